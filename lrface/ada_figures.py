"""Pictures of the AdA paper (003): adversarial corruptions and their similarity by radius (figure 1), accuracy under AdA by
radius, and how well a corruption network draws what corruptions make of an image (figure 3)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrface.attack_trials import TrialRun
from lrface.benchmarks.corrupted import corrupt_images
from lrface.benchmarks.page import COLOURS
from lrface.degrade.adversarial import Attack, Perturbation, corrupted, perturb
from lrface.errors import UsageError
from lrface.files import atomic_file
from lrface.losses.ssim import ssim
from lrface.models.per_example import CorruptionNetwork
from lrface.perturbation import Judge, LabelledImages
from lrface.progress import progress

RADII = (0.0075, 0.009375, 0.015, 0.0225, 0.03)
"""Of figure 1b; the paper names 0.0075, 0.009375 and 0.015."""

# ---------------------------------------------------------------------------------------------- similarity by radius


@dataclass
class Corrupted:
    """What AdA made of some images at one radius.

    images: float32 [n, 3, h, w] in [0, 1]; similarity: SSIM with the originals, float64 [n]; wrong: whether the classifier
    errs on them, bool [n].
    """

    images: Tensor
    similarity: NDArray[np.float64]
    wrong: NDArray[np.bool_]


def corrupted_by_radius(
    judge: Judge,
    images: LabelledImages,
    network: CorruptionNetwork,
    radii: Sequence[float] = RADII,
    steps: int = 10,
    seed: int = 0,
    batch_size: int = 32,
    show_progress: bool = True,
) -> dict[float, Corrupted]:
    """AdA's attack on all images at each radius, without the limit of similarity."""
    place = next(network.parameters()).device
    found = {}
    with progress(len(images.pixels) * len(radii), "AdA", enabled=show_progress) as bar:
        for radius in radii:
            drawn, similarity, wrong = [], [], []
            for rows in torch.arange(len(images.pixels)).split(batch_size):
                clean, labels = images.float(rows).to(place), judge.right[rows].to(place)
                settings = Attack(radius=radius, steps=steps)
                made = perturb(
                    clean, labels, judge.scores, network, rows + (seed << 20), settings, similarity=None
                )
                drawn.append(made.images.cpu())
                similarity.append(made.similarity.double().cpu())
                wrong.append(judge.wrong(drawn[-1], rows))
                bar.advance(len(rows))
            found[radius] = Corrupted(
                torch.cat(drawn), torch.cat(similarity).numpy(), torch.cat(wrong).numpy()
            )
    return found


def kernel_density(
    values: NDArray[np.float64],
    places: NDArray[np.float64],
    highest: float | None = None,
    least: float = 0.002,
) -> NDArray[np.float64]:
    """Gaussian kernel density with Scott's bandwidth, n ** (-1/5) standard deviations but at least ``least``; 0 above
    ``highest``, with what would lie there mirrored at it."""
    width = max(float(values.std()) * len(values) ** -0.2, least)

    def density(of: NDArray[np.float64]) -> NDArray[np.float64]:
        kernels = np.exp(-0.5 * ((places[:, None] - of[None]) / width) ** 2)
        return kernels.mean(1) / (width * np.sqrt(2 * np.pi))

    if highest is None:
        return density(values)
    return np.where(places <= highest, density(values) + density(2 * highest - values), 0.0)


def draw_similarity(
    path: str | Path,
    images: LabelledImages,
    found: Mapping[float, Corrupted],
    title: str,
    shown: float = 0.015,
    pairs: int = 6,
) -> None:
    """Figure 1: on the left images, what AdA made of them at the radius ``shown`` and five times their difference;
    on the right the density of SSIM for each radius. ``path``: a .png or .svg."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1, 1.5))[0]
    nearest = min(found, key=lambda radius: abs(radius - shown))
    made = found[nearest]
    # Those that fool the classifier first: they are what the figure is about.
    chosen = np.argsort(~made.wrong, kind="stable")[:pairs]
    cells = left.subplots(len(chosen), 3, squeeze=False)
    for row, index in zip(cells, chosen.tolist(), strict=True):
        clean = images.float(slice(index, index + 1))[0]
        change = (0.5 + 5 * (made.images[index] - clean)).clamp(0, 1)
        for axes, picture in zip(row, (clean, made.images[index], change), strict=True):
            axes.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set_axis_off()
    for axes, name in zip(cells[0], ("original", "AdA", "5 x difference"), strict=True):
        axes.set_title(name, fontsize=9)
    left.suptitle(f"radius {nearest:g}", fontsize=10)
    axes = right.subplots()
    lowest = min(float(each.similarity.min()) for each in found.values())
    places = np.linspace(max(-0.1, lowest - 0.05), 1.0, 800)
    colours = colormaps["viridis"](np.linspace(0, 0.85, len(found)))
    for (radius, each), colour in zip(found.items(), colours, strict=True):
        density = kernel_density(each.similarity, places, highest=1.0)
        axes.plot(
            places,
            density,
            color=colour,
            label=f"{radius:g}   mean {each.similarity.mean():.3f}",
            linewidth=1.5,
        )
        axes.fill_between(places, density, color=colour, alpha=0.12)
    axes.set_xlabel("SSIM of original and corrupted image")
    axes.set_ylabel("density")
    axes.set_xlim(places[0], 1.0)
    axes.set_ylim(bottom=0)
    axes.legend(title="radius", frameon=False, loc="upper left")
    axes.grid(True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    save(figure, path)


def draw_accuracy(path: str | Path, run: TrialRun, names: Mapping[str, str], title: str) -> None:
    """Accuracy of each model under AdA against the radius, from trials of ada; radius 0 is the clean accuracy.

    Args:
        names: what each model is called.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, result in enumerate(run.results):
        trials = [trial for trial in result["attacks"] if trial["norm"] == "weights"]
        places = [0.0, *(trial["size"] for trial in trials)]
        values = [result["clean_accuracy"], *(trial["accuracy"] for trial in trials)]
        label = names.get(result["model"], result["model"])
        axes.plot(
            places, values, marker="o", markersize=3.5, color=COLOURS[number % len(COLOURS)], label=label
        )
    axes.set_xlabel("radius of the perturbation of the network's weights, relative to their norm")
    axes.set_ylabel("accuracy (%)")
    axes.set_ylim(0, 100)
    axes.set_xlim(left=0)
    axes.set_title(title, fontsize=11, loc="left")
    axes.legend(frameon=False)
    axes.grid(True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


# ------------------------------------------------------------------------------------------------- reconstruction


@dataclass
class Reconstruction:
    """SSIM of corrupted images with what a network draws from their clean originals, float64 [n] each.

    before: with the network as trained; after: with its weights perturbed for each image.
    """

    before: NDArray[np.float64]
    after: NDArray[np.float64]


def reconstruct(
    network: CorruptionNetwork,
    clean: Tensor,
    wanted: Tensor,
    steps: int = 50,
    learning_rate: float = 1e-3,
    penalty: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Weights for each image that turn it into its corrupted variant (paper 003, eq. 6): Adam on
    SSIM(c(x; phi + delta), x') - penalty ||delta||^2, from delta = 0.

    Args:
        clean, wanted: float32 [n, 3, h, w] in [0, 1].

    Returns:
        SSIM before and after, [n] each.
    """
    delta: Perturbation = {
        name: value.new_zeros(len(clean), *value.shape).requires_grad_()
        for name, value in network.named_parameters()
    }
    adam = torch.optim.Adam(list(delta.values()), learning_rate)
    before: Tensor | None = None
    with torch.enable_grad():
        for _ in range(steps):
            similarity = ssim(corrupted(network, delta, clean), wanted)
            before = similarity.detach() if before is None else before
            norm = sum((value.square().sum() for value in delta.values()), start=clean.new_zeros(()))
            adam.zero_grad(set_to_none=True)
            # Images do not see each other: the gradient of the sum is each one's own.
            (penalty * norm - similarity.sum()).backward()
            adam.step()
    with torch.no_grad():
        after = ssim(corrupted(network, delta, clean), wanted)
    return after if before is None else before, after


def reconstruct_corruptions(
    network: CorruptionNetwork,
    images: LabelledImages,
    names: Sequence[str],
    severities: Sequence[int] = (1, 2, 3, 4, 5),
    steps: int = 50,
    seed: int = 0,
    batch_size: int = 32,
    show_progress: bool = True,
) -> dict[str, Reconstruction]:
    """How well a network can draw each corruption: figure 3, by corruption. Severities take turns.

    Raises:
        UsageError: images without a set of corruptions in colour.
    """
    if images.kind.channels != 3:
        raise UsageError(f"corruption networks draw images in colour; {images.kind.title} is grey")
    place = next(network.parameters()).device
    pixels = images.pixels.permute(0, 2, 3, 1).contiguous().numpy()
    found = {}
    with progress(len(names) * len(pixels), "reconstruction", enabled=show_progress) as bar:
        for name in names:
            wanted = np.empty_like(pixels)
            for turn, severity in enumerate(severities):
                rows = np.arange(turn, len(pixels), len(severities))
                if len(rows):
                    wanted[rows] = corrupt_images(pixels[rows], name, severity, images.kind.set, seed)
            before, after = [], []
            for rows_ in torch.arange(len(pixels)).split(batch_size):
                target = torch.from_numpy(wanted[rows_.numpy()]).permute(0, 3, 1, 2).float().div_(255)
                one, other = reconstruct(network, images.float(rows_).to(place), target.to(place), steps)
                before.append(one.double().cpu())
                after.append(other.double().cpu())
                bar.advance(len(rows_))
            found[name] = Reconstruction(torch.cat(before).numpy(), torch.cat(after).numpy())
    return found


def draw_reconstruction(
    path: str | Path, found: Mapping[str, Mapping[str, Reconstruction]], title: str
) -> None:
    """Figure 3: for each network a bar for each corruption, mean and standard deviation of SSIM; the line on it is what the
    unperturbed network has.

    Args:
        found: by network, then by corruption.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4 * len(found) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    cells = figure.subplots(len(found), 1, squeeze=False, sharex=True)[:, 0]
    for number, (axes, (network, corruptions)) in enumerate(zip(cells, found.items(), strict=True)):
        places = np.arange(len(corruptions))
        means = [float(each.after.mean()) for each in corruptions.values()]
        spread = [float(each.after.std()) for each in corruptions.values()]
        axes.bar(
            places,
            means,
            yerr=spread,
            color=COLOURS[number % len(COLOURS)],
            capsize=2.5,
            error_kw={"lw": 0.9},
        )
        before = [float(each.before.mean()) for each in corruptions.values()]
        axes.hlines(
            before, places - 0.4, places + 0.4, color="black", linewidth=1.4, label="weights as trained"
        )
        every = np.concatenate([each.after for each in corruptions.values()])
        axes.set_title(f"{network}: {every.mean():.2f} ± {every.std():.2f}", fontsize=11, loc="left")
        axes.set_ylabel("SSIM")
        axes.set_ylim(0, 1.05)
        axes.grid(True, axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        names = [name.replace("_", " ") for name in corruptions]
        axes.set_xticks(places, names, rotation=40, ha="right", fontsize=8)
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), fontsize=8)
    figure.suptitle(title)
    save(figure, path)


def reconstruction_figures(found: Mapping[str, Reconstruction]) -> dict[str, Any]:
    """Means and standard deviations by corruption and over all, for a result file."""
    every = np.concatenate([each.after for each in found.values()])
    return {
        "mean": round(float(every.mean()), 4),
        "deviation": round(float(every.std()), 4),
        "corruptions": {
            name: {
                "mean": round(float(each.after.mean()), 4),
                "deviation": round(float(each.after.std()), 4),
                "as_trained": round(float(each.before.mean()), 4),
            }
            for name, each in found.items()
        },
    }


def save(figure: Any, path: str | Path) -> None:
    """Write a matplotlib figure, whole or not at all. Raises UsageError for another ending than .png or .svg."""
    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        raise UsageError(f"--out {path}: a picture ends in .png or .svg")
    with atomic_file(path) as aside:
        figure.savefig(aside, format=path.suffix[1:], dpi=110)
