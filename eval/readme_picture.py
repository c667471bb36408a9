"""The picture of the README: eval/results/table4_resolution.json as curves, above them what the sizes look like.

The faces are procedural ones (lrface/data/synthetic.py): no photograph of a person is in the repository.

    python eval/readme_picture.py
"""

import json
import statistics
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lrface.data.synthetic import SyntheticFaces
from lrface.degrade.resolution import resample
from lrface.files import atomic_file

ROOT = Path(__file__).resolve().parent.parent
SIZES = (112, 56, 28, 14)
CURVES = {
    "vanilla": ("vanilla (clean faces only)", "tab:gray"),
    "specialised": ("a specialised network for each size", "tab:orange"),
    "naive": ("naive augmentation", "tab:blue"),
    "qualnet_lm": ("QualNet-LM", "tab:red"),
}


def accuracies(rows: list[dict], curve: str, size: int) -> list[float]:
    """Accuracy at ``size`` of every seed of a curve; the specialised one takes each size's own network."""
    if curve == "specialised":
        curve = "vanilla" if size == 112 else f"specialised_{size}"
    return [row["accuracy"][str(size)] for row in rows if row["recipe"] == curve]


def main() -> None:
    rows = json.loads((ROOT / "eval" / "results" / "table4_resolution.json").read_text())["rows"]
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    faces_area, curve_area = figure.subfigures(1, 2, width_ratios=[1, 1.35])
    faces = SyntheticFaces(identities=3, images_per_identity=1, seed=7)
    images = (
        torch.stack([torch.from_numpy(faces.image(index)).permute(2, 0, 1) for index in range(3)]) / 255.0
    )
    grid = faces_area.subplots(3, 4)
    for column, size in enumerate(SIZES):
        seen = resample(images, size, down="nearest", up="bilinear")
        for row in range(3):
            axis = grid[row][column]
            axis.imshow(seen[row].permute(1, 2, 0).numpy())
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                axis.set_title(f"{size} px", fontsize=10)
    faces_area.suptitle("what the network sees", fontsize=11)
    axis = curve_area.subplots()
    for curve, (label, colour) in CURVES.items():
        points = [(size, accuracies(rows, curve, size)) for size in SIZES]
        points = [(size, values) for size, values in points if values]
        if not points:
            continue
        means = [statistics.mean(values) for _, values in points]
        below = [mean - min(values) for mean, (_, values) in zip(means, points, strict=True)]
        above = [max(values) - mean for mean, (_, values) in zip(means, points, strict=True)]
        axis.errorbar(
            [size for size, _ in points],
            means,
            [below, above],
            label=label,
            color=colour,
            marker="o",
            capsize=3,
        )
    axis.set_xscale("log", base=2)
    axis.set_xticks(SIZES, [str(size) for size in SIZES])
    axis.invert_xaxis()
    axis.set_xlabel("size of both faces in pixels")
    axis.set_ylabel("LFW accuracy (%)")
    axis.set_title("trained on 6,276 faces, 2 CPU cores; bars: range over seeds", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    with atomic_file(ROOT / "docs" / "resolution.png") as aside:
        figure.savefig(aside, dpi=110, format="png")
    print(ROOT / "docs" / "resolution.png")


if __name__ == "__main__":
    main()
