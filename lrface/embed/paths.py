"""Folders of images into one file of vectors, on one machine or many, resumable after a kill; and videos."""

import csv
import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lrface
from lrface.embed.embedder import FaceEmbedder, _Call
from lrface.embed.intake import _Item
from lrface.embed.loading import load_embedder
from lrface.embed.results import Embeddings, _joined
from lrface.embed.video import Frame, is_video
from lrface.errors import LrfaceError, UsageError
from lrface.files import atomic_file
from lrface.progress import progress as progress_bar


@dataclass(frozen=True)
class EmbedSummary:
    """What :func:`embed_paths` did.

    Attributes:
        images: files tried.
        embedded: files that gave at least one face.
        faces: rows written.
        failures: files listed in ``failures_file``.
        out: the file of vectors.
        failures_file: CSV, columns ``path`` and ``reason``; only a header when nothing failed.
        seconds: wall time.
        unit, source: what ``images`` and ``failures`` count: "images" both, or of videos "frames" and "videos".
    """

    images: int
    embedded: int
    faces: int
    failures: int
    out: Path
    failures_file: Path
    seconds: float
    unit: str = "images"
    source: str = "images"


def embed_paths(
    embedder: FaceEmbedder,
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    kind: str = "auto",
    faces: str = "largest-central",
    flip: bool = False,
    batch_size: int = 64,
    workers: int | None = None,
    fallback: str = "skip",
    engine: str = "local",
    address: str | None = None,
    progress: bool = True,
) -> EmbedSummary:
    """Embed files and folders of images into one file of vectors.

    Folders are searched with everything below them; hidden files and files that are no images by name are
    passed over there, while a file named itself is always tried. An image that cannot be read or shows no
    face is listed in ``OUT.failures.csv`` with its reason and the job goes on. Memory stays bounded whatever
    the number of images. A run that was killed goes on where it stopped when the same command is given again:
    finished parts wait in the hidden folder ``.OUT.parts`` and are used when model, settings, files, sizes
    and times of change are the same.

    Args:
        embedder: the model.
        paths: files and folders.
        out: ``.parquet``, with the columns path (string), face (int32, which face of the image, from 0),
            vector (fixed_size_list<float32>[d], of unit length), box (fixed_size_list<float32>[4]), score
            (float32), landmarks (fixed_size_list<float32>[10]: x0, y0, ..., x4, y4), effective_resolution
            and quality (float32), and with ``quality="reconstruction"`` reconstruction_error (float32), as in
            :class:`Embeddings`; or ``.npz`` with arrays of these names. The schema metadata
            (in a .npz the string array ``metadata``, JSON) has ``lrface_model``, ``lrface_model_sha256``,
            ``lrface_version``, and as JSON ``lrface_card`` and ``lrface_settings``. A file that is there
            already is replaced when the new one is whole.
        kind, faces, flip, batch_size, fallback: as in :meth:`FaceEmbedder.embed`.
        engine: "local", or "ray": workers are actors of a Ray cluster, one thread each, and embed one part at a
            time; ``paths`` and ``out`` must lie where every machine sees them. Needs an embedder that
            :func:`load_embedder` made without a detector of your own.
        workers: "local": as in :meth:`FaceEmbedder.embed`; "ray": actors, None for one a CPU (or GPU).
        address: of the Ray cluster; None starts one on this machine for the run.
        progress: draw a bar on standard error.

    Raises:
        UsageError: an option with a wrong value, or another ending of ``out``.
        LrfaceError: no image was found, or none gave a face (the reasons are listed all the same), or ``out``
            cannot be written.
    """
    started = time.monotonic()
    call = _Call(kind, faces, flip, batch_size, "skip", fallback)
    if engine not in ("local", "ray"):
        raise UsageError(f"engine must be local or ray; found {engine!r}")
    if address is not None and engine != "ray":
        raise UsageError("address is that of a Ray cluster: give engine ray with it")
    if engine == "ray" and embedder._made_by is None:
        raise UsageError(
            "engine ray makes the embedder once more on each machine, which a detector of your own bars"
        )
    out = _checked_out(out)
    failures_file = out.with_name(out.name + ".failures.csv")
    files = find_images(paths)
    settings = {"kind": kind, "faces": faces, "flip": flip, "fallback": fallback, **embedder._settings()}
    metadata = _metadata(embedder, settings)
    parts = out.with_name(f".{out.name}.parts")
    _claim(parts, _fingerprint(metadata, files))
    starts = range(0, len(files), _PART_IMAGES)
    names = [parts / f"part-{start // _PART_IMAGES:06d}.parquet" for start in starts]
    done = sum(
        min(_PART_IMAGES, len(files) - start)
        for start, name in zip(starts, names, strict=True)
        if name.exists()
    )
    with progress_bar(len(files), "embed", unit="images", initial=done, enabled=progress) as bar:
        missing = [(start, name) for start, name in zip(starts, names, strict=True) if not name.exists()]
        tasks = (
            ([str(file) for file in files[start : start + _PART_IMAGES]], name) for start, name in missing
        )
        if engine == "local":
            for labels, name in tasks:
                _embed_part(embedder, labels, labels, name, call, metadata, workers, bar.advance)
        elif missing:
            from lrface.cluster import on_ray

            assert embedder._made_by is not None
            crew = _RayCrew(*embedder._made_by, embedder.model_sha256, call, metadata)
            given = [
                (labels, [os.path.abspath(label) for label in labels], name.resolve())
                for labels, name in tasks
            ]
            gpus = 1 if embedder._device.type == "cuda" else 0
            for at, _ in on_ray(crew.worker, given, workers, address, gpus):
                bar.advance(len(given[at][0]))
    summary = _merge(names, out, failures_file, len(files), metadata, started)
    _remove(parts)
    if summary.faces == 0:
        raise LrfaceError(
            f"none of {len(files)} images gave a face, so {out} was not written; {failures_file} has the "
            "reasons"
        )
    return summary


def _embed_part(
    embedder: FaceEmbedder,
    labels: Sequence[str],
    paths: Sequence[str],
    name: Path,
    call: _Call,
    metadata: Mapping[str, str],
    workers: int | None,
    advance: Callable[[int], None],
) -> None:
    """Embed the files ``paths``, called ``labels``, into the part ``name``."""
    blocks = []
    items = [_Item(i, label, path) for i, (label, path) in enumerate(zip(labels, paths, strict=True))]
    for block in embedder._blocks(items, call, workers):
        blocks.append(block)
        advance(len(set(block.source.tolist()) | {index for index, _ in block.failures}))
    _write_part(name, labels, _joined(blocks, embedder.embedding_size, embedder._reconstructs), metadata)


@dataclass(frozen=True)
class _RayCrew:
    """What an actor needs to embed parts."""

    model: str | Path
    options: dict[str, Any]
    model_sha256: str
    call: _Call
    metadata: dict[str, str]

    def worker(self) -> "Callable[[tuple[list[str], list[str], Path]], None]":
        """Made in the actor's process. Raises LrfaceError where it cannot work."""
        torch.set_num_threads(1)
        embedder = load_embedder(self.model, threads=1, **self.options)
        if embedder.model_sha256 != self.model_sha256:
            raise LrfaceError(
                f"{embedder.file} on {platform.node()} is another file than here; every machine of the cluster must "
                "see the same model"
            )

        def work(task: tuple[list[str], list[str], Path]) -> None:
            labels, paths, name = task
            if not name.parent.is_dir():
                raise LrfaceError(
                    f"{name.parent} is not there on {platform.node()}: images and OUT must lie where every machine "
                    "of the cluster sees them"
                )
            _embed_part(embedder, labels, paths, name, self.call, self.metadata, 1, lambda _: None)

        return work


def are_videos(paths: Sequence[str | Path]) -> bool:
    """Whether these paths are for :func:`embed_videos`. Raises UsageError where some are and some are not."""
    videos = [is_video(path) for path in paths]
    if any(videos) and not all(videos):
        raise UsageError(
            f"{paths[videos.index(True)]} is a video and {paths[videos.index(False)]} is none; embed them in two calls, "
            "since frames have columns of their own"
        )
    return any(videos)


def embed_videos(
    embedder: FaceEmbedder,
    sources: Sequence[str | Path | int],
    out: str | Path,
    *,
    every: int = 1,
    limit: int | None = None,
    faces: str = "all",
    flip: bool = False,
    batch_size: int = 16,
    progress: bool = True,
) -> EmbedSummary:
    """Embed the faces of videos, streams or cameras, one after the other, into one file of vectors.

    A video that cannot be opened or breaks off is listed with its reason in ``OUT.failures.csv``; its frames before that
    are kept. Ctrl-C ends a camera or stream, keeps what there is, and is then passed on.

    Args:
        sources, every, limit, faces, flip, batch_size: as in :meth:`FaceEmbedder.embed_video`, for each source.
        out: as in :func:`embed_paths`, with the columns ``frame`` (int64) and ``seconds`` (float64) more; ``path`` is
            the source.

    Returns:
        A summary in which ``images`` counts frames looked at, ``embedded`` those with a face, ``failures`` videos.

    Raises:
        UsageError: an option with a wrong value, or another ending of ``out``.
        LrfaceError: no frame showed a face (``out`` is not written), or ``out`` cannot be written.
    """
    started = time.monotonic()
    out = _checked_out(out)
    failures_file = out.with_name(out.name + ".failures.csv")
    settings = {"kind": "photo", "every": every, "faces": faces, "flip": flip, **embedder._settings()}
    metadata = _metadata(embedder, settings)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=_made_folder(out)) as made:
        folder = Path(made)
        names: list[Path] = []
        looked = shown = 0
        interrupted = None
        with progress_bar(None, "embed", unit="frames", enabled=progress) as bar:
            for source in sources:
                waiting: list[Frame] = []
                reason = None
                try:
                    for frame in embedder.embed_video(
                        source, every=every, limit=limit, faces=faces, flip=flip, batch_size=batch_size
                    ):
                        waiting.append(frame)
                        looked += 1
                        shown += len(frame.faces) > 0
                        bar.advance(faces=len(frame.faces))
                        if len(waiting) >= _PART_IMAGES:
                            names.append(folder / f"part-{len(names):06d}.parquet")
                            _write_frames(names[-1], str(source), waiting, embedder, metadata)
                            waiting = []
                except UsageError:
                    raise
                except LrfaceError as error:
                    reason = str(error)
                except KeyboardInterrupt as stopped:
                    interrupted = stopped
                names.append(folder / f"part-{len(names):06d}.parquet")
                _write_frames(names[-1], str(source), waiting, embedder, metadata, reason)
                if interrupted is not None:
                    break
        summary = _merge(names, out, failures_file, looked, metadata, started)
    if interrupted is not None:
        raise interrupted
    if summary.faces == 0:
        raise LrfaceError(
            f"none of {looked} frames of {', '.join(map(str, sources))} gave a face, so {out} was not written; "
            f"{failures_file} names videos that cannot be read"
        )
    return replace(summary, embedded=shown, unit="frames", source="videos")


def _write_frames(
    name: Path,
    source: str,
    frames: Sequence[Frame],
    embedder: FaceEmbedder,
    metadata: Mapping[str, str],
    reason: str | None = None,
) -> None:
    """Consecutive frames of one video as a part; ``reason`` is why the video ended, where that is a failure."""
    faces = [replace(each.faces, failures=[]) for each in frames]
    found = _joined(faces, embedder.embedding_size, embedder._reconstructs)
    found.source = np.repeat(np.arange(len(frames)), [len(each) for each in faces])
    found.failures = [] if reason is None else [(0, reason)]
    more = {
        "frame": np.array([each.frame for each in frames], np.int64),
        "seconds": np.array([each.seconds for each in frames], np.float64),
    }
    _write_part(name, [source] * max(1, len(frames)), found, metadata, more)


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """The files that ``paths`` name, folders replaced by the images below them in sorted order, each once.

    Raises LrfaceError when there is none.
    """
    from lrface.align.pipeline import IMAGE_SUFFIXES

    found: dict[Path, None] = {}
    for each in paths:
        path = Path(each).expanduser()
        if not path.is_dir():
            found[path] = None
            continue
        for folder, below, names in os.walk(path):
            below[:] = sorted(name for name in below if not name.startswith("."))
            for name in sorted(names):
                if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES:
                    found[Path(folder) / name] = None
    if not any(path.is_file() for path in found):
        given = ", ".join(str(each) for each in paths) or "no path"
        raise LrfaceError(
            f"no images found in {given}; give image files, or folders of {', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    return list(found)


def _checked_out(out: str | Path) -> Path:
    out = Path(out)
    if out.suffix not in _MERGERS:
        raise UsageError(
            f"{out}: vectors are written to {' or '.join(_MERGERS)}; found the ending {out.suffix!r}"
        )
    return out


def _made_folder(out: Path) -> Path:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LrfaceError(f"{out.parent} cannot be made: {error}") from error
    return out.parent


def _metadata(embedder: FaceEmbedder, settings: Mapping[str, Any]) -> dict[str, str]:
    return {
        "lrface_model": embedder.name,
        "lrface_model_sha256": embedder.model_sha256,
        "lrface_version": lrface.__version__,
        "lrface_card": json.dumps(embedder.card),
        "lrface_settings": json.dumps(settings),
    }


# Images in a part: what a killed run loses at most, and what is in memory at once.
_PART_IMAGES = 1024


def _text(path: str | Path) -> str:
    """A path as text that can be written: bytes that are no UTF-8 are written out, as in lrface.align."""
    return str(path).encode("utf-8", "backslashreplace").decode("utf-8")


def _fingerprint(metadata: Mapping[str, str], files: Sequence[Path]) -> str:
    digest = hashlib.sha256(json.dumps([metadata, _PART_IMAGES], sort_keys=True).encode())
    for file in files:
        try:
            state = file.stat()
            seen = f"{state.st_size} {state.st_mtime_ns}"
        except OSError as error:
            seen = str(error)
        digest.update(b"\0" + os.fsencode(file) + b"\0" + seen.encode("utf-8", "replace"))
    return digest.hexdigest()


def _claim(parts: Path, fingerprint: str) -> None:
    """Make ``parts`` the folder of the job ``fingerprint``, emptied when it was another job's."""
    mark = parts / "job"
    if mark.is_file() and mark.read_text(encoding="utf-8") == fingerprint:
        return
    _remove(parts)
    with atomic_file(mark) as aside:
        aside.write_text(fingerprint, encoding="utf-8")


def _remove(parts: Path) -> None:
    import shutil

    if parts.exists():
        shutil.rmtree(parts)


def _write_part(
    name: Path,
    labels: Sequence[str],
    found: Embeddings,
    metadata: Mapping[str, str],
    more: Mapping[str, np.ndarray] | None = None,
) -> None:
    """``more`` has further columns, an entry an image."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    source = found.source
    # Which face of its image each row is: rows of one image are consecutive.
    first = np.searchsorted(source, source, side="left")
    columns = {
        "path": pa.array([_text(labels[i]) for i in source], pa.string()),
        "face": pa.array(np.arange(len(source)) - first, pa.int32()),
        "vector": _fixed_size(found.vectors),
        "box": _fixed_size(found.box),
        "score": pa.array(found.score, pa.float32()),
        "landmarks": _fixed_size(found.landmarks.reshape(-1, 10)),
        "effective_resolution": pa.array(found.effective_resolution, pa.float32()),
        "quality": pa.array(found.quality, pa.float32()),
    }
    if found.reconstruction_error is not None:
        columns["reconstruction_error"] = pa.array(found.reconstruction_error, pa.float32())
    columns |= {key: pa.array(values[source]) for key, values in (more or {}).items()}
    failures = [[_text(labels[index]), reason] for index, reason in found.failures]
    table = pa.table(columns).replace_schema_metadata({**metadata, _FAILURES: json.dumps(failures)})
    with atomic_file(name) as aside:
        pq.write_table(table, aside, compression="none")


# A part's failures travel in its own schema metadata, so that a part is one file, there or not.
_FAILURES = "failures"


def _fixed_size(rows: np.ndarray) -> Any:
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1), pa.float32()), rows.shape[1])


def _merge(
    parts: Sequence[Path],
    out: Path,
    failures_file: Path,
    images: int,
    metadata: Mapping[str, str],
    started: float,
) -> EmbedSummary:
    """All parts into ``out`` and ``failures_file``; ``out`` is left alone when no part has a face."""
    import pyarrow.parquet as pq

    faces = failed = embedded = 0
    with atomic_file(failures_file) as aside, aside.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "reason"])
        for part in parts:
            with pq.ParquetFile(part) as opened:
                listed = json.loads(opened.schema_arrow.metadata[_FAILURES.encode()])
                embedded += len(set(opened.read(["path"])["path"].to_pylist()))
                faces += opened.metadata.num_rows
            rows.writerows(listed)
            failed += len(listed)
    if faces:
        with atomic_file(out) as aside:
            _MERGERS[out.suffix](parts, aside, metadata)
    return EmbedSummary(images, embedded, faces, failed, out, failures_file, time.monotonic() - started)


def _merge_parquet(parts: Sequence[Path], out: Path, metadata: Mapping[str, str]) -> None:
    import pyarrow.parquet as pq

    schema = pq.read_schema(parts[0]).with_metadata(dict(metadata))
    # Vectors do not compress; paths do, and zstd is cheap.
    with pq.ParquetWriter(out, schema, compression={"path": "zstd"}, use_dictionary=False) as writer:
        for part in parts:
            table = pq.read_table(part)
            if table.num_rows:
                writer.write_table(table.replace_schema_metadata(dict(metadata)))


def _merge_npz(parts: Sequence[Path], out: Path, metadata: Mapping[str, str]) -> None:
    """A .npz array by array and part by part: no array is ever whole in memory."""
    import zipfile

    import pyarrow.parquet as pq

    total = sum(pq.read_metadata(part).num_rows for part in parts)
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:

        def member(name: str, dtype: np.dtype, shape: tuple[int, ...], arrays: Iterable[np.ndarray]) -> None:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                header = {
                    "descr": np.lib.format.dtype_to_descr(dtype),
                    "fortran_order": False,
                    "shape": shape,
                }
                np.lib.format.write_array_header_1_0(file, header)
                for array in arrays:
                    file.write(np.ascontiguousarray(array, dtype=dtype).tobytes())

        def column(name: str) -> Iterator[np.ndarray]:
            for part in parts:
                values = pq.read_table(part, columns=[name])[name].combine_chunks()
                if name == "path":
                    yield np.array(values.to_pylist(), dtype=np.str_)
                elif isinstance(width := getattr(values.type, "list_size", None), int):
                    yield values.flatten().to_numpy().reshape(-1, width)
                else:
                    yield values.to_numpy()

        longest = max((array.dtype for array in column("path")), key=lambda dtype: dtype.itemsize)
        for name in pq.read_schema(parts[0]).names:
            sample = next(column(name))
            dtype = longest if name == "path" else sample.dtype
            member(name, dtype, (total, *sample.shape[1:]), column(name))
        described = np.array(json.dumps(dict(metadata)))
        member("metadata", described.dtype, (), [described])


_MERGERS = {".parquet": _merge_parquet, ".npz": _merge_npz}
