"""Whether figures of several runs can be told apart: t tests over seeds, corrected by Holm.

Runs at the same seeds have the same data and the same order of it, so they are compared in pairs.
Imports no PyTorch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite, nan, sqrt
from statistics import fmean, stdev

#: Chance of calling equal methods different that is accepted, of all comparisons together.
LEVEL = 0.05
PAIRED, WELCH = "paired t test", "Welch's t test"


@dataclass(frozen=True)
class Difference:
    """Two groups of figures, as far as they can be told apart.

    Attributes:
        first: name of a group.
        second: name of the other.
        difference: mean of the second minus mean of the first.
        low: lower end of the 95 % confidence interval of this comparison alone.
        high: its upper end.
        test: `PAIRED` or `WELCH`; empty where there is none.
        seeds: of the smaller group.
        p: of the test alone; NaN where there is none.
        adjusted: p after Holm's correction; NaN where there is none.
        why_not: why there is no test; empty where there is one.
    """

    first: str
    second: str
    difference: float
    low: float
    high: float
    test: str
    seeds: int
    p: float
    adjusted: float
    why_not: str = ""

    @property
    def told_apart(self) -> bool:
        """Whether the spread leaves no doubt that the groups differ."""
        return self.adjusted < LEVEL


def compare_all(
    groups: Mapping[str, Mapping[int, float]], untested: Mapping[str, str] | None = None
) -> list[Difference]:
    """Every pair of groups, in their order, with p corrected for the number of tests.

    Args:
        groups: by name a figure for each seed.
        untested: why a group is compared with none, by name.
    """
    reasons = untested or {}
    names = list(groups)
    pairs = [(a, b) for n, a in enumerate(names) for b in names[n + 1 :]]
    found = []
    for a, b in pairs:
        pair = _compare(a, b, groups[a], groups[b])
        if reason := reasons.get(a) or reasons.get(b):
            pair = Difference(a, b, pair.difference, nan, nan, "", pair.seeds, nan, nan, reason)
        found.append(pair)
    tested = [n for n, each in enumerate(found) if not each.why_not]
    corrected = holm([found[n].p for n in tested])
    for place, adjusted in zip(tested, corrected, strict=True):
        found[place] = replace(found[place], adjusted=adjusted)
    return found


def _compare(
    first: str, second: str, one: Mapping[int, float], other: Mapping[int, float]
) -> Difference:
    seeds = min(len(one), len(other))
    nothing = Difference(first, second, nan, nan, nan, "", seeds, nan, nan)
    for name, values in ((first, one), (second, other)):
        if not values:
            return replace(nothing, why_not=f"no run of {name} has a figure")
    known = all(map(isfinite, (*one.values(), *other.values())))
    if not known:
        return replace(nothing, why_not="a figure is not finite")
    difference = fmean(other.values()) - fmean(one.values())
    nothing = replace(nothing, difference=difference)
    if seeds < 2:
        return replace(nothing, why_not="one seed cannot tell")
    if one.keys() == other.keys():
        test, (p, half) = PAIRED, paired([other[seed] - one[seed] for seed in one])
    else:
        test, (p, half) = WELCH, welch(list(one.values()), list(other.values()))
    low, high = difference - half, difference + half
    return Difference(first, second, difference, low, high, test, seeds, p, nan)


def paired(differences: Sequence[float]) -> tuple[float, float]:
    """Student's t test that the mean of at least two differences is 0.

    Returns:
        p of both sides, and half the width of the 95 % confidence interval.
    """
    count = len(differences)
    error = stdev(differences) / sqrt(count)
    return _t_test(fmean(differences), error, count - 1.0)


def welch(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Welch's t test that two groups of at least two figures have the same mean.

    Returns:
        p of both sides, and half the width of the 95 % confidence interval.
    """
    parts = [stdev(group) ** 2 / len(group) for group in (one, other)]
    total = sum(parts)
    freedom = inf
    if total > 0:
        pairs = zip(parts, (one, other), strict=True)
        freedom = total**2 / sum(part**2 / (len(group) - 1) for part, group in pairs)
    return _t_test(fmean(other) - fmean(one), sqrt(total), freedom)


def _t_test(mean: float, error: float, freedom: float) -> tuple[float, float]:
    """p and half the width of the interval; without any spread a difference is certain."""
    if error <= 1e-12 * abs(mean) or error == 0:
        return (1.0 if mean == 0 else 0.0), 0.0
    from scipy import stats

    p = 2 * float(stats.t.sf(abs(mean) / error, freedom))
    return p, float(stats.t.ppf(0.975, freedom)) * error


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p of several tests, so that all together keep the level.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    corrected, highest = [0.0] * len(p), 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=lambda n: p[n])):
        highest = max(highest, min(1.0, (len(p) - rank) * p[place]))
        corrected[place] = highest
    return corrected


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation of a sample; of one value the deviation is NaN, of none both."""
    if not values:
        return nan, nan
    return fmean(values), stdev(values) if len(values) > 1 else nan
