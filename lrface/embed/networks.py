"""What turns a batch of aligned faces into raw features: encoders of lrface, ONNX files, torch.export programs,
functions of the user's own."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from lrface.errors import LrfaceError, UsageError
from lrface.files import read_json
from lrface.models.blocks import channels_last
from lrface.models.insightface_files import BYTES, own_rule, package_says, read_graph, takes_bytes
from lrface.models.python_network import module_and_made

INPUT_SIZE = 112
OPTIONS_OF_FILES = ("colour", "mean", "std", "output", "convention")
"""What may be said about a file of others."""
CARD_KEY = "lrface_card"
"""Where an ONNX file carries lrface's card: a ``metadata_props`` entry of this name, JSON."""


class _Network(Protocol):
    """What turns a batch into raw features: float32 [n, 3, s, s] RGB in [0, 1] -> float32 [n,
    embedding_size]."""

    embedding_size: int
    input_size: int
    card: dict[str, Any]
    file: Path
    precision: str
    largest_batch: int

    def __call__(self, images: Tensor) -> Tensor: ...


class _TorchNetwork:
    """An encoder of lrface (``lrface.train.checkpoint.load_model``)."""

    def __init__(
        self, encoder: nn.Module, card: dict[str, Any], file: Path, device: torch.device, precision: str
    ):
        # Channels last, and batches whose activations stay in the cache: both a third faster on a CPU.
        self._encoder = channels_last(encoder.eval().requires_grad_(False))
        self.largest_batch = 16 if device.type == "cpu" else 256
        self.card = card
        self.file = file
        self.device = device
        self.embedding_size = int(card["embedding_size"])
        self.input_size = _card_size(card, file)
        self.precision = precision
        self.decoder: nn.Module | None = None

    def __call__(self, images: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            return self._encoder(images.to(self.device, memory_format=torch.channels_last)).float()

    def add_decoder(self) -> None:
        """Raises LrfaceError where no decoder was kept with the encoder."""
        from lrface.train.checkpoint import load_decoder

        decoder = load_decoder(self.file, self.card, self._encoder)  # type: ignore[arg-type]
        self.decoder = channels_last(decoder.to(self.device).requires_grad_(False))

    def with_error(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features float32 [n, d], and the mean absolute difference float32 [n] between each image and what the decoder
        draws of its final feature map, clipped to [0, 1]."""
        assert self.decoder is not None
        images = images.to(self.device, memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            feature_map = self._encoder.features(images)  # type: ignore[operator]
            features, drawn = self._encoder.embed(feature_map), self.decoder(feature_map)  # type: ignore[operator]
        return features.float(), (drawn.float().clamp(0, 1) - images).abs().mean(dim=(1, 2, 3))


@dataclass(frozen=True)
class _Said:
    """What was said about the input and output of a graph that others exported.

    Attributes:
        given: names of what was said.
        source: "options", "card beside" (FILE.json), "insightface convention", or "convention": nothing was said.
        insightface: what goes in was said to be insightface's convention.
    """

    swap: bool
    mean: Tensor | None
    std: Tensor | None
    output: str | None
    given: tuple[str, ...]
    source: str
    insightface: bool = False


def _said(
    file: Path,
    colour: str | None,
    mean: float | Sequence[float] | None,
    std: float | Sequence[float] | None,
    output: str | None,
    convention: str | None = None,
) -> _Said:
    options: dict[str, Any] = {
        "colour": colour,
        "mean": mean,
        "std": std,
        "output": output,
        "convention": convention,
    }
    options = {name: value for name, value in options.items() if value is not None}
    beside = described_beside(file)
    if not beside.is_file():
        return _checked_said(options, "options" if options.keys() - {"output"} else "convention")
    if options:
        raise UsageError(
            f"{beside} says what {file.name} takes and gives; leave out {', '.join(options)}, or correct that file"
        )
    content = read_json(beside, "the description of the model")
    unknown = [name for name in content if name not in OPTIONS_OF_FILES]
    if unknown or not content.keys() & {"colour", "convention"}:
        what = f"unknown field {unknown[0]!r}" if unknown else "field 'colour' is missing"
        raise LrfaceError(
            f"{beside}: {what}; it holds colour (RGB or BGR), and may hold mean, std and output, or instead of colour, mean "
            'and std "convention": "insightface"'
        )
    try:
        return _checked_said(content, "card beside")
    except (UsageError, TypeError, ValueError) as error:
        raise LrfaceError(f"{beside}: {error}") from error


def _checked_said(said: Mapping[str, Any], source: str) -> _Said:
    colour, output = said.get("colour"), said.get("output")
    if colour not in (None, "RGB", "BGR"):
        raise UsageError(f"colour must be RGB or BGR; found {colour!r}")
    if not isinstance(output, str | None):
        raise UsageError(f"output must be the name of an output; found {output!r}")
    mean = std = None
    convention = said.get("convention")
    if convention is not None:
        if convention != "insightface":
            raise UsageError(f"convention must be insightface; found {convention!r}")
        others = [name for name in ("colour", "mean", "std") if name in said]
        if others:
            raise UsageError(f"convention insightface says what goes in; leave out {', '.join(others)}")
        return _Said(False, None, None, output, ("convention",), source, insightface=True)
    if source != "convention":
        mean, std = _channels("mean", said.get("mean", 0.0)), _channels("std", said.get("std", 1.0))
        if bool((std == 0).any()):
            raise UsageError("std must not be 0")
    given = tuple(name for name in ("colour", "mean", "std") if name in said)
    return _Said(colour == "BGR", mean, std, output, given, source)


def described_beside(file: str | Path) -> Path:
    """Where a .onnx or .pt2 file of others may be described: FILE.json beside it, ``{"colour": "RGB" or "BGR",
    "mean": ..., "std": ..., "output": ...}``, the options of :func:`load_embedder` of these names."""
    return Path(f"{file}.json")


def _with_convention(file: Path, said: _Said) -> _Said:
    """What insightface gives an ONNX file, where the caller says that it is insightface's, or its package or its graph
    do: see :mod:`lrface.models.insightface_files`. Else what was said."""
    if not said.insightface and said.source != "convention":
        return said
    found = package_says(file)
    if found is None and said.insightface:
        found = own_rule(read_graph(file))
    elif found is None:
        try:
            found = BYTES if takes_bytes(read_graph(file)) else None
        except LrfaceError:  # onnx is not installed: then nothing is known
            pass
    if found is None:
        return said
    return replace(
        said,
        mean=_channels("mean", found[0]),
        std=_channels("std", found[1]),
        source="insightface convention",
    )


def _without_convention(file: Path, said: _Said) -> _Said:
    if said.insightface:
        raise UsageError(f"convention insightface is for .onnx files; say colour, mean and std of {file}")
    return said


class _ForeignNetwork:
    """A graph that others may have exported. What goes in is said by lrface's card in it, by a card beside it, by the
    caller, or by nobody: then by convention."""

    file: Path
    largest_batch: int
    precision = "float32"
    # The graph may fix the batch, or take none smaller.
    _batch: int | None = None
    _smallest: int = 1

    def _run(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def _describe(self, said: _Said, text: str | None, size: int | None, width: int | None) -> None:
        """Fill in what the network is, from lrface's card (``text``) or what was said, and run it once."""
        self._swap, self._mean, self._std = False, None, None
        card = None
        file = self.file
        if text is not None:
            if said.given:
                where = (
                    f"delete {described_beside(file)}"
                    if said.source == "card beside"
                    else f"leave out {', '.join(said.given)}"
                )
                raise UsageError(f"{file} carries lrface's card, which says what goes in; {where}")
            card = _inner_card(file, text)
            if size not in (None, _card_size(card, file)):
                raise LrfaceError(
                    f"{file}: its card says input size {_card_size(card, file)}, its graph takes {size} x "
                    f"{size}; export the model again"
                )
            size = _card_size(card, file)
            if card["input"]["range"] == [-1, 1]:  # exported for insightface
                self._mean = self._std = _channels("mean", 0.5)
        else:
            self._swap, self._mean, self._std = said.swap, said.mean, said.std
        self.input_size = INPUT_SIZE if size is None else size
        # A graph need not declare its width: one grey image shows it, and that the network runs at all.
        shown = self(torch.full((1, 3, self.input_size, self.input_size), 0.5)).shape[1]
        if width not in (None, shown):
            raise LrfaceError(f"{file}: its output is declared {width} wide and gives {shown} values")
        self.embedding_size = shown
        if card is not None and card.get("embedding_size") != shown:
            raise LrfaceError(
                f"{file}: its card says embedding_size {card.get('embedding_size')}, the network gives "
                f"{shown}; export the model again"
            )
        self.card = self._described(said) if card is None else card
        if said.output is not None:
            self.card = {**self.card, "output": said.output}

    def _described(self, said: _Said) -> dict[str, Any]:
        """A card for a file that has none: what is known, and whose word it is."""
        normalisation: Any = "inside"
        if self._mean is not None and self._std is not None:
            normalisation = {"mean": self._mean.flatten().tolist(), "std": self._std.flatten().tolist()}
        return {
            "format": self.file.suffix.lower().removeprefix("."),
            "embedding_size": self.embedding_size,
            "input": {
                "size": self.input_size,
                "colour": "BGR" if self._swap else "RGB",
                "range": [0, 1],
                "normalisation": normalisation,
            },
            "described_by": said.source,
        }

    def __call__(self, images: Tensor) -> Tensor:
        images = images.to("cpu", torch.float32)  # through numpy, wherever onnxruntime computes
        images = self._as_the_graph_takes_them(images)
        if self._batch is None and len(images) >= self._smallest:
            return self._run(images)
        # The graph fixes the batch, or its least: the last one is filled up with black images.
        step = self._batch or self._smallest
        parts = []
        for start in range(0, len(images), step):
            part = images[start : start + step]
            padded = torch.zeros(step, *images.shape[1:])
            padded[: len(part)] = part
            parts.append(self._run(padded)[: len(part)])
        return torch.cat(parts)

    def _as_the_graph_takes_them(self, images: Tensor) -> Tensor:
        """Colours swapped and normalised. In numpy: PyTorch's threads, once woken, wait in a loop for more and hold up those
        of the library that runs the graph (2 cores: 257 instead of 630 images a second)."""
        array = images.detach().numpy()
        if self._swap:
            array = array[:, ::-1]
        if self._mean is not None and self._std is not None:
            mean, std = self._mean.numpy(), self._std.numpy()
            if (mean != 0).any() or (std != 1).any():
                array = (array - mean) / std
        return torch.from_numpy(np.ascontiguousarray(array))


class _OnnxNetwork(_ForeignNetwork):
    """An ONNX file run by onnxruntime."""

    def __init__(self, file: Path, device: torch.device, threads: int | None, said: _Said):
        self.file = file
        self.largest_batch = 4 if device.type == "cpu" else 256  # activations stay in the cache
        self._session = _onnx_session(file, device, threads)
        self._input, self._type, size, self._batch = _onnx_input(file, self._session)
        self._output, width = _onnx_output(file, self._session, said.output)
        text = self._session.get_modelmeta().custom_metadata_map.get(CARD_KEY)
        self._describe(said if text is not None else _with_convention(file, said), text, size, width)

    def _run(self, images: Tensor) -> Tensor:
        array = images.numpy().astype(self._type, copy=False)
        try:
            result = self._session.run([self._output], {self._input: np.ascontiguousarray(array)})[0]
        except Exception as error:  # onnxruntime's own errors share no base class below Exception
            raise LrfaceError(
                f"{self.file} fails on a batch of shape {list(array.shape)}: {_first_line(error)}"
            ) from error
        _check_embedding(f"{self.file}: output {self._output!r}", result, len(array))
        return torch.from_numpy(result.astype(np.float32, copy=False))


class _ExportedNetwork(_ForeignNetwork):
    """A torch.export program, run operator by operator by :mod:`lrface.exported`."""

    def __init__(self, file: Path, device: torch.device, threads: int | None, said: _Said):
        from lrface.exported import ExportedProgram

        if threads is not None:
            torch.set_num_threads(threads)
        self.file = file
        self._device = device
        self._program = ExportedProgram(file, device)
        least, most = self._program.smallest_batch, self._program.largest_batch
        self.largest_batch = min(most or 256, 16 if device.type == "cpu" else 256)
        self._batch, self._smallest = (most if least == most else None), least
        outputs = self._program.outputs
        if said.output is None and len(outputs) != 1:
            raise UsageError(
                f"{file} has {len(outputs)} outputs ({', '.join(outputs)}); name the embedding with output=..."
            )
        if said.output is not None and said.output not in outputs:
            raise UsageError(f"{file} has no output {said.output!r}; it has {', '.join(outputs)}")
        self._output = said.output or outputs[0]
        self._describe(_without_convention(file, said), self._program.card, self._program.input_size, None)

    def _run(self, images: Tensor) -> Tensor:
        try:
            with torch.inference_mode():
                result = self._program(images.to(self._device, self._program.input_type))[self._output]
        except (RuntimeError, TypeError, ValueError, KeyError, IndexError, NotImplementedError) as error:
            raise LrfaceError(
                f"{self.file} fails on a batch of shape {list(images.shape)}: {_first_line(error)}"
            ) from error
        _check_embedding(f"{self.file}: output {self._output!r}", result, len(images))
        return result.float().cpu()


class _PythonNetwork:
    """What a function of the user's own module gives: a callable, float32 [n, 3, s, s] RGB in [0, 1] -> [n, d]."""

    precision = "float32"

    def __init__(self, text: str, device: torch.device, threads: int | None):
        if threads is not None:
            torch.set_num_threads(threads)
        self._text, self._device = text, device
        self.largest_batch = 16 if device.type == "cpu" else 256
        self.file, made = _made_by_user(text)
        if isinstance(made, nn.Module):
            made = made.eval().requires_grad_(False).to(device)
        self._callable = made
        self.input_size = getattr(made, "input_size", INPUT_SIZE)
        if not isinstance(self.input_size, int) or isinstance(self.input_size, bool) or self.input_size < 1:
            raise LrfaceError(f"{text}: its input_size must be a whole number; found {self.input_size!r}")
        self.embedding_size = self(torch.full((1, 3, self.input_size, self.input_size), 0.5)).shape[1]
        self.card: dict[str, Any] = {
            "format": "python",
            "made_by": text,
            "embedding_size": self.embedding_size,
            "input": {"size": self.input_size, "colour": "RGB", "range": [0, 1], "normalisation": "inside"},
            "described_by": "module:function",
        }

    def __call__(self, images: Tensor) -> Tensor:
        images = images.to(self._device, torch.float32)
        try:
            result = self._callable(images)
        except Exception as error:  # anything may go wrong in code of the user's
            raise LrfaceError(
                f"{self._text} fails on a batch of shape {list(images.shape)}: {type(error).__name__}: "
                f"{_first_line(error)}"
            ) from error
        if not isinstance(result, Tensor):
            raise LrfaceError(
                f"{self._text} gives {type(result).__name__}; an embedding is a tensor [{len(images)}, d]"
            )
        _check_embedding(self._text, result, len(images))
        return result.detach().float().cpu()


_MODULE_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def _made_by_user(text: str) -> tuple[Path, Callable[[Tensor], Tensor]]:
    """The source of the module in ``module:function``, and what the function gives."""
    module, made = module_and_made(text)
    source = getattr(module, "__file__", None)
    if source is None or not callable(made):
        raise LrfaceError(
            f"{text}: the function must give something that turns images [n, 3, 112, 112] into features [n, d], and "
            f"its module must have a source file; found {type(made).__name__} of {source}"
        )
    return Path(source), made


def _check_embedding(what: str, result: Any, images: int) -> None:
    if result.ndim != 2 or len(result) != images:
        raise LrfaceError(
            f"{what} has shape {list(result.shape)} for {images} images; an embedding is [{images}, d]"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _channels(name: str, value: float | Sequence[float]) -> Tensor:
    """One number or three, as [1, 3, 1, 1]."""
    numbers = [float(value)] * 3 if isinstance(value, int | float) else [float(each) for each in value]
    if len(numbers) != 3 or not all(math.isfinite(number) for number in numbers):
        raise UsageError(
            f"{name} must be one number or three, in the network's channel order; found {value!r}"
        )
    return torch.tensor(numbers).view(1, 3, 1, 1)


def _card_size(card: Mapping[str, Any], file: Path) -> int:
    size = card.get("input", {}).get("size")
    if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise LrfaceError(
            f"{file}: the card's field 'input.size' must be one whole number of pixels; found {size!r}"
        )
    return size


def _onnx_session(file: Path, device: torch.device, threads: int | None) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise LrfaceError(
            f"{file} needs onnxruntime, which cannot be imported ({error}): pip install onnxruntime"
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type != "cpu":
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise LrfaceError(
                f"device {device}: this onnxruntime has no CUDA; pip install onnxruntime-gpu, or take "
                "device='cpu'"
            )
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=providers)
    except Exception as error:  # onnxruntime's own errors share no base class below Exception
        raise LrfaceError(
            f"{file} is no ONNX model that onnxruntime can run: {_first_line(error)}"
        ) from error
    if device.type != "cpu" and session.get_providers()[0] != "CUDAExecutionProvider":
        raise LrfaceError(
            f"device {device}: onnxruntime could not start CUDA and offered the CPU; take device='cpu'"
        )
    return session


def _onnx_input(file: Path, session: Any) -> tuple[str, type[np.generic], int | None, int | None]:
    """Name, number type, side and batch of the only input; None for what the graph leaves open."""
    inputs = session.get_inputs()
    if len(inputs) != 1:
        raise LrfaceError(
            f"{file} takes {len(inputs)} inputs ({', '.join(each.name for each in inputs)}); a face embedder "
            "takes one, images [n, 3, 112, 112]"
        )
    entry = inputs[0]
    types: dict[str, type[np.generic]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    if entry.type not in types:
        raise LrfaceError(
            f"{file}: input {entry.name!r} takes {entry.type}; a face embedder takes tensor(float)"
        )
    shape = [side if isinstance(side, int) else None for side in entry.shape]
    if len(shape) != 4 or shape[1] not in (3, None) or shape[2] != shape[3]:
        raise LrfaceError(
            f"{file}: input {entry.name!r} has shape {entry.shape}; a face embedder takes square images "
            "[n, 3, side, side] (channels before rows)"
        )
    return entry.name, types[entry.type], shape[2], shape[0]


def _onnx_output(file: Path, session: Any, wanted: str | None) -> tuple[str, int | None]:
    outputs = {each.name: each for each in session.get_outputs()}
    if wanted is None:
        if len(outputs) != 1:
            raise UsageError(
                f"{file} has {len(outputs)} outputs ({', '.join(outputs)}); name the embedding with "
                "output=..."
            )
        wanted = next(iter(outputs))
    if wanted not in outputs:
        raise UsageError(f"{file} has no output {wanted!r}; it has {', '.join(outputs)}")
    shape = outputs[wanted].shape
    if len(shape) != 2:
        raise LrfaceError(f"{file}: output {wanted!r} has shape {shape}; an embedding is [n, d]")
    return wanted, shape[1] if isinstance(shape[1], int) else None


def _inner_card(file: Path, text: str) -> dict[str, Any]:
    from lrface.train.checkpoint import check_card

    try:
        card = json.loads(text)
    except ValueError as error:
        raise LrfaceError(
            f"{file}: its metadata {CARD_KEY!r} is no JSON: {error}; export the model again"
        ) from error
    if not isinstance(card, dict):
        raise LrfaceError(
            f"{file}: its metadata {CARD_KEY!r} must hold a JSON object; found {type(card).__name__}"
        )
    check_card(card, file, ([0, 1], [-1, 1]))
    return card


def _device(name: str | torch.device) -> torch.device:
    """ "auto" takes the GPU where there is one; an explicit device is never replaced by another."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device must be auto, cpu, cuda or cuda:K; found {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device must be auto, cpu, cuda or cuda:K; found {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device {device}: PyTorch finds {torch.cuda.device_count()} GPUs here; take device='cpu'"
        )
    return device


def _is_module_function(model: str | Path) -> bool:
    return isinstance(model, str) and bool(_MODULE_FUNCTION.fullmatch(model)) and not Path(model).exists()


def thresholds_file(model: str | Path) -> Path:
    """Where a model's operating thresholds are: the card beside a .safetensors file, NAME.onnx.thresholds.json beside
    an ONNX file."""
    file = Path(model)
    if file.suffix == ".safetensors":
        return file.with_suffix(".json")
    return file.with_name(f"{file.name}.thresholds.json")


def _thresholds_of(network: "_Network") -> Path:
    if isinstance(network, _PythonNetwork):  # a module may hold several functions
        function = network.card["made_by"].partition(":")[2]
        return network.file.with_name(f"{network.file.name}.{function}.thresholds.json")
    return thresholds_file(network.file)


def _kept_thresholds(file: Path, sidecar: Path) -> dict[str, Any]:
    """Thresholds and probabilities measured for exactly this file; nothing where there are none."""
    if not sidecar.is_file():
        return {}
    kept = read_json(sidecar, "the thresholds of the model")
    with file.open("rb") as opened:
        if kept.get("model_sha256") != hashlib.file_digest(opened, "sha256").hexdigest():
            return {}  # another file of the same name: compare() says that it is not calibrated
    return {key: kept[key] for key in ("thresholds", "thresholds_measured", "probability") if key in kept}


def _load_torch(path: Path, device: torch.device, precision: str, threads: int | None) -> _TorchNetwork:
    from lrface.train.checkpoint import find_model, load_model

    try:
        weights = find_model(path)
    except LrfaceError as error:
        others = sorted([*path.glob("*.onnx"), *path.glob("*.safetensors")]) if path.is_dir() else []
        if not others:
            raise
        raise LrfaceError(
            f"{error}; it holds {', '.join(other.name for other in others)}: name the file"
        ) from error
    encoder, card = load_model(weights, device)
    if not card["embedding_size"]:
        name = card["architecture"]["name"]
        raise LrfaceError(f"{weights} is {name}, a corruption network: it draws images and embeds none")
    if card["input"]["colour"] != "RGB":
        raise LrfaceError(
            f"{weights} takes {card['input']['colour']} images; faces are embedded by networks of RGB images"
        )
    if threads is not None:
        torch.set_num_threads(threads)
    return _TorchNetwork(encoder, card, weights, device, precision)
