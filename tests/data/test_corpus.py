"""From files to examples: what is trained on is what the file says."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedforward.config.sections import DataSection
from fedforward.core.batches import IGNORED
from fedforward.core.errors import FedForwardError
from fedforward.data.sampler import collate
from fedforward.data.tokenise import NO_ROOM
from tests.support.corpora import Letters, corpus, reader, texts, write_rows

QA: dict[str, Any] = {"prompt": "{q}:", "answer": "{a}"}


def answers(path: Path, **data: Any) -> list[str]:
    made = corpus(path, Letters(eos=None), **{"prompt": "{q}:", "answer": "{a}", **data})
    return sorted(answer for _, answer in texts(made, Letters(eos=None)))


def test_numbers_keep_their_text_in_every_row(tmp_path: Path) -> None:
    for written in (
        ["5", "4.5", "null"],
        ["100000000000000000000", "7", "1e2"],
        ['"00004"', "3.10", "true"],
    ):
        lines = [f'{{"q": "{n}", "a": {value}}}' for n, value in enumerate(written)]
        found = answers(write_rows(tmp_path / "d.jsonl", lines))
        assert found == sorted(value.strip('"') for value in written if value != "null")
    path = tmp_path / "d.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("q", "a"), *enumerate(["00004", "NA", "None", "", "5"])])
    assert answers(path) == sorted(["00004", "NA", "None", "5"])


def test_fields_that_no_template_names_are_not_looked_at(tmp_path: Path) -> None:
    rows: list[Any] = [{"q": str(n), "a": "x", "meta": None} for n in range(5)]
    rows += [{"q": "5", "a": "y", "meta": {"deep": [1]}}, '{"q": "6", "a": "z", "m": 1, "m": 2}']
    assert len(answers(write_rows(tmp_path / "d.jsonl", rows))) == 7


def test_templates_reach_into_rows(tmp_path: Path) -> None:
    rows = [{"q": "a", "a": {"text": ["x"]}}, {"q": "b", "a": {"text": ["y", "z"]}}]
    path = write_rows(tmp_path / "d.jsonl", rows)
    assert answers(path, answer="{a.text[0]}") == ["x", "y"]
    assert answers(path, answer="{words[-1]}", fields={"words[-1]": "a.text[-1]"}) == ["x", "z"]
    with pytest.raises(FedForwardError, match=r"line 1 of .*the field a holds an object"):
        answers(path)
    with pytest.raises(FedForwardError, match=r"line 1 of .*\{a\.text\[1\]\} asks for item 1"):
        answers(path, answer="{a.text[1]}")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": "{question}"}, "data.prompt names the field {question}, which the data do not"),
        ({"prompt": "{0}"}, "the field {0}, which the data do not have. Their fields are q, a, s"),
        ({"answer": "{q.x.y}"}, "line 1 of"),
        ({"fields": {"q": "Q"}}, "data.fields: q = 'Q' is not a field of"),
        ({"federation": {"partition": "by-field", "field": "site"}}, "federation.field = 'site'"),
        ({"heldout": 2.5}, "data.heldout = 2.5 is neither a share below 1"),
        ({"heldout": 9}, "keeps 9 examples for evaluation, but the data have only 2"),
    ],
)
def test_keys_that_do_not_fit_the_data(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = write_rows(tmp_path / "d.jsonl", [{"q": "a", "a": "b", "s": "c"}] * 2)
    with pytest.raises(FedForwardError) as caught:
        corpus(path, Letters(), **(QA | changes))
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["d.jsonl", "d.parquet"])
@pytest.mark.parametrize("limit", [None, 3])
def test_all_fields_are_listed_where_one_is_missing(
    tmp_path: Path, name: str, limit: int | None
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"q": str(n), "a": "x", "site": "s"} for n in range(9)]
    path = tmp_path / name
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        write_rows(path, rows)
    with pytest.raises(FedForwardError, match=r"\{question\}.* Their fields are q, a, site\."):
        corpus(path, Letters(), prompt="{question}", answer="{a}", limit=limit)


def test_lines_that_are_not_drawn_are_not_looked_at(tmp_path: Path) -> None:
    rows: list[Any] = [{"q": str(n), "a": "x"} for n in range(30)] + ["no JSON"] * 3
    path = write_rows(tmp_path / "d.jsonl", rows)
    drawn = reader(path, **QA, limit=2, seed=1).rows.table
    assert len(drawn) == 2
    # A field that only other rows have is no mistake.
    rows = [{"q": str(n), "a": "x"} for n in range(30)] + [{"q": "z", "a": "y", "hint": "h"}]
    path = write_rows(tmp_path / "e.jsonl", rows)
    assert len(reader(path, prompt="{q}{hint}", answer="{a}", limit=2, seed=1).rows.table) == 2


@pytest.mark.parametrize(
    "changes",
    [{"prompt": "{meta.titel}"}, {"fields": {"q": "meta.nope"}, "prompt": "{q}"}],
)
def test_a_misspelt_path_is_no_hole(tmp_path: Path, changes: dict[str, Any]) -> None:
    rows = [{"q": str(n), "a": "x", "meta": {"title": "T"}} for n in range(4)]
    with pytest.raises(FedForwardError, match=r"titel\}|meta\.nope"):
        corpus(write_rows(tmp_path / "d.jsonl", rows), Letters(), **(QA | changes))


def test_files_of_one_source_have_the_same_fields(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "a.csv").write_text("q,a\n1,2\n3,4\n", encoding="utf-8")
    (shards / "b.csv").write_text("Q,a\n1,2\n3,4\n", encoding="utf-8")
    with pytest.raises(FedForwardError, match=r"b\.csv has no field 'q', and other files have it"):
        corpus(shards, Letters(), **QA)
    for name in ("a", "b"):
        (shards / f"{name}.csv").unlink()
        write_rows(shards / f"{name}.jsonl", [{"q" if name == "a" else "Q": "1", "a": "2"}] * 2)
    (shards / "notes.bz2").write_text("x", encoding="utf-8")
    corpus(shards, Letters(), **QA)
    assert "b.jsonl has no field 'q' in any row" in caplog.text
    assert "1 others in it are not read: notes.bz2" in caplog.text
    (shards / "a.jsonl.gz").write_bytes(b"")
    with pytest.raises(FedForwardError, match=r"has a\.jsonl twice, once compressed"):
        corpus(shards, Letters(), **QA)
    with pytest.raises(FedForwardError, match=r"takes in a\.jsonl twice"):
        corpus([str(shards / "a.jsonl"), f"{shards}/./a.jsonl"], Letters(), **QA)


def test_the_default_template_takes_an_input(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Translate", "input": "Bonjour", "output": "Hello"},
        {"instruction": "Greet", "output": "Hi"},
    ]
    for kept, shown in (
        (rows[:1] * 2, "\n\n### Input:\nBonjour\n\n"),
        (rows[1:] * 2, "Greet\n\n##"),
    ):
        made = corpus(write_rows(tmp_path / "d.jsonl", kept), Letters())
        assert shown in texts(made, Letters())[0][0]


def test_optional_answers(tmp_path: Path) -> None:
    rows = [{"q": str(n), "a": a} for n, a in enumerate(["x", None, "y"])]
    path = write_rows(tmp_path / "d.jsonl", rows)
    assert answers(path, answer="{^a}none{/a}{a}") == ["none", "x", "y"]
    assert answers(path, answer="{?a}{q}{/a}") == ["0", "2"]


def test_weights_have_an_end_and_keep_the_limit(tmp_path: Path) -> None:
    one = write_rows(tmp_path / "a.jsonl", [{"q": str(n), "a": "a"} for n in range(30)])
    two = write_rows(tmp_path / "b.jsonl", [{"q": str(n), "a": "b"} for n in range(30)])
    sources = [str(one), str(two)]
    made = corpus(sources, Letters(), 1, **QA, weights=[1.0, 9.0], limit=8)
    assert sum(map(len, made.clients)) + len(made.heldout) == 8
    with pytest.raises(FedForwardError, match=r"would repeat the rows of a source 1\.03e"):
        corpus(sources, Letters(), **QA, weights=[1e30, 1.0])


def test_fields_hold_for_the_evaluation_as_well(tmp_path: Path) -> None:
    rows = [{"question": str(n), "a": "x"} for n in range(4)]
    path = write_rows(tmp_path / "d.jsonl", rows)
    for held in (rows, [{"q": "7", "a": "x"}]):
        other = write_rows(tmp_path / "held.jsonl", held)
        evaluation = {"source": str(other)}
        made = corpus(path, Letters(), **QA, fields={"q": "question"}, evaluation=evaluation)
        assert len(made.heldout) == len(held)


def test_a_wrong_separator_is_guessed(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("q;a\n1;2\n3;4\n", encoding="utf-8")
    with pytest.raises(FedForwardError, match=r"Their fields are q;a\. Cells of a \.csv file are"):
        answers(tmp_path / "d.csv")


def test_a_field_may_be_there_in_later_rows_only(tmp_path: Path) -> None:
    rows = [{"q": "a", "a": "b"}, {"q": "c", "a": "d", "hint": "e"}]
    path = write_rows(tmp_path / "d.jsonl", rows)
    made = corpus(path, Letters(eos=None), prompt="{q}{?hint}({hint}){/hint}", answer="{a}")
    assert sorted(texts(made, Letters())) == [("a", "b"), ("c(e)", "d")]


@pytest.mark.parametrize("prefix", [(), (1,), (0, 1)])
def test_only_the_answer_and_the_end_count(tmp_path: Path, prefix: tuple[int, ...]) -> None:
    path = write_rows(tmp_path / "d.jsonl", [{"q": "ab", "a": "xyz"}] * 2)
    made = corpus(path, Letters(prefix), **(QA | {"prompt": "{q}"}))
    (example,) = made.clients[0]
    assert example.tokens.tolist() == [*prefix, *map(ord, "abxyz"), 2]
    labels = collate([example]).labels[0]
    assert labels[labels != IGNORED].tolist() == [*map(ord, "xyz"), 2]
    assert (labels[: len(prefix) + 2] == IGNORED).all()


def test_an_end_that_is_there_is_not_doubled(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", [{"q": "\1ab", "a": "xyz\2"}] * 2)
    (example,) = corpus(path, Letters((1,)), **QA).clients[0]
    assert example.tokens.tolist() == [1, *map(ord, "ab:xyz"), 2]


def test_an_empty_prompt_leaves_the_first_token_out(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", [{"q": "", "a": "xyz"}] * 2)
    (example,) = corpus(path, Letters(), prompt="{q}", answer="{a}").clients[0]
    assert collate([example]).labels[0].tolist() == [IGNORED, ord("y"), ord("z"), 2]


def test_no_end_token_is_made_up(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", [{"q": "a", "a": "x"}] * 2)
    (example,) = corpus(path, Letters(eos=None), prompt="{q}", answer="{a}").clients[0]
    assert example.tokens.tolist() == [ord("a"), ord("x")]


def test_what_is_cut_and_what_is_dropped_is_counted(tmp_path: Path) -> None:
    pairs = [("ab", "xy"), ("abcd", "xy"), ("abcde", "x"), ("ab", ""), ("a", "xyzxyz")]
    path = write_rows(tmp_path / "d.jsonl", [{"q": q, "a": a} for q, a in pairs])
    held = write_rows(tmp_path / "held.jsonl", [{"q": "a", "a": "b"}])
    made = corpus(
        path,
        Letters(),
        prompt="{q}",
        answer="{a}",
        sequence_length=5,
        evaluation={"source": str(held)},
    )
    # 2 + 2 + 1 fits; 4 + 2 + 1 is cut; 5 leaves no room; no answer; 1 + 6 + 1 is cut.
    assert made.cut == 2 and made.rows == (5, 1)
    assert made.train_tally.dropped == {
        NO_ROOM: 1,
        "the answer is empty: {a} is null or empty": 1,
    }
    assert [len(example.tokens) for example in made.clients[0]] == [5, 5, 5]


def test_what_stands_around_a_null_is_no_answer(tmp_path: Path) -> None:
    rows = [{"q": str(n), "a": a} for n, a in enumerate(["x", None, " ", "y", ""])]
    path = write_rows(tmp_path / "d.jsonl", rows)
    assert answers(path, answer=" is {a}.") == [" is x.", " is y."]
    assert answers(path, answer="yes") == ["yes"] * 5


def test_data_of_which_nothing_is_left_say_why(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", [{"q": "abc", "a": None}] * 4)
    with pytest.raises(FedForwardError, match=r"No held-out row is left: in 2 of 2 the ans"):
        corpus(path, Letters(), **(QA | {"heldout": 2}))
    path = write_rows(tmp_path / "d.jsonl", [{"q": "abc", "a": "x"}] * 4)
    with pytest.raises(FedForwardError, match=r"no room for an answer\. Raise data\.seq"):
        corpus(path, Letters(), **(QA | {"sequence_length": 3}))


@pytest.mark.parametrize("limit", [None, 7])
def test_a_limit_draws_from_the_same_order(tmp_path: Path, limit: int | None) -> None:
    """With a limit the rows are the first of the order that all rows have."""
    path = write_rows(tmp_path / "d.jsonl", [{"q": str(n), "a": "x"} for n in range(40)])
    made = reader(path, **QA, limit=limit, seed=3).rows
    drawn = [made.table[n].values["q"] for n in range(len(made.table))]
    order = reader(path, **QA, seed=3).rows.table
    assert drawn == [order[n].values["q"] for n in range(40)][:limit]
    assert list(map(int, drawn)) != sorted(map(int, drawn))
    assert made.table[0].where == f"line {int(drawn[0]) + 1} of {path}"


def counted(made: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for part in made.clients:
        for example in part:
            found[example.reference] = found.get(example.reference, 0) + 1
    return found


def test_sources_are_mixed_by_their_weights(tmp_path: Path) -> None:
    one = write_rows(tmp_path / "a.jsonl", [{"q": str(n), "a": "a"} for n in range(100)])
    two = write_rows(tmp_path / "b.jsonl", [{"q": str(n), "a": "b"} for n in range(21)])
    sources = [str(one), str(two)]
    plain = counted(corpus(sources, Letters(), 2, **QA))
    assert plain["a"] + plain["b"] == 120 and plain["b"] in (20, 21)
    mixed = counted(corpus(sources, Letters(), 2, **QA, weights=[1.0, 1.0]))
    assert mixed["a"] == plain["a"] and abs(mixed["b"] - mixed["a"]) <= 2
    limited = reader(sources, **QA, weights=[3.0, 1.0], limit=40).rows.table
    origins = limited.origins.tolist()
    assert (origins.count(0), origins.count(1)) == (30, 10)
    with pytest.raises(ValueError, match=r"weights = \[1.0\] has 1 numbers for 2 sources"):
        DataSection(source=sources, weights=[1.0])
    with pytest.raises(ValueError, match=r"source = \[\] is not allowed"):
        DataSection(source=[])


def test_the_same_rows_have_the_same_fingerprint_in_every_form(tmp_path: Path) -> None:
    rows = [{"q": str(n), "a": "xyz"[n % 3]} for n in range(20)]
    path = write_rows(tmp_path / "d.jsonl", rows)
    (tmp_path / "d.json").write_text(json.dumps(rows), encoding="utf-8")
    shards = tmp_path / "shards"
    shards.mkdir()
    for n in range(4):
        write_rows(shards / f"{n}.jsonl", rows[5 * n : 5 * n + 5])
    forms = (path, tmp_path / "d.json", shards)
    prints = {corpus(form, Letters(), 3, **QA).fingerprint() for form in forms}
    assert len(prints) == 1
    assert corpus(path, Letters((1,)), 3, **QA).fingerprint() not in prints
    assert corpus(path, Letters(), 3, **QA, seed=1).fingerprint() not in prints


def test_words_stand_for_the_text_of_the_file(tmp_path: Path) -> None:
    lines = ['{"q": "a", "a": true}', '{"q": "b", "a": false}', '{"q": "c", "a": null}']
    path = write_rows(tmp_path / "d.jsonl", [*lines, '{"q": "d", "a": true}'])
    words = {"true": "yes", "false": "no"}
    made = corpus(path, Letters(), **QA, label_words=words, seed=1)
    every = [*made.clients[0], *made.heldout]
    assert sorted(e.reference for e in every) == ["no", "yes", "yes"]
    assert made.dropped == 1
    for example in every:
        assert [len(choice) for choice in example.choices] == [5, 4]
        assert np.array_equal(example.choices[example.right], example.tokens)
        assert example.choice_prompts == (2, 2)
    with pytest.raises(
        FedForwardError, match=r"has no word for a = '(true|false)', which is in line \d"
    ):
        corpus(path, Letters(), **QA, label_words={"True": "yes", "False": "no"}, seed=1)
