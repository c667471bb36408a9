"""One run in several processes: what they tell each other, and what makes them equal to one process.

Everything here also works in a run of one process, where there is no process group and nothing is sent.
"""

import copy
import inspect
import json
import logging
import math
import os
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from lrface.compiling import not_compiled
from lrface.errors import LrfaceError, UsageError
from lrface.files import explain
from lrface.heads.base import at_least_float32
from lrface.heads.margin import sum_over_ranks
from lrface.heads.partial import PartialHead
from lrface.methods.base import Method, StepOutput
from lrface.train.checkpoint import TrainingState, restore_random_state
from lrface.train.launch import CONSEQUENCE, LOST, Place, end_with_launcher, expected_ranks, find_place

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Result = TypeVar("Result")
CLASSES = "classes.safetensors"
PIECE = 64 << 20  # bytes of the classes' weights that are on their way at once
STRATEGIES = ("auto", "ddp", "fsdp")


class RankLost(LrfaceError):
    """Another rank ended or gave no answer in time: this one can only end too."""

    exit_code = CONSEQUENCE


class RankFailed(LrfaceError):
    """Rank 0 failed at something it does for all; it tells the user itself."""

    exit_code = CONSEQUENCE


def rank() -> int:
    """The number of this process in its run, 0 in a run of one process."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def ranks() -> int:
    """The processes of this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def local_ranks() -> int:
    """The processes of this run on this machine."""
    place = find_place() if ranks() > 1 else None
    return 1 if place is None else place.local_ranks


@contextmanager
def process_group(devices: int, nodes: int, device: str, timeout_seconds: float) -> Iterator[Place]:
    """Join the other processes of the run for the time of the block; a run of one process joins nothing.

    Args:
        devices, nodes: as in the recipe; with torchrun or srun both may stay 1.
        device: cpu (gloo) or cuda (NCCL, and gloo for tensors on the CPU).
        timeout_seconds: how long a rank waits for the others before it ends with an error.

    Raises:
        UsageError: more than one rank asked for where nobody has started the others, a rank without a GPU.
        RankLost: within the block, another rank ended or was silent for too long.
    """
    place = find_place()
    wanted = expected_ranks(devices, nodes, place)
    if wanted == 1:
        yield Place()
        return
    if place is None:
        raise UsageError(
            f"trainer.devices={devices}, trainer.nodes={nodes}: start it with `lrface train`, torchrun or srun, which "
            "make the processes"
        )
    if not 0 < timeout_seconds < float("inf"):
        raise UsageError(f"trainer.timeout_seconds must be above 0; found {timeout_seconds}")
    end_with_launcher()
    place.export(os.environ)
    backend = "gloo"
    if device == "cuda":
        if place.local_rank >= torch.cuda.device_count():
            raise UsageError(
                f"rank {place.rank} is number {place.local_rank} on its machine, which shows "
                f"{torch.cuda.device_count()} GPUs; lower trainer.devices to that"
            )
        torch.cuda.set_device(place.local_rank)
        backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
        yield place
    except RuntimeError as error:
        if not _is_loss_of_contact(error):
            raise
        raise RankLost(
            f"rank {place.rank} {LOST}: one of them ended or gave no answer for {timeout_seconds:g} s (trainer."
            "timeout_seconds). Its own message says why; the same command goes on from the last checkpoint"
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _is_loss_of_contact(error: RuntimeError) -> bool:
    """Whether a collective failed, and not the computation."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        word in text for word in ("gloo", "nccl", "connection closed by peer", "processgroup", "tcpstore")
    )


def from_first(value: Result) -> Result:
    """Rank 0's ``value``, on every rank."""
    if ranks() == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def on_first(act: Callable[[], Result], help: Callable[[], None] | None = None) -> Result:
    """Rank 0 does ``act`` while the others wait; its result on every rank.

    Args:
        help: what the others do meanwhile, each time that ``act`` calls :func:`ask_for_help`.

    Raises:
        RankFailed: on the other ranks, when it failed on rank 0, which raises its own error.
    """
    if ranks() == 1:
        return act()
    if rank() == 0:
        try:
            result = act()
        except Exception as error:
            from_first(("failed", str(error)))
            raise
        from_first(("done", result))
        return result
    while True:
        word, answer = from_first(("", None))
        if word == "help":
            assert help is not None
            help()
        elif word == "failed":
            raise RankFailed(f"rank {rank()} stopped because rank 0 failed: {answer}")
        else:
            return answer  # type: ignore[return-value]


def ask_for_help() -> None:
    """Let the other ranks, which wait in :func:`on_first`, do their part of what comes now."""
    from_first(("help", None))


def gathered(value: Result) -> list[Result]:
    """The values of all ranks, in their order, on rank 0; on the others an empty list."""
    if ranks() == 1:
        return [value]
    values: list[Any] | None = [None] * ranks() if rank() == 0 else None
    dist.gather_object(value, values, dst=0)
    return values or []


def largest(*values: int) -> tuple[int, ...]:
    """Each value's largest over the ranks: how they agree, every step, whether to stop or to save."""
    if ranks() == 1:
        return values
    numbers = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return tuple(numbers.tolist())


def mean_output(output: StepOutput) -> StepOutput:
    """The means over the ranks of a step's detached loss and logs, on their device, without waiting for it."""
    if ranks() == 1:
        return output
    keys = list(output.logs)
    numbers = torch.stack([output.loss.float(), *(output.logs[key].float() for key in keys)])
    dist.all_reduce(numbers)
    loss, *logs = (numbers / ranks()).unbind()
    return StepOutput(loss, dict(zip(keys, logs, strict=True)))


def seed_rank(step: int) -> None:
    """Give every rank but the first a random stream of its own, from the generator's seed, the rank and the step.

    Dropout then differs between ranks, and rank 0 draws what a run of one process would.
    """
    if rank() > 0:
        sequence = np.random.SeedSequence((torch.initial_seed(), rank(), step))
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> 1))


def restore_random(state: TrainingState) -> None:
    """Bring back this rank's random generators; new streams where the checkpoint is of another number of ranks."""
    states = [state.random, *state.random_of_others]
    if rank() == 0 or len(states) == ranks():
        restore_random_state(states[rank()])
    else:
        seed_rank(state.step)


class NoLog:
    """The log of a rank that keeps none."""

    def write(self, step: int, values: dict[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


class SynchronisedBatchNorm(_BatchNorm):
    """BatchNorm with the statistics of the batch of all ranks, on any device.

    PyTorch's own takes GPUs alone. Every rank must have as many images. Statistics are at least float32 whatever the
    precision of the input, means of ranks' means and variances, not of squares, so that nothing cancels.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, found {input.dim()}")

    @not_compiled  # a collective inside
    def forward(self, input: Tensor) -> Tensor:
        if not self.training and self.running_mean is not None:
            return super().forward(input)
        dimensions = [0, *range(2, input.dim())]
        with torch.no_grad():
            variance, average = torch.var_mean(at_least_float32(input), dimensions, correction=0)
            both = torch.stack([average, variance])
            parts = [torch.empty_like(both) for _ in range(ranks())]
            dist.all_gather(parts, both)
            averages, variances = torch.stack(parts).unbind(1)
            average = averages.mean(0)
            variance = variances.mean(0) + averages.var(0, correction=0)
            count = input.numel() // input.shape[1] * ranks()
            # An i-RevNet that computes again what it computed switches tracking off meanwhile.
            if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
                assert self.num_batches_tracked is not None
                self.num_batches_tracked.add_(1)
                share = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
                self.running_mean.lerp_(average.to(self.running_mean), share)
                self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var), share)
        return _Normalise.apply(input, self.weight, self.bias, average, variance, self.eps)


class _Normalise(torch.autograd.Function):
    """Batch normalisation by given statistics, with the gradient of statistics that depend on all ranks' input."""

    @staticmethod
    def forward(
        context: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor,
        average: Tensor,
        variance: Tensor,
        eps: float,
    ) -> Tensor:
        context.save_for_backward(input, weight, average, torch.rsqrt(variance + eps))
        return F.batch_norm(input, average, variance, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:
        input, weight, average, scale = context.saved_tensors
        shape = [1, -1] + [1] * (input.dim() - 2)
        dimensions = [0, *range(2, input.dim())]
        with torch.autocast(input.device.type, enabled=False):
            upper = at_least_float32(gradient)
            normal = (at_least_float32(input) - average.view(shape)) * scale.view(shape)
            own = torch.stack([upper.sum(dimensions), (upper * normal).sum(dimensions)])
            total = own.clone()
            dist.all_reduce(total)
            total /= input.numel() // input.shape[1] * ranks()
            factor = scale if weight is None else scale * at_least_float32(weight)
            lower = (upper - total[0].view(shape) - normal * total[1].view(shape)) * factor.view(shape)
        affine = (own[1], own[0]) if weight is not None else (None, None)
        return lower.to(input.dtype), *affine, None, None, None


def synchronise_batchnorm(method: nn.Module, device: str) -> nn.Module:
    """Let every BatchNorm of ``method`` use the statistics of all ranks' images; names of tensors stay."""
    if device == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(method)
    for module in method.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            # Parameters, buffers, hooks and mode stay as they are.
            module.__class__ = SynchronisedBatchNorm  # type: ignore[assignment]
    return method


@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], largest_norm: float) -> None:
    """Scale the gradient to ``largest_norm`` at most: that of all parameters, of all ranks' shards too."""
    given = [parameter for parameter in parameters if parameter.grad is not None]
    split = [parameter for parameter in given if getattr(parameter, "sharded", False)]
    rest = [parameter for parameter in given if not getattr(parameter, "sharded", False)]
    total = _square_norm(rest) + sum_over_ranks(_square_norm(split)) if split else _square_norm(rest)
    # As PyTorch does it, on this rank's part of what FSDP spread.
    factor = (largest_norm / (total.sqrt() + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([own_part(parameter.grad) for parameter in given], factor)


def own_part(tensor: Any) -> Tensor:
    """This rank's part of a tensor that FSDP spread; any other as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _square_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if hasattr(norm, "full_tensor"):  # of a network that FSDP spread
        norm = norm.full_tensor()
    return norm.square()


class Spread:
    """How a method runs over the ranks of this run.

    Args:
        device: cpu or cuda.
        precision: what Fabric calls it.
        strategy: "ddp" keeps the whole network in every rank; "fsdp" keeps a share of the weights, gradients and momentum
            in each and gathers a block's weights when it is computed (PyTorch's fully_shard); "auto" is ddp.
        sync_batchnorm: statistics of BatchNorm over the batch of all ranks; None is True.

    Attributes:
        fabric: what moves, wraps and casts.

    Raises:
        UsageError: an unknown strategy.
    """

    def __init__(
        self, device: str, precision: str, strategy: str = "auto", sync_batchnorm: bool | None = None
    ):
        if strategy not in STRATEGIES:
            raise UsageError(f"trainer.strategy must be one of {', '.join(STRATEGIES)}; found {strategy!r}")
        self.device = device
        self.sync_batchnorm = ranks() > 1 and sync_batchnorm is not False
        self.fsdp = ranks() > 1 and strategy == "fsdp"
        self._whole: Method | None = None
        self.fabric = self._make_fabric(precision)

    def _make_fabric(self, precision: str) -> "Fabric":
        from lightning_fabric import Fabric

        # Their notes on precision and on a missing CUDA toolkit would stand between a user and the progress bar.
        for name in ("lightning_fabric", "lightning.fabric", "torch.utils.cpp_extension"):
            logging.getLogger(name).setLevel(logging.ERROR)
        arguments: dict[str, Any] = {"accelerator": self.device, "precision": precision}
        if ranks() == 1:
            return Fabric(devices=1, **arguments)
        place = find_place()
        assert place is not None  # there is a process group
        from lightning_fabric.plugins.environments import TorchElasticEnvironment
        from lightning_fabric.strategies import DDPStrategy

        # Of convolutions of one pixel, whose two memory orders are the same: nothing is copied.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")

        class ByItself(DDPStrategy):
            """All that DDP's strategy knows of ranks, for a module whose ranks talk without a wrapper."""

            def __init__(self, **arguments: Any):
                super().__init__(**arguments)
                self._backward_sync_control = _GradientsLater()  # type: ignore[assignment]

            def setup_module(self, module: nn.Module) -> nn.Module:  # type: ignore[override]
                return module

        environment = TorchElasticEnvironment()
        known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
        # PyTorch renamed it.
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        # Statistics over all ranks are equal on all; others differ, and then rank 0's count.
        wrapper: dict[str, Any] = {"gradient_as_bucket_view": True, buffers: not self.sync_batchnorm}
        strategy = (
            ByItself(cluster_environment=environment)
            if self.fsdp
            else DDPStrategy(cluster_environment=environment, **wrapper)
        )
        fabric = Fabric(
            devices=place.local_ranks,
            num_nodes=place.ranks // place.local_ranks,
            strategy=strategy,
            **arguments,
        )
        fabric.launch()
        return fabric

    def prepare(self, method: Method) -> None:
        """Before an optimiser is made: equal weights on all ranks, statistics over all, weights split over them."""
        if ranks() == 1:
            return
        if self.sync_batchnorm:
            synchronise_batchnorm(method, self.device)
        heads = partial_heads(method)
        own = [f"{name}.{part}" for name in heads for part in ("weight", "sampled")]
        method._ddp_params_and_buffers_to_ignore = own  # type: ignore[assignment]
        if not self.fsdp:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        method.to(memory_format=torch.contiguous_format)  # it takes no other
        self._whole = copy.deepcopy(method) if rank() == 0 else None
        for head in partial_heads(self._whole).values() if self._whole is not None else ():
            head.weight = head.weight[:0]
        for name, tensor in _tensors(method):
            if name not in own:
                dist.broadcast(tensor.data, src=0)
        mesh = init_device_mesh(self.device, (ranks(),))
        ignored = {parameter for name, parameter in method.named_parameters() if name in own}
        for block in _blocks(method.get_submodule("encoder")):
            fully_shard(block, mesh=mesh, ignored_params=ignored)
        # The rest as one: methods call parts of the encoder and the decoder, and only their own forward is sure to run.
        fully_shard(method, mesh=mesh, ignored_params=ignored)

    def whole(self, method: Method) -> Method:
        """The method with all of its weights, for rank 0 to save; every rank must call it."""
        if not self.fsdp:
            return method
        state = self.whole_tensors(method.state_dict())
        if self._whole is None:
            return method
        self._whole.load_state_dict(state)
        return self._whole

    def whole_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of such a method's, whole, for rank 0 to save; every rank must call it."""
        return {key: _full(value) for key, value in tensors.items()}

    def optimiser_state(self, optimiser: torch.optim.Optimizer) -> dict[str, Any]:
        """The optimiser's state with whole tensors, for rank 0 to save; every rank must call it."""
        state = optimiser.state_dict()
        if self.fsdp:
            state["state"] = {
                index: {key: _full(value) for key, value in own.items()}
                for index, own in state["state"].items()
            }
        return state

    def own_state(self, saved: dict[str, Any], optimiser: torch.optim.Optimizer) -> dict[str, Any]:
        """An optimiser's whole state, as saved, with this rank's part of every tensor."""
        if not self.fsdp:
            return saved
        from torch.distributed.tensor import DTensor, distribute_tensor

        parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
        state = {}
        for index, own in saved["state"].items():
            parameter = parameters[index]
            state[index] = {
                key: distribute_tensor(value, parameter.device_mesh, parameter.placements)
                if isinstance(value, Tensor)
                and isinstance(parameter, DTensor)
                and value.shape == parameter.shape
                else value
                for key, value in own.items()
            }
        return {**saved, "state": state}


class _GradientsLater:
    """How Fabric tells a network that FSDP spread that more parts of the batch follow."""

    @contextmanager
    def no_backward_sync(self, module: Any, enabled: bool) -> Iterator[None]:
        module.set_requires_gradient_sync(not enabled)
        yield


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _blocks(encoder: nn.Module) -> Iterator[nn.Module]:
    """The parts of its sequences that are worth gathering one at a time."""
    for child in encoder.children():
        if isinstance(child, (nn.Sequential, nn.ModuleList)):
            for block in child:
                if sum(parameter.numel() for parameter in block.parameters()) >= 10_000:
                    yield block


def _full(value: Any) -> Any:
    return value.full_tensor().cpu() if hasattr(value, "full_tensor") else value


def partial_heads(method: nn.Module) -> dict[str, PartialHead]:
    """The heads of a method whose classes are split over the ranks, by name."""
    return {name: module for name, module in method.named_modules() if isinstance(module, PartialHead)}


def save_classes(method: nn.Module, folder: Path) -> None:
    """Rank 0 writes ``classes.safetensors``: the classes of all ranks, a piece at a time, as if there were one rank.

    The other ranks call :func:`send_classes` meanwhile. Nothing is written for a method without such heads.

    Raises:
        LrfaceError: the disk is full or cannot be written.
    """
    layout = _layout(method)
    if not layout:
        return
    ask_for_help()
    header: dict[str, Any] = {}
    end = 0
    for key, shape, _ in layout:
        start, end = end, end + 4 * math.prod(shape)
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    problem: OSError | None = None
    path = folder / CLASSES
    try:
        file = path.open("wb")
        file.write(struct.pack("<Q", len(text)) + text)
    except OSError as error:
        problem, file = error, open(os.devnull, "wb")  # noqa: SIM115  # the others send all the same
    with file:
        for piece in _pieces(layout):
            try:
                file.write(piece.numpy().data)
            except OSError as error:
                problem = problem or error
    if problem is not None:
        raise explain(problem, path) from problem


def send_classes(method: nn.Module) -> None:
    """What the other ranks do while rank 0 is in :func:`save_classes`."""
    for _ in _pieces(_layout(method)):
        pass


def load_classes(method: nn.Module, folder: Path, momentum: bool = True) -> None:
    """Give each of the method's split heads this rank's classes of a checkpoint, of however many ranks it is.

    Args:
        momentum: the optimiser's state too, and not the weights alone.

    Raises:
        LrfaceError: the file is missing or broken, or of other classes.
    """
    for name, head in partial_heads(method).items():
        path = folder / CLASSES
        try:
            with safe_open(path, "pt") as file:
                rows = {}
                for key in file.keys():  # noqa: SIM118  # it is no dictionary
                    part = key.removeprefix(f"{name}.")
                    if part == key or not (momentum or part == "weight"):
                        continue
                    values = file.get_slice(key)
                    wanted = [head.identities, *([head.weight.shape[1]] if part != "step" else [])]
                    if values.get_shape() != wanted:
                        raise LrfaceError(
                            f"{path}: {key} has shape {values.get_shape()}, the head's classes {wanted}; it is of other "
                            "data or of another embedding"
                        )
                    rows[part] = values[head.first : head.first + len(head.weight)]
        except FileNotFoundError as error:
            raise LrfaceError(
                f"{path} does not exist: the checkpoint has no classes of a partial head; choose another place with "
                "out=DIR, or --restart"
            ) from error
        except (SafetensorError, OSError) as error:
            raise LrfaceError(f"{path} is no readable safetensors file ({error})") from error
        if "weight" not in rows:
            raise LrfaceError(f"{path} has no {name}.weight; choose another place with out=DIR, or --restart")
        head.load_rows(rows)


def _layout(method: nn.Module) -> list[tuple[str, list[int], tuple[PartialHead, Tensor]]]:
    """Name and shape, over all ranks, of what the split heads keep, and this rank's rows of it."""
    return [
        (f"{name}.{part}", [head.identities, *rows.shape[1:]], (head, rows))
        for name, head in partial_heads(method).items()
        for part, rows in sorted(head.rows().items())
    ]


def _pieces(layout: list[tuple[str, list[int], tuple[PartialHead, Tensor]]]) -> Iterator[Tensor]:
    """On rank 0 every piece of every tensor in its order; on the others nothing of use, while they send theirs."""
    for _, shape, (head, rows) in layout:
        step = max(1, PIECE // (4 * math.prod(shape[1:])))
        for owner in range(head.ranks):
            first, last = head.identities * owner // head.ranks, head.identities * (owner + 1) // head.ranks
            for start in range(first, last, step):
                count = min(step, last - start)
                if owner == head.rank:
                    piece = rows[start - first : start - first + count].detach().float().cpu().contiguous()
                    if owner:
                        dist.send(piece, 0)
                    else:
                        yield piece
                elif head.rank == 0:
                    piece = torch.empty(count, *shape[1:])
                    dist.recv(piece, owner)
                    yield piece
