"""What a run says, once each, when it goes wrong in a way that the FedMeZO paper names.

A loss that surges: the rate or μ is too large, and by how much. A loss that stays: what the
projected gradients say of it. Nothing here ends or changes a run. Imports no PyTorch.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from fedforward.config.schema import Config
from fedforward.federation.ledger import Round
from fedforward.methods.base import method_class
from fedforward.training.metrics import LEAST_EXAMPLES

#: A loss above this multiple of the lowest before it has surged: held out, and in training.
SURGE, TRAINING_SURGE = 1.1, 1.25
#: A training loss, which is that of probes, above this multiple of the held-out one.
APART = 1.25
#: What probes may lie above the weights' own loss, as a share of it.
PROBES_ABOVE = 0.01
#: Rounds after which a loss that has changed by less than this share is said to stay.
STAYING_ROUNDS, STAYING = 10, 0.002
#: Share of the loss that the steps of a run should be able to take off.
WORTH = 0.01


class Adviser:
    """Looks at each round of a run, and has a sentence where there is something to change."""

    def __init__(self, config: Config) -> None:
        self.config = config
        method = config.method
        # Rates that are found are lowered by who finds them.
        self._rate = None if method.learning_rate == "auto" else float(method.learning_rate)
        can = method_class(method.name).capabilities
        # Where losses travel, by which a rate is found.
        self._losses = can.forward_only and not config.privacy.on
        self._losses = self._losses and not config.federation.secure_sums
        # Normalised steps, votes and noise do not have the length of projected gradients, and a
        # sum of reports has none of single clients.
        self._plain = (
            self._losses
            and not can.votes
            and method.estimator != "fzoo"
            and not config.server.normalise
        )
        # Backpropagation measures the loss at the weights themselves.
        self._probes = can.forward_only
        self._said: set[str] = set()
        self._falls: list[float] = []

    def look(self, lines: Sequence[Mapping[str, Any]], record: Round) -> str:
        """A sentence, once for each kind of trouble; else empty.

        Args:
            lines: of the base model and of each round so far, the last one of this round.
            record: the round, as the ledger has it.
        """
        if self.config.objective != "loss":
            return ""
        self._falls.append(self._promised(record))
        for name, find in (("surge", self._surge), ("mu", self._mu), ("stays", self._stays)):
            if name not in self._said and (words := find(lines)):
                self._said.add(name)
                return words
        return ""

    def _promised(self, record: Round) -> float:
        """How much the round's steps could lower the loss at first order: Σ p_i η_i g² / n.

        On the batches on which g was measured, so it is more than on other examples.
        """
        directions = max(1, self.config.method.directions)
        # The square of a wrong number of a client may be more than float32 holds.
        squares = [(part.report.gradients.astype(np.float64) ** 2).sum() for part in record.results]
        return sum(
            part.weight * part.learning_rate * float(square) / directions
            for part, square in zip(record.results, squares, strict=True)
        )

    def _surge(self, lines: Sequence[Mapping[str, Any]]) -> str:
        """The loss has risen: by how much the steps are too long."""
        if self._rate is None:
            return ""
        risen = self._risen(lines)
        if risen is None:
            return ""
        what, low, now, rounds = risen
        method, rate = self.config.method, self._rate
        factor, how = 3.0, "The steps are too long"
        promised = sum(self._falls[-rounds:])
        if self._plain and len(self._falls) >= rounds and promised > 0.0:
            # f(η) = -a η + b η² has risen by R, so the best rate is a / 2b. a is too large here.
            factor = max(2.0, 2.0 * (1.0 + (now - low) / promised))
            how = (
                f"By its projected gradients method.learning_rate = {rate:g} is at least "
                f"{factor:.2g} times too large"
            )
        found = ", or 'auto'" if self._losses else ""
        return (
            f"The {what} loss has surged from {low:.3f} to {now:.3f} by round "
            f"{lines[-1]['round']}. {how}: try {_rounded(rate / factor)}{found}. A shorter "
            f"round (method.local_steps, {method.local_steps} now) or more method.directions "
            "also help."
        )

    def _risen(self, lines: Sequence[Mapping[str, Any]]) -> tuple[str, float, float, int] | None:
        """Which loss has risen, from what to what, and in how many rounds."""
        if "heldout_loss" in lines[-1]:
            told = [line for line in lines if "heldout_loss" in line]
            before = min(told[:-1], key=lambda line: line["heldout_loss"], default=None)
            now = told[-1]["heldout_loss"]
            if before is not None and math.isfinite(now) and now > SURGE * before["heldout_loss"]:
                rounds = lines[-1]["round"] - before["round"]
                return "held-out", before["heldout_loss"], now, rounds
        losses = self._training(lines)
        width = self._width(lines)
        if len(losses) < 2 * width:
            return None
        means = [fmean(losses[n : n + width]) for n in range(len(losses) - 2 * width + 1)]
        place = min(range(len(means)), key=means.__getitem__)
        now = fmean(losses[-width:])
        if now > TRAINING_SURGE * means[place]:
            return "training", means[place], now, len(losses) - place - width
        return None

    def _mu(self, lines: Sequence[Mapping[str, Any]]) -> str:
        """The probes lie far above the weights: by how much μ is too large."""
        width, losses = self._width(lines), self._training(lines)
        heldout = lines[-1].get("heldout_loss")
        if not self._probes or len(losses) < width:
            return ""
        if heldout is None or not math.isfinite(heldout):
            return ""
        # Where the weights themselves have got worse it is the rate.
        low = min(line["heldout_loss"] for line in lines if "heldout_loss" in line)
        training = fmean(losses[-width:])
        if self._rate is None:
            # One round of weights that were taken back says nothing of probes.
            before = losses[-2 * width : -width]
            training = min(training, fmean(before)) if before else 0.0
        if heldout > SURGE * low or training <= APART * heldout:
            return ""
        mu = self.config.method.mu
        factor = math.sqrt((training - heldout) / (PROBES_ABOVE * heldout))
        return (
            f"The loss at the probes is {training:.3f}, and {heldout:.3f} at the weights "
            f"themselves: they are too far away. method.mu = {mu:g} is about {factor:.2g} times "
            f"too large: try {_rounded(mu / factor)}. Where training and held-out examples differ "
            "by nature, this says nothing."
        )

    def _stays(self, lines: Sequence[Mapping[str, Any]]) -> str:
        """The held-out loss does not move: whether steps are too short, or noise."""
        told = [line["heldout_loss"] for line in lines if "heldout_loss" in line]
        if lines[-1]["round"] < STAYING_ROUNDS or "heldout_loss" not in lines[-1]:
            return ""
        if len(told) < 3 or max(abs(loss - told[0]) for loss in told) > STAYING * abs(told[0]):
            return ""
        promised, start = sum(self._falls), told[0]
        begin = (
            f"The held-out loss has stayed within {100 * STAYING:.1f} % of {start:.3f} for "
            f"{lines[-1]['round']} rounds. "
        )
        end = " `fedforward diagnose CONFIG` measures a rate."
        if self._rate is None:
            return f"{begin}Each step tells little: raise method.directions or batch_size.{end}"
        if self.config.privacy.on:
            return (
                f"{begin}The noise of [privacy] may hide what rows say: raise method.batch_size or "
                "take fewer federation.rounds with a privacy.target_epsilon. A "
                f"method.learning_rate, {self._rate:g} now, can be found on public rows."
            )
        if not self._plain or len(self._falls) < lines[-1]["round"]:
            return (
                f"{begin}Raise method.learning_rate, {self._rate:g} now, or method.directions or "
                f"batch_size.{end}"
            )
        if 0.0 < promised < WORTH * start:
            factor = WORTH * start / promised
            return (
                f"{begin}The steps are too short: by their projected gradients they could take "
                f"off {promised:.2g} nats in all. Try method.learning_rate = "
                f"{_rounded(self._rate * min(factor, 100.0))} (it is {self._rate:g}).{end}"
            )
        return (
            f"{begin}The steps are long enough to take off {promised:.2g} nats, and noise takes "
            f"it back: raise method.directions or batch_size.{end}"
        )

    def _training(self, lines: Sequence[Mapping[str, Any]]) -> list[float]:
        losses = (line["training_loss"] for line in lines[1:])
        return [loss for loss in losses if loss is not None and math.isfinite(loss)]

    def _width(self, lines: Sequence[Mapping[str, Any]]) -> int:
        """Rounds whose training losses together are of enough examples."""
        method = self.config.method
        clients = max(1, len(lines[-1].get("learning_rates", ())))
        return -(-LEAST_EXAMPLES // (method.local_steps * method.batch_size * clients))


def _rounded(value: float) -> str:
    """To one digit."""
    return f"{float(f'{value:.0e}'):g}"
