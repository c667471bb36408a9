"""Frames of video files, network streams and cameras, one after the other: no video is ever whole in memory."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lrface.embed.results import Embeddings
from lrface.errors import LrfaceError, UsageError

VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"})
"""What `lrface embed` takes for a video file by its name; :meth:`~lrface.embed.FaceEmbedder.embed_video` opens any."""

# A container may round its count of frames up; far fewer than it says were lost.
_FEWER_FRAMES = 0.98


@dataclass(frozen=True)
class Frame:
    """The faces of one frame.

    Attributes:
        frame: its number, from 0, in the video (of a stream or camera since it was opened).
        seconds: its time in the video; of a camera, and of streams that do not say, since it was opened.
        faces: what :meth:`lrface.embed.FaceEmbedder.embed` gives for it, ``source`` 0; no rows where no face was found.
    """

    frame: int
    seconds: float
    faces: Embeddings


def is_video(name: str | Path) -> bool:
    """Whether a name of the command line means a video: a file of :data:`VIDEO_SUFFIXES`, a URL or a camera's number
    that is no file."""
    text = str(name)
    return (
        "://" in text
        or Path(text).suffix.lower() in VIDEO_SUFFIXES
        or (text.isdecimal() and not Path(text).exists())
    )


def frames(source: str | Path | int, every: int = 1) -> Iterator[tuple[int, float, np.ndarray]]:
    """Number, seconds and pixels (uint8 [h, w, 3], RGB, upright) of every ``every``-th frame.

    Args:
        source: a file, a URL that OpenCV's FFmpeg reads (rtsp://, http://, ...), or a camera's number.

    Raises:
        UsageError: ``every`` below 1.
        LrfaceError: it cannot be opened, breaks off (a stream always does when it ends), or a frame cannot be decoded.
    """
    import cv2

    if every < 1:
        raise UsageError(f"every must be at least 1; found {every}")
    text = str(source)
    camera = isinstance(source, int) or (text.isdecimal() and not Path(text).exists())
    live = camera or "://" in text
    if not live and not os.path.isfile(text):
        raise LrfaceError(
            f"{text}: no such video file; give a file, a URL such as rtsp://... or a camera's number"
        )
    name = f"camera {text}" if camera else text
    # OpenCV itself would open a picture, or a pattern of picture files, as a video.
    capture = cv2.VideoCapture(int(text)) if camera else cv2.VideoCapture(text, cv2.CAP_FFMPEG)
    try:
        if not capture.isOpened():
            what = "is no video that OpenCV can read" if not live else "cannot be opened"
            raise LrfaceError(f"{name} {what}; check it with `ffprobe` or a player")
        rate = capture.get(cv2.CAP_PROP_FPS)
        rate = rate if np.isfinite(rate) and rate > 0 else 0.0
        expected = 0 if live else int(max(0.0, capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        number = 0
        while capture.grab():
            if number % every == 0:
                good, image = capture.retrieve()
                if not good or image is None:
                    raise LrfaceError(f"{name}: frame {number} cannot be decoded; the video is damaged there")
                milliseconds = capture.get(cv2.CAP_PROP_POS_MSEC)
                if number and milliseconds <= 0 and rate:  # not every container has times
                    milliseconds = 1000.0 * number / rate
                yield number, milliseconds / 1000.0, np.ascontiguousarray(_three_channels(image)[:, :, ::-1])
            number += 1
    finally:
        capture.release()
    if live:
        raise LrfaceError(f"{name} broke off after {number} frames; open it again to go on")
    if number == 0:
        raise LrfaceError(f"{name} holds no frame that OpenCV can decode")
    if number < int(_FEWER_FRAMES * expected):
        raise LrfaceError(
            f"{name} breaks off: it says it holds {expected} frames, and {number} could be read; the file is cut short "
            "or damaged"
        )


def _three_channels(image: np.ndarray) -> np.ndarray:
    if image.ndim == 2:
        image = image[:, :, None]
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image[:, :, :3]
