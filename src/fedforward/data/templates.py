"""From a row of fields to tokens: the prompt template, the answer, and what of them counts."""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedforward.core.errors import FedForwardError


@dataclass(frozen=True, eq=False)
class Example:
    """One tokenised example.

    Attributes:
        tokens: int64 [length], prompt, answer and end of sequence.
        prompt_length: how many of them are the prompt, whose loss does not count.
        reference: the right answer as text.
        choices: int64 [length] each, the tokens of every possible answer, where there are label
            words.
        right: the place of the right answer among them, or the number of a classifier's class.
    """

    tokens: NDArray[np.int64]
    prompt_length: int
    reference: str = ""
    choices: tuple[NDArray[np.int64], ...] = ()
    right: int = 0


@dataclass(frozen=True)
class Tokenised:
    """The examples that were kept, and what happened to the others.

    Attributes:
        examples: in the order of the rows.
        rows: the index of the row that each example came from.
        cut: how many answers were cut at the sequence length.
        dropped: how many rows had a prompt that left no room for an answer.
    """

    examples: list[Example]
    rows: list[int]
    cut: int
    dropped: int


def fields(template: str, key: str) -> list[str]:
    """The field names between braces, in order.

    Raises:
        FedForwardError: the braces do not match, are empty, or hold more than a name.
    """
    try:
        parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise FedForwardError(
            f"{key} = {template!r}: {error}. Write fields as {{name}} and a plain brace as {{{{."
        ) from error
    if any(not name for _, name, _, _ in parts):
        raise FedForwardError(f"{key} = {template!r}: a field needs a name, as in {{question}}.")
    for _, name, form, conversion in parts:
        if form or conversion:
            raise FedForwardError(
                f"{key} = {template!r}: only a name may stand between braces, as in {{{name}}}."
            )
    return [str(name) for _, name, _, _ in parts]


def check_fields(template: str, columns: Sequence[str], key: str) -> None:
    """Refuse a template that names a field which the data do not have."""
    for name in fields(template, key):
        if name not in columns:
            raise FedForwardError(
                f"{key} names the field {{{name}}}, which the data do not have. "
                f"Their fields are {', '.join(columns)}."
            )


def fill(template: str, row: Mapping[str, Any]) -> str:
    """The template with the row's values; a missing value (null) becomes nothing."""
    # Not `str.format`: a column may be called "a.b", which is an attribute there.
    text = ""
    for literal, name, _, _ in string.Formatter().parse(template):
        value = None if name is None else row[name]
        text += literal if value is None else f"{literal}{value}"
    return text


def tokenise(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    prompt: str,
    answer: str,
    sequence_length: int,
) -> Tokenised:
    """Prompt and answer tokenised apart, then joined, with the end-of-sequence token after them."""
    examples: list[Example] = []
    kept: list[int] = []
    cut = dropped = 0
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    prompts = [fill(prompt, row) for row in rows]
    answers = [fill(answer, row) for row in rows]
    if not prompts:
        return Tokenised([], [], 0, 0)
    # Several thousand single calls cost seconds; one batched call does not.
    options: dict[str, Any] = {"add_special_tokens": False, "verbose": False}
    prompt_ids = tokenizer(prompts, **options)["input_ids"]
    answer_ids = tokenizer(answers, **options)["input_ids"]
    begin = [] if tokenizer.bos_token_id is None else begin_tokens(tokenizer)
    for index, (before, after) in enumerate(zip(prompt_ids, answer_ids, strict=True)):
        before = begin + before
        if len(before) + 1 > sequence_length or not after:
            dropped += 1
            continue
        whole = before + after + end
        cut += len(whole) > sequence_length
        tokens = np.array(whole[:sequence_length], np.int64)
        examples.append(Example(tokens, max(1, len(before)), answers[index]))
        kept.append(index)
    return Tokenised(examples, kept, cut, dropped)


def begin_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer itself puts before a text (a begin-of-sequence token, or nothing)."""
    with_special = tokenizer("a")["input_ids"]
    without = tokenizer("a", add_special_tokens=False)["input_ids"]
    extra = len(with_special) - len(without)
    begins = extra > 0 and with_special[0] == tokenizer.bos_token_id
    return [tokenizer.bos_token_id] if begins else []
