"""What a diagnosis has found, as plain data. Imports no PyTorch."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from fedforward.analysis.assumptions import Constants, LocalRate, RateConstants, StepBound
from fedforward.analysis.forward_only import ForwardTrace, TwoPointError
from fedforward.analysis.heterogeneity import Index
from fedforward.analysis.spectrum import Interval


@dataclass(frozen=True)
class BlockRank:
    """One block of the tuned parameters alone.

    Attributes:
        block: its name in the layout.
        parameters: tuned in it.
        trace: tr(H_bb).
        norm: ‖H_bb‖ after a few Lanczos steps, a lower bound.
        effective_rank: their ratio.
    """

    block: str
    parameters: int
    trace: Interval
    norm: float
    effective_rank: Interval


@dataclass(frozen=True)
class MatrixRank:
    """The Hessian or the Gauss-Newton matrix at a point; see `spectrum.Spectrum`.

    Attributes:
        matrix: "Hessian" or "Gauss-Newton".
        nodes: Ritz values, with `weights`: the spectral density.
    """

    matrix: str
    norm: float
    largest: float
    least: float
    trace: Interval
    absolute_trace: Interval
    squares: Interval
    effective_rank: Interval
    absolute_rank: Interval
    converged: bool
    products: int
    blocks: tuple[BlockRank, ...]
    nodes: tuple[float, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class PointCurvature:
    """Curvature of the sampled rows' mean loss at a point.

    Attributes:
        point: "base" or what `--at` names.
        loss: in nats.
        matrices: Hessian and Gauss-Newton; empty where there are no derivatives.
        forward: from forward passes alone; of adapters also of A and of B, where they are not 0.
    """

    point: str
    loss: float
    matrices: tuple[MatrixRank, ...]
    forward: tuple[ForwardTrace, ...]


@dataclass(frozen=True)
class Assumed:
    """The constants of the paper's assumptions, and what follows from them.

    Attributes:
        points: at which gradients were sampled.
        clients: that were sampled.
        batches: of each client and point.
        batch_size: rows of a batch.
        gradient_squares: ‖∇f‖² at each point.
        smoothness: L, the largest that was met: ‖H‖, or ‖Δ∇f‖ / ‖Δθ‖ between points. A lower
            bound of the true L.
        noise: c_g and σ_g² (Assumption 4).
        heterogeneity: c_h and σ_h² (Assumption 6); None for one client.
        bound: of the learning rate (theory).
        rates: of the theorems (theory).
        local: the best rate in the quadratic model (from what was measured).
        trace_from: which matrix's trace that has, the larger one; `rates` have its effective rank.
    """

    points: tuple[str, ...]
    clients: int
    batches: int
    batch_size: int
    gradient_squares: tuple[float, ...]
    smoothness: float
    noise: Constants
    heterogeneity: Constants | None
    bound: StepBound
    rates: RateConstants
    local: LocalRate
    trace_from: str


@dataclass(frozen=True)
class Differences:
    """How clients differ.

    Attributes:
        measured: σ_h,i, the root of the mean of ‖∇f - ∇f_i‖² over the points.
        indices: and their rank correlations to it.
    """

    measured: tuple[float, ...]
    indices: tuple[Index, ...]


@dataclass(frozen=True)
class Setting:
    """What was looked at.

    Attributes:
        model: its path.
        tuned_parameters: d.
        method: its name.
        rows: sampled for curvature.
        counted: tokens, examples or texts that their loss is the mean of.
        probes: random vectors of the estimates.
        clients: N of the configuration.
        local_steps: H.
        directions: n.
        rounds: T.
        mu: μ.
        seconds: that all of it took.
    """

    model: str
    tuned_parameters: int
    method: str
    rows: int
    counted: int
    probes: int
    clients: int
    local_steps: int
    directions: int
    rounds: int
    mu: float
    seconds: float


@dataclass(frozen=True)
class Diagnosis:
    """All that `diagnose` has found.

    Attributes:
        setting: what was looked at.
        curvature: at each point.
        assumed: None where there are no derivatives.
        differences: None for one client, or without derivatives.
        two_point: error of the estimate over μ and dtypes; empty without derivatives.
        notes: a sentence for each thing that is not there, or must be known to read the rest.
    """

    setting: Setting
    curvature: tuple[PointCurvature, ...]
    assumed: Assumed | None
    differences: Differences | None
    two_point: tuple[TwoPointError, ...]
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values for `--json`; what is not finite is null."""
        found: dict[str, Any] = _plain(asdict(self))
        if self.assumed is not None:
            bound = self.assumed.bound
            found["assumed"]["bound"] |= {"rate": bound.rate, "binding": bound.binding}
        return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(own) for own in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
