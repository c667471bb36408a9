import copy
import math

import pytest
import torch
from torch.nn import functional as F

from lrface.degrade.adversarial import Attack, perturb
from lrface.degrade.policies import build_policy
from lrface.errors import UsageError
from lrface.heads import build_head
from lrface.losses import jensen_shannon
from lrface.losses.ssim import ssim
from lrface.methods import AdA
from lrface.methods.ada import image_seeds
from lrface.methods.base import drawn
from lrface.models import build_backbone

N = 6
NETWORK = {"name": "edsr", "blocks": 1, "features": 6, "scale": 2}


def method(head: str = "softmax", policy: str = "clean", size: int = 32, **arguments) -> AdA:
    torch.manual_seed(0)
    backbone = (
        build_backbone("cifar_resnet18", width=4)
        if size == 32
        else build_backbone("mobilefacenet", embedding_size=32)
    )
    options = {"resolution": {"clean_share": 0.5, "sizes": [14]}}.get(policy, {"crop_padding": 4})
    made = AdA(
        backbone,
        build_head(head, 32, 4),
        build_policy(policy, **options),
        **{"network": NETWORK, "steps": 2, "radius": 0.05, **arguments},
    )
    identity_like(made)
    return made.train()


def identity_like(model: AdA) -> None:
    """A network that draws what it is given, and whose every weight counts: an identity by hand, and small weights."""
    network = model.corruption_network
    with torch.no_grad():
        for value in network.parameters():
            value.mul_(0.2)
        network.head.weight[:3, :, 1, 1] += torch.eye(3)
        network.enlarge[0][0].weight.view(6, 4, 6, 3, 3)[:3, :, :3, 1, 1] += torch.eye(3)[:, None]
        network.gather.weight.mul_(0.1)
        network.output.weight[:, :3, 1, 1] += torch.eye(3)


def raw_batch(seed: int = 0, size: int = 32, n: int = N) -> dict:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 8, 8, generator=generator)
    images = (F.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)
    return {"image": images, "label": torch.arange(n) % 4, "seed": 100 + seed}


def test_the_pipeline_is_frame_attack_degrade():
    model = method(policy="augmix")
    batch = model.prepare(raw_batch())
    (parameters,) = drawn(raw_batch(), model.policy)
    hq = model.policy.frame(raw_batch()["image"].float() / 255, parameters)
    assert torch.equal(batch["hq"], hq)
    model.eval()
    attacked = perturb(
        hq,
        raw_batch()["label"],
        lambda images: model.head(model.encoder(images), None),
        model.corruption_network,
        image_seeds(raw_batch()),
        Attack(radius=0.05, steps=2),
    )
    torch.testing.assert_close(
        batch["image"], model.policy.degrade(attacked.images, parameters), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(batch["similarity"], attacked.similarity, atol=1e-6, rtol=0)
    assert 0.5 < float(attacked.similarity.mean()) < 0.999
    assert not torch.equal(attacked.images, batch["image"])  # AugMix came after
    assert "seed" not in batch


def test_a_step_is_replayed_from_its_seed():
    model = method()
    torch.manual_seed(1)
    first = model.prepare(raw_batch())
    torch.manual_seed(2)
    second = model.prepare(raw_batch())
    other = model.prepare({**raw_batch(), "seed": 7})
    for key in first:
        assert torch.equal(first[key], second[key]), key
    assert not torch.equal(first["image"], other["image"])


@pytest.mark.parametrize("head", ["softmax", "cosface", "adaface", "curricularface"])
def test_the_attack_moves_nothing(head):
    """No gradient, no statistic of BatchNorm or of the head, no mode, no random generator."""
    model = method(head)
    before = copy.deepcopy(model.state_dict())
    modes = {name: part.training for name, part in model.named_modules()}
    state = torch.get_rng_state()
    model.prepare(raw_batch())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: part.training for name, part in model.named_modules()} == modes
    assert all(value.grad is None for value in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.encoder.training and not model.corruption_network.training
    output = model(model.prepare(raw_batch()))
    output.loss.backward()
    trainable = dict(model.named_parameters())
    assert all(value.grad is None for name, value in trainable.items() if "corruption_network" in name)
    assert all(value.grad is not None for name, value in trainable.items() if name.startswith("encoder."))


def test_the_attack_raises_the_loss_that_is_learned():
    """The margin of a face head included."""
    model = method("cosface", steps=8)
    ready = model.prepare(raw_batch(n=32))
    model.eval()

    def losses(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return F.cross_entropy(
                model.head(model.encoder(images), ready["label"]), ready["label"], reduction="none"
            )

    assert float((losses(ready["image"]) >= ready["start"]).float().mean()) >= 0.95
    assert float((losses(ready["image"]) >= losses(ready["hq"])).float().mean()) >= 0.95
    assert float(losses(ready["image"]).mean()) == pytest.approx(
        float(model.head.loss(model.encoder(ready["image"]), ready["label"]).loss.detach()), rel=1e-4
    )


def test_the_loss_is_the_heads_on_what_came_out():
    model = method()
    ready = model.prepare(raw_batch())
    twin = copy.deepcopy(model)
    output = model(ready)
    wanted = F.cross_entropy(twin.head.linear(twin.encoder(ready["image"])), ready["label"])
    assert float(output.loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    assert float(output.logs["similarity"]) == pytest.approx(float(ready["similarity"].mean()))
    assert set(output.logs) == {"accuracy", "similarity", "limited", "start"}


def test_with_consistency_the_attacked_image_is_the_clean_one():
    model = method(policy="augmix", consistency=12.0)
    ready = model.prepare(raw_batch())
    draws = drawn(raw_batch(), model.policy, 2)
    for number, own in enumerate(draws):
        assert torch.equal(ready[f"view {number}"], model.policy.degrade(ready["image"], own))
    assert float(ssim(ready["image"], ready["hq"]).max()) < 0.9999
    twin = copy.deepcopy(model)
    output = model(ready)
    logits = twin.head.linear(
        twin.encoder(torch.cat([ready["image"], ready["view 0"], ready["view 1"]]))
    ).split(N)
    wanted = F.cross_entropy(logits[0], ready["label"]) + 12 * jensen_shannon(logits)
    assert float(output.loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert float(output.logs["divergence"]) > 0


def test_lower_resolution_comes_after_the_attack():
    """Multi-resolution and AdA on faces, with CosFace."""
    model = method("cosface", policy="resolution", size=112)
    ready = model.prepare(raw_batch(size=112, n=4))
    (parameters,) = drawn(raw_batch(size=112, n=4), model.policy)
    low = parameters.size < 112
    assert low.tolist().count(True) == 2 and ready["image"].shape == (4, 3, 112, 112)
    # What was shrunk to 14 pixels has 14 different rows of differences; the others keep their detail.
    smooth = (ready["image"][:, :, 1:] - ready["image"][:, :, :-1]).diff(dim=2).abs().mean((1, 2, 3))
    assert float(smooth[low].max()) < float(smooth[~low].min())
    assert math.isfinite(float(model(ready).loss.detach()))


def test_parts_of_a_batch_for_each_rank():
    model, batch = method(), raw_batch()
    whole = model.prepare(batch)
    for rank in range(2):
        own = slice(rank * 3, rank * 3 + 3)
        share = {"image": batch["image"][own], "label": batch["label"][own], "seed": 100, "part": (rank, 2)}
        assert torch.equal(image_seeds(share), image_seeds(batch)[own])
        part = model.prepare(share)
        for key in ("hq", "start", "similarity"):
            torch.testing.assert_close(part[key], whole[key][own], atol=1e-4, rtol=0)
        assert float((part["image"] - whole["image"][own]).abs().mean()) < 1e-3
        assert "part" not in part


def test_seeds_of_images_differ_within_a_batch_and_between_batches():
    seeds = torch.cat([image_seeds({**raw_batch(), "seed": seed}) for seed in range(100)])
    assert len(seeds.unique()) == len(seeds)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"radius": -1.0}, "method.radius must be at least 0; found -1.0"),
        ({"similarity": 1.5}, "method.similarity must be between -1 and 1; found 1.5"),
        ({"consistency": -1.0}, r"method.consistency \(lambda\) must be at least 0; found -1.0"),
        ({"consistency": 1.0, "views": 0}, "method.views must be at least 1; found 0"),
        ({"consistency": 1.0, "head": "cosface"}, "consistency compares class probabilities"),
        (
            {"head": "sphereface2"},
            "maximises the cross-entropy over all classes, which SphereFace2 does not give",
        ),
        (
            {"head": "partial"},
            "maximises the cross-entropy over all classes, which PartialHead does not give",
        ),
        ({"network": "edrs"}, "unknown corruption network 'edrs' .did you mean 'edsr'"),
    ],
)
def test_what_it_refuses(arguments, message):
    with pytest.raises(UsageError, match=message):
        method(**arguments)


def test_fresh_weights_of_the_network_are_refused_unless_a_file_gives_them(tmp_path):
    assert dict(method().must_load) == {"corruption_network": "encoder"}
    network = method().corruption_network
    names = network.published_names()
    torch.save({names[key]: value for key, value in network.named_parameters()}, tmp_path / "edsr.pt")
    given = method(network={**NETWORK, "weights": str(tmp_path / "edsr.pt")})
    assert not given.must_load
