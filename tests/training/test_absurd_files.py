"""Files of a run with absurd content: one sentence that names the file, and never a traceback."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedforward.core.errors import FedForwardError
from fedforward.federation.ledger import Ledger
from fedforward.training import metrics_lines
from fedforward.training.run_directory import RunDirectory
from tests.support.command_line import command, write_config

ABSURD: list[Any] = [
    None, -1, 0, True, "x", "", [], {}, [[]], 1.5, 1e300, float("inf"), 10**30, 10**400, "\ud800",
]  # fmt: skip
DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    assert command("run", write_config(folder), "--out", folder / "run").code == 0
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished / "run", tmp_path / "run"))


def places(content: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where values stand in JSON, the whole included."""
    yield place
    if isinstance(content, dict):
        for key, value in content.items():
            yield from places(value, (*place, key))


def put(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    """JSON with another value in one place."""
    if not place:
        return value
    return {**content, place[0]: put(content[place[0]], place[1:], value)}


def changed(raw: bytes, chance: random.Random) -> bytes:
    """A file with some bytes other, gone or between."""
    wrong, place = bytearray(raw), chance.randrange(len(raw))
    kind = chance.randrange(4)
    if kind == 0:
        wrong[place] ^= 1 << chance.randrange(8)
    elif kind == 1:
        wrong[place : place + 16] = bytes(16)
    elif kind == 2:
        del wrong[place:]
    else:
        wrong[place:place] = chance.randbytes(3)
    return bytes(wrong)


def read_all(run: Path) -> None:
    """What a command reads of a run before it builds a model, and of every round."""
    directory = RunDirectory(run)
    directory.load()
    ledger = Ledger(directory.ledger, read_only=True)
    directory.check_length(ledger.length)
    directory.compare_summary(ledger.length, {"state_digest": "", "ledger_digest": ""})
    list(ledger.rounds())
    ledger.close()


def test_every_absurd_value_of_json_is_a_sentence_at_most(finished: Path, run: Path) -> None:
    for name in ("plan.json", "summary.json", "environment.json", "ledger.head"):
        whole = json.loads((finished / "run" / name).read_text("utf-8"))
        for place in places(whole):
            for value in ABSURD:
                (run / name).write_text(json.dumps(put(whole, place, value)), encoding="utf-8")
                refused = ""
                try:
                    read_all(run)
                except FedForwardError as error:
                    refused = str(error)
                assert not refused or str(run) in refused, (name, place, value)
        shutil.copy(finished / "run" / name, run)


@pytest.mark.parametrize("name", ["ledger.sqlite", "plan.json", "ledger.head", "config.toml"])
def test_changed_bytes_are_a_sentence_at_most(finished: Path, run: Path, name: str) -> None:
    whole, chance = (finished / "run" / name).read_bytes(), random.Random(name)
    refused = 0
    for _ in range(400):
        (run / name).write_bytes(changed(whole, chance))
        try:
            read_all(run)
        except FedForwardError as error:
            assert str(run) in str(error), error
            refused += 1
    assert refused > 40


def test_a_line_of_metrics_is_whole_or_written_again(finished: Path) -> None:
    lines = (finished / "run/metrics.jsonl").read_text("utf-8").splitlines()
    for number, text in enumerate(lines):
        assert metrics_lines.read_line(text, number) is not None
        assert metrics_lines.read_line(text, number + 1) is None
        whole = json.loads(text)
        for place in places(whole):
            found = [
                metrics_lines.read_line(json.dumps(put(whole, place, value)), number)
                for value in ABSURD
            ]
            # No place takes a list.
            assert [found[ABSURD.index(value)] for value in ([], [[]])] == [None, None], place
    assert metrics_lines.read_line(DEEP, 0) is None


@pytest.mark.parametrize(
    ("line", "place", "value"),
    [
        (0, ("example",), None), (0, ("heldout_loss",), ""), (1, ("bytes", "up"), []),
        (1, ("bytes",), {"up": 1}), (2, ("learning_rates",), {"0": "x"}), (2, ("seconds",), None),
        (2, ("passes",), 10**400), (1, ("training_loss",), {}), (0, (), DEEP),
    ],
)  # fmt: skip
def test_a_run_goes_on_from_absurd_metrics(
    finished: Path, run: Path, line: int, place: tuple[str, ...], value: Any
) -> None:
    """The values are the ledger's, and those that were measured are measured again."""
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text("utf-8").splitlines()
    lines[line] = DEEP if value is DEEP else json.dumps(put(json.loads(lines[line]), place, value))
    metrics.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert command("verify", run).code == 0
    assert command("run", finished / "c.toml", "--out", run, "--resume").code == 0
    before, after = (
        [json.loads(text) for text in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
        for folder in (finished / "run", run)
    )
    for name in ("round", "training_loss", "heldout_loss", "learning_rates"):
        assert [entry.get(name) for entry in after] == [entry.get(name) for entry in before]


@pytest.mark.parametrize("text", ["", "[]", "7", "{}", '{"state": 1}', DEEP, "\0"])
def test_an_absurd_status_is_a_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "status.json").write_text(text, encoding="utf-8")
    for name in ("status", "stop"):
        command(name, tmp_path).refused(str(tmp_path / "status.json"), "writes it again")
    assert not (tmp_path / "stop").exists()


@pytest.mark.parametrize("classes", [7, "ab", [1], {"a": 1}])
def test_classes_of_another_kind_are_a_sentence(run: Path, classes: Any) -> None:
    import sqlite3

    from tests.support.forgery import rechained

    database = sqlite3.connect(run / "ledger.sqlite")
    header = json.loads(database.execute("SELECT content FROM header").fetchone()[0])
    database.execute("DROP TRIGGER header_kept")
    database.execute("UPDATE header SET content = ?", (json.dumps(header | {"classes": classes}),))
    rechained(database)
    database.close()
    (run / "ledger.head").unlink()
    command("verify", run).refused(str(run / "ledger.sqlite"), "classes", "from a copy")
