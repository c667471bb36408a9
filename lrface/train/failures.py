"""What can go wrong in the middle of training, named for the user."""

import torch

from lrface.errors import LrfaceError
from lrface.methods.base import Method


def check_finite(method: Method, stage_name: str, step: int) -> None:
    """Raises LrfaceError when a weight is not finite, so that a broken network is never saved over a good one."""
    for name, parameter in method.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise LrfaceError(
                f"{name} is not finite after step {step} of stage {stage_name!r}; no checkpoint was written, older "
                "ones are kept. Lower optimiser.learning_rate of this stage or set optimiser.clip_norm=5"
            )
