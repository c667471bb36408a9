"""CLIP's text tower as a classifier: against open_clip's own, through a probe, on a student, without a download."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_runs import draw_pictures
from typer.testing import CliRunner

from lrface import probe
from lrface.cli import app
from lrface.errors import LrfaceError, UsageError
from lrface.features import open_networks
from lrface.models import build_backbone
from lrface.probe import run_probe
from lrface.train.checkpoint import make_card, save_model
from lrface.zero_shot import read_class_names, read_prompts, text_classifier

open_clip = pytest.importorskip("open_clip", reason="pip install 'lrface[clip]'")

TOWER = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
TEXT = {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
NAMES = ["tabby cat", "dog", "lorry", "crème brûlée"]
SENTENCES = ["a photo of a {}.", "{} in the dark"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A small model of random weights, and its file."""
    folder = tmp_path_factory.mktemp("clip")
    text = json.dumps({"embed_dim": 32, "vision_cfg": TOWER, "text_cfg": TEXT})
    (folder / "zero-shot-clip.json").write_text(text)
    open_clip.add_model_config(folder / "zero-shot-clip.json")
    torch.manual_seed(5)
    whole = open_clip.create_model("zero-shot-clip", pretrained=None).eval()
    torch.save(whole.state_dict(), folder / "clip.pt")
    return whole, folder / "clip.pt"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("data"))


def card(**arguments) -> dict:
    return {"architecture": {"name": "open_clip", "arguments": {"model": "zero-shot-clip", **arguments}}}


def test_directions_are_those_of_open_clip(clip):
    whole, file = clip
    found = text_classifier(card(weights=str(file)), NAMES, SENTENCES)
    tokenizer = open_clip.get_tokenizer("zero-shot-clip")
    with torch.no_grad():
        wanted = open_clip.build_zero_shot_classifier(whole, tokenizer, NAMES, SENTENCES).T
    torch.testing.assert_close(found.directions, wanted, rtol=1e-5, atol=1e-6)
    assert found.scale == pytest.approx(1 / 0.07, rel=1e-5)  # what CLIP starts with
    features = 9 * torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        found.scores(features), found.scale * (features / features.norm(dim=1, keepdim=True)) @ wanted.T
    )


def test_a_probe_judges_by_text_what_open_clip_says(clip, pictures, tmp_path, monkeypatch):
    """The untouched model from its file, and a student whose own weights are its card's."""
    whole, file = clip
    network = build_backbone("open_clip", model="zero-shot-clip", weights=str(file))
    network.start()
    with torch.no_grad():
        network.network.attnpool.c_proj.bias += 0.1
    architecture = {"name": "open_clip", "arguments": {"model": "zero-shot-clip", "weights": "gone.pt"}}
    save_model(tmp_path / "student", network, make_card(architecture, network, {}))
    (tmp_path / "names.txt").write_text("\n".join(NAMES), encoding="utf-8")
    (tmp_path / "sentences.txt").write_text("\n".join(SENTENCES) + "\n")
    seen = {}

    def figures(scores, labels):
        seen[len(seen)] = scores
        return before(scores, labels)

    before = probe.classification_figures
    monkeypatch.setattr(probe, "classification_figures", figures)
    models = [f"clip=open_clip:zero-shot-clip@weights={file}", f"student={tmp_path / 'student'}"]
    told = {
        "zero_shot": True,
        "text_weights": str(file),
        "class_names": str(tmp_path / "names.txt"),
        "prompts": str(tmp_path / "sentences.txt"),
    }
    place = pictures / "pictures"
    run = run_probe(
        models, place, place, **told, device="cpu", show_progress=False, keep_features=False, seeds=1
    )
    assert [(r["name"], r["classifier"], r["labels"]) for r in run.results] == [
        ("clip", "probe", 1.0),
        ("student", "probe", 1.0),
        ("clip", "zero-shot", None),
        ("student", "zero-shot", None),
    ]
    images = probe.open_data(place, None, False)
    pixels = torch.from_numpy(np.stack([images.read(row) for row in range(16)])).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in OPENAI)
    tokenizer = open_clip.get_tokenizer("zero-shot-clip")
    with torch.no_grad():
        towards = open_clip.build_zero_shot_classifier(whole, tokenizer, NAMES, SENTENCES)
        embedded = whole.encode_image((pixels - mean) / std, normalize=True)
    wanted = whole.logit_scale.exp().item() * embedded @ towards
    np.testing.assert_allclose(seen[2], wanted.numpy(), rtol=1e-3, atol=1e-3)
    assert not np.allclose(seen[3], seen[2], atol=1e-2), "the student has weights of its own"
    assert "zero-shot" in run.to_text() and run.about["prompts"].endswith("sentences.txt")


OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def test_through_the_command(clip, pictures):
    """Classes by the names of their folders, CLIP's own short list of sentences."""
    model = f"clip=open_clip:zero-shot-clip@weights={clip[1]}"
    place = str(pictures / "pictures")
    command = ["probe", place, place, "--model", model, "--zero-shot", "--prompts", "simple", "--no-cache"]
    done = CliRunner().invoke(app, [*command, "--device", "cpu", "--json"])
    assert done.exit_code == 0, done.output
    results = json.loads(done.stdout)["results"]
    assert [result["classifier"] for result in results] == ["probe", "zero-shot"]
    assert 0 <= results[1]["top1"]["mean"] <= 100 and results[1]["training_images"] is None


def test_names_and_sentences(tmp_path):
    assert len(read_prompts("openai")) == 80 and len(read_prompts("simple")) == 7
    assert all("{}" in line for line in read_prompts("openai"))
    assert read_class_names(["polar_bear", "cat"], None) == ["polar bear", "cat"]
    assert read_class_names(["n01440764", "n01443537"], None) == ["tench", "goldfish"]
    (tmp_path / "names.txt").write_text("a\nb\n\n")
    assert read_class_names(["0", "1"], str(tmp_path / "names.txt")) == ["a", "b"]
    for call, said in (
        (lambda: read_class_names(["0", "1"], None), "only numbers its classes .0 to 1.; name them with --class-n"),
        (lambda: read_class_names(["0"], str(tmp_path / "names.txt")), "2 names for 1 classes"),
        (lambda: read_class_names(["0"], "none.txt"), "--class-names none.txt: no such file"),
        (lambda: read_prompts("none.txt"), "--prompts none.txt: no such file; give openai, simple, or a file"),
        (lambda: read_prompts(str(tmp_path / "names.txt")), "each line has {} where the class goes; found 'a'"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            call()


def test_files_that_do_not_fit_are_named(clip, tmp_path, monkeypatch):
    whole, file = clip
    towers = {key: value for key, value in whole.state_dict().items() if key.startswith("visual.")}
    save_file({key: value.contiguous() for key, value in towers.items()}, tmp_path / "tower.safetensors")
    with pytest.raises(LrfaceError, match="tower.safetensors holds no text tower, .* --text-weights FILE"):
        text_classifier(card(), NAMES, SENTENCES, str(tmp_path / "tower.safetensors"))
    state = {**whole.state_dict()}
    del state["text_projection"]
    torch.save(state, tmp_path / "part.pt")
    with pytest.raises(LrfaceError, match="text weights for .* 1 missing, first text_projection"):
        text_classifier(card(), NAMES, SENTENCES, str(tmp_path / "part.pt"))
    with pytest.raises(UsageError, match="started from no file and no tag; .* --text-weights"):
        text_classifier(card(), NAMES, SENTENCES)
    with pytest.raises(LrfaceError, match="gone.pt: no such file"):
        text_classifier(card(weights="gone.pt"), NAMES, SENTENCES)
    for text, said in (
        ("open_clip:zero-shot-clip", "say whose weights: open_clip:zero-shot-clip@pretrained=TAG"),
        (f"open_clip:zero-shot-clip@weight={file}", "found 'weight=.*give weights=..., pretrained=..., input_size=..."),
        ("open_clip:zero-shot@weights=x", "open_clip has no model 'zero-shot'"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            open_networks([text], "cpu", None, print)
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(LrfaceError) as raised:
        text_classifier(
            {
                "architecture": {
                    "name": "open_clip",
                    "arguments": {"model": "RN50", "pretrained": "openai"},
                }
            },
            NAMES,
            SENTENCES,
        )
    assert 'python -c "import open_clip; print(open_clip.download_pretrained(' in str(raised.value)


def test_only_networks_of_open_clip_have_a_text_tower(pictures, tmp_path):
    network = build_backbone("cifar_resnet18", width=4)
    save_model(
        tmp_path, network, make_card({"name": "cifar_resnet18", "arguments": {"width": 4}}, network, {})
    )
    place = pictures / "pictures"
    with pytest.raises(UsageError, match="--zero-shot: no --model is of open_clip"):
        run_probe([str(tmp_path)], place, place, zero_shot=True, device="cpu", show_progress=False)
