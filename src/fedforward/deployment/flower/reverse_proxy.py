"""The only door from outside: what sites need of the engine passes, everything else does not.

Flower serves sites, operators and app processes on one port, and the operators' part has no
password: whoever reaches the port could register a key or submit code to be run. So the engine
listens on the loopback device alone, and this gate hands on the sites' part (`/v1/fleet/`). Who a
site is, is still proven to the engine by its key in every request.
"""

import asyncio
import ssl
import threading
import time
from contextlib import suppress
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from fedforward.core.errors import FedForwardError

#: What passes.
SITES = "/v1/fleet/"
#: Bytes that a request may have: a snapshot of an adapter, with room.
LARGEST = 1 << 30
#: Bytes of all unfinished requests together: whoever reaches the port can begin one.
MOST_HELD = 2 << 30
_OWN_HOP = {"host", "connection", "keep-alive", "transfer-encoding", "content-length", "upgrade"}
#: Seconds for the gate to open, and for the engine to answer.
PATIENCE = 60.0
#: Seconds that a request waits while the server is being started.
HOLD = 4.0


class Gate:
    """A server in a thread.

    Attributes:
        received: bytes of requests' bodies that passed.
        sent: bytes of the answers' bodies.
        turned_away: requests for what is not the sites' part.
        ready: whether the engine knows the sites' keys. Before that sites wait, and are then asked
            to try again, since the engine would tell them that they are not let in.
    """

    def __init__(
        self,
        host: str,
        port: int,
        engine: str,
        trust: ssl.SSLContext | None,
        certificate: tuple[str, str] | None,
    ) -> None:
        """Listen on `host` and `port` and hand on to `engine`, a URL.

        Args:
            trust: what the engine's certificate is checked with; None if it has none.
            certificate: files of the gate's certificate and key; None is plaintext.
        """
        self.received = self.sent = self.turned_away = 0
        self.ready = False
        self._held = 0
        self._client = httpx.AsyncClient(
            base_url=engine, verify=trust or False, timeout=PATIENCE, trust_env=False
        )
        app = Starlette(
            routes=[Route("/{path:path}", self._pass, methods=["GET", "POST"])],
        )
        options: dict[str, Any] = {}
        if certificate is not None:
            options = {"ssl_certfile": certificate[0], "ssl_keyfile": certificate[1]}
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                ws="none",
                log_level="error",
                access_log=False,
                server_header=False,
                timeout_keep_alive=30,
                **options,
            )
        )
        self._where = f"{host}:{port}"
        self._thread = threading.Thread(target=self._serve, name="gate", daemon=True)

    def open(self) -> None:
        """Begin to listen.

        Raises:
            FedForwardError: the address cannot be had.
        """
        self._thread.start()
        last = time.monotonic() + PATIENCE
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > last:
                raise FedForwardError(
                    f"--listen {self._where}: the address cannot be listened on. It may be in use, "
                    "or not be this machine's."
                )
            time.sleep(0.05)

    def _serve(self) -> None:
        # An address that cannot be had ends the thread, which `open` then finds.
        with suppress(SystemExit):
            self._server.run()

    def close(self) -> None:
        """Stop listening."""
        self._server.should_exit = True
        self._thread.join(5.0)

    async def _pass(self, request: Request) -> Response:
        path = request.url.path
        if request.method != "POST" or not path.startswith(SITES) or ".." in path:
            self.turned_away += 1
            return PlainTextResponse("fedforward: only sites are served here\n", 404)
        last = time.monotonic() + HOLD
        while not self.ready and time.monotonic() < last:
            await asyncio.sleep(0.1)
        if not self.ready:
            return PlainTextResponse("fedforward: the server is being started\n", 503)
        parts: list[bytes] = []
        size = 0
        try:
            async for part in request.stream():
                size += len(part)
                self._held += len(part)
                if size > LARGEST or self._held > MOST_HELD:
                    return PlainTextResponse("fedforward: too much at once\n", 413)
                parts.append(part)
            return await self._hand_on(request, b"".join(parts))
        except ClientDisconnect:
            return PlainTextResponse("fedforward: the request broke off\n", 400)
        finally:
            self._held -= size

    async def _hand_on(self, request: Request, body: bytes) -> Response:
        self.received += len(body)
        headers = {k: v for k, v in request.headers.items() if k.lower() not in _OWN_HOP}
        try:
            answer = await self._client.post(request.url.path, content=body, headers=headers)
        except httpx.HTTPError:
            return PlainTextResponse("fedforward: the engine is being started again\n", 503)
        self.sent += len(answer.content)
        kept = {
            k: v
            for k, v in answer.headers.items()
            if k.lower() not in _OWN_HOP | {"content-encoding", "server", "date"}
        }
        return Response(answer.content, answer.status_code, kept)
