import math

import pytest
import torch

from lrface.losses import jensen_shannon


def logits(views: int = 3, n: int = 4, classes: int = 5, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(views, n, classes, generator=generator, dtype=torch.float64) * 3)


def by_hand(views: list[torch.Tensor]) -> float:
    """1/k sum_k KL(p_k || M), the mean over images, written out in plain numbers."""
    total = 0.0
    for image in range(len(views[0])):
        p = []
        for view in views:
            exponentials = [math.exp(value) for value in view[image].tolist()]
            p.append([value / sum(exponentials) for value in exponentials])
        mean = [sum(column) / len(views) for column in zip(*p, strict=True)]
        for row in p:
            total += sum(a * math.log(a / b) for a, b in zip(row, mean, strict=True)) / len(views)
    return total / len(views[0])


@pytest.mark.parametrize("views", [2, 3, 4])
def test_is_its_formula(views):
    found = jensen_shannon(logits(views))
    assert found.dtype == torch.float64 and found.item() == pytest.approx(by_hand(logits(views)), rel=1e-12)


def test_bounds():
    same = logits(1)[0]
    assert jensen_shannon([same, same + 2.5, same]).item() == pytest.approx(0, abs=1e-12)
    # Certain of three different classes: log 3, the most there is, and nothing overflows.
    apart = [torch.eye(3)[k].repeat(2, 1) * 1000 for k in range(3)]
    assert jensen_shannon(apart).item() == pytest.approx(math.log(3), rel=1e-6)
    assert jensen_shannon([view.bfloat16() for view in logits()]).dtype == torch.float32


def test_gradients():
    views = [view.requires_grad_() for view in logits(n=2, classes=3)]
    assert torch.autograd.gradcheck(lambda *given: jensen_shannon(given), views)
