"""Each variant against its formula written out, the decomposition, gradients, precision, and how much memory it takes."""

import weakref

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lrface.errors import UsageError
from lrface.losses.contrastive import VARIANTS, contrastive_loss, log_sum_exp

TAU = 0.1


def embeddings(n: int = 7, width: int = 5, dtype: torch.dtype = torch.float64, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        (3 * torch.randn(n, width, generator=generator, dtype=torch.float64)).to(dtype) for _ in "sr"
    )


def written_out(variant: str, student: torch.Tensor, teacher: torch.Tensor, tau: float) -> torch.Tensor:
    """Paper 002, section 3 and appendix C, term by term."""
    s, r = F.normalize(student), F.normalize(teacher)
    n = len(s)
    total = 0.0
    for i in range(n):
        k = lambda y, z: torch.exp(y @ z / tau)  # noqa: E731
        others = [j for j in range(n) if j != i]
        mse = -(s[i] @ r[i])
        st = sum(k(s[i], r[j]) for j in range(n))
        ss = sum(k(s[i], s[j]) for j in others)
        rs = sum(k(r[i], s[j]) for j in range(n))
        rr = sum(k(r[i], r[j]) for j in others)
        total = (
            total
            + {
                "student_teacher": lambda: mse / tau + st.log(),  # noqa: B023
                "student_student": lambda: mse / tau + ss.log(),  # noqa: B023
                "student_both": lambda: mse / tau + (ss + st).log(),  # noqa: B023
                "nt_xent": lambda: mse / tau + (ss + st).log() + (rs + rr).log(),  # noqa: B023
                "mse": lambda: mse,  # noqa: B023
            }[variant]()
        )
    return total / n


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_formulas(variant, chunk):
    student, teacher = (values.requires_grad_() for values in embeddings())
    found = contrastive_loss(student, teacher, TAU, variant, chunk)
    wanted = written_out(variant, student, teacher, TAU)
    assert found.loss.dtype == torch.float64
    torch.testing.assert_close(found.loss, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.pull + found.push, found.loss)
    for own, expected in zip(
        torch.autograd.grad(found.loss, [student, teacher]),
        torch.autograd.grad(wanted, [student, teacher]),
        strict=True,
    ):
        torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-12)


def test_the_decomposition_is_info_nce():
    """Equation (3) is equation (2), the cross-entropy of the similarities with the diagonal."""
    for seed in range(5):
        student, teacher = embeddings(64, 16, torch.float32, seed)
        found = contrastive_loss(student, teacher, TAU, "student_teacher", chunk=10)
        logits = F.normalize(student.double()) @ F.normalize(teacher.double()).T / TAU
        info_nce = F.cross_entropy(logits, torch.arange(64))
        assert found.loss.item() == pytest.approx(info_nce.item(), rel=1e-6, abs=1e-6)
        assert (found.pull + found.push).item() == pytest.approx(info_nce.item(), rel=1e-6, abs=1e-6)
        mse = ((F.normalize(student) - F.normalize(teacher)) ** 2).sum(1).mean() / 2 - 1
        assert found.pull.item() == pytest.approx(mse.item() / TAU, rel=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_by_differences(variant):
    student, teacher = (values.requires_grad_() for values in embeddings(5, 3))
    assert torch.autograd.gradcheck(
        lambda s, r: contrastive_loss(s, r, 0.5, variant, chunk=2).loss, (student, teacher)
    )
    assert torch.autograd.gradcheck(
        lambda s: contrastive_loss(s, teacher.detach(), 0.5, variant, chunk=2).loss, student
    )


@pytest.mark.parametrize("skipped", [None, 0, 5])
def test_the_block_sum_is_logsumexp(skipped):
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    keys = torch.randn(11, 4, generator=generator, dtype=torch.float64)
    wanted = queries @ keys.T / 0.2
    if skipped is not None:
        wanted[torch.arange(5), torch.arange(5) + skipped] = -torch.inf
    for chunk in (1, 2, 4, 16):
        found = log_sum_exp(queries, keys, 0.2, skipped, chunk)
        torch.testing.assert_close(found, wanted.logsumexp(1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_exact_under_autocast(variant):
    student, teacher = embeddings(16, 8, torch.float32)
    alone = contrastive_loss(student.requires_grad_(), teacher, TAU, variant, 5)
    (wanted,) = torch.autograd.grad(alone.loss, student)
    with torch.autocast("cpu", torch.bfloat16):
        found = contrastive_loss(student, teacher, TAU, variant, 5)
        (gradient,) = torch.autograd.grad(found.loss, student)  # inside, as a careless caller does
    assert found.loss.dtype == torch.float32 and torch.equal(found.loss, alone.loss)
    assert torch.equal(gradient, wanted)
    half = contrastive_loss(student.bfloat16(), teacher.bfloat16(), TAU, variant, 5)
    assert half.loss.dtype == torch.float32
    assert half.loss.item() == pytest.approx(alone.loss.item(), abs=0.2)


def test_an_embedding_of_no_length_has_no_gradient_and_harms_no_other():
    student, teacher = embeddings(6, 4, torch.float32)
    student[2] = 0
    found = contrastive_loss(student.requires_grad_(), teacher)
    found.loss.backward()
    assert bool(found.loss.isfinite()) and bool(student.grad.isfinite().all())
    assert not student.grad[2].any() and bool(student.grad[[0, 1, 3, 4, 5]].any(1).all())


class Memory(TorchDispatchMode):
    """Bytes of storages alive, and the most there ever were, of what is made meanwhile."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = self.largest = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                key = storage._cdata
                if key not in self.alive:
                    self.alive[key] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, key, None)
                self.largest = max(self.largest, storage.nbytes())
                self.peak = max(self.peak, sum(self.alive.values()))
        return result


def peak(n: int, chunk: int, variant: str, width: int = 16) -> tuple[int, int]:
    student, teacher = embeddings(n, width, torch.float32)
    student.requires_grad_()
    with Memory() as memory:
        contrastive_loss(student, teacher, TAU, variant, chunk).loss.backward()
    return memory.peak, memory.largest


@pytest.mark.parametrize("variant", ["student_teacher", "nt_xent"])
def test_a_batch_of_4096_takes_memory_of_its_chunk(variant):
    n, chunk, width = 4096, 256, 16
    most, largest = peak(n, chunk, variant, width)
    vectors = 4 * n * width
    # The embeddings, of length 1, together, their gradients: some tens of times n d; and a few blocks.
    assert largest <= max(2 * vectors, 4 * chunk**2)
    assert most < 40 * vectors + 3 * 4 * chunk**2
    assert most < 4 * n**2 / 4, "less than a quarter of one matrix n x n"
    if variant == "student_teacher":
        whole, _ = peak(n, n, variant, width)
        assert whole > 5 * most  # the measure sees what blocks save


def test_what_is_refused():
    student, teacher = embeddings()
    for arguments, said in (
        ({"variant": "clip"}, "method.variant must be one of student_teacher"),
        ({"temperature": 0.0}, "method.temperature must be above 0"),
        ({"temperature": float("nan")}, "method.temperature must be above 0"),
        ({"chunk": 0}, "method.chunk must be at least 1"),
    ):
        with pytest.raises(UsageError, match=said):
            contrastive_loss(student, teacher, **arguments)
    with pytest.raises(UsageError, match="of one shape"):
        contrastive_loss(student, teacher[:, :3])
    with pytest.raises(UsageError, match="at least 2"):
        contrastive_loss(student[:1], teacher[:1])
    assert contrastive_loss(student[:1], teacher[:1], variant="mse").loss.isfinite()
