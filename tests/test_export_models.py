"""Exported files against the models they came from, and against those who read them: onnxruntime, PyTorch, OpenVINO and
insightface itself."""

import json
import sys

import numpy as np
import pytest
import torch
from onnx_files import write_onnx, write_recogniser
from PIL import Image
from typer.testing import CliRunner

from lrface import export
from lrface.cli import app
from lrface.data.synthetic import SyntheticFaces
from lrface.embed import load_embedder
from lrface.errors import LrfaceError, UsageError
from lrface.export import export_model
from lrface.models import build_backbone
from lrface.train.checkpoint import make_card, save_model

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

NETWORKS = '''
import torch
from torch import nn


class Small(nn.Module):
    """Two convolutions and a linear layer for images of 112 pixels."""

    input_size = 112

    def __init__(self, last):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 7, 4)
        self.norm = nn.BatchNorm2d(8)
        self.norm.running_mean.uniform_(-1, 1)
        self.second = nn.Conv2d(8, 16, 3, 2)
        self.last = nn.Linear(16 * 13 * 13, 24)
        self.what = last

    def forward(self, images):
        found = self.second(self.norm(self.first(images * 2 - 1)).relu())
        found = self.last(found.flatten(1))
        return self.what(found)


def same(found):
    return found


def small():
    return Small(same)


def over_the_batch():
    return Small(lambda found: found - found.mean(0) * 0.5)


def random():
    return Small(lambda found: nn.functional.dropout(found, 0.5, training=True))


def growing():
    return Small(lambda found: found * found.tolist()[0][0])


def plain():
    return lambda images: images.flatten(1)[:, :8]
'''


def in_numpy(network, images):
    with torch.no_grad():
        return network(images).numpy()


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    (folder / "networks_to_export.py").write_text(NETWORKS)
    sys.path.insert(0, str(folder))
    import networks_to_export

    yield networks_to_export
    sys.path.remove(str(folder))
    del sys.modules["networks_to_export"]


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """A folder of 12 drawn faces of 4 people."""
    folder = tmp_path_factory.mktemp("faces")
    drawn = SyntheticFaces(4, 3)
    for index, name in enumerate(drawn.sources()):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(drawn.image(index)).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def images():
    return torch.rand(5, 3, 112, 112, generator=torch.Generator().manual_seed(1))


def recogniser(file, size=112):
    return write_recogniser(file, size=size)


def by_onnxruntime(file, images):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]


def quiet(model, out, **options):
    return export_model(model, out, show_progress=False, **options)


def cosines(a, b):
    a, b = (np.asarray(each, np.float64) for each in (a, b))
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


# ----------------------------------------------------------------------------------------------- PyTorch networks


def test_a_trained_network_to_onnx_with_its_card(tmp_path, faces, images):
    torch.manual_seed(0)
    encoder = build_backbone("ir18", width=8, embedding_size=32).eval()
    architecture = {"name": "ir18", "arguments": {"width": 8, "embedding_size": 32}}
    card = make_card(architecture, encoder, {"of": "tests"})
    save_model(tmp_path / "run", encoder, {**card, "thresholds": {"112": 0.3}, "licence": "none"})
    said = []
    found = quiet(tmp_path / "run", tmp_path / "small.onnx", faces=faces, say=said.append)
    assert [row["resolution"] for row in found.rows] == [112, 56, 28, 14] and not said
    assert all(row["minimum_cosine"] >= 0.9999 and row["faces"] == 12 for row in found.rows)
    assert found.bytes == (tmp_path / "small.onnx").stat().st_size and "12 faces" in str(found)
    model = onnx.load(tmp_path / "small.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for count in (1, 2, 7):
        batch = images.repeat(2, 1, 1, 1)[:count]
        given = by_onnxruntime(tmp_path / "small.onnx", batch)
        np.testing.assert_allclose(given, in_numpy(encoder, batch), atol=2e-4)
    embedder = load_embedder(tmp_path / "small.onnx")
    assert embedder.card["training"] == {"of": "tests"} and embedder.card["licence"] == "none"
    assert embedder.card["thresholds"] == {"112": 0.3}
    assert embedder.card["architecture"] == architecture
    assert embedder.card["exported"]["from"] == "model.safetensors"
    small = quiet(tmp_path / "small.onnx", tmp_path / "int8.onnx", faces=faces, int8="dynamic")
    assert small.bytes < 0.5 * found.bytes
    # Paths and source lines of whoever exported it are nobody's business.
    content = (tmp_path / "small.onnx").read_bytes()
    assert not any(
        word in content for word in (b"site-packages", b".py", b"stack_trace", str(tmp_path).encode())
    )


@pytest.mark.parametrize("precision", export.PRECISIONS)
def test_a_model_without_its_run(tmp_path, faces, images, precision):
    torch.manual_seed(0)
    encoder = build_backbone("ir18", width=8, embedding_size=32).eval()
    architecture = {"name": "ir18", "arguments": {"width": 8, "embedding_size": 32}}
    card = make_card(architecture, encoder, {"of": "tests"})
    whole = save_model(tmp_path / "run", encoder, {**card, "thresholds": {"112": 0.3}})
    out = tmp_path / "small.safetensors"
    found = quiet(tmp_path / "run", out, to="safetensors", faces=faces, precision=precision)
    share = out.stat().st_size / whole.stat().st_size
    assert share < 0.55 if precision == "float16" else 0.99 < share < 1.01
    assert found.bytes == out.stat().st_size + out.with_suffix(".json").stat().st_size
    embedder = load_embedder(out)
    assert cosines(embedder.embed_tensor(images), in_numpy(encoder, images)).min() > 0.9999
    assert embedder.card["thresholds"] == {"112": 0.3} and embedder.card["exported"]["precision"] == precision
    assert sorted(each.name for each in tmp_path.iterdir()) == ["run", "small.json", "small.safetensors"]


def test_only_networks_of_lrface_have_a_safetensors_file(networks, faces, tmp_path):
    with pytest.raises(UsageError, match="no network of lrface's own"):
        quiet("networks_to_export:small", tmp_path / "net.safetensors", to="safetensors", faces=faces)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def three(networks, faces, tmp_path_factory):
    """One network of a user's in three formats."""
    pytest.importorskip("openvino")
    folder = tmp_path_factory.mktemp("three")
    for to, ending in export.ENDINGS.items():
        if to == "safetensors":
            continue  # lrface's own networks alone
        quiet("networks_to_export:small", folder / f"net{ending}", to=to, faces=faces)
    return folder


@pytest.mark.parametrize("ending", [".onnx", ".pt2", ".xml"])
def test_every_format_gives_the_networks_features(three, networks, images, ending):
    embedder = load_embedder(three / f"net{ending}")
    wanted = in_numpy(networks.small().eval(), images)
    np.testing.assert_allclose(embedder.embed_tensor(images).numpy(), wanted, rtol=1e-4, atol=1e-4)
    assert embedder.card["input"] == {
        "size": 112,
        "colour": "RGB",
        "range": [0, 1],
        "normalisation": "inside",
    }
    assert embedder.card["source"]["described_by"] == "module:function"
    assert embedder.embedding_size == 24
    assert sorted(each.name for each in three.iterdir()) == ["net.bin", "net.onnx", "net.pt2", "net.xml"]


def test_pytorch_itself_loads_the_program(three, networks, images, tmp_path_factory):
    extra = {"lrface_card": ""}
    program = torch.export.load(three / "net.pt2", extra_files=extra)
    np.testing.assert_allclose(
        program.module()(images).numpy(), in_numpy(networks.small().eval(), images), atol=1e-4
    )
    assert json.loads(extra["lrface_card"])["format"] == "lrface-model"
    content = (three / "net.pt2").read_bytes()
    assert b"stack_trace" not in content and str(tmp_path_factory.getbasetemp()).encode() not in content


def test_an_exported_program_goes_on_to_onnx(three, networks, images, faces, tmp_path):
    quiet(three / "net.pt2", tmp_path / "again.onnx", faces=faces)
    wanted = in_numpy(networks.small().eval(), images)
    np.testing.assert_allclose(by_onnxruntime(tmp_path / "again.onnx", images), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("to", ["onnx", "torch-export", "openvino"])
def test_half_precision_is_half_the_size(three, networks, images, faces, tmp_path, to):
    out = tmp_path / f"half{export.ENDINGS[to]}"
    source = three / "net.onnx" if to != "torch-export" else "networks_to_export:small"
    found = quiet(source, out, to=to, faces=faces, precision="float16")
    whole = sum(file.stat().st_size for file in three.glob(f"net{export.ENDINGS[to]}"))
    whole += (three / "net.bin").stat().st_size if to == "openvino" else 0
    assert found.bytes < 0.75 * whole
    given = load_embedder(out).embed_tensor(images)
    assert cosines(given, in_numpy(networks.small().eval(), images)).min() > 0.9999


@pytest.mark.parametrize(
    "function, says",
    [
        ("over_the_batch", "batch|does not give the model's features"),
        ("random", "does not give the model's features"),
        ("growing", "cannot export|not any number"),
        ("plain", "function, of which there is no graph"),
    ],
)
def test_what_does_not_give_the_same_leaves_no_file(networks, faces, tmp_path, function, says):
    out = tmp_path / "net.onnx"
    out.write_bytes(b"an earlier file")
    with pytest.raises(LrfaceError, match=says):
        quiet(f"networks_to_export:{function}", out, faces=faces)
    assert [each.name for each in tmp_path.iterdir()] == ["net.onnx"]
    assert out.read_bytes() == b"an earlier file"


# ---------------------------------------------------------------------------------------------------- ONNX files


def test_a_described_file_takes_rgb_afterwards(tmp_path, faces, images):
    source = recogniser(tmp_path / "theirs.onnx")
    named = f"{source}@colour=BGR,mean=0.1:0.2:0.3,std=0.5"
    quiet(named, tmp_path / "ours.onnx", faces=faces)
    given = (images.numpy()[:, ::-1] - np.array([0.1, 0.2, 0.3], np.float32).reshape(1, 3, 1, 1)) / 0.5
    wanted = by_onnxruntime(source, torch.from_numpy(np.ascontiguousarray(given, np.float32)))
    np.testing.assert_allclose(by_onnxruntime(tmp_path / "ours.onnx", images), wanted, rtol=1e-3, atol=1e-3)
    embedder = load_embedder(tmp_path / "ours.onnx")
    np.testing.assert_allclose(embedder.embed_tensor(images), wanted, rtol=1e-3, atol=1e-3)
    assert embedder.card["source"] == {"described_by": "options", "format": "onnx"}


def test_a_file_that_nobody_described_is_asked_about(tmp_path, faces):
    source = recogniser(tmp_path / "theirs.onnx")
    with pytest.raises(UsageError, match="@colour=RGB"):
        quiet(source, tmp_path / "ours.onnx", faces=faces)
    assert not (tmp_path / "ours.onnx").exists()


def test_an_onnx_file_as_a_program(tmp_path, faces, images):
    pytest.importorskip("onnx2torch")
    source = recogniser(tmp_path / "theirs.onnx")
    quiet(f"{source}@colour=BGR,mean=0.5,std=0.5", tmp_path / "ours.pt2", to="torch-export", faces=faces)
    given = torch.from_numpy(np.ascontiguousarray(images.numpy()[:, ::-1])) * 2 - 1
    np.testing.assert_allclose(
        load_embedder(tmp_path / "ours.pt2").embed_tensor(images),
        by_onnxruntime(source, given),
        rtol=1e-3,
        atol=1e-3,
    )


def test_of_several_outputs_the_named_one_is_left(tmp_path, faces, images):
    write_onnx(tmp_path / "two.onnx", size=112, output=True)
    quiet(f"{tmp_path / 'two.onnx'}@colour=RGB,output=flat", tmp_path / "one.onnx", faces=faces)
    assert [each.name for each in onnx.load(tmp_path / "one.onnx").graph.output] == ["flat"]
    np.testing.assert_allclose(
        by_onnxruntime(tmp_path / "one.onnx", images), images.mean(dim=(2, 3)), rtol=1e-5
    )


def test_a_graph_for_one_image_is_refused(tmp_path, faces):
    """Its Reshape has the batch as a number."""
    weight = numpy_helper.from_array(
        np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32), "weight"
    )
    shape = numpy_helper.from_array(np.array([1, 3]), "shape")
    nodes = [
        helper.make_node("GlobalAveragePool", ["images"], ["mean"]),
        helper.make_node("Reshape", ["mean", "shape"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["embedding"]),
    ]
    kind = TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "fixed",
        [helper.make_tensor_value_info("images", kind, [1, 3, 112, 112])],
        [helper.make_tensor_value_info("embedding", kind, [1, 8])],
        [weight, shape],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8),
        tmp_path / "a.onnx",
    )
    with pytest.raises(LrfaceError, match=r"\[4, 3, 112, 112\]|any number"):
        quiet(f"{tmp_path / 'a.onnx'}@colour=RGB", tmp_path / "b.onnx", faces=faces)
    assert not (tmp_path / "b.onnx").exists()


def test_another_opset(tmp_path, faces, images):
    source = recogniser(tmp_path / "theirs.onnx")
    found = quiet(f"{source}@colour=RGB", tmp_path / "ours.onnx", faces=faces, opset=19)
    assert found.opset == 19
    assert [each.version for each in onnx.load(tmp_path / "ours.onnx").opset_import] == [19]
    np.testing.assert_allclose(
        by_onnxruntime(tmp_path / "ours.onnx", images), by_onnxruntime(source, images), rtol=1e-4, atol=1e-4
    )


def test_small_networks_are_tried_at_the_sizes_that_they_have(tmp_path, faces):
    source = recogniser(tmp_path / "theirs.onnx", size=16)
    found = quiet(f"{source}@colour=RGB", tmp_path / "ours.onnx", faces=faces)
    assert [row["resolution"] for row in found.rows] == [14]


# ----------------------------------------------------------------------------------------------------------- int8


@pytest.mark.parametrize("how, operators", [("dynamic", "ConvInteger"), ("static", "QuantizeLinear")])
def test_int8_is_small_and_says_what_it_costs(tmp_path, faces, images, how, operators):
    source = recogniser(tmp_path / "theirs.onnx")
    beside = {"model_sha256": load_embedder(source).model_sha256, "thresholds": {"112": 0.3}}
    (tmp_path / "theirs.onnx.thresholds.json").write_text(json.dumps(beside))
    found = quiet(f"{source}@colour=RGB", tmp_path / "small.onnx", faces=faces, int8=how)
    assert found.bytes < 0.5 * source.stat().st_size
    assert found.minimum_cosine == export.INT8_MINIMUM_COSINE
    assert found.thresholds_dropped and "lrface calibrate" in str(found)
    assert operators in {node.op_type for node in onnx.load(tmp_path / "small.onnx").graph.node}
    embedder = load_embedder(tmp_path / "small.onnx")
    assert "thresholds" not in embedder.card and embedder.card["exported"]["int8"] == how
    judged = cosines(embedder.embed_tensor(images), by_onnxruntime(source, images))
    assert 0.95 < judged.min() and all(row["minimum_cosine"] < 0.999999 for row in found.rows)
    if how == "static":
        assert found.faces.startswith("4 faces") and found.calibration.startswith("8 other faces")


def test_int8_that_is_too_far_off_leaves_no_file(tmp_path, faces):
    source = recogniser(tmp_path / "theirs.onnx")
    with pytest.raises(LrfaceError, match="--minimum-cosine"):
        quiet(
            f"{source}@colour=RGB",
            tmp_path / "small.onnx",
            faces=faces,
            int8="dynamic",
            minimum_cosine=0.9999999,
        )
    assert sorted(each.name for each in tmp_path.iterdir()) == ["theirs.onnx"]


# ---------------------------------------------------------------------------------------------------- insightface


def write_detector(file, points):
    """An SCRFD file, as insightface reads it, that finds one face with ``points`` [5, 2] in any image of 128 pixels."""
    stored, nodes, outputs = [], [helper.make_node("ReduceMax", ["image"], ["some"], keepdims=0)], []
    nodes += [helper.make_node("Mul", ["some", "nought"], ["nothing"])]
    stored.append(numpy_helper.from_array(np.float32(0), "nought"))
    for kind in ("score", "box", "points"):
        for stride in (8, 16, 32):
            side = 128 // stride
            rows = np.zeros((side * side * 2, {"score": 1, "box": 4, "points": 10}[kind]), np.float32)
            if stride == 8:
                place = (8 * side + 8) * 2  # its anchor lies at (64, 64)
                rows[place] = {"score": [0.9], "box": [6, 6, 6, 6], "points": (points.reshape(-1) - 64) / 8}[
                    kind
                ]
            name = f"{kind}_{stride}"
            stored.append(numpy_helper.from_array(rows, f"{name}_rows"))
            nodes.append(helper.make_node("Add", [f"{name}_rows", "nothing"], [name]))
            outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, list(rows.shape)))
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 128, 128])
    graph = helper.make_graph(nodes, "detector", [image], outputs, stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(file))


def in_insightface(folder, file, photo, points):
    """The embedding that FaceAnalysis gives the face at ``points``, and the crop that it takes it from (RGB)."""
    from insightface.app import FaceAnalysis
    from insightface.utils import face_align

    folder.mkdir()
    write_detector(folder / "detector.onnx", points)
    (folder / "recogniser.onnx").write_bytes(file.read_bytes())
    analysis = FaceAnalysis(name=str(folder), providers=["CPUExecutionProvider"])
    analysis.prepare(ctx_id=-1, det_size=(128, 128))
    (found,) = analysis.get(photo[:, :, ::-1].copy())
    np.testing.assert_allclose(found.kps, points, atol=1e-3)
    size = analysis.models["recognition"].input_size[0]
    crop = face_align.norm_crop(photo[:, :, ::-1].copy(), landmark=found.kps, image_size=size)
    return found.embedding, crop[:, :, ::-1].copy()


POINTS = np.array([[48.0, 58], [80, 56], [65, 76], [52, 93], [79, 92]], np.float32)


def test_a_file_for_insightface_is_its_recognition_model(tmp_path, faces, images):
    source = recogniser(tmp_path / "theirs.onnx")
    named = f"{source}@colour=RGB"
    quiet(named, tmp_path / "for_insightface.onnx", faces=faces, flavour="insightface")
    photo = SyntheticFaces(1, 1, size=128).image(0)
    embedding, crop = in_insightface(tmp_path / "package", tmp_path / "for_insightface.onnx", photo, POINTS)
    ours = load_embedder(source, colour="RGB").embed(crop, kind="crop").vectors
    assert cosines(embedding[None], ours)[0] > 0.99999
    # It loads here, too, by its card, and goes back.
    again = load_embedder(tmp_path / "for_insightface.onnx")
    np.testing.assert_allclose(
        again.embed_tensor(images), by_onnxruntime(source, images), rtol=1e-3, atol=1e-3
    )
    quiet(tmp_path / "for_insightface.onnx", tmp_path / "back.onnx", faces=faces)
    np.testing.assert_allclose(
        by_onnxruntime(tmp_path / "back.onnx", images), by_onnxruntime(source, images), rtol=1e-3, atol=1e-3
    )


def test_names_that_insightface_would_misread_are_changed(tmp_path, faces, images):
    """It takes a graph that has a Sub and a Mul by name among its first nodes for one of bytes."""
    source = recogniser(tmp_path / "theirs.onnx")
    model = onnx.load(source)
    model.graph.node[0].name, model.graph.node[1].name = "Sub_0", "Mul_1"
    onnx.save(model, source)
    quiet(f"{source}@colour=RGB", tmp_path / "ours.onnx", faces=faces, flavour="insightface", int8="dynamic")
    from insightface.model_zoo import get_model

    read = get_model(str(tmp_path / "ours.onnx"), providers=["CPUExecutionProvider"])
    assert (read.taskname, read.input_mean, read.input_std) == ("recognition", 127.5, 127.5)
    crop = (images[0] * 255).round().byte()
    given = read.get_feat(crop.permute(1, 2, 0).numpy()[:, :, ::-1].copy())
    wanted = load_embedder(tmp_path / "ours.onnx").embed_tensor(crop.float()[None] / 255)
    assert cosines(given, wanted)[0] > 0.9999


def test_sizes_that_insightface_does_not_align_are_refused(tmp_path, faces):
    source = recogniser(tmp_path / "theirs.onnx", size=16)
    with pytest.raises(UsageError, match="multiples of 112"):
        quiet(f"{source}@colour=RGB", tmp_path / "ours.onnx", faces=faces, flavour="insightface")


# ---------------------------------------------------------------------------------------- teachers, use of one's own


def test_a_file_for_insightface_as_teacher_and_backbone(tmp_path, faces, images):
    pytest.importorskip("onnx2torch")
    from lrface.models.onnx_network import OnnxBackbone
    from lrface.models.onnx_teacher import OnnxTeacher

    source = recogniser(tmp_path / "theirs.onnx")
    quiet(f"{source}@colour=RGB", tmp_path / "ours.onnx", faces=faces, flavour="insightface")
    wanted = by_onnxruntime(source, images)
    np.testing.assert_allclose(OnnxTeacher(str(tmp_path / "ours.onnx"))(images), wanted, rtol=1e-3, atol=1e-3)
    network = OnnxBackbone(path=str(tmp_path / "ours.onnx")).eval()
    np.testing.assert_allclose(in_numpy(network, images), wanted, rtol=1e-3, atol=1e-3)


# -------------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    "options, says",
    [
        ({"to": "tflite"}, "to must be one of onnx"),
        ({"to": "openvino"}, "end in .xml"),
        ({"flavour": "dlib"}, "flavour must be"),
        ({"precision": "bfloat16"}, "precision must be"),
        ({"int8": "weights"}, "int8 must be one of dynamic, static"),
        ({"int8": "static", "precision": "float16"}, "exclude each other"),
        ({"int8": "static"}, "--faces"),
        ({"minimum_cosine": 2.0}, "between -1 and 1"),
        ({"opset": 5}, "opset must be 13 to"),
        ({"to": "torch-export", "int8": "static", "out": "a.pt2"}, "is for ONNX files"),
        ({"to": "torch-export", "flavour": "insightface", "out": "a.pt2"}, "is for ONNX files"),
        ({"out": "theirs.onnx"}, "is the model itself"),
    ],
)
def test_options_that_do_not_fit_are_named(tmp_path, options, says):
    source = recogniser(tmp_path / "theirs.onnx", size=16)
    options = dict(options)
    with pytest.raises(UsageError, match=says):
        quiet(f"{source}@colour=RGB", tmp_path / options.pop("out", "a.onnx"), **options)
    assert [each.name for each in tmp_path.iterdir()] == ["theirs.onnx"]


def test_places_and_packages_that_are_missing_are_named(tmp_path, faces, networks, monkeypatch):
    source = recogniser(tmp_path / "theirs.onnx", size=16)
    named = f"{source}@colour=RGB"
    with pytest.raises(LrfaceError, match="theirs.onnx/a.onnx"):
        quiet(named, source / "a.onnx", faces=faces)
    with pytest.raises(LrfaceError, match="absent"):
        quiet(named, tmp_path / "a.onnx", faces=tmp_path / "absent")
    with pytest.raises(LrfaceError, match="no such"):
        quiet(tmp_path / "absent.onnx", tmp_path / "a.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(LrfaceError, match=r"lrface\[export\]"):
        quiet("networks_to_export:small", tmp_path / "a.onnx", faces=faces)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(LrfaceError, match=r"lrface\[openvino\]"):
        quiet(named, tmp_path / "a.xml", to="openvino", faces=faces)
    assert [each.name for each in tmp_path.iterdir()] == ["theirs.onnx"]


def test_the_command_prints_one_object(tmp_path, faces):
    source = recogniser(tmp_path / "theirs.onnx", size=16)
    command = [
        "export",
        f"{source}@colour=RGB",
        "--out",
        str(tmp_path / "a.onnx"),
        "--faces",
        str(faces),
        "--json",
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["rows"][0]["minimum_cosine"] > 0.9999 and found["file"] == str(tmp_path / "a.onnx")
    assert CliRunner().invoke(app, [*command[:-1], "--to", "openvino"]).exit_code == 2


def test_without_faces_of_ones_own_the_shipped_ones_are_taken(tmp_path):
    source = recogniser(tmp_path / "theirs.onnx", size=16)
    said = []
    found = quiet(f"{source}@colour=RGB", tmp_path / "a.onnx", say=said.append)
    assert found.rows[0]["faces"] == export.FACES
    assert "6 faces of insightface's photograph and 26 drawn ones" in said[0] and "--faces" in said[0]


def test_accuracy_of_both_on_a_benchmark(tmp_path, faces):
    """On pairs of drawn faces: float and int8 side by side."""
    source = recogniser(tmp_path / "theirs.onnx")
    album = tmp_path / "album"
    drawn = SyntheticFaces(4, 3)
    for index, name in enumerate(drawn.sources()):
        person, number = name.split("/")
        (album / person).mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawn.image(index)).save(album / person / f"{person}_{int(number) + 1:04d}.png")
    people = drawn.identities
    lines = ["2\t2"]
    for first, second in ((0, 1), (2, 3)):
        lines += [f"{people[person]}\t1\t2" for person in (first, second)]
        lines += [f"{people[first]}\t{n}\t{people[second]}\t{n}" for n in (1, 2)]
    (album / "pairs.txt").write_text("\n".join(lines) + "\n")
    found = quiet(
        f"{source}@colour=RGB",
        tmp_path / "a.onnx",
        faces=faces,
        int8="static",
        benchmark=str(album),
        resolutions=(112, 14),
    )
    assert [row["probe_size"] for row in found.accuracy] == [112, 14]
    for row in found.accuracy:
        assert row["difference"] == pytest.approx(row["exported"] - row["model"])
        assert 0 <= row["exported"] <= 100 and row["pairs"] == 8
    assert "exported %" in str(found)


# --------------------------------------------------------------------------------------------------- the real thing


def test_the_real_recogniser_there_and_back(shared, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "FACES", 8)
    oracle, real = shared / "oracle" / "mobilefacenet_ms1m.onnx", shared / "data" / "celeba300_112"
    if not (oracle.is_file() and real.is_dir()):
        pytest.skip("the oracle or the real faces are absent")
    found = quiet(f"{oracle}@colour=RGB", tmp_path / "a.onnx", faces=real, flavour="insightface")
    assert all(row["minimum_cosine"] > 0.99999 for row in found.rows) and len(found.rows) == 4
    photo = np.asarray(Image.open(next(real.glob("*/*"))).resize((128, 128)))
    embedding, crop = in_insightface(tmp_path / "package", tmp_path / "a.onnx", photo, POINTS)
    ours = load_embedder(oracle, colour="RGB").embed(crop, kind="crop").vectors
    assert cosines(embedding[None], ours)[0] > 0.9999
    back = quiet(tmp_path / "a.onnx", tmp_path / "b.onnx", faces=real)
    assert all(row["minimum_cosine"] > 0.99999 for row in back.rows)
