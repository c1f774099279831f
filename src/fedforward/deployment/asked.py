"""What a site has been asked so far, in files of its own: a restart does not make it forget.

Every answer that measures data says something of them, so a site bounds their number. The counts
are on disk before an answer leaves. Imports no PyTorch.
"""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from fedforward.core.errors import FedForwardError
from fedforward.core.files import read_object, write_bytes
from fedforward.messages.envelope import MessageKind

#: No count of a run is larger.
_LARGEST = 2**53
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Asked:
    """How often each kind of message was answered in one run.

    Attributes:
        path: file that outlasts the process; None keeps counts in memory.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Goes on with what is in the file.

        Raises:
            FedForwardError: the file is there and is none of these.
        """
        self.path = path
        self._counts: Counter[str] = Counter()
        if path is not None and path.exists():
            advice = (
                "It says how often this site was asked in a run; restore it from a copy, or take "
                "no further part in this run."
            )
            content = read_object(path, advice)
            if not all(kind in MessageKind.__members__ for kind in content) or not all(
                type(count) is int and 0 <= count < _LARGEST for count in content.values()
            ):
                raise FedForwardError(f"{path} is damaged: it holds no counts by kind. {advice}")
            self._counts.update(content)

    def note(self, kind: MessageKind, most: int) -> int:
        """Count a message, on disk when this returns; returns how many of its kind there were.

        One above `most` is not to be answered, and is not kept.

        Raises:
            FedForwardError: it cannot be written down.
        """
        count = self._counts[kind.name] + 1
        if count <= most:
            counts = {**self._counts, kind.name: count}
            _write(self.path, counts)
            self._counts[kind.name] = count
        return count


class SeenTerms:
    """The different terms that a site has looked at, those of a run's name each.

    Attributes:
        path: as in `Asked`.
    """

    def __init__(self, path: Path | None = None) -> None:
        """See `Asked`."""
        self.path = path
        self._seen: list[str] = []
        if path is not None and path.exists():
            advice = (
                "It says which terms this site has looked at; restore it from a copy. Only if you "
                "trust the server, remove it."
            )
            seen = read_object(path, advice).get("terms")
            if not isinstance(seen, list) or not all(
                isinstance(part, str) and _DIGEST.fullmatch(part) for part in seen
            ):
                raise FedForwardError(f"{path} is damaged: it holds no list of digests. {advice}")
            self._seen = seen

    def note(self, run: bytes, terms: dict[str, Any], most: int) -> bool:
        """Keep terms, on disk when this returns; whether they are among the first `most`.

        Raises:
            FedForwardError: they cannot be written down.
        """
        text = json.dumps(terms, sort_keys=True).encode("utf-8", "surrogatepass")
        digest = hashlib.sha256(run + text).hexdigest()
        if digest in self._seen:
            return True
        if len(self._seen) >= most:
            return False
        seen = [*self._seen, digest]
        _write(self.path, {"terms": seen})
        self._seen = seen
        return True


def _write(path: Path | None, content: dict[str, Any]) -> None:
    if path is None:
        return
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_bytes(path, json.dumps(content).encode() + b"\n", private=True)
    except OSError as error:
        raise FedForwardError(
            f"{path} cannot be written: {error.strerror or error}. Until it can, this site answers "
            "nothing that measures its data. Make room, or look at the rights of the folder."
        ) from error
