"""What a run will see of its data, before it runs: examples, lengths, what is left out, balance.

Reads data and tokenizer as a run does, and no weights.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedforward.config.schema import Config
from fedforward.core.logs import PHASES
from fedforward.data.corpus import Corpus
from fedforward.data.examples import Example, lengths
from fedforward.data.tokenise import Tally
from fedforward.models.loading import tokenizer_and_positions
from fedforward.training import build

#: Bars of the histogram of lengths.
BARS = 12


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens of an example that are alike.

    Attributes:
        text: decoded.
        tokens: how many.
        counted: whether their loss counts.
        special: whether the tokenizer calls them special.
    """

    text: str
    tokens: int
    counted: bool
    special: bool


@dataclass(frozen=True)
class Shown:
    """An example as the model will see it.

    Attributes:
        client: whose it is; None for a held-out one.
        pieces: its tokens, in order.
        tokens: how many.
        counted: of how many the loss counts.
        answers: every possible answer, where there are label words; the class of a classifier.
    """

    client: int | None
    pieces: tuple[Piece, ...]
    tokens: int
    counted: int
    answers: tuple[str, ...]


@dataclass(frozen=True)
class DataPreview:
    """See the module.

    Attributes:
        sources: as the configuration names them.
        files: how many they are.
        chat: what `data.chat` is, or None.
        rows: training and held-out rows that were read.
        clients: examples of each client.
        heldout: examples kept for evaluation.
        tallies: what happened to training and held-out rows.
        shown: some examples.
        lengths: tokens of all training examples, sorted.
        counted: mean of the tokens whose loss counts, over the examples that were looked at.
        balance: of each client, how many examples have each label or value of the field that
            clients are divided by; empty if there is neither.
        balanced_by: what those are, in words.
        sequence_length: most tokens of an example.
        end: what ends an example, as text; "" if nothing does.
    """

    sources: tuple[str, ...]
    files: int
    chat: str | None
    rows: tuple[int, int]
    clients: tuple[int, ...]
    heldout: int
    tallies: tuple[Tally, Tally]
    shown: tuple[Shown, ...]
    lengths: Any
    counted: float
    balance: tuple[Mapping[str, int], ...]
    balanced_by: str
    sequence_length: int
    end: str

    def histogram(self) -> list[tuple[int, int, int]]:
        """(least, most, examples) of each bar of lengths, in tokens."""
        least, most = int(self.lengths[0]), int(self.lengths[-1])
        width = max(1, -(-(most - least + 1) // BARS))
        places = (self.lengths - least) // width
        counts = np.bincount(places, minlength=int(places[-1]) + 1)
        return [
            (least + n * width, min(most, least + (n + 1) * width - 1), int(count))
            for n, count in enumerate(counts)
        ]

    def as_json(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return {
            "sources": list(self.sources),
            "files": self.files,
            "chat": self.chat,
            "rows": {"training": self.rows[0], "heldout": self.rows[1]},
            "examples": {"clients": list(self.clients), "heldout": self.heldout},
            "left_out": [dict(tally.dropped) for tally in self.tallies],
            "cut": sum(tally.cut for tally in self.tallies),
            "crossed": sum(tally.crossed for tally in self.tallies),
            "tokens": {
                "least": int(self.lengths[0]),
                "median": int(self.lengths[len(self.lengths) // 2]),
                "most": int(self.lengths[-1]),
                "counted_mean": self.counted,
                "histogram": [list(bar) for bar in self.histogram()],
            },
            "balanced_by": self.balanced_by,
            "balance": [dict(part) for part in self.balance],
            "shown": [
                {
                    "client": example.client,
                    "tokens": example.tokens,
                    "counted": example.counted,
                    "answers": list(example.answers),
                    "pieces": [vars(piece) for piece in example.pieces],
                }
                for example in self.shown
            ],
        }


def preview_data(config: Config, examples: int = 3) -> DataPreview:
    """Read the data of a run and tokenise them.

    Args:
        examples: how many to show, of clients in turn.

    Raises:
        FedForwardError: for whatever the run would refuse of data and tokenizer.
    """
    reader = build.corpus_reader(config)
    PHASES.info("loading the tokenizer")
    tokenizer, positions = tokenizer_and_positions(config.model.path)
    PHASES.info("reading the data")
    classes = build.read_classes(config, reader)
    corpus = build.read_corpus(config, reader, tokenizer, positions, classes)
    every = np.sort(np.concatenate([lengths(part) for part in corpus.clients]))
    looked_at = [part[n] for part in corpus.clients for n in range(min(len(part), 200))]
    balance, balanced_by = _balance(config, corpus)
    end = tokenizer.eos_token_id
    return DataPreview(
        sources=tuple(source.name for source in reader.sources),
        files=sum(max(1, len(source.files)) for source in reader.sources),
        chat=reader.chat,
        rows=corpus.rows,
        clients=tuple(map(len, corpus.clients)),
        heldout=len(corpus.heldout),
        tallies=(corpus.train_tally, corpus.heldout_tally),
        shown=tuple(_shown(corpus, tokenizer, examples)),
        lengths=every,
        counted=float(np.mean([example.counted.sum() for example in looked_at])),
        balance=balance,
        balanced_by=balanced_by,
        sequence_length=config.data.sequence_length,
        end="" if end is None else tokenizer.decode([end]),
    )


def _balance(config: Config, corpus: Corpus) -> tuple[tuple[Mapping[str, int], ...], str]:
    if corpus.classes or config.data.label_words:
        counts = tuple(
            Counter(example.reference.strip() for example in part) for part in corpus.clients
        )
        return counts, "answer"
    return corpus.groups, f"{config.federation.field}" if corpus.groups else ""


def _shown(corpus: Corpus, tokenizer: Any, examples: int) -> Sequence[Shown]:
    """Examples of the clients in turn."""
    found = []
    for number in range(examples):
        client = number % len(corpus.clients)
        part = corpus.clients[client]
        place = number // len(corpus.clients)
        if place < len(part):
            found.append(_example(part[place], client, corpus, tokenizer))
    return found


def _example(example: Example, client: int, corpus: Corpus, tokenizer: Any) -> Shown:
    counted = example.counted
    if corpus.classes:
        answers: tuple[str, ...] = (corpus.classes[example.right],)
        counted = np.zeros(len(example.tokens), np.bool_)
    else:
        pairs = zip(example.choices, example.choice_prompts, strict=True)
        answers = tuple(tokenizer.decode(choice[prompt:]) for choice, prompt in pairs)
    return Shown(
        client,
        tuple(_pieces(example.tokens.tolist(), counted.tolist(), tokenizer)),
        len(example.tokens),
        int(counted.sum()),
        answers,
    )


def _pieces(tokens: Sequence[int], counted: Sequence[bool], tokenizer: Any) -> Sequence[Piece]:
    special = set(tokenizer.all_special_ids)
    pieces: list[Piece] = []
    begin = 0
    for end in range(1, len(tokens) + 1):
        key = (counted[begin], tokens[begin] in special)
        if end < len(tokens) and (counted[end], tokens[end] in special) == key:
            continue
        text = tokenizer.decode(tokens[begin:end], clean_up_tokenization_spaces=False)
        pieces.append(Piece(text, end - begin, *key))
        begin = end
    return pieces
