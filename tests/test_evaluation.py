"""verify_models and calibrate on a small benchmark of drawn faces with a network whose weights the test makes."""

import json
import pickle

import cv2
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from lrface import load_embedder
from lrface.benchmarks.packs import write_pack
from lrface.benchmarks.verification import load_benchmark
from lrface.calibrate import calibrate, threshold_at
from lrface.cli import app
from lrface.data.synthetic import SyntheticFaces, verification_pairs
from lrface.errors import LrfaceError
from lrface.evaluation import verify_models
from lrface.models import build_backbone
from lrface.train.checkpoint import make_card, save_model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two random networks and a pack of 40 pairs."""
    folder = tmp_path_factory.mktemp("evaluation")
    arguments = {"width": 8, "embedding_size": 16}
    for name, seed in (("first", 0), ("second", 1)):
        torch.manual_seed(seed)
        encoder = build_backbone("ir18", **arguments).eval()
        save_model(folder / name, encoder, make_card({"name": "ir18", "arguments": arguments}, encoder, {}))
    faces = SyntheticFaces(12, 4)
    left, right, same = verification_pairs(faces, 40)
    images = [
        cv2.imencode(".png", faces.image(int(index))[..., ::-1])[1].tobytes()
        for pair in zip(left, right, strict=True)
        for index in pair
    ]
    write_pack(folder / "drawn.bin", images, same)
    return folder


def test_models_are_compared_pair_by_pair(place, tmp_path):
    models = [str(place / "first"), str(place / "second")]
    run = verify_models(models, [str(place / "drawn.bin")], (112, 14), cache=tmp_path, show_progress=False)
    assert [(row["model"], row["probe_size"]) for row in run.rows] == [
        (m, s) for m in models for s in (112, 14)
    ]
    assert len(run.comparisons) == 2 and set(run.areas) == set(models)
    for row, compared in zip(run.rows[:2], run.comparisons, strict=True):
        other = next(r for r in run.rows[2:] if r["probe_size"] == row["probe_size"])
        assert compared["difference"] == pytest.approx(other["accuracy"] - row["accuracy"], abs=1e-3)
        assert compared["interval"][0] <= compared["difference"] <= compared["interval"][1]
    again = verify_models(models, [str(place / "drawn.bin")], (112, 14), cache=tmp_path, show_progress=False)
    assert json.dumps(again.to_json()) == json.dumps(run.to_json())
    alone = verify_models(
        models[:1], [str(place / "drawn.bin")], (112, 14), keep_features=False, show_progress=False
    )
    assert alone.rows == run.rows[:2] and not alone.comparisons


def test_threshold_by_hand():
    scores = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    same = [True, False, True, False, False, False]
    # one of four strangers may pass: the threshold lies above the second of them
    threshold = threshold_at(scores, same, 0.25)
    assert 0.6 < threshold < 0.6 + 1e-9
    assert 0.5 < threshold_at(scores, same, 0.5) < 0.5 + 1e-9
    with pytest.raises(LrfaceError, match="at least 5 are needed"):
        threshold_at(scores, same, 0.2)


def test_thresholds_are_stored_with_the_model_and_used(place, tmp_path, monkeypatch):
    monkeypatch.setenv("LRFACE_CACHE", str(tmp_path))
    model, pack = str(place / "first"), str(place / "drawn.bin")
    before = load_embedder(model)
    faces = SyntheticFaces(2, 2)
    assert before.compare(faces.image(0), faces.image(1)).threshold_from == "default"
    arguments = [
        "calibrate",
        "--model",
        model,
        "--benchmark",
        pack,
        "--far",
        "0.1",
        "--resolutions",
        "112,28",
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "wanted FAR 1e-1" in done.stdout and "Brier score" in done.stdout
    embedder = load_embedder(model)
    assert list(embedder.card["thresholds"]) == ["112", "28", "112x28"]
    assert embedder.card["thresholds_measured"]["impostor_pairs"] == 20
    compared = embedder.compare(faces.image(0), faces.image(1))
    assert compared.threshold_from == "card" and compared.threshold in embedder.card["thresholds"].values()
    stores = set((tmp_path / "features").iterdir())
    kept = embedder.card["probability"]
    assert kept["sizes"] == [28, 112] and kept["slope"][0][1] == kept["slope"][1][0]
    assert kept["measured"]["impostor_pairs"] == 20 and 0 < kept["measured"]["brier"] < 0.5
    assert before.compare(faces.image(0), faces.image(1)).probability is None
    logit = kept["slope"][1][1] * compared.similarity + kept["intercept"][1][1]
    sharp = embedder.decide(compared.similarity, (112, 112))
    assert sharp.probability == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-9)
    assert 0 < compared.probability < 1 and f"{compared.probability:.4f}" in compared.statement
    run = verify_models([model], [pack], (112, 28), matrix=True, show_progress=False)
    assert (
        stores and set((tmp_path / "features").iterdir()) == stores
    )  # the features of before are found again
    (found,) = run.evaluations.values()
    accepted = dict.fromkeys(embedder.card["thresholds"], 0)
    for scores, row in zip(found.scores, found.rows, strict=True):
        large, small = row["gallery_size"], row["probe_size"]
        key = str(large) if large == small else "112x28"
        accepted[key] += (scores[~found.benchmark.same] >= embedder.card["thresholds"][key]).sum()
    assert accepted["112"] <= 2 and accepted["28"] <= 2  # of 20
    assert accepted["112x28"] <= 4  # of 40: either face may be the small one
    assert embedder.decide(0.5, (112, 28)).threshold == embedder.card["thresholds"]["112x28"]
    refused = CliRunner().invoke(app, [*arguments[:-4], "--far", "0.001"])
    assert refused.exit_code == 1 and "at least 1000 are needed" in refused.output


def test_verify_prints_matrix_and_conditions(place, tmp_path, monkeypatch):
    monkeypatch.setenv("LRFACE_CACHE", str(tmp_path))
    arguments = ["verify", "--model", str(place / "first"), "--benchmark", str(place / "drawn.bin")]
    done = CliRunner().invoke(
        app, [*arguments, "--resolutions", "112,28", "--matrix", "--degrade", "jpeg=20,size=28"]
    )
    assert done.exit_code == 0, done.output
    assert "gallery size (down) x probe size (across)" in done.stdout
    assert "28 jpeg=20 x 28 jpeg=20" in done.stdout
    done = CliRunner().invoke(app, [*arguments, "--json", "--resolutions", "112"])
    found = json.loads(done.stdout)
    assert set(found) == {"results", "resolution_areas", "comparisons"} and len(found["results"]) == 1


def test_native_sizes_are_told_plotted_and_on_the_page(place, tmp_path, monkeypatch):
    monkeypatch.setenv("LRFACE_CACHE", str(tmp_path / "cache"))
    faces = SyntheticFaces(6, 2)
    lines = []
    for identity in range(6):
        for number in (1, 2):
            side = (14, 20, 40)[(identity + number) % 3]
            image = cv2.resize(
                faces.image(2 * identity + number - 1), (side, side), interpolation=cv2.INTER_AREA
            )
            (tmp_path / f"crops/p{identity}").mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(tmp_path / f"crops/p{identity}/p{identity}_{number:04d}.png"), image[..., ::-1])
        lines += [f"p{identity}\t1\t2", f"p{identity}\t1\tp{(identity + 1) % 6}\t2"]
    (tmp_path / "crops/pairs.txt").write_text("\n".join(lines) + "\n")
    command = ["verify", "--model", str(place / "first"), "--benchmark", str(tmp_path / "crops")]
    command += ["--resolutions", "native"]
    done = CliRunner().invoke(
        app, [*command, "--report", str(tmp_path / "page.html"), "--plot", str(tmp_path / "plot.png")]
    )
    assert done.exit_code == 0, done.output
    assert (
        "native x native" in done.stdout
        and "12 to 15 px" in done.stdout
        and "crops by native size" in done.stdout
    )
    page = (tmp_path / "page.html").read_text()
    assert "accuracy by native size" in page and "native size" in page
    assert (tmp_path / "plot.png").stat().st_size > 5000
    found = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert [part["smallest"] for part in found["results"][0]["by_native_size"]] == [12, 16]
    assert found["resolution_areas"] == {str(place / "first"): {}}
    refused = CliRunner().invoke(app, [*command[:3], "--benchmark", str(place / "drawn.bin"), *command[5:]])
    assert refused.exit_code == 2 and "--resolutions native" in refused.output and refused.stdout == ""


@pytest.mark.parametrize(
    "spoil, message",
    [
        ("missing image", "p1 2"),
        ("half a pair", "line 3"),
        ("one image too few in a pack", "images"),
        ("not a number", "not finite"),
        ("another input size", "takes images of 96x96 pixels, the faces of crops are 112x112"),
    ],
)
def test_what_is_wrong_gets_a_name_and_no_table(place, tmp_path, monkeypatch, spoil, message):
    monkeypatch.setenv("LRFACE_CACHE", str(tmp_path / "cache"))
    model, benchmark = str(place / "first"), tmp_path / "crops"
    faces = SyntheticFaces(2, 2)
    for index in range(4):
        path = benchmark / f"p{index // 2}/p{index // 2}_{index % 2 + 1:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), faces.image(index)[..., ::-1])
    text = "p0\t1\t2\np1\t1\t2\np0\t1\tp1\t1\np0\t2\tp1\t2\n"
    if spoil == "missing image":
        (benchmark / "p1/p1_0002.png").unlink()
    if spoil == "half a pair":
        text = text.replace("p0\t1\tp1\t1\n", "p0\t1\n")
    (benchmark / "pairs.txt").write_text(text)
    if spoil == "one image too few in a pack":
        images = [cv2.imencode(".png", faces.image(index))[1].tobytes() for index in range(4)]
        benchmark = tmp_path / "odd.bin"
        benchmark.write_bytes(pickle.dumps((images[:3], [True, False])))
    if spoil in ("not a number", "another input size"):
        size = 96 if spoil == "another input size" else 112
        nodes = [
            helper.make_node("Flatten", ["image"], ["flat"]),
            helper.make_node("MatMul", ["flat", "w"], ["scaled"]),
            helper.make_node("Log" if spoil == "not a number" else "Identity", ["scaled"], ["embedding"]),
        ]
        weight = numpy_helper.from_array(np.full((3 * size * size, 4), -1, np.float32), "w")
        image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, size, size])
        out = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", 4])
        graph = helper.make_graph(nodes, "tiny", [image], [out], [weight])
        model = str(tmp_path / "tiny.onnx")
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), model)
    done = CliRunner().invoke(app, ["verify", "--model", model, "--benchmark", str(benchmark), "--json"])
    assert done.exit_code == (2 if spoil == "another input size" else 1), done.output
    assert message in done.stderr and "Traceback" not in done.stderr and done.stdout == ""


def write_onnx(path, seed):
    """Means of 28 x 28 pixels, times a random matrix."""
    matrix = np.random.default_rng(seed).normal(size=(48, 16)).astype(np.float32)
    nodes = [
        helper.make_node("AveragePool", ["image"], ["pooled"], kernel_shape=[28, 28], strides=[28, 28]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["embedding"]),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, 112, 112])
    out = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", 16])
    graph = helper.make_graph(nodes, "tiny", [image], [out], [numpy_helper.from_array(matrix, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def test_an_onnx_file_gets_its_thresholds_beside_it(place, tmp_path):
    model = tmp_path / "tiny.onnx"
    write_onnx(model, seed=0)
    calibrate(str(model), str(place / "drawn.bin"), 0.1, (112,), cache=tmp_path, show_progress=False)
    assert set(load_embedder(model).card["thresholds"]) == {"112"}
    assert load_embedder(model).card["probability"]["sizes"] == [112]
    write_onnx(model, seed=1)
    assert not {"thresholds", "probability"} & set(load_embedder(model).card)  # they belong to another file


def test_a_benchmark_becomes_a_pack_of_the_same_pairs(place, tmp_path):
    pack = tmp_path / "copy.bin"
    done = CliRunner().invoke(app, ["pack", str(place / "drawn.bin"), str(pack), "--to", "bin"])
    assert done.exit_code == 0 and "40 pairs" in done.stdout
    first, copy = load_benchmark(place / "drawn.bin"), load_benchmark(pack)
    np.testing.assert_array_equal(first.images[first.left], copy.images[copy.left])
    np.testing.assert_array_equal(first.images[first.right], copy.images[copy.right])
    np.testing.assert_array_equal(first.same, copy.same)
    again = CliRunner().invoke(app, ["pack", str(place / "drawn.bin"), str(pack), "--to", "bin"])
    assert again.exit_code == 2 and "exists" in again.output
