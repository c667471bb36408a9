"""Degradation policies by name, as the block ``degrade`` of a recipe gives them.

    clean         mirrored and cropped only
    resolution    part of the batch loses resolution (paper 001, section 4.1); what a block without a name means
    corruptions   part of the batch is corrupted, each image by a corruption and severity of its own
    augmix        chains of operations mixed with the image (Hendrycks et al., ICLR 2020)
    gaussian_noise, speckle_noise  part of the batch gets noise (Rusak et al., ECCV 2020)
    pixel_mask    pixels go missing (Ravula et al., NeurIPS 2021)
    gaussian_blur a Gaussian of a given kernel (the same)
    mixed         the degraded images of a batch are shared among several policies
    chain         degraded images go through several policies, one after another

All but ``clean`` take ``clean_share``, the share of each batch that stays clean; all take ``mirror``, and all but
``resolution`` take ``crop_padding``.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrface.degrade import corruptions
from lrface.degrade.augmix import AugMixPolicy
from lrface.degrade.framing import Frame, Framing
from lrface.degrade.noise_policy import GaussianNoisePolicy, SpeckleNoisePolicy
from lrface.degrade.operators import GaussianBlurPolicy, PixelMaskPolicy
from lrface.degrade.policy import Policy, ResolutionPolicy, check_share, rows_of
from lrface.errors import UsageError
from lrface.registry import Registry

POLICIES: Registry[Policy] = Registry("degrade")

SHARED = 1 << 20
"""Values from which on an operation is worth being shared among threads on the CPU."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Operations take one thread each. On a few small images several threads mostly wait for each other, a hundred times
    an image; on a busy machine that lasts many times as long as the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass
class CleanParameters:
    """See :class:`~lrface.degrade.framing.Frame`."""

    frame: Frame


class CleanPolicy(Policy):
    """Nothing is degraded. Arguments: see :class:`~lrface.degrade.framing.Framing`."""

    def __init__(self, mirror: float = 0.5, crop_padding: int = 0):
        self.framing = Framing(mirror, crop_padding)

    def sample(self, n: int, full_size: int, generator: torch.Generator) -> CleanParameters:
        return CleanParameters(self.framing.sample(n, generator))

    def frame(self, images: Tensor, parameters: CleanParameters) -> Tensor:
        return self.framing.apply(images, parameters.frame)

    def degrade(self, hq: Tensor, parameters: CleanParameters) -> Tensor:
        return hq


@dataclass
class CorruptedParameters:
    """What happens to each of n images. All tensors live on the CPU.

    frame: how they are mirrored and cropped.
    name: int64 [n], index into the policy's ``names``.
    severity: int64 [n], 1 to 5, or 0 for an image that stays clean.
    seed: int64 [n]; every random number of an image's corruption is a function of it.
    """

    frame: Frame
    name: Tensor
    severity: Tensor
    seed: Tensor


class CorruptionPolicy(Policy):
    """Part of each batch stays clean, each other image is corrupted; uniform over corruptions and severities.

    Args:
        set: constants, a key of :data:`lrface.degrade.corruptions.SETS` for images of three channels.
        names: the corruptions; by default the 15 of ImageNet-C.
        severities: 1 to 5; one that is listed twice comes twice as often.
        clean_share: share of the batch that stays clean, exact up to rounding (0.5 in paper 001).
        mirror, crop_padding: see :class:`~lrface.degrade.framing.Framing`.

    Raises:
        UsageError: an unknown set or corruption, a severity outside of 1 to 5, a share outside [0, 1].
    """

    def __init__(
        self,
        set: str = "face",
        names: Sequence[str] | None = None,
        severities: Sequence[int] = (1, 2, 3, 4, 5),
        clean_share: float = 0.5,
        mirror: float = 0.5,
        crop_padding: int = 0,
    ):
        check_share("clean_share", clean_share)
        if corruptions.check_set(set).channels != 3:
            raise UsageError(f"degrade.set {set!r} is for grey images; training images have 3 channels")
        names = corruptions.CORRUPTIONS if names is None else names
        if isinstance(names, str) or not isinstance(names, Sequence) or not names:
            raise UsageError(f"degrade.names must list at least one corruption; found {names!r}")
        if not isinstance(severities, Sequence) or not severities:
            raise UsageError(f"degrade.severities must list at least one of 1 to 5; found {severities!r}")
        for severity in severities:
            if isinstance(severity, bool) or severity not in (1, 2, 3, 4, 5):
                raise UsageError(f"degrade.severities must be whole numbers, 1 to 5; found {severity!r}")
        self.set = set
        self.names = tuple(corruptions.check_name(name, set) for name in names)
        self.severities = tuple(severities)
        self.clean_share = clean_share
        self.framing = Framing(mirror, crop_padding)

    def sample(self, n: int, full_size: int, generator: torch.Generator) -> CorruptedParameters:
        frame = self.framing.sample(n, generator)
        order = torch.randperm(n, generator=generator)
        name = torch.randint(len(self.names), (n,), generator=generator)
        severity = torch.tensor(self.severities)[
            torch.randint(len(self.severities), (n,), generator=generator)
        ]
        severity[order[: round(n * self.clean_share)]] = 0
        seed = torch.randint(-(2**63), 2**63 - 1, (n,), generator=generator)
        return CorruptedParameters(frame, name, severity, seed)

    def frame(self, images: Tensor, parameters: CorruptedParameters) -> Tensor:
        return self.framing.apply(images, parameters.frame)

    def degrade(self, hq: Tensor, parameters: CorruptedParameters) -> Tensor:
        corrupted = parameters.severity > 0
        chosen = parameters.name[corrupted].unique().tolist()
        if not chosen:
            return hq
        degraded = hq.clone()
        size = hq.shape[-2], hq.shape[-1]
        # Images of one corruption and severity are worked on together.
        values = int(corrupted.sum()) * hq[0].numel() // (len(chosen) * len(set(self.severities)))
        with one_thread() if hq.device.type == "cpu" and values < SHARED else nullcontext():
            for number in chosen:
                rows = (corrupted & (parameters.name == number)).nonzero().squeeze(1)
                own = corruptions.CorruptionParameters(
                    self.names[number], self.set, size, parameters.severity[rows], parameters.seed[rows]
                )
                index = rows.to(hq.device)
                degraded[index] = corruptions.apply(hq[index].contiguous(), own)
        return degraded


@dataclass
class MixedParameters:
    """What happens to each of n images.

    frame: how they are mirrored and cropped.
    part: int64 [n] on the CPU, index into the policy's ``parts``, or -1 for an image that stays clean.
    parts: what each part drew for all n images.
    """

    frame: Frame
    part: Tensor
    parts: tuple[Any, ...]


# These follow from the policy that a part belongs to.
_OF_THE_WHOLE = ("mirror", "crop_padding")


def _build_part(part: Any, number: int, kind: str, more: Sequence[str] = ()) -> Policy:
    where = f"degrade.parts.{number}"
    if isinstance(part, str):
        part = {"name": part}
    if not isinstance(part, Mapping) or not isinstance(part.get("name"), str):
        raise UsageError(f"{where} must be a mapping with a name and arguments; found {part!r}")
    name, arguments = part["name"], {key: value for key, value in part.items() if key != "name"}
    if name == "clean":
        raise UsageError(f"{where}: a part must degrade; for clean images set degrade.clean_share")
    for key in (*_OF_THE_WHOLE, *more):
        if key in arguments:
            raise UsageError(f"{where}.{key}: give degrade.{key} of the {kind} policy instead")
    arguments.pop("share", None)
    try:
        return build_policy(name, **{"clean_share": 0.0, **arguments, "mirror": 0.0})
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error


def _check_parts(parts: Any) -> None:
    if isinstance(parts, (str, Mapping)) or not isinstance(parts, Sequence) or not parts:
        raise UsageError(
            "degrade.parts must list policies, such as [{name: resolution}, {name: corruptions}]; "
            f"found {parts!r}"
        )


class MixedPolicy(Policy):
    """Part of each batch stays clean, the other images are shared among several policies.

    Args:
        parts: for each policy a mapping with its ``name``, its ``share`` of the degraded images (1 by default; shares are
            relative to each other) and its arguments but clean_share, mirror and crop_padding.
        clean_share: share of the batch that stays clean. All shares are exact up to rounding.
        mirror, crop_padding: see :class:`~lrface.degrade.framing.Framing`.

    Raises:
        UsageError: no parts, an unknown or wrong part by its place, a share below 0, all shares 0.
    """

    def __init__(
        self,
        parts: Sequence[Mapping[str, Any]] = (),
        clean_share: float = 0.5,
        mirror: float = 0.5,
        crop_padding: int = 0,
    ):
        check_share("clean_share", clean_share)
        _check_parts(parts)
        self.parts = [_build_part(part, n, "mixed", ["clean_share"]) for n, part in enumerate(parts)]
        shares = [1.0 if isinstance(part, str) else part.get("share", 1.0) for part in parts]
        for number, share in enumerate(shares):
            if isinstance(share, bool) or not isinstance(share, (int, float)) or not share >= 0:
                raise UsageError(
                    f"degrade.parts.{number}.share must be a number of 0 or more; found {share!r}"
                )
        if not sum(shares) > 0:
            raise UsageError("degrade.parts: at least one share must be above 0")
        self.shares = tuple(share / sum(shares) for share in shares)
        self.clean_share = clean_share
        self.framing = Framing(mirror, crop_padding)

    def sample(self, n: int, full_size: int, generator: torch.Generator) -> MixedParameters:
        frame = self.framing.sample(n, generator)
        order = torch.randperm(n, generator=generator)
        part = torch.full((n,), -1)
        first = clean = round(n * self.clean_share)
        reached = 0.0
        for number, share in enumerate(self.shares):
            reached += share
            last = clean + round((n - clean) * reached)
            part[order[first:last]] = number
            first = last
        parts = tuple(policy.sample(n, full_size, generator) for policy in self.parts)
        return MixedParameters(frame, part, parts)

    def frame(self, images: Tensor, parameters: MixedParameters) -> Tensor:
        return self.framing.apply(images, parameters.frame)

    def degrade(self, hq: Tensor, parameters: MixedParameters) -> Tensor:
        if bool((parameters.part < 0).all()):
            return hq
        degraded = hq.clone()
        for number, policy in enumerate(self.parts):
            rows = (parameters.part == number).nonzero().squeeze(1)
            if len(rows):
                index = rows.to(hq.device)
                degraded[index] = policy.degrade(hq[index], rows_of(parameters.parts[number], rows))
        return degraded


@dataclass
class ChainParameters:
    """What happens to each of n images.

    frame: how they are mirrored and cropped.
    clean: bool [n] on the CPU.
    parts: what each part drew for all n images.
    """

    frame: Frame
    clean: Tensor
    parts: tuple[Any, ...]


class ChainPolicy(Policy):
    """Part of each batch stays clean, the other images go through several policies in the order they are given.

    Args:
        parts: for each policy a mapping with its ``name`` and its arguments but mirror and crop_padding; its
            ``clean_share``, 0 by default, is the share of the batch that it passes on as it is.
        clean_share: share of the batch that stays clean, exact up to rounding.
        mirror, crop_padding: see :class:`~lrface.degrade.framing.Framing`.

    Raises:
        UsageError: no parts, an unknown or wrong part by its place.
    """

    def __init__(
        self,
        parts: Sequence[Mapping[str, Any]] = (),
        clean_share: float = 0.5,
        mirror: float = 0.5,
        crop_padding: int = 0,
    ):
        check_share("clean_share", clean_share)
        _check_parts(parts)
        self.parts = [_build_part(part, n, "chain", ["share"]) for n, part in enumerate(parts)]
        self.clean_share = clean_share
        self.framing = Framing(mirror, crop_padding)

    def sample(self, n: int, full_size: int, generator: torch.Generator) -> ChainParameters:
        frame = self.framing.sample(n, generator)
        clean = torch.zeros(n, dtype=torch.bool)
        clean[torch.randperm(n, generator=generator)[: round(n * self.clean_share)]] = True
        return ChainParameters(
            frame, clean, tuple(policy.sample(n, full_size, generator) for policy in self.parts)
        )

    def frame(self, images: Tensor, parameters: ChainParameters) -> Tensor:
        return self.framing.apply(images, parameters.frame)

    def degrade(self, hq: Tensor, parameters: ChainParameters) -> Tensor:
        rows = (~parameters.clean).nonzero().squeeze(1)
        if not len(rows):
            return hq
        degraded = hq.clone()
        index = rows.to(hq.device)
        passed = hq[index]
        for policy, own in zip(self.parts, parameters.parts, strict=True):
            passed = policy.degrade(passed, rows_of(own, rows))
        degraded[index] = passed
        return degraded


POLICIES.register("clean", CleanPolicy)
POLICIES.register("resolution", ResolutionPolicy)
POLICIES.register("corruptions", CorruptionPolicy)
POLICIES.register("augmix", AugMixPolicy)
POLICIES.register("gaussian_noise", GaussianNoisePolicy)
POLICIES.register("speckle_noise", SpeckleNoisePolicy)
POLICIES.register("pixel_mask", PixelMaskPolicy)
POLICIES.register("gaussian_blur", GaussianBlurPolicy)
POLICIES.register("mixed", MixedPolicy)
POLICIES.register("chain", ChainPolicy)


def build_policy(name: str, **arguments: Any) -> Policy:
    """The policy ``name``.

    Raises:
        UsageError: unknown name or arguments, or a value that the policy does not take.
    """
    return POLICIES.build(name, **arguments)
