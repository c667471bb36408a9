"""The model inside lrface: made from a finished run, measured on LFW twice, described. All it takes from nothing:

    lrface data overlap DATA/celeba300_112 lfw --model recogniser.onnx --data DATA --out drop.csv
    lrface data split DATA/celeba300_112 faces held --held-out 2 --drop drop.csv
    lrface train celeba300/distilled stages.0.method.teacher.path=recogniser.onnx data.path=faces out=runs/shipped
    lrface align DATA/lfw/images lfw_aligned
    python eval/shipped.py --run runs/shipped --data DATA --lfw lfw_aligned --dropped drop.csv

Writes lrface/shipped (weights in half precision, thresholds, card) and eval/results/shipped.json. The same without --run
measures and describes the model that is there.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lrface.calibrate import calibrate
from lrface.errors import errors_for_users
from lrface.evaluation import verify_models
from lrface.export import export_model
from lrface.files import read_json, write_json, write_text
from lrface.shipped import FOLDER, NAME
from lrface.study import RESULTS, about_the_run

SIZES = (112, 56, 28, 14)
FALSE_ACCEPT_RATE = 1e-3
INDEPENDENT = Path(__file__).with_name("lfw_onnxruntime.py")
LICENCE = (
    "Weights for non-commercial research and evaluation. They were learnt from CelebA, whose licence allows no more, and "
    "from a recogniser trained by others on MS1M, a data set that its makers have withdrawn, with no licence stated. "
    "MIT, the licence of lrface's code, does not extend to them."
)


def make(run: Path, faces: Path, dropped: Path) -> dict[str, Any]:
    """Weights and card of ``run`` into lrface/shipped; what was exported."""
    weights = FOLDER / "model.safetensors"
    found = export_model(
        str(run), weights, to="safetensors", precision="float16", faces=faces, show_progress=False
    )
    card_file = weights.with_suffix(".json")
    card = read_json(card_file, "the card of the model")
    with dropped.open(newline="", encoding="utf-8") as file:
        left_out = sorted(row["identity"] for row in csv.DictReader(file))
    card["training"].update(
        {
            "data": "CelebA (Liu et al., ICCV 2015): aligned crops of 112x112 pixels",
            "left_out_as_in_lfw": left_out,
            "labels": "none: the targets are the embeddings of the teacher",
            "teacher": {
                "what": "a MobileFaceNet that others trained on MS1M, 128 values; none of its weights are here",
                "licence": "not stated",
            },
        }
    )
    card["licence"] = LICENCE
    for stage in card["recipe"]["stages"]:
        stage["method"]["teacher"].pop("path", None)  # a place on the machine that trained
    card["recipe"].pop("out", None)
    write_json(card_file, card)
    return {"rows": found.rows, "bytes": weights.stat().st_size}


def independent(aligned: Path, pairs: Path) -> dict[str, float]:
    """Percent by sizes, of an exported file, by ONNX Runtime without lrface."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "shipped.onnx"
        export_model(NAME, file, show_progress=False)
        command = [sys.executable, str(INDEPENDENT), str(file), str(aligned), str(pairs)]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def table(rows: list[dict[str, Any]], other: dict[str, float], thresholds: dict[str, float]) -> str:
    """Markdown: accuracy, its interval, TAR@FAR=1e-3 and threshold by sizes."""
    lines = [
        "| pixels of the two faces | LFW accuracy (%) | 95 % interval | ONNX Runtime alone | TAR@FAR=1e-3 (%) | threshold |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        sizes = f"{row['gallery_size']}x{row['probe_size']}"
        low, high = row["accuracy_interval"]
        key = sizes if row["gallery_size"] != row["probe_size"] else str(row["gallery_size"])
        lines.append(
            f"| {row['gallery_size']} x {row['probe_size']} | {row['accuracy']:.2f} | {low:.2f} to {high:.2f} "
            f"| {other[sizes]:.2f} | {row['tar_at_far']['1e-3']:.1f} | {thresholds[key]:.3f} |"
        )
    return "\n".join(lines) + "\n"


def photographs() -> str:
    """Markdown: verdicts on people outside of LFW, as eval/demo_sheet.py counted them."""
    counted = read_json(RESULTS / "shipped_photographs.json", "counts of wrong verdicts")
    lines = [
        "| people | pixels | one person, not recognised | two people, taken for one |",
        "|---|---|---|---|",
    ]
    for name, label in (("public", "of the picture"), ("private", "private")):
        for size, pairs in counted[name]["wrong"].items():
            lines.append(
                f"| {label} | 112 x {size} | {pairs['same_wrong']} of {pairs['same']} "
                f"| {pairs['different_wrong']} of {pairs['different']:,} |"
            )
    return "\n".join(lines) + "\n"


def describe(card: dict[str, Any], figures: str, photographs: str, megabytes: float) -> str:
    """The card in words."""
    training = card["training"]
    dropped = len(training["left_out_as_in_lfw"])
    architecture = card["architecture"]
    recipe, measured = card["recipe"]["stages"][0], card["thresholds_measured"]
    return f"""# The model inside lrface

A slim {architecture["name"].upper().replace("IR", "IR-")} of width {architecture["arguments"]["width"]}: RGB faces of
112x112 pixels in [0, 1] to {card["embedding_size"]} values, {megabytes:.1f} MB in half precision. It is what
`lrface compare a.jpg b.jpg` and `load_embedder()` take where no model is named, and it is called `shipped` everywhere else.

It is small and learnt from little: **a model to try lrface with, not one to decide about people with.** For accuracy at
full size take a recogniser of your own and `lrface robustify` it.

## How it was made

From random weights by `lrface train celeba300/distilled` ({recipe["steps"]:,} steps of 64 images): at 112, 56, 28 and 14
pixels its embedding is to be where a teacher puts the clean face. No weights of others are in it. The commands from
nothing are in `eval/shipped.py`.

- **Data**: {training["images"]:,} CelebA faces of {training["identities"]} people (aligned crops); three in four images
  of a batch are blends of two. `lrface data overlap` found {dropped} further people, who are in LFW too: they were left out.
- **Labels**: none. The teacher's embeddings are the targets.
- **Teacher**: a MobileFaceNet that others trained on MS1M; its licence was not stated with it. People of LFW may be in
  MS1M.

## Licence and use

{card["licence"]}

Meant for trying lrface, for teaching, tests and as a start for training of your own. Not for identifying people without
their consent, for surveillance, or for any decision about a person.

## Figures

LFW View 2, 6,000 pairs, flip fusion, nearest down and bilinear up:

    lrface align DATA/lfw/images lfw_aligned
    lrface verify --benchmark lfw_aligned --pairs DATA/lfw/pairs.txt --cross

(`lrface verify --benchmark lfw --cross --data DATA` aligns by itself: within 0.1. Crops are JPEG of quality 95; as PNG the
figures move by up to 0.7 at 14 pixels, within the intervals.) The fourth column is a script without lrface on the exported
model and the same crops:

    lrface export shipped --to onnx --out shipped.onnx
    python eval/lfw_onnxruntime.py shipped.onnx lfw_aligned DATA/lfw/pairs.txt

The threshold is that of a false accept rate of
{FALSE_ACCEPT_RATE:g} (`lrface calibrate`), measured on LFW's {measured["impostor_pairs"]:,} pairs of different people.

{figures}
## On photographs it never saw

People who are neither in LFW nor in what it learnt from:

![Verdicts on photographs of Barack Obama, Eileen Collins and Grace Hopper](../../docs/shipped_sheet.png)

`python eval/demo_sheet.py PEOPLE --out sheet.png` draws it, wrong verdicts in red, and counts. Pairs of photographs judged
wrongly, the second at the size; the private people are one man, 18 times, and 18 women (no pictures of them are here):

{photographs}
Half of a face is never taken for the whole one. At 14 pixels most photographs of one person are not recognised.

## Limits

- At these thresholds one in a thousand pairs of strangers is taken for one person, and many pairs of one person are not
  recognised: see TAR@FAR.
- LFW and CelebA are photographs of celebrities, mostly of light skin, adult and frontal. Accuracy by skin tone, age and
  sex was not measured. Expect worse outside of what they show.
- Half faces, masks, profiles and bad alignment: expect wrong verdicts.
- Low resolution was nearest shrinking and bilinear growing; blur, noise and compression of cameras were not trained.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="a finished run of celeba300/distilled")
    parser.add_argument("--data", type=Path, required=True, help="folder of celeba300_112 and lfw")
    parser.add_argument(
        "--lfw", type=Path, required=True, help="what `lrface align` made of LFW, for the script"
    )
    parser.add_argument("--dropped", type=Path, help="what `lrface data overlap --out` wrote; with --run")
    options = parser.parse_args()
    if (options.run is None) != (options.dropped is None):
        parser.error("--run and --dropped go together")
    started = time.time()
    pairs = options.data / "lfw" / "pairs.txt"
    if options.run is not None:
        make(options.run, options.data / "celeba300_112", options.dropped)
        calibrate(NAME, str(options.lfw), FALSE_ACCEPT_RATE, SIZES, pairs=pairs)
    run = verify_models([NAME], [str(options.lfw)], SIZES, pairs=pairs, cross=True)
    other = independent(options.lfw, pairs)
    card = read_json(FOLDER / "model.json", "the card of the model")
    megabytes = (FOLDER / "model.safetensors").stat().st_size / 1e6
    text = table(run.rows, other, card["thresholds"])
    kept = ("gallery_size", "probe_size", "accuracy", "accuracy_interval", "accuracy_std", "tar_at_far")
    write_json(
        RESULTS / "shipped.json",
        {
            "what": "The model inside lrface on LFW",
            "weights_sha256": card["weights_sha256"],
            "megabytes": round(megabytes, 3),
            "rows": [{key: row[key] for key in kept} for row in run.rows],
            "onnxruntime_alone": other,
            "largest_difference": round(
                max(
                    abs(row["accuracy"] - other[f"{row['gallery_size']}x{row['probe_size']}"])
                    for row in run.rows
                ),
                3,
            ),
            "thresholds": card["thresholds"],
            **about_the_run(started),
        },
    )
    write_text(FOLDER / "README.md", describe(card, text, photographs(), megabytes))
    print(text, end="")


if __name__ == "__main__":
    with errors_for_users():
        main()
