"""The data of a run: read once, split, tokenised and divided among clients.

The same sections of a configuration and the same run seed give the same corpus, bit for bit.
Nothing here imports PyTorch.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedforward.config.method_sections import FederationSection
from fedforward.config.sections import DataSection, EvaluationSection
from fedforward.core.errors import FedForwardError
from fedforward.core.seeds import derive, generator
from fedforward.data import chat as chats
from fedforward.data import labels
from fedforward.data.chat import ChatRenderer
from fedforward.data.encoding import TextEncoder
from fedforward.data.examples import Example, Examples
from fedforward.data.partition import partition
from fedforward.data.sources import Source, find
from fedforward.data.spool import Numbers, narrow
from fedforward.data.table import Table, Wanted
from fedforward.data.templates import Template
from fedforward.data.tokenise import (
    AnswerMaker,
    ChatMaker,
    ChoiceMaker,
    ClassMaker,
    Maker,
    Tally,
    Tokenised,
    check_left,
    log_tally,
    tokenise,
)

LOGGER = logging.getLogger("fedforward.data")
#: How often `data.weights` may repeat a row.
MOST_REPEATS = 1000


class Prompt(NamedTuple):
    """The prompt that is answered before and after a run.

    Attributes:
        text: as people read it.
        tokens: int64 [length], what the model is given.
        expected: the right answer, if it is known.
    """

    text: str
    tokens: NDArray[np.int64]
    expected: str | None


@dataclass(frozen=True)
class Corpus:
    """The data of a run, tokenised and divided.

    Attributes:
        clients: each client's training examples.
        heldout: the examples kept for evaluation.
        example: the prompt that is answered before and after.
        train_tally: what happened to the training rows.
        heldout_tally: what happened to those kept for evaluation.
        classes: of a sequence classifier, in the order of its head; else empty.
        rows: training rows and held-out rows that were read.
        groups: of each client, how many examples have each value of the field that the data are
            divided by; empty without one.
        continued: makes the prompt of a text as the run's examples have it.
    """

    clients: Sequence[Sequence[Example]]
    heldout: Sequence[Example]
    example: Prompt
    train_tally: Tally
    heldout_tally: Tally
    classes: tuple[str, ...] = ()
    rows: tuple[int, int] = (0, 0)
    groups: tuple[Mapping[str, int], ...] = ()
    continued: Callable[[str], Prompt] | None = None

    @property
    def cut(self) -> int:
        """Answers cut at the sequence length."""
        return self.train_tally.cut + self.heldout_tally.cut

    @property
    def dropped(self) -> int:
        """Rows that were left out."""
        return self.train_tally.dropped.total() + self.heldout_tally.dropped.total()

    def fingerprint(self) -> str:
        """SHA-256 of every client's and the held-out examples' tokens and classes, hexadecimal."""
        state = hashlib.sha256()
        for part in (*self.clients, self.heldout):
            state.update(f"{len(part)}\n".encode())
            for example in _records(part):
                state.update(example)
        return state.hexdigest()


def _records(part: Sequence[Example]) -> Any:
    assert isinstance(part, Examples)
    return (part.store.record(int(place)) for place in part.places)


class Rows(NamedTuple):
    """Rows as they were read.

    Attributes:
        table: with all rows, or those to train on.
        train: the numbers of the rows to train on.
        heldout_table: with the rows to evaluate on.
        heldout: their numbers there.
    """

    table: Table
    train: Numbers
    heldout_table: Table
    heldout: Numbers


class CorpusReader:
    """Reads the data of a run once, whether for its classes, its corpus or both."""

    def __init__(
        self,
        data: DataSection,
        evaluation: EvaluationSection,
        federation: FederationSection,
        run_seed: int,
        key: str = "data.source",
    ) -> None:
        """Read nothing yet.

        Args:
            data: where the rows are, and what is made of them.
            evaluation: held-out rows of their own, if any, and how many.
            federation: how examples are divided, and among how many clients.
            run_seed: of the rows' orders and of the partition.
            key: that names the rows' source in errors.
        """
        self._key = key
        self._data, self._evaluation, self._federation = data, evaluation, federation
        self._run_seed = run_seed
        self._prompt = Template.parse(data.prompt, "data.prompt")
        self._answer = Template.parse(data.answer, "data.answer")

    @cached_property
    def sources(self) -> list[Source]:
        """Where the rows to train on are.

        Raises:
            FedForwardError: see `sources.find`.
        """
        data = self._data
        names = [data.source] if isinstance(data.source, str) else data.source
        found = [find(n, split=data.split, subset=data.subset, key=self._key) for n in names]
        files = [file.resolve() for source in found for file in source.files]
        if len(set(files)) < len(files):
            twice = next(file for file in files if files.count(file) > 1)
            raise FedForwardError(
                f"{self._key} = {data.source!r} takes in {twice.name} twice. Name each file once."
            )
        for source in found:
            if len(source.files) > 1:
                LOGGER.info(
                    "%s: %d files, from %s to %s",
                    source.name,
                    len(source.files),
                    source.files[0].name,
                    source.files[-1].name,
                )
        return found

    @cached_property
    def chat(self) -> str | None:
        """What `data.chat` says, or what the fields of the data say where no template does."""
        data = self._data
        if data.chat is not None:
            return data.chat
        if not data.default_templates or data.label_words:
            return None
        columns = self.sources[0].columns()
        row = next(self.sources[0].read(), (0, 0, {}))[2]
        names = {**{name: name for name in columns}, **(data.fields or {})}
        required = {*self._prompt.paths, *self._answer.paths} - {"input"}
        if required <= names.keys():
            return None
        found = chats.detect(columns, row)
        if found is not None:
            LOGGER.warning(
                "the data hold conversations, so data.chat = %r is used; set it, or data.prompt "
                "and data.answer",
                found,
            )
        return found

    def _wanted(self, *, partition: bool, names: Mapping[str, str]) -> Wanted:
        """What is read of each row."""
        texts: dict[str, str] = {}
        values: dict[str, str] = {}
        optional: frozenset[str] = frozenset()
        if self.chat is None:
            texts = dict.fromkeys(self._prompt.paths, "data.prompt")
            texts |= dict.fromkeys(self._answer.paths, "data.answer") | texts
            if self._data.default_templates:
                # Instructions may come with an input.
                optional = frozenset({"input"} & texts.keys())
        else:
            wanted, more = chats.paths(self.chat)
            values = dict.fromkeys((*wanted, *more), "data.chat")
            optional = frozenset(more)
        field = self._field if partition else None
        if field is not None and field not in values:
            texts.setdefault(field, "federation.field")
        return Wanted(texts, values, optional, names)

    @cached_property
    def rows(self) -> Rows:
        """The rows to train on and those to evaluate on.

        Raises:
            FedForwardError: for whatever is wrong with the sources, their fields or their size.
        """
        data = self._data
        table = Table.read(
            self.sources,
            self._wanted(partition=True, names=data.fields or {}),
            seed=self._run_seed,
            purpose="heldout",
            limit=data.limit,
            shares=data.weights or (),
        )
        numbers = narrow(np.arange(len(table)))
        if self._evaluation.source is not None:
            other = self._evaluation_table()
            return Rows(table, numbers, other, narrow(np.arange(len(other))))
        kept = _heldout_count(data.heldout, len(table))
        return Rows(table, numbers[kept:], table, numbers[:kept][: self._evaluation.limit])

    def classes(self) -> tuple[str, ...]:
        """A classifier's classes: those that are named, or all answers in the data.

        Raises:
            FedForwardError: see `labels.classes` and `rows`.
        """
        self._check_plain()
        if self._data.label_words:
            return labels.classes((), self._answer, self._data.label_words)
        if self._data.classes is not None:
            return tuple(self._data.classes)
        rows = self.rows
        every = [(rows.table, n) for n in rows.train]
        every += [(rows.heldout_table, n) for n in rows.heldout]
        return labels.classes((table[int(n)] for table, n in every), self._answer, None)

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
        maker, renderer = self._maker(tokenizer, classes)
        rows = self.rows
        heldout = tokenise(rows.heldout_table, rows.heldout, maker, "held-out rows")
        check_left(heldout, len(rows.heldout), "held-out", data.sequence_length)
        train = tokenise(rows.table, rows.train, maker, "training rows")
        check_left(train, len(rows.train), "training", data.sequence_length)
        for tally, count in (
            (train.tally, len(rows.train)),
            (heldout.tally, len(rows.heldout)),
        ):
            log_tally(tally, count)
        values = self._field_values(rows.table, train.rows)
        parts = self._partition(values, len(train.rows))
        if generates and positions is not None:
            longest = max(
                heldout.examples.store.longest_prompt, train.examples.store.longest_prompt
            )
            _check_room_for_answers(data, longest, positions)
        origins = rows.table.origins[train.rows]
        encoder = TextEncoder(tokenizer)

        def continued(text: str) -> Prompt:
            if renderer is not None:
                text = renderer.prompt(text)
                return Prompt(text, encoder.prompt(text, prefix=False), None)
            return Prompt(text, encoder.texts([text])[0] if classes else encoder.prompt(text), None)

        parts = [self._repeated(part, origins, client) for client, part in enumerate(parts)]
        return Corpus(
            clients=[train.examples.take(part) for part in parts],
            heldout=heldout.examples,
            example=self._example(heldout, rows, encoder, renderer, continued),
            continued=continued,
            train_tally=train.tally,
            heldout_tally=heldout.tally,
            classes=tuple(classes),
            rows=(len(rows.train), len(rows.heldout)),
            groups=tuple(Counter(values[int(n)] for n in part) for part in parts)
            if values is not None
            else (),
        )

    def sample(
        self, tokenizer: Any, classes: Sequence[str], rows: int, purpose: str
    ) -> list[Example]:
        """Examples of some rows drawn at random.

        Args:
            classes: of a sequence classifier; else empty. A row of another class has -1.
            rows: how many, at most.
            purpose: names the draw's stream of random numbers.

        Raises:
            FedForwardError: for whatever is wrong with the source or its fields, or no row is left.
        """
        wanted = self._wanted(partition=False, names=self._names())
        table = Table.read(
            self.sources,
            wanted,
            seed=self._run_seed,
            purpose=purpose,
            limit=rows,
            prefix=f" (with {self._key} = {self._data.source!r})",
        )
        limit = self._data.sequence_length
        if classes:
            words = self._data.label_words
            rows_read = [table[number] for number in range(len(table))]
            texts = TextEncoder(tokenizer).texts([self._prompt.fill(r.values) for r in rows_read])
            places = {name: place for place, name in enumerate(classes)}
            names = [labels.class_name(row, self._answer, words) for row in rows_read]
            return [
                Example(tokens[:limit], len(tokens[:limit]), name, right=places.get(name, -1))
                for tokens, name in zip(texts, names, strict=True)
            ]
        maker, _ = self._maker(tokenizer, ())
        tokenised = tokenise(table, narrow(np.arange(len(table))), maker, f"rows of {self._key}")
        check_left(tokenised, len(table), self._key, limit)
        return list(tokenised.examples)

    def _names(self) -> dict[str, str]:
        """`data.fields`, for sources that may call their fields as the templates do."""
        there = {name for source in self.sources for name in source.columns()}
        fields = (self._data.fields or {}).items()
        return {own: found for own, found in fields if own not in there and found in there}

    def _maker(self, tokenizer: Any, classes: Sequence[str]) -> tuple[Maker, ChatRenderer | None]:
        """What makes examples of rows, and what renders conversations if they are ones."""
        data = self._data
        encoder = TextEncoder(tokenizer)
        if classes or data.label_words:
            self._check_plain()
        if data.label_words:
            labels.word_path(self._answer)
        if classes:
            return (
                ClassMaker(
                    self._prompt,
                    self._answer,
                    data.label_words,
                    classes,
                    encoder,
                    data.sequence_length,
                ),
                None,
            )
        if data.label_words:
            words = data.label_words
            return (
                ChoiceMaker(self._prompt, self._answer, words, encoder, data.sequence_length),
                None,
            )
        if self.chat is not None:
            renderer = ChatRenderer(tokenizer, data.chat_template, data.loss_on)
            return ChatMaker(self.chat, renderer, encoder, data.sequence_length), renderer
        return AnswerMaker(self._prompt, self._answer, encoder, data.sequence_length), None

    def _check_plain(self) -> None:
        if self.chat is not None:
            raise FedForwardError(
                f"data.chat = {self.chat!r} makes conversations, and data.label_words and "
                "model.head = 'classification' need data.prompt and data.answer. Write those, as "
                'in data.prompt = "{messages[0].content}".'
            )

    def _example(
        self,
        heldout: Tokenised,
        rows: Rows,
        encoder: TextEncoder,
        renderer: ChatRenderer | None,
        continued: Callable[[str], Prompt],
    ) -> Prompt:
        """The prompt to answer before and after: the one asked for, or the first held-out one."""
        first, asked = heldout.examples[0], self._data.example
        if asked is None:
            tokens = first.tokens[: first.prompt_length]
            row = rows.heldout_table[int(heldout.rows[0])]
            if renderer is None:
                text = self._prompt.fill(row.values)
            else:
                text = encoder.tokenizer.decode(tokens)
            return Prompt(text, tokens, first.reference)
        return continued(asked)

    @property
    def _field(self) -> str | None:
        """The field that the data are divided by, if any."""
        return self._federation.field if self._federation.partition != "iid" else None

    def _field_values(self, table: Table, rows: Numbers) -> list[str] | None:
        """The text of the field that the data are divided by in each of these rows, if any."""
        field = self._field
        if field is None:
            return None
        return [str(table[int(row)].values[field] or "") for row in rows]

    def _partition(self, values: list[str] | None, examples: int) -> list[Numbers]:
        """Each client's places among the examples."""
        return partition(
            values,
            examples,
            self._federation.clients,
            kind=self._federation.partition,
            field=self._field,
            alpha=self._federation.alpha,
            seed=derive(self._run_seed, "partition"),
        )

    def _repeated(self, part: Numbers, origins: NDArray[np.int16], client: int) -> Numbers:
        """A client's examples, those of sources with a large share several times.

        Every example is there once at least; the source with the least share for its size has
        each of its examples once.
        """
        shares = self._data.weights
        if not shares or self._data.limit is not None:
            # With a limit each source has given its share of it.
            return part
        counts = np.bincount(origins, minlength=len(shares))
        times = np.array(shares) / np.maximum(counts, 1)
        times /= times[counts > 0].min()
        if times.max() > MOST_REPEATS:
            raise FedForwardError(
                f"data.weights = {list(shares)!r} would repeat the rows of a source "
                f"{times.max():.3g} times, and {MOST_REPEATS} is the most. Use weights that are "
                "closer to each other, or data.limit."
            )
        random = generator(self._run_seed, "weights", client)
        order = [part]
        for source, factor in enumerate(times):
            mine = part[origins[part] == source]
            more = factor - 1.0
            order += [mine] * int(more)
            rest = round((more - int(more)) * len(mine))
            order.append(mine[np.sort(random.permutation(len(mine))[:rest])])
        return np.concatenate(order)

    def _evaluation_table(self) -> Table:
        """The rows of `evaluation.source`, in an order of the run's seed."""
        section = self._evaluation
        assert section.source is not None
        source = find(
            section.source, split=section.split, subset=section.subset, key="evaluation.source"
        )
        there = source.columns()
        fields = (self._data.fields or {}).items()
        # A file to evaluate on may call its fields as the templates do, or as the source does.
        names = {own: found for own, found in fields if own not in there and found in there}
        return Table.read(
            [source],
            self._wanted(partition=False, names=names),
            seed=self._run_seed,
            purpose="evaluation",
            limit=section.limit,
            prefix=f" (with evaluation.source = {section.source!r})",
        )


def _check_room_for_answers(data: DataSection, longest: int, positions: int) -> None:
    """Refuse prompts that leave a model fewer positions than a generated answer may take."""
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
