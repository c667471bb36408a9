"""What a file that `lrface export` writes keeps of a model: size, cosine to the model's features and accuracy on LFW, for
each kind of file. Writes eval/results/exported.json and .md.

    python eval/exported.py --model mobilefacenet_ms1m.onnx@colour=RGB --faces celeba300_112 --data DATA

Four minutes a kind on two cores: LFW goes through the model and through the file at four sizes, each image and its
mirror.
"""

import argparse
import hashlib
import platform
import tempfile
from pathlib import Path
from typing import Any

from lrface.embed import parse_model
from lrface.errors import errors_for_users
from lrface.export import export_model
from lrface.files import write_json, write_text
from lrface.train.record import lrface_commit

RESULTS = Path(__file__).resolve().parent / "results"
KINDS: dict[str, dict[str, Any]] = {
    "ONNX, float32": {},
    "ONNX, float16": {"precision": "float16", "minimum_cosine": 0.999},
    "ONNX, int8 static": {"int8": "static"},
    # The worst face of a MobileFaceNet lies below the gate of 0.95: what that costs is to be seen.
    "ONNX, int8 dynamic": {"int8": "dynamic", "minimum_cosine": 0.9},
    "OpenVINO, float32": {"to": "openvino"},
}
ENDINGS = {"onnx": ".onnx", "openvino": ".xml", "torch-export": ".pt2"}


def measured(kind: str, arguments: argparse.Namespace) -> dict[str, Any]:
    options = KINDS[kind]
    with tempfile.TemporaryDirectory() as folder:
        done = export_model(
            arguments.model,
            Path(folder) / f"model{ENDINGS[options.get('to', 'onnx')]}",
            faces=arguments.faces,
            benchmark=arguments.benchmark,
            data=arguments.data,
            pairs=arguments.pairs,
            say=print,
            **options,
        )
    result = done.to_dict()
    del result["file"]  # in a folder that is gone
    return {"kind": kind, **result}


def table(rows: list[dict[str, Any]]) -> str:
    sizes = [row["resolution"] for row in rows[0]["rows"]]
    heads = ["file", "MB", *(f"cosine at {size}" for size in sizes), *(f"LFW {size}" for size in sizes)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    exact = {row["gallery_size"]: row["model"] for row in rows[0]["accuracy"]}
    before = [f"{exact[size]:.2f}" if size in exact else "" for size in sizes]
    lines.append(
        f"| the model | {rows[0]['source_bytes'] / 1e6:.2f} | "
        + " | ".join([""] * len(sizes) + before)
        + " |"
    )
    for row in rows:
        accuracy = {each["gallery_size"]: each["exported"] for each in row["accuracy"]}
        cells = [f"{each['mean_cosine']:.4f}" for each in row["rows"]]
        cells += [f"{accuracy[size]:.2f}" if size in accuracy else "" for size in sizes]
        lines.append(f"| {row['kind']} | {row['bytes'] / 1e6:.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="as of `lrface export`; a file on disk")
    parser.add_argument("--faces", type=Path, required=True, help="aligned faces")
    parser.add_argument("--benchmark", default="lfw")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--pairs", type=Path)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    arguments = parser.parse_args()
    file = Path(parse_model(arguments.model)[0])
    rows: list[dict[str, Any]] = []
    for kind in arguments.kinds:
        rows.append(measured(kind, arguments))
        write_json(
            RESULTS / "exported.json",
            {
                "model": file.name,
                "model_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
                "machine": f"{platform.machine()}, {platform.system()}",
                "commit": lrface_commit(),
                "rows": rows,
            },
        )
        write_text(RESULTS / "exported.md", table(rows))
    print(table(rows))


if __name__ == "__main__":
    with errors_for_users():
        main()
