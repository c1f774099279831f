"""From text to tokens, as the tokenizer itself would make them of the whole text.

Prompt and answer are tokenised together. A token that reaches from the prompt into the answer
belongs to the answer, in training, evaluation and generation alike. A model then continues a prompt
from tokens after which it was trained to answer. What the tokenizer puts before and after a text
stands there once, whether or not the text has it already.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Texts that give away what a tokenizer adds around any text.
_SAMPLES = ("a", "1", "x y")


@dataclass(frozen=True)
class Encoded:
    """The tokens of a text and where some characters of it lie among them.

    Attributes:
        tokens: int64 [length].
        places: of each asked character, how many tokens end before it or at it.
        crossed: of each, whether a token reaches over it.
    """

    tokens: NDArray[np.int64]
    places: tuple[int, ...]
    crossed: tuple[bool, ...]


class TextEncoder:
    """Encodes texts for training, evaluation and generation.

    Attributes:
        prefix: tokens that the tokenizer puts before a text.
        suffix: tokens that it puts after a text.
        end: what ends a training text: the suffix, and the end-of-sequence token if it lacks it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.prefix, self.suffix = affixes(tokenizer)
        end = tokenizer.eos_token_id
        self.end = self.suffix if end is None or end in self.suffix else (*self.suffix, end)

    def encode(
        self,
        texts: Sequence[str],
        seams: Sequence[Sequence[int]],
        *,
        prefix: bool = True,
        end: bool = True,
    ) -> list[Encoded]:
        """The tokens of texts.

        Args:
            texts: at least one.
            seams: for each text, the characters asked for.
            prefix: whether what the tokenizer puts before a text is added where it is not there.
            end: whether what ends a training text is.
        """
        batch = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)
        found = []
        for row, (ids, asked) in enumerate(zip(batch["input_ids"], seams, strict=True)):
            if self._fast:
                marks = [_boundary(batch.encodings[row], len(ids), seam) for seam in asked]
            else:
                marks = [self._boundary_by_prefix(texts[row], ids, seam) for seam in asked]
            before: tuple[int, ...] = () if not prefix else self._missing_prefix(ids)
            after: tuple[int, ...] = () if not end else missing_end(ids, self.end)
            found.append(
                Encoded(
                    np.array([*before, *ids, *after], np.int64),
                    tuple(len(before) + place for place, _ in marks),
                    tuple(crossed for _, crossed in marks),
                )
            )
        return found

    def prompt(self, text: str, *, prefix: bool = True) -> NDArray[np.int64]:
        """The tokens of a text that is to be continued, int64 [length].

        Args:
            prefix: see `encode`.
        """
        if not text:
            return np.array(self.prefix if prefix else (), np.int64)
        (encoded,) = self.encode([text], [()], prefix=prefix, end=False)
        return encoded.tokens

    def texts(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """The tokens of whole texts, int64 [length] each, with what the tokenizer adds to them."""
        batch = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)
        return [
            np.array([*self._missing_prefix(ids), *ids, *missing_end(ids, self.suffix)], np.int64)
            for ids in batch["input_ids"]
        ]

    def _missing_prefix(self, ids: Sequence[int]) -> tuple[int, ...]:
        """What of the prefix a text lacks that may have its end, or all of it, already."""
        for there in range(min(len(self.prefix), len(ids)), 0, -1):
            if tuple(ids[:there]) == self.prefix[-there:]:
                return self.prefix[:-there]
        return self.prefix

    @cached_property
    def _fast(self) -> bool:
        return bool(getattr(self.tokenizer, "is_fast", False))

    def _boundary_by_prefix(self, text: str, ids: Sequence[int], seam: int) -> tuple[int, bool]:
        """As `_boundary`, for a tokenizer that does not say where its tokens lie."""
        (part,) = self.tokenizer([text[:seam]], add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        place = 0
        while place < min(len(part), len(ids)) and part[place] == ids[place]:
            place += 1
        return place, place < len(part)


def _boundary(encoding: Any, length: int, seam: int) -> tuple[int, bool]:
    """How many tokens end before a character or at it, and whether one reaches over it."""
    # The last token that ends there, found from the first one that holds a character after it.
    offsets = encoding.offsets
    token, char = None, seam
    while token is None and length and char < offsets[-1][1]:
        token = encoding.char_to_token(char)
        char += 1
    place = length if token is None else token
    while place and offsets[place - 1][1] > seam:
        place -= 1
    ended = offsets[place - 1][1] if place else 0
    begins = offsets[place][0] if place < length else seam
    # Some tokenizers leave a token's leading space out of its place.
    return place, begins < seam or (place < length and ended < seam)


def affixes(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens that a tokenizer puts before and after any text."""
    found = set()
    for sample in _SAMPLES:
        whole = list(tokenizer(sample)["input_ids"])
        plain = list(tokenizer(sample, add_special_tokens=False)["input_ids"])
        for begin in range(len(whole) - len(plain) + 1):
            if plain and whole[begin : begin + len(plain)] == plain:
                found.add((tuple(whole[:begin]), tuple(whole[begin + len(plain) :])))
                break
        else:
            return (), ()
    return found.pop() if len(found) == 1 else ((), ())


def missing_end(ids: Sequence[int], end: Sequence[int]) -> tuple[int, ...]:
    """What of an ending a text lacks that may have its beginning, or all of it, already."""
    for there in range(min(len(end), len(ids)), 0, -1):
        if tuple(ids[-there:]) == tuple(end[:there]):
            return tuple(end[there:])
    # A text that ends with the last token of an ending is ended.
    return () if end and ids and ids[-1] == end[-1] else tuple(end)
