"""Which images an epoch shows and how often: every image once, identities alike, P x K batches, weights, caps.

An epoch's order is a function of (seed, epoch) and of the labels, nothing else, so that a run can go on at any step
with any number of workers. Batch b of an epoch is ``order[b * batch_size : (b + 1) * batch_size]``; images at the
end of an order that fill no batch are left out.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lrface.errors import LrfaceError, UsageError
from lrface.registry import nearest

Order = NDArray[np.int64]

KINDS = ("shuffle", "class_balanced", "weighted", "identities")
WEIGHTS = ("power", "effective_number")


@dataclass(frozen=True)
class Sampling:
    """How often the images of each identity are shown.

    kind:
        - "shuffle": an epoch shows every image once (with ``maximum``: at most so many of an identity, chosen anew
          each epoch);
        - "class_balanced": an epoch shows as many images as there are, every identity equally often up to one image;
        - "weighted": as many images as there are; an image of an identity with n images is shown with a frequency in
          proportion to its weight: n ** -beta with ``weights`` "power" (0 is "shuffle", 1 is "class_balanced",
          0.5 the square-root sampling of Mahajan et al., arXiv:1805.00932), or (1 - beta) / (1 - beta ** n) with
          "effective_number" (Cui et al., CVPR 2019, arXiv:1901.05555, eq. 4);
        - "identities": batches of ``identities`` different identities with ``images`` images of each, one identity
          after the other (P x K; Hermans et al., arXiv:1703.07737). An epoch has as many batches as "shuffle" would;
          identities come in rounds that show each once (those left over where the number of identities is no
          multiple of ``identities`` differ each round).
    beta, weights: of "weighted".
    identities, images: P and K of "identities"; P * K is the batch size.
    maximum: most images of an identity in an epoch, of "shuffle" and "weighted"; an epoch is shorter by it.
    minimum: identities with fewer images are not trained on at all.

    How often is exact, not by chance: an identity whose share is 3.7 images of an epoch gets 3 or 4. Its images are
    gone through in an order drawn anew each epoch, none a second time before all were shown; where fewer exist than
    are to be shown (in an epoch, or K in a batch), they are repeated.

    Raises:
        UsageError: an unknown kind, a value out of range, or one that the kind does not use.
    """

    kind: str = "shuffle"
    beta: float | None = None
    weights: str = "power"
    identities: int | None = None
    images: int | None = None
    maximum: int | None = None
    minimum: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(
                f"data.sampling.kind must be one of {', '.join(KINDS)}; found {self.kind!r}{nearest(self.kind, KINDS)}"
            )
        used = {
            "beta": ("weighted",),
            "identities": ("identities",),
            "images": ("identities",),
            "maximum": ("shuffle", "weighted"),
        }
        for field, kinds in used.items():
            if getattr(self, field) is not None and self.kind not in kinds:
                raise UsageError(
                    f"data.sampling.{field} belongs to kind {' and '.join(kinds)}, not to {self.kind}; remove it"
                )
        if self.weights not in WEIGHTS:
            raise UsageError(
                f"data.sampling.weights must be power or effective_number; found {self.weights!r}"
            )
        if self.weights != "power" and self.kind != "weighted":
            raise UsageError(f"data.sampling.weights belongs to kind weighted, not to {self.kind}; remove it")
        if self.kind == "weighted":
            if self.beta is None:
                raise UsageError(
                    "data.sampling.beta is missing: kind weighted needs it, for example beta: 0.5"
                )
            below = 1.0 if self.weights == "effective_number" else float("inf")
            if not 0 <= self.beta < below:
                limit = " and below 1" if self.weights == "effective_number" else ""
                raise UsageError(
                    f"data.sampling.beta must be at least 0{limit} with weights {self.weights}; found {self.beta}"
                )
        for field, least in (("identities", 2), ("images", 1)):
            value = getattr(self, field)
            if self.kind == "identities" and (value is None or value < least):
                raise UsageError(
                    f"data.sampling.{field} must be at least {least} for kind identities; found {value}"
                )
        for field in ("maximum", "minimum"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise UsageError(f"data.sampling.{field} must be at least 1; found {value}")

    @property
    def batch_size(self) -> int | None:
        """The batch size that the kind sets, None where it takes any."""
        if self.identities is None or self.images is None:
            return None
        return self.identities * self.images

    def check_batch_size(self, batch_size: int) -> None:
        """Raises UsageError where P x K is not ``batch_size`` (of all processes together)."""
        if self.batch_size not in (None, batch_size):
            raise UsageError(
                f"data.sampling: {self.identities} identities with {self.images} images each are batches of "
                f"{self.batch_size}, data.batch_size is {batch_size}; set data.batch_size={self.batch_size}"
            )


class EpochOrders:
    """The order of every epoch of one data set.

    Args:
        sampling: how images are chosen.
        labels: int [n], the identity of each image.
        seed: of the whole run.

    Raises:
        LrfaceError: fewer identities than a P x K batch needs.
    """

    def __init__(self, sampling: Sampling, labels: NDArray[np.int64], seed: int):
        self.sampling = sampling
        self.seed = seed
        self.labels = np.asarray(labels, dtype=np.int64)
        n = len(self.labels)
        self.sizes = np.bincount(self.labels)
        self.present = np.flatnonzero(self.sizes)  # labels may have gaps here; nothing is drawn for them
        self.starts = np.concatenate(([0], np.cumsum(self.sizes)[:-1]))
        self._expected: NDArray[np.float64] | None = None
        if sampling.kind == "identities":
            assert sampling.identities is not None and sampling.batch_size is not None
            if len(self.present) < sampling.identities:
                raise LrfaceError(
                    f"the data holds {len(self.present)} identities, fewer than data.sampling.identities="
                    f"{sampling.identities} of a batch; set it to {len(self.present)} or less"
                )
            self.length = n // sampling.batch_size * sampling.batch_size
        elif sampling.kind == "shuffle" and sampling.maximum is None:
            self.length = n
        else:
            self._expected = self._shares(n)
            # Shares add up to a whole number but for rounding.
            self.length = int(np.floor(self._expected.sum() + 1e-6))

    def _shares(self, n: int) -> NDArray[np.float64]:
        """How many images of each label an epoch shows on average: float64 [labels]."""
        sizes = self.sizes.astype(np.float64)
        if self.sampling.kind == "shuffle":
            shares = sizes
        else:
            weights = np.zeros_like(sizes)
            counts, beta = sizes[self.present], self.sampling.beta
            if self.sampling.kind == "class_balanced":
                weights[self.present] = 1.0 / counts
            elif self.sampling.weights == "power":
                assert beta is not None
                # Scaled by the largest identity, so that no power underflows.
                weights[self.present] = (counts / counts.max()) ** -beta
            else:
                assert beta is not None
                weights[self.present] = (1.0 - beta) / -np.expm1(counts * np.log(beta)) if beta > 0 else 1.0
            shares = sizes * weights
            shares *= n / shares.sum()
        if self.sampling.maximum is not None:
            shares = np.minimum(shares, self.sampling.maximum)
        return shares

    def _counts(self, random: np.random.Generator) -> NDArray[np.int64]:
        """Images of each label in one epoch: the shares rounded down or up, ``length`` in all (systematic sampling)."""
        assert self._expected is not None
        counts = np.floor(self._expected + 1e-6)
        left = int(self.length - counts.sum())
        rest = np.maximum(self._expected - counts, 0.0)
        if left > 0:
            order = random.permutation(len(rest))
            reached = np.cumsum(rest[order])
            reached *= left / reached[-1]
            reached[-1] = left
            steps = np.floor(reached + random.random())
            counts[order] += np.diff(steps, prepend=0.0)
        return counts.astype(np.int64)

    def _grouped(self, random: np.random.Generator) -> Order:
        """All images, label by label, each label's in random order."""
        shuffled = random.permutation(len(self.labels))
        return shuffled[np.argsort(self.labels[shuffled], kind="stable")]

    def order(self, epoch: int) -> Order:
        """Indices of the images of ``epoch``, int64 [length]."""
        random = np.random.default_rng((self.seed, epoch))
        if self.sampling.kind == "identities":
            return self._identity_batches(random)
        if self._expected is None:
            return random.permutation(self.length)
        grouped = self._grouped(random)
        counts = self._counts(random)
        chosen = np.repeat(np.arange(len(counts)), counts)
        place = np.arange(len(chosen)) - np.repeat(np.cumsum(counts) - counts, counts)
        found = grouped[self.starts[chosen] + place % self.sizes[chosen]]
        return found[random.permutation(len(found))]

    def _identity_batches(self, random: np.random.Generator) -> Order:
        people, each = self.sampling.identities, self.sampling.images
        assert people is not None and each is not None
        grouped = self._grouped(random)
        batches = self.length // (people * each)
        whole = len(self.present) // people * people  # identities of a round that fill batches
        rounds = -(-batches * people // whole)
        # Each row is a round: all identities in random order.
        table = random.permuted(np.tile(self.present, (rounds, 1)), axis=1)[:, :whole]
        chosen = table.reshape(-1)[: batches * people]
        turn = np.arange(len(chosen)) // whole
        place = turn[:, None] * each + np.arange(each)
        return grouped[self.starts[chosen][:, None] + place % self.sizes[chosen][:, None]].reshape(-1)
