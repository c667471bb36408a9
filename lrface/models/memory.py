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
        # What has no weights is cheap to keep, and a ReLU in place would change its own input a second time.
        if next(block.parameters(), None) is not None:
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
        return nullcontext(), self._buffers_kept()

    @contextmanager
    def _buffers_kept(self) -> Iterator[None]:
        """The second forward pass works on copies: running statistics of BatchNorm do not see a batch twice."""
        own = [(part, dict(part._buffers)) for part in self.block.modules() if part._buffers]
        for part, buffers in own:
            part._buffers.update(
                {key: None if value is None else value.clone() for key, value in buffers.items()}
            )
        try:
            yield
        finally:
            for part, buffers in own:
                part._buffers.update(buffers)
