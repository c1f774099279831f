"""The socket of a site's model server: who connects and says nothing holds up nobody."""

import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from fedforward.deployment.model_server import MAX_CONNECTIONS, Inbox, ask

SIZE = struct.Struct("<Q")
TIMEOUT_S = 0.3


@pytest.fixture
def place(tmp_path: Path) -> Iterator[str]:
    """A socket behind which every message is answered reversed."""
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(path)
        listening.listen(MAX_CONNECTIONS)
        inbox = Inbox(listening, TIMEOUT_S)

        def answer() -> None:
            while True:
                connection, data = inbox.take()
                inbox.reply(connection, data[::-1])

        threading.Thread(target=answer, daemon=True).start()
        yield path
        listening.shutdown(socket.SHUT_RDWR)


def connected(path: str, stack: ExitStack) -> socket.socket:
    connection = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    connection.settimeout(5.0)
    connection.connect(path)
    return connection


def test_whole_messages_are_answered(place: str) -> None:
    for data in (b"", b"abc", bytes(range(256)) * 40_000):
        assert ask(place, data) == data[::-1]


@pytest.mark.parametrize(
    "beginning", [b"", b"\1", SIZE.pack(1000) + b"half", SIZE.pack(1 << 60), SIZE.pack(1 << 33)]
)
def test_who_sends_half_a_message_is_not_waited_for(place: str, beginning: bytes) -> None:
    with ExitStack() as stack:
        # One fewer than fit: the others are served meanwhile.
        idle = [connected(place, stack) for _ in range(MAX_CONNECTIONS - 1)]
        for connection in idle:
            connection.sendall(beginning)
        began = time.monotonic()
        assert ask(place, b"abc") == b"cba"
        assert time.monotonic() - began < TIMEOUT_S
        assert idle[0].recv(1) == b""
        assert time.monotonic() - began < 2.0


def test_room_comes_back(place: str) -> None:
    """Also where more connect than fit, and where nobody reads the replies."""
    with ExitStack() as stack:
        for _ in range(MAX_CONNECTIONS):
            connected(place, stack)
        assert ask(place, b"abc") == b"cba"
        for _ in range(MAX_CONNECTIONS - 1):
            connected(place, stack).sendall(SIZE.pack(1 << 20) + bytes(1 << 20))
        began = time.monotonic()
        assert ask(place, b"abc") == b"cba"
        assert time.monotonic() - began < 3.0


def test_a_trickle_is_cut_off(place: str) -> None:
    with ExitStack() as stack:
        connection = connected(place, stack)
        began = time.monotonic()
        with pytest.raises(OSError, match=r"Broken pipe|reset"):
            for byte in SIZE.pack(1000) + bytes(1000):
                connection.sendall(bytes([byte]))
                time.sleep(0.05)
        assert time.monotonic() - began < 2.0
