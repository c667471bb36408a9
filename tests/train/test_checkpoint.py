import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lrface.errors import LrfaceError
from lrface.models import build_backbone
from lrface.train.checkpoint import (
    TrainingState,
    checkpoints,
    fill,
    find_model,
    latest_checkpoint,
    load_model,
    load_parts,
    load_training_state,
    make_card,
    save_checkpoint,
    save_model,
)

ARCHITECTURE = {"name": "ir18", "arguments": {"width": 4, "embedding_size": 8}}


def encoder(seed: int = 0, **changes) -> nn.Module:
    torch.manual_seed(seed)
    return build_backbone("ir18", **{**ARCHITECTURE["arguments"], **changes})


@pytest.fixture
def model(tmp_path) -> Path:
    network = encoder()
    return save_model(
        tmp_path / "model.safetensors", network, make_card(ARCHITECTURE, network, {"recipe": "test"})
    )


def change_card(model: Path, **changes) -> None:
    path = model.with_suffix(".json")
    card = json.loads(path.read_text())
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(card.get(key), dict) and key == "input":
            value = {**card[key], **value}
        card[key] = value
    path.write_text(json.dumps(card))


def refused(model: Path, message: str) -> None:
    with pytest.raises(LrfaceError, match=message):
        load_model(model)


def test_a_model_comes_back_as_it_was(model):
    original = encoder().eval()
    with torch.no_grad():
        original.stem[1].running_mean.normal_()
    save_model(model, original, make_card(ARCHITECTURE, original, {}))
    loaded, card = load_model(model)
    assert not loaded.training
    images = torch.rand(2, 3, 112, 112)
    with torch.no_grad():
        assert torch.equal(loaded(images), original(images))
    assert card["format"] == "lrface-model" and card["version"] == 1
    assert card["architecture"] == ARCHITECTURE and card["embedding_size"] == 8
    assert card["input"] == {"size": 112, "colour": "RGB", "range": [0, 1], "normalisation": "inside"}
    assert card["licence"] and card["lrface_version"]
    assert sorted(path.name for path in model.parent.iterdir()) == ["model.json", "model.safetensors"]


def test_channels_last_weights_come_back(tmp_path):
    network = encoder().to(memory_format=torch.channels_last)
    save_model(tmp_path, network, make_card(ARCHITECTURE, network, {}))
    loaded, _ = load_model(tmp_path)
    for key, value in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_an_absent_card_is_named(model):
    model.with_suffix(".json").unlink()
    refused(model, r"model.json \(the card of the model\) does not exist")


def test_a_card_of_other_weights_is_refused(model, tmp_path):
    other = encoder(seed=1)
    save_model(tmp_path / "other", other, make_card(ARCHITECTURE, other, {}))
    shutil.copy(tmp_path / "other" / "model.safetensors", model)
    refused(model, "model.safetensors does not belong to .*model.json: its sha256 differs")


def test_another_architecture_is_named(model):
    change_card(model, architecture={"name": "ir34", "arguments": ARCHITECTURE["arguments"]})
    refused(model, r"its card says ir34\) is of another architecture: .* missing, first body")
    change_card(model, architecture={"name": "ir18", "arguments": {"width": 8, "embedding_size": 8}})
    refused(
        model,
        r"another architecture: .*stem.0.weight: \(4, 3, 3, 3\) in the file, \(8, 3, 3, 3\) in the network",
    )
    change_card(model, architecture={"name": "ir19", "arguments": {}})
    refused(model, "model.json: field 'architecture': unknown backbone 'ir19'")
    change_card(model, architecture={"name": "ir18", "arguments": {"wide": 4}})
    refused(model, "model.json: field 'architecture': unknown key backbone.wide")
    change_card(model, architecture="ir18")
    refused(model, "field 'architecture' must hold a name and arguments; found 'ir18'")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"input": {"colour": "BGR"}}, "model.json: field 'input.colour' must be 'RGB'; found 'BGR'"),
        ({"input": {"range": [0, 255]}}, r"field 'input.range' must be \[0, 1\]; found \[0, 255\]"),
        ({"input": {"normalisation": "outside"}}, "field 'input.normalisation' must be 'inside'"),
        ({"input": {"size": 160}}, "field 'input.size' is 160, that of the network 112"),
        ({"input": None}, "field 'input' must say size, colour and range; found None"),
        ({"format": "other"}, "field 'format' must be 'lrface-model'; found 'other'"),
        ({"version": 2}, "written in format version 2; this lrface reads version 1"),
        ({"embedding_size": 512}, "field 'embedding_size' is 512, that of the network 8"),
    ],
)
def test_a_card_that_does_not_fit_is_refused(model, changes, message):
    change_card(model, **changes)
    refused(model, message)


def test_broken_weights_are_named(model):
    model.write_bytes(model.read_bytes()[:1000])
    refused(model, "model.safetensors is no readable safetensors file")


def test_find_model(model, tmp_path):
    assert find_model(model) == model
    assert find_model(str(tmp_path)) == model
    with pytest.raises(LrfaceError, match="nowhere: no such model; give a .onnx or .safetensors file"):
        find_model(tmp_path / "nowhere")
    with pytest.raises(LrfaceError, match="model.json is not a model: expected a .safetensors"):
        find_model(tmp_path / "model.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(LrfaceError, match="empty holds no model"):
        find_model(tmp_path / "empty")


def test_find_model_takes_the_newest_checkpoint_of_the_last_stage(tmp_path):
    for name in ("stages/1-one/step-00000010", "stages/2-two/step-00000005", "stages/2-two/step-00000020"):
        (tmp_path / name).mkdir(parents=True)
    assert find_model(tmp_path) == tmp_path / "stages/2-two/step-00000020/model.safetensors"
    assert find_model(tmp_path / "stages/1-one") == tmp_path / "stages/1-one/step-00000010/model.safetensors"
    (tmp_path / "stages/3-three").mkdir()  # begun, without a checkpoint yet
    assert find_model(tmp_path).parent.parent.name == "2-two"
    (tmp_path / "stages/10-ten/step-00000001").mkdir(parents=True)
    assert find_model(tmp_path).parent.parent.name == "10-ten"
    # Left by a kill: never taken for a checkpoint.
    (tmp_path / "stages/10-ten/.step-00000009.123.tmp").mkdir()
    (tmp_path / "stages/10-ten/.step-00000008.deleted").mkdir()
    assert find_model(tmp_path).parent.name == "step-00000001"


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(2, 3)
        self.encoder.embedding_size, self.encoder.input_size = 3, 112
        self.head = nn.Linear(3, 4)


def state(step: int) -> TrainingState:
    return TrainingState(
        step, {"state": {}, "param_groups": []}, {"cpu": torch.get_rng_state()}, {"count": step}
    )


def test_checkpoints_hold_every_part_and_only_the_newest_are_kept(tmp_path):
    method = Two()
    for step in (5, 10, 15):
        with torch.no_grad():
            method.head.weight.fill_(step)
        assert (
            save_checkpoint(tmp_path, method, {}, state(step), keep_last=2) == tmp_path / f"step-{step:08d}"
        )
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000010", "step-00000015"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000015" and len(checkpoints(tmp_path)) == 2
    parts = load_parts(tmp_path / "step-00000010")
    assert set(parts) == {"encoder.weight", "encoder.bias", "head.weight", "head.bias"}
    assert bool((parts["head.weight"] == 10).all())
    back = load_training_state(tmp_path / "step-00000010")
    assert back.step == 10 and back.extra == {"count": 10}
    assert latest_checkpoint(tmp_path / "nowhere") is None


def test_a_training_state_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    path = save_checkpoint(tmp_path, Two(), {}, state(1), 2)
    torch.save({"step": Evil()}, path / "training.pt")
    with pytest.raises(
        LrfaceError, match=r"training.pt cannot be read \(.* other than tensors .*\); delete .*step-00000001"
    ):
        load_training_state(path)
    (path / "training.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(LrfaceError, match="training.pt cannot be read"):
        load_training_state(path)
    (path / "training.pt").write_bytes(b"")
    with pytest.raises(LrfaceError, match="training.pt cannot be read"):
        load_training_state(path)
    assert not (tmp_path / "ran").exists()


def test_fill_takes_everything_and_nothing_else():
    target, source = nn.Linear(2, 3), nn.Linear(2, 3).state_dict()
    fill(target, source, "it")
    assert torch.equal(target.weight, source["weight"])
    with pytest.raises(LrfaceError, match="it is of another architecture: 1 missing, first bias"):
        fill(target, {"weight": source["weight"]}, "it")
    with pytest.raises(LrfaceError, match="1 not of this network, first more"):
        fill(target, {**source, "more": torch.zeros(1)}, "it")
    with pytest.raises(LrfaceError, match=r"first weight: \(3, 5\) in the file, \(3, 2\) in the network"):
        fill(target, {**source, "weight": torch.zeros(3, 5)}, "it")


def test_weights_are_readable_by_safetensors_alone(model, tmp_path):
    loaded = load_file(model)
    assert set(loaded) == set(encoder().state_dict())
    save_file(loaded, tmp_path / "again.safetensors")
    assert load_file(tmp_path / "again.safetensors").keys() == loaded.keys()
