"""Figure 3 of the AdA paper (003): how well corruption networks can draw corruptions, with 50 steps of Adam on the weights'
perturbation of each image (eq. 6). The paper takes 640 images of each corruption.

    python eval/ada_figure3.py EDSR=runs/cifar10-edsr CAE=runs/cifar10-cae --data DATA
"""

import argparse
import time
from pathlib import Path

from lrface.ada_figures import draw_reconstruction, reconstruct_corruptions, reconstruction_figures
from lrface.deepaugment import open_network
from lrface.errors import errors_for_users
from lrface.files import write_json
from lrface.perturbation import read_labelled
from lrface.recipes import find_data
from lrface.robustness import resolved
from lrface.study import RESULTS, about_the_run

PAPER = {"EDSR": {"mean": 0.91, "deviation": 0.26}, "CAE": {"mean": 0.84, "deviation": 0.16}}

if __name__ == "__main__":
    with errors_for_users():
        parser = argparse.ArgumentParser(
            description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("networks", nargs="+", metavar="NAME=RUN")
        parser.add_argument("--data", type=Path, help="folder of the data sets; else $LRFACE_DATA")
        parser.add_argument("--images", type=int, default=640, help="test images, drawn")
        parser.add_argument("--steps", type=int, default=50)
        parser.add_argument("--batch-size", type=int, default=32)
        parser.add_argument("--out", type=Path, default=RESULTS / "ada_figure3.png")
        options = parser.parse_args()
        started = time.time()
        images = read_labelled(find_data("cifar10/test.parquet", options.data), options.images)
        names = [*images.kind.names, *images.kind.held_out]
        found, rows = {}, []
        for text in options.networks:
            name, _, run = text.partition("=")
            network, sha256 = open_network(run or name, resolved("auto"))
            found[name] = reconstruct_corruptions(
                network, images, names, steps=options.steps, batch_size=options.batch_size
            )
            rows.append(
                {
                    "network": name,
                    "network_sha256": sha256,
                    **reconstruction_figures(found[name]),
                    "paper": PAPER.get(name),
                }
            )
            print(name, rows[-1]["mean"], rows[-1]["deviation"])
        draw_reconstruction(
            options.out, found, f"SSIM with corrupted images, {options.steps} steps, {options.images} images"
        )
        about = {"images": options.images, "steps": options.steps}
        write_json(
            options.out.with_suffix(".json"),
            {"table": "AdA figure 3", **about, "rows": rows, **about_the_run(started)},
        )
