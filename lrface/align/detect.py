"""What a face detector is, how one is made from settings, and which of its faces a photograph gives."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from lrface.align.warp import central_landmarks
from lrface.errors import LrfaceError, UsageError

FACE_RULES = ("largest-central", "largest", "all")
FALLBACKS = ("skip", "center")

# Photographs with a longer side are searched on a copy of this size.
MAX_SIDE = 2048


@dataclass
class Detection:
    """One face. ``box`` float32 [4]: left, top, right, bottom; ``landmarks`` float32 [5, 2]: x and y of the
    eyes, the nose and the mouth corners, all in pixels of the image given; ``score`` 0..1."""

    box: np.ndarray
    score: float
    landmarks: np.ndarray


class FaceDetector(Protocol):
    """Whatever finds faces with five landmarks: lrface.align.mtcnn.MtcnnDetector (the default),
    lrface.align.onnx_detector.OnnxDetector, or one of your own."""

    def detect(self, images: Sequence[np.ndarray]) -> list[list[Detection]]:
        """Faces of every image: uint8 [h, w, 3] RGB, of any sizes -> one list of detections an image,
        surest first, in pixels of the image given; empty where there is no face."""
        ...


def load_detector(
    model: str | Path | None = None,
    device: str | torch.device = "cpu",
    min_face_size: int | None = None,
    min_score: float | None = None,
) -> FaceDetector:
    """The detector that these settings describe.

    Args:
        model: an SCRFD or RetinaFace ONNX file (see OnnxDetector); None is MTCNN.
        min_face_size: the smallest face looked for, in pixels (MTCNN only; None is 20).
        min_score: faces it is less sure of are dropped; None is the detector's own (MTCNN 0.9, ONNX 0.5).

    Raises:
        UsageError: settings out of range or not this detector's.
        LrfaceError: a model that cannot be used.
    """
    settings: dict[str, Any] = {} if min_score is None else {"min_score": min_score}
    if model is not None:
        if min_face_size is not None:
            raise UsageError(
                "min_face_size is a setting of MTCNN; an ONNX detector looks for the sizes it was trained on"
            )
        from lrface.align.onnx_detector import OnnxDetector

        return OnnxDetector(model, device, **settings)
    from lrface.align.mtcnn import MtcnnDetector

    if min_face_size is not None:
        settings["min_face_size"] = min_face_size
    return MtcnnDetector(device, **settings)


def describe_detector(
    model: str | Path | None = None, min_face_size: int | None = None, min_score: float | None = None
) -> dict[str, Any]:
    """All that faces depend on, as plain JSON values, for the same settings as ``load_detector``: data found by
    different detectors must not mix. Raises LrfaceError when the model's file cannot be read."""
    if model is not None:
        from lrface.align.onnx_detector import DECODER_VERSION, MIN_SCORE

        try:
            with open(model, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise LrfaceError(f"detector model {model}: cannot be read: {error.strerror}") from error
        return {
            "detector": "onnx",
            "detector_version": DECODER_VERSION,
            "detector_sha256": digest,
            "min_score": MIN_SCORE if min_score is None else min_score,
            "min_face_size": min_face_size,
        }
    from lrface.align.mtcnn import CASCADE_VERSION, MIN_FACE_SIZE, MIN_SCORE

    return {
        "detector": "mtcnn",
        "detector_version": CASCADE_VERSION,
        "detector_sha256": None,
        "min_score": MIN_SCORE if min_score is None else min_score,
        "min_face_size": MIN_FACE_SIZE if min_face_size is None else min_face_size,
    }


def central_face(height: int, width: int) -> Detection:
    """The largest centred square of a photograph as if it were a face, with score 0: what the fallback "center"
    takes where none was found."""
    side = min(height, width)
    corner = np.array([width - side, height - side], np.float32) / 2
    return Detection(np.concatenate([corner, corner + side]), 0.0, central_landmarks(height, width))


def check_images(images: Sequence[np.ndarray]) -> None:
    """Raises ValueError naming the first that is no uint8 [h, w, 3] array with pixels."""
    for at, image in enumerate(images):
        if (
            not isinstance(image, np.ndarray)
            or image.dtype != np.uint8
            or image.ndim != 3
            or image.shape[2] != 3
        ):
            found = (
                f"{image.dtype} {list(image.shape)}"
                if isinstance(image, np.ndarray)
                else type(image).__name__
            )
            raise ValueError(f"image {at} must be a uint8 array [h, w, 3], found {found}")
        if 0 in image.shape:
            raise ValueError(f"image {at} is empty: {list(image.shape)}")


def choose_faces(
    detections: Sequence[Detection], image_shape: Sequence[int], rule: str = "largest-central"
) -> list[Detection]:
    """The faces that a rule takes from one photograph of ``image_shape`` (height, width, ...).

    "largest-central": the one with the largest area minus twice the squared distance of its centre from the
    centre of the photograph (so that a bystander at the edge does not win); "largest": the largest area;
    "all": every face, largest first. Returns at most one face for the first two; raises UsageError for
    another rule.
    """
    if rule not in FACE_RULES:
        raise UsageError(f"unknown face rule {rule!r}; there are {', '.join(FACE_RULES)}")
    if not detections:
        return []
    boxes = np.stack([face.box for face in detections]).astype(np.float64)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    if rule == "all":
        return [detections[i] for i in np.argsort(-area, kind="stable")]
    if rule == "largest-central":
        middle = np.array([image_shape[1] / 2, image_shape[0] / 2])
        away = (boxes[:, :2] + boxes[:, 2:]) / 2 - middle
        area = area - 2.0 * (away**2).sum(axis=1)
    return [detections[int(np.argmax(area))]]
