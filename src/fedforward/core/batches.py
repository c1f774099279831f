"""Batches as plain arrays: what a network is given, and what is known of the right answers.

How a batch is measured is its objective's affair. A batch without one is measured by the loss of
its labelled tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

#: Label of tokens that do not count (the prompt and the padding).
IGNORED = -100


class Batch(Protocol):
    """What a probe is measured on."""

    @property
    def tokens(self) -> NDArray[np.int64]:
        """int64 [rows, length], what the network is given."""
        ...

    @property
    def objective(self) -> Any:
        """Measures the batch: `measure(model, probes)`; None for the loss of labelled tokens."""
        ...


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Right-padded token rows. Causal attention never looks right, so no mask is needed.

    For a sequence classifier the last token's label is the class of the text, and nothing else is
    labelled, so that a row's label also says where it ends.

    Attributes:
        tokens: int64 [rows, length].
        labels: int64 [rows, length]; IGNORED where a token does not count.
        objective: see `Batch`.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    objective: Any = None

    @property
    def input_lengths(self) -> NDArray[np.int64] | None:
        """int64 [rows], tokens before the last labelled one; 0 in a row without any.

        These are what a network must be given of a row that runs alone. A kind of batch whose rows
        are read in another way says so itself; None is for rows that cannot run alone.
        """
        if type(self) is not TokenBatch:
            return None
        places = np.arange(self.labels.shape[1])
        return np.asarray((places * (self.labels != IGNORED)).max(axis=1, initial=0))


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """Left-padded prompts that are continued.

    Attributes:
        tokens: int64 [rows, length].
        mask: int64 [rows, length]; 0 where a row is padded.
        most_tokens: of a continuation.
        padding: the token that follows a continuation which ended before others; may be None if
            there is one row.
    """

    tokens: NDArray[np.int64]
    mask: NDArray[np.int64]
    most_tokens: int
    padding: int | None


@dataclass(frozen=True, eq=False, kw_only=True)
class JoinedRows(TokenBatch):
    """A row for each example, right-padded: what its answers have in common, then their endings.

    An ending is what an answer has beyond that, without its last token, which the network need not
    be given. Answers of one token have none, so the row is the prompt. Nothing is labelled.

    Attributes:
        positions: int64 [examples, length], where a token stands in its answer, from 0.
        endings: int64 [examples, length], whose ending a token belongs to, numbered from 1; 0 is
            what all have in common, -1 padding. A token sees what comes before it of these two.
        places: int64 [examples, answers, most tokens], where in the row a token of an answer is
            predicted; 0 where `targets` is IGNORED.
        targets: int64 [examples, answers, most tokens], the counted tokens of each answer, and
            IGNORED after them.
        right: int64 [examples], the place of the right answer.
    """

    positions: NDArray[np.int64]
    endings: NDArray[np.int64]
    places: NDArray[np.int64]
    targets: NDArray[np.int64]
    right: NDArray[np.int64]

    @property
    def input_lengths(self) -> NDArray[np.int64] | None:
        """See `TokenBatch`: whole prompts. Rows with endings have masks and positions of their own.

        Only tokens tell rows apart that run alone.
        """
        return None if self.branches else np.asarray((self.endings >= 0).sum(axis=1))

    @property
    def branches(self) -> bool:
        """Whether any answer has an ending, so that tokens must not see all that is before them."""
        return bool((self.endings > 0).any())

    @property
    def single(self) -> bool:
        """Whether every answer is one token, all of a row predicted in one place."""
        return self.targets.shape[2] == 1 and bool((self.places == self.places[:, :1]).all())

    def part(self, rows: slice) -> "JoinedRows":
        """Some of the rows, without padding that they do not need."""
        length = int((self.endings[rows] >= 0).sum(axis=1).max())
        return replace(
            self,
            tokens=self.tokens[rows, :length],
            labels=self.labels[rows, :length],
            positions=self.positions[rows, :length],
            endings=self.endings[rows, :length],
            places=self.places[rows],
            targets=self.targets[rows],
            right=self.right[rows],
        )


@dataclass(frozen=True, eq=False)
class ChoiceBatch:
    """Examples with several possible answers.

    Attributes:
        rows: a row for each answer, those of one example after another, where only the answers'
            tokens count; or a row for each example (`JoinedRows`).
        right: int64 [examples], the place of the right answer.
        objective: see `Batch`.
    """

    rows: TokenBatch
    right: NDArray[np.int64]
    objective: Any = None

    @property
    def tokens(self) -> NDArray[np.int64]:
        """See `Batch`."""
        return self.rows.tokens


@dataclass(frozen=True, eq=False)
class AnswerBatch:
    """Prompts whose generated answers are compared with references.

    Attributes:
        prompts: what is continued.
        references: the right answers, one for each prompt.
        objective: see `Batch`.
    """

    prompts: PromptBatch
    references: Sequence[str]
    objective: Any = None

    @property
    def tokens(self) -> NDArray[np.int64]:
        """See `Batch`."""
        return self.prompts.tokens
