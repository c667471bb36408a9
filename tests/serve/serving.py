"""A real server in a thread of the test process, and questions to it."""

import http.client
import io
import json
import socket
import threading
import uuid
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def form(*parts: tuple[str, bytes], boundary: str | None = None) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a multipart form."""
    boundary = boundary or uuid.uuid4().hex
    body = b""
    for name, content in parts:
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="marianne.jpg"\r\n'
        body += head.encode() + b"Content-Type: image/jpeg\r\n\r\n" + content + b"\r\n"
    return body + f"--{boundary}--\r\n".encode(), {
        "Content-Type": f"multipart/form-data; boundary={boundary}"
    }


@dataclass
class Client:
    """Asks a server at ``url``, each question on a connection of its own."""

    url: str
    headers: dict[str, str] = field(default_factory=dict)

    def ask(self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> Answer:
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=60)
        try:
            connection.request(method, path, body or None, {**self.headers, **(headers or {})})
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, headers=headers)

    def post(self, path: str, *parts: tuple[str, bytes], **headers: str) -> Answer:
        body, own = form(*parts)
        return self.ask("POST", path, body, {**own, **headers})


@contextmanager
def served(app):
    """The application behind uvicorn on a free port, as `lrface serve` runs it; gives a :class:`Client`."""
    from lrface.serve import uvicorn_server

    listening = socket.create_server(("127.0.0.1", 0))
    started = threading.Event()
    server = uvicorn_server(app, app.state.service.limits, started.set)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        while not started.wait(0.1):
            assert thread.is_alive(), "the server did not start"
        yield Client(f"http://127.0.0.1:{listening.getsockname()[1]}")
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive(), "the server did not stop"


def encoded(image: np.ndarray, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, form, **options)
    return file.getvalue()
