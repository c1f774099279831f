"""Rows written to files and read as a run reads them."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedforward.config.method_sections import FederationSection
from fedforward.config.sections import DataSection, EvaluationSection
from fedforward.data.corpus import Corpus, CorpusReader
from fedforward.data.sources import find


def write_rows(path: Path, rows: Iterable[Mapping[str, Any] | str]) -> Path:
    """A JSONL file of rows, or of lines as they are."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def read(source: Path | str) -> list[dict[str, Any]]:
    """All rows of a source."""
    return [row for _, _, row in find(str(source), key="data.source").read()]


def reader(source: Path | str | list[str], clients: int = 1, **data: Any) -> CorpusReader:
    """What reads a corpus; `evaluation`, `federation` and `seed` are taken out of the keys."""
    evaluation, federation = data.pop("evaluation", {}), data.pop("federation", {})
    seed = data.pop("seed", 0)
    names = source if isinstance(source, list) else str(source)
    return CorpusReader(
        DataSection(source=names, **{"heldout": 1, **data}),
        EvaluationSection(**evaluation),
        FederationSection(clients=clients, **federation),
        seed,
    )


def corpus(source: Path | str | list[str], tokenizer: Any, clients: int = 1, **data: Any) -> Corpus:
    """The corpus of a source; see `reader`."""
    return reader(source, clients, **data).corpus(tokenizer, None)


def texts(made: Corpus, tokenizer: Any) -> list[tuple[str, str]]:
    """Prompt and answer of every example, the held-out ones last."""
    return [
        (
            tokenizer.decode(example.tokens[: example.prompt_length]),
            tokenizer.decode(example.tokens[example.counted]),
        )
        for part in (*made.clients, made.heldout)
        for example in part
    ]


class Letters:
    """A tokenizer with a token for each letter, and what it puts around a text."""

    chat_template: str | None = None

    def __init__(
        self, prefix: tuple[int, ...] = (), suffix: tuple[int, ...] = (), eos: int | None = 2
    ) -> None:
        self.prefix, self.suffix = prefix, suffix
        self.eos_token_id = eos

    def __call__(self, text: Any, add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
        if isinstance(text, list):
            return {"input_ids": [self(t, add_special_tokens)["input_ids"] for t in text]}
        ids = [ord(letter) for letter in text]
        return {"input_ids": [*self.prefix, *ids, *self.suffix] if add_special_tokens else ids}

    def decode(self, tokens: Any) -> str:
        """The letters; what stands around a text as ^ and $."""
        return "".join({0: "^", 1: "^", 2: "$", 3: "$"}.get(int(t), chr(int(t))) for t in tokens)
