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

from fedforward.core.steps import Evaluation, Probe, Update
from fedforward.directions import Distribution, Layout
from fedforward.directions.ops import accumulate

_NAME = "theta"


class Quadratic:
    """A `ForwardModel` whose batch is the client's shift of the optimum (float64 [d]) or None.

    Attributes:
        layout: the tunable space, one tensor of shape (d,).
        theta: float32 [d], the weights.

    Example:
        >>> model = Quadratic([2.0, 1.0], dimension=10)
        >>> (evaluation,) = model.evaluate([Probe(None)])
        >>> round(evaluation.mean, 6)
        0.75
    """

    def __init__(
        self,
        spectrum: Sequence[float],
        dimension: int,
        *,
        seed: int = 0,
        distribution: Distribution = Distribution.GAUSSIAN,
        blocks: int = 1,
    ) -> None:
        """θ starts at 0 and θ* at distance one, in the span of Q, the same in its coordinates.

        Args:
            spectrum: the non-zero eigenvalues λ of H, r of them, r <= dimension.
            dimension: d.
            seed: of the rotation.
            distribution: of the directions.
            blocks: into so many equal parts θ is divided.
        """
        self.eigenvalues = np.array(spectrum, dtype=np.float64)
        r = len(self.eigenvalues)
        generator = np.random.Generator(np.random.Philox(seed))
        self.basis, _ = np.linalg.qr(generator.standard_normal((dimension, r)))
        self.optimum = self.basis @ np.full(r, r**-0.5)
        sizes = {f"{_NAME}.{b:04}": (dimension // blocks,) for b in range(blocks)}
        self.layout = Layout.of(sizes, {str(b): [n] for b, n in enumerate(sizes)})
        self.distribution = distribution
        self.theta = torch.zeros(dimension, dtype=torch.float32)
        self._base = self.theta.clone()

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
            self._accumulate(self.theta, Update(probe.trajectory + probe.perturbation, 0), point)
            loss = self.loss(point.numpy().astype(np.float64), probe.batch)
            results.append(Evaluation(np.array([loss], np.float64), np.array([1], np.int64)))
        return results

    def commit(self, updates: Sequence[Update]) -> None:
        """θ ← round(decay · θ + Σ c z) for each update in turn."""
        for update in updates:
            source = self._base if update.from_base else self.theta
            self._accumulate(source, update, self.theta)

    def _accumulate(self, source: torch.Tensor, update: Update, out: torch.Tensor) -> None:
        size = self.layout.sizes[0]
        for block, first_tile in enumerate(self.layout.first_tiles):
            part, steps = slice(block * size, (block + 1) * size), update.steps.block(block)
            accumulate(
                source[part],
                steps.seeds,
                steps.coefficients,
                first_tile=first_tile,
                distribution=self.distribution,
                out=out[part],
                decay=update.decay,
            )

    def keep_base(self) -> None:
        """The base is always kept."""

    def reset(self) -> None:
        """Back to where θ was at the start."""
        self.theta.copy_(self._base)

    @property
    def state_bytes(self) -> int:
        """Bytes of θ."""
        return 4 * len(self.theta)

    def export_bytes(self) -> bytes:
        """The bytes of θ."""
        return self.theta.numpy().tobytes()

    def assign_bytes(self, data: bytes) -> None:
        """Set θ from what `export_bytes` gave."""
        self.theta.copy_(torch.frombuffer(bytearray(data), dtype=torch.float32))

    def digest(self) -> bytes:
        """SHA-256 of θ."""
        return hashlib.sha256(self.theta.numpy().tobytes()).digest()
