"""DeepAugment sets on disk (Hendrycks et al., ICCV 2021): `lrface deepaugment`. Above data and models, below the command
line; the edits are in lrface.models.deepaugment."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from lrface.data.arrowfile import open_batches
from lrface.data.packed import SHARD_ROWS, alignment_columns, shard_name, write_index, write_shard
from lrface.data.source import FaceSource, check_source, open_source
from lrface.errors import LrfaceError, UsageError
from lrface.files import locked, read_json, write_json
from lrface.models import build_corruption_network
from lrface.models.deepaugment import draw_edited, edited, edits_of
from lrface.models.per_example import CorruptionNetwork
from lrface.progress import progress

REFRESH = 0.05
"""Chance, before each image, that the network is edited anew: the published script's."""
LOSSLESS_SIDE = 64
"""Images up to this side are stored as PNG, larger ones as JPEG of quality 95: ten copies of ImageNet as PNG would take a
terabyte."""

_JOB = ".deepaugment.json"


@dataclass
class DeepAugmentSummary:
    """What was written.

    Attributes:
        out: the folder, packed data.
        images: in it; source_images: what they were made from.
        written: images written by this call; existing: those an earlier one had written.
        networks: runs whose networks drew them.
        broken: (name, reason) of images that could not be read; they are missing from every copy.
    """

    out: str
    images: int
    source_images: int
    copies: int
    identities: int
    written: int
    existing: int
    networks: list[str]
    broken: list[tuple[str, str]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.out}: {self.images} images, {self.copies} of each of {self.source_images}, of {self.identities} "
            f"identities, by {', '.join(self.networks)}"
            + (f"; {self.existing} were there" if self.existing else "")
        ]
        if self.broken:
            name, reason = self.broken[0]
            lines.append(f"{len(self.broken)} broken images were left out, the first is {name}: {reason}")
        return "\n".join(lines)


def deepaugment_set(
    source: str | Path,
    out: str | Path,
    networks: Sequence[str | Path],
    copies: int = 10,
    *,
    seed: int = 0,
    device: str = "cpu",
    batch_size: int = 32,
    show_progress: bool = True,
) -> DeepAugmentSummary:
    """Draw each image of a training set ``copies`` times by edited networks, and pack what they draw.

    Copy k is drawn by network k modulo their number. The images of a copy are gone through in an order of its own; before
    each, the network is edited anew with probability 0.05 (:func:`lrface.models.deepaugment.edited`), and each image has
    distortions of EDSR's signals of its own. All that is a function of the seed, the copy and the image's place in it.

    OUT is packed data of the same identities, so that a recipe can name it beside the clean set: ``data: {path: [CLEAN,
    OUT]}``. Files in it appear whole or not at all, ``index.json`` last; a killed run goes on from the last whole shard
    (8,192 images) when the same call is made again, and comes to the same bytes.

    Args:
        source: training data of any format, of images of one size.
        out: a folder that is not there, empty, or left by the same call.
        networks: runs whose network is an EDSR or a compressive autoencoder, see :func:`open_network`.
        copies: how often each image is drawn; the published set has one of each network, paper 003's 10x set ten.
        seed: another one gives other edits.
        device: where the networks run.
        batch_size: images drawn at once.

    Raises:
        UsageError: a value out of range, or OUT holds something else.
        LrfaceError: a source or network that cannot be read, or OUT cannot be written.
    """
    if copies < 1 or batch_size < 1:
        raise UsageError(f"--copies and --batch-size must be at least 1; found {copies} and {batch_size}")
    if not networks:
        raise UsageError("--network: name at least one run whose network draws images")
    opened = open_source(source)
    check_source(opened, str(source))
    loaded = [open_network(path, device) for path in networks]
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; give a folder")
    job = {
        "source": str(Path(source).resolve()),
        "source_images": len(opened),
        "networks_sha256": [sha256 for _, sha256 in loaded],
        "copies": copies,
        "seed": seed,
        "batch_size": batch_size,
    }
    with locked(out):
        _claim(out, job)
        writer = _Writer(opened, out, [network for network, _ in loaded], copies, seed, device, batch_size)
        writer.write(show_progress)
        if not writer.images:
            name, reason = next(iter(writer.broken.items()))
            raise LrfaceError(f"{source}: none of its images can be used; the first: {name}: {reason}")
        height, width = writer.size
        made = {**job, "networks": [str(path) for path in networks], "edits": writer.edits}
        extra = {"deepaugment": {**made, "broken": sorted(writer.broken.items())}}
        write_index(
            out,
            image_size=(height, width),
            identities=opened.identities,
            shards=writer.shards,
            extra=extra,
        )
    return DeepAugmentSummary(
        str(out),
        writer.images,
        len(opened),
        copies,
        len(opened.identities),
        writer.written,
        writer.images - writer.written,
        [str(path) for path in networks],
        sorted(writer.broken.items()),
    )


def open_network(text: str | Path, device: str = "cpu") -> tuple[CorruptionNetwork, str]:
    """An image-to-image network in eval mode, and the hash of its weights.

    Args:
        text: a run of `lrface train`, or ``edsr@weights=FILE`` or ``compressive_autoencoder@weights=FILE`` with weights in
            the form in which they were published, of the published size.

    Raises:
        UsageError: an unknown network. LrfaceError: no such run or file, or one of another network.
    """
    from lrface.train.checkpoint import load_model

    name, separator, file = str(text).partition("@weights=")
    if separator:
        network: Any = build_corruption_network({"name": name, "weights": file})
        sha256 = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    else:
        network, card = load_model(text, device)
        sha256 = str(card["weights_sha256"])
        if not isinstance(network, CorruptionNetwork):
            raise LrfaceError(
                f"{text} holds a {card['architecture']['name']}; --network takes runs of a network that draws images, such "
                "as `lrface train cifar10/edsr`"
            )
    edits_of(network)
    return network.to(device).eval().requires_grad_(False), sha256


def _claim(out: Path, job: dict[str, Any]) -> None:
    """Make ``out`` the folder of this job. Raises UsageError when it is another's."""
    mark = out / _JOB
    if not mark.is_file():
        others = [entry.name for entry in out.iterdir() if entry.name != ".lock"] if out.is_dir() else []
        if others:
            raise UsageError(f"{out} is not empty (it holds {sorted(others)[0]}); give another folder")
        write_json(mark, job)
        return
    kept = read_json(mark, "what this folder is being filled with")
    for key, wanted in json.loads(json.dumps(job)).items():
        if kept.get(key) != wanted:
            raise UsageError(
                f"{out} holds a set made with other settings: {key} was {kept.get(key)}, now {wanted}. Give another "
                "folder, or delete this one"
            )


@dataclass
class _Writer:
    source: FaceSource
    out: Path
    networks: list[CorruptionNetwork]
    copies: int
    seed: int
    device: str
    batch_size: int

    def __post_init__(self) -> None:
        self.shards: list[dict[str, Any]] = []
        self.broken: dict[str, str] = {}
        self.edits: dict[str, int] = {}
        self.images = self.written = 0
        self.size = (0, 0)
        self._names = self.source.sources()
        self._alignment = alignment_columns(self.source)
        self._edited: tuple[tuple[int, int], CorruptionNetwork, list[str]] | None = None
        count = len(self.source)
        # For each copy: the order of its images, and the number of the edited network that draws each of them.
        self._orders = [
            np.random.default_rng((self.seed, 0, copy)).permutation(count) for copy in range(self.copies)
        ]
        self._groups = [
            (np.random.default_rng((self.seed, 1, copy)).random(count) < REFRESH).cumsum()
            for copy in range(self.copies)
        ]

    def write(self, show_progress: bool) -> None:
        """Every shard that is not there yet."""
        count = len(self.source)
        total = count * self.copies
        with progress(total, "deepaugment", unit="images", enabled=show_progress) as bar:
            for number, start in enumerate(range(0, total, SHARD_ROWS)):
                stop = min(start + SHARD_ROWS, total)
                path = self.out / shard_name(number)
                entry = self._kept(path)
                if entry is None:
                    entry = self._shard(path, start, stop, bar.advance)
                    self.written += entry["rows"]
                else:
                    bar.advance(stop - start)
                if entry["rows"]:
                    self.shards.append(entry)
                    self.images += entry["rows"]

    def _kept(self, path: Path) -> dict[str, Any] | None:
        """The index entry of a shard that an earlier call wrote, with what it noted."""
        if not path.is_file():
            return None
        schema, _ = open_batches(path)
        noted = json.loads((schema.metadata or {}).get(b"deepaugment", b"{}"))
        self._note(noted)
        data = path.read_bytes()
        return {
            "file": path.name,
            "rows": noted["rows"],
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }

    def _note(self, noted: dict[str, Any]) -> None:
        self.broken.update(noted["broken"])
        for name, times in noted["edits"].items():
            self.edits[name] = self.edits.get(name, 0) + times
        self.size = tuple(noted["size"]) if noted["rows"] else self.size

    def _shard(self, path: Path, start: int, stop: int, advance: Any) -> dict[str, Any]:
        records: list[dict[str, Any]] = []
        broken: dict[str, str] = {}
        edits: dict[str, int] = {}
        position = start
        while position < stop:
            end = self._run_end(position, stop)
            copy = position // len(self.source)
            self._edit(position, edits)
            places = range(position, end)
            indices = [int(self._orders[copy][place % len(self.source)]) for place in places]
            good, pixels = self._read(indices, broken)
            if good:
                drawn = self._draw(copy, [places[number] for number in good], pixels)
                for number, image in zip(good, drawn, strict=True):
                    records.append(self._record(copy, indices[number], image))
            advance(end - position)
            position = end
        noted = {"rows": len(records), "broken": broken, "edits": edits, "size": self.size}
        self._note(noted)
        return write_shard(path, records, {"deepaugment": json.dumps(noted, ensure_ascii=False)})

    def _run_end(self, position: int, stop: int) -> int:
        """Where the images end that are drawn at once with the one at ``position``: one copy, one edited network."""
        count = len(self.source)
        copy, place = divmod(position, count)
        groups = self._groups[copy]
        same = int(np.searchsorted(groups, groups[place], side="right"))
        return min(stop, copy * count + same, position + self.batch_size)

    def _edit(self, position: int, edits: dict[str, int]) -> None:
        """Have the edited network ready that draws the image at ``position``; count its edits where it begins there."""
        copy, place = divmod(position, len(self.source))
        group = int(self._groups[copy][place])
        if self._edited is None or self._edited[0] != (copy, group):
            rng = np.random.default_rng((self.seed, 2, copy, group))
            network, names = edited(self.networks[copy % len(self.networks)], rng)
            self._edited = (copy, group), network, names
        begins = place == 0 or int(self._groups[copy][place - 1]) != group
        kind = type(self._edited[1]).__name__
        for name in self._edited[2] if begins else ():
            edits[f"{kind} {name}"] = edits.get(f"{kind} {name}", 0) + 1

    def _read(self, indices: Sequence[int], broken: dict[str, str]) -> tuple[list[int], NDArray[np.uint8]]:
        good: list[int] = []
        pixels: list[NDArray[np.uint8]] = []
        for number, index in enumerate(indices):
            try:
                image = self.source.image(index)
            except LrfaceError as error:
                broken[self._names[index]] = str(error)
                continue
            shape = (image.shape[0], image.shape[1])
            if self.size == (0, 0):
                self.size = shape
            if shape != self.size:
                raise LrfaceError(
                    f"{self._names[index]} has {shape[1]}x{shape[0]} pixels, others have {self.size[1]}x{self.size[0]}; "
                    f"bring them to one size first: `lrface pack SRC OUT --size {self.size[0]}`"
                )
            good.append(number)
            pixels.append(image)
        return good, np.stack(pixels) if pixels else np.zeros((0, 1, 1, 3), np.uint8)

    def _draw(self, copy: int, places: Sequence[int], pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        assert self._edited is not None
        rngs = [np.random.default_rng((self.seed, 3, copy, place % len(self.source))) for place in places]
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self.device).float().div_(255)
        drawn = draw_edited(self._edited[1], images, rngs).nan_to_num(0).mul_(255).round_().to(torch.uint8)
        return drawn.permute(0, 2, 3, 1).cpu().numpy()

    def _record(self, copy: int, index: int, image: NDArray[np.uint8]) -> dict[str, Any]:
        label = int(self.source.labels[index])
        lossless = max(image.shape[:2]) <= LOSSLESS_SIDE
        options = (
            [] if lossless else [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, 0x111111]
        )
        file = cv2.imencode(".png" if lossless else ".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)[
            1
        ]
        return {
            "image": file.tobytes(),
            "label": label,
            "identity": self.source.identities[label],
            "source": f"{copy}/{self._names[index]}",
            **self._alignment(index),
        }
