"""Where the time of a training step goes: a few dozen steps, a trace, and a reading of one screen."""

import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lrface.files import atomic_file
from lrface.train.step import TrainingStep, batch_length
from lrface.train.trainer import Stage, Trainer, check_needs

WARM_UP, WHOLE, PARTED, TRACED = 3, 12, 12, 3
PHASES = ("data", "prepare", "forward", "backward", "optimiser")
MEANING = {
    "data": "waiting for images: decoding, copying",
    "prepare": "degradation on the device",
    "forward": "",
    "backward": "",
    "optimiser": "",
}


@dataclass
class Reading:
    """What a profile found.

    milliseconds: of each phase of a step; on a GPU measured with the host waiting after each, so that they add up to
        somewhat more than a step takes.
    step_milliseconds, images_per_second: of whole steps, nothing waiting.
    flops_per_image: floating-point operations of convolutions and matrix products, forward and backward.
    peak_flops: operations a second of a large matrix product in the same precision, measured here.
    utilisation: flops_per_image * images_per_second / peak_flops.
    memory_bytes: highest use: on a GPU what tensors took, else what the process had in memory.
    gpu_idle: share of the traced time in which no kernel ran, None on a CPU.
    trace: for chrome://tracing or ui.perfetto.dev.
    """

    stage: str
    device: str
    precision: str
    batch_size: int
    steps: int
    images_per_second: float
    step_milliseconds: float
    milliseconds: dict[str, float]
    flops_per_image: float
    peak_flops: float
    utilisation: float
    memory_bytes: int
    gpu_idle: float | None
    trace: str

    def __str__(self) -> str:
        total = sum(self.milliseconds.values())
        lines = [
            f"stage {self.stage}: {self.steps} steps of {self.batch_size} images, {self.device}, {self.precision}",
            f"  {self.images_per_second:,.1f} images/s, {self.step_milliseconds:,.1f} ms a step",
        ]
        for phase, value in self.milliseconds.items():
            note = f"  {MEANING[phase]}" if MEANING[phase] else ""
            lines.append(f"  {phase:9} {value:9.1f} ms {value / total:6.1%}{note}")
        lines.append(
            f"  model: {self.flops_per_image / 1e9:,.2f} GFLOP an image, forward and backward; "
            f"{self.utilisation:.1%} of the {self.peak_flops / 1e12:,.3f} TFLOP/s of a large matrix product here"
        )
        what = "of GPU memory" if self.device == "cuda" else "of memory, the whole process"
        lines.append(f"  peak: {self.memory_bytes / 2**30:,.2f} GiB {what}")
        if self.gpu_idle is not None:
            lines.append(f"  GPU idle {self.gpu_idle:.1%} of the traced time")
        lines.append(f"  trace: {self.trace} (open it at https://ui.perfetto.dev or chrome://tracing)")
        return "\n".join(lines)


def profile_stage(trainer: Trainer, stage: Stage, trace: Path) -> Reading:
    """Take the first few dozen steps of ``stage`` from its start, and write a trace of the last of them.

    No checkpoint is read or written.

    Raises:
        LrfaceError: as :meth:`Trainer.fit`; the trace cannot be written.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own notes, of no use to a user
    take = trainer.ready(stage, resume=False).take
    device = trainer.fabric.device

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    spent = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        wait()
        spent[name] += time.perf_counter() - begun

    with closing(stage.batches(0, WARM_UP + WHOLE + PARTED + TRACED)) as stream:
        batch = next(stream)
        check_needs(stage.method, batch)
        flops = count_flops(take, batch, stage.batch_size)
        for _ in range(WARM_UP):
            _step(take, batch)
            batch = next(stream)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        wait()
        started = time.perf_counter()
        for _ in range(WHOLE):
            _step(take, batch)
            batch = next(stream)
        wait()
        seconds = (time.perf_counter() - started) / WHOLE
        take.phase = timed
        for _ in range(PARTED):
            _step(take, batch)
            with timed("data"):
                batch = next(stream)
        take.phase = torch.profiler.record_function
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profiler:
            started = time.perf_counter()
            for index in range(TRACED):
                _step(take, batch)
                if index + 1 < TRACED:
                    with torch.profiler.record_function("data"):
                        batch = next(stream)
            wait()
            traced = time.perf_counter() - started
    with atomic_file(trace) as aside:
        profiler.export_chrome_trace(str(aside))
    speed = stage.batch_size / seconds
    idle = None
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated()
        # Operators of the host carry the time of their kernels, and labels that of what is inside: kernels alone count.
        kernels = (
            event
            for event in profiler.key_averages()
            if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
        )
        idle = max(0.0, 1 - sum(event.self_device_time_total for event in kernels) / 1e6 / traced)
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    peak = peak_flops(device, trainer.precision)
    return Reading(
        stage.name,
        device.type,
        trainer.precision,
        stage.batch_size,
        WHOLE + PARTED + TRACED,
        speed,
        seconds * 1e3,
        {phase: spent[phase] / PARTED * 1e3 for phase in PHASES},
        flops,
        peak,
        flops * speed / peak,
        memory,
        idle,
        str(trace),
    )


def _step(take: TrainingStep, batch: dict[str, Any]) -> None:
    take.gradients(batch)
    take.update()


def count_flops(take: TrainingStep, batch: dict[str, Any], images: int) -> float:
    """Floating-point operations an image of a step's forward and backward; activations computed twice count twice."""
    from torch.utils.flop_counter import FlopCounterMode

    method = take.method
    assert batch_length(batch) == images or take.fabric.world_size > 1
    prepared = method.prepare(take.to_device(batch))
    with FlopCounterMode(display=False) as counter:
        with take.fabric.autocast():
            # Past the compiled call, which would hide the operations from the counter.
            loss = method.forward(prepared).loss
        loss.backward()
    take.optimiser.zero_grad(set_to_none=True)
    return counter.get_total_flops() / batch_length(batch)


def peak_flops(device: torch.device, precision: str) -> float:
    """Operations a second of the best of five large matrix products (2048 wide on a CPU, 8192 on a GPU)."""
    size = 8192 if device.type == "cuda" else 2048
    kind = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[precision]
    left, right = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    best = float("inf")
    with torch.no_grad():
        for _ in range(6):  # the first one only warms up
            started = time.perf_counter()
            nn.functional.linear(left, right)
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
