"""The queue: batches across requests, room that ends, time that ends, errors that stay with their request."""

import threading
import time

import numpy as np
import pytest

from lrface import load_embedder
from lrface.errors import UsageError
from lrface.serve.batching import Batcher, Options
from lrface.serve.limits import Limits, Refused

CROP = Options("crop")


class Held:
    """An embedder whose calls wait for permission, and are counted."""

    def __init__(self, embedder):
        self._embedder = embedder
        self.go = threading.Event()
        self.sizes = []

    def embed(self, images, **options):
        self.go.wait(20)
        self.sizes.append(len(images))
        return self._embedder.embed(images, **options)


@pytest.fixture(scope="module")
def embedder(pooled_model):
    return load_embedder(pooled_model)


@pytest.fixture
def held(embedder):
    return Held(embedder)


def batches(embedder, **limits):
    return Batcher(embedder, Limits(**limits))


def later():
    return time.monotonic() + 20


def test_requests_are_embedded_together_and_each_gets_its_own(held, embedder, faces):
    batcher = batches(held, batch=4)
    futures = []
    for count in (1, 1, 2, 1, 3, 2):  # the first is taken alone: it holds the thread
        images = [faces[(count + at) % 4] for at in range(count)]
        futures.append((images, batcher.submit(images, CROP, later(), batcher.reserve(count, count))))
        time.sleep(0.05 if len(futures) == 1 else 0)
    assert batcher.waiting == 10
    held.go.set()
    for images, future in futures:
        found = future.result(20)
        expected = embedder.embed(images, kind="crop").vectors
        rows = np.stack([each.embeddings.vectors[each.rows[0]] for each in found])
        np.testing.assert_allclose(rows, expected, atol=1e-6)
    batcher.close()
    assert held.sizes == [1, 4, 3, 2] and batcher.waiting == 0


def test_options_are_kept_apart(embedder, faces):
    batcher = batches(embedder, batch=8, wait=0.1)
    plain = batcher.submit(faces[:2], CROP, later(), batcher.reserve(2, 2))
    flipped = batcher.submit(faces[:2], Options("crop", flip=True), later(), batcher.reserve(2, 2))
    for future, flip in ((plain, False), (flipped, True)):
        expected = embedder.embed(faces[:2], kind="crop", flip=flip).vectors
        np.testing.assert_allclose(future.result(20)[0].embeddings.vectors[:2], expected, atol=1e-6)
    batcher.close()


def test_what_has_no_face_says_why_and_the_others_are_embedded(embedder, faces):
    batcher = batches(embedder)
    flat = np.full((112, 112, 3), 127, np.uint8)[:50]
    found = batcher.submit([faces[0], flat, faces[1]], CROP, later(), batcher.reserve(3, 3)).result(20)
    assert [len(each.rows) for each in found] == [1, 0, 1]
    assert "square" in found[1].reason and found[0].reason is None
    batcher.close()


def test_a_full_queue_refuses_with_a_time_to_come_back(held, faces):
    batcher = batches(held, queue=16, pixels=200_000)
    futures = [batcher.submit(faces, CROP, later(), batcher.reserve(4, 4)) for _ in range(4)]
    with pytest.raises(Refused, match="16 images are waiting") as refused:
        batcher.reserve(1, 1)
    assert refused.value.status == 503 and refused.value.retry_after >= 1
    held.go.set()
    for future in futures:
        future.result(20)
    batcher.reserve(16, 16).free()
    # Pixels count too: eight of the largest images at once.
    place = batcher.reserve(8, 8 * 200_000)
    with pytest.raises(Refused):
        batcher.reserve(1, 1)
    place.free()
    place.free()  # given back once, however often it is said
    assert batcher.waiting == 0
    batcher.close()


def test_a_request_whose_time_is_over_is_not_embedded(held, faces):
    batcher = batches(held)
    first = batcher.submit(faces[:1], CROP, later(), batcher.reserve(1, 1))
    time.sleep(0.05)
    late = batcher.submit(faces[:2], CROP, time.monotonic() + 0.05, batcher.reserve(2, 2))
    left = batcher.submit(faces[:3], CROP, later(), batcher.reserve(3, 3))
    assert left.cancel()  # its client has gone
    time.sleep(0.1)
    held.go.set()
    first.result(20)
    with pytest.raises(Refused) as refused:
        late.result(20)
    assert refused.value.status == 504
    batcher.close()
    assert held.sizes == [1] and batcher.waiting == 0


def test_an_error_stays_with_the_request_that_made_it(embedder, faces):
    class Picky(Held):
        def embed(self, images, **options):
            if any(image.shape[0] == 13 for image in images):
                raise RuntimeError("a face of 13 pixels")
            return super().embed(images, **options)

    picky = Picky(embedder)
    picky.go.set()
    batcher = batches(picky, wait=0.2)
    good = batcher.submit(faces[:1], CROP, later(), batcher.reserve(1, 1))
    bad = batcher.submit([np.zeros((13, 13, 3), np.uint8)], CROP, later(), batcher.reserve(1, 1))
    also = batcher.submit(faces[1:2], CROP, later(), batcher.reserve(1, 1))
    assert len(good.result(20)[0].rows) == len(also.result(20)[0].rows) == 1
    with pytest.raises(RuntimeError):
        bad.result(20)
    assert batcher.alive and batcher.waiting == 0
    batcher.close()


def test_closing_finishes_what_is_there_and_takes_nothing_new(held, faces):
    batcher = batches(held)
    futures = [batcher.submit(faces, CROP, later(), batcher.reserve(4, 4)) for _ in range(3)]
    closing = threading.Thread(target=batcher.close)
    closing.start()
    time.sleep(0.05)
    assert not batcher.alive
    with pytest.raises(Refused, match="stopping"):
        batcher.reserve(1, 1)
    held.go.set()
    closing.join(20)
    assert all(future.done() and len(future.result()) == 4 for future in futures)


def test_a_call_runs_alone_in_the_same_thread(embedder, faces):
    batcher = batches(embedder, wait=0.2)
    faces_before = batcher.submit(faces, CROP, later(), batcher.reserve(4, 4))
    call = batcher.submit_call(lambda: threading.current_thread().name, later(), batcher.reserve(1, 1))
    assert call.result(20) == "lrface-batches" and faces_before.result(20)
    batcher.close()


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("batch", 0, "limit batch"),
        ("queue", 3, "queue must hold"),
        ("wait", 2.0, "wait lies between"),
        ("seconds", 0.0, "time of a request"),
        ("pixels", 100, "limit pixels"),
        ("images", 1, "limit images"),
    ],
)
def test_limits_that_are_none_are_wrong_usage(field, value, named):
    with pytest.raises(UsageError, match=named):
        Limits(**{field: value})
