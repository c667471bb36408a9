"""Agreement of a classifier's predictions for several views of an image."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def jensen_shannon(logits: Sequence[Tensor]) -> Tensor:
    """Jensen-Shannon divergence of the predictions for k views (Hendrycks et al., "AugMix", ICLR 2020, eq. 2).

    The mean of KL(p_k || M) over the views, p_k = softmax(logits_k), M the mean of the p_k. In nats: 0 where all views
    agree, at most log k.

    Args:
        logits: k tensors [n, classes].

    Returns:
        Scalar, the mean over the n images, at least float32.
    """
    at_least = torch.float64 if logits[0].dtype == torch.float64 else torch.float32
    log_p = torch.stack([F.log_softmax(view.to(at_least), dim=1) for view in logits])
    log_mean = torch.logsumexp(log_p, dim=0) - math.log(len(logits))
    return (log_p.exp() * (log_p - log_mean)).sum(-1).mean()
