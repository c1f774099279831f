"""Files that are written as a whole or not at all, and JSON that others may have damaged."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedforward.core.errors import FedForwardError


def write_bytes(path: Path, data: bytes, *, private: bool = False) -> None:
    """Write a file as a whole or not at all; its content is on disk when this returns.

    A power failure soon after may bring back the file that was there before.

    Args:
        private: whether its user alone may read it (mode 0600).
    """
    partial = path.with_name(path.name + ".partial")
    try:
        if private:
            # What a kill has left may be readable by others.
            partial.unlink(missing_ok=True)
        with open(partial, "wb", opener=_private if private else None) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_EXCL, 0o600)


def keep_names(folder: Path) -> None:
    """Have a folder's list of files on disk, where the system can do that."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def parse_json(text: str | bytes) -> Any:
    """JSON's content.

    Raises:
        ValueError: it is no JSON, or is nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_object(path: Path, advice: str) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        advice: a sentence on what to do where it is damaged.

    Raises:
        FedForwardError: it is missing, cannot be read, or is no JSON object.
    """
    try:
        content = parse_json(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"it has {str(content)[:40]!r} in place of a JSON object")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FedForwardError(f"{path} cannot be read: {reason}. {advice}") from error
    return content
