"""A request to the reverse proxy: its headers, its body as it comes, and how it is refused.

Nothing of a request is kept but the headers that Flower uses.
"""

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress

from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive

from fedforward.deployment.flower import site_auth

#: Bytes and seconds of a refused request's body: read, so that a site also reads the answer.
REST_BYTES, REST_TIMEOUT_S = 1 << 16, 2.0
#: Headers of a request that pass to the engine.
REQUEST_HEADERS = frozenset(
    {
        "accept",
        "content-length",
        "content-type",
        "flwr-component-name",
        "flwr-package-name",
        "flwr-package-version",
        site_auth.PUBLIC_KEY,
        site_auth.SIGNATURE,
        site_auth.TIMESTAMP,
    }
)


class RefusedError(Exception):
    """A request that is not handed on."""

    def __init__(self, answer: Response) -> None:
        self.answer = answer
        # The rest of the body is not waited for.
        answer.headers["connection"] = "close"

    @classmethod
    def because(cls, status: int, words: str) -> "RefusedError":
        """With a sentence for people."""
        return cls(PlainTextResponse(f"fedforward: {words}\n", status))


class Body:
    """A request's body as it comes.

    Attributes:
        more: whether there is more of it.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.more = True

    async def part(self, timeout_s: float) -> bytes:
        """The next part.

        Raises:
            ClientDisconnect: it broke off.
            TimeoutError: it did not come in time.
        """
        async with asyncio.timeout(timeout_s):
            message = await self._receive()
        if message["type"] != "http.request":
            raise ClientDisconnect
        self.more = message.get("more_body", False)
        return bytes(message.get("body", b""))

    async def disconnected(self) -> None:
        """Wait until the other side is gone; the body must have been read to its end."""
        while (await self._receive())["type"] != "http.disconnect":
            continue

    async def skip(self) -> None:
        """Read a little of what is left: who is still writing does not read an answer."""
        left, last = REST_BYTES, time.monotonic() + REST_TIMEOUT_S
        with suppress(TimeoutError):
            while self.more and left > 0:
                left -= len(await self.part(last - time.monotonic()))


def read_headers(request: Request) -> dict[str, str]:
    """The headers that pass to the engine.

    Raises:
        RefusedError: one is there twice, of which the engine might take the other, or something
            has a form that Flower's sites do not use.
    """
    found: dict[str, str] = {}
    for raw, value in request.scope["headers"]:
        name = raw.decode("latin-1")
        if name == "transfer-encoding":
            raise RefusedError.because(411, "the length of the request is missing")
        if name not in REQUEST_HEADERS:
            continue
        if name in found or not value.isascii():
            raise RefusedError.because(400, f"{name} is there twice, or is not ASCII")
        found[name] = value.decode("latin-1")
    return found


def read_size(headers: Mapping[str, str]) -> int:
    """Bytes of a request's body.

    Raises:
        RefusedError: it does not say.
    """
    if "content-length" not in headers:
        raise RefusedError.because(411, "the length of the request is missing")
    return int(headers["content-length"])
