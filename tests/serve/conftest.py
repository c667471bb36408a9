import numpy as np
import pytest
from serving import encoded

from lrface.data.synthetic import SyntheticFaces


@pytest.fixture(scope="session")
def faces() -> list[np.ndarray]:
    """Drawn faces uint8 [112, 112, 3]: 0 and 1 of one person, 2 and 3 of another."""
    drawn = SyntheticFaces(2, 2)
    return [drawn.image(number) for number in range(4)]


@pytest.fixture(scope="session")
def face_files(faces) -> list[bytes]:
    """The same as PNG files."""
    return [encoded(face) for face in faces]
