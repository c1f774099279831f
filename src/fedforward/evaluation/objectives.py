"""What a run optimises and measures, by name: the loss, a score of the project, or the user's own.

A name stands for the batches that carry what its evaluation needs. `method.objective` and
`evaluation.metrics` take the same names.
"""

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

from fedforward.core.errors import FedForwardError
from fedforward.data.sampler import (
    Collate,
    collate,
    collate_answers,
    collate_choices,
    collate_classes,
)
from fedforward.evaluation import text_metrics as metrics
from fedforward.models.base import WrongClassBatch
from fedforward.models.scored import Score

PAIRWISE: dict[str, Callable[[str, str], float]] = {
    "exact-match": metrics.exact_match,
    "f1": metrics.token_f1,
    "rougeL": metrics.rouge_l,
}


def needs_answers(name: str) -> bool:
    """Whether a metric or objective looks at generated answers."""
    return name in PAIRWISE or ":" in name


def class_batches_of(name: str) -> Collate:
    """How examples become batches that measure a sequence classifier.

    Args:
        name: "loss" or "accuracy".
    """
    if name == "loss":
        return collate_classes
    return partial(collate_classes, kind=WrongClassBatch)


def batches_of(name: str, tokenizer: Any, most_tokens: int) -> Collate:
    """How examples become batches that measure an objective.

    Args:
        name: "loss", "accuracy", or what `score_of` takes.
        tokenizer: reads generated answers.
        most_tokens: of a generated answer.

    Raises:
        FedForwardError: see `score_of`.
    """
    if name == "loss":
        return collate
    if name == "accuracy":
        return collate_choices
    score = score_of(name, "method.objective")
    return partial(collate_answers, tokenizer=tokenizer, most_tokens=most_tokens, score=score)


def score_of(name: str, key: str) -> Score:
    """The score of a name in `PAIRWISE`, or of a user's `package.module:function`.

    Args:
        name: as the user typed it.
        key: the configuration key to name in errors.

    Raises:
        FedForwardError: there is no such module or function, or it cannot be imported. What is
            returned raises it where the function fails, or returns other than one finite number
            for each prediction.
    """
    if name in PAIRWISE:
        return partial(_each, PAIRWISE[name])
    return partial(_called, _import(name, key), f"{key} = {name!r}")


def _each(
    function: Callable[[str, str], float], predictions: Sequence[str], references: Sequence[str]
) -> list[float]:
    return [function(*pair) for pair in zip(predictions, references, strict=True)]


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
