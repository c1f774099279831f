"""The result of a run as one typed record, and as the JSON of `summary.json`.

A run on one machine and one across machines share `RunSummary`; what only one of them has is in
`SimulationSummary` or `DeploymentSummary`. Imports no PyTorch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedforward.config.schema import Config

Lines = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class LossChange:
    """Held-out losses of a run, in nats per answer token.

    Attributes:
        start: of the base model.
        end: at the last evaluation.
        lowest: of all evaluations.
    """

    start: float
    end: float
    lowest: float


@dataclass(frozen=True)
class MetricChange:
    """A metric of the base model and at the end."""

    start: float
    end: float


@dataclass(frozen=True)
class MeanTraffic:
    """Mean encoded bytes of a round, per client that was asked; None where no round was run."""

    up: float | None
    down: float | None


@dataclass(frozen=True)
class CatchUpCost:
    """What it takes to bring a client forward that was away.

    Attributes:
        entry_bytes: of a round's ledger entry; 0 before the first.
        snapshot_bytes: of the tuned tensors.
        break_even_rounds: beyond which a snapshot is less; None before the first round.
    """

    entry_bytes: int
    snapshot_bytes: int
    break_even_rounds: int | None


@dataclass(frozen=True)
class Absences:
    """Reports of the whole run that did not count."""

    failed: int
    late: int
    refused: int


@dataclass(frozen=True)
class Example:
    """One prompt, with the model's answers before and after; `expected` is None if unknown."""

    prompt: str
    expected: str | None
    before: str
    after: str


@dataclass(frozen=True)
class SimulationSummary:
    """What only a run on one machine knows.

    Attributes:
        model: path or hub name of the base model.
        classes: of a sequence classifier; None for a causal model.
        dtype: of the weights.
        tuned_parameters: numbers that are tuned.
        clients: that are simulated.
        examples: training examples of each client.
        heldout_examples: examples kept for evaluation.
        answers_cut: answers cut at the sequence length.
        rows_dropped: rows without room for an answer.
        zero_gradients: mean share of projected gradients that are exactly 0; None without any.
        skipped_steps: local steps whose loss was not finite.
        changed_share: mean share of weights that a round has changed; None if not measured.
        bytes_per_client_round: of reports and tasks.
        catch_up: what a client that was away costs.
        absences: reports that did not count.
        peak_memory_bytes: of a step or of the first commit, the larger.
        inference_memory_bytes: peak of plain inference on the widest batch.
        peak_resident_bytes: of the whole process.
        state_digest: SHA-256 of the tuned tensors, hexadecimal.
        example: a prompt answered before and after.
    """

    model: str
    classes: list[str] | None
    dtype: str
    tuned_parameters: int
    clients: int
    examples: list[int]
    heldout_examples: int
    answers_cut: int
    rows_dropped: int
    zero_gradients: float | None
    skipped_steps: int
    changed_share: float | None
    bytes_per_client_round: MeanTraffic
    catch_up: CatchUpCost
    absences: Absences
    peak_memory_bytes: int
    inference_memory_bytes: int
    peak_resident_bytes: int
    state_digest: str
    example: Example


@dataclass(frozen=True)
class DeploymentSummary:
    """What only a run across machines knows.

    Attributes:
        sites: training examples of each site that was ever admitted, by name.
        clients: number of those sites.
        message_bytes: of envelopes, per envelope that was sent.
        state_digest: SHA-256 of the tuned tensors, hexadecimal; None where no site gave it.
    """

    sites: dict[str, int]
    clients: int
    message_bytes: MeanTraffic
    state_digest: str | None


@dataclass(frozen=True)
class RunSummary:
    """The result of a run.

    Attributes:
        method: name of the method.
        objective: what was optimised.
        tune: "lora" or "full".
        rounds: in the ledger.
        local_steps: of each round.
        stopped: why the run ended before its last round; None if it did not.
        heldout_loss: of the base model and after; None where clients withhold it.
        metrics: by name.
        seconds: that the rounds and evaluations took.
        ledger_digest: the ledger's chain hash, hexadecimal.
        simulation: of a run on one machine; None for one across machines.
        deployment: of a run across machines; None for one on one machine.
    """

    method: str
    objective: str
    tune: str
    rounds: int
    local_steps: int
    stopped: str | None
    heldout_loss: LossChange | None
    metrics: dict[str, MetricChange]
    seconds: float
    ledger_digest: str
    simulation: SimulationSummary | None = None
    deployment: DeploymentSummary | None = None

    def to_json(self) -> dict[str, Any]:
        """The content of `summary.json`: one object, with the fields of this kind of run alone."""
        content = asdict(self)
        for kind in ("simulation", "deployment"):
            content |= content.pop(kind) or {}
        return content


def summarize(
    config: Config,
    lines: Lines,
    reason: str,
    ledger_digest: str,
    own: SimulationSummary | DeploymentSummary,
) -> RunSummary:
    """The summary of a run.

    Args:
        lines: the metrics of the base model and of every round.
        reason: why the run ended before its last round; empty if it did not.
        own: what only this kind of run knows.
    """
    losses = [line["heldout_loss"] for line in lines if "heldout_loss" in line]
    first, last = lines[0].get("metrics", {}), lines[-1].get("metrics", {})
    return RunSummary(
        method=config.method.name,
        objective=config.objective,
        tune=config.model.tune,
        rounds=lines[-1]["round"],
        local_steps=config.method.local_steps,
        stopped=reason or None,
        heldout_loss=LossChange(losses[0], losses[-1], min(losses)) if losses else None,
        metrics={
            name: MetricChange(value, last[name]) for name, value in first.items() if name in last
        },
        seconds=lines[-1]["seconds"],
        ledger_digest=ledger_digest,
        simulation=own if isinstance(own, SimulationSummary) else None,
        deployment=own if isinstance(own, DeploymentSummary) else None,
    )


def mean_traffic(lines: Lines) -> MeanTraffic:
    """Of all rounds whose bytes were counted."""
    traffic = [line["bytes"] for line in lines if "bytes" in line]
    return MeanTraffic(mean([t["up"] for t in traffic]), mean([t["down"] for t in traffic]))


def absences(lines: Lines) -> Absences:
    """Of all rounds in which some client that was asked did not count."""
    found = [line["clients"] for line in lines if "clients" in line]
    return Absences(*(sum(c[what] for c in found) for what in ("failed", "late", "refused")))


def mean(values: Iterable[float]) -> float | None:
    """The arithmetic mean; None of nothing."""
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else None
