"""Which examples a client sees in which step, and their arrays.

A client's batch is a pure function of (run seed, client, step count since the start of the run),
so that a resumed run and an absent client's return need no state.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedforward.data.templates import Example
from fedforward.models.causal_lm import IGNORED, TokenBatch
from fedforward.seeds import generator


def collate(examples: Sequence[Example]) -> TokenBatch:
    """Right-padded rows; only the answers' tokens keep their labels."""
    length = max(len(example.tokens) for example in examples)
    tokens = np.zeros((len(examples), length), np.int64)
    labels = np.full((len(examples), length), IGNORED, np.int64)
    for row, example in enumerate(examples):
        tokens[row, : len(example.tokens)] = example.tokens
        answer = slice(example.prompt_length, len(example.tokens))
        labels[row, answer] = example.tokens[answer]
    return TokenBatch(tokens, labels)


#: Batches among which examples are exchanged, so that those of a batch have similar lengths.
BATCHES_SORTED = 16


class Batches:
    """The endless, shuffled stream of one client's batches, addressable by step.

    Every example comes once an epoch. Within stretches of 16 batches the examples are sorted into
    batches of similar length, and those are shuffled: less padding, and no order of lengths.
    """

    def __init__(
        self, examples: Sequence[Example], *, batch_size: int, run_seed: int, client: int
    ) -> None:
        self.examples = examples
        self.batch_size = batch_size
        self.run_seed = run_seed
        self.client = client
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, step: int) -> TokenBatch:
        """The batch of step `step` counted from the start of the run, from 0."""
        first = step * self.batch_size
        return collate([self._example(first + place) for place in range(self.batch_size)])

    def _example(self, position: int) -> Example:
        epoch, place = divmod(position, len(self.examples))
        if epoch != self._epoch:
            self._order = self._shuffled(epoch)
            self._epoch = epoch
        return self.examples[int(self._order[place])]

    def _shuffled(self, epoch: int) -> NDArray[np.int64]:
        """The examples in the order of an epoch, int64 [examples]."""
        random = generator(self.run_seed, "epoch", self.client, epoch)
        order = random.permutation(len(self.examples))
        lengths = np.array([len(example.tokens) for example in self.examples])
        # The epoch's first examples may belong to a batch that the one before began.
        begin = -epoch * len(order) % self.batch_size
        while self.batch_size > 1 and begin + self.batch_size <= len(order):
            count = min(BATCHES_SORTED, (len(order) - begin) // self.batch_size)
            part = order[begin : begin + count * self.batch_size]
            batches = part[np.argsort(lengths[part], kind="stable")].reshape(count, -1)
            order[begin : begin + len(part)] = batches[random.permutation(count)].ravel()
            begin += len(part)
        return order


def by_length(examples: Sequence[Example], rows: int) -> list[TokenBatch]:
    """Every example once, in batches of similar length (for evaluation)."""
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].tokens))
    return [
        collate([examples[index] for index in order[begin : begin + rows]])
        for begin in range(0, len(order), rows)
    ]
