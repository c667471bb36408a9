"""The training loop. It knows one call: ``method(batch)``."""

import time
from collections.abc import Callable, Generator
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lrface.errors import LrfaceError, UsageError
from lrface.files import explain
from lrface.methods.base import Method
from lrface.models.memory import recompute_activations
from lrface.progress import progress
from lrface.train.average import AveragedWeights, BlendedWeights
from lrface.train.checkpoint import (
    TrainingState,
    fill,
    latest_checkpoint,
    load_parts,
    load_training_state,
    random_state,
    remove_leftovers,
    save_checkpoint,
    torch_random_state,
)
from lrface.train.distributed import (
    NoLog,
    Spread,
    from_first,
    gathered,
    largest,
    load_classes,
    on_first,
    partial_heads,
    rank,
    restore_random,
    save_classes,
    seed_rank,
    send_classes,
)
from lrface.train.failures import (
    Replay,
    check_finite,
    largest_that_fits,
    load_failed,
    memory_named,
    out_of_memory_message,
    replay,
    save_failed,
    workers_named,
)
from lrface.train.log import MetricsLog
from lrface.train.observe import Observer
from lrface.train.optimisers import (
    Optimiser,
    build_optimiser,
    load_optimiser,
    parameter_groups,
    set_rate,
)
from lrface.train.schedule import Schedule
from lrface.train.signals import Interrupted, Signals
from lrface.train.step import TrainingStep, batch_length

PRECISIONS = {"bfloat16": "bf16-mixed", "float16": "16-mixed", "float32": "32-true"}


@dataclass
class Stage:
    """What the trainer runs: a method for so many steps.

    batches: ``batches(first, last)`` gives the batches of these steps.
    folder: checkpoints and logs.
    card: goes into every checkpoint.
    observer: what watches the stage.
    accumulate: parts a batch is split into for forward and backward, so that it needs less memory. The gradient is
        the whole batch's; only what BatchNorm and dropout do is done for each part by itself.
    ema: decay of an exponential moving average of the weights, which then is what is exported, validated and loaded
        by the next stage; None for none. See :class:`lrface.train.average.AveragedWeights`.

    Raises:
        UsageError: a value out of range, or a method that needs its whole batch at once.
    """

    name: str
    method: Method
    steps: int
    batch_size: int
    batches: Callable[[int, int], Generator[dict[str, Any], None, None]]
    folder: Path
    card: dict[str, Any]
    optimiser: Optimiser = field(default_factory=Optimiser)
    schedule: Schedule = field(default_factory=Schedule)
    observer: Observer = field(default_factory=Observer)
    accumulate: int = 1
    ema: float | None = None

    def __post_init__(self) -> None:
        check_stage(self.name, self.method, self.batch_size, self.accumulate, self.ema)

    def rate(self, step: int) -> float:
        """The learning rate of ``step``."""
        return self.optimiser.learning_rate * self.schedule.factor(step, self.steps)


def check_stage(name: str, method: Method, batch_size: int, accumulate: int, ema: float | None) -> None:
    """Raises UsageError for what :class:`Stage` refuses, before a stage before it has run for hours."""
    if accumulate < 1 or batch_size % accumulate or (accumulate > 1 and batch_size // accumulate < 2):
        raise UsageError(
            f"stage {name!r}: accumulate must divide the batch of {batch_size} into equal parts of at least 2 images; "
            f"found {accumulate}"
        )
    if accumulate > 1 and not method.accumulable:
        raise UsageError(
            f"stage {name!r}: method {type(method).__name__} cannot take a batch in parts (accumulate={accumulate}): "
            f"{method.not_accumulable_because}"
        )
    if ema is not None and not 0 <= ema < 1:
        raise UsageError(f"stage {name!r}: ema must be from 0 to below 1, or null for none; found {ema}")


@dataclass
class StageResult:
    """What a stage came to: last logged values, time and throughput of this process's part of it."""

    steps: int
    resumed_at: int
    seconds: float
    images_per_second: float
    logs: dict[str, float]
    checkpoint: Path


def resolve_device(name: str) -> str:
    """ "auto" -> "cuda" where there is one, else "cpu"; an explicit device is never replaced by another.

    Raises:
        UsageError: unknown name, or CUDA asked for where there is none.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise UsageError(f"--device (trainer.device of a recipe) must be auto, cpu or cuda; found {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "--device (trainer.device of a recipe) is cuda but PyTorch finds no GPU here; set it to cpu or auto"
        )
    return name


class Trainer:
    """Runs stages.

    Args:
        device: auto, cpu or cuda.
        precision: bfloat16 or float16 (autocast; float16 on a GPU only, with scaled gradients), or float32.
        channels_last: memory order of images and convolutions.
        compile: compile the method's forward and backward (needs a C++ compiler on CPU).
        threads: CPU threads, None for PyTorch's choice.
        checkpoint_every: steps between checkpoints; one is always written at the end of a stage.
        keep_last: checkpoints kept in each stage.
        keep_every: checkpoints of steps that are a multiple of it are kept for ever, and there always is one.
        checkpoint_activations: keep only what enters each block of the encoder, and compute the rest again for the
            backward pass: less memory for about a third more time; the same gradients and statistics.
        log_every: steps between log rows.
        tensorboard: write TensorBoard events beside the CSV.
        strategy, sync_batchnorm: of a run of several ranks, see :class:`lrface.train.distributed.Spread`.
        show_progress: draw the bar.
    """

    def __init__(
        self,
        device: str = "auto",
        precision: str = "bfloat16",
        channels_last: bool = True,
        compile: bool = False,
        threads: int | None = None,
        checkpoint_every: int = 1000,
        keep_last: int = 2,
        keep_every: int | None = None,
        checkpoint_activations: bool = False,
        log_every: int = 10,
        tensorboard: bool = True,
        strategy: str = "auto",
        sync_batchnorm: bool | None = None,
        show_progress: bool = True,
    ):
        if precision not in PRECISIONS:
            raise UsageError(f"trainer.precision must be one of {', '.join(PRECISIONS)}; found {precision!r}")
        for name, value in (
            ("checkpoint_every", checkpoint_every),
            ("keep_last", keep_last),
            ("keep_every", keep_every),
            ("log_every", log_every),
        ):
            if value is not None and value < 1:
                raise UsageError(f"trainer.{name} must be at least 1; found {value}")
        if threads is not None and threads < 1:
            raise UsageError(
                f"trainer.threads must be at least 1, or null for PyTorch's choice; found {threads}"
            )
        self.device = resolve_device(device)
        if precision == "float16" and self.device != "cuda":
            raise UsageError(
                f"trainer.precision float16 needs a GPU and this run is on {self.device}; set trainer.precision=bfloat16"
            )
        self.precision = precision
        self.channels_last = channels_last
        self.compile = compile
        self.checkpoint_every = checkpoint_every
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.checkpoint_activations = checkpoint_activations
        self.log_every = log_every
        self.tensorboard = tensorboard
        self.show_progress = show_progress and rank() == 0
        if threads is not None:
            torch.set_num_threads(threads)
        self.spread = Spread(self.device, PRECISIONS[precision], strategy, sync_batchnorm)
        self.fabric = self.spread.fabric

    def ready(self, stage: Stage, resume: bool = True) -> "Ready":
        """The stage with everything built, at its newest checkpoint if there is one and ``resume``."""
        method = stage.method
        if self.channels_last:
            method.to(memory_format=torch.channels_last)
        found = from_first(latest_checkpoint(stage.folder) if resume else None)
        state = averaged = None
        if found is not None:
            state = load_training_state(found)
            averaged = load_parts(found)
            fill(method, averaged if state.weights is None else state.weights, f"checkpoint {found}")
            load_classes(method, found)
        share = method.teacher_share
        for name, there in (("ema", stage.ema is not None), ("method.teacher_share", share > 0)):
            if self.spread.fsdp and there:
                raise UsageError(
                    f"stage {stage.name!r}: {name} needs whole weights; set trainer.strategy=ddp"
                )
        if stage.ema is not None and share:
            raise UsageError(f"stage {stage.name!r}: give ema or method.teacher_share, not both")
        if self.spread.fsdp and not method.splittable:
            raise UsageError(
                f"stage {stage.name!r}: method {type(method).__name__} computes with whole weights before its step; set "
                "trainer.strategy=ddp"
            )
        self.spread.prepare(method)
        groups = parameter_groups(method, stage.optimiser)
        fused = self.precision != "float16" and not self.spread.fsdp  # which PyTorch has for neither
        optimiser = build_optimiser(stage.optimiser, groups, fused)
        for head in partial_heads(method).values():
            head.attach(optimiser)
        method.train()
        if self.checkpoint_activations:
            recompute_activations(method.encoder)
        if self.compile:
            method.compile()
        model, wrapped = self.fabric.setup(method, optimiser)
        take = TrainingStep(
            self.fabric, model, method, optimiser, wrapped, stage.accumulate, stage.optimiser.clip_norm
        )
        if state is not None:
            load_optimiser(optimiser, self.spread.own_state(state.optimiser, optimiser), found)
            if state.extra:
                method.set_extra_state(state.extra)
            if take.scaler is not None and state.scaler:
                take.scaler.load_state_dict(state.scaler)
        average: AveragedWeights | BlendedWeights | None = None
        if stage.ema is not None:
            average = AveragedWeights(method, stage.ema, averaged)
        elif share:
            average = BlendedWeights(method, share)
        return Ready(take, average, 0 if state is None else state.step, found, state)

    def fit(self, stage: Stage) -> StageResult:
        """Train ``stage`` to its end, from its newest checkpoint if there is one.

        Raises:
            LrfaceError: the loss stops being finite, memory does not suffice, a data worker dies, a batch lacks a
                key the method needs, a checkpoint does not fit, the disk is full.
            Interrupted: a signal asked to stop; a checkpoint of the last step was written.
        """
        on_first(lambda: remove_leftovers(stage.folder))
        ready = self.ready(stage)
        if ready.first >= stage.steps:
            assert ready.found is not None
            return StageResult(stage.steps, ready.first, 0.0, 0.0, {}, ready.found)
        try:
            log = MetricsLog(stage.folder, ready.first, self.tensorboard) if rank() == 0 else NoLog()
        except OSError as error:
            raise explain(error, stage.folder) from error
        if ready.state is not None:
            restore_random(ready.state)
        else:
            seed_rank(0)
        try:
            stage.observer.begin(ready.first, stage.method, stage.folder)
            with workers_named(stage.folder):
                return self._loop(stage, ready, log)
        finally:
            stage.observer.end()
            log.close()

    def _loop(self, stage: Stage, ready: "Ready", log: MetricsLog | NoLog) -> StageResult:
        method, take, average, first = stage.method, ready.take, ready.average, ready.first
        # Reading the loss makes the host wait for the device: free on a CPU, not on a GPU.
        check_every = 1 if self.device == "cpu" else self.log_every
        random: dict[int, dict[str, Any]] = {}
        checkpoint = ready.found
        saved = first if checkpoint is not None else -1
        values: dict[str, float] = {}
        started = mark = time.perf_counter()
        marked = first
        with (
            Signals() as signals,
            progress(
                stage.steps * stage.batch_size,
                f"stage {stage.name}",
                initial=first * stage.batch_size,
                enabled=self.show_progress,
            ) as bar,
            closing(stage.batches(first, stage.steps)) as stream,
        ):
            for step, batch in enumerate(stream, start=first):
                if step == first:
                    check_needs(method, batch)
                rate = stage.rate(step)
                set_rate(take.optimiser, rate)
                random[step % check_every] = torch_random_state()
                done = step + 1
                due = (
                    done % self.checkpoint_every == 0
                    or done == stage.steps
                    or (self.keep_every is not None and done % self.keep_every == 0)
                )
                with memory_named(partial(self._memory, stage, take, step, batch)):
                    output = take.gradients(batch)
                    if step % check_every == 0 or due:
                        self._check_loss(stage, take, step, batch, random, rate)
                    # Taken only when the loss is known to be finite, so a checkpoint never holds NaN of it.
                    take.update()
                if average is not None:
                    average.update(step)
                if step % self.log_every == 0 or done == stage.steps:
                    now = time.perf_counter()
                    values = {
                        "loss": float(output.loss),
                        **{key: float(value) for key, value in output.logs.items()},
                        "learning_rate": rate,
                        "images_per_second": (done - marked) * stage.batch_size / (now - mark),
                    }
                    mark, marked = now, done
                    log.write(step, values)
                    stage.observer.logged(step, values)
                    bar.advance(stage.batch_size, loss=f"{values['loss']:.3f}")
                else:
                    bar.advance(stage.batch_size)
                watching = time.perf_counter()
                with nullcontext() if average is None else average.shown():
                    due |= stage.observer.after_step(done, method)
                mark += time.perf_counter() - watching  # the speed in the log is that of training
                # The ranks stop after the same step, and save together.
                received, asked = largest(signals.received or 0, int(due))
                if asked or received:
                    self._check_loss(stage, take, step, batch, random, rate)
                    check_finite(method, stage.name, step)
                    checkpoint = self._save(stage, ready, done)
                    stage.observer.saved(done, checkpoint)
                    saved = done
                    if received:
                        raise Interrupted(received, done, checkpoint)
        assert checkpoint is not None and saved == stage.steps
        seconds = time.perf_counter() - started
        speed = (stage.steps - first) * stage.batch_size / seconds
        return StageResult(stage.steps, first, seconds, speed, values, checkpoint)

    def _save(self, stage: Stage, ready: "Ready", step: int) -> Path:
        method, take, average = stage.method, ready.take, ready.average
        extra = method.get_extra_state() if has_extra_state(method) else {}
        scaler = {} if take.scaler is None else take.scaler.state_dict()
        optimiser = self.spread.optimiser_state(take.optimiser)
        state = TrainingState(step, optimiser, random_state(), extra, scaler)
        state.random_of_others = gathered(state.random)[1:]
        averaged = None if average is None else self.spread.whole_tensors(average.state())
        whole, kept = self.spread.whole(method), stage.observer.kept()
        card = stage.card
        if stage.ema is not None:
            card = {**card, "weights": f"exponential moving average of the trained ones, decay {stage.ema:g}"}
        elif average is not None:
            card = {
                **card,
                "weights": f"{method.teacher_share:g} of the teacher's, the rest of the trained ones",
            }
        return on_first(
            lambda: save_checkpoint(
                stage.folder,
                whole,
                card,
                state,
                self.keep_last,
                kept,
                self.keep_every,
                averaged,
                lambda aside: save_classes(method, aside),
            ),
            lambda: send_classes(method),
        )

    def _check_loss(
        self,
        stage: Stage,
        take: TrainingStep,
        step: int,
        batch: dict[str, Any],
        random: dict[int, dict[str, Any]],
        rate: float,
    ) -> None:
        """Raises LrfaceError when the loss of this or an earlier step was not finite; the batch is saved first."""
        found = take.first_bad()
        if found is None:
            return
        ago, loss = found
        bad = step - ago
        if ago:
            with closing(stage.batches(bad, bad + 1)) as stream:
                batch = next(stream)
        checkpoint = latest_checkpoint(stage.folder)
        kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "there was no checkpoint yet"
        try:
            path = save_failed(
                # Each rank has a part of the batch.
                stage.folder / f"rank-{rank()}" if rank() else stage.folder,
                self.spread.whole(stage.method),
                stage=stage.name,
                step=bad,
                precision=self.precision,
                batch=batch,
                random=random[bad % len(random)],
            )
            saved = f"the batch is saved: `lrface train RECIPE --replay {path}` finds where it began"
        except LrfaceError as error:
            saved = f"the batch could not be saved ({error})"
        raise LrfaceError(
            f"the loss became {loss} at step {bad} of stage {stage.name!r} (learning rate {rate:g}); {kept}; {saved}. "
            "Lower optimiser.learning_rate of this stage, raise schedule.warmup_steps, "
            "set optimiser.clip_norm=5 or trainer.precision=float32, and run again with --accept-changes to go on "
            "from that checkpoint"
        )

    def _memory(self, stage: Stage, take: TrainingStep, step: int, batch: dict[str, Any], reason: str) -> str:
        """What to say about a step that ran out of memory: the batch that fits is found by trying smaller ones."""
        take.optimiser.zero_grad(set_to_none=True)
        take.accumulate = 1
        size = batch_length(batch)

        def attempt(number: int) -> None:
            take.gradients(
                {
                    key: value[:number]
                    if isinstance(value, torch.Tensor) and value.shape[:1] == (size,)
                    else value
                    for key, value in batch.items()
                }
            )
            take.update()

        # Other processes of a distributed run would wait for this one's gradients.
        fitting = largest_that_fits(attempt, size) if self.fabric.world_size == 1 else size // 2
        return out_of_memory_message(
            reason, stage.name, step, size, stage.accumulate, fitting, stage.method.accumulable
        )

    def replay(self, method: Method, path: Path) -> Replay:
        """Run a batch once more whose loss was not finite, with the weights it met.

        Raises:
            LrfaceError: the file is missing, broken or of another network.
        """
        content = load_failed(path)
        fill(method, content["weights"], f"{path}")
        if self.channels_last:
            method.to(memory_format=torch.channels_last)
        method.train()
        model = self.fabric.setup(method)
        method.autocast = self.fabric.autocast
        return replay(content, method, model, self.fabric)


@dataclass
class Ready:
    """A stage ready to go on: ``first`` steps are done, ``found`` and ``state`` are of its newest checkpoint."""

    take: TrainingStep
    average: AveragedWeights | BlendedWeights | None
    first: int
    found: Path | None
    state: TrainingState | None


def check_needs(method: Method, batch: dict[str, Any]) -> None:
    """Raises LrfaceError when the batch lacks a key that the method needs."""
    missing = [key for key in method.needs if key not in batch]
    if missing:
        raise LrfaceError(f"method {type(method).__name__} needs {missing} in a batch; found {sorted(batch)}")


def has_extra_state(method: Method) -> bool:
    """Whether the method keeps state of its own beside its tensors."""
    return type(method).get_extra_state is not torch.nn.Module.get_extra_state
