"""From rows to tokenised examples, in each of the four ways: answer, conversation, words, class.

What happens to a row that cannot be used is counted by its reason, and is shown before a run.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedforward.core.errors import FedForwardError
from fedforward.data import labels
from fedforward.data.chat import ChatRenderer, Rendered, conversation
from fedforward.data.encoding import TextEncoder
from fedforward.data.examples import Example, Examples, ExampleStore
from fedforward.data.spool import Numbers, narrow
from fedforward.data.table import Progress, Row, Table
from fedforward.data.templates import Template

LOGGER = logging.getLogger("fedforward.data")
#: Rows that are tokenised in one call.
_BATCH_ROWS = 512
NO_ROOM = "the prompt leaves no room for an answer"
NO_TURN = "the conversation has no answer of an assistant after a first message"


@dataclass
class Tally:
    """What happened to rows.

    Attributes:
        dropped: how many were left out, by reason.
        cut: how many answers were cut at the sequence length.
        crossed: in how many a token reaches from the prompt into the answer.
    """

    dropped: Counter[str] = field(default_factory=Counter)
    cut: int = 0
    crossed: int = 0


class Maker(Protocol):
    """Makes examples of rows."""

    def make(self, rows: Sequence[Row], tally: Tally) -> Iterator[Example | None]:
        """An example of each row, or None for one that is counted as dropped."""
        ...


@dataclass(frozen=True)
class Tokenised:
    """The examples that were kept, and what happened to the others.

    Attributes:
        examples: in the order of the rows.
        rows: [examples], the row that each came from.
        tally: of all rows.
    """

    examples: Examples
    rows: Numbers
    tally: Tally


def tokenise(table: Table, rows: Numbers, maker: Maker, what: str) -> Tokenised:
    """Make examples of some rows of a table.

    Args:
        rows: their numbers.
        what: the rows are, for the progress.

    Raises:
        FedForwardError: a row holds what cannot be an example; the disk is full.
    """
    store, tally, progress = ExampleStore(), Tally(), Progress()
    kept = np.empty_like(rows)
    for begin in range(0, len(rows), _BATCH_ROWS):
        progress.show(f"tokenising {what}", begin, len(rows))
        part = rows[begin : begin + _BATCH_ROWS]
        made = maker.make([table[int(number)] for number in part], tally)
        for number, example in zip(part, made, strict=True):
            if example is not None:
                kept[len(store)] = number
                store.append(example)
    places = narrow(np.arange(len(store)))
    return Tokenised(
        Examples(store, places),
        kept if len(store) == len(kept) else kept[: len(store)].copy(),
        tally,
    )


@dataclass(frozen=True)
class AnswerMaker:
    """A prompt and its answer, with the end-of-sequence token after them."""

    prompt: Template
    answer: Template
    encoder: TextEncoder
    sequence_length: int

    def make(self, rows: Sequence[Row], tally: Tally) -> Iterator[Example | None]:
        """See `Maker`."""
        texts = [(self.prompt.fill(row.values), self.answer.fill(row.values)) for row in rows]
        encoded = self.encoder.encode([p + a for p, a in texts], [[len(p)] for p, _ in texts])
        for row, (_, answer), found in zip(rows, texts, encoded, strict=True):
            (place,) = found.places
            if not self.answer.says_something(row.values):
                named = " and ".join(f"{{{path}}}" for path in self.answer.shown)
                tally.dropped[
                    f"the answer is empty: {named or 'data.answer'} is null or empty"
                ] += 1
                yield None
                continue
            if max(1, place) >= min(len(found.tokens), self.sequence_length):
                tally.dropped[NO_ROOM] += 1
                yield None
                continue
            tally.cut += len(found.tokens) > self.sequence_length
            tally.crossed += found.crossed[0]
            # A text's first token has no loss.
            yield Example(found.tokens[: self.sequence_length], max(1, place), answer)


@dataclass(frozen=True)
class ChatMaker:
    """A conversation, as the tokenizer's chat template has it."""

    chat: str
    renderer: ChatRenderer
    encoder: TextEncoder
    sequence_length: int

    def make(self, rows: Sequence[Row], tally: Tally) -> Iterator[Example | None]:
        """See `Maker`."""
        rendered = [
            self.renderer.render(conversation(row.values, self.chat, row.where), row.where)
            for row in rows
        ]
        there = [talk for talk in rendered if talk is not None]
        seams = [[place for span in talk.spans for place in span] for talk in there]
        # The template has said all that stands around a text.
        encoded = iter(
            self.encoder.encode([t.text for t in there], seams, prefix=False, end=False)
            if there
            else ()
        )
        for talk in rendered:
            if talk is None:
                tally.dropped[NO_TURN] += 1
                yield None
            else:
                found = next(encoded)
                yield self._example(talk, found.tokens, found.places, tally)

    def _example(
        self, talk: Rendered, tokens: NDArray[np.int64], places: Sequence[int], tally: Tally
    ) -> Example | None:
        limit = self.sequence_length
        spans: list[tuple[int, int]] = []
        reference = ""
        for begin, end, said in zip(places[0::2], places[1::2], talk.references, strict=True):
            # What follows the end-of-sequence token is never generated.
            ends = np.flatnonzero(tokens[begin:end] == self.encoder.tokenizer.eos_token_id)
            if len(ends):
                last = begin + int(ends[-1]) + 1
                # An end within what is said is no end.
                rest = self.encoder.tokenizer.decode(tokens[last:end])
                end = end if rest.strip() else last
            if max(1, begin) < min(end, limit):
                spans.append((max(1, begin), min(end, limit)))
                reference = said
        if not spans:
            tally.dropped[NO_ROOM] += 1
            return None
        tally.cut += len(tokens) > limit
        # Generation begins after the prompt of the last answer that is there.
        return Example(tokens[:limit], spans[-1][0], reference, spans=tuple(spans))


@dataclass(frozen=True)
class ChoiceMaker:
    """A prompt with each possible answer; the words take the place of the answer's field.

    No end-of-sequence token follows, so that the loss is that of the word, as in MeZO. A row is
    dropped if its longest choice does not fit the sequence length.

    Attributes:
        words: by the field's values as text, in the order of the choices.
    """

    prompt: Template
    answer: Template
    words: Mapping[str, str]
    encoder: TextEncoder
    sequence_length: int

    def make(self, rows: Sequence[Row], tally: Tally) -> Iterator[Example | None]:
        """See `Maker`."""
        path = labels.word_path(self.answer)
        answers = [self.answer.fill({path: word}) for word in self.words.values()]
        labels.check_endings(self.words, answers, self.encoder.tokenizer)
        places = {word: place for place, word in enumerate(self.words.values())}
        texts, seams = [], []
        for row in rows:
            prompt = self.prompt.fill(row.values)
            texts += [prompt + answer for answer in answers]
            seams += [[len(prompt)]] * len(answers)
        encoded = self.encoder.encode(texts, seams, end=False)
        for number, row in enumerate(rows):
            found = encoded[number * len(answers) : (number + 1) * len(answers)]
            if not (row.values[path] or "").strip():
                tally.dropped[f"the answer is empty: {{{path}}} is null or empty"] += 1
                yield None
                continue
            right = places[labels.word(self.words, path, row)]
            choices = tuple(one.tokens for one in found)
            prompts = tuple(one.places[0] for one in found)
            if min(prompts) == 0 or max(map(len, choices)) > self.sequence_length:
                tally.dropped[NO_ROOM if min(prompts) else "the prompt is empty"] += 1
                yield None
                continue
            tally.crossed += any(one.crossed[0] for one in found)
            yield Example(
                choices[right],
                prompts[right],
                answers[right],
                choices,
                right,
                choice_prompts=prompts,
            )


@dataclass(frozen=True)
class ClassMaker:
    """A prompt with the number of its class, tokenised as the tokenizer does with a text.

    A row without an answer, or whose prompt is empty or too long, is dropped.

    Attributes:
        words: by the field's values as text, in place of the answers; or None.
        classes: in the order of the head.
    """

    prompt: Template
    answer: Template
    words: Mapping[str, str] | None
    classes: Sequence[str]
    encoder: TextEncoder
    sequence_length: int

    def make(self, rows: Sequence[Row], tally: Tally) -> Iterator[Example | None]:
        """See `Maker`."""
        places = {name: place for place, name in enumerate(self.classes)}
        texts = self.encoder.texts([self.prompt.fill(row.values) for row in rows])
        named = " and ".join(f"{{{path}}}" for path in self.answer.shown)
        for row, tokens in zip(rows, texts, strict=True):
            name = labels.class_name(row, self.answer, self.words)
            if not name:
                tally.dropped[f"the answer is empty: {named} is null or empty"] += 1
                yield None
            elif not 0 < len(tokens) <= self.sequence_length:
                reason = "the text is longer than data.sequence_length"
                tally.dropped[reason if len(tokens) else "the prompt is empty"] += 1
                yield None
            else:
                yield Example(
                    tokens, len(tokens), name, right=labels.class_number(name, places, row)
                )


def check_left(tokenised: Tokenised, rows: int, what: str, sequence_length: int) -> None:
    """Refuse data of which no example is left.

    Raises:
        FedForwardError: with the reasons and how many rows each dropped.
    """
    if len(tokenised.examples):
        return
    reasons = "; ".join(
        f"in {count} of {rows} {reason}" for reason, count in tokenised.tally.dropped.most_common()
    )
    advice = "Mend the data, or look at data.prompt, data.answer and data.fields."
    if NO_ROOM in tokenised.tally.dropped or "longer than" in reasons:
        advice = f"Raise data.sequence_length = {sequence_length}, or shorten data.prompt."
    raise FedForwardError(f"No {what} row is left: {reasons or 'there is none'}. {advice}")


def log_tally(tally: Tally, rows: int) -> None:
    """Say what happened to rows that were not used whole."""
    for reason, count in tally.dropped.most_common():
        LOGGER.warning("%s of %s rows are left out: %s", f"{count:,}", f"{rows:,}", reason)
    if tally.cut:
        LOGGER.warning(
            "%s of %s answers are cut at data.sequence_length", f"{tally.cut:,}", f"{rows:,}"
        )
    if tally.crossed:
        LOGGER.warning(
            "in %s of %s rows a token reaches from the prompt into the answer, and counts as the "
            "answer's; a space at the prompt's end belongs at the answer's beginning",
            f"{tally.crossed:,}",
            f"{rows:,}",
        )
