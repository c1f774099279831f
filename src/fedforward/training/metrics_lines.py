"""Whether lines of `metrics.jsonl` are what a run writes: the names and kinds of all values.

A kill may cut the last line short, and people edit files. A line that is not whole, and those after
it, are written again from the ledger. Imports no PyTorch.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from fedforward.core.files import parse_json

#: No count of a run is larger, and float64 holds each exactly.
_LARGEST = 2**53


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _number(value: Any) -> bool:
    """A float of any kind: `NaN` and infinities are written as null."""
    return type(value) is float or (type(value) is int and abs(value) < _LARGEST)


def _finite(value: Any) -> bool:
    return _number(value) and math.isfinite(value)


def _number_or_null(value: Any) -> bool:
    return value is None or _number(value)


def _each(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(kind, value.values()))


def _traffic(value: Any) -> bool:
    return _each(_finite)(value) and {"up", "down"} <= value.keys()


def _example(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, dict) or value.keys() != {"prompt", "expected", "before"}:
        return False
    texts = [value["prompt"], value["before"]]
    texts += [] if value["expected"] is None else [value["expected"]]
    return all(isinstance(text, str) for text in texts)


_KINDS: dict[str, Callable[[Any], bool]] = {
    "heldout_loss": _number_or_null,
    "seconds": _finite,
    "training_loss": _number_or_null,
    "skipped_steps": _count,
    "zero_gradients": _finite,
    "learning_rates": _each(_number),
    "bytes": _traffic,
    "clients": _each(_count),
    "taken_back": _count,
    "epsilon": _finite,
    "delta": _finite,
    "passes": _finite,
    "changed_share": _finite,
    "metrics": _each(_number_or_null),
    "medians": _each(_number_or_null),
    "example": _example,
    "withheld": lambda value: value is True,
}
_BASE = {"seconds", "example"}
_ROUND = {"seconds", "training_loss", "skipped_steps", "learning_rates"}


def read_line(text: str, number: int) -> dict[str, Any] | None:
    """A line of metrics, with NaN where JSON has null; None if it is not whole.

    Args:
        number: rounds before it; 0 is the base model's line.
    """
    try:
        line = parse_json(text)
    except ValueError:
        return None
    if not isinstance(line, dict) or not (_ROUND if number else _BASE) <= line.keys():
        return None
    if type(line.get("round")) is not int or line["round"] != number:
        return None
    if not number and not {"heldout_loss", "withheld"} & line.keys():
        return None
    if not all(kind(line[name]) for name, kind in _KINDS.items() if name in line):
        return None
    if line.get("taken_back", 0) >= max(1, number):
        return None
    if line.get("heldout_loss", 0.0) is None:
        line["heldout_loss"] = math.nan
    for key in ("metrics", "medians"):
        for name, value in line.get(key, {}).items():
            line[key][name] = math.nan if value is None else value
    return line


def with_metrics(lines: Sequence[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """The lines before the first that was evaluated without these metrics."""
    whole = []
    for line in lines:
        if "heldout_loss" in line and not set(names) <= line.get("metrics", {}).keys():
            break
        whole.append(line)
    return whole
