"""The loop of a run: restore what was kept, round after round until done, and the summary.

A `RoundRunner` does the rounds: clients in this process (`training.run.Run`), or sites across
machines (`deployment.coordinator.Coordinator`). The loop writes the metrics and the summary, and
decides when a run ends. Imports no PyTorch.
"""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from math import isfinite
from typing import Any, Protocol

from fedforward.config.schema import Config
from fedforward.core.errors import UpdateNotFiniteError
from fedforward.federation.ledger import Ledger
from fedforward.federation.round_maker import SLOWER
from fedforward.methods.base import method_class
from fedforward.training import metrics
from fedforward.training.advice import Adviser
from fedforward.training.assembly import guarantee_of
from fedforward.training.callbacks import Callbacks
from fedforward.training.metrics import DivergenceError, ProgressCallback, RoundOutcome
from fedforward.training.metrics_lines import with_metrics
from fedforward.training.run_directory import RunDirectory, write_json
from fedforward.training.summary import (
    DeploymentSummary,
    Lines,
    RunSummary,
    SimulationSummary,
    summarize,
)

LOGGER = logging.getLogger("fedforward.training.loop")
#: How often a run that has diverged goes back, before it stops.
MOST_RETURNS = 5
#: Why a run ends after these metrics lines, the base model's first; empty if it does not.
StopRule = Callable[[Sequence[dict[str, Any]]], str]


class RoundRunner(Protocol):
    """Whoever does the rounds of a run; what it commits is in the ledger."""

    def restore(self, rounds: int) -> Iterable[RoundOutcome]:
        """Come to `rounds` rounds of the ledger, and then to each later one.

        Yields:
            What is known of each later round, once the runner stands after it.
        """
        ...

    def run_round(self) -> RoundOutcome:
        """One whole round, from tasks to the ledger.

        Raises:
            UpdateNotFiniteError: the round's update is not finite; nothing was committed.
        """
        ...

    def go_back(self, rounds: int) -> RoundOutcome:
        """Take back all rounds after the first so many, as a round of the ledger."""
        ...

    def evaluate(self, rounds: int) -> dict[str, Any]:
        """The held-out figures after so many rounds.

        Returns:
            `heldout_loss` and what else belongs in the metrics line; after 0 rounds `example` may
            be among it. Without `heldout_loss` where there are no figures, or none yet; with
            `withheld` where there will be none.
        """
        ...

    def finish(self, lines: Lines) -> SimulationSummary | DeploymentSummary:
        """Keep what was tuned, and add to the summary what only this runner knows."""
        ...


class Loop:
    """A run that is being carried out.

    Attributes:
        lines: the metrics of each round so far; line 0 is the base model.
        summary: of the run; None until it is written.
    """

    def __init__(
        self,
        config: Config,
        directory: RunDirectory,
        ledger: Ledger,
        runner: RoundRunner,
        *,
        progress: ProgressCallback | None = None,
        callbacks: Callbacks | None = None,
        clock: Callable[[], float] = time.monotonic,
        stop: StopRule | None = None,
    ) -> None:
        """`clock` gives seconds; `stop` may end the run sooner than its settings do."""
        self.config = config
        self.directory = directory
        self.ledger = ledger
        self.runner = runner
        self.progress = progress
        self.callbacks = Callbacks(config.run.callbacks) if callbacks is None else callbacks
        self.clock = clock
        self.stop = stop
        self.lines: list[dict[str, Any]] = []
        self.summary: RunSummary | None = None
        self._restored = False
        self._rounding = metrics.RoundingWatch(config)
        self._adviser = Adviser(config)
        self._guarantee = guarantee_of(config)

    def run(self) -> RunSummary:
        """Carry the run to its end, write the summary and close the ledger.

        Raises:
            DivergenceError: after the results so far have been written.
        """
        self._restore()
        self.callbacks.begin(self.config, self.directory.path, self.lines)
        try:
            reason = self._returned(self._reason())
            while self.ledger.length < self.config.federation.rounds and not reason:
                reason = self._returned(self._round())
            return self._finish(reason)
        finally:
            self.callbacks.end()

    def _round(self) -> str:
        """One round and its line; why the run ends here, or nothing."""
        began = self.clock()
        try:
            outcome = self.runner.run_round()
        except UpdateNotFiniteError:
            return "diverged: the update of the next round was not finite"
        self._write_line(outcome, self.clock() - began)
        return self._reason()

    def _returned(self, reason: str) -> str:
        """Why the run ends here, unless it goes back to where it was best and on from there."""
        if not reason.startswith("diverged") or self.config.run.on_divergence != "rollback":
            return reason
        if not isfinite(self.lines[0]["heldout_loss"]):
            return reason
        returns = [line["round"] for line in self.lines if "taken_back" in line]
        if len(returns) == MOST_RETURNS:
            return f"{reason}; it went back {MOST_RETURNS} times"
        # Unless it is the coming round that could not be made, the last one is not good.
        last = metrics.reason_to_stop(self.config, self.lines)
        good = self.lines[:-1] if last else self.lines
        rounds = max(metrics.best_round(self.config, good), *returns[-1:], 0)
        LOGGER.warning(
            "The run has %s. It goes back to what it was after round %d, and on with a third of "
            "the learning rate.",
            reason,
            rounds,
        )
        began = self.clock()
        outcome = self.runner.go_back(rounds)
        self._write_line(outcome, self.clock() - began)
        return ""

    def _reason(self) -> str:
        """Why the run ends here, or nothing."""
        if words := metrics.reason_to_stop(self.config, self.lines):
            return words
        if self.stop is not None and (words := self.stop(self.lines)):
            return words
        target, after = self.config.privacy.target_epsilon, self.ledger.length + 1
        if self._guarantee is None or target is None or after > self.config.federation.rounds:
            return ""
        coming = self._guarantee.epsilon(after)
        if coming <= target:
            return ""
        return f"privacy: one more round has epsilon {coming:.3f}, above target_epsilon {target:g}"

    def _restore(self) -> None:
        """Make the metrics agree with the ledger, and begin them if there are none."""
        self.lines = with_metrics(
            self.directory.read_metrics(self.ledger.length), self.config.metrics
        )
        while not self.lines:
            figures = self.runner.evaluate(0)
            if "heldout_loss" in figures or "withheld" in figures:
                self.lines = [{"round": 0, "example": None, **figures, "seconds": 0.0}]
        self.directory.rewrite_metrics(self.lines)
        # A kill between a round and its line loses the line, never the round. What is written
        # again must be what was lost: it decides when the run stops.
        for outcome in self.runner.restore(self.lines[-1]["round"]):
            self._write_line(outcome, 0.0)
        if self._due(self.lines[-1]["round"]):
            self._evaluate_last()
        self._restored = True

    def _write_line(self, outcome: RoundOutcome, seconds: float) -> None:
        line = metrics.round_line(outcome, self.lines[-1]["seconds"] + seconds)
        if "passes" in line:
            known = (earlier["passes"] for earlier in reversed(self.lines) if "passes" in earlier)
            line["passes"] = round(line["passes"] + next(known, 0.0), 3)
        if self._guarantee is not None:
            line["epsilon"] = self._guarantee.epsilon(line["round"])
            line["delta"] = self._guarantee.delta
        if self._due(line["round"]) or "taken_back" in line:
            self._evaluate_into(line)
        self.lines.append(line)
        self.directory.append_metrics(line)
        if self._restored:
            self.callbacks.line(line)
        if "taken_back" not in line:
            self._advise(outcome)
        if self.progress is not None:
            self.progress(line["round"], self.config.federation.rounds, line)

    def _advise(self, outcome: RoundOutcome) -> None:
        """Say what there is to change by the last line."""
        line = self.lines[-1]
        if words := self._rounding.look(line):
            LOGGER.warning("%s", words)
        if words := self._adviser.look(metrics.remaining_lines(self.lines), outcome.record):
            more = line["round"] < self.config.federation.rounds
            more = more and not metrics.reason_to_stop(self.config, self.lines)
            LOGGER.warning("%s%s", words, " The run goes on." if more else "")

    def _due(self, done: int) -> bool:
        """Whether there is an evaluation after so many rounds."""
        return done % self.config.run.evaluate_every == 0 or done == self.config.federation.rounds

    def _evaluate_into(self, line: dict[str, Any]) -> None:
        began = self.clock()
        line |= self.runner.evaluate(line["round"])
        line["seconds"] += self.clock() - began

    def _evaluate_last(self) -> None:
        """Measure the last line where that is missing."""
        if not {"heldout_loss", "withheld"} & self.lines[-1].keys():
            self._evaluate_into(self.lines[-1])
            self.directory.rewrite_metrics(self.lines)
            if self._restored:
                self.callbacks.line(self.lines[-1])

    def _finish(self, reason: str) -> RunSummary:
        own = self.runner.finish(self.lines)
        self._evaluate_last()
        summary = summarize(self.config, self.lines, reason, self.ledger.chain.hex(), own)
        write_json(self.directory.summary, summary.to_json())
        self.summary = summary
        self.ledger.close()
        if words := self._divergence(reason):
            raise DivergenceError(words)
        return summary

    def _way_back(self) -> str:
        """What else can be done about a run that has diverged."""
        can = method_class(self.config.method.name).capabilities.replayable
        if not can or self.config.run.on_divergence == "rollback":
            return ""
        return " --resume run.on_divergence=rollback goes back to the lowest held-out loss."

    def _divergence(self, reason: str) -> str:
        """Why the run has diverged and what to do, in one sentence; empty if it has not."""
        if not isfinite(self.lines[0].get("heldout_loss", 0.0)):
            return (
                f"The loss of the base model itself is not a number: the weights of model.path = "
                f"{self.config.model.path!r} are damaged, or model.dtype = "
                f"{self.config.model.dtype!r} is too narrow for them (try 'float32')."
            )
        if not reason.startswith("diverged"):
            return ""
        rate = self.config.method.learning_rate
        returns = sum("taken_back" in line for line in self.lines)
        if rate != "auto":
            # It has gone on with smaller ones already.
            rate *= SLOWER**returns
        advice = (
            "Give method.learning_rate a number in place of 'auto', lower"
            if rate == "auto"
            else f"Lower method.learning_rate ({'it was' if returns else 'it is'} {rate:g}; try "
            f"{rate / 3:g}) or"
        )
        return (
            f"The run {reason} after round {self.lines[-1]['round']}. {advice} "
            "method.local_steps, or average more method.directions. Everything up to here is in "
            f"{self.directory.path}.{self._way_back()}"
        )
