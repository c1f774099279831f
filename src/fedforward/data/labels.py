"""Classification: the possible answers, as words for a causal model or as a classifier's classes.

The classes and their order follow from the data or from the words alone, so that all parties name
the rows of a head alike.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fedforward.core.errors import FedForwardError
from fedforward.data.templates import Example, Tokenised, begin_tokens, fields, fill


def check_template(answer: str) -> None:
    """Refuse an answer in which it is not clear which field the words stand for."""
    names = set(fields(answer, "data.answer"))
    if len(names) != 1:
        raise FedForwardError(
            f"data.label_words stand for the values of the field in data.answer, and data.answer = "
            f"{answer!r} names {len(names)} fields. Name one, as in '{{label}}'."
        )


#: More different answers than this are free text and no classes.
MOST_CLASSES = 1000


def classes(
    rows: Iterable[Mapping[str, Any]], answer: str, words: Mapping[str, str] | None
) -> tuple[str, ...]:
    """The classes of a run: the words in their order, or the different answers in the data.

    Answers are sorted, by value where all of them are whole numbers.

    Raises:
        FedForwardError: there are fewer than two, or too many, or two words name one class.
    """
    if words is not None:
        named = tuple(word.strip() for word in words.values())
        if "" in named or len(set(named)) < len(named):
            raise FedForwardError(
                f"data.label_words = {dict(words)!r} names the classes of model.head = "
                "'classification', and without outer spaces the words must be different and not "
                "empty."
            )
        return named
    found = {fill(answer, row).strip() for row in rows} - {""}
    if not 2 <= len(found) <= MOST_CLASSES:
        many = "only " if len(found) < 2 else ""
        raise FedForwardError(
            f"data.answer = {answer!r} has {many}{len(found)} different values in the data, and "
            f"model.head = 'classification' needs 2 to {MOST_CLASSES} classes. Name the field of "
            "the classes, as in '{label}', or use model.head = 'causal'."
        )
    if all(re.fullmatch(r"-?\d+", name) for name in found):
        return tuple(sorted(found, key=lambda name: (int(name), name)))
    return tuple(sorted(found))


def classify(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    prompt: str,
    answer: str,
    sequence_length: int,
    words: Mapping[str, str] | None,
    classes: Sequence[str],
) -> Tokenised:
    """Prompts with the numbers of their classes, tokenised as the tokenizer does with a text.

    A row without an answer, or whose prompt is empty or too long, is dropped.

    Args:
        words: by the field's values as text, in place of the answers.
        classes: in the order of the head.

    Raises:
        FedForwardError: a row's value has no word.
    """
    if not rows:
        return Tokenised([], [], 0, 0)
    places = {name: place for place, name in enumerate(classes)}
    examples: list[Example] = []
    kept: list[int] = []
    prompts = tokenizer([fill(prompt, row) for row in rows], verbose=False)["input_ids"]
    for index, (row, tokens) in enumerate(zip(rows, prompts, strict=True)):
        if words is None:
            name = fill(answer, row).strip()
        else:
            (field,) = set(fields(answer, "data.answer"))
            name = _word(words, field, row).strip()
        if not name or not 0 < len(tokens) <= sequence_length:
            continue
        whole = np.array(tokens, np.int64)
        examples.append(Example(whole, len(whole), name, right=places[name]))
        kept.append(index)
    return Tokenised(examples, kept, 0, len(rows) - len(kept))


def _word(words: Mapping[str, str], field: str, row: Mapping[str, Any]) -> str:
    """The word for a row's value."""
    value = str(row[field])
    if value not in words:
        raise FedForwardError(
            f"data.label_words has no word for {field} = {value!r}, which is in the data. It "
            f"has words for {', '.join(map(repr, words))}."
        )
    return words[value]


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
    places = {word: place for place, word in enumerate(words.values())}
    begin = [] if tokenizer.bos_token_id is None else begin_tokens(tokenizer)
    room = sequence_length - max(map(len, endings))
    examples: list[Example] = []
    kept: list[int] = []
    prompts = tokenizer([fill(prompt, row) for row in rows], **options)["input_ids"]
    for index, (row, before) in enumerate(zip(rows, prompts, strict=True)):
        right = places[_word(words, field, row)]
        before = begin + before
        if not 0 < len(before) <= room:
            continue
        choices = tuple(np.array(before + ending, np.int64) for ending in endings)
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
