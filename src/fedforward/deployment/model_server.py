"""One resident process for each site, with the model in it, behind a socket that only its user has.

An engine may start a process for every message; a language model must not live there. Such a
process calls `ask`; the model server answers one message after another. It knows no engine.

    python -m fedforward.deployment.model_server SITE_TOML SOCKET
"""

import logging
import os
import socket
import struct
import sys
import threading
import time
from pathlib import Path

LOGGER = logging.getLogger("fedforward.deployment.model_server")
_SIZE = struct.Struct("<Q")
#: Bytes of the largest message: more than any snapshot of an adapter.
MAX_BYTES = 1 << 34
#: Seconds to wait for a model server that is just being started (again).
TIMEOUT_S = 120.0
#: How often a message is put to a model server that dies over it.
MAX_RETRIES = 2
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


def _receive(connection: socket.socket) -> bytes:
    (size,) = _SIZE.unpack(_exactly(connection, _SIZE.size))
    if size > MAX_BYTES:
        raise ConnectionError(f"a message of {size} bytes")
    return _exactly(connection, size)


def _exactly(connection: socket.socket, size: int) -> bytes:
    parts, left = [], size
    while left:
        part = connection.recv(min(left, 1 << 20))
        if not part:
            raise ConnectionError("the other side is gone")
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


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
        listening.listen(8)
        LOGGER.info("waiting for the server")
        while True:
            connection, _ = listening.accept()
            with connection:
                try:
                    _send(connection, site.answer(_receive(connection)))
                except OSError:
                    # Whoever asked is gone; the server will ask again.
                    continue


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
