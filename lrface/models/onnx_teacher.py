"""An ONNX file as a frozen teacher: run by onnxruntime on the CPU, never trained."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrface.compiling import not_compiled
from lrface.errors import LrfaceError, UsageError
from lrface.models.blocks import FaceBackbone

CARD_KEY = "lrface_card"
"""Where `lrface export` puts its card in an ONNX file: see lrface.embed."""
TYPES: dict[str, type[np.generic]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OnnxTeacher(FaceBackbone):
    """RGB float [n, 3, input_size, input_size] in [0, 1] -> embedding [n, embedding_size] without a gradient, in the images'
    dtype and on their device.

    A file that lrface exported says what it takes; for any other it is what the arguments say.

    Args:
        path: the .onnx file: one input [n, 3, side, side] of a fixed side, embeddings [n, d].
        colour: "RGB" or "BGR", the order of the file's channels.
        mean, std: the file takes (x - mean) / std; a number, or one a channel in the order of its channels. By default
            it takes [0, 1] and normalises inside.
        output: name of the output, where the file has several.

    Raises:
        UsageError: a wrong argument, or one that contradicts lrface's card.
        LrfaceError: no such file, none that onnxruntime can run, or one of another shape.
    """

    def __init__(
        self,
        path: str,
        colour: str = "RGB",
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        output: str | None = None,
    ):
        super().__init__()
        self.file = Path(path).expanduser()
        if not self.file.is_file():
            raise LrfaceError(f"{self.file}: no such file; method.teacher.path must be an .onnx file")
        if colour not in ("RGB", "BGR"):
            raise UsageError(f"method.teacher.colour must be RGB or BGR; found {colour!r}")
        self._swap = colour == "BGR"
        self._mean, self._std = _channels("mean", mean), _channels("std", std)
        if (self._std == 0).any():
            raise UsageError("method.teacher.std must not be 0")
        self._sessions: dict[int, Any] = {}
        session = self._session(1)
        self._check_card(session.get_modelmeta().custom_metadata_map.get(CARD_KEY))
        inputs = session.get_inputs()
        shape = inputs[0].shape
        if len(inputs) != 1 or inputs[0].type not in TYPES or len(shape) != 4 or shape[2] != shape[3]:
            raise LrfaceError(
                f"{self.file} takes {', '.join(f'{each.name} {each.shape} {each.type}' for each in inputs)}; a teacher "
                "takes one input, float images [n, 3, side, side]"
            )
        if not isinstance(shape[2], int) or isinstance(shape[0], int):
            raise LrfaceError(
                f"{self.file}: input {inputs[0].name!r} has shape {shape}; a teacher takes any number of images of one "
                "size: export it with a batch of any size and a fixed side"
            )
        self._input, self._type, self.input_size = inputs[0].name, TYPES[inputs[0].type], shape[2]
        outputs = [each.name for each in session.get_outputs()]
        if output is None and len(outputs) != 1:
            raise UsageError(
                f"{self.file} has outputs {', '.join(outputs)}; name one with method.teacher.output"
            )
        if output is not None and output not in outputs:
            raise UsageError(f"{self.file} has no output {output!r}; it has {', '.join(outputs)}")
        self._output = output or outputs[0]
        # A graph need not declare its width: a grey image shows it.
        shown = self._run(np.full((1, 3, self.input_size, self.input_size), 0.5, np.float32), 1)
        self.embedding_size = self.feature_channels = shown.shape[1]
        self.feature_size = 1

    def __deepcopy__(self, memo: dict[int, Any]) -> "OnnxTeacher":
        return self  # nothing in it changes

    @not_compiled
    def forward(self, x: Tensor) -> Tensor:
        embeddings = self._run(x.detach().to("cpu", torch.float32).numpy(), torch.get_num_threads())
        return torch.from_numpy(embeddings.astype(np.float32)).to(x.device, x.dtype)

    def _check_card(self, text: str | None) -> None:
        """lrface's own files take RGB in [0, 1]."""
        if text is None:
            return
        signed = takes_signed(text, str(self.file))
        if self._swap or self._mean.any() or (self._std != 1).any():
            raise UsageError(
                f"{self.file} was exported by lrface and takes RGB in [0, 1]; leave out method.teacher's colour, mean "
                "and std"
            )
        if signed:
            self._mean = self._std = _channels("mean", 0.5)

    def _session(self, threads: int) -> Any:
        if threads not in self._sessions:
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            options.intra_op_num_threads = threads
            try:
                found = onnxruntime.InferenceSession(str(self.file), options, ["CPUExecutionProvider"])
            except Exception as error:  # onnxruntime's own errors share no base class below Exception
                reason = str(error).partition("\n")[0][:200]
                raise LrfaceError(
                    f"{self.file} is no ONNX model that onnxruntime can run: {reason}"
                ) from error
            self._sessions = {threads: found}
        return self._sessions[threads]

    def _run(self, images: np.ndarray, threads: int) -> np.ndarray:
        if self._swap:
            images = images[:, ::-1]
        images = np.ascontiguousarray(((images - self._mean) / self._std).astype(self._type))
        try:
            (found,) = self._session(threads).run([self._output], {self._input: images})
        except Exception as error:  # as above
            reason = str(error).partition("\n")[0][:200]
            raise LrfaceError(f"{self.file} fails on images {list(images.shape)}: {reason}") from error
        if found.ndim != 2 or len(found) != len(images):
            raise LrfaceError(
                f"{self.file}: output {self._output!r} is {list(found.shape)} for {len(images)} images; embeddings are "
                "[n, d]"
            )
        return found


def takes_signed(card: str, what: str) -> bool:
    """Whether a file that lrface exported takes [-1, 1], as insightface gives it, instead of [0, 1].

    Raises LrfaceError: a card that is no JSON.
    """
    try:
        found = json.loads(card)
    except ValueError as error:
        raise LrfaceError(f"{what}: its card is no JSON ({error}); export the model again") from error
    entry = found.get("input") if isinstance(found, dict) else None
    return isinstance(entry, dict) and entry.get("range") == [-1, 1]


def _channels(name: str, given: Any) -> np.ndarray:
    """float32 [1, 1 or 3, 1, 1]."""
    try:
        values = np.asarray(given, np.float32).reshape(1, -1, 1, 1)
    except (TypeError, ValueError) as error:
        raise UsageError(f"method.teacher.{name} must be a number, or three; found {given!r}") from error
    if values.shape[1] not in (1, 3) or not np.isfinite(values).all():
        raise UsageError(f"method.teacher.{name} must be a number, or three; found {given!r}")
    return values
