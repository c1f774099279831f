"""Whether a run takes more memory than was planned, and what has grown since it began."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from fedforward.models.base import CausalModel
from fedforward.planning.memory.tracker import bytes_alive

#: Seconds between two looks: counting tensors takes a moment.
INTERVAL_S = 30.0
#: What a run may be above its plan: a share of it, and bytes.
SHARE, BYTES = 0.1, 16 << 20

#: What to change, by what has grown.
_ADVICE = {
    "sums of local steps": "lower run.probes_per_call",
    "a copy of the base weights": "tune fewer blocks (model.blocks)",
    "other tensors": "look at what your own code keeps from round to round",
}


def parts_of(model: CausalModel) -> dict[str, int]:
    """Bytes of what a model keeps between rounds, by what it is.

    Kept activations are not among them: they have a bound, and the plan counts them when full.
    """
    sums: Any = getattr(model, "trajectory_cache", ())
    copies: Any = getattr(model, "_cache", {})
    held = [total for _, total in sums] + list(copies.values())
    return {
        "sums of local steps": sum(tensor.nbytes for tensor in held),
        "a copy of the base weights": sum(tensor.nbytes for tensor in model._base.values()),
    }


def kept_bytes(model: CausalModel) -> int:
    """Bytes of kept activations on the model's kind of device."""
    return model.kept.size if model.kept is not None and model.device.type == "cpu" else 0


def alive_beside_kept(model: CausalModel) -> int:
    """Bytes of all tensors on the model's kind of device, without kept activations."""
    return bytes_alive(model.device.type) - kept_bytes(model)


class GrowthWatch:
    """Looks now and then whether what rests between rounds has grown beyond the plan."""

    def __init__(
        self,
        parts: Callable[[], Mapping[str, int]],
        alive: Callable[[], int],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Looks begin with `begin`.

        Args:
            parts: bytes of what is known, by what it is.
            alive: bytes of all tensors that a plan is of.
            clock: gives seconds.
        """
        self._parts, self._alive, self._clock = parts, alive, clock
        self._before: tuple[int, dict[str, int]] | None = None
        self._last = 0.0
        self._said = False

    def begin(self, alive: int) -> None:
        """From now on memory is compared with what it is now.

        Args:
            alive: bytes of all tensors that a plan is of, as they were just counted.
        """
        self._before = alive, dict(self._parts())
        self._last = self._clock()

    def look(self, plan: int, round_number: int) -> str:
        """A sentence, once, where the run takes more than planned; else empty.

        Args:
            plan: bytes at the worst moment, as they were planned or measured at the beginning.
            round_number: rounds that are done.
        """
        now = self._clock()
        if self._said or self._before is None or now - self._last < INTERVAL_S:
            return ""
        alive, parts = self._alive(), dict(self._parts())
        self._last = now
        grown = alive - self._before[0]
        if grown <= SHARE * plan + BYTES:
            return ""
        self._said = True
        by_part = {name: size - self._before[1].get(name, 0) for name, size in parts.items()}
        by_part["other tensors"] = grown - sum(by_part.values())
        name = max(by_part, key=lambda part: by_part[part])
        told = ", ".join(
            f"{part} by {size / 1e6:,.1f} MB" for part, size in by_part.items() if size > 0
        )
        return (
            f"After round {round_number} the run takes about {(plan + grown) / 1e6:,.1f} MB at "
            f"its worst moment, and {plan / 1e6:,.1f} MB were planned. What grew: {told}. "
            f"{_ADVICE[name].capitalize()}. The run goes on."
        )
