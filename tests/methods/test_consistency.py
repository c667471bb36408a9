import copy

import pytest
import torch
from torch.nn import functional as F

from lrface.degrade.policies import build_policy
from lrface.errors import UsageError
from lrface.heads import build_head
from lrface.losses import jensen_shannon
from lrface.methods import Consistency
from lrface.models import build_backbone

N = 6


def method(policy: str = "augmix", **arguments) -> Consistency:
    torch.manual_seed(0)
    encoder = build_backbone("cifar_resnet18", width=4)
    options = {
        "augmix": {},
        "corruptions": {"set": "cifar", "names": ["fog", "contrast"], "clean_share": 0.0},
    }
    chosen = build_policy(policy, **options[policy], crop_padding=4)
    return Consistency(encoder, build_head("softmax", 32, 4), chosen, **arguments)


def raw_batch(seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (N, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return {"image": images, "label": torch.arange(N) % 4, "seed": 100 + seed}


@pytest.mark.parametrize("policy", ["augmix", "corruptions"])
def test_views_are_framed_alike_and_degraded_each_for_itself(policy):
    model = method(policy)
    batch = model.prepare(raw_batch())
    generator = torch.Generator().manual_seed(100)
    draws = [model.policy.sample(N, 32, generator) for _ in range(2)]
    images = raw_batch()["image"].float() / 255
    hq = model.policy.frame(images, draws[0])
    assert torch.equal(batch["hq"], hq) and torch.equal(batch["image"], hq)
    for number, own in enumerate(draws):
        assert torch.equal(batch[f"view {number}"], model.policy.degrade(hq, own))
    assert not torch.equal(batch["view 0"], batch["view 1"])
    assert "seed" not in batch and torch.equal(batch["label"], raw_batch()["label"])


def test_the_loss_is_its_formula():
    model = method(weight=12.0).double().train()
    batch = model.prepare(raw_batch())
    batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    reference = copy.deepcopy(model)
    output = model(batch)
    with torch.no_grad():
        # All views in one batch: they share the statistics of BatchNorm.
        together = torch.cat([batch["hq"], batch["view 0"], batch["view 1"]])
        logits = reference.head.linear(reference.encoder(together)).split(N)
        recognition = F.cross_entropy(logits[0], batch["label"])
        p = [F.softmax(view, dim=1) for view in logits]
        mean = sum(p) / 3
        divergence = sum((q * (q / mean).log()).sum(1).mean() for q in p) / 3
    assert float(output.loss.detach()) == pytest.approx(float(recognition + 12 * divergence), rel=1e-9)
    assert float(output.logs["recognition"]) == pytest.approx(float(recognition), rel=1e-9)
    assert float(output.logs["divergence"]) == pytest.approx(float(divergence), rel=1e-7)
    assert float(jensen_shannon(logits)) == pytest.approx(float(divergence), rel=1e-7)
    assert float(divergence) > 0


def test_weight_zero_is_classification_of_the_clean_images():
    model = method(weight=0.0)
    batch = model.prepare(raw_batch())
    output = model(batch)
    assert float(output.loss.detach()) == float(output.logs["recognition"])


def test_parts_of_a_batch_for_each_rank():
    model, batch = method(), raw_batch()
    whole = model.prepare(batch)
    for rank in range(2):
        own = slice(rank * 3, rank * 3 + 3)
        share = {"image": batch["image"][own], "label": batch["label"][own], "seed": 100, "part": (rank, 2)}
        part = model.prepare(share)
        for key in ("hq", "view 0", "view 1"):
            torch.testing.assert_close(part[key], whole[key][own], atol=1e-6, rtol=0)
        assert "part" not in part


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"weight": -1.0}, r"method.weight \(lambda\) must be at least 0; found -1.0"),
        ({"views": 0}, "method.views must be at least 1; found 0"),
    ],
)
def test_values_out_of_range(arguments, message):
    with pytest.raises(UsageError, match=message):
        method(**arguments)


def test_it_takes_a_linear_classifier():
    model = method()
    with pytest.raises(UsageError, match="set head: softmax"):
        Consistency(model.encoder, build_head("cosface", 32, 4), model.policy)
