"""The data of a run: read once, split, tokenised and divided among clients.

The same sections of a configuration and the same run seed give the same corpus, bit for bit.
Nothing here imports PyTorch.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from fedforward.config.sections import DataSection, EvaluationSection, FederationSection
from fedforward.core.errors import FedForwardError
from fedforward.core.seeds import derive, generator
from fedforward.data import labels, sources, templates
from fedforward.data.partition import partition
from fedforward.data.templates import Example


@dataclass(frozen=True)
class Corpus:
    """The data of a run, tokenised and divided.

    Attributes:
        clients: each client's training examples.
        heldout: the examples kept for evaluation.
        example: the prompt that is answered before and after, and its expected answer if known.
        classes: of a sequence classifier, in the order of its head; else empty.
        cut: answers cut at the sequence length.
        dropped: rows without room for an answer.
    """

    clients: list[list[Example]]
    heldout: list[Example]
    example: tuple[str, str | None]
    cut: int
    dropped: int
    classes: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """SHA-256 of every client's and the held-out examples' tokens and classes, hexadecimal."""
        state = hashlib.sha256()
        for part in (*self.clients, self.heldout):
            state.update(f"{len(part)}\n".encode())
            for example in part:
                state.update(f"{example.prompt_length} {len(example.tokens)}\n".encode())
                for tokens in (example.tokens, *example.choices):
                    state.update(tokens.astype("<i8").tobytes())
                if self.classes:
                    state.update(f"class {example.right}\n".encode())
        return state.hexdigest()


class Rows(NamedTuple):
    """Rows as they were read, each list in an order of the run's seed.

    Attributes:
        train: to train on.
        heldout: to evaluate on.
    """

    train: list[dict[str, Any]]
    heldout: list[dict[str, Any]]


class CorpusReader:
    """Reads the data of a run once, whether for its classes, its corpus or both."""

    def __init__(
        self,
        data: DataSection,
        evaluation: EvaluationSection,
        federation: FederationSection,
        run_seed: int,
    ) -> None:
        """Read nothing yet.

        Args:
            data: where the rows are, and what is made of them.
            evaluation: held-out rows of their own, if any, and how many.
            federation: how examples are divided, and among how many clients.
            run_seed: of the rows' orders and of the partition.
        """
        self._data, self._evaluation, self._federation = data, evaluation, federation
        self._run_seed = run_seed

    @cached_property
    def rows(self) -> Rows:
        """The rows to train on and those to evaluate on.

        Raises:
            FedForwardError: for whatever is wrong with the sources, their fields or their size.
        """
        data, field = self._data, self._field
        table = sources.read(data.source, split=data.split, subset=data.subset, key="data.source")
        table = _rename_fields(data, table)
        _check_templates(data, table, "")
        if field is not None and field not in table.column_names:
            raise FedForwardError(
                f"federation.field = {field!r} is not a field of the data. Their fields are "
                f"{', '.join(table.column_names)}."
            )
        order = generator(self._run_seed, "heldout").permutation(len(table)).tolist()
        rows = [table[index] for index in order[: data.limit]]
        if self._evaluation.source is not None:
            return Rows(rows, self._evaluation_rows())
        kept = _heldout_count(data.heldout, len(rows))
        return Rows(rows[kept:], rows[:kept][: self._evaluation.limit])

    def classes(self) -> tuple[str, ...]:
        """A classifier's classes: those of training and held-out data, or the label words.

        Raises:
            FedForwardError: see `labels.classes` and `rows`.
        """
        data = self._data
        if data.label_words:
            return labels.classes((), data.answer, data.label_words)
        return labels.classes([*self.rows.train, *self.rows.heldout], data.answer, None)

    def corpus(
        self,
        tokenizer: Any,
        positions: int | None,
        classes: Sequence[str] = (),
        *,
        generates: bool = False,
    ) -> Corpus:
        """Tokenise the rows and divide them among the clients.

        Args:
            positions: the longest sequence that the model takes, or None.
            classes: of a sequence classifier, in the order of its head.
            generates: whether prompts must leave room for `data.answer_tokens` new tokens.

        Raises:
            FedForwardError: for whatever is wrong with the data or their keys.
        """
        data = self._data
        if positions is not None and data.sequence_length > positions:
            raise FedForwardError(
                f"data.sequence_length = {data.sequence_length} is longer than the {positions} "
                f"positions that this model takes. Use at most {positions}."
            )
        if data.label_words:
            labels.check_template(data.answer)
        rows, heldout_rows = self.rows
        heldout = self._tokenise(heldout_rows, tokenizer, classes)
        train = self._tokenise(rows, tokenizer, classes)
        if not heldout.examples or not train.examples:
            raise FedForwardError(
                f"data.sequence_length = {data.sequence_length} leaves no "
                f"{'held-out' if not heldout.examples else 'training'} example: every prompt fills "
                "it, or every answer is empty. Raise it, or look at data.prompt and data.answer."
            )
        parts = self._partition([rows[row] for row in train.rows])
        if generates and positions is not None:
            _check_room_for_answers(data, [*heldout.examples, *train.examples], positions)
        shown = templates.fill(data.prompt, heldout_rows[heldout.rows[0]])
        example = (shown, heldout.examples[0].reference)
        return Corpus(
            clients=[[train.examples[index] for index in part] for part in parts],
            heldout=heldout.examples,
            example=(data.example, None) if data.example else example,
            cut=heldout.cut + train.cut,
            dropped=heldout.dropped + train.dropped,
            classes=tuple(classes),
        )

    @property
    def _field(self) -> str | None:
        """The field that the data are divided by, if any."""
        return self._federation.field if self._federation.partition != "iid" else None

    def _partition(self, rows: Sequence[dict[str, Any]]) -> Sequence[Sequence[int]]:
        """Each client's places in these rows."""
        field = self._field
        return partition(
            [row[field] if field else 0 for row in rows],
            self._federation.clients,
            kind=self._federation.partition,
            field=field,
            alpha=self._federation.alpha,
            seed=derive(self._run_seed, "partition"),
        )

    def _evaluation_rows(self) -> list[dict[str, Any]]:
        """The rows of `evaluation.source`, in an order of the run's seed."""
        section = self._evaluation
        assert section.source is not None
        table = sources.read(
            section.source, split=section.split, subset=section.subset, key="evaluation.source"
        )
        _check_templates(self._data, table, f" (with evaluation.source = {section.source!r})")
        order = generator(self._run_seed, "evaluation").permutation(len(table)).tolist()
        return [table[index] for index in order[: section.limit]]

    def _tokenise(
        self, rows: Sequence[dict[str, Any]], tokenizer: Any, classes: Sequence[str]
    ) -> templates.Tokenised:
        data = self._data
        options: dict[str, Any] = {
            "prompt": data.prompt,
            "answer": data.answer,
            "sequence_length": data.sequence_length,
        }
        words = data.label_words
        if classes:
            return labels.classify(rows, tokenizer, words=words, classes=classes, **options)
        if words:
            return labels.tokenise(rows, tokenizer, words=words, **options)
        return templates.tokenise(rows, tokenizer, **options)


def _rename_fields(data: DataSection, table: Any) -> Any:
    """The table with its fields called what the templates call them."""
    names = data.fields or {}
    for own, found in names.items():
        if found not in table.column_names:
            raise FedForwardError(
                f"data.fields: {own} = {found!r} is not a field of {data.source}. Their "
                f"fields are {', '.join(table.column_names)}."
            )
    if not names:
        return table
    # At once, for two fields may change places. A field that only has a requested name is dropped.
    hidden = [name for name in names if name in table.column_names and name not in names.values()]
    return table.remove_columns(hidden).rename_columns({found: own for own, found in names.items()})


def _check_templates(data: DataSection, table: Any, where: str) -> None:
    """Refuse templates that name fields which a data set does not have."""
    for key, template in (("prompt", data.prompt), ("answer", data.answer)):
        templates.check_fields(template, table.column_names, f"data.{key}{where}")


def _check_room_for_answers(data: DataSection, examples: Sequence[Example], positions: int) -> None:
    """Refuse prompts that leave a model fewer positions than a generated answer may take."""
    longest = max(example.prompt_length for example in examples)
    room = positions - data.answer_tokens
    if longest > room:
        raise FedForwardError(
            f"data.answer_tokens = {data.answer_tokens} after the longest prompt of "
            f"{longest} tokens is more than the {positions} positions that this model takes. Lower "
            f"it, or drop long prompts with data.sequence_length = {max(1, room)}."
        )


def _heldout_count(requested: float, examples: int) -> int:
    if requested < 1:
        count = max(1, round(requested * examples))
    elif requested == int(requested):
        count = int(requested)
    else:
        raise FedForwardError(
            f"data.heldout = {requested:g} is neither a share below 1 nor a whole number of "
            "examples."
        )
    if count >= examples:
        raise FedForwardError(
            f"data.heldout = {requested:g} keeps {count} examples for evaluation, but the data "
            f"have only {examples}. Use a smaller share or number."
        )
    return count
