"""From images to embeddings: one call for crops and photographs, one for folders of them.

    from lrface import load_embedder
    embedder = load_embedder("runs/qualnet_lm")            # or model.onnx, model.safetensors
    found = embedder.embed(["anna.jpg", "group.jpg"], faces="all")
    found.vectors, found.source, found.effective_resolution

A network takes RGB float in [0, 1] and gives raw features; :class:`FaceEmbedder` puts decoding, detection,
alignment and batching before it and scaling to unit length behind it.
"""

import csv
import hashlib
import importlib
import json
import math
import os
import platform
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import lrface
from lrface.degrade.resolution import resize
from lrface.errors import LrfaceError, UsageError
from lrface.files import atomic_file, read_json
from lrface.models.blocks import channels_last
from lrface.progress import progress as progress_bar

if TYPE_CHECKING:
    from lrface.align.detect import FaceDetector

INPUT_SIZE = 112
CARD_KEY = "lrface_card"
"""Where an ONNX file carries lrface's card: a ``metadata_props`` entry of this name, JSON."""

KINDS = ("auto", "crop", "photo")
QUALITIES = ("norm", "reconstruction")
PRECISIONS = ("float32", "bfloat16")

UNCALIBRATED_THRESHOLD = 0.3
"""The cosine above which two faces are called the same where neither the caller nor the card gives one.

Not calibrated for any model: a middle value for networks trained with margin losses. For one MobileFaceNet on
500 pairs of LFW photographs the best threshold was 0.26, and 0.3 decided 99.4 % of them rightly.
"""

# A block is what is decoded, detected and embedded together: it bounds memory, whatever the length of the
# job.
_BLOCK_PIXELS = 32_000_000


# --------------------------------------------------------------------------------------------------- networks


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
        source: "options", "card beside" (FILE.json), or "convention": nothing was said.
    """

    swap: bool
    mean: Tensor | None
    std: Tensor | None
    output: str | None
    given: tuple[str, ...]
    source: str


def _said(
    file: Path,
    colour: str | None,
    mean: float | Sequence[float] | None,
    std: float | Sequence[float] | None,
    output: str | None,
) -> _Said:
    options: dict[str, Any] = {"colour": colour, "mean": mean, "std": std, "output": output}
    options = {name: value for name, value in options.items() if value is not None}
    beside = described_beside(file)
    if not beside.is_file():
        return _checked_said(options, "options" if options.keys() - {"output"} else "convention")
    if options:
        raise UsageError(
            f"{beside} says what {file.name} takes and gives; leave out {', '.join(options)}, or correct that file"
        )
    content = read_json(beside, "the description of the model")
    unknown = [name for name in content if name not in ("colour", "mean", "std", "output")]
    if unknown or "colour" not in content:
        what = f"unknown field {unknown[0]!r}" if unknown else "field 'colour' is missing"
        raise LrfaceError(
            f"{beside}: {what}; it holds colour (RGB or BGR), and may hold mean, std and output"
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
        if self._swap:
            images = images.flip(1)
        if self._mean is not None and self._std is not None:
            images = (images - self._mean) / self._std
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


class _OnnxNetwork(_ForeignNetwork):
    """An ONNX file run by onnxruntime."""

    def __init__(self, file: Path, device: torch.device, threads: int | None, said: _Said):
        self.file = file
        self.largest_batch = 4 if device.type == "cpu" else 256  # activations stay in the cache
        self._session = _onnx_session(file, device, threads)
        self._input, self._type, size, self._batch = _onnx_input(file, self._session)
        self._output, width = _onnx_output(file, self._session, said.output)
        text = self._session.get_modelmeta().custom_metadata_map.get(CARD_KEY)
        self._describe(said, text, size, width)

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
        self._describe(said, self._program.card, self._program.input_size, None)

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
    name, _, function = text.partition(":")
    # As `python -m` does: modules of the current directory come first, while this one is imported and called.
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(name)
        made = getattr(module, function)()
    except Exception as error:  # anything may go wrong in code of the user's
        raise LrfaceError(
            f"{text}: {type(error).__name__}: {_first_line(error)}; the module is imported from the current "
            "directory or an installed package, and the function is called without arguments"
        ) from error
    finally:
        sys.path.remove(os.getcwd())
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
    check_card(card, file)
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


def load_embedder(
    model: str | Path,
    *,
    device: str | torch.device = "cpu",
    precision: str = "float32",
    threads: int | None = None,
    min_face_size: int | None = None,
    min_score: float | None = None,
    detector: "FaceDetector | None" = None,
    detector_model: str | Path | None = None,
    colour: str | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    output: str | None = None,
    quality: str = "norm",
) -> "FaceEmbedder":
    """A model, ready to embed.

    Args:
        model: a ``.onnx`` file, a ``.safetensors`` file with its JSON card beside it, a directory that holds
            ``model.safetensors`` and ``model.json``, a run directory of ``lrface train``, a torch.export
            program (``.pt2``, see :mod:`lrface.exported`), or ``"module:function"``: a function without
            arguments of a module in the current directory or installed, which gives a callable float32
            [n, 3, s, s] RGB in [0, 1] -> [n, d], with s its ``input_size`` where it has one, else 112. Only
            that last kind runs code of the model's author.
        device: "auto", "cpu", "cuda" or "cuda:K", for the network and the detector.
        precision: "float32", or "bfloat16" (autocast; safetensors models only).
        threads: CPU threads. For an ONNX file of this session alone; for PyTorch the count is the whole
            process's (``torch.set_num_threads``), set once here. None leaves the library's choice.
        min_face_size: the smallest face looked for in photographs, in pixels; see
            :func:`lrface.align.detect.load_detector` for this and the next two. None takes its default.
        min_score: how sure the detector must be of a face, 0 to 1.
        detector_model: an SCRFD or RetinaFace ONNX file; None finds faces with MTCNN.
        detector: a detector of your own instead.
        colour, mean, std: only for a .onnx or .pt2 file that others exported, where it does not follow lrface's
            convention (RGB in [0, 1], normalisation inside): the network is given ``(x - mean) / std`` with x
            in [0, 1] and channels in the order ``colour``, "RGB" or "BGR". ``mean`` and ``std`` are one
            number or three in that order. A network that wants pixels in [-1, 1] takes ``mean=0.5, std=0.5``;
            one that wants 0 to 255 takes ``mean=0, std=1/255``. Nothing is guessed from names. The same may be
            written in a card beside the file: see :func:`described_beside`.
        output: name of the embedding, where such a file has several outputs.
        quality: "norm", or "reconstruction": also give the reconstruction error of every face, for which the
            model must be a finished run of `lrface train` with a decoder (QualNet).

    Raises:
        UsageError: an option with a wrong value, or one that does not fit this kind of model.
        LrfaceError: nothing there, not a model, a card that does not fit its weights, or an input or output
            of another shape than a face embedder's.
    """
    path = Path(model).expanduser()
    if quality not in QUALITIES:
        raise UsageError(f"quality must be one of {', '.join(QUALITIES)}; found {quality!r}")
    if precision not in PRECISIONS:
        raise UsageError(f"precision must be one of {', '.join(PRECISIONS)}; found {precision!r}")
    if threads is not None and threads < 1:
        raise UsageError(f"threads must be at least 1; found {threads}")
    place = _device(device)
    settings = {"model": detector_model, "min_face_size": min_face_size, "min_score": min_score}
    given = {key: value for key, value in settings.items() if value is not None}
    if detector is not None and given:
        raise UsageError(
            "min_face_size, min_score and detector_model are not for a detector of your own; leave them out"
        )
    network: _Network
    kind = path.suffix.lower()
    if kind in (".onnx", ".pt2"):
        if not path.is_file():
            raise LrfaceError(
                f"{path}: no such file; give a .onnx, .pt2 or .safetensors file, or a directory made by `lrface "
                "train RECIPE`"
            )
        if precision != "float32":
            raise UsageError(
                f"precision {precision} is for safetensors models; a {kind} file computes as it was exported"
            )
        said = _said(path, colour, mean, std, output)
        foreign = _OnnxNetwork if kind == ".onnx" else _ExportedNetwork
        network = foreign(path, place, threads, said)
    else:
        for name, value in (("colour", colour), ("mean", mean), ("std", std), ("output", output)):
            if value is not None:
                raise UsageError(
                    f"{name} describes a .onnx or .pt2 file of others; {path} says itself what it takes"
                )
        if _is_module_function(model):
            if precision != "float32":
                raise UsageError(
                    f"precision {precision} is for safetensors models; {model} computes as it likes"
                )
            network = _PythonNetwork(str(model), place, threads)
        else:
            network = _load_torch(path, place, precision, threads)
    if network.file.suffix != ".safetensors":
        network.card.update(_kept_thresholds(network.file, _thresholds_of(network)))
    if quality == "reconstruction":
        if not isinstance(network, _TorchNetwork):
            raise UsageError(
                f"quality reconstruction needs the decoder of a run of `lrface train`; {model} is no such run"
            )
        network.add_decoder()
    name = path.stem if path.is_file() or kind in (".onnx", ".pt2") else path.resolve().name
    embedder = FaceEmbedder(network, name, place, given, detector)
    if detector is None:
        options = {
            "colour": colour,
            "mean": mean,
            "std": std,
            "output": output,
            "quality": quality,
            **settings,
        }
        options["detector_model"] = options.pop("model")
        if detector_model is not None:
            options["detector_model"] = Path(detector_model).expanduser().resolve()
        made_from = str(model) if _is_module_function(model) else path.resolve()
        embedder._made_by = (made_from, {"device": str(device), "precision": precision, **options})
    return embedder


def _is_module_function(model: str | Path) -> bool:
    return isinstance(model, str) and bool(_MODULE_FUNCTION.fullmatch(model)) and not Path(model).exists()


def parse_model(text: str) -> tuple[str, dict[str, Any]]:
    """A model as command lines name it: ``MODEL`` or ``MODEL@colour=BGR,mean=0.5,std=1/255,output=NAME``.

    Numbers may be fractions; three of them, one a channel, have colons between: ``mean=0.485:0.456:0.406``.

    Returns:
        The model and the options of :func:`load_embedder` of these names.

    Raises:
        UsageError: an unknown option or no number.
    """
    model, at, tail = text.rpartition("@")
    if not at or "=" not in tail or Path(text).exists():
        return text, {}
    options: dict[str, Any] = {}
    for part in tail.split(","):
        name, equals, value = part.partition("=")
        if not equals or name not in ("colour", "mean", "std", "output") or name in options:
            raise UsageError(
                f"model {text}: found {part!r} after the @; give colour=RGB or colour=BGR, mean=NUMBER, std=NUMBER, "
                "output=NAME, each at most once, with commas between"
            )
        if name in ("mean", "std"):
            try:
                numbers = [float(Fraction(number)) for number in value.split(":")]
            except (ValueError, ZeroDivisionError) as error:
                raise UsageError(
                    f"model {text}: {name} takes one number or three with colons between (0.5, 1/255, "
                    f"0.485:0.456:0.406); found {value!r}"
                ) from error
            options[name] = numbers[0] if len(numbers) == 1 else numbers
        else:
            options[name] = value
    return model, options


def open_model(text: str, **options: Any) -> "FaceEmbedder":
    """:func:`load_embedder` for a model as command lines name it, see :func:`parse_model`."""
    model, described = parse_model(text)
    return load_embedder(model, **described, **options)


def undescribed(embedder: "FaceEmbedder") -> str | None:
    """For a file of others about whose input nobody has said anything: how to say it. None for any other model."""
    if embedder.card.get("described_by") != "convention":
        return None
    file = embedder.file
    return (
        f"name it as {file}@colour=BGR,mean=0.5,std=0.5 (the network gets (x - mean) / std of pixels x in [0, 1]; "
        f"{file}@colour=RGB where it normalises inside), or write {described_beside(file)} beside it: "
        '{"colour": "BGR", "mean": 0.5, "std": 0.5}'
    )


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
    """Thresholds measured for exactly this file; nothing where there are none."""
    if not sidecar.is_file():
        return {}
    kept = read_json(sidecar, "the thresholds of the model")
    with file.open("rb") as opened:
        if kept.get("model_sha256") != hashlib.file_digest(opened, "sha256").hexdigest():
            return {}  # another file of the same name: compare() says that it is not calibrated
    return {key: kept[key] for key in ("thresholds", "thresholds_measured") if key in kept}


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


# ---------------------------------------------------------------------------------------------------- results


@dataclass
class Embeddings:
    """n faces, in the order of the images they came from.

    Attributes:
        vectors: float32 [n, d], of unit length.
        box: float32 [n, 4], left, top, right, bottom in pixels of the photograph; NaN for crops.
        score: float32 [n], how sure the detector was, 0 to 1; NaN for crops.
        landmarks: float32 [n, 5, 2], x and y in pixels of the photograph; NaN for crops.
        effective_resolution: float32 [n], how many pixels of the original image span the aligned face: a
            crop's own side, or for a photograph :func:`lrface.align.warp.effective_resolution`.
        source: int64 [n], position of the image in the input.
        quality: float32 [n], length of the feature before it was made a unit vector (with ``flip`` of the sum of
            both); networks trained with a margin give longer ones for clearer faces. Its scale is the model's own.
        failures: ``(position, reason)`` of every image that gave no face.
        reconstruction_error: float32 [n], mean absolute difference between the aligned face and what the model's
            decoder draws of its final feature map, 0 to 1; None unless the embedder was loaded with
            ``quality="reconstruction"``.
    """

    vectors: np.ndarray
    box: np.ndarray
    score: np.ndarray
    landmarks: np.ndarray
    effective_resolution: np.ndarray
    source: np.ndarray
    quality: np.ndarray
    failures: list[tuple[int, str]] = field(default_factory=list)
    reconstruction_error: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.vectors)


def _joined(parts: Sequence[Embeddings], width: int, reconstruction: bool = False) -> Embeddings:
    empty = Embeddings(
        np.zeros((0, width), np.float32),
        np.zeros((0, 4), np.float32),
        np.zeros(0, np.float32),
        np.zeros((0, 5, 2), np.float32),
        np.zeros(0, np.float32),
        np.zeros(0, np.int64),
        np.zeros(0, np.float32),
    )
    parts = [empty, *parts]
    errors = [part.reconstruction_error for part in parts if part.reconstruction_error is not None]
    return Embeddings(
        np.concatenate([part.vectors for part in parts]),
        np.concatenate([part.box for part in parts]),
        np.concatenate([part.score for part in parts]),
        np.concatenate([part.landmarks for part in parts]),
        np.concatenate([part.effective_resolution for part in parts]),
        np.concatenate([part.source for part in parts]),
        np.concatenate([part.quality for part in parts]),
        [failure for part in parts for failure in part.failures],
        np.concatenate([np.zeros(0, np.float32), *errors]) if reconstruction else None,
    )


def similarity(a: "np.ndarray | Embeddings", b: "np.ndarray | Embeddings") -> np.ndarray:
    """Cosine of every pair: [n, d] and [m, d] (or one vector [d]) -> float32 [n, m], between -1 and 1.

    Raises UsageError for widths that differ, or a vector without direction (all zero or not finite).
    """
    left, right = (
        np.atleast_2d(np.asarray(each.vectors if isinstance(each, Embeddings) else each, dtype=np.float32))
        for each in (a, b)
    )
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[1]:
        raise UsageError(
            f"similarity takes vectors of one width, [n, d] and [m, d]; found {list(left.shape)} and "
            f"{list(right.shape)}"
        )
    units = []
    for vectors in (left, right):
        norm = np.linalg.norm(vectors, axis=1, keepdims=True)
        if not (np.isfinite(norm) & (norm > 0)).all():
            raise UsageError(
                "similarity takes vectors with a direction; found one that is zero or not finite"
            )
        units.append(vectors / norm)
    return np.clip(units[0] @ units[1].T, -1.0, 1.0)


@dataclass(frozen=True)
class Comparison:
    """Whether two images show one person.

    Attributes:
        similarity: cosine, -1 to 1.
        verdict: True for the same person: ``similarity >= threshold``.
        threshold: the cosine it was held against.
        threshold_from: "given" (by the caller), "card" (measured for this model) or "default" (neither).
        effective_resolutions: of the two faces, in pixels.
    """

    similarity: float
    verdict: bool
    threshold: float
    threshold_from: str
    effective_resolutions: tuple[float, float]

    @property
    def calibrated(self) -> bool:
        """Whether the threshold was chosen for this model; the default is not."""
        return self.threshold_from != "default"

    @property
    def statement(self) -> str:
        """The verdict in a sentence, with what it rests on."""
        origin = {
            "given": "the threshold given",
            "card": "the threshold on the model's card",
            "default": "an uncalibrated default threshold: this model's card has none, so measure it with "
            "`lrface calibrate` or give your own",
        }[self.threshold_from]
        who, sign = ("same person", ">=") if self.verdict else ("different people", "<")
        return f"{who}: similarity {self.similarity:.3f} {sign} {self.threshold:.3f} ({origin})"


def _card_threshold(card: Mapping[str, Any], resolution: float, name: str) -> float | None:
    """The card's threshold measured nearest to ``resolution``, on a scale of doublings; None where it has
    none."""
    thresholds = card.get("thresholds")
    if not thresholds:
        return None
    try:
        table = {float(size): float(value) for size, value in thresholds.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise LrfaceError(
            f"model {name}: the card's field 'thresholds' must map a resolution to a cosine, as in "
            f'{{"112": 0.28}}; found {thresholds!r}'
        ) from error
    if any(size <= 0 or not -1 <= value <= 1 for size, value in table.items()):
        raise LrfaceError(
            f"model {name}: the card's field 'thresholds' must hold positive resolutions and cosines between "
            f"-1 and 1; found {thresholds!r}"
        )
    return table[min(table, key=lambda size: (abs(math.log(size / resolution)), -size))]


# ----------------------------------------------------------------------------------------------------- intake


class _Unusable(Exception):
    """This one image cannot be embedded; the message is the reason."""


@dataclass
class _Item:
    """One input image: its position, what it is called in messages, and the thing itself."""

    index: int
    label: str
    value: Any


@dataclass
class _Face:
    """One face on its way to the network: float32 [3, s, s] in [0, 1] and where it came from."""

    pixels: Tensor
    box: np.ndarray
    score: float
    landmarks: np.ndarray
    resolution: float
    source: int


def _items(images: Any) -> list[_Item]:
    """Whatever :meth:`FaceEmbedder.embed` takes, as single images."""
    values: list[Any]
    if isinstance(images, str | os.PathLike | bytes | bytearray | memoryview | Image.Image):
        values = [images]
    elif isinstance(images, np.ndarray | Tensor):
        if images.ndim not in (2, 3, 4):
            raise UsageError(f"an image has 2 or 3 axes, a batch 4; found shape {list(images.shape)}")
        values = list(images) if images.ndim == 4 else [images]
    elif isinstance(images, Iterable):
        values = list(images)
    else:
        raise UsageError(f"embed takes images or a list of them; found {type(images).__name__}")
    items = []
    for index, value in enumerate(values):
        if isinstance(value, str | os.PathLike):
            label = os.fspath(value)
        elif isinstance(value, bytes | bytearray | memoryview | Image.Image | np.ndarray | Tensor):
            label = f"image {index}"
        else:
            raise UsageError(
                f"image {index} is a {type(value).__name__}; embed takes paths, bytes, PIL images, numpy "
                "arrays [h, w, 3] and tensors [3, h, w]"
            )
        items.append(_Item(index, str(label), value))
    return items


def _decode(item: _Item) -> np.ndarray | Tensor:
    """uint8 [h, w, 3], or float32 [3, h, w] in [0, 1] for an image that came in floating point.

    Raises _Unusable.
    """
    value = item.value
    if isinstance(value, Tensor):
        return _from_channels_first(value.detach().cpu())
    if isinstance(value, np.ndarray):
        return _from_array(value)
    from lrface.align.pipeline import UnreadableImage, read_photo

    try:
        if isinstance(value, Image.Image):
            return read_photo(value)
        return read_photo(Path(value) if isinstance(value, str | os.PathLike) else bytes(value))
    except UnreadableImage as error:
        raise _Unusable(str(error)) from error


def _from_array(array: np.ndarray) -> np.ndarray | Tensor:
    """numpy [h, w], [h, w, 1] or [h, w, 3] as :func:`_decode` gives it. Raises _Unusable."""
    shape = list(array.shape)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3) or 0 in array.shape:
        raise _Unusable(f"an array must be RGB [h, w, 3] or grey [h, w]; found shape {shape}")
    if array.dtype == np.uint8:
        return np.repeat(array, 3, axis=2) if array.shape[2] == 1 else np.ascontiguousarray(array)
    if not np.issubdtype(array.dtype, np.floating):
        raise _Unusable(f"an array must be uint8, or floating point in [0, 1]; found {array.dtype}")
    return _from_channels_first(
        torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1), dtype=np.float32))
    )


def _from_channels_first(tensor: Tensor) -> np.ndarray | Tensor:
    """A tensor [3, h, w], [1, h, w] or [h, w] as :func:`_decode` gives it. Raises _Unusable."""
    shape = list(tensor.shape)
    if tensor.ndim == 2:
        tensor = tensor[None]
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3) or 0 in tensor.shape:
        raise _Unusable(f"a tensor must be RGB [3, h, w] or grey [1, h, w]; found shape {shape}")
    tensor = tensor.expand(3, *tensor.shape[1:])
    if tensor.dtype == torch.uint8:
        return np.ascontiguousarray(tensor.permute(1, 2, 0).numpy())
    if not tensor.is_floating_point():
        raise _Unusable(f"a tensor must be uint8, or floating point in [0, 1]; found {tensor.dtype}")
    tensor = tensor.float()
    low, high = float(tensor.min()), float(tensor.max())
    # What enlarging by bicubic overshoots, or rounding, is forgiven; 0 to 255 and [-1, 1] are not.
    if not (low >= -0.1 and high <= 1.1):
        raise _Unusable(f"floating point pixels must lie in [0, 1]; found {low:g} to {high:g}")
    return tensor.clamp(0.0, 1.0)


def _sides(image: np.ndarray | Tensor) -> tuple[int, int]:
    """Height and width of what :func:`_decode` gives."""
    return (
        (image.shape[0], image.shape[1])
        if isinstance(image, np.ndarray)
        else (image.shape[1], image.shape[2])
    )


def _as_tensor(image: np.ndarray | Tensor) -> Tensor:
    """float32 [3, h, w] in [0, 1]."""
    if isinstance(image, Tensor):
        return image
    return torch.from_numpy(
        np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32) / np.float32(255)
    )


def _as_photo(image: np.ndarray | Tensor) -> np.ndarray:
    """uint8 [h, w, 3]: what the detector takes."""
    if isinstance(image, np.ndarray):
        return image
    return np.ascontiguousarray((image * 255.0).round().to(torch.uint8).permute(1, 2, 0).numpy())


def _attempt(item: _Item) -> np.ndarray | Tensor | _Unusable:
    try:
        return _decode(item)
    except _Unusable as reason:
        return reason


def _decoded(items: Sequence[_Item], workers: int) -> Iterator[tuple[_Item, np.ndarray | Tensor | _Unusable]]:
    """Every item with its pixels, in order; files are read a few ahead on ``workers`` threads."""
    encoded = any(not isinstance(item.value, np.ndarray | Tensor) for item in items)
    if workers < 2 or len(items) < 2 or not encoded:
        for item in items:
            yield item, _attempt(item)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="lrface-decode")
    pending: deque[tuple[_Item, Future[np.ndarray | Tensor | _Unusable]]] = deque()
    try:
        for item in items:
            pending.append((item, pool.submit(_attempt, item)))
            if len(pending) > 4 * workers:
                done, future = pending.popleft()
                yield done, future.result()
        while pending:
            done, future = pending.popleft()
            yield done, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# --------------------------------------------------------------------------------------------------- embedder


@dataclass(frozen=True)
class _Call:
    """Options of one call of :meth:`FaceEmbedder.embed`, checked."""

    kind: str
    faces: str
    flip: bool
    batch_size: int
    on_error: str
    fallback: str

    def __post_init__(self) -> None:
        from lrface.align.detect import FACE_RULES, FALLBACKS

        for name, allowed in (
            ("kind", KINDS),
            ("faces", FACE_RULES),
            ("on_error", ("raise", "skip")),
            ("fallback", FALLBACKS),
        ):
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name} must be one of {', '.join(allowed)}; found {getattr(self, name)!r}")
        if self.batch_size < 1:
            raise UsageError(f"batch_size must be at least 1; found {self.batch_size}")


class FaceEmbedder:
    """A network with everything around it; made by :func:`load_embedder`.

    Safe to use from several threads at once. With precision float32 on a CPU a crop gets the same vector, to
    1e-5, whatever else is in the call. A face in a photograph gets the same to about 1e-3: landmarks found in
    a batch differ in the last bits, which can round pixels of the aligned crop the other way.
    """

    def __init__(
        self,
        network: _Network,
        name: str,
        device: torch.device,
        detector_settings: Mapping[str, Any],
        detector: "FaceDetector | None" = None,
    ):
        self._network = network
        self._name = name
        self._device = device
        self._detector_settings = dict(detector_settings)
        self._own_detector = detector is not None
        self._detector = detector
        # How load_embedder makes this once more, in another process.
        self._made_by: tuple[str | Path, dict[str, Any]] | None = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return (
            f"FaceEmbedder({self.name!r}, embedding_size={self.embedding_size}, input_size={self.input_size})"
        )

    @property
    def name(self) -> str:
        """The model's file name without its ending, or its directory's name."""
        return self._name

    @property
    def embedding_size(self) -> int:
        """Width d of the vectors."""
        return self._network.embedding_size

    @property
    def input_size(self) -> int:
        """Side of the square images that the network takes, in pixels."""
        return self._network.input_size

    @property
    def file(self) -> Path:
        """The weights: a .safetensors, .onnx or .pt2 file; for module:function the module's source."""
        return self._network.file

    @property
    def thresholds_file(self) -> Path:
        """Where the model's operating thresholds are kept, see :func:`lrface.calibrate.calibrate`."""
        return _thresholds_of(self._network)

    @property
    def precision(self) -> str:
        """What the network computes in: "float32" or "bfloat16"."""
        return self._network.precision

    @property
    def card(self) -> dict[str, Any]:
        """What the model says about itself. A file without lrface's card gets one of format "onnx" or "pt2" whose
        ``described_by`` says what describes its input: "options" of the caller's, a "card beside" the file, or
        "convention". A module:function gets one of format "python"."""
        return dict(self._network.card)

    def _settings(self) -> dict[str, Any]:
        """Beside the model and the call, what a vector depends on."""
        from lrface.align.detect import describe_detector

        detector: dict[str, Any]
        if self._own_detector:
            public = {key: value for key, value in vars(self._detector).items() if not key.startswith("_")}
            plain = {
                key: value for key, value in public.items() if isinstance(value, int | float | str | tuple)
            }
            detector = {"detector": type(self._detector).__name__, **plain}
        else:
            detector = describe_detector(**self._detector_settings)
        quality = "reconstruction" if self._reconstructs else "norm"
        return {"precision": self._network.precision, "quality": quality, "detector": detector}

    @cached_property
    def model_sha256(self) -> str:
        """SHA-256 of the file the model came from."""
        with self._network.file.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def detector(self) -> "FaceDetector":
        """The detector for photographs, made when first needed. Raises LrfaceError where it cannot be."""
        with self._lock:
            if self._detector is None:
                from lrface.align.detect import load_detector

                self._detector = load_detector(device=self._device, **self._detector_settings)
            return self._detector

    def embed_tensor(self, images: Tensor, batch_size: int = 256) -> Tensor:
        """Raw features of aligned crops: what the network gives, not of unit length.

        Args:
            images: float32 [n, 3, s, s] RGB in [0, 1], s being :attr:`input_size`; n may be 0.
            batch_size: how many go through the network at once, at most.

        Returns:
            float32 [n, embedding_size] on the device of ``images``.

        Raises:
            UsageError: another shape or type.
        """
        size = self.input_size
        if not isinstance(images, Tensor) or images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size):
            found = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise UsageError(f"embed_tensor takes a tensor [n, 3, {size}, {size}]; found {found}")
        if images.dtype != torch.float32:
            raise UsageError(f"embed_tensor takes float32 in [0, 1]; found {images.dtype}")
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1; found {batch_size}")
        # Made outside inference mode, so that the caller may train on it.
        features = torch.empty(len(images), self.embedding_size, device=images.device)
        step = min(batch_size, self._network.largest_batch)
        with torch.inference_mode():
            for start in range(0, len(images), step):
                part = images[start : start + step]
                features[start : start + len(part)] = self._network(part).to(images.device)
        return features

    def embed(
        self,
        images: Any,
        *,
        kind: str = "auto",
        faces: str = "largest-central",
        flip: bool = False,
        batch_size: int = 64,
        on_error: str = "raise",
        workers: int | None = None,
        fallback: str = "skip",
    ) -> Embeddings:
        """Unit vectors of the faces in images.

        Args:
            images: one image or a list of them, mixed at will: paths, encoded bytes, PIL images, numpy arrays
                (uint8 [h, w, 3] RGB or [h, w] grey, or floating point in [0, 1]) and tensors ([3, h, w] RGB
                or [1, h, w] grey, uint8 or floating point in [0, 1]); or a batch, numpy [n, h, w, 3] or a
                tensor [n, 3, h, w].
            kind: "crop": every image is an aligned square face of any size, resized to the network's input
                (bilinear, antialiased when shrinking). "photo": faces are detected and aligned. "auto": a
                square image whose side is at most 112 pixels, or is the network's input size, is a crop;
                anything else a photograph.
            faces: which faces of a photograph: "largest-central" (one), "largest" (one) or "all", largest
                first.
            flip: add the features of the mirrored face before scaling to unit length. Twice the work for a
                little accuracy, and what `lrface verify` does by default; embed a gallery and its probes
                alike.
            batch_size: images decoded together and faces embedded together, at most.
            on_error: "raise" stops at the first image that cannot be read or shows no face; "skip" lists it
                in ``failures`` and goes on.
            workers: threads that decode files; None takes up to four.
            fallback: what a photograph without a face gives: "skip", a failure, or "center", its largest centred
                square, with score 0.

        Returns:
            :class:`Embeddings`. An empty list of images gives zero rows.

        Raises:
            UsageError: an option or a type of image that is not listed above.
            LrfaceError: with on_error="raise", names the image and the reason.
        """
        call = _Call(kind, faces, flip, batch_size, on_error, fallback)
        blocks = self._blocks(_items(images), call, workers)
        return _joined(list(blocks), self.embedding_size, self._reconstructs)

    def similarity(self, a: np.ndarray | Embeddings, b: np.ndarray | Embeddings) -> np.ndarray:
        """See :func:`similarity`."""
        return similarity(a, b)

    def compare(
        self,
        a: Any,
        b: Any,
        *,
        threshold: float | None = None,
        kind: str = "auto",
        faces: str = "largest-central",
        flip: bool = True,
    ) -> Comparison:
        """Whether two images show one person.

        The threshold is ``threshold``; else the one on the model's card measured nearest to the smaller
        effective resolution of the two faces (field ``thresholds``, {"112": cosine, "56": ...}); else
        :data:`UNCALIBRATED_THRESHOLD`, which the result says. ``flip`` is on here, as in `lrface calibrate`,
        where thresholds come from.

        Args:
            a, b: one image each, of any type that :meth:`embed` takes.
            faces: "largest-central" or "largest": one face an image.

        Raises:
            UsageError: more than one image or face a side, or a threshold that is no cosine.
            LrfaceError: an image cannot be read or shows no face.
        """
        if threshold is not None and not -1 <= threshold <= 1:
            raise UsageError(f"threshold is a cosine, between -1 and 1; found {threshold}")
        if faces == "all":
            raise UsageError("compare takes one face an image: faces must be largest-central or largest")
        sides = []
        for name, image in (("first", a), ("second", b)):
            found = self.embed(image, kind=kind, faces=faces, flip=flip)
            if len(found) != 1:
                raise UsageError(f"compare takes one image a side; the {name} holds {len(found)}")
            sides.append(found)
        cosine = float(similarity(sides[0], sides[1])[0, 0])
        resolutions = (float(sides[0].effective_resolution[0]), float(sides[1].effective_resolution[0]))
        origin = "given"
        if threshold is None:
            threshold, origin = _card_threshold(self.card, min(resolutions), self.name), "card"
        if threshold is None:
            threshold, origin = UNCALIBRATED_THRESHOLD, "default"
        return Comparison(cosine, cosine >= threshold, threshold, origin, resolutions)

    def _blocks(self, items: Sequence[_Item], call: "_Call", workers: int | None) -> Iterator[Embeddings]:
        """Embeddings of consecutive runs of images; each run is small enough to be in memory at once."""
        count = workers if workers is not None else min(4, os.cpu_count() or 1)
        waiting: list[tuple[_Item, np.ndarray | Tensor | _Unusable]] = []
        pixels = 0
        for item, image in _decoded(items, count):
            waiting.append((item, image))
            if not isinstance(image, _Unusable):
                pixels += math.prod(_sides(image))
            if len(waiting) >= call.batch_size or pixels >= _BLOCK_PIXELS:
                yield self._block(waiting, call)
                waiting, pixels = [], 0
        if waiting:
            yield self._block(waiting, call)

    def _block(
        self, images: Sequence[tuple[_Item, np.ndarray | Tensor | _Unusable]], call: "_Call"
    ) -> Embeddings:
        found: dict[int, list[_Face] | _Unusable] = {}
        photos: list[tuple[_Item, np.ndarray]] = []
        for item, image in images:
            if isinstance(image, _Unusable):
                found[item.index] = image
            elif self._is_crop(image, call.kind):
                found[item.index] = self._crop(item, image)
            else:
                photos.append((item, _as_photo(image)))
        found.update(self._photo_faces(photos, call))
        ready: list[_Face] = []
        failures: list[tuple[int, str]] = []
        for item, _ in images:
            result = found[item.index]
            if isinstance(result, _Unusable):
                if call.on_error == "raise":
                    raise LrfaceError(f"{item.label}: {result}")
                failures.append((item.index, str(result)))
            else:
                ready += result
        vectors, lengths, errors, good = self._unit_vectors(ready, call.flip, call.batch_size)
        for face in (face for face, fine in zip(ready, good, strict=True) if not fine):
            reason = "the network's features are zero or not finite: it is broken, or overflows here"
            if call.on_error == "raise":
                label = next(item.label for item, _ in images if item.index == face.source)
                raise LrfaceError(f"{label}: {reason}")
            failures.append((face.source, reason))
        kept = [face for face, fine in zip(ready, good, strict=True) if fine]
        return Embeddings(
            vectors[good],
            np.array([face.box for face in kept], np.float32).reshape(-1, 4),
            np.array([face.score for face in kept], np.float32),
            np.array([face.landmarks for face in kept], np.float32).reshape(-1, 5, 2),
            np.array([face.resolution for face in kept], np.float32),
            np.array([face.source for face in kept], np.int64),
            lengths[good],
            sorted(failures),
            None if errors is None else errors[good],
        )

    def _is_crop(self, image: np.ndarray | Tensor, kind: str) -> bool:
        height, width = _sides(image)
        small = height == width and (height <= INPUT_SIZE or height == self.input_size)
        return kind == "crop" or (kind == "auto" and small)

    def _crop(self, item: _Item, image: np.ndarray | Tensor) -> list[_Face] | _Unusable:
        height, width = _sides(image)
        if height != width:
            return _Unusable(
                f"a crop must be square; found {width} x {height} pixels. kind='photo' finds the face"
            )
        pixels = resize(_as_tensor(image)[None], self.input_size, "bilinear")[0]
        nowhere = np.full(4, np.nan, np.float32)
        return [
            _Face(pixels, nowhere, math.nan, np.full((5, 2), np.nan, np.float32), float(height), item.index)
        ]

    def _photo_faces(
        self, photos: Sequence[tuple[_Item, np.ndarray]], call: _Call
    ) -> dict[int, list[_Face] | _Unusable]:
        from lrface.align.detect import central_face, choose_faces
        from lrface.align.warp import effective_resolution, warp_face

        found: dict[int, list[_Face] | _Unusable] = {}
        detections = self.detector.detect([image for _, image in photos]) if photos else []
        for (item, image), each in zip(photos, detections, strict=True):
            chosen = choose_faces(each, image.shape, call.faces)
            if not chosen and call.fallback == "center":
                chosen = [central_face(*image.shape[:2])]
            try:
                found[item.index] = [
                    _Face(
                        _as_tensor(warp_face(image, face.landmarks, self.input_size)),
                        face.box,
                        face.score,
                        face.landmarks,
                        effective_resolution(face.landmarks, self.input_size),
                        item.index,
                    )
                    for face in chosen
                ] or _Unusable(
                    f"no face found in {image.shape[1]} x {image.shape[0]} pixels; an aligned crop needs "
                    "kind='crop'"
                )
            except ValueError as error:  # landmarks that coincide
                found[item.index] = _Unusable(f"a face cannot be aligned: {error}")
        return found

    def _unit_vectors(
        self, faces: Sequence[_Face], flip: bool, batch_size: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
        """Unit vectors float32 [n, d], lengths float32 [n], reconstruction errors float32 [n] where they are wanted, and
        bool [n]: whether the network gave a direction."""
        vectors = torch.zeros(len(faces), self.embedding_size)
        errors = torch.zeros(len(faces)) if self._reconstructs else None
        for start in range(0, len(faces), batch_size):
            pixels = torch.stack([face.pixels for face in faces[start : start + batch_size]])
            if errors is None:
                features = self.embed_tensor(pixels, batch_size)
            else:
                features, errors[start : start + len(pixels)] = self._with_errors(pixels)
            if flip:
                features = features + self.embed_tensor(pixels.flip(3), batch_size)
            vectors[start : start + len(pixels)] = features
        norm = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        good = (torch.isfinite(norm) & (norm > 0))[:, 0]
        return (
            (vectors / norm).numpy(),
            norm[:, 0].numpy(),
            None if errors is None else errors.numpy(),
            good.numpy(),
        )

    @contextmanager
    def alone_on_cpu(self) -> Iterator[None]:
        """While a network that another library runs on the CPU has the cores, PyTorch prepares images in one thread:
        its waiting threads would hold up the network's."""
        threads = torch.get_num_threads()
        if isinstance(self._network, _OnnxNetwork) and self._device.type == "cpu":
            torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    def reconstruction_errors(self, images: Tensor, batch_size: int = 64) -> Tensor:
        """Mean absolute difference between each aligned crop and what the model's decoder draws of it.

        Args:
            images: as in :meth:`embed_tensor`.

        Returns:
            float32 [n], on the CPU.

        Raises:
            UsageError: the model was loaded without ``quality="reconstruction"``.
        """
        if not self._reconstructs:
            raise UsageError('reconstruction errors need load_embedder(..., quality="reconstruction")')
        return torch.cat([self._with_errors(part)[1] for part in images.split(batch_size)])

    @property
    def _reconstructs(self) -> bool:
        return isinstance(self._network, _TorchNetwork) and self._network.decoder is not None

    def _with_errors(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Features and reconstruction errors of aligned faces, on the CPU."""
        network = self._network
        assert isinstance(network, _TorchNetwork)
        with torch.inference_mode():
            parts = [network.with_error(part) for part in pixels.split(network.largest_batch)]
        return torch.cat([part[0] for part in parts]).cpu(), torch.cat([part[1] for part in parts]).cpu()


# --------------------------------------------------------------------------------------------- many at a time


@dataclass(frozen=True)
class EmbedSummary:
    """What :func:`embed_paths` did.

    Attributes:
        images: files tried.
        embedded: files that gave at least one face.
        faces: rows written.
        failures: files listed in ``failures_file``.
        out: the file of vectors.
        failures_file: CSV, columns ``path`` and ``reason``; only a header when nothing failed.
        seconds: wall time.
    """

    images: int
    embedded: int
    faces: int
    failures: int
    out: Path
    failures_file: Path
    seconds: float


def embed_paths(
    embedder: FaceEmbedder,
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    kind: str = "auto",
    faces: str = "largest-central",
    flip: bool = False,
    batch_size: int = 64,
    workers: int | None = None,
    fallback: str = "skip",
    engine: str = "local",
    address: str | None = None,
    progress: bool = True,
) -> EmbedSummary:
    """Embed files and folders of images into one file of vectors.

    Folders are searched with everything below them; hidden files and files that are no images by name are
    passed over there, while a file named itself is always tried. An image that cannot be read or shows no
    face is listed in ``OUT.failures.csv`` with its reason and the job goes on. Memory stays bounded whatever
    the number of images. A run that was killed goes on where it stopped when the same command is given again:
    finished parts wait in the hidden folder ``.OUT.parts`` and are used when model, settings, files, sizes
    and times of change are the same.

    Args:
        embedder: the model.
        paths: files and folders.
        out: ``.parquet``, with the columns path (string), face (int32, which face of the image, from 0),
            vector (fixed_size_list<float32>[d], of unit length), box (fixed_size_list<float32>[4]), score
            (float32), landmarks (fixed_size_list<float32>[10]: x0, y0, ..., x4, y4), effective_resolution
            and quality (float32), and with ``quality="reconstruction"`` reconstruction_error (float32), as in
            :class:`Embeddings`; or ``.npz`` with arrays of these names. The schema metadata
            (in a .npz the string array ``metadata``, JSON) has ``lrface_model``, ``lrface_model_sha256``,
            ``lrface_version``, and as JSON ``lrface_card`` and ``lrface_settings``. A file that is there
            already is replaced when the new one is whole.
        kind, faces, flip, batch_size, fallback: as in :meth:`FaceEmbedder.embed`.
        engine: "local", or "ray": workers are actors of a Ray cluster, one thread each, and embed one part at a
            time; ``paths`` and ``out`` must lie where every machine sees them. Needs an embedder that
            :func:`load_embedder` made without a detector of your own.
        workers: "local": as in :meth:`FaceEmbedder.embed`; "ray": actors, None for one a CPU (or GPU).
        address: of the Ray cluster; None starts one on this machine for the run.
        progress: draw a bar on standard error.

    Raises:
        UsageError: an option with a wrong value, or another ending of ``out``.
        LrfaceError: no image was found, or none gave a face (the reasons are listed all the same), or ``out``
            cannot be written.
    """
    started = time.monotonic()
    call = _Call(kind, faces, flip, batch_size, "skip", fallback)
    if engine not in ("local", "ray"):
        raise UsageError(f"engine must be local or ray; found {engine!r}")
    if address is not None and engine != "ray":
        raise UsageError("address is that of a Ray cluster: give engine ray with it")
    if engine == "ray" and embedder._made_by is None:
        raise UsageError(
            "engine ray makes the embedder once more on each machine, which a detector of your own bars"
        )
    out = Path(out)
    if out.suffix not in _MERGERS:
        raise UsageError(
            f"{out}: vectors are written to {' or '.join(_MERGERS)}; found the ending {out.suffix!r}"
        )
    failures_file = out.with_name(out.name + ".failures.csv")
    files = find_images(paths)
    settings = {"kind": kind, "faces": faces, "flip": flip, "fallback": fallback, **embedder._settings()}
    metadata = {
        "lrface_model": embedder.name,
        "lrface_model_sha256": embedder.model_sha256,
        "lrface_version": lrface.__version__,
        "lrface_card": json.dumps(embedder.card),
        "lrface_settings": json.dumps(settings),
    }
    parts = out.with_name(f".{out.name}.parts")
    _claim(parts, _fingerprint(metadata, files))
    starts = range(0, len(files), _PART_IMAGES)
    names = [parts / f"part-{start // _PART_IMAGES:06d}.parquet" for start in starts]
    done = sum(
        min(_PART_IMAGES, len(files) - start)
        for start, name in zip(starts, names, strict=True)
        if name.exists()
    )
    with progress_bar(len(files), "embed", unit="images", initial=done, enabled=progress) as bar:
        missing = [(start, name) for start, name in zip(starts, names, strict=True) if not name.exists()]
        tasks = (
            ([str(file) for file in files[start : start + _PART_IMAGES]], name) for start, name in missing
        )
        if engine == "local":
            for labels, name in tasks:
                _embed_part(embedder, labels, labels, name, call, metadata, workers, bar.advance)
        elif missing:
            from lrface.cluster import on_ray

            assert embedder._made_by is not None
            crew = _RayCrew(*embedder._made_by, embedder.model_sha256, call, metadata)
            given = [
                (labels, [os.path.abspath(label) for label in labels], name.resolve())
                for labels, name in tasks
            ]
            gpus = 1 if embedder._device.type == "cuda" else 0
            for at, _ in on_ray(crew.worker, given, workers, address, gpus):
                bar.advance(len(given[at][0]))
    summary = _merge(names, out, failures_file, len(files), metadata, started)
    _remove(parts)
    if summary.faces == 0:
        raise LrfaceError(
            f"none of {len(files)} images gave a face, so {out} was not written; {failures_file} has the "
            "reasons"
        )
    return summary


def _embed_part(
    embedder: FaceEmbedder,
    labels: Sequence[str],
    paths: Sequence[str],
    name: Path,
    call: _Call,
    metadata: Mapping[str, str],
    workers: int | None,
    advance: Callable[[int], None],
) -> None:
    """Embed the files ``paths``, called ``labels``, into the part ``name``."""
    blocks = []
    items = [_Item(i, label, path) for i, (label, path) in enumerate(zip(labels, paths, strict=True))]
    for block in embedder._blocks(items, call, workers):
        blocks.append(block)
        advance(len(set(block.source.tolist()) | {index for index, _ in block.failures}))
    _write_part(name, labels, _joined(blocks, embedder.embedding_size, embedder._reconstructs), metadata)


@dataclass(frozen=True)
class _RayCrew:
    """What an actor needs to embed parts."""

    model: str | Path
    options: dict[str, Any]
    model_sha256: str
    call: _Call
    metadata: dict[str, str]

    def worker(self) -> "Callable[[tuple[list[str], list[str], Path]], None]":
        """Made in the actor's process. Raises LrfaceError where it cannot work."""
        torch.set_num_threads(1)
        embedder = load_embedder(self.model, threads=1, **self.options)
        if embedder.model_sha256 != self.model_sha256:
            raise LrfaceError(
                f"{embedder.file} on {platform.node()} is another file than here; every machine of the cluster must "
                "see the same model"
            )

        def work(task: tuple[list[str], list[str], Path]) -> None:
            labels, paths, name = task
            if not name.parent.is_dir():
                raise LrfaceError(
                    f"{name.parent} is not there on {platform.node()}: images and OUT must lie where every machine "
                    "of the cluster sees them"
                )
            _embed_part(embedder, labels, paths, name, self.call, self.metadata, 1, lambda _: None)

        return work


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """The files that ``paths`` name, folders replaced by the images below them in sorted order, each once.

    Raises LrfaceError when there is none.
    """
    from lrface.align.pipeline import IMAGE_SUFFIXES

    found: dict[Path, None] = {}
    for each in paths:
        path = Path(each).expanduser()
        if not path.is_dir():
            found[path] = None
            continue
        for folder, below, names in os.walk(path):
            below[:] = sorted(name for name in below if not name.startswith("."))
            for name in sorted(names):
                if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES:
                    found[Path(folder) / name] = None
    if not any(path.is_file() for path in found):
        given = ", ".join(str(each) for each in paths) or "no path"
        raise LrfaceError(
            f"no images found in {given}; give image files, or folders of {', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    return list(found)


# Images in a part: what a killed run loses at most, and what is in memory at once.
_PART_IMAGES = 1024


def _text(path: str | Path) -> str:
    """A path as text that can be written: bytes that are no UTF-8 are written out, as in lrface.align."""
    return str(path).encode("utf-8", "backslashreplace").decode("utf-8")


def _fingerprint(metadata: Mapping[str, str], files: Sequence[Path]) -> str:
    digest = hashlib.sha256(json.dumps([metadata, _PART_IMAGES], sort_keys=True).encode())
    for file in files:
        try:
            state = file.stat()
            seen = f"{state.st_size} {state.st_mtime_ns}"
        except OSError as error:
            seen = str(error)
        digest.update(b"\0" + os.fsencode(file) + b"\0" + seen.encode("utf-8", "replace"))
    return digest.hexdigest()


def _claim(parts: Path, fingerprint: str) -> None:
    """Make ``parts`` the folder of the job ``fingerprint``, emptied when it was another job's."""
    mark = parts / "job"
    if mark.is_file() and mark.read_text(encoding="utf-8") == fingerprint:
        return
    _remove(parts)
    with atomic_file(mark) as aside:
        aside.write_text(fingerprint, encoding="utf-8")


def _remove(parts: Path) -> None:
    import shutil

    if parts.exists():
        shutil.rmtree(parts)


def _write_part(name: Path, labels: Sequence[str], found: Embeddings, metadata: Mapping[str, str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    source = found.source
    # Which face of its image each row is: rows of one image are consecutive.
    first = np.searchsorted(source, source, side="left")
    columns = {
        "path": pa.array([_text(labels[i]) for i in source], pa.string()),
        "face": pa.array(np.arange(len(source)) - first, pa.int32()),
        "vector": _fixed_size(found.vectors),
        "box": _fixed_size(found.box),
        "score": pa.array(found.score, pa.float32()),
        "landmarks": _fixed_size(found.landmarks.reshape(-1, 10)),
        "effective_resolution": pa.array(found.effective_resolution, pa.float32()),
        "quality": pa.array(found.quality, pa.float32()),
    }
    if found.reconstruction_error is not None:
        columns["reconstruction_error"] = pa.array(found.reconstruction_error, pa.float32())
    failures = [[_text(labels[index]), reason] for index, reason in found.failures]
    table = pa.table(columns).replace_schema_metadata({**metadata, _FAILURES: json.dumps(failures)})
    with atomic_file(name) as aside:
        pq.write_table(table, aside, compression="none")


# A part's failures travel in its own schema metadata, so that a part is one file, there or not.
_FAILURES = "failures"


def _fixed_size(rows: np.ndarray) -> Any:
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1), pa.float32()), rows.shape[1])


def _merge(
    parts: Sequence[Path],
    out: Path,
    failures_file: Path,
    images: int,
    metadata: Mapping[str, str],
    started: float,
) -> EmbedSummary:
    """All parts into ``out`` and ``failures_file``; ``out`` is left alone when no part has a face."""
    import pyarrow.parquet as pq

    faces = failed = embedded = 0
    with atomic_file(failures_file) as aside, aside.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "reason"])
        for part in parts:
            with pq.ParquetFile(part) as opened:
                listed = json.loads(opened.schema_arrow.metadata[_FAILURES.encode()])
                embedded += len(set(opened.read(["path"])["path"].to_pylist()))
                faces += opened.metadata.num_rows
            rows.writerows(listed)
            failed += len(listed)
    if faces:
        with atomic_file(out) as aside:
            _MERGERS[out.suffix](parts, aside, metadata)
    return EmbedSummary(images, embedded, faces, failed, out, failures_file, time.monotonic() - started)


def _merge_parquet(parts: Sequence[Path], out: Path, metadata: Mapping[str, str]) -> None:
    import pyarrow.parquet as pq

    schema = pq.read_schema(parts[0]).with_metadata(dict(metadata))
    # Vectors do not compress; paths do, and zstd is cheap.
    with pq.ParquetWriter(out, schema, compression={"path": "zstd"}, use_dictionary=False) as writer:
        for part in parts:
            table = pq.read_table(part)
            if table.num_rows:
                writer.write_table(table.replace_schema_metadata(dict(metadata)))


def _merge_npz(parts: Sequence[Path], out: Path, metadata: Mapping[str, str]) -> None:
    """A .npz array by array and part by part: no array is ever whole in memory."""
    import zipfile

    import pyarrow.parquet as pq

    total = sum(pq.read_metadata(part).num_rows for part in parts)
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:

        def member(name: str, dtype: np.dtype, shape: tuple[int, ...], arrays: Iterable[np.ndarray]) -> None:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                header = {
                    "descr": np.lib.format.dtype_to_descr(dtype),
                    "fortran_order": False,
                    "shape": shape,
                }
                np.lib.format.write_array_header_1_0(file, header)
                for array in arrays:
                    file.write(np.ascontiguousarray(array, dtype=dtype).tobytes())

        def column(name: str) -> Iterator[np.ndarray]:
            for part in parts:
                values = pq.read_table(part, columns=[name])[name].combine_chunks()
                if name == "path":
                    yield np.array(values.to_pylist(), dtype=np.str_)
                elif isinstance(width := getattr(values.type, "list_size", None), int):
                    yield values.flatten().to_numpy().reshape(-1, width)
                else:
                    yield values.to_numpy()

        longest = max((array.dtype for array in column("path")), key=lambda dtype: dtype.itemsize)
        for name in pq.read_schema(parts[0]).names:
            sample = next(column(name))
            dtype = longest if name == "path" else sample.dtype
            member(name, dtype, (total, *sample.shape[1:]), column(name))
        described = np.array(json.dumps(dict(metadata)))
        member("metadata", described.dtype, (), [described])


_MERGERS = {".parquet": _merge_parquet, ".npz": _merge_npz}
