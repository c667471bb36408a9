"""What a server takes at most, who may ask, and the answers to requests that it does not take."""

import hmac
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lrface.errors import LrfaceError, UsageError

TOKEN_VARIABLE = "LRFACE_TOKEN"
SHORTEST_TOKEN = 16
PIXELS_TOGETHER = 8
"""Decoded pixels in memory at once, in photographs of the largest size that is taken."""


@dataclass(frozen=True)
class Limits:
    """What a server takes at most.

    Attributes:
        batch: images embedded together.
        wait: seconds that a first image waits for others to be embedded with; nobody waits while the network is busy.
        queue: images decoded, waiting and being embedded; above that a request is answered 503.
        requests: requests in work, from their first byte on; above that 503.
        upload: bytes of the body of a request; above that 413.
        images: images of one request; above that 413.
        pixels: of one image, by its header, before anything is decoded; above that 413.
        seconds: for a request; 408 where its body has not arrived by then, 504 where the answer is not there.
    """

    batch: int = 32
    wait: float = 0.005
    queue: int = 256
    requests: int = 128
    upload: int = 16 << 20
    images: int = 16
    pixels: int = 24_000_000
    seconds: float = 30.0

    def __post_init__(self) -> None:
        for name, least in (
            ("batch", 1),
            ("requests", 1),
            ("upload", 1024),
            ("images", 2),
            ("pixels", 112 * 112),
        ):
            if getattr(self, name) < least:
                raise UsageError(f"the limit {name} must be at least {least}; found {getattr(self, name)}")
        if self.queue < self.images:
            raise UsageError(
                f"the queue must hold the images of a request: {self.images}; found {self.queue}"
            )
        if not (0 <= self.wait <= 1 and 0 < self.seconds < math.inf):
            raise UsageError(
                f"the wait lies between 0 and 1 s and the time of a request above 0; found {self.wait} and {self.seconds}"
            )


class Refused(Exception):
    """A request that gets no answer of its kind.

    Attributes:
        status: of HTTP.
        code: a short word for programs.
        message: what was found and what to do; it never repeats what was sent.
        retry_after: seconds, where the same request may work later.
    """

    def __init__(self, status: int, code: str, message: str, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.code, self.message, self.retry_after = status, code, message, retry_after

    @property
    def headers(self) -> dict[str, str]:
        found = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        return {**found, "www-authenticate": "Bearer"} if self.status == 401 else found


def read_token(file: str | Path | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """The token of a file, else of $LRFACE_TOKEN, else None.

    Raises:
        LrfaceError: a file that cannot be read.
        UsageError: a token of fewer than 16 characters, or of others than printable ASCII without spaces.
    """
    where = f"${TOKEN_VARIABLE}"
    token = environment.get(TOKEN_VARIABLE)
    if file is not None:
        where = str(file)
        try:
            token = Path(file).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a text file"
            raise LrfaceError(f"the token file {file} cannot be read: {reason}") from error
    if token is None:
        return None
    if len(token) < SHORTEST_TOKEN or not all("!" <= character <= "~" for character in token):
        raise UsageError(
            f"{where}: a token has at least {SHORTEST_TOKEN} printable characters without spaces; make one with: "
            "openssl rand -hex 32"
        )
    return token


def check_token(token: str | None, authorization: str | None) -> None:
    """Raises Refused (401) unless the header ``Authorization`` bears the token; compared in constant time."""
    if token is None:
        return
    scheme, _, given = (authorization or "").partition(" ")
    same = hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), token.encode())
    if scheme.lower() != "bearer" or not same:
        found = "another one was sent" if authorization else "none was sent"
        raise Refused(
            401, "unauthorised", f"this server wants its token (Authorization: Bearer TOKEN); {found}"
        )
