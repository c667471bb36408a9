"""What can go wrong in the middle of training, named for the user, and replayed."""

import gc
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrface.errors import LrfaceError
from lrface.files import atomic_file
from lrface.methods.base import Method
from lrface.train.checkpoint import latest_checkpoint, restore_random_state, tensors

FAILED = "lrface-failed-batch"


# ------------------------------------------------------------------------------------------------ not a number


def check_finite(method: Method, stage_name: str, step: int) -> None:
    """Raises LrfaceError when a weight is not finite, so that a broken network is never saved over a good one."""
    for name, parameter in method.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise LrfaceError(
                f"{name} is not finite after step {step} of stage {stage_name!r}; no checkpoint was written, older "
                "ones are kept. Lower optimiser.learning_rate of this stage or set optimiser.clip_norm=5"
            )


def save_failed(
    folder: Path,
    method: Method,
    *,
    stage: str,
    step: int,
    precision: str,
    batch: dict[str, Any],
    random: dict[str, Any],
) -> Path:
    """Write a batch, and the weights and random generators it met, to ``folder/failed/step-XXXXXXXX.pt``.

    Tensors and plain values only; :func:`replay` reads it.

    Raises:
        LrfaceError: the disk is full or cannot be written.
    """
    path = folder / "failed" / f"step-{step:08d}.pt"
    content = {
        "format": FAILED,
        "stage": stage,
        "step": step,
        "precision": precision,
        "batch": {key: value.cpu() if isinstance(value, Tensor) else value for key, value in batch.items()},
        "random": random,
        "weights": tensors(method),
    }
    with atomic_file(path) as aside, aside.open("wb") as file:
        torch.save(content, file)
    return path


def load_failed(path: Path) -> dict[str, Any]:
    """What :func:`save_failed` wrote. Raises LrfaceError when it is missing, broken or something else."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise LrfaceError(f"{path} does not exist") from error
    except Exception as error:
        raise LrfaceError(
            f"{path} cannot be read: it is broken or no batch that `lrface train` saved"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FAILED:
        raise LrfaceError(
            f"{path} is no batch that `lrface train` saved: its field 'format' is not {FAILED!r}"
        )
    return content


@dataclass
class Replay:
    """What a saved batch does to the weights that it met.

    modules: with outputs that are not finite, in the order in which they ran: the first one is where it began.
    gradients: parameters with gradients that are not finite.
    inputs: keys of the prepared batch that are not finite.
    """

    stage: str
    step: int
    loss: float
    inputs: list[str] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    gradients: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"stage {self.stage}, step {self.step}: loss {self.loss}"]
        for what, names in (
            ("not finite already in the batch", self.inputs),
            ("first outputs that are not finite", self.modules),
            ("gradients that are not finite", self.gradients),
        ):
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            lines.append(f"{what}: {', '.join(names[:5]) or 'none'}{more}")
        return "\n".join(lines)


def replay(content: dict[str, Any], method: Method, model: nn.Module, fabric: Any) -> Replay:
    """Run the saved step once more, forward and backward.

    Args:
        content: of :func:`load_failed`; its weights are in ``method`` already.
        model: the method as ``fabric`` wraps it.
    """
    result = Replay(content["stage"], content["step"], 0.0)
    hooks = [
        module.register_forward_hook(
            lambda _module, _inputs, output, name=name: (
                None if _finite(output) else result.modules.append(name)
            )
        )
        for name, module in method.named_modules()
        if name
    ]
    try:
        restore_random_state(content["random"])
        batch = {
            key: value.to(fabric.device) if isinstance(value, Tensor) else value
            for key, value in content["batch"].items()
        }
        batch = method.prepare(batch)
        result.inputs = [key for key, value in batch.items() if not _finite(value)]
        output = model(batch)
        result.loss = float(output.loss.detach())
        fabric.backward(output.loss)
    finally:
        for hook in hooks:
            hook.remove()
    result.gradients = [
        name
        for name, parameter in method.named_parameters()
        if parameter.grad is not None and not _finite(parameter.grad)
    ]
    return result


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, (tuple, list)):
        return all(_finite(item) for item in value)
    return True


# -------------------------------------------------------------------------------------------------------- memory


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch or Python ran out of memory, on a GPU or on the CPU (a RuntimeError there)."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError)
        and any(words in str(error) for words in ("DefaultCPUAllocator", "out of memory"))
    )


@contextmanager
def memory_named(explain: Callable[[str], str]) -> Iterator[None]:
    """Turn running out of memory in here into an LrfaceError with what ``explain(reason)`` says.

    Everything that the failed step held is freed before ``explain`` is called.
    """
    reason = None
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).split("\n")[0] or type(error).__name__
        traceback.clear_frames(error.__traceback__)
    if reason is not None:
        free_memory()
        raise LrfaceError(explain(reason))


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def largest_that_fits(attempt: Callable[[int], None], size: int, least: int = 2) -> int | None:
    """The largest number of images that ``attempt`` can take, to an eighth, below ``size``; None if not ``least``.

    Args:
        attempt: a whole training step on so many images; raises when memory does not suffice.
    """

    def fits(number: int) -> bool:
        try:
            attempt(number)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)
            return False
        finally:
            if torch.cuda.is_available():  # its allocator holds pieces of another size
                free_memory()
        return True

    above, below = size, size // 2
    while below >= least and not fits(below):
        above, below = below, below // 2
    if below < least:
        return None
    while above - below > max(1, below // 8):
        middle = (above + below) // 2
        if fits(middle):
            below = middle
        else:
            above = middle
    return below


def out_of_memory_message(
    reason: str,
    stage_name: str,
    step: int,
    size: int,
    accumulate: int,
    fitting: int | None,
    accumulable: bool,
) -> str:
    """What to do when a step on ``size`` images ran out of memory and one on ``fitting`` images did not."""
    parts = "" if accumulate == 1 else f" in {accumulate} parts"
    message = f"out of memory at step {step} of stage {stage_name!r} with a batch of {size} images{parts} ({reason}). "
    others = "trainer.checkpoint_activations=true or a smaller backbone needs less memory"
    if fitting is None:
        return message + f"Not even 2 images fit: {others}; is the memory in use by something else?"
    message += f"A batch of {fitting} images fits: set data.batch_size={fitting}"
    number = next(
        (n for n in range(accumulate + 1, size + 1) if size % n == 0 and size // n <= fitting), None
    )
    if accumulable and number is not None and size // number >= 2:
        message += f", or accumulate={number} of this stage for the same batch in parts of {size // number}"
    return f"{message}; {others}"


# -------------------------------------------------------------------------------------------------- data workers


@contextmanager
def workers_named(folder: Path) -> Iterator[None]:
    """Turn the death of a process that loads data into an LrfaceError."""
    reason = None
    try:
        yield
    except RuntimeError as error:
        # "Caught ... in DataLoader worker" is an error that a worker raised and lived.
        if not str(error).startswith("DataLoader worker"):
            raise
        reason = str(error).strip()
        # The loader goes with the frames: alive, it would raise once more when any other child process ends.
        traceback.clear_frames(error.__traceback__)
    if reason is not None:
        checkpoint = latest_checkpoint(folder)
        kept = f"goes on from {checkpoint}" if checkpoint else "starts this stage again"
        raise LrfaceError(
            f"a process that loads data died ({reason}); the system kills one when memory runs out: lower "
            f"data.workers. The same command {kept}"
        )
