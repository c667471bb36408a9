"""Photographs in the style of others: what `lrface stylise` does (paper 004, section 3.3; Geirhos et al., ICLR 2019)."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrface.benchmarks.image_sets import ImageSet, decode_image, open_images
from lrface.benchmarks.report import left_out
from lrface.data.decode import BrokenImage
from lrface.data.folder import SUFFIXES
from lrface.data.stylised import stylised_name
from lrface.errors import LrfaceError, UsageError
from lrface.files import atomic_file, locked, read_json, write_json
from lrface.models.adain import AdaIn, load_adain
from lrface.progress import progress

JOB = "stylised.json"
"""What the folder holds beside the images: how they were made, and what could not be read."""

STYLES_KEPT = 64


@dataclass(frozen=True)
class StyliseSummary:
    """What was written.

    Attributes:
        out: the folder.
        images: photographs there are.
        styles: pictures whose style is taken.
        written: by this call; existing: by an earlier one.
        broken: (name, reason) of every photograph or style that could not be read.
    """

    out: str
    images: int
    styles: int
    written: int
    existing: int
    broken: list[tuple[str, str]]

    def to_dict(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.out}: {self.images} photographs in the styles of {self.styles} pictures: {self.written} written"
            + (f", {self.existing} were there" if self.existing else "")
        ]
        return "\n".join([*lines, *left_out(self.broken, JOB)])


def stylise(
    photographs: str | Path,
    styles: str | Path,
    encoder: str | Path,
    decoder: str | Path,
    out: str | Path,
    *,
    alpha: float = 1.0,
    size: int = 256,
    seed: int = 0,
    device: str = "auto",
    show_progress: bool = True,
) -> StyliseSummary:
    """One stylised image for each photograph, below ``out`` under the same relative name; names without an image file's
    suffix get .png. The same call goes on where an earlier one stopped.

    Args:
        photographs: images of any form that :func:`lrface.benchmarks.image_sets.open_images` reads.
        styles: a folder of pictures, at any depth. Each photograph takes one that its name and ``seed`` draw.
        encoder, decoder: AdaIN's weights, see :mod:`lrface.models.adain`.
        alpha: from 0 (the photograph as the decoder draws it) to 1 (all of the style).
        size: shorter side in pixels to which smaller photographs are enlarged for the network (the result is shrunk back),
            and of the square that is cut from a style.

    Raises:
        UsageError: alpha or size out of range, or ``out`` holds images made otherwise.
        LrfaceError: nothing to read, weights that do not fit, a disk that is full.
    """
    from lrface.train.trainer import resolve_device

    if not 0 <= alpha <= 1:
        raise UsageError(f"--alpha must be between 0 and 1; found {alpha}")
    if size < 32:
        raise UsageError(f"--size must be at least 32 pixels; found {size}")
    out, place = Path(out), resolve_device(device)
    images = open_images(photographs)
    pictures = find_pictures(Path(styles))
    network = load_adain(encoder, decoder, place)
    job = {
        "styles": [path.relative_to(styles).as_posix() for path in pictures],
        "encoder_sha256": _sha256(Path(encoder)),
        "decoder_sha256": _sha256(Path(decoder)),
        "alpha": alpha,
        "size": size,
        "seed": seed,
    }
    out.mkdir(parents=True, exist_ok=True)
    broken: dict[str, str] = {}
    written = existing = 0
    kept: dict[Path, Tensor] = {}
    with locked(out):
        if (out / JOB).is_file():
            made = read_json(out / JOB, "how the stylised images were made")
            other = next((key for key, value in job.items() if made.get(key) != value), None)
            if other is not None:
                raise UsageError(
                    f"{out} holds images made with another {other.replace('_sha256', '')}; choose another --out, or remove "
                    "it"
                )
        elif any(entry.name != ".lock" for entry in out.iterdir()):
            raise UsageError(f"{out} is not empty and holds no stylised images; choose another --out")
        write_json(out / JOB, {**job, "broken": []})
        with progress(len(images), "stylise", enabled=show_progress) as bar:
            for index, name in enumerate(images.names):
                target = out / stylised_name(name)
                bar.advance(1)
                if target.is_file():
                    existing += 1
                    continue
                try:
                    content = _read(images, index)
                    style = _style_of(name, seed, pictures, size, kept, broken)
                except BrokenImage as error:
                    broken[name] = str(error)
                    continue
                _save(stylised(network, content, style, alpha, size, place), target)
                written += 1
        write_json(out / JOB, {**job, "broken": [list(pair) for pair in sorted(broken.items())]})
    if not written and not existing:
        name, reason = next(iter(broken.items()))
        raise LrfaceError(f"{photographs}: none of its images can be stylised; the first: {name}: {reason}")
    return StyliseSummary(str(out), len(images), len(pictures), written, existing, sorted(broken.items()))


def find_pictures(folder: Path) -> list[Path]:
    """Image files in ``folder`` and below, sorted. Raises LrfaceError where there are none."""
    if not folder.is_dir():
        raise LrfaceError(f"{folder}: no such folder; --styles is a folder of pictures")
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
    if not found:
        raise LrfaceError(f"{folder}: no pictures in it; --styles is a folder of image files")
    return found


def styles_for(name: str, seed: int, pictures: Sequence[Path]) -> Iterator[Path]:
    """The pictures in the order in which ``name`` would take them: a function of the name, the seed and their number."""
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    start = int.from_bytes(digest, "little")
    for step in range(len(pictures)):
        yield pictures[(start + step) % len(pictures)]


def stylised(
    network: AdaIn, content: NDArray[np.uint8], style: Tensor, alpha: float, size: int, device: str
) -> NDArray[np.uint8]:
    """A photograph uint8 [h, w, 3] in a style float [1, 3, s, s]: uint8 [h, w, 3].

    A photograph smaller than ``size`` is enlarged first and the result shrunk back: the network's features have an eighth of
    an image's resolution.
    """
    height, width = content.shape[:2]
    scale = max(1.0, size / min(height, width))
    shape = max(8, round(width * scale)), max(8, round(height * scale))
    enlarged = content if scale == 1 else _resized(content, shape, cv2.INTER_CUBIC)
    with torch.inference_mode():
        made = network(_tensor(enlarged).to(device), style.to(device), alpha)[0].cpu()
    pixels = (made * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    pixels = np.ascontiguousarray(pixels[: enlarged.shape[0], : enlarged.shape[1]])
    return pixels if scale == 1 else _resized(pixels, (width, height), cv2.INTER_AREA)


def _resized(image: NDArray[np.uint8], shape: tuple[int, int], interpolation: int) -> NDArray[np.uint8]:
    """To ``shape``, (width, height)."""
    return np.asarray(cv2.resize(image, shape, interpolation=interpolation), dtype=np.uint8)


def _tensor(image: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float().div_(255)


def _read(images: ImageSet, index: int) -> NDArray[np.uint8]:
    try:
        image = images.read(index)
    except LrfaceError as error:
        raise BrokenImage(str(error)) from None
    return np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image


def _style_of(
    name: str,
    seed: int,
    pictures: Sequence[Path],
    size: int,
    kept: dict[Path, Tensor],
    broken: dict[str, str],
) -> Tensor:
    """The style's middle square at ``size`` pixels, float [1, 3, size, size]; of the first picture that can be read."""
    for path in styles_for(name, seed, pictures):
        if str(path) in broken:
            continue
        if path not in kept:
            try:
                picture = decode_image(path.read_bytes())
            except (BrokenImage, OSError) as error:
                broken[str(path)] = str(error)
                continue
            height, width = picture.shape[:2]
            side = min(height, width)
            top, left = (height - side) // 2, (width - side) // 2
            square = np.ascontiguousarray(picture[top : top + side, left : left + side])
            interpolation = cv2.INTER_AREA if side > size else cv2.INTER_CUBIC
            if len(kept) >= STYLES_KEPT:
                kept.pop(next(iter(kept)))
            kept[path] = _tensor(_resized(square, (size, size), interpolation))
        return kept[path]
    raise LrfaceError(f"none of the {len(pictures)} pictures of styles can be read: {pictures[0]}, ...")


def _save(image: NDArray[np.uint8], target: Path) -> None:
    from PIL import Image

    kind = {".png": "PNG", ".bmp": "BMP", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF"}
    name = kind.get(target.suffix.lower(), "JPEG")
    with atomic_file(target) as aside:
        Image.fromarray(image).save(aside, name, **({"quality": 95} if name in ("JPEG", "WEBP") else {}))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
