"""Bounds on the connections to the public port: how many, from where, and how long each may take.

Whoever reaches the port can open connections before anybody knows who that is. The bounds hold
before a key is looked at: on connections in total and from one address, on the bytes and lines of a
request's head, and on the seconds for TLS, for a head, and for reading an answer. It knows nothing
of Flower, and never looks at a body.
"""

import asyncio
import ipaddress
import os
import socket
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedforward.core.machine import raise_open_file_limit

#: Connections at most, of which Python keeps about 0.3 MB each for TLS, and the share of them that
#: one address can have.
MAX_CONNECTIONS, ONE_ADDRESS_SHARE = 1024, 4
#: Connections to the engine at most.
MAX_ENGINE_CONNECTIONS = 256
#: Open files where the system does not tell how many there may be.
_DEFAULT_OPEN_FILES = 1024
#: Bytes and lines of a request's head. Flower's have about 1 kB and twelve lines.
MAX_HEAD_BYTES, MAX_HEADERS = 1 << 14, 64
#: Bytes of a head that are looked at together: the bound is checked between two pieces.
_PIECE = 1 << 12
#: Seconds for TLS to be agreed on, and for it to be ended.
HANDSHAKE_TIMEOUT_S, SHUTDOWN_TIMEOUT_S = 10.0, 5.0
#: Seconds for a request's head, from its first byte or from the opening of the connection.
HEAD_TIMEOUT_S = 10.0
#: Seconds that a connection may wait for the next request.
KEEP_ALIVE_S = 30
#: Seconds for a reader to take what waits for it, about 100 kB.
READER_TIMEOUT_S = 30.0
#: Seconds for the last bytes to be taken once the connection is to be closed.
LINGER_S = 5.0
#: In what Linux tells of a TCP connection: bytes acknowledged, bytes received.
_TCP_INFO = struct.Struct("=120xQQ")
#: States of a peer whose request is there as a whole.
_ASKED = (h11.DONE, h11.MUST_CLOSE)


def connection_limits() -> tuple[int, int]:
    """Connections that this process can have, of sites and to the engine.

    A quarter of the files that it may open is left for its own.
    """
    files = raise_open_file_limit() or _DEFAULT_OPEN_FILES
    if files < 0:
        # The system's word for "unlimited".
        return MAX_CONNECTIONS, MAX_ENGINE_CONNECTIONS
    return (
        max(1, min(MAX_CONNECTIONS, files // 2)),
        max(1, min(MAX_ENGINE_CONNECTIONS, files // 4)),
    )


def transferred(connection: socket.socket) -> tuple[int, int]:
    """Bytes that a TCP connection has received and sent, TLS and repetitions of requests included.

    Zeros where the system does not tell (Linux does).
    """
    try:
        told = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        acknowledged, received = _TCP_INFO.unpack_from(told)
    except (AttributeError, OSError, struct.error):
        return 0, 0
    return received, acknowledged


class ConnectionCount:
    """How many connections are open, in total and by address.

    Attributes:
        refused: connections that were closed because there were too many.
        open_now: the connections.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.most_each = max(1, most // ONE_ADDRESS_SHARE)
        self.refused = 0
        self.open_now: set[socket.socket] = set()
        self._open: Counter[str] = Counter()
        self._gone = 0, 0

    @property
    def transferred(self) -> tuple[int, int]:
        """Bytes on the wire from and to sites since the beginning; see the function."""
        each = [self._gone, *(transferred(connection) for connection in list(self.open_now))]
        return sum(up for up, _ in each), sum(down for _, down in each)

    def closing(self, connection: socket.socket) -> None:
        """Keep the bytes of a connection that is about to be closed."""
        if connection in self.open_now:
            self.open_now.remove(connection)
            up, down = transferred(connection)
            self._gone = self._gone[0] + up, self._gone[1] + down

    @property
    def open(self) -> int:
        """Connections that are open."""
        return self._open.total()

    def enter(self, address: str) -> bool:
        """Count a connection; False if there is no room for it."""
        if self.open >= self.most or self._open[address] >= self.most_each:
            self.refused += 1
            return False
        self._open[address] += 1
        return True

    def leave(self, address: str) -> None:
        """No longer count a connection."""
        self._open[address] -= 1
        if not self._open[address]:
            del self._open[address]


def network(host: str) -> str:
    """What counts as one address: of IPv6 the first 64 bits, which are one line's."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return host
    return str(ipaddress.IPv6Network((int(address), 64), strict=False))


class _Connection(socket.socket):
    """A connection that says when it is closed."""

    on_close: Callable[[], None] | None = None
    before_close: Callable[[socket.socket], None] | None = None

    def close(self) -> None:
        """See `socket.close`."""
        on_close, self.on_close = self.on_close, None
        before, self.before_close = self.before_close, None
        if before is not None:
            before(self)
        super().close()
        if on_close is not None:
            on_close()


class _Listener(socket.socket):
    """A listening socket that closes what is too much, before TLS costs anything."""

    count: ConnectionCount

    def accept(self) -> tuple[socket.socket, Any]:
        """See `socket.accept`.

        Raises:
            ConnectionAbortedError: what came was too much; the event loop goes on.
        """
        accepted, peer = super().accept()
        address = network(str(peer[0]))
        if not self.count.enter(address):
            accepted.close()
            raise ConnectionAbortedError("too many connections")
        connection = _Connection(fileno=accepted.detach())
        connection.on_close = lambda: self.count.leave(address)
        connection.before_close = self.count.closing
        self.count.open_now.add(connection)
        return connection, peer


def listen(host: str, port: int, count: ConnectionCount) -> Sequence[socket.socket]:
    """Sockets that listen on all addresses of a host; an empty one is all of this machine's.

    Raises:
        OSError: an address cannot be had.
    """
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    listeners: list[_Listener] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            listener = _Listener(family, kind, protocol)
            listeners.append(listener)
            listener.count = count
            if os.name == "posix":
                # On Windows it would let others take the port.
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(address)
            listener.listen()
    except OSError:
        for listener in listeners:
            listener.close()
        raise
    return listeners


class Loop(asyncio.SelectorEventLoop):
    """An event loop that does not wait long for TLS; uvicorn has no setting for that."""

    async def create_server(self, *arguments: Any, **options: Any) -> asyncio.Server:
        """See `loop.create_server`."""
        if options.get("ssl") is not None:
            options["ssl_handshake_timeout"] = HANDSHAKE_TIMEOUT_S
            options["ssl_shutdown_timeout"] = SHUTDOWN_TIMEOUT_S
        return await super().create_server(*arguments, **options)


class _Parser(h11.Connection):
    """h11 with a bound on the number of headers as well."""

    def next_event(self) -> Any:
        """See `h11.Connection.next_event`."""
        event = super().next_event()
        if isinstance(event, h11.Request) and len(event.headers) > MAX_HEADERS:
            raise h11.RemoteProtocolError("too many headers", error_status_hint=431)
        return event


class _Alarm:
    """Carries out something after some seconds, unless it is stopped before."""

    def __init__(self, loop: asyncio.AbstractEventLoop, act: Callable[[], None]) -> None:
        self._loop = loop
        self._act = act
        self._handle: asyncio.TimerHandle | None = None

    @property
    def running(self) -> bool:
        """Whether it was started and not stopped."""
        return self._handle is not None

    def start(self, seconds: float) -> None:
        """Begin to wait, anew if it waits."""
        self.stop()
        self._handle = self._loop.call_later(seconds, self._act)

    def stop(self) -> None:
        """Wait no longer."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


class BoundedProtocol(H11Protocol):
    """uvicorn's connection with bounds on heads and on waiting for the other side.

    An application can end the connection by `request.state.abort()`.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.conn = _Parser(h11.SERVER, MAX_HEAD_BYTES)
        self.app_state = {**self.app_state, "abort": self._abort}
        self._head = _Alarm(self.loop, self._abort)
        self._reader = _Alarm(self.loop, self._abort)

    def _abort(self) -> None:
        self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a head, but not for ever."""
        super().connection_made(transport)
        self._head.start(HEAD_TIMEOUT_S)

    def connection_lost(self, exc: Exception | None) -> None:
        """There is nothing left to wait for."""
        self._head.stop()
        self._reader.stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Look at a head in pieces, and refuse a second request before the first is answered."""
        while data and not self.transport.is_closing():
            if self.conn.their_state in _ASKED:
                # Only an attacker asks again before it is answered, and that head would be looked
                # at as a whole.
                self._abort()
                return
            in_head = self.conn.their_state is h11.IDLE
            if in_head and not self._head.running:
                self._head.start(HEAD_TIMEOUT_S)
            piece, data = (data[:_PIECE], data[_PIECE:]) if in_head else (data, b"")
            super().data_received(piece)
            if self.conn.their_state in _ASKED and self.conn.trailing_data[0]:
                self._abort()

    def handle_events(self) -> None:
        """The head is there when there is something to answer."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._head.stop()

    def pause_writing(self) -> None:
        """The reader is slow: wait a while."""
        super().pause_writing()
        self._reader.start(READER_TIMEOUT_S)

    def resume_writing(self) -> None:
        """The reader has taken most of it."""
        super().resume_writing()
        if not self.transport.is_closing():
            self._reader.stop()

    def eof_received(self) -> None:
        """What the other side has not taken by then is not kept."""
        super().eof_received()
        self._reader.start(LINGER_S)

    def on_response_complete(self) -> None:
        """Likewise where the connection is closed after an answer.

        The rest of a body that was answered early must come as soon as a head.
        """
        super().on_response_complete()
        if self.transport.is_closing():
            self._reader.start(LINGER_S)
        elif self.conn.their_state is h11.SEND_BODY:
            self._head.start(HEAD_TIMEOUT_S)

    def send_400_response(self, msg: str) -> None:
        """Likewise after what is no request, or is no longer one in the middle of its body."""
        if self.cycle is not None and not self.cycle.response_complete:
            started = self.cycle.response_started
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if started:
                self._abort()
                return
        super().send_400_response(msg)
        self._head.stop()
        self._reader.start(LINGER_S)

    def timeout_keep_alive_handler(self) -> None:
        """Likewise where no other request came."""
        super().timeout_keep_alive_handler()
        self._reader.start(LINGER_S)
