"""A student that learns from a frozen teacher: what each sees, what moves, and that the distance between them falls."""

import copy

import pytest
import torch
from small_runs import IREVNET
from torch.nn import functional as F

from lrface.degrade.policies import build_policy
from lrface.degrade.policy import ResolutionPolicy
from lrface.errors import UsageError
from lrface.heads import build_head
from lrface.losses.distillation import softened_divergence
from lrface.methods import METHODS, Distil
from lrface.models import build_backbone

N = 8
LOSSES = ["kd", "fitnet", "pkt", "vid", "sp"]


def distil(loss, policy: str = "corruptions", **arguments) -> Distil:
    torch.manual_seed(0)
    encoder = build_backbone("cifar_resnet18", width=4)
    options = {"corruptions": {"set": "cifar", "names": ["gaussian_noise", "brightness"], "clean_share": 0.0}}
    chosen = build_policy(policy, **options.get(policy, {"mirror": 0.0}))
    parts = {"encoder": encoder, "head": build_head("softmax", 32, 5), "policy": chosen}
    method = METHODS.build("distil", **{"teacher": IREVNET, "loss": loss, **arguments}, **parts)
    return with_statistics(method)


def with_statistics(method: Distil) -> Distil:
    """The method with a teacher whose BatchNorm has seen images, as one that was trained has."""
    teacher, size = method.teacher, method.teacher.input_size
    images = torch.rand(8, 3, size, size, generator=torch.Generator().manual_seed(9))
    norms = [part for part in teacher.modules() if isinstance(part, torch.nn.modules.batchnorm._BatchNorm)]
    for part in norms:
        part.momentum = 1.0
    with torch.no_grad():
        teacher.train()(images)
    for part in norms:
        part.momentum = 0.1
    teacher.eval()
    return method


def batch(n: int = N, seed: int = 0, size: int = 32) -> dict:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)
    return {"image": images, "label": torch.arange(n) % 5, "seed": seed}


@pytest.mark.parametrize("loss", LOSSES)
def test_the_student_sees_degraded_images_and_the_teacher_their_clean_originals(loss):
    method = distil(loss, weight=0.7).train()
    if loss == "kd":
        torch.nn.init.normal_(method.teacher_head.linear.weight)
    ready = method.prepare(batch())
    assert not torch.equal(ready["image"], ready["hq"])
    reference = copy.deepcopy(method)
    output = method(ready)
    with torch.no_grad():
        student, teacher = reference.encoder, reference.teacher.eval()
        maps = student.features(ready["image"]), teacher.features(ready["hq"])
        embeddings = student.embed(maps[0]), teacher.embed(maps[1])
        logits = reference.head.linear(embeddings[0])
        recognition = F.cross_entropy(logits, ready["label"])
        seen = {
            "kd": lambda: (logits, reference.teacher_head.linear(embeddings[1])),
            "pkt": lambda: embeddings,
        }.get(loss, lambda: maps)()
        distillation = reference.distillation(*seen)
    assert distillation > 1e-6
    assert output.logs["recognition"].item() == pytest.approx(recognition.item(), rel=1e-5)
    assert output.logs["distillation"].item() == pytest.approx(distillation.item(), rel=1e-4)
    assert output.loss.item() == pytest.approx((recognition + 0.7 * distillation).item(), rel=1e-5)
    assert set(output.logs) == {"recognition", "distillation", "accuracy"}
    assert not any(value.requires_grad for value in output.logs.values())


@pytest.mark.parametrize("loss", LOSSES)
def test_the_student_and_the_regressor_move_and_never_the_teacher(loss):
    method = distil(loss)
    optimiser = torch.optim.SGD(method.param_groups(), lr=0.01, momentum=0.9, weight_decay=1e-3)
    before = copy.deepcopy(method.state_dict())
    for seed in range(3):
        method.train()
        assert not any(part.training for part in method.teacher.modules())
        optimiser.zero_grad()
        method(method.prepare(batch(seed=seed))).loss.backward()
        optimiser.step()
    same = {key for key, value in method.state_dict().items() if torch.equal(value, before[key])}
    assert same == {key for key in before if key.startswith("teacher")}
    assert len(same) > 20 and ("teacher_head.linear.weight" in same) is (loss == "kd")
    assert any(key.startswith("distillation.") for key in before) is (loss in ("fitnet", "vid"))
    held = {id(parameter) for group in method.param_groups() for parameter in group["params"]}
    assert held == {id(parameter) for parameter in method.parameters() if parameter.requires_grad}
    assert not any(id(parameter) in held for parameter in method.teacher.parameters())
    assert all(parameter.grad is None for parameter in method.teacher.parameters())


@pytest.mark.parametrize("loss", LOSSES)
def test_training_brings_the_student_nearer_to_the_teacher(loss):
    """From the distillation loss alone: the softmax loss may not do it by the way."""
    # The half logarithm of VID's usual variance of 5 would hide what its regressor learns.
    method = distil({"name": "vid", "variance": 1.0} if loss == "vid" else loss, "clean")
    if loss == "kd":
        torch.nn.init.normal_(method.teacher_head.linear.weight, std=0.3)
    ready = method.prepare(batch())
    optimiser = torch.optim.Adam(method.param_groups(), lr=3e-3)
    found = []
    for _ in range(20):
        method.train()
        optimiser.zero_grad()
        output = method(ready)
        (output.loss - output.logs["recognition"]).backward()
        optimiser.step()
        found.append(output.logs["distillation"].item())
    assert found[-1] < 0.8 * found[0], found


def test_the_loss_of_kd_is_zero_where_the_student_is_the_teacher():
    method = distil("kd", "clean", teacher={"name": "cifar_resnet18", "width": 4}).eval()
    method.teacher.load_state_dict(method.encoder.state_dict())
    method.teacher_head.load_state_dict(method.head.state_dict())
    output = method(method.prepare(batch()))
    assert output.logs["distillation"].item() == pytest.approx(0, abs=1e-7)


def test_weights_are_the_published_ones_unless_given():
    found = {loss: distil(loss).weight for loss in LOSSES}
    assert found == {"kd": 2.0, "fitnet": 0.1, "pkt": 30_000.0, "vid": 1.0, "sp": 3000.0}
    assert distil("sp", weight=5).weight == 5.0 and distil("sp", weight="1e-3").weight == 0.001
    output = distil("sp", weight=0)(distil("sp").prepare(batch()))
    assert output.loss.item() == output.logs["recognition"].item()


def test_what_compares_the_images_of_a_batch_cannot_be_accumulated():
    assert {loss for loss in LOSSES if not distil(loss).accumulable} == {"pkt", "sp"}


def test_what_has_to_be_loaded():
    assert distil("kd").must_load == {"teacher": "encoder", "teacher_head": "head"}
    assert distil("vid").must_load == {"teacher": "encoder"}


def test_arguments_of_a_loss():
    method = distil({"name": "kd", "temperature": 4.0})
    output = method(ready := method.prepare(batch()))
    with torch.no_grad():
        own = method.head.linear(method.encoder(ready["image"]))
        wanted = method.teacher_head.linear(method.teacher(ready["hq"]))
    expected = softened_divergence(own, wanted, 4.0)
    assert output.logs["distillation"].item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(
    "loss, arguments, message",
    [
        ("kd", {"weight": -1.0}, "method.weight must be at least 0; found -1.0"),
        ("kd", {"weight": float("nan")}, "method.weight must be at least 0; found nan"),
        ("kd", {"weight": "much"}, "method.weight must be of type float; found 'much'"),
        ("kd", {"teacher": 3}, "method.teacher must be the name of a backbone, or a mapping"),
        (
            "kd",
            {"teacher": "irevnett"},
            "method.teacher: unknown backbone 'irevnett' .did you mean 'irevnet'",
        ),
        (
            "kd",
            {"teacher": {"name": "cifar_resnet18", "widht": 4}},
            "method.teacher: unknown key backbone.widht",
        ),
        (
            "kd",
            {"teacher": {**IREVNET, "input_size": 64}},
            "takes images of 64 x 64 pixels, the student 32 x 32",
        ),
        ("fit", {}, "unknown loss 'fit'"),
        ({"name": "kd", "temperature": -1}, {}, "loss.temperature must be above 0"),
    ],
)
def test_what_is_refused(loss, arguments, message):
    with pytest.raises(UsageError, match=message):
        distil(loss, **arguments)


def test_a_teacher_of_other_colours():
    encoder = build_backbone("madry_mnist")
    head, policy = build_head("softmax", encoder.embedding_size, 5), build_policy("clean", mirror=0.0)
    with pytest.raises(UsageError, match="method.teacher and the student must both take RGB, or both grey"):
        Distil(encoder, head, policy, {**IREVNET, "input_size": 28}, "sp")


# Face recognition: the head is CosFace and the teacher a recogniser of clean faces.


def recogniser(loss, **arguments) -> Distil:
    torch.manual_seed(0)
    encoder = build_backbone("ir18", width=4, embedding_size=8, dropout=0.0)
    teacher = {"name": "ir18", "width": 8, "embedding_size": 16}
    head = build_head("cosface", 8, 5)
    return with_statistics(Distil(encoder, head, ResolutionPolicy(0.5, [14]), teacher, loss, **arguments))


@pytest.mark.parametrize(
    "loss",
    [
        "fitnet",
        {"name": "fitnet", "at": "embedding", "distance": "l2"},
        "pkt",
        {"name": "vid", "at": "embedding"},
        "sp",
    ],
    ids=str,
)
def test_faces(loss):
    method = recogniser(loss).train()
    ready = method.prepare(batch(size=112))
    output = method(ready)
    output.loss.backward()
    assert output.loss.isfinite() and output.logs["distillation"] > 1e-7
    assert all(parameter.grad is not None for group in method.param_groups() for parameter in group["params"])
    assert all(parameter.grad.abs().sum() > 0 for parameter in method.distillation.parameters())
    for part in method.distillation.modules():
        if isinstance(part, torch.nn.Conv2d):
            name = loss if isinstance(loss, str) else loss["name"]
            assert part.kernel_size == ((3, 3) if name == "fitnet" and method.layer == "features" else (1, 1))


def test_kd_needs_the_probabilities_of_a_linear_classifier():
    with pytest.raises(
        UsageError, match="kd compares class probabilities.*set head: softmax, or take a loss of"
    ):
        recogniser("kd")
