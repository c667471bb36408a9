"""ONNX files as networks: the same function, what of it is trained, and the way back from a card."""

import base64
import copy
import zlib

import numpy as np
import pytest
import torch
from onnx_files import write_onnx, write_recogniser

from lrface.degrade.policies import build_policy
from lrface.errors import LrfaceError, UsageError
from lrface.methods import METHODS
from lrface.models import build_backbone
from lrface.models.onnx_network import OnnxBackbone
from lrface.train.checkpoint import load_model, make_card, save_model

pytest.importorskip("onnx2torch")


@pytest.fixture(scope="module", params=[17, 20])
def file(request, tmp_path_factory):
    return write_recogniser(tmp_path_factory.mktemp("recogniser") / "recogniser.onnx", opset=request.param)


def by_onnxruntime(file, images: torch.Tensor) -> torch.Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])


def test_a_file_and_its_network_give_the_same_embeddings(file):
    network = build_backbone("onnx", path=str(file)).eval()
    assert isinstance(network, OnnxBackbone)
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    wanted = by_onnxruntime(file, images)
    with torch.no_grad():
        feature_map = network.features(images)
        assert feature_map.shape == (5, network.feature_channels, network.feature_size, network.feature_size)
        assert (network.feature_channels, network.feature_size) == (16, 4)
        assert (network.embedding_size, network.input_size) == (8, 16)
        torch.testing.assert_close(network.embed(feature_map), wanted, rtol=1e-5, atol=1e-5)
        other = network.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(other(images), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(copy.deepcopy(other)(images[:1]), wanted[:1], rtol=1e-5, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.cosine_similarity(other(images).float(), wanted).min() > 0.99


def test_all_that_is_behind_the_first_layer_is_trained_and_the_normalisation_is_not(file):
    network = OnnxBackbone(path=str(file)).train()
    shapes = sorted(tuple(each.shape) for each in network.parameters())
    weights = [(8, 3, 3, 3), (8,), (8,), (16, 8, 3, 3), (16,), (16,), (1, 16, 1, 1), (8, 256), (8,)]
    assert shapes == sorted(weights)
    fixed = {name: value.clone() for name, value in network.named_buffers() if "initializer" in name}
    assert [tuple(value.shape) for value in fixed.values()] == [(1, 3, 1, 1)] * 2
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    optimiser = torch.optim.SGD(network.parameters(), 0.1)
    network(torch.rand(4, 3, 16, 16)).square().sum().backward()
    optimiser.step()
    assert all(not torch.equal(before[name], value) for name, value in network.named_parameters())
    buffers = dict(network.named_buffers())
    assert all(torch.equal(buffers[name], value) for name, value in fixed.items())


def test_a_card_builds_the_network_again_without_the_file(tmp_path):
    file = write_recogniser(tmp_path / "recogniser.onnx")
    network = OnnxBackbone(path=str(file)).eval()
    card = make_card({"name": "onnx", "arguments": {"path": str(file)}}, network, {})
    arguments = card["architecture"]["arguments"]
    assert "path" not in arguments
    plain = zlib.decompress(base64.b64decode(arguments["graph"]))
    assert len(plain) < 3000 < file.stat().st_size  # no weight in it
    save_model(tmp_path / "model.safetensors", network, card)
    file.unlink()
    loaded, again = load_model(tmp_path / "model.safetensors")
    images = torch.rand(3, 3, 16, 16)
    assert torch.equal(loaded(images), network(images))
    assert (
        make_card({"name": "onnx", "arguments": arguments}, loaded, {})["architecture"]
        == again["architecture"]
    )


def test_colours_and_range_of_a_file_that_does_not_normalise_stay_with_its_structure(tmp_path):
    file = write_recogniser(tmp_path / "bgr.onnx", bgr=True)
    said = {"colour": "BGR", "mean": [0.1, 0.2, 0.3], "std": 0.5}
    network = OnnxBackbone(path=str(file), **said).eval()
    images = torch.rand(3, 3, 16, 16)
    mean = torch.tensor(said["mean"]).view(1, 3, 1, 1)
    wanted = by_onnxruntime(file, (images.flip(1) - mean) / 0.5)
    torch.testing.assert_close(network(images), wanted, rtol=1e-5, atol=1e-5)
    other = OnnxBackbone(**network.described({})).eval()
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(images), network(images))


def test_a_network_without_a_map_is_taken_as_a_whole(tmp_path):
    matrix = write_onnx(tmp_path / "tiny.onnx", size=1, output=True)
    network = OnnxBackbone(path=str(tmp_path / "tiny.onnx"), output="embedding")
    assert (network.feature_channels, network.feature_size) == (4, 1)
    images = torch.rand(2, 3, 1, 1)
    torch.testing.assert_close(network(images), images.flatten(1) @ matrix)
    assert [tuple(each.shape) for each in network.parameters()] == [(3, 4)]  # MatMul's matrix is trained


def test_of_several_outputs_one_is_named(tmp_path):
    write_onnx(tmp_path / "two.onnx", output=True)
    with pytest.raises(UsageError, match="outputs embedding, flat; name one with backbone.output"):
        OnnxBackbone(path=str(tmp_path / "two.onnx"))
    with pytest.raises(UsageError, match="no output 'logits'"):
        OnnxBackbone(path=str(tmp_path / "two.onnx"), output="logits")
    network = OnnxBackbone(path=str(tmp_path / "two.onnx"), output="flat")
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(network(images), images.mean((2, 3)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "give path"),
        ({"path": "x.onnx", "graph": "x"}, "give path"),
        ({"graph": "no base64!"}, "no packed structure"),
        ({"graph": base64.b64encode(b"text").decode()}, "no packed structure"),
        ({"graph": base64.b64encode(zlib.compress(b"text" * 9)).decode()}, "holds no ONNX model"),
        ({"path": "x.onnx", "colour": "rgb"}, "RGB or BGR"),
        ({"path": "x.onnx", "std": 0.0}, "std must not be 0"),
        ({"path": "x.onnx", "mean": [1, 2]}, "a number, or three"),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    with pytest.raises(UsageError, match=words):
        OnnxBackbone(**arguments)


def test_files_that_are_no_recognisers_are_named(tmp_path):
    import onnx
    from onnx import TensorProto, helper

    with pytest.raises(LrfaceError, match="no such file"):
        OnnxBackbone(path=str(tmp_path / "none.onnx"))
    (tmp_path / "text.onnx").write_text("no network")
    with pytest.raises(LrfaceError, match="no readable ONNX file"):
        OnnxBackbone(path=str(tmp_path / "text.onnx"))

    def write(node, output, kind=TensorProto.FLOAT, images=("n", 3, 8, 8)):
        shapes = [helper.make_tensor_value_info("images", kind, list(images))]
        found = [helper.make_tensor_value_info("out", kind, output)]
        graph = helper.make_graph([node], "other", shapes, found)
        opset = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
        onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), tmp_path / "other.onnx")
        return str(tmp_path / "other.onnx")

    relu = helper.make_node("Relu", ["images"], ["out"])
    with pytest.raises(LrfaceError, match="embeddings are"):
        OnnxBackbone(path=write(relu, ["n", 3, 8, 8]))
    with pytest.raises(LrfaceError, match="3, side, side"):
        OnnxBackbone(path=write(relu, ["n", 3, 8, 9], images=("n", 3, 8, 9)))
    with pytest.raises(LrfaceError, match="float32"):
        OnnxBackbone(path=write(relu, ["n", 3, 8, 8], kind=TensorProto.FLOAT16))
    unknown = helper.make_node("Secret", ["images"], ["out"], domain="own")
    with pytest.raises(
        LrfaceError, match="cannot be turned into a PyTorch network.*teacher that onnxruntime"
    ):
        OnnxBackbone(path=write(unknown, ["n", 4]))


def test_lrfaces_own_files_say_what_they_take(tmp_path):
    file = write_recogniser(tmp_path / "own.onnx", metadata="{}")
    assert OnnxBackbone(path=str(file)).embedding_size == 8
    with pytest.raises(UsageError, match="exported by lrface and takes RGB"):
        OnnxBackbone(path=str(file), colour="BGR")


def test_the_oracle_as_a_network(shared):
    file = shared / "oracle" / "mobilefacenet_ms1m.onnx"
    network = OnnxBackbone(path=str(file)).eval()
    assert (network.feature_channels, network.feature_size, network.embedding_size) == (512, 7, 128)
    images = torch.from_numpy(np.random.default_rng(0).random((2, 3, 112, 112), np.float32))
    with torch.no_grad():
        torch.testing.assert_close(network(images), by_onnxruntime(file, images), rtol=0, atol=2e-5)
    assert len(network.graph) < 20_000


@pytest.mark.parametrize("named", [False, True])
def test_a_contrastive_student_starts_from_the_file(named, tmp_path):
    path = str(write_recogniser(tmp_path / "recogniser.onnx"))
    teacher = {"teacher": {"name": "onnx", "path": path}} if named else {}
    policy = build_policy("resolution", clean_share=0.0, sizes=[8])
    method = METHODS.build("contrastive", encoder=OnnxBackbone(path=path), policy=policy, **teacher)
    assert isinstance(method.teacher, OnnxBackbone)
    assert method.teacher.weights == path  # so that no stage before has to be loaded
    assert method.filled([]) == ["encoder starts from the teacher"]
    ready = method.train().prepare({"image": torch.rand(4, 3, 16, 16), "seed": 0})
    method(ready).loss.backward()
    assert all(each.grad is not None for each in method.encoder.parameters())
    assert all(each.grad is None for each in method.teacher.parameters())
