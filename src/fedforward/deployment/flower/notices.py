"""Names that one process of a server tells another: who was sent something, and who answered.

There is a file of each. The coordinator writes the first and the reverse proxy reads it; the second
goes the other way. So neither asks the engine again and again. What gets lost costs time only: both
look unasked as well.
"""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

#: The two files, in the server's `flower` folder.
SENT, ANSWERED = "sent.names", "answered.names"
#: Bytes after which a file is begun anew.
MAX_BYTES = 1 << 20
#: Instead of a name: whoever it may be.
ANYBODY = "*"


class Notices:
    """One such file, for one who writes and one who reads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read = 0
        with suppress(OSError):
            # What was told before is old.
            self._read = path.stat().st_size

    def create(self) -> None:
        """Begin with an empty file.

        Raises:
            OSError: it cannot be written.
        """
        self.path.write_bytes(b"")
        self._read = 0

    def tell(self, names: Iterable[str]) -> None:
        """Add names; without a word if the file cannot be written."""
        text = "".join(f"{name}\n" for name in names).encode()
        with suppress(OSError):
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
            try:
                if os.fstat(file).st_size > MAX_BYTES:
                    os.ftruncate(file, 0)
                    text = f"{ANYBODY}\n".encode() + text
                os.write(file, text)
            finally:
                os.close(file)

    def new(self) -> set[str]:
        """Names since the last call, with `ANYBODY` where some may be missing."""
        try:
            size = self.path.stat().st_size
            if size == self._read:
                return set()
            began_anew = size < self._read
            with self.path.open("rb") as file:
                file.seek(0 if began_anew else self._read)
                content = file.read()
                whole = content[: content.rfind(b"\n") + 1]
                self._read = (0 if began_anew else self._read) + len(whole)
        except OSError:
            return set()
        found = set(whole.decode(errors="replace").split("\n")) - {""}
        return found | {ANYBODY} if began_anew else found
