"""The detector on real faces, against facenet-pytorch, and at the limits of its input."""

import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lrface.align.detect import choose_faces
from lrface.align.mtcnn import (
    MtcnnDetector,
    _area_crops,
    _area_resize,
    _load_weights,
    _rectangle_sums,
    _suppress,
    _suppress_nested,
)
from lrface.errors import LrfaceError, UsageError


def left_to_right(faces):
    return sorted(faces, key=lambda face: face.box[0])


@pytest.fixture(scope="module")
def found(detector, six_faces):
    return left_to_right(detector.detect([six_faces])[0])


def test_exactly_six_faces(found, face_places):
    assert len(found) == 6
    for face, (x, y, height) in zip(found, face_places, strict=True):
        assert face.box.dtype == np.float32 and face.box.shape == (4,)
        assert face.landmarks.dtype == np.float32 and face.landmarks.shape == (5, 2)
        assert isinstance(face.score, float) and 0.9 < face.score <= 1
        assert abs(face.box[0] + face.box[2] - 2 * x) < 20 and abs(face.box[1] + face.box[3] - 2 * y) < 20
        # eyes above the nose above the mouth, the left of each on the left, all inside the box
        eye_left, eye_right, nose, mouth_left, mouth_right = face.landmarks
        assert eye_left[0] < eye_right[0] and mouth_left[0] < mouth_right[0]
        assert max(eye_left[1], eye_right[1]) < nose[1] < min(mouth_left[1], mouth_right[1])
        assert (face.landmarks > face.box[:2]).all() and (face.landmarks < face.box[2:]).all()
        assert face.box[3] - face.box[1] == pytest.approx(height, rel=0.2)


def test_equal_to_facenet_pytorch(six_faces):
    """Same faces, boxes, scores and landmarks as the package whose networks these are."""
    peer = pytest.importorskip("facenet_pytorch", reason="facenet-pytorch is not installed").MTCNN()
    boxes, scores, landmarks = peer.detect(six_faces, landmarks=True)
    ours = MtcnnDetector(min_score=0.0).detect([six_faces])[0]
    assert len(ours) == len(boxes) == 8  # six and two false ones
    by_place = np.argsort([face.box[0] for face in ours])
    for mine, other in zip(by_place, np.argsort(boxes[:, 0].astype(float)), strict=True):
        np.testing.assert_allclose(ours[mine].box, boxes[other].astype(float), atol=0.02)
        np.testing.assert_allclose(ours[mine].landmarks, landmarks[other].astype(float), atol=0.02)
        assert ours[mine].score == pytest.approx(float(scores[other]), abs=1e-4)


def test_equal_to_facenet_pytorch_on_lfw(shared, detector):
    peer = pytest.importorskip("facenet_pytorch", reason="facenet-pytorch is not installed").MTCNN()
    paths = sorted((shared / "data/lfw/images").glob("*/*.jpg"))[::1700]
    photos = [cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB) for path in paths]
    for photo, faces in zip(photos, detector.detect(photos), strict=True):
        chosen = choose_faces(faces, photo.shape)[0]
        _, _, landmarks = peer.detect(photo, landmarks=True)
        apart = [np.abs(other.astype(float) - chosen.landmarks).max() for other in landmarks]
        assert min(apart) < 0.05


def test_batch_gives_what_single_calls_give(detector, face_cuts):
    grey = np.full((150, 210, 3), 128, np.uint8)
    images = [face_cuts[0], grey, face_cuts[1], cv2.resize(face_cuts[2], (90, 80)), face_cuts[1]]
    together = detector.detect(images)
    assert [len(faces) for faces in together] == [1, 0, 1, 1, 1]
    for image, faces in zip(images, together, strict=True):
        alone = detector.detect([image])[0]
        assert len(alone) == len(faces)
        for one, other in zip(alone, faces, strict=True):
            np.testing.assert_allclose(one.landmarks, other.landmarks, atol=0.01)


@pytest.mark.parametrize(("side", "least"), [(112, 6), (56, 6), (28, 6), (16, 4)])
def test_small_images_are_enlarged(detector, face_cuts, side, least):
    """An image that is one small face: found, and in the pixels of that image."""
    expected = [detector.detect([cut])[0][0].landmarks for cut in face_cuts]
    small = [cv2.resize(cut, (side, side), interpolation=cv2.INTER_AREA) for cut in face_cuts]
    count = 0
    for cut, faces, landmarks in zip(face_cuts, detector.detect(small), expected, strict=True):
        assert len(faces) <= 1
        count += len(faces)
        for face in faces:
            scale = np.array([side / cut.shape[1], side / cut.shape[0]])
            in_cut = (face.landmarks + 0.5) / scale - 0.5
            # within 6 % of the width of the cut, which is about 10 % of the face
            assert np.abs(in_cut - landmarks).mean() < 0.06 * cut.shape[1]
    assert count >= least


def test_lfw_faces_of_sixteen_pixels(shared, detector):
    """What is left of LFW photographs whose middle is 16 x 16 pixels: nearly all are found, within half a pixel."""
    paths = sorted((shared / "data/lfw/images").glob("*/*.jpg"))[::331]
    cuts = [cv2.imread(str(path))[60:190, 60:190, ::-1].copy() for path in paths]
    expected = detector.detect(cuts)
    small = detector.detect([cv2.resize(cut, (16, 16), interpolation=cv2.INTER_AREA) for cut in cuts])
    apart = [
        np.abs((found[0].landmarks + 0.5) * 130 / 16 - 0.5 - large[0].landmarks).mean() * 16 / 130
        for found, large in zip(small, expected, strict=True)
        if found
    ]
    assert len(apart) >= 0.9 * len(cuts) and np.median(apart) < 0.5


def test_huge_photographs_are_searched_on_a_copy(found, six_faces):
    huge = cv2.resize(six_faces, None, fx=3, fy=3, interpolation=cv2.INTER_LINEAR)
    detector = MtcnnDetector(max_side=1280)
    faces = left_to_right(detector.detect([huge])[0])
    assert len(faces) == 6
    for face, same in zip(faces, found, strict=True):
        apart = (face.landmarks + 0.5) / 3 - 0.5 - same.landmarks
        assert np.abs(apart).max() < 3  # in pixels of the smaller photograph
    assert detector._prepare(huge).image.shape == (886, 1280, 3)


def test_second_look_at_what_seemed_empty(face_cuts, monkeypatch):
    """Searched again at twice the size, only where nothing was found, and mapped back."""
    detector = MtcnnDetector()
    cascade, looks = detector._cascade, []

    def blind_at_first(images):
        looks.append([image.shape for image in images])
        return [[] if image.shape == face_cuts[0].shape else cascade([image])[0] for image in images]

    expected = detector.detect([face_cuts[0]])[0][0]
    monkeypatch.setattr(detector, "_cascade", blind_at_first)
    first, other = detector.detect([face_cuts[0], face_cuts[1]])
    assert len(looks) == 2 and len(looks[0]) == 2 and len(looks[1]) == 1
    height, width = face_cuts[0].shape[:2]
    border = round(0.25 * min(2 * height, 2 * width))
    assert looks[1] == [(2 * height + 2 * border, 2 * width + 2 * border, 3)]
    assert len(first) == len(other) == 1
    assert np.abs(first[0].landmarks - expected.landmarks).max() < 4
    assert np.abs(first[0].box - expected.box).max() < 12
    detector.second_look = False
    assert detector.detect([face_cuts[0]]) == [[]]


@pytest.mark.parametrize("name", ["Marilyn_Monroe", "Princess_Aiko"])
def test_the_two_faces_of_lfw_that_one_look_misses(shared, detector, name):
    photo = cv2.imread(str(shared / f"data/lfw/images/{name}/{name}_0001.jpg"))[:, :, ::-1].copy()
    assert MtcnnDetector(second_look=False).detect([photo]) == [[]]
    (found,) = detector.detect([photo])[0]
    assert np.abs((found.box[:2] + found.box[2:]) / 2 - 125).max() < 15


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (5, 5000), (20, 20), (400, 30)])
def test_images_of_any_size_without_a_face(detector, shape):
    assert detector.detect([np.full((*shape, 3), 90, np.uint8)]) == [[]]


def test_noise_is_no_face(detector):
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    assert detector.detect([noise]) == [[]]
    assert detector.detect([]) == []


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((50, 50), np.uint8), r"image 0 must be a uint8 array \[h, w, 3\], found uint8 \[50, 50\]"),
        (np.zeros((50, 50, 3)), "found float64"),
        (np.zeros((0, 50, 3), np.uint8), "is empty"),
        ("photo.jpg", "found str"),
    ],
)
def test_other_input_is_refused(detector, image, message):
    with pytest.raises(ValueError, match=message):
        detector.detect([image])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_face_size": 5}, "min_face_size"),
        ({"thresholds": (0.6, 0.7)}, "thresholds"),
        ({"min_score": 1.5}, "min_score"),
        ({"min_side": 500, "max_side": 400}, "max_side"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(UsageError, match=message):
        MtcnnDetector(**settings)


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "facenet_pytorch", None)
    with pytest.raises(LrfaceError, match="facenet-pytorch, which is not installed: pip install"):
        MtcnnDetector()


def test_damaged_weights_are_named(tmp_path):
    (tmp_path / "pnet.pt").write_bytes(b"nothing of use")
    for name in ("pnet.pt", "rnet.pt"):
        with pytest.raises(
            LrfaceError, match=f"{name}: the weights .* cannot be read.*force-reinstall"
        ) as caught:
            _load_weights(tmp_path / name)
        assert "weights_only" not in str(caught.value)  # torch advises to unpickle what it refused


def test_detecting_needs_no_heavy_import():
    """Neither facenet-pytorch nor torchvision: they take seconds to import."""
    script = (
        "import sys, numpy as np\n"
        "from lrface.align.mtcnn import MtcnnDetector\n"
        "MtcnnDetector().detect([np.full((60, 60, 3), 99, np.uint8)])\n"
        "assert not {'facenet_pytorch', 'torchvision'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_suppression_is_the_same_as_torchvision():
    nms = pytest.importorskip("torchvision.ops").nms
    random = np.random.default_rng(0)
    corners = random.uniform(0, 200, (300, 2))
    boxes = np.hstack([corners, corners + random.uniform(20, 60, (300, 1))]).astype(np.float32)
    scores = random.random(300).astype(np.float32)
    for overlap in (0.5, 0.7):
        expected = nms(torch.from_numpy(boxes), torch.from_numpy(scores), overlap).tolist()
        assert _suppress(boxes, scores, overlap).tolist() == expected
    assert _suppress(boxes[:0], scores[:0], 0.5).shape == (0,)


@pytest.mark.parametrize("size", [(151, 151), (250, 250), (13, 40), (300, 500)])
def test_area_resize_is_the_same_as_interpolate(size):
    image = np.random.default_rng(0).integers(0, 256, (250, 250, 3), dtype=np.uint8)
    ours = _area_resize(_rectangle_sums(image), *size)
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    theirs = F.interpolate(tensor, size=size, mode="area")[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_area_crops_are_the_same_as_interpolate():
    image = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    top, bottom = np.array([0, 3, 80]), np.array([90, 20, 85])
    left, right = np.array([0, 7, 118]), np.array([120, 60, 120])
    ours = _area_crops(_rectangle_sums(image), top, bottom, left, right, 24)
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    for k in range(3):
        part = tensor[:, :, top[k] : bottom[k], left[k] : right[k]]
        theirs = F.interpolate(part, size=(24, 24), mode="area")[0].permute(1, 2, 0).numpy()
        np.testing.assert_allclose(ours[k], theirs, atol=1e-3)


def test_a_face_within_a_face_is_dropped():
    boxes = np.array([[0, 0, 99, 99], [25, 25, 74, 74], [90, 90, 189, 189]], np.float32)
    assert _suppress_nested(boxes, np.array([0.9, 0.8, 0.7], np.float32), 0.7) == [0, 2]
    assert _suppress_nested(boxes, np.array([0.8, 0.9, 0.95], np.float32), 0.7) == [2, 1]
    assert _suppress_nested(boxes[:0], np.zeros(0, np.float32), 0.7) == []


def test_both_layouts_give_the_same(face_cuts, monkeypatch):
    """Where PyTorch has no oneDNN, its own kernels do the work; so they do on a GPU."""
    blocked = MtcnnDetector().detect(face_cuts)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    plain = MtcnnDetector()
    assert not plain._output._blocked
    for ours, other in zip(blocked, plain.detect(face_cuts), strict=True):
        assert len(ours) == len(other) == 1
        np.testing.assert_allclose(ours[0].landmarks, other[0].landmarks, atol=0.02)
        assert ours[0].score == pytest.approx(other[0].score, abs=1e-4)
