"""A preview shows what a run will see of its data."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedforward.training.data_preview import DataPreview, preview_data
from tests.support.command_line import command, write_config
from tests.support.corpora import write_rows

Configure = Any


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path)


@pytest.fixture
def found(configure: Configure, tmp_path: Path) -> DataPreview:
    rows: list[Any] = [
        {"text": f"it is {n}, " + "ten " * n, "good": n % 3 == 0, "ward": "ab"[n % 2]}
        for n in range(20)
    ]
    rows += [{"text": "none", "good": None, "ward": "a"}]
    config = configure(
        data__source=str(write_rows(tmp_path / "d.jsonl", rows)),
        data__prompt="{text}",
        data__answer=" {good}",
        data__heldout=2,
        federation__clients=2,
        federation__partition="by-field",
        federation__field="ward",
    )
    return preview_data(config, examples=3)


def test_all_rows_are_accounted_for(found: DataPreview) -> None:
    assert found.rows == (19, 2) and sum(found.clients) + found.heldout == 20
    dropped = found.tallies[0].dropped + found.tallies[1].dropped
    assert dropped == {"the answer is empty: {good} is null or empty": 1}
    assert sum(count for _, _, count in found.histogram()) == sum(found.clients)
    assert found.balanced_by == "ward"
    assert [sum(part.values()) for part in found.balance] == list(found.clients)
    assert all(len(part) == 1 for part in found.balance)


def test_shown_are_the_tokens_and_what_of_them_counts(found: DataPreview) -> None:
    assert [example.client for example in found.shown] == [0, 1, 0]
    for example in found.shown:
        assert sum(piece.tokens for piece in example.pieces) == example.tokens
        counted = [piece for piece in example.pieces if piece.counted]
        assert sum(piece.tokens for piece in counted) == example.counted
        assert "".join(piece.text for piece in counted) in (" true</s>", " false</s>")
        assert [piece.special for piece in example.pieces] == [False, False, True]
    json.dumps(found.as_json())


def test_a_histogram_of_one_length(found: DataPreview) -> None:
    import dataclasses

    import numpy as np

    same = dataclasses.replace(found, lengths=np.array([7, 7]))
    assert same.histogram() == [(7, 7, 2)]


@pytest.mark.parametrize("how", [("preview",), ("run", "--dry-run")])
def test_the_command_shows_it_and_writes_nothing(config: Path, how: tuple[str, ...]) -> None:
    before = sorted(config.parent.iterdir())
    result = command(how[0], config, *how[1:])
    assert result.code == 0
    for words in ("example 1, client 0", "«", "</s>", "held out", "tokens of training examples"):
        assert words in result.out
    assert sorted(config.parent.iterdir()) == before


def test_the_balance_of_labels(config: Path) -> None:
    words = 'data.label_words={"north" = " up", "south" = " down"}'
    rows = [{"q": str(n), "site": ("north", "south")[n % 3 == 0]} for n in range(12)]
    data = write_rows(config.parent / "labels.jsonl", rows)
    more = [f"data.source={data}", "data.prompt={q}", "data.answer={site}", words]
    result = command("preview", config, *more, "--json")
    content = json.loads(result.out)
    assert content["balanced_by"] == "answer"
    total: dict[str, int] = {}
    for part in content["balance"]:
        for label, count in part.items():
            total[label] = total.get(label, 0) + count
    assert sum(total.values()) == sum(content["examples"]["clients"])
    assert content["shown"][0]["answers"] == [" up", " down"]
    assert " up" in command("preview", config, *more).out


def test_what_a_run_would_refuse_is_refused(config: Path) -> None:
    command("preview", config, "data.prompt={gone}").refused("names the field {gone}")
    command("preview", config, "model.path=/nowhere").refused("model.path = '/nowhere'")
    command("preview", config.parent / "no.toml").refused("no such configuration file")
