"""`run.on_divergence = "rollback"`: what the ledger has of it, and that every party follows."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedforward.config.schema import Config
from fedforward.core.errors import MessageError
from fedforward.federation.client import Client, Replica
from fedforward.federation.ledger import Ledger
from fedforward.federation.round_maker import SLOWER
from fedforward.messages.entry import Contribution, Entry, remaining, takes_back
from fedforward.messages.task import Task
from fedforward.methods.fedmezo import FedMeZO
from fedforward.models.quadratic import Quadratic
from fedforward.training import loop as loops
from fedforward.training import metrics
from tests.support.command_line import command, write_config
from tests.support.forgery import altered
from tests.training.test_loop import Begun

ROUNDS = 12
#: After these rounds a run of these tests has diverged, whatever its losses are.
DIVERGED = (4, 9)
METHODS = {
    "fedmezo": ["method.learning_rate=0.3", "server.normalise=true"],
    "decomfl": ["method.name=decomfl", "method.learning_rate=0.3", "server.momentum=0.5"],
    "fedkseed-pro": ["method.name=fedkseed-pro", "method.candidates=9", "method.learning_rate=0.3"],
    "zorba": ["method.name=zorba", "planning.active=[2,3]", "method.learning_rate=0.3"],
}


@pytest.fixture(autouse=True)
def diverging(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(config: Config, lines: Sequence[dict[str, Any]]) -> str:
        return "diverged: it is a test" if lines[-1]["round"] in DIVERGED else ""

    monkeypatch.setattr(metrics, "_heldout_diverged", found)
    monkeypatch.setattr(metrics, "_training_diverged", lambda config, lines: "")


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]


def test_entries_that_are_taken_back() -> None:
    plain = [Entry(n, ()) for n in range(6)]
    whole = [*plain[:3], replace(plain[3], keeps=1), plain[4], replace(plain[5], keeps=5)]
    assert [entry.round for entry in remaining(whole)] == [0, 3, 4, 5]
    assert Entry.decode(whole[3].encode()) == whole[3]
    assert [takes_back(whole, rounds) for rounds in range(6)] == [
        False,
        False,
        True,
        True,
        *[False] * 2,
    ]
    for wrong in (replace(plain[3], keeps=4), replace(plain[3], keeps=1, payload=b"a")):
        with pytest.raises(MessageError, match="keeps"):
            Entry.decode(wrong.encode())


@pytest.mark.parametrize("name", METHODS)
def test_a_run_goes_back_and_on(name: str, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    options = [f"federation.rounds={ROUNDS}", *METHODS[name], "run.on_divergence=rollback"]
    ran = command("run", config, *options, "--out", tmp_path / "run")
    assert ran.code == 0
    lines = lines_of(tmp_path / "run")
    returns = [line for line in lines if "taken_back" in line]
    assert [line["round"] for line in returns] == [5, 10] and len(lines) == ROUNDS + 1
    for line in returns:
        number = line["round"] - 1 - line["taken_back"]
        # The state is that of the round to which it went back, bit for bit.
        assert line["heldout_loss"] == lines[number]["heldout_loss"]
    rated = [line for line in lines[1:] if line["learning_rates"]]
    if name != "fedmezo":
        rates = {next(iter(line["learning_rates"].values())) for line in rated}
        assert sorted(rates) == pytest.approx(sorted(0.3 * SLOWER**n for n in range(3)))
    # Replay goes back as well, also to what was taken back.
    first = returns[0]["round"]
    for rounds in ([], ["--round", first - 1], ["--round", first]):
        found = command("verify", tmp_path / "run", *rounds)
        assert found.code == 0, found
    assert command("report", tmp_path / "run").code == 0
    # Resuming a run that has ended changes nothing.
    before = (tmp_path / "run/ledger.sqlite").read_bytes()
    again = command("run", config, *options, "--out", tmp_path / "run", "--resume")
    assert again.code == 0 and (tmp_path / "run/ledger.sqlite").read_bytes() == before


@pytest.mark.parametrize("cut", [2, 5, 9])
def test_a_run_that_was_killed_ends_alike(cut: int, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    options = [*METHODS["decomfl"], "run.on_divergence=rollback"]
    assert (
        command(
            "run", config, *options, f"federation.rounds={ROUNDS}", "--out", tmp_path / "whole"
        ).code
        == 0
    )
    append = Ledger.append

    def killed(self: Ledger, record: Any) -> None:
        append(self, record)
        if self.length == cut:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ledger, "append", killed)
        command("run", config, *options, f"federation.rounds={ROUNDS}", "--out", tmp_path / "cut")
    resumed = command(
        "run",
        config,
        *options,
        f"federation.rounds={ROUNDS}",
        "--out",
        tmp_path / "cut",
        "--resume",
    )
    assert resumed.code == 0
    ends = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "cut")]
    for key in ("ledger_digest", "state_digest"):
        assert ends[0][key] == ends[1][key]


def test_a_run_that_has_stopped_goes_back_when_it_is_resumed(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    options = [*METHODS["decomfl"], f"federation.rounds={ROUNDS}", "--out", tmp_path / "run"]
    assert command("run", config, *options).code == 2
    assert command("run", config, *options, "--resume").code == 2
    found = command("run", config, *options, "run.on_divergence=rollback", "--resume")
    assert found.code == 0
    assert any("taken_back" in line for line in lines_of(tmp_path / "run"))


def test_a_run_that_ended_by_going_back_is_resumed(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    last = DIVERGED[0]
    options = [*METHODS["decomfl"], "run.on_divergence=rollback", "--out", tmp_path / "run"]
    assert command("run", config, *options, f"federation.rounds={last}").code == 0
    assert lines_of(tmp_path / "run")[-1]["round"] == last + 1
    before = (tmp_path / "run/ledger.sqlite").read_bytes()
    again = command("run", config, *options, f"federation.rounds={last}", "--resume")
    assert again.code == 0, again.error
    assert (tmp_path / "run/ledger.sqlite").read_bytes() == before
    found = command("run", config, *options, f"federation.rounds={last - 1}", "--resume")
    assert found.code == 2 and f"has {last} rounds already" in found.error


@pytest.mark.parametrize("wrong", [0, 5, 10**9, -1, "many", None])
def test_metrics_that_say_another_return_are_found(wrong: Any, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    options = [*METHODS["decomfl"], "run.on_divergence=rollback", "federation.rounds=6"]
    run = tmp_path / "run"
    assert command("run", config, *options, "--out", run).code == 0
    lines = lines_of(run)
    whole = (run / "metrics.jsonl").read_text()
    lines[5]["taken_back"] = wrong
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if wrong == 0:
        found = command("verify", run)
        assert found.code and "has taken_back 0 after 5 rounds" in found.error
        return
    # A line that no run writes is written again from the ledger.
    again = command("run", config, *options, "--out", run, "--resume")
    assert again.code == 0, again.error
    kept = [json.loads(line) for line in whole.splitlines()]
    for mine, there in zip(lines_of(run), kept, strict=True):
        assert mine.get("taken_back") == there.get("taken_back")
        assert mine["heldout_loss"] == there["heldout_loss"]


def test_methods_without_replay_say_so(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    found = command(
        "run", config, "method.name=fedavg", "method.learning_rate=1", "run.on_divergence=rollback"
    )
    assert found.code == 2 and "run.on_divergence = 'rollback'" in found.error


def test_verify_finds_a_return_that_no_server_makes(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    options = [*METHODS["decomfl"], f"federation.rounds={ROUNDS}", "run.on_divergence=rollback"]
    assert command("run", config, *options, "--out", tmp_path / "run").code == 0
    returns = [line["round"] - 1 for line in lines_of(tmp_path / "run") if "taken_back" in line]
    assert len(returns) > 1
    altered(
        tmp_path / "run/ledger.sqlite",
        returns[-1],
        entry=lambda entry: replace(entry, keeps=returns[-2]),
    )
    found = command("verify", tmp_path / "run")
    assert found.code and f"takes back round {returns[-2]}, which took others back" in found.error


def test_it_stops_after_so_many_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "MOST_RETURNS", 1)
    monkeypatch.setattr("tests.training.test_rollback.DIVERGED", (2, 4))
    begun = Begun(
        tmp_path,
        lambda rounds: 1.0,
        on_divergence="rollback",
        evaluate_every=1,
    )
    with pytest.raises(metrics.DivergenceError, match="went back 1 times"):
        begun.loop.run()


def test_a_replica_asks_for_all_rounds() -> None:
    replica = Replica(Quadratic([1.0], 10), FedMeZO(local_steps=2))  # type: ignore[arg-type]
    replica.catch_up([Entry(0, ()), Entry(1, ())])
    with pytest.raises(MessageError, match="all rounds from 0 on"):
        replica.catch_up([Entry(2, (), keeps=1)])
    replica.catch_up([Entry(0, ()), Entry(1, ()), Entry(2, (), keeps=1)])
    assert replica.rounds == 3


def test_a_replica_that_holds_more_than_a_snapshot_takes_it_where_the_rest_is_taken_back() -> None:
    def client() -> Client:
        replica = Replica(Quadratic([1.0], 10), FedMeZO(local_steps=2))  # type: ignore[arg-type]
        return Client(0, [], replica)  # type: ignore[arg-type]

    giver, late = client(), client()
    giver.replica.catch_up([steps(0), steps(1)])
    late.replica.catch_up([steps(number) for number in range(4)])
    entries = (steps(2), steps(3), Entry(4, (), keeps=2))
    late.sync(Task(5, 0, 0.0, True, entries, snapshot=giver.replica.snapshot().encode()))
    assert late.replica.rounds == 5 and late.replica.digest() == giver.replica.digest()


def steps(number: int) -> Entry:
    return Entry(number, (Contribution(0, np.array([0.5, 0.25], np.float32)),))
