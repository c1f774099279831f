"""What a run optimises and measures, by name: the loss, a score of the project, or the user's own.

An objective makes batches of examples and says how a model is measured on them, through the
model's three primitives: token losses, class logits, generation. What it measures is lower where
the model is better, so that estimators work with it as they do with a loss. A value without a
gradient is as good as any other. `method.objective` and `evaluation.metrics` take the same names.
"""

import importlib
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from fedforward.core.batches import AnswerBatch, Batch, ChoiceBatch
from fedforward.core.errors import FedForwardError
from fedforward.core.registry import OBJECTIVES
from fedforward.core.steps import Evaluation, Probe
from fedforward.data.examples import Example
from fedforward.data.sampler import collate, collate_answers, collate_choices, collate_classes
from fedforward.evaluation.text_metrics import exact_match, rouge_l, token_f1

#: Scores of predictions, given their references: as many finite numbers, higher is better.
ScoreFunction = Callable[[Sequence[str], Sequence[str]], list[float]]


@dataclass(frozen=True)
class Context:
    """What an objective is built with.

    Attributes:
        tokenizer: reads generated answers.
        answer_tokens: most tokens of a generated answer.
        classes: of a sequence classifier; else empty.
        key: the configuration key that names the objective, for errors.
        joined: whether label words of one token share a row (`ProbePlan.joins_choices`).
        most_branching: see `ProbePlan`.
    """

    tokenizer: Any
    answer_tokens: int
    classes: tuple[str, ...] = ()
    key: str = "method.objective"
    joined: bool = False
    most_branching: int = 0


class Objective(ABC):
    """Makes batches, and measures a model on them.

    Attributes:
        needs_answers: whether it looks at generated answers.

    Example:
        An objective of another package is a class like this, named by an entry point of the group
        `fedforward.objectives`; `examples/plugin` has one.
    """

    needs_answers: ClassVar[bool] = False

    @classmethod
    def build(cls, context: Context) -> "Objective":
        """The objective for a run.

        Raises:
            FedForwardError: it does not fit.
        """
        return cls()

    @abstractmethod
    def batch(self, examples: Sequence[Example]) -> Batch:
        """A batch whose `objective` is this one."""

    @abstractmethod
    def measure(self, model: Any, probes: Sequence[Probe]) -> list[Evaluation]:
        """Measure probes on batches of this objective.

        Args:
            model: has `token_losses`, `class_logits` and `generate`; see `CausalModel`.
        """

    def metric(self, value: float) -> float:
        """What people look at, from the mean of what was measured; higher is better."""
        return 1.0 - value


class Loss(Objective):
    """The loss of the answers' tokens in nats; of a sequence classifier, that of the classes."""

    @classmethod
    def build(cls, context: Context) -> Objective:
        """See `Objective`."""
        return ClassLoss() if context.classes else cls()

    def batch(self, examples: Sequence[Example]) -> Batch:
        """See `Objective`. The model needs no objective for it."""
        return collate(examples)

    def measure(self, model: Any, probes: Sequence[Probe]) -> list[Evaluation]:
        """See `Objective`."""
        measured: list[Evaluation] = model.token_losses(probes)
        return measured

    def metric(self, value: float) -> float:
        """The loss itself: lower is better."""
        return value


class ClassLoss(Loss):
    """-log p of each text's class, in nats."""

    def batch(self, examples: Sequence[Example]) -> Batch:
        """See `Objective`."""
        return replace(collate_classes(examples), objective=self)

    def measure(self, model: Any, probes: Sequence[Probe]) -> list[Evaluation]:
        """See `Objective`."""
        return [
            _counted_once(self.values(torch.from_numpy(logits), _classes(probe)))
            for probe, logits in zip(probes, model.class_logits(probes), strict=True)
        ]

    def values(self, logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """float64 [rows] of logits float64 [rows, classes] and the right classes, int64 [rows]."""
        return torch.nn.functional.cross_entropy(logits, classes, reduction="none")


class ClassError(ClassLoss):
    """0 for a text whose class is the likeliest, 1 for another."""

    def values(self, logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """See `ClassLoss`; NaN where a logit is not finite."""
        wrong = (logits.argmax(dim=1) != classes).double()
        return wrong.masked_fill(~logits.isfinite().all(dim=1), torch.nan)

    def metric(self, value: float) -> float:
        """The accuracy."""
        return 1.0 - value


@dataclass(frozen=True, eq=False)
class OfChoices(Objective):
    """What follows from the log-likelihoods of an example's possible answers.

    The log-likelihood of an answer is summed over its tokens. MeZO (Malladi et al., 2023) divides
    it by the number of tokens. Where words have as many the choice is the same; where they have
    not, a trained model would favour the longer word, whose later tokens are certain once it has
    begun.

    Attributes:
        joined: see `Context`.
        most_branching: likewise.
    """

    joined: bool = False
    most_branching: int = 0

    @classmethod
    def build(cls, context: Context) -> Objective:
        """See `Objective`; of a sequence classifier, what is said of its classes."""
        return cls.of_classes() if context.classes else cls(context.joined, context.most_branching)

    @classmethod
    @abstractmethod
    def of_classes(cls) -> Objective:
        """The objective of a sequence classifier that has this one's name."""

    def batch(self, examples: Sequence[Example]) -> ChoiceBatch:
        """See `Objective`."""
        batch = collate_choices(examples, joined=self.joined, most_branching=self.most_branching)
        return replace(batch, objective=self)

    def measure(self, model: Any, probes: Sequence[Probe]) -> list[Evaluation]:
        """See `Objective`. NaN where the loss of an answer is not finite."""
        measured = model.choices(probes)
        return [
            self.evaluation(found.sums, probe.batch.right)
            for probe, found in zip(probes, measured, strict=True)
        ]

    def evaluation(self, sums: NDArray[np.float64], right: NDArray[np.int64]) -> Evaluation:
        """From `Choices.sums`, float64 [examples, answers], and the places of the right answers."""
        values = np.full(len(right), np.nan)
        finite = np.isfinite(sums).all(axis=1)
        values[finite] = self.values(sums[finite], right[finite])
        return Evaluation(values, np.ones(len(values), np.int64))

    @abstractmethod
    def values(self, sums: NDArray[np.float64], right: NDArray[np.int64]) -> NDArray[np.float64]:
        """One value for each example, of finite sums."""


class Choice(OfChoices):
    """Cross-entropy over the possible answers in nats: -log p(right) / Σ p, per example.

    What MeZO calls training as classification.
    """

    @classmethod
    def of_classes(cls) -> Objective:
        """The loss of the classes, which is the same."""
        return ClassLoss()

    def values(self, sums: NDArray[np.float64], right: NDArray[np.int64]) -> NDArray[np.float64]:
        """See `OfChoices`."""
        own = sums[np.arange(len(right)), right]
        return np.asarray(np.logaddexp.reduce(own[:, None] - sums, axis=1))

    def metric(self, value: float) -> float:
        """The cross-entropy itself: lower is better."""
        return value


class Accuracy(OfChoices):
    """0 for an example that is answered rightly by one of the label words, 1 for another.

    The answer is that of the greatest log-likelihood.
    """

    @classmethod
    def of_classes(cls) -> Objective:
        """The share of texts whose class is not the likeliest."""
        return ClassError()

    def values(self, sums: NDArray[np.float64], right: NDArray[np.int64]) -> NDArray[np.float64]:
        """See `OfChoices`."""
        return np.asarray(sums.argmin(axis=1) != right, np.float64)


@dataclass(frozen=True, eq=False)
class Score(Objective):
    """1 - score of each example's greedy answer.

    Attributes:
        function: of answers and references.
        tokenizer: reads the answers.
        answer_tokens: most tokens of one.
    """

    needs_answers: ClassVar[bool] = True
    function: ScoreFunction
    tokenizer: Any
    answer_tokens: int

    def batch(self, examples: Sequence[Example]) -> AnswerBatch:
        """See `Objective`."""
        batch = collate_answers(examples, self.tokenizer, self.answer_tokens)
        return replace(batch, objective=self)

    def measure(self, model: Any, probes: Sequence[Probe]) -> list[Evaluation]:
        """See `Objective`."""
        generated = model.generate([replace(p, batch=p.batch.prompts) for p in probes])
        results = []
        for probe, tokens in zip(probes, generated, strict=True):
            scores = self.function(texts(self.tokenizer, tokens), probe.batch.references)
            values = 1.0 - np.array(scores, np.float64)
            results.append(Evaluation(values, np.ones(len(values), np.int64)))
        return results


@dataclass(frozen=True)
class Pairwise:
    """A score of the project: of one prediction and its reference.

    Attributes:
        function: higher is better.
    """

    function: Callable[[str, str], float]
    needs_answers: ClassVar[bool] = True

    def build(self, context: Context) -> Objective:
        """See `Objective`."""
        return Score(self, context.tokenizer, context.answer_tokens)

    def __call__(self, predictions: Sequence[str], references: Sequence[str]) -> list[float]:
        """The scores."""
        return [self.function(*pair) for pair in zip(predictions, references, strict=True)]


EXACT_MATCH, F1, ROUGE_L = Pairwise(exact_match), Pairwise(token_f1), Pairwise(rouge_l)


def together(objectives: Mapping[str, Objective]) -> list[dict[str, Objective]]:
    """The objectives, by name, in groups that one pass over the examples measures."""

    def of(*kinds: type) -> dict[str, Objective]:
        return {n: o for n, o in objectives.items() if isinstance(o, kinds)}

    classes, choices = of(ClassLoss), of(OfChoices)
    if choices and not classes:
        # The right answer is one of the possible ones.
        choices = of(OfChoices, Loss)
    alone = [{n: o} for n, o in objectives.items() if n not in choices and n not in classes]
    return [group for group in (choices, classes, *alone) if group]


def evaluate_together(
    model: Any, objectives: Mapping[str, Objective], examples: Sequence[Example]
) -> dict[str, Evaluation]:
    """What the objectives of one group of `together` say of some examples, by name."""
    first = next((o for o in objectives.values() if type(o) is not Loss), None)
    if isinstance(first, OfChoices):
        batch = first.batch(examples)
        losses = any(type(o) is Loss for o in objectives.values())
        (found,) = model.choices([Probe(batch)], loss=losses)
        counts = np.array([int(example.counted.sum()) for example in examples], np.int64)
        return {
            name: o.evaluation(found.sums, batch.right)
            if isinstance(o, OfChoices)
            else Evaluation(found.losses, counts)
            for name, o in objectives.items()
        }
    if isinstance(first, ClassLoss):
        probe = Probe(first.batch(examples))
        (logits,) = model.class_logits([probe])
        given, classes = torch.from_numpy(logits), _classes(probe)
        return {
            name: _counted_once(o.values(given, classes))
            for name, o in objectives.items()
            if isinstance(o, ClassLoss)
        }
    return {n: model.evaluate([Probe(o.batch(examples))])[0] for n, o in objectives.items()}


def needs_answers(name: str) -> bool:
    """Whether a metric or objective looks at generated answers."""
    if name == "perplexity":
        return False
    return ":" in name or bool(OBJECTIVES.get(name).needs_answers)


def build_objective(name: str, context: Context) -> Objective:
    """An objective by name, or of a user's `package.module:function`.

    Args:
        name: as the user typed it.

    Raises:
        FedForwardError: there is no such objective, module or function, or it cannot be imported.
            What a user's function measures raises it where the function fails, or returns other
            than one finite number for each prediction.
    """
    if ":" in name:
        function = partial(_called, _import(name, context.key), f"{context.key} = {name!r}")
        return Score(function, context.tokenizer, context.answer_tokens)
    built: Objective = OBJECTIVES.get(name).build(context)
    return built


def texts(tokenizer: Any, generated: NDArray[np.int64]) -> list[str]:
    """Generated tokens, int64 [rows, length], as texts without special tokens and outer spaces."""
    decoded = tokenizer.batch_decode(generated.tolist(), skip_special_tokens=True)
    return [str(text).strip() for text in decoded]


def _classes(probe: Probe) -> torch.Tensor:
    """The class of each row, int64 [rows]."""
    return torch.from_numpy(probe.batch.labels.max(axis=1))


def _counted_once(values: torch.Tensor) -> Evaluation:
    return Evaluation(values.numpy(), np.ones(len(values), np.int64))


def _import(name: str, key: str) -> Callable[[list[str], list[str]], Any]:
    module, _, attribute = name.partition(":")
    # An installed command does not look in the working directory by itself.
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    importlib.invalidate_caches()
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:
        raise FedForwardError(
            f"{key} = {name!r}: the module {module} cannot be imported "
            f"({type(error).__name__}: {error}). It must be installed, or lie in the folder that "
            "the command is started in."
        ) from error
    if not callable(found):
        what = "has no function" if found is None else "has, but not as a function,"
        raise FedForwardError(
            f"{key} = {name!r}: the module {module} {what} {attribute}. Write "
            "package.module:function, of predictions and references."
        )
    function: Callable[[list[str], list[str]], Any] = found
    return function


def _called(
    function: Callable[[list[str], list[str]], Any],
    name: str,
    predictions: Sequence[str],
    references: Sequence[str],
) -> list[float]:
    """What a user's function returns, once it has been looked at."""
    try:
        scores = list(function(list(predictions), list(references)))
    except Exception as error:
        raise FedForwardError(
            f"{name} failed ({type(error).__name__}: {error}), given {len(predictions)} "
            f"predictions, the first of them {predictions[0]!r}."
        ) from error
    if len(scores) != len(predictions):
        raise FedForwardError(
            f"{name} returned {len(scores)} scores for {len(predictions)} predictions. It must "
            "return one for each."
        )
    for score, prediction in zip(scores, predictions, strict=True):
        if not isinstance(score, Real) or not math.isfinite(score):
            raise FedForwardError(
                f"{name} returned {score!r} for the prediction {prediction!r}. Every score must be "
                "a finite number."
            )
    return [float(score) for score in scores]
