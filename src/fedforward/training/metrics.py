"""What is measured of a round: a line of figures, when to stop, and who is told of it.

The simulation on one machine and the federation across machines write the same lines and stop for
the same reasons. Imports no PyTorch.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import compress
from statistics import fmean
from typing import Any

from fedforward.config.schema import Config
from fedforward.core.errors import FedForwardError
from fedforward.evaluation.text_metrics import LOSSES
from fedforward.federation.ledger import Round
from fedforward.federation.plausibility import plausible_losses
from fedforward.federation.secure_sums import mean_loss, skipped_steps
from fedforward.messages.report import Report

#: So many projected gradients that are 0, and such a share of all, are said to be too many.
LEAST_ZEROS, MOST_ZEROS = 3, 0.02
#: A training loss below this may well be the same for both probes of a pair.
LEAST_LOSS = 0.01
#: A held-out loss above this multiple of the loss at the start counts as divergence.
DIVERGED = 1.5
#: Where updates that raise the loss are taken back, so many rounds or evaluations in a row do.
PERSISTENT = 3

#: Examples in the rounds whose training losses must all have risen; one alone says little.
LEAST_EXAMPLES = 16

#: Told of each round: rounds that are done, rounds of the run, and the round's metrics line.
ProgressCallback = Callable[[int, int, dict[str, Any]], None]


class DivergenceError(FedForwardError):
    """The run stopped because its loss rose too far or was not a number."""


@dataclass(frozen=True)
class Traffic:
    """Encoded bytes of one round, per client that was asked (the mean).

    Attributes:
        up: of reports.
        down: of tasks.
        snapshots: of snapshots that a client sent up, whole; None where they are not counted apart.
    """

    up: float
    down: float
    snapshots: int | None = None


@dataclass(frozen=True)
class Attendance:
    """What became of the clients that were asked in a round; None where it is not known.

    Attributes:
        asked: clients that were sent a task.
        reported: reports that the round was made from.
        failed: clients that sent nothing.
        late: reports that came after their round was closed.
        refused: reports that were refused.
    """

    asked: int
    reported: int
    failed: int | None = None
    late: int = 0
    refused: int | None = None


@dataclass(frozen=True)
class RoundOutcome:
    """A round that is in the ledger, and what else is known of it.

    Attributes:
        record: the ledger's.
        traffic: None for a round that was read from the ledger.
        attendance: likewise.
        changed_share: share of the tuned weights whose bits the round has changed, if measured.
        passes: forward passes over a probe's batch that would cost as much as all the round's
            probes did; None or 0 if that was not counted.
    """

    record: Round
    traffic: Traffic | None = None
    attendance: Attendance | None = None
    changed_share: float | None = None
    passes: float | None = None


def round_line(outcome: RoundOutcome, seconds: float) -> dict[str, Any]:
    """A round's line, without held-out figures; `round` counts from 1.

    Args:
        seconds: since the beginning of the run.
    """
    record, attendance = outcome.record, outcome.attendance
    reports = [result.report for result in record.results]
    losses = [report.loss for report in reports if math.isfinite(report.loss)]
    # One client's number neither ends a run nor hides that it diverges.
    losses = list(compress(losses, plausible_losses(losses)))
    skipped = sum(report.skipped for report in reports)
    if record.total is not None:
        mean, skipped = mean_loss(record.total), skipped_steps(record.total)
        losses = [mean] if math.isfinite(mean) else []
    line: dict[str, Any] = {
        "round": record.entry.round + 1,
        "training_loss": sum(losses) / len(losses) if losses else None,
        "skipped_steps": skipped,
        **_zero_gradients(reports),
        "learning_rates": {r.report.client: r.learning_rate for r in record.results},
        "seconds": seconds,
    }
    if outcome.traffic is not None:
        line["bytes"] = _known(outcome.traffic)
    if record.entry.goes_back:
        line["taken_back"] = record.entry.round - record.entry.keeps
    if attendance is not None and (attendance.reported < attendance.asked or attendance.late):
        line["clients"] = _known(attendance)
    if outcome.passes:
        line["passes"] = outcome.passes
    if outcome.changed_share is not None and not record.entry.goes_back:
        line["changed_share"] = outcome.changed_share
    return line


def _known(record: Traffic | Attendance) -> dict[str, Any]:
    return {name: value for name, value in asdict(record).items() if value is not None}


def _zero_gradients(reports: Sequence[Report]) -> dict[str, float]:
    """The share of a round's projected gradients that are exactly 0: their probes told nothing.

    Those of skipped steps are among them. Nothing for a method that sends none.
    """
    gradients = [gradient for report in reports for gradient in report.gradients.tolist()]
    return {"zero_gradients": gradients.count(0.0) / len(gradients)} if gradients else {}


class RoundingWatch:
    """Looks whether probes tell nothing because the losses of a pair round to the same number."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._zeros = self._gradients = 0
        # Other objectives take few values, which are often equal for a good reason.
        self._over = config.objective not in LOSSES

    def look(self, line: Mapping[str, Any]) -> str:
        """A sentence, once, when too many projected gradients were exactly 0; else empty.

        Args:
            line: of the next round.
        """
        method = self.config.method
        # Those of skipped steps are 0 as well, and their losses were not finite; a loss of 0 has
        # nothing left to tell.
        if self._over or line["skipped_steps"] or (line["training_loss"] or 0.0) < LEAST_LOSS:
            return ""
        gradients = method.local_steps * method.directions * len(line["learning_rates"])
        self._gradients += gradients
        self._zeros += round(gradients * line.get("zero_gradients", 0.0))
        if self._zeros < LEAST_ZEROS or self._zeros < MOST_ZEROS * self._gradients:
            return ""
        self._over = True
        mu, dtype = method.mu, self.config.model.dtype
        wider = "" if dtype == "float32" else ", or set model.dtype = 'float32'"
        return (
            f"{self._zeros} of {self._gradients} projected gradients were exactly 0: with "
            f"method.mu = {mu:g} both losses of a pair often round to the same number in {dtype}, "
            f"so that steps tell little. Raise method.mu (try {_larger(mu, dtype):g}){wider}. "
            "The run goes on."
        )


def _larger(mu: float, dtype: str) -> float:
    """A perturbation scale that this rounding seldom swallows, and that is above this one."""
    usual = 1e-3 if dtype == "float32" else 3e-3
    return usual if mu < usual else 10 * mu


def remaining_lines(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of rounds that no later one took back, without those that took others back."""
    found: list[dict[str, Any]] = []
    for line in lines:
        if "taken_back" not in line:
            found.append(line)
            continue
        while found[-1]["round"] >= line["round"] - line["taken_back"]:
            found.pop()
    return found


def best_round(config: Config, lines: Sequence[dict[str, Any]]) -> int:
    """The number of rounds after which what a run optimises was best; the latest of equals.

    Rounds that were taken back are left out; one that took others back has the value of those that
    stayed.
    """
    stayed = {line["round"] for line in remaining_lines(lines)}
    values = {
        line["round"]: heldout_objective(config.objective, line)
        for line in lines
        if "heldout_loss" in line and (line["round"] in stayed or "taken_back" in line)
    }
    finite = {number: value for number, value in values.items() if math.isfinite(value)}
    return min(finite, key=lambda number: (finite[number], -number), default=0)


def reason_to_stop(config: Config, lines: Sequence[dict[str, Any]]) -> str:
    """Why a run ends before its last round, or nothing.

    Args:
        lines: of the base model and of each round so far.
    """
    if "taken_back" in lines[-1]:
        return ""
    lines = remaining_lines(lines)
    if len(lines) == 1:
        return ""
    if words := _persists(_training_diverged, config, lines):
        return words
    if "heldout_loss" not in lines[-1]:
        return ""
    evaluated = [line for line in lines if "heldout_loss" in line]
    if words := _persists(_heldout_diverged, config, evaluated):
        return words
    objective = config.objective
    patience = config.run.patience
    values = [heldout_objective(objective, line) for line in evaluated]
    if patience and len(values) > patience and min(values[-patience:]) >= min(values[:-patience]):
        better = f"a better {objective}"
        if objective in LOSSES:
            better = f"a lower held-out {objective}"
        return f"patience: {patience} evaluations without {better}"
    return ""


def _persists(
    diverged: Callable[[Config, Sequence[dict[str, Any]]], str],
    config: Config,
    lines: Sequence[dict[str, Any]],
) -> str:
    """Why a run has diverged, unless the next round may still take back what made it so.

    With `method.learning_rate = "auto"` an update that raises the loss is taken back a round
    later. The last round's never is, and a base model whose loss is no number stays so.
    """
    words = diverged(config, lines)
    if not words or config.method.learning_rate != "auto":
        return words
    final = lines[-1]["round"] >= config.federation.rounds
    if final or not math.isfinite(lines[0].get("heldout_loss", 0.0)):
        return words
    ends = range(len(lines), len(lines) - PERSISTENT, -1)
    return words if all(end > 1 and diverged(config, lines[:end]) for end in ends) else ""


def _training_diverged(config: Config, lines: Sequence[dict[str, Any]]) -> str:
    """Why a run has diverged by its last line's training loss, or nothing."""
    line = lines[-1]
    steps = config.method.local_steps * len(line["learning_rates"])
    if line["skipped_steps"] >= steps:
        return "diverged: no step of the last round had a finite loss"
    if line["training_loss"] is None or "heldout_loss" not in lines[0]:
        # Sites may withhold their losses.
        return ""
    start = _decisive(lines[0], "heldout_loss")
    told = [entry["training_loss"] for entry in lines[1:] if entry["training_loss"] is not None]
    rounds = -(-LEAST_EXAMPLES // (steps * config.method.batch_size))
    if len(told) < rounds:
        return ""
    first, last = fmean(told[:rounds]), told[-rounds:]
    # Each of them: a round whose update was taken back says nothing of those after it.
    if min(last) > _limit(config) * max(start, first):
        return f"diverged: the training loss is {fmean(last):.3f}, from {first:.3f}"
    return ""


def _heldout_diverged(config: Config, lines: Sequence[dict[str, Any]]) -> str:
    """Why a run has diverged by its last line's held-out figures, or nothing."""
    found, start = (_decisive(line, "heldout_loss") for line in (lines[-1], lines[0]))
    if not found <= _limit(config) * start:
        return f"diverged: the held-out loss is {found:.3f}, from {start:.3f}"
    return _worse_than_guessing(config, lines)


def _decisive(line: Mapping[str, Any], name: str) -> float:
    """A held-out figure that decides: over sites their median, where there are several."""
    figures = {"heldout_loss": line["heldout_loss"], **line.get("metrics", {})}
    return float(line.get("medians", {}).get(name, figures[name]))


def _limit(config: Config) -> float:
    """The multiple of the loss at the start that counts as divergence.

    Another objective may leave the loss behind as long as there is one.
    """
    return DIVERGED if config.objective == "loss" else math.inf


def heldout_objective(objective: str, line: Mapping[str, Any]) -> float:
    """What a run optimises, on held-out examples, from a line with a held-out loss.

    Lower is better: scores have their sign changed.
    """
    if objective == "loss":
        return _decisive(line, "heldout_loss")
    value = _decisive(line, objective)
    return value if objective in LOSSES else -value


def _worse_than_guessing(config: Config, lines: Sequence[Mapping[str, Any]]) -> str:
    """Why a run that optimises "choice" has diverged, or nothing.

    A cross-entropy that begins near 0 may well rise by more than half.
    """
    if config.objective != "choice" or config.data.label_words is None:
        return ""
    start, found = (_decisive(line, "choice") for line in (lines[0], lines[-1]))
    if found <= DIVERGED * max(start, math.log(len(config.data.label_words))):
        return ""
    return f"diverged: the held-out choice is {found:.3f}, from {start:.3f}"
