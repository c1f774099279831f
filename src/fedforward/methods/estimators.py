"""Gradient estimates from probes: which probes to run, and what their losses say.

An estimator is a pair of pure functions; it knows nothing of models, clients or rounds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedforward.core.errors import FedForwardError
from fedforward.core.registry import ESTIMATORS
from fedforward.core.steps import Evaluation, Probe, Steps


class Estimator(Protocol):
    """How one step of a client measures its projected gradients."""

    @property
    def directions(self) -> int:
        """n, directions of a step; a step is θ ← θ - (η / n) Σ_d g_d z_d."""
        ...

    @property
    def probes_per_step(self) -> int:
        """Forward passes of a step."""
        ...

    def probes(self, batch: Any, trajectory: Steps, directions: Sequence[Steps]) -> list[Probe]:
        """The probes of a step; `directions` are n of them, each a step of coefficient 1."""
        ...

    def gradients(self, evaluations: Sequence[Evaluation]) -> tuple[NDArray[np.float32], float]:
        """Projected gradients float32 [n] and the mean loss of all probes.

        NaN stands where a loss was not finite; callers count and skip such steps.
        """
        ...


def build_estimator(name: str, directions: int, mu: float) -> Estimator:
    """The estimator of a name.

    Raises:
        FedForwardError: there is none, it refuses the numbers, or it is no estimator.
    """
    try:
        built: Estimator = ESTIMATORS.get(name)(directions=directions, mu=mu)
    except TypeError as error:
        raise FedForwardError(
            f"The estimator {name!r} cannot be made with directions and mu: {error}. Mend or "
            "remove the package that adds it."
        ) from error
    if not callable(getattr(built, "gradients", None)):
        raise FedForwardError(
            f"The estimator {name!r} is no Estimator: it has no gradients(). Mend or remove the "
            "package that adds it."
        )
    return built


@dataclass(frozen=True)
class TwoPoint:
    """SPSA as FedMeZO and MeZO have it: g_d = (F(θ+μz_d; B) - F(θ-μz_d; B)) / 2μ.

    Attributes:
        directions: n; the paper has 1.
        mu: μ, the perturbation scale.

    Example:
        >>> TwoPoint(mu=1e-3).probes_per_step
        2
    """

    directions: int = 1
    mu: float = 1e-3

    def __post_init__(self) -> None:
        _check_settings(self.directions, self.mu)

    @property
    def probes_per_step(self) -> int:
        """Both signs of every direction."""
        return 2 * self.directions

    def probes(self, batch: Any, trajectory: Steps, directions: Sequence[Steps]) -> list[Probe]:
        """+μ and -μ along each direction in turn."""
        return [
            Probe(batch, trajectory, direction.scaled(sign * self.mu))
            for direction in directions
            for sign in (1.0, -1.0)
        ]

    def gradients(self, evaluations: Sequence[Evaluation]) -> tuple[NDArray[np.float32], float]:
        """See `Estimator`. Both losses of a pair are checked."""
        losses = np.array([evaluation.mean for evaluation in evaluations], dtype=np.float64)
        plus, minus = losses[0::2], losses[1::2]
        with np.errstate(invalid="ignore", over="ignore"):
            gradients = ((plus - minus) / (2.0 * self.mu)).astype(np.float32)
        gradients[~np.isfinite(gradients)] = np.nan
        return gradients, float(losses.mean())

    def by_example(self, evaluations: Sequence[Evaluation]) -> NDArray[np.float64]:
        """The same of each example's own mean loss, float64 [examples, n]."""
        losses = _by_example(evaluations)
        with np.errstate(invalid="ignore", over="ignore"):
            return (losses[:, 0::2] - losses[:, 1::2]) / (2.0 * self.mu)


@dataclass(frozen=True)
class OneSided:
    """One probe a direction, each compared with the mean of the others.

    l_d = F(θ+μz_d; B), g_d = (l_d - mean of l_k, k ≠ d) / μ. The point θ itself is not measured, so
    n directions cost n forward passes where `TwoPoint` takes 2n. The mean of the others stands for
    F(θ) + (μ/2) tr(H): a forward difference from F(θ) alone would have (μ/2) zᵀHz in it, which is
    larger than the gradient where curvature is. The comparison is the leave-one-out baseline of
    Kool et al. (2019) and of mean-centred evolution strategies: it leaves the estimate of the
    gradient unbiased, and adds a share of 1 / (n - 1) to its variance.

    Attributes:
        directions: n, at least 2.
        mu: μ, the perturbation scale.

    Example:
        >>> OneSided(directions=8, mu=1e-2).probes_per_step
        8
    """

    directions: int = 8
    mu: float = 1e-2

    def __post_init__(self) -> None:
        _check_settings(self.directions, self.mu)
        if self.directions < 2:
            raise FedForwardError(
                "method.estimator = 'one-sided' compares the losses of a step's directions, and "
                f"method.directions = {self.directions} leaves nothing to compare with; use 2 or "
                "more, such as 8."
            )

    @property
    def probes_per_step(self) -> int:
        """Every direction once."""
        return self.directions

    def probes(self, batch: Any, trajectory: Steps, directions: Sequence[Steps]) -> list[Probe]:
        """+μ along each direction in turn."""
        return [Probe(batch, trajectory, direction.scaled(self.mu)) for direction in directions]

    def gradients(self, evaluations: Sequence[Evaluation]) -> tuple[NDArray[np.float32], float]:
        """See `Estimator`. One loss that is not finite makes all of them NaN."""
        losses = np.array([evaluation.mean for evaluation in evaluations], dtype=np.float64)
        if not np.isfinite(losses).all():
            return np.full(self.directions, np.nan, np.float32), float("nan")
        # l_d - mean of the others = (l_d - mean of all) * n / (n - 1).
        away = (losses - losses.mean()) * (self.directions / (self.directions - 1))
        with np.errstate(over="ignore"):
            gradients = (away / self.mu).astype(np.float32)
        gradients[~np.isfinite(gradients)] = np.nan
        return gradients, float(losses.mean())

    def by_example(self, evaluations: Sequence[Evaluation]) -> NDArray[np.float64]:
        """The same of each example's own mean loss, float64 [examples, n]."""
        losses = _by_example(evaluations)
        with np.errstate(invalid="ignore", over="ignore"):
            away = losses - losses.mean(axis=1, keepdims=True)
            return np.asarray(away * (self.directions / (self.directions - 1) / self.mu))


@dataclass(frozen=True)
class FZOO:
    """One-sided differences, normalised by their own spread (FZOO, arXiv 2506.09034).

    l_0 = F(θ; B), l_d = F(θ+μz_d; B), g_d = (l_d - l_0) / σ with σ the standard deviation of the
    l_d, of the sample (n - 1). The authors' code takes the population's (n); rates differ by the
    root of n / (n - 1). σ grows like μ‖∇F‖, so a step's length does not depend on the scale of the
    loss; with the step's 1/n this is the paper's η/(nσ) Σ (l_d - l_0) z_d. Meant for Rademacher
    directions.

    Attributes:
        directions: n, at least 2.
        mu: μ, the perturbation scale.

    Example:
        >>> FZOO(directions=8, mu=1e-3).probes_per_step
        9
    """

    directions: int = 8
    mu: float = 1e-3

    def __post_init__(self) -> None:
        _check_settings(self.directions, self.mu)
        if self.directions < 2:
            raise FedForwardError(
                "method.estimator = 'fzoo' is normalised by the spread of its directions' losses, "
                f"and method.directions = {self.directions} has none; use 2 or more (the paper "
                "has 8)."
            )

    @property
    def probes_per_step(self) -> int:
        """Every direction once, and the point itself."""
        return self.directions + 1

    def probes(self, batch: Any, trajectory: Steps, directions: Sequence[Steps]) -> list[Probe]:
        """The point, then +μ along each direction in turn."""
        away = [Probe(batch, trajectory, direction.scaled(self.mu)) for direction in directions]
        return [Probe(batch, trajectory), *away]

    def gradients(self, evaluations: Sequence[Evaluation]) -> tuple[NDArray[np.float32], float]:
        """See `Estimator`. Losses that are all equal say nothing: their gradients are 0."""
        losses = np.array([evaluation.mean for evaluation in evaluations], dtype=np.float64)
        if not np.isfinite(losses).all():
            return np.full(self.directions, np.nan, np.float32), float("nan")
        away = losses[1:]
        spread = float(away.std(ddof=1))
        gradients = (away - losses[0]) / spread if spread else np.zeros(self.directions)
        return gradients.astype(np.float32), float(losses.mean())


def _by_example(evaluations: Sequence[Evaluation]) -> NDArray[np.float64]:
    """Mean losses, float64 [examples, probes], of probes on the same batch.

    That of an example without a counted token is 0.
    """
    means = [part.sums / np.maximum(part.counts, 1) for part in evaluations]
    return np.stack(means, axis=1)


def _check_settings(directions: int, mu: float) -> None:
    if not isinstance(directions, int) or directions < 1:
        raise FedForwardError(
            f"directions = {directions!r} is not allowed: it must be a whole number, at least 1."
        )
    if not 0.0 < mu < math.inf:
        raise FedForwardError(f"mu = {mu!r} is not allowed: it must be a number above 0.")
