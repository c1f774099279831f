"""f(θ) = ½ (θ-θ*)ᵀ H (θ-θ*) with a chosen, rotated spectrum: where methods meet their theory.

H = Q diag(λ) Qᵀ with r orthonormal columns Q in R^d, so the same non-zero spectrum can be
rotated and zero-padded to any dimension. The rotation matters: Rademacher directions have no
variance on a diagonal H.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fedforward.directions import Distribution, Layout
from fedforward.directions.kernels import accumulate
from fedforward.steps import Evaluation, Probe, Update

_NAME = "theta"


class Quadratic:
    """A `ForwardModel` whose batch is the client's shift of the optimum (float64 [d]) or None.

    Attributes:
        layout: the tunable space, one tensor of shape (d,).
        theta: float32 [d], the weights.
    """

    def __init__(
        self,
        spectrum: Sequence[float],
        dimension: int,
        *,
        seed: int = 0,
        distribution: Distribution = Distribution.GAUSSIAN,
    ) -> None:
        """θ starts at 0 and θ* at distance one, in the span of Q, the same in its coordinates.

        Args:
            spectrum: the non-zero eigenvalues λ of H, r of them, r <= dimension.
            dimension: d.
            seed: of the rotation.
            distribution: of the directions.
        """
        self.eigenvalues = np.array(spectrum, dtype=np.float64)
        r = len(self.eigenvalues)
        generator = np.random.Generator(np.random.Philox(seed))
        self.basis, _ = np.linalg.qr(generator.standard_normal((dimension, r)))
        self.optimum = self.basis @ np.full(r, r**-0.5)
        self.layout = Layout.of({_NAME: (dimension,)})
        self.distribution = distribution
        self.theta = torch.zeros(dimension, dtype=torch.float32)

    def loss(self, theta: NDArray[np.float64], shift: NDArray[np.float64] | None = None) -> float:
        """f at θ; `shift` moves the optimum (a heterogeneous client)."""
        optimum = self.optimum if shift is None else self.optimum + shift
        coordinates = self.basis.T @ (theta - optimum)
        return float(0.5 * np.sum(self.eigenvalues * coordinates**2))

    def evaluate(self, probes: Sequence[Probe]) -> list[Evaluation]:
        """The loss at each probe, as one example with one token."""
        results = []
        point = torch.empty_like(self.theta)
        for probe in probes:
            steps = probe.trajectory + probe.perturbation
            accumulate(
                self.theta,
                steps.seeds,
                steps.coefficients,
                first_tile=0,
                distribution=self.distribution,
                out=point,
            )
            loss = self.loss(point.numpy().astype(np.float64), probe.batch)
            results.append(Evaluation(np.array([loss], np.float64), np.array([1], np.int64)))
        return results

    def commit(self, updates: Sequence[Update]) -> None:
        """θ ← round(decay · θ + Σ c z) for each update in turn."""
        for update in updates:
            accumulate(
                self.theta,
                update.steps.seeds,
                update.steps.coefficients,
                first_tile=0,
                distribution=self.distribution,
                out=self.theta,
                decay=update.decay,
                dither_seed=update.dither_seed,
            )

    def digest(self) -> bytes:
        """SHA-256 of θ."""
        return hashlib.sha256(self.theta.numpy().tobytes()).digest()
