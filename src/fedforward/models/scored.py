"""Batches whose examples are scored: what a probe measures when it is not the loss of tokens.

The value of an example is 1 - score, counted once, so that estimators and reports work with it as
they do with a loss. Such a value has no gradient; a probe of it is as good as any other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedforward.core.steps import Evaluation, Probe
from fedforward.models.base import CausalModel, PromptBatch, TokenBatch

#: Scores of predictions, given their references: as many finite numbers, higher is better.
Score = Callable[[Sequence[str], Sequence[str]], list[float]]


@dataclass(frozen=True, eq=False)
class ChoiceBatch:
    """Examples with several possible answers, a row for each; the most likely one is chosen.

    That is the answer of the greatest log-likelihood, summed over its tokens, which is what
    training on right answers makes greater. MeZO (Malladi et al., 2023) divides it by the number
    of tokens. Where words have as many the choice is the same; where they have not, a trained model
    would favour the longer word, whose later tokens are certain once it has begun.

    Attributes:
        rows: the answers of one example after another; only their tokens count.
        right: int64 [examples], the place of the right answer.
    """

    rows: TokenBatch
    right: NDArray[np.int64]

    @property
    def tokens(self) -> NDArray[np.int64]:
        """See `Batch.tokens`."""
        return self.rows.tokens

    @classmethod
    def measure(cls, model: CausalModel, probes: Sequence[Probe]) -> list[Evaluation]:
        """See `Batch.measure`: 0 for an example that is answered rightly, 1 for another.

        NaN where the loss of an answer is not finite.
        """
        measured = model.evaluate_tokens([replace(p, batch=p.batch.rows) for p in probes])
        return [p.batch._judge(losses) for p, losses in zip(probes, measured, strict=True)]

    def _judge(self, losses: Evaluation) -> Evaluation:
        sums = losses.sums.reshape(len(self.right), -1)
        wrong = (sums.argmin(axis=1) != self.right).astype(np.float64)
        wrong[~np.isfinite(sums).all(axis=1)] = np.nan
        return Evaluation(wrong, np.ones(len(wrong), np.int64))


@dataclass(frozen=True, eq=False)
class AnswerBatch:
    """Prompts whose greedy answers are compared with references.

    Attributes:
        prompts: what is continued.
        references: the right answers, one for each prompt.
        tokenizer: reads the answers.
        score: of answers and references.
    """

    prompts: PromptBatch
    references: Sequence[str]
    tokenizer: Any
    score: Score

    @property
    def tokens(self) -> NDArray[np.int64]:
        """See `Batch.tokens`."""
        return self.prompts.tokens

    @classmethod
    def measure(cls, model: CausalModel, probes: Sequence[Probe]) -> list[Evaluation]:
        """See `Batch.measure`: 1 - score of each answer."""
        generated = model.generate([replace(p, batch=p.batch.prompts) for p in probes])
        return [p.batch._judge(tokens) for p, tokens in zip(probes, generated, strict=True)]

    def _judge(self, generated: NDArray[np.int64]) -> Evaluation:
        scores = self.score(texts(self.tokenizer, generated), self.references)
        return Evaluation(1.0 - np.array(scores, np.float64), np.ones(len(scores), np.int64))


def texts(tokenizer: Any, generated: NDArray[np.int64]) -> list[str]:
    """Generated tokens, int64 [rows, length], as texts without special tokens and outer spaces."""
    decoded = tokenizer.batch_decode(generated.tolist(), skip_special_tokens=True)
    return [str(text).strip() for text in decoded]
