"""What every method is: which directions a client probes, how reports become steps, and replay.

A method is one short file that reads like its paper's algorithm box. It alone knows the seeds of
its directions, what it adds to messages (their payloads), and what it remembers from round to
round. Everything else asks its `Capabilities`. No method imports PyTorch at its top.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from fedforward.core.errors import FedForwardError, MessageError
from fedforward.core.registry import AGGREGATORS, METHODS
from fedforward.core.seeds import direction_seed, dither_seed
from fedforward.core.steps import NO_STEPS, Evaluation, Probe, Steps, Update
from fedforward.messages.entry import Contribution, Entry
from fedforward.messages.report import ClientResult, Report
from fedforward.messages.snapshot import Snapshot
from fedforward.messages.task import Task
from fedforward.methods.aggregation import Aggregator, join, mean
from fedforward.methods.estimators import Estimator, TwoPoint
from fedforward.methods.parameters import check_parameters, parameters_of

#: What a client does in a round: it yields probes and is sent their evaluations.
LocalRound = Generator[Sequence[Probe], Sequence[Evaluation], Report]


class BatchStream(Protocol):
    """A client's batches by step since the start of the run."""

    def __len__(self) -> int: ...
    def __getitem__(self, step: int) -> Any: ...


@dataclass(frozen=True)
class Capabilities:
    """What the rest of the system may rely on; rules read these, and no method's name.

    Attributes:
        forward_only: clients run forward passes only; else they backpropagate and send tensors.
        replayable: the ledger's entries rebuild the tuned state. Where they do not, what the
            server remembers is the tuned state: it lies in a file beside the ledger, and an
            entry's payload is its SHA-256.
        shared_directions: all clients of a round probe the same directions, so that their scalars
            can be compared.
        blocks: clients may be given different blocks.
        contributions: a round's update is a list of steps that the server may scale, repeat and
            decay.
        masks: a mask may keep some weights from moving.
        from_base: every state is a sum on top of the base weights, which are kept beside it.
        scales: the server may shorten each client's update before it joins them.
        votes: clients report signs alone, and their majority is the update: there are no sizes
            that rates could follow, and no rule to choose.
        sums: the server needs no more of a round than the sum of its reports' scalars.
        private: clients may do a step with scalars that were clipped and got noise, and report
            nothing else of their data.
    """

    forward_only: bool = True
    replayable: bool = True
    shared_directions: bool = False
    blocks: bool = False
    contributions: bool = True
    masks: bool = True
    from_base: bool = False
    scales: bool = False
    votes: bool = False
    sums: bool = False
    private: bool = False

    @property
    def state_is_whole(self) -> bool:
        """Whether what the method remembers is the tuned state, so that nothing else is needed."""
        return self.from_base or not self.replayable


class MethodState(Protocol):
    """What a method remembers from round to round, at the server and at each replica."""

    def encode(self) -> bytes:
        """What another party takes over, beside the tuned tensors or in their place."""
        ...

    def restore(self, data: bytes) -> None:
        """Take over what `encode` gave.

        Raises:
            MessageError: it is of another size than this run's.
        """
        ...


class NoState:
    """For methods that remember nothing: their state is in the weights alone."""

    def encode(self) -> bytes:
        """Nothing."""
        return b""

    def restore(self, data: bytes) -> None:
        """Nothing to take over.

        Raises:
            MessageError: there is something.
        """
        if data:
            raise MessageError(
                f"A snapshot with {len(data)} bytes of a method's memory was refused: this method "
                "has none."
            )


def method_class(name: str) -> "type[Method]":
    """The class of a method's name.

    Raises:
        FedForwardError: there is none, or what the name stands for is no whole subclass of
            `Method`.
    """
    found = METHODS.get(name)
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise FedForwardError(
            f"The method {name!r} is {found!r}, which is no subclass of Method. Mend or remove the "
            "package that adds it."
        )
    missing = sorted(getattr(found, "__abstractmethods__", ()))
    if missing:
        raise FedForwardError(
            f"The method {name!r} of {found.__module__}.{found.__qualname__} does not define "
            f"{', '.join(missing)}. Mend or remove the package that adds it."
        )
    return found


def usable_methods() -> "dict[str, type[Method]]":
    """Every method that can be imported and is whole, by name."""
    usable = {}
    for name in METHODS.names():
        # What a broken package adds is refused where it is used.
        with contextlib.suppress(FedForwardError):
            usable[name] = method_class(name)
    return usable


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A federated method.

    A subclass gives `seeds` and `aggregate`; with a payload of its own, or a memory, also the
    functions that concern them. Fields made by `parameter` are keys of the section `[method]`.

    Attributes:
        capabilities: of the class.
        defaults: of a configuration that names the method, by section, in place of the usual ones.
        lora_defaults: more of `[method]`, where adapters are tuned.
        local_steps: H.
        estimator: how a step measures its projected gradients.
        aggregator: how the scalars of clients that share directions are joined.
        run_seed: from which directions are derived.
    """

    capabilities: ClassVar[Capabilities] = Capabilities()
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    lora_defaults: ClassVar[Mapping[str, Any]] = {}
    local_steps: int = 30
    estimator: Estimator = TwoPoint()
    aggregator: Aggregator = mean
    run_seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.local_steps, int) or self.local_steps < 1:
            raise FedForwardError(
                f"local_steps = {self.local_steps!r} is not allowed: it must be a whole number, "
                "at least 1."
            )
        own = {name: getattr(self, name) for name in parameters_of(type(self))}
        check_parameters(type(self), own, prefix="")
        if not isinstance(self.aggregator, Aggregator):
            raise FedForwardError(
                f"aggregator = {self.aggregator!r} is no Aggregator; write one, or one of "
                "AGGREGATORS by name: AGGREGATORS.get('median')."
            )
        if not callable(getattr(self.estimator, "gradients", None)):
            raise FedForwardError(
                f"estimator = {self.estimator!r} is no Estimator; write one, as in "
                "TwoPoint(mu=1e-3)."
            )
        if self.capabilities.votes and self.aggregator is not mean:
            raise FedForwardError(
                f"aggregator = {AGGREGATORS.name_of(self.aggregator)!r} joins scalars, and the "
                f"clients of method.name = {self.name!r} vote: their majority is the update. Use "
                "aggregator = 'mean'."
            )
        if self.aggregator.shared_directions and not self.capabilities.shared_directions:
            raise FedForwardError(
                f"method.aggregator compares the scalars of clients, and those of method.name = "
                f"{self.name!r} multiply different directions. Use a method whose clients share "
                "directions ('decomfl', 'zorba'), or aggregator = 'mean'."
            )
        if self.aggregator.scales is not None and not self.capabilities.scales:
            raise FedForwardError(
                f"method.aggregator shortens clients' updates, and method.name = {self.name!r} "
                "joins them in its own way. Use aggregator = 'mean'."
            )

    @property
    def name(self) -> str:
        """As in `method.name` of a configuration."""
        return METHODS.name_of(type(self))

    @property
    def directions(self) -> int:
        """Directions of each step; its projected gradients in a report times H."""
        return self.estimator.directions

    # ---- directions and replay -----------------------------------------------------------------

    @abstractmethod
    def seeds(self, round_number: int, client: int, payload: bytes = b"") -> NDArray[np.uint64]:
        """The seeds of a client's directions in a round, uint64 [H * n], step after step.

        Args:
            payload: that the tasks of the round carried.
        """

    def new_state(self) -> MethodState:
        """What a server or a replica remembers before the first round."""
        return NoState()

    def update(self, entry: Entry, state: Any) -> Update:
        """What a ledger entry does to the weights; `state` takes the entry in.

        Raises:
            MessageError: the entry is not one of this method.
        """
        parts = entry.contributions
        expected = self.local_steps * self.directions
        for part in parts:
            if len(part.coefficients) != expected:
                raise MessageError(
                    f"Ledger round {entry.round} was refused: it has {len(part.coefficients)} "
                    f"coefficients of a client, and this run has {expected} directions a round."
                )
        if not parts:
            return Update(NO_STEPS, dither_seed(self.run_seed, entry.round), entry.decay)
        seeds = np.concatenate([self.seeds(entry.round - p.age, p.client) for p in parts])
        coefficients = np.concatenate([part.coefficients for part in parts])
        steps = Steps(seeds, coefficients)
        moved = [part.blocks for part in parts if part.blocks is not None]
        if moved:
            every = np.ones(len(moved[0]), np.bool_)
            rows = [every if part.blocks is None else part.blocks for part in parts]
            if {len(row) for row in rows} != {len(every)}:
                raise MessageError(
                    f"Ledger round {entry.round} was refused: its sets of blocks are of "
                    "different numbers of blocks."
                )
            active = np.repeat(np.array(rows).T, expected, axis=1)
            steps = Steps(seeds, np.where(active, coefficients, np.float32(0.0)))
        return Update(steps, dither_seed(self.run_seed, entry.round), entry.decay)

    def round_steps(self, entry: Entry) -> Steps:
        """What a round's own reports have added to the weights: its update without older steps."""
        fresh = tuple(part for part in entry.contributions if not part.age)
        return self.update(replace(entry, contributions=fresh), self.new_state()).steps

    def taken_back(self, round_number: int, entry: Entry) -> Entry:
        """The round that takes back what the reports of the round before have added.

        Args:
            entry: of the round before.
        """
        parts = [part for part in entry.contributions if not part.age]
        return Entry(
            round_number,
            tuple(replace(part, coefficients=-part.coefficients, age=1) for part in parts),
        )

    def restore(self, model: Any, snapshot: Snapshot, state: Any) -> None:
        """Bring a model, and what its replica remembers, to a snapshot's state.

        Raises:
            MessageError: the snapshot is of another size than this run's.
        """
        state.restore(snapshot.state)
        model.assign_bytes(snapshot.data)

    # ---- the client ----------------------------------------------------------------------------

    def local_round(self, task: Task, batches: BatchStream, model: Any = None) -> LocalRound:
        """θ_{h+1} = θ_h - (η_i / n) Σ_d g_hd z_hd for h < H, in the active blocks.

        The client's part of a round, on its own trajectory, which is dropped after reporting g.

        Args:
            model: at the state that the task starts from; a forward-only method does not touch it.
        """
        seeds = self.seeds(task.round, task.client, task.payload)
        trajectory = NO_STEPS
        gradients: list[float] = []
        losses: list[float] = []
        skipped = 0
        n = self.directions
        for step in range(self.local_steps):
            batch = batches[task.round * self.local_steps + step]
            own = seeds[step * n : (step + 1) * n]
            directions = [direction(seed, task.blocks) for seed in own]
            evaluations = yield self.estimator.probes(batch, trajectory, directions)
            projected, loss = self.estimator.gradients(evaluations)
            if np.isfinite(projected).all():
                losses.append(loss)
            else:
                projected = np.zeros_like(projected)
                skipped += 1
            moves = self.local_moves(projected).astype(np.float64)
            moved = Steps.of(own, -task.learning_rate / n * moves)
            trajectory = trajectory + (moved if task.blocks is None else moved.within(task.blocks))
            gradients.extend(projected.tolist())
        return Report(
            round=task.round,
            client=task.client,
            examples=len(batches),
            loss=float(np.mean(losses)) if losses else float("nan"),
            skipped=skipped,
            gradients=np.array(gradients, np.float32),
        )

    def local_moves(self, projected: NDArray[np.float32]) -> NDArray[np.float32]:
        """What a local step takes of its projected gradients, float32 [n]: all of them."""
        return projected

    def scalars(self, report: Report) -> NDArray[np.float64]:
        """What a report says of each direction, float64 [H * n]."""
        return report.gradients.astype(np.float64)

    def with_scalars(self, report: Report, scalars: NDArray[np.float32]) -> Report:
        """A report that says this of each direction instead.

        Args:
            scalars: float32 [H * n].
        """
        return replace(report, gradients=scalars)

    def rehearse(
        self, model: Any, batches: Sequence[Any], active: NDArray[np.bool_] | None = None
    ) -> None:
        """A step in the middle of a round, on given batches, that changes nothing.

        What a step takes in memory is measured on it.

        Args:
            batches: one for each client that advances in the same call.
            active: the blocks that are perturbed, bool [B]; None is all.
        """
        model.evaluate(rehearsal(self.estimator, batches, active))

    # ---- the server ----------------------------------------------------------------------------

    def task_payload(self, state: Any) -> bytes:
        """What the tasks of the coming round carry beside what all methods need."""
        return b""

    def check_report(self, report: Report, parameters: int) -> None:
        """Refuse a report that is not one of this method.

        Args:
            parameters: tuned parameters of the model.

        Raises:
            MessageError: see above.
        """
        expected = self.local_steps * self.directions
        if len(report.gradients) != expected or report.payload:
            raise MessageError(
                f"A report of client {report.client} was refused: it has "
                f"{len(report.gradients)} projected gradients, not {expected}."
            )

    @abstractmethod
    def aggregate(self, round_number: int, results: Sequence[ClientResult], state: Any) -> Entry:
        """The server's part: the round's steps from the results, sorted by client."""

    def aggregate_sum(
        self, round_number: int, mean: NDArray[np.float64], learning_rate: float
    ) -> Entry:
        """The round's steps where the server has no more than a sum; with `Capabilities.sums`.

        Args:
            mean: (1/n) Σ_i g_i over the n clients, float64 [local steps * directions].
            learning_rate: η, which all clients share.
        """
        raise NotImplementedError(f"{type(self).__name__} has no sums")

    def observe(  # noqa: B027 - most methods remember nothing
        self, entry: Entry, results: Sequence[ClientResult], state: Any
    ) -> None:
        """Take a round that was closed into what the server remembers; also on resume."""

    def kept(self, report: Report) -> Report:
        """What the ledger keeps of a report."""
        return report

    def own_update(self, round_number: int, result: ClientResult, payload: bytes = b"") -> Steps:
        """Δ_i = -(η_i / n) Σ_h g_ih z_ih in the client's blocks: what it would do to θ alone."""
        report = result.report
        seeds = self.seeds(round_number, report.client, payload)
        rate = -result.learning_rate / self.directions
        steps = Steps.of(seeds, rate * self.scalars(report))
        return steps if result.blocks is None else steps.within(result.blocks)


def direction(seed: np.uint64, active: NDArray[np.bool_] | None) -> Steps:
    """z(seed) in the active blocks, as a step of coefficient 1."""
    whole = Steps.of([int(seed)], [1.0])
    return whole if active is None else whole.within(active)


def rehearsal(
    estimator: Estimator, batches: Sequence[Any], active: NDArray[np.bool_] | None = None
) -> list[Probe]:
    """The probes of one step of each client, in the middle of a round.

    Args:
        batches: one for each client.
        active: the blocks that are perturbed, bool [B]; None is all.
    """
    probes: list[Probe] = []
    for batch in batches:
        # Every client carries a sum of its own; it is there, but too small to change anything.
        trajectory = Steps.of([1], [1e-30])
        trajectory = trajectory if active is None else trajectory.within(active)
        seeds = np.arange(2, 2 + estimator.directions, dtype=np.uint64)
        probes += estimator.probes(batch, trajectory, [direction(s, active) for s in seeds])
    return probes


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
    method: Method,
    results: Sequence[ClientResult],
    client: int,
    blocks: NDArray[np.bool_] | None = None,
) -> Contribution:
    """The joined coefficients of clients that share directions; sums in float64."""
    joined = join(
        method.aggregator,
        [part.report.gradients for part in results],
        [part.learning_rate for part in results],
        [part.weight for part in results],
        method.directions,
    )
    return Contribution(client, coefficients(joined), blocks)
