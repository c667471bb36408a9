"""Less memory for training: activations of a backbone's blocks computed again instead of kept."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lrface.errors import UsageError


def recompute_activations(encoder: nn.Module) -> None:
    """Let each block of ``encoder.body`` keep its input alone for the backward pass (Chen et al., arXiv 1604.06174).

    Gradients stay the same, dropout draws the same numbers again, and the statistics of BatchNorm move once a step.

    Raises:
        UsageError: the encoder has no ``body`` of blocks.
    """
    body = getattr(encoder, "body", None)
    if not isinstance(body, (nn.Sequential, nn.ModuleList)):
        raise UsageError(
            f"trainer.checkpoint_activations: {type(encoder).__name__} is not made of blocks that could be computed "
            "again; set it to false"
        )
    for block in body:
        block.forward = _Recomputed(block)


class _Recomputed:
    """The block's own forward, under a checkpoint while training."""

    def __init__(self, block: nn.Module):
        self.block = block
        self.own = block.forward

    def __call__(self, *inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.own(*inputs)
        if torch.compiler.is_compiling():  # the compiler takes care of what a forward pass changes
            return checkpoint(self.own, *inputs, use_reentrant=False)
        return checkpoint(self.own, *inputs, use_reentrant=False, context_fn=self._contexts)

    def _contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), self._statistics_kept()

    @contextmanager
    def _statistics_kept(self) -> Iterator[None]:
        """BatchNorm normalises by the batch as before, but its running statistics do not see it a second time."""
        norms = [
            part
            for part in self.block.modules()
            if isinstance(part, nn.modules.batchnorm._BatchNorm)
            and part.training
            and part.track_running_stats
        ]
        for part in norms:
            part.track_running_stats = False
        try:
            yield
        finally:
            for part in norms:
                part.track_running_stats = True
