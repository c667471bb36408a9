"""Procedural faces: reproducible by number, a sound face source, and hard enough to be worth training on."""

import hashlib
import subprocess
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from lrface.data.synthetic import PERSON_RANGES, SyntheticFaces, _Picture, draw_face, verification_pairs
from lrface.errors import UsageError


def _digest(faces: SyntheticFaces) -> str:
    return hashlib.sha256(b"".join(faces.image(index).tobytes() for index in range(len(faces)))).hexdigest()


def test_images_are_rgb_bytes_of_the_size_asked_for():
    for size in (8, 14, 112, 160):
        faces = SyntheticFaces(2, 2, size=size)
        image = faces.image(3)
        assert image.shape == (size, size, 3) and image.dtype == np.uint8
        assert faces.image_size == size
        assert image.std() > 10
    assert len(faces) == 4
    assert faces.labels.dtype == np.int64 and faces.labels.tolist() == [0, 0, 1, 1]
    assert len(set(faces.identities)) == 2


def test_a_larger_picture_shows_the_same_face():
    small, large = draw_face(0, 5, 0), draw_face(0, 5, 0, 224)
    back = cv2.resize(large, (112, 112), interpolation=cv2.INTER_AREA)
    smooth = [cv2.GaussianBlur(image.astype(np.float32), (0, 0), 2.0).ravel() for image in (small, back)]
    assert np.corrcoef(smooth)[0, 1] > 0.97


def test_the_same_numbers_give_the_same_picture_in_another_instance_and_process():
    faces = SyntheticFaces(3, 2, seed=4)
    digest = _digest(faces)
    reverse = [faces.image(index) for index in reversed(range(6))]  # order of access does not matter
    assert np.array_equal(reverse[0], faces.image(5))
    assert _digest(SyntheticFaces(3, 2, seed=4)) == digest
    code = (
        "import hashlib; from lrface.data.synthetic import SyntheticFaces as S; f = S(3, 2, seed=4);"
        "print(hashlib.sha256(b''.join(f.image(i).tobytes() for i in range(6))).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == digest


def test_a_person_does_not_depend_on_the_subset_asked_for():
    all_of_them = SyntheticFaces(8, 3, seed=1)
    some = SyntheticFaces(2, 5, seed=1, first_identity=6)
    assert some.identities == all_of_them.identities[6:]
    for person in range(2):
        for number in range(3):
            whole = all_of_them.image((6 + person) * 3 + number)
            assert np.array_equal(whole, some.image(person * 5 + number))


def test_seeds_identities_and_images_differ():
    pictures = [
        draw_face(seed, identity, number).tobytes()
        for seed in (0, 1)
        for identity in (0, 1, 10**12)
        for number in (0, 1)
    ]
    assert len(set(pictures)) == 12


def test_drawing_leaves_the_thread_setting_of_opencv_alone():
    before = cv2.getNumThreads()
    draw_face(0, 0, 0)
    assert cv2.getNumThreads() == before


def test_landmarks_lie_on_the_template():
    from lrface.data import synthetic

    errors = []
    for number in range(40):
        person = synthetic._person(0, number)
        rng = np.random.default_rng(number)
        view = SimpleNamespace(
            **synthetic._stretch(synthetic.IMAGE_RANGES, rng.random(len(synthetic.IMAGE_RANGES)))
        )
        picture = _Picture(person, view, 112)
        eyes = np.array([[-person.eye_spacing, person.eye_y], [person.eye_spacing, person.eye_y]])
        corner = picture.mouth_corner
        mouth = np.array([corner * [-1, 1], corner])
        nose = np.array([[person.nose_bend, person.nose_y]])
        lift = np.array([0, 0, person.nose_height, 0, 0])
        pixels = picture.surface(np.concatenate([eyes, nose, mouth]), lift) / (1 << synthetic.SHIFT)
        errors.append(pixels - synthetic.TEMPLATE)
    errors = np.array(errors)
    # Poses move the points as in aligned photographs, by pixels; on average they lie where they belong.
    assert np.abs(errors.mean(axis=0)).max() < 2.5
    assert np.linalg.norm(errors, axis=2).mean() < 5
    assert np.linalg.norm(errors, axis=2).max() > 2


def test_nuisance_outweighs_identity_in_colour_but_not_in_everything():
    faces = SyntheticFaces(60, 6)
    images = np.stack([faces.image(index) for index in range(len(faces))]).astype(np.float32)
    centre = images[:, 30:100, 30:82].mean(axis=(1, 2)).reshape(60, 6, 3)
    within = centre.var(axis=1).mean()
    between = centre.mean(axis=1).var(axis=0).mean() - within / 6
    assert between < 0.6 * within  # mean colour does not give a person away
    grey = images.mean(axis=3).reshape(60, 6, -1)
    grey = grey - grey.mean(axis=2, keepdims=True)
    grey /= grey.std(axis=2, keepdims=True)
    own, other = [], []
    for person in range(60):
        own.append((grey[person, 0] * grey[person, 1]).mean())
        other.append((grey[person, 0] * grey[(person + 1) % 60, 1]).mean())
    assert np.mean(own) > np.mean(other) + 0.01  # something of the person is in the picture
    assert len(PERSON_RANGES) > 60


def _best_accuracy(score: np.ndarray, same: np.ndarray) -> float:
    ordered = same[np.argsort(-score)]
    accepted = np.concatenate([[0], np.cumsum(ordered)])
    wrong = np.concatenate([[0], np.cumsum(~ordered)])
    return float(((accepted + (~same).sum() - wrong) / len(same)).max())


def _tiny(faces: SyntheticFaces) -> np.ndarray:
    """14-pixel images as the benchmarks make them (every eighth pixel), as standardised vectors."""
    rows = np.stack([faces.image(index)[4::8, 4::8].ravel() for index in range(len(faces))]).astype(
        np.float32
    )
    rows -= rows.mean(axis=1, keepdims=True)
    return rows / (rows.std(axis=1, keepdims=True) + 1)


def test_a_linear_model_on_14_pixel_images_stays_under_75_percent():
    people, each = 400, 8
    train = _tiny(SyntheticFaces(people, each))
    held_out = SyntheticFaces(120, each, first_identity=100_000)
    test = _tiny(held_out)
    left, right, same = verification_pairs(held_out, 6000, seed=0)
    mean = train.mean(axis=0)
    train, test = train - mean, test - mean

    def accuracy(vectors: np.ndarray) -> float:
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return _best_accuracy((unit[left] * unit[right]).sum(axis=1), same)

    assert accuracy(test) < 0.70  # pixels compared as they are

    # Linear discriminant analysis: whiten the spread within persons, keep the directions between them.
    persons = train.reshape(people, each, -1)
    means = persons.mean(axis=1)
    within = (persons - means[:, None]).reshape(len(train), -1)
    within = within.T @ within / (len(train) - people)
    within += np.eye(len(within)) * 1e-3 * np.trace(within) / len(within)
    values, vectors = np.linalg.eigh(within)
    whiten = vectors / np.sqrt(values)
    spread, directions = np.linalg.eigh(whiten.T @ (np.cov(means.T) - within / each) @ whiten)
    results = []
    for kept in (8, 16, 32, 64):
        gain = np.maximum(spread[-kept:], 0)
        results.append(accuracy((test @ whiten @ directions[:, -kept:]) * np.sqrt(gain / (1 + gain))))
    # The requirement is 0.75. Going from 500 people to 1000 once raised the result by five points.
    assert max(results) < 0.70, results
    assert max(results) > 0.58  # but 14 pixels are not noise


def test_pairs_are_balanced_and_never_repeat():
    faces = SyntheticFaces(12, 4)
    left, right, same = verification_pairs(faces, 144, seed=3)
    assert left.dtype == right.dtype == np.int64 and same.dtype == bool
    assert len(left) == len(right) == 144 and same.sum() == 72  # all pairs of one identity that exist
    assert ((faces.labels[left] == faces.labels[right]) == same).all()
    assert (left != right).all()
    assert len({frozenset(pair) for pair in zip(left.tolist(), right.tolist(), strict=True)}) == 144
    again = verification_pairs(faces, 144, seed=3)
    assert all(np.array_equal(a, b) for a, b in zip(again, (left, right, same), strict=True))
    assert not np.array_equal(verification_pairs(faces, 144, seed=4)[0], left)


def test_every_possible_pair_can_be_drawn_from_a_source_in_any_order():
    source = SimpleNamespace(identities=["a", "b", "c"], labels=np.array([2, 0, 1, 0, 2, 1, 2]))
    seen_same, seen_different = set(), set()
    for seed in range(60):
        left, right, same = verification_pairs(source, 10, seed=seed)
        assert ((source.labels[left] == source.labels[right]) == same).all()
        for one, two, equal in zip(left.tolist(), right.tolist(), same, strict=True):
            (seen_same if equal else seen_different).add(frozenset((one, two)))
    assert len(seen_same) == 5 and len(seen_different) == 21 - 5


def test_pairs_of_a_very_large_set_cost_no_enumeration():
    source = SimpleNamespace(
        identities=[str(number) for number in range(20_000)], labels=np.repeat(np.arange(20_000), 10)
    )
    left, right, same = verification_pairs(source, 6000, seed=0)
    assert ((source.labels[left] == source.labels[right]) == same).all()
    assert len(np.unique(np.stack([np.minimum(left, right), np.maximum(left, right)]), axis=1).T) == 6000


@pytest.mark.parametrize(
    ("source", "pairs", "text"),
    [
        (SyntheticFaces(3, 1), 2, "at least two of every identity"),
        (SyntheticFaces(1, 5), 2, "at least two identities"),
        (SyntheticFaces(3, 2), 3, "odd"),
        (SyntheticFaces(3, 2), 8, "has 3"),
        (SyntheticFaces(3, 2), 0, "pairs"),
    ],
)
def test_pairs_that_cannot_be_drawn_are_refused(source, pairs, text):
    with pytest.raises(UsageError, match=text):
        verification_pairs(source, pairs, seed=0)


@pytest.mark.parametrize(
    "arguments",
    [
        {"identities": 0},
        {"images_per_identity": 0},
        {"seed": -1},
        {"size": 4},
        {"size": 100_000},
        {"first_identity": -1},
        {"identities": 2.5},
        {"seed": True},
    ],
)
def test_bad_arguments_are_named(arguments):
    with pytest.raises(UsageError, match=next(iter(arguments))):
        SyntheticFaces(**{"identities": 2, "images_per_identity": 2, **arguments})


def test_an_index_outside_the_set_is_refused():
    faces = SyntheticFaces(2, 2)
    for index in (-1, 4):
        with pytest.raises(UsageError, match="index"):
            faces.image(index)


def test_the_set_says_what_it_is_for():
    text = SyntheticFaces(2, 3).describe()
    assert "2 procedural identities" in text and "smoke tests" in text and "no claim" in text
