"""What a run has spent after each of its rounds: rounds, passes, bytes and seconds.

Imports no PyTorch.
"""

from collections.abc import Sequence
from math import nan
from typing import Any, Literal

Resource = Literal["rounds", "bytes", "passes", "seconds"]
RESOURCES: tuple[Resource, ...] = ("rounds", "bytes", "passes", "seconds")
#: What an amount of each is called.
WORDS: dict[Resource, str] = {
    "rounds": "rounds",
    "bytes": "bytes sent and received by one client",
    "passes": "forward passes over a batch",
    "seconds": "seconds",
}


def spent(lines: Sequence[dict[str, Any]], what: Resource) -> list[float]:
    """How much a run has spent in all, at each of its metrics lines; line 0 is the base model's.

    Bytes are those of a client that was asked in every round, up and down; of clients the mean. A
    snapshot that one client sends is shared among all. Seconds include evaluations.
    A round that was restored from the ledger has no bytes, and counts as the one before it.
    NaN where nothing was counted.
    """
    if what == "rounds":
        return [float(line["round"]) for line in lines]
    if what == "seconds":
        return [float(line["seconds"]) for line in lines]
    if what == "passes":
        return _passes(lines)
    return _bytes(lines)


def _passes(lines: Sequence[dict[str, Any]]) -> list[float]:
    if not any("passes" in line for line in lines):
        return [0.0, *[nan] * (len(lines) - 1)]
    found = [0.0]
    for line in lines[1:]:
        found.append(float(line.get("passes", found[-1])))
    return found


def _bytes(lines: Sequence[dict[str, Any]]) -> list[float]:
    counted = [_of_round(line) for line in lines[1:]]
    latest = next((size for size in counted if size is not None), nan)
    found = [0.0]
    for size in counted:
        latest = latest if size is None else size
        found.append(found[-1] + latest)
    return found


def _of_round(line: dict[str, Any]) -> float | None:
    traffic = line.get("bytes")
    if traffic is None:
        return None
    asked = line.get("clients", {}).get("asked") or len(line["learning_rates"]) or 1
    return float(traffic["up"] + traffic["down"] + traffic.get("snapshots", 0) / asked)
