"""The losses of knowledge distillation, each against its formula written out value by value."""

import math

import pytest
import torch
from torch.nn import functional as F

from lrface.errors import UsageError
from lrface.losses.distillation import (
    LOSSES,
    DistillationLoss,
    FitNet,
    Shape,
    VariationalInformation,
    build_distillation,
    neighbour_divergence,
    similarity_difference,
    softened_divergence,
)

N = 5
STUDENT, TEACHER = Shape(3, 4), Shape(6, 8)
SHAPES = {
    "features": (STUDENT, TEACHER),
    "embedding": (Shape(3), Shape(6)),
    "logits": (Shape(7), Shape(7)),
}


def values(shape: Shape, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    size = (N, shape.channels) if shape.size is None else (N, shape.channels, shape.size, shape.size)
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


SMALL = {
    "features": (Shape(2, 2), Shape(3, 4)),
    "embedding": (Shape(2), Shape(3)),
    "logits": (Shape(3), Shape(3)),
}


def built(loss, at: str | None = None, shapes=SHAPES) -> tuple[DistillationLoss, torch.Tensor, torch.Tensor]:
    """The loss in double precision with parameters of no special values, and what a student and a teacher give."""
    torch.manual_seed(1)
    named = {"name": loss} if isinstance(loss, str) else loss
    module, layer = build_distillation(named if at is None else {**named, "at": at}, shapes)
    module = module.double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    student, teacher = (values(shape, seed) for seed, shape in enumerate(shapes[layer]))
    return module, student, teacher


CASES = [
    ("kd", "logits"),
    ("fitnet", "features"),
    ("fitnet", "embedding"),
    ({"name": "fitnet", "distance": "l2"}, "features"),
    ("pkt", "embedding"),
    ("pkt", "features"),
    ("vid", "features"),
    ("vid", "embedding"),
    ("sp", "features"),
    ("sp", "embedding"),
]


# Formulas


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kd_is_the_divergence_of_softened_probabilities(temperature):
    student, teacher = values(Shape(7), 0, 3.0), values(Shape(7), 1, 3.0)
    expected = 0.0
    for own, wanted in zip(student.tolist(), teacher.tolist(), strict=True):
        q, p = ([math.exp(value / temperature) for value in row] for row in (own, wanted))
        for a, b in zip(p, q, strict=True):
            a, b = a / sum(p), b / sum(q)
            expected += a * math.log(a / b) * temperature**2 / N
    assert softened_divergence(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-12)
    module, _ = build_distillation({"name": "kd", "temperature": temperature}, SHAPES)
    assert module(student, teacher).item() == pytest.approx(expected, rel=1e-12)
    assert softened_divergence(teacher, teacher, temperature).item() == pytest.approx(0, abs=1e-15)


def test_the_gradient_of_kd_is_that_of_the_cross_entropy_with_soft_targets():
    """Hinton et al., eq. (2): (q - p) / T for each logit, here times T^2 and averaged over images."""
    student, teacher = values(Shape(7), 0, 3.0).requires_grad_(), values(Shape(7), 1, 3.0)
    softened_divergence(student, teacher, 3.0).backward()
    expected = (torch.softmax(student / 3, 1) - torch.softmax(teacher / 3, 1)) * 3 / N
    torch.testing.assert_close(student.grad, expected.detach())


@pytest.mark.parametrize("distance, power", [("l1", 1), ("l2", 2)])
def test_fitnet_is_the_mean_distance_where_the_shapes_agree(distance, power):
    loss = FitNet(STUDENT, STUDENT, distance)
    assert not list(loss.parameters())
    student, teacher = values(STUDENT, 0), values(STUDENT, 1)
    pairs = list(zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True))
    expected = sum(abs(a - b) ** power for a, b in pairs) / len(pairs)
    assert loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "student, teacher, weight, bias",
    [
        (Shape(3, 4), Shape(6, 4), (6, 3, 3, 3), 6),
        (Shape(3, 4), Shape(6, 8), (24, 3, 3, 3), 24),
        (Shape(3, 8), Shape(6, 4), (6, 3, 3, 3), 6),
        (Shape(3, 1), Shape(3, 4), (48, 3, 3, 3), 48),
        (Shape(3), Shape(6), (6, 3, 1, 1), 6),
    ],
)
def test_fitnet_has_a_regressor_where_they_do_not(student, teacher, weight, bias):
    loss = FitNet(student, teacher).double()
    assert [tuple(parameter.shape) for parameter in loss.parameters()] == [weight, (bias,)]
    own, wanted = values(student, 0), values(teacher, 1)
    convolution = list(loss.parameters())
    mapped = F.conv2d(
        own if own.ndim == 4 else own[..., None, None],
        *convolution,
        stride=2 if (student.size or 0) > (teacher.size or 0) else 1,
        padding=0 if student.size is None else 1,
    )
    if teacher.size is not None and student.size is not None and teacher.size > student.size:
        mapped = F.pixel_shuffle(mapped, teacher.size // student.size)
    mapped = mapped.reshape(wanted.shape)
    assert loss(own, wanted).item() == pytest.approx((mapped - wanted).abs().mean().item(), rel=1e-12)


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(
        sum(x * x for x in a) * sum(y * y for y in b)
    )


@pytest.mark.parametrize("widths", [(3, 6), (8, 2)])
def test_pkt_is_the_divergence_of_the_probabilities_to_be_a_neighbour(widths):
    student, teacher = (values(Shape(width), seed) for seed, width in enumerate(widths))
    kernels = [
        [[(cosine(a, b) + 1) / 2 for b in network.tolist()] for a in network.tolist()]
        for network in (student, teacher)
    ]
    expected = 0.0
    for i in range(N):
        others = [j for j in range(N) if j != i]
        own, wanted = ([kernel[i][j] for j in others] for kernel in kernels)
        for q, p in zip(own, wanted, strict=True):
            q, p = q / sum(own), p / sum(wanted)
            expected += p * math.log(p / q) / N**2
    assert expected > 0.001
    assert neighbour_divergence(student, teacher).item() == pytest.approx(expected, rel=1e-10)
    module, _ = build_distillation("pkt", SHAPES)
    assert module(student, teacher).item() == pytest.approx(expected, rel=1e-10)
    maps = student.reshape(N, -1, 1, 1)
    assert neighbour_divergence(maps, teacher).item() == pytest.approx(expected, rel=1e-10)


def test_pkt_and_sp_do_not_see_the_scale_of_the_features():
    student, teacher = values(STUDENT, 0), values(TEACHER, 1)
    for loss in (neighbour_divergence, similarity_difference):
        found = loss(student, teacher)
        assert found > 1e-4
        assert loss(student * 100, teacher / 100).item() == pytest.approx(found.item(), rel=1e-10)
        assert loss(teacher * 3, teacher).item() == pytest.approx(0, abs=1e-14)


def test_sp_is_the_difference_of_normalised_gram_matrices():
    student, teacher = values(STUDENT, 0), values(TEACHER, 1)
    similarities = []
    for network in (student, teacher):
        rows = network.reshape(N, -1).tolist()
        gram = [[sum(x * y for x, y in zip(a, b, strict=True)) for b in rows] for a in rows]
        similarities.append([[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in gram])
    expected = sum((similarities[0][i][j] - similarities[1][i][j]) ** 2 for i in range(N) for j in range(N))
    assert similarity_difference(student, teacher).item() == pytest.approx(expected / N**2, rel=1e-12)
    module, _ = build_distillation("sp", SHAPES)
    assert module(student, teacher).item() == pytest.approx(expected / N**2, rel=1e-12)


def test_vid_is_the_likelihood_of_a_gaussian_a_channel():
    module, student, _ = built("vid")
    teacher = values(Shape(6, 4), 1)
    convolutions = [part.weight for part in module.regressor if hasattr(part, "weight")]
    assert [tuple(weight.shape) for weight in convolutions] == [(6, 3, 1, 1), (6, 6, 1, 1), (6, 6, 1, 1)]
    expected = 0.0
    for image in range(N):
        for row in range(4):
            for column in range(4):
                hidden = student[image, :, row, column]
                hidden = torch.relu(convolutions[0][:, :, 0, 0] @ hidden)
                hidden = torch.relu(convolutions[1][:, :, 0, 0] @ hidden)
                mean = convolutions[2][:, :, 0, 0] @ hidden
                for channel in range(6):
                    deviation = math.sqrt(math.log(1 + math.exp(module.alpha[channel].item())) + 1e-5)
                    error = teacher[image, channel, row, column].item() - mean[channel].item()
                    density = math.exp(-(error**2) / (2 * deviation**2)) / deviation
                    expected -= math.log(density) / teacher.numel()
    assert module(student, teacher).item() == pytest.approx(expected, rel=1e-10)


def test_vid_averages_the_larger_map_and_begins_at_the_variance():
    module, student, teacher = built("vid")
    halved = teacher.reshape(N, 6, 4, 2, 4, 2).mean((3, 5))
    assert module(student, teacher).item() == pytest.approx(module(student, halved).item(), rel=1e-12)
    fresh = VariationalInformation(Shape(3, 4), Shape(6, 2), variance=0.7, epsilon=0.01).double()
    variance = F.softplus(fresh.alpha) + 0.01
    torch.testing.assert_close(variance, torch.full_like(variance, 0.7), rtol=1e-6, atol=0)
    pooled = F.avg_pool2d(values(STUDENT, 0), 2)
    small = values(Shape(6, 2), 1)
    assert fresh(values(STUDENT, 0), small).item() == pytest.approx(fresh(pooled, small).item(), rel=1e-12)


def test_vid_learns_which_channels_the_student_can_know():
    """The variance of channels of noise goes to that of the noise, that of those that can be known far below."""
    torch.manual_seed(0)
    loss = VariationalInformation(Shape(2), Shape(8), variance=2.0)
    adam = torch.optim.Adam(loss.parameters(), lr=0.05)
    student = torch.rand(256, 2)
    teacher = torch.randn(256, 8)
    teacher[:, :4] = student @ torch.rand(2, 4) * 2
    for _ in range(100):
        adam.zero_grad()
        loss(student, teacher).backward()
        adam.step()
    variance = F.softplus(loss.alpha)
    assert variance[:4].max() < 0.3 and 0.5 < variance[4:].min() and variance[4:].max() < 1.5


# Properties of all


@pytest.mark.parametrize("loss, at", CASES, ids=str)
def test_gradients(loss, at):
    module, student, teacher = built(loss, at, SMALL)
    student, teacher = student[:3].requires_grad_(), teacher[:3]
    parameters = list(module.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: module(x, teacher), (student, *parameters))


@pytest.mark.parametrize("loss, at", CASES, ids=str)
def test_the_teacher_gets_no_gradient(loss, at):
    module, student, teacher = built(loss, at)
    student.requires_grad_()
    teacher.requires_grad_()
    found = module(student, teacher)
    assert found.shape == ()
    found.backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0
    assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters())


@pytest.mark.parametrize("loss, at", CASES, ids=str)
def test_autocast_and_half_precision_change_little(loss, at):
    module, student, teacher = built(loss, at)
    student, teacher = student.bfloat16(), teacher.bfloat16()
    expected = module(student.double(), teacher.double()).item()
    module = module.float()
    learned = bool(list(module.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        found = module(student.requires_grad_(), teacher)
    assert found.dtype == torch.float32
    # Products of half precision are wrong by 1e-2; only a regressor may be made of them.
    assert found.item() == pytest.approx(expected, rel=2e-2 if learned else 1e-5)
    found.backward()
    assert student.grad.isfinite().all() and student.grad.abs().sum() > 0


@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize("name", ["pkt", "sp"])
def test_features_of_any_size_in_float32(name, scale):
    module, student, teacher = built(name, "features")
    expected = module(student, teacher).item()
    # A vector shorter than 1e-6 has no direction for pkt, which compares cosines.
    if not (name == "pkt" and scale < 1):
        assert module((student * scale).float(), (teacher * scale).float()).item() == pytest.approx(
            expected, rel=1e-4
        )
    tiny = (student * scale).float().requires_grad_()
    module(tiny, teacher.float()).backward()
    assert tiny.grad.isfinite().all()


@pytest.mark.parametrize("loss, at", CASES, ids=str)
@pytest.mark.parametrize("who", ["student", "teacher", "both", "an image of each"])
def test_features_that_are_all_zero(loss, at, who):
    module, student, teacher = built(loss, at)
    module, student, teacher = module.float(), student.float(), teacher.float()
    if who in ("student", "both"):
        student.zero_()
    if who in ("teacher", "both"):
        teacher.zero_()
    if who == "an image of each":
        student[1], teacher[2] = 0, 0
    found = module(student.requires_grad_(), teacher)
    found.backward()
    assert found.isfinite() and student.grad.isfinite().all()
    assert student.grad.abs().max() < 100  # no 1/0 in the disguise of a small epsilon
    if who == "both" and not list(module.parameters()):
        assert found.item() == pytest.approx(0, abs=1e-6)


def test_opposite_directions_have_a_finite_divergence():
    student = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    teacher = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    for own, wanted in ((student, teacher), (teacher.clone().requires_grad_(), student.detach())):
        found = neighbour_divergence(own, wanted)
        found.backward()
        assert found.isfinite() and found > 0.1 and own.grad.isfinite().all()


@pytest.mark.parametrize("name", ["pkt", "sp"])
def test_one_image_has_no_other_to_be_compared_with(name):
    module, student, teacher = built(name)
    with pytest.raises(UsageError, match=f"{name} compares the images of a batch .* at least 2; found 1"):
        module(student[:1], teacher[:1])
    assert module(student[:2], teacher[:2]).isfinite()
    assert module.relational and not build_distillation("vid", SHAPES)[0].relational


@pytest.mark.parametrize("name", ["kd", "fitnet", "vid"])
def test_one_image_is_a_batch_for_the_others(name):
    """And the mean over a batch is the mean of its parts: these may be accumulated."""
    module, student, teacher = built(name)
    parts = [module(student[i : i + 1], teacher[i : i + 1]).item() for i in range(N)]
    assert module(student, teacher).item() == pytest.approx(sum(parts) / N, rel=1e-12)


# Building


@pytest.mark.parametrize(
    "loss, message",
    [
        ("kdd", "unknown loss 'kdd' .did you mean 'kd'"),
        ({"temperature": 2}, "loss must be a name, or a mapping with a name and arguments"),
        (3, "loss must be a name, or a mapping with a name and arguments; found 3"),
        ({"name": "kd", "temprature": 2}, r"unknown key loss.temprature for loss 'kd' .*'temperature'"),
        ({"name": "kd", "temperature": 0}, "loss.temperature must be above 0; found 0"),
        ({"name": "kd", "at": "features"}, "loss.at of kd must be logits; found 'features'"),
        (
            {"name": "fitnet", "at": "pixels"},
            "loss.at of fitnet must be features or embedding; found 'pixels'",
        ),
        ({"name": "fitnet", "distance": "l3"}, "loss.distance must be l1 or l2; found 'l3'"),
        ({"name": "fitnet", "student": 3}, "loss.student follows from the networks; remove it"),
        ({"name": "vid", "epsilon": 0.0}, "loss.variance must be above loss.epsilon, and that above 0"),
        ({"name": "vid", "variance": 1e-6}, "loss.variance must be above loss.epsilon"),
    ],
)
def test_what_is_refused(loss, message):
    with pytest.raises(UsageError, match=message):
        build_distillation(loss, SHAPES)


def test_shapes_that_cannot_be_compared():
    with pytest.raises(
        UsageError, match="map has 7 x 7 pixels, the student's 4 x 4; fitnet needs one to be a"
    ):
        FitNet(Shape(3, 4), Shape(3, 7))
    with pytest.raises(UsageError, match="the teacher knows 9 classes, the student 7"):
        build_distillation("kd", {"logits": (Shape(7), Shape(9))})
    with pytest.raises(
        UsageError, match="kd compares class probabilities.*set head: softmax, or .*: fitnet, pkt"
    ):
        build_distillation("kd", {"features": (STUDENT, TEACHER)})


def test_the_published_weights():
    weights = {name: loss.published_weight for name, loss in LOSSES.items()}
    assert weights == {"kd": 2.0, "fitnet": 0.1, "pkt": 30_000.0, "vid": 1.0, "sp": 3000.0}
    layers = {name: build_distillation(name, SHAPES)[1] for name in LOSSES}
    assert layers == {"kd": "logits", "pkt": "embedding"} | dict.fromkeys(("fitnet", "vid", "sp"), "features")
    assert build_distillation("kd", SHAPES)[0].temperature == 2.0
