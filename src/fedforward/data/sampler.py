"""Which examples a client sees in which step, and their arrays.

A client's batch is a pure function of (run seed, client, step count since the start of the run),
so that a resumed run and an absent client's return need no state.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedforward.core.batches import (
    IGNORED,
    AnswerBatch,
    Batch,
    ChoiceBatch,
    JoinedRows,
    PromptBatch,
    TokenBatch,
)
from fedforward.core.entropy import Entropy
from fedforward.core.seeds import generator
from fedforward.data.examples import Example, lengths, take

Collate = Callable[[Sequence[Example]], Batch]


def collate(examples: Sequence[Example]) -> TokenBatch:
    """Right-padded rows; only the answers' tokens keep their labels."""
    return _rows([(example.tokens, example.counted_spans) for example in examples])


def collate_choices(
    examples: Sequence[Example], *, joined: bool = False, most_branching: int = 0
) -> ChoiceBatch:
    """A row for each possible answer of each example, or one row for all of an example's.

    Args:
        joined: whether answers of one token, all after the same prompt, share a row.
        most_branching: tokens of a row up to which other answers do; see `JoinedRows`.
    """
    right = np.array([e.right for e in examples], np.int64)
    if joined:
        rows_of_examples = join(examples)
        length = rows_of_examples.tokens.shape[1]
        if not rows_of_examples.branches or length <= most_branching:
            return ChoiceBatch(rows_of_examples, right)
    rows = [
        (choice, ((prompt, len(choice)),))
        for e in examples
        for choice, prompt in zip(
            e.choices, e.choice_prompts or (e.prompt_length,) * len(e.choices), strict=True
        )
    ]
    return ChoiceBatch(_rows(rows), right)


def join(examples: Sequence[Example]) -> JoinedRows:
    """One row for all possible answers of an example."""
    shape = (len(examples), len(examples[0].choices))
    prompts = [e.choice_prompts or (e.prompt_length,) * shape[1] for e in examples]
    common = [_in_common(e.choices, min(p)) for e, p in zip(examples, prompts, strict=True)]
    longest = max(
        begin + sum(len(choice) - 1 - begin for choice in e.choices)
        for e, begin in zip(examples, common, strict=True)
    )
    counted = max(
        len(choice) - prompt
        for e, own in zip(examples, prompts, strict=True)
        for choice, prompt in zip(e.choices, own, strict=True)
    )
    tokens, positions = np.zeros((2, shape[0], longest), np.int64)
    endings = np.full((shape[0], longest), -1, np.int64)
    places = np.zeros((*shape, counted), np.int64)
    targets = np.full((*shape, counted), IGNORED, np.int64)
    for row, (example, begin, own) in enumerate(zip(examples, common, prompts, strict=True)):
        tokens[row, :begin] = example.choices[0][:begin]
        positions[row, :begin] = np.arange(begin)
        endings[row, :begin] = 0
        free = begin
        for number, (choice, prompt) in enumerate(zip(example.choices, own, strict=True)):
            ending = slice(free, free + len(choice) - 1 - begin)
            tokens[row, ending] = choice[begin:-1]
            positions[row, ending] = np.arange(begin, len(choice) - 1)
            endings[row, ending] = number + 1
            # Each token is predicted where the one before it stands.
            before = np.arange(prompt - 1, len(choice) - 1)
            places[row, number, : len(before)] = np.where(
                before < begin, before, free + before - begin
            )
            targets[row, number, : len(before)] = choice[prompt:]
            free = ending.stop
    return JoinedRows(
        tokens=tokens,
        labels=np.full(tokens.shape, IGNORED, np.int64),
        positions=positions,
        endings=endings,
        places=places,
        targets=targets,
        right=np.array([e.right for e in examples], np.int64),
    )


def _in_common(choices: Sequence[NDArray[np.int64]], prompt: int) -> int:
    """How many tokens all answers begin with, at most the shortest prompt."""
    most = min(prompt, *(len(choice) - 1 for choice in choices))
    same = np.ones(most, np.bool_)
    for choice in choices[1:]:
        same &= choice[:most] == choices[0][:most]
    return most if same.all() else int(same.argmin())


def collate_classes(examples: Sequence[Example]) -> TokenBatch:
    """Right-padded texts; the last token's label is the number of the class."""
    rows = _rows([(example.tokens, ()) for example in examples])
    for row, example in enumerate(examples):
        rows.labels[row, len(example.tokens) - 1] = example.right
    return rows


def collate_answers(examples: Sequence[Example], tokenizer: Any, most_tokens: int) -> AnswerBatch:
    """The examples' prompts, with the right answers."""
    prompts = collate_prompts(
        [example.tokens[: example.prompt_length] for example in examples], tokenizer, most_tokens
    )
    return AnswerBatch(prompts, [example.reference for example in examples])


def collate_prompts(
    prompts: Sequence[NDArray[np.int64]], tokenizer: Any, most_tokens: int
) -> PromptBatch:
    """Left-padded rows, each int64 [length], to be continued by at most so many tokens."""
    length = max(map(len, prompts))
    tokens, mask = np.zeros((2, len(prompts), length), np.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = 1
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return PromptBatch(tokens, mask, most_tokens, padding)


def _rows(
    rows: Sequence[tuple[NDArray[np.int64], Sequence[tuple[int, int]]]],
) -> TokenBatch:
    """Right-padded rows of (tokens, [begin, end) of those that count)."""
    length = max(len(whole) for whole, _ in rows)
    tokens = np.zeros((len(rows), length), np.int64)
    labels = np.full((len(rows), length), IGNORED, np.int64)
    for row, (whole, spans) in enumerate(rows):
        tokens[row, : len(whole)] = whole
        for begin, end in spans:
            labels[row, begin:end] = whole[begin:end]
    return TokenBatch(tokens, labels)


#: Batches among which examples are exchanged, so that those of a batch have similar lengths.
BATCHES_SORTED = 16


class Batches:
    """The endless, shuffled stream of one client's batches, addressable by step.

    Every example comes once an epoch. Within stretches of 16 batches the examples are sorted into
    batches of similar length, and those are shuffled: less padding, and no order of lengths.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        run_seed: int,
        client: int,
        collate: Collate = collate,
    ) -> None:
        self.examples = examples
        self.collate = collate
        self.batch_size = batch_size
        self.run_seed = run_seed
        self.client = client
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, step: int) -> Batch:
        """The batch of step `step` counted from the start of the run, from 0."""
        first = step * self.batch_size
        return self.collate([self._example(first + place) for place in range(self.batch_size)])

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
        length = lengths(self.examples)
        # The epoch's first examples may belong to a batch that the one before began.
        begin = -epoch * len(order) % self.batch_size
        while self.batch_size > 1 and begin + self.batch_size <= len(order):
            count = min(BATCHES_SORTED, (len(order) - begin) // self.batch_size)
            part = order[begin : begin + count * self.batch_size]
            batches = part[np.argsort(length[part], kind="stable")].reshape(count, -1)
            order[begin : begin + len(part)] = batches[random.permutation(count)].ravel()
            begin += len(part)
        return order


class PoissonSamples:
    """Samples of one client's examples, each example drawn by itself; new ones at every look.

    A sample is a list of batches of similar lengths, which are as large as `batch_size` at most.

    Example:
        >>> len(PoissonSamples(batches, SystemEntropy(), chance=0.0, said=100)[0])
        0
    """

    def __init__(self, batches: Batches, entropy: Entropy, *, chance: float, said: int) -> None:
        """`said` is told as the number of examples, in place of the true one."""
        self.batches = batches
        self.entropy = entropy
        self.chance = chance
        self.said = said

    def __len__(self) -> int:
        return self.said

    def __getitem__(self, step: int) -> list[Batch]:
        """A sample; it does not depend on the step."""
        examples = self.batches.examples
        drawn = take(examples, self.entropy.chosen(len(examples), self.chance))
        if not len(drawn):
            return []
        parts = by_length(drawn, self.batches.batch_size)
        return [self.batches.collate(part) for part in parts]


def by_length(examples: Sequence[Example], rows: int) -> list[Sequence[Example]]:
    """Every example once, in groups of similar length (for evaluation)."""
    order = np.argsort(lengths(examples), kind="stable")
    return [take(examples, order[begin : begin + rows]) for begin in range(0, len(order), rows)]


def longest(examples: Sequence[Example], count: int) -> Sequence[Example]:
    """So many of the longest examples, the longest last."""
    return take(examples, np.argsort(lengths(examples), kind="stable")[-count:])
