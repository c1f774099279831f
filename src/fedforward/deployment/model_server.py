"""One resident process for each site, with the model in it, behind a socket that only its user has.

An engine may start a process for every message; a language model must not live there. Such a
process calls `ask`; the model server answers one message after another. It knows no engine.

    python -m fedforward.deployment.model_server SITE_TOML SOCKET
"""

import logging
import os
import queue
import socket
import struct
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from fedforward.deployment.transient import TransientErrors

LOGGER = logging.getLogger("fedforward.deployment.model_server")
_SIZE = struct.Struct("<Q")
#: Bytes of the largest message: more than any snapshot of an adapter.
MAX_BYTES = 1 << 34
#: Seconds to wait for a model server that is just being started (again).
TIMEOUT_S = 120.0
#: How often a message is put to a model server that dies over it.
MAX_RETRIES = 2
#: Connections that are read, wait or are written at a time.
MAX_CONNECTIONS = 8
#: Seconds for a peer to begin a message or to read a reply, and bytes of either a second.
PEER_TIMEOUT_S, RATE = 10.0, 1 << 22
#: Seconds between two attempts to connect.
POLL_INTERVAL_S = 0.2


class ModelServerGoneError(ConnectionError):
    """There is no model server behind the socket, or it died over a message."""


def ask(path: str, data: bytes, timeout_s: float = TIMEOUT_S) -> bytes:
    """A model server's reply to an encoded envelope.

    One that dies is started again by its supervisor, so the message is put to it again.

    Raises:
        ModelServerGoneError: no reply within `timeout_s` seconds, or the server died each time.
    """
    last = time.monotonic() + timeout_s
    tries = 0
    while True:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.connect(path)
                tries += 1
                _send(connection, data)
                # The model may take any time over it.
                return _receive(connection)
        except OSError as error:
            if tries >= MAX_RETRIES or time.monotonic() > last:
                raise ModelServerGoneError(
                    f"the site's model server does not answer "
                    f"({error or 'it died over the message'})"
                ) from error
            time.sleep(POLL_INTERVAL_S)


def _send(connection: socket.socket, data: bytes) -> None:
    connection.sendall(_SIZE.pack(len(data)))
    connection.sendall(data)


def _receive(connection: socket.socket, timeout_s: float | None = None) -> bytes:
    """A whole message.

    Args:
        timeout_s: seconds for its size to come, and beyond `RATE` for the rest; None waits.

    Raises:
        OSError: the other side is gone, or too slow.
    """
    (size,) = _SIZE.unpack(_exactly(connection, _SIZE.size, timeout_s))
    if size > MAX_BYTES:
        raise ConnectionError(f"a message of {size} bytes")
    return _exactly(connection, size, timeout_s)


def _exactly(connection: socket.socket, size: int, timeout_s: float | None) -> bytes:
    began = time.monotonic()
    parts, came = [], 0
    while came < size:
        if timeout_s is not None:
            left_s = began + timeout_s + came / RATE - time.monotonic()
            if left_s <= 0:
                raise TimeoutError("the other side is too slow")
            connection.settimeout(left_s)
        part = connection.recv(min(size - came, 1 << 20))
        if not part:
            raise ConnectionError("the other side is gone")
        parts.append(part)
        came += len(part)
    return b"".join(parts)


class Inbox:
    """Whole messages from a listening socket; who sends half of one holds up nobody.

    Connections are read and written in threads of their own. Only who takes the messages has to do
    with the model, which must stay in one thread.
    """

    def __init__(self, listening: socket.socket, timeout_s: float = PEER_TIMEOUT_S) -> None:
        """`timeout_s` is as in `_receive`, and likewise for a reply to be read."""
        self._listening = listening
        self._timeout_s = timeout_s
        self._whole: queue.SimpleQueue[tuple[socket.socket, bytes]] = queue.SimpleQueue()
        self._free = threading.Semaphore(MAX_CONNECTIONS)
        self._errors = TransientErrors(LOGGER.warning)
        threading.Thread(target=self._accept, name="inbox", daemon=True).start()

    def take(self) -> tuple[socket.socket, bytes]:
        """Wait for a message; the connection that it came from takes the reply."""
        return self._whole.get()

    def reply(self, connection: socket.socket, data: bytes) -> None:
        """Send a reply, without waiting until it is read."""
        threading.Thread(target=self._send, args=(connection, data), daemon=True).start()

    def _accept(self) -> None:
        while self._listening.fileno() >= 0:
            self._free.acquire()
            connection = None
            with self._errors.noted("a connection cannot be accepted"):
                connection, _ = self._listening.accept()
            if connection is None:
                self._free.release()
                time.sleep(POLL_INTERVAL_S)
            else:
                threading.Thread(target=self._read, args=(connection,), daemon=True).start()

    def _read(self, connection: socket.socket) -> None:
        try:
            data = _receive(connection, self._timeout_s)
        except OSError:
            self._leave(connection)
        else:
            self._whole.put((connection, data))

    def _send(self, connection: socket.socket, data: bytes) -> None:
        # Whoever asked may be gone; the server will ask again.
        with suppress(OSError):
            connection.settimeout(self._timeout_s + len(data) / RATE)
            _send(connection, data)
        self._leave(connection)

    def _leave(self, connection: socket.socket) -> None:
        connection.close()
        self._free.release()


def serve(settings: Path, path: Path) -> None:
    """Answer messages until the supervisor is gone or says so."""
    from fedforward.config.site import load_site
    from fedforward.models.libraries import quiet_libraries

    site_config = load_site(settings)
    LOGGER.info("loading libraries")
    quiet_libraries()
    from fedforward.deployment.site import Site

    site = Site(site_config)
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        # The folder is its user's alone, so there is no moment at which others could connect.
        listening.bind(str(path))
        path.chmod(0o600)
        listening.listen(MAX_CONNECTIONS)
        LOGGER.info("waiting for the server")
        inbox = Inbox(listening)
        while True:
            connection, data = inbox.take()
            inbox.reply(connection, site.answer(data))


def _die_with(parent: int) -> None:
    """End this process when its parent does."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(0)


def main() -> None:
    """The process of a model server; its log goes to standard output, for the supervisor."""
    from fedforward.core.logs import shown, tolerate_narrow_encodings

    tolerate_narrow_encodings()
    settings, path = sys.argv[1:3]
    threading.Thread(target=_die_with, args=(os.getppid(),), daemon=True).start()
    with shown(logging.StreamHandler(sys.stdout)):
        serve(Path(settings), Path(path))


if __name__ == "__main__":
    main()
