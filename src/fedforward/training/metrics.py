"""How far a run is: a line of figures a round, when to stop, and whoever is told of it.

The simulation on one machine and the federation across machines write the same lines and stop for
the same reasons. Imports no PyTorch.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol

from fedforward.config.schema import Config
from fedforward.core.errors import FedForwardError
from fedforward.federation.ledger import Round
from fedforward.messages.report import Report

#: A held-out loss above this multiple of the loss at the start counts as divergence.
DIVERGED = 1.5


class Listener(Protocol):
    """Whoever shows the progress of a run."""

    def phase(self, text: str) -> None:
        """A preparation step begins."""
        ...

    def progress(self, done: int, total: int, line: dict[str, Any]) -> None:
        """A round is done; `line` is its metrics line."""
        ...


class DivergenceError(FedForwardError):
    """The run stopped because its loss rose too far or was not a number."""


def round_line(record: Round) -> dict[str, Any]:
    """A round's figures as far as its reports have them; `round` counts from 1."""
    reports = [result.report for result in record.results]
    losses = [report.loss for report in reports if math.isfinite(report.loss)]
    return {
        "round": record.entry.round + 1,
        "training_loss": sum(losses) / len(losses) if losses else None,
        "skipped_steps": sum(report.skipped for report in reports),
        **_zero_gradients(reports),
        "learning_rates": {r.report.client: r.learning_rate for r in record.results},
    }


def _zero_gradients(reports: Sequence[Report]) -> dict[str, float]:
    """The share of a round's projected gradients that are exactly 0: their probes told nothing.

    Those of skipped steps are among them. Nothing for a method that sends none.
    """
    gradients = [gradient for report in reports for gradient in report.gradients.tolist()]
    return {"zero_gradients": gradients.count(0.0) / len(gradients)} if gradients else {}


def reason_to_stop(config: Config, lines: Sequence[dict[str, Any]]) -> str:
    """Why a run ends before its last round, or nothing.

    Args:
        lines: of the base model and of each round so far.
    """
    if len(lines) == 1:
        return ""
    line, start = lines[-1], lines[0]["heldout_loss"]
    steps = config.method.local_steps * len(line["learning_rates"])
    if line["skipped_steps"] >= steps:
        return "diverged: no step of the last round had a finite loss"
    objective = config.method.objective
    # Another objective may leave the loss behind as long as there is one.
    limit = DIVERGED if objective == "loss" else math.inf
    training = [entry["training_loss"] for entry in lines[1:]]
    first = next((loss for loss in training if loss is not None), None)
    # Sites may withhold their losses.
    if training[-1] is not None and training[-1] > limit * max(start, first):
        return f"diverged: the training loss is {training[-1]:.3f}, from {first:.3f}"
    if "heldout_loss" not in line:
        return ""
    if not line["heldout_loss"] <= limit * start:
        return f"diverged: the held-out loss is {line['heldout_loss']:.3f}, from {start:.3f}"
    patience = config.run.patience
    evaluated = [entry for entry in lines if "heldout_loss" in entry]
    values = [
        entry["heldout_loss"] if objective == "loss" else -entry["metrics"][objective]
        for entry in evaluated
    ]
    if patience and len(values) > patience and min(values[-patience:]) >= min(values[:-patience]):
        better = "a lower held-out loss" if objective == "loss" else f"a better {objective}"
        return f"patience: {patience} evaluations without {better}"
    return ""
