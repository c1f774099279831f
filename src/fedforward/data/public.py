"""Text that anyone may see (`data.public`), for what is made of text before a run."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedforward.config.schema import Config
from fedforward.core.errors import FedForwardError
from fedforward.core.paths import hint, home
from fedforward.data.corpus import Corpus, CorpusReader
from fedforward.data.encoding import TextEncoder
from fedforward.data.examples import Example

#: Bytes of a plain text that are read for each token that is wanted.
_BYTES_PER_TOKEN = 16


def public_reader(config: Config) -> CorpusReader:
    """What reads `data.public` as rows, with the templates of the run.

    Raises:
        FedForwardError: a template cannot be read.
    """
    plain = {"weights": None, "subset": None, "split": "train", "limit": None, "example": None}
    data = config.data.model_copy(update={"source": config.data.public, **plain})
    return CorpusReader(
        data, config.evaluation, config.federation, config.run.seed, key="data.public"
    )


def public_examples(config: Config, tokenizer: Any, classes: Sequence[str]) -> list[Example]:
    """At most `data.public_rows` rows of `data.public`.

    A .txt file is cut into rows of `data.sequence_length` tokens, spread over its beginning. All
    of them count in the loss.

    Args:
        classes: of a sequence classifier; else empty.

    Raises:
        FedForwardError: there is no such source, or it cannot be read.
    """
    name = config.data.public
    if isinstance(name, str) and name.lower().endswith(".txt"):
        return [Example(text, 1) for text in _of_plain_text(config, name, tokenizer)]
    return public_reader(config).sample(tokenizer, classes, config.data.public_rows, "public")


def _of_plain_text(config: Config, name: str, tokenizer: Any) -> list[NDArray[np.int64]]:
    rows, length = config.data.public_rows, config.data.sequence_length
    file, given = home(name), f"data.public = {name!r}"
    if not file.is_file():
        raise FedForwardError(f"{given}: no such file.{hint(name)} Give a text that is there.")
    try:
        with file.open("rb") as opened:
            data = opened.read(_BYTES_PER_TOKEN * rows * length)
        text = data.decode("utf-8-sig", "strict" if len(data) == file.stat().st_size else "ignore")
    except (OSError, UnicodeDecodeError) as error:
        raise FedForwardError(f"{given} cannot be read: {error}. Give a UTF-8 text.") from error
    if not text.strip():
        raise FedForwardError(f"{given} is empty. Give a text.")
    (tokens,) = TextEncoder(tokenizer).texts([text])
    pieces = [tokens[begin : begin + length] for begin in range(0, len(tokens), length)]
    chosen = min(rows, len(pieces))
    return [pieces[number * len(pieces) // chosen] for number in range(chosen)]


def training_examples(corpus: Corpus, rows: int) -> list[Example]:
    """Some of all clients' training examples, spread evenly over them."""
    every = [
        (client, place) for client, part in enumerate(corpus.clients) for place in range(len(part))
    ]
    chosen = min(rows, len(every))
    picked = [every[number * len(every) // chosen] for number in range(chosen)]
    return [corpus.clients[client][place] for client, place in picked]
