"""The vocabulary that everything above the tensors speaks: steps, updates, probes, evaluations.

A local trajectory, a client's upload, a round's update and a whole run are sums of steps
θ_base + Σ_k c_k · z(s_k). Nothing here imports PyTorch; a batch is opaque to all but the model.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Steps:
    """A short ordered list of (seed, coefficient): the displacement Σ_k c_k · z(s_k).

    Where blocks differ, each block b has coefficients of its own: its coordinates move by
    Σ_k c_bk · z(s_k), and a step whose coefficient is 0 there is not added to them at all.

    Attributes:
        seeds: uint64 [K].
        coefficients: float32 [K], or [B, K] with a row for each block of the layout.

    Example:
        >>> z = Steps.of(seeds=[7], coefficients=[1.0])
        >>> len(z + -0.5 * z)
        2
    """

    seeds: NDArray[np.uint64]
    coefficients: NDArray[np.float32]

    @classmethod
    def of(cls, seeds: Iterable[int], coefficients: Iterable[float]) -> "Steps":
        """Steps from plain numbers; coefficients are rounded to float32 once, here."""
        float64 = np.array(list(coefficients), dtype=np.float64)
        with np.errstate(over="ignore"):
            return cls(np.array(list(seeds), dtype=np.uint64), float64.astype(np.float32))

    def __len__(self) -> int:
        return len(self.seeds)

    def __add__(self, other: "Steps") -> "Steps":
        first, second = self.coefficients, other.coefficients
        if first.ndim != second.ndim:
            rows = max(first, second, key=lambda part: part.ndim).shape[0]
            first, second = (np.broadcast_to(c, (rows, c.shape[-1])) for c in (first, second))
        return Steps(
            np.concatenate((self.seeds, other.seeds)), np.concatenate((first, second), axis=-1)
        )

    def __getitem__(self, part: slice) -> "Steps":
        return Steps(self.seeds[part], self.coefficients[..., part])

    def starts_with(self, prefix: "Steps") -> bool:
        """Whether the first steps are those of `prefix`, bit for bit."""
        k = len(prefix)
        if not k:
            return True
        mine, theirs = self.coefficients[..., :k], prefix.coefficients
        return (
            k <= len(self)
            and mine.shape == theirs.shape
            and self.seeds[:k].tobytes() == prefix.seeds.tobytes()
            and mine.tobytes() == theirs.tobytes()
        )

    @property
    def by_block(self) -> bool:
        """Whether blocks have coefficients of their own."""
        return self.coefficients.ndim == 2

    def scaled(self, factor: float) -> "Steps":
        """Every coefficient times a number, rounded to float32 once."""
        with np.errstate(over="ignore"):
            return Steps(self.seeds, (self.coefficients * np.float64(factor)).astype(np.float32))

    def __mul__(self, factor: float) -> "Steps":
        """Every coefficient times a number; see `scaled`.

        Example:
            >>> (2 * Steps.of([7], [0.5])).coefficients.tolist()
            [1.0]
        """
        return self.scaled(factor)

    __rmul__ = __mul__

    def within(self, active: NDArray[np.bool_]) -> "Steps":
        """The same steps in the active blocks alone.

        Args:
            active: bool [B].
        """
        rows = np.where(active[:, None], self.coefficients, np.float32(0.0))
        return Steps(self.seeds, rows.astype(np.float32))

    def moves(self, block: int) -> bool:
        """Whether any step moves a block."""
        return bool(self.coefficients[block].any()) if self.by_block else bool(len(self))

    def block(self, block: int) -> "Steps":
        """The steps of one block, coefficients float32 [K' <= K]."""
        if not self.by_block:
            return self
        row = self.coefficients[block]
        there = row != 0
        return Steps(self.seeds[there], row[there])


NO_STEPS = Steps.of((), ())


@dataclass(frozen=True)
class Update:
    """One committed change: θ ← round(decay · θ + Σ_k c_k · z(s_k)).

    Attributes:
        steps: in the order in which they are added.
        dither_seed: of the stochastic rounding when the weights are in half precision.
        decay: multiplies the weights before the steps are added.
        from_base: the steps are added to the base weights in place of the current ones.
    """

    steps: Steps
    dither_seed: int
    decay: float = 1.0
    from_base: bool = False

    def block(self, block: int) -> "Update":
        """What the update does to one block."""
        return replace(self, steps=self.steps.block(block)) if self.steps.by_block else self


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


@dataclass(frozen=True)
class ProbePlan:
    """How probes are grouped into forward passes. Fixed when a run starts and stored with it.

    Attributes:
        probes_per_call: most probes that share one forward pass.
        threads: PyTorch and kernel threads.
        trajectory: "recompute" adds a client's local steps to the weights in every probe; "cache"
            keeps their sum in a float32 copy of the tuned weights. Both round once from the same
            sum, so the bits are the same.
        evaluation_rows: examples per forward pass of a held-out evaluation.
        device: where the run was started; the last bits of losses depend on it.
        tokens_per_call: tokens of a forward pass that fewer probes share, or with adapters fewer
            rows, rather than exceed it; 0 is any number.
        placement: where the parts of a network lie that is spread over devices; empty for one.
        alone: why probes of this model cannot share a forward pass; empty if they can.
        shares_prefix: whether probes of a batch share what lies below the first block they move.
        left_out: what of the model is not tuned, and why; empty if nothing.
        joins_choices: whether label words of one token share a row, which is the prompt.
        most_branching: tokens of a row up to which other label words share one as well, as
            endings that do not see each other; 0 is none.
        keeps_activations: whether what enters the first tuned block is computed by row and kept;
            how much memory that may take does not matter to any bit.
        not_kept: why it is not, where that was asked for; else empty.
    """

    probes_per_call: int
    threads: int
    trajectory: str
    evaluation_rows: int
    device: str = "cpu"
    tokens_per_call: int = 0
    placement: str = ""
    alone: str = ""
    shares_prefix: bool = True
    left_out: str = ""
    joins_choices: bool = False
    most_branching: int = 0
    keeps_activations: bool = False
    not_kept: str = ""
