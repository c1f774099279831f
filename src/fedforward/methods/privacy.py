"""The Gaussian mechanism on projected gradients: DPZero's form (arXiv 2310.09639, algorithm 2).

A step of a client draws a Poisson sample of its examples. Each example's K differences of losses
are clipped as one vector, their sum gets noise, and the client moves along and reports what comes
out. Nothing else of the sample is used or leaves. Imports no PyTorch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedforward.core.entropy import Entropy, SystemEntropy
from fedforward.core.steps import Evaluation, Probe, Steps
from fedforward.methods.base import Method
from fedforward.methods.estimators import Estimator


class ByExample(Protocol):
    """An `Estimator` that can say what each example alone says."""

    def by_example(self, evaluations: Sequence[Evaluation]) -> NDArray[np.float64]:
        """Projected gradients of each example's mean loss, float64 [examples, n]."""
        ...


@dataclass(frozen=True)
class Mechanism:
    """Clipping and noise of one step.

    Attributes:
        clip: C, most that an example's vector of n projected gradients may be long (L2).
        noise_multiplier: σ; the noise on a sum is N(0, (σC)²) in each of its n numbers.
        expected: B, examples that a sample is expected to have; sums are divided by it.
        chance: q, with which each example enters a sample.
        examples: what is said in place of how many examples there are.
        entropy: where samples and noise come from.

    Example:
        >>> Mechanism(clip=1.0, noise_multiplier=0.0, expected=2, chance=1.0, examples=2).release(
        ...     np.array([[3.0, 4.0], [0.0, 0.5]])
        ... )
        array([0.3 , 0.65], dtype=float32)
    """

    clip: float
    noise_multiplier: float
    expected: int
    chance: float
    examples: int
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
        lengths = scale * np.linalg.norm(known / scale, axis=1, keepdims=True)
        return np.asarray(known * np.minimum(1.0, self.clip / np.maximum(lengths, self.clip)))

    def release(self, vectors: NDArray[np.float64]) -> NDArray[np.float32]:
        """(Σ clipped + N(0, (σC)² I)) / B, float32 [n].

        Args:
            vectors: float64 [examples of the sample, n]; there may be none.
        """
        noise = self.noise_multiplier * self.clip * self.entropy.normal(vectors.shape[1])
        total = self.clipped(vectors).sum(axis=0) + noise
        return np.asarray(total / self.expected, np.float32)

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
