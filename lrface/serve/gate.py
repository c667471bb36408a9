"""What every request passes: who asks, how much is in work, what is logged and counted of it."""

import asyncio
import logging
import time
import traceback
from contextlib import suppress
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lrface.errors import LrfaceError
from lrface.serve.limits import Limits, Refused, check_token
from lrface.serve.metrics import Metrics

log = logging.getLogger("lrface.serve")

DEADLINE = "lrface.deadline"
"""Key of a request's scope: when its time is over, of time.monotonic()."""

METHODS = frozenset(("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"))
HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
_DRAIN_SECONDS = 5.0
_GONE = 499  # the client left before its answer; as nginx logs it


def problem(refused: Refused) -> JSONResponse:
    """The answer to a refused request, as the schema ``Problem`` describes it."""
    content = {"code": refused.code, "message": refused.message}
    return JSONResponse(content, refused.status, headers=refused.headers)


class Gate:
    """Middleware around the application.

    Args:
        open_paths: answered without a token.
        hosts: names under which the server may be asked; None for any. A server without a token is asked by this
            machine only, and not by a page of another site in this machine's browser, whatever name that site's
            address has.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        metrics: Metrics,
        token: str | None,
        open_paths: frozenset[str],
        hosts: frozenset[str] | None,
    ):
        self._app, self._limits, self._metrics = app, limits, metrics
        self._token, self._open_paths, self._hosts = token, open_paths, hosts
        self._in_work = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        scope[DEADLINE] = started + self._limits.seconds
        request = _Exchange(scope, receive, send, 4 * self._limits.upload)
        counted = False
        try:
            self._admit(scope, Headers(scope=scope))
            self._in_work += 1
            counted = True
            self._metrics.in_work(self._in_work)
            await self._app(scope, request.receive, request.send)
        except Refused as refused:
            self._metrics.refused(refused.code)
            await problem(refused)(scope, request.receive, request.send)
        except ClientDisconnect:
            request.status = _GONE
        except Exception as error:
            # The place, and no message but lrface's own: another may repeat what was sent.
            said = f": {error}" if isinstance(error, LrfaceError) else ""
            places = "".join(traceback.format_tb(error.__traceback__))
            log.error("%s%s\n%s", type(error).__name__, said, places)
            if not request.status:
                failed = Refused(500, "internal", "the server failed; its log says where")
                await problem(failed)(scope, request.receive, request.send)
        finally:
            if counted:
                self._in_work -= 1
                self._metrics.in_work(self._in_work)
            seconds = time.monotonic() - started
            # Only what the server itself knows: a path that it does not have is not repeated.
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in METHODS else "other"
            status = request.status or _GONE
            self._metrics.request(route, status, seconds)
            log.info("%s %s %d %.0f ms", method, route, status, seconds * 1000)

    def _admit(self, scope: Scope, headers: Headers) -> None:
        if self._hosts is not None:
            host = (
                headers.get("host", "").rsplit(":", 1)[0] if "]" not in headers.get("host", "") else "[::1]"
            )
            if host not in self._hosts or headers.get("sec-fetch-site") == "cross-site":
                raise Refused(
                    403, "other_site", "this server answers this machine only, and no page of another site"
                )
        if scope["path"] not in self._open_paths:
            check_token(self._token, headers.get("authorization"))
            if self._in_work >= self._limits.requests:
                raise Refused(
                    503, "busy", f"{self._in_work} requests are in work; try again in 1 s", retry_after=1
                )


class _Exchange:
    """One request's messages, with what is known of them."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, drain: int):
        self._receive, self._send, self._drain = receive, send, drain
        self._expects = "expect" in Headers(scope=scope)
        self._body_read = False
        self.status = 0

    async def receive(self) -> Message:
        message = await self._receive()
        if not message.get("more_body", False):
            self._body_read = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
            slow = self.status == 408  # nothing will come
            if self.status >= 400 and not (self._body_read or self._expects or slow):
                await self._read_rest()
        await self._send(message)

    async def _read_rest(self) -> None:
        """A connection closed on a client that still sends loses the answer: what comes is read away, within
        reason."""
        left: Any = self._drain
        with suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_SECONDS):
                while not self._body_read and left > 0:
                    left -= len((await self.receive()).get("body", b""))
