"""From files to batches: what is read, what is refused, which tokens count, who gets which rows."""

import gc
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedforward.core.batches import IGNORED
from fedforward.core.errors import FedForwardError
from fedforward.data import sources, templates
from fedforward.data.partition import partition
from fedforward.data.sampler import Batches, by_length, collate
from fedforward.data.templates import Example
from tests.support.command_line import MODEL

ROWS = [{"q": "größe?", "a": "1"}, {"q": "b, c", "a": "2"}]


@pytest.fixture
def left_open() -> Iterator[None]:
    """Close what the library's readers leave open before a later test is blamed for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


def written(path: Path) -> Path:
    import datasets

    if path.suffix == ".parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(str(path))
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    else:
        mark = "," if path.suffix == ".csv" else "\t"
        lines = [mark.join(f'"{row[name]}"' for name in ("q", "a")) for row in ROWS]
        path.write_text("\n".join([f"q{mark}a", *lines]) + "\n", encoding="utf-8")
    return path


# Brackets and a star are letters of a name here, where the library sees a pattern.
@pytest.mark.parametrize(
    "name", ["d.jsonl", "d.json", "d.csv", "d.tsv", "d.parquet", "D.JSONL", "d[1]*.jsonl"]
)
@pytest.mark.usefixtures("left_open")
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    lower = written(tmp_path / name.lower())
    data = sources.read(str(lower.rename(tmp_path / name)), key="data.source")
    assert [{key: str(row[key]) for key in row} for row in data] == ROWS


@pytest.mark.parametrize(
    ("name", "raw", "words"),
    [
        ("d.jsonl", b"", ["the file is empty"]),
        ("d.parquet", b"", ["the file is empty"]),
        ("d.jsonl", b" \n\t\n", ["the file is empty"]),
        ("d.jsonl", b"{}\n{}\n", ["holds no examples"]),
        ("d.csv", b"q,a\n", ["holds no examples"]),
        ("d.jsonl", b'{"q":1}\n\n{"q":\n', ["line 3 is not a JSON object", "one whole object"]),
        (
            "d.jsonl",
            b'{"q":"1"}\n{"q":"\xff"}\n',
            ["line 2 is not UTF-8", "Save the file as UTF-8"],
        ),
        ("d.csv", b"q,a\n1,2\n\xff,2\n", ["line 3 is not UTF-8"]),
        ("d.jsonl", b'{"q":"1"}\n["q"]\n', ["line 2 is an array"]),
        ("d.jsonl", b"3\n4\n", ["line 1 is a number"]),
        ("d.jsonl", b'{"q":"1"}\nnull\n"x"\n', ["line 2 is null"]),
        ("d.json", b'[{"q": 1},\n {"q": }]', ["line 2 is not JSON"]),
        ("d.csv", b"q,a\n1,2\n1,2,3,4\n", ["line 3", "Expected 2 fields", "saw 4"]),
        ("d.parquet", b"PAR1 no more", ["is not a readable parquet file"]),
        ("d.txt", b"text", ["the ending '.txt' is not known", ".jsonl"]),
    ],
)
@pytest.mark.usefixtures("left_open")
def test_files_that_are_refused(tmp_path: Path, name: str, raw: bytes, words: list[str]) -> None:
    path = tmp_path / name
    path.write_bytes(raw)
    with pytest.raises(FedForwardError) as caught:
        sources.read(str(path), key="data.source")
    for word in [f"data.source = {str(path)!r}", *words]:
        assert word in str(caught.value)


def test_a_path_is_no_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a [b] *"
    folder.mkdir()
    (folder / "d.jsonl").write_text('{"q": "1"}\n', encoding="utf-8")
    monkeypatch.chdir(folder)
    for source in ("d.jsonl", str(folder / "d.jsonl"), "../a [b] */d.jsonl"):
        assert len(sources.read(source, key="data.source")) == 1


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(FedForwardError, match="no such file"):
        sources.read(str(tmp_path / "gone.jsonl"), key="data.source")
    for folder in (tmp_path, tmp_path / "d.jsonl"):
        folder.mkdir(exist_ok=True)
        with pytest.raises(FedForwardError, match="is a folder"):
            sources.read(str(folder), key="data.source")


def test_reading_leaves_the_library_as_it_was(tmp_path: Path) -> None:
    import datasets

    before = datasets.logging.get_verbosity()
    with pytest.raises(FedForwardError):
        sources.read(str(tmp_path / "gone.jsonl"), key="data.source")
    sources.read(str(written(tmp_path / "d.jsonl")), key="data.source")
    assert datasets.logging.get_verbosity() == before


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{q", "expected '}'"),
        ("q}", "Single '}'"),
        ("{}", "a field needs a name"),
        ("{q:>d}", "only a name may stand between braces, as in {q}"),
        ("{q:}{q!r}", "only a name"),
        ("{q!r:{a}}", "only a name"),
        ("{0}", "the field {0}, which the data do not have. Their fields are q, a"),
        ("{q.x}", "the field {q.x}"),
        ("{question}", "the field {question}"),
    ],
)
def test_templates_that_are_refused(template: str, words: str) -> None:
    with pytest.raises(FedForwardError) as caught:
        templates.check_fields(template, ["q", "a"], "data.prompt")
    assert words in str(caught.value) and "data.prompt" in str(caught.value)


def test_templates_are_filled() -> None:
    row = {"q": "{a}", "a": None, "a b": 3, "x.y": [1]}
    template = "{{{q}}} {a}|{a b}|{x.y}"
    templates.check_fields(template, list(row), "data.prompt")
    assert templates.fields(template, "data.prompt") == ["q", "a", "a b", "x.y"]
    assert templates.fill(template, row) == "{{a}} |3|[1]"


class Letters:
    """A tokenizer with a token for each letter, which puts 1 before a text if `begins`."""

    eos_token_id: int | None = 2

    def __init__(self, begins: bool, eos: int | None = 2) -> None:
        self.begins = begins
        self.bos_token_id = 1
        self.eos_token_id = eos

    def __call__(self, text: Any, add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
        if isinstance(text, list):
            return {"input_ids": [self(t, add_special_tokens)["input_ids"] for t in text]}
        start = [1] if self.begins and add_special_tokens else []
        return {"input_ids": start + [ord(letter) for letter in text]}


def tokenised(rows: Sequence[tuple[str, str]], tokenizer: Any, length: int) -> Any:
    return templates.tokenise(
        [{"q": q, "a": a} for q, a in rows],
        tokenizer,
        prompt="{q}",
        answer="{a}",
        sequence_length=length,
    )


@pytest.mark.parametrize("begins", [False, True])
def test_only_the_answer_and_the_end_count(begins: bool) -> None:
    (example,) = tokenised([("ab", "xyz")], Letters(begins), 20).examples
    start = [1] if begins else []
    assert example.tokens.tolist() == [*start, *map(ord, "abxyz"), 2]
    labels = collate([example]).labels[0]
    assert labels[labels != IGNORED].tolist() == [*map(ord, "xyz"), 2]
    assert (labels[: len(start) + 2] == IGNORED).all()


def test_an_empty_prompt_leaves_the_first_token_out() -> None:
    (example,) = tokenised([("", "xyz")], Letters(False), 20).examples
    assert collate([example]).labels[0].tolist() == [IGNORED, ord("y"), ord("z"), 2]


def test_no_end_token_is_made_up() -> None:
    (example,) = tokenised([("a", "x")], Letters(False, eos=None), 20).examples
    assert example.tokens.tolist() == [ord("a"), ord("x")]


def test_what_is_cut_and_what_is_dropped_is_counted() -> None:
    rows = [("ab", "xy"), ("abcd", "xy"), ("abcde", "x"), ("ab", ""), ("a", "xyzxyz")]
    result = tokenised(rows, Letters(False), 5)
    # 2 + 2 + 1 fits; 4 + 2 + 1 is cut; 5 leaves no room; no answer; 1 + 6 + 1 is cut.
    assert (result.cut, result.dropped, result.rows) == (2, 2, [0, 1, 4])
    assert [len(example.tokens) for example in result.examples] == [5, 5, 5]
    assert tokenised([], Letters(False), 5).rows == []


def test_the_demonstration_tokenizer_round_trips() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(MODEL))
    (example,) = tokenised([("what is it?", " it is 3.")], tokenizer, 64).examples
    answer = tokenizer.decode(example.tokens[example.prompt_length :], skip_special_tokens=True)
    assert answer.strip() == "it is 3."
    assert example.tokens[-1] == tokenizer.eos_token_id


def numbered(count: int) -> list[Example]:
    return [Example(np.array([n, n + 1000], np.int64), 1) for n in range(count)]


def stream(count: int = 10, size: int = 3, seed: int = 5, client: int = 0) -> Batches:
    return Batches(numbered(count), batch_size=size, run_seed=seed, client=client)


def drawn(batches: Batches, steps: Sequence[int]) -> list[list[int]]:
    return [batches[step].tokens[:, 0].tolist() for step in steps]


def test_a_batch_is_a_function_of_the_step() -> None:
    steps = list(range(20))
    forwards = drawn(stream(), steps)
    assert drawn(stream(), steps[::-1]) == forwards[::-1]
    same = stream()
    assert drawn(same, [7, 0, 7, 19, 3]) == [forwards[step] for step in (7, 0, 7, 19, 3)]
    assert drawn(stream(client=1), steps) != forwards
    assert drawn(stream(seed=6), steps) != forwards


@given(count=st.integers(1, 12), size=st.integers(1, 15))
def test_every_epoch_sees_every_example_once(count: int, size: int) -> None:
    flat = [n for batch in drawn(stream(count, size), range(3 * count)) for n in batch]
    for begin in range(0, len(flat) - count + 1, count):
        assert sorted(flat[begin : begin + count]) == list(range(count))


def test_epochs_are_shuffled_anew() -> None:
    first, second = (drawn(stream(10, 10), [epoch])[0] for epoch in (0, 1))
    assert first != second


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_examples_of_a_batch_have_similar_lengths(epoch: int) -> None:
    """Most of the padding of a plain shuffle is gone, and the lengths of batches have no order."""
    random = np.random.default_rng(0)
    examples = [Example(np.full(length, 7), 1) for length in random.integers(20, 220, 203)]
    batches = Batches(examples, batch_size=4, run_seed=1, client=0)
    # Not a multiple of the batch size: later epochs begin within a batch.
    places = [step for step in range(160) if 203 * epoch <= 4 * step < 203 * (epoch + 1) - 4]
    drawn_batches = [batches[step] for step in places]
    padding = sum(int((b.labels == IGNORED).sum()) - 4 for b in drawn_batches)
    shuffled = [examples[n] for n in random.permutation(203)[:200]]
    lengths = np.array([len(e.tokens) for e in shuffled]).reshape(-1, 4)
    assert padding < 0.4 * (lengths.max(axis=1, keepdims=True) - lengths).sum()
    order = [b.tokens.shape[1] for b in drawn_batches]
    assert abs(np.corrcoef(order, range(len(order)))[0, 1]) < 0.4


def test_evaluation_batches_hold_every_example_once() -> None:
    examples = [Example(np.full(length, length, np.int64), 1) for length in (5, 2, 9, 3, 2)]
    batches = [collate(group) for group in by_length(examples, 2)]
    assert [batch.tokens.shape for batch in batches] == [(2, 2), (2, 5), (1, 9)]
    assert (batches[1].labels[0] != IGNORED).sum() == 2


def divided(values: Sequence[Any], clients: int, kind: str, seed: int = 1) -> list[list[int]]:
    return partition(values, clients, kind=kind, field="site", alpha=0.5, seed=seed)


SITES = [f"s{n % 6}" for n in range(60)]


@pytest.mark.parametrize(
    ("kind", "clients"), [("iid", 7), ("dirichlet", 4), ("by-field", 3), ("iid", 60)]
)
def test_every_index_goes_to_one_client(kind: str, clients: int) -> None:
    parts = divided(SITES, clients, kind)
    assert len(parts) == clients and all(parts)
    assert sorted(index for part in parts for index in part) == list(range(60))
    assert divided(SITES, clients, kind) == parts
    assert divided(SITES, clients, kind, seed=2) != parts


def test_by_keeps_a_site_together() -> None:
    owners: dict[str, set[int]] = {}
    for client, part in enumerate(divided(SITES, 3, "by-field")):
        for index in part:
            owners.setdefault(SITES[index], set()).add(client)
    assert sorted(map(len, owners.values())) == [1] * 6


def test_a_partition_that_cannot_be() -> None:
    with pytest.raises(FedForwardError, match=r"federation\.clients = 4, but only 3 training"):
        divided([0, 1, 2], 4, "iid")
    with pytest.raises(FedForwardError, match=r"Use federation\.clients = 1, 2, 3, 6, or another"):
        divided(SITES, 4, "by-field")
    with pytest.raises(FedForwardError, match=r"alpha = 0\.0001 left a client without examples"):
        partition(["a"] * 12, 12, kind="dirichlet", field="site", alpha=1e-4, seed=0)
