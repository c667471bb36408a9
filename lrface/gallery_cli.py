"""`lrface gallery`: parse, call, print."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lrface.errors import errors_for_users
from lrface.shipped import NAME as SHIPPED

gallery_app = typer.Typer(
    help="Enrol people, find out who is in a photograph, remove people for good.", no_args_is_help=True
)

GalleryPlace = Annotated[
    str, typer.Argument(metavar="GALLERY", help="Folder; with --backend milvus the name of a collection.")
]
Backend = Annotated[str, typer.Option("--backend", help="folder or milvus.")]
Uri = Annotated[
    str | None,
    typer.Option(
        "--uri", help="Milvus: a file NAME.db (Milvus Lite) or http://HOST:19530 (server, cluster)."
    ),
]
Token = Annotated[
    str | None,
    typer.Option("--token", envvar="LRFACE_MILVUS_TOKEN", help="Milvus: user:password.", show_envvar=True),
]
ModelName = Annotated[
    str,
    typer.Option(
        "--model",
        help="The model whose vectors the gallery holds, as in `lrface embed`; another is refused. Shipped: the model "
        "inside lrface.",
    ),
]
Kind = Annotated[
    str, typer.Option("--kind", help="crop (aligned square faces), photo (detect and align), auto by size.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Batch = Annotated[int, typer.Option("--batch-size", help="Faces embedded at once.")]
DetectorModel = Annotated[
    Path | None,
    typer.Option(
        "--detector-model", help="SCRFD or RetinaFace .onnx file that finds faces; default: MTCNN, included."
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else there.")
]

_SHOWN = 20


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False))


def _list_failures(failures: list[tuple[str, str]]) -> None:
    for image, reason in failures[:_SHOWN]:
        _say(f"{image}: {reason}")
    if len(failures) > _SHOWN:
        _say(f"and {len(failures) - _SHOWN} more; --json lists all")


@gallery_app.command()
def add(
    gallery: GalleryPlace,
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="SOURCE...",
            help="Folder with a folder for each person, or CSV file with the columns path and name; with --name "
            "images and folders of images.",
        ),
    ],
    model: ModelName = SHIPPED,
    name: Annotated[str | None, typer.Option("--name", help="All images are of this person.")] = None,
    kind: Kind = "auto",
    pooling: Annotated[
        str | None,
        typer.Option(
            "--pooling",
            help="New gallery: how a person's images become one vector, mean (default) or norm (by clearness).",
        ),
    ] = None,
    flip: Annotated[
        bool | None,
        typer.Option(
            "--flip/--no-flip", help="New gallery: embed the mirrored face too (default), here and in probes."
        ),
    ] = None,
    index: Annotated[
        str | None,
        typer.Option(
            "--index",
            help="Search from now on by: exact, hnsw, ivf, or auto: exact up to a million people, then hnsw.",
        ),
    ] = None,
    device: Device = "auto",
    batch_size: Batch = 64,
    detector_model: DetectorModel = None,
    backend: Backend = "folder",
    uri: Uri = None,
    token: Token = None,
    json_output: Json = False,
) -> None:
    """Enrol people; the gallery is made when it is not there.

    More images of somebody are pooled with the earlier ones; the same image again changes nothing. Images that are broken
    or show no face are listed. What was enrolled when the command is stopped or killed stays; the same command goes on.
    """
    with errors_for_users():
        from lrface.embed import open_model
        from lrface.gallery import enrol

        report = enrol(
            gallery,
            sources,
            lambda: open_model(model, device=device, detector_model=detector_model),
            name=name,
            pooling=pooling,
            flip=flip,
            index=index,
            kind=kind,
            batch_size=batch_size,
            backend=backend,
            uri=uri,
            token=token,
        )
        if json_output:
            _print_json(report.to_dict())
        else:
            _list_failures(report.failures)
            print(report)
        if not report.enrolled and not report.already:
            raise typer.Exit(1)


@gallery_app.command()
def search(
    gallery: GalleryPlace,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES...", help="Photographs, crops, folders.")],
    model: ModelName = SHIPPED,
    top: Annotated[int, typer.Option("--top", help="Candidates for each face.")] = 5,
    threshold: Annotated[
        float | None,
        typer.Option(
            "--threshold",
            help="Cosine from which on it is that person; default: the model's own at the probe's resolution.",
        ),
    ] = None,
    faces: Annotated[
        str, typer.Option("--faces", help="Which faces of a photograph: largest-central, largest or all.")
    ] = "largest-central",
    kind: Kind = "auto",
    device: Device = "auto",
    batch_size: Batch = 64,
    detector_model: DetectorModel = None,
    backend: Backend = "folder",
    uri: Uri = None,
    token: Token = None,
    json_output: Json = False,
) -> None:
    """Who is in photographs: a name, or unknown where nobody reaches the threshold, and the people most alike."""
    with errors_for_users():
        from lrface.embed import find_images, open_model
        from lrface.gallery import Gallery, matches_text

        files = find_images(images)
        embedder = open_model(model, device=device, detector_model=detector_model)
        with Gallery.open(gallery, embedder, backend=backend, uri=uri, token=token) as opened:
            found = opened.search(
                files, k=top, threshold=threshold, faces=faces, kind=kind, batch_size=batch_size
            )
        failures = [(str(files[position]), reason) for position, reason in found.failures]
        if json_output:
            results = [{"image": str(files[match.source]), **match.to_dict()} for match in found.matches]
            _print_json({"results": results, "failures": failures})
        else:
            _list_failures(failures)
            print(matches_text(found, [str(file) for file in files]))
        if not found.matches:
            raise typer.Exit(1)


@gallery_app.command()
def remove(
    gallery: GalleryPlace,
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="People as they were enrolled.")],
    backend: Backend = "folder",
    uri: Uri = None,
    token: Token = None,
    json_output: Json = False,
) -> None:
    """Delete people: vectors, names and paths. In a folder no byte of them stays in its files; Milvus drops what it deleted
    when it compacts, see docs/gallery.md."""
    with errors_for_users():
        from lrface.gallery import Gallery

        with Gallery.open(gallery, backend=backend, uri=uri, token=token) as opened:
            done = opened.remove(names, progress=True)
        if json_output:
            _print_json({"removed": done.removed, "absent": done.absent})
        else:
            for name, count in done.removed.items():
                print(f"removed {name}: {count} images")
            for name in done.absent:
                _say(f"nobody here is called {name!r}")
        if done.absent:
            raise typer.Exit(1)


@gallery_app.command()
def info(
    gallery: GalleryPlace,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Also check that it is the gallery's model, and show its thresholds."),
    ] = None,
    people: Annotated[bool, typer.Option("--people", help="Also list everybody.")] = False,
    backend: Backend = "folder",
    uri: Uri = None,
    token: Token = None,
    json_output: Json = False,
) -> None:
    """How many people and images, which model, how it is searched."""
    with errors_for_users():
        from lrface.embed import open_model
        from lrface.gallery import Gallery

        embedder = open_model(model) if model is not None else None
        with Gallery.open(gallery, embedder, backend=backend, uri=uri, token=token) as opened:
            said = opened.info()
            names = opened.names() if people else None
        if json_output:
            _print_json(said if names is None else {**said, "names": names})
            return
        for key, value in said.items():
            print(f"{key.replace('_', ' '):20} {value}")
        for name, count in (names or {}).items():
            print(f"{name}: {count} images")
