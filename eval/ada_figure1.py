"""Figure 1 of the AdA paper (003): what AdA makes of images against a classifier, and the density of their SSIM by radius.

lrface train cifar10/edsr && lrface train cifar10/clean
python eval/ada_figure1.py runs/cifar10-clean --network runs/cifar10-edsr --data DATA
"""

import argparse
import time
from pathlib import Path

from lrface.ada_figures import RADII, corrupted_by_radius, draw_similarity
from lrface.deepaugment import open_network
from lrface.errors import errors_for_users
from lrface.files import write_json
from lrface.perturbation import open_judge, read_labelled
from lrface.recipes import find_data
from lrface.robustness import resolved
from lrface.study import RESULTS, about_the_run

if __name__ == "__main__":
    with errors_for_users():
        parser = argparse.ArgumentParser(
            description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("model", help="a run with head softmax, as for `lrface robustness`")
        parser.add_argument("--network", required=True, help="a run that trained a corruption network")
        parser.add_argument("--data", type=Path, help="folder of the data sets; else $LRFACE_DATA")
        parser.add_argument("--radii", type=float, nargs="+", default=list(RADII))
        parser.add_argument("--images", type=int, default=500, help="test images, drawn")
        parser.add_argument("--steps", type=int, default=10)
        parser.add_argument("--out", type=Path, default=RESULTS / "ada_figure1.png")
        options = parser.parse_args()
        started = time.time()
        images = read_labelled(find_data("cifar10/test.parquet", options.data), options.images)
        judge = open_judge(options.model, images, "auto")
        network, sha256 = open_network(options.network, resolved("auto"))
        found = corrupted_by_radius(judge, images, network, options.radii, options.steps)
        kind = type(network).__name__
        draw_similarity(
            options.out, images, found, f"AdA through {kind}, {options.steps} steps, {options.images} images"
        )
        rows = [
            {
                "radius": radius,
                "ssim_mean": round(float(each.similarity.mean()), 4),
                "ssim_deviation": round(float(each.similarity.std()), 4),
                "ssim_least": round(float(each.similarity.min()), 4),
                "below_0.3": int((each.similarity < 0.3).sum()),
                "accuracy": round(100 * float(1 - each.wrong.mean()), 2),
            }
            for radius, each in found.items()
        ]
        about = {
            "checkpoint_sha256": judge.classifier.sha256,
            "network_sha256": sha256,
            "images": options.images,
            "steps": options.steps,
        }
        write_json(
            options.out.with_suffix(".json"),
            {"table": "AdA figure 1", **about, "rows": rows, **about_the_run(started)},
        )
        for row in rows:
            print(row)
