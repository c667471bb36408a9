"""Procedural faces: an unlimited, embedded identity set for smoke tests, demos and scale tests.

The faces are drawn, not photographed. They exist so that every part of the package can be exercised without
data: the training loop end to end, verification, throughput with very many identities. They are NOT evidence
for any claim about recognising people: accuracy here says nothing about accuracy on photographs.

How an image is made. A person is a vector of uniform numbers (`PERSON_RANGES`, plus moles, freckles and scars
at fixed places of the face); an image is a second, independent vector (`IMAGE_RANGES`): pose, expression,
light, hair arrangement, background, things before the face, camera. Features are smooth curves on a dome that
is turned by yaw and pitch; the five landmarks of the turned face are then fitted to the standard
112-pixel template by a similarity, exactly as an aligner does with a photograph, and a little misalignment is
added. Light falls on a coarse height field (dome, nose, sockets, cheeks), so that the same skin has very
different colours in two images.

The difficulty is set on purpose: much of what tells people apart is only a few pixels wide at 112x112, and
colour, light and pose vary more between two images of one person than between two persons. A linear discriminant
trained on 14-pixel images of 400 people stays under 70 % verification accuracy on other people
(tests/data/test_synthetic.py); with more people to learn from it gets better.
"""

from functools import lru_cache
from types import SimpleNamespace
from typing import Protocol

import cv2
import numpy as np

from lrface.errors import UsageError

Array = np.ndarray

# Aligned positions in a 112x112 crop: eyes, nose tip, mouth corners (image left first).
TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)

# The face is described in template pixels, the origin between eyes and mouth, x to the right, y down,
# z towards the camera.
DOME_CENTRE_Y = -15.0
DOME_RADIUS_X = 46.0
DOME_RADIUS_Y = 76.0
DOME_DEPTH = 42.0
SHIFT = 4  # fractional bits of the drawing coordinates
GRID = 56  # side of the grid on which light and soft colours are computed
LARGEST_SIZE = 512

# What a person is. Lengths are in template pixels; everything without a unit is a share of its full effect.
PERSON_RANGES: dict[str, tuple[float, float]] = {
    # head
    "forehead": (0.92, 1.08),
    "temple": (0.92, 1.07),
    "cheekbone": (0.92, 1.08),
    "cheek": (0.90, 1.08),
    "jaw": (0.84, 1.12),
    "jaw_corner": (0.80, 1.16),
    "chin_width": (0.70, 1.50),
    "chin_length": (-4.0, 4.0),
    "ear_size": (0.6, 1.25),
    "ear_out": (0.5, 4.5),
    "ear_y": (-4.0, 3.0),
    # skin
    "melanin": (0.15, 0.75),
    "redness": (-1.0, 1.0),
    "yellowness": (-1.0, 1.0),
    "blush": (0.0, 0.6),
    "pores": (0.0, 1.0),
    "freckles": (-1.2, 1.0),
    "moles": (0.0, 8.0),
    "scars": (-1.6, 2.4),
    # eyes
    "eye_spacing": (15.8, 19.4),
    "eye_y": (-21.8, -18.8),
    "eye_width": (4.8, 8.8),
    "eye_open": (1.9, 5.2),
    "eye_low": (1.0, 3.0),
    "eye_tilt": (-0.31, 0.27),
    "eye_skew": (-0.40, 0.40),
    "eye_asymmetry": (-0.9, 0.9),
    "iris_size": (2.4, 4.0),
    "iris_colour": (0.0, 4.0),
    "iris_ring": (0.0, 1.0),
    "crease": (-0.4, 1.0),
    "crease_height": (1.4, 4.2),
    "bags": (-0.6, 1.0),
    "lashes": (0.0, 1.0),
    "eye_shadow": (-0.7, 1.0),
    "socket": (0.0, 1.0),
    # brows
    "brow_y": (6.2, 11.0),
    "brow_inner": (3.0, 11.5),
    "brow_outer": (23.5, 32.0),
    "brow_tilt": (-4.2, 4.2),
    "brow_arch": (-1.5, 5.2),
    "brow_arch_at": (0.35, 0.75),
    "brow_thick_inner": (0.4, 3.4),
    "brow_thick_middle": (0.5, 3.2),
    "brow_thick_outer": (0.2, 2.2),
    "brow_dark": (0.25, 1.0),
    "brow_asymmetry": (-1.5, 1.5),
    # nose
    "nose_y": (-2.8, 2.8),
    "nose_width": (4.6, 10.6),
    "nose_height": (6.0, 16.0),
    "bridge_width": (3.2, 6.2),
    "bridge_height": (0.3, 1.0),
    "bridge_bump": (-1.0, 1.0),
    "nostril_size": (0.8, 2.5),
    "nostril_tilt": (-0.7, 0.7),
    "nostril_gap": (0.38, 0.66),
    "wing_height": (2.4, 6.4),
    "wing_dark": (0.2, 1.0),
    "tip_size": (2.6, 4.6),
    "nose_bend": (-1.1, 1.1),
    # mouth
    "mouth_y": (18.6, 22.6),
    "mouth_width": (11.2, 17.2),
    "lip_upper": (0.9, 5.2),
    "lip_lower": (1.4, 6.6),
    "cupid": (0.0, 1.5),
    "cupid_width": (0.12, 0.30),
    "lip_peak": (0.4, 0.95),
    "mouth_curve": (-2.4, 2.4),
    "mouth_bend": (-1.2, 1.2),
    "lip_red": (0.0, 1.0),
    "lip_dark": (0.0, 1.0),
    "philtrum": (-0.5, 1.0),
    "dimples": (-1.5, 1.0),
    "chin_cleft": (-1.8, 1.0),
    # hair
    "hair_dark": (0.0, 1.0),
    "hair_red": (0.0, 1.0),
    "hair_grey": (-3.0, 1.0),
    "hairline": (-62.0, -47.0),
    "widow_peak": (-4.0, 6.0),
    "temple_recess": (-3.0, 11.0),
    "hair_side": (-32.0, 34.0),
    "hair_volume": (1.0, 8.0),
    "parting": (-22.0, 22.0),
    "curl": (0.0, 1.0),
    "bald": (0.0, 1.0),
    # beard
    "beard": (-1.6, 1.0),
    "beard_line": (2.0, 20.0),
    "beard_side": (18.0, 38.0),
    "moustache": (-1.2, 1.0),
    "moustache_width": (0.5, 1.2),
    "moustache_thick": (1.2, 3.6),
    "goatee": (-2.0, 1.0),
    # age
    "forehead_lines": (-1.0, 1.0),
    "forehead_line_y": (-47.0, -39.0),
    "frown_lines": (-1.4, 1.0),
    "frown_gap": (1.6, 4.0),
    "crow_feet": (-1.2, 1.0),
    "folds": (-0.6, 1.0),
    "fold_length": (0.5, 1.15),
    "cheek_lines": (-2.0, 1.0),
}

# What differs between two images of one person.
IMAGE_RANGES: dict[str, tuple[float, float]] = {
    # pose (radians) and misalignment (pixels, shares, radians)
    "yaw_a": (-0.29, 0.29),
    "yaw_b": (-0.29, 0.29),
    "pitch_a": (-0.17, 0.17),
    "pitch_b": (-0.17, 0.17),
    "jitter_x": (-1.6, 1.6),
    "jitter_y": (-1.6, 1.6),
    "jitter_scale": (-0.04, 0.04),
    "jitter_roll": (-0.05, 0.05),
    # expression
    "smile": (-0.6, 1.0),
    "open": (-1.2, 1.0),
    "brow_raise": (-1.0, 1.0),
    "frown": (-1.0, 1.0),
    "lids": (-0.35, 0.45),
    "blink": (0.0, 1.0),
    "gaze_x": (-1.6, 1.6),
    "gaze_y": (-0.7, 0.7),
    "pout": (-0.2, 0.2),
    # light
    "light_side": (-1.3, 1.3),
    "light_up": (-1.1, 0.5),
    "ambient": (0.25, 0.8),
    "exposure": (-0.6, 0.32),
    "warm": (-0.3, 0.3),
    "tint": (-0.1, 0.1),
    "gloss": (0.0, 1.0),
    "contrast": (0.75, 1.25),
    "saturation": (0.55, 1.25),
    "rim": (-1.0, 1.0),
    # appearance of the day
    "hair_shift": (-9.0, 9.0),
    "hair_lower": (-5.0, 10.0),
    "hair_side_shift": (-26.0, 26.0),
    "hair_light": (-0.5, 0.6),
    "hair_dye": (0.0, 1.0),
    "hair_dye_dark": (0.0, 1.0),
    "hair_dye_red": (0.0, 1.0),
    "beard_growth": (-1.0, 1.0),
    "flush": (0.0, 0.8),
    "makeup": (-1.5, 1.0),
    "makeup_hue": (0.0, 1.0),
    "tan": (-0.34, 0.34),
    # things before the face: a chance and a choice each
    "glasses": (0.0, 1.0),
    "glasses_shape": (0.0, 1.0),
    "glasses_tint": (0.0, 1.0),
    "hat": (0.0, 1.0),
    "hat_line": (-52.0, -37.0),
    "hand": (0.0, 1.0),
    "mask": (0.0, 1.0),
    "mask_line": (-10.0, 6.0),
    "patch": (0.0, 1.0),
    # camera
    "blur": (-0.5, 1.1),
    "noise": (0.0, 9.0),
}

_PERSON_STREAM, _IMAGE_STREAM = 1, 2
_SKIN_STEPS = np.array([0.0, 0.35, 0.7, 1.0])
_SKIN = np.array([[238.0, 202, 180], [214, 166, 134], [160, 110, 80], [98, 64, 48]])
_IRIS_STEPS = np.array([0.0, 1.0, 2.0, 3.0, 4.0])
_IRIS = np.array([[48.0, 28, 18], [116, 72, 34], [112, 122, 60], [66, 122, 176], [140, 158, 172]])
_SIDES = np.array([[[-1.0, 1.0]], [[1.0, 1.0]]])  # mirrors a curve of the right half to both halves
_CIRCLE = np.stack([np.cos(np.arange(14) * np.pi / 7), np.sin(np.arange(14) * np.pi / 7)], axis=1)
_OPEN_16 = np.linspace(0.0, 1.0, 16)


class _Labelled(Protocol):
    """What `verification_pairs` needs of a face source."""

    @property
    def identities(self) -> list[str]: ...
    @property
    def labels(self) -> Array: ...


class SyntheticFaces:
    """A lazily drawn set of procedural faces (a FaceSource). For smoke tests, demos and scale tests only.

    Identity number k (counted from 0 over all sets, `first_identity` being the first one of this set) is the
    same person for the same seed whatever range of identities and however many images are asked for, and its
    image j is the same image. Nothing is stored: an image is drawn, in about 2 ms, when it is asked for.

    Attributes: identities list[str]; labels int64 [n], the index into identities; image_size int.

    Raises UsageError when a number is out of range.
    """

    format = "synthetic"

    def __init__(
        self,
        identities: int,
        images_per_identity: int,
        seed: int = 0,
        size: int = 112,
        first_identity: int = 0,
    ) -> None:
        _check_integer("identities", identities, 1)
        _check_integer("images_per_identity", images_per_identity, 1)
        _check_integer("seed", seed, 0)
        _check_integer("size", size, 8, LARGEST_SIZE)
        _check_integer("first_identity", first_identity, 0)
        self.seed = int(seed)
        self.image_size = int(size)
        self.first_identity = int(first_identity)
        self.images_per_identity = int(images_per_identity)
        self.identities = [
            f"synthetic-{self.seed}-{number:07d}"
            for number in range(self.first_identity, self.first_identity + int(identities))
        ]
        self.labels = np.repeat(np.arange(int(identities), dtype=np.int64), self.images_per_identity)

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Array:
        """Image number `index`: uint8 [size, size, 3] RGB. Raises UsageError for an index outside the set."""
        _check_integer("index", index, 0, len(self) - 1)
        label, number = divmod(int(index), self.images_per_identity)
        return draw_face(self.seed, self.first_identity + label, number, self.image_size)

    def encoded(self, index: int) -> None:
        """None: nothing is stored."""
        return None

    def sources(self) -> list[str]:
        """IDENTITY/NUMBER of every image."""
        return [
            f"{identity}/{number:05d}"
            for identity in self.identities
            for number in range(self.images_per_identity)
        ]

    def describe(self) -> str:
        """One paragraph for logs and model cards: what this set is and what it is not for."""
        return (
            f"{len(self.identities)} procedural identities with {self.images_per_identity} images each "
            f"({self.image_size} pixels, seed {self.seed}, identities from number {self.first_identity}), "
            "drawn by lrface. For smoke tests, demos and scale tests; results on drawn faces support no "
            "claim about recognising people."
        )


def verification_pairs(source: _Labelled, pairs: int, seed: int = 0) -> tuple[Array, Array, Array]:
    """Draw balanced pairs: half of one identity, half of two, without replacement.

    Returns left int64 [pairs], right int64 [pairs] (indices into the source) and same bool [pairs], in
    random order. No pair (in either order) occurs twice and no image is paired with itself. Every pair that
    exists is equally likely, so an identity with more images occurs more often.

    Raises UsageError when `pairs` is odd or below 2, an identity has fewer than two images, there is one
    identity only, or the source has fewer pairs of a kind than asked for.
    """
    _check_integer("pairs", pairs, 2)
    _check_integer("seed", seed, 0)
    if pairs % 2:
        raise UsageError(f"pairs: {pairs} is odd; a balanced set needs an even number")
    labels = np.asarray(source.labels, dtype=np.int64)
    counts = np.bincount(labels, minlength=len(source.identities))
    if len(counts) < 2:
        raise UsageError("verification pairs need at least two identities; the source has one")
    if counts.min() < 2:
        poorest = int(counts.argmin())
        raise UsageError(
            f"identity {source.identities[poorest]!r} has {counts[poorest]} image(s); verification pairs "
            "need at least two of every identity"
        )
    half = pairs // 2
    order = np.argsort(labels, kind="stable")
    ends = np.cumsum(counts)[labels[order]]  # for each image in label order: where its identity ends
    rng = np.random.default_rng(np.random.SeedSequence([seed, 3]))
    columns = []
    for same in (True, False):
        # Position p in label order goes with a later one: the rest of its identity, or all that follow it.
        position = np.arange(len(order))
        choices = ends - position - 1 if same else len(order) - ends
        edges = np.cumsum(choices)
        available = int(edges[-1])
        if half > available:
            kind = "one identity" if same else "two identities"
            raise UsageError(
                f"pairs: {pairs} asks for {half} pairs of {kind}, the source has {available}; "
                "ask for fewer pairs"
            )
        chosen = rng.choice(available, size=half, replace=False)
        first = np.searchsorted(edges, chosen, side="right")
        offset = chosen - (edges[first] - choices[first])
        second = (first + 1 if same else ends[first]) + offset
        columns.append(np.stack([order[first], order[second], np.full(half, same)], axis=1))
    table = np.concatenate(columns)
    table = table[rng.permutation(pairs)]
    swap = rng.random(pairs) < 0.5  # otherwise the left image would always have the smaller label
    table[swap, :2] = table[swap, 1::-1]
    return table[:, 0].astype(np.int64), table[:, 1].astype(np.int64), table[:, 2].astype(bool)


def draw_face(seed: int, identity: int, number: int, size: int = 112) -> Array:
    """Draw image `number` of person `identity`: uint8 [size, size, 3] RGB, a pure function of its arguments.

    Below 112 pixels the 112-pixel image is averaged down; above, it is drawn at the size asked for.
    """
    person = _person(seed, identity)
    rng = np.random.Generator(
        np.random.PCG64(np.random.SeedSequence([_IMAGE_STREAM, seed, identity, number]))
    )
    view = SimpleNamespace(**_stretch(IMAGE_RANGES, rng.random(len(IMAGE_RANGES))))
    view.random = rng.random(96)  # free numbers for backgrounds, colours and strokes of this image
    picture = _Picture(person, view, max(size, 112))
    image = picture.draw()
    if size < 112:
        image = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
    return image


def _check_integer(name: str, value: int, low: int, high: int | None = None) -> None:
    allowed = f"{low} or more" if high is None else f"{low} to {high}"
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise UsageError(f"{name}: expected an integer ({allowed}), found {value!r}")
    if value < low or (high is not None and value > high):
        raise UsageError(f"{name}: {value} is out of range; allowed is {allowed}")


def _stretch(ranges: dict[str, tuple[float, float]], uniform: Array) -> dict[str, float]:
    limits = _limits(tuple(ranges.values()))
    return dict(zip(ranges, (limits[0] + uniform * limits[1]).tolist(), strict=True))


@lru_cache(maxsize=4)
def _limits(ranges: tuple[tuple[float, float], ...]) -> tuple[Array, Array]:
    table = np.array(ranges)
    return table[:, 0], table[:, 1] - table[:, 0]


@lru_cache(maxsize=64)
def _person(seed: int, identity: int) -> SimpleNamespace:
    """The parameters of a person, its marks and its colours."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([_PERSON_STREAM, seed, identity])))
    person = SimpleNamespace(**_stretch(PERSON_RANGES, rng.random(len(PERSON_RANGES))))
    moles = rng.random((8, 4))[: int(person.moles)]
    person.mole_place = np.stack([moles[:, 0] * 66 - 33, moles[:, 1] * 82 - 46], axis=1)
    person.mole_look = moles[:, 2:] * [1.0, 0.35] + [0.5, 0.35]  # radius in pixels, tone
    freckles = rng.random((48, 3))[: max(0, int(person.freckles * 48))]
    person.freckle_place = np.stack([freckles[:, 0] * 60 - 30, freckles[:, 1] * 26 - 13], axis=1)
    person.freckle_look = freckles[:, 2]
    scars = rng.random((2, 5))[: max(0, int(person.scars))]
    person.scars_at = [
        np.array([[-28 + 56 * x, -44 + 78 * y]])
        + np.linspace(-1, 1, 5)[:, None]
        * (3 + 5 * length)
        * np.array([[np.cos(3.2 * turn), np.sin(3.2 * turn)]])
        + np.array([[0.0, 1.0]]) * bend * np.array([[0.0], [1.0], [1.5], [1.0], [0.0]])
        for x, y, length, turn, bend in scars
    ]
    person.wrinkle = rng.random(16) * 2 - 1
    person.brow_hair = rng.random(24)
    person.complexion = (
        1
        + 0.05 * person.redness * np.array([0.8, -0.6, -0.6])
        + 0.05 * person.yellowness * np.array([0.2, 0.2, -1.2])
    )
    person.hair = _hair_colour(
        person.hair_dark * (1 - 0.35 * (1 - person.melanin)), person.hair_red, max(0.0, person.hair_grey)
    )
    person.iris = np.array([np.interp(person.iris_colour, _IRIS_STEPS, _IRIS[:, c]) for c in range(3)])
    return person


def _hair_colour(dark: float, red: float, grey: float) -> Array:
    colour = np.array([26.0, 20, 18]) + (1 - dark) ** 1.3 * np.array([190.0, 150 - 55 * red, 92 - 52 * red])
    return colour * (1 - grey) + np.array([176.0, 174, 172]) * grey


@lru_cache(maxsize=32)
def _curve(controls: int, samples: int, closed: bool) -> Array:
    """Matrix [samples, controls] that turns control points into a smooth curve through them (Catmull-Rom)."""
    spans = controls if closed else controls - 1
    at = np.arange(samples) * spans / samples if closed else np.linspace(0, spans, samples)
    span = np.minimum(at.astype(int), spans - 1)
    t = at - span
    weights = np.stack(
        [
            (-t + 2 * t**2 - t**3) / 2,
            (2 - 5 * t**2 + 3 * t**3) / 2,
            (t + 4 * t**2 - 3 * t**3) / 2,
            (-(t**2) + t**3) / 2,
        ],
        axis=1,
    )
    matrix = np.zeros((samples, controls))
    for shift in range(4):
        index = span + shift - 1
        index = index % controls if closed else np.clip(index, 0, controls - 1)
        np.add.at(matrix, (np.arange(samples), index), weights[:, shift])
    return matrix


@lru_cache(maxsize=1)
def _noise_tile() -> Array:
    """Fixed standard normal noise, float32 [1024, 1024]; images read it from random places."""
    return np.random.Generator(np.random.PCG64(20)).standard_normal((1024, 1024), dtype=np.float32)


@lru_cache(maxsize=1)
def _grid() -> tuple[Array, Array]:
    """Template coordinates of the cells of the coarse grid: two float32 [GRID, GRID]."""
    at = ((np.arange(GRID) + 0.5) * (112 / GRID) - 0.5).astype(np.float32)
    return np.meshgrid(at, at)


def _dome(points: Array) -> Array:
    """Depth of the head under points [..., 2] of the face."""
    square = (points[..., 0] / DOME_RADIUS_X) ** 2 + ((points[..., 1] - DOME_CENTRE_Y) / DOME_RADIUS_Y) ** 2
    return DOME_DEPTH * np.sqrt(np.maximum(1.0 - square, 0.03))


class _Picture:
    """One image being drawn: a person, a view of it and the canvas."""

    def __init__(self, person: SimpleNamespace, view: SimpleNamespace, side: int) -> None:
        self.person, self.view, self.side = person, view, side
        self.scale = side / 112
        self.canvas = np.empty((side, side, 3), dtype=np.uint8)
        self.open = max(0.0, view.open) * 5.5
        # The sum of two uniforms: moderate turns are the common ones.
        yaw, pitch = view.yaw_a + view.yaw_b, view.pitch_a + view.pitch_b
        turn_yaw = np.array([[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]])
        turn_pitch = np.array(
            [[1, 0, 0], [0, np.cos(pitch), np.sin(pitch)], [0, -np.sin(pitch), np.cos(pitch)]]
        )
        self.turn = turn_pitch @ turn_yaw
        self.mouth_corner = np.array(
            [
                person.mouth_width * (1 + 0.11 * view.smile - view.pout),
                person.mouth_y - 2.4 * view.smile + 0.4 * self.open,
            ]
        )
        self._align()

    def _align(self) -> None:
        """Fit the landmarks of the turned face to the template, with the misalignment of this image."""
        person, view = self.person, self.view
        eye, corner = [person.eye_spacing, person.eye_y], self.mouth_corner
        places = np.array(
            [[-eye[0], eye[1]], eye, [person.nose_bend, person.nose_y], [-corner[0], corner[1]], corner]
        )
        depth = _dome(places)
        depth[2] += person.nose_height
        turned = np.concatenate([places, depth[:, None]], axis=1) @ self.turn.T
        found, wanted = turned[:, 0] + 1j * turned[:, 1], TEMPLATE[:, 0] + 1j * TEMPLATE[:, 1]
        found_mean, wanted_mean = found.mean(), wanted.mean()
        centred = found - found_mean
        factor = np.vdot(centred, wanted - wanted_mean) / np.vdot(centred, centred)
        factor *= (1 + view.jitter_scale) * np.exp(1j * view.jitter_roll)
        shift = wanted_mean + view.jitter_x + 1j * view.jitter_y - factor * found_mean
        self.similarity = (complex(factor), complex(shift))
        rotate = np.array([[factor.real, -factor.imag], [factor.imag, factor.real]])
        pixel = rotate @ self.turn[:2] * self.scale
        offset = np.array([shift.real + 0.5, shift.imag + 0.5]) * self.scale - 0.5
        fixed = 1 << SHIFT
        self.matrix, self.offset = pixel.T * fixed, offset * fixed
        # The visible contour of a dome hardly changes its shape when the head turns; it is carried along.
        contour = rotate * self.scale
        self.contour_matrix = contour.T * fixed
        self.contour_offset = self.offset + contour @ self.turn[:2, 2] * 6.0 * fixed

    # Coordinates and strokes

    def surface(self, points: Array, lift: float | Array = 0.0) -> Array:
        """Canvas coordinates (fixed point int32) of points [..., 2] lying `lift` above the head."""
        depth = _dome(points) + lift
        return np.rint(points @ self.matrix[:2] + depth[..., None] * self.matrix[2] + self.offset).astype(
            np.int32
        )

    def contour(self, points: Array) -> Array:
        """Canvas coordinates (fixed point int32) of points [..., 2] on the outline of the head."""
        return np.rint(points @ self.contour_matrix + self.contour_offset).astype(np.int32)

    def fill(self, pixels: Array, colour: Array) -> None:
        cv2.fillPoly(self.canvas, [pixels], colour.tolist(), cv2.LINE_AA, SHIFT)

    def stroke(self, pixels: Array, colour: Array, width: float = 1.0, closed: bool = False) -> None:
        thickness = max(1, round(width * self.scale))
        cv2.polylines(self.canvas, [pixels], closed, colour.tolist(), thickness, cv2.LINE_AA, SHIFT)

    def dot(self, pixel: Array, radius: float, colour: Array) -> None:
        # cv2.circle makes a diamond of a circle this small, a polygon stays round.
        pixels = np.rint(_CIRCLE * (radius * self.scale * (1 << SHIFT)) + pixel).astype(np.int32)
        cv2.fillPoly(self.canvas, [pixels], colour.tolist(), cv2.LINE_AA, SHIFT)

    def mask(self, polygons: list[Array], blur: float) -> Array:
        """Soft coverage of polygons: float32 [side, side] from 0 to 1."""
        layer = np.zeros((self.side, self.side), dtype=np.uint8)
        for polygon in polygons:
            cv2.fillPoly(layer, [polygon], 255, cv2.LINE_AA, SHIFT)
        soft = cv2.GaussianBlur(layer, (0, 0), blur * self.scale)
        return soft.astype(np.float32) * np.float32(1 / 255)

    def blend(self, coverage: Array, colour: Array) -> None:
        mixed = self.canvas + coverage[..., None] * (colour.astype(np.float32) - self.canvas)
        np.clip(mixed, 0, 255, out=mixed)
        self.canvas[...] = mixed

    # The picture

    def draw(self) -> Array:
        person, view = self.person, self.view
        skin = np.array(
            [np.interp(person.melanin + view.tan, _SKIN_STEPS, _SKIN[:, channel]) for channel in range(3)]
        )
        self.skin = skin * person.complexion
        self.lip = self.skin * np.array([0.92, 0.70, 0.70]) * (1 - 0.25 * person.lip_dark)
        self.lip += person.lip_red * np.array([14.0, -26, -20])
        self.draw_background()
        self.draw_head()
        self.draw_marks()
        self.draw_eyes()
        self.draw_mouth()
        self.draw_nose()
        self.draw_lines()
        self.draw_beard()
        self.draw_brows()
        self.draw_hair()
        self.draw_glasses()
        self.draw_obstacles()
        return self.light()

    def draw_background(self) -> None:
        random = self.view.random
        corners = (random[:12] * 210 + 20).reshape(2, 2, 3)
        # Half way to grey: interiors and skies, not neon.
        corners = (0.5 * corners + 0.5 * corners.mean(axis=2, keepdims=True)).astype(np.float32)
        self.canvas[...] = cv2.resize(corners, (self.side, self.side), interpolation=cv2.INTER_LINEAR)
        extent = self.side << SHIFT
        for start in (12, 20, 28):
            box = random[start : start + 8]
            low = (box[:2] * 1.2 - 0.2) * extent
            high = low + box[2:4] * 0.7 * extent
            corners_of = np.array([low, [high[0], low[1]], high, [low[0], high[1] * 0.8 + low[1] * 0.2]])
            self.fill(corners_of.astype(np.int32), 110 * box[4:7] + 110 * box[7])

    def draw_head(self) -> None:
        person, view = self.person, self.view
        drop = person.chin_length + self.open * 0.8
        # Shoulders and neck.
        cloth = view.random[36:39] * 225
        self.fill(
            self.contour(np.array([[-80.0, 75], [-60, 56], [-24, 46], [24, 46], [60, 56], [80, 75]])), cloth
        )
        neck = np.array([[-25.0, 20], [25, 20], [27, 52], [0, 60], [-27, 52]])
        self.fill(self.contour(neck), self.skin * 0.72)
        ear = np.array([[0.0, -9], [4.5, -11], [7, -5], [5.5, 3], [2, 10], [-2, 8]]) * person.ear_size
        ear = _curve(6, 18, True) @ ear + [37.0 * person.cheekbone + person.ear_out - 2, -16 + person.ear_y]
        for side in self.contour(ear * _SIDES):
            self.fill(side, self.skin * 0.86)
        half = np.array(
            [
                [0, -90],
                [27 * person.forehead, -82],
                [38 * person.forehead, -60],
                [39.5 * person.temple, -38],
                [40 * person.cheekbone, -16],
                [38 * person.cheek, 5],
                [33.5 * person.jaw, 21 + 0.4 * drop],
                [24.5 * person.jaw_corner, 33 + 0.8 * drop],
                [10.5 * person.chin_width, 41 + drop],
                [0, 42.5 + drop],
            ]
        )
        outline = np.concatenate([half, half[-2:0:-1] * [-1, 1]])
        self.outline = _curve(18, 72, True) @ outline
        self.outline_pixels = self.contour(self.outline)
        self.fill(self.outline_pixels, self.skin)

    def draw_marks(self) -> None:
        person = self.person
        if len(person.freckle_place):
            colours = self.skin * (0.86 - 0.2 * person.freckle_look[:, None])
            for pixel, colour in zip(self.surface(person.freckle_place), colours, strict=True):
                self.dot(pixel, 0.55, colour)
        if len(person.mole_place):
            for pixel, look in zip(self.surface(person.mole_place), person.mole_look, strict=True):
                self.dot(pixel, look[0], self.skin * look[1] * np.array([0.8, 0.66, 0.62]))
        for scar in person.scars_at:
            self.stroke(self.surface(scar), np.minimum(self.skin * [1.12, 1.0, 0.98] + 14, 255))

    def draw_eyes(self) -> None:
        person, view = self.person, self.view
        closing = 1.0 - max(-0.3, view.lids) - 0.22 * max(0.0, view.smile)
        if view.blink > 0.95:
            closing = 0.08
        upper, lower = person.eye_open * closing, person.eye_low * (0.6 + 0.4 * closing)
        width = person.eye_width
        controls = np.array(
            [
                [-width, 0.6],
                [width * (-0.45 + 0.3 * person.eye_skew), -upper * 0.86],
                [width * (0.2 + 0.3 * person.eye_skew), -upper],
                [width, -0.5],
            ]
        )
        top = _curve(4, 12, False) @ controls
        below = controls * [1, -1] * [1, lower / max(upper, 0.1)]
        below[0], below[3] = controls[0], controls[3]
        bottom = _curve(4, 12, False) @ below
        cos, sin = np.cos(person.eye_tilt), np.sin(person.eye_tilt)
        tilt = np.array([[cos, sin], [-sin, cos]])
        rise = np.array([0.0, person.crease_height + 1.0])
        arcs = np.concatenate(
            [
                top,
                bottom,
                (top - rise) * [1.06, 1.0],
                (bottom + [0, 2.6]) * [1.04, 1.0],
                top - [0, 1.0 + 0.55 * person.crease_height],
                bottom + [0, 1.9],
            ]
        )
        arcs = arcs @ tilt
        centre = np.array([person.eye_spacing, person.eye_y])
        shift = np.array([[[0.0, person.eye_asymmetry / 2]], [[0.0, -person.eye_asymmetry / 2]]])
        both = self.surface((arcs + centre) * _SIDES + shift).reshape(2, 6, 12, 2)
        gaze = np.array([view.gaze_x, view.gaze_y - 0.4])
        pupils = self.surface((centre * _SIDES + shift + gaze)[:, 0])
        lid = self.skin * 0.93
        if person.eye_shadow > 0:
            lid = lid * (1 - 0.3 * person.eye_shadow * np.array([0.7, 1.0, 0.8]))
        crease = self.skin * (1 - 0.5 * max(0.0, person.crease))
        lash = self.skin * (0.36 - 0.2 * person.lashes)
        white = np.array([232.0, 228, 224])
        for curves, pupil in zip(both, pupils, strict=True):
            self.fill(np.concatenate([curves[0], curves[1][::-1]]), white)
            self.dot(pupil, person.iris_size, person.iris * (0.85 - 0.6 * person.iris_ring))
            self.dot(pupil, person.iris_size * 0.78, person.iris)
            self.dot(pupil, person.iris_size * 0.4, np.array([12.0, 10, 10]))
            self.dot(pupil + [-14, -14], 0.55, np.array([250.0, 250, 250]))
            self.fill(np.concatenate([curves[0], curves[2][::-1]]), lid)
            self.fill(np.concatenate([curves[1], curves[3][::-1]]), self.skin * 0.97)
            if person.crease > 0:
                self.stroke(curves[4], crease)
            if person.bags > 0:
                self.stroke(curves[5], self.skin * (1 - 0.28 * person.bags))
            self.stroke(curves[1], self.skin * 0.72)
            self.stroke(curves[0], lash, 1.4)

    def draw_mouth(self) -> None:
        person, view = self.person, self.view
        corner_x, corner_y = self.mouth_corner
        middle = person.mouth_y + person.mouth_curve
        upper, lower = person.lip_upper * (1 - 0.2 * view.smile), person.lip_lower * (1 - 0.15 * view.smile)
        half_open = self.open / 2
        peak = person.cupid_width * corner_x
        top_y = middle - half_open * 0.5 - upper
        x = corner_x * np.array([-1, -0.55, 0, 0, 0, 0.55, 1])
        x[2], x[4] = -peak, peak
        shoulder = middle - half_open * 0.5 - upper * person.lip_peak
        top = np.array(
            [corner_y, shoulder, top_y - person.cupid * 0.5, top_y + person.cupid * 0.5] + [0.0] * 3
        )
        top[4:] = top[2::-1]
        x5 = corner_x * np.array([-1, -0.5, 0, 0.5, 1])
        mid = np.array([corner_y, (corner_y + 2 * middle) / 3, middle, (corner_y + 2 * middle) / 3, corner_y])
        bulge = np.array([0, 0.8, 1, 0.8, 0])
        bend = np.array([0.0, person.mouth_bend])
        upper_edge = _curve(7, 18, False) @ np.stack([x, top], axis=1)
        inner_top = _curve(5, 14, False) @ np.stack([x5 * 0.96, mid - half_open * 0.5 * bulge], axis=1)
        inner_bottom = _curve(5, 14, False) @ np.stack([x5 * 0.96, mid + half_open * 1.5 * bulge], axis=1)
        lower_edge = _curve(5, 14, False) @ np.stack([x5, mid + (half_open * 1.5 + lower) * bulge], axis=1)
        points = np.concatenate([upper_edge, inner_top, inner_bottom, lower_edge])
        points = points + bend * (points[:, :1] / corner_x)
        pixels = self.surface(points, 2.0)
        a, b, c, d = pixels[:18], pixels[18:32], pixels[32:46], pixels[46:]
        lip = self.lip
        if view.makeup > 0.25:
            hue = view.makeup_hue
            paint = np.array([150.0 + 60 * hue, 30 + 40 * (1 - hue), 50 + 60 * hue])
            lip = lip * (1 - 0.6 * view.makeup) + paint * 0.6 * view.makeup
        self.fill(np.concatenate([a, d[::-1]]), lip)
        self.fill(np.concatenate([a, b[::-1]]), lip * 0.86)
        if self.open > 0.7:
            self.fill(np.concatenate([b, c[::-1]]), np.array([58.0, 20, 22]))
            teeth = np.concatenate([b[2:12], ((b * 2 + c) // 3)[2:12][::-1]])
            self.fill(teeth, np.array([228.0, 222, 210]))
        else:
            self.stroke(b, lip * 0.42)
        self.stroke(d[3:11] + [0, 20], self.skin * 0.84)

    def draw_nose(self) -> None:
        person = self.person
        tip = np.array([person.nose_bend, person.nose_y])
        width, wing = person.nose_width, person.wing_height
        flare = 1 + 0.08 * max(0.0, self.view.smile)
        side = np.array(
            [
                [width * 0.72, -wing * 0.9],
                [width, -wing * 0.2],
                [width * 0.98, wing * 0.5],
                [width * 0.66, wing * 0.8],
            ]
        )
        side = _curve(4, 10, False) @ side * [flare, 1]
        tilt = person.nostril_tilt
        angles = np.linspace(0, 2 * np.pi, 10, endpoint=False)
        hole = np.stack(
            [np.cos(angles) * person.nostril_size * 1.25, np.sin(angles) * 0.62 * person.nostril_size], 1
        )
        hole = hole @ np.array([[np.cos(tilt), np.sin(tilt)], [-np.sin(tilt), np.cos(tilt)]])
        hole = hole + [width * person.nostril_gap, wing * 0.72]
        base = np.array([[0.0, wing * 1.0], [width * 0.3, wing * 0.95], [width * 0.55, wing * 0.8]])
        bridge = np.array(
            [
                [person.bridge_width * 0.9, -17.0],
                [person.bridge_width * 0.8, -11],
                [width * 0.55, -wing * 1.3],
            ]
        )
        bridge = _curve(3, 8, False) @ bridge
        points = np.concatenate([side, hole, base, bridge])
        lift = (
            np.concatenate([np.full(10, 0.45), np.full(10, 0.75), np.full(3, 0.8), np.linspace(0.25, 0.6, 8)])
            * person.nose_height
        )
        wing_colour = self.skin * (1 - 0.42 * person.wing_dark)
        for curves in self.surface(points * _SIDES + tip, lift):
            self.stroke(curves[:10], wing_colour)
            self.fill(curves[10:20], self.skin * 0.3)
            self.stroke(curves[20:23], self.skin * 0.66)
            self.stroke(curves[23:], self.skin * (1 - 0.14 * person.bridge_height))
        if person.philtrum > 0:
            line = np.array(
                [[1.4, person.nose_y + wing + 2.0], [1.9, person.mouth_y - person.lip_upper - 1.5]]
            )
            for pixels in self.surface(line * _SIDES, 2.0):
                self.stroke(pixels, self.skin * (1 - 0.2 * person.philtrum))

    def draw_lines(self) -> None:
        """Wrinkles, folds, dimples: age and expression together decide how deep they are."""
        person, view = self.person, self.view
        wrinkle, smile = person.wrinkle, max(0.0, view.smile)
        both: list[tuple[Array, float]] = []
        single: list[tuple[Array, float]] = []
        fold = 0.24 * max(0.0, person.folds) + 0.12 * smile
        if fold > 0.03:
            corner_x, corner_y = self.mouth_corner
            start = np.array([person.nose_width + 1.5, person.nose_y - 1.0])
            end = np.array([corner_x + 4.5 + wrinkle[0], corner_y + 3.0])
            end = start + (end - start) * person.fold_length
            middle = (start + end) / 2 + [2.0 + wrinkle[1], -1.0]
            both.append((_curve(3, 8, False) @ np.stack([start, middle, end]), fold))
        if person.dimples > 0:
            place = self.mouth_corner + [3.5, -1.0]
            both.append(
                (np.stack([place - [0, 2.2], place + [0.8, 0], place + [0, 2.2]]), 0.3 * person.dimples)
            )
        if person.cheek_lines > 0:
            both.append((np.array([[26.0, 2], [28 + wrinkle[2], 10], [26, 20]]), 0.22 * person.cheek_lines))
        if person.crow_feet > 0:
            outer = np.array([person.eye_spacing + person.eye_width + 1.5, person.eye_y])
            for spread in (-0.5 + 0.2 * wrinkle[3], 0.0, 0.5 + 0.2 * wrinkle[4]):
                both.append(
                    (
                        np.stack([outer, outer + [4.5, 5 * spread]]),
                        0.25 * person.crow_feet * (0.6 + 0.6 * smile),
                    )
                )
        if person.forehead_lines > 0:
            depth = 0.2 * person.forehead_lines * (1 + 0.4 * view.brow_raise)
            for row in range(3):
                y, reach = person.forehead_line_y - 4.2 * row, 17 + 6 * wrinkle[5 + row]
                ripple = 1.3 * wrinkle[8 + row]
                controls = np.array(
                    [[-reach, y + ripple], [-0.3 * reach, y - ripple], [0.4 * reach, y], [reach, y - 0.5]]
                )
                single.append((_curve(4, 10, False) @ controls, depth))
        if person.frown_lines > 0:
            gap, depth = person.frown_gap, 0.3 * person.frown_lines * (1 + 0.5 * view.frown)
            single.append((np.array([[-gap, -33.0], [-gap * 0.9, -26.0]]), depth))
            single.append((np.array([[gap, -32.0 + wrinkle[11]], [gap * 0.9, -26.0 + wrinkle[12]]]), depth))
        if person.chin_cleft > 0:
            y = 34 + person.chin_length + 0.8 * self.open
            single.append((np.array([[0.0, y - 3], [0.4, y + 3]]), 0.3 * person.chin_cleft))
        for points, depth in both:
            colour = self.skin * (1 - depth)
            for pixels in self.surface(points * _SIDES):
                self.stroke(pixels, colour)
        for points, depth in single:
            self.stroke(self.surface(points), self.skin * (1 - depth))

    def draw_brows(self) -> None:
        person, view = self.person, self.view
        t = _OPEN_16
        x = person.brow_inner + t * (person.brow_outer - person.brow_inner)
        arch = np.where(
            t < person.brow_arch_at,
            1 - ((person.brow_arch_at - t) / person.brow_arch_at) ** 2,
            1 - ((t - person.brow_arch_at) / (1 - person.brow_arch_at)) ** 2,
        )
        y = person.eye_y - person.brow_y - 2.1 * view.brow_raise - person.brow_arch * arch
        y = y + person.brow_tilt * (t - 0.5) + 1.6 * view.frown * (1 - t) ** 2
        thick = np.interp(
            t,
            [0.0, 0.08, 0.5, 1.0],
            [
                person.brow_thick_inner * 0.6,
                person.brow_thick_inner,
                person.brow_thick_middle,
                person.brow_thick_outer,
            ],
        )
        edges = np.concatenate([np.stack([x, y - thick], 1), np.stack([x, y + thick * 0.8], 1)[::-1]])
        roots = np.arange(1, 15)
        lean = (0.5 + person.brow_hair[:14]) * 1.2
        hairs = np.stack(
            [
                np.stack([x[roots], y[roots] + thick[roots] * 0.7], 1),
                np.stack([x[roots] + lean, y[roots] - thick[roots] * 1.1], 1),
            ],
            1,
        ).reshape(-1, 2)
        shift = np.array([[[0.0, person.brow_asymmetry]], [[0.0, 0.0]]])
        body = self.skin * (1 - person.brow_dark) + person.hair * 0.75 * person.brow_dark
        for pixels in self.surface(np.concatenate([edges, hairs]) * _SIDES + shift, 1.5):
            self.fill(pixels[:32], body)
            strokes = pixels[32:].reshape(14, 2, 2)
            cv2.polylines(self.canvas, list(strokes), False, (body * 0.72).tolist(), 1, cv2.LINE_AA, SHIFT)

    def draw_beard(self) -> None:
        person, view = self.person, self.view
        growth = view.beard_growth
        beard, goatee = person.beard + 0.45 * growth, person.goatee + 0.45 * growth
        moustache = person.moustache + 0.45 * growth
        if max(beard, goatee, moustache) <= 0.05:
            return
        corner_x, corner_y = self.mouth_corner
        drop = person.chin_length + self.open * 0.8
        below = corner_y + 1.5 * self.open + person.lip_lower
        coverage = np.zeros((self.side, self.side), dtype=np.float32)
        if beard > 0.05:
            line, reach = person.beard_line, person.beard_side
            half = np.array(
                [
                    [40.0, line - 22],
                    [reach, line - 4],
                    [corner_x + 5, corner_y - 2],
                    [corner_x * 0.6, below + 3],
                ]
            )
            lower = np.array([[0, below + 4.5], [0.0, 50 + drop], [26, 42 + drop], [42, 20]])
            right = np.concatenate([half, lower[:1]])
            full = np.concatenate([right, right[-2::-1] * [-1, 1], lower[:0:-1] * [-1, 1], lower[1:]])
            coverage = self.mask([self.contour(full)], 1.6) * min(0.9, 0.2 + 0.8 * beard)
        if goatee > 0.05:
            chin = np.array(
                [[-6.0, below + 4], [6, below + 4], [9, 36 + drop], [0, 44 + drop], [-9, 36 + drop]]
            )
            patch = self.mask([self.surface(_curve(5, 20, True) @ chin)], 1.0) * min(0.9, 0.25 + 0.8 * goatee)
            np.maximum(coverage, patch, out=coverage)
        if moustache > 0.05:
            width, thick = corner_x * person.moustache_width, person.moustache_thick
            y = person.mouth_y - person.lip_upper - self.open * 0.25 - 0.6
            shape = np.array(
                [
                    [-width, y + 2],
                    [-width * 0.5, y - thick * 0.9],
                    [0, y - thick],
                    [width * 0.5, y - thick * 0.9],
                    [width, y + 2],
                    [0, y],
                ]
            )
            patch = self.mask([self.surface(shape, 3.0)], 0.7) * min(0.9, 0.25 + 0.8 * moustache)
            np.maximum(coverage, patch, out=coverage)
        coverage *= np.clip(0.8 + 0.35 * self.noise(self.view.random[40:42]), 0, 1)
        self.blend(coverage, person.hair * 0.8)

    def noise(self, place: Array) -> Array:
        """A window of the noise tile, float32 [side, side], chosen by two numbers from 0 to 1."""
        tile = _noise_tile()
        row, column = (place * (tile.shape[0] - self.side)).astype(int)
        return tile[row : row + self.side, column : column + self.side]

    def draw_hair(self) -> None:
        person, view = self.person, self.view
        hair = person.hair
        if view.hair_dye < 0.4:
            hair = _hair_colour(view.hair_dye_dark, view.hair_dye_red, 0.0)
        hair = np.minimum(hair * (1 + view.hair_light), 245)
        volume = person.hair_volume
        ends = min(46.0, person.hair_side + view.hair_side_shift)
        top = self.outline * (1 + volume / 45) + [0, -0.3 * volume]
        random = view.random
        if person.bald > 0.12:
            line = person.hairline + view.hair_lower
            recess = person.temple_recess
            part = person.parting + view.hair_shift
            wave = person.curl * 3.0 * (random[44:51] - 0.5)
            across = np.array([-37.5, -30, -17, 0, 17, 30, 37.5])
            fall = np.exp(-(((across - part) / 9.0) ** 2)) * -4.0
            down = np.array(
                [
                    14.0,
                    1 - recess * 0.6,
                    -recess * 0.4,
                    person.widow_peak,
                    -recess * 0.4,
                    1 - recess * 0.6,
                    14.0,
                ]
            )
            inner = _curve(7, 28, False) @ np.stack([across, line + down + fall + wave], 1)
            pixels = self.surface(inner)
            upper = top[np.r_[54:72, 0:19]]  # from the left temple over the top to the right temple
            cap = np.concatenate([self.contour(upper), pixels[::-1]])
            self.fill(cap, hair)
            # Strands run from the parting down to the hairline.
            root = self.contour(np.array([[part * 0.8, -84.0]]))[0]
            for index, share in enumerate(random[51:61]):
                end = pixels[int(share * 27.99)]
                tone = hair * (0.72 + 0.6 * random[61 + index])
                self.stroke(np.stack([root, (root + end) // 2 + [0, -40], end]), tone)
        if ends > -24:
            # Hair beside the face, as far down as this person wears it today.
            y = np.linspace(-56, ends, 14)
            taper = np.sqrt(1 - np.linspace(0, 1, 14) ** 4)
            edge = np.interp(y, self.outline[:37, 1], self.outline[:37, 0])
            wave = person.curl * 2.0 * np.sin(y / 4.0 + 6 * random[71])
            inside = np.stack([edge - (2.5 + 0.4 * volume) * taper + wave, y], 1)
            outside = np.stack([edge + (3 + volume) * taper + wave, y], 1)
            for side in self.contour(np.concatenate([inside, outside[::-1]]) * _SIDES):
                self.fill(side, hair * 0.9)

    def draw_glasses(self) -> None:
        person, view = self.person, self.view
        if view.glasses > 0.2:
            return
        shape = 2.0 + 3.0 * view.glasses_shape  # from ellipse to rounded box
        angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        cos, sin = np.cos(angles), np.sin(angles)
        rim = np.stack(
            [np.sign(cos) * np.abs(cos) ** (2 / shape), np.sign(sin) * np.abs(sin) ** (2 / shape)], 1
        )
        random = view.random
        rim = rim * [10.5 + 3.5 * random[72], 6.5 + 4.0 * random[73]] + [17.6, person.eye_y + 1.5]
        colour = random[74:77] * np.array([150.0, 120, 130])
        width = 1.0 + 1.4 * random[77]
        sides = self.surface(rim * _SIDES, 5.0)
        if view.glasses_tint < 0.3:
            darkness = 0.35 + 0.6 * random[78]
            self.blend(self.mask(list(sides), 0.5) * np.float32(darkness), colour * 0.4)
        for pixels in sides:
            self.stroke(pixels, colour, width, closed=True)
        inner = [side[12] for side in sides]
        self.stroke(np.stack(inner), colour, width)
        for pixels, direction in zip(sides, (-1.0, 1.0), strict=True):
            ear = self.contour(np.array([[direction * 42.0, person.eye_y - 1.0]]))[0]
            self.stroke(np.stack([pixels[0], ear]), colour, width)

    def draw_obstacles(self) -> None:
        view = self.view
        random = view.random
        if view.hat < 0.1:
            colour = random[79:82] * 220
            line = view.hat_line
            brim = np.array(
                [
                    [-60.0, -100],
                    [60, -100],
                    [50, line - 2],
                    [22, line + 3],
                    [0, line + 4],
                    [-22, line + 3],
                    [-50, line - 2],
                ]
            )
            self.fill(self.contour(brim), colour)
            self.stroke(self.contour(brim[2:] - [0, 6]), colour * 0.6, 1.5)
        if view.mask < 0.05:
            colour = 120 + random[82:85] * 130
            line = view.mask_line
            shape = np.array(
                [
                    [-42.0, line - 6],
                    [-16, line],
                    [0, line - 7],
                    [16, line],
                    [42, line - 6],
                    [36, 24],
                    [22, 44],
                    [0, 50],
                    [-22, 44],
                    [-36, 24],
                ]
            )
            self.fill(self.surface(_curve(10, 40, True) @ shape, 4.0), colour)
            for y in (10.0, 20.0):
                self.stroke(
                    self.surface(np.array([[-34.0, y - 2], [0, y + 2], [34, y - 2]]), 6.0), colour * 0.84
                )
        if view.hand < 0.06:
            side = -1.0 if random[85] < 0.5 else 1.0
            start = np.array([side * (18 + 16 * random[86]), 10 + 26 * random[87]])
            for finger in range(4):
                low = start + [side * 5.5 * finger, 3.0 * abs(finger - 1)]
                line = np.stack([low, low + [side * 6, 44.0]])
                self.stroke(self.surface(line, 8.0), self.skin * (0.62 + 0.05 * finger), 8.0)
                self.stroke(self.surface(line, 8.0), self.skin * 0.92, 6.5)
        if view.patch < 0.08:
            centre = np.array([-36 + 72 * random[88], -40 + 84 * random[89]])
            radius = 7 + 11 * random[90:92]
            box = np.array([[-1.0, -1], [1, -0.8], [0.9, 1], [-1, 0.9]]) * radius + centre
            self.fill(self.surface(box, 8.0), random[92:95] * 230)

    def light(self) -> Array:
        """Shade the picture by light on the height field, then pass it through the camera."""
        view = self.view
        column, row = _grid()
        factor, shift = self.similarity
        turned = (column + 1j * row - np.complex64(shift)) / np.complex64(factor)
        turned_x, turned_y = turned.real, turned.imag
        # Which point of the head is under a cell: two steps of a fixed-point search from a flat head.
        turn = self.turn.astype(np.float32)
        inverse = np.linalg.inv(turn[:2, :2])
        depth: Array | np.float32 = np.float32(36.0)
        for _ in range(2):
            a, b = turned_x - turn[0, 2] * depth, turned_y - turn[1, 2] * depth
            x, y = inverse[0, 0] * a + inverse[0, 1] * b, inverse[1, 0] * a + inverse[1, 1] * b
            inside = 1 - (x * (1 / DOME_RADIUS_X)) ** 2 - ((y - DOME_CENTRE_Y) * (1 / DOME_RADIUS_Y)) ** 2
            depth = np.float32(DOME_DEPTH) * np.sqrt(np.maximum(inside, np.float32(0.03)))
        bumps, blush = self.relief()
        distance = (x[None] - bumps[:, 0, None, None]) * bumps[:, 2, None, None]
        distance *= distance
        other = (y[None] - bumps[:, 1, None, None]) * bumps[:, 3, None, None]
        other *= other
        distance += other
        distance += 1
        distance *= distance
        np.reciprocal(distance, out=distance)
        relief = np.tensordot(bumps[:, 4], distance, 1)
        soft = np.tensordot(blush, distance, 1)
        height = turn[2, 0] * x + turn[2, 1] * y + turn[2, 2] * (depth + relief)
        slope_x, slope_y = np.empty_like(height), np.empty_like(height)
        np.subtract(height[:, 2:], height[:, :-2], out=slope_x[:, 1:-1])
        np.subtract(height[2:], height[:-2], out=slope_y[1:-1])
        slope_x[:, 0], slope_x[:, -1] = slope_x[:, 1], slope_x[:, -2]
        slope_y[0], slope_y[-1] = slope_y[1], slope_y[-2]
        spacing = np.float32(0.25 * abs(factor))
        slope_x *= spacing
        slope_y *= spacing
        towards = np.array([view.light_side, view.light_up, 1.0])
        towards /= np.linalg.norm(towards)
        length = 1 / np.sqrt(1 + slope_x * slope_x + slope_y * slope_y)
        facing = (
            np.float32(towards[2]) - slope_x * np.float32(towards[0]) - slope_y * np.float32(towards[1])
        ) * length
        diffuse = np.maximum(facing, 0)
        half = towards + [0, 0, 1]
        half /= np.linalg.norm(half)
        mirror = (
            np.float32(half[2]) - slope_x * np.float32(half[0]) - slope_y * np.float32(half[1])
        ) * length
        gloss = np.maximum(mirror, 0) ** 24 * np.float32(46 * view.gloss * view.gloss)
        ambient = view.ambient
        shade = np.float32(ambient) + np.float32(1.15 * (1 - ambient) + 0.1) * diffuse
        colour = np.exp(view.exposure + np.array([view.warm, view.tint, -view.warm]))
        on_head = np.clip(inside * 12 + 0.1, 0, 1)
        gloss *= on_head
        planes = np.empty((GRID, GRID, 4), dtype=np.float32)
        shade = 0.8 + on_head * (shade - 0.8)
        for channel, reddening in enumerate((0.05, -0.09, -0.09)):
            planes[..., channel] = shade * np.float32(colour[channel])
            planes[..., channel] *= 1 + np.float32(reddening) * soft
        planes[..., 3] = gloss
        light = cv2.resize(planes, (self.side, self.side), interpolation=cv2.INTER_LINEAR)
        image: Array = self.canvas * light[..., :3]
        image += light[..., 3:]
        grey = image.mean(axis=2, keepdims=True)
        image = grey + np.float32(view.saturation) * (image - grey)
        image = (image - 110) * np.float32(view.contrast) + 110
        if view.blur > 0.25:
            image = cv2.GaussianBlur(image, (0, 0), view.blur * self.scale)
        grain = self.noise(view.random[42:44])[..., None]
        image += grain * np.float32(view.noise)
        np.clip(image, 0, 255, out=image)
        return image.astype(np.uint8)

    def relief(self) -> tuple[Array, Array]:
        """Bumps of the height field, float32 [n, 5] (x, y, 1/width, 1/height, amount), and blush [n]."""
        person, view = self.person, self.view
        tip_x, tip_y, tall = person.nose_bend, person.nose_y, person.nose_height
        eye_x, eye_y = person.eye_spacing, person.eye_y
        smile = max(0.0, view.smile)
        wing_x = person.nose_width * 0.85
        blush = person.blush + view.flush
        rows = [
            (tip_x, tip_y, person.tip_size * 1.8, 6.5, tall, 0.5 * blush),
            (
                tip_x * 0.6,
                tip_y - 9,
                person.bridge_width * 1.3,
                9,
                tall * (0.5 + 0.2 * person.bridge_bump),
                0.0,
            ),
            (0, -18.0, person.bridge_width * 1.4, 8, tall * 0.6 * person.bridge_height, 0.0),
            (-wing_x, tip_y + 1, 4.0, 4.0, tall * 0.3, 0.0),
            (wing_x, tip_y + 1, 4.0, 4.0, tall * 0.3, 0.0),
            (-eye_x, eye_y - 1, 10, 7, -2.5 - 4 * person.socket, 0.2),
            (eye_x, eye_y - 1, 10, 7, -2.5 - 4 * person.socket, 0.2),
            (-27, -4 - 2 * smile, 13, 12, 2.5 + 3 * smile, 1.5 * blush),
            (27, -4 - 2 * smile, 13, 12, 2.5 + 3 * smile, 1.5 * blush),
            (0, person.mouth_y, 17, 9, 4.0, 0.0),
            (0, person.mouth_y + person.lip_lower + 5, 9, 4, -3.0, 0.0),
            (0, 38 + person.chin_length, 11, 8, 5.0, 0.0),
            (0, -38, 34, 6, 2.0, 0.0),
        ]
        table = np.array(rows, dtype=np.float32)
        table[:, 2:4] = 1 / table[:, 2:4]
        return table[:, :5], table[:, 5]
