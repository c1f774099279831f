"""Noise on projected gradients: DPZero's form (arXiv 2310.09639, algorithm 2).

A step of a client draws a Poisson sample of its examples. Each example's K differences of losses
are clipped as one vector, their sum gets noise, and the client moves along and reports what comes
out. Nothing else of the sample is used or leaves. Sums and noise are whole multiples of one unit:
no bit of what comes out says more than the number does. Imports no PyTorch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fedforward.core.entropy import Entropy, SystemEntropy
from fedforward.core.steps import Evaluation, Probe, Steps
from fedforward.methods.base import Method
from fedforward.methods.estimators import Estimator

Noise = Literal["gaussian", "laplace"]
#: Units of the grid that the scale of the noise has.
UNITS = 2**30
#: What clipped vectors are shortened by, so that no rounding on the way makes one too long.
_SHORTER = 1.0 - 2.0**-40


class ByExample(Protocol):
    """An `Estimator` that can say what each example alone says."""

    def by_example(self, evaluations: Sequence[Evaluation]) -> NDArray[np.float64]:
        """Projected gradients of each example's mean loss, float64 [examples, n]."""
        ...


@dataclass(frozen=True)
class Mechanism:
    """Clipping and noise of one step.

    Attributes:
        clip: C, most that an example's vector of n projected gradients may be long.
        noise_multiplier: σ; σC is the scale of the noise in each of a sum's n numbers.
        expected: B, examples that a sample is expected to have; sums are divided by it.
        chance: q, with which each example enters a sample.
        examples: what is said in place of how many examples there are.
        noise: "gaussian", with the L2 length and deviation σC, or "laplace", with the L1 length
            and weights exp(-|x| / σC).
        entropy: where samples and noise come from.

    Example:
        >>> Mechanism(clip=1.0, noise_multiplier=0.0, expected=2, chance=1.0, examples=2).release(
        ...     np.array([[3.0, 4.0], [0.0, 0.5]])
        ... ).round(6)
        array([0.3 , 0.65], dtype=float32)
    """

    clip: float
    noise_multiplier: float
    expected: int
    chance: float
    examples: int
    noise: Noise = "gaussian"
    entropy: Entropy = field(default_factory=SystemEntropy, compare=False)

    def clipped(self, vectors: NDArray[np.float64]) -> NDArray[np.float64]:
        """Rows shortened to length C; a row that is not finite becomes 0.

        Args:
            vectors: float64 [examples, n].
        """
        known = np.where(np.isfinite(vectors).all(axis=1, keepdims=True), vectors, 0.0)
        # Divided first, so that squares stay in range.
        largest = np.abs(known).max(axis=1, keepdims=True, initial=0.0)
        scale = np.where(largest > 0, largest, 1.0)
        order = 1 if self.noise == "laplace" else 2
        lengths = scale * np.linalg.norm(known / scale, ord=order, axis=1, keepdims=True)
        return np.asarray(known * np.minimum(1.0, self.clip / np.maximum(lengths, self.clip)))

    @property
    def unit(self) -> float:
        """The step of the grid: σC / 2³⁰."""
        return (self.noise_multiplier or 1.0) * self.clip / UNITS

    def total(self, vectors: NDArray[np.float64]) -> NDArray[np.int64]:
        """Σ clipped + noise in whole units, int64 [n].

        Each number is rounded towards 0, so that no vector gets longer.

        Args:
            vectors: float64 [examples of the sample, n]; there may be none.
        """
        units = np.trunc(self.clipped(vectors) * (_SHORTER / self.unit))
        drawn = self.entropy.laplace if self.noise == "laplace" else self.entropy.gaussian
        total: NDArray[np.int64] = units.astype(np.int64).sum(axis=0)
        return total + drawn(vectors.shape[1], UNITS) if self.noise_multiplier else total

    def release(self, vectors: NDArray[np.float64]) -> NDArray[np.float32]:
        """(Σ clipped + noise) / B, float32 [n]; it depends on nothing but `total`."""
        return np.asarray(self.total(vectors) * (self.unit / self.expected), np.float32)

    def applied(self, method: Method) -> Method:
        """The method with estimates that have gone through this mechanism."""
        return replace(method, estimator=PrivateEstimator(method.estimator, self))


@dataclass(frozen=True)
class PrivateEstimator:
    """An estimator of samples, each a list of batches that hold its examples.

    Attributes:
        inner: measures; it is a `ByExample` as well.
        mechanism: what its measurements go through.
    """

    inner: Estimator
    mechanism: Mechanism

    @property
    def directions(self) -> int:
        """See `Estimator`."""
        return self.inner.directions

    @property
    def probes_per_step(self) -> int:
        """See `Estimator`; of a sample that is one batch."""
        return self.inner.probes_per_step

    def probes(self, batch: Any, trajectory: Steps, directions: Sequence[Steps]) -> list[Probe]:
        """Those of each batch in turn; none of an empty sample."""
        return [
            probe for part in batch for probe in self.inner.probes(part, trajectory, directions)
        ]

    def gradients(self, evaluations: Sequence[Evaluation]) -> tuple[NDArray[np.float32], float]:
        """What may be known of the sample, float32 [n]; its loss may not, and is NaN."""
        each = self.inner.probes_per_step
        inner: ByExample = self.inner  # type: ignore[assignment]  # `rules` hold it
        parts = [
            inner.by_example(evaluations[begin : begin + each])
            for begin in range(0, len(evaluations), each)
        ]
        vectors = np.concatenate([np.empty((0, self.directions)), *parts])
        return self.mechanism.release(vectors), float("nan")
