"""Contrastive inversion (paper 002): a student's embeddings of degraded images against a teacher's of the clean ones.

With S_i the student's embedding of the degraded image i and R_i the teacher's of the clean one, both of unit length,
K(y, z) = exp(<y, z> / tau), and sums over the n images of a batch:

    pull    (1 / tau) L_MSE, with L_MSE = -1/n sum_i <S_i, R_i>                                              eq. (1)
    push    L_unif = 1/n sum_i of, by ``variant`` (eq. 4 and appendix C):
            student_teacher   log sum_j K(S_i, R_j)
            student_student   log sum_{j != i} K(S_i, S_j)
            student_both      log (sum_{j != i} K(S_i, S_j) + sum_j K(S_i, R_j))
            nt_xent           the same + log (sum_j K(R_i, S_j) + sum_{j != i} K(R_i, R_j))
    loss    pull + push                                                                                       eq. (3)

With student_teacher that is InfoNCE, eq. (2). ``mse`` is L_MSE alone, not divided by tau. NT-Xent is taken as appendix C
writes it, with one pull for its two logarithms; SimCLR's has two.

No n x n matrix is ever kept: similarities are computed in blocks of ``chunk`` x ``chunk``, and once more for the
gradient. Everything is in float32 at least, under autocast too.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lrface.compiling import not_compiled
from lrface.errors import UsageError
from lrface.heads.base import at_least_float32
from lrface.heads.margin import unit

VARIANTS = ("student_teacher", "student_student", "student_both", "nt_xent", "mse")


class Contrast(NamedTuple):
    """The loss and its two terms, scalars, at least float32: loss = pull + push, and push is 0 for ``mse``."""

    loss: Tensor
    pull: Tensor
    push: Tensor


def check_contrastive(variant: str, temperature: float, chunk: int) -> None:
    """Raises UsageError for what :func:`contrastive_loss` refuses."""
    if variant not in VARIANTS:
        raise UsageError(f"method.variant must be one of {', '.join(VARIANTS)}; found {variant!r}")
    if not 0 < temperature < float("inf"):
        raise UsageError(f"method.temperature must be above 0; found {temperature}")
    if chunk < 1:
        raise UsageError(f"method.chunk must be at least 1 image; found {chunk}")


def contrastive_loss(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 0.1,
    variant: str = "student_teacher",
    chunk: int = 1024,
) -> Contrast:
    """The loss of this module; differentiable, once, by both.

    Args:
        student: float [n, d], embeddings of the degraded images, of any length.
        teacher: float [n, d], of their clean originals in the same order.
        temperature: tau, 0.1 in the paper.
        variant: what is pushed apart, one of :data:`VARIANTS`.
        chunk: side of a block of similarities. The memory is 3 chunk^2 numbers and a few times n d.

    Raises:
        UsageError: another variant, a temperature that is not above 0, a chunk below 1, other shapes, or fewer than 2
            images where a student has to be compared with another one.
    """
    check_contrastive(variant, temperature, chunk)
    if student.ndim != 2 or student.shape != teacher.shape:
        raise UsageError(
            f"contrastive_loss compares embeddings [n, d] of one shape; found {tuple(student.shape)} of the student and "
            f"{tuple(teacher.shape)} of the teacher"
        )
    if len(student) < 2 and variant != "mse":
        raise UsageError(
            "contrastive_loss compares the images of a batch with each other: it needs at least 2"
        )
    with torch.autocast(student.device.type, enabled=False):
        own = at_least_float32(student)
        wanted = at_least_float32(teacher).to(own.dtype)
        own, wanted = unit(own, own.norm(dim=1)), unit(wanted, wanted.norm(dim=1))
        pull = -(own * wanted).sum(1).mean()
        if variant == "mse":
            return Contrast(pull, pull, torch.zeros_like(pull))
        pull = pull / temperature
        if variant == "student_teacher":
            push = log_sum_exp(own, wanted, temperature, None, chunk).mean()
        elif variant == "student_student":
            push = log_sum_exp(own, own, temperature, 0, chunk).mean()
        else:
            both = torch.cat([own, wanted])
            push = log_sum_exp(own, both, temperature, 0, chunk).mean()
            if variant == "nt_xent":
                push = push + log_sum_exp(wanted, both, temperature, len(own), chunk).mean()
        return Contrast(pull + push, pull, push)


@not_compiled  # loops over blocks would be unrolled
def log_sum_exp(
    queries: Tensor, keys: Tensor, temperature: float, skipped: int | None = None, chunk: int = 1024
) -> Tensor:
    """float [n]: log sum_j exp(<queries_i, keys_j> / temperature), in blocks.

    Args:
        queries: float [n, d].
        keys: float [m, d] of the same dtype.
        skipped: row i leaves out key ``skipped + i``, itself; None leaves out none.
        chunk: rows and columns of a block.
    """
    return _LogSumExp.apply(queries, keys, temperature, skipped, chunk)


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, queries: Tensor, keys: Tensor, temperature: float, skipped: int | None, chunk: int
    ) -> Tensor:
        total = queries.new_full((len(queries),), float("-inf"))
        for row in range(0, len(queries), chunk):
            rows = slice(row, row + chunk)
            for column in range(0, len(keys), chunk):
                block = _block(queries, keys, row, column, temperature, skipped, chunk)
                total[rows] = torch.logaddexp(total[rows], block.logsumexp(1))
        context.save_for_backward(queries, keys, total)
        context.settings = temperature, skipped, chunk
        return total

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, total = context.saved_tensors
        temperature, skipped, chunk = context.settings
        of_queries = torch.zeros_like(queries) if context.needs_input_grad[0] else None
        of_keys = torch.zeros_like(keys) if context.needs_input_grad[1] else None
        with torch.autocast(queries.device.type, enabled=False):
            for row in range(0, len(queries), chunk):
                rows = slice(row, row + chunk)
                for column in range(0, len(keys), chunk):
                    columns = slice(column, column + chunk)
                    block = _block(queries, keys, row, column, temperature, skipped, chunk)
                    weights = block.sub_(total[rows, None]).exp_().mul_(gradient[rows, None] / temperature)
                    if of_queries is not None:
                        of_queries[rows].addmm_(weights, keys[columns])
                    if of_keys is not None:
                        of_keys[columns].addmm_(weights.T, queries[rows])
        return of_queries, of_keys, None, None, None


def _block(
    queries: Tensor, keys: Tensor, row: int, column: int, temperature: float, skipped: int | None, chunk: int
) -> Tensor:
    """Similarities / temperature of the rows from ``row`` and the keys from ``column`` on, -inf where they are skipped."""
    block = (queries[row : row + chunk] @ keys[column : column + chunk].T).div_(temperature)
    offset = 0 if skipped is None else row + skipped - column
    if skipped is not None and -len(block) < offset < block.shape[1]:
        block.diagonal(offset).fill_(float("-inf"))
    return block
