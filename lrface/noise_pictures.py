"""Pictures of noise: images at the decision boundary (paper 004, Fig. 1), samples (Fig. 4B to D) and densities over time
(Fig. 4A)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrface.benchmarks.perturbation import perturbed
from lrface.data.sheet import SheetRow, draw_sheet
from lrface.errors import LrfaceError
from lrface.files import atomic_file, read_json
from lrface.models.noise import NoiseGenerator, build_noise_generator
from lrface.train.sheets import picture

if TYPE_CHECKING:
    from lrface.perturbation import Judge, LabelledImages, PerturbationRun, Sampler, Smallest

IMAGES = 8
SAMPLES = 1 << 18
"""Values of noise that a density is drawn from."""

RANGE = 5.0
"""Densities are drawn from -RANGE to RANGE root mean squares."""

GREY = (0.299, 0.587, 0.114)
"""BT.601: how the paper's greyscale noise is read."""


def grey_density(
    generator: NoiseGenerator | None, channels: int, seed: int = 0, bins: int = 101
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The density of a generator's noise in grey, with the noise of all channels brought to a root mean square of 1.

    Args:
        generator: None for normal noise.

    Returns:
        The middles of the bins and the density there, float64 [bins] each.
    """
    normal = torch.randn(4, channels, 256, SAMPLES // 1024, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        noise = normal if generator is None else generator(normal)
    noise = noise / noise.square().mean().sqrt()
    weights = torch.tensor(GREY if channels == 3 else (1.0,)).view(1, -1, 1, 1)
    values = (noise * weights).sum(1).flatten().double().numpy()
    density, edges = np.histogram(values, bins, (-RANGE, RANGE))
    width = edges[1] - edges[0]
    return (edges[:-1] + edges[1:]) / 2, density / (len(values) * width)


def draw_densities(
    path: str | Path, curves: Mapping[str, NoiseGenerator], channels: int, title: str, note: str = ""
) -> None:
    """Fig. 4A: a curve for each generator, in the order of time, over that of Gaussian noise. ``path``: a .png or .svg."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    middles, normal = grey_density(None, channels)
    axes.fill_between(middles, normal, color="0.88", label="Gaussian")
    colours = colormaps["viridis"](np.linspace(0, 0.92, max(2, len(curves))))
    top = float(normal.max())
    for (name, generator), colour in zip(curves.items(), colours, strict=False):
        _, density = grey_density(generator, channels)
        axes.plot(middles, density, color=colour, label=name, linewidth=1.4)
        top = max(top, min(float(density.max()), 6 * float(normal.max())))
    # A distribution that is nearly one value would leave no room for the others.
    axes.set_ylim(0, 1.05 * top)
    axes.set_xlim(-RANGE, RANGE)
    axes.set_xlabel("noise in grey, in root mean squares of all channels" + (f"\n{note}" if note else ""))
    axes.set_ylabel("density")
    axes.set_title(title)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=9)
    path = Path(path)
    with atomic_file(path) as aside:
        figure.savefig(aside, format=path.suffix[1:] or "png", dpi=120)


def noise_picture(
    generator: NoiseGenerator | None, channels: int, side: int, seed: int = 0
) -> NDArray[np.uint8]:
    """A sample of noise around mid-grey, three root mean squares from black or white: uint8 [side, side, 3]."""
    normal = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        noise = normal if generator is None else generator(normal)
    return picture((0.5 + noise / (6 * noise.square().mean().sqrt()))[0])


def draw_noise(
    path: str | Path,
    generators: Mapping[str, NoiseGenerator],
    channels: int,
    side: int,
    title: str,
    note: str = "",
) -> None:
    """Fig. 4B and C: samples of each generator's noise, of ``side`` pixels, under those of Gaussian noise."""
    rows = [
        SheetRow([name], [[noise_picture(generator, channels, side, seed) for seed in range(4)]])
        for name, generator in [("Gaussian", None), *generators.items()]
    ]
    draw_sheet(path, title, note or "around mid-grey; three root mean squares to black or white", rows)


def draw_boundary(
    path: str | Path,
    title: str,
    images: "LabelledImages",
    judge: "Judge",
    drawn: "Mapping[str, tuple[Sampler, Smallest]]",
) -> None:
    """Fig. 1: images that the model has right, and each with the least noise of each kind that makes it wrong."""
    sizes = {name: smallest.size for name, (_, smallest) in drawn.items()}
    good = np.all([(size > 0) & np.isfinite(size) for size in sizes.values()], axis=0).nonzero()[0]
    if not len(good):
        return
    # Those nearest to the medians, so that they show what is told: spread over the classes where there are several.
    typical = np.sum([np.abs(np.log(size[good] / np.median(size[good]))) for size in sizes.values()], axis=0)
    chosen: list[int] = []
    order = good[np.argsort(typical, kind="stable")].tolist()
    for fresh in (True, False):
        for row in order:
            seen = {int(images.labels[other]) for other in chosen}
            if (
                row not in chosen
                and len(chosen) < IMAGES
                and (not fresh or int(images.labels[row]) not in seen)
            ):
                chosen.append(row)
    classes = judge.classifier.classes
    rows = []
    for row in chosen:
        clean = images.float(slice(row, row + 1))
        shown: list[list[np.ndarray | None]] = [[picture(clean[0])]]
        words = []
        for name, (draw, smallest) in drawn.items():
            noise = draw(clean, row)
            noise = noise / noise.square().mean().sqrt()
            shown.append([picture(perturbed(clean, noise, torch.tensor([smallest.gamma[row]]).float())[0])])
            words.append(f"{name} {smallest.size[row]:.2f}")
        label = int(judge.right[row])
        rows.append(SheetRow([str(label) if classes is None else classes[label], *words], shown))
    draw_sheet(
        path,
        title,
        "each image with the least noise that makes the model wrong; L2 sizes at the left",
        rows,
        ["clean", *drawn],
    )


def draw_run(
    folder: Path,
    run: "PerturbationRun",
    images: "LabelledImages",
    judges: "Sequence[Judge]",
    drawn: "Sequence[Mapping[str, tuple[Sampler, Smallest]]]",
    learned: Sequence[Sequence[NoiseGenerator]],
) -> None:
    """Everything of a run of `lrface perturbation`: boundary-N.png, noise-N.png and densities-N.png of model N."""
    channels, side = run.about["channels"], run.about["size"]
    for number, (result, own, generators) in enumerate(
        zip(run.results, drawn, learned, strict=True), start=1
    ):
        model = result["model"]
        judge = judges[number - 1]
        draw_boundary(folder / f"boundary-{number}.png", model, images, judge, own)
        if generators:
            named = {f"generator {seed + 1}": made.cpu() for seed, made in enumerate(generators)}
            note = f"trained with noise of length {result['noises']['adversarial']['epsilon']:.2f}"
            draw_noise(folder / f"noise-{number}.png", named, channels, side, f"{model}: adversarial noise")
            draw_densities(folder / f"densities-{number}.png", named, channels, model, note)


def generators_of_run(run: str | Path) -> tuple[dict[str, NoiseGenerator], dict[str, Any]]:
    """The generators that a run of the method ant kept for its replay, in the order of time, and the current one.

    Returns:
        Names and generators; and facts: ``step, kept, saved`` (states that were saved in all), ``channels, size``.

    Raises:
        LrfaceError: no run, no checkpoint of the method ant.
    """
    from lrface.recipes import load_recipe
    from lrface.train.checkpoint import PARTS, TRAINING, latest_checkpoint, load_state, load_training_state

    run = Path(run)
    recipe_file = run / "recipe.yaml"
    if not recipe_file.is_file():
        raise LrfaceError(f"{run}: no run of `lrface train` (it has no recipe.yaml)")
    recipe = load_recipe(str(recipe_file))
    for number, stage in reversed(list(enumerate(recipe.stages, start=1))):
        newest = latest_checkpoint(run / "stages" / f"{number}-{stage.name}")
        if stage.method.name == "ant" and newest is not None and (newest / TRAINING).is_file():
            break
    else:
        raise LrfaceError(
            f"{run}: no stage of the method ant with a checkpoint; noise is learned by that method"
        )
    card = read_json(newest / "model.json", "the card of the checkpoint")
    channels = 1 if card["input"]["colour"] == "grey" else 3
    wanted = stage.method.arguments.get("generator", "noise1x1")
    state = load_training_state(newest).extra
    found: dict[str, NoiseGenerator] = {}
    states: Tensor = state["states"]
    for place, row in enumerate(states, start=1):
        generator = build_noise_generator(wanted, channels)
        generator.load(row)
        found[f"state {place}"] = generator
    current = build_noise_generator(wanted, channels)
    prefix = "generator."
    parts = {
        key.removeprefix(prefix): value
        for key, value in load_state(newest / PARTS).items()
        if key.startswith(prefix)
    }
    current.load_state_dict(parts)
    found["current"] = current
    facts = {
        "checkpoint": str(newest),
        "step": state["step"],
        "saved": state["seen"],
        "kept": len(states),
        "channels": channels,
        "size": card["input"]["size"],
    }
    return {name: made.requires_grad_(False) for name, made in found.items()}, facts


SHOWN = 10
"""Generators in a picture: more are thinned out evenly."""


def draw_training(run: str | Path, folder: str | Path) -> dict[str, Any]:
    """densities.png and noise.png of a training run's generators; returns the facts of :func:`generators_of_run` and the
    files."""
    generators, facts = generators_of_run(run)
    names = list(generators)
    places = np.unique(np.linspace(0, len(names) - 1, min(SHOWN, len(names))).round().astype(int))
    shown = {names[place]: generators[names[place]] for place in places}
    note = f"{facts['kept']} states of {facts['saved']} saved in {facts['step']} steps, {len(shown)} shown"
    files = [str(Path(folder) / "densities.png"), str(Path(folder) / "noise.png")]
    title = f"{Path(run).name}: noise learned in training"
    draw_densities(files[0], shown, facts["channels"], title, note)
    draw_noise(files[1], shown, facts["channels"], 28, title, f"patches of 28 x 28 pixels; {note}")
    return {**facts, "files": files}
