"""Mutations that keep a form: JSON and TOML stay what they are, and values in them change.

A fuzzer that changes bytes meets the parser of a text again and again. What lies behind it is met
with texts that can be parsed.
"""

import json
import random
import tomllib
from collections.abc import Iterator
from typing import Any

from fedforward.config.template import toml_value

#: Values that programs do not expect.
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 255, 2**16, 2**31, 2**32, 2**53, 2**63, 2**64, -(2**63),
    10**30, 10**400, 0.0, -0.0, 0.5, 1e-300, 1e300, float("inf"), float("-inf"), float("nan"),
    "", "x", "0", "-1", "\ud800", "\0", "é", "a" * 300, "../..", "/", "{a}", "{", "{a[0].b}", "1e9",
    [], [[]], {}, {"": 0}, [None], [0, 1, 2], ["a", "b"], {"a": {"b": []}}, ":", "a:b", "00" * 32,
]  # fmt: skip
_DEEPEST = 40


def places(content: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where values stand, the whole included."""
    yield place
    if len(place) > _DEEPEST:
        return
    pairs: Any = ()
    if isinstance(content, dict):
        pairs = content.items()
    elif isinstance(content, list):
        pairs = enumerate(content[:20])
    for key, value in pairs:
        yield from places(value, (*place, key))


def at(content: Any, place: tuple[Any, ...]) -> Any:
    """The value in a place."""
    for key in place:
        content = content[key]
    return content


def put(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    """The content with another value in one place."""
    if not place:
        return value
    copy: Any = dict(content) if isinstance(content, dict) else list(content)
    copy[place[0]] = put(content[place[0]], place[1:], value)
    return copy


def changed(content: Any, chance: random.Random) -> Any:
    """The content with one thing other."""
    found = list(places(content))
    place = chance.choice(found)
    old = at(content, place)
    way = chance.randrange(6)
    if way == 0 and isinstance(old, dict) and old:
        gone = chance.choice(list(old))
        return put(content, place, {key: value for key, value in old.items() if key != gone})
    if way == 1 and isinstance(old, list):
        return put(content, place, [*old, chance.choice([*old, *ODD])])
    if way == 2 and isinstance(old, dict):
        name = chance.choice(["x", "", *map(str, old)]) + chance.choice(["", "2", "."])
        return put(content, place, {**old, name: chance.choice(ODD)})
    if way == 3:
        return put(content, place, at(content, chance.choice(found)))
    if way == 4 and type(old) in (int, float):
        step = chance.choice([1, -1, 2, 0.5, 10**6])
        return put(content, place, old + step if abs(old) < 2**62 else step)
    if way == 4 and isinstance(old, str) and old:
        cut = chance.randrange(len(old))
        return put(content, place, old[:cut] + chance.choice(["", "{", "}", "[", ".", "0", "é"]))
    return put(content, place, chance.choice(ODD))


def mutated_json(data: bytes, chance: random.Random) -> bytes | None:
    """JSON with some values other; None if it is none."""
    try:
        content = json.loads(data)
        for _ in range(chance.choice([1, 1, 2, 4])):
            content = changed(content, chance)
        return json.dumps(content).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError, TypeError, OverflowError):
        return None


def mutated_toml(data: bytes, chance: random.Random) -> bytes | None:
    """TOML with some values other; None if it is none."""
    try:
        content = tomllib.loads(data.decode())
        for _ in range(chance.choice([1, 1, 2, 4])):
            content = changed(content, chance)
        lines = []
        for section, part in content.items():
            if isinstance(part, dict):
                lines.append(f"[{section}]")
                lines += [f"{key} = {toml_value(value)}" for key, value in part.items()]
            else:
                lines.insert(0, f"{section} = {toml_value(part)}")
        return "\n".join(lines).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError, TypeError, AttributeError, OverflowError):
        return None


def mutated_bytes(data: bytes, chance: random.Random) -> bytes:
    """Bytes with some other, gone, doubled, or with an odd number among them."""
    made = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 4, 8])):
        place = chance.randrange(len(made) + 1)
        way = chance.randrange(6)
        if way == 0 and made:
            made[place % len(made)] ^= 1 << chance.randrange(8)
        elif way == 1:
            del made[place : place + chance.choice([1, 2, 4, 16])]
        elif way == 2:
            made[place:place] = made[place : place + chance.choice([1, 4, 16, 64])]
        elif way == 3:
            size = chance.choice([1, 2, 4, 8])
            odd = chance.choice([0, 1, 2, 2**7, 2 ** (8 * size - 1), 2 ** (8 * size) - 1])
            made[place : place + size] = (odd % 2 ** (8 * size)).to_bytes(size, "little")
        elif way == 4:
            made[place : place + 4] = chance.randbytes(4)
        else:
            del made[place:]
    return bytes(made)
