"""Damaged files of every format end in a clean result or a LrfaceError: never in a crash, a hang or without memory."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest

from lrface.data.convert import pack

FORMATS = [
    "recordio",
    "im2rec",
    "packed",
    "bcolz",
    "memfile",
    "parquet",
    "huggingface",
    "webdataset",
    "folder",
]


def make(form: str, root: Path) -> Path:
    """A small sound data set of a format as root/data (with what lies beside it)."""
    faces = root.with_name(root.name + "-faces")
    suffixes = (".jpg", ".png", ".webp", ".bmp", ".tif") if form == "folder" else (".jpg", ".png")
    for number in range(10):
        path = faces / f"person{number // 4}" / f"{number}{suffixes[number % len(suffixes)]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        assert cv2.imwrite(str(path), cv2.resize(pixels, (20, 20)))
    root.mkdir()
    if form == "folder":
        faces.rename(root / "data")
        return root
    target = {"recordio": "rec", "im2rec": "rec", "packed": "arrow", "huggingface": "parquet"}.get(form, form)
    pack(faces, root / "data", target, show_progress=False)
    if form == "im2rec":
        (root / "data" / "train.idx").unlink()
        (root / "data" / "property").unlink()
    if form in ("parquet", "huggingface"):
        from pyarrow import parquet

        file = next((root / "data").glob("*.parquet"))
        table = parquet.read_table(file)
        file.unlink()
    if form == "parquet":
        # As others write it: compressed pages, dictionaries, several row groups.
        parquet.write_table(table, root / "data" / "train.parquet", row_group_size=4)
    if form == "huggingface":
        with pa.ipc.new_stream(str(root / "data" / "data-00000-of-00001.arrow"), table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
        (root / "data" / "state.json").write_text(
            json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]})
        )
        (root / "data" / "dataset_info.json").write_text(json.dumps({"features": {}}))
    shutil.rmtree(faces)
    return root


def fuzz(form: str, folder: Path, count: int, seed: int, seconds: float) -> dict[str, int]:
    make(form, folder)
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("fuzzing.py"), form, folder, str(count), str(seed)],
        capture_output=True,
        text=True,
        timeout=seconds,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENCV_LOG_LEVEL": "OFF"},
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr[-4000:]}"
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["refused"] + result.get("clean", 0) == count
    # Both ends are reached, and for more than one reason: the damage is neither harmless nor always the same.
    assert result["refused"] > count // 20 and result["messages"] > 3
    return result


@pytest.mark.parametrize("form", FORMATS)
def test_200_mutations(form, tmp_path):
    fuzz(form, tmp_path / form, 200, 1, 120)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_10000_mutations(form, tmp_path):
    print(form, fuzz(form, tmp_path / form, 10_000, 2, 3600))
