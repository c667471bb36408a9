"""Accuracy of classifiers under AdA against its radius: who withstands adversarial corruptions, and how large ones.

python eval/ada_attack.py nominal=runs/clean AdA=runs/ada --network runs/cifar10-edsr --data DATA
"""

import argparse
import time
from pathlib import Path

from lrface.ada_figures import draw_accuracy
from lrface.attack_trials import Trial, run_trials
from lrface.errors import errors_for_users
from lrface.files import write_json
from lrface.recipes import find_data
from lrface.study import RESULTS, about_the_run

if __name__ == "__main__":
    with errors_for_users():
        parser = argparse.ArgumentParser(
            description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("models", nargs="+", metavar="NAME=RUN")
        parser.add_argument("--network", required=True, help="a run that trained a corruption network")
        parser.add_argument("--data", type=Path, help="folder of the data sets; else $LRFACE_DATA")
        parser.add_argument("--radii", type=float, nargs="+", default=[0.0075, 0.015, 0.03, 0.06])
        parser.add_argument("--images", type=int, default=500, help="test images, drawn")
        parser.add_argument("--steps", type=int, default=10)
        parser.add_argument("--out", type=Path, default=RESULTS / "ada_attack.png")
        options = parser.parse_args()
        started = time.time()
        names = {run or name: name for name, _, run in (text.partition("=") for text in options.models)}
        run = run_trials(
            list(names),
            find_data("cifar10/test.parquet", options.data),
            [Trial(("ada",), "weights", radius) for radius in sorted(options.radii)],
            count=options.images,
            network=options.network,
            steps=options.steps,
        )
        draw_accuracy(
            options.out, run, names, f"Under AdA, {options.steps} steps, {options.images} test images"
        )
        rows = [{"name": names[result["model"]], **result} for result in run.results]
        about = {key: run.about[key] for key in ("images", "seed", "steps")}
        write_json(
            options.out.with_suffix(".json"),
            {"table": "accuracy under AdA", **about, "rows": rows, **about_the_run(started)},
        )
        print(run.to_text())
