"""`lrface robustify` on a recogniser from disk: LFW before and after, at 112, 56, 28 and 14 pixels, and 112 against each.
Writes eval/results/robustified.json and .md, and docs/robustified.png.

    python eval/robustified.py --model recogniser.onnx --data DATA --out runs/robust-recogniser

45 minutes of training on celeba300_112 and two tests of LFW; goes on where it stopped. Threshold and accuracy are those of
LFW's View 2 with flip fusion, nearest down, bilinear up.
"""

import argparse
import hashlib
import time
from pathlib import Path
from typing import Any

from lrface import recipes
from lrface.embed import parse_model
from lrface.errors import errors_for_users
from lrface.files import atomic_file, read_json, write_json, write_text
from lrface.models.onnx_network import OnnxBackbone
from lrface.robustify import robustify
from lrface.study import (
    RESOLUTION_TESTING,
    RESULTS,
    about_the_run,
    accuracy_at_sizes,
    kept,
    lfw_at,
)
from lrface.train.checkpoint import load_model

SIZES = (112, 56, 28, 14)
TESTING = {**RESOLUTION_TESTING, "precision": "float32"}
"""As `lrface verify` does."""


def table(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> str:
    heads = ["LFW accuracy (%)", *(f"{row['gallery_size']} x {row['probe_size']}" for row in before)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, rows in (("as it is", before), ("`lrface robustify`", after)):
        lines.append(f"| {name} | " + " | ".join(f"{row['accuracy']:.2f}" for row in rows) + " |")
    return "\n".join(lines) + "\n"


def draw(out: Path, before: list[dict[str, Any]], after: list[dict[str, Any]]) -> None:
    """Accuracy against pixels: both faces small, and one of them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    both, one = figure.subplots(1, 2, sharey=True)
    for axes, title in ((both, "both faces at this size"), (one, "one of them, the other at 112")):
        for rows, label, style in ((before, "as it is", "--"), (after, "lrface robustify", "-")):
            points = {}
            for row in rows:
                same = row["gallery_size"] == row["probe_size"]
                if same == (axes is both) or row["probe_size"] == row["gallery_size"] == SIZES[0]:
                    points[row["probe_size"]] = row
            x = sorted(points)
            y = [points[size]["accuracy"] for size in x]
            low = [points[size]["accuracy"] - points[size]["accuracy_interval"][0] for size in x]
            high = [points[size]["accuracy_interval"][1] - points[size]["accuracy"] for size in x]
            axes.errorbar(x, y, [low, high], linestyle=style, marker="o", capsize=3, label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(SIZES, [str(size) for size in SIZES])
        axes.minorticks_off()
        axes.set_xlabel("pixels")
        axes.set_title(title, fontsize="medium")
        axes.grid(alpha=0.3)
    both.set_ylabel("accuracy on LFW (%), 95 % interval")
    both.legend()
    FigureCanvasAgg(figure)
    with atomic_file(out) as aside:
        figure.savefig(aside, dpi=150, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="an .onnx file, as of `lrface robustify`")
    parser.add_argument("--data", type=Path, help="holds celeba300_112 and lfw; else $LRFACE_DATA")
    parser.add_argument("--out", type=Path, default=Path("runs/robustified"), help="folder of the run")
    parser.add_argument("--lfw", type=Path, help="LFW aligned by `lrface align`, to spare its alignment")
    parser.add_argument("--minutes", type=float, default=45.0)
    arguments = parser.parse_args()
    faces = recipes.find_data("celeba300_112", arguments.data)
    done = robustify(arguments.model, faces, arguments.out, minutes=arguments.minutes, say=print)
    summary = read_json(arguments.out / "summary.json", "the summary of the run")
    path, described = parse_model(arguments.model)
    started = time.time()
    benchmark = lfw_at(arguments.lfw, arguments.data)
    network, card = load_model(arguments.out)
    file_sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    key = {"testing": TESTING, "file_sha256": file_sha256}
    before = kept(
        arguments.out / "evaluations" / "lfw_before.json",
        key,
        lambda: {
            "rows": accuracy_at_sizes(
                OnnxBackbone(path, **described), benchmark, SIZES, precision=TESTING["precision"]
            )
        },
    )["rows"]
    after = kept(
        arguments.out / "evaluations" / "lfw.json",
        {"testing": TESTING, "weights_sha256": card["weights_sha256"]},
        lambda: {"rows": accuracy_at_sizes(network, benchmark, SIZES, precision=TESTING["precision"])},
    )["rows"]
    text = table(before, after)
    write_json(
        RESULTS / "robustified.json",
        {
            "command": f"python eval/robustified.py --model {Path(path).name}",
            "model_sha256": file_sha256,
            "checkpoint_sha256": card["weights_sha256"],
            "recipe_sha256": summary["recipe_sha256"],
            "recipe": Path(done.recipe).read_text(),
            "steps": done.steps,
            "training_seconds": round(sum(stage.get("seconds", 0.0) for stage in summary["stages"]), 1),
            "data": {"training": "celeba300_112", "test": "LFW View 2, 6,000 pairs"},
            "testing": TESTING,
            "before": before,
            "after": after,
            **about_the_run(started),
        },
    )
    write_text(RESULTS / "robustified.md", text)
    draw(RESULTS.parents[1] / "docs" / "robustified.png", before, after)
    print(text, end="")


if __name__ == "__main__":
    with errors_for_users():
        main()
