"""The reverse proxy before the engine: what sites need passes, everything else does not.

Flower serves sites, operators and app processes on one port, and the operators' part has no
password: whoever reaches the port could register a key or submit code to be run. So the engine
listens on the loopback device alone, and this proxy hands on the sites' part (`/v1/fleet/`). Who a
site is, is proven by its key in every request: here before a body is read, and to the engine.
`connections` has the bounds before that. Bodies are handed on in pieces and never kept, but for a
site's question for a message, which `held_pulls` holds until there is one.
"""

import asyncio
import logging
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager, nullcontext
from typing import Any

import httpx
import uvicorn
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from fedforward.core.errors import FedForwardError
from fedforward.deployment.flower import connections, held_pulls, site_auth
from fedforward.deployment.flower.held_pulls import HeldPulls
from fedforward.deployment.flower.requests import Body, RefusedError, read_headers, read_size
from fedforward.deployment.flower.site_auth import ROUTES, SITES_PATH, PublicKeys

LOGGER = logging.getLogger("fedforward.deployment.server")
#: Bytes that a request may have: a snapshot of an adapter, with room.
MAX_BYTES = 1 << 30
#: Bytes of all unfinished requests together: the engine keeps them in memory.
MAX_BYTES_TOGETHER = 2 << 30
#: Bytes from which a request is a big one; big ones and all of one site at a time.
BIG_BYTES, MAX_BIG, MAX_REQUESTS = 8 << 20, 2, 32
#: Seconds for a body to come: some, and one more for so many bytes.
BODY_TIMEOUT_S, BODY_RATE = 20.0, 8 << 10
#: Headers of an answer that pass back.
ANSWER_HEADERS = frozenset(
    {"content-length", "content-type", "flwr-version-incompatibility-message"}
)
_TRY_AGAIN = "too much at a time; try again"
_RESTARTED = "the engine is being started again"
_JSON = "application/json"
_ONLY_SITES = "fedforward: only sites are served here\n"
#: Seconds for the proxy to open, and for the engine to answer.
TIMEOUT_S = 60.0
#: Seconds that a request waits while the server is being started.
START_TIMEOUT_S = 4.0
#: Seconds after which an idle connection to the engine is not used again; it closes it after 5 s.
_ENGINE_KEEP_ALIVE_S = 3.0


class ReverseProxy:
    """A server in a thread.

    Attributes:
        received: bytes of requests' bodies that passed.
        sent: bytes of the answers' bodies.
        refused: requests for what is not the sites' part, or of who is not let in.
        bytes_open: of requests that are being handed on.
        ready: whether the engine knows the sites' keys. Before that sites wait, and are then asked
            to try again, since the engine would tell them that they are not let in.
        keys: of the sites that are let in; None lets in all.
    """

    def __init__(
        self,
        host: str,
        port: int,
        engine: str,
        trust: ssl.SSLContext | None,
        certificate: tuple[str, str] | None,
        keys: PublicKeys | None = None,
        held: HeldPulls | None = None,
    ) -> None:
        """Listen on `host` and `port` and hand on to `engine`, a URL.

        Args:
            trust: what the engine's certificate is checked with; None if it has none.
            certificate: files of the proxy's certificate and key; None is plaintext.
            keys: see the class.
            held: holds questions for messages; without it the engine answers them at once.
        """
        self.held = held
        self.received = self.sent = self.refused = 0
        self.ready = False
        self.keys = keys
        self.bytes_open = 0
        self._requests: Counter[str] = Counter()
        self._big: Counter[str] = Counter()
        most, to_engine = connections.connection_limits()
        self.connections = connections.ConnectionCount(most)
        if held is not None:
            held.transferred = lambda: self.connections.transferred
        self._client = httpx.AsyncClient(
            base_url=engine,
            verify=trust or False,
            timeout=TIMEOUT_S,
            trust_env=False,
            headers={"accept-encoding": "identity", "user-agent": "fedforward"},
            limits=httpx.Limits(max_connections=to_engine, keepalive_expiry=_ENGINE_KEEP_ALIVE_S),
        )
        self._server = uvicorn.Server(self._configured(certificate))
        self._address = host, port
        self._thread: threading.Thread | None = None

    def _configured(self, certificate: tuple[str, str] | None) -> uvicorn.Config:
        options: dict[str, Any] = {}
        if certificate is not None:
            options = {"ssl_certfile": certificate[0], "ssl_keyfile": certificate[1]}
        return uvicorn.Config(
            self._serve_request,
            http=connections.BoundedProtocol,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_level="critical",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=connections.KEEP_ALIVE_S,
            timeout_graceful_shutdown=1,
            **options,
        )

    def open(self) -> None:
        """Begin to listen.

        Raises:
            FedForwardError: the address cannot be had.
        """
        host, port = self._address
        try:
            listeners = connections.listen(host, port, self.connections)
        except OSError as error:
            raise FedForwardError(
                f"--listen {host}:{port}: the address cannot be listened on. It may be in use, "
                "or not be this machine's."
            ) from error
        self._thread = threading.Thread(
            target=self._run, args=(listeners,), name="reverse proxy", daemon=True
        )
        self._thread.start()
        last = time.monotonic() + TIMEOUT_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > last:
                raise FedForwardError(f"--listen {host}:{port}: the reverse proxy did not start.")
            time.sleep(0.05)

    def _run(self, listeners: Sequence[socket.socket]) -> None:
        async def serve() -> None:
            async with self._client:
                await self._server.serve(sockets=list(listeners))

        with asyncio.Runner(loop_factory=connections.Loop) as runner:
            runner.run(serve())

    def close(self) -> None:
        """Stop listening."""
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join(5.0)

    async def _serve_request(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, body = Request(scope, receive), Body(receive)
        try:
            async with AsyncExitStack() as stack:
                try:
                    answer = await self._answer(request, body, stack)
                except RefusedError as refused:
                    await body.skip()
                    answer = refused.answer
                await answer(scope, receive, send)
        except (ClientDisconnect, asyncio.CancelledError):
            # Of a server that ends, a site must see no answer: after an error 500 its SuperNode
            # would end as well.
            request.state.abort()
        except Exception as error:
            LOGGER.warning(f"the reverse proxy could not answer a request: {error!r}")
            request.state.abort()

    async def _answer(self, request: Request, body: Body, stack: AsyncExitStack) -> Response:
        """Hand on a request that passes all the checks; `stack` is left when it was answered.

        Raises:
            RefusedError: it does not.
        """
        path = request.scope["raw_path"].decode("ascii")
        # A site that cannot connect asks for the folder, to find out whether it is too early.
        known = path in ROUTES or path == SITES_PATH
        if request.method != "POST" or request.scope["query_string"] or not known:
            raise self._stranger(PlainTextResponse(_ONLY_SITES, 404))
        headers = read_headers(request)
        await self._wait_until_ready()
        if path == SITES_PATH:
            raise self._stranger(PlainTextResponse(_ONLY_SITES, 404))
        if self.keys is not None and (why := site_auth.refusal(path, headers, self.keys)):
            raise self._stranger(Response(why.content, why.status, media_type=_JSON))
        owner = headers.get(site_auth.PUBLIC_KEY) or (request.client.host if request.client else "")
        size = read_size(headers)
        if self.held is not None:
            self.held.note(path, owner)
        stack.enter_context(_counted(self._requests, owner, MAX_REQUESTS))
        with self._room(owner, size):
            if self.held is not None and path == held_pulls.PULL and size <= held_pulls.MAX_BYTES:
                return await self._hold(owner, headers, body, size)
            return await self._hand_on(request, path, headers, self._parts(body, size), stack)

    def _stranger(self, answer: Response) -> RefusedError:
        self.refused += 1
        return RefusedError(answer)

    async def _wait_until_ready(self) -> None:
        last = time.monotonic() + START_TIMEOUT_S
        while not self.ready:
            if time.monotonic() > last:
                raise RefusedError.because(503, "the server is being started")
            await asyncio.sleep(0.1)

    @contextmanager
    def _room(self, owner: str, size: int) -> Iterator[None]:
        """Count a request's bytes until the engine has answered.

        Raises:
            RefusedError: they are too many.
        """
        if size > min(MAX_BYTES, MAX_BYTES_TOGETHER):
            raise RefusedError.because(413, "too much at once")
        if self.bytes_open + size > MAX_BYTES_TOGETHER:
            raise RefusedError.because(503, _TRY_AGAIN)
        with _counted(self._big, owner, MAX_BIG) if size >= BIG_BYTES else nullcontext():
            self.bytes_open += size
            try:
                yield
            finally:
                self.bytes_open -= size

    async def _hold(
        self, owner: str, headers: Mapping[str, str], body: Body, size: int
    ) -> Response:
        assert self.held is not None
        content = await held_pulls.whole(self._parts(body, size))

        async def ask() -> Response:
            # The key may have been taken away meanwhile.
            if self.keys is not None and (
                why := site_auth.refusal(held_pulls.PULL, headers, self.keys)
            ):
                raise self._stranger(Response(why.content, why.status, media_type=_JSON))
            try:
                answer = await self._client.post(held_pulls.PULL, headers=headers, content=content)
            except httpx.HTTPError:
                raise RefusedError.because(503, _RESTARTED) from None
            return Response(answer.content, answer.status_code, _kept(answer))

        left_s = held_pulls.HOLD_S if self.keys is None else site_auth.seconds_left(headers)
        answer = await self.held.answer(owner, body, ask, left_s)
        self.sent += len(answer.body)
        return answer

    async def _hand_on(
        self,
        request: Request,
        path: str,
        headers: Mapping[str, str],
        content: AsyncIterator[bytes],
        stack: AsyncExitStack,
    ) -> Response:
        asked = self._client.build_request("POST", path, headers=headers, content=content)
        try:
            answer = await self._client.send(asked, stream=True)
        except httpx.HTTPError:
            raise RefusedError.because(503, _RESTARTED) from None
        stack.push_async_callback(answer.aclose)
        content = self._content(request, answer)
        return StreamingResponse(content, answer.status_code, _kept(answer))

    async def _parts(self, body: Body, size: int) -> AsyncIterator[bytes]:
        """A request's body as it comes.

        Raises:
            RefusedError: it comes too slowly.
            ClientDisconnect: it broke off.
        """
        came, waited_s = 0, 0.0
        while came < size:
            # What the engine needs to take it is not the site's time.
            began = time.monotonic()
            try:
                part = await body.part(BODY_TIMEOUT_S + came / BODY_RATE - waited_s)
            except TimeoutError:
                raise RefusedError.because(408, "the request came too slowly") from None
            waited_s += time.monotonic() - began
            came += len(part)
            self.received += len(part)
            yield part

    async def _content(self, request: Request, answer: httpx.Response) -> AsyncIterator[bytes]:
        """An answer's body as it comes."""
        try:
            async for part in answer.aiter_raw():
                self.sent += len(part)
                yield part
        except httpx.HTTPError:
            # Half an answer must not pass for a whole one. The response ends with the connection.
            request.state.abort()
            await asyncio.sleep(TIMEOUT_S)


def _kept(answer: httpx.Response) -> dict[str, str]:
    """The headers of an answer that pass back."""
    return {k: v for k, v in answer.headers.items() if k.lower() in ANSWER_HEADERS}


@contextmanager
def _counted(count: Counter[str], owner: str, most: int) -> Iterator[None]:
    """Count what an owner has going on.

    Raises:
        RefusedError: it has too much.
    """
    if count[owner] >= most:
        raise RefusedError.because(503, _TRY_AGAIN)
    count[owner] += 1
    try:
        yield
    finally:
        count[owner] -= 1
        if not count[owner]:
            del count[owner]
