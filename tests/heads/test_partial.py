"""Partial FC in one process; tests/train/test_distributed.py has it in two."""

import copy

import pytest
import torch
from torch import nn

from lrface.errors import LrfaceError, UsageError
from lrface.heads import MarginHead, PartialHead, build_head
from lrface.train import distributed
from lrface.train.average import AveragedWeights

D, CLASSES, N = 16, 60, 12
HEADS = [
    ("cosface", {}),
    ("arcface", {"scale": 16.0, "label_smoothing": 0.1}),
    ("combined", {}),
    ("sphereface", {}),
    ("sphereface_r", {}),
    ("adaface", {}),
    ("magface", {}),
    ("curricularface", {}),
    ("discface", {}),
]


def partial(share: float, of: str = "cosface", classes: int = CLASSES, **arguments) -> PartialHead:
    torch.manual_seed(0)
    head = build_head("partial", D, classes, of=of, sample_share=share, **arguments)
    assert isinstance(head, PartialHead)
    return head


def batch(step: int, classes: int = CLASSES) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    embeddings = torch.randn(N, D, generator=generator, dtype=torch.float64) * 3
    return embeddings.requires_grad_(), torch.randint(classes, (N,), generator=generator)


OPTIMISERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=5e-3, nesterov=True),
    "plain": lambda p: torch.optim.SGD(p, 0.05),
    "adamw": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1),
}


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
@pytest.mark.parametrize(("of", "arguments"), HEADS)
def test_all_classes_are_the_head_itself(of, arguments, optimiser):
    head = partial(1.0, of, **arguments).double()
    whole = build_head(of, D, CLASSES, **arguments).double()
    assert isinstance(whole, MarginHead)
    with torch.no_grad():
        whole.weight.copy_(head.weight)
    moves, moves_whole = OPTIMISERS[optimiser](head.parameters()), OPTIMISERS[optimiser](whole.parameters())
    head.attach(moves)
    for step in range(4):
        embeddings, labels = batch(step)
        others = embeddings.detach().clone().requires_grad_()
        found, wanted = head.loss(embeddings, labels), whole.loss(others, labels)
        torch.testing.assert_close(found.loss, wanted.loss)
        assert float(found.accuracy) == float(wanted.accuracy)
        assert found.logs.keys() == wanted.logs.keys()
        for one, other in ((moves, found), (moves_whole, wanted)):
            one.zero_grad()
            other.loss.backward()
        torch.testing.assert_close(embeddings.grad, others.grad)
        torch.testing.assert_close(head.sampled.grad, whole.weight.grad)
        moves.step()
        moves_whole.step()
        torch.testing.assert_close(head.weight, whole.weight)
        for name, buffer in whole.named_buffers():
            torch.testing.assert_close(head.inner.get_buffer(name), buffer)


def test_the_loss_over_a_sample_is_the_formula():
    head = partial(0.3, scale=8.0, margin=0.2).double()
    embeddings, labels = batch(0)
    found = head.loss(embeddings, labels)
    found.loss.backward()
    rows = head.chosen
    assert len(rows) == round(0.3 * CLASSES) and len(set(rows.tolist())) == len(rows)
    assert set(labels.tolist()) <= set(rows.tolist())
    total = 0.0
    for embedding, label in zip(embeddings.detach(), labels, strict=True):
        cosine = torch.stack([torch.cosine_similarity(embedding, head.weight[row], dim=0) for row in rows])
        logits = 8.0 * (cosine - 0.2 * (rows == label).double())
        total += float(torch.logsumexp(logits, 0) - logits[rows == label][0])
    assert found.loss.item() == pytest.approx(total / N, rel=1e-12)


def test_the_gradient_is_that_of_the_loss():
    head = partial(0.3, "arcface", scale=4.0).double()
    before = head.sampling.clone()
    _, labels = batch(0)

    def loss(embeddings: torch.Tensor) -> torch.Tensor:
        head.sampling.copy_(before)  # the same sample each time
        return head.loss(embeddings, labels).loss

    assert torch.autograd.gradcheck(loss, (batch(1)[0],))


@pytest.mark.parametrize("name", OPTIMISERS)
def test_classes_that_are_not_in_the_sample_rest(name):
    head = partial(0.3)
    optimiser = OPTIMISERS[name](head.parameters())
    head.attach(optimiser)
    last = {}
    for step in range(5):
        embeddings, labels = batch(step)
        optimiser.zero_grad()
        head.loss(embeddings.float(), labels).loss.backward()
        before = {key: value.clone() for key, value in head.rows().items()}
        optimiser.step()
        resting = torch.ones(CLASSES, dtype=torch.bool)
        resting[head.chosen] = False
        assert int(resting.sum()) == CLASSES - round(0.3 * CLASSES)
        for key, value in head.rows().items():
            if key in before:
                assert torch.equal(value[resting], before[key][resting]), key
        last = {key: value for key, value in head.rows().items() if key in before}
        assert not torch.equal(last["weight"][~resting], before["weight"][~resting])
    assert (
        set(last)
        == {
            "sgd": {"weight", "momentum_buffer"},
            "plain": {"weight"},
            "adamw": {"weight", "exp_avg", "exp_avg_sq", "step"},
        }[name]
    )


def test_adamw_counts_the_steps_of_each_class():
    """A class that comes late takes the first step that AdamW takes: as long as the learning rate."""
    head = partial(0.05, classes=400)
    optimiser = torch.optim.AdamW(head.parameters(), 0.01, weight_decay=0.0)
    head.attach(optimiser)
    for step in range(30):
        embeddings, labels = batch(step, 400)
        new = torch.ones(400, dtype=torch.bool) if step == 0 else head.state["step"] == 0
        before = head.weight.clone()
        optimiser.zero_grad()
        head.loss(embeddings.float(), labels).loss.backward()
        optimiser.step()
        first = head.chosen[new[head.chosen]]
        assert len(first) or step > 20
        moved = (head.weight - before)[first].abs()
        torch.testing.assert_close(moved, torch.full_like(moved, 0.01), rtol=1e-2, atol=0)


def test_memory_of_a_step_is_that_of_the_sample():
    head = partial(0.1, classes=1000)
    embeddings, labels = batch(0, 1000)
    head.loss(embeddings.float(), labels).loss.backward()
    assert head.sampled.grad is not None and head.sampled.grad.shape == (100, D) == head.sampled.shape
    assert head.weight.grad is None and not head.weight.requires_grad


def test_more_true_classes_than_the_share():
    head = partial(0.02)
    embeddings, labels = batch(0)
    head.loss(embeddings.float(), labels).loss.backward()
    assert head.chosen.tolist() == sorted(set(labels.tolist()))


def test_every_draw_is_another_and_comes_back():
    head = partial(0.3)
    saved = copy.deepcopy(head.state_dict())
    drawn = []
    for _ in range(3):
        head.loss(batch(0)[0].float(), batch(0)[1]).loss.backward()
        drawn.append(head.chosen.tolist())
        head.sampled.grad = None
    assert drawn[0] != drawn[1] != drawn[2]
    torch.manual_seed(99)
    other = build_head("partial", D, CLASSES, sample_share=0.3)
    other.load_state_dict(saved)
    for wanted in drawn:
        other.loss(batch(0)[0].float(), batch(0)[1]).loss.backward()
        assert other.chosen.tolist() == wanted
        other.sampled.grad = None
    assert set(saved) == {"sampling"}


def test_a_batch_in_parts_has_the_gradient_of_the_whole():
    head = partial(1.0).double()
    embeddings, labels = batch(0)
    head.loss(embeddings, labels).loss.backward()
    wanted, head.sampled.grad = head.sampled.grad.clone(), None
    for part in (slice(0, N // 2), slice(N // 2, N)):
        (head.loss(embeddings[part], labels[part]).loss / 2).backward()
    torch.testing.assert_close(head.sampled.grad, wanted)
    # Parts draw samples of their own: the step moves the classes of both.
    head = partial(0.3)
    optimiser = torch.optim.SGD(head.parameters(), 0.1)
    head.attach(optimiser)
    before = head.weight.clone()
    drawn = set()
    for part in (slice(0, N // 2), slice(N // 2, N)):
        known = set(head.chosen.tolist())
        head.loss(embeddings[part].float(), labels[part]).loss.backward()
        assert known <= set(head.chosen.tolist())
        drawn |= set(head.chosen.tolist())
    optimiser.step()
    moved = (head.weight != before).any(1).nonzero()[:, 0].tolist()
    assert set(moved) == drawn and len(drawn) > round(0.3 * CLASSES)


def test_a_step_with_a_loss_that_is_not_finite_moves_nothing():
    head = partial(0.5)
    optimiser = torch.optim.SGD(head.parameters(), 0.1, momentum=0.9, fused=True)
    head.attach(optimiser)
    embeddings, labels = batch(0)
    before = head.weight.clone()
    head.loss(embeddings.float(), labels).loss.backward()
    optimiser.found_inf = torch.tensor(1.0)
    optimiser.grad_scale = None
    optimiser.step()
    assert torch.equal(head.weight, before) and not head.state["momentum_buffer"].any()
    optimiser.found_inf = torch.tensor(0.0)
    head.loss(embeddings.float(), labels).loss.backward()
    optimiser.step()
    assert not torch.equal(head.weight, before)


def test_half_precision_and_evaluation():
    head = partial(0.5)
    embeddings, labels = batch(0)
    with torch.autocast("cpu", torch.bfloat16):
        found = head.loss(embeddings.bfloat16(), labels)
    assert found.loss.dtype == torch.float32 and bool(torch.isfinite(found.loss))
    drawn = head.sampling.clone()
    head.eval()
    with torch.no_grad():
        head.loss(embeddings.float(), labels)
    assert torch.equal(head.sampling, drawn)


def test_weights_do_not_depend_on_how_they_are_split(monkeypatch):
    monkeypatch.setattr("lrface.heads.partial.BLOCK", 7)
    whole = partial(1.0).weight
    parts = []
    for rank in range(4):
        monkeypatch.setattr("lrface.heads.partial._place", lambda rank=rank: (rank, 4))
        parts.append(partial(1.0).weight)
    assert torch.equal(torch.cat(parts), whole)
    assert float(whole.std()) == pytest.approx(0.01, rel=0.1) and len(whole.unique()) > 0.9 * whole.numel()


class Method(nn.Module):
    def __init__(self, share: float = 0.3, classes: int = CLASSES):
        super().__init__()
        self.encoder = nn.Linear(D, D)
        self.head = partial(share, classes=classes)


def trained() -> Method:
    method = Method()
    optimiser = torch.optim.AdamW(method.parameters(), 0.01)
    method.head.attach(optimiser)
    for step in range(3):
        embeddings, labels = batch(step)
        optimiser.zero_grad()
        method.head.loss(method.encoder(embeddings.detach().float()), labels).loss.backward()
        optimiser.step()
    return method


def test_a_checkpoint_keeps_the_classes_and_their_momentum(tmp_path, monkeypatch):
    method = trained()
    monkeypatch.setattr(distributed, "PIECE", 4 * D * 7)  # several pieces, the last one smaller
    distributed.save_classes(method, tmp_path)
    other = Method()
    other.head.weight.zero_()
    distributed.load_classes(other, tmp_path)
    for key, value in method.head.rows().items():
        assert torch.equal(other.head.rows()[key], value), key
    plain = Method()
    distributed.load_classes(plain, tmp_path, momentum=False)
    assert torch.equal(plain.head.weight, method.head.weight) and not plain.head.state
    # What one of three ranks would read.
    monkeypatch.setattr("lrface.heads.partial._place", lambda: (1, 3))
    third = Method()
    distributed.load_classes(third, tmp_path)
    assert torch.equal(third.head.weight, method.head.weight[20:40])
    assert torch.equal(third.head.state["step"], method.head.state["step"][20:40])


def test_classes_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(LrfaceError, match="classes.safetensors does not exist"):
        distributed.load_classes(Method(), tmp_path)
    distributed.save_classes(trained(), tmp_path)
    with pytest.raises(LrfaceError, match=r"head.\w+ has shape \[60.*the head's classes \[61"):
        distributed.load_classes(Method(classes=61), tmp_path)
    (tmp_path / distributed.CLASSES).write_bytes(b"broken")
    with pytest.raises(LrfaceError, match="no readable safetensors file"):
        distributed.load_classes(Method(), tmp_path)


def test_averaged_weights_leave_the_classes_alone():
    method = trained()
    average = AveragedWeights(method, 0.9)
    average.update(5)
    with average.shown():
        pass
    assert "head.sampled" not in average.state()


def test_settings_that_do_not_fit_are_named():
    with pytest.raises(UsageError, match=r"head.sample_share must lie in \(0, 1\]; found 0"):
        partial(0.0)
    with pytest.raises(UsageError, match="SphereFace2 is no softmax"):
        partial(0.5, "sphereface2")
    with pytest.raises(UsageError, match="head 'softmax' has no margin"):
        partial(0.5, "softmax")
    with pytest.raises(UsageError, match="head 'partial' has no margin"):
        partial(0.5, "partial")
    with pytest.raises(UsageError, match="unknown key head.scael for head 'cosface'.*scale"):
        partial(0.5, scael=3.0)
    head = partial(0.5)
    with pytest.raises(UsageError, match="by sgd or adamw; found rmsprop"):
        head.attach(torch.optim.RMSprop(head.parameters()))


def test_more_ranks_than_classes_are_refused(monkeypatch):
    monkeypatch.setattr("lrface.heads.partial._place", lambda: (0, 8))
    with pytest.raises(UsageError, match="5 identities cannot be split over 8 ranks"):
        partial(0.5, classes=5)
