"""The stages of `lrface robustify`: what moves, what is compared with what, and what a resumed run remembers."""

import copy

import pytest
import torch
from torch.nn import functional as F

from lrface.degrade import policies
from lrface.errors import UsageError
from lrface.heads import build_head
from lrface.methods import METHODS, Reconstruct, Robustify
from lrface.models import build_backbone, build_decoder_for

N = 6
NETWORK = {"name": "cifar_resnet18", "width": 4}


def encoder(seed: int = 0):
    torch.manual_seed(seed)
    network = build_backbone(**NETWORK).train()
    with torch.no_grad():
        network(torch.rand(8, 3, 32, 32))  # statistics that are not those of a fresh network
    return network


def build(**arguments) -> Robustify:
    network = encoder()
    policy = policies.build_policy("resolution", clean_share=0.0, sizes=[8])
    parts = {
        "head": build_head("cosface", network.embedding_size, 3),
        "decoder": build_decoder_for(network, "subpixel", width=8),
    }
    options = {"quality_weight": 0.5, "recognition_weight": 0.2, "queue": 10, **arguments}
    method = METHODS.build("robustify", encoder=network, policy=policy, **parts, **options)
    method.filled([])
    return method.train()


def statistics(network) -> torch.Tensor:
    return torch.cat([value for name, value in network.state_dict().items() if name.endswith("running_mean")])


def batch(seed: int = 0, n: int = N) -> dict:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return {"image": images, "label": torch.arange(n) % 3, "seed": seed}


def test_the_loss_is_the_weighted_sum_of_its_formulas():
    method = build(quality_share=0.5)
    with torch.no_grad():  # a student that is not its teacher
        for parameter in method.encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    earlier, ready = method.prepare(batch(1)), method.prepare(batch(2))
    method(earlier)  # remembered
    reference = copy.deepcopy(method).eval()
    output = method(ready)
    with torch.no_grad():
        feature_map = reference.encoder.features(ready["image"])
        own = reference.encoder.embed(feature_map)
        wanted, before = (F.normalize(reference.teacher(each["hq"])) for each in (ready, earlier))
        directions = F.normalize(own)
        others = torch.cat([before, wanted])
        p = ((wanted @ others.T) / 0.1).softmax(1)
        q = ((directions @ others.T) / 0.1).softmax(1)
        shown = N // 2
        drawn = reference.decoder(feature_map)[:shown].clamp(0, 1)
        expected = {
            "distillation": 1 - (directions * wanted).sum(1).mean(),
            "contrast": (p * (p / q).log()).sum(1).mean(),
            "quality": (drawn - ready["hq"][:shown]).abs().mean(),
            "recognition": reference.head.loss(own, ready["label"]).loss,
        }
    for name, value in expected.items():
        assert output.logs[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name
    total = sum(weight * expected[name] for name, weight in method.loss_weights.items())
    assert output.loss.item() == pytest.approx(total.item(), rel=1e-4)


def test_a_student_that_is_its_teacher_loses_nothing_on_clean_faces():
    method = build(quality_weight=0.0, recognition_weight=0.0)
    method.policy = policies.build_policy("clean")
    output = method(method.prepare(batch()))
    assert output.logs["distillation"].item() == pytest.approx(0, abs=1e-5)
    assert output.logs["contrast"].item() == pytest.approx(0, abs=1e-5)


def test_only_the_student_and_the_head_move():
    method = build()
    before = {name: value.detach().clone() for name, value in method.state_dict().items()}
    trained = {name.partition(".")[0] for name, value in method.named_parameters() if value.requires_grad}
    assert trained == {"encoder", "head"}
    optimiser = torch.optim.SGD([value for value in method.parameters() if value.requires_grad], 0.1)
    method(method.prepare(batch())).loss.backward()
    optimiser.step()
    moved = {name for name, value in method.state_dict().items() if not torch.equal(before[name], value)}
    assert {name.partition(".")[0] for name in moved} == {"encoder", "head", "remembered", "count"}
    assert not [name for name in moved if "running" in name or "num_batches" in name]


def test_what_is_remembered_is_the_newest_and_part_of_a_checkpoint():
    method = build(queue=10)
    ready = [method.prepare(batch(seed)) for seed in range(3)]
    method(ready[0])
    assert int(method.count) == N and (method.remembered[:4] == 0).all()
    resumed = build(queue=10)
    resumed.load_state_dict(method.state_dict())
    for each in ready[1:]:
        one, other = method(each), resumed(each)
    assert torch.equal(one.loss, other.loss)
    assert int(method.count) == 10
    with torch.no_grad():
        wanted = [F.normalize(method.teacher(each["hq"])) for each in ready[1:]]
    torch.testing.assert_close(method.remembered, torch.cat(wanted)[-10:])
    method.eval()
    kept = method.remembered.clone()
    method(ready[0])
    assert torch.equal(method.remembered, kept)  # to look at a batch is not to learn from it


def test_another_network_may_teach_an_encoder_that_starts_from_nothing():
    policy = policies.build_policy("resolution", clean_share=0.0, sizes=[8])
    options = {"quality_weight": 0.0, "teacher": NETWORK, "queue": 0}
    method = Robustify(encoder(), policy, freeze=[], **options)
    assert method.must_load == {"teacher": "encoder"} and method.filled([]) == []
    with pytest.raises(UsageError, match="method.teacher has embedding_size 64, the encoder 32"):
        Robustify(encoder(), policy, **{**options, "teacher": {**NETWORK, "width": 8}})
    before = copy.deepcopy(method.state_dict())
    optimiser = torch.optim.SGD([value for value in method.parameters() if value.requires_grad], 0.1)
    method(method.prepare(batch())).loss.backward()
    optimiser.step()
    moved = {name for name, value in method.state_dict().items() if not torch.equal(value, before[name])}
    assert not [name for name in moved if name.startswith("teacher.")]
    assert [name for name in moved if name.endswith("running_mean")]  # its BatchNorm learns
    frozen = Robustify(encoder(), policy, **options)
    frozen(frozen.prepare(batch()))
    assert torch.equal(statistics(frozen.encoder), statistics(encoder()))


def test_blended_faces_lie_between_two_of_the_batch_and_the_rest_is_as_it_was():
    method = build(mixed_share=0.5)
    method.policy = policies.build_policy("clean", mirror=0.0)
    given = batch(3)
    before, images = given["image"].clone(), given["image"].flatten(1) / 255
    ready = method.prepare(given)
    assert torch.equal(given["image"], before)
    drawn = ready["hq"].flatten(1)
    torch.testing.assert_close(drawn[: N // 2], images[: N // 2])
    torch.testing.assert_close(drawn, method.prepare(batch(3))["hq"].flatten(1))
    for row in range(N // 2, N):
        # Between its own image and one of the batch: the difference points towards one of them, by a share of the way.
        way = images - images[row]
        share = (way @ (drawn[row] - images[row])) / way.square().sum(1).clamp_min(1e-9)
        rest = (images[row] + share[:, None] * way - drawn[row]).abs().amax(1)
        assert rest.min() < 1e-5 and 0 <= share[rest.argmin()] <= 1
    assert (drawn[N // 2 :] - images[N // 2 :]).abs().amax() > 0.05
    other = method.prepare(batch(3) | {"seed": 4})["hq"].flatten(1)
    assert not torch.equal(other[N // 2 :], drawn[N // 2 :])


def test_blended_faces_have_no_part_in_recognition():
    method = build(mixed_share=0.5)
    ready = method.prepare(batch())
    ready["label"] = ready["label"].clone()
    first = method(ready).logs["recognition"]
    ready["label"][N // 2 :] = 0
    assert method(ready).logs["recognition"] == first
    ready["label"][0] = 2
    assert method(ready).logs["recognition"] != first


def test_without_labels_or_a_decoder_their_losses_are_left_out():
    policy = policies.build_policy("resolution")
    method = METHODS.build("robustify", encoder=encoder(), policy=policy, quality_weight=0.0)
    assert method.needs == ("image", "seed") and not hasattr(method, "head")
    unlabelled = {key: value for key, value in batch().items() if key != "label"}
    output = method(method.prepare(unlabelled))
    assert set(output.logs) == {"distillation", "contrast"}
    assert not method.accumulable
    alone = Robustify(encoder(), policy, contrast_weight=0.0, quality_weight=0.0)
    assert alone.accumulable and "contrast" not in alone(alone.prepare(unlabelled)).logs


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"distillation_weight": -1.0}, "distillation_weight must be at least 0"),
        ({"distillation_weight": 0.0, "contrast_weight": 0.0}, "must not both be 0"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"queue": -1}, "queue must be at least 0"),
        ({"quality_share": 0.0}, "quality_share must be above 0"),
        ({"mixed_share": 0.95}, "at most 0.9 with a recognition loss"),
        ({"teacher_share": 1.0}, "teacher_share must be from 0 to below 1"),
        ({"teacher_share": 0.2, "teacher": NETWORK}, "and 0 with another network"),
        ({"freeze": ["decoder"]}, r"freeze must be \[batchnorm\] or \[\]"),
    ],
)
def test_values_out_of_range(arguments, words):
    with pytest.raises(UsageError, match=words):
        build(**arguments)
    with pytest.raises(UsageError, match="nothing to compute it with"):
        Robustify(encoder(), policies.build_policy("clean"), recognition_weight=1.0, quality_weight=0.0)


def test_a_decoder_learns_and_the_encoder_stays_to_the_bit():
    network = encoder()
    decoder = build_decoder_for(network, "subpixel", width=8)
    method = METHODS.build(
        "reconstruct", encoder=network, decoder=decoder, policy=policies.build_policy("clean")
    )
    assert isinstance(method, Reconstruct) and method.needs == ("image", "seed")
    method.train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    optimiser = torch.optim.Adam([value for value in method.parameters() if value.requires_grad], 1e-2)
    losses = []
    for _ in range(20):
        output = method(method.prepare(batch()))
        optimiser.zero_grad()
        output.loss.backward()
        optimiser.step()
        losses.append(output.loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
