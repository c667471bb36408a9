"""What a loss needs that compares the images of all ranks: theirs, with gradients that the trainer's mean makes right."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lrface.compiling import not_compiled


def ranks() -> int:
    """The processes of this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@not_compiled  # a collective inside
def of_all_ranks(own: Tensor) -> Tensor:
    """[n, ...] of every rank -> [ranks n, ...] of all, in the order of the ranks.

    For a loss that every rank then computes from all of it: what a rank's own rows get for a gradient is multiplied by
    the number of ranks, because the trainer averages over them.
    """
    return _OfAllRanks.apply(own)


class _OfAllRanks(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, own: Tensor) -> Tensor:
        own = own.contiguous()
        parts = [torch.empty_like(own) for _ in range(ranks())]
        dist.all_gather(parts, own)
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient.chunk(ranks())[dist.get_rank()] * ranks()
