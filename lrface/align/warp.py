"""From five landmarks to an upright square crop: a closed-form similarity transform and one warp."""

import cv2
import numpy as np

# The five-point template of ArcFace (Deng et al., CVPR 2019) for a 112 x 112 crop, x and y in pixels: left
# eye, right eye, nose tip, left and right corner of the mouth, "left" as seen in the image. Every public
# 112 x 112 face set and benchmark pack is aligned to it.
TEMPLATE_112 = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]],
    dtype=np.float32,
)


def _scaled_template(size: int) -> np.ndarray:
    if size < 1:
        raise ValueError(f"crop size must be at least 1, found {size}")
    return TEMPLATE_112.astype(np.float64) * (size / 112.0)


def similarity_transform(landmarks: np.ndarray, size: int = 112) -> np.ndarray:
    """The rotation, uniform scale and shift that bring five landmarks closest to the template (least
    squares).

    landmarks: [5, 2] x and y in pixels of the photograph: left eye, right eye, nose, mouth corners. Returns
    float64 [2, 3]: ``crop = M[:, :2] @ (x, y) + M[:, 2]``. Never mirrors. In the plane the optimum of
    Umeyama (PAMI 1991) has a closed form: with points as complex numbers it is a linear regression with one
    complex slope. Raises ValueError for a wrong shape, a number that is not finite, or landmarks that all
    coincide.
    """
    points = np.asarray(landmarks, dtype=np.float64)
    if points.shape != (5, 2):
        raise ValueError(f"landmarks must be [5, 2], found {list(points.shape)}")
    if not np.isfinite(points).all():
        raise ValueError("landmarks must be finite numbers")
    source = points[:, 0] + 1j * points[:, 1]
    template = _scaled_template(size)
    target = template[:, 0] + 1j * template[:, 1]
    source_mean, target_mean = source.mean(), target.mean()
    centred = source - source_mean
    spread = float((centred.real**2 + centred.imag**2).sum())
    if spread < 1e-9:
        raise ValueError("landmarks coincide: no face can be aligned to them")
    slope = (np.conj(centred) * (target - target_mean)).sum() / spread
    if abs(slope) < 1e-12:
        raise ValueError("landmarks do not determine a rotation: no face can be aligned to them")
    shift = target_mean - slope * source_mean
    return np.array([[slope.real, -slope.imag, shift.real], [slope.imag, slope.real, shift.imag]])


def effective_resolution(landmarks: np.ndarray, size: int = 112) -> float:
    """How many pixels of the photograph span the crop: ``size`` divided by the scale of the transform.

    112 or more means that the crop shows real detail; 14 means that the face is 14 pixels of photograph,
    enlarged.
    """
    matrix = similarity_transform(landmarks, size)
    return float(size / np.hypot(matrix[0, 0], matrix[1, 0]))


def central_landmarks(height: int, width: int) -> np.ndarray:
    """Where the five points of the template lie in a photograph whose largest centred square is the crop:
    float32 [5, 2], in pixels.

    ``warp_face`` with them gives that square, of side min(height, width) and half of what is left over cut off
    on either side, resampled to the size of the crop: pixel averages by a whole factor, then bilinear.
    """
    side = min(height, width)
    corner = np.array([(width - side) / 2, (height - side) / 2])
    # Pixel centres: pixel c of a crop of 112 covers side / 112 pixels about its middle.
    return (corner + (TEMPLATE_112.astype(np.float64) + 0.5) * (side / 112.0) - 0.5).astype(np.float32)


def warp_face(image: np.ndarray, landmarks: np.ndarray, size: int = 112) -> np.ndarray:
    """Cut one face out upright: uint8 [h, w, 3] and landmarks [5, 2] -> uint8 [size, size, 3], same colour
    order.

    Bilinear, black outside the photograph: what public aligned face sets are made with. A face more than
    twice as large as the crop is first shrunk by a whole factor with pixel averages, since a plain bilinear
    warp would skip pixels and alias.

    Raises:
        ValueError: an image of another shape or type, or unusable landmarks.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise ValueError(f"image must be uint8 [h, w, 3], found {image.dtype} {list(image.shape)}")
    matrix = similarity_transform(landmarks, size)
    # A hair above: landmarks are float32, and twice as large should count as twice.
    factor = int(1.0 / np.hypot(matrix[0, 0], matrix[1, 0]) + 1e-4)
    if factor >= 2 or max(image.shape[:2]) > 16_000:  # OpenCV warps at most 32,767 pixels a side
        image, matrix = _region(image, matrix, size, max(1, factor))
    return cv2.warpAffine(
        image, matrix, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=0
    )


def _region(image: np.ndarray, matrix: np.ndarray, size: int, factor: int) -> tuple[np.ndarray, np.ndarray]:
    """The part of the image that the crop shows, shrunk by ``factor``, and the transform from there to the
    crop."""
    height, width = image.shape[:2]
    linear, shift = matrix[:, :2], matrix[:, 2]
    inverse = np.linalg.inv(linear)
    corners = np.array([[-1, -1], [size, -1], [-1, size], [size, size]], dtype=np.float64)
    seen = (corners - shift) @ inverse.T
    # Whole blocks of factor x factor pixels, one centred on the first pixel of the crop: for an upright face
    # every pixel of the crop is then the average of one block. What lies outside of the photograph is black.
    first = np.round(-inverse @ shift - (factor - 1) / 2).astype(np.int64)
    before = np.ceil((first - seen.min(axis=0)) / factor).astype(np.int64) + 2
    after = np.ceil((seen.max(axis=0) - first) / factor).astype(np.int64) + 2
    left, top = first - before * factor
    right, bottom = first + after * factor
    x0, y0, x1, y1 = max(0, left), max(0, top), min(width, right), min(height, bottom)
    if x0 >= x1 or y0 >= y1:
        return np.zeros((1, 1, 3), np.uint8), matrix
    part = image[y0:y1, x0:x1]
    if (x0, y0, x1, y1) != (left, top, right, bottom):
        part = cv2.copyMakeBorder(
            part, y0 - top, bottom - y1, x0 - left, right - x1, cv2.BORDER_CONSTANT, value=(0, 0, 0)
        )
    if factor > 1:
        part = cv2.resize(
            part, (part.shape[1] // factor, part.shape[0] // factor), interpolation=cv2.INTER_AREA
        )
    # Pixel centres: x_image = left + (x_part + 0.5) * factor - 0.5
    offset = np.array([left, top]) + 0.5 * factor - 0.5
    return part, np.hstack([linear * factor, (linear @ offset + shift)[:, None]])
