"""The similarity transform: cases solved by hand, other implementations; the warp: known pixels."""

import numpy as np
import pytest

from lrface.align.warp import (
    TEMPLATE_112,
    central_landmarks,
    effective_resolution,
    similarity_transform,
    warp_face,
)


def apply(matrix, points):
    return points @ matrix[:, :2].T + matrix[:, 2]


def test_template_maps_to_itself():
    np.testing.assert_allclose(similarity_transform(TEMPLATE_112), [[1, 0, 0], [0, 1, 0]], atol=1e-12)
    assert effective_resolution(TEMPLATE_112) == pytest.approx(112)


def test_quarter_turn_twice_as_large_and_shifted():
    # (x, y) -> (-2 y + 300, 2 x + 10): a quarter turn, scale 2. Its inverse is solved by hand:
    # x = (v - 10) / 2, y = (300 - u) / 2.
    x, y = TEMPLATE_112[:, 0], TEMPLATE_112[:, 1]
    photograph = np.stack([-2 * y + 300, 2 * x + 10], axis=1)
    expected = [[0, 0.5, -5], [-0.5, 0, 150]]
    np.testing.assert_allclose(similarity_transform(photograph), expected, atol=1e-5)
    assert effective_resolution(photograph) == pytest.approx(224, abs=1e-4)


def test_other_crop_sizes_scale_the_template():
    landmarks = TEMPLATE_112 * 3 + 17
    for size in (56, 112, 224):
        matrix = similarity_transform(landmarks, size)
        np.testing.assert_allclose(apply(matrix, landmarks), TEMPLATE_112 * size / 112, atol=1e-4)
        # How much detail there is does not depend on the size of the crop.
        assert effective_resolution(landmarks, size) == pytest.approx(336, abs=1e-3)


def noisy_faces(count=20, seed=0):
    random = np.random.default_rng(seed)
    for _ in range(count):
        angle, scale = random.uniform(-np.pi, np.pi), random.uniform(0.1, 8)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        noise = random.normal(0, 4, (5, 2))
        yield (TEMPLATE_112 + noise) @ turn.T * scale + random.uniform(-500, 500, 2)


def test_no_nearby_similarity_fits_better():
    random = np.random.default_rng(1)
    for landmarks in noisy_faces():
        matrix = similarity_transform(landmarks)

        def error(rotation_scale, shift, points=landmarks):
            a, b = rotation_scale
            moved = points @ np.array([[a, -b], [b, a]]).T + shift
            return ((moved - TEMPLATE_112) ** 2).sum()

        best = error((matrix[0, 0], matrix[1, 0]), matrix[:, 2])
        for _ in range(20):
            change = random.normal(0, 1e-3, 4)
            other = error((matrix[0, 0] + change[0], matrix[1, 0] + change[1]), matrix[:, 2] + change[2:])
            assert other >= best


def test_equal_to_scikit_image():
    transform = pytest.importorskip("skimage.transform", reason="scikit-image is not installed")
    for landmarks in noisy_faces():
        other = transform.SimilarityTransform.from_estimate(landmarks, TEMPLATE_112.astype(np.float64))
        np.testing.assert_allclose(similarity_transform(landmarks), other.params[:2], rtol=1e-9, atol=1e-7)


def test_mirrored_landmarks_give_no_mirror():
    mirrored = TEMPLATE_112 * [-1, 1] + [200, 0]
    matrix = similarity_transform(mirrored)
    assert np.linalg.det(matrix[:, :2]) > 0


@pytest.mark.parametrize(
    ("landmarks", "message"),
    [
        (np.zeros((4, 2)), "must be \\[5, 2\\]"),
        (np.full((5, 2), np.nan), "finite"),
        (np.full((5, 2), 7.0), "coincide"),
    ],
)
def test_unusable_landmarks_are_refused(landmarks, message):
    with pytest.raises(ValueError, match=message):
        similarity_transform(landmarks)


def test_crop_of_an_aligned_image_is_the_image():
    image = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    np.testing.assert_array_equal(warp_face(image, TEMPLATE_112), image)


def test_quarter_turn_moves_every_pixel():
    image = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    # Landmarks of the face turned clockwise within its frame: (x, y) -> (111 - y, x).
    landmarks = np.stack([111 - TEMPLATE_112[:, 1], TEMPLATE_112[:, 0]], axis=1)
    crop = warp_face(np.rot90(image, -1), landmarks)
    assert np.abs(crop.astype(int) - image).max() <= 1


def test_what_lies_outside_is_black():
    image = np.full((112, 112, 3), 200, np.uint8)
    crop = warp_face(image, TEMPLATE_112 - 40)  # the crop starts 40 pixels before the image
    assert (crop[:39] == 0).all() and (crop[:, :39] == 0).all()
    assert (crop[41:, 41:] == 200).all()


@pytest.mark.parametrize("factor", [2, 3, 5, 8])
def test_large_face_is_averaged_not_sampled(factor):
    # One-pixel noise on grey: a plain bilinear warp keeps it, averages over blocks bring it down.
    random = np.random.default_rng(factor)
    size = 112 * factor
    image = random.choice(np.array([64, 192], np.uint8), (size, size, 1)).repeat(3, axis=2)
    centre = (factor - 1) / 2  # pixel centres of the blocks
    crop = warp_face(image, TEMPLATE_112 * factor + centre)
    blocks = image[:, :, 0].reshape(112, factor, 112, factor).mean(axis=(1, 3))
    assert np.abs(crop[:, :, 0] - blocks).max() <= 1.01


def test_large_turned_face_keeps_its_place():
    # A smooth picture: averages and samples agree, so the crop shows whether the region is mapped rightly.
    y, x = np.mgrid[:1500, :1400].astype(np.float64)
    image = np.stack([x / 1400, y / 1500, (x + y) / 2900], axis=2) * 255
    image = np.round(image).astype(np.uint8)
    angle, scale = 0.6, 6.3
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    landmarks = (TEMPLATE_112 - 56) @ turn.T + [720, 700]
    crop = warp_face(image, landmarks)
    v, u = np.mgrid[:112, :112].astype(np.float64)
    where = (np.stack([u, v], axis=2) - 56) @ turn.T + [720, 700]
    inside = ((where > 8) & (where < [1390, 1490])).all(axis=2)
    assert inside.mean() > 0.9
    assert np.abs(crop[:, :, 0] - where[:, :, 0] / 1400 * 255)[inside].max() < 1.6
    assert np.abs(crop[:, :, 1] - where[:, :, 1] / 1500 * 255)[inside].max() < 1.6


def test_very_wide_photograph():
    image = np.zeros((200, 40_000, 3), np.uint8)
    image[20:132, 39_000:39_112] = 99
    crop = warp_face(image, TEMPLATE_112 + [39_000, 20])
    assert (crop == 99).all()


@pytest.mark.parametrize(
    "image", [np.zeros((5, 5), np.uint8), np.zeros((5, 5, 3)), np.zeros((0, 5, 3), np.uint8)]
)
def test_images_of_another_kind_are_refused(image):
    with pytest.raises(ValueError, match="uint8"):
        warp_face(image, TEMPLATE_112)


def test_the_middle_of_a_photograph_is_its_largest_centred_square():
    pixels = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    np.testing.assert_array_equal(warp_face(pixels, central_landmarks(112, 112)), pixels)
    wide = np.zeros((112, 200, 3), np.uint8)
    wide[:, 44:156] = pixels
    np.testing.assert_array_equal(warp_face(wide, central_landmarks(112, 200)), pixels)
    np.testing.assert_array_equal(
        warp_face(wide.swapaxes(0, 1), central_landmarks(200, 112)), pixels.swapaxes(0, 1)
    )
    # Twice as large: averages of 2 x 2 pixels.
    twice = np.repeat(np.repeat(pixels, 2, axis=0), 2, axis=1)
    np.testing.assert_array_equal(warp_face(twice, central_landmarks(224, 224)), pixels)
    assert effective_resolution(central_landmarks(300, 250)) == pytest.approx(250)
