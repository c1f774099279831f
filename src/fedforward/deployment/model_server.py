"""One resident process for each site, with the model in it, behind a socket that only its user has.

An engine may start a process for every message; a language model must not live there. Such a
process calls `ask`; the worker answers one letter after another. It is engine-neutral.

    python -m fedforward.deployment.model_server SITE_TOML SOCKET
"""

import os
import socket
import struct
import sys
import threading
import time
from pathlib import Path

_SIZE = struct.Struct("<Q")
#: A letter beyond this is not one: the largest hold a snapshot of an adapter.
LARGEST = 1 << 34
#: Seconds to wait for a worker that is just being started (again).
PATIENCE = 120.0
#: How often a letter is put to a worker that dies over it.
TRIES = 2


class WorkerGoneError(ConnectionError):
    """There is no worker behind the socket, or it died over a letter."""


def ask(path: str, data: bytes, patience: float = PATIENCE) -> bytes:
    """A worker's answer to a letter.

    A worker that dies is started again by its supervisor, so the letter is put to it again.

    Raises:
        WorkerGoneError: nobody answers within `patience` seconds, or each worker dies over it.
    """
    last = time.monotonic() + patience
    tries = 0
    while True:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.connect(path)
                tries += 1
                _send(connection, data)
                return _receive(connection)
        except OSError as error:
            if tries >= TRIES or time.monotonic() > last:
                raise WorkerGoneError(
                    f"the site's worker does not answer ({error or 'it died over the letter'})"
                ) from error
            time.sleep(0.2)


def _send(connection: socket.socket, data: bytes) -> None:
    connection.sendall(_SIZE.pack(len(data)))
    connection.sendall(data)


def _receive(connection: socket.socket) -> bytes:
    (size,) = _SIZE.unpack(_exactly(connection, _SIZE.size))
    if size > LARGEST:
        raise ConnectionError(f"a letter of {size} bytes")
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


def say(text: str) -> None:
    """A line for the supervisor, at once."""
    print(text, flush=True)


def serve(settings: Path, path: Path) -> None:
    """Answer letters until the supervisor is gone or says so."""
    from fedforward.config.site import load_site
    from fedforward.models.libraries import quiet_libraries

    site_config = load_site(settings)
    say("loading libraries")
    quiet_libraries()
    from fedforward.deployment.site import Site

    site = Site(site_config, say)
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        # The folder is its user's alone, so there is no moment at which others could connect.
        listening.bind(str(path))
        path.chmod(0o600)
        listening.listen(8)
        say("waiting for the server")
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
    """The process of a worker."""
    settings, path = sys.argv[1:3]
    threading.Thread(target=_die_with, args=(os.getppid(),), daemon=True).start()
    serve(Path(settings), Path(path))


if __name__ == "__main__":
    main()
