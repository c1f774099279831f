"""Which rows a site has, whatever file they are in: a number for each row's content.

Imports no PyTorch.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedforward.data.sources import Source


def fingerprints(sources: Iterable[Source]) -> NDArray[np.uint64]:
    """The first 8 bytes of the SHA-256 of each different row, uint64 [rows], sorted.

    A row is the same where all its fields are, by name and as text, in whatever order or format.
    Fields without a value do not count.

    Raises:
        FedForwardError: a source cannot be read.
    """
    found = [fingerprint(row) for source in sources for _, _, row in source.read()]
    return np.unique(np.array(found, np.uint64))


def fingerprint(row: Any) -> int:
    """Of one row.

    Example:
        >>> fingerprint({"a": 1, "b": "x"}) == fingerprint({"b": "x", "a": "1", "c": None})
        True
    """
    text = json.dumps(_as_text(row), sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def _as_text(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _as_text(part) for name, part in value.items() if part is not None}
    if isinstance(value, list | tuple):
        return [_as_text(part) for part in value]
    return str(value)
