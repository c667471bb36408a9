"""Training of a corruption network on the images themselves: EDSR to enlarge them, the autoencoder to draw them again."""

from typing import Any

import torch
from torch.nn import functional as F

from lrface.degrade.policy import Policy
from lrface.errors import UsageError
from lrface.methods.base import Method, StepOutput, degrade_batch
from lrface.models.per_example import CorruptionNetwork

LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss}


class Restore(Method):
    """The distance between what the network draws and the image (``training_pair`` of the network).

    No labels are read. What comes of it is loaded into a method with a corruption network, such as ``ada``:
    ``load: [{from: encoder, to: corruption_network}]``, or ``{path: RUN, to: corruption_network}``.

    Args:
        encoder: the corruption network.
        policy: what it is trained on; framed images only, as the policy ``clean`` gives them.
        loss: l1, as EDSR is trained (Lim et al., section 3.2), or l2, as the compressive autoencoder is.

    Raises:
        UsageError: another loss.
    """

    needs = ("image", "seed")
    encoder: CorruptionNetwork

    def __init__(self, encoder: CorruptionNetwork, policy: Policy, loss: str = "l1"):
        super().__init__()
        if loss not in LOSSES:
            raise UsageError(f"method.loss must be {' or '.join(LOSSES)}; found {loss!r}")
        self.encoder = encoder
        self.policy = policy
        self.loss = loss

    @torch.no_grad()
    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        return degrade_batch(batch, self.policy)

    def forward(self, batch: dict[str, Any]) -> StepOutput:
        drawn, wanted = self.encoder.training_pair(batch["image"])
        error = F.mse_loss(drawn.detach().float().clamp(0, 1), wanted)
        return StepOutput(
            LOSSES[self.loss](drawn.float(), wanted), {"psnr": -10 * error.clamp_min(1e-10).log10()}
        )
