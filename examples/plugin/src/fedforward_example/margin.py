"""The margin between the right label word and the best other one, as a smooth objective.

For an example with log-likelihoods l_c of its possible answers the value is log(1 + exp(m - l_y)),
where y is the right answer and m the greatest of the others: lower is better, 0 is certain. Unlike
an accuracy it moves with every small change of the model.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fedforward.core.batches import Batch
from fedforward.core.steps import Evaluation, Probe
from fedforward.data.examples import Example
from fedforward.data.sampler import collate_choices
from fedforward.evaluation.objectives import Objective


class Margin(Objective):
    """See the module; it needs `data.label_words`."""

    def batch(self, examples: Sequence[Example]) -> Batch:
        """A row for each possible answer of each example."""
        return replace(collate_choices(examples), objective=self)

    def measure(self, model: Any, probes: Sequence[Probe]) -> list[Evaluation]:
        """One value for each example, from the losses of its rows."""
        measured = model.token_losses([replace(p, batch=p.batch.rows) for p in probes])
        results = []
        for probe, losses in zip(probes, measured, strict=True):
            right = probe.batch.right
            loss = losses.sums.reshape(len(right), -1)
            place = np.arange(len(right))
            others = loss.copy()
            others[place, right] = np.inf
            values = np.logaddexp(0.0, loss[place, right] - others.min(axis=1))
            results.append(Evaluation(values, np.ones(len(values), np.int64)))
        return results

    def metric(self, value: float) -> float:
        """exp(-value): 1 is certain, 1/2 is a draw; higher is better."""
        return float(np.exp(-value))
