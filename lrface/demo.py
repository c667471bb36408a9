"""The main job on an embedded default: align a photograph, train, verify, embed, draw. Needs no data and no network.

The photograph is the group picture that the insightface wheel ships; the training faces are drawn
(lrface.data.synthetic): their accuracies say that the machinery works, and nothing about photographs. The faces of
the photograph are embedded by the model inside lrface.
"""

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lrface.errors import LrfaceError, UsageError
from lrface.files import atomic_file, write_json

if TYPE_CHECKING:
    from lrface.config import Recipe
    from lrface.data.synthetic import SyntheticFaces
    from lrface.embed import FaceEmbedder

RESOLUTIONS = (112, 56, 28, 14)
SIZE = 112
FACES_IN_PHOTO = 6
MODELS = {"qualnet_lm": "QualNet-LM", "naive": "naive augmentation"}
"""The recipes demo/NAME that are trained, and what they are called in tables."""

COLOURS = {"qualnet_lm": "#1f5fa8", "naive": "#d9772b"}
SHOWN_RECONSTRUCTIONS = 3
RECONSTRUCTED = 60
"""Held-out images over which the error of the reconstruction is averaged."""


@dataclass(frozen=True)
class HeldOut:
    """The drawn identities that are verified, none of which is trained on.

    identities, images: how many, and images of each. pairs: even. first_identity: beyond the training's last.
    """

    identities: int = 100
    images: int = 6
    pairs: int = 3000
    first_identity: int = 1_000_000


@dataclass(frozen=True)
class PhotoFaces:
    """Faces of the photograph from left to right.

    crops: uint8 [n, 112, 112, 3] RGB, aligned. scores: float32 [n]. effective_resolution: float32 [n], pixels of
    the photograph that span a crop.
    """

    path: Path
    crops: np.ndarray
    scores: np.ndarray
    effective_resolution: np.ndarray


def print_to_stderr(message: str) -> None:
    """Messages go to standard error; standard output is for results."""
    print(message, file=sys.stderr, flush=True)


def run_demo(
    out: Path,
    *,
    show_progress: bool = True,
    say: Callable[[str], None] = print_to_stderr,
    seed: int = 0,
    overrides: Sequence[str] = (),
    held_out: HeldOut | None = None,
    show: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Align six faces, train QualNet-LM and naive augmentation, verify both, embed the faces with the shipped
    model, draw one picture.

    What an earlier call in the same place has trained is used again, and a run that was stopped goes on.

    Args:
        out: ``OUT/qualnet_lm`` and ``OUT/naive`` hold the runs, ``OUT/demo.png`` the picture, ``OUT/demo.json``
            the summary.
        show_progress: draw bars on standard error.
        say: receives messages.
        seed: of both trainings.
        overrides: recipe fields for both recipes, as in ``lrface train``.
        held_out: what is verified; None takes the default :class:`HeldOut`.
        show: receives the tables, the result of the demo.

    Returns:
        The summary, all JSON: ``photo``, ``models`` (``results`` are rows of evaluate_verification), ``faces``,
        ``reconstruction``, ``seconds``, ``picture``.

    Raises:
        LrfaceError: the photograph is not there or shows no face, or a training fails.
        UsageError: another recipe was trained in this place, or a wrong override.
        KeyboardInterrupt: a signal stopped a training, after its checkpoint was written.
    """
    out = Path(out).expanduser().absolute()
    test_set = held_out or HeldOut()
    seconds: dict[str, float] = {}
    started = time.perf_counter()

    with _timed(seconds, "align"):
        faces = align_photo(find_photo())
    say(f"1/4 aligned {len(faces.crops)} faces of {faces.path}")
    if len(faces.crops) != FACES_IN_PHOTO:
        say(f"    the photograph shows {FACES_IN_PHOTO} faces; the detector found {len(faces.crops)}")

    recipes: dict[str, Recipe] = {}
    models: dict[str, dict[str, Any]] = {}
    for name, title in MODELS.items():
        say(f"2/4 training {title}")
        with _timed(seconds, f"train_{name}"):
            recipes[name], models[name] = _train(name, out / name, seed, overrides, show_progress, say)

    from lrface.embed import load_embedder

    source = _held_out_faces(test_set, recipes.values())
    embedders = {name: load_embedder(out / name) for name in MODELS}
    for name, title in MODELS.items():
        say(f"3/4 verifying {title} on {test_set.identities} held-out identities")
        with _timed(seconds, f"verify_{name}"):
            models[name]["results"] = _verify(embedders[name], source, test_set, show_progress)

    say("4/4 embedding the faces at four resolutions, drawing")
    with _timed(seconds, "embed"):
        embedded = embed_at_resolutions(load_embedder(), faces.crops)
        network = load_reconstruction(out / "qualnet_lm", recipes["qualnet_lm"])
        drawn = np.stack([source.image(index) for index in _reconstructed_indices(source)])
        reconstructions = reconstruct(network, drawn)
    summary: dict[str, Any] = {
        "photo": {
            "path": str(faces.path),
            "faces": len(faces.crops),
            "scores": _rounded(faces.scores),
            "effective_resolution": _rounded(faces.effective_resolution, 1),
        },
        "held_out": vars(test_set),
        "models": models,
        "faces": embedded,
        "reconstruction": {
            "images": len(drawn),
            "l1": {
                str(size): round(float(np.abs(images - drawn / 255.0).mean()), 4)
                for size, images in reconstructions.items()
            },
        },
    }
    picture = out / "demo.png"
    with _timed(seconds, "picture"):
        shown = slice(0, SHOWN_RECONSTRUCTIONS)
        draw_picture(
            picture,
            faces,
            embedded,
            drawn[shown],
            {size: images[shown] for size, images in reconstructions.items()},
            {name: models[name]["results"] for name in MODELS},
        )
    seconds["total"] = time.perf_counter() - started
    summary["seconds"] = {key: round(value, 1) for key, value in seconds.items()}
    summary["picture"] = str(picture)
    write_json(out / "demo.json", summary)
    show(summary_tables(summary))
    return summary


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


def _rounded(values: Any, digits: int = 4) -> list[Any]:
    return np.round(np.asarray(values, dtype=np.float64), digits).tolist()


# -------------------------------------------------------------------------------------------------- photograph


def find_photo() -> Path:
    """The group photograph of the insightface wheel, found without importing insightface.

    Raises:
        LrfaceError: insightface is not installed, or its wheel has no such photograph.
    """
    spec = importlib.util.find_spec("insightface")
    if spec is None or not spec.submodule_search_locations:
        raise LrfaceError(
            "the demo's photograph comes with insightface, which is not installed: pip install insightface"
        )
    path = Path(next(iter(spec.submodule_search_locations))) / "data" / "images" / "t1.jpg"
    if not path.is_file():
        raise LrfaceError(
            f"{path}: the insightface that is installed has no such photograph; pip install --force-reinstall insightface"
        )
    return path


def align_photo(path: Path) -> PhotoFaces:
    """All faces that the detector finds with its default settings.

    Raises:
        LrfaceError: there is none.
    """
    from lrface.align.detect import load_detector
    from lrface.align.pipeline import read_photo
    from lrface.align.warp import effective_resolution, warp_face

    photo = read_photo(path)
    found = sorted(load_detector().detect([photo])[0], key=lambda face: float(face.box[0] + face.box[2]))
    if not found:
        raise LrfaceError(f"{path}: no face found")
    return PhotoFaces(
        path,
        np.stack([warp_face(photo, face.landmarks, SIZE) for face in found]),
        np.array([face.score for face in found], dtype=np.float32),
        np.array([effective_resolution(face.landmarks, SIZE) for face in found], dtype=np.float32),
    )


# ---------------------------------------------------------------------------------------- training, verification


def _train(
    name: str, out: Path, seed: int, overrides: Sequence[str], show_progress: bool, say: Callable[[str], None]
) -> "tuple[Recipe, dict[str, Any]]":
    """Train recipe demo/NAME into ``out``, or go on with it; the recipe, and its part of the summary."""
    from lrface.recipes import load_recipe, run_recipe
    from lrface.train.signals import Interrupted

    recipe = load_recipe(f"demo/{name}", [f"seed={seed}", *overrides])
    recipe.out = str(out)
    try:
        run = run_recipe(recipe, show_progress=show_progress, say=lambda message: say(f"    {message}"))
    except Interrupted as stopped:
        say(f"    {stopped}")
        raise KeyboardInterrupt from stopped
    except UsageError as error:
        raise UsageError(f"{error}. (In the demo: give another --out, or delete {out}.)") from error
    steps = [int(stage["steps"]) for stage in run.stages]
    return recipe, {
        "recipe": f"demo/{name}",
        "model": run.model,
        "weights_sha256": run.weights_sha256,
        "identities": run.identities,
        "images": run.images,
        "steps": steps,
        "training_images": sum(steps) * recipe.data.batch_size,
        "images_per_second": [stage.get("images_per_second") for stage in run.stages],
    }


def _held_out_faces(test_set: HeldOut, recipes: "Sequence[Recipe] | Any") -> "SyntheticFaces":
    """Drawn faces of the same world as the training faces, and of none of the same identities.

    Raises:
        UsageError: a recipe trains on one of these identities, or on other data.
    """
    from lrface.data.synthetic import SyntheticFaces

    seeds = set()
    for recipe in recipes:
        trained = recipe.data.synthetic
        if trained is None:
            raise UsageError(f"recipe {recipe.name}: the demo trains on drawn faces (data.synthetic)")
        first, last = trained.first_identity, trained.first_identity + trained.identities
        if first < test_set.first_identity + test_set.identities and test_set.first_identity < last:
            raise UsageError(
                f"recipe {recipe.name} trains on identities {first} to {last - 1}, of which some are held out "
                f"(from {test_set.first_identity}); lower data.synthetic.identities"
            )
        seeds.add(trained.seed)
    if len(seeds) != 1:
        raise UsageError(f"both recipes must have one data.synthetic.seed; found {sorted(seeds)}")
    return SyntheticFaces(
        test_set.identities, test_set.images, seed=seeds.pop(), first_identity=test_set.first_identity
    )


def _verify(
    embedder: "FaceEmbedder", source: "SyntheticFaces", test_set: HeldOut, show_progress: bool
) -> list[dict[str, Any]]:
    from lrface.benchmarks.verification import VerificationSet, evaluate_verification
    from lrface.data.synthetic import verification_pairs

    left, right, same = verification_pairs(source, test_set.pairs)
    benchmark = VerificationSet.from_source(source, left, right, same, name="drawn faces")
    return evaluate_verification(
        embedder.embed_tensor, benchmark, resolutions=RESOLUTIONS, progress=show_progress
    ).rows


# ------------------------------------------------------------------------------------ embedding, reconstruction


def at_resolutions(crops: np.ndarray) -> dict[int, Tensor]:
    """uint8 [n, 112, 112, 3] -> for each size float32 [n, 3, 112, 112] in [0, 1]: nearest down, bilinear up."""
    from lrface.degrade.resolution import resample

    images = torch.from_numpy(np.ascontiguousarray(crops)).permute(0, 3, 1, 2).contiguous().float() / 255.0
    return {size: resample(images, size) for size in RESOLUTIONS}


def embed_at_resolutions(embedder: "FaceEmbedder", crops: np.ndarray) -> dict[str, Any]:
    """How like each face stays to itself as it loses resolution.

    Returns, by size: ``own``, the cosine between each face at this size and the same face at 112; ``others``, its
    largest cosine to another of the faces at 112 (None for a single face); ``found``, how many faces are nearest to
    themselves.
    """
    vectors = {
        size: embedder.embed(images, kind="crop", flip=True).vectors
        for size, images in at_resolutions(crops).items()
    }
    rows: dict[str, Any] = {}
    for size, probe in vectors.items():
        cosines = embedder.similarity(probe, vectors[SIZE])
        own = np.diagonal(cosines)
        others = np.where(np.eye(len(cosines), dtype=bool), -np.inf, cosines).max(axis=1)
        rows[str(size)] = {
            "own": _rounded(own),
            "others": _rounded(others) if len(cosines) > 1 else None,
            "found": int((own > others).sum()),
        }
    return {"embedding_size": embedder.embedding_size, "faces": len(crops), "resolutions": rows}


class Reconstruction(nn.Module):
    """Encoder and decoder of QualNet-LM: float32 [n, 3, 112, 112] in [0, 1] -> the same, what the feature map holds."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(self, images: Tensor) -> Tensor:
        feature_map = self.encoder.features(images)  # type: ignore[operator]
        return self.decoder(feature_map).clamp(0.0, 1.0)


def load_reconstruction(run: Path, recipe: "Recipe") -> Reconstruction:
    """Encoder and decoder of the last checkpoint of a QualNet run, in eval mode.

    Raises:
        LrfaceError: the run has no checkpoint of its last stage, or one of another architecture.
    """
    from lrface.models import build_backbone, build_decoder
    from lrface.train.checkpoint import fill, latest_checkpoint, load_parts

    folder = run / "stages" / f"{len(recipe.stages)}-{recipe.stages[-1].name}"
    newest = latest_checkpoint(folder)
    if newest is None:
        raise LrfaceError(f"{folder} holds no checkpoint; delete {run} and run the demo again")
    encoder = build_backbone(recipe.backbone.name, **recipe.backbone.arguments)
    decoder = build_decoder(recipe.decoder.name, encoder.feature_channels, **recipe.decoder.arguments)
    state = load_parts(newest)
    for name, part in (("encoder", encoder), ("decoder", decoder)):
        prefix = f"{name}."
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        fill(part, own, f"{name} of {newest}")
    return Reconstruction(encoder, decoder).eval()


def reconstruct(network: Reconstruction, crops: np.ndarray) -> dict[int, np.ndarray]:
    """What the decoder makes of uint8 [n, 112, 112, 3] at each size: float32 [n, 112, 112, 3] in [0, 1]."""
    with torch.inference_mode():
        return {
            size: np.concatenate([network(part).permute(0, 2, 3, 1).numpy() for part in images.split(32)])
            for size, images in at_resolutions(crops).items()
        }


def _reconstructed_indices(source: "SyntheticFaces") -> list[int]:
    """The first image of each of the first identities, then their second images and so on: not chosen by hand."""
    order = np.arange(len(source)).reshape(len(source.identities), -1).T.ravel()
    return order[:RECONSTRUCTED].tolist()


# ----------------------------------------------------------------------------------------------------- results


def summary_tables(summary: dict[str, Any]) -> str:
    """The summary of :func:`run_demo` as text."""
    from lrface.benchmarks.report import format_columns

    models, faces = summary["models"], summary["faces"]
    first = models["qualnet_lm"]["results"][0]
    accuracy = [
        [str(size)]
        + [
            f"{row['accuracy']:.2f} +- {row['accuracy_std']:.2f}"
            for name in MODELS
            for row in models[name]["results"]
            if row["probe_size"] == size
        ]
        for size in RESOLUTIONS
    ]
    likeness = []
    for size, row in faces["resolutions"].items():
        others = "-" if row["others"] is None else f"{max(row['others']):.2f}"
        likeness.append(
            [size, *(f"{value:.2f}" for value in row["own"]), others, f"{row['found']} of {faces['faces']}"]
        )
    trained = ", ".join(
        f"{title} on {models[name]['training_images']} images" for name, title in MODELS.items()
    )
    header = ["pixels", *(f"face {number + 1}" for number in range(faces["faces"])), "nearest other", "found"]
    lines = [
        "",
        f"Verification accuracy in percent on {summary['held_out']['identities']} drawn identities that were not "
        f"trained on ({first['pairs']} pairs,",
        f"{first['folds']} folds, +- one standard deviation over the folds, chance is 50). Trained: {trained}.",
        "",
        format_columns(["pixels", *MODELS.values()], accuracy),
        "",
        "The faces of the photograph, embedded by the model inside lrface: cosine of each face at a resolution with "
        "itself at 112, the",
        "largest cosine with another face, and how many are nearest to themselves.",
        "",
        format_columns(header, likeness),
        "",
        f"Drawn faces show that all parts work; they say nothing about photographs. {summary['seconds']['total']:.0f} s.",
        f"model:   {models['qualnet_lm']['model']}",
        f"picture: {summary['picture']}",
    ]
    return "\n".join(lines)


GAP = 10  # pixels between crops on a sheet


def _montage(
    rows: Sequence[Sequence[np.ndarray]], below: Sequence[int], groups: int = 0
) -> tuple[np.ndarray, Any]:
    """Crops [112, 112, 3] in [0, 1] on white, ``below[r]`` free pixels under row r, a wider gap after each ``groups``
    columns (0: none); and the function (row, column) -> left, top of that crop."""
    columns = len(rows[0])

    def place(row: int, column: int) -> tuple[int, int]:
        left = column * (SIZE + GAP) + (3 * GAP * (column // groups) if groups else 0)
        return left, sum(SIZE + GAP + space for space in below[:row])

    right, bottom = place(len(rows), columns - 1)
    sheet = np.ones((bottom - GAP, right + SIZE, 3), dtype=np.float32)
    for r, row in enumerate(rows):
        for c, crop in enumerate(row):
            left, top = place(r, c)
            sheet[top : top + SIZE, left : left + SIZE] = crop
    return sheet, place


def draw_picture(
    path: Path,
    faces: PhotoFaces,
    embedded: dict[str, Any],
    drawn: np.ndarray,
    reconstructions: dict[int, np.ndarray],
    results: dict[str, list[dict[str, Any]]],
) -> Path:
    """One PNG: the faces at four resolutions, accuracy against resolution, and reconstructions of drawn faces.

    Args:
        path: where it goes.
        faces: of the photograph.
        embedded: of :func:`embed_at_resolutions`.
        drawn: uint8 [k, 112, 112, 3], drawn faces.
        reconstructions: by size, float [k, 112, 112, 3] in [0, 1], of these.
        results: by name in MODELS, rows of evaluate_verification.

    Raises:
        LrfaceError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise LrfaceError(
            f"the picture needs matplotlib, which cannot be imported ({error}): pip install matplotlib"
        ) from error

    figure = Figure(figsize=(16, 10.2), dpi=110, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    figure.text(0.02, 0.965, "lrface demo", fontsize=19, weight="bold", va="center")
    figure.text(
        0.135,
        0.964,
        "six faces of a photograph at four resolutions, two networks trained on drawn faces",
        fontsize=13,
        color="#444444",
        va="center",
    )
    _draw_faces(figure, faces, embedded)
    _draw_curve(figure, results)
    _draw_reconstructions(figure, drawn, reconstructions)
    with atomic_file(path) as aside:
        canvas.print_figure(aside, format="png", dpi=110)
    return path


def _sheet_axes(figure: Any, sheet: np.ndarray, left: float, top: float, width: float, height: float) -> Any:
    """Axes that show ``sheet`` in its own aspect inside the given box, at its top left. Shares of the figure."""
    figure_width, figure_height = figure.get_size_inches()
    rows, columns = sheet.shape[:2]
    inches = min(width * figure_width / columns, height * figure_height / rows)
    shown_width, shown_height = columns * inches / figure_width, rows * inches / figure_height
    axes = figure.add_axes((left, top - shown_height, shown_width, shown_height))
    axes.imshow(sheet, interpolation="antialiased", aspect="auto")
    axes.set_axis_off()
    return axes


def _heading(figure: Any, x: float, y: float, title: str, explanation: str) -> None:
    """The title of a part of the picture, and a line below it that says what is shown."""
    figure.text(x, y, title, fontsize=13, weight="bold", va="center")
    figure.text(x, y - 0.023, explanation, fontsize=10.5, color="#444444", va="center")


def _draw_faces(figure: Any, faces: PhotoFaces, embedded: dict[str, Any]) -> None:
    shown = [list(images.permute(0, 2, 3, 1).numpy()) for images in at_resolutions(faces.crops).values()]
    sheet, place = _montage(shown, [26] * len(shown))
    _heading(
        figure,
        0.02,
        0.92,
        "Aligned faces of the photograph",
        "above: pixels of the photograph that a face spans; below: cosine with itself at 112 pixels, by the shipped model",
    )
    axes = _sheet_axes(figure, sheet, 0.062, 0.865, 0.50, 0.525)
    for column, resolution in enumerate(faces.effective_resolution):
        left, _ = place(0, column)
        axes.text(
            left + SIZE / 2,
            -7,
            f"{resolution:.0f} px",
            ha="center",
            va="bottom",
            fontsize=9.5,
            color="#777777",
        )
    for row, size in enumerate(RESOLUTIONS):
        _, top = place(row, 0)
        axes.text(-12, top + SIZE / 2, f"{size} px", ha="right", va="center", fontsize=12)
        for column, cosine in enumerate(embedded["resolutions"][str(size)]["own"]):
            left, top = place(row, column)
            axes.text(left + SIZE / 2, top + SIZE + 4, f"{cosine:.2f}", ha="center", va="top", fontsize=10)


def _draw_curve(figure: Any, results: dict[str, list[dict[str, Any]]]) -> None:
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

    first = next(iter(results.values()))[0]
    _heading(
        figure,
        0.535,
        0.92,
        "Verification accuracy",
        f"identities not trained on, {first['pairs']} pairs; bars: one standard deviation over {first['folds']} folds",
    )
    axes = figure.add_axes((0.575, 0.40, 0.405, 0.465))
    lowest, highest = 50.0, 50.0
    for number, (name, rows) in enumerate(results.items()):
        rows = sorted(rows, key=lambda row: row["probe_size"])
        # The curves stand a little apart, so that their error bars can be told from each other.
        shift = 1.025 ** (number - (len(results) - 1) / 2)
        accuracy = [row["accuracy"] for row in rows]
        spread = [row["accuracy_std"] for row in rows]
        lowest = min([lowest, *(a - s for a, s in zip(accuracy, spread, strict=True))])
        highest = max([highest, *(a + s for a, s in zip(accuracy, spread, strict=True))])
        axes.errorbar(
            [row["probe_size"] * shift for row in rows],
            accuracy,
            yerr=spread,
            label=MODELS[name],
            color=COLOURS[name],
            marker="os"[number % 2],
            markersize=7,
            linewidth=2,
            capsize=4,
        )
    axes.axhline(50, color="#888888", linewidth=1, linestyle=":")
    axes.annotate(
        "chance", (1, 50), (-4, 3), ("axes fraction", "data"), "offset points", ha="right", color="#777777"
    )
    axes.set_xscale("log")
    axes.set_xlim(12, 131)
    axes.set_ylim(max(0.0, lowest - 3), min(101.0, highest + 4))
    axes.xaxis.set_major_locator(FixedLocator(sorted(RESOLUTIONS)))
    axes.set_xticklabels([str(size) for size in sorted(RESOLUTIONS)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("resolution of both faces (pixels)", fontsize=11)
    axes.set_ylabel("accuracy (%)", fontsize=11)
    axes.grid(True, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="best", fontsize=11)


def _draw_reconstructions(figure: Any, drawn: np.ndarray, reconstructions: dict[int, np.ndarray]) -> None:
    seen = {size: images.permute(0, 2, 3, 1).numpy() for size, images in at_resolutions(drawn).items()}
    columns = [(face, size) for face in range(len(drawn)) for size in RESOLUTIONS]
    rows = [[images[size][face] for face, size in columns] for images in (seen, reconstructions)]
    sheet, place = _montage(rows, [0, 0], groups=len(RESOLUTIONS))
    _heading(
        figure,
        0.02,
        0.318,
        "Reconstructions by QualNet-LM's decoder",
        "drawn faces that were not trained on, from the feature map that the embedding is computed from",
    )
    axes = _sheet_axes(figure, sheet, 0.085, 0.252, 0.897, 0.235)
    for number, (_, size) in enumerate(columns):
        left, _ = place(0, number)
        axes.text(left + SIZE / 2, -6, f"{size} px", ha="center", va="bottom", fontsize=10)
    for row, label in enumerate(("what the\nnetwork sees", "what it\nreconstructs")):
        _, top = place(row, 0)
        axes.text(-12, top + SIZE / 2, label, ha="right", va="center", fontsize=10.5)
