"""A model behind HTTP, and the page of `lrface ui`: on this machine unless told otherwise, and nothing is kept.

Uploads are read into memory, decoded, embedded in batches across requests, and forgotten; no image is written
anywhere, and the log holds methods, routes, statuses and times only. One process serves: the network takes the cores
itself. TLS is a matter of the proxy in front.
"""

import asyncio
import contextlib
import errno
import importlib
import logging
import os
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lrface.errors import LrfaceError, UsageError
from lrface.serve.limits import Limits, read_token

if TYPE_CHECKING:
    from fastapi import FastAPI

    from lrface.embed import FaceEmbedder

__all__ = ["Limits", "run"]

HERE = frozenset(("localhost", "127.0.0.1", "[::1]"))
_PACKAGES = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")


def run(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token_file: str | Path | None = None,
    anyone: bool = False,
    gallery: str | Path | None = None,
    gallery_uri: str | None = None,
    page: bool = False,
    limits: Limits | None = None,
    ready: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> None:
    """Serve a model until SIGTERM or Ctrl-C, then finish what is in work and return.

    Args:
        model: as command lines name it, see :func:`lrface.embed.open_model`.
        host: an address of this machine. Any but a loopback address needs a token, or ``anyone``.
        port: 0 takes a free one.
        token_file: a file with the token that requests must bear; None takes $LRFACE_TOKEN, and where that is not set
            there is none.
        anyone: serve another address than loopback without a token.
        gallery: a folder of `lrface gallery`, which /search looks in; with ``gallery_uri`` a collection of Milvus.
        page: also the page of `lrface ui`.
        ready: called with the server's address, as "http://127.0.0.1:8000", when it answers.
        options: those of :func:`lrface.embed.load_embedder`.

    Raises:
        UsageError: an address that needs a token, or a token that is none.
        LrfaceError: a missing package, a model that cannot be loaded, a token file that cannot be read, a port in use.
    """
    _check_packages()
    from lrface.serve.app import build_app

    limits = limits or Limits()
    token = read_token(token_file)
    listening = _listen(host, port)
    try:
        loopback = listening.getsockname()[0].split("%")[0] in ("127.0.0.1", "::1")
        if not (loopback or token or anyone):
            raise UsageError(
                f"{host} can be reached by other machines: give a token (--token-file FILE or $LRFACE_TOKEN), or "
                "--anyone to serve whoever asks"
            )
        hosts = HERE if loopback and token is None else None
        embedder, no_reconstruction = _open(model, page, options)
        with contextlib.ExitStack() as stack:
            people = None
            if gallery is not None:
                from lrface.gallery import Gallery

                backend = "folder" if gallery_uri is None else "milvus"
                people = stack.enter_context(
                    Gallery.open(gallery, embedder, backend=backend, uri=gallery_uri)
                )
                people.names()  # read now: what is damaged is said before anybody asks
            _log_to_stderr()
            app = build_app(
                embedder,
                limits,
                token=token,
                hosts=hosts,
                gallery=people,
                page=page,
                no_reconstruction=no_reconstruction,
            )
            _warm(embedder)
            address, number = listening.getsockname()[:2]
            url = f"http://{f'[{address}]' if ':' in address else address}:{number}"
            asyncio.run(uvicorn_server(app, limits, lambda: ready(url)).serve([listening]))
    finally:
        listening.close()


def _open(model: str, page: bool, options: dict[str, Any]) -> "tuple[FaceEmbedder, str | None]":
    """The embedder, for the page with its decoder, and why it has none."""
    from lrface.embed import open_model

    reason = None
    if page:
        try:
            return open_model(model, **{**options, "quality": "reconstruction"}), None
        except LrfaceError as error:
            reason = str(error)
    return open_model(model, **options), reason


def _warm(embedder: "FaceEmbedder") -> None:
    """What is loaded at first use is loaded now: a server that says it is ready answers at once."""
    size = embedder.input_size
    embedder.embed(np.full((size, size, 3), 127, np.uint8), kind="crop")
    embedder.detector.detect([np.full((160, 160, 3), 127, np.uint8)])
    _ = embedder.model_sha256


def uvicorn_server(app: "FastAPI", limits: Limits, ready: Callable[[], None] = lambda: None) -> Any:
    """The ``uvicorn.Server`` that serves an application; its ``serve(sockets)`` ends in good order on SIGTERM and SIGINT.

    Args:
        ready: called when it answers.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            # As uvicorn does, without sending itself the signal again afterwards: stopping when told is no failure.
            if threading.current_thread() is not threading.main_thread():
                yield
                return
            signals = (signal.SIGINT, signal.SIGTERM)
            before = {each: signal.signal(each, self.handle_exit) for each in signals}
            try:
                yield
            finally:
                for each, handler in before.items():
                    signal.signal(each, handler)

    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=int(limits.seconds) + 5,
        # Connections, idle ones with them: each costs a descriptor.
        limit_concurrency=max(1000, 2 * limits.requests),
        lifespan="on",
    )
    # uvicorn's own lines would hold what the client asked for, parameters with it.
    logging.getLogger("uvicorn.access").disabled = True
    # What is odd in an uploaded file is judged by decoding it; here once, for warning filters belong to no thread.
    warnings.filterwarnings("ignore", module="PIL")
    return Server(config)


def _check_packages() -> None:
    for name in _PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise LrfaceError(
                f"serving needs the package {name}, which cannot be imported ({error}): pip install 'lrface[serve]'"
            ) from error


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise UsageError(f"a port lies between 0 and 65535; found {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"host {host!r} is no address of this machine: {error}") from error
    try:
        if os.name == "posix":  # take the port of a server that has just ended
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise LrfaceError(
                f"port {port} of {host} is in use by another process; choose another with --port (0: any free one)"
            ) from error
        raise LrfaceError(f"cannot serve on {host}, port {port}: {error.strerror or error}") from error
    return listening


def _log_to_stderr() -> None:
    for name, level in (("lrface.serve", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.propagate = False
        if not logger.handlers:
            handler = logging.StreamHandler(sys.stderr)
            handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
            logger.addHandler(handler)
