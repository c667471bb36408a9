"""What every head keeps to: extreme input, precision, shards, state, errors, compilation, ranks, and that it teaches."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from lrface.errors import UsageError
from lrface.heads import HEADS, MarginHead, build_head, build_margin

NAMES = [name for name in HEADS.names() if name != "partial"]
MARGINS = [name for name in NAMES if name != "softmax"]
WITH_STATISTICS = {"adaface": {"norm_mean", "norm_std"}, "curricularface": {"t"}, "sphereface": {"steps"}}


def batch(n=12, d=8, c=6, seed=0, length=8.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator) * length, torch.randint(0, c, (n,), generator=generator)


def head_of(name, d=8, c=6, seed=0, **arguments):
    torch.manual_seed(seed)
    return build_head(name, d, c, **arguments)


def finite(*tensors):
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


# ---------------------------------------------------------------- extremes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_finite_at_the_ends(name, dtype):
    """Embeddings on, against and across their class, of length 0, tiny and huge."""
    head = head_of(name, discrepancy=0.5) if name != "softmax" else head_of(name)
    weight = (head.weight if name != "softmax" else head.linear.weight).detach()
    # float16 has no room for the gradient of a shorter one; it comes with a loss scaler that steps over that.
    shortest = 0.1 if dtype == torch.float16 else 1e-3
    rows = [
        weight[0],
        -weight[0],
        weight[1] * 1e4,
        -weight[1] * shortest,
        torch.zeros(8),
        torch.full((8,), 1e-7),
    ]
    embeddings = torch.stack([*rows, torch.full((8,), 1e3)]).to(dtype).requires_grad_()
    labels = torch.tensor([0, 0, 1, 1, 2, 3, 4])
    with torch.autocast(
        "cpu", dtype=dtype if dtype != torch.float32 else torch.bfloat16, enabled=dtype != torch.float32
    ):
        out = head.loss(embeddings, labels)
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert finite(
        out.loss, embeddings.grad, *(value.grad for value in head.parameters()), *head.state_dict().values()
    )
    if name != "softmax":  # an embedding without a direction learns nothing of one; the length alone may
        assert embeddings.grad[4].abs().max() == 0


@pytest.mark.parametrize("name", MARGINS)
def test_cosines_of_exactly_one_and_minus_one(name):
    head = build_margin(name, 8)
    for rounding in (0.0, 1e-7, 1e-6):  # a float32 cosine of unit vectors can lie this far outside
        ends = torch.tensor([[1.0 + rounding, 0.0], [-1.0 - rounding, 0.0], [0.0, 1.0 + rounding]])
        cosine = ends.requires_grad_()
        norms = torch.tensor([20.0, 20.0, 20.0], requires_grad=True)
        logits = head.margin(cosine, torch.tensor([0, 0, 0]), norms)
        F.cross_entropy(logits, torch.tensor([0, 0, 0])).backward()
        assert finite(logits, cosine.grad) and (norms.grad is None or finite(norms.grad))


@pytest.mark.parametrize("name", NAMES)
def test_a_class_without_a_sample_is_pushed_away_only(name):
    head = head_of(name)
    embeddings, _ = batch(n=5)
    weight = head.weight if name != "softmax" else head.linear.weight
    head.loss(embeddings, torch.tensor([0, 1, 2, 0, 1])).loss.backward()
    assert finite(weight.grad) and bool((weight.grad[3:].abs().amax(1) > 0).all())
    # One sample, near its class: a step against the gradient takes every other class further from it.
    head = head.double()
    with torch.no_grad():
        sample = (weight[:1] / weight[0].norm() + 0.1 * torch.eye(1, 8)) * 20
    weight.grad = None
    head.loss(sample, torch.tensor([0])).loss.backward()
    slope = (weight.grad @ sample[0])[1:]  # of the loss, when a class moves towards the sample
    assert bool((slope > 0).all())


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MARGINS)
def test_autocast_changes_nothing_about_angles(name, dtype):
    head = head_of(name, d=64, discrepancy=0.5)
    embeddings, labels = batch(d=64)
    exact = copy.deepcopy(head).loss(embeddings, labels)
    twin = copy.deepcopy(head)
    with torch.autocast("cpu", dtype=dtype):
        assert F.linear(F.normalize(embeddings), F.normalize(head.weight)).dtype == dtype  # what it would do
        mixed = head.loss(embeddings, labels)
        assert head(embeddings, labels).dtype == torch.float32
    assert mixed.loss.dtype == torch.float32 and torch.equal(mixed.loss, exact.loss)
    # Embeddings that come in half precision are exact numbers too: what they mean is computed in float32.
    half = twin.loss(embeddings.to(dtype), labels)
    wide = copy.deepcopy(twin)
    wide.load_state_dict(head_of(name, d=64, discrepancy=0.5).state_dict())
    torch.testing.assert_close(
        half.loss, wide.loss(embeddings.to(dtype).float(), labels).loss, rtol=0, atol=0
    )


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_embeddings_are_close_to_float32(name):
    head = head_of(name, d=64)
    embeddings, labels = batch(d=64)
    exact = copy.deepcopy(head).loss(embeddings, labels).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = head.loss(embeddings.bfloat16(), labels).loss
    assert half.item() == pytest.approx(exact.item(), rel=0.02) and half.dtype == torch.float32


# ---------------------------------------------------------------- shards


SPLITS = [[6], [3, 3], [1, 5], [2, 1, 3], [1] * 6]


def shards(cosine, labels, sizes):
    """Columns and targets of classes split into runs of these sizes."""
    first = 0
    for size in sizes:
        inside = (labels >= first) & (labels < first + size)
        yield cosine[:, first : first + size], torch.where(inside, labels - first, -1)
        first += size


@pytest.mark.parametrize("sizes", SPLITS)
@pytest.mark.parametrize("name", MARGINS)
def test_shards_give_what_the_whole_gives(name, sizes):
    generator = torch.Generator().manual_seed(1)
    cosine = (torch.rand(40, 6, generator=generator, dtype=torch.float64) * 2 - 1).requires_grad_()
    labels = torch.randint(0, 6, (40,), generator=generator)
    norms = torch.rand(40, generator=generator, dtype=torch.float64) * 130
    head = build_margin(name, 8).double()
    if name == "curricularface":
        head.t.fill_(0.4)
    own = cosine.detach().gather(1, labels[:, None])[:, 0]
    whole = head.margin(cosine, labels, norms)
    (slope,) = torch.autograd.grad(whole.square().sum(), cosine)
    parts = [head.margin(columns, target, norms, own) for columns, target in shards(cosine, labels, sizes)]
    joined = torch.cat(parts, dim=1)
    assert torch.equal(joined, whole)
    torch.testing.assert_close(torch.autograd.grad(joined.square().sum(), cosine)[0], slope)
    # Statistics: the sum over the shards is that of the whole.
    wanted = head.statistics(cosine, labels, norms)
    found = sum(head.statistics(columns, target, norms) for columns, target in shards(cosine, labels, sizes))
    if name != "sphereface":  # which counts steps, not samples
        torch.testing.assert_close(found, wanted)
    assert wanted.dtype == torch.float64 and not wanted.requires_grad


@pytest.mark.parametrize("name", MARGINS)
def test_a_head_that_says_so_needs_the_target_cosine_and_no_other_reads_it(name):
    generator = torch.Generator().manual_seed(1)
    cosine = torch.rand(40, 6, generator=generator) * 2 - 1
    head, elsewhere = build_margin(name, 8), torch.full((40,), -1)
    if name == "curricularface":
        head.t.fill_(0.4)
    outcomes = [
        head.margin(cosine, elsewhere, torch.full((40,), 20.0), own)
        for own in (None, torch.full((40,), -0.5))
    ]
    assert torch.equal(*outcomes) != head.needs_target_cosine


@pytest.mark.parametrize("name", ["magface", "discface", "sphereface2"])
@pytest.mark.parametrize("sizes", SPLITS)
def test_penalties_and_separable_losses_of_shards_add_up(name, sizes):
    head = head_of(name, discrepancy=0.3).double()
    embeddings, labels = batch()
    embeddings = embeddings.double()
    whole = head.penalty(embeddings, head.weight, labels)
    assert whole.shape == (12,) and bool((whole > 0).all())
    cosine = head.cosines(embeddings)
    total, loss, first = 0.0, 0.0, 0
    for (columns, target), size in zip(shards(cosine, labels, sizes), sizes, strict=True):
        part = head.penalty(embeddings, head.weight[first : first + size], target)
        assert bool((part[target < 0] == 0).all())
        total = total + part
        if not head.softmax:
            loss = loss + head.criterion(head.margin(columns, target, embeddings.norm(dim=1)), target)
        first += size
    torch.testing.assert_close(total, whole)
    if not head.softmax:
        torch.testing.assert_close(loss + whole.mean(), head.loss(embeddings, labels).loss)


@pytest.mark.parametrize("name", MARGINS)
def test_a_margin_without_weights(name):
    head = build_margin(name, 8, discrepancy=0.5)
    assert isinstance(head, MarginHead) and head.weight is None and "weight" not in head.state_dict()
    assert set(dict(head.named_parameters())) == ({"xi", "bias"} if name == "sphereface2" else {"xi"})
    repr(head)


def test_softmax_has_no_margin():
    with pytest.raises(UsageError, match="head 'softmax' has no margin"):
        build_margin("softmax", 8)


# ---------------------------------------------------------------- statistics and state


@pytest.mark.parametrize("name", NAMES)
def test_statistics_move_in_training_only_and_by_loss_only(name):
    head = head_of(name)
    embeddings, labels = batch()
    before = {key: value.clone() for key, value in head.named_buffers()}
    assert set(before) == WITH_STATISTICS.get(name, set())
    head.eval().loss(embeddings, labels)
    head.train()(embeddings, labels)
    assert all(torch.equal(value, before[key]) for key, value in head.named_buffers())
    out = head.loss(embeddings, labels)
    assert not any(torch.equal(value, before[key]) for key, value in head.named_buffers())
    assert not any(value.requires_grad for value in (*out.logs.values(), out.accuracy, *head.buffers()))
    # What is logged stays what it was when later steps move the buffers.
    kept = {key: value.item() for key, value in out.logs.items()}
    head.loss(embeddings * 2, labels)
    assert {key: value.item() for key, value in out.logs.items()} == kept


def test_adaface_keeps_running_mean_and_deviation_of_lengths():
    head = head_of("adaface", momentum=0.9)
    mean, deviation = 20.0, 100.0
    for seed in range(4):
        embeddings, labels = batch(seed=seed)
        lengths = [math.sqrt(sum(v * v for v in row)) for row in embeddings.double().tolist()]
        lengths = [min(100.0, max(0.001, value)) for value in lengths]
        own = sum(lengths) / 12
        spread = math.sqrt(sum((value - own) ** 2 for value in lengths) / 11)
        mean, deviation = 0.9 * mean + 0.1 * own, 0.9 * deviation + 0.1 * spread
        out = head.loss(embeddings, labels)
        assert head.norm_mean.item() == pytest.approx(mean, rel=1e-5)
        assert head.norm_std.item() == pytest.approx(deviation, rel=1e-5)
        assert out.logs["norm_mean"].item() == pytest.approx(mean, rel=1e-5)


def test_adaface_with_a_single_embedding_keeps_its_deviation():
    head = head_of("adaface")
    head.loss(torch.full((1, 8), 2.0), torch.tensor([0]))
    assert head.norm_std.item() == 100.0 and head.norm_mean.item() != 20.0
    moved = head.norm_mean.item()
    head.update(torch.zeros(3, dtype=torch.float64))  # a batch none of which is here
    assert head.norm_mean.item() == moved and head.norm_std.item() == 100.0


def test_curricularface_keeps_a_running_mean_of_target_cosines():
    head = head_of("curricularface", momentum=0.8)
    t = 0.0
    for seed in range(4):
        embeddings, labels = batch(seed=seed)
        own = F.cosine_similarity(embeddings.double(), head.weight.detach().double()[labels]).mean().item()
        t = 0.8 * t + 0.2 * own
        head.loss(embeddings, labels)
        assert head.t.item() == pytest.approx(t, rel=1e-4, abs=1e-6)
    head.update(torch.zeros(2, dtype=torch.float64))
    assert head.t.item() == pytest.approx(t, rel=1e-4, abs=1e-6)


def test_sphereface_blends_less_and_less():
    head = head_of("sphereface")
    embeddings, labels = batch()
    for step in range(1, 5):
        out = head.loss(embeddings, labels)
        assert head.steps.item() == step
        assert out.logs["blend"].item() == pytest.approx(1000 / (1 + 0.12 * step))
    head.steps.fill_(10**9)
    assert head.eval().loss(embeddings, labels).logs["blend"].item() == 5.0


@pytest.mark.parametrize("name", NAMES)
def test_two_losses_before_one_backward(name):
    head = head_of(name)
    one, labels = batch(seed=0)
    two, _ = batch(seed=1)
    (head.loss(one, labels).loss + head.loss(two, labels).loss).backward()
    assert finite(*(value.grad for value in head.parameters()))


@pytest.mark.parametrize("name", NAMES)
def test_a_restored_head_goes_on_as_the_first(name, tmp_path):
    from safetensors.torch import load_file, save_file

    head = head_of(name)
    optimiser = torch.optim.SGD(head.parameters(), 0.1)

    def step(head, optimiser, seed):
        embeddings, labels = batch(seed=seed)
        optimiser.zero_grad()
        head.loss(embeddings, labels).loss.backward()
        optimiser.step()

    for seed in range(3):
        step(head, optimiser, seed)
    save_file(head.state_dict(), tmp_path / "head.safetensors")
    again = head_of(name, seed=99)
    again.load_state_dict(load_file(tmp_path / "head.safetensors"))
    for seed in range(3, 6):
        step(head, optimiser, seed)
    other = torch.optim.SGD(again.parameters(), 0.1)
    for seed in range(3, 6):
        step(again, other, seed)
    for (key, value), twin in zip(head.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(value, twin), key


def test_names_of_tensors_in_old_checkpoints():
    assert list(head_of("cosface").state_dict()) == ["weight"]
    assert list(head_of("arcface").state_dict()) == ["weight"]
    assert list(head_of("softmax").state_dict()) == ["linear.weight", "linear.bias"]


# ---------------------------------------------------------------- wrong arguments


@pytest.mark.parametrize(
    "name, arguments, told",
    [
        ("cosface", {"scale": 0.0}, r"head.scale must lie in \(0, inf\); found 0.0"),
        ("cosface", {"scale": math.nan}, "head.scale must lie in .0, inf.; found nan"),
        ("cosface", {"margin": -0.1}, r"head.margin must lie in \[0, 2\]; found -0.1"),
        ("cosface", {"discrepancy": -1.0}, r"head.discrepancy must lie in \[0, inf\); found -1.0"),
        ("arcface", {"margin": 3.2}, r"head.margin must lie in \[0, 3.14159\); found 3.2"),
        ("softmax", {"label_smoothing": 1.0}, r"head.label_smoothing must lie in \[0, 1\); found 1.0"),
        ("magface", {"label_smoothing": -0.1}, r"head.label_smoothing must lie in \[0, 1\); found -0.1"),
        (
            "magface",
            {"lower_norm": 120.0},
            "head.upper_norm must be above head.lower_norm; found 110.0 and 120.0",
        ),
        ("magface", {"upper_margin": 4.0}, "head.upper_margin must lie in"),
        ("combined", {"m1": 0.0}, r"head.m1 must lie in \(0, inf\); found 0.0"),
        ("combined", {"m2": -0.5}, "head.m2 must lie in"),
        ("combined", {"m3": 2.5}, "head.m3 must lie in"),
        ("sphereface", {"margin": 0}, "head.margin must lie in"),
        ("sphereface", {"margin": 1.5}, "head.margin must be of type int; found 1.5"),
        ("sphereface", {"blend_end": -1.0}, "head.blend_end must lie in"),
        ("sphereface", {"scale": 30}, "unknown key head.scale for head 'sphereface'"),
        ("sphereface_r", {"margin": 0.9}, "head.margin must lie in"),
        ("sphereface2", {"balance": 1.0}, r"head.balance must lie in \(0, 1\); found 1.0"),
        ("sphereface2", {"label_smoothing": 0.1}, "unknown key head.label_smoothing for head 'sphereface2'"),
        ("sphereface2", {"power": 0.5}, "head.power must lie in"),
        ("adaface", {"concentration": 0.0}, "head.concentration must lie in"),
        ("adaface", {"momentum": 1.0}, "head.momentum must lie in"),
        ("curricularface", {"momentum": -0.1}, "head.momentum must lie in"),
        ("curricularface", {"margn": 0.5}, "unknown key head.margn .*did you mean 'margin'"),
    ],
)
def test_wrong_values_are_named(name, arguments, told):
    with pytest.raises(UsageError, match=told):
        build_head(name, 8, 4, **arguments)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("embedding_size, identities", [(0, 4), (8, 1), (8, 0)])
def test_bad_sizes_are_refused(name, embedding_size, identities):
    with pytest.raises(UsageError, match=f"found {embedding_size} and {identities}"):
        build_head(name, embedding_size, identities)


def test_wrong_name_names_the_nearest():
    with pytest.raises(UsageError, match="unknown head 'cosfase' .did you mean 'cosface'"):
        build_head("cosfase", 8, 4)


# ---------------------------------------------------------------- compilation, ranks, learning


class HeadStep(nn.Module):
    """A head as a method calls it."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, embeddings, labels):
        out = self.head.loss(embeddings, labels)
        return out.loss, out.accuracy, out.logs


@pytest.mark.parametrize("name", NAMES)
def test_compiles_as_one_graph(name):
    """Traced whole by the compiler's front end and its autograd; the C++ it would make is the trainer tests' matter."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager = HeadStep(head_of(name).double())
    traced = copy.deepcopy(eager)
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager", dynamic=False)
    for seed in range(3):
        embeddings, labels = batch(seed=seed)
        first, second = embeddings.double().requires_grad_(), embeddings.double().requires_grad_()
        expected, found = eager(first, labels), compiled(second, labels)
        torch.testing.assert_close(found, expected)
        expected[0].backward()
        found[0].backward()
        torch.testing.assert_close(second.grad, first.grad)
    torch.testing.assert_close(dict(traced.named_buffers()), dict(eager.named_buffers()))
    # One graph for all steps: buffers that were replaced do not make it compile again.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def run_rank(rank, path, names, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    found = {}
    for name in names:
        model = DistributedDataParallel(HeadStep(head_of(name).double()))
        for seed in range(2):
            embeddings, labels = batch(n=12, seed=seed)
            half = slice(rank * 6, rank * 6 + 6)
            model.zero_grad()
            model(embeddings[half].double(), labels[half])[0].backward()
        found[name] = {key: value.grad for key, value in model.module.named_parameters()}
        found[name] |= dict(model.module.named_buffers())
    torch.save(found, f"{results}.{rank}")
    torch.distributed.destroy_process_group()


def test_two_ranks_are_one_process_with_the_same_batch(tmp_path):
    torch.multiprocessing.spawn(run_rank, (tmp_path / "meeting", NAMES, tmp_path / "found"), nprocs=2)
    found = [torch.load(f"{tmp_path / 'found'}.{rank}", weights_only=True) for rank in (0, 1)]
    for name in NAMES:
        model = HeadStep(head_of(name).double())
        for seed in range(2):
            embeddings, labels = batch(n=12, seed=seed)
            model.zero_grad()
            model(embeddings.double(), labels)[0].backward()
        expected = {key: value.grad for key, value in model.named_parameters()} | dict(model.named_buffers())
        for rank in (0, 1):
            torch.testing.assert_close(found[rank][name], expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_each_head_separates_four_clouds(name):
    """Points that no plane through the origin sorts: the network has to learn, and the head has to say what."""
    generator = torch.Generator().manual_seed(5)
    centres = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
    labels = torch.arange(120) % 4
    points = centres[labels] + 0.25 * torch.randn(120, 2, generator=generator)
    held_out = centres[labels] + 0.25 * torch.randn(120, 2, generator=generator)
    torch.manual_seed(6)
    network = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 16), nn.BatchNorm1d(16))
    head = build_head(name, 16, 4, **({"lower_norm": 1.0, "upper_norm": 10.0} if name == "magface" else {}))
    optimiser = torch.optim.AdamW([*network.parameters(), *head.parameters()], 1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        head.loss(network(points), labels).loss.backward()
        optimiser.step()
    network.eval()
    with torch.no_grad():
        one, other = F.normalize(network(points)), F.normalize(network(held_out))
        assert (nearest_mean(one, other, labels) == labels).float().mean() > 0.97
        same = labels[:, None] == labels[None]
        scores = other @ other.T
        off = ~torch.eye(120, dtype=torch.bool)
        assert scores[same & off].mean() - scores[~same].mean() > 0.7


def nearest_mean(known, asked, labels):
    means = torch.stack([known[labels == label].mean(0) for label in range(4)])
    return (asked @ F.normalize(means).T).argmax(1)
