"""QualNet for classification: a classifier, a connector, and the frozen inverse of an i-RevNet on one batch."""

import copy

import pytest
import torch

from lrface.degrade.policies import build_policy
from lrface.errors import UsageError
from lrface.heads import build_head
from lrface.methods import QualNet
from lrface.models import build_backbone, build_decoder_for
from lrface.models.irevnet import IRevNet

NETWORK = {
    "name": "irevnet",
    "blocks": [1, 2, 1],
    "strides": [1, 2, 2],
    "channels": [4, 16, 64],
    "input_size": 32,
}


def qualnet(**arguments) -> QualNet:
    torch.manual_seed(0)
    encoder = build_backbone("cifar_resnet18", width=4)
    decoder = build_decoder_for(encoder, "irevnet_inverse", network=NETWORK)
    policy = build_policy("corruptions", set="cifar", names=["gaussian_noise", "brightness"])
    return QualNet(encoder, build_head("softmax", 32, 5), decoder, policy, **arguments)


def batch(n: int = 6, seed: int = 0) -> dict:
    images = torch.randint(
        0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    return {"image": images, "label": torch.arange(n) % 5, "seed": seed}


def test_the_loss_is_its_formula():
    method = qualnet(quality_weight=0.1).train()
    ready = method.prepare(batch())
    assert not torch.equal(ready["image"], ready["hq"])
    reference = copy.deepcopy(method)
    output = method(ready)
    with torch.no_grad():
        feature_map = reference.encoder.features(ready["image"])
        logits = reference.head(reference.encoder.embed(feature_map), ready["label"])
        network = reference.decoder.network.eval()
        drawn = network.inverse(reference.decoder.connector(feature_map)).clamp(0, 1)
        recognition = -torch.log_softmax(logits, 1)[torch.arange(6), ready["label"]].mean()
        quality = (drawn - ready["hq"]).abs().mean()
    assert output.logs["quality"].item() == pytest.approx(quality.item(), rel=1e-4)
    assert output.loss.item() == pytest.approx((recognition + 0.1 * quality).item(), rel=1e-4)


def test_training_moves_the_classifier_and_the_connector_and_never_the_inverse():
    method = qualnet(quality_weight=0.1)
    optimiser = torch.optim.SGD(method.param_groups(), lr=0.05, momentum=0.9)
    before = copy.deepcopy(method.state_dict())
    for step in range(3):
        method.train()
        optimiser.zero_grad()
        method(method.prepare(batch(seed=step))).loss.backward()
        optimiser.step()
    same = {key for key, value in method.state_dict().items() if torch.equal(value, before[key])}
    assert same == {key for key in before if key.startswith("decoder.network.")}
    assert len(same) > 30


def test_param_groups_hold_the_connector_and_not_the_inverse():
    method = qualnet()
    held = {id(parameter) for group in method.param_groups() for parameter in group["params"]}
    trained = {id(parameter) for parameter in method.parameters() if parameter.requires_grad}
    assert held == trained
    assert id(method.decoder.connector[0].weight) in held
    assert not any(id(parameter) in held for parameter in method.decoder.network.parameters())


def test_the_reconstruction_of_clean_images_can_be_learned():
    """The gradient through the inverse points the right way: on one batch the picture comes nearer to the image."""
    method = qualnet(quality_weight=1.0, clip=False)
    method.policy = build_policy("clean", mirror=0.0)
    network: IRevNet = method.decoder.network
    ready = method.prepare(batch())
    for part in network.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.momentum = 1.0
    with torch.no_grad():
        network.train()(ready["hq"])
    optimiser = torch.optim.Adam(method.param_groups(), lr=3e-3)
    found = []
    for _ in range(30):
        method.train()
        optimiser.zero_grad()
        output = method(ready)
        output.loss.backward()
        optimiser.step()
        found.append(output.logs["quality"].item())
    assert found[-1] < 0.8 * found[0]


@pytest.mark.parametrize("quality", ["l2", {"name": "likelihood", "minimum": 0.05}])
def test_other_quality_losses_take_its_place(quality):
    method = qualnet(quality_weight=0.5, quality=quality).train()
    ready = method.prepare(batch())
    reference = copy.deepcopy(method)
    output = method(ready)
    output.loss.backward()
    drawn = reference.decoder(reference.encoder.features(ready["image"]))
    expected = reference.quality_loss(drawn, ready["hq"], True).item()
    assert output.logs["quality"].item() == pytest.approx(expected, rel=1e-4)
    trained = list(method.quality_loss.parameters())
    assert len(trained) == (0 if quality == "l2" else 4)
    held = {id(parameter) for group in method.param_groups() for parameter in group["params"]}
    assert all(id(parameter) in held and parameter.grad is not None for parameter in trained)


def test_an_unknown_quality_loss():
    with pytest.raises(UsageError, match="unknown quality 'l3'"):
        qualnet(quality="l3")


def test_an_adversary_learns_before_each_step_and_is_stored_with_the_method():
    method = qualnet(quality={"name": "adversarial", "width": 4, "depth": 2}).train()
    adversary = method.quality_loss
    held = {id(parameter) for group in method.param_groups() for parameter in group["params"]}
    assert not any(id(parameter) in held for parameter in adversary.parameters())
    before = copy.deepcopy(method.state_dict())
    ready = method.prepare(batch())
    moved = {key for key, value in method.state_dict().items() if not torch.equal(value, before[key])}
    assert moved and all(key.startswith("quality_loss.") for key in moved)  # BatchNorm counted nothing
    assert method.training and not method.decoder.network.training
    method(ready).loss.backward()
    assert method.encoder.stem[0].weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in adversary.parameters())
    after = copy.deepcopy(adversary.state_dict())
    method.eval().prepare(batch())  # looking teaches nothing
    assert all(torch.equal(value, after[key]) for key, value in adversary.state_dict().items())
