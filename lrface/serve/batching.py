"""Faces of many requests embedded together, by one thread, from a queue that has an end."""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lrface.embed import Embeddings, FaceEmbedder
from lrface.serve.limits import PIXELS_TOGETHER, Limits, Refused


@dataclass(frozen=True)
class Options:
    """Those of :meth:`lrface.embed.FaceEmbedder.embed` that a request chooses."""

    kind: str = "auto"
    faces: str = "largest-central"
    flip: bool = False


@dataclass(frozen=True)
class Found:
    """The faces of one image: rows of ``embeddings`` (``source`` as it came), or why there are none."""

    embeddings: Embeddings
    rows: tuple[int, ...]
    reason: str | None


class Place:
    """Room for a request's images in the server's memory, until it is given back."""

    def __init__(self, give_back: Callable[[], None]):
        self._give_back: Callable[[], None] | None = give_back

    def free(self) -> None:
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back()


@dataclass(eq=False)
class _Job:
    images: Sequence[np.ndarray]
    options: Options
    call: Callable[[], Any] | None
    deadline: float
    place: Place
    arrived: float = field(default_factory=time.monotonic)
    future: "Future[Any]" = field(default_factory=Future)

    def end(self, result: Any = None, error: BaseException | None = None) -> None:
        self.place.free()
        if self.future.done():
            return
        if error is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


class Batcher:
    """One thread that embeds; requests hand it decoded images and wait.

    Whatever waits when the thread is free is taken together, up to ``limits.batch`` images; a lone request waits
    ``limits.wait`` seconds for company. What cannot be embedded fails alone: after an error in a batch each of its
    requests is tried by itself.

    Args:
        on_batch: told of each batch: images, faces, seconds in the network, seconds each request had waited.
    """

    def __init__(
        self,
        embedder: FaceEmbedder,
        limits: Limits,
        on_batch: Callable[[int, int, float, Sequence[float]], None] = lambda *_: None,
    ):
        self.embedder = embedder
        self._limits = limits
        self._on_batch = on_batch
        self._changed = threading.Condition()
        self._queue: deque[_Job] = deque()
        self._images, self._pixels = 0, 0
        self._closing = False
        self._seconds_an_image = 0.02  # until it is known
        self._thread = threading.Thread(target=self._work, name="lrface-batches", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether requests are still taken and worked on."""
        return self._thread.is_alive() and not self._closing

    @property
    def waiting(self) -> int:
        """Images that are decoded, wait, or are being embedded."""
        return self._images

    def reserve(self, images: int, pixels: int) -> Place:
        """Room for images that are about to be decoded. Raises Refused (503) where there is none."""
        with self._changed:
            full = self._images + images > self._limits.queue
            # One request alone may always be worked on: what it holds is bounded by its own limits.
            heavy = self._images and self._pixels + pixels > PIXELS_TOGETHER * self._limits.pixels
            if self._closing or full or heavy:
                what = "the server is stopping" if self._closing else f"{self._images} images are waiting"
                seconds = min(30, max(1, math.ceil(self._images * self._seconds_an_image)))
                raise Refused(503, "busy", f"{what}; try again in {seconds} s", retry_after=seconds)
            self._images += images
            self._pixels += pixels

        def give_back() -> None:
            with self._changed:
                self._images -= images
                self._pixels -= pixels

        return Place(give_back)

    def submit(
        self, images: Sequence[np.ndarray], options: Options, deadline: float, place: Place
    ) -> "Future[list[Found]]":
        """Embed images (uint8 [h, w, 3] RGB): one :class:`Found` each, in order. ``deadline`` is of time.monotonic();
        a request that is not begun by then is dropped (Refused, 504). ``place`` is given back when it is done."""
        return self._add(_Job(images, options, None, deadline, place))

    def submit_call(self, call: Callable[[], Any], deadline: float, place: Place) -> "Future[Any]":
        """Run ``call`` in the thread that embeds, by itself."""
        return self._add(_Job((), Options(), call, deadline, place))

    def close(self) -> None:
        """Take nothing new, finish what is there, end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _add(self, job: _Job) -> "Future[Any]":
        with self._changed:
            if self._closing:
                refused = Refused(503, "busy", "the server is stopping", retry_after=5)
            else:
                self._queue.append(job)
                self._changed.notify_all()
                return job.future
        job.end(error=refused)
        return job.future

    def _work(self) -> None:
        while jobs := self._take():
            now = time.monotonic()
            ready = [job for job in jobs if job.deadline > now and job.future.set_running_or_notify_cancel()]
            for job in jobs:
                if job not in ready:
                    late = Refused(504, "timeout", "the request waited too long to be embedded")
                    job.end(error=late)
            groups: dict[Options, list[_Job]] = {}
            for job in ready:
                if job.call is not None:
                    self._run(job, job.call)
                else:
                    groups.setdefault(job.options, []).append(job)
            for options, group in groups.items():
                self._embed(group, options)
            # Names would keep the images of the last batch while the thread waits for the next.
            del jobs, ready, groups
            job = options = group = None  # type: ignore[assignment]

    def _take(self) -> list[_Job]:
        """The next jobs, at least one; none when the server stops and nothing is left."""
        with self._changed:
            while not self._queue:
                if self._closing:
                    return []
                self._changed.wait()
            jobs = [self._queue.popleft()]
            size, until = len(jobs[0].images), jobs[0].arrived + self._limits.wait
            while size < self._limits.batch and jobs[0].call is None:
                if self._queue:
                    size += len(self._queue[0].images)
                    if size > self._limits.batch or self._queue[0].call is not None:
                        break
                    jobs.append(self._queue.popleft())
                    continue
                left = until - time.monotonic()
                if left <= 0 or self._closing:
                    break
                self._changed.wait(left)
            return jobs

    def _embed(self, jobs: list[_Job], options: Options) -> None:
        started = time.monotonic()
        images = [image for job in jobs for image in job.images]
        try:
            found = self.found(images, options)
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:
                    self._embed([job], options)
            else:
                jobs[0].end(error=error)
            return
        seconds = time.monotonic() - started
        if images:
            self._seconds_an_image += 0.1 * (seconds / len(images) - self._seconds_an_image)
        faces = sum(len(each.rows) for each in found)
        self._on_batch(len(images), faces, seconds, [started - job.arrived for job in jobs])
        at = 0
        for job in jobs:
            job.end(found[at : at + len(job.images)])
            at += len(job.images)

    def found(self, images: Sequence[np.ndarray], options: Options) -> list[Found]:
        """The faces of each image; for the thread that embeds only."""
        embeddings = self.embedder.embed(
            list(images),
            kind=options.kind,
            faces=options.faces,
            flip=options.flip,
            batch_size=self._limits.batch,
            on_error="skip",
            workers=1,
        )
        rows: list[list[int]] = [[] for _ in images]
        for row, source in enumerate(embeddings.source):
            rows[source].append(row)
        reasons = dict(embeddings.failures)
        return [Found(embeddings, tuple(each), reasons.get(at)) for at, each in enumerate(rows)]

    def _run(self, job: _Job, call: Callable[[], Any]) -> None:
        try:
            job.end(call())
        except Exception as error:
            job.end(error=error)
