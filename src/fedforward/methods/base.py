"""The methods, one short file each, that read like their papers' algorithm boxes.

A method says along which directions a client probes in a round and how the server joins the
reports. Adding one is a file with a `Method` and a line in `training.assembly.build_method`. No method
imports PyTorch (`fedavg`, the first-order baseline, aside).
"""

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fedforward.core.seeds import direction_seed
from fedforward.core.steps import NO_STEPS, Evaluation, Probe, Steps
from fedforward.messages.codec import NO_ODDS, Contribution, Entry, Report, Task
from fedforward.methods.estimators import Estimator

#: What a client does in a round: it yields probes and is sent their evaluations.
LocalRound = Generator[Sequence[Probe], Sequence[Evaluation], Report]


class BatchStream(Protocol):
    """A client's batches by step since the start of the run."""

    def __len__(self) -> int: ...
    def __getitem__(self, step: int) -> Any: ...


@dataclass(frozen=True, eq=False)
class Returned:
    """A report as the server holds it when a round closes.

    Attributes:
        weight: p_i, the client's share of the average; the weights of a round sum to one.
        learning_rate: η_i that the client was given.
        report: what it sent.
        active: bool [B], the blocks that it was given; None is all.
    """

    weight: float
    learning_rate: float
    report: Report
    active: NDArray[np.bool_] | None = None


class Tracker(Protocol):
    """What a method's server remembers of earlier rounds; rebuilt from the ledger on resume."""

    def odds(self) -> NDArray[np.uint16]:
        """How likely each candidate seed is to be drawn in the coming round, or empty."""
        ...

    def observe(self, round_number: int, reports: Iterable[Report]) -> None:
        """Take in the reports of a round that was closed."""
        ...


class NoTracker:
    """For methods whose server remembers nothing."""

    def odds(self) -> NDArray[np.uint16]:
        """None at all."""
        return NO_ODDS

    def observe(self, round_number: int, reports: Iterable[Report]) -> None:
        """Nothing to remember."""


@dataclass(frozen=True)
class Method(ABC):
    """A method whose clients send scalars.

    Attributes:
        name: as in `method.name` of a configuration.
        by_block: whether clients may be given different blocks.
        shared_seeds: whether all clients of a round probe along the same directions.
        candidates: K, for a method whose directions come from K seeds of the whole run; else 0.
        sends_odds: whether tasks carry how likely each candidate is to be drawn.
        run_seed: from which directions are derived.
        local_steps: H.
        estimator: how a step measures its projected gradients.
    """

    name: ClassVar[str]
    by_block: ClassVar[bool] = False
    shared_seeds: ClassVar[bool] = False
    run_seed: int
    local_steps: int
    estimator: Estimator

    @property
    def directions(self) -> int:
        """Directions of each step; its projected gradients in a report times H."""
        return self.estimator.directions

    @property
    def candidates(self) -> int:
        """See the class."""
        return 0

    @property
    def sends_odds(self) -> bool:
        """See the class."""
        return False

    @abstractmethod
    def seeds(self, round_number: int, client: int, odds: NDArray[np.uint16]) -> NDArray[np.uint64]:
        """The seeds of a client's directions in a round, uint64 [H * n], step after step."""

    @abstractmethod
    def aggregate(
        self, round_number: int, returned: Sequence[Returned], odds: NDArray[np.uint16]
    ) -> Entry:
        """The server's part: the round's steps from the reports, sorted by client."""

    def tracker(self) -> Tracker:
        """What the server remembers for this method."""
        return NoTracker()

    def local_round(
        self,
        task: Task,
        batches: BatchStream,
        active: NDArray[np.bool_] | None = None,
    ) -> LocalRound:
        """θ_{h+1} = θ_h - (η_i / n) Σ_d g_hd z_hd for h < H, in the active blocks.

        The client's part of a round, on its own trajectory, which is dropped after reporting g.
        """
        seeds = self.seeds(task.round, task.client, task.odds)
        trajectory = NO_STEPS
        gradients: list[float] = []
        losses: list[float] = []
        skipped = 0
        n = self.directions
        for step in range(self.local_steps):
            batch = batches[task.round * self.local_steps + step]
            own = seeds[step * n : (step + 1) * n]
            units = [_unit(seed, active) for seed in own]
            evaluations = yield self.estimator.probes(batch, trajectory, units)
            projected, loss = self.estimator.gradients(evaluations)
            if np.isfinite(projected).all():
                losses.append(loss)
            else:
                projected = np.zeros_like(projected)
                skipped += 1
            moved = Steps.of(own, -task.learning_rate / n * projected.astype(np.float64))
            trajectory = trajectory + (moved if active is None else moved.within(active))
            gradients.extend(projected.tolist())
        return Report(
            round=task.round,
            client=task.client,
            examples=len(batches),
            loss=float(np.mean(losses)) if losses else float("nan"),
            skipped=skipped,
            gradients=np.array(gradients, np.float32),
        )

    def own_update(self, round_number: int, returned: Returned, odds: NDArray[np.uint16]) -> Steps:
        """Δ_i = -(η_i / n) Σ_h g_ih z_ih in the client's blocks: what it would do to θ alone."""
        report = returned.report
        seeds = self.seeds(round_number, report.client, odds)
        steps = Steps.of(
            seeds, -returned.learning_rate / self.directions * report.gradients.astype(np.float64)
        )
        return steps if returned.active is None else steps.within(returned.active)


def _unit(seed: np.uint64, active: NDArray[np.bool_] | None) -> Steps:
    unit = Steps.of([int(seed)], [1.0])
    return unit if active is None else unit.within(active)


def round_seeds(
    run_seed: int, round_number: int, client: int, steps: int, directions: int
) -> NDArray[np.uint64]:
    """The seeds of one round's directions, new in every round, uint64 [steps * directions]."""
    return np.array(
        [
            direction_seed(run_seed, round_number, client, *divmod(place, directions))
            for place in range(steps * directions)
        ],
        dtype=np.uint64,
    )


def coefficients(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """Float64 sums as the ledger's float32, rounded once.

    What float32 cannot hold becomes infinite here, and the ledger refuses it.
    """
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def shared_contribution(
    returned: Sequence[Returned], directions: int, client: int, blocks: bytes = b""
) -> Contribution:
    """-(1/n) Σ_i p_i η_i g_i / Σ_i p_i over clients that share directions, float64 sums."""
    rates = np.array([part.weight * part.learning_rate for part in returned])
    gradients = np.array([part.report.gradients for part in returned], dtype=np.float64)
    total = sum(part.weight for part in returned)
    return Contribution(client, coefficients(-(rates @ gradients) / (directions * total)), blocks)


@runtime_checkable
class FirstOrderMethod(Protocol):
    """A method whose clients train by backpropagation and send tensors."""

    @property
    def name(self) -> str:
        """As in `method.name` of a configuration."""
        ...

    @property
    def local_steps(self) -> int:
        """H."""
        ...

    @property
    def directions(self) -> int:
        """Directions of each step; its gradients in a report times H."""
        ...

    def train(self, task: Task, batches: BatchStream, model: Any) -> Report:
        """The client's part of a round; the model is back at the server's state afterwards."""
        ...

    def average(self, returned: Sequence[Returned]) -> NDArray[np.float32]:
        """The server's part: the tuned state after the round, float32 [d]."""
        ...
