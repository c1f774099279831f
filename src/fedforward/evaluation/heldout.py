"""What is measured on held-out examples: the loss always, and the metrics that were asked for.

Answers are generated once for all the metrics that look at them.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from logging import INFO
from typing import Any

import numpy as np

from fedforward.config.schema import Config
from fedforward.core.logs import PHASES, PROGRESS
from fedforward.core.steps import Probe, ProbePlan
from fedforward.data.examples import Example
from fedforward.data.sampler import by_length, collate_prompts
from fedforward.evaluation.objectives import (
    Context,
    Objective,
    Score,
    ScoreFunction,
    build_objective,
    evaluate_together,
    texts,
    together,
)
from fedforward.models.base import CausalModel

#: Seconds after which an evaluation says how far it is, and between its saying so.
FIRST_LINE_S, NEXT_LINE_S = 2.0, 10.0


@dataclass(frozen=True)
class HeldOut:
    """The held-out examples and what is measured on them.

    Attributes:
        groups: the examples, in groups of similar length.
        metrics: names, without the loss that is always measured.
        objectives: what is measured through batches, the loss among them, by name.
        scores: of generated answers, by metric.
        tokenizer: reads generated answers.
        most_tokens: of a generated answer.
    """

    groups: list[Sequence[Example]]
    metrics: tuple[str, ...]
    objectives: dict[str, Objective]
    scores: dict[str, ScoreFunction]
    tokenizer: Any
    most_tokens: int


def prepare(
    config: Config,
    examples: Sequence[Example],
    tokenizer: Any,
    plan: ProbePlan,
    classes: tuple[str, ...] = (),
) -> HeldOut:
    """See `HeldOut`.

    Args:
        classes: of a sequence classifier; else empty.

    Raises:
        FedForwardError: a metric's function cannot be found, or fails on two references.
    """
    metrics = config.metrics
    typed = dict.fromkeys(config.evaluation.metrics, "evaluation.metrics")
    objectives: dict[str, Objective] = {}
    scores: dict[str, ScoreFunction] = {}
    for name in dict.fromkeys(("loss", *metrics)):
        if name == "perplexity":
            continue
        key = typed.get(name, "method.objective")
        context = Context(
            tokenizer,
            config.data.answer_tokens,
            classes,
            key,
            joined=plan.joins_choices,
            most_branching=plan.most_branching,
        )
        objective = build_objective(name, context)
        if isinstance(objective, Score):
            scores[name] = objective.function
        else:
            objectives[name] = objective
    references = [example.reference for example in examples[:2]]
    for score in scores.values():
        # Before the run has left anything behind.
        score(references, references)
    groups = by_length(examples, plan.evaluation_rows)
    return HeldOut(groups, metrics, objectives, scores, tokenizer, config.data.answer_tokens)


def measure(model: CausalModel, heldout: HeldOut) -> dict[str, Any]:
    """The held-out figures at the model's current weights.

    What one pass over the examples can measure, one pass measures. How far it is, is logged as a
    phase where it takes more than two seconds.

    Returns:
        `heldout_loss`, the mean loss per answer token (or text, of a classifier) in nats, whatever
        the run optimises; and, if there are any, `metrics` by name: `perplexity` is exp(loss), the
        others are means over the examples.
    """
    progress = _Progress()
    values: dict[str, float] = {}
    for group in together(heldout.objectives):
        values |= _means(model, progress.over(heldout.groups, ", ".join(group)), group)
    loss = values["loss"]
    if "perplexity" in heldout.metrics:
        with np.errstate(over="ignore"):
            values["perplexity"] = float(np.exp(loss))
    if heldout.scores:
        values |= _scores(model, heldout, progress.over(heldout.groups, "answers"))
    figures: dict[str, Any] = {"heldout_loss": loss}
    if heldout.metrics:
        figures["metrics"] = {name: values[name] for name in heldout.metrics}
    return figures


def _means(
    model: CausalModel, groups: Iterable[Sequence[Example]], objectives: Mapping[str, Objective]
) -> dict[str, float]:
    """By name, the sum of all that is measured, divided by its count, as people look at it."""
    total, count = dict.fromkeys(objectives, 0.0), dict.fromkeys(objectives, 0)
    for group in groups:
        for name, evaluation in evaluate_together(model, objectives, group).items():
            total[name] += float(evaluation.sums.sum())
            count[name] += int(evaluation.counts.sum())
    return {name: o.metric(total[name] / count[name]) for name, o in objectives.items()}


def _scores(
    model: CausalModel, heldout: HeldOut, groups: Iterable[Sequence[Example]]
) -> dict[str, float]:
    """The mean of each score over the greedy answers to all prompts."""
    answers: list[str] = []
    references: list[str] = []
    for group in groups:
        prompts = [example.tokens[: example.prompt_length] for example in group]
        batch = collate_prompts(prompts, heldout.tokenizer, heldout.most_tokens)
        (generated,) = model.generate([Probe(batch)])
        answers += texts(heldout.tokenizer, generated)
        references += [example.reference for example in group]
    return {
        name: float(np.mean(score(answers, references))) for name, score in heldout.scores.items()
    }


class _Progress:
    """Logs how far an evaluation is, once it has taken a while.

    A line every ten seconds, and a record below INFO for each group, for a bar on a terminal.
    """

    def __init__(self) -> None:
        self.first = self.due = time.monotonic() + FIRST_LINE_S

    def over(self, groups: Sequence[Sequence[Example]], what: str) -> Iterator[Sequence[Example]]:
        """The groups, one after another."""
        done, total = 0, sum(map(len, groups))
        for group in groups:
            now = time.monotonic()
            if now >= self.first:
                level = INFO if now >= self.due else PROGRESS
                self._log(level, what, done, total)
                self.due = now + NEXT_LINE_S if level == INFO else self.due
            yield group
            done += len(group)
        if time.monotonic() >= self.first:
            self._log(PROGRESS, what, done, total)

    def _log(self, level: int, what: str, done: int, total: int) -> None:
        how_far = {"done": done, "total": total}
        PHASES.log(level, "evaluating %s: %d of %d examples", what, done, total, extra=how_far)
