"""PGD and DDN as foolbox has them, for lrface.attack_trials (paper 004, section 4.6 and appendix F, Tables 5 and 12)."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lrface.errors import LrfaceError

if TYPE_CHECKING:
    from lrface.attack_trials import Task


class _Module(nn.Module):
    """A classifier as foolbox wants it."""

    def __init__(self, scores: Callable[[Tensor], Tensor]):
        super().__init__()
        self.scores = scores

    def forward(self, images: Tensor) -> Tensor:
        return self.scores(images)


def import_foolbox() -> Any:
    """Raises LrfaceError naming the extra where foolbox is missing."""
    try:
        import foolbox
    except ImportError as error:
        raise LrfaceError(
            "the attacks pgd and ddn need foolbox, which is not installed: pip install 'lrface[attack]'"
        ) from error
    return foolbox


def _found(task: "Task", attack: Any, epsilon: float | None) -> Tensor:
    foolbox = import_foolbox()
    with torch.no_grad():
        place = task.scores(task.images[:1]).device
    model = foolbox.PyTorchModel(_Module(task.scores).eval(), bounds=(0, 1), device=place)
    torch.manual_seed(task.seed)  # foolbox draws PGD's start from PyTorch's own generator
    _, found, _ = attack(model, task.images.to(place), task.labels.to(place), epsilons=epsilon)
    return found.detach().float().cpu()


def pgd(task: "Task") -> Tensor:
    """Projected gradient descent (Madry et al., ICLR 2018) from a random start: 200 steps of a tenth of the size, which are
    the paper's 0.0001 within 0.001 (ImageNet) and 0.01 within 0.1 (MNIST; it takes 100 there, and saw no difference)."""
    attacks = import_foolbox().attacks
    kind = attacks.LinfPGD if task.norm == "linf" else attacks.L2PGD
    return _found(task, kind(abs_stepsize=task.size / 10, steps=task.steps or 200), task.size)


def ddn(task: "Task") -> Tensor:
    """DDN (Rony et al., CVPR 2019), which looks for the smallest perturbation that fools the classifier: 200 steps, the
    radius moved by 2 % each, for grey images (MNIST) by 5 %."""
    gamma = 0.05 if task.images.shape[1] == 1 else 0.02
    attack = import_foolbox().attacks.DDNAttack(init_epsilon=task.size, steps=task.steps or 200, gamma=gamma)
    return _found(task, attack, None)
