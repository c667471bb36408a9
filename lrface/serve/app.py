"""The application: what is asked and answered over HTTP. Imported by :func:`lrface.serve.run` only."""

import asyncio
import logging
import math
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

import lrface
from lrface.embed import FaceEmbedder
from lrface.errors import LrfaceError
from lrface.serve.batching import Batcher, Found, Options, Place
from lrface.serve.gate import DEADLINE, Gate, problem
from lrface.serve.images import check_header, decode_image
from lrface.serve.limits import Limits, Refused
from lrface.serve.metrics import Metrics
from lrface.serve.upload import read_upload, too_large

if TYPE_CHECKING:
    from lrface.gallery import Gallery

log = logging.getLogger("lrface.serve")

Kind = Literal["auto", "crop", "photo"]
OneFace = Literal["largest-central", "largest"]
FaceRule = Literal["largest-central", "largest", "all"]

_KIND = "crop: an aligned square face; photo: faces are found and aligned; auto: by size."


# ------------------------------------------------------------------------------------------------- questions


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class EmbedQuestion(_Strict):
    kind: Kind = Field("auto", description=_KIND)
    faces: FaceRule = Field("largest-central", description="Which faces of a photograph.")
    flip: bool = Field(False, description="Add the features of the mirrored face.")


class CompareQuestion(_Strict):
    kind: Kind = Field("auto", description=_KIND)
    faces: OneFace = Field("largest-central", description="Which face of a photograph.")
    flip: bool = Field(True, description="Add the features of the mirrored face.")
    threshold: float | None = Field(
        None, ge=-1, le=1, description="Cosine from which on it is the same person; default: the model's own."
    )


class SearchQuestion(_Strict):
    kind: Kind = Field("auto", description=_KIND)
    faces: FaceRule = Field("largest-central", description="Which faces of a photograph.")
    k: int = Field(5, ge=1, le=100, description="Candidates for each face.")
    threshold: float | None = Field(
        None, ge=-1, le=1, description="Cosine from which on it is the same person; default: the model's own."
    )


# --------------------------------------------------------------------------------------------------- answers


class Problem(BaseModel):
    """Why a request got no answer."""

    code: str = Field(description="A short word for programs.")
    message: str = Field(description="What was found and what to do.")


class Face(BaseModel):
    """Where a face is and how good it is; box, landmarks and score are null for aligned crops."""

    box: list[float] | None = Field(description="Left, top, right, bottom in pixels of the photograph.")
    landmarks: list[list[float]] | None = Field(description="Five points [x, y] in pixels of the photograph.")
    score: float | None = Field(description="How sure the detector is, 0 to 1.")
    effective_resolution: float = Field(description="Pixels of real detail across the aligned face.")
    quality: float = Field(description="Length of the feature; its scale is the model's own.")


class EmbeddedFace(Face):
    vector: list[float] = Field(description="Of unit length.")


class EmbeddedImage(BaseModel):
    faces: list[EmbeddedFace]
    reason: str | None = Field(description="Why there is no face; null where there is one.")


class Embedded(BaseModel):
    """One entry an image, in the order sent."""

    model: str
    model_sha256: str
    embedding_size: int
    images: list[EmbeddedImage]


class Compared(BaseModel):
    similarity: float = Field(description="Cosine, -1 to 1.")
    same_person: bool
    probability: float | None = Field(
        description="That it is the same person; null where the model is not calibrated for it."
    )
    threshold: float
    threshold_from: str = Field(description="given, card (measured for this model) or default (neither).")
    statement: str = Field(description="The verdict in a sentence.")
    first: Face
    second: Face


class Candidate(BaseModel):
    """A person of the gallery that a face resembles."""

    name: str
    similarity: float = Field(description="Cosine to the person's template, -1 to 1.")
    threshold: float = Field(description="What it has to reach, by the less clear of the two.")
    accepted: bool
    images: int = Field(description="Enrolled images behind the template.")
    resolution: float = Field(description="Of the clearest of them, in pixels.")


class FoundFace(Face):
    name: str | None = Field(description="Who it is; null: nobody in the gallery is like it enough.")
    threshold_from: str = Field(description="given, card (measured for this model) or default (neither).")
    candidates: list[Candidate] = Field(description="Best first, accepted or not.")


class SearchedImage(BaseModel):
    faces: list[FoundFace]
    reason: str | None = Field(description="Why there is no face; null where there is one.")


class Searched(BaseModel):
    """One entry an image, in the order sent."""

    images: list[SearchedImage]


class About(BaseModel):
    """What this server runs and takes."""

    lrface: str
    model: str
    model_sha256: str
    embedding_size: int
    input_size: int
    max_upload_bytes: int
    max_images: int
    max_pixels: int
    gallery: bool = Field(description="Whether there is a gallery to search.")


class Health(BaseModel):
    status: Literal["ready"]
    uptime_seconds: float
    queue_images: int


class Alive(BaseModel):
    status: Literal["alive"]


def face_fields(found: Found, row: int) -> dict[str, Any]:
    """The fields of :class:`Face` of one face."""
    each = found.embeddings
    located = not math.isnan(each.score[row])
    return {
        "box": each.box[row].tolist() if located else None,
        "landmarks": each.landmarks[row].tolist() if located else None,
        "score": float(each.score[row]) if located else None,
        "effective_resolution": float(each.effective_resolution[row]),
        "quality": float(each.quality[row]),
    }


# --------------------------------------------------------------------------------------------------- service


class Service:
    """What the routes share: the embedder behind its queue, and threads that decode."""

    def __init__(self, embedder: FaceEmbedder, limits: Limits):
        self.embedder = embedder
        self.limits = limits
        self.metrics = Metrics()
        self.batcher = Batcher(embedder, limits, self.metrics.batch)
        self.metrics.watch(self.batcher)
        self.started = time.monotonic()
        self._decoders = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="lrface-decode")

    def close(self) -> None:
        """Finish what is in work."""
        self.batcher.close()
        self._decoders.shutdown()

    async def images(
        self, request: Request, fields: Mapping[str, tuple[int, int]]
    ) -> tuple[list[np.ndarray], Place]:
        """The images of a form, decoded (uint8 [h, w, 3] RGB), in the order of ``fields``, with the room they take.

        Args:
            fields: name -> least and most images of it.

        Raises:
            Refused: for anything else than whole images within the limits, or no room.
        """
        length = request.headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.limits.upload:
            raise too_large(self.limits)
        try:
            async with asyncio.timeout(self._left(request)):
                form = await read_upload(
                    request.headers.get("content-type"), request.stream(), frozenset(fields), self.limits
                )
        except TimeoutError:
            raise Refused(
                408, "slow", f"the body had not arrived after {self.limits.seconds:g} s", None
            ) from None
        for name, (least, most) in fields.items():
            if not least <= len(form.get(name, ())) <= most:
                wanted = f"{least}" if least == most else f"{least} to {most}"
                raise Refused(
                    422,
                    "wrong_count",
                    f"the form must have {wanted} of the field {name!r}; found {len(form.get(name, ()))}",
                )
        files = [file for name in fields for file in form.get(name, ())]
        pixels = sum(check_header(file, at, self.limits.pixels) for at, file in enumerate(files, 1))
        place = self.batcher.reserve(len(files), pixels)
        loop = asyncio.get_running_loop()
        work = [
            loop.run_in_executor(self._decoders, decode_image, file, at, self.limits.pixels)
            for at, file in enumerate(files, 1)
        ]
        # All have ended before the room is given back, whichever failed.
        decoded = await asyncio.gather(*work, return_exceptions=True)
        images = []
        for each in decoded:
            if isinstance(each, BaseException):
                place.free()
                raise each
            images.append(each)
        return images, place

    async def embed(
        self, request: Request, fields: Mapping[str, tuple[int, int]], options: Options
    ) -> list[Found]:
        """The images of a form, embedded. Raises Refused as :meth:`images`, and 504 when the time is over."""
        images, place = await self.images(request, fields)
        return await self.result(
            request, self.batcher.submit(images, options, request.scope[DEADLINE], place)
        )

    async def call(self, request: Request, function: Callable[[], Any], place: Place) -> Any:
        """``function`` run alone by the thread that embeds. Raises Refused (504) when the time is over."""
        return await self.result(request, self.batcher.submit_call(function, request.scope[DEADLINE], place))

    async def aside(self, request: Request, function: Callable[[], Any]) -> Any:
        """``function`` run by one of the threads that decode. Raises Refused (504) when the time is over."""
        return await self.result(request, self._decoders.submit(function))

    async def result(self, request: Request, future: "Future[Any]") -> Any:
        try:
            async with asyncio.timeout(self._left(request)):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            raise Refused(
                504, "timeout", f"the answer was not ready after {self.limits.seconds:g} s; try again later"
            ) from None

    @staticmethod
    def _left(request: Request) -> float:
        return max(0.0, request.scope[DEADLINE] - time.monotonic())


def one_face(found: Found, which: str) -> int:
    """The row of an image's only face. Raises Refused (422) where it has none."""
    if not found.rows:
        raise Refused(422, "no_face", f"the {which} image: {found.reason}")
    return found.rows[0]


# ------------------------------------------------------------------------------------------------ documents

_MEANINGS = {
    401: "The token is missing or wrong.",
    403: "Asked under another host name or by a page of another site.",
    408: "The body did not arrive in time.",
    413: "Too many bytes, images or pixels.",
    415: "Not multipart/form-data, or an image that is no JPEG, PNG or WebP file.",
    422: "A wrong parameter, a damaged form or image, or no face where one is needed.",
    503: "The server has as much work as it takes, or is stopping; try again after Retry-After seconds.",
    504: "The answer was not ready in time.",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """These statuses with what they mean, for the document of a route."""
    found: dict[int | str, dict[str, Any]] = {
        status: {"model": Problem, "description": _MEANINGS[status]} for status in statuses
    }
    if 503 in found:
        seconds = {"schema": {"type": "integer"}, "description": "Seconds after which to try again."}
        found[503]["headers"] = {"Retry-After": seconds}
    return found


OF_IMAGES = (401, 403, 408, 413, 415, 422, 503, 504)


def form(fields: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """The body of a route for its document: files by field name."""
    file = {"type": "string", "format": "binary", "description": "A JPEG, PNG or WebP file."}
    properties: dict[str, Any] = {
        name: file if most == 1 else {"type": "array", "items": file, "minItems": least, "maxItems": most}
        for name, (least, most) in fields.items()
    }
    schema = {
        "type": "object",
        "required": [name for name, (least, _) in fields.items() if least],
        "properties": properties,
        "additionalProperties": False,
    }
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def answer(value: BaseModel) -> Response:
    return Response(value.model_dump_json(), media_type="application/json")


# ------------------------------------------------------------------------------------------------------ app


def build_app(
    embedder: FaceEmbedder,
    limits: Limits,
    *,
    token: str | None = None,
    hosts: frozenset[str] | None = None,
    gallery: "Gallery | None" = None,
    page: bool = False,
    no_reconstruction: str | None = None,
) -> FastAPI:
    """The application of one model.

    Args:
        token: that requests must bear; /health, the page itself and the document are open.
        hosts: names under which it may be asked, see :class:`lrface.serve.gate.Gate`.
        gallery: whom /search looks among; without one there is no such route.
        page: also the page of `lrface ui`.
        no_reconstruction: why the page shows no reconstructions; None where the model has a decoder.
    """
    service = Service(embedder, limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    # The pages of /docs and /redoc would ask other hosts for their scripts.
    app = FastAPI(
        title="lrface",
        version=lrface.__version__,
        description="Faces of any resolution: embed, compare, search. Images are sent as multipart/form-data; none is "
        "stored or logged.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        dependencies=[Depends(HTTPBearer(auto_error=False))] if token is not None else [],
    )
    app.state.service = service
    open_paths = {"/health", "/health/live", "/openapi.json"}

    def refused(_: Request, error: Any) -> Response:
        service.metrics.refused(error.code)
        return problem(error)

    def not_valid(_: Request, error: Any) -> Response:
        places = "; ".join(
            f"{'.'.join(str(part) for part in each['loc'][1:2])}: {each['msg']}" for each in error.errors()
        )
        return problem(Refused(422, "wrong_parameter", places))

    def of_starlette(_: Request, error: Any) -> Response:
        answered = problem(Refused(error.status_code, "no_such_route", str(error.detail)))
        answered.headers.update(error.headers or {})
        return answered

    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(RequestValidationError, not_valid)
    app.add_exception_handler(HTTPException, of_starlette)

    many, pair = {"image": (1, limits.images)}, {"first": (1, 1), "second": (1, 1)}

    @app.post("/embed", response_model=Embedded, responses=errors(*OF_IMAGES), openapi_extra=form(many))
    async def embed(request: Request, question: Annotated[EmbedQuestion, Query()]) -> Response:
        """Unit vectors of the faces in one or more images."""
        found = await service.embed(request, many, Options(question.kind, question.faces, question.flip))
        images = [
            EmbeddedImage(
                faces=[
                    EmbeddedFace(**face_fields(each, row), vector=each.embeddings.vectors[row].tolist())
                    for row in each.rows
                ],
                reason=each.reason,
            )
            for each in found
        ]
        return answer(
            Embedded(
                model=embedder.name,
                model_sha256=embedder.model_sha256,
                embedding_size=embedder.embedding_size,
                images=images,
            )
        )

    @app.post("/compare", response_model=Compared, responses=errors(*OF_IMAGES), openapi_extra=form(pair))
    async def compare(request: Request, question: Annotated[CompareQuestion, Query()]) -> Response:
        """Whether two images show the same person: similarity and a verdict."""
        found = await service.embed(request, pair, Options(question.kind, question.faces, question.flip))
        rows = [one_face(each, which) for each, which in zip(found, pair, strict=True)]
        vectors = [each.embeddings.vectors[row] for each, row in zip(found, rows, strict=True)]
        faces = [face_fields(each, row) for each, row in zip(found, rows, strict=True)]
        cosine = float(embedder.similarity(*vectors)[0, 0])
        sizes = (faces[0]["effective_resolution"], faces[1]["effective_resolution"])
        verdict = embedder.decide(cosine, sizes, threshold=question.threshold)
        return answer(
            Compared(
                similarity=verdict.similarity,
                same_person=verdict.verdict,
                probability=verdict.probability,
                threshold=verdict.threshold,
                threshold_from=verdict.threshold_from,
                statement=verdict.statement,
                first=Face(**faces[0]),
                second=Face(**faces[1]),
            )
        )

    if gallery is not None:
        _add_search(app, service, gallery)

    @app.get("/about", response_model=About, responses=errors(401, 403))
    async def about() -> Response:
        """The model and the limits of this server."""
        return answer(
            About(
                lrface=lrface.__version__,
                model=embedder.name,
                model_sha256=embedder.model_sha256,
                embedding_size=embedder.embedding_size,
                input_size=embedder.input_size,
                max_upload_bytes=limits.upload,
                max_images=limits.images,
                max_pixels=limits.pixels,
                gallery=gallery is not None,
            )
        )

    @app.get("/health", response_model=Health, responses=errors(403, 503))
    async def health() -> Response:
        """Whether requests are taken (readiness). No token is needed."""
        if not service.batcher.alive:
            raise Refused(503, "stopping", "the server is stopping", retry_after=5)
        return answer(
            Health(
                status="ready",
                uptime_seconds=round(time.monotonic() - service.started, 3),
                queue_images=service.batcher.waiting,
            )
        )

    @app.get("/health/live", response_model=Alive, responses=errors(403))
    async def live() -> Response:
        """Whether the process answers at all (liveness). No token is needed."""
        return answer(Alive(status="alive"))

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}, "description": "Prometheus."}, **errors(401, 403)},
    )
    async def metrics() -> Response:
        """Counts, latencies, queue depth and batch sizes, for Prometheus."""
        return Response(service.metrics.text(), media_type=service.metrics.content_type)

    if page:
        from lrface.serve.page import FILES, add_page

        add_page(app, service, no_reconstruction)
        open_paths.update(FILES)
    app.add_middleware(
        Gate,
        limits=limits,
        metrics=service.metrics,
        token=token,
        open_paths=frozenset(open_paths),
        hosts=hosts,
    )
    return app


def _add_search(app: FastAPI, service: Service, gallery: "Gallery") -> None:
    fields = {"image": (1, service.limits.images)}
    flip = bool(gallery.info()["flip"])

    @app.post("/search", response_model=Searched, responses=errors(*OF_IMAGES), openapi_extra=form(fields))
    async def search(request: Request, question: Annotated[SearchQuestion, Query()]) -> Response:
        """Whom of the gallery the faces of one or more images show, if anybody."""
        found = await service.embed(request, fields, Options(question.kind, question.faces, flip))
        rows = [(each, row) for each in found for row in each.rows]

        def look() -> list[Any]:
            if not rows:
                return []
            vectors = np.stack([each.embeddings.vectors[row] for each, row in rows])
            pixels = [float(each.embeddings.effective_resolution[row]) for each, row in rows]
            try:
                return gallery.search_vectors(vectors, pixels, k=question.k, threshold=question.threshold)
            except LrfaceError as error:
                log.error("the gallery cannot be searched: %s", error)
                raise Refused(
                    503, "gallery", "the gallery cannot be searched at present", retry_after=30
                ) from None

        matches = iter(await service.aside(request, look))
        images = []
        for each in found:
            faces = []
            for row in each.rows:
                match = next(matches)
                candidates = [
                    Candidate(
                        name=candidate.name,
                        similarity=candidate.similarity,
                        threshold=threshold,
                        accepted=candidate.similarity >= threshold,
                        images=candidate.images,
                        resolution=candidate.resolution,
                    )
                    for candidate, threshold in zip(match.candidates, match.thresholds, strict=True)
                ]
                faces.append(
                    FoundFace(
                        **face_fields(each, row),
                        name=match.name,
                        threshold_from=match.threshold_from,
                        candidates=candidates,
                    )
                )
            images.append(SearchedImage(faces=faces, reason=each.reason))
        return answer(Searched(images=images))
