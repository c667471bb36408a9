"""Which faces of a photograph are taken, and which detector settings make."""

import numpy as np
import pytest

from lrface.align.detect import Detection, central_face, choose_faces, describe_detector, load_detector
from lrface.align.mtcnn import MtcnnDetector
from lrface.errors import UsageError


def face(left, top, right, bottom, score=1.0):
    return Detection(np.array([left, top, right, bottom], np.float32), score, np.zeros((5, 2), np.float32))


def test_choice_of_faces():
    # 200 x 100 photograph, centre (100, 50): a small central face, a large one at the left edge.
    central, large, small = face(80, 30, 120, 70), face(0, 0, 50, 50), face(190, 90, 200, 100)
    faces = [small, large, central]
    # areas 100, 2500, 1600; squared distances from the centre 95^2+45^2, 75^2+25^2 = 6250, 0
    assert choose_faces(faces, (100, 200)) == [central]
    assert choose_faces(faces, (100, 200, 3), "largest") == [large]
    assert choose_faces(faces, (100, 200), "all") == [large, central, small]
    # 70 x 70 = 4900 minus 2 x 40^2 = 1700 is more than 1600
    wide = face(25, 15, 95, 85)
    assert choose_faces([central, wide], (100, 200)) == [wide]
    for rule in ("largest-central", "largest", "all"):
        assert choose_faces([], (100, 200), rule) == []
    with pytest.raises(UsageError, match="'biggest'; there are largest-central, largest, all"):
        choose_faces(faces, (100, 200), "biggest")


def test_settings_make_a_detector():
    detector = load_detector(min_score=0.7, min_face_size=30)
    assert isinstance(detector, MtcnnDetector)
    assert (detector.min_score, detector.min_face_size) == (0.7, 30)
    plain = load_detector()
    assert isinstance(plain, MtcnnDetector)
    described = describe_detector()
    assert (described["min_score"], described["min_face_size"]) == (plain.min_score, plain.min_face_size)
    assert described["detector"] == "mtcnn" and described["detector_sha256"] is None
    assert describe_detector(min_score=0.7, min_face_size=30) == {
        **described,
        "min_score": 0.7,
        "min_face_size": 30,
    }


def test_the_middle_of_a_photograph():
    middle = central_face(100, 261)
    assert middle.score == 0 and middle.box.tolist() == [80.5, 0, 180.5, 100]
    assert middle.landmarks.dtype == np.float32 and middle.landmarks.shape == (5, 2)
    assert (middle.landmarks > middle.box[:2]).all() and (middle.landmarks < middle.box[2:]).all()
