"""Classification: the possible answers, as words for a causal model or as a classifier's classes.

The classes and their order follow from the data or from the words alone, so that all parties name
the rows of a head alike.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedforward.core.errors import FedForwardError
from fedforward.data.table import Row
from fedforward.data.templates import Template

#: More different answers than this are free text and no classes.
MOST_CLASSES = 1000


def word_path(answer: Template) -> str:
    """The field that the words stand for.

    Raises:
        FedForwardError: it is not clear which.
    """
    if len(answer.paths) != 1:
        raise FedForwardError(
            f"data.label_words stand for the values of the field in data.answer, and data.answer = "
            f"{answer.source!r} names {len(answer.paths)} fields. Name one, as in '{{label}}'."
        )
    return answer.paths[0]


def word(words: Mapping[str, str], path: str, row: Row) -> str:
    """The word for a row's value.

    Raises:
        FedForwardError: it has none.
    """
    value = row.values[path]
    if value not in words:
        raise FedForwardError(
            f"data.label_words has no word for {path} = {value!r}, which is in {row.where}. It "
            f"has words for {', '.join(map(repr, words))}."
        )
    return words[value]


def classes(
    rows: Iterable[Row], answer: Template, words: Mapping[str, str] | None
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
    found = {answer.fill(row.values).strip() for row in rows} - {""}
    if not 2 <= len(found) <= MOST_CLASSES:
        many = "only " if len(found) < 2 else ""
        raise FedForwardError(
            f"data.answer = {answer.source!r} has {many}{len(found)} different values in the data, "
            f"and model.head = 'classification' needs 2 to {MOST_CLASSES} classes. Name the field "
            "of the classes, as in '{label}', or use model.head = 'causal'."
        )
    if all(re.fullmatch(r"-?\d+", name) for name in found):
        return tuple(sorted(found, key=lambda name: (int(name), name)))
    return tuple(sorted(found))


def label_names(
    answer: str, words: Mapping[str, str] | None, classes: Sequence[str]
) -> tuple[str, ...]:
    """What examples call their labels, in their order: classes, or answers with a word each.

    Args:
        answer: `data.answer`.
        words: `data.label_words`; None for a sequence classifier.
        classes: of a sequence classifier; else empty.
    """
    if classes or words is None:
        return tuple(classes)
    template = Template.parse(answer, "data.answer")
    path = word_path(template)
    return tuple(template.fill({path: word}) for word in words.values())


def class_name(row: Row, answer: Template, words: Mapping[str, str] | None) -> str:
    """The class of a row; "" if it has none.

    Raises:
        FedForwardError: its value has no word.
    """
    if words is None:
        return answer.fill(row.values).strip()
    path = word_path(answer)
    return word(words, path, row).strip() if (row.values[path] or "").strip() else ""


def class_number(name: str, classes: Mapping[str, int], row: Row) -> int:
    """The place of a row's class in the head.

    Raises:
        FedForwardError: the row's class is not among those that are named.
    """
    if name not in classes:
        raise FedForwardError(
            f"data.classes has no {name!r}, which is the answer in {row.where}. It has "
            f"{', '.join(map(repr, classes))}."
        )
    return classes[name]


def check_endings(words: Mapping[str, str], answers: Sequence[str], tokenizer: Any) -> None:
    """Refuse words that a model cannot tell apart.

    Raises:
        FedForwardError: an answer has no tokens, or two have the same.
    """
    endings = tokenizer(list(answers), add_special_tokens=False, verbose=False)["input_ids"]
    seen: dict[tuple[int, ...], str] = {}
    for name, ending in zip(words.values(), endings, strict=True):
        if not ending:
            raise FedForwardError(
                f"data.label_words: the answer with the word {name!r} has no tokens. Use another "
                "word."
            )
        if tuple(ending) in seen:
            raise FedForwardError(
                f"data.label_words: {seen[tuple(ending)]!r} and {name!r} are the same tokens to "
                "this model. Use other words."
            )
        seen[tuple(ending)] = name
