"""Indices of how a client differs from the others, and how they rank beside the measured one.

Each index is a number per client, larger where the client is further from the others. Imports no
PyTorch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.spatial.distance import jensenshannon


@dataclass(frozen=True)
class Index:
    """One index of heterogeneity.

    Attributes:
        name: of the index.
        values: of each client.
        correlation: Spearman's rank correlation with the measured σ_h,i; None where ranks are not
            defined.
        chance: its two-sided p-value; exact up to seven clients.
    """

    name: str
    values: tuple[float, ...]
    correlation: float | None
    chance: float | None


def divergences(labels: Sequence[Mapping[str, int]]) -> NDArray[np.float64]:
    """Jensen-Shannon divergence in nats of each client's labels from all labels, float64 [N].

    Args:
        labels: of each client, how many examples have each label.

    Example:
        >>> divergences([{"a": 5}, {"a": 5}]).tolist()
        [0.0, 0.0]
    """
    names = sorted({name for own in labels for name in own})
    counts = np.array([[own.get(name, 0) for name in names] for own in labels], np.float64)
    whole = counts.sum(axis=0)
    return np.array([float(jensenshannon(own, whole)) ** 2 for own in counts])


def index(name: str, values: NDArray[np.float64], measured: NDArray[np.float64]) -> Index:
    """An index with its rank correlation to what was measured, both float64 [N]."""
    shown = tuple(float(value) for value in values)
    there = np.isfinite(values) & np.isfinite(measured)
    mine, theirs = values[there], measured[there]
    if len(mine) < 3 or np.ptp(mine) == 0.0 or np.ptp(theirs) == 0.0:
        return Index(name, shown, None, None)
    found = stats.spearmanr(mine, theirs)
    chance = float(found.pvalue)
    if len(mine) <= 7:
        order = stats.permutation_test(
            (mine,),
            lambda own: stats.spearmanr(own, theirs).statistic,
            permutation_type="pairings",
            n_resamples=np.inf,
        )
        chance = float(order.pvalue)
    return Index(name, shown, float(found.statistic), chance)
