"""What is measured on held-out examples: the loss always, and the metrics that were asked for.

Answers are generated once for all the metrics that look at them.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedforward.config.schema import Config
from fedforward.core.logs import PHASES
from fedforward.core.steps import Probe, ProbePlan
from fedforward.data.examples import Example
from fedforward.data.sampler import by_length, collate_prompts
from fedforward.evaluation.objectives import (
    Context,
    Objective,
    Score,
    ScoreFunction,
    build_objective,
    texts,
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
        context = Context(tokenizer, config.data.answer_tokens, classes, key)
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

    How far it is, is logged as a phase where it takes more than two seconds.

    Returns:
        `heldout_loss`, the mean loss per answer token (or text, of a classifier) in nats; and, if
        there are any, `metrics` by name: `perplexity` is exp(loss), the others are means over the
        examples.
    """
    progress = _Progress()
    values = {
        name: objective.metric(_mean(model, progress.over(heldout.groups, name), objective))
        for name, objective in heldout.objectives.items()
    }
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


def _mean(model: CausalModel, groups: Iterable[Sequence[Example]], objective: Objective) -> float:
    """The sum of all that is measured, divided by its count."""
    total, count = 0.0, 0
    for group in groups:
        (evaluation,) = model.evaluate([Probe(objective.batch(group))])
        total += float(evaluation.sums.sum())
        count += int(evaluation.counts.sum())
    return total / count


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
    """Logs how far an evaluation is, once it has taken a while."""

    def __init__(self) -> None:
        self.due = time.monotonic() + FIRST_LINE_S

    def over(self, groups: Sequence[Sequence[Example]], what: str) -> Iterator[Sequence[Example]]:
        """The groups, one after another."""
        done, total = 0, sum(map(len, groups))
        for group in groups:
            now = time.monotonic()
            if now >= self.due:
                PHASES.info("evaluating %s: %d of %d examples", what, done, total)
                self.due = now + NEXT_LINE_S
            yield group
            done += len(group)
