"""Adversarial Noise Training (paper 004, section 3.2.2): the classifier learns from noise that a generator learns to make
as harmful to it as noise of that length can be."""

import math
from typing import Any

import torch
from torch import Tensor

from lrface.data.dataset import as_float
from lrface.degrade.corruptions.draws import Draws
from lrface.degrade.policy import Policy
from lrface.degrade.rescaling import epsilon_for, rescale
from lrface.errors import UsageError
from lrface.heads import Head, PartialHead
from lrface.methods.base import Method, StepOutput, drawn, without_seed
from lrface.models.blocks import FaceBackbone
from lrface.models.noise import NoiseGenerator, build_noise_generator

CLEAN, STYLISED, CURRENT, REPLAYED = range(4)  # what becomes of an image


class AdversarialNoise(Method):
    """The head's loss on a batch that is part clean, part with the noise of a generator, part with noise of before.

    Each step first ascends: the generator moves by a step of Adam to where the classifier's loss is higher on the batch's
    images with its noise. The classifier is in eval mode then: no statistics move, and it gets no gradient. Then the
    classifier learns, in the trainer's step, from the noise of that generator, as it is now, and the generator gets no
    gradient. Noise lies on images as the policy framed and degraded them, is scaled to the length epsilon as it is after
    clipping to [0, 1], and comes from normal noise that is a function of the batch's seed.

    At regular intervals a fresh generator replaces the current one. The paper halts the training of the classifier while
    the fresh one is trained; here, so that a step costs the same at any time, it is trained against the classifier as that
    goes on learning, in the last ``fresh_share`` of an interval, while the current one stays as it is.

    On several ranks the gradient of the generator is that of all ranks' images.

    Args:
        encoder: backbone.
        head: one with all of its classes in this process.
        policy: frames images, and degrades them before noise is added; ``clean`` in the paper.
        generator: a name in :data:`lrface.models.noise.NOISE_GENERATORS`, or a mapping with a name and arguments.
        epsilon: length of the noise (L2 over an image's values in [0, 1]) for images of ``epsilon_at`` pixels a side;
            others get that of the same root mean square, epsilon * side / epsilon_at (see
            :func:`~lrface.degrade.rescaling.epsilon_for`). Paper: 135 for noise1x1, 70 for noise3x3, at 224; 10 at 28 on
            MNIST.
        learning_rate: of the generator's Adam, 1e-4 in the paper.
        restart_epochs, restart_steps: epochs or steps from one generator to the next (0.33 epochs in the paper); one of
            both at most, 0 for never.
        fresh_share: see above, above 0 up to 1.
        replay: whether states of before are used; without, the current generator gets their share (Table 4, w/o EP).
        replay_size: states kept at most, each 4 bytes a parameter. When it is full a state replaces a random one, so that
            those kept are a uniform sample of all that were ever saved. The log has their number and memory.
        save_steps: steps of ascent from one saved state to the next; the last state of a generator is always saved.
        clean_share, current_share, stylised_share: parts of the batch, exact up to rounding; the rest replays. 0.5, 0.3, 0
            in the paper; with stylised images 0.25, 0.225, 0.3. An image that replays gets a state of its own, drawn
            uniformly; while there is none yet, the current one.

    With a ``stylised_share`` a batch must have ``stylised``, the stylised version of each image: uint8 or float, shaped like
    ``image``.

    Raises:
        UsageError: a value out of range, a head that does not fit, an unknown generator.
    """

    splittable = False

    def __init__(
        self,
        encoder: FaceBackbone,
        head: Head,
        policy: Policy,
        generator: Any = "noise1x1",
        epsilon: float = 135.0,
        epsilon_at: int = 224,
        learning_rate: float = 1e-4,
        restart_epochs: float | None = None,
        restart_steps: int | None = None,
        fresh_share: float = 0.5,
        replay: bool = True,
        replay_size: int = 500,
        save_steps: int = 50,
        clean_share: float = 0.5,
        current_share: float = 0.3,
        stylised_share: float = 0.0,
    ):
        super().__init__()
        for name, value in (
            ("epsilon", epsilon),
            ("epsilon_at", epsilon_at),
            ("learning_rate", learning_rate),
            ("replay_size", replay_size),
            ("save_steps", save_steps),
            ("fresh_share", fresh_share),
        ):
            if not 0 < value < math.inf:
                raise UsageError(f"method.{name} must be above 0; found {value}")
        if fresh_share > 1:
            raise UsageError(f"method.fresh_share must be at most 1; found {fresh_share}")
        shares = {
            "clean_share": clean_share,
            "current_share": current_share,
            "stylised_share": stylised_share,
        }
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise UsageError(f"method.{name} must be between 0 and 1; found {share}")
        if sum(shares.values()) > 1 + 1e-9:
            raise UsageError(
                f"method.{', '.join(shares)} must come to 1 at most; found {sum(shares.values()):g}"
            )
        if clean_share + stylised_share > 1 - 1e-9:
            raise UsageError("method.clean_share and stylised_share leave no image for noise")
        if restart_epochs is not None and restart_steps is not None:
            raise UsageError("method: give restart_epochs or restart_steps, not both")
        if restart_epochs is None and restart_steps is None:
            restart_epochs = 0.33
        intervals: dict[str, Any] = {"restart_epochs": restart_epochs, "restart_steps": restart_steps}
        for name, value in intervals.items():
            if value is not None and not 0 <= value < math.inf:
                raise UsageError(f"method.{name} must be at least 0; found {value!r}")
        if isinstance(head, PartialHead):
            raise UsageError(
                "the method ant needs the loss over all classes before each step, which a partial head does not have in "
                "one process; choose a head such as cosface or softmax"
            )
        self.encoder = encoder
        self.head = head
        self.policy = policy
        self.generator, self.successor = (
            build_noise_generator(generator, encoder.channels).requires_grad_(False) for _ in range(2)
        )
        # Another run's seed gives another start.
        self.generator.reset(int(torch.randint(2**62, (), device="cpu")))
        self.epsilon = epsilon_for(encoder.input_size, epsilon, epsilon_at)
        self.learning_rate = learning_rate
        self.restart_epochs, self.restart_steps = restart_epochs, restart_steps
        self.fresh_share = fresh_share
        self.replay_size = replay_size if replay else 0
        self.save_steps = save_steps
        self.shares = (clean_share, stylised_share, current_share if replay else 1.0)
        if stylised_share:
            self.needs = (*self.needs, "stylised")
        self.optimisers = [self._adam(self.generator), self._adam(self.successor)]
        self.step = 0
        self.seen = 0  # states that were saved so far
        self.states = torch.empty(0, len(self.generator.state()))

    def _adam(self, generator: NoiseGenerator) -> torch.optim.Adam:
        return torch.optim.Adam(generator.parameters(), self.learning_rate)

    # ------------------------------------------------------------------------------------------------ state

    def get_extra_state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "seen": self.seen,
            "states": self.states.cpu(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.step, self.seen, self.states = state["step"], state["seen"], state["states"]
        for optimiser, own in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(own)

    # ------------------------------------------------------------------------------------------------- step

    @torch.no_grad()
    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        (parameters,) = drawn(batch, self.policy)
        degraded, hq = self.policy.apply(as_float(batch["image"]), parameters)
        roles, seeds = self._roles(batch)
        roles, seeds = roles.to(hq.device), seeds.to(hq.device)
        ready = {**without_seed(batch), "hq": hq}
        noisy = (roles >= CURRENT).nonzero().squeeze(1)
        clean, labels = degraded[noisy], batch["label"][noisy]
        if self.training:
            ready["adversarial"] = self._move(clean, labels, seeds[noisy], batch)
        kept = float(len(self.states))
        ready["replay_states"] = hq.new_tensor(kept)
        ready["replay_mib"] = hq.new_tensor(kept * self.states.shape[1] * 4 / 2**20)
        images = degraded.clone()
        images[noisy] = self._noised(clean, seeds[noisy], roles[noisy] == REPLAYED)
        if self.shares[1]:
            stylised = self.policy.frame(as_float(ready.pop("stylised")), parameters)
            chosen = (roles == STYLISED)[:, None, None, None]
            images = torch.where(chosen, stylised, images)
        return {**ready, "image": images}

    def forward(self, batch: dict[str, Any]) -> StepOutput:
        recognition = self.head.loss(self.encoder(batch["image"]), batch["label"])
        shown: dict[str, Tensor] = {
            key: batch[key] for key in ("adversarial", "replay_states", "replay_mib") if key in batch
        }
        return StepOutput(recognition.loss, {"accuracy": recognition.accuracy, **recognition.logs, **shown})

    def _roles(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """What becomes of each image of a rank's share, int64 [n] on the CPU, and the seed of its noise, int64 [n]."""
        count = len(batch["image"])
        rank, ranks = batch.get("part", (0, 1))
        total = count * ranks
        draws = Draws(torch.tensor([int(batch["seed"])]))
        order = draws.bits("ant order", total)[0].argsort(stable=True)
        roles = torch.full((total,), REPLAYED)
        first, reached = 0, 0.0
        for role, share in zip((CLEAN, STYLISED, CURRENT), self.shares, strict=True):
            reached = min(1.0, reached + share)
            last = round(total * reached)
            roles[order[first:last]] = role
            first = last
        own = slice(rank * count, (rank + 1) * count)
        return roles[own], draws.bits("ant noise", total)[0].long()[own]

    def noise(self, generator: NoiseGenerator, shape: torch.Size, seeds: Tensor, stream: str) -> Tensor:
        """Noise of ``generator`` for images of ``shape`` [n, c, h, w], a function of ``seeds`` int64 [n]."""
        with self.autocast():
            return generator(_normal(shape, seeds, stream))

    def _noised(self, images: Tensor, seeds: Tensor, replayed: Tensor) -> Tensor:
        """The images with the current generator's noise, or where ``replayed`` that of a saved state."""
        noise = self.noise(self.generator, images.shape, seeds, "noise")
        rows = replayed.nonzero().squeeze(1)
        if len(self.states) and len(rows):
            choice = Draws(seeds[rows]).bits("state", 1)[:, 0].long() % len(self.states)
            self.states = self.states.to(images.device)
            normal = _normal(images.shape, seeds[rows], "noise")
            with self.autocast():
                noise[rows] = self.generator.noise_of(self.states[choice], normal).to(noise)
        return rescale(images, noise, self.epsilon).images

    # --------------------------------------------------------------------------------------------- generator

    @property
    def interval(self) -> int:
        """Steps from one generator to the next, 0 for never."""
        if self.restart_steps is not None:
            return self.restart_steps
        if not self.restart_epochs:
            return 0
        if self.epoch_steps is None:
            raise UsageError("method.restart_epochs: nobody said how long an epoch is; give restart_steps")
        return max(1, round(self.restart_epochs * self.epoch_steps))

    def _move(self, images: Tensor, labels: Tensor, seeds: Tensor, batch: dict[str, Any]) -> Tensor:
        """Everything that happens to generators in a step; the classifier's loss, detached, that was ascended."""
        interval, seed = self.interval, int(batch["seed"])
        place = self.step % interval if interval else self.step
        window = max(1, round(interval * self.fresh_share))
        if interval and place == 0 and self.step:
            self._save(seed)
            self.generator, self.successor = self.successor, self.generator
            self.optimisers.reverse()
        fresh = bool(interval) and place >= interval - window
        if fresh and place == interval - window:
            self.successor.reset(seed)
            self.optimisers[1] = self._adam(self.successor)
        generator, optimiser = (
            (self.successor, self.optimisers[1]) if fresh else (self.generator, self.optimisers[0])
        )
        loss = self._ascend(generator, optimiser, images, labels, seeds)
        self.step += 1
        if not fresh and self.step % self.save_steps == 0:
            self._save(seed)
        return loss

    def _ascend(
        self,
        generator: NoiseGenerator,
        optimiser: torch.optim.Adam,
        images: Tensor,
        labels: Tensor,
        seeds: Tensor,
    ) -> Tensor:
        """A step of Adam up the loss of all ranks' images; the mean loss before it."""
        weights = list(generator.parameters())
        # Gradients, the loss and how many images they are of: sums, so that ranks may have different numbers of them.
        sums = torch.zeros(sum(weight.numel() for weight in weights) + 2, device=images.device)
        if len(images):
            loss, gradients = self._gradients(generator, images, labels, seeds)
            told = [*gradients, loss, sums.new_tensor(len(images))]
            sums = torch.cat([part.detach().float().flatten() for part in told])
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(sums)
        *means, mean_loss = (sums[:-1] / sums[-1].clamp_min(1)).split(
            [*(weight.numel() for weight in weights), 1]
        )
        for weight, mean in zip(weights, means, strict=True):
            weight.grad = -mean.view_as(weight)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return mean_loss[0]

    def _gradients(
        self, generator: NoiseGenerator, images: Tensor, labels: Tensor, seeds: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The sum of the images' losses and its gradient for the generator alone; no statistics move."""
        training = self.training
        self.eval()
        generator.requires_grad_(True)
        try:
            with torch.enable_grad():
                noise = self.noise(generator, images.shape, seeds, "ascent")
                noisy = rescale(images, noise, self.epsilon).images
                with self.autocast():
                    # A mean's gradient would be too small for half precision.
                    loss = self.head.loss(self.encoder(noisy), labels).loss * len(images)
                return loss, torch.autograd.grad(loss, list(generator.parameters()))
        finally:
            generator.requires_grad_(False)
            self.train(training)

    def _save(self, seed: int) -> None:
        """Keep the current generator's state: a uniform sample of all states so far (reservoir sampling)."""
        if not self.replay_size:
            return
        state = self.generator.state()[None].to(self.states.device)
        self.seen += 1
        if len(self.states) < self.replay_size:
            self.states = torch.cat([self.states, state])
            return
        place = int(Draws(torch.tensor([seed])).bits(f"ant place {self.seen}", 1)[0, 0]) % self.seen
        if place < self.replay_size:
            self.states[place] = state[0]


def _normal(shape: torch.Size, seeds: Tensor, stream: str) -> Tensor:
    """Standard normal [n, c, h, w], a function of seeds int64 [n]; in channels_last order, in which so few channels are
    convolved several times as fast."""
    _, channels, height, width = shape
    return Draws(seeds).normal(stream, height, width, channels).permute(0, 3, 1, 2)
