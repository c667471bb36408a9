"""open_clip's image towers as backbones: the library's own function, files of random weights, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lrface.errors import LrfaceError, UsageError
from lrface.models import build_backbone
from lrface.models.library import start_networks

open_clip = pytest.importorskip("open_clip", reason="pip install 'lrface[clip]'")

TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
TOWERS = {
    "tiny-RN": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
    "tiny-ViT": {"image_size": 64, "layers": 2, "width": 16, "head_width": 8, "patch_size": 16},
}
IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", autouse=True)
def small_models(tmp_path_factory):
    """Architectures of open_clip's own kinds, small ones, added by its own function."""
    folder = tmp_path_factory.mktemp("models")
    for name, tower in TOWERS.items():
        text = json.dumps({"embed_dim": 32, "vision_cfg": tower, "text_cfg": TEXT})
        (folder / f"{name}.json").write_text(text)
    open_clip.add_model_config(folder)


def whole(model: str) -> torch.nn.Module:
    torch.manual_seed(3)
    return open_clip.create_model(model, pretrained=None).eval()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("part", ["whole", "tower"])
@pytest.mark.parametrize("model", TOWERS)
def test_a_file_of_weights_gives_the_librarys_own_function(tmp_path, model, part, suffix):
    clip = whole(model)
    state = (clip if part == "whole" else clip.visual).state_dict()
    file = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save(state, file)
    else:
        save_file({key: value.contiguous() for key, value in state.items()}, file)
    network = build_backbone("open_clip", model=model, weights=str(file)).eval()
    told, classifier = network.start()
    assert told == f"starts from {file}" and classifier == {}
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in OPENAI)
    with torch.no_grad():
        wanted = clip.encode_image((IMAGES - mean) / std)
        found = network(IMAGES)
        feature_map = network.features(IMAGES)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert network.embedding_size == found.shape[1] == 32 and network.input_size == 64
    assert feature_map.shape[1:] == (network.feature_channels, *[network.feature_size] * 2)
    assert network.feature_size == (2 if model == "tiny-RN" else 1)
    assert not any("transformer.token" in key or "logit" in key for key in network.state_dict())


OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def test_encoder_and_teacher_start_from_their_file(tmp_path):
    torch.save(whole("tiny-RN").state_dict(), tmp_path / "w.pt")

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.teacher = (
                build_backbone("open_clip", model="tiny-RN", weights=str(tmp_path / "w.pt")) for _ in "et"
            )

    both = Both()
    assert start_networks(both, {"encoder"}) == [f"teacher starts from {tmp_path / 'w.pt'}"]
    assert len(start_networks(both, ())) == 2


def test_another_size_of_images_is_the_models_argument():
    network = build_backbone("open_clip", model="tiny-RN", input_size=96).eval()
    assert network.input_size == 96 and network.feature_size == 3
    assert network(torch.rand(1, 3, 96, 96)).shape == (1, 32)


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save(whole("tiny-ViT").state_dict(), tmp_path / "w.pt")
    network = build_backbone("open_clip", model="tiny-RN", weights=str(tmp_path / "w.pt"))
    with pytest.raises(
        LrfaceError, match=r"w.pt, weights for open_clip's tiny-RN, is of another architecture"
    ):
        network.start()
    network = build_backbone("open_clip", model="tiny-RN", weights=str(tmp_path / "none.pt"))
    with pytest.raises(LrfaceError, match="none.pt: no such file"):
        network.start()


def test_without_a_network_the_command_is_told(monkeypatch, tmp_path):
    """huggingface_hub itself, in its own offline mode."""
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with torch.device("meta"):
        network = build_backbone("open_clip", model="RN50", pretrained="openai")
    with pytest.raises(LrfaceError) as raised:
        network.start()
    said = str(raised.value)
    assert "weights 'openai' of RN50 are not on this machine and could not be downloaded" in said
    command = (
        'python -c "import open_clip; print(open_clip.download_pretrained(open_clip.get_pretrained_cfg('
        "'RN50', 'openai')))\""
    )
    assert command in said and "backbone.weights=FILE" in said


def test_what_is_refused():
    for arguments, said in (
        ({"model": "RN11"}, r"open_clip has no model 'RN11' \(did you mean 'RN101'"),
        ({"model": "RN50", "pretrained": "open"}, r"no weights 'open' for RN50 \(did you mean 'openai'"),
        ({"model": "ViT-B-32", "pretrained": "openai"}, "take model: ViT-B-32-quickgelu"),
        ({"model": "tiny-RN", "stem": "quality"}, "unknown key backbone.stem"),
    ):
        with torch.device("meta"), pytest.raises(UsageError, match=said):
            build_backbone("open_clip", **arguments)


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    with pytest.raises(LrfaceError, match=r"pip install 'lrface\[clip\]'"):
        build_backbone("open_clip", model="RN50")
