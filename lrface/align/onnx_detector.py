"""Finding faces with an ONNX file of the user's: SCRFD and RetinaFace as insightface exports them.

Both are one-stage networks (Guo et al., "Sample and Computation Redistribution for Efficient Face Detection",
ICLR 2022; Deng et al., "RetinaFace", CVPR 2020). Their files have no names to go by: the family follows from the
number and widths of the outputs, and the decoding (anchors, distances in strides, suppression) is written out here.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch

from lrface.align.detect import Detection, check_images
from lrface.errors import LrfaceError, UsageError

MIN_SCORE = 0.5

# Raised whenever the same photograph and file give other faces than before.
DECODER_VERSION = 1

# Overlap (intersection over union) from which of two faces only the surer stays.
_OVERLAP = 0.4
# A network for any size sees every photograph at these two: a face that fills it is found at the first, small ones
# at the second. What insightface does by default.
_SIDES = (128, 640)


class _Layout(NamedTuple):
    name: str
    strides: tuple[int, ...]
    anchors: int  # at each position


# By number of outputs: scores, distances to the sides of a box and offsets of five landmarks, one of each a stride.
_LAYOUTS = {
    9: _Layout("SCRFD", (8, 16, 32), 2),
    15: _Layout("RetinaFace", (8, 16, 32, 64, 128), 1),
}
_WITHOUT_LANDMARKS = {6: _LAYOUTS[9], 10: _LAYOUTS[15]}
_WIDTHS = (1, 4, 10)


class OnnxDetector:
    """SCRFD or RetinaFace from an ONNX file.

    The file takes images float32 [1, 3, h, w], RGB, (pixel - 127.5) / 128, and gives 9 outputs (SCRFD: strides 8,
    16, 32, two anchors a position) or 15 (RetinaFace: strides 8 to 128, one anchor), in the order scores, boxes,
    landmarks and within each by stride; each [n, k] or [1, n, k] with k = 1, 4, 10. Scores are probabilities.

    path: the file. device: "cpu", "cuda" or "cuda:K". min_score: faces it is less sure of are dropped.
    second_look: a photograph in which nothing was found is searched once more with room around it, as a face that
    touches the edges is often missed. One photograph at a time goes through the network, fitted into a square (or
    the size that the file fixes) at its top left corner, black beside it.

    Raises LrfaceError for a file that is missing, cannot be run, has another layout, or gives no landmarks;
    UsageError for settings out of range.
    """

    def __init__(
        self,
        path: str | Path,
        device: str | torch.device = "cpu",
        min_score: float = MIN_SCORE,
        second_look: bool = True,
    ):
        if not 0 < min_score < 1:
            raise UsageError(f"min_score must be between 0 and 1, found {min_score}")
        self.path = Path(path)
        self.min_score = min_score
        self.second_look = second_look
        self._session = _session(self.path, torch.device(device))
        self._layout = _layout(self.path, self._session)
        self._input, self._sizes = _input(self.path, self._session, max(self._layout.strides))
        self._outputs = [each.name for each in self._session.get_outputs()]

    @property
    def family(self) -> str:
        """ "SCRFD" or "RetinaFace"."""
        return self._layout.name

    def detect(self, images: Sequence[np.ndarray]) -> list[list[Detection]]:
        """Faces of every image: uint8 [h, w, 3] RGB, of any sizes -> one list of detections an image, surest
        first, in pixels of the image given.

        Raises ValueError for an image of another shape or type, LrfaceError when the network fails on one.
        """
        check_images(images)
        return [self._faces(image) for image in images]

    def _faces(self, image: np.ndarray) -> list[Detection]:
        found = self._search(image)
        if found or not self.second_look:
            return found
        border = max(1, min(image.shape[:2]) // 2)
        sides = (border, border, border, border)
        found = self._search(cv2.copyMakeBorder(image, *sides, cv2.BORDER_REPLICATE))
        return [Detection(face.box - border, face.score, face.landmarks - border) for face in found]

    def _search(self, image: np.ndarray) -> list[Detection]:
        at_sizes = [self._candidates(image, width, height) for width, height in self._sizes]
        score, box, points = (np.concatenate(column) for column in zip(*at_sizes, strict=True))
        order = np.argsort(-score, kind="stable")
        kept = order[suppress(box[order], _OVERLAP)]
        return [Detection(box[k], float(score[k]), points[k].reshape(5, 2)) for k in kept]

    def _candidates(
        self, image: np.ndarray, width: int, height: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the network finds in the image fitted into width x height: score float32 [n], box [n, 4], landmarks
        [n, 10] in pixels of the image."""
        copy, scale = _fitted(image, width, height)
        blob = (copy.astype(np.float32) - 127.5) * np.float32(1 / 128)
        try:
            outputs = self._session.run(self._outputs, {self._input: blob.transpose(2, 0, 1)[None]})
        except Exception as error:  # onnxruntime's own errors share no base class below Exception
            raise LrfaceError(
                f"{self.path}: fails on an image of {width} x {height} pixels: {_first_line(error)}"
            ) from error
        parts = []
        count = len(self._layout.strides)
        for k, stride in enumerate(self._layout.strides):
            score, box, points = (
                np.asarray(outputs[k + kind * count], np.float32).reshape(-1, each)
                for kind, each in enumerate(_WIDTHS)
            )
            centre = _centres(width // stride, height // stride, stride, self._layout.anchors)
            if not len(score) == len(box) == len(points) == len(centre):
                raise LrfaceError(
                    f"{self.path}: for {width} x {height} pixels at stride {stride} it gives {len(score)} scores, "
                    f"{len(box)} boxes and {len(points)} landmarks; {self.family} gives {len(centre)} of each"
                )
            sure = np.flatnonzero(score[:, 0] >= self.min_score)
            centre, box, points = centre[sure], box[sure] * stride, points[sure] * stride
            corners = np.concatenate([centre - box[:, :2], centre + box[:, 2:]], axis=1)
            parts.append((score[sure, 0], corners, np.tile(centre, 5) + points))
        scores, boxes, landmarks = (np.concatenate(column) for column in zip(*parts, strict=True))
        whole = np.isfinite(boxes).all(axis=1) & np.isfinite(landmarks).all(axis=1)
        return scores[whole], boxes[whole] / np.float32(scale), landmarks[whole] / np.float32(scale)


def suppress(boxes: np.ndarray, overlap: float) -> np.ndarray:
    """Positions of boxes [n, 4], best first, that survive non-maximum suppression by intersection over union.

    A box from pixel a to pixel b counts b - a + 1 pixels, as these networks were trained.
    """
    area = (boxes[:, 2] - boxes[:, 0] + 1) * (boxes[:, 3] - boxes[:, 1] + 1)
    left = np.arange(len(boxes))
    kept = []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        low = np.maximum(boxes[best, :2], boxes[left, :2])
        high = np.minimum(boxes[best, 2:], boxes[left, 2:])
        shared = np.maximum(high - low + 1, 0).prod(axis=1)
        left = left[shared / (area[best] + area[left] - shared) <= overlap]
    return np.asarray(kept, np.int64)


def _fitted(image: np.ndarray, width: int, height: int) -> tuple[np.ndarray, float]:
    """The image as large as fits into width x height, in its top left corner, and how much larger it is there."""
    ratio = image.shape[0] / image.shape[1]
    if ratio > height / width:
        new_height, new_width = height, max(1, int(height / ratio))
    else:
        new_width, new_height = width, max(1, int(width * ratio))
    scale = new_height / image.shape[0]
    # Bilinear is what these networks are used with; it would skip pixels of a photograph much larger.
    kind = cv2.INTER_AREA if scale < 0.5 else cv2.INTER_LINEAR
    copy = np.zeros((height, width, 3), np.uint8)
    copy[:new_height, :new_width] = cv2.resize(image, (new_width, new_height), interpolation=kind)
    return copy, scale


def _centres(columns: int, rows: int, stride: int, anchors: int) -> np.ndarray:
    """Pixel of every anchor, float32 [rows * columns * anchors, 2]: row by row, anchors of a position together."""
    y, x = np.mgrid[:rows, :columns].astype(np.float32) * stride
    return np.repeat(np.stack([x, y], axis=2).reshape(-1, 2), anchors, axis=0)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _session(path: Path, device: torch.device) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise LrfaceError(
            f"detector model {path} needs onnxruntime, which cannot be imported ({error}): pip install onnxruntime"
        ) from error
    if not path.is_file():
        raise LrfaceError(f"detector model {path}: no such file; give an SCRFD or RetinaFace .onnx file")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # One thread: workers share the cores between them, and rounding does not depend on the machine's.
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda":
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise LrfaceError(
                f"device {device}: this onnxruntime has no CUDA; pip install onnxruntime-gpu, or take device cpu"
            )
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime's own errors share no base class below Exception
        raise LrfaceError(
            f"detector model {path}: is no ONNX model that onnxruntime can run: {_first_line(error)}"
        ) from error


def _layout(path: Path, session: Any) -> _Layout:
    """The family of a file by its outputs. Raises LrfaceError naming what was found for any other."""
    outputs = session.get_outputs()
    known = "; ".join(f"{layout.name} has {number} outputs" for number, layout in _LAYOUTS.items())
    if len(outputs) in _WITHOUT_LANDMARKS:
        name = _WITHOUT_LANDMARKS[len(outputs)].name
        raise LrfaceError(
            f"detector model {path}: has {len(outputs)} outputs, as {name} without landmarks, which alignment "
            f"needs; take the file with landmarks (its name often ends in bnkps or kps): {known}"
        )
    layout = _LAYOUTS.get(len(outputs))
    found = ", ".join(f"{each.name} {each.shape}" for each in outputs[:16])
    if layout is None:
        raise LrfaceError(
            f"detector model {path}: is of no known family: it has {len(outputs)} outputs ({found}); {known}"
        )
    for position, output in enumerate(outputs):
        width = _WIDTHS[position // len(layout.strides)]
        shape = output.shape
        if len(shape) not in (2, 3) or (isinstance(shape[-1], int) and shape[-1] != width):
            raise LrfaceError(
                f"detector model {path}: output {position} ({output.name}) has shape {shape}; with "
                f"{len(outputs)} outputs as {layout.name} it should be [n, {width}] (outputs are {found})"
            )
    return layout


def _input(path: Path, session: Any, stride: int) -> tuple[str, list[tuple[int, int]]]:
    """Name of the input, and the sizes (width, height) that photographs are searched at."""
    inputs = session.get_inputs()
    shape = inputs[0].shape if inputs else []
    if (
        len(inputs) != 1
        or inputs[0].type != "tensor(float)"
        or len(shape) != 4
        or (isinstance(shape[0], int) and shape[0] != 1)
        or (isinstance(shape[1], int) and shape[1] != 3)
    ):
        found = ", ".join(f"{each.name} {each.type} {each.shape}" for each in inputs)
        raise LrfaceError(
            f"detector model {path}: takes {found or 'nothing'}; a face detector takes one image, tensor(float) "
            "[1, 3, height, width]"
        )
    height, width = shape[2:]
    if not (isinstance(height, int) and isinstance(width, int)):
        return inputs[0].name, [(side, side) for side in _SIDES]
    if height < stride or width < stride or height % stride or width % stride:
        raise LrfaceError(
            f"detector model {path}: takes images of {width} x {height} pixels; sides should be multiples of "
            f"{stride}"
        )
    return inputs[0].name, [(width, height)]
