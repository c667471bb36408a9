"""Heads in their method, by the real trainer."""

import csv
from pathlib import Path

import pytest
import torch

from lrface.degrade.policy import ResolutionPolicy
from lrface.heads import HEADS, build_head
from lrface.methods import Classify, QualNet
from lrface.models import build_backbone, build_decoder
from lrface.train.checkpoint import load_parts
from lrface.train.optimisers import Optimiser
from lrface.train.trainer import Stage, Trainer

LOGS = {
    "adaface": ["norm_mean", "norm_std"],
    "curricularface": ["t"],
    "discface": ["penalty"],
    "magface": ["norm", "penalty"],
    "sphereface": ["blend"],
}


def method_of(name: str, kind: str = "classify") -> Classify | QualNet:
    torch.manual_seed(0)
    encoder = build_backbone("ir18", width=4, embedding_size=16, dropout=0.0)
    head = build_head(name, 16, 5)
    policy = ResolutionPolicy()
    if kind == "classify":
        return Classify(encoder, head, policy)
    return QualNet(encoder, head, build_decoder("subpixel", 32, width=16), policy)


def batches(first: int, last: int):
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        images = torch.randint(0, 256, (5, 3, 112, 112), generator=generator, dtype=torch.uint8)
        yield {"image": images, "label": torch.arange(5), "seed": step}


def train(method: Classify | QualNet, folder: Path, source=batches, rate: float = 0.01, **settings):
    trainer = Trainer(
        **{
            "device": "cpu",
            "precision": "float32",
            "tensorboard": False,
            "show_progress": False,
            "checkpoint_every": 2,
            "log_every": 1,
            **settings,
        }
    )
    card = {"format": "lrface-model", "version": 1}
    return trainer.fit(Stage("stage", method, 4, 5, source, folder, card, Optimiser(learning_rate=rate)))


@pytest.mark.parametrize(
    "name, kind",
    [(name, "classify") for name in HEADS.names() if name != "partial"]
    + [("magface", "qualnet"), ("softmax", "qualnet")],
)
def test_what_a_head_has_to_show_is_logged(name, kind, tmp_path):
    train(method_of(name, kind), tmp_path, precision="bfloat16")
    with (tmp_path / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    shown = {"classify": [], "qualnet": ["recognition", "quality"]}[kind]
    assert list(table[0])[1:] == [
        "loss",
        *shown,
        "accuracy",
        *LOGS.get(name, []),
        "learning_rate",
        "images_per_second",
    ]
    assert len(table) == 4 and all(float(value) == float(value) for row in table for value in row.values())
    if kind == "qualnet":
        for row in table:
            total = float(row["recognition"]) + float(row["quality"])
            assert float(row["loss"]) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("name", ["adaface", "curricularface", "sphereface", "discface", "sphereface2"])
def test_a_resume_is_exact(name, tmp_path):
    whole = train(method_of(name), tmp_path / "whole")

    def broken(first: int, last: int):
        for step, batch in enumerate(batches(first, last), start=first):
            if step == 3:
                raise KeyboardInterrupt
            yield batch

    with pytest.raises(KeyboardInterrupt):
        train(method_of(name), tmp_path / "parts", broken)
    resumed = train(method_of(name), tmp_path / "parts")
    assert resumed.resumed_at == 2
    expected, found = load_parts(whole.checkpoint), load_parts(resumed.checkpoint)
    assert found.keys() == expected.keys() and any(key.startswith("head.") for key in found)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    fresh = method_of(name).state_dict()
    assert not any(torch.equal(expected[key], fresh[key]) for key in expected if key.startswith("head."))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adaface", "curricularface", "sphereface", "sphereface2"])
def test_compiled_training_is_the_same(name, tmp_path):
    """With a rate so small that rounding, which the compiler does in another order, is not multiplied by the steps."""
    plain = train(method_of(name), tmp_path / "plain", rate=1e-5)
    torch._dynamo.reset()
    compiled = train(method_of(name), tmp_path / "compiled", rate=1e-5, compile=True)
    expected, found = load_parts(plain.checkpoint), load_parts(compiled.checkpoint)
    fresh = method_of(name).state_dict()
    for key, value in expected.items():
        if value.is_floating_point():
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4)
        if key.startswith("head."):  # how far it went, too
            torch.testing.assert_close(found[key] - fresh[key], value - fresh[key], rtol=0.01, atol=1e-6)
