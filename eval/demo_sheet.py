"""A model on photographs of one's own: every photograph against every other with the second one at 112, 28 and 14 pixels.

    python eval/demo_sheet.py PEOPLE --out sheet.png

PEOPLE holds a folder with photographs for each person. A row of the sheet is a face as it is, a column a face brought down
to the size; in each field their cosine, green where the model's verdict (`lrface compare`) is right, red where it is wrong.
Prints, as JSON, how many of both kinds are wrong at each size.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lrface.align.detect import load_detector
from lrface.align.pipeline import read_photo
from lrface.align.warp import warp_face
from lrface.degrade.resolution import resample
from lrface.embed import FaceEmbedder, find_images, open_model
from lrface.errors import LrfaceError, errors_for_users
from lrface.files import atomic_file

SIZES = (112, 28, 14)


def faces(people: Path) -> tuple[np.ndarray, list[str]]:
    """The crop of the surest face of each photograph, uint8 [n, 112, 112, 3] RGB, and whose it is."""
    detector = load_detector()
    crops, names = [], []
    for file in find_images([people]):
        photo = read_photo(file)
        found = detector.detect([photo])[0]
        if not found:
            raise LrfaceError(f"{file}: no face found")
        crops.append(warp_face(photo, max(found, key=lambda face: face.score).landmarks, SIZES[0]))
        names.append(file.parent.name)
    return np.stack(crops), names


def judged(embedder: FaceEmbedder, crops: np.ndarray, names: list[str]) -> dict[int, dict[str, np.ndarray]]:
    """By size: cosines [n, n], row at 112 against column at the size, and whether the verdict is right, bool [n, n]."""
    images = torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 255
    vectors = {s: embedder.embed(resample(images, s), kind="crop", flip=True).vectors for s in SIZES}
    same = np.array(names)[:, None] == np.array(names)[None]
    result = {}
    for size in SIZES:
        cosines = embedder.similarity(vectors[SIZES[0]], vectors[size])
        verdicts = np.vectorize(lambda c, s=size: embedder.decide(float(c), (SIZES[0], s)).verdict)(cosines)
        result[size] = {"cosines": cosines, "right": verdicts == same, "same": same}
    return result


def counts(found: dict[int, dict[str, np.ndarray]]) -> dict[str, Any]:
    """How many pairs of two photographs are judged wrongly."""
    rows = {}
    for size, each in found.items():
        two = ~np.eye(len(each["same"]), dtype=bool)
        rows[str(size)] = {
            "same": int((two & each["same"]).sum()),
            "same_wrong": int((two & each["same"] & ~each["right"]).sum()),
            "different": int((two & ~each["same"]).sum()),
            "different_wrong": int((two & ~each["same"] & ~each["right"]).sum()),
        }
    return rows


def draw(out: Path, crops: np.ndarray, names: list[str], found: dict[int, dict[str, np.ndarray]]) -> None:
    """The sheet: a table for each size, faces along both sides."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n = len(crops)
    figure = Figure(figsize=(len(SIZES) * (0.75 * n + 1), 0.75 * n + 1.6), layout="constrained")
    images = torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 255
    for axes, size in zip(figure.subplots(1, len(SIZES)), SIZES, strict=True):
        small = resample(images, size).permute(0, 2, 3, 1).clamp(0, 1).numpy()
        each = found[size]
        axes.set_title(f"rows at {SIZES[0]} pixels, columns at {size}")
        for k in range(n):
            axes.imshow(crops[k], extent=(-0.97, -0.03, k + 0.97, k + 0.03))
            axes.imshow(small[k], extent=(k + 0.03, k + 0.97, -0.03, -0.97))
            for other in range(n):
                right = each["right"][k, other]
                face = {"facecolor": "#cfe8cf" if right else "#e66a5a", "edgecolor": "white"}
                axes.add_patch(_square(other, k, face))
                bold = "bold" if each["same"][k, other] else "normal"
                text = f"{each['cosines'][k, other]:.2f}"
                axes.text(other + 0.5, k + 0.5, text, ha="center", va="center", fontsize=9, weight=bold)
        axes.set_xlim(-1, n)
        axes.set_ylim(n, -1)
        axes.set_yticks([k + 0.5 for k in range(n)], names if size == SIZES[0] else [""] * n)
        axes.set_xticks([])
        axes.set_aspect("equal")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    figure.supxlabel("cosine; bold: one person; red: the verdict of lrface compare is wrong", fontsize=10)
    FigureCanvasAgg(figure)
    with atomic_file(out) as aside:
        figure.savefig(aside, dpi=110, format="png")


def _square(x: float, y: float, style: dict[str, Any]) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), 1, 1, **style)


if __name__ == "__main__":
    with errors_for_users():
        parser = argparse.ArgumentParser(
            description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("people", type=Path, help="a folder with a folder for each person")
        parser.add_argument("--model", default="shipped", help="as for lrface embed")
        parser.add_argument("--out", type=Path, default=Path("sheet.png"))
        options = parser.parse_args()
        aligned, owners = faces(options.people)
        results = judged(open_model(options.model), aligned, owners)
        draw(options.out, aligned, owners, results)
        print(json.dumps(counts(results)))
