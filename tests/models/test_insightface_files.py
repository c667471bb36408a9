"""What is known of insightface's networks, against insightface's own reading of the same files."""

import json

import numpy as np
import pytest
import torch

from lrface.embed import load_embedder, parse_model, undescribed
from lrface.errors import LrfaceError, UsageError
from lrface.models.insightface_files import BYTES, SIGNED, own_rule, package_says, read_graph, takes_bytes

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

RANDOM = np.random.default_rng(0)
WEIGHT = RANDOM.normal(size=(8, 3, 16, 16)).astype(np.float32) / 50


def write(file, steps, names=("first", "second"), constants=False, size=112):
    """A recogniser of one layer behind ``steps``, (operator, number) pairs."""
    stored, nodes, last = [numpy_helper.from_array(WEIGHT, "weight")], [], "data"
    for place, (operator, value) in enumerate(steps):
        number = numpy_helper.from_array(np.asarray(value, np.float32), f"number{place}")
        if constants:
            nodes.append(helper.make_node("Constant", [], [f"number{place}"], value=number))
        else:
            stored.append(number)
        name = names[place] if place < len(names) else f"step{place}"
        nodes.append(helper.make_node(operator, [last, f"number{place}"], [f"value{place}"], name))
        last = f"value{place}"
    nodes += [
        helper.make_node("Conv", [last, "weight"], ["map"], "layer", strides=[16, 16]),
        helper.make_node("GlobalAveragePool", ["map"], ["mean"], "pool"),
        helper.make_node("Flatten", ["mean"], ["embedding"], "flat"),
    ]
    kind = TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "recogniser",
        [helper.make_tensor_value_info("data", kind, ["n", 3, size, size])],
        [helper.make_tensor_value_info("embedding", kind, ["n", 8])],
        stored,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(file))
    return file


MXNET = [("Sub", 127.5), ("Mul", 0.0078125)]


@pytest.mark.parametrize(
    "steps, bytes_",
    [
        (MXNET, True),
        ([("Sub", 127.5), ("Div", 127.5)], True),
        ([("Mul", 1 / 127.5), ("Add", -1.0)], True),
        ([("Sub", np.full((1, 3, 1, 1), 127.5)), ("Mul", np.full((1, 3, 1, 1), 1 / 128))], True),
        ([("Sub", 0.5), ("Div", 0.5)], False),
        ([("Sub", 127.5)], False),
        ([("Mul", 1 / 255)], False),
        ([], False),
    ],
)
def test_a_graph_of_bytes_is_known_by_its_constants(tmp_path, steps, bytes_):
    for constants in (False, True):
        file = write(tmp_path / "theirs.onnx", steps, constants=constants)
        assert takes_bytes(read_graph(file)) is bytes_
        embedder = load_embedder(file)
        if bytes_:
            assert embedder.card["described_by"] == "insightface convention" and undescribed(embedder) is None
            normalisation = embedder.card["input"]["normalisation"]
            assert normalisation["mean"] == [0, 0, 0] and embedder.card["input"]["colour"] == "RGB"
            np.testing.assert_allclose(normalisation["std"], [1 / 255] * 3, rtol=1e-6)
        else:  # nothing is guessed
            assert embedder.card["described_by"] == "convention"
            assert "@convention=insightface" in undescribed(embedder)


@pytest.mark.parametrize(
    "steps, names",
    [
        (MXNET, ("_minusscalar0", "_mulscalar0")),
        (MXNET, ("Sub_0", "Mul_1")),
        ([], ()),
        ([("Sub", 0.5), ("Mul", 2.0)], ("first", "second")),
    ],
)
def test_the_named_convention_gives_what_insightface_gives(tmp_path, steps, names):
    from insightface.model_zoo import get_model

    file = write(tmp_path / "theirs.onnx", steps, names)
    theirs = get_model(str(file), providers=["CPUExecutionProvider"])
    assert theirs.taskname == "recognition"
    mean, std = own_rule(read_graph(file))
    assert (mean, std) == (BYTES if theirs.input_std == 1 else SIGNED)
    crop = RANDOM.integers(0, 256, (112, 112, 3), dtype=np.uint8)
    wanted = theirs.get_feat(crop[:, :, ::-1].copy())
    model, options = parse_model(f"{file}@convention=insightface")
    ours = load_embedder(model, **options)
    given = ours.embed_tensor(torch.from_numpy(crop).permute(2, 0, 1)[None].float() / 255)
    np.testing.assert_allclose(given, wanted, rtol=1e-4, atol=1e-4)
    assert ours.card["described_by"] == "insightface convention"


@pytest.mark.parametrize(
    "preprocessing, wanted",
    [
        ("embedded", BYTES),
        ({"mean": 127.5, "std": 127.5}, SIGNED),
        (None, SIGNED),
        ({"mean": 0, "std": 255}, (0, 1)),
    ],
)
def test_a_model_package_says_it_itself(tmp_path, preprocessing, wanted):
    file = write(tmp_path / "theirs.onnx", [])
    (tmp_path / "MODEL.LICENSE").write_text("of tests")
    task = {"file": "theirs.onnx", "preprocessing": preprocessing, "embedding_dimension": 8}
    if preprocessing is None:
        del task["preprocessing"]
    manifest = {
        "manifest_version": 2,
        "model_id": "theirs",
        "license": "MODEL.LICENSE",
        "tasks": {"recognition": task},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    np.testing.assert_allclose(package_says(file), wanted)
    from insightface.model_zoo import get_model

    theirs = get_model(str(tmp_path), model_task="recognition", providers=["CPUExecutionProvider"])
    crop = RANDOM.integers(0, 256, (112, 112, 3), dtype=np.uint8)
    ours = load_embedder(file)
    given = ours.embed_tensor(torch.from_numpy(crop).permute(2, 0, 1)[None].float() / 255)
    np.testing.assert_allclose(given, theirs.get_feat(crop[:, :, ::-1].copy()), rtol=1e-4, atol=1e-3)
    assert ours.card["described_by"] == "insightface convention"
    # What the caller says goes before.
    assert load_embedder(file, colour="BGR", mean=0.5, std=0.5).card["described_by"] == "options"


@pytest.mark.parametrize(
    "manifest",
    [
        "{broken",
        "[]",
        '{"manifest_version": 1}',
        '{"manifest_version": 2, "tasks": {"recognition": {"file": "other.onnx"}}}',
        '{"manifest_version": 2, "tasks": {}}',
    ],
)
def test_other_files_of_that_name_say_nothing(tmp_path, manifest):
    file = write(tmp_path / "theirs.onnx", [])
    (tmp_path / "manifest.json").write_text(manifest)
    assert package_says(file) is None and load_embedder(file).card["described_by"] == "convention"


def test_what_contradicts_itself_is_named(tmp_path):
    file = write(tmp_path / "theirs.onnx", [])
    with pytest.raises(UsageError, match="leave out colour"):
        load_embedder(file, convention="insightface", colour="BGR")
    with pytest.raises(UsageError, match="convention must be insightface"):
        load_embedder(file, convention="dlib")
    with pytest.raises(UsageError, match="convention describes"):
        load_embedder(tmp_path, convention="insightface")
    (tmp_path / "theirs.onnx.json").write_text('{"convention": "insightface"}')
    assert load_embedder(file).card["described_by"] == "insightface convention"
    (tmp_path / "theirs.onnx.json").unlink()
    task = {"file": "theirs.onnx", "preprocessing": {"mean": 1, "std": 0}}
    (tmp_path / "manifest.json").write_text(
        json.dumps({"manifest_version": 2, "tasks": {"recognition": task}})
    )
    with pytest.raises(LrfaceError, match="tasks.recognition.preprocessing"):
        load_embedder(file)
