from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lrface.errors import UsageError
from lrface.methods.base import Method, StepOutput
from lrface.train.optimisers import Layer, Optimiser, build_optimiser, parameter_groups, set_rate


class Toy(Method):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.PReLU(8), nn.Linear(8, 5))
        self.head = nn.Linear(5, 3)

    def forward(self, batch: dict[str, Any]) -> StepOutput:
        return StepOutput(F.cross_entropy(self.head(self.encoder(batch["x"])), batch["label"]))


def batch(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {"x": torch.randn(6, 4, generator=generator), "label": torch.arange(6) % 3}


def train(method: Toy, optimiser: torch.optim.Optimizer, rates: list[float]) -> None:
    for step, rate in enumerate(rates):
        set_rate(optimiser, rate)
        optimiser.zero_grad()
        method(batch(step)).loss.backward()
        optimiser.step()


RATES = [0.1, 0.05, 0.02, 0.1]
NORMS = (
    "encoder.0.bias",
    "encoder.1.weight",
    "encoder.1.bias",
    "encoder.2.weight",
    "encoder.3.bias",
    "head.bias",
)


@pytest.mark.parametrize(
    "settings, theirs, arguments",
    [
        ({}, torch.optim.SGD, {"momentum": 0.9}),
        ({"momentum": 0.0}, torch.optim.SGD, {"momentum": 0.0}),
        ({"momentum": 0.8, "nesterov": True}, torch.optim.SGD, {"momentum": 0.8, "nesterov": True}),
        ({"name": "adam"}, torch.optim.Adam, {"betas": (0.9, 0.999), "decoupled_weight_decay": False}),
        ({"name": "adamw"}, torch.optim.AdamW, {"betas": (0.9, 0.999), "eps": 1e-8}),
        (
            {"name": "adamw", "betas": [0.7, 0.95], "eps": 1e-3},
            torch.optim.AdamW,
            {"betas": (0.7, 0.95), "eps": 1e-3},
        ),
    ],
)
@pytest.mark.parametrize("decay_norms", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_each_setting_does_what_pytorch_does_with_it(settings, theirs, arguments, decay_norms, fused):
    mine, bare = Toy(), Toy()
    chosen = Optimiser(weight_decay=0.03, decay_norms=decay_norms, **settings)
    train(mine, build_optimiser(chosen, parameter_groups(mine, chosen), fused), RATES)
    named = dict(bare.named_parameters())
    groups = [
        {"params": [named[name]], "weight_decay": 0.03 if decay_norms or name not in NORMS else 0.0}
        for name in named
    ]
    train(bare, theirs(groups, lr=0.1, fused=fused, **arguments), RATES)
    for name, value in mine.named_parameters():
        torch.testing.assert_close(value, named[name], rtol=1e-6, atol=1e-7)


def test_layers_have_settings_of_their_own():
    mine, bare = Toy(), Toy()
    layers = [
        Layer("encoder.3.*", learning_rate_factor=0.0),
        Layer("encoder.*.weight", learning_rate_factor=0.1, weight_decay=0.5),
        Layer("encoder.*", learning_rate_factor=0.2),
    ]
    chosen = Optimiser(weight_decay=0.03, layers=layers)
    optimiser = build_optimiser(chosen, parameter_groups(mine, chosen), fused=True)
    train(mine, optimiser, RATES)
    named = dict(bare.named_parameters())
    by_hand = {  # factor on the rate, weight decay
        "encoder.0.weight": (0.1, 0.5),
        "encoder.0.bias": (0.2, 0.0),
        "encoder.1.weight": (0.1, 0.5),
        "encoder.1.bias": (0.2, 0.0),
        "encoder.2.weight": (0.1, 0.5),
        "encoder.3.weight": (0.0, 0.03),
        "encoder.3.bias": (0.0, 0.0),
        "head.weight": (1.0, 0.03),
        "head.bias": (1.0, 0.0),
    }
    momenta = {name: torch.zeros_like(value) for name, value in named.items()}
    for step, rate in enumerate(RATES):
        bare.zero_grad()
        bare(batch(step)).loss.backward()
        with torch.no_grad():
            for name, value in named.items():
                factor, decay = by_hand[name]
                momenta[name] = 0.9 * momenta[name] + value.grad + decay * value
                value -= rate * factor * momenta[name]
    for name, value in mine.named_parameters():
        torch.testing.assert_close(value, named[name], rtol=1e-5, atol=1e-6)
    assert torch.equal(mine.encoder[3].weight, Toy().encoder[3].weight)


def test_without_layers_the_groups_are_the_methods():
    method = Toy()
    groups = parameter_groups(method, Optimiser())
    assert [len(group["params"]) for group in groups] == [3, 6]
    assert [group.get("weight_decay") for group in groups] == [None, 0.0]


def test_a_pattern_that_matches_nothing_is_named():
    chosen = Optimiser(layers=[Layer("encodr.*")])
    with pytest.raises(UsageError) as caught:
        parameter_groups(Toy(), chosen)
    message = str(caught.value)
    assert "optimiser.layers: 'encodr.*' matches no parameter that this stage trains" in message
    assert "encoder.0.weight" in message


def test_what_is_frozen_does_not_match():
    method = Toy()
    method.encoder.requires_grad_(False)
    with pytest.raises(UsageError, match="'encoder.*' matches no parameter that this stage trains"):
        parameter_groups(method, Optimiser(layers=[Layer("encoder.*")]))


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"learning_rate_factor": -1.0},
            "optimiser.layers 'head.*': learning_rate_factor must be at least 0",
        ),
        ({"learning_rate_factor": float("nan")}, "learning_rate_factor must be at least 0; found nan"),
        ({"weight_decay": -0.1}, "optimiser.layers 'head.*': weight_decay must be at least 0; found -0.1"),
    ],
)
def test_wrong_layer_settings_are_named(settings, message):
    with pytest.raises(UsageError, match=message.replace("*", r"\*")):
        Layer("head.*", **settings)
