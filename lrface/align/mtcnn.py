"""Finding faces and five landmarks: the MTCNN cascade with the networks that facenet-pytorch ships.

The weights are facenet-pytorch's; the cascade around them is our own and batches across images. It follows
the published cascade (Zhang et al., "Joint face detection and alignment using multitask cascaded
convolutional networks", 2016) with the same resampling and rounding as facenet-pytorch, so that landmarks
agree with it.
"""

import importlib.util
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lrface.align.detect import MAX_SIDE, Detection, check_images
from lrface.errors import LrfaceError, UsageError

MIN_FACE_SIZE, MIN_SCORE = 20, 0.9

# Raised whenever the same photograph gives other faces than before: data of two kinds must not mix.
CASCADE_VERSION = 3

# Shrink factor between levels of the image pyramid, as in the published cascade (about 1 / sqrt 2).
PYRAMID_STEP = 0.709
# The proposal network sees 12 x 12 pixels and moves 2 pixels at a time.
CELL, STRIDE = 12, 2


class _Prepared(NamedTuple):
    """The copy of an image that is searched: how much larger it is in x and y, and the border around it."""

    image: np.ndarray
    scale: tuple[float, float]
    border: int


class MtcnnDetector:
    """MTCNN on a batch of photographs.

    device: a torch device. min_face_size: the smallest face looked for, in pixels. thresholds: what a
    candidate must reach after each of the three networks. min_score: faces the last network is less sure of
    are dropped; what is no face scores 0.6 to 0.89 in typical photographs, the least sure of 13,233 LFW faces
    0.936. second_look: an image in which nothing was found is searched once more at twice the size, which finds
    faces that fall between the levels of the pyramid or were almost sure enough (two of LFW's).
    min_side: images with a shorter side are enlarged first (bicubic), results are mapped back. max_side: images
    with a longer side are searched on a shrunk copy, so that a huge photograph costs no more memory or time
    than one of that size (faces under ``min_face_size`` in the copy are then not found); None searches them
    whole.

    Raises LrfaceError when facenet-pytorch is not installed, UsageError for settings out of range.
    """

    def __init__(
        self,
        device: str | torch.device = "cpu",
        min_face_size: int = MIN_FACE_SIZE,
        thresholds: tuple[float, float, float] = (0.6, 0.7, 0.7),
        min_score: float = MIN_SCORE,
        min_side: int = 160,
        max_side: int | None = MAX_SIDE,
        second_look: bool = True,
    ):
        if min_face_size < CELL:
            raise UsageError(f"min_face_size must be at least {CELL} pixels, found {min_face_size}")
        if len(thresholds) != 3 or not all(0 <= value < 1 for value in thresholds):
            raise UsageError(f"thresholds must be three numbers in [0, 1), found {thresholds}")
        if not 0 <= min_score < 1:
            raise UsageError(f"min_score must be in [0, 1), found {min_score}")
        if min_side < 1 or (max_side is not None and max_side < max(min_side, 2 * min_face_size)):
            raise UsageError(f"min_side {min_side} and max_side {max_side} leave no image size to search")
        self.device = torch.device(device)
        self.min_face_size = min_face_size
        self.thresholds = thresholds
        self.min_score = min_score
        self.min_side = min_side
        self.max_side = max_side
        self.second_look = second_look
        proposal, refine, output = _mtcnn_weights()
        self._proposal = _ProposalNetwork(proposal, self.device)
        self._refine = _RefineNetwork(refine, self.device)
        self._output = _OutputNetwork(output, self.device)

    def detect(self, images: Sequence[np.ndarray]) -> list[list[Detection]]:
        """Faces of every image: uint8 [h, w, 3] RGB, of any sizes -> one list of detections an image,
        surest first.

        Coordinates are in pixels of the image given. An image without a face gives an empty list. Raises
        ValueError for an image of another shape or type.
        """
        check_images(images)
        results: list[list[Detection]] = [[] for _ in images]
        with torch.inference_mode():
            self._search(images, range(len(images)), 1.0, results)
            if self.second_look:
                limit = self.max_side or float("inf")  # what is as large already would be searched the same
                again = [
                    i for i, faces in enumerate(results) if not faces and max(images[i].shape[:2]) < limit
                ]
                self._search(images, again, 2.0, results)
        return results

    def _search(
        self,
        images: Sequence[np.ndarray],
        positions: Sequence[int],
        enlarge: float,
        results: list[list[Detection]],
    ) -> None:
        for group in _batches([images[i].shape for i in positions], pixels=int(4_000_000 / enlarge**2)):
            members = [positions[k] for k in group]
            prepared = [self._prepare(images[i], enlarge) for i in members]
            found = self._cascade([copy.image for copy in prepared])
            for i, copy, faces in zip(members, prepared, found, strict=True):
                results[i] = [_map_back(face, copy) for face in faces]

    def _prepare(self, image: np.ndarray, enlarge: float = 1.0) -> _Prepared:
        height, width = image.shape[:2]
        short, long = min(height, width), max(height, width)
        target = max(1.0, self.min_side / short) * enlarge
        if self.max_side is not None:
            target = min(target, self.max_side / long)
        if target == 1.0:
            return _Prepared(np.ascontiguousarray(image), (1.0, 1.0), 0)
        new_width, new_height = max(1, round(width * target)), max(1, round(height * target))
        kind = cv2.INTER_CUBIC if target > 1 else cv2.INTER_AREA
        copy = cv2.resize(image, (new_width, new_height), interpolation=kind)
        border = 0
        if target > 1:
            # A small image is often a face that fills it. With room around, the box fits and landmarks are
            # better (measured on aligned crops: mean distance from the template 2.3 instead of 3.1 pixels
            # of 112).
            border = round(0.25 * min(new_width, new_height))
            copy = cv2.copyMakeBorder(copy, border, border, border, border, cv2.BORDER_REPLICATE)
        return _Prepared(copy, (new_width / width, new_height / height), border)

    def _cascade(self, images: list[np.ndarray]) -> list[list[Detection]]:
        # Sums over rectangles make every later average exact and cheap, whatever the scale.
        sums = [_rectangle_sums(image) for image in images]
        boxes = self._propose(images, sums)
        boxes = self._refine_boxes(sums, boxes)
        return self._final_faces(sums, boxes)

    def _propose(self, images: list[np.ndarray], sums: list[np.ndarray]) -> list[np.ndarray]:
        """First network, over the pyramid of every image: float32 [n, 4] square boxes an image."""
        candidates: list[list[np.ndarray]] = [[] for _ in images]
        by_size: dict[tuple[int, int], list[int]] = {}
        for i, image in enumerate(images):
            by_size.setdefault(image.shape[:2], []).append(i)
        for (height, width), members in by_size.items():
            for scale in self._scales(height, width):
                out_h, out_w = int(height * scale + 1), int(width * scale + 1)
                together = max(1, _LEVEL_PIXELS // (out_h * out_w))
                for start in range(0, len(members), together):
                    part = members[start : start + together]
                    level = np.stack([_area_resize(sums[i], out_h, out_w) for i in part])
                    probability, shift = self._proposal(torch.from_numpy(level).to(self.device))
                    batch, row, column = np.nonzero(probability >= self.thresholds[0])
                    score = probability[batch, row, column]
                    shifts = shift[batch, :, row, column]
                    cell = np.stack([column, row], axis=1).astype(np.float32)
                    first = np.floor((STRIDE * cell + 1) / np.float32(scale))
                    last = np.floor((STRIDE * cell + CELL) / np.float32(scale))
                    found = np.concatenate([first, last, score[:, None], shifts], axis=1)
                    for position, i in enumerate(part):
                        mine = found[batch == position]
                        if len(mine):
                            candidates[i].append(mine[_suppress(mine[:, :4], mine[:, 4], 0.5)])
        boxes = []
        for mine in candidates:
            if not mine:
                boxes.append(np.zeros((0, 4), np.float32))
                continue
            joined = np.concatenate(mine)
            joined = joined[_suppress(joined[:, :4], joined[:, 4], 0.7)]
            extent = joined[:, 2:4] - joined[:, :2]
            moved = joined[:, :4] + joined[:, 5:9] * np.tile(extent, 2)
            boxes.append(_square(moved))
        return boxes

    def _scales(self, height: int, width: int) -> list[float]:
        scale = CELL / self.min_face_size
        side = min(height, width) * scale
        scales = []
        while side >= CELL:
            scales.append(scale)
            scale *= PYRAMID_STEP
            side *= PYRAMID_STEP
        return scales

    def _refine_boxes(self, sums: list[np.ndarray], boxes: list[np.ndarray]) -> list[np.ndarray]:
        """Second network on every candidate: float32 [n, 4] square boxes an image."""
        boxes, crops = _crop_all(sums, boxes, 24)
        if crops is None:
            return boxes
        score, shift = self._refine(crops.to(self.device))
        refined, start = [], 0
        for mine in boxes:
            mine_score, mine_shift = score[start : start + len(mine)], shift[start : start + len(mine)]
            start += len(mine)
            keep = np.flatnonzero(mine_score > self.thresholds[1])
            keep = keep[_suppress(mine[keep], mine_score[keep], 0.7)]
            refined.append(_square(_regress(mine[keep], mine_shift[keep])))
        return refined

    def _final_faces(self, sums: list[np.ndarray], boxes: list[np.ndarray]) -> list[list[Detection]]:
        """Third network: faces of every image, surest first."""
        boxes, crops = _crop_all(sums, boxes, 48)
        if crops is None:
            return [[] for _ in boxes]
        score, shift, points = self._output(crops.to(self.device))
        threshold = max(self.thresholds[2], self.min_score)
        faces, start = [], 0
        for mine in boxes:
            stop = start + len(mine)
            mine_score, mine_shift, mine_points = score[start:stop], shift[start:stop], points[start:stop]
            start = stop
            # Suppression comes before min_score, so that a lower min_score only ever adds faces.
            keep = np.flatnonzero(mine_score > self.thresholds[2])
            extent = mine[keep, 2:4] - mine[keep, :2] + 1
            landmarks = np.stack(
                [
                    extent[:, :1] * mine_points[keep, :5] + mine[keep, :1] - 1,
                    extent[:, 1:] * mine_points[keep, 5:] + mine[keep, 1:2] - 1,
                ],
                axis=2,
            )
            final = _regress(mine[keep], mine_shift[keep])
            faces.append(
                [
                    Detection(final[k], float(mine_score[keep[k]]), landmarks[k])
                    for k in _suppress_nested(final, mine_score[keep], 0.7)
                    if mine_score[keep[k]] > threshold
                ]
            )
        return faces


def _mtcnn_weights() -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Weights of the three networks, from the installed facenet-pytorch.

    Its files are read without importing it, which takes seconds (torchvision, torch's compiler), and with
    ``weights_only``, so that nothing in them can run.
    """
    found = importlib.util.find_spec("facenet_pytorch")
    if found is None or not found.submodule_search_locations:
        raise LrfaceError(
            "the face detector needs the networks of facenet-pytorch, which is not installed: "
            "pip install --no-deps facenet-pytorch==2.5.3"
        )
    folder = Path(found.submodule_search_locations[0]) / "data"
    proposal, refine, output = (_load_weights(folder / f"{name}.pt") for name in ("pnet", "rnet", "onet"))
    return proposal, refine, output


def _load_weights(path: Path) -> dict[str, Tensor]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise LrfaceError(
            f"{path}: the weights of the face detector cannot be read ({type(error).__name__}); "
            "install them anew: pip install --force-reinstall --no-deps facenet-pytorch==2.5.3"
        ) from error


def _batches(shapes: Sequence[Sequence[int]], pixels: int) -> list[list[int]]:
    """Positions in groups whose images together stay below ``pixels`` (or of one image), equal sizes
    together."""
    groups: list[list[int]] = []
    total = 0
    for i in sorted(range(len(shapes)), key=lambda i: (shapes[i][0], shapes[i][1], i)):
        size = shapes[i][0] * shapes[i][1]
        if not groups or total + size > pixels:
            groups.append([])
            total = 0
        groups[-1].append(i)
        total += size
    return groups


def _map_back(face: Detection, copy: _Prepared) -> Detection:
    if copy.scale == (1.0, 1.0):
        return face
    # A pixel is an area: centre 0 of the image lies at (scale - 1) / 2 of the copy.
    factor = np.asarray(copy.scale, dtype=np.float32)
    landmarks = (face.landmarks - copy.border + 0.5) / factor - 0.5
    box = (face.box - copy.border) / np.tile(factor, 2)
    return Detection(box.astype(np.float32), face.score, landmarks.astype(np.float32))


# What goes through a network at once, on a CPU: activations then stay in the cache, and are small enough to come
# out of memory that the process already has (fresh pages from the system cost more than the arithmetic).
_LEVEL_PIXELS, _REFINE_CROPS, _OUTPUT_CROPS = 90_000, 32, 16


class _Network:
    """Convolutions with PReLU, each followed by a pooling or not; a dense layer; heads, computed as one.

    pools: side of the pooling windows behind each convolution, 0 for none. heads: names of the layers that give the
    results. On a CPU, activations are in oneDNN's own layout between the first convolution and the last: PReLU and
    pooling then take half the time, since sixteen channels lie together whatever their number, and pooling does not
    record where maxima are.
    """

    def __init__(
        self, weights: dict[str, Tensor], device: torch.device, pools: Sequence[int], heads: Sequence[str]
    ):
        self._cpu = device.type == "cpu"
        self._blocked = self._cpu and torch.backends.mkldnn.is_available()
        self._pools = pools
        values = {name: value.detach().to(device, torch.float32) for name, value in weights.items()}
        # Networks expect (pixel - 127.5) / 128: folded into the first layer, which is exact as it pads nothing.
        first = values["conv1.weight"]
        values["conv1.bias"] = values["conv1.bias"] - first.sum(dim=(1, 2, 3)) * (127.5 * 0.0078125)
        values["conv1.weight"] = first * 0.0078125
        kinds = ("conv{}.weight", "conv{}.bias", "prelu{}.weight")
        last = len(pools)
        self._convolutions = [
            [self._block(values[kind.format(number)]) for kind in kinds] for number in range(1, last + 1)
        ]
        self._heads = [torch.cat([values[f"{name}.{kind}"] for name in heads]) for kind in ("weight", "bias")]
        self._dense: list[Tensor] | None = None
        if f"dense{last + 1}.weight" in values:
            # Features are 3 x 3 positions, published in the order column, row, channel.
            weight = values[f"dense{last + 1}.weight"].unflatten(1, (3, 3, -1)).permute(0, 3, 2, 1).flatten(1)
            self._dense = [weight, values[f"dense{last + 1}.bias"], values[f"prelu{last + 1}.weight"]]
        else:
            self._heads = [self._block(value) for value in self._heads]

    def _block(self, value: Tensor) -> Tensor:
        """A weight in oneDNN's layout, where activations are."""
        if not self._blocked:
            return value
        blocked = value.contiguous().to_mkldnn()
        if value.ndim < 4:
            return blocked
        return torch.ops.aten.mkldnn_reorder_conv2d_weight(blocked, (0, 0), (1, 1), (1, 1), 1)

    def _convolve(self, pixels: Tensor) -> Tensor:
        x = pixels.permute(0, 3, 1, 2).contiguous()
        if self._blocked:
            x = x.to_mkldnn()
        for (weight, bias, slope), size in zip(self._convolutions, self._pools, strict=True):
            x = F.prelu(F.conv2d(x, weight, bias), slope)
            if size:  # windows two pixels apart, the last ones cut off by the edge
                x = F.max_pool2d(x, size, 2, ceil_mode=True)
        return x

    def on_levels(self, levels: Tensor) -> np.ndarray:
        """The heads at every position: float32 [n, h, w, 3] pixels 0..255 -> [n, k, h', w']."""
        x = F.conv2d(self._convolve(levels), self._heads[0], self._heads[1])
        return (x.to_dense() if self._blocked else x).cpu().numpy()

    def on_crops(self, crops: Tensor, together: int) -> np.ndarray:
        """The heads: float32 [n, s, s, 3] pixels 0..255 -> [n, k]; on a CPU ``together`` at a time."""
        assert self._dense is not None
        features = []
        for part in crops.split(together if self._cpu else 512):
            x = self._convolve(part)
            features.append((x.to_dense() if self._blocked else x).flatten(1))
        weight, bias, slope = self._dense
        x = F.prelu(F.linear(torch.cat(features), weight, bias), slope)
        return F.linear(x, self._heads[0], self._heads[1]).cpu().numpy()


def _probability(logits: np.ndarray) -> np.ndarray:
    """Second of two softmax outputs [n, 2, ...] -> [n, ...]."""
    return 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))


class _ProposalNetwork(_Network):
    def __init__(self, weights: dict[str, Tensor], device: torch.device):
        super().__init__(weights, device, (2, 0, 0), ("conv4_1", "conv4_2"))

    def __call__(self, level: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """float32 [n, h, w, 3] pixels 0..255 -> probability [n, h', w'] and shift [n, 4, h', w']."""
        found = self.on_levels(level)
        return _probability(found), found[:, 2:]


class _RefineNetwork(_Network):
    def __init__(self, weights: dict[str, Tensor], device: torch.device):
        super().__init__(weights, device, (3, 3, 0), ("dense5_1", "dense5_2"))

    def __call__(self, crops: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """float32 [n, 24, 24, 3] -> probability [n] and shift [n, 4]."""
        found = self.on_crops(crops, _REFINE_CROPS)
        return _probability(found), found[:, 2:]


class _OutputNetwork(_Network):
    def __init__(self, weights: dict[str, Tensor], device: torch.device):
        super().__init__(weights, device, (3, 3, 2, 0), ("dense6_1", "dense6_2", "dense6_3"))

    def __call__(self, crops: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """float32 [n, 48, 48, 3] -> probability [n], shift [n, 4] and landmarks [n, 10] (five x, five y)."""
        found = self.on_crops(crops, _OUTPUT_CROPS)
        return _probability(found), found[:, 2:6], found[:, 6:]


def _rectangle_sums(image: np.ndarray) -> np.ndarray:
    """Sums over every rectangle from the top left corner: int32 [h + 1, w + 1, 4], of which three count.

    Four numbers of four bytes are gathered as one of sixteen, faster than three.
    """
    return cv2.integral(cv2.cvtColor(image, cv2.COLOR_RGB2RGBA), sdepth=cv2.CV_32S)


def _windows(length: np.ndarray | int, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """Where ``parts`` averaging windows over ``length`` pixels begin and end: they overlap when it does not
    divide."""
    at = np.arange(parts)
    length = np.asarray(length)[..., None]
    return (at * length) // parts, -((-(at + 1) * length) // parts)


def _area_resize(sums: np.ndarray, out_h: int, out_w: int) -> np.ndarray:
    """Average-resample an image given its rectangle sums [h + 1, w + 1, 4]: float32 [out_h, out_w, 3]."""
    top, bottom = _windows(sums.shape[0] - 1, out_h)
    left, right = _windows(sums.shape[1] - 1, out_w)
    rows = sums.take(bottom, axis=0)
    rows -= sums.take(top, axis=0)
    quads = rows.view(np.complex128)[:, :, 0]
    total = quads.take(right, axis=1).view(np.int32)
    total -= quads.take(left, axis=1).view(np.int32)
    return _averages(total.reshape(out_h, out_w, 4), np.outer(bottom - top, right - left))


def _averages(total: np.ndarray, area: np.ndarray) -> np.ndarray:
    """Sums int32 [..., 4] over areas [...]: float32 [..., 3]."""
    return total[..., :3].astype(np.float32) / area[..., None].astype(np.float32)


def _crop_all(
    sums: list[np.ndarray], boxes: list[np.ndarray], size: int
) -> tuple[list[np.ndarray], Tensor | None]:
    """The boxes that overlap their image, and their contents resampled: float32 [total, size, size, 3]."""
    kept, crops = [], []
    for image_sums, mine in zip(sums, boxes, strict=True):
        height, width = image_sums.shape[0] - 1, image_sums.shape[1] - 1
        corners = np.trunc(mine).astype(np.int64)
        left, top = np.maximum(corners[:, 0], 1) - 1, np.maximum(corners[:, 1], 1) - 1
        right, bottom = np.minimum(corners[:, 2], width), np.minimum(corners[:, 3], height)
        inside = (right > left) & (bottom > top)
        kept.append(mine[inside])
        if inside.any():
            crops.append(
                _area_crops(image_sums, top[inside], bottom[inside], left[inside], right[inside], size)
            )
    return kept, torch.from_numpy(np.concatenate(crops)) if crops else None


def _area_crops(
    sums: np.ndarray, top: np.ndarray, bottom: np.ndarray, left: np.ndarray, right: np.ndarray, size: int
) -> np.ndarray:
    """Average-resample n rectangles [n] of one image: float32 [n, size, size, 3]."""
    y0, y1 = (top[:, None] + edge for edge in _windows(bottom - top, size))
    x0, x1 = (left[:, None] + edge for edge in _windows(right - left, size))
    stride = sums.shape[1]
    quads = sums.view(np.complex128).reshape(-1)

    def corner(y: np.ndarray, x: np.ndarray) -> np.ndarray:
        return quads.take(y[:, :, None] * stride + x[:, None, :]).view(np.int32)

    total = corner(y1, x1)
    total -= corner(y0, x1)
    total -= corner(y1, x0)
    total += corner(y0, x0)
    area = (y1 - y0)[:, :, None] * (x1 - x0)[:, None, :]
    return _averages(total.reshape(len(top), size, size, 4), area)


def _square(boxes: np.ndarray) -> np.ndarray:
    """Boxes [n, 4] grown to squares about their centres."""
    extent = boxes[:, 2:4] - boxes[:, :2]
    side = extent.max(axis=1, keepdims=True)
    corner = boxes[:, :2] + extent * np.float32(0.5) - side * np.float32(0.5)
    return np.concatenate([corner, corner + side], axis=1)


def _regress(boxes: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Boxes [n, 4] moved by shifts [n, 4] in units of their size."""
    extent = boxes[:, 2:4] - boxes[:, :2] + 1
    return boxes + shift * np.tile(extent, 2)


def _suppress(boxes: np.ndarray, scores: np.ndarray, overlap: float) -> np.ndarray:
    """Positions that survive non-maximum suppression by intersection over union, best score first."""
    if not len(boxes):
        return np.zeros(0, np.int64)
    corner_and_size: Any = boxes.astype(np.float64)
    corner_and_size[:, 2:] -= corner_and_size[:, :2]
    confidence: Any = scores
    # OpenCV's rather than torchvision's: as fast, the same, and nothing more to import.
    return np.asarray(cv2.dnn.NMSBoxes(corner_and_size, confidence, 0.0, overlap), dtype=np.int64).reshape(-1)


def _suppress_nested(boxes: np.ndarray, scores: np.ndarray, overlap: float) -> list[int]:
    """As ``_suppress``, but by intersection over the smaller of the two areas: also drops a face within a
    face."""
    area = (boxes[:, 2] - boxes[:, 0] + 1) * (boxes[:, 3] - boxes[:, 1] + 1)
    left = np.argsort(scores)[::-1]
    keep = []
    while len(left):
        best, left = left[0], left[1:]
        keep.append(int(best))
        low = np.maximum(boxes[best, :2], boxes[left, :2])
        high = np.minimum(boxes[best, 2:4], boxes[left, 2:4])
        shared = np.maximum(high - low + 1, 0).prod(axis=1)
        left = left[shared / np.minimum(area[best], area[left]) <= overlap]
    return keep
