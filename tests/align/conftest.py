import importlib.util
from pathlib import Path

import cv2
import numpy as np
import pytest

# Rough middles and heights of the six faces of the photograph, left to right.
FACES = [
    (110, 330, 135),
    (322, 211, 123),
    (518, 333, 143),
    (793, 410, 128),
    (961, 132, 140),
    (1181, 336, 119),
]


@pytest.fixture(scope="session")
def six_faces_path() -> Path:
    """The photograph that the insightface wheel ships; it shows six faces."""
    found = importlib.util.find_spec("insightface")
    if found is None or not found.submodule_search_locations:
        pytest.skip("insightface is not installed: its photograph of six faces is needed")
    return Path(found.submodule_search_locations[0]) / "data" / "images" / "t1.jpg"


@pytest.fixture(scope="session")
def face_places() -> list[tuple[int, int, int]]:
    return FACES


@pytest.fixture(scope="session")
def six_faces(six_faces_path) -> np.ndarray:
    return cv2.cvtColor(cv2.imread(str(six_faces_path)), cv2.COLOR_BGR2RGB)


@pytest.fixture(scope="session")
def face_cuts(six_faces) -> list[np.ndarray]:
    """The six faces cut out with some room around, each about 180 pixels wide."""
    cuts = []
    for x, y, height in FACES:
        half = int(height * 0.8)
        cuts.append(six_faces[max(0, y - half) : y + half, max(0, x - half) : x + half].copy())
    return cuts


@pytest.fixture(scope="session")
def detector():
    from lrface.align.mtcnn import MtcnnDetector

    return MtcnnDetector()
