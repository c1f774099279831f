"""FedKSeed (arXiv 2312.06353): every direction of a run comes from K candidate seeds.

Faithful to the paper: a client draws a candidate for each local step; what a run has done to θ is
one accumulator for each candidate, θ = θ_base - Σ_j a_j z(s_j), so that catching up costs at most
K directions however many rounds were missed. It departs in exactness: accumulators are 64-bit
integers in units of 2^-40 and θ is always rounded once from the base, so that the order of
additions is without effect and every party holds the same bits. Which candidate a step drew is
derived from (run seed, round, client, step), so that a report is H scalars and no indices.

FedKSeed-Pro draws candidates by importance: softmax of the candidates' mean |g|, scaled to [0, 1]
between the least and the greatest (our reading; the wire form, 16-bit odds, is ours too).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedforward.core.errors import UpdateNotFiniteError
from fedforward.core.seeds import candidate_seed, dither_seed, draws
from fedforward.core.steps import Steps, Update
from fedforward.messages.codec import (
    ACCUMULATOR_UNIT,
    NO_ODDS,
    Entry,
    Increments,
    MessageError,
    Report,
)
from fedforward.methods.base import Method, NoTracker, Returned, Tracker

#: Odds of the least likely candidate; the most likely has e times as much.
LEAST_ODDS = 20000
#: A sum of so many of a round's amounts still fits 64 bits.
LARGEST_AMOUNT = 2.0**46


@dataclass(frozen=True)
class FedKSeed(Method):
    """Directions from K candidates.

    Attributes:
        pool: K.
        importance: whether candidates are drawn by importance (FedKSeed-Pro).
    """

    name: ClassVar[str] = "fedkseed"
    pool: int = 4096
    importance: bool = False

    @property
    def candidates(self) -> int:
        """K."""
        return self.pool

    @property
    def sends_odds(self) -> bool:
        """Where importance asks for it."""
        return self.importance

    def places(self, round_number: int, client: int, odds: NDArray[np.uint16]) -> NDArray[np.int64]:
        """Which candidates a client draws in a round, int64 [H * n]; integer arithmetic alone."""
        count = self.local_steps * self.directions
        drawn = draws(self.run_seed, "draw", count, round_number, client)
        if not len(odds):
            uniform: NDArray[np.int64] = (drawn % np.uint64(self.pool)).astype(np.int64)
            return uniform
        ends = np.cumsum(odds.astype(np.uint64))
        weighted: NDArray[np.int64] = np.searchsorted(ends, drawn % ends[-1], side="right")
        return weighted.astype(np.int64)

    def seeds(self, round_number: int, client: int, odds: NDArray[np.uint16]) -> NDArray[np.uint64]:
        """The seeds of the candidates that were drawn.

        Raises:
            MessageError: the odds are of another number of candidates.
        """
        if len(odds) not in (0, self.pool):
            raise MessageError(
                f"A task with odds of {len(odds)} candidate seeds was refused: this run has "
                f"{self.pool} (method.candidates)."
            )
        return candidate_seeds(self.run_seed, self.pool)[self.places(round_number, client, odds)]

    def tracker(self) -> Tracker:
        """The mean |g| of every candidate, where importance asks for it."""
        return Amplitudes(self) if self.importance else NoTracker()

    def aggregate(
        self, round_number: int, returned: Sequence[Returned], odds: NDArray[np.uint16]
    ) -> Entry:
        """-p_i (η_i / n) g_ih for each candidate, rounded to the accumulators' unit, added up.

        Raises:
            UpdateNotFiniteError: an amount is beyond 64 bits.
        """
        places = [self.places(round_number, part.report.client, odds) for part in returned]
        amounts = []
        for part in returned:
            rate = -part.weight * (part.learning_rate / self.directions)
            exact = np.rint(rate * part.report.gradients.astype(np.float64) / ACCUMULATOR_UNIT)
            if not (np.abs(exact) < LARGEST_AMOUNT).all():
                raise UpdateNotFiniteError(
                    f"The update of round {round_number + 1} is beyond what accumulators hold and "
                    "was not written. Lower method.learning_rate; the rounds before are kept."
                )
            amounts.append(exact.astype(np.int64))
        touched, where = np.unique(np.concatenate(places), return_inverse=True)
        sums = np.zeros(len(touched), np.int64)
        np.add.at(sums, where, np.concatenate(amounts))
        return Entry(round_number, (), increments=Increments(touched.astype(np.uint32), sums))


class Amplitudes:
    """The mean |g| of every candidate over all reports so far, and the odds that follow from it."""

    def __init__(self, method: FedKSeed) -> None:
        self.method = method
        self.sums = np.zeros(method.pool, np.float64)
        self.counts = np.zeros(method.pool, np.int64)

    def odds(self) -> NDArray[np.uint16]:
        """Uint16 [K]: softmax of the means scaled to [0, 1]; candidates not drawn yet have 0."""
        means = self.sums / np.maximum(1, self.counts)
        width = float(means.max() - means.min())
        if not width:
            return NO_ODDS
        scaled = (means - means.min()) / width
        odds: NDArray[np.uint16] = np.rint(LEAST_ODDS * np.exp(scaled)).astype(np.uint16)
        return odds

    def observe(self, round_number: int, reports: Iterable[Report]) -> None:
        """Add a round's |g|, drawn by the odds that stood before it."""
        odds = self.odds()
        for report in reports:
            places = self.method.places(round_number, report.client, odds)
            np.add.at(self.sums, places, np.abs(report.gradients.astype(np.float64)))
            np.add.at(self.counts, places, 1)


@cache
def candidate_seeds(run_seed: int, pool: int) -> NDArray[np.uint64]:
    """The seeds of all candidates, uint64 [K]."""
    return np.array([candidate_seed(run_seed, place) for place in range(pool)], dtype=np.uint64)


class Accumulators:
    """What a run has done to θ so far, one exact number for each candidate.

    Attributes:
        values: int64 [K], in units of `ACCUMULATOR_UNIT`.
    """

    def __init__(self, run_seed: int, pool: int) -> None:
        self.run_seed = run_seed
        self.values = np.zeros(pool, np.int64)

    def add(self, increments: Increments) -> None:
        """Take in a round.

        Raises:
            MessageError: it names a candidate that does not exist.
        """
        if len(increments.places) and int(increments.places[-1]) >= len(self.values):
            raise MessageError(
                f"A ledger entry for candidate seed {int(increments.places[-1])} was refused: this "
                f"run has {len(self.values)} (method.candidates)."
            )
        self.values[increments.places] += increments.amounts

    def update(self, round_number: int) -> Update:
        """θ = round(θ_base + Σ_j a_j z(s_j)), in the order of the candidates."""
        places = np.flatnonzero(self.values)
        seeds = candidate_seeds(self.run_seed, len(self.values))[places]
        amounts = (self.values[places] * ACCUMULATOR_UNIT).astype(np.float32)
        return Update(
            Steps(seeds, amounts), dither_seed(self.run_seed, round_number), from_base=True
        )
