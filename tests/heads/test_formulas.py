"""Each head against its published formula, written out in float64 with nothing of lrface's."""

import math

import pytest
import torch

from lrface.heads import HEADS, build_head, build_margin
from lrface.heads.sphere import starting_bias

# Angles to the true class: the ends, close to them, beyond pi minus any margin used here, and ordinary ones.
ANGLES = [0.0, 1e-3, 0.2, 0.7, math.pi / 4, 1.3, math.pi / 2, 2.0, 2.5, 2.8, 3.0, math.pi - 1e-3, math.pi]


def cosface(cosines, y, norm, s=30.0, m=0.25):
    return [s * (c - m) if j == y else s * c for j, c in enumerate(cosines)]


def arc(c, m):
    """cos(theta + m), and the authors' straight line where theta + m passes pi."""
    theta = math.acos(c)
    return math.cos(theta + m) if theta + m < math.pi else c - m * math.sin(m)


def arcface(cosines, y, norm, s=64.0, m=0.5):
    return [s * (arc(c, m) if j == y else c) for j, c in enumerate(cosines)]


def psi(phi):
    k = math.floor(phi / math.pi)
    return (-1) ** k * math.cos(phi) - 2 * k


def combined(cosines, y, norm, s=64.0, m1=1.0, m2=0.3, m3=0.2):
    return [s * (psi(m1 * math.acos(c) + m2) - m3) if j == y else s * c for j, c in enumerate(cosines)]


def sphereface(cosines, y, norm, m=4, blend=1000.0):
    own = (blend * cosines[y] + psi(m * math.acos(cosines[y]))) / (1 + blend)
    return [norm * (own if j == y else c) for j, c in enumerate(cosines)]


def bare_sphereface(cosines, y, norm):
    return sphereface(cosines, y, norm, blend=0.0)


def sphereface_r(cosines, y, norm, s=30.0, m=1.5):
    return [s * math.cos(min(m * math.acos(c), math.pi)) if j == y else s * c for j, c in enumerate(cosines)]


def sphereface2(cosines, y, norm, r=40.0, m=0.4, t=3, b=-12.5):
    def g(c):
        return 2 * ((c + 1) / 2) ** t - 1

    return [r * (g(c) - m) + b if j == y else r * (g(c) + m) + b for j, c in enumerate(cosines)]


def adaface(cosines, y, norm, s=64.0, m=0.4, h=0.333, mean=20.0, std=100.0):
    z = max(-1.0, min(1.0, (max(0.001, min(100.0, norm)) - mean) / ((std + 1e-3) / h)))
    theta = min(max(math.acos(cosines[y]) - m * z, 0.0), math.pi)
    return [s * (math.cos(theta) - (m * z + m)) if j == y else s * c for j, c in enumerate(cosines)]


def sharp_adaface(cosines, y, norm):
    return adaface(cosines, y, norm, mean=15.0, std=3.0)


def magface(cosines, y, norm, s=64.0, la=10.0, ua=110.0, lm=0.45, um=0.8):
    a = max(la, min(ua, norm))
    return arcface(cosines, y, norm, s, (um - lm) / (ua - la) * (a - la) + lm)


def curricularface(cosines, y, norm, s=64.0, m=0.5, t=0.3):
    own = arc(cosines[y], m)
    return [s * (own if j == y else c if own >= c else c * (t + c)) for j, c in enumerate(cosines)]


# name, arguments, buffers and parameters, formula
CASES = {
    "cosface": ("cosface", {}, {}, cosface),
    "cosface of its paper": ("cosface", {"scale": 64, "margin": 0.35}, {}, lambda *a: cosface(*a, 64, 0.35)),
    "arcface": ("arcface", {}, {}, arcface),
    "arcface with a wide margin": ("arcface", {"margin": 1.2}, {}, lambda *a: arcface(*a, m=1.2)),
    "discface": ("discface", {}, {}, arcface),
    "combined": ("combined", {}, {}, combined),
    "combined CM2": (
        "combined",
        {"m1": 0.9, "m2": 0.4, "m3": 0.15},
        {},
        lambda *a: combined(*a, 64, 0.9, 0.4, 0.15),
    ),
    "combined, far round": ("combined", {"m1": 3, "m2": 1.0}, {}, lambda *a: combined(*a, 64, 3, 1.0)),
    "combined as cosface": ("combined", {"scale": 30, "m2": 0, "m3": 0.25}, {}, cosface),
    "sphereface": ("sphereface", {}, {}, sphereface),
    "sphereface, bare": ("sphereface", {"blend_start": 0, "blend_end": 0}, {}, bare_sphereface),
    "sphereface after 100 steps": (
        "sphereface",
        {},
        {"steps": 100},
        lambda *a: sphereface(*a, blend=1000 / 13),
    ),
    "sphereface in the end": ("sphereface", {}, {"steps": 10**6}, lambda *a: sphereface(*a, blend=5.0)),
    "sphereface_r": ("sphereface_r", {}, {}, sphereface_r),
    "sphereface2": ("sphereface2", {}, {"bias": -12.5}, sphereface2),
    "adaface": ("adaface", {}, {}, adaface),
    "adaface, sharp": ("adaface", {}, {"norm_mean": 15.0, "norm_std": 3.0}, sharp_adaface),
    "magface": ("magface", {}, {}, magface),
    "curricularface": ("curricularface", {}, {"t": 0.3}, curricularface),
}


def batch():
    """Cosines float64 [n, 4], target int64 [n] and norms [n]: every angle of ANGLES to the true class."""
    generator = torch.Generator().manual_seed(0)
    target = torch.arange(len(ANGLES)) % 4
    angles = torch.rand(len(ANGLES), 4, generator=generator, dtype=torch.float64) * math.pi
    angles[torch.arange(len(ANGLES)), target] = torch.tensor(ANGLES, dtype=torch.float64)
    norms = torch.linspace(5.0, 130.0, len(ANGLES), dtype=torch.float64)[
        torch.randperm(len(ANGLES), generator=generator)
    ]
    return torch.cos(angles), target, norms


def smooth_batch():
    """The part of it away from the ends, and from the joints of psi, where no difference quotient is exact."""
    cosine, target, norms = batch()
    kept = torch.tensor([0.1 < a < math.pi - 0.1 and a not in (math.pi / 4, math.pi / 2) for a in ANGLES])
    return cosine[kept].clamp(-0.999, 0.999).requires_grad_(), target[kept], norms[kept]


def margin_of(case, dtype=torch.float64):
    name, arguments, state, formula = CASES[case]
    head = build_margin(name, 8, **arguments).to(dtype)
    with torch.no_grad():
        for key, value in state.items():
            getattr(head, key).fill_(value)
    return head, formula


def test_every_margin_head_has_a_formula_here():
    assert {name for name, *_ in CASES.values()} == set(HEADS.names()) - {"softmax", "partial"}


@pytest.mark.parametrize("case", CASES)
def test_margin_is_the_published_formula(case):
    cosine, target, norms = batch()
    head, formula = margin_of(case)
    rows = zip(cosine.tolist(), target.tolist(), norms.tolist(), strict=True)
    expected = torch.tensor([formula(*row) for row in rows], dtype=torch.float64)
    logits = head.margin(cosine, target, norms)
    # At angles of 0 and pi the sine is held at 3.2e-5, so a logit is off by at most s m1 sin(m2) of that, m1 up to 3.
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=64 * 3 * 3.2e-5)
    inner = torch.tensor([1e-4 < angle < math.pi - 1e-4 for angle in ANGLES])
    torch.testing.assert_close(logits[inner], expected[inner], rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_float32_is_as_good_as_its_cosines(case):
    cosine, target, norms = batch()
    exact = margin_of(case)[0].margin(cosine, target, norms)
    logits = margin_of(case, torch.float32)[0].margin(cosine.float(), target, norms.float())
    assert logits.dtype == torch.float32
    # A float32 cosine near +-1 knows its angle to 3.5e-4 only; multiplied by 4 and by a length of 130 that shows.
    torch.testing.assert_close(logits.double(), exact, rtol=1e-3, atol=0.2)
    inner = torch.tensor([0.1 < angle < math.pi - 0.1 for angle in ANGLES])
    torch.testing.assert_close(logits[inner].double(), exact[inner], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_the_true_logit_never_rises_with_the_angle(case):
    head, _ = margin_of(case)
    angles = torch.linspace(1e-4, math.pi - 1e-4, 2001, dtype=torch.float64)
    cosine = torch.stack([torch.cos(angles), torch.zeros_like(angles)], dim=1)
    target = torch.zeros(2001, dtype=torch.long)
    for norm in (1.0, 30.0, 200.0):
        own = head.margin(cosine, target, torch.full_like(angles, norm))[:, 0]
        assert bool((own[1:] <= own[:-1] + 1e-12).all())


@pytest.mark.parametrize("case", CASES)
def test_gradient_is_that_of_the_formula(case):
    """Central differences of the formula itself, in float64, against autograd: nothing of a margin is detached."""
    cosine, target, norms = smooth_batch()
    head, formula = margin_of(case)
    head.margin(cosine, target, norms).sum().backward()
    step = 1e-6
    for i, (row, y, norm) in enumerate(zip(cosine.tolist(), target.tolist(), norms.tolist(), strict=True)):
        for j in range(4):
            up, down = list(row), list(row)
            up[j] += step
            down[j] -= step
            slope = (sum(formula(up, y, norm)) - sum(formula(down, y, norm))) / (2 * step)
            assert cosine.grad[i, j].item() == pytest.approx(slope, rel=1e-5, abs=1e-4), (i, j)


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case):
    cosine, target, norms = smooth_batch()
    head, _ = margin_of(case)
    assert torch.autograd.gradcheck(lambda c: head.margin(c, target, norms), (cosine,))
    if CASES[case][0] != "adaface":  # its quality is detached by definition
        norms.requires_grad_()
        assert torch.autograd.gradcheck(lambda c, n: head.margin(c, target, n), (cosine, norms))


def test_the_quality_of_adaface_has_no_gradient():
    cosine, target, norms = batch()
    norms.requires_grad_()
    cosine.requires_grad_()
    margin_of("adaface, sharp")[0].margin(cosine, target, norms).sum().backward()
    assert norms.grad is None


def test_the_margin_of_magface_has_a_gradient_through_the_length():
    cosine, target, norms = batch()
    norms.requires_grad_()
    margin_of("magface")[0].margin(cosine, target, norms).sum().backward()
    inside = (norms > 10) & (norms < 110)
    inner = torch.tensor([0.1 < angle < 2.0 for angle in ANGLES])
    assert bool((norms.grad[inside & inner] < 0).all()) and bool((norms.grad[~inside] == 0).all())


def test_arcface_gradient_at_the_true_class():
    """d cos(theta + m) / d cos(theta) = sin(theta + m) / sin(theta); a detached margin would give 1."""
    for theta in (0.1, 0.5, 1.0, 2.0, 2.6):
        cosine = torch.tensor([[math.cos(theta), 0.0]], dtype=torch.float64, requires_grad=True)
        head = build_margin("arcface", 8, scale=1.0)
        head.margin(cosine, torch.tensor([0]), torch.ones(1))[0, 0].backward()
        assert cosine.grad[0, 0].item() == pytest.approx(math.sin(theta + 0.5) / math.sin(theta), rel=1e-12)
        assert abs(cosine.grad[0, 0].item() - 1) > 0.05


def test_combined_is_arcface_until_pi():
    cosine, target, norms = batch()
    own = cosine.gather(1, target[:, None])[:, 0]
    before = own > -math.cos(0.5)
    both = [
        build_margin(name, 8, **arguments).margin(cosine, target, norms)
        for name, arguments in (("arcface", {}), ("combined", {"m2": 0.5, "m3": 0.0}))
    ]
    torch.testing.assert_close(both[0][before], both[1][before], rtol=1e-9, atol=1e-9)
    assert 3 <= int((~before).sum()) <= 5


# ---------------------------------------------------------------- losses of whole heads


def embeddings_and_weight(n=6, d=5, c=4):
    generator = torch.Generator().manual_seed(3)
    embeddings = torch.randn(n, d, generator=generator, dtype=torch.float64) * 10
    return (
        embeddings,
        torch.randn(c, d, generator=generator, dtype=torch.float64),
        torch.tensor([0, 3, 1, 2, 3, 0]),
    )


def head_of(name, weight, **arguments):
    head = build_head(name, weight.shape[1], len(weight), **arguments).double()
    with torch.no_grad():
        head.weight.copy_(weight)
    return head.eval()


def cosine_table(embeddings, weight):
    """Plain Python."""
    table = []
    for x in embeddings.tolist():
        row = []
        for w in weight.tolist():
            dot = sum(a * b for a, b in zip(x, w, strict=True))
            row.append(dot / math.sqrt(sum(a * a for a in x)) / math.sqrt(sum(b * b for b in w)))
        table.append(row)
    return table, [math.sqrt(sum(a * a for a in x)) for x in embeddings.tolist()]


def cross_entropy(logits, y, smoothing=0.0):
    total = math.log(sum(math.exp(z - max(logits)) for z in logits)) + max(logits)
    wanted = [(1 - smoothing) * (j == y) + smoothing / len(logits) for j in range(len(logits))]
    return sum(p * (total - z) for p, z in zip(wanted, logits, strict=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    "name", ["cosface", "arcface", "combined", "sphereface", "sphereface_r", "adaface", "curricularface"]
)
def test_loss_is_the_cross_entropy_of_the_formula(name, smoothing):
    embeddings, weight, labels = embeddings_and_weight()
    head = head_of(name, weight, label_smoothing=smoothing)
    formula = {"curricularface": lambda *a: curricularface(*a, t=0.0)}.get(name) or globals()[name]
    table, norms = cosine_table(embeddings, weight)
    logits = [formula(row, y, norm) for row, y, norm in zip(table, labels.tolist(), norms, strict=True)]
    expected = sum(cross_entropy(z, y, smoothing) for z, y in zip(logits, labels.tolist(), strict=True)) / 6
    out = head.loss(embeddings, labels)
    assert out.loss.item() == pytest.approx(expected, rel=1e-9)
    right = (
        sum(max(range(4), key=z.__getitem__) == y for z, y in zip(logits, labels.tolist(), strict=True)) / 6
    )
    assert out.accuracy.item() == pytest.approx(right)
    torch.testing.assert_close(
        head(embeddings, labels), torch.tensor(logits, dtype=torch.float64), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_softmax_loss(smoothing):
    embeddings, weight, labels = embeddings_and_weight()
    head = build_head("softmax", 5, 4, label_smoothing=smoothing).double()
    with torch.no_grad():
        head.linear.weight.copy_(weight)
        head.linear.bias.copy_(torch.arange(4.0))
    expected = 0.0
    for x, y in zip(embeddings.tolist(), labels.tolist(), strict=True):
        logits = [sum(a * b for a, b in zip(x, w, strict=True)) + j for j, w in enumerate(weight.tolist())]
        expected += cross_entropy(logits, y, smoothing) / 6
    assert head.loss(embeddings, labels).loss.item() == pytest.approx(expected, rel=1e-9)


def test_magface_loss_has_its_regulariser():
    embeddings, weight, labels = embeddings_and_weight()
    head = head_of("magface", weight)
    table, norms = cosine_table(embeddings, weight)
    assert min(norms) < 20 < max(norms)
    expected = penalty = 0.0
    for row, y, norm in zip(table, labels.tolist(), norms, strict=True):
        a = max(10.0, min(110.0, norm))
        expected += cross_entropy(magface(row, y, norm), y) / 6
        penalty += 35.0 * (1 / a + a / 110.0**2) / 6
    out = head.loss(embeddings, labels)
    assert out.loss.item() == pytest.approx(expected + penalty, rel=1e-9)
    assert out.logs["penalty"].item() == pytest.approx(penalty, rel=1e-9)
    assert out.logs["norm"].item() == pytest.approx(sum(norms) / 6, rel=1e-9)


@pytest.mark.parametrize("name", ["discface", "cosface", "magface", "sphereface2"])
@pytest.mark.parametrize("length", [0.0, 0.02, 0.4])
def test_discrepancy_term(name, length):
    embeddings, weight, labels = embeddings_and_weight()
    plain = head_of(name, weight, discrepancy=0.0).loss(embeddings, labels).loss.item()
    head = head_of(name, weight, discrepancy=0.7)
    xi = [length * math.cos(0.3), 0.0, length * math.sin(0.3), 0.0, 0.0]
    with torch.no_grad():
        head.xi.copy_(torch.tensor(xi))
    held = [value * min(1.0, 0.05 / length) if length else 0.0 for value in xi]
    expected = 0.0
    for x, y in zip(embeddings.tolist(), labels.tolist(), strict=True):
        w = weight[y].tolist()
        x_norm, w_norm = math.sqrt(sum(a * a for a in x)), math.sqrt(sum(b * b for b in w))
        left = [a / x_norm - b / w_norm - k for a, b, k in zip(x, w, held, strict=True)]
        expected += 0.7 * math.sqrt(sum(value * value for value in left)) / 6
    assert head.loss(embeddings, labels).loss.item() - plain == pytest.approx(expected, rel=1e-6)


def test_sphereface2_loss():
    embeddings, weight, labels = embeddings_and_weight()
    head = head_of("sphereface2", weight)
    bias = head.bias.item()
    table, norms = cosine_table(embeddings, weight)
    expected = 0.0
    for row, y, norm in zip(table, labels.tolist(), norms, strict=True):
        z = sphereface2(row, y, norm, b=bias)
        expected += 0.7 / 40 * math.log1p(math.exp(-z[y]))
        expected += 0.3 / 40 * sum(math.log1p(math.exp(z[j])) for j in range(4) if j != y)
    assert head.loss(embeddings, labels).loss.item() == pytest.approx(50 * expected / 6, rel=1e-9)
    bare = head_of("sphereface2", weight, loss_weight=1.0)
    assert bare.loss(embeddings, labels).loss.item() == pytest.approx(expected / 6, rel=1e-9)


@pytest.mark.parametrize("identities", [2, 3, 4, 100, 10**6])
def test_the_bias_of_sphereface2_balances_pull_and_push_at_a_cosine_of_zero(identities):
    bias = starting_bias(identities, scale=40.0, margin=0.4, balance=0.7, power=3.0)
    own, other = sphereface2([0.0, 0.0], 0, 1.0, b=bias)
    pull = 0.7 / (1 + math.exp(own))
    push = 0.3 * (identities - 1) / (1 + math.exp(-other))
    assert pull == pytest.approx(push, rel=1e-9)
    if identities <= 100:
        assert build_head("sphereface2", 4, identities).bias.item() == pytest.approx(bias)


@pytest.mark.parametrize("name", [name for name in HEADS.names() if name not in ("partial", "softmax")])
def test_gradcheck_of_the_loss(name):
    embeddings, weight, labels = embeddings_and_weight()
    head = head_of(name, weight, discrepancy=0.3)
    if name == "adaface":  # at the clip, where its detached quality has no slope anyway
        head.norm_std.fill_(1e-3)
    parameters = {key: value.detach().clone().requires_grad_() for key, value in head.named_parameters()}
    with torch.no_grad():
        parameters["xi"].copy_(torch.linspace(0.0, 0.01, 5))

    def loss(embeddings, *values):
        return torch.func.functional_call(
            Loss(head),
            {f"head.{k}": v for k, v in zip(parameters, values, strict=True)},
            (embeddings, labels),
        )

    assert torch.autograd.gradcheck(loss, (embeddings.requires_grad_(), *parameters.values()))


class Loss(torch.nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, embeddings, labels):
        return self.head.loss(embeddings, labels).loss
