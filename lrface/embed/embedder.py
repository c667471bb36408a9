"""A network with everything around it: decoding, detection, alignment and batching before, unit length behind."""

import hashlib
import itertools
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lrface.degrade.resolution import resize
from lrface.embed.intake import _as_photo, _as_tensor, _decoded, _Face, _Item, _items, _sides, _Unusable
from lrface.embed.networks import INPUT_SIZE, _Network, _OnnxNetwork, _thresholds_of, _TorchNetwork
from lrface.embed.resolution import effective_resolutions
from lrface.embed.results import Comparison, Embeddings, _joined, decide, similarity
from lrface.embed.video import Frame, frames
from lrface.errors import LrfaceError, UsageError

if TYPE_CHECKING:
    from lrface.align.detect import FaceDetector

KINDS = ("auto", "crop", "photo")

# A block is what is decoded, detected and embedded together: it bounds memory, whatever the length of the
# job.
_BLOCK_PIXELS = 32_000_000


@dataclass(frozen=True)
class _Call:
    """Options of one call of :meth:`FaceEmbedder.embed`, checked."""

    kind: str
    faces: str
    flip: bool
    batch_size: int
    on_error: str
    fallback: str

    def __post_init__(self) -> None:
        from lrface.align.detect import FACE_RULES, FALLBACKS

        for name, allowed in (
            ("kind", KINDS),
            ("faces", FACE_RULES),
            ("on_error", ("raise", "skip")),
            ("fallback", FALLBACKS),
        ):
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name} must be one of {', '.join(allowed)}; found {getattr(self, name)!r}")
        if self.batch_size < 1:
            raise UsageError(f"batch_size must be at least 1; found {self.batch_size}")


class FaceEmbedder:
    """A network with everything around it; made by :func:`lrface.embed.load_embedder`.

    Safe to use from several threads at once. With precision float32 on a CPU a crop gets the same vector, to
    1e-5, whatever else is in the call. A face in a photograph gets the same to about 1e-3: landmarks found in
    a batch differ in the last bits, which can round pixels of the aligned crop the other way.
    """

    def __init__(
        self,
        network: _Network,
        name: str,
        device: torch.device,
        detector_settings: Mapping[str, Any],
        detector: "FaceDetector | None" = None,
    ):
        self._network = network
        self._name = name
        self._device = device
        self._detector_settings = dict(detector_settings)
        self._own_detector = detector is not None
        self._detector = detector
        # How load_embedder makes this once more, in another process.
        self._made_by: tuple[str | Path, dict[str, Any]] | None = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return (
            f"FaceEmbedder({self.name!r}, embedding_size={self.embedding_size}, input_size={self.input_size})"
        )

    @property
    def name(self) -> str:
        """The model's file name without its ending, or its directory's name."""
        return self._name

    @property
    def embedding_size(self) -> int:
        """Width d of the vectors."""
        return self._network.embedding_size

    @property
    def input_size(self) -> int:
        """Side of the square images that the network takes, in pixels."""
        return self._network.input_size

    @property
    def file(self) -> Path:
        """The weights: a .safetensors, .onnx or .pt2 file; for module:function the module's source."""
        return self._network.file

    @property
    def thresholds_file(self) -> Path:
        """Where the model's operating thresholds are kept, see :func:`lrface.calibrate.calibrate`."""
        return _thresholds_of(self._network)

    @property
    def precision(self) -> str:
        """What the network computes in: "float32" or "bfloat16"."""
        return self._network.precision

    @property
    def card(self) -> dict[str, Any]:
        """What the model says about itself. A file without lrface's card gets one of format "onnx" or "pt2" whose
        ``described_by`` says what describes its input: "options" of the caller's, a "card beside" the file, or
        "convention". A module:function gets one of format "python"."""
        return dict(self._network.card)

    def _settings(self) -> dict[str, Any]:
        """Beside the model and the call, what a vector depends on."""
        from lrface.align.detect import describe_detector

        detector: dict[str, Any]
        if self._own_detector:
            public = {key: value for key, value in vars(self._detector).items() if not key.startswith("_")}
            plain = {
                key: value for key, value in public.items() if isinstance(value, int | float | str | tuple)
            }
            detector = {"detector": type(self._detector).__name__, **plain}
        else:
            detector = describe_detector(**self._detector_settings)
        quality = "reconstruction" if self._reconstructs else "norm"
        return {"precision": self._network.precision, "quality": quality, "detector": detector}

    @cached_property
    def model_sha256(self) -> str:
        """SHA-256 of the file the model came from."""
        with self._network.file.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def detector(self) -> "FaceDetector":
        """The detector for photographs, made when first needed. Raises LrfaceError where it cannot be."""
        with self._lock:
            if self._detector is None:
                from lrface.align.detect import load_detector

                self._detector = load_detector(device=self._device, **self._detector_settings)
            return self._detector

    def embed_tensor(self, images: Tensor, batch_size: int = 256) -> Tensor:
        """Raw features of aligned crops: what the network gives, not of unit length.

        Args:
            images: float32 [n, 3, s, s] RGB in [0, 1], s being :attr:`input_size`; n may be 0.
            batch_size: how many go through the network at once, at most.

        Returns:
            float32 [n, embedding_size] on the device of ``images``.

        Raises:
            UsageError: another shape or type.
        """
        size = self.input_size
        if not isinstance(images, Tensor) or images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size):
            found = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise UsageError(f"embed_tensor takes a tensor [n, 3, {size}, {size}]; found {found}")
        if images.dtype != torch.float32:
            raise UsageError(f"embed_tensor takes float32 in [0, 1]; found {images.dtype}")
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1; found {batch_size}")
        # Made outside inference mode, so that the caller may train on it.
        features = torch.empty(len(images), self.embedding_size, device=images.device)
        step = min(batch_size, self._network.largest_batch)
        with torch.inference_mode():
            for start in range(0, len(images), step):
                part = images[start : start + step]
                features[start : start + len(part)] = self._network(part).to(images.device)
        return features

    def embed(
        self,
        images: Any,
        *,
        kind: str = "auto",
        faces: str = "largest-central",
        flip: bool = False,
        batch_size: int = 64,
        on_error: str = "raise",
        workers: int | None = None,
        fallback: str = "skip",
    ) -> Embeddings:
        """Unit vectors of the faces in images.

        Args:
            images: one image or a list of them, mixed at will: paths, encoded bytes, PIL images, numpy arrays
                (uint8 [h, w, 3] RGB or [h, w] grey, or floating point in [0, 1]) and tensors ([3, h, w] RGB
                or [1, h, w] grey, uint8 or floating point in [0, 1]); or a batch, numpy [n, h, w, 3] or a
                tensor [n, 3, h, w].
            kind: "crop": every image is an aligned square face of any size, resized to the network's input
                (bilinear, antialiased when shrinking). "photo": faces are detected and aligned. "auto": a
                square image whose side is at most 112 pixels, or is the network's input size, is a crop;
                anything else a photograph.
            faces: which faces of a photograph: "largest-central" (one), "largest" (one) or "all", largest
                first.
            flip: add the features of the mirrored face before scaling to unit length. Twice the work for a
                little accuracy, and what `lrface verify` does by default; embed a gallery and its probes
                alike.
            batch_size: images decoded together and faces embedded together, at most.
            on_error: "raise" stops at the first image that cannot be read or shows no face; "skip" lists it
                in ``failures`` and goes on.
            workers: threads that decode files; None takes up to four.
            fallback: what a photograph without a face gives: "skip", a failure, or "center", its largest centred
                square, with score 0.

        Returns:
            :class:`Embeddings`. An empty list of images gives zero rows.

        Raises:
            UsageError: an option or a type of image that is not listed above.
            LrfaceError: with on_error="raise", names the image and the reason.
        """
        call = _Call(kind, faces, flip, batch_size, on_error, fallback)
        blocks = self._blocks(_items(images), call, workers)
        return _joined(list(blocks), self.embedding_size, self._reconstructs)

    def embed_photo(self, image: Any, *, flip: bool = False, on_error: str = "raise") -> Embeddings:
        """All faces of one photograph, largest first.

        >>> group = embedder.embed_photo("group.jpg")
        >>> group.vectors.shape[1] == embedder.embedding_size, len(group.box) == len(group)
        (True, True)

        Args:
            image: one image of any type that :meth:`embed` takes, of any shape.
            on_error: "skip": no rows, and the reason in ``failures``, for a photograph without a face.

        Raises:
            UsageError: more than one image.
            LrfaceError: as in :meth:`embed`.
        """
        items = _items(image)
        if len(items) != 1:
            raise UsageError(f"embed_photo takes one photograph; found {len(items)} images")
        call = _Call("photo", "all", flip, 64, on_error, "skip")
        return _joined(list(self._blocks(items, call, 1)), self.embedding_size, self._reconstructs)

    def embed_video(
        self,
        source: str | Path | int,
        *,
        every: int = 1,
        limit: int | None = None,
        faces: str = "all",
        flip: bool = False,
        batch_size: int = 16,
    ) -> Iterator[Frame]:
        """The faces of a video frame by frame, while it is read.

        >>> for frame in embedder.embed_video("door.avi", every=2):
        ...     print(frame.frame, f"{frame.seconds:.2f}", len(frame.faces))
        0 0.00 1
        2 0.20 1
        4 0.40 1

        Args:
            source: a file, a URL that OpenCV reads (rtsp://, http://, ...), or the number of a camera.
            every: only every so many-th frame is looked at, from the first.
            limit: stop after that many looked at; None goes on to the end, which a stream or a camera does not have.
            faces, flip: as in :meth:`embed`; every frame is a photograph.
            batch_size: frames that are searched and embedded together, at most; 1 gives every frame of a camera at once.
                That many are in memory, never the video.

        Yields:
            :class:`lrface.embed.video.Frame`, without rows for a frame that shows no face.

        Raises:
            UsageError: an option with a wrong value, when the first frame is asked for.
            LrfaceError: the source cannot be opened, is damaged or breaks off: after the frames before that were given.
        """
        call = _Call("photo", faces, flip, batch_size, "skip", "skip")
        if limit is not None and limit < 1:
            raise UsageError(f"limit must be at least 1; found {limit}")
        waiting: list[tuple[int, float, np.ndarray]] = []
        pixels = 0
        source_frames = itertools.islice(frames(source, every), limit)
        while True:
            broken = None
            try:
                found = next(source_frames, None)
            except LrfaceError as error:
                found, broken = None, error
            if found is not None:
                waiting.append(found)
                pixels += found[2].shape[0] * found[2].shape[1]
            if waiting and (found is None or len(waiting) >= batch_size or pixels >= _BLOCK_PIXELS):
                yield from self._frames(waiting, call)
                waiting, pixels = [], 0
            if broken is not None:
                raise broken
            if found is None:
                return

    def _frames(self, waiting: Sequence[tuple[int, float, np.ndarray]], call: "_Call") -> Iterator[Frame]:
        items = [(_Item(i, f"frame {number}", None), image) for i, (number, _, image) in enumerate(waiting)]
        block = self._block(items, call)
        for i, (number, seconds, _) in enumerate(waiting):
            faces = block.rows(block.source == i)
            faces.source[:] = 0
            faces.failures = [(0, reason) for index, reason in block.failures if index == i]
            yield Frame(number, seconds, faces)

    def similarity(self, a: np.ndarray | Embeddings, b: np.ndarray | Embeddings) -> np.ndarray:
        """See :func:`lrface.embed.similarity`."""
        return similarity(a, b)

    def similarity_matrix(self, a: Any, b: Any = None, *, flip: bool = True, **options: Any) -> np.ndarray:
        """Cosine of every face of ``a`` with every one of ``b``; of ``a`` with itself where ``b`` is None.

        >>> embedder.similarity_matrix(["anna.png", "bert.png"]).shape
        (2, 2)

        Args:
            a, b: :class:`Embeddings`, or images as :meth:`embed` takes them; images are embedded with ``flip`` and
                ``options``, which are those of :meth:`embed`. Vectors are for :func:`lrface.embed.similarity`.

        Returns:
            float32 [n, m], -1 to 1, one row a face of ``a``.
        """
        sides = [
            each if isinstance(each, Embeddings) else self.embed(each, flip=flip, **options)
            for each in ([a] if b is None else [a, b])
        ]
        return similarity(sides[0], sides[-1])

    def compare(
        self,
        a: Any,
        b: Any,
        *,
        threshold: float | None = None,
        kind: str = "auto",
        faces: str = "largest-central",
        flip: bool = True,
        prior: float = 0.5,
    ) -> Comparison:
        """Whether two images show one person.

        >>> found = embedder.compare("anna.png", "bert.png")
        >>> -1 <= found.similarity <= 1, found.effective_resolutions, found.probability is None
        (True, (112.0, 112.0), True)

        The threshold is ``threshold``; else the one on the model's card measured nearest to the
        effective resolutions of the two faces (field ``thresholds``, {"112": cosine, "112x14": ...}); else
        :data:`~lrface.embed.UNCALIBRATED_THRESHOLD`, which the result says. The probability is told where the card
        has been calibrated (`lrface calibrate`), for both resolutions, else it is None. ``flip`` is on here, as in
        `lrface calibrate`, where both come from.

        Args:
            a, b: one image each, of any type that :meth:`embed` takes, or :class:`Embeddings` of one face.
            faces: "largest-central" or "largest": one face an image.
            prior: how probable it is beforehand that the two are one person, above 0 and below 1.

        Raises:
            UsageError: more than one image or face a side, a threshold that is no cosine, or a wrong prior.
            LrfaceError: an image cannot be read or shows no face.
        """
        if faces == "all":
            raise UsageError("compare takes one face an image: faces must be largest-central or largest")
        if threshold is not None and not -1 <= threshold <= 1:
            raise UsageError(f"threshold is a cosine, between -1 and 1; found {threshold}")
        sides = []
        for name, image in (("first", a), ("second", b)):
            found = (
                image
                if isinstance(image, Embeddings)
                else self.embed(image, kind=kind, faces=faces, flip=flip)
            )
            if len(found) != 1:
                raise UsageError(f"compare takes one image a side; the {name} holds {len(found)}")
            sides.append(found)
        left, right = sides
        return self.decide(
            float(similarity(left, right)[0, 0]),
            (float(left.effective_resolution[0]), float(right.effective_resolution[0])),
            threshold=threshold,
            prior=prior,
            qualities=(float(left.quality[0]), float(right.quality[0])),
        )

    def decide(
        self,
        cosine: float,
        resolutions: tuple[float, float],
        *,
        threshold: float | None = None,
        prior: float = 0.5,
        qualities: tuple[float, float] = (math.nan, math.nan),
    ) -> Comparison:
        """What :meth:`compare` says of two faces that are embedded already: their cosine and effective resolutions."""
        return decide(self.card, self.name, cosine, resolutions, threshold, prior, qualities)

    def _blocks(self, items: Sequence[_Item], call: "_Call", workers: int | None) -> Iterator[Embeddings]:
        """Embeddings of consecutive runs of images; each run is small enough to be in memory at once."""
        count = workers if workers is not None else min(4, os.cpu_count() or 1)
        waiting: list[tuple[_Item, np.ndarray | Tensor | _Unusable]] = []
        pixels = 0
        for item, image in _decoded(items, count):
            waiting.append((item, image))
            if not isinstance(image, _Unusable):
                pixels += math.prod(_sides(image))
            if len(waiting) >= call.batch_size or pixels >= _BLOCK_PIXELS:
                yield self._block(waiting, call)
                waiting, pixels = [], 0
        if waiting:
            yield self._block(waiting, call)

    def _block(
        self, images: Sequence[tuple[_Item, np.ndarray | Tensor | _Unusable]], call: "_Call"
    ) -> Embeddings:
        found: dict[int, list[_Face] | _Unusable] = {}
        photos: list[tuple[_Item, np.ndarray]] = []
        for item, image in images:
            if isinstance(image, _Unusable):
                found[item.index] = image
            elif self._is_crop(image, call.kind):
                found[item.index] = self._crop(item, image)
            else:
                photos.append((item, _as_photo(image)))
        found.update(self._photo_faces(photos, call))
        ready: list[_Face] = []
        failures: list[tuple[int, str]] = []
        for item, _ in images:
            result = found[item.index]
            if isinstance(result, _Unusable):
                if call.on_error == "raise":
                    raise LrfaceError(f"{item.label}: {result}")
                failures.append((item.index, str(result)))
            else:
                ready += result
        vectors, lengths, errors, good, resolutions = self._unit_vectors(ready, call.flip, call.batch_size)
        for face in (face for face, fine in zip(ready, good, strict=True) if not fine):
            reason = "the network's features are zero or not finite: it is broken, or overflows here"
            if call.on_error == "raise":
                label = next(item.label for item, _ in images if item.index == face.source)
                raise LrfaceError(f"{label}: {reason}")
            failures.append((face.source, reason))
        kept = [face for face, fine in zip(ready, good, strict=True) if fine]
        return Embeddings(
            vectors[good],
            np.array([face.box for face in kept], np.float32).reshape(-1, 4),
            np.array([face.score for face in kept], np.float32),
            np.array([face.landmarks for face in kept], np.float32).reshape(-1, 5, 2),
            resolutions[good],
            np.array([face.source for face in kept], np.int64),
            lengths[good],
            sorted(failures),
            None if errors is None else errors[good],
        )

    def _is_crop(self, image: np.ndarray | Tensor, kind: str) -> bool:
        height, width = _sides(image)
        small = height == width and (height <= INPUT_SIZE or height == self.input_size)
        return kind == "crop" or (kind == "auto" and small)

    def _crop(self, item: _Item, image: np.ndarray | Tensor) -> list[_Face] | _Unusable:
        height, width = _sides(image)
        if height != width:
            return _Unusable(
                f"a crop must be square; found {width} x {height} pixels. kind='photo' finds the face"
            )
        pixels = resize(_as_tensor(image)[None], self.input_size, "bilinear")[0]
        nowhere = np.full(4, np.nan, np.float32)
        return [
            _Face(pixels, nowhere, math.nan, np.full((5, 2), np.nan, np.float32), float(height), item.index)
        ]

    def _photo_faces(
        self, photos: Sequence[tuple[_Item, np.ndarray]], call: _Call
    ) -> dict[int, list[_Face] | _Unusable]:
        from lrface.align.detect import central_face, choose_faces
        from lrface.align.warp import effective_resolution, warp_face

        found: dict[int, list[_Face] | _Unusable] = {}
        detections = self.detector.detect([image for _, image in photos]) if photos else []
        for (item, image), each in zip(photos, detections, strict=True):
            chosen = choose_faces(each, image.shape, call.faces)
            if not chosen and call.fallback == "center":
                chosen = [central_face(*image.shape[:2])]
            try:
                found[item.index] = [
                    _Face(
                        _as_tensor(warp_face(image, face.landmarks, self.input_size)),
                        face.box,
                        face.score,
                        face.landmarks,
                        effective_resolution(face.landmarks, self.input_size),
                        item.index,
                    )
                    for face in chosen
                ] or _Unusable(
                    f"no face found in {image.shape[1]} x {image.shape[0]} pixels; an aligned crop needs "
                    "kind='crop'"
                )
            except ValueError as error:  # landmarks that coincide
                found[item.index] = _Unusable(f"a face cannot be aligned: {error}")
        return found

    def _unit_vectors(
        self, faces: Sequence[_Face], flip: bool, batch_size: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray, np.ndarray]:
        """Unit vectors float32 [n, d], lengths float32 [n], reconstruction errors float32 [n] where they are wanted,
        bool [n]: whether the network gave a direction, and effective resolutions float32 [n]."""
        vectors = torch.zeros(len(faces), self.embedding_size)
        errors = torch.zeros(len(faces)) if self._reconstructs else None
        resolutions = np.array([face.resolution for face in faces], np.float32)
        for start in range(0, len(faces), batch_size):
            # In numpy, as is the mirror: see _ForeignNetwork._as_the_graph_takes_them.
            crops = np.stack([face.pixels.numpy() for face in faces[start : start + batch_size]])
            pixels = torch.from_numpy(crops)
            resolutions[start : start + len(pixels)] = effective_resolutions(
                pixels, resolutions[start : start + len(pixels)]
            )
            if errors is None:
                features = self.embed_tensor(pixels, batch_size)
            else:
                features, errors[start : start + len(pixels)] = self._with_errors(pixels)
            if flip:
                mirrored = torch.from_numpy(np.ascontiguousarray(crops[..., ::-1]))
                features = features + self.embed_tensor(mirrored, batch_size)
            vectors[start : start + len(pixels)] = features
        norm = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        good = (torch.isfinite(norm) & (norm > 0))[:, 0]
        return (
            (vectors / norm).numpy(),
            norm[:, 0].numpy(),
            None if errors is None else errors.numpy(),
            good.numpy(),
            resolutions,
        )

    @contextmanager
    def alone_on_cpu(self) -> Iterator[None]:
        """While a network that another library runs on the CPU has the cores, PyTorch prepares images in one thread:
        its waiting threads would hold up the network's."""
        threads = torch.get_num_threads()
        if isinstance(self._network, _OnnxNetwork) and self._device.type == "cpu":
            torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    def reconstruction_errors(self, images: Tensor, batch_size: int = 64) -> Tensor:
        """Mean absolute difference between each aligned crop and what the model's decoder draws of it.

        Args:
            images: as in :meth:`embed_tensor`.

        Returns:
            float32 [n], on the CPU.

        Raises:
            UsageError: the model was loaded without ``quality="reconstruction"``.
        """
        if not self._reconstructs:
            raise UsageError('reconstruction errors need load_embedder(..., quality="reconstruction")')
        return torch.cat([self._with_errors(part)[1] for part in images.split(batch_size)])

    @property
    def _reconstructs(self) -> bool:
        return isinstance(self._network, _TorchNetwork) and self._network.decoder is not None

    def _with_errors(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Features and reconstruction errors of aligned faces, on the CPU."""
        network = self._network
        assert isinstance(network, _TorchNetwork)
        with torch.inference_mode():
            parts = [network.with_error(part) for part in pixels.split(network.largest_batch)]
        return torch.cat([part[0] for part in parts]).cpu(), torch.cat([part[1] for part in parts]).cpu()
