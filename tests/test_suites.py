"""lrface bench on small packs of drawn faces: tables in the paper's layout, what is missing, what is broken."""

import json
import pickle
import shutil

import cv2
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from typer.testing import CliRunner

from lrface import suites
from lrface.benchmarks.packs import write_pack
from lrface.benchmarks.published import NAMES, TABLE_4, TABLE_5
from lrface.cli import app
from lrface.data.synthetic import SyntheticFaces, verification_pairs
from lrface.errors import UsageError
from lrface.evaluation import verify_models
from lrface.models import build_backbone
from lrface.suites import run_suite
from lrface.train.checkpoint import make_card, save_model

SIZES = (112, 28)


@pytest.fixture(scope="module")
def images():
    """PNG files of 30 pairs of drawn faces, and which show one person."""
    faces = SyntheticFaces(12, 4)
    left, right, same = verification_pairs(faces, 30)
    files = [
        cv2.imencode(".png", faces.image(int(index))[..., ::-1])[1].tobytes()
        for pair in zip(left, right, strict=True)
        for index in pair
    ]
    return files, same


@pytest.fixture(scope="module")
def root(tmp_path_factory, images, pooled_model):
    """A root of data with AgeDB-30 and LFW and without CFP-FP, and two models."""
    folder = tmp_path_factory.mktemp("suites")
    files, same = images
    write_pack(folder / "agedb_30.bin", files, same)
    write_pack(folder / "lfw.bin", files[:40], same[:20])
    arguments = {"width": 8, "embedding_size": 16}
    torch.manual_seed(0)
    encoder = build_backbone("ir18", **arguments).eval()
    save_model(folder / "first", encoder, make_card({"name": "ir18", "arguments": arguments}, encoder, {}))
    shutil.copy(pooled_model, folder / "tiny.onnx")
    return folder


@pytest.fixture(autouse=True)
def no_other_data(monkeypatch, tmp_path):
    monkeypatch.delenv("LRFACE_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LRFACE_CACHE", str(tmp_path / "cache"))


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def test_the_paper_stands_beside_measured_rows(root, tmp_path):
    arguments = [
        root / "first",
        f"{root / 'tiny.onnx'}@colour=RGB",
        "--data",
        root,
        "--resolutions",
        "112,28",
    ]
    done = bench(*arguments, "--report", tmp_path / "out.html")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Table 4 of Kim et al.") and "AgeDB-30 / CFP-FP" in lines[1]
    assert lines[2].split() == ["method", "figures", "112x112", "28x28"]
    naive = next(line for line in lines if line.startswith(NAMES["naive"]))
    assert naive.split("paper")[1].split() == "90.32 / 95.09 85.85 / 92.49".split()
    measured = [line for line in lines if " measured " in line]
    assert [line.split()[0] for line in measured] == ["first", "tiny.onnx@colour=RGB"]
    assert all(line.count(" / -") == 2 for line in measured)  # no CFP-FP
    assert {len(line) for line in lines[4:9]} == {len(lines[2])}
    assert "not found, so not in the tables: cfp_fp, tinyface" in done.stdout
    assert str(root / "cfp_fp.bin") in done.stderr and "cfp_fp.py" in done.stderr
    page = (tmp_path / "out.html").read_text()
    assert "90.32 / 95.09" in page and 'src="http' not in page and 'href="http' not in page

    first, again = (bench(*arguments, "--json") for _ in range(2))
    assert first.exit_code == 0 and first.stdout == again.stdout
    found = json.loads(first.stdout)
    (table,) = found["tables"]
    rows = [row for row in table["rows"] if row["figures"] == "measured"]
    for row, name in zip(rows, arguments[:2], strict=True):
        for cell, size in zip(row["cells"], SIZES, strict=True):
            result = next(r for r in found["results"] if r["model"] == str(name) and r["probe_size"] == size)
            assert cell == {
                "values": [result["accuracy"], None],
                "intervals": [result["accuracy_interval"], None],
            }
            low, high = cell["intervals"][0]
            assert low <= cell["values"][0] <= high and f"{low:.2f} to {high:.2f}" in page
    assert [entry["benchmark"] for entry in found["missing"]] == ["cfp_fp", "tinyface"]


def test_a_whole_table_4_and_a_further_benchmark(root, tmp_path, images):
    files, same = images
    for name in ("agedb_30", "cfp_fp"):
        write_pack(tmp_path / f"{name}.bin", files, same)
    run = run_suite(
        [str(root / "first")],
        resolutions=(112,),
        benchmarks=["AgeDB-30", str(root / "lfw.bin")],
        data=tmp_path,
        show_progress=False,
    )
    plain = verify_models(
        [str(root / "first")], ["agedb30", "cfp_fp"], (112,), data=tmp_path, show_progress=False
    )
    table, further = run.tables
    agedb, cfp = (row["accuracy"] for row in plain.rows)
    assert table.rows[-1][2][0].values == (agedb, cfp)
    assert table.rows[-1][2][0].text == f"{agedb:.2f} / {cfp:.2f}"
    assert [row[0] for row in further.rows] == ["first on lfw"]
    assert list(run.missing) == ["tinyface"]


def test_full_takes_what_is_there_in_every_combination(root):
    done = bench(root / "first", "--suite", "full", "--data", root, "--resolutions", "112,28", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert {(row["benchmark"], row["gallery_size"], row["probe_size"]) for row in found["results"]} == {
        (name, gallery, probe) for name in ("lfw", "agedb30") for gallery in SIZES for probe in SIZES
    }
    missing = {entry["benchmark"] for entry in found["missing"]}
    assert {"cfp_fp", "cfp_ff", "calfw", "cplfw", "vgg2_fp", "tinyface", "ijbc"} <= missing
    shown = bench(root / "first", "--suite", "full", "--data", root, "--resolutions", "112,28")
    assert "accuracy on agedb30 of " in shown.stdout and "gallery size (down) x probe size" in shown.stdout


def test_nothing_there(root, tmp_path):
    done = bench(root / "first", "--data", tmp_path)
    assert done.exit_code == 1 and not done.stdout
    assert "no benchmark of suite paper was found (agedb30, cfp_fp, tinyface)" in done.stderr
    assert str(tmp_path / "agedb_30.bin") in done.stderr
    assert bench(root / "first", "--suite", "best").exit_code == 2
    missing = bench(root / "first", "--data", root, "--benchmark", "calfw")
    assert missing.exit_code == 1 and "calfw" in missing.stderr and not missing.stdout


def test_an_undescribed_file_of_others_is_refused(root):
    done = bench(root / "tiny.onnx", "--data", root)
    assert done.exit_code == 2 and not done.stdout
    assert f"{root / 'tiny.onnx'}@colour=BGR,mean=0.5,std=0.5" in done.stderr
    assert f"{root / 'tiny.onnx.json'} beside it" in done.stderr and '{"colour": "BGR"' in done.stderr
    with pytest.raises(UsageError, match="lrface does not guess"):
        run_suite([str(root / "tiny.onnx")], data=root, show_progress=False)


def test_broken_benchmarks_and_models_give_no_table(root, tmp_path, images):
    files, same = images
    # an image that is named and not there
    folder = tmp_path / "missing" / "agedb30"
    (folder / "images" / "ann").mkdir(parents=True)
    for number in (1, 2):
        (folder / "images" / "ann" / f"ann_{number:04d}.jpg").write_bytes(files[number])
    (folder / "pairs.txt").write_text("2\t1\nann\t1\t2\nann\t1\tbob\t1\nann\t1\t2\nann\t2\tbob\t1\n")
    # an odd number of images, so that the last has no partner
    odd = tmp_path / "odd"
    odd.mkdir()
    write_pack(odd / "agedb_30.bin", files, same)
    # written here by the test itself; what reads it is restricted
    (odd / "agedb_30.bin").write_bytes(pickle.dumps((files[:-1], [bool(each) for each in same]), protocol=2))
    # features that are not numbers, an input size that the benchmark has not
    broken = onnx.load(root / "tiny.onnx")
    broken.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.full(1, np.nan, np.float32), "grey"))
    onnx.save(broken, tmp_path / "nan.onnx")
    small = onnx.load(root / "tiny.onnx")
    for axis in (2, 3):
        small.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = 64
    small.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 48
    onnx.save(small, tmp_path / "small.onnx")
    for arguments, says in (
        ((root / "first", "--data", tmp_path / "missing"), "bob"),
        ((root / "first", "--data", odd), "agedb_30.bin"),
        ((f"{tmp_path / 'nan.onnx'}@colour=RGB", "--data", root), "not finite"),
        ((f"{tmp_path / 'small.onnx'}@colour=RGB", "--data", root), "64x64"),
    ):
        done = bench(*arguments, "--json")
        assert done.exit_code in (1, 2) and not done.stdout, done.output
        assert says in done.stderr.splitlines()[-1], done.stderr
        assert "Traceback" not in done.output


def test_table_5_holds_the_ranks_of_tinyface(monkeypatch, root):
    from lrface.identification_run import IdentificationRun

    rows = [
        {"model": "runs/a", "protocol": "authors", "rank": {"1": 50.0, "5": 75.0, "10": 100.0}, "mated": 100},
        {"model": "runs/a", "protocol": "open set", "rank": None, "mated": 100},
    ]
    table = suites._ranks("tinyface", IdentificationRun(rows=rows), {"runs/a": "a"})
    assert table.columns == ("Rank-1", "Rank-5", "Rank-10")
    assert [cell.text for cell in table.rows[2][2]] == ["35.54", "44.45", "47.42"]
    assert [row[0] for row in table.rows] == [*NAMES.values(), "a, authors"]
    # Wilson's interval by hand: 50 of 100
    assert table.rows[-1][2][0].intervals == ((40.3832, 59.6168),)
    assert table.rows[-1][2][2].intervals[0][1] == 100.0


def test_published_figures_are_those_of_the_paper(shared):
    text = (shared / "papers" / "001_4659c027da6d0559.txt").read_text()
    lines = [line.replace("<b>", "").replace("</b>", "").split("\t") for line in text.splitlines()]
    printed = {line[0]: line for line in lines if len(line) >= 5}
    for key, name in (("naive", "Naïve Augmentation"), ("qualnet_lm", "QualNet50-LM (ours)")):
        row = next(line for line in lines if line[0] == name and len(line) == 10)
        figures = [float(cell.split()[0]) for cell in row[2:]]
        assert figures == [value for pair in TABLE_4[key].values() for value in pair]
        ranks = next(line for line in lines if line[:2] == [name, "All"] and len(line) == 5)
        assert [float(cell) for cell in ranks[2:]] == list(TABLE_5[key].values())
    specialised = [line for line in lines if len(line) == 10 and "-" in line[2:]]
    found = [float(cell) for line in specialised for cell in line[2:] if cell != "-"]
    assert found == [value for pair in TABLE_4["specialised"].values() for value in pair]
    assert [float(cell) for cell in printed["Specialized Network"][2:]] == list(
        TABLE_5["specialised"].values()
    )
