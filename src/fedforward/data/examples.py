"""Tokenised examples, and where a run keeps them: on disk, read when they are drawn."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import overload

import numpy as np
from numpy.typing import NDArray

from fedforward.data.spool import Numbers, Spool


@dataclass(frozen=True, eq=False)
class Example:
    """One tokenised example.

    Attributes:
        tokens: int64 [length], prompt, answer and what ends a text.
        prompt_length: how many of them come before the answer, which generation begins after.
        reference: the right answer as text.
        choices: int64 [length] each, the tokens of every possible answer, where there are label
            words.
        right: the place of the right answer among them, or the number of a classifier's class.
        spans: [begin, end) of the tokens whose loss counts; none is all after the prompt.
        choice_prompts: as `prompt_length`, of each choice.
    """

    tokens: NDArray[np.int64]
    prompt_length: int
    reference: str = ""
    choices: tuple[NDArray[np.int64], ...] = ()
    right: int = 0
    spans: tuple[tuple[int, int], ...] = ()
    choice_prompts: tuple[int, ...] = ()

    @property
    def counted_spans(self) -> tuple[tuple[int, int], ...]:
        """[begin, end) of the tokens whose loss counts."""
        return self.spans or ((self.prompt_length, len(self.tokens)),)

    @property
    def counted(self) -> NDArray[np.bool_]:
        """Which tokens' loss counts, bool [length]."""
        mask = np.zeros(len(self.tokens), np.bool_)
        for begin, end in self.counted_spans:
            mask[begin:end] = True
        return mask


class ExampleStore:
    """Examples on disk, appended and then read by number.

    Attributes:
        longest_prompt: tokens of the longest prompt.
    """

    def __init__(self) -> None:
        self._tokens = Spool()
        self._references = Spool()
        self._lengths: list[NDArray[np.int32]] = []
        self._recent: list[int] = []
        self.longest_prompt = 0

    def append(self, example: Example) -> None:
        """Add an example.

        Raises:
            FedForwardError: the disk is full.
        """
        head = (
            example.prompt_length,
            example.right,
            len(example.tokens),
            len(example.spans),
            len(example.choices),
        )
        ends = [len(choice) for choice in example.choices]
        prompts = example.choice_prompts or (example.prompt_length,) * len(ends)
        spans = [place for span in example.spans for place in span]
        whole = np.concatenate(
            [
                np.array([*head, *spans, *ends, *prompts], np.int32),
                np.asarray(example.tokens, np.int32),
                *(np.asarray(choice, np.int32) for choice in example.choices),
            ]
        )
        self._tokens.append(whole.astype("<i4").tobytes())
        self._references.append(example.reference.encode())
        self._recent.append(len(example.tokens))
        if len(self._recent) == 1 << 16:
            self._settle()
        self.longest_prompt = max(self.longest_prompt, example.prompt_length)

    def _settle(self) -> None:
        self._lengths.append(np.array(self._recent, np.int32))
        self._recent = []

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, number: int) -> Example:
        """An example, from 0."""
        whole = np.frombuffer(self._tokens[number], "<i4").astype(np.int64)
        prompt, right, length, spans, choices = (int(value) for value in whole[:5])
        numbers, rest = np.split(whole[5:], [2 * spans + 2 * choices])
        pairs = numbers[: 2 * spans].reshape(-1, 2).tolist()
        ends = numbers[2 * spans : 2 * spans + choices]
        tokens, *parts = np.split(
            rest, length + np.cumsum([0, *ends[:-1]]) if choices else [length]
        )
        return Example(
            tokens,
            prompt,
            self._references[number].decode(),
            tuple(parts) if choices else (),
            right,
            tuple((begin, end) for begin, end in pairs),
            tuple(numbers[2 * spans + choices :].tolist()),
        )

    def record(self, number: int) -> bytes:
        """All of an example but its reference, as it is kept: int32, little endian."""
        return self._tokens[number]

    @property
    def lengths(self) -> NDArray[np.int32]:
        """The tokens of every example, int32 [examples]."""
        self._settle()
        self._lengths = [np.concatenate(self._lengths)]
        return self._lengths[0]


class Examples(Sequence[Example]):
    """Some examples of a store, in an order of their own.

    Attributes:
        store: where they are.
        places: [examples], their numbers there.
    """

    def __init__(self, store: ExampleStore, places: Numbers) -> None:
        self.store, self.places = store, places

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, place: int) -> Example: ...

    @overload
    def __getitem__(self, place: slice) -> "Examples": ...

    def __getitem__(self, place: int | slice) -> "Example | Examples":
        if isinstance(place, slice):
            return Examples(self.store, self.places[place])
        return self.store[int(self.places[place])]

    def take(self, order: Numbers) -> "Examples":
        """These ones of them, in this order."""
        return Examples(self.store, self.places[order])

    @property
    def lengths(self) -> NDArray[np.int32]:
        """The tokens of each, int32 [examples]."""
        return self.store.lengths[self.places]


class Flipped(Sequence[Example]):
    """Examples with wrong labels: each has the one after its own, and the last one the first.

    A label that is one of several words or classes is all that a liar changes (Tolpegin et al.,
    2020, arXiv 2007.08432).
    """

    def __init__(self, examples: Sequence[Example], names: Sequence[str]) -> None:
        """`names`: of the labels, in their order."""
        self._examples, self._names = examples, names

    def __len__(self) -> int:
        return len(self._examples)

    @overload
    def __getitem__(self, place: int) -> Example: ...

    @overload
    def __getitem__(self, place: slice) -> "Flipped": ...

    def __getitem__(self, place: int | slice) -> "Example | Flipped":
        found = self._examples[place]
        if not isinstance(found, Example):
            return Flipped(found, self._names)
        right = (found.right + 1) % len(self._names)
        wrong = replace(found, right=right, reference=self._names[right])
        if not found.choices:
            return wrong
        begin = found.choice_prompts[right] if found.choice_prompts else found.prompt_length
        return replace(wrong, tokens=found.choices[right], prompt_length=begin, spans=())


def lengths(examples: Sequence[Example]) -> NDArray[np.int32]:
    """The tokens of each example, int32 [examples]."""
    if isinstance(examples, Examples):
        return examples.lengths
    return np.array([len(example.tokens) for example in examples], np.int32)


def take(examples: Sequence[Example], order: Numbers) -> Sequence[Example]:
    """Some of the examples, in this order; those on disk stay there."""
    if isinstance(examples, Examples):
        return examples.take(order)
    return [examples[int(place)] for place in order]
