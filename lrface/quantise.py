"""ONNX networks in int8, by onnxruntime's own quantisation."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lrface.errors import LrfaceError
from lrface.progress import progress

# Layers with weights: most of the arithmetic, and all of the size.
_LAYERS = ["Conv", "Gemm", "MatMul"]
# What follows them: quantised together with them, the range is that of what is left, not of what is cut off. For a
# MobileFaceNet on faces of CelebA: mean cosine 0.99 instead of 0.93. Sums and PReLU stay float32.
_ACTIVATIONS = ["Relu", "Clip"]
_CALIBRATION_BATCH = 8


def quantise(
    file: Path,
    out: Path,
    how: str,
    faces: Tensor | None,
    signed: bool,
    card: str,
    show_progress: bool = False,
) -> None:
    """Write a float32 ONNX network with its convolutions and matrices in int8.

    Args:
        file: one input, float images [n, 3, s, s].
        how: "dynamic": weights in uint8, ranges of activations measured batch by batch as they come, depthwise convolutions
            in float32 (few weights, and one scale for all their channels costs most of the accuracy); "static": weights in
            int8 with one scale a channel, activations in uint8, ranges measured on ``faces``, from the smallest to the
            largest value seen.
        faces: float32 [n, 3, s, s] in [0, 1]; None for dynamic.
        signed: whether the network takes [-1, 1].
        card: lrface's card, JSON.

    Raises:
        LrfaceError: onnxruntime or onnx cannot quantise it.
    """
    from lrface import onnx_graph

    prepared, made = out.with_name("prepared.onnx"), out.with_name("quantised.onnx")
    with _quiet_root_logger():
        try:
            from onnxruntime.quantization import QuantType, quantize_dynamic, quantize_static
            from onnxruntime.quantization.shape_inference import quant_pre_process

            # Folds constants and BatchNorm into the layers before. Symbolic shapes would need sympy and are not needed.
            quant_pre_process(str(file), str(prepared), skip_symbolic_shape=True)
            if how == "dynamic":
                depthwise = _prepare_dynamic(prepared)
                quantize_dynamic(
                    str(prepared),
                    str(made),
                    op_types_to_quantize=_LAYERS,
                    weight_type=QuantType.QUInt8,
                    nodes_to_exclude=depthwise,
                )
            else:
                assert faces is not None
                quantize_static(
                    str(prepared),
                    str(made),
                    _Reader(prepared, faces, signed, show_progress),
                    op_types_to_quantize=_LAYERS + _ACTIVATIONS,
                    per_channel=True,
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                )
        except LrfaceError:
            raise
        except Exception as error:  # its own errors share no base class below Exception
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise LrfaceError(f"{file.name}: onnxruntime cannot quantise it: {reason}") from error
    model = onnx_graph.load_onnx(made)
    if signed:
        onnx_graph.for_insightface(model)
    out.write_bytes(onnx_graph.finish(model, card))


def _prepare_dynamic(file: Path) -> list[str]:
    """The names of the convolutions of groups, which get one where they have none.

    Shapes that were stated go: onnxruntime transposes matrices and leaves those of before.
    """
    import onnx

    from lrface import onnx_graph

    model = onnx_graph.load_onnx(file)
    del model.graph.value_info[:]
    names = []
    for number, node in enumerate(model.graph.node):
        if node.op_type == "Conv" and any(each.name == "group" and each.i > 1 for each in node.attribute):
            node.name = node.name or f"lrface_depthwise_{number}"
            names.append(node.name)
    onnx.save(model, str(file))
    return names


class _Reader:
    """Batches of faces as onnxruntime's calibration asks for them."""

    def __init__(self, file: Path, faces: Tensor, signed: bool, show_progress: bool):
        from lrface import onnx_graph

        self._name = onnx_graph.image_input(onnx_graph.load_onnx(file)).name
        images = faces * 2 - 1 if signed else faces
        self._parts = iter(images.split(_CALIBRATION_BATCH))
        self._bar: Any = progress(len(faces), "ranges", unit="faces", enabled=show_progress)
        self._advance = self._bar.__enter__().advance

    def get_next(self) -> dict[str, np.ndarray] | None:
        part = next(self._parts, None)
        if part is None:
            self._bar.__exit__(None, None, None)
            return None
        self._advance(len(part))
        return {self._name: np.ascontiguousarray(part.numpy())}


@contextlib.contextmanager
def _quiet_root_logger() -> Iterator[None]:
    """It warns about its own habits through the root logger."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(before)
