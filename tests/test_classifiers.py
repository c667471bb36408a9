import hashlib

import numpy as np
import onnx
import pytest
import torch
import torchvision
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

from lrface.classifiers import open_classifier, parse_classifier
from lrface.errors import LrfaceError, UsageError
from lrface.models import build_backbone
from lrface.train.checkpoint import make_card, save_model

IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_options_follow_an_at():
    assert parse_classifier("torchvision:resnet50") == ("torchvision:resnet50", {})
    found = parse_classifier("timm:vit@weights=a/b.pth,mean=0.5:0.4:0.3,std=1/255")
    assert found == ("timm:vit", {"weights": "a/b.pth", "mean": "0.5:0.4:0.3", "std": "1/255"})
    for text in ("m@weigths=a", "m@mean=1,mean=2", "m@mean="):
        with pytest.raises(UsageError, match="after the @"):
            parse_classifier(text)


@pytest.fixture(scope="module")
def squeezenet(tmp_path_factory):
    """A random SqueezeNet of 7 classes, in the file layouts that trainers leave."""
    folder = tmp_path_factory.mktemp("squeezenet")
    torch.manual_seed(0)
    network = torchvision.models.squeezenet1_1(num_classes=7).eval()
    state = network.state_dict()
    torch.save(state, folder / "plain.pth")
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 3},
        folder / "run.pth",
    )
    save_file(state, folder / "plain.safetensors")
    return folder, network


def test_torchvision_networks_get_what_is_said(squeezenet):
    folder, network = squeezenet
    said = "mean=0.485:0.456:0.406,std=0.25"
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    expected = network((IMAGES - mean) / 0.25).detach()
    for name in ("plain.pth", "run.pth", "plain.safetensors"):
        found = open_classifier(f"torchvision:squeezenet1_1@weights={folder / name},{said}", 32, device="cpu")
        assert found.outputs == 7 and found.classes is None
        torch.testing.assert_close(found.scores(IMAGES), expected, rtol=1e-4, atol=1e-4)
        assert found.sha256 == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "names.txt").write_text("\n".join("abcdefg"))
    text = f"torchvision:squeezenet1_1@weights={folder / 'plain.pth'},{said},classes={folder / 'names.txt'}"
    assert open_classifier(text, 32, device="cpu").classes == list("abcdefg")
    with pytest.raises(LrfaceError, match="7 outputs and 1000 names"):
        open_classifier(text.replace(str(folder / "names.txt"), "imagenet"), 32, device="cpu")


def test_nothing_about_weights_is_guessed(squeezenet, tmp_path, monkeypatch):
    folder, _ = squeezenet
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def refused(kind, message, text):
        with pytest.raises(kind, match=message):
            open_classifier(text, 32, device="cpu")

    name = "torchvision:squeezenet1_1"
    refused(UsageError, "none of torchvision's own.*not guessed", f"{name}@weights={folder / 'plain.pth'}")
    refused(UsageError, "both mean and std", f"{name}@weights={folder / 'plain.pth'},mean=0")
    refused(UsageError, "weights=IMAGENET1K_V1", name)
    refused(
        LrfaceError,
        f"curl -L --create-dirs -o {tmp_path}/checkpoints/squeezenet",
        f"{name}@weights=IMAGENET1K_V1",
    )
    refused(LrfaceError, "no file, nor one of IMAGENET1K_V1", f"{name}@weights=IMAGENET")
    refused(UsageError, r"did you mean 'squeezenet1_1'", "torchvision:squeezenet11@weights=x")
    refused(LrfaceError, "does not fit", f"torchvision:alexnet@weights={folder / 'plain.pth'},mean=0,std=1")
    refused(UsageError, "takes one number or three", f"{name}@weights={folder / 'plain.pth'},mean=0:1,std=1")
    refused(UsageError, "none 0", f"{name}@weights={folder / 'plain.pth'},mean=0,std=0")
    refused(UsageError, "colour is not for this kind", f"{name}@weights={folder / 'plain.pth'},colour=BGR")
    # A file under the right name that is not what it should be.
    place = (
        tmp_path / "checkpoints" / torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1.url.split("/")[-1]
    )
    place.parent.mkdir()
    place.write_bytes((folder / "plain.pth").read_bytes())
    refused(LrfaceError, "its hash differs", f"{name}@weights=IMAGENET1K_V1")
    (tmp_path / "evil.pth").write_bytes(b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00exit\x85R.")
    refused(
        LrfaceError, "cannot be read as tensors alone", f"{name}@weights={tmp_path / 'evil.pth'},mean=0,std=1"
    )


def test_timm_is_named_where_it_is_missing(squeezenet, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(LrfaceError, match=r"pip install 'lrface\[timm\]'"):
        open_classifier("timm:resnet18@weights=x", 224, device="cpu")


def test_timm_networks(tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    network = timm.create_model("resnet10t", num_classes=4).eval()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    text = f"timm:resnet10t@weights={tmp_path / 'weights.pth'}"
    with pytest.raises(UsageError, match="timm's own of this name: mean="):
        open_classifier(text, 32, device="cpu")
    found = open_classifier(f"{text},mean=0.5,std=0.5", 32, device="cpu")
    torch.testing.assert_close(
        found.scores(IMAGES), network((IMAGES - 0.5) / 0.5).detach(), rtol=1e-4, atol=1e-4
    )


def graph_of_means(path, side="s", channels=3, batch="n"):
    """An ONNX file whose scores are the means of its channels."""
    nodes = [helper.make_node("ReduceMean", ["image", "axes"], ["scores"], keepdims=0)]
    kind = TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "means",
        [helper.make_tensor_value_info("image", kind, (batch, channels, side, side))],
        [helper.make_tensor_value_info("scores", kind, (batch, channels))],
        [numpy_helper.from_array(np.array([2, 3]), "axes")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    return path


def test_onnx_files_say_what_goes_in(tmp_path):
    path = graph_of_means(tmp_path / "means.onnx")
    with pytest.raises(UsageError, match="that is not guessed: name it as"):
        open_classifier(str(path), 32, device="cpu")
    expected = ((IMAGES.flip(1) - 0.5) / 0.25).mean(dim=(2, 3))
    found = open_classifier(f"{path}@colour=BGR,mean=0.5,std=0.25", 32, device="cpu")
    torch.testing.assert_close(found.scores(IMAGES), expected)
    (tmp_path / "means.onnx.json").write_text('{"colour": "BGR", "mean": 0.5, "std": [0.25, 0.25, 0.25]}')
    torch.testing.assert_close(open_classifier(str(path), 32, device="cpu").scores(IMAGES), expected)
    with pytest.raises(UsageError, match="says what means.onnx takes"):
        open_classifier(f"{path}@mean=0,std=1", 32, device="cpu")
    fixed = graph_of_means(tmp_path / "fixed.onnx", side=32, batch=2)
    said = f"{fixed}@colour=RGB,mean=0,std=1"
    torch.testing.assert_close(
        open_classifier(said, 32, device="cpu").scores(IMAGES), IMAGES.mean(dim=(2, 3))
    )
    with pytest.raises(UsageError, match="takes images of 32x32 pixels, the benchmark's are 224x224"):
        open_classifier(said, 224, device="cpu")
    grey = graph_of_means(tmp_path / "grey.onnx", side=28, channels=1)
    assert open_classifier(f"{grey}@mean=0,std=1", 28, 1, device="cpu").channels == 1
    with pytest.raises(UsageError, match="images of 1 channels, the benchmark's have 3"):
        open_classifier(f"{grey}@mean=0,std=1", 28, 3, device="cpu")


def run_folder(folder, classes=("cat", "dog", "eel")):
    """A checkpoint of a run with a softmax head, and what it computes."""
    torch.manual_seed(0)
    arguments = {"width": 4}
    encoder = build_backbone("cifar_resnet18", **arguments).eval()
    training = {"classes": list(classes)} if classes else {}
    card = make_card({"name": "cifar_resnet18", "arguments": arguments}, encoder, training)
    linear = torch.nn.Linear(encoder.embedding_size, 3)
    step = folder / "stages/1-clean/step-00000010"
    save_model(step, encoder, card)
    save_file(
        {"head.linear.weight": linear.weight.detach(), "head.linear.bias": linear.bias.detach()},
        step / "parts.safetensors",
    )
    save_model(folder, encoder, card)
    return step, linear(encoder(IMAGES)).detach()


def test_a_run_of_lrface_classifies_with_its_head(tmp_path):
    step, expected = run_folder(tmp_path)
    for path in (tmp_path, step, tmp_path / "model.safetensors"):
        found = open_classifier(str(path), 32, device="cpu")
        assert found.classes == ["cat", "dog", "eel"] and found.input_size == 32
        torch.testing.assert_close(found.scores(IMAGES), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="takes images of 32x32 pixels, the benchmark's are 64x64"):
        open_classifier(str(tmp_path), 64, device="cpu")
    parts = step / "parts.safetensors"
    save_file({"head.weight": torch.zeros(3, 32)}, parts)
    with pytest.raises(LrfaceError, match="holds no softmax head .it has head.weight"):
        open_classifier(str(tmp_path), 32, device="cpu")
    parts.unlink()
    with pytest.raises(LrfaceError, match="has no classes: a classifier needs the head"):
        open_classifier(str(tmp_path), 32, device="cpu")
    with pytest.raises(LrfaceError, match="no such model"):
        open_classifier(str(tmp_path / "none"), 32, device="cpu")


def test_a_cards_classes_have_to_fit(tmp_path):
    run_folder(tmp_path, ("cat", "dog"))
    with pytest.raises(LrfaceError, match="'training.classes' should name 3 classes"):
        open_classifier(str(tmp_path), 32, device="cpu")


def test_functions_of_the_user(tmp_path, monkeypatch):
    (tmp_path / "my_classifiers.py").write_text(
        "import torch\n"
        "class Means:\n"
        "    classes = ['red', 'green', 'blue']\n"
        "    def __call__(self, images):\n"
        "        return images.mean(dim=(2, 3))\n"
        "def means(): return Means()\n"
        "def broken(): return lambda images: images\n"
        "def infinite(): return lambda images: images.mean(dim=(2, 3)) / 0\n"
    )
    monkeypatch.chdir(tmp_path)
    found = open_classifier("my_classifiers:means", 32, device="cpu")
    assert found.classes == ["red", "green", "blue"]
    torch.testing.assert_close(found.scores(IMAGES), IMAGES.mean(dim=(2, 3)))
    with pytest.raises(LrfaceError, match=r"gives \[1, 3, 32, 32\] for 1 images"):
        open_classifier("my_classifiers:broken", 32, device="cpu")
    with pytest.raises(LrfaceError, match="scores are not finite"):
        open_classifier("my_classifiers:infinite", 32, device="cpu").scores(IMAGES)
