"""Thousands of broken uploads: each is refused by its own fault (4xx), and the server goes on as before."""

import io
import resource
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from malformed import MAX_PIXELS, malformed, sound, still_whole
from PIL import Image
from serving import served

pytest.importorskip("fastapi")

from lrface import load_embedder
from lrface.serve.app import build_app
from lrface.serve.limits import Limits


@pytest.fixture(scope="module")
def server(pooled_model):
    app = build_app(load_embedder(pooled_model), Limits(pixels=MAX_PIXELS))
    with served(app) as client:
        yield client


def upload(server, path, number, make):
    data = make(number)
    answer = server.post(path, ("image", data))
    return number, answer.status, answer.json.get("code", "")


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.slow, id="ten-thousand")])
def test_malformed_uploads_are_refused_each_and_kill_nothing(server, count):
    for whole in sound():  # what is damaged below is good as it is
        assert server.post("/embed?kind=crop", ("image", whole)).status == 200
    pid_before = server.get("/metrics").body.count(b"process_resident_memory_bytes")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: upload(server, "/embed?kind=crop", n, malformed), range(count)))
    wrong = [each for each in found if not 400 <= each[1] < 500]
    assert not wrong, wrong[:10]
    codes = Counter(code for _, _, code in found)
    assert {"empty", "wrong_type", "unreadable", "too_many_pixels"} <= set(codes), codes
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    assert growth < 300, f"memory grew by {growth} MiB"
    # The same process answers, its thread embeds, and nothing was left behind.
    assert pid_before and server.get("/health").json["queue_images"] == 0
    assert server.post("/embed?kind=crop", ("image", sound()[0])).status == 200


@pytest.mark.parametrize("count", [60, pytest.param(3000, marks=pytest.mark.slow, id="thousands")])
def test_damage_that_leaves_a_picture_gives_vectors_or_a_reason(server, count):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: upload(server, "/embed?kind=crop", n, still_whole), range(count)))
    statuses = Counter(status for _, status, _ in found)
    assert (
        statuses[200] and statuses[422] and all(status == 200 or 400 <= status < 500 for status in statuses)
    ), statuses


@pytest.mark.parametrize("side", [(1, 1), (1, 900), (900, 1), (3, 3), (20, 13)])
def test_photographs_of_strange_shapes_have_no_face(server, side):
    file = io.BytesIO()
    Image.fromarray(np.full((*side, 3), 100, np.uint8)).save(file, "PNG")
    answer = server.post("/embed?kind=photo&faces=all", ("image", file.getvalue()))
    assert answer.status == 200 and answer.json["images"][0]["faces"] == [], answer.body
