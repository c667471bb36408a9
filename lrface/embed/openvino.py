"""OpenVINO models (.xml with its .bin) as embedders, and how they are written (``pip install 'lrface[openvino]'``)."""

import hashlib
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrface.embed.networks import (
    CARD_KEY,
    _check_embedding,
    _first_line,
    _ForeignNetwork,
    _Said,
    _without_convention,
)
from lrface.errors import LrfaceError, UsageError

WEIGHTS_KEY = "lrface_weights_sha256"
"""Entry of the model's rt_info with the SHA-256 of its .bin, so that no other model's weights are taken for its own."""


def _openvino(file: Path) -> Any:
    try:
        import openvino
    except ImportError as error:
        raise LrfaceError(
            f"{file} needs OpenVINO, which cannot be imported ({error}): pip install 'lrface[openvino]'"
        ) from error
    return openvino


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def write_openvino(source: Path, out: Path, card: str, half: bool = False) -> None:
    """Convert an ONNX file: ``out`` (.xml) and the .bin beside it, with lrface's card in its rt_info.

    Args:
        half: keep weights in float16; OpenVINO computes in float32 on a CPU all the same.

    Raises:
        LrfaceError: OpenVINO is not installed or cannot convert the file.
    """
    openvino = _openvino(out)
    try:
        # Not convert_model: that reports what it converts to OpenVINO's makers.
        model = openvino.Core().read_model(str(source))
        model.set_rt_info(card, [CARD_KEY])
        for _ in range(2):  # the hash is of weights that have been written
            openvino.save_model(model, str(out), compress_to_fp16=half)
            model.set_rt_info(_sha256(out.with_suffix(".bin")), [WEIGHTS_KEY])
    except RuntimeError as error:
        raise LrfaceError(f"OpenVINO cannot convert the network: {_first_line(error)}") from error


class _OpenVinoNetwork(_ForeignNetwork):
    """An OpenVINO model, computing in float32 on the CPU."""

    def __init__(self, file: Path, device: torch.device, threads: int | None, said: _Said):
        openvino = _openvino(file)
        self.file = file
        self.largest_batch = 4
        if device.type != "cpu":
            raise LrfaceError(f"device {device}: lrface runs OpenVINO models on the CPU; take device='cpu'")
        weights = file.with_suffix(".bin")
        if not weights.is_file():
            raise LrfaceError(
                f"{weights}: no such file; an OpenVINO model is two files, {file.name} and {weights.name}"
            )
        core = openvino.Core()
        try:
            model = core.read_model(str(file), str(weights))
        except RuntimeError as error:
            raise LrfaceError(f"{file} is no OpenVINO model: {_first_line(error)}") from error
        said_hash = _entry(model, WEIGHTS_KEY)
        if said_hash is not None and said_hash != _sha256(weights):
            raise LrfaceError(
                f"{weights} does not belong to {file}, which names its SHA-256; copy both files again, or export the model "
                "again"
            )
        size = self._read_input(model)
        self._output = self._read_output(model, said.output)
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        try:
            self._compiled = core.compile_model(model, "CPU", options)
        except RuntimeError as error:
            raise LrfaceError(f"{file} is no OpenVINO model for this CPU: {_first_line(error)}") from error
        self._requests = threading.local()  # a request computes one batch at a time
        self._describe(_without_convention(file, said), _entry(model, CARD_KEY), size, None)

    def _read_input(self, model: Any) -> int | None:
        if len(model.inputs) != 1:
            raise LrfaceError(
                f"{self.file} takes {len(model.inputs)} inputs; a face embedder takes one, images [n, 3, 112, 112]"
            )
        shape = model.inputs[0].partial_shape
        kind = model.inputs[0].element_type.get_type_name()
        sides = (
            [side.get_length() if side.is_static else None for side in shape] if shape.rank.is_static else []
        )
        if kind not in ("f32", "f16") or len(sides) != 4 or sides[1] not in (3, None) or sides[2] != sides[3]:
            raise LrfaceError(
                f"{self.file}: its input is {kind} {shape}; a face embedder takes float images [n, 3, side, side]"
            )
        self._type = np.float16 if kind == "f16" else np.float32
        self._batch = sides[0]
        return sides[2]

    def _read_output(self, model: Any, wanted: str | None) -> int:
        names = [
            sorted(each.names)[0] if each.names else str(place) for place, each in enumerate(model.outputs)
        ]
        if wanted is None:
            if len(names) != 1:
                raise UsageError(
                    f"{self.file} has {len(names)} outputs ({', '.join(names)}); name the embedding with output=..."
                )
            return 0
        for place, each in enumerate(model.outputs):
            if wanted in each.names or wanted == names[place]:
                return place
        raise UsageError(f"{self.file} has no output {wanted!r}; it has {', '.join(names)}")

    def _run(self, images: Tensor) -> Tensor:
        request = getattr(self._requests, "request", None)
        if request is None:
            request = self._requests.request = self._compiled.create_infer_request()
        array = np.ascontiguousarray(images.numpy().astype(self._type, copy=False))
        try:
            result = request.infer([array])[self._output]
        except RuntimeError as error:
            raise LrfaceError(
                f"{self.file} fails on a batch of shape {list(array.shape)}: {_first_line(error)}"
            ) from error
        _check_embedding(str(self.file), result, len(array))
        # A copy: the request writes its next result into the same memory.
        return torch.from_numpy(np.array(result, np.float32))


def _entry(model: Any, key: str) -> str | None:
    return str(model.get_rt_info([key]).value) if model.has_rt_info([key]) else None
