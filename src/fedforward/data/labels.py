"""Classification: words that stand for the values of a field, all of them possible answers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedforward.data.templates import Example, Tokenised, begin_tokens, fields, fill
from fedforward.errors import FedForwardError


def check_template(answer: str) -> None:
    """Refuse an answer in which it is not clear which field the words stand for."""
    names = set(fields(answer, "data.answer"))
    if len(names) != 1:
        raise FedForwardError(
            f"data.label_words stand for the values of the field in data.answer, and data.answer = "
            f"{answer!r} names {len(names)} fields. Name one, as in '{{label}}'."
        )


def tokenise(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    prompt: str,
    answer: str,
    sequence_length: int,
    words: Mapping[str, str],
) -> Tokenised:
    """Prompts with each possible answer; the words take the place of the answer's field.

    No end-of-sequence token follows, so that the loss is that of the word, as in MeZO. A row is
    dropped if its prompt is empty, or its longest choice does not fit the sequence length.

    Args:
        words: by the field's values as text, in the order of the choices.

    Raises:
        FedForwardError: a row's value has no word, or two words have the same tokens.
    """
    (field,) = set(fields(answer, "data.answer"))
    answers = [fill(answer, {field: word}) for word in words.values()]
    options: dict[str, Any] = {"add_special_tokens": False, "verbose": False}
    endings = tokenizer(answers, **options)["input_ids"]
    _check_endings(words, endings)
    if not rows:
        return Tokenised([], [], 0, 0)
    places = {value: place for place, value in enumerate(words)}
    begin = [] if tokenizer.bos_token_id is None else begin_tokens(tokenizer)
    room = sequence_length - max(map(len, endings))
    examples: list[Example] = []
    kept: list[int] = []
    prompts = tokenizer([fill(prompt, row) for row in rows], **options)["input_ids"]
    for index, (row, before) in enumerate(zip(rows, prompts, strict=True)):
        value = str(row[field])
        if value not in places:
            raise FedForwardError(
                f"data.label_words has no word for {field} = {value!r}, which is in the data. It "
                f"has words for {', '.join(map(repr, words))}."
            )
        before = begin + before
        if not 0 < len(before) <= room:
            continue
        choices = tuple(np.array(before + ending, np.int64) for ending in endings)
        right = places[value]
        examples.append(Example(choices[right], len(before), answers[right], choices, right))
        kept.append(index)
    return Tokenised(examples, kept, 0, len(rows) - len(kept))


def _check_endings(words: Mapping[str, str], endings: Sequence[Sequence[int]]) -> None:
    seen: dict[tuple[int, ...], str] = {}
    for word, ending in zip(words.values(), endings, strict=True):
        if not ending:
            raise FedForwardError(
                f"data.label_words: the answer with the word {word!r} has no tokens. Use another "
                "word."
            )
        if tuple(ending) in seen:
            raise FedForwardError(
                f"data.label_words: {seen[tuple(ending)]!r} and {word!r} are the same tokens to "
                "this model. Use other words."
            )
        seen[tuple(ending)] = word
