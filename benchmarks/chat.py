"""Whether conversations have the tokens that `apply_chat_template` gives them, one by one.

    python benchmarks/chat.py --tokenizers FOLDER ... [--rows 300]

Conversations of one to five turns are made here, with and without a system message, with spaces at
their ends, code, quotes and other alphabets, in three of the forms that `data.chat` reads. For
every tokenizer with a chat template, the tokens of each example are compared with those of
transformers. The tokens that count are compared with the text between the two renderings around an
answer; white space before an answer may be in its first token.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import common
from common import Column, Reach, Row

from fedforward.config.method_sections import FederationSection
from fedforward.config.sections import DataSection, EvaluationSection
from fedforward.data.corpus import CorpusReader

COLUMNS = (
    Column("tokenizer", "tokenizer"),
    Column("form", "form"),
    Column("conversations", "conversations", ","),
    Column("tokens", "tokens", ","),
    Column("equal", "equal tokens, %", ".1f"),
    Column("counted_equal", "equal counted text, %", ".1f"),
)
ALL = Reach(">=", 100.0)
WORDS = [
    "sheep",
    "naïve",
    "“quoted”",
    "x = 3 * y",
    "日本語",
    "\n\n",
    "  two",
    "don't",
    "3.50",
    "<b>",
]


def said(random_: random.Random) -> str:
    """Something that somebody may say."""
    words = [*random_.choices(WORDS, k=random_.randint(0, 7)), "word"]
    random_.shuffle(words)
    return " ".join(words) + random_.choice(["", " ", "\n"])


def talk(random_: random.Random, turns: int, system: bool) -> list[dict[str, str]]:
    """Messages that end with an answer."""
    messages = [{"role": "system", "content": said(random_)}] if system else []
    for _ in range(turns):
        messages += [
            {"role": "user", "content": said(random_)},
            {"role": "assistant", "content": said(random_)},
        ]
    return messages


def row_of(messages: list[dict[str, str]], form: str) -> dict[str, Any]:
    """The messages as a row of a form."""
    if form == "messages":
        return {"messages": messages}
    if form == "conversations":
        names = {"user": "human", "assistant": "gpt", "system": "system"}
        return {
            "conversations": [{"from": names[m["role"]], "value": m["content"]} for m in messages]
        }
    return {"prompt": messages[:-1], "completion": messages[-1:]}


def measure(name: str, tokenizer: Any, form: str, count: int) -> Row:
    """Compare the examples of a form with transformers."""
    random_ = random.Random(f"{name} {form}")
    talks = [talk(random_, 1 + n % 5, n % 2 == 0) for n in range(count)]
    chat = "prompt-completion" if form == "prompt" else form
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "rows.jsonl"
        lines = [json.dumps(row_of(messages, form)) for messages in talks]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        data = DataSection(source=str(path), chat=chat, heldout=1, sequence_length=100_000)
        evaluation = EvaluationSection(source=str(path), limit=1)
        reader = CorpusReader(data, evaluation, FederationSection(clients=1), 0)
        corpus = reader.corpus(tokenizer, None)
    found = {}
    for example in corpus.clients[0]:
        counted = tokenizer.decode(example.tokens[example.counted])
        found.setdefault(tuple(example.tokens.tolist()), []).append(counted)
    equal = texts = tokens = 0
    for messages in talks:
        whole = tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
        tokens += len(whole)
        if tuple(whole) not in found:
            continue
        equal += 1
        full = tokenizer.apply_chat_template(messages, tokenize=False)
        begun = tokenizer.apply_chat_template(
            messages[:-1], tokenize=False, add_generation_prompt=True
        )
        wanted = full[len(begun) :]
        end = tokenizer.eos_token or ""
        cut = wanted.rfind(end)
        wanted = wanted[: cut + len(end)] if end and cut >= 0 else wanted
        texts += any(_is_answer(text, wanted) for text in found[tuple(whole)])
    return {
        "tokenizer": name,
        "form": form,
        "conversations": count,
        "tokens": tokens,
        "equal": 100 * equal / count,
        "counted_equal": 100 * texts / count,
        "reaches": {"equal": ALL, "counted_equal": ALL},
    }


def _is_answer(text: str, wanted: str) -> bool:
    """Whether the counted text is the answer; a first token may reach in from the prompt."""
    return text.endswith(wanted) and text[: len(text) - len(wanted)].strip() == ""


def main(arguments: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--tokenizers", nargs="+", required=True)
    parser.add_argument("--rows", type=int, default=300)
    given: argparse.Namespace = parser.parse_args(arguments)
    common.prepare(given)
    from transformers import AutoTokenizer

    found = []
    for folder in given.tokenizers:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if not tokenizer.chat_template:
            common.stop(f"{folder} has no chat template.")
        for form in ("messages", "conversations", "prompt"):
            found.append(
                measure(Path(folder).name, tokenizer, form, 10 if given.quick else given.rows)
            )
    common.finish(given, "chat", found, COLUMNS)


if __name__ == "__main__":
    main()
