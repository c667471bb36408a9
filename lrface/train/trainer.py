"""The training loop. It knows one call: ``method(batch)``."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lrface.errors import LrfaceError, UsageError
from lrface.methods.base import Method
from lrface.progress import progress
from lrface.train.checkpoint import (
    TrainingState,
    fill,
    latest_checkpoint,
    load_parts,
    load_training_state,
    random_state,
    remove_leftovers,
    restore_random_state,
    save_checkpoint,
)
from lrface.train.failures import check_finite
from lrface.train.log import MetricsLog
from lrface.train.observe import Observer
from lrface.train.optimisers import Optimiser, build_optimiser, check_param_groups, load_optimiser
from lrface.train.schedule import Schedule
from lrface.train.signals import Interrupted, Signals

PRECISIONS = {"bfloat16": "bf16-mixed", "float32": "32-true"}


@dataclass
class Stage:
    """What the trainer runs: a method for so many steps.

    batches: ``batches(first, last)`` gives the batches of these steps.
    folder: checkpoints and logs.
    card: goes into every checkpoint.
    observer: what watches the stage.
    """

    name: str
    method: Method
    steps: int
    batch_size: int
    batches: Callable[[int, int], Iterator[dict[str, Any]]]
    folder: Path
    card: dict[str, Any]
    optimiser: Optimiser = field(default_factory=Optimiser)
    schedule: Schedule = field(default_factory=Schedule)
    observer: Observer = field(default_factory=Observer)


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
        raise UsageError(f"trainer.device must be auto, cpu or cuda; found {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "trainer.device is cuda but PyTorch finds no GPU here; set trainer.device=cpu or auto"
        )
    return name


class Trainer:
    """Runs stages.

    Args:
        device: auto, cpu or cuda.
        precision: bfloat16 (autocast) or float32.
        channels_last: memory order of images and convolutions.
        compile: compile the method's forward and backward (needs a C++ compiler on CPU).
        threads: CPU threads, None for PyTorch's choice.
        checkpoint_every: steps between checkpoints; one is always written at the end of a stage.
        keep_last: checkpoints kept in each stage.
        log_every: steps between log rows.
        tensorboard: write TensorBoard events beside the CSV.
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
        log_every: int = 10,
        tensorboard: bool = True,
        show_progress: bool = True,
    ):
        if precision not in PRECISIONS:
            raise UsageError(f"trainer.precision must be one of {', '.join(PRECISIONS)}; found {precision!r}")
        for name, value in (
            ("checkpoint_every", checkpoint_every),
            ("keep_last", keep_last),
            ("log_every", log_every),
        ):
            if value < 1:
                raise UsageError(f"trainer.{name} must be at least 1; found {value}")
        if threads is not None and threads < 1:
            raise UsageError(
                f"trainer.threads must be at least 1, or null for PyTorch's choice; found {threads}"
            )
        self.device = resolve_device(device)
        self.precision = precision
        self.channels_last = channels_last
        self.compile = compile
        self.checkpoint_every = checkpoint_every
        self.keep_last = keep_last
        self.log_every = log_every
        self.tensorboard = tensorboard
        self.show_progress = show_progress
        if threads is not None:
            torch.set_num_threads(threads)
        from lightning_fabric import Fabric

        # Their notes on precision and on a missing CUDA toolkit would stand between a user and the progress bar.
        for name in ("lightning_fabric", "lightning.fabric", "torch.utils.cpp_extension"):
            logging.getLogger(name).setLevel(logging.ERROR)
        self.fabric = Fabric(accelerator=self.device, devices=1, precision=PRECISIONS[precision])  # type: ignore[arg-type]

    def fit(self, stage: Stage) -> StageResult:
        """Train ``stage`` to its end, from its newest checkpoint if there is one.

        Raises:
            LrfaceError: the loss stops being finite, a batch lacks a key the method needs, a checkpoint does
                not fit, the disk is full.
            Interrupted: a signal asked to stop; a checkpoint of the last step was written.
        """
        method = stage.method
        if self.channels_last:
            method.to(memory_format=torch.channels_last)
        groups = method.param_groups()
        check_param_groups(method, groups)
        remove_leftovers(stage.folder)
        found = latest_checkpoint(stage.folder)
        state = None
        if found is not None:
            fill(method, load_parts(found), f"checkpoint {found}")
            state = load_training_state(found)
        optimiser = build_optimiser(stage.optimiser, groups, fused=self.device == "cuda")
        method.train()
        if self.compile:
            method.compile()
        model, wrapped = self.fabric.setup(method, optimiser)
        first = 0
        if state is not None:
            first = state.step
            load_optimiser(optimiser, state.optimiser, found)
            if state.extra:
                method.set_extra_state(state.extra)
        if first >= stage.steps:
            assert found is not None
            return StageResult(stage.steps, first, 0.0, 0.0, {}, found)
        log = MetricsLog(stage.folder, first, self.tensorboard)
        if state is not None:
            restore_random_state(state.random)
        try:
            stage.observer.begin(first, method, stage.folder)
            return self._loop(stage, model, optimiser, wrapped, log, first)
        finally:
            stage.observer.end()
            log.close()

    def _loop(
        self,
        stage: Stage,
        model: nn.Module,
        optimiser: torch.optim.Optimizer,
        wrapped: Any,
        log: MetricsLog,
        first: int,
    ) -> StageResult:
        method = stage.method
        parameters = [p for group in optimiser.param_groups for p in group["params"]]
        # Reading the loss makes the host wait for the device: free on a CPU, not on a GPU.
        check_every = 1 if self.device == "cpu" else self.log_every
        checkpoint = latest_checkpoint(stage.folder)
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
        ):
            for step, batch in enumerate(stage.batches(first, stage.steps), start=first):
                if step == first:
                    missing = [key for key in method.needs if key not in batch]
                    if missing:
                        raise LrfaceError(
                            f"method {type(method).__name__} needs {missing} in a batch; found {sorted(batch)}"
                        )
                rate = settings_rate(stage, step)
                for group in optimiser.param_groups:
                    group["lr"] = rate
                output = model(method.prepare(self._to_device(batch)))
                optimiser.zero_grad(set_to_none=True)
                self.fabric.backward(output.loss)
                if stage.optimiser.clip_norm is not None:
                    torch.nn.utils.clip_grad_norm_(parameters, stage.optimiser.clip_norm)
                done = step + 1
                due = done % self.checkpoint_every == 0 or done == stage.steps
                if step % check_every == 0 or due:
                    loss = float(output.loss.detach())
                    if not math.isfinite(loss):
                        raise LrfaceError(self._not_finite(stage, step, loss, rate))
                # The step is taken only when the loss is known to be finite, so a checkpoint never holds NaN of it.
                wrapped.step()
                if step % self.log_every == 0 or done == stage.steps:
                    now = time.perf_counter()
                    values = {
                        "loss": float(output.loss.detach()),
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
                due |= stage.observer.after_step(done, method)
                mark += time.perf_counter() - watching  # the speed in the log is that of training
                if due or signals.received is not None:
                    check_finite(method, stage.name, step)
                    checkpoint = self._save(stage, method, optimiser, done)
                    stage.observer.saved(done, checkpoint)
                    saved = done
                    if signals.received is not None:
                        raise Interrupted(signals.received, done, checkpoint)
        assert checkpoint is not None and saved == stage.steps
        seconds = time.perf_counter() - started
        speed = (stage.steps - first) * stage.batch_size / seconds
        return StageResult(stage.steps, first, seconds, speed, values, checkpoint)

    def _to_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        device = self.fabric.device
        if device.type == "cpu":
            return batch
        return {
            key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for key, value in batch.items()
        }

    def _save(self, stage: Stage, method: Method, optimiser: torch.optim.Optimizer, step: int) -> Path:
        extra = method.get_extra_state() if has_extra_state(method) else {}
        state = TrainingState(step, optimiser.state_dict(), random_state(), extra)
        kept = stage.observer.kept()
        return save_checkpoint(stage.folder, method, stage.card, state, self.keep_last, kept)

    def _not_finite(self, stage: Stage, step: int, loss: float, rate: float) -> str:
        checkpoint = latest_checkpoint(stage.folder)
        kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "there was no checkpoint yet"
        return (
            f"the loss became {loss} at step {step} of stage {stage.name!r} (learning rate {rate:g}); {kept}. Lower "
            f"optimiser.learning_rate of this stage, raise schedule.warmup_steps, set optimiser.clip_norm=5 or "
            "trainer.precision=float32, and run again with --accept-changes to go on from that checkpoint"
        )


def settings_rate(stage: Stage, step: int) -> float:
    """The learning rate of ``step``."""
    return stage.optimiser.learning_rate * stage.schedule.factor(step, stage.steps)


def has_extra_state(method: Method) -> bool:
    """Whether the method keeps state of its own beside its tensors."""
    return type(method).get_extra_state is not nn.Module.get_extra_state
