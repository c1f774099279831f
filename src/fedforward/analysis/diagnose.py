"""A diagnosis of a configuration, stage by stage; see docs/how-to/diagnose.md.

Every random choice follows from `run.seed`. Nothing is trained and nothing is kept.
"""

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedforward.analysis import subject as building
from fedforward.analysis.derivatives import (
    LossSurface,
    check_second_derivative,
    differentiable,
)
from fedforward.analysis.federated import Gradients, assumed, differences, sample_gradients
from fedforward.analysis.forward_only import (
    ForwardTrace,
    TwoPointError,
    losses_at,
    projections,
    trace_of,
    two_point_errors,
)
from fedforward.analysis.result import (
    BlockRank,
    Diagnosis,
    MatrixRank,
    PointCurvature,
    Setting,
)
from fedforward.analysis.spectrum import Products, lanczos, random_signs, spectrum
from fedforward.analysis.subject import Subject
from fedforward.config.schema import Config
from fedforward.core.errors import FedForwardError
from fedforward.core.logs import PHASES, PROGRESS
from fedforward.core.seeds import derive
from fedforward.core.steps import NO_STEPS, Probe
from fedforward.models.lora import LoraModel
from fedforward.training import build

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        rows: of all clients, whose mean loss is looked at.
        probes: random vectors of each trace.
        steps: Lanczos steps of a third of them.
        block_steps: Lanczos steps for the norm of a block; 0 leaves blocks out.
        gradient_rows: of all clients at each point, for noise and heterogeneity.
        points: at which gradients are sampled, at least 2.
        directions: of the two-point estimates, whose error is measured.
        error_rows: for that.
        scales: every μ.
    """

    rows: int = 4
    probes: int = 12
    steps: int = 8
    block_steps: int = 4
    gradient_rows: int = 48
    points: int = 4
    directions: int = 8
    error_rows: int = 2
    scales: tuple[float, ...] = (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 1e-1)


QUICK = Effort(
    rows=2,
    probes=6,
    steps=6,
    block_steps=0,
    gradient_rows=24,
    points=2,
    directions=4,
    error_rows=1,
    scales=(1e-4, 1e-3, 1e-2),
)


def diagnose(config: Config, *, at: str | None = None, effort: Effort | None = None) -> Diagnosis:
    """Measure curvature, noise, heterogeneity and the error of the two-point estimate.

    Args:
        at: a run directory, or the folder of an adapter: a point beside the base.
        effort: how much is measured.

    Raises:
        FedForwardError: for whatever a run would refuse; see also `subject.check`.

    Example:
        >>> from fedforward.config.loading import load
        >>> found = diagnose(load("run.toml"))  # doctest: +SKIP
        >>> found.curvature[0].matrices[0].effective_rank.value  # doctest: +SKIP
        31.4
    """
    effort = Effort() if effort is None else effort
    return _Work(config, at, effort).carry_out()


class _Work:
    """A diagnosis that is being made."""

    def __init__(self, config: Config, at: str | None, effort: Effort) -> None:
        self.given, self.at, self.effort = config, at, effort
        self.began = time.monotonic()
        if at is not None:
            building.check_point(at)
        self.found: Subject = building.subject(config)
        self.model = self.found.model
        self.seed = self.found.config.run.seed
        self.notes: list[str] = [self.found.without] if self.found.without else []
        self.batches = self.found.rows(effort.rows)
        self.without = self.found.without
        self.smoothness: list[float] = []
        self.top: dict[str, MatrixRank] = {}
        self._done = self._total = 0
        self._what = ""

    def carry_out(self) -> Diagnosis:
        """All stages."""
        self._check_derivatives()
        base = self.model.export_state()
        curvature = [self._curvature("base")]
        trained = None
        if self.at is not None:
            trained = building.trained_state(self.found, self.at)
            curvature.append(self._curvature(self.at))
        made = None if self.without else self._gradients(base, trained)
        self._go(base if trained is None else trained)
        federated = measured = None
        if made is not None:
            last = curvature[-1].matrices
            federated = assumed(self.found, made, last, self.smoothness)
            measured = self._differences(made)
        errors = () if self.without else self._two_point_errors()
        self._note()
        return Diagnosis(
            setting=self._setting(),
            curvature=tuple(curvature),
            assumed=federated,
            differences=measured,
            two_point=errors,
            notes=tuple(self.notes),
        )

    def _go(self, state: NDArray[np.float32]) -> None:
        self.model.assign_state(state)

    def _check_derivatives(self) -> None:
        """Find out whether there are derivatives; a sentence in the notes if not."""
        if self.without:
            return
        try:
            with differentiable(self.model):
                check_second_derivative(LossSurface(self.model, self.batches))
        except FedForwardError as error:
            self.without = str(error)
            self.notes.append(self.without)

    def _setting(self) -> Setting:
        config, method = self.found.config, self.found.method
        with_ = self._counted()
        return Setting(
            model=config.model.path,
            tuned_parameters=self.model.layout.parameters,
            method=config.method.name,
            rows=with_[0],
            counted=with_[1],
            probes=self.effort.probes,
            clients=len(self.found.corpus.clients),
            local_steps=method.local_steps,
            directions=max(1, method.directions),
            rounds=config.federation.rounds,
            mu=config.method.mu,
            seconds=time.monotonic() - self.began,
        )

    def _counted(self) -> tuple[int, int]:
        """Rows that are sampled, and what their loss is the mean of."""
        found = self.model.evaluate([Probe(batch) for batch in self.batches])
        return sum(len(e.counts) for e in found), int(sum(e.counts.sum() for e in found))

    # ---- curvature ----------------------------------------------------------------------------

    def _curvature(self, point: str) -> PointCurvature:
        """Both matrices where the model stands, and the trace from forward passes."""
        matrices: list[MatrixRank] = []
        if not self.without:
            with differentiable(self.model):
                surface = LossSurface(self.model, self.batches, self._tell)
                matrices = [
                    self._matrix(point, "Hessian", surface),
                    self._matrix(point, "Gauss-Newton", surface),
                ]
            self.smoothness.append(matrices[0].norm)
        PHASES.info("curvature of %s: forward passes alone", point)
        forward = self._forward_traces()
        (loss,) = losses_at(self.model, self.batches, [NO_STEPS])
        return PointCurvature(point, float(loss), tuple(matrices), forward)

    def _forward_traces(self) -> tuple[ForwardTrace, ...]:
        """The trace from forward passes; of A and B apart, where the coupling adds much noise."""
        model, mu = self.model, self.found.config.method.mu
        seeds = [derive(self.seed, "diagnose-z", n) for n in range(2 * self.effort.directions)]
        found = [trace_of(model, self.batches, seeds, mu)]
        names = {
            part: [name for name in model.tensors if f".lora_{part}." in name] for part in "AB"
        }
        if not names["A"] or not names["B"] or model.masks:
            return tuple(found)
        try:
            for part, own in names.items():
                others = [model.tensors[name] for name in names["B" if part == "A" else "A"]]
                if any(tensor.any() for tensor in others):
                    model.masks = {
                        name: torch.full_like(tensor, name in own, dtype=torch.bool)
                        for name, tensor in model.tensors.items()
                    }
                    model.clear_cache()
                    found.append(trace_of(model, self.batches, seeds, mu, part))
        finally:
            model.masks = {}
            model.clear_cache()
        return tuple(found)

    def _matrix(self, point: str, name: str, surface: LossSurface) -> MatrixRank:
        """Trace, norm and effective rank of one matrix, whole and by block."""
        effort = self.effort
        hessian = name == "Hessian"
        whole = surface.hessian if hessian else surface.gauss_newton
        blocks = self.model.layout.blocks
        by_block = len(blocks) * effort.block_steps if len(blocks) > 1 else 0
        starts = -(-effort.probes // 3)
        probes = 2 * effort.probes + starts if hessian else effort.probes
        total = starts * (effort.steps - 1) + probes + 12 + by_block
        self._begin(f"curvature of {point}: {name}", total)
        found = spectrum(
            whole,
            surface.size,
            probes=effort.probes,
            steps=effort.steps,
            seed=derive(self.seed, "diagnose"),
            owners=surface.owners,
            groups=self._factors() if hessian else None,
        )
        norms: list[float] = []
        if by_block:
            parts = surface.hessian_of_blocks if hessian else surface.gauss_newton_of_blocks
            norms = self._block_norms(parts, surface)
        ranks = [
            BlockRank(block, size, trace, norm, trace.over(norm))
            for block, size, trace, norm in zip(
                blocks, self.model.layout.block_sizes, found.block_traces, norms, strict=False
            )
        ]
        self._end()
        return MatrixRank(
            matrix=name,
            norm=found.norm,
            largest=found.largest,
            least=found.least,
            trace=found.trace,
            absolute_trace=found.absolute_trace,
            squares=found.squares,
            effective_rank=found.effective_rank,
            absolute_rank=found.absolute_rank,
            converged=found.converged,
            products=found.products,
            blocks=tuple(ranks),
            nodes=tuple(found.nodes.tolist()),
            weights=tuple(found.weights.tolist()),
        )

    def _factors(self) -> NDArray[np.bool_] | None:
        """Which coordinates are of an A, where A and B of adapters are tuned, bool [d]."""
        layout = self.model.layout
        own = [".lora_A." in name for name in layout.names]
        return np.repeat(own, layout.sizes) if any(own) else None

    def _block_norms(self, products: Products, surface: LossSurface) -> list[float]:
        """‖H_bb‖ of every block by a few Lanczos steps, all blocks side by side."""
        count = len(self.model.layout.blocks)
        signs = random_signs(1, surface.size, derive(self.seed, "diagnose-blocks"))
        starts = np.where(surface.owners == np.arange(count)[:, None], signs, 0.0)
        spaces = lanczos(products, starts, self.effort.block_steps)
        return [float(np.abs(space.ritz()[0]).max()) for space in spaces]

    # ---- clients ------------------------------------------------------------------------------

    def _gradients(
        self, base: NDArray[np.float32], trained: NDArray[np.float32] | None
    ) -> Gradients:
        """Gradients of clients' batches at some points."""
        self._begin("gradients of clients", 0)
        made = sample_gradients(
            self.found,
            base,
            trained,
            self.effort.points,
            self.effort.gradient_rows,
            max(self.smoothness),
            self._progress,
        )
        self.smoothness += made.secants
        self.notes += made.notes
        return made

    def _differences(self, made: Gradients) -> Any:
        """How clients differ; None for one."""
        if len(self.found.corpus.clients) < 2:
            self.notes.append(
                "federation.clients = 1: heterogeneity is of several clients, and is not defined."
            )
            return None
        PHASES.info("differences between clients")
        return differences(self.found, made)

    # ---- the estimate ---------------------------------------------------------------------------

    def _two_point_errors(self) -> tuple[TwoPointError, ...]:
        """Bias and noise of the two-point estimate over μ and dtypes, where the model stands."""
        effort = self.effort
        batches = self.found.rows(effort.error_rows)
        seeds = [derive(self.seed, "diagnose-two", n) for n in range(effort.directions)]
        with differentiable(self.model):
            _, gradient = LossSurface(self.model, batches).gradient()
        model = self.model
        exact = projections(model.layout, gradient, seeds, model.distribution)
        state = model.export_state()
        errors: list[TwoPointError] = []
        for dtype in DTYPES:
            PHASES.info("two-point estimates in %s", dtype)
            other = model if dtype == "float32" else self._in_dtype(dtype, state)
            errors += two_point_errors(other, batches, seeds, exact, effort.scales, dtype)
        return tuple(errors)

    def _in_dtype(self, dtype: str, state: NDArray[np.float32]) -> Any:
        """The same model with its weights in half precision."""
        config = building.with_dtype(self.found.config, dtype)
        other, _ = build.build_model(config, self.model.plan, self.model.classes)
        other.plan = self.model.plan
        if isinstance(other, LoraModel) and isinstance(self.model, LoraModel):
            mine = self.model.saved_tensors()
            for name, tensor in other.saved_tensors().items():
                tensor.data.copy_(mine[name].data)
            for name, output in other.outputs.items():
                output.copy_(self.model.outputs[name])
        other.assign_state(state)
        return other

    # ---- notes and progress ---------------------------------------------------------------------

    def _note(self) -> None:
        """What must be known to read the numbers."""
        zero = isinstance(self.model, LoraModel) and any(
            ".lora_B." in name and not tensor.any()
            for name, tensor in self.model.saved_tensors().items()
        )
        if isinstance(self.model, LoraModel) and (zero or self.at is not None):
            self.notes.append(
                "At the base every B is 0, so the loss does not depend on A: its gradient and its "
                "part of both matrices are 0 there, and the Hessian couples A and B through the "
                "gradient alone, which makes it indefinite. The rank there is that of B, and the "
                "range from passes alone, which is of positive matrices, is to be read for B. Give "
                "--at RUN for a point where A counts."
            )

    def _begin(self, what: str, total: int) -> None:
        self._what, self._done, self._total = what, 0, total
        PHASES.info(what)

    def _tell(self, done: int) -> None:
        self._done += done
        self._progress(min(self._done, self._total), self._total)

    def _progress(self, done: int, total: int) -> None:
        if total:
            extra = {"done": done, "total": total}
            PHASES.log(PROGRESS, "%s: %d of %d", self._what, done, total, extra=extra)

    def _end(self) -> None:
        self._progress(self._total, self._total)


def with_rows(effort: Effort, rows: int | None, probes: int | None) -> Effort:
    """An effort with other numbers of rows and probes, where they are given."""
    if rows is not None:
        effort = replace(effort, rows=rows, gradient_rows=max(effort.gradient_rows, rows))
    return effort if probes is None else replace(effort, probes=probes)
