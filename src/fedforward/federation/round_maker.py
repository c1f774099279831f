"""From the reports of a round to its ledger entry, and what that depends on of the rounds before.

The server closes rounds with it, and `audit` makes the entries of a ledger again with it. All of it
follows from the settings and the ledger. It knows scalars and seeds, and no weights.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedforward.core.layout import Layout
from fedforward.directions import Distribution
from fedforward.federation.learning_rates import WINDOW, RateSettings, rates, update_differences
from fedforward.federation.ledger import Round
from fedforward.federation.plausibility import capped_weights
from fedforward.federation.rate_search import RateSearch
from fedforward.federation.secure_sums import mean_gradients
from fedforward.federation.server_optimizer import PLAIN, ServerOptimizer
from fedforward.messages.entry import Entry
from fedforward.messages.report import ClientResult, Report
from fedforward.messages.secure import Total
from fedforward.methods.base import Method

#: What learning rates are multiplied with whenever rounds are taken back.
SLOWER = 1.0 / 3.0


@dataclass(frozen=True, kw_only=True)
class RoundSettings:
    """What a round's entry depends on beside the rounds before it.

    Attributes:
        run_seed: of every derived choice.
        weights: "equal" or "examples".
        weight_ratio, weight_share: see `plausibility.capped_weights`.
        rates: how learning rates are chosen.
        layout: of the tunable space.
        distribution: of the directions.
        optimizer: what is done to a round's steps before they are written.
        search: finds learning rates where they are "auto"; `rates` then multiply what it finds.
        secure_sums: whether the server has sums of reports and no single ones.
    """

    run_seed: int
    weights: str
    rates: RateSettings
    layout: Layout
    distribution: Distribution
    optimizer: ServerOptimizer = PLAIN
    search: RateSearch | None = None
    weight_ratio: float = math.inf
    weight_share: float = 1.0
    secure_sums: bool = False


class RoundMaker:
    """What rounds leave for the one that follows, and how that one is made.

    Attributes:
        rounds: that were taken in.
        state: what the method remembers.
        search: of the learning rate; None where it is given.
        history: the last rounds, oldest first; none of those that were taken back.
        last_return: the number of the last round that took others back; -1 if none did.
    """

    def __init__(self, settings: RoundSettings, method: Method) -> None:
        self.settings = settings
        self.method = method
        self._window = max(WINDOW, settings.optimizer.window)
        self._begin()

    def _begin(self) -> None:
        self.rounds = 0
        self.state: Any = self.method.new_state()
        self.search = copy(self.settings.search)
        self.history: list[Round] = []
        self.last_return = -1
        self._slower = 1.0
        self._first: Round | None = None
        self._payload_before = b""

    def go_back(self, record: Round, remaining: Iterable[Round]) -> None:
        """Take in a round that takes others back.

        Args:
            remaining: rounds before it that no earlier one took back, oldest first.
        """
        self._begin()
        kept = (earlier for earlier in remaining if earlier.entry.round < record.entry.keeps)
        for earlier in kept:
            self.observe(earlier)
            self.remember(earlier)
        self.remember(record)

    def observe(self, record: Round) -> None:
        """Take a round into what the method remembers."""
        if record.entry.goes_back:
            return
        self._payload_before = self.method.task_payload(self.state)
        self.method.observe(record.entry, record.results, self.state)

    def remember(self, record: Round) -> None:
        """Take in a round that was observed and is in the ledger."""
        self.rounds = record.entry.round + 1
        if record.entry.goes_back:
            self.last_return = record.entry.round
            self._slower *= SLOWER
            if self.search is not None:
                self.search.lower(SLOWER)
            return
        if self.search is not None:
            self.search.observe(record)
        self._first = self._first or record
        self.history = [*self.history, record][-self._window :]

    def multipliers(self, participants: Sequence[int]) -> dict[int, float]:
        """Each client's learning rate as the schedule and its score have it."""
        return rates(
            self.settings.rates,
            self.rounds,
            participants,
            self.history[-WINDOW:],
            self.settings.run_seed,
            self._differences,
        )

    def task_rates(self, multipliers: Mapping[int, float]) -> dict[int, float]:
        """The learning rates that tasks carry.

        Args:
            multipliers: of all participants.
        """
        factor = self.settings.optimizer.rate_factor(self._first, self.history)
        if self.search is not None:
            # Known only when the first round's projected gradients are; that round stays where
            # it begins.
            factor *= self.search.factor(1.0) / max(1, len(multipliers))
        else:
            factor *= self._slower
        return {client: factor * rate for client, rate in multipliers.items()}

    def results(
        self,
        reports: Sequence[Report],
        weights: Sequence[float],
        multipliers: Mapping[int, float],
        blocks: Mapping[int, NDArray[np.bool_] | None],
        *,
        last: bool,
    ) -> list[ClientResult]:
        """The reports with their weights, rates and blocks.

        Args:
            reports: sorted by client.
            weights: p_i, in the same order.
            multipliers: see `multipliers`; of all participants.
            blocks: that clients were given; none stands for all.
            last: whether no round follows.
        """
        own = self.task_rates(multipliers)
        results = [
            ClientResult(weight, own[report.client], report, blocks.get(report.client))
            for weight, report in zip(weights, reports, strict=True)
        ]
        if self.search is None:
            return results
        return self.search.rated(results, multipliers, last)

    def entry(self, results: Sequence[ClientResult], total: Total | None = None) -> Entry:
        """The round's update, or the one that takes back the last, if the loss has risen by it.

        Args:
            total: with secure sums, the sum of the reports.
        """
        optimizer = self.settings.optimizer
        if total is not None:
            mean, rate = mean_gradients(total), results[0].learning_rate
            return optimizer.apply(self.method.aggregate_sum(self.rounds, mean, rate), self.history)
        if self.search is not None and self.search.takes_back(results):
            before = self.history[-1].entry
            return replace(self.method.taken_back(self.rounds, before), decay=optimizer.decay)
        entry = self.method.aggregate(self.rounds, results, self.state)
        return optimizer.apply(entry, self.history)

    def _differences(self) -> dict[int, float]:
        record = self.history[-1]
        updates = {
            part.report.client: self.method.own_update(
                record.entry.round, part, self._payload_before
            )
            for part in record.results
        }
        weights = [part.weight for part in record.results]
        return update_differences(
            updates, weights, self.settings.layout, self.settings.distribution
        )


def weights_of(settings: RoundSettings, examples: Sequence[int]) -> list[float]:
    """p_i of clients with so many training examples each; they sum to one."""
    if settings.weights == "equal":
        return [1.0 / len(examples)] * len(examples)
    return capped_weights(examples, settings.weight_ratio, settings.weight_share)
