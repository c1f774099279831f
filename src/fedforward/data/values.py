"""Values of rows as the file has them: reaching into a row by a path, and a value's text.

A path is a field's name, or goes on into what the field holds: `answer.text`, `turns[0]`,
`messages[-1].content`. A field whose own name has dots or brackets is found by its whole name.
"""

import datetime
import decimal
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from fedforward.core.errors import FedForwardError

_STEP = re.compile(r"\.?([^.\[\]]+)|\[(-?\d+)\]")
#: Names of fields that an error lists.
_MOST_NAMES = 40


class Number(str):
    """A number as it is written in a JSON file, such as "5.0", "1e3" or "100000000000000000000"."""

    __slots__ = ()


class Repeated(dict[str, Any]):
    """A JSON object in which keys stand more than once; `keys_twice` has them."""

    keys_twice: frozenset[str] = frozenset()


@lru_cache(maxsize=1024)
def steps(path: str) -> tuple[str | int, ...]:
    """The names and places that a path consists of; empty where it is not one.

    Example:
        >>> steps("messages[-1].content")
        ('messages', -1, 'content')
    """
    found: list[str | int] = []
    end = 0
    while end < len(path):
        match = _STEP.match(path, end)
        if match is None or (end == 0 and (match[1] is None or path[0] == ".")):
            return ()
        found.append(match[1] if match[1] is not None else int(match[2]))
        end = match.end()
    return tuple(found)


def first_name(path: str, row: Mapping[str, Any]) -> str:
    """The field of a row that a path begins with: the whole path where a field is called so."""
    parts = steps(path)
    return path if path in row or not parts else str(parts[0])


def reach(row: Mapping[str, Any], path: str, where: str) -> Any:
    """What lies at a path of a row; None where an object on the way lacks the key or is null.

    Args:
        where: the row, for errors, as in "line 3 of rows.jsonl".

    Raises:
        FedForwardError: the path goes into what is no list or object, or beyond a list's end; or a
            key on it stands twice in its object.
    """
    parts = (path,) if path in row else steps(path) or (path,)
    value: Any = row
    for count, part in enumerate(parts):
        done = _written(parts[:count])
        if value is None:
            return None
        if isinstance(part, str) and isinstance(value, Mapping):
            if isinstance(value, Repeated) and part in value.keys_twice:
                raise FedForwardError(
                    f"{where} has the key {part!r} more than once. Keep one of them."
                )
            value = value.get(part)
        elif isinstance(part, int) and isinstance(value, list):
            if not -len(value) <= part < len(value):
                raise FedForwardError(
                    f"{where}: {{{path}}} asks for item {part} of {done}, which has {len(value)}. "
                    "Mend the row, or name an item that every row has."
                )
            value = value[part]
        else:
            raise FedForwardError(
                f"{where}: {{{path}}} goes into {done}, which is {kind_of(value)}. "
                f"{_advice(done, value)}"
            )
    return value


def text_of(value: Any, path: str, where: str) -> str | None:
    """A value's text as the file has it; None for null.

    Raises:
        FedForwardError: it is a list, an object, binary, or text that is no Unicode text.
    """
    if value is None:
        return None
    if isinstance(value, str):
        if not value.isascii() and _SURROGATE.search(value):
            raise FedForwardError(
                f"{where}: the field {path} has half of a surrogate pair (an escape from \\ud800 "
                "to \\udfff without its other half), which is no text. Mend the row."
            )
        return str(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, decimal.Decimal):
        return format(value, "f")
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    raise FedForwardError(
        f"{where}: the field {path} holds {kind_of(value)} and no text. {_advice(path, value)}"
    )


_SURROGATE = re.compile(r"[\ud800-\udfff]")


def plain(value: Any) -> Any:
    """A JSON value with Python's numbers in place of written ones, as `json.loads` gives it."""
    if isinstance(value, Number):
        try:
            return json.loads(value)
        except ValueError:
            # A whole number with more digits than Python reads.
            return str(value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


def kind_of(value: Any) -> str:
    """What a value is, in words."""
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return f"an object with the keys {listed(value)}" if value else "an empty object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, bool):
        return "a truth value"
    if isinstance(value, Number | int | float | decimal.Decimal):
        return "a number"
    if isinstance(value, str):
        return "text"
    if isinstance(value, bytes | bytearray):
        return "binary data"
    if isinstance(value, datetime.timedelta):
        return "a duration"
    return f"a {type(value).__name__}"


def listed(names: Any) -> str:
    """Names for an error, the first of very many."""
    names = [str(name) for name in names]
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _advice(path: str, value: Any) -> str:
    """How to reach into a value."""
    if isinstance(value, Mapping) and value:
        return f"Name what is meant, as in {{{path}.{next(iter(value))}}}."
    if isinstance(value, list):
        inner = value[0] if value else None
        deeper = f".{next(iter(inner))}" if isinstance(inner, Mapping) and inner else ""
        chat = f", or say data.chat = {path!r} if it is a conversation" if deeper else ""
        return f"Name an item, as in {{{path}[0]{deeper}}}{chat}."
    return "Name a field that holds text."


def _written(parts: tuple[str | int, ...]) -> str:
    """A path as people write it."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return text.removeprefix(".") or "the row"
