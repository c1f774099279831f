"""`method.learning_rate = "auto"`: a rate from what the clients measure along the last update.

Before a client begins a round, it measures its first batches at θ - Δ, θ and θ + Δ, where Δ is the
last round's update: the losses at 0, 1 and 2 times that update, on data that it was not made from.
A parabola through their means has its least value at the rate that was best for that round. Slopes
and curvatures are averaged over rounds, because each is noisy. The reports of a round count at the
rate that they themselves lead to. Local steps are shorter by the number of participants: what
averages the directions of n clients bears a step that is n times as long as what a client's own
directions bear. All of it follows from the ledger, so a server that resumes has the same rates.

The first rate is small: a step moves each weight by no more than a probe does (`mu`). Rates are
then multiplied by at most 3 a round, so that a good one is found within a few rounds, and by at
most 1.4 or 1.1 where the last update has not lowered the loss beyond doubt. They fall below a
quarter of the first one only where that is too large beyond doubt. The less certain the average
slope is, the more rounds are averaged. Steps that a schedule has made short count for less.
"""

import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedforward.federation.ledger import Round
from fedforward.messages.report import ClientResult

#: Multiples of the last update at which clients measure.
SCALES = (0.0, 1.0, 2.0)
#: How much of the averages a new round replaces, at most, and at least: the less, the more of the
#: average slope may be chance.
FRESH, LEAST_FRESH = 0.3, 0.05
#: Most that a rate is multiplied with in a round: where the loss has fallen beyond doubt, where a
#: larger rate is better beyond doubt, and where neither is known. Chance moves a rate slowly.
GROWTH, SURE_GROWTH, DOUBTFUL_GROWTH = 3.0, 1.4, 1.1
#: Least that it is multiplied with; and where twice the last update was worse than none.
SHRINKAGE, LEAST_SHRINKAGE = 0.7, 0.25
#: The least rate without proof that it is too large, as a part of the first one.
FLOOR = 4.0
#: Standard errors by which the loss must have risen for an update to be taken back.
SIGNIFICANT = 2.0
#: A loss above this multiple of the one before the update has leapt: one standard error is enough.
LEAP = 2.0
#: Clients from which on the spread of their rises says how large chance is.
LEAST_CLIENTS = 4
#: Losses beyond this stand for what is not finite.
LARGEST_LOSS = 1e30
#: Clients from which on one that differs from the others is left out, and by how many times what
#: chance explains it has to differ.
LEAST_JUDGES, OUTLIER = 3, 10.0
#: How many times the median standard error one that a client tells may count as.
SURE_OF = 5.0
#: How much of the logarithm of the projected gradients' mean square a new round replaces.
FRESH_SQUARE = 0.4
#: A step that is shorter than this part of the rate moves no rate: chance divided by its length is
#: large. Such are the last ones of a schedule.
SHORT = 0.5
#: A rate above this is of no use, and its square would not be finite much longer.
LARGEST_RATE = 1e6


#: The probes along the last update, as a share of a round's.
SEARCH_SHARE = 0.2


def line_search_batches(probes: int) -> int:
    """Batches on which a client measures along the last update, from the probes of its round."""
    return max(1, round(SEARCH_SHARE * probes / len(SCALES)))


@dataclass(frozen=True)
class LineSearch:
    """What the clients of a round measured along the update before it.

    Attributes:
        losses: float64 [3], the weighted mean loss at 0, 1 and 2 times the update.
        error: the standard error of the difference between the first two.
    """

    losses: NDArray[np.float64]
    error: float

    @property
    def slope(self) -> float:
        """How fast the loss falls at the beginning of the update, per length of the update."""
        before, now, after = map(float, self.losses)
        return (3.0 * before - 4.0 * now + after) / 2.0

    @property
    def curvature(self) -> float:
        """The second derivative along the update, per squared length."""
        before, now, after = map(float, self.losses)
        return before - 2.0 * now + after

    @property
    def has_risen(self) -> bool:
        """Whether the update has made the loss larger, by more than chance explains.

        Where it is far larger at some examples only, the spread of the rises is large as well. The
        loss at twice the update then says that it was too long.
        """
        before, now = map(float, self.losses[:2])
        if now >= LARGEST_LOSS:
            # Not finite, so that no error of the difference is known.
            return before < LARGEST_LOSS
        leapt = self.bounds and now > LEAP * before and now - before > self.error
        return leapt or not now - before <= SIGNIFICANT * self.error

    @property
    def has_fallen(self) -> bool:
        """Whether the update has made the loss smaller, by more than chance explains."""
        return bool(self.losses[0] - self.losses[1] > SIGNIFICANT * self.error)

    @property
    def best(self) -> float:
        """The multiple of the update at which the parabola is least; inf where it has no least."""
        return self.slope / self.curvature if self.curvature > 0.0 else math.inf

    @property
    def bounds(self) -> bool:
        """Whether twice the update is worse than none, by more than chance explains."""
        return bool(self.losses[2] - self.losses[0] > SIGNIFICANT * 2.0 * self.error)

    @property
    def was_too_long(self) -> bool:
        """Whether the update, or twice it, has made the loss larger because it is too long.

        A loss that rises from the beginning, in a line, says nothing of the length.
        """
        if self.losses.max() >= LARGEST_LOSS:
            return True
        return (self.has_risen or self.bounds) and self.curvature > -2.0 * self.slope


def line_search(results: Sequence[ClientResult]) -> LineSearch | None:
    """The weighted mean of what clients measured, outliers left out; None if none did."""
    known = [part for part in results if len(part.report.line_search)]
    if not known:
        return None
    weights = np.array([part.weight for part in known])
    rows = np.array([part.report.line_search for part in known], np.float64)
    if len(known) >= LEAST_JUDGES:
        kept = plausible(rows)
        weights, rows = weights[kept], rows[kept]
        rows[:, 3] = np.minimum(rows[:, 3], SURE_OF * np.median(rows[:, 3]))
    weights = weights / weights.sum()
    return LineSearch(weights @ rows[:, :3], _error(weights, rows))


def plausible(rows: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which clients' rises lie near those of most.

    Sites differ in how large their losses are, so rises are compared, and not losses. A rise is an
    outlier that is further from the median than ten times what chance explains: the median distance
    and the median of the standard errors that clients tell.

    Args:
        rows: float64 [clients, 4], as `Report.line_search`.

    Returns:
        bool [clients]; all, if no client is near in both rises.

    Example:
        >>> honest = [[1.0, 0.9, 0.9, 0.01], [2.0, 1.9, 1.8, 0.02], [1.0, 0.8, 0.8, 0.01]]
        >>> plausible(np.array([*honest, [1.0, 1e9, 1.0, 0.01]])).tolist()
        [True, True, True, False]
    """
    rises = rows[:, 1:3] - rows[:, :1]
    away = np.abs(rises - np.median(rises, axis=0))
    chance = np.median(away, axis=0) + np.median(rows[:, 3]) * np.array([1.0, 2.0])
    kept: NDArray[np.bool_] = np.logical_and.reduce(away <= OUTLIER * chance, axis=1)
    return kept if kept.any() else np.ones(len(rows), np.bool_)


def _error(weights: NDArray[np.float64], rows: NDArray[np.float64]) -> float:
    """The standard error of the mean rise: from what clients say of theirs, or from their spread.

    A client with a single example takes its whole rise for chance. Where there are several clients
    the spread of their rises is an estimate as well, and the smaller of the two counts. The fewer
    they are, the more uncertain it is: it is multiplied by about what Student's t asks for.

    Args:
        weights: float64 [clients], which sum to 1.
        rows: float64 [clients, 4], as `Report.line_search`.
    """
    told = math.sqrt(float((weights**2) @ (rows[:, 3] ** 2)))
    count = len(rows)
    if count < LEAST_CLIENTS or rows[:, :2].max() >= LARGEST_LOSS:
        return told
    rises = rows[:, 1] - rows[:, 0]
    away = rises - weights @ rises
    spread = math.sqrt(float((weights**2) @ away**2) * count / (count - 1))
    return min(told, spread * (1.0 + 2.0 / (count - 1)))


def mean_square(results: Sequence[ClientResult]) -> float:
    """Of a round's projected gradients, those of skipped steps left out; 0 if none is left."""
    told = np.concatenate([part.report.gradients.astype(np.float64) for part in results])
    told = told[told != 0.0]
    return float(np.mean(told**2)) if len(told) else 0.0


class RateSearch:
    """The rate of the coming round, from the rounds before.

    A rate here is the root mean square of a step, per direction and coordinate: what multiplies the
    projected gradients is the rate divided by the root of their mean square.

    Attributes:
        rate: of the coming round, before its schedule.
        mean_square: of the projected gradients; 0 before the first round.
        applied: the mean rate of the last round's steps; 0 where it took back another.
    """

    def __init__(self, mu: float, directions: int) -> None:
        """`directions`: that a step averages."""
        # Of n directions averaged, a step is as long as one direction's over the root of n.
        self.rate = mu * math.sqrt(directions)
        self._least = self.rate / FLOOR
        self.mean_square = 0.0
        self.applied = 0.0
        self._slope = self._curvature = 0.0
        #: The variance of the average slope, by chance, and the rounds that it is of.
        self._doubt, self._seen = 0.0, 0

    def factor(self, schedule: float) -> float:
        """What multiplies projected gradients; 0 before their size is known.

        Args:
            schedule: of the round, which multiplies the rate.
        """
        return schedule * self.rate / math.sqrt(self.mean_square) if self.mean_square else 0.0

    def takes_back(self, results: Sequence[ClientResult]) -> bool:
        """Whether what a round's clients measured says that the last update has to go."""
        found = line_search(results)
        return found is not None and self.applied > 0.0 and found.has_risen

    def rated(
        self,
        results: Sequence[ClientResult],
        multipliers: Mapping[int, float],
        last: bool = False,
    ) -> list[ClientResult]:
        """A round's results at the rate that what they measured leads to.

        Args:
            multipliers: of each client's rate, the schedule among them.
            last: whether no round follows that could take this one back: its rate does not grow.
        """
        now = copy(self)
        now._learn(line_search(results))
        if last:
            now.rate = min(now.rate, self.rate)
        # Projected gradients that are suddenly large make no longer step than others.
        now.mean_square = max(now.mean_square, mean_square(results))
        return [
            replace(part, learning_rate=now.factor(multipliers[part.report.client]))
            for part in results
        ]

    def observe(self, record: Round) -> None:
        """Take in a round that is in the ledger: what was measured before it, and its own step."""
        taken_back = self.takes_back(record.results)
        self._learn(line_search(record.results))
        square = mean_square(record.results)
        self.applied = 0.0
        if square and not taken_back:
            known = self.mean_square
            rates = [part.weight * part.learning_rate for part in record.results]
            self.applied = math.sqrt(square) * sum(rates)
            # Of logarithms, so that one round whose clients went astray counts for little.
            self.mean_square = known * (square / known) ** FRESH_SQUARE if known else square

    def lower(self, factor: float) -> None:
        """Take a part of the rate, and of the least one: rounds were taken back by the last one."""
        self.rate *= factor
        self._least = min(self._least, self.rate)
        self.applied = 0.0

    @property
    def _fresh(self) -> float:
        """How much of the averages the coming round replaces."""
        # The first rounds all count alike.
        least = max(LEAST_FRESH, 1.0 / (1 + self._seen))
        if not self._doubt:
            return max(FRESH, least)
        certain = abs(self._slope) / (SIGNIFICANT * math.sqrt(self._doubt))
        return max(FRESH * min(1.0, certain), least)

    def _learn(self, found: LineSearch | None) -> None:
        """Take in what was measured along the last update, if that was a step."""
        if found is None or not self.applied:
            return
        length = min(1.0, self.applied / self.rate)
        if found.losses.max() < LARGEST_LOSS:
            # As in least squares a slope weighs as the square of its step's length.
            fresh = self._fresh * length**2
            self._seen += 1
            self._slope += fresh * (found.slope / self.applied - self._slope)
            bend = found.curvature / self.applied**2
            self._curvature += fresh * length**2 * (bend - self._curvature)
            error = fresh * found.error / self.applied
            self._doubt = (1.0 - fresh) ** 2 * self._doubt + error * error
        if found.was_too_long:
            own = min(1.0, max(found.best, LEAST_SHRINKAGE))
            self.rate *= min(own, SHRINKAGE) if found.has_risen else own
            self._least = min(self._least, self.rate)
            return
        if length < SHORT:
            return
        best, low, high = self._best()
        if found.has_fallen:
            # The averages are late where the curvature grows fast.
            best = min(best, 2.0 * found.best * self.rate)
        sure = GROWTH if found.has_fallen else SURE_GROWTH
        most = sure if found.has_fallen or low > self.rate else DOUBTFUL_GROWTH
        least = SHRINKAGE if high < self.rate else 1.0 / DOUBTFUL_GROWTH
        floor = max(least * self.rate, min(self._least, self.rate, high))
        self.rate = min(max(best, floor), most * self.rate, LARGEST_RATE)

    def _best(self) -> tuple[float, float, float]:
        """The rate at which the averages are best, and what it lies between beyond doubt."""
        doubt = SIGNIFICANT * math.sqrt(self._doubt)
        if self._curvature > 0.0:
            best, by = self._slope / self._curvature, doubt / self._curvature
            return best, best - by, best + by
        falls = [slope > 0.0 for slope in (self._slope, self._slope - doubt, self._slope + doubt)]
        best, low, high = (math.inf if fall else 0.0 for fall in falls)
        return best, low, high
