"""Beside Table 6: how hard the quality loss pulls the encoder, and whether against the softmax loss.

The paper explains its second column by a conflict of the two tasks. This reads the runs of eval/table6_ablation.py: the
cosine between the gradients of the two losses on the encoder, their relative length, and how well images are drawn.

    python eval/table6_gradients.py --data DATA --seeds 0
"""

import argparse
import shlex
import sys
import time
from pathlib import Path

from lrface.diagnose import quality_pull
from lrface.errors import errors_for_users
from lrface.files import write_json, write_text
from lrface.study import RESULTS, about_the_run
from lrface.train.checkpoint import load_model

RUNS = {
    "end_to_end": "with decoder",
    "two_stages": "with decoder, two stages",
    "qualnet": "QualNet, lambda 0.1",
    "qualnet_0.6": "QualNet, lambda 0.6",
}
BATCHES = 6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of the data sets; else $LRFACE_DATA")
    parser.add_argument("--runs", type=Path, default=Path("runs/qualnet/cifar10"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    started = time.time()
    rows = []
    lines = [
        "| | seed | step | lambda | cosine | length | lambda x length | reconstruction | mean image |",
        "|---" * 9 + "|",
    ]
    for key, label in RUNS.items():
        for seed in arguments.seeds:
            run = arguments.runs / f"{key}-seed{seed}"
            if not (run / "summary.json").exists():
                print(f"{run}: not trained", file=sys.stderr)
                continue
            weights = load_model(run)[1]["weights_sha256"]
            for row in quality_pull(run, arguments.data, BATCHES):
                rows.append({"key": key, "seed": seed, "checkpoint_sha256": weights, **row})
                low, high = row["cosine_range"]
                cosine = f"{row['cosine']:.3f} ({low:.3f} to {high:.3f})"
                lines.append(
                    f"| {label} | {seed} | {row['step']} | {row['lambda']:g} | {cosine} | "
                    f"{row['length']:.3f} | {row['lambda'] * row['length']:.4f} | {row['reconstruction']:.3f} | "
                    f"{row['mean_image']:.3f} |"
                )
                print(lines[-1], file=sys.stderr)
    write_json(
        RESULTS / "table6_gradients.json",
        {
            "table": "Gradients of L_quality beside those of L_softmax on the encoder, in the runs of Table 6",
            "command": f"python eval/table6_gradients.py --seeds {shlex.join(map(str, arguments.seeds))}",
            "checkpoint_sha256": {f"{row['key']}:{row['seed']}": row["checkpoint_sha256"] for row in rows},
            "data": {"training": f"{BATCHES} batches of the training images"},
            "seeds": arguments.seeds,
            "rows": rows,
            **about_the_run(started),
        },
    )
    write_text(RESULTS / "table6_gradients.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    with errors_for_users():
        main()
