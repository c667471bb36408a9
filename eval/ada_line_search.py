"""AdA's attack on a trained classifier: does its loss rise, and where does the line search of appendix G (paper 003) end?

For each radius, over the first test images of CIFAR-10: on what share of them the loss after the attack is at least that
of the random start and of the clean image, the classifier's accuracy, and SSIM with the clean image. For those whose SSIM
is below the threshold: the distance of the result's SSIM from it, by the paper's single fit and by the two passes that
lrface takes, as quantiles and as the share within 0.03. Radii far beyond the paper's 0.015 are there because at that one
hardly any image comes below 0.3. Writes eval/results/ada_line_search.json, or --out.

    python eval/ada_line_search.py --data DATA --classifier RUN --network RUN
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lrface.classifiers import open_classifier
from lrface.data.source import open_source
from lrface.deepaugment import open_network
from lrface.degrade.adversarial import Attack, limit_similarity, perturb
from lrface.errors import errors_for_users
from lrface.files import write_json
from lrface.losses.ssim import ssim
from lrface.models.per_example import CorruptionNetwork
from lrface.recipes import find_data
from lrface.study import RESULTS, about_the_run
from lrface.train.checkpoint import load_model

RADII = (0.015, 0.1, 0.2)
THRESHOLD, WANTED = 0.3, 0.03
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def spread(values: Tensor) -> dict[str, float]:
    """Quantiles by name."""
    found = values.double().quantile(torch.tensor(QUANTILES, dtype=torch.float64))
    return {
        f"{100 * share:g} %": round(float(value), 4) for share, value in zip(QUANTILES, found, strict=True)
    }


def measure(
    images: Tensor, labels: Tensor, classifier: Any, network: CorruptionNetwork, radius: float
) -> dict[str, Any]:
    """One row."""
    seeds = torch.arange(len(images))
    found = perturb(images, labels, classifier, network, seeds, Attack(radius), similarity=None)

    def judged(seen: Tensor) -> tuple[Tensor, float]:
        with torch.no_grad():
            scores = torch.cat([classifier(part) for part in seen.split(64)]).float()
        right = float((scores.argmax(1) == labels).float().mean())
        return F.cross_entropy(scores, labels, reduction="none"), 100 * right

    (clean, accuracy), (after, attacked) = judged(images), judged(found.images)
    below = found.similarity < THRESHOLD
    row: dict[str, Any] = {
        "radius": radius,
        "accuracy_clean": round(accuracy, 2),
        "accuracy_attacked": round(attacked, 2),
        "share_at_least_start": round(float((after >= found.losses[0]).float().mean()), 4),
        "share_at_least_clean": round(float((after >= clean).float().mean()), 4),
        "loss_clean": round(float(clean.mean()), 4),
        "loss_before_each_step": [round(float(value), 4) for value in found.losses.mean(1)],
        "loss_after": round(float(after.mean()), 4),
        "similarity": spread(found.similarity),
        "below_threshold": int(below.sum()),
    }
    if bool(below.any()):
        for name, passes in (("paper", 1), ("lrface", 2)):
            limited, gamma, _ = limit_similarity(images[below], found.images[below], THRESHOLD, passes)
            away = ssim(images[below], limited) - THRESHOLD
            row[f"search_{name}"] = {
                "share_within_0.03": round(float((away.abs() <= WANTED).float().mean()), 4),
                "distance": spread(away),
                "gamma": spread(gamma),
            }
    return row


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of the data sets; else $LRFACE_DATA")
    parser.add_argument("--classifier", required=True, help="a run of lrface train with head: softmax")
    parser.add_argument("--network", required=True, help="a run of the method restore")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, default=RESULTS / "ada_line_search.json")
    options = parser.parse_args(arguments)
    started = time.time()
    if options.threads:
        torch.set_num_threads(options.threads)
    source = open_source(find_data("cifar10/test.parquet", options.data))
    pictures = np.stack([source.image(index) for index in range(options.images)])
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    labels = torch.from_numpy(np.asarray(source.labels[: options.images])).long()
    classifier = open_classifier(options.classifier, 32, device="cpu")
    network, sha256 = open_network(options.network, "cpu")
    with torch.no_grad():
        drawn = torch.cat([network(part) for part in images.split(64)])
    rows = []
    for radius in RADII:
        rows.append(measure(images, labels, classifier.network, network, radius))
        print(rows[-1], file=sys.stderr, flush=True)
    write_json(
        options.out,
        {
            "table": "AdA's attack and its line search (paper 003, appendices A and G)",
            "command": "python eval/ada_line_search.py --data DATA --classifier RUN --network RUN",
            "data": f"the first {options.images} test images of CIFAR-10",
            "seeds": [0],
            "classifier": {"architecture": load_model(options.classifier)[1]["architecture"]},
            "checkpoint_sha256": classifier.sha256,
            "network": load_model(options.network)[1]["architecture"],
            "network_sha256": sha256,
            "network_similarity": spread(ssim(images, drawn)),
            "threshold": THRESHOLD,
            "rows": rows,
            **about_the_run(started),
        },
    )
    return 0


if __name__ == "__main__":
    with errors_for_users():
        sys.exit(main())
