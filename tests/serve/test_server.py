"""The server over HTTP: answers that are the embedder's own, limits, the token, what is kept (nothing)."""

import http.client
import json
import logging
import os
import re
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from serving import Client, encoded, form, served

pytest.importorskip("fastapi")

from lrface import load_embedder
from lrface.gallery import Gallery
from lrface.serve.app import build_app
from lrface.serve.limits import Limits

LIMITS = Limits(upload=1 << 20, pixels=1_000_000, images=8, queue=64, requests=48)
TOKEN = "correct-horse-battery-staple"


@pytest.fixture(scope="module")
def embedder(pooled_model):
    return load_embedder(pooled_model)


@pytest.fixture(scope="module")
def app(embedder, faces, tmp_path_factory):
    gallery = Gallery.create(tmp_path_factory.mktemp("people") / "gallery", embedder)
    gallery.add({"Anna Ó": [faces[0]], "Ben": [faces[2]]}, kind="crop")
    return build_app(embedder, LIMITS, hosts=frozenset(("127.0.0.1", "localhost", "[::1]")), gallery=gallery)


@pytest.fixture(scope="module")
def server(app):
    with served(app) as client:
        yield client


def held(app):
    """Stops the thread that embeds until it is let go; gives the event."""
    go = threading.Event()
    batcher = app.state.service.batcher
    batcher.submit_call(lambda: go.wait(20), time.monotonic() + 20, batcher.reserve(1, 1))
    return go


def numbers(server, name):
    """Values of one metric by its labels."""
    text = server.get("/metrics").body.decode()
    return {
        labels or "": float(value) for labels, value in re.findall(rf"^{name}(\{{.*\}})? (\S+)$", text, re.M)
    }


def test_embed_gives_what_the_embedder_gives(server, embedder, faces, face_files):
    answer = server.post("/embed?kind=crop&flip=true", *[("image", file) for file in face_files])
    assert answer.status == 200 and answer.headers["content-type"] == "application/json"
    found = answer.json
    assert found["model"] == "pooled" and found["model_sha256"] == embedder.model_sha256
    expected = embedder.embed(faces, kind="crop", flip=True)
    vectors = [image["faces"][0]["vector"] for image in found["images"]]
    np.testing.assert_allclose(vectors, expected.vectors, atol=1e-6)
    face = found["images"][0]["faces"][0]
    assert face["box"] is face["landmarks"] is face["score"] is None
    assert face["effective_resolution"] == pytest.approx(float(expected.effective_resolution[0]))
    assert face["quality"] == pytest.approx(float(expected.quality[0]), rel=1e-5)


def test_a_photograph_gives_its_faces_and_one_without_says_so(server, embedder):
    from importlib.resources import files

    photo = files("matplotlib").joinpath("mpl-data/sample_data/grace_hopper.jpg").read_bytes()
    nobody = encoded(np.full((200, 300, 3), 90, np.uint8), "JPEG")
    answer = server.post("/embed?faces=all", ("image", photo), ("image", nobody))
    assert answer.status == 200, answer.body
    one, none = answer.json["images"]
    expected = embedder.embed([photo])
    np.testing.assert_allclose(one["faces"][0]["vector"], expected.vectors[0], atol=2e-3)
    np.testing.assert_allclose(one["faces"][0]["box"], expected.box[0], atol=0.1)
    assert one["faces"][0]["score"] > 0.9 and one["reason"] is None
    assert none["faces"] == [] and "no face found" in none["reason"]
    refused = server.post("/compare", ("first", photo), ("second", nobody))
    assert refused.status == 422 and refused.json["code"] == "no_face" and "second" in refused.json["message"]


def test_compare_decides_as_the_embedder_does(server, embedder, faces, face_files):
    for other in (1, 2):
        answer = server.post(
            "/compare?kind=crop", ("first", face_files[0]), ("second", face_files[other])
        ).json
        expected = embedder.compare(faces[0], faces[other], kind="crop")
        assert answer["similarity"] == pytest.approx(expected.similarity, abs=1e-6)
        assert answer["same_person"] is expected.verdict and answer["threshold"] == expected.threshold
        assert answer["threshold_from"] == expected.threshold_from and answer["statement"]
    given = server.post(
        "/compare?kind=crop&threshold=1", ("first", face_files[0]), ("second", face_files[2])
    ).json
    assert given["same_person"] is False and given["threshold_from"] == "given"


def test_search_names_who_is_enrolled_and_nobody_else(server, faces, face_files):
    answer = server.post("/search?kind=crop&k=2&threshold=0.999", *[("image", file) for file in face_files])
    names = [image["faces"][0]["name"] for image in answer.json["images"]]
    assert answer.status == 200 and names == ["Anna Ó", None, "Ben", None]
    best = answer.json["images"][2]["faces"][0]["candidates"]
    assert (
        [each["name"] for each in best] == ["Ben", "Anna Ó"]
        and best[0]["accepted"]
        and not best[1]["accepted"]
    )
    assert best[0]["similarity"] == pytest.approx(1, abs=1e-5)


def test_without_a_gallery_there_is_no_search(embedder, face_files):
    with served(build_app(embedder, LIMITS)) as client:
        assert client.post("/search", ("image", face_files[0])).status == 404
        assert "/search" not in client.get("/openapi.json").json["paths"]
        assert client.get("/about").json["gallery"] is False


def test_jpeg_and_webp_are_taken_too_whatever_the_client_calls_them(server, faces):
    for kind in ("JPEG", "WEBP"):
        assert server.post("/embed?kind=crop", ("image", encoded(faces[0], kind))).status == 200


@pytest.mark.parametrize(
    ("path", "parts", "status", "code"),
    [
        ("/embed", [], 422, "wrong_count"),
        ("/embed", [("picture", b"x")], 422, "unknown_field"),
        ("/embed", [("image", b"")], 422, "empty"),
        ("/embed", [("image", b"GIF89a" + bytes(100))], 415, "wrong_type"),
        ("/embed", [("image", b"%PDF-1.7")], 415, "wrong_type"),
        ("/embed", [("image", b"\x89PNG\r\n\x1a\n")], 422, "unreadable"),
        ("/embed", [("image", bytes(2 << 20))], 413, "too_large"),
        ("/embed", [("image", b"x")] * 9, 413, "too_many_images"),
        ("/embed?kind=cropp", [("image", b"x")], 422, "wrong_parameter"),
        ("/embed?knd=crop", [("image", b"x")], 422, "wrong_parameter"),
        ("/compare", [("first", b"x")], 422, "wrong_count"),
        ("/compare", [("first", b"x"), ("first", b"x")], 422, "wrong_count"),
        ("/compare?threshold=nan", [("first", b"x"), ("second", b"x")], 422, "wrong_parameter"),
        ("/compare?faces=all", [("first", b"x"), ("second", b"x")], 422, "wrong_parameter"),
        ("/search?k=0", [("image", b"x")], 422, "wrong_parameter"),
        ("/nothing", [("image", b"x")], 404, "no_such_route"),
    ],
)
def test_what_is_wrong_is_said(server, path, parts, status, code):
    answer = server.post(path, *parts)
    assert (answer.status, answer.json["code"]) == (status, code), answer.body
    assert answer.json["message"] and "marianne" not in answer.json["message"]


def test_a_body_that_is_no_form_or_ends_early(server, face_files):
    assert server.ask("POST", "/embed", b"{}", {"Content-Type": "application/json"}).status == 415
    assert server.ask("POST", "/embed", b"abc", {"Content-Type": "multipart/form-data"}).status == 415
    assert server.ask("POST", "/embed", b"", {}).status == 415
    body, headers = form(("image", face_files[0]))
    for part in (body[: len(body) // 2], body[10:], b"", body.replace(b"name=", b"nome=")):
        answer = server.ask("POST", "/embed?kind=crop", part, headers)
        assert answer.status == 422, (part[:80], answer.body)
    assert server.ask("PUT", "/embed").status == 405


def test_pixels_are_counted_before_anything_is_decoded(server, monkeypatch):
    from lrface.serve import app

    decoded = []
    monkeypatch.setattr(app, "decode_image", lambda *_: decoded.append(1))
    answer = server.post("/embed", ("image", encoded(np.zeros((1001, 1000, 3), np.uint8))))
    assert (answer.status, answer.json["code"]) == (413, "too_many_pixels") and not decoded
    assert "1000 x 1001" in answer.json["message"]


def test_a_body_without_length_is_counted_while_it_arrives(server):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = "POST /embed HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
        connection.sendall(f"{head}Content-Type: multipart/form-data; boundary=b\r\n\r\n".encode())
        start = b'--b\r\nContent-Disposition: form-data; name="image"\r\n\r\n'
        connection.sendall(f"{len(start):x}\r\n".encode() + start + b"\r\n")
        for _ in range(40):  # 2.5 MiB where 1 is allowed; it never ends
            connection.sendall(b"10000\r\n" + bytes(65536) + b"\r\n")
        connection.sendall(b"0\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_many_at_once_are_embedded_together(server, app, embedder, faces, face_files):
    before = numbers(server, "lrface_batch_images_count")[""], numbers(server, "lrface_batch_images_sum")[""]
    go = held(app)
    with ThreadPoolExecutor(24) as pool:
        answers = [
            pool.submit(server.post, "/embed?kind=crop", ("image", face_files[n % 4])) for n in range(24)
        ]
        while app.state.service.batcher.waiting < 25:
            time.sleep(0.01)
        assert numbers(server, "lrface_queue_images")[""] == 25
        go.set()
        expected = embedder.embed(faces, kind="crop").vectors
        for number, answer in enumerate(answers):
            found = answer.result(30).json["images"][0]["faces"][0]["vector"]
            np.testing.assert_allclose(found, expected[number % 4], atol=1e-6)
    count = numbers(server, "lrface_batch_images_count")[""] - before[0]
    assert numbers(server, "lrface_batch_images_sum")[""] - before[1] == 24 and count <= 3
    assert numbers(server, "lrface_queue_images")[""] == 0


def test_a_full_server_says_when_to_come_back_and_works_on(server, app, face_files):
    go = held(app)
    with ThreadPoolExecutor(40) as pool:
        answers = [
            pool.submit(server.post, "/embed?kind=crop", *[("image", face_files[0])] * 8) for _ in range(40)
        ]
        deadline = time.monotonic() + 20
        while sum(answer.done() for answer in answers) < 33 and time.monotonic() < deadline:
            time.sleep(0.01)
        refused = [answer.result() for answer in answers if answer.done()]
        assert server.get("/health").status == 200
        go.set()
        statuses = [answer.result(30).status for answer in answers]
    # 64 images have room, of which the held thread's call takes one: seven requests of eight.
    assert statuses.count(200) == 7 and statuses.count(503) == 33 and len(refused) == 33
    assert all(
        int(answer.headers["retry-after"]) >= 1 and answer.json["code"] == "busy" for answer in refused
    )
    assert server.post("/embed?kind=crop", ("image", face_files[0])).status == 200
    assert numbers(server, "lrface_refused_total")['{code="busy"}'] >= 33


def test_a_request_that_takes_too_long_is_answered(embedder, face_files):
    app = build_app(embedder, Limits(seconds=0.5))
    with served(app) as client:
        go = held(app)
        answer = client.post("/embed?kind=crop", ("image", face_files[0]))
        assert (answer.status, answer.json["code"]) == (504, "timeout")
        go.set()
        host, port = client.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as slow:
            head = "POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n"
            slow.sendall(f"{head}Content-Type: multipart/form-data; boundary=b\r\n\r\n--b".encode())
            assert slow.recv(4096).startswith(b"HTTP/1.1 408 ")
        assert client.post("/embed?kind=crop", ("image", face_files[0])).status == 200
        assert app.state.service.batcher.waiting == 0


def test_a_client_that_leaves_costs_nothing(server, app, face_files):
    body, headers = form(("image", face_files[0]))
    for sent in (body, body[:1000]):
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=30)
        connection.request("POST", "/embed?kind=crop", sent, {**headers, "Content-Length": str(len(body))})
        connection.close()
    assert server.post("/embed?kind=crop", ("image", face_files[0])).status == 200
    deadline = time.monotonic() + 20
    while numbers(server, "lrface_requests_in_work")[""] > 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert numbers(server, "lrface_requests_in_work")[""] == 1  # the question itself
    assert app.state.service.batcher.waiting == 0


def test_the_token_is_wanted_everywhere_but_for_health(embedder, face_files):
    with served(build_app(embedder, LIMITS, token=TOKEN)) as client:
        for path in ("/health", "/health/live", "/openapi.json"):
            assert client.get(path).status == 200
        for given in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": f"Basic {TOKEN}"},
            {"Authorization": "é"},
        ):
            for answer in (client.get("/metrics", **given), client.get("/about", **given)):
                assert answer.status == 401 and answer.headers["www-authenticate"] == "Bearer"
            answer = client.post("/embed?kind=crop", ("image", face_files[0]), **given)
            assert answer.status == 401 and TOKEN not in answer.body.decode()
        with_token = Client(client.url, {"Authorization": f"Bearer {TOKEN}"})
        assert with_token.post("/embed?kind=crop", ("image", face_files[0])).status == 200
        assert with_token.get("/metrics").status == 200


def test_another_site_cannot_ask_through_this_machines_browser(server, face_files):
    assert server.get("/health", Host="rebound.example:80").status == 403
    assert server.get("/health", Host="localhost:1").status == 200
    answer = server.post("/embed?kind=crop", ("image", face_files[0]), **{"Sec-Fetch-Site": "cross-site"})
    assert (answer.status, answer.json["code"]) == (403, "other_site")


_opened: list[str] = []
_watching = threading.Event()


def _watch(event, arguments):
    if _watching.is_set() and event == "open":
        path, mode, flags = arguments
        writes = isinstance(mode, str) and any(each in mode for each in "wax+")
        if writes or (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            _opened.append(str(path))
    elif _watching.is_set() and event in ("tempfile.mkstemp", "tempfile.mkdtemp", "os.mkdir"):
        _opened.append(f"{event} {arguments}")


def test_no_image_is_stored_or_logged(server, faces, caplog, tmp_path, monkeypatch):
    """Nothing is opened for writing from the first byte to the answer, and the log knows routes and numbers only."""
    monkeypatch.chdir(tmp_path)
    sys.addaudithook(_watch)  # it cannot be taken away again, only told to look aside
    noise = np.random.default_rng(0).integers(0, 256, (500, 500, 3)).astype(np.uint8)
    caplog.set_level(logging.DEBUG)
    logging.getLogger("lrface.serve").setLevel(logging.DEBUG)
    parts = [("image", encoded(noise))]  # 750 kB: a spooled file would go to the disk
    _watching.set()
    try:
        (tmp_path / "seen").touch()  # the watch itself works
        statuses = [
            server.post("/embed?kind=crop", *parts).status,
            server.post("/embed?kind=crop&faces=marianne", *parts).status,
            server.post("/embed?kind=crop", ("image", parts[0][1][:-300])).status,
            server.post("/marianne", *parts).status,
            server.post("/search?kind=crop", *parts).status,
        ]
    finally:
        _watching.clear()
    assert statuses == [200, 422, 422, 404, 200]
    assert [os.path.basename(path) for path in _opened] == ["seen"]
    assert [path.name for path in tmp_path.iterdir()] == ["seen"]
    said = [record.getMessage() for record in caplog.records if record.name.startswith(("lrface", "uvicorn"))]
    assert len([line for line in said if line.startswith("POST")]) == 5
    assert all(re.fullmatch(r"(GET|POST) (/[a-z/]*|other) \d{3} \d+ ms", line) for line in said), said


def test_answers_forbid_keeping_and_framing(server, face_files):
    for answer in (server.post("/embed?kind=crop", ("image", face_files[0])), server.get("/nothing")):
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-security-policy"].startswith("default-src 'self'")


def test_the_document_names_every_answer(server):
    document = server.get("/openapi.json").json
    assert document["openapi"].startswith("3.")
    for path in ("/embed", "/compare", "/search"):
        operation = document["paths"][path]["post"]
        assert (
            operation["requestBody"]["content"]["multipart/form-data"]["schema"]["additionalProperties"]
            is False
        )
        assert set(operation["responses"]) == {"200", "401", "403", "408", "413", "415", "422", "503", "504"}
        for status, response in operation["responses"].items():
            schema = response["content"]["application/json"]["schema"]
            assert ("Problem" in schema["$ref"]) is (status != "200")
    assert "docs" not in json.dumps(document["paths"])
    assert server.get("/docs").status == 404  # it would ask other hosts for its scripts


def test_metrics_are_prometheus(server, face_files):
    before = numbers(server, "lrface_requests_total").get('{route="/embed",status="200"}', 0)
    server.post("/embed?kind=crop", ("image", face_files[0]))
    after = server.get("/metrics")
    assert after.headers["content-type"].startswith("text/plain")
    assert numbers(server, "lrface_requests_total")['{route="/embed",status="200"}'] == before + 1
    for name in (
        "lrface_request_seconds_bucket",
        "lrface_batch_seconds_count",
        "process_resident_memory_bytes",
    ):
        assert numbers(server, name), name


def test_an_error_of_the_server_itself_is_told_without_what_was_sent(
    embedder, face_files, monkeypatch, caplog
):
    app = build_app(embedder, LIMITS)
    with served(app) as client:
        logging.getLogger("lrface.serve").propagate = True
        sent = "".join(("mari", "anne"))  # not in the lines of code that a traceback shows

        def broken(*_, **__):
            raise RuntimeError(sent)

        monkeypatch.setattr(app.state.service.batcher, "found", broken)
        answer = client.post("/embed?kind=crop", ("image", face_files[0]))
        assert (answer.status, answer.json["code"]) == (500, "internal")
        assert "marianne" not in answer.body.decode() + caplog.text and "RuntimeError" in caplog.text
        monkeypatch.undo()
        assert client.post("/embed?kind=crop", ("image", face_files[0])).status == 200
