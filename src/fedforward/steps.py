"""The vocabulary that everything above the tensors speaks: steps, updates, probes, evaluations.

A local trajectory, a client's upload, a round's update and a whole run are sums of steps
θ_base + Σ_k c_k · z(s_k). Nothing here imports PyTorch; a batch is opaque to all but the model.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Steps:
    """A short ordered list of (seed, coefficient): the displacement Σ_k c_k · z(s_k).

    Attributes:
        seeds: uint64 [K].
        coefficients: float32 [K].
    """

    seeds: NDArray[np.uint64]
    coefficients: NDArray[np.float32]

    @classmethod
    def of(cls, seeds: Iterable[int], coefficients: Iterable[float]) -> "Steps":
        """Steps from plain numbers; coefficients are rounded to float32 once, here."""
        wide = np.array(list(coefficients), dtype=np.float64)
        with np.errstate(over="ignore"):
            return cls(np.array(list(seeds), dtype=np.uint64), wide.astype(np.float32))

    def __len__(self) -> int:
        return len(self.seeds)

    def __add__(self, other: "Steps") -> "Steps":
        return Steps(
            np.concatenate((self.seeds, other.seeds)),
            np.concatenate((self.coefficients, other.coefficients)),
        )

    def __getitem__(self, part: slice) -> "Steps":
        return Steps(self.seeds[part], self.coefficients[part])

    def starts_with(self, prefix: "Steps") -> bool:
        """Whether the first steps are those of `prefix`, bit for bit."""
        k = len(prefix)
        return (
            k <= len(self)
            and self.seeds[:k].tobytes() == prefix.seeds.tobytes()
            and self.coefficients[:k].tobytes() == prefix.coefficients.tobytes()
        )


NO_STEPS = Steps.of((), ())


@dataclass(frozen=True)
class Update:
    """One committed change: θ ← round(decay · θ + Σ_k c_k · z(s_k)).

    Attributes:
        steps: in the order in which they are added.
        dither_seed: of the stochastic rounding when the weights are in half precision.
        decay: multiplies the weights before the steps are added.
    """

    steps: Steps
    dither_seed: int
    decay: float = 1.0


@dataclass(frozen=True)
class Probe:
    """A forward pass at θ + trajectory + perturbation on one batch.

    The two parts are one sum, in this order; they are kept apart because probes of a step share
    the trajectory.
    """

    batch: Any
    trajectory: Steps = NO_STEPS
    perturbation: Steps = NO_STEPS


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a probe measured, per example of its batch.

    Attributes:
        sums: float64 [examples], the summed loss of an example's counted tokens, in nats.
        counts: int64 [examples], how many tokens were counted.
    """

    sums: NDArray[np.float64]
    counts: NDArray[np.int64]

    @property
    def mean(self) -> float:
        """Mean loss per counted token, in nats; NaN if nothing was counted."""
        count = int(self.counts.sum())
        return float(self.sums.sum() / count) if count else float("nan")


class ForwardModel(Protocol):
    """The line between methods, which see scalars, and models, which see tensors."""

    def evaluate(self, probes: Sequence[Probe]) -> list[Evaluation]:
        """Measure each probe; the weights are the same afterwards, bit for bit."""
        ...

    def commit(self, updates: Sequence[Update]) -> None:
        """Apply updates to the weights in order, each with its own rounding."""
        ...

    def digest(self) -> bytes:
        """SHA-256 of the tuned state (32 bytes)."""
        ...
