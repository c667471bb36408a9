"""Partial FC (An et al., "Killing Two Birds with One Stone", CVPR 2022): identities by the million.

The class weights are split over the ranks of a run, every rank sees the embeddings of all, and each step takes the
softmax over the true classes and a random sample of the others. A step needs memory and time for the sample only; the
classes that are not in it stay as they are, with their momentum.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from lrface.compiling import not_compiled
from lrface.errors import UsageError
from lrface.heads.base import Head, HeadLoss, at_least_float32, check_range, check_sizes
from lrface.heads.margin import MarginHead, sum_over_ranks, unit

# Rows that are drawn from one seed at the start, so that the weights do not depend on how they are split.
BLOCK = 65_536


def _place() -> tuple[int, int]:
    """This process's number and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class _OfAllRanks(torch.autograd.Function):
    """Embeddings [n, d] of every rank -> [ranks n, d] of all, in the order of the ranks.

    Every rank computes the same loss L from all embeddings, and the gradient of its own classes' part of it; the sum of
    these parts is L's. It is given back times the number of ranks, because the trainer averages over them.
    """

    @staticmethod
    def forward(context: Any, own: Tensor) -> Tensor:
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        ranks = dist.get_world_size()
        own = torch.empty_like(gradient[: len(gradient) // ranks])
        dist.reduce_scatter_tensor(own, gradient.contiguous())
        return own * ranks


class _SumOfShards(torch.autograd.Function):
    """The sum over ranks of something that each computes from its classes; its gradient to each is that to the sum."""

    @staticmethod
    def forward(context: Any, own: Tensor) -> Tensor:
        total = own.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient


class PartialHead(Head):
    """A margin head over a sample of the classes, whose weights are split over the ranks of the run.

    Rank r of R holds classes ``identities r // R`` to ``identities (r + 1) // R``. A step's classes are, in each rank,
    those of its classes that the batch of all ranks shows, and as many others, drawn without repetition, as make
    ``sample_share`` of the rank's classes. With a share of 1 this is the head itself, to rounding.

    Its weights have no gradient: :attr:`sampled` stands for them in the optimiser, and :meth:`attach` lets the optimiser
    move the step's classes. SGD and AdamW are known; AdamW's bias correction counts the steps of each class.

    Args:
        embedding_size: d, width of the embedding.
        identities: number of classes of all ranks.
        inner: the head whose margin it is, without weights (:func:`lrface.heads.build_margin`).
        sample_share: share of the classes in a step, in (0, 1]; 0.1 in the paper.

    Attributes:
        weight: float32 [classes of this rank, d]; saved apart from the other tensors, see :meth:`rows`.
        first: the number of its first class.
        sampled: parameter [k, d], with the gradient of the k classes of the step.

    Raises:
        UsageError: a share outside (0, 1], fewer classes than ranks, a head without a softmax.
    """

    weight: Tensor
    sampling: Tensor

    def __init__(self, embedding_size: int, identities: int, inner: MarginHead, sample_share: float = 0.1):
        super().__init__()
        check_sizes(embedding_size, identities)
        check_range("sample_share", sample_share, 0, 1, "(]")
        if not inner.softmax:
            raise UsageError(
                f"head.of: {type(inner).__name__} is no softmax over the classes, and a sample of its classes would be "
                "another loss; take cosface, arcface or another head with a softmax"
            )
        self.rank, self.ranks = _place()
        if identities < self.ranks:
            raise UsageError(
                f"{identities} identities cannot be split over {self.ranks} ranks; take the head itself"
            )
        self.identities = identities
        self.inner = inner
        self.sample_share = sample_share
        self.first = identities * self.rank // self.ranks
        last = identities * (self.rank + 1) // self.ranks
        seed = int(torch.randint(2**62, (), device="cpu"))
        self.register_buffer("sampling", torch.tensor([seed, 0]))  # the seed and how often was drawn
        self.register_buffer("weight", torch.empty(last - self.first, embedding_size), persistent=False)
        self._initialise(seed)
        self.sampled = nn.Parameter(torch.empty(0, embedding_size))
        self.sampled.sharded = True  # type: ignore[attr-defined]
        self.chosen = torch.empty(0, dtype=torch.int64)  # the rows of ``weight`` that ``sampled`` stands for
        self.state: dict[str, Tensor] = {}  # of the optimiser: a row a class
        if self.ranks > 1:
            for parameter in inner.parameters():  # as in _OfAllRanks: each rank has a part of its gradient
                parameter.register_hook(lambda gradient: gradient * self.ranks)

    def _initialise(self, seed: int) -> None:
        if self.weight.is_meta:
            return
        last = self.first + len(self.weight)
        for block in range(self.first // BLOCK, (last - 1) // BLOCK + 1):
            generator = torch.Generator().manual_seed(seed ^ block)
            count = min(BLOCK, self.identities - block * BLOCK)
            rows = torch.empty(count, self.weight.shape[1]).normal_(std=0.01, generator=generator)
            low, high = max(self.first, block * BLOCK), min(last, block * BLOCK + count)
            self.weight[low - self.first : high - self.first] = rows[
                low - block * BLOCK : high - block * BLOCK
            ]

    def _choose(self, own: Tensor) -> Tensor:
        """The rows of the step, int64 [k], rising: the true classes ``own`` and others."""
        count = len(self.weight)
        wanted = max(1, round(self.sample_share * count))
        if wanted == count:
            return torch.arange(count, device=own.device)
        true = torch.unique(own)
        if len(true) >= wanted:
            return true
        entropy = (*self.sampling.tolist(), self.first)
        seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)
        generator = torch.Generator(own.device).manual_seed(seed)
        order = torch.rand(count, generator=generator, device=own.device)
        order[true] = 2.0
        return order.topk(wanted).indices.sort().values

    # Its shapes change with the labels, and the ranks meet inside.
    @not_compiled
    def loss(self, embeddings: Tensor, labels: Tensor) -> HeadLoss:
        """The loss of the batch of all ranks, the same on each: embeddings float [n, d], labels int64 [n] of this rank.

        Every rank must have as many. A backward pass adds to the gradient of ``sampled``.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = at_least_float32(embeddings)
            if self.ranks > 1:
                embeddings = _OfAllRanks.apply(embeddings)
                every = [torch.empty_like(labels) for _ in range(self.ranks)]
                dist.all_gather(every, labels.contiguous())
                labels = torch.cat(every)
            with torch.no_grad():
                own = labels - self.first
                here = (own >= 0) & (own < len(self.weight))
                rows = self._choose(own[here])
                target = torch.where(here, torch.searchsorted(rows, own), -1)
                if self.training:
                    self.sampling[1] += 1
            classes = self.weight.index_select(0, rows).to(embeddings.dtype)
            if torch.is_grad_enabled():
                classes.requires_grad_().register_post_accumulate_grad_hook(
                    lambda leaf: self._take_gradient(rows, leaf)
                )
            norms = embeddings.norm(dim=1)
            cosine = F.linear(unit(embeddings, norms), F.normalize(classes))
            if self.training:
                statistics = self.inner.statistics(cosine, target, norms)
                if len(statistics):
                    self.inner.update(sum_over_ranks(statistics))
            true_cosine = None
            if self.inner.needs_target_cosine:
                true_cosine = sum_over_ranks(_of_true_class(cosine.detach(), target))
            logits = self.inner.margin(cosine, target, norms, true_cosine)
            loss, correct = self._softmax(logits, target)
            logs = self.inner.logs(norms)
            penalty = self.inner.penalty(embeddings, classes, target)
            if penalty is not None:
                penalty = self._sum(penalty).mean()
                loss = loss + penalty
                logs["penalty"] = penalty.detach()
            return HeadLoss(loss, correct.float().mean(), logs)

    def _sum(self, own: Tensor) -> Tensor:
        return _SumOfShards.apply(own) if self.ranks > 1 else own

    def _softmax(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy over the classes of all ranks, and whether each sample's largest logit is its own."""
        with torch.no_grad():
            largest = logits.max(1).values
            classes = torch.tensor(logits.shape[1], device=logits.device)
            if self.ranks > 1:
                dist.all_reduce(largest, dist.ReduceOp.MAX)
                dist.all_reduce(classes)
        smoothing = self.inner.label_smoothing
        parts = [(logits - largest[:, None]).exp().sum(1), _of_true_class(logits, target)]
        if smoothing:
            parts.append(logits.sum(1))
        exponentials, true, *total = self._sum(torch.stack(parts)).unbind()
        loss = largest + exponentials.log() - (1 - smoothing) * true
        if smoothing:
            loss = loss - smoothing * total[0] / classes
        return loss.mean(), true.detach() >= largest

    def _take_gradient(self, rows: Tensor, classes: Tensor) -> None:
        """After a backward pass: its gradient joins that of other parts of the same batch."""
        assert classes.grad is not None
        gradient = classes.grad.to(self.weight.dtype)
        classes.grad = None
        values = classes.detach().to(self.weight.dtype)
        if self.sampled.grad is not None:
            rows, place = torch.unique(torch.cat([self.chosen, rows]), return_inverse=True)
            both = torch.cat([self.sampled.grad, gradient])
            gradient = both.new_zeros(len(rows), both.shape[1]).index_add_(0, place, both)
            values = self.weight.index_select(0, rows)
        self.chosen = rows
        self.sampled.data = values
        self.sampled.grad = gradient

    def attach(self, optimiser: torch.optim.Optimizer) -> None:
        """Let each step of ``optimiser``, which has ``sampled`` among its parameters, move the step's classes.

        Raises:
            UsageError: it is neither SGD nor AdamW.
        """
        if not isinstance(optimiser, (torch.optim.SGD, torch.optim.AdamW)):
            raise UsageError(
                f"head partial moves its classes by sgd or adamw; found {type(optimiser).__name__.lower()}"
            )
        optimiser.register_step_pre_hook(lambda used, _arguments, _keywords: self._step(used))

    @torch.no_grad()
    def _step(self, optimiser: torch.optim.Optimizer) -> None:
        gradient = self.sampled.grad
        if gradient is None:
            return
        # The optimiser itself has nothing to do with what has no gradient.
        self.sampled.grad = None
        group = next(g for g in optimiser.param_groups if any(p is self.sampled for p in g["params"]))
        # What a fused optimiser is told of a scaled gradient and of one that is not finite.
        scale, bad = getattr(optimiser, "grad_scale", None), getattr(optimiser, "found_inf", None)
        if scale is not None:
            gradient = gradient / scale
        rows, before = self.chosen, self.sampled.data
        after, state = (_adamw if "betas" in group else _sgd)(group, before, gradient, self._state_of)
        for name, (old, new) in {"weight": (before, after), **state}.items():
            kept = new if bad is None else torch.where(bad > 0, old, new)
            (self.weight if name == "weight" else self.state[name]).index_copy_(0, rows, kept)
            if name == "weight":  # whoever looks for weights that are not finite looks at parameters
                self.sampled.data = kept

    def _state_of(self, name: str, wide: bool = True) -> Tensor:
        """The step's rows of the optimiser's ``name``, which is 0 before a class's first step."""
        if name not in self.state:
            shape = self.weight.shape if wide else self.weight.shape[:1]
            self.state[name] = self.weight.new_zeros(shape)
        return self.state[name].index_select(0, self.chosen)

    def rows(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of this rank's classes, float32, a row a class: weights and the optimiser's state."""
        return {"weight": self.weight, **self.state}

    def load_rows(self, rows: dict[str, Tensor]) -> None:
        """Take ``rows()`` of a checkpoint, cut to this rank's classes."""
        for name, values in rows.items():
            values = values.to(self.weight.device)
            if name == "weight":
                self.weight = values
            else:
                self.state[name] = values

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}sampled"]

    def _load_from_state_dict(
        self, state: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)
        missing[:] = [key for key in missing if key != f"{prefix}sampled"]

    def extra_repr(self) -> str:
        last = self.first + len(self.weight)
        return f"classes {self.first} to {last} of {self.identities}, sample_share={self.sample_share}"


def _of_true_class(values: Tensor, target: Tensor) -> Tensor:
    """The value [n] of each row [n, c] at its true class, 0 where that is elsewhere."""
    return torch.where(target >= 0, values.gather(1, target.clamp_min(0)[:, None])[:, 0], 0.0)


def _sgd(group: dict[str, Any], weight: Tensor, gradient: Tensor, state_of: Any) -> Any:
    """PyTorch's SGD on some rows: their new weights, and the old and new of each state."""
    gradient = gradient + group["weight_decay"] * weight
    state = {}
    if group["momentum"]:
        old = state_of("momentum_buffer")
        new = group["momentum"] * old + gradient
        state["momentum_buffer"] = (old, new)
        gradient = gradient + group["momentum"] * new if group["nesterov"] else new
    return weight - group["lr"] * gradient, state


def _adamw(group: dict[str, Any], weight: Tensor, gradient: Tensor, state_of: Any) -> Any:
    """PyTorch's AdamW on some rows, each of which counts its own steps."""
    low, high = group["betas"]
    old_first, old_second, old_steps = (
        state_of("exp_avg"),
        state_of("exp_avg_sq"),
        state_of("step", wide=False),
    )
    first = low * old_first + (1 - low) * gradient
    second = high * old_second + (1 - high) * gradient.square()
    steps = old_steps + 1
    size = group["lr"] / _unseen(low, steps)
    correction = _unseen(high, steps).sqrt()
    moved = size[:, None] * first / (second.sqrt() / correction[:, None] + group["eps"])
    state = {
        "exp_avg": (old_first, first),
        "exp_avg_sq": (old_second, second),
        "step": (old_steps, steps),
    }
    return weight * (1 - group["lr"] * group["weight_decay"]) - moved, state


def _unseen(beta: float, steps: Tensor) -> Tensor:
    """1 - beta^steps, without cancellation in the first steps."""
    return -torch.expm1(steps * math.log(beta)) if beta else torch.ones_like(steps)
