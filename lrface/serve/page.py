"""The page of `lrface ui`: two faces at every resolution, what the network sees of them, what it makes of them."""

import base64
import math
from importlib.resources import files
from typing import Any

import cv2
import numpy as np
import torch
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, Field
from torch import Tensor

from lrface.align.warp import warp_face
from lrface.degrade.resolution import resample, resize
from lrface.embed import FaceEmbedder
from lrface.serve.app import OF_IMAGES, Face, Service, answer, errors, face_fields, form, one_face
from lrface.serve.batching import Found, Options
from lrface.serve.limits import Refused

SIZES = (112, 96, 80, 68, 56, 48, 40, 34, 28, 24, 20, 17, 14, 12, 10)
"""Pixels of a side at which a face is shown and embedded."""
FILES = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}


class FaceAtSizes(Face):
    """One face; images are PNG files as data: addresses, of what the network is given."""

    crops: list[str] = Field(description="The aligned face at each size.")
    reconstructions: list[str] | None = Field(
        description="What the decoder draws of each; null without decoder."
    )


class Pair(BaseModel):
    """Of two faces, at size i of the first and size j of the second."""

    similarity: list[list[float]]
    threshold: list[list[float]]
    same_person: list[list[bool]]
    probability: list[list[float]] | None = Field(
        description="That it is the same person; null where the model is not calibrated for it."
    )
    threshold_from: str


class FacesAtSizes(BaseModel):
    sizes: list[int] = Field(description="Pixels of a side, largest first.")
    first: FaceAtSizes
    second: FaceAtSizes | None
    pair: Pair | None
    no_reconstruction: str | None = Field(description="Why nothing is reconstructed.")


def page_sizes(input_size: int) -> list[int]:
    """:data:`SIZES` up to what the network takes, and that itself."""
    return [input_size, *(size for size in SIZES if size < input_size)]


def aligned(image: np.ndarray, found: Found, size: int) -> Tensor:
    """The face that was embedded, as the network was given it: float32 [1, 3, size, size] in [0, 1]."""
    landmarks = found.embeddings.landmarks[found.rows[0]]
    if math.isnan(landmarks[0, 0]):
        return resize(_tensor(image), size, "bilinear")
    return _tensor(warp_face(image, landmarks, size))


def _tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32) / np.float32(255))[None]


def _png(image: Tensor) -> str:
    """float32 [3, h, w] RGB in [0, 1] as a data: address."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    _, encoded = cv2.imencode(".png", np.ascontiguousarray(pixels[:, :, ::-1]))
    return "data:image/png;base64," + base64.b64encode(encoded.tobytes()).decode("ascii")


def reconstructed(embedder: FaceEmbedder, crops: Tensor) -> Tensor | None:
    """What the model's decoder draws of crops float32 [n, 3, s, s]: the same, about [0, 1]; None without decoder."""
    network: Any = embedder._network
    if getattr(network, "decoder", None) is None:
        return None
    with torch.inference_mode():
        return network.decoder(network._encoder.features(crops.to(network.device))).float().cpu()


def at_sizes(
    embedder: FaceEmbedder, image: np.ndarray, found: Found, sizes: list[int]
) -> tuple[FaceAtSizes, np.ndarray]:
    """One face shrunk to each size and enlarged again, embedded: what the page shows, and vectors float32 [sizes, d].

    Raises:
        Refused: the network gives no direction for it.
    """
    face = aligned(image, found, embedder.input_size)
    crops = torch.cat([resample(face, size) for size in sizes])
    embeddings = embedder.embed(crops, kind="crop", flip=True, on_error="skip")
    if embeddings.failures:
        raise Refused(422, "no_face", f"a face cannot be embedded: {embeddings.failures[0][1]}")
    drawn = reconstructed(embedder, crops)
    shown = FaceAtSizes(
        **face_fields(found, found.rows[0]),
        crops=[_png(each) for each in crops],
        reconstructions=None if drawn is None else [_png(each) for each in drawn],
    )
    return shown, embeddings.vectors


def compare_sizes(
    embedder: FaceEmbedder, faces: list[FaceAtSizes], vectors: list[np.ndarray], sizes: list[int]
) -> Pair:
    """Every size of one face against every size of the other."""
    cosine = embedder.similarity(vectors[0], vectors[1])
    # A face has no more detail than its photograph had, whatever size it is shown at.
    detail = [[min(float(size), face.effective_resolution) for size in sizes] for face in faces]
    table = [
        [embedder.decide(float(cosine[i, j]), (a, b)) for j, b in enumerate(detail[1])]
        for i, a in enumerate(detail[0])
    ]
    probabilities = [[each.probability for each in row if each.probability is not None] for row in table]
    known = all(len(row) == len(sizes) for row in probabilities)
    return Pair(
        similarity=[[each.similarity for each in row] for row in table],
        threshold=[[each.threshold for each in row] for row in table],
        same_person=[[each.verdict for each in row] for row in table],
        probability=probabilities if known else None,
        threshold_from=table[0][0].threshold_from,
    )


def add_page(app: FastAPI, service: Service, no_reconstruction: str | None) -> None:
    """The page's own files and the question it asks, on an application.

    Args:
        no_reconstruction: why the model reconstructs nothing; None where it does.
    """
    embedder = service.embedder
    sizes = page_sizes(embedder.input_size)
    fields = {"first": (1, 1), "second": (0, 1)}

    @app.post(
        "/page/compare",
        response_model=FacesAtSizes,
        responses=errors(*OF_IMAGES),
        openapi_extra=form(fields),
    )
    async def compare_at_sizes(request: Request) -> Response:
        """One face or two at many resolutions: crops, reconstructions, similarities, verdicts. For the page."""
        images, place = await service.images(request, fields)

        def measure() -> FacesAtSizes:
            options = Options(flip=True)
            found = service.batcher.found(images, options)
            names = ("first", "second")[: len(images)]
            for name, each in zip(names, found, strict=True):
                one_face(each, name)
            faces, vectors = [], []
            for image, each in zip(images, found, strict=True):
                shown, embedded = at_sizes(embedder, image, each, sizes)
                faces.append(shown)
                vectors.append(embedded)
            both = len(faces) == 2
            return FacesAtSizes(
                sizes=sizes,
                first=faces[0],
                second=faces[1] if both else None,
                pair=compare_sizes(embedder, faces, vectors, sizes) if both else None,
                no_reconstruction=no_reconstruction,
            )

        return answer(await service.call(request, measure, place))

    def add_file(path: str, name: str, kind: str) -> None:
        content = files("lrface.serve").joinpath("page", name).read_bytes()

        @app.get(path, include_in_schema=False)
        async def file() -> Response:
            return Response(content, media_type=kind)

    for path, (name, kind) in FILES.items():
        add_file(path, name, kind)
