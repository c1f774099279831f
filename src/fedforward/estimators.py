"""Gradient estimates from probes: which probes to run, and what their losses say.

An estimator is a pair of pure functions; it knows nothing of models, clients or rounds.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedforward.steps import Evaluation, Probe, Steps


def two_point_probes(batch: Any, trajectory: Steps, seeds: Sequence[int], mu: float) -> list[Probe]:
    """The 2n probes of the two-point estimate: +μ and -μ along each of n directions.

    FedMeZO, Eq. of the estimator (SPSA): g = (F(θ+μz; B) - F(θ-μz; B)) / 2μ.
    """
    return [
        Probe(batch, trajectory, Steps.of([seed], [sign * mu]))
        for seed in seeds
        for sign in (1.0, -1.0)
    ]


def two_point_gradients(
    evaluations: Sequence[Evaluation], mu: float
) -> tuple[NDArray[np.float32], float]:
    """Projected gradients float32 [n] and the mean loss of all 2n probes.

    Both losses of a pair are checked: where one is not finite the projected gradient is NaN, which
    callers count and skip.
    """
    losses = np.array([evaluation.mean for evaluation in evaluations], dtype=np.float64)
    plus, minus = losses[0::2], losses[1::2]
    with np.errstate(invalid="ignore", over="ignore"):
        gradients = ((plus - minus) / (2.0 * mu)).astype(np.float32)
    gradients[~np.isfinite(gradients)] = np.nan
    return gradients, float(losses.mean())
