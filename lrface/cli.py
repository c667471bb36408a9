"""The command line: parse, call, print."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import lrface
from lrface.errors import errors_for_users
from lrface.gallery_cli import gallery_app
from lrface.serve_cli import serve, ui
from lrface.shipped import NAME as SHIPPED

app = typer.Typer(
    help="Face recognition for faces of any resolution: align, train, verify, embed, compare.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def say(message: str) -> None:
    """Messages go to standard error; standard output is for results."""
    print(message, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False))


Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else there.")
]
DataRoot = Annotated[
    Path | None,
    typer.Option(
        "--data", help="Folder that data is looked for in; else $LRFACE_DATA, else ~/.cache/lrface."
    ),
]

DetectorModel = Annotated[
    Path | None,
    typer.Option(
        "--detector-model", help="SCRFD or RetinaFace .onnx file that finds faces; default: MTCNN, included."
    ),
]
Fallback = Annotated[
    str,
    typer.Option(
        "--fallback", help="A photograph without a face: skip it, or center takes its middle square."
    ),
]
Engine = Annotated[
    str, typer.Option("--engine", help="local: processes here; ray: actors on the machines of a Ray cluster.")
]
ModelName = Annotated[
    str,
    typer.Option(
        "--model",
        help="A run of `lrface train`, a .safetensors, .onnx or .pt2 (torch.export) file, or module:function; an .onnx or "
        ".pt2 file of others takes FILE@colour=BGR,mean=0.5,std=0.5. Shipped: the model inside lrface.",
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--address", help="Ray cluster (auto, host:6379); default: one of this machine, for the run."
    ),
]

FaceRule = Annotated[
    str, typer.Option("--faces", help="Which faces of a photograph: largest-central, largest or all.")
]
Resolutions = Annotated[str, typer.Option("--resolutions", help="Test sizes in pixels.")]
Pairs = Annotated[Path | None, typer.Option("--pairs", help="pairs.txt for a folder that has none in it.")]
Down = Annotated[str, typer.Option("--down", help="Kernel down: nearest, area, bilinear, bicubic.")]
Up = Annotated[str, typer.Option("--up", help="Kernel up again: nearest, area, bilinear, bicubic.")]
FaceQuality = Annotated[
    str,
    typer.Option(
        "--quality",
        help="norm: length of the feature; reconstruction: also the error of what the model's decoder draws (runs of "
        "QualNet).",
    ),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Precision = Annotated[str, typer.Option("--precision", help="float32 or bfloat16.")]
ImageBatch = Annotated[int, typer.Option("--batch-size", help="Images embedded at once.")]
AlignWorkers = Annotated[int | None, typer.Option("--workers", help="Processes that align photographs.")]
KeepFeatures = Annotated[
    bool,
    typer.Option(
        "--keep-features/--no-keep-features",
        help="Keep features in the cache, so that the same test is instant the second time.",
    ),
]
FlipFaces = Annotated[bool, typer.Option("--flip/--no-flip", help="Add the features of the mirrored face.")]
FaceBatch = Annotated[int, typer.Option("--batch-size", help="Faces embedded at once.")]


def _version(value: bool) -> None:
    if value:
        print(f"lrface {lrface.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    recipe: Annotated[
        str, typer.Argument(help="A recipe file, or the name of a shipped recipe (see `lrface recipes`).")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Fields to change, dotted: seed=1 out=runs/x data.batch_size=64 stages.0.epochs=2",
        ),
    ] = None,
    data: DataRoot = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Delete an earlier run in the same place.")
    ] = False,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Go on with an earlier run although the recipe changed.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Only check the recipe and print it resolved.")
    ] = False,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile",
            help="Only take a few dozen steps of the first stage: where their time goes, and a trace in OUT/profile.",
        ),
    ] = False,
    replay: Annotated[
        Path | None,
        typer.Option(
            "--replay", help="Only run a batch again that failed, saved in OUT/stages/STAGE/failed."
        ),
    ] = None,
    json_output: Json = False,
) -> None:
    """Train a recipe, from where the same command stopped last time.

    The run goes to the recipe's `out` (runs/NAME): model.safetensors and model.json at the end, checkpoints,
    metrics.csv and TensorBoard events for each stage in stages/. Ctrl-C, SIGTERM and SIGUSR1 write a checkpoint first;
    after a kill the run goes on from its newest checkpoint.
    """
    with errors_for_users():
        from dataclasses import asdict

        from lrface import config, recipes
        from lrface.train import launch
        from lrface.train.signals import Interrupted

        loaded = recipes.load_recipe(recipe, overrides or [])
        if check:
            methods = [recipes.build_method(loaded, stage, identities=2) for stage in loaded.stages]
            recipes.check_loads(loaded, methods)
            print_json(config.to_plain(loaded)) if json_output else print(config.to_yaml(loaded), end="")
            return
        if profile or replay:
            from lrface import diagnose

            found = (
                diagnose.replay_failed(loaded, replay, data=data, say=say)
                if replay
                else diagnose.profile_recipe(loaded, data=data, say=say)
            )
            print_json(asdict(found)) if json_output else print(found)
            return
        if launch.wanted(loaded.trainer.devices, loaded.trainer.nodes):
            launch.check_batch(loaded.data.batch_size, loaded.trainer.devices * loaded.trainer.nodes)
            command = [sys.executable, "-m", "lrface.cli", *sys.argv[1:]]
            raise typer.Exit(launch.launch(command, loaded.trainer.devices, loaded.trainer.nodes, say))
        try:
            summary = recipes.run_recipe(
                loaded, data=data, restart=restart, accept_changes=accept_changes, say=say
            )
        except Interrupted as stopped:
            if launch.is_first():
                say(str(stopped))
            raise typer.Exit(stopped.exit_code) from stopped
        if not launch.is_first():
            return
        for entry in summary.stages:
            if "seconds" in entry:
                say(
                    f"stage {entry['name']}: steps {entry['resumed_at']} to {entry['steps']} in "
                    f"{entry['seconds']:.0f} s, {entry['images_per_second']:.0f} images/s, "
                    + ", ".join(
                        f"{key} {value:.4g}"
                        for key, value in entry["logs"].items()
                        if key != "images_per_second"
                    )
                )
        print_json(asdict(summary)) if json_output else print(f"model: {summary.model}")


@app.command()
def robustify(
    model: Annotated[
        str,
        typer.Argument(
            help="A run of `lrface train`, a .safetensors or .onnx file, or module:function that gives a "
            "torch.nn.Module; an .onnx file of others takes FILE@colour=BGR,mean=0.5,std=0.5."
        ),
    ],
    data: Annotated[
        Path, typer.Option("--data", help="Aligned faces in any format that lrface reads, labels optional.")
    ],
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the run; runs/robust-NAME.")] = None,
    minutes: Annotated[
        float | None, typer.Option("--minutes", help="Time for all of it; 45 unless --steps is given.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Steps of the second stage, instead.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a field of the recipe: trainer.threads=1; may be repeated."),
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Delete an earlier run in the same place.")
    ] = False,
    json_output: Json = False,
) -> None:
    """Teach a recogniser that exists low resolutions, on aligned faces of your own.

    A decoder is trained for the recogniser's map of features, then the recogniser on degraded faces, with itself as it was
    for a teacher. The run is like those of `lrface train`; the same command goes on where it stopped.
    """
    with errors_for_users():
        from dataclasses import asdict

        from lrface.robustify import robustify as run
        from lrface.train.signals import Interrupted

        try:
            found = run(
                model,
                data,
                out,
                minutes=minutes,
                steps=steps,
                overrides=settings or [],
                restart=restart,
                say=say,
            )
        except Interrupted as stopped:
            say(str(stopped))
            raise typer.Exit(stopped.exit_code) from stopped
        print_json(asdict(found)) if json_output else print(f"model: {found.model}")


@app.command(name="recipes")
def list_recipes(
    action: Annotated[str, typer.Argument(help="list, show or copy.")] = "list",
    name: Annotated[str | None, typer.Argument(help="Recipe to show or copy.")] = None,
    destination: Annotated[
        Path | None, typer.Argument(help="Where to copy to; default: the recipe's file name here.")
    ] = None,
    json_output: Json = False,
) -> None:
    """List the shipped recipes, show one, or copy one to change it."""
    with errors_for_users():
        from lrface import config, recipes
        from lrface.errors import UsageError
        from lrface.files import write_text

        if action == "list":
            found = {
                key: config.parse_recipe(config.read_yaml(path))
                for key, path in recipes.shipped_recipes().items()
            }
            if json_output:
                print_json({key: recipe.description for key, recipe in found.items()})
            else:
                width = max(map(len, found), default=0)
                for key, recipe in found.items():
                    print(f"{key:{width}}  {recipe.description}")
            return
        if action not in ("show", "copy") or name is None:
            raise UsageError(
                "usage: lrface recipes [list], lrface recipes show NAME, lrface recipes copy NAME [FILE]"
            )
        path = recipes.find_recipe(name)
        if action == "show":
            print(path.read_text(encoding="utf-8"), end="")
            return
        target = destination or Path(path.name)
        if target.exists():
            raise UsageError(f"{target} exists; give another file name")
        write_text(target, path.read_text(encoding="utf-8"))
        say(f"copied to {target}; train it with: lrface train {target}")


@app.command()
def runs(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FOLDER]... | compare RUN RUN...",
            help="Folders that runs are looked for in, default: runs; or compare and two runs or more.",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="With compare: draw losses and validation accuracies, FILE.png."),
    ] = None,
    json_output: Json = False,
) -> None:
    """List the runs of `lrface train` in a folder, or compare some side by side.

    A list says of each run how far it is, whether a process is working on it, its speed, loss and accuracy on held-out
    identities. A comparison shows the keys of the recipes that differ, and what the runs came to.
    """
    with errors_for_users():
        from lrface.errors import UsageError
        from lrface.runs import compare_runs, draw_comparison, list_runs, runs_table

        places = folders or [Path("runs")]
        if str(places[0]) != "compare":
            if plot is not None:
                raise UsageError("--plot belongs to lrface runs compare RUN RUN...")
            reports = [report for place in places for report in list_runs(place)]
            print_json({"runs": [r.to_dict() for r in reports]}) if json_output else print(
                runs_table(reports)
            )
            return
        comparison = compare_runs(places[1:])
        if plot is not None:
            draw_comparison(comparison, plot)
            say(f"written: {plot}")
        print_json(comparison.to_dict()) if json_output else print(comparison.to_text())


def parse_sizes(text: str) -> list[int]:
    """ "112,56" -> [112, 56]. Raises UsageError for anything that is no list of whole numbers."""
    from lrface.errors import UsageError

    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--resolutions takes whole numbers such as 112,56,28,14; found {text!r}") from error
    return sizes


def parse_test_sizes(text: str) -> tuple[list[int], bool]:
    """ "native,56,28" -> ([56, 28], True): sizes, and whether images are also taken as they are."""
    parts = [part.strip() for part in text.split(",")]
    named = [part for part in parts if part != "native"]
    native = len(named) < len(parts)
    return ([] if native and not named else parse_sizes(",".join(named))), native


@app.command()
def align(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of identity folders of photographs.")],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder for the packed, aligned faces and report.csv.")
    ],
    size: Annotated[int, typer.Option("--size", help="Side of the aligned faces in pixels.")] = 112,
    faces: FaceRule = "largest-central",
    workers: Annotated[
        int | None, typer.Option("--workers", help="Worker processes; default: one a core.")
    ] = None,
    detector_model: DetectorModel = None,
    min_face_size: Annotated[
        int | None,
        typer.Option("--min-face-size", help="Smallest face that MTCNN looks for, in pixels; default: 20."),
    ] = None,
    min_score: Annotated[
        float | None,
        typer.Option("--min-score", help="How sure the detector must be, 0 to 1; default: its own."),
    ] = None,
    fallback: Fallback = "skip",
    image_format: Annotated[
        str, typer.Option("--format", help="How faces are stored: jpeg or png.")
    ] = "jpeg",
    quality: Annotated[int, typer.Option("--quality", help="JPEG quality, 1 to 100.")] = 95,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    engine: Engine = "local",
    address: RayAddress = None,
    json_output: Json = False,
) -> None:
    """Find faces in photographs, align them to five points and pack them for training.

    SRC holds one folder for each identity. OUT gets Arrow shards, index.json and report.csv, which says of every
    file what became of it. The same command goes on after a kill and ends with the same data.
    """
    with errors_for_users():
        from lrface.align.pipeline import align_folder

        summary = align_folder(
            source,
            out,
            image_size=size,
            face_rule=faces,
            workers=workers,
            detector_model=detector_model,
            min_score=min_score,
            min_face_size=min_face_size,
            fallback=fallback,
            image_format=image_format,
            quality=quality,
            device=device,
            engine=engine,
            address=address,
        )
        print_json(summary.to_dict()) if json_output else print(summary)


@app.command()
def pack(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            help="Training data of any format: a folder of crops, train.rec, Parquet, Arrow, tar shards, a carray; "
            "with --to bin a benchmark, by name or path.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="Folder to write (with --to bin a file); it must not be there yet."
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="arrow (lrface's own), rec, bcolz, memfile, parquet, webdataset, or bin (InsightFace's verification pack).",
        ),
    ] = "arrow",
    size: Annotated[
        int | None, typer.Option("--size", help="Resize images of another size to this side in pixels.")
    ] = None,
    data: DataRoot = None,
    json_output: Json = False,
) -> None:
    """Convert aligned faces from any format into one that trains fast, or into one of another tool.

    Image files are kept byte for byte; labels, names and order too. Broken images are left out and listed. OUT
    appears when it is whole; an interrupted run leaves nothing that looks like data.
    """
    with errors_for_users():
        from lrface.data import convert

        if to == "bin":
            from lrface.benchmarks.packs import benchmark_to_pack
            from lrface.errors import UsageError

            if out.exists():
                raise UsageError(f"{out} exists; give another file name")
            pairs = benchmark_to_pack(str(source), out, data=data)
            print_json({"out": str(out), "pairs": pairs}) if json_output else print(f"{out}: {pairs} pairs")
            return
        summary = convert.pack(source, out, to=to, size=size)
        print_json(summary.to_dict()) if json_output else print(summary)


@app.command()
def unpack(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Training data of any format.")],
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="Folder to write OUT/IDENTITY/IMAGE to; it must not be there yet."
        ),
    ],
    json_output: Json = False,
) -> None:
    """Convert aligned faces from any format into a folder of identity folders.

    Image files are kept byte for byte; pixels of formats that hold no files become PNG.
    """
    with errors_for_users():
        from lrface.data import convert

        summary = convert.unpack(source, out)
        print_json(summary.to_dict()) if json_output else print(summary)


@app.command()
def verify(
    benchmark: Annotated[
        list[str],
        typer.Option(
            "--benchmark",
            help="lfw, agedb30, cfp_fp, cfp_ff, calfw, cplfw, vgg2_fp, xqlfw, survface, a .bin pack, or a folder with "
            "pairs.txt; may repeat. ijbb or ijbc, by itself: TAR at FAR of templates.",
        ),
    ],
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help="A run of `lrface train`, a .safetensors, .onnx or .pt2 (torch.export) file, or module:function; several "
            "compare. None: the model inside lrface. An .onnx or .pt2 file of others takes RGB in [0, 1], or what you say: "
            "FILE@colour=BGR,mean=0.5,std=0.5 (also output=NAME), or FILE.json beside it with these fields.",
        ),
    ] = None,
    resolutions: Annotated[
        str,
        typer.Option(
            "--resolutions",
            help="Test sizes in pixels. native (alone or among them): images as they are, with figures by how many "
            "pixels of the original span a face; small images in a folder of pairs are then faces, enlarged whole.",
        ),
    ] = "112,56,28,14",
    data: DataRoot = None,
    pairs: Pairs = None,
    flip: Annotated[
        bool, typer.Option("--flip/--no-flip", help="Add the features of the mirrored image.")
    ] = True,
    cross: Annotated[bool, typer.Option("--cross", help="Also full-size gallery against each size.")] = False,
    matrix: Annotated[
        bool, typer.Option("--matrix", help="Every gallery size against every probe size.")
    ] = False,
    degrade: Annotated[
        list[str] | None,
        typer.Option(
            "--degrade",
            help="A further condition: jpeg=30, blur=2 (sigma, pixels), noise=10 (sigma, of 255), size=28, or several "
            "with commas between; may repeat.",
        ),
    ] = None,
    corruption: Annotated[
        list[str] | None,
        typer.Option(
            "--corruption",
            help="Faces corrupted: fog (severities 1 to 5), fog:3, all (the 15), held-out (the other 4), all:3; may repeat.",
        ),
    ] = None,
    down: Down = "nearest",
    up: Up = "bilinear",
    device: Device = "auto",
    precision: Precision = "float32",
    batch_size: ImageBatch = 64,
    workers: AlignWorkers = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw accuracy against resolution: FILE.png/.svg/.pdf.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report", help="Write one self-contained page: FILE.html with tables, curves, worst errors."
        ),
    ] = None,
    quality: FaceQuality = "norm",
    keep_features: KeepFeatures = True,
    json_output: Json = False,
) -> None:
    """Verification accuracy at several resolutions, by ten folds, with TAR@FAR and 95 % intervals.

    Both images of a pair are brought down to each size and up again. Several models are compared with the first pair
    by pair. Benchmarks are looked for in --data, then $LRFACE_DATA, then ~/.cache/lrface; photographs are aligned
    once and kept in the cache ($LRFACE_CACHE, else ~/.cache/lrface).
    """
    model = model or [SHIPPED]
    with errors_for_users():
        from lrface.benchmarks.conditions import Condition, parse_corruptions
        from lrface.benchmarks.face_c import face_c_text
        from lrface.benchmarks.page import short_names
        from lrface.benchmarks.report import plot_results, verification_text
        from lrface.evaluation import verify_models
        from lrface.identification_run import only_template_benchmark, verify_templates

        templates = only_template_benchmark(benchmark)
        if templates is not None:
            _show_identification(
                verify_templates(
                    model,
                    templates,
                    data=data,
                    keep_features=keep_features,
                    device=device,
                    precision=precision,
                    batch_size=batch_size,
                ),
                report,
                json_output,
            )
            return
        sizes, native = parse_test_sizes(resolutions)
        run = verify_models(
            model,
            benchmark,
            sizes,
            native=native,
            quality=quality,
            data=data,
            pairs=pairs,
            keep_features=keep_features,
            device=device,
            precision=precision,
            flip=flip,
            down=down,
            up=up,
            batch_size=batch_size,
            workers=workers,
            cross=cross,
            matrix=matrix,
            degrade=[*map(Condition.parse, degrade or []), *parse_corruptions(corruption or [])],
            say=say,
        )
        if plot is not None:
            short = short_names(model)
            plot_results(
                {short[path]: [row for row in run.rows if row["model"] == path] for path in model}, plot
            )
            say(f"plot: {plot}")
        _write_report(run, report)
        if json_output:
            print_json(run.to_json())
        else:
            print(verification_text(run.rows, run.areas, run.comparisons, face_c_text(run.face_c)))


def _write_report(run: Any, report: Path | None) -> None:
    if report is not None:
        from lrface.files import write_text

        write_text(report, run.page())
        say(f"report: {report}")


def _show_identification(run: Any, report: Path | None, json_output: bool) -> None:
    from lrface.benchmarks.identification_page import identification_text

    _write_report(run, report)
    print_json(run.to_json()) if json_output else print(identification_text(run.rows, run.notes))


@app.command()
def identify(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help="A run of `lrface train`, a .safetensors or .onnx file; several make several rows. None: the model inside "
            "lrface.",
        ),
    ] = None,
    benchmark: Annotated[
        str | None, typer.Option("--benchmark", help="tinyface, survface, ijbb or ijbc.")
    ] = None,
    gallery: Annotated[
        Path | None,
        typer.Option("--gallery", help="Identity folders of crops or photographs, or data of any format."),
    ] = None,
    probe: Annotated[
        Path | None, typer.Option("--probe", help="The same for the probes; names say who is who.")
    ] = None,
    resolutions: Annotated[
        str, typer.Option("--resolutions", help="Probe sizes in pixels, 112,28,14; native: as they are.")
    ] = "native",
    data: DataRoot = None,
    crops: Annotated[
        Path | None,
        typer.Option(
            "--crops", help="TinyFace: aligned crops laid out like Testing_Set, in place of its images."
        ),
    ] = None,
    align: Annotated[
        bool, typer.Option("--align/--no-align", help="TinyFace: find faces, or enlarge images whole.")
    ] = True,
    pool: Annotated[
        str | None,
        typer.Option(
            "--pool",
            help="Images of one folder make a template: none, mean, norm (feature length) or quality (detector).",
        ),
    ] = None,
    open_share: Annotated[
        float,
        typer.Option("--open-share", help="Share of identities that leave the gallery for the open-set row."),
    ] = 0.5,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Which of them leave.")] = 0,
    flip: Annotated[
        bool, typer.Option("--flip/--no-flip", help="Folders: add the features of the mirrored image.")
    ] = True,
    down: Down = "nearest",
    up: Up = "bilinear",
    device: Device = "auto",
    precision: Precision = "float32",
    batch_size: ImageBatch = 64,
    workers: AlignWorkers = None,
    report: Annotated[
        Path | None,
        typer.Option("--report", help="Write one self-contained page: FILE.html with curves and tables."),
    ] = None,
    keep_features: KeepFeatures = True,
    json_output: Json = False,
) -> None:
    """Who of a gallery is on each probe: rank-k, mean average precision, open-set FNIR at FPIR.

    TinyFace is scored as its authors do and as AdaFace and CVLface do, side by side. What could not be aligned is
    counted, never left out. IJB-B and IJB-C search mixed-media probes in both galleries.
    """
    model = model or [SHIPPED]
    with errors_for_users():
        from lrface.identification_run import run_identification

        run = run_identification(
            model,
            benchmark,
            gallery,
            probe,
            [] if resolutions == "native" else parse_sizes(resolutions),
            data=data,
            crops=crops,
            align=align,
            flip=flip,
            pooling=pool,
            open_share=open_share,
            seed=seed,
            workers=workers,
            down=down,
            up=up,
            keep_features=keep_features,
            device=device,
            precision=precision,
            batch_size=batch_size,
        )
        _show_identification(run, report, json_output)


@app.command()
def bench(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Runs of `lrface train`, .safetensors, .onnx or .pt2 (torch.export) files, or module:function. An .onnx or "
            ".pt2 file of others must be described: FILE@colour=BGR,mean=0.5,std=0.5 (network gets (x - mean) / std, x in "
            "[0, 1]; also output=NAME; three numbers with colons between), or FILE.json beside it with these fields.",
        ),
    ],
    suite: Annotated[
        str,
        typer.Option(
            "--suite",
            help="paper: Tables 4 and 5 with the paper's rows beside yours; full: every benchmark that is found, every "
            "gallery size against every probe size.",
        ),
    ] = "paper",
    benchmark: Annotated[
        list[str] | None,
        typer.Option("--benchmark", help="A further one, as for `lrface verify`; may repeat."),
    ] = None,
    resolutions: Resolutions = "112,56,28,14",
    data: DataRoot = None,
    device: Device = "auto",
    precision: Precision = "float32",
    batch_size: ImageBatch = 64,
    workers: AlignWorkers = None,
    report: Annotated[
        Path | None,
        typer.Option("--report", help="Write one self-contained page: FILE.html with tables and curves."),
    ] = None,
    keep_features: KeepFeatures = True,
    json_output: Json = False,
) -> None:
    """The tables of the paper for your models, or everything that is found on disk, by one command.

    Benchmarks that are missing are listed with the place they should be in, and the others are run; exit code 1 when
    none is there.
    """
    with errors_for_users():
        from lrface.suites import run_suite

        run = run_suite(
            models,
            suite,
            parse_sizes(resolutions),
            benchmarks=benchmark or [],
            data=data,
            say=say,
            device=device,
            precision=precision,
            batch_size=batch_size,
            workers=workers,
            keep_features=keep_features,
        )
        _write_report(run, report)
        print_json(run.to_json()) if json_output else print(run.to_text())


def parse_names(text: str | None) -> list[str]:
    """ "fog,snow" -> ["fog", "snow"]; nothing for nothing."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def parse_severities(text: str | None) -> list[int]:
    """ "1,3,5" -> [1, 3, 5]. Raises UsageError for anything that is no list of whole numbers."""
    from lrface.errors import UsageError

    try:
        return [int(part) for part in parse_names(text)]
    except ValueError as error:
        raise UsageError(
            f"--severities takes whole numbers from 1 to 5 such as 1,3,5; found {text!r}"
        ) from error


Corruptions = Annotated[
    str | None,
    typer.Option("--corruptions", help="Only these, with commas between: fog,snow; default: all 15."),
]
Severities = Annotated[
    str | None, typer.Option("--severities", help="Only these of 1 to 5, with commas between; default: all.")
]
HeldOutCorruptions = Annotated[
    bool,
    typer.Option(
        "--held-out", help="Also speckle noise, gaussian blur, spatter and saturate, which are shown apart."
    ),
]
CorruptionSeed = Annotated[
    int, typer.Option("--seed", min=0, help="Another seed draws random corruptions anew.")
]


@app.command()
def corrupt(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            help="Clean images: a folder of class folders or of images, .npy or .npz arrays, Parquet, packed data.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Argument(metavar="[OUT]", help="Folder for the set; not needed for --preview alone."),
    ] = None,
    set: Annotated[
        str, typer.Option("--set", help="imagenet-c, cifar-c, tiny-imagenet-c, mnist-c or face.")
    ] = "imagenet-c",
    corruptions: Corruptions = None,
    severities: Severities = None,
    held_out: HeldOutCorruptions = False,
    preview: Annotated[
        Path | None,
        typer.Option(
            "--preview", help="Draw one image of SRC under all corruptions and severities: FILE.png."
        ),
    ] = None,
    seed: CorruptionSeed = 0,
    device: Device = "auto",
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images corrupted at once.")] = 64,
    workers: Annotated[
        int | None, typer.Option("--workers", help="Threads that read and write; default: one a core.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Write an evaluation set of corrupted images in the layout of ImageNet-C, CIFAR-10-C or MNIST-C.

    What an image becomes depends on its pixels, the corruption, the severity and the seed alone. The same command goes
    on after a kill. Images that cannot be read are left out and listed.
    """
    with errors_for_users():
        from lrface.corrupt import corrupt_set, draw_preview
        from lrface.errors import UsageError
        from lrface.train.trainer import resolve_device

        names, levels = parse_names(corruptions), parse_severities(severities)
        if out is None and preview is None:
            raise UsageError(
                "usage: lrface corrupt SRC OUT --set SET, or lrface corrupt SRC --preview FILE.png"
            )
        if preview is not None:
            draw_preview(source, preview, set, names, levels, seed=seed)
            say(f"preview: {preview}")
        if out is None:
            return
        summary = corrupt_set(
            source,
            out,
            set,
            names,
            levels,
            held_out=held_out,
            seed=seed,
            device=resolve_device(device),
            batch_size=batch_size,
            workers=workers,
        )
        print_json(summary.to_dict()) if json_output else print(summary)


@app.command()
def deepaugment(
    source: Annotated[
        Path, typer.Argument(metavar="DATA", help="Training data of any format, images of one size.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the set: packed data of the same classes.")],
    network: Annotated[
        list[str],
        typer.Option(
            "--network",
            help="A run whose network draws images (`lrface train cifar10/edsr`), or edsr@weights=FILE with published "
            "weights; several draw the copies by turns.",
        ),
    ],
    copies: Annotated[int, typer.Option("--copies", help="How often each image is drawn.")] = 10,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Another seed draws other edits.")] = 0,
    data: DataRoot = None,
    device: Device = "auto",
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images drawn at once.")] = 32,
    json_output: Json = False,
) -> None:
    """Draw a training set anew by image-to-image networks whose weights are edited at random (DeepAugment).

    A recipe names the set beside the clean one: data.path=[DATA,SET]. The same command goes on after a kill.
    """
    with errors_for_users():
        from lrface.benchmarks.image_sets import find_images
        from lrface.deepaugment import deepaugment_set
        from lrface.train.trainer import resolve_device

        summary = deepaugment_set(
            find_images(source, data),
            out,
            network,
            copies,
            seed=seed,
            device=resolve_device(device),
            batch_size=batch_size,
        )
        print_json(summary.to_dict()) if json_output else print(summary)


@app.command()
def robustness(
    model: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="A run of `lrface train` with head softmax, torchvision:NAME@weights=FILE, "
            "timm:NAME@weights=FILE,mean=M,std=S, FILE.onnx@colour=RGB,mean=M,std=S, or module:function; also "
            "classes=FILE with the names of the outputs.",
        ),
    ],
    benchmark: Annotated[
        str,
        typer.Option(
            "--benchmark",
            help="imagenet_c, cifar10_c, tiny_imagenet_c, mnist_c or face_c, or the folder of a stored set.",
        ),
    ],
    clean: Annotated[
        Path | None,
        typer.Option(
            "--clean", help="Clean images with classes: for the clean error, and to be corrupted on the fly."
        ),
    ] = None,
    corruptions: Corruptions = None,
    severities: Severities = None,
    held_out: HeldOutCorruptions = False,
    classes: Annotated[
        str | None,
        typer.Option(
            "--classes", help="Only these classes: imagenet200, imagenet100, or a file with one name a line."
        ),
    ] = None,
    subset: Annotated[
        str | None,
        typer.Option("--subset", help="Only these images: robustbench5000, or a file with one name a line."),
    ] = None,
    shifted: Annotated[
        list[Path] | None,
        typer.Option(
            "--shifted",
            help="Further clean images of the same classes, such as CIFAR-10.1: an error of each.",
        ),
    ] = None,
    seed: CorruptionSeed = 0,
    data: DataRoot = None,
    device: Device = "auto",
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images classified at once.")] = 64,
    workers: Annotated[
        int | None, typer.Option("--workers", help="Threads that read images; default: one a core.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report", help="Write one self-contained page: FILE.html with plots, heat maps and tables."
        ),
    ] = None,
    json_output: Json = False,
) -> None:
    """Errors of classifiers on corrupted images: by corruption and severity, CE, mCE, relative mCE.

    A stored set is read as it is; without one, the images of --clean are corrupted on the fly.
    """
    with errors_for_users():
        from lrface.robustness import run_robustness

        run = run_robustness(
            model,
            benchmark,
            clean,
            data=data,
            corruptions=parse_names(corruptions),
            severities=parse_severities(severities),
            held_out=held_out,
            classes=classes,
            subset=subset,
            shifted=shifted or (),
            seed=seed,
            device=device,
            batch_size=batch_size,
            workers=workers,
        )
        _write_report(run, report)
        print_json(run.to_json()) if json_output else print(run.to_text())


@app.command()
def features(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="Images with classes: Parquet, a folder of class folders, arrays, packed data, or a face benchmark (lfw); "
            "as it stands or below --data.",
        ),
    ],
    model: Annotated[
        list[str],
        typer.Option(
            "--model",
            help="NAME=MODEL or MODEL, a panel each; may repeat. A run of `lrface train`, a .safetensors, .onnx or .pt2 "
            "file, module:function, torchvision:NAME@weights=FILE or timm:NAME@weights=FILE,mean=M,std=S.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="The picture, FILE.png, .svg or .pdf; FILE.json and FILE.csv beside it hold figures and points. Without "
            "it figures alone.",
        ),
    ] = None,
    classes: Annotated[
        str,
        typer.Option(
            "--classes",
            help="How many, the first that have enough images, or names: cat,dog,ship; 10 at most.",
        ),
    ] = "4",
    images: Annotated[int, typer.Option("--images", help="Images of each class.")] = 100,
    resolution: Annotated[
        int | None,
        typer.Option("--resolution", help="LQ images: brought down to this side in pixels and up again."),
    ] = None,
    corruption: Annotated[
        list[str] | None,
        typer.Option(
            "--corruption",
            help="LQ images: fog (severities 1 to 5), fog:3, all (the 15), held-out (the other 4), all:3; may repeat. Each "
            "image gets one, by turns.",
        ),
    ] = None,
    degrade: Annotated[
        list[str] | None,
        typer.Option("--degrade", help="LQ images: jpeg=30, blur=2, noise=10, size=14,jpeg=50; may repeat."),
    ] = None,
    set: Annotated[
        str | None,
        typer.Option(
            "--set",
            help="Constants of corruptions: imagenet-c, cifar-c, tiny-imagenet-c or face; default: by the models' size.",
        ),
    ] = None,
    down: Down = "bicubic",
    up: Up = "bicubic",
    perplexity: Annotated[
        float | None, typer.Option("--perplexity", help="Of t-SNE; default: 30, or what the points allow.")
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Of the choice of images, corruptions and t-SNE.")
    ] = 0,
    data: DataRoot = None,
    device: Device = "auto",
    batch_size: ImageBatch = 64,
    workers: Annotated[
        int | None, typer.Option("--workers", help="Threads that read images; default: one a core.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Features of clean (HQ) and degraded (LQ) images, model by model: a t-SNE picture and figures.

    The same images, degraded alike, go through every model. Without --resolution, --corruption or --degrade LQ images
    have half the resolution, as in Figure 2 of the QualNet paper.
    """
    with errors_for_users():
        from lrface.benchmarks.conditions import Condition, parse_corruptions
        from lrface.features import run_features

        run = run_features(
            model,
            source,
            out,
            classes=classes,
            images=images,
            resolution=resolution,
            conditions=[*map(Condition.parse, degrade or []), *parse_corruptions(corruption or [])],
            down=down,
            up=up,
            corruption_set=set,
            perplexity=perplexity,
            seed=seed,
            root=data,
            device=device,
            batch_size=batch_size,
            workers=workers,
            say=say,
        )
        if out is not None:
            say(f"picture: {out}")
        print_json(run.to_json()) if json_output else print(run.to_text())


Classifiers = Annotated[
    list[str],
    typer.Argument(metavar="MODEL...", help="Classifiers as `lrface robustness` takes them."),
]
LabelledPath = Annotated[
    Path,
    typer.Option(
        "--images",
        help="Clean images with classes: class folders, Parquet, arrays, MNIST's files. Of 28 (grey), 32, 64 or 112 pixels "
        "they are taken as they are, others as ImageNet's (256, the middle 224).",
    ),
]
ImageCount = Annotated[
    int | None, typer.Option("--count", help="So many of the images, drawn by --seed; 0 for all.")
]


@app.command()
def probe(
    train: Annotated[
        str,
        typer.Argument(
            metavar="TRAIN",
            help="Training images with classes: Parquet, a folder of class folders, arrays, packed data; as it stands or "
            "below --data.",
        ),
    ],
    test: Annotated[str, typer.Argument(metavar="TEST", help="Test images of the same classes.")],
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help="NAME=MODEL or MODEL, an encoder that stays as it is; may repeat. A run of `lrface train`, a .safetensors, "
            ".onnx or .pt2 file, module:function, torchvision:NAME@weights=FILE, timm:NAME@weights=FILE,mean=M,std=S or "
            "open_clip:NAME@weights=FILE.",
        ),
    ] = None,
    own_head: Annotated[
        list[str] | None,
        typer.Option(
            "--own-head",
            help="NAME=MODEL, a classifier judged with its own last layer on the same images (end-to-end baseline); may "
            "repeat.",
        ),
    ] = None,
    degrade: Annotated[
        str,
        typer.Option(
            "--degrade",
            help="Forward operator, a policy as in recipes: '{name: gaussian_noise, sigma: 0.5}'. All images are degraded "
            "unless it has a clean_share.",
        ),
    ] = "clean",
    train_degrade: Annotated[
        str | None, typer.Option("--train-degrade", help="Another one for training images: clean.")
    ] = None,
    test_degrade: Annotated[
        list[str] | None,
        typer.Option("--test-degrade", help="Another one for test images; may repeat, each is judged apart."),
    ] = None,
    labels: Annotated[
        str, typer.Option("--labels", help="Shares of the training labels, nested: 1.0,0.1,0.01.")
    ] = "1.0",
    seeds: Annotated[int, typer.Option("--seeds", help="Draws of the degraded test images.")] = 10,
    classifier_of: Annotated[
        str | None,
        typer.Option(
            "--classifier-of", help="Judge the other models with this model's linear classifier as well."
        ),
    ] = None,
    restore: Annotated[
        str | None,
        typer.Option(
            "--restore",
            help="Restore degraded test images first: nlm, deep_decoder or '{name: deep_decoder, steps: 1000}'. Training "
            "images are clean then, unless --train-degrade is given.",
        ),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            "--classes",
            help="Only these classes: imagenet100, imagenet100b, imagenet200, or a file with one name a line.",
        ),
    ] = None,
    relabel: Annotated[
        str | None,
        typer.Option(
            "--relabel",
            help="Label shift: only test images of these classes, taken for others: cup='cocktail shaker',...; imagenet100 "
            "for the paper's.",
        ),
    ] = None,
    images: Annotated[
        int | None, typer.Option("--images", help="About so many test images, drawn alike from each class.")
    ] = None,
    views: Annotated[
        int, typer.Option("--views", help="Draws of each training image; epochs take them by turns.")
    ] = 1,
    set: Annotated[
        str | None,
        typer.Option(
            "--set",
            help="Size of images for networks that take any: imagenet-c (224), tiny-imagenet-c (64), cifar-c (32).",
        ),
    ] = None,
    zero_shot: Annotated[
        bool, typer.Option("--zero-shot", help="Judge open_clip's networks by its text tower as well.")
    ] = False,
    text_weights: Annotated[
        str | None,
        typer.Option("--text-weights", help="File of the whole CLIP model, where the network names none."),
    ] = None,
    prompts: Annotated[
        str, typer.Option("--prompts", help="openai (80 sentences), simple (7), or a file: {} is the class.")
    ] = "openai",
    class_names: Annotated[
        str | None,
        typer.Option(
            "--class-names", help="File with a name a line, in the classes' order; else the data's."
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of all that is drawn.")] = 0,
    data: DataRoot = None,
    cache: Annotated[
        bool,
        typer.Option("--cache/--no-cache", help="Keep features in $LRFACE_CACHE, else ~/.cache/lrface."),
    ] = True,
    device: Device = "auto",
    batch_size: ImageBatch = 64,
    workers: Annotated[
        int | None, typer.Option("--workers", help="Threads that read images; default: one a core.")
    ] = None,
    json_output: Json = False,
) -> None:
    """How well a linear classifier tells classes apart by a network's features of degraded images.

    Several networks see the same draws. Top-1, top-5 and AUC (macro one-vs-rest), mean and standard error over draws of
    the test images. Features are kept: the next probe of a network takes seconds.
    """
    with errors_for_users():
        from lrface.probe import parse_shares, run_probe

        run = run_probe(
            model or [],
            train,
            test,
            degrade=degrade,
            train_degrade=train_degrade,
            test_degrade=test_degrade or [],
            labels=parse_shares(labels),
            seeds=seeds,
            own_heads=own_head or [],
            classifier_of=classifier_of,
            restore=restore,
            classes=classes,
            relabel=relabel,
            images=images,
            views=views,
            image_set=set,
            zero_shot=zero_shot,
            text_weights=text_weights,
            prompts=prompts,
            class_names=class_names,
            seed=seed,
            root=data,
            keep_features=cache,
            device=device,
            batch_size=batch_size,
            workers=workers,
            say=say,
        )
        print_json(run.to_json()) if json_output else print(run.to_text())


@app.command()
def perturbation(
    model: Classifiers,
    images: LabelledPath,
    noise: Annotated[
        str | None, typer.Option("--noise", help="Of gaussian,uniform,adversarial; default: all three.")
    ] = None,
    count: ImageCount = 1000,
    seeds: Annotated[int, typer.Option("--seeds", help="Draws of Gaussian and of uniform noise.")] = 1,
    generators: Annotated[
        int, typer.Option("--generators", help="Fresh noise generators trained against each model.")
    ] = 4,
    generator: Annotated[
        str,
        typer.Option(
            "--generator", help="noise1x1: pixels drawn by themselves; noise3x3: correlated within 3x3."
        ),
    ] = "noise1x1",
    depth: Annotated[int, typer.Option("--depth", help="Convolutions of a generator.")] = 4,
    steps: Annotated[int, typer.Option("--steps", help="Steps that a generator learns for.")] = 600,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="Of a generator (Adam).")] = 1e-3,
    epsilon: Annotated[
        float | None,
        typer.Option(
            "--epsilon",
            help="L2 length of the noise that a generator learns with; default: the model's median for Gaussian noise.",
        ),
    ] = None,
    train_images: Annotated[
        Path | None,
        typer.Option("--train-images", help="What generators learn on; default: the measured images."),
    ] = None,
    pictures: Annotated[
        Path | None,
        typer.Option("--pictures", help="Folder for pictures: images at the boundary, noise, densities."),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Of the images, the noise and the generators.")
    ] = 0,
    data: DataRoot = None,
    device: Device = "auto",
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images searched at once.")] = 256,
    json_output: Json = False,
) -> None:
    """How much noise a classifier bears: the median size at which it errs, for Gaussian, uniform and adversarial noise.

    Adversarial noise is drawn pixel by pixel from the worst distribution that a small network learns against the model.
    Faces: networks with a softmax head on their own identities; an embedder has no classes to err about.
    """
    with errors_for_users():
        from lrface.benchmarks.image_sets import find_images
        from lrface.perturbation import GeneratorSettings, run_perturbation

        settings = GeneratorSettings(
            name=generator, epsilon=epsilon, steps=steps, learning_rate=learning_rate, depth=depth
        )
        run = run_perturbation(
            model,
            find_images(images, data),
            noises=parse_names(noise),
            count=count or None,
            seeds=seeds,
            generators=generators,
            generator=settings,
            train_images=None if train_images is None else find_images(train_images, data),
            seed=seed,
            device=device,
            batch_size=batch_size,
            pictures=pictures,
        )
        print_json(run.to_json()) if json_output else print(run.to_text())


@app.command()
def attack(
    model: Classifiers,
    images: LabelledPath,
    attacks: Annotated[
        list[str] | None,
        typer.Option(
            "--attack",
            help="What, in which norm and how far: ddn=0.125, pgd:linf=1/255,2/255, pgd:l2=0.5, autoattack:linf=1/255, "
            "autoattack+multitargeted:l2=0.5, ada=0.015; may be given again. Default: ddn=0.125 and pgd:linf=0.001.",
        ),
    ] = None,
    count: ImageCount = 1000,
    network: Annotated[
        Path | None, typer.Option("--network", help="For ada: a run that trained a corruption network.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Default: the attack's own.")] = None,
    restarts: Annotated[int | None, typer.Option("--restarts", help="Default: the attack's own.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the images and of the attacks.")] = 0,
    data: DataRoot = None,
    device: Device = "auto",
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images attacked at once.")] = 100,
    json_output: Json = False,
) -> None:
    """Accuracy of classifiers under adversarial attacks, and the median distance where one looks for the smallest.

    PGD and DDN are foolbox's, AutoAttack its authors': pip install 'lrface\\[attack]'.
    """
    with errors_for_users():
        from lrface.attack_trials import parse_trials, run_trials
        from lrface.benchmarks.image_sets import find_images

        run = run_trials(
            model,
            find_images(images, data),
            [trial for text in attacks or ("ddn=0.125", "pgd:linf=0.001") for trial in parse_trials(text)],
            count=count or None,
            network=network,
            steps=steps,
            restarts=restarts,
            seed=seed,
            device=device,
            batch_size=batch_size,
        )
        print_json(run.to_json()) if json_output else print(run.to_text())


@app.command()
def noise(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run of `lrface train` with the method ant.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for densities.png and noise.png.")],
    json_output: Json = False,
) -> None:
    """Draw the noise that generators learned over a training run: densities over time, and samples."""
    with errors_for_users():
        from lrface.noise_pictures import draw_training

        facts = draw_training(run, out)
        print_json(facts) if json_output else print("\n".join(facts["files"]))


@app.command()
def stylise(
    photographs: Annotated[
        Path,
        typer.Argument(
            metavar="PHOTOS", help="Images: class folders, a folder, Parquet, arrays, packed data."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the stylised images, under the same names.")],
    styles: Annotated[Path, typer.Option("--styles", help="Folder of pictures whose styles are taken.")],
    encoder: Annotated[Path, typer.Option("--encoder", help="VGG-19 as AdaIN takes it: vgg_normalised.pth.")],
    decoder: Annotated[Path, typer.Option("--decoder", help="AdaIN's decoder: decoder.pth.")],
    alpha: Annotated[float, typer.Option("--alpha", help="How much of the style, 0 to 1.")] = 1.0,
    size: Annotated[
        int,
        typer.Option("--size", help="Shorter side that smaller photographs are enlarged to for the network."),
    ] = 256,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Another seed draws other styles.")] = 0,
    device: Device = "auto",
    json_output: Json = False,
) -> None:
    """Each photograph in the style of a picture (AdaIN), as training data for `data.stylised`; the weights are your files.

    The same command goes on after a kill. What cannot be read is left out and listed.
    """
    with errors_for_users():
        from lrface.stylise import stylise as run

        summary = run(
            photographs, styles, encoder, decoder, out, alpha=alpha, size=size, seed=seed, device=device
        )
        print_json(summary.to_dict()) if json_output else print(summary)


@app.command()
def calibrate(
    model: ModelName,
    benchmark: Annotated[str, typer.Option("--benchmark", help="As for `lrface verify`.")] = "lfw",
    far: Annotated[
        float, typer.Option("--far", help="False accept rate wanted, above 0 and below 1.")
    ] = 1e-3,
    resolutions: Annotated[str, typer.Option("--resolutions", help="Sizes in pixels.")] = "112,56,28,14",
    data: DataRoot = None,
    pairs: Pairs = None,
    flip: Annotated[
        bool,
        typer.Option(
            "--flip/--no-flip", help="Add the features of the mirrored image, as `lrface compare` does."
        ),
    ] = True,
    device: Device = "auto",
    json_output: Json = False,
) -> None:
    """Measure the threshold of a wanted false accept rate for every pair of resolutions, and store it with the model.

    `lrface compare` and compare() of the embedding API then decide by it, at the resolutions of the two faces.
    """
    with errors_for_users():
        from dataclasses import asdict

        from lrface.calibrate import calibrate as measure
        from lrface.calibrate import calibration_table

        sizes = parse_sizes(resolutions)
        found = measure(
            model, benchmark, far, sizes, data=data, pairs=pairs, flip=flip, device=device, say=say
        )
        print_json(asdict(found)) if json_output else print(calibration_table(found))


@app.command(name="export")
def export_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As --model of `lrface embed`.")],
    out: Annotated[
        Path,
        typer.Option(
            "--out", help="File to write: .onnx, .pt2, .xml (and its .bin) or .safetensors (and its .json)."
        ),
    ],
    to: Annotated[str, typer.Option("--to", help="onnx, torch-export, openvino or safetensors.")] = "onnx",
    faces: Annotated[
        Path | None,
        typer.Option(
            "--faces",
            help="Aligned faces of any format that the file is held against the model on; your own, at best.",
        ),
    ] = None,
    flavour: Annotated[
        str,
        typer.Option("--flavour", help="lrface, or insightface: an .onnx for insightface's FaceAnalysis."),
    ] = "lrface",
    precision: Annotated[str, typer.Option("--precision", help="float32, or float16.")] = "float32",
    int8: Annotated[
        str | None,
        typer.Option("--int8", help="static (ranges measured on --faces) or dynamic: an .onnx in int8."),
    ] = None,
    minimum_cosine: Annotated[
        float | None,
        typer.Option(
            "--minimum-cosine", help="Of the worst face to the model's features; default 0.9999, int8 0.95."
        ),
    ] = None,
    opset: Annotated[
        int | None, typer.Option("--opset", help="Of the .onnx; default: PyTorch's choice.")
    ] = None,
    benchmark: Annotated[
        str | None,
        typer.Option("--benchmark", help="Also verify model and file on it, as for `lrface verify`."),
    ] = None,
    data: DataRoot = None,
    pairs: Pairs = None,
    json_output: Json = False,
) -> None:
    """Write a model as an ONNX, torch.export or OpenVINO file that gives the same features, or no file.

    It takes any number of images RGB in [0, 1], normalises inside and carries the model's card. Faces at 112, 56, 28 and 14
    pixels go through the model and through the file, and the lowest cosine has to reach --minimum-cosine.
    """
    with errors_for_users():
        from lrface.export import export_model

        found = export_model(
            model,
            out,
            to=to,
            faces=faces,
            flavour=flavour,
            precision=precision,
            int8=int8,
            minimum_cosine=minimum_cosine,
            opset=opset,
            benchmark=benchmark,
            data=data,
            pairs=pairs,
            say=say,
        )
        print_json(found.to_dict()) if json_output else print(found)


@app.command()
def embed(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATHS...", help="Images and folders of them; or videos: files, URLs, a camera's number."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Where the vectors go: .parquet or .npz.")],
    model: ModelName = SHIPPED,
    kind: Annotated[
        str,
        typer.Option("--kind", help="crop (aligned square faces), photo (detect and align), auto by size."),
    ] = "auto",
    faces: FaceRule = "largest-central",
    flip: FlipFaces = False,
    device: Device = "auto",
    precision: Precision = "float32",
    batch_size: FaceBatch = 64,
    detector_model: DetectorModel = None,
    fallback: Fallback = "skip",
    quality: FaceQuality = "norm",
    workers: Annotated[
        int | None, typer.Option("--workers", help="Threads that decode, or with --engine ray actors.")
    ] = None,
    engine: Engine = "local",
    address: RayAddress = None,
    every: Annotated[int, typer.Option("--every", help="Videos: look at every so many-th frame.")] = 1,
    limit: Annotated[
        int | None, typer.Option("--limit", help="Videos: stop each after so many frames looked at.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Embed images into a file of unit vectors with box, score, effective resolution and quality.

    Faces of videos, streams and cameras get the frame and its time too. What cannot be read or shows no face is listed
    with its reason in OUT.failures.csv; the job goes on.
    """
    with errors_for_users():
        from dataclasses import asdict

        from lrface.embed import are_videos, embed_paths, embed_videos, open_model

        embedder = open_model(
            model, device=device, precision=precision, detector_model=detector_model, quality=quality
        )
        if are_videos(paths):
            summary = embed_videos(
                embedder, paths, out, every=every, limit=limit, faces=faces, flip=flip, batch_size=batch_size
            )
        else:
            summary = embed_paths(
                embedder,
                paths,
                out,
                kind=kind,
                faces=faces,
                flip=flip,
                batch_size=batch_size,
                workers=workers,
                fallback=fallback,
                engine=engine,
                address=address,
            )
        if json_output:
            print_json({key: str(v) if isinstance(v, Path) else v for key, v in asdict(summary).items()})
        else:
            rate = summary.images / max(summary.seconds, 1e-9)
            print(
                f"{summary.out}: {summary.faces} faces of {summary.embedded} {summary.unit} in {summary.seconds:.1f} s "
                f"({rate:.0f} {summary.unit}/s); {summary.failures} {summary.source} failed"
                + (f", reasons in {summary.failures_file}" if summary.failures else "")
            )


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="An image: aligned crop or photograph.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another image.")],
    model: ModelName = SHIPPED,
    threshold: Annotated[
        float | None, typer.Option("--threshold", help="Cosine from which on it is the same person.")
    ] = None,
    kind: Annotated[str, typer.Option("--kind", help="crop, photo or auto.")] = "auto",
    flip: FlipFaces = True,
    prior: Annotated[
        float, typer.Option("--prior", help="How probable one person is before looking, above 0, below 1.")
    ] = 0.5,
    device: Device = "auto",
    json_output: Json = False,
) -> None:
    """Whether two images show the same person: similarity, effective resolutions, a verdict, and the probability.

    The probability is told of models that `lrface calibrate` has measured, for the resolutions of both faces.
    """
    with errors_for_users():
        from dataclasses import asdict

        from lrface.embed import open_model

        found = open_model(model, device=device).compare(
            first, second, threshold=threshold, kind=kind, flip=flip, prior=prior
        )
        print_json({**asdict(found), "calibrated": found.calibrated}) if json_output else print(
            found.statement
        )


data_app = typer.Typer(
    help="Look into data: what it is, whether it is sound, what it shares with a benchmark, held-out identities.",
    no_args_is_help=True,
)
app.add_typer(data_app, name="data")
app.add_typer(gallery_app, name="gallery")
app.command()(serve)
app.command()(ui)

Workers = Annotated[int | None, typer.Option("--workers", help="Processes that decode; default: one a core.")]


@data_app.command(name="info")
def data_info(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="Data of any format, or a benchmark's name, folder or .bin.")
    ],
    sheet: Annotated[
        Path | None, typer.Option("--sheet", help="Draw a contact sheet: FILE.png, a row an identity.")
    ] = None,
    data: DataRoot = None,
    json_output: Json = False,
) -> None:
    """What a data set or a benchmark is: format, counts, images an identity, sizes, encoding, colours, pairs.

    Headers of all images are read, of 20,000 evenly spread where there are more; 300 images are decoded to see
    whether red and blue are where they should be.
    """
    with errors_for_users():
        from lrface.benchmarks.images import describe
        from lrface.data.info import draw_source
        from lrface.data.sheet import check_sheet_path

        if sheet is not None:
            check_sheet_path(sheet)
        info, source = describe(path, data)
        if sheet is not None:
            draw_source(source, info, sheet)
            say(f"contact sheet: {sheet}")
        print_json(info.to_dict()) if json_output else print(info)


@data_app.command(name="check")
def data_check(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="Data of any format, or a benchmark's name, folder or .bin.")
    ],
    report: Annotated[
        Path | None, typer.Option("--report", help="Write every finding to FILE.csv with identity and image.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", help="Also compare faces: a run of `lrface train`, .safetensors or .onnx file."
        ),
    ] = None,
    near_duplicate: Annotated[
        float,
        typer.Option(
            "--near-duplicate",
            help="With --model: cosine from which on images of an identity are one photograph.",
        ),
    ] = 0.95,
    label_noise: Annotated[
        float,
        typer.Option(
            "--label-noise",
            help="With --model: cosine from which on images of two identities show one person.",
        ),
    ] = 0.7,
    workers: Workers = None,
    device: Device = "auto",
    batch_size: FaceBatch = 64,
    data: DataRoot = None,
    json_output: Json = False,
) -> None:
    """Decode every image and list what is wrong. Exit code 1 when an image does not decode whole or labels have gaps.

    Also listed: copies by content (same file, same pixels), identities with one image, other sizes than most,
    images of one colour; with --model near duplicates, and images that look like another identity's (probably
    under the wrong name, or no faces). Every image is compared with every other, exactly.
    """
    with errors_for_users():
        from lrface.benchmarks.images import open_images
        from lrface.data.check import check_data

        embedder = None
        if model is not None:
            from lrface.embed import open_model
            from lrface.neighbours import alike_findings, check_thresholds, embed_source

            check_thresholds(near_duplicate, label_noise)
            embedder = open_model(model, device=device)
        images = open_images(path, data)
        found = check_data(images.source, images.name, workers)
        if embedder is not None:
            vectors = embed_source(images.source, embedder, batch_size)
            found.findings += alike_findings(images.source, vectors, near_duplicate, label_noise, device)
        if report is not None:
            found.write(report, images.source)
        print_json(found.to_dict()) if json_output else print(found)
        if report is not None:
            say(f"findings: {report}")
        if not found.sound:
            raise typer.Exit(1)


@data_app.command(name="overlap")
def data_overlap(
    train: Annotated[str, typer.Argument(metavar="TRAIN", help="Training data of any format.")],
    test: Annotated[
        str, typer.Argument(metavar="TEST", help="A benchmark's name, folder or .bin, or data of any format.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model", help="Also compare faces: a run of `lrface train`, .safetensors or .onnx file."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="List of training identities to leave out, FILE.csv (lrface data split --drop)."
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="Write all evidence, image by image, to FILE.csv.")
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option("--sheet", help="Draw the surest identity pairs side by side: FILE.png.")
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            "--threshold",
            help="Cosine from which on two images may show one person; default: found on TEST's own strangers, see --far.",
        ),
    ] = None,
    false_accept_rate: Annotated[
        float,
        typer.Option("--far", help="Share of TEST's pairs of strangers that reaches the default threshold."),
    ] = 1e-5,
    same_photograph: Annotated[
        float, typer.Option("--same-photograph", help="Cosine from which on two images are one photograph.")
    ] = 0.95,
    workers: Workers = None,
    device: Device = "auto",
    batch_size: FaceBatch = 64,
    data: DataRoot = None,
    json_output: Json = False,
) -> None:
    """Which identities and images of a training set are in a benchmark: by name, by content, by embedding.

    Names are compared without case, accents, spaces and punctuation; contents by image file and by decoded
    pixels. With --model, two identities are one person when at least half of their image pairs reach the
    threshold; one similar pair is not enough, since training sets have wrong labels and strangers look alike.
    The threshold is the cosine that a share --far of the benchmark's own pairs of different people reaches (by
    their mean and deviation where they are too few).
    """
    with errors_for_users():
        from lrface.benchmarks.images import open_images
        from lrface.data.sheet import check_sheet_path
        from lrface.overlap import find_overlap

        if sheet is not None:
            check_sheet_path(sheet)
        embedder = None
        if model is not None:
            from lrface.embed import open_model

            embedder = open_model(model, device=device)
        found = find_overlap(
            open_images(train, data),
            open_images(test, data, aligned=embedder is not None),
            embedder,
            threshold=threshold,
            false_accept_rate=false_accept_rate,
            same_photograph=same_photograph,
            workers=workers,
            batch_size=batch_size,
            device=device,
        )
        for file, write in ((report, found.write_leaks), (out, found.write_drop_list), (sheet, found.draw)):
            if file is not None:
                write(file)
                say(f"written: {file}")
        print_json(found.to_dict()) if json_output else print(found)


@data_app.command(name="split")
def data_split(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Training data of any format.")],
    out_train: Annotated[
        Path, typer.Argument(metavar="OUT_TRAIN", help="Folder for the packed training part.")
    ],
    out_held_out: Annotated[
        Path, typer.Argument(metavar="OUT_HELD_OUT", help="Folder for the packed held-out part.")
    ],
    held_out: Annotated[
        str, typer.Option("--held-out", help="Identities to hold out: a share below 1, or a number.")
    ] = "0.1",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Which identities are held out.")] = 0,
    drop: Annotated[
        Path | None,
        typer.Option(
            "--drop",
            help="Identities for neither part: what `lrface data overlap --out` wrote, or one a line.",
        ),
    ] = None,
    json_output: Json = False,
) -> None:
    """Split training data by identity into two packed parts, of which `lrface train` takes either.

    Image files are copied as they are; labels are numbered anew without gaps, names stay. The same data and seed
    hold out the same people, whatever the format.
    """
    with errors_for_users():
        from lrface.data.source import open_source
        from lrface.data.split import parse_held_out, read_drop_list, split_source

        share = parse_held_out(held_out)
        dropped = [] if drop is None else read_drop_list(drop)
        summary = split_source(open_source(path), str(path), out_train, out_held_out, share, seed, dropped)
        print_json(summary.to_dict()) if json_output else print(summary)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for runs and the picture.")] = Path(
        "demo-output"
    ),
    json_output: Json = False,
) -> None:
    """The whole job on embedded data: align a photograph, train, verify, embed, draw. About 5 minutes, no network."""
    with errors_for_users():
        from lrface.demo import run_demo

        summary = run_demo(out, say=say, show=say if json_output else print)
        if json_output:
            print_json(summary)


if __name__ == "__main__":
    app()
