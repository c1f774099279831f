"""What `verify` and `export` find in a run that was altered, or of which parts are gone."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedforward.messages.entry import Entry
from fedforward.messages.report import ClientResult
from fedforward.training import replay
from tests.support.command_line import command, write_config
from tests.support.forgery import altered

#: Rounds; clients prove their state in the first and the eleventh.
ROUNDS = 12
METHODS = {
    "auto": ["run.evaluate_every=6"],
    "decomfl": ["method.name=decomfl", "method.learning_rate=1e-3", "server.momentum=0.5"],
    "zorba": ["method.name=zorba", "planning.active=[2,3]", "federation.weights=equal"],
    "fedkseed-pro": ["method.name=fedkseed-pro", "method.candidates=9"],
    "feedsign": ["method.name=feedsign", "method.learning_rate=1e-3"],
    "cosine": ["method.learning_rate=1e-3", "method.schedule=cosine", "method.client_rates=random"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that gives the folder of a finished run, which tests copy."""
    made: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            options = [f"federation.rounds={ROUNDS}", *METHODS[name]]
            config = write_config(folder)
            assert command("run", config, *options, "--out", folder / "run").code == 0
            made[name] = folder / "run"
        return made[name]

    return run


def summarised(run: Path, chain: bytes) -> None:
    """The summary says what the altered ledger says."""
    content = json.loads((run / "summary.json").read_text("utf-8"))
    content["ledger_digest"] = chain.hex()
    (run / "summary.json").write_text(json.dumps(content), encoding="utf-8")


def test_rounds_are_replayed_on_all_cores(
    runs: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No bit depends on them, and what computes afterwards has as many threads as before."""
    import torch

    seen: list[int] = []
    run = replay.RoundReplay.run

    def watched(self: replay.RoundReplay, *arguments: Any) -> None:
        seen.append(torch.get_num_threads())
        run(self, *arguments)

    monkeypatch.setattr(replay.RoundReplay, "run", watched)
    digests = []
    for cores in (1, 3):
        monkeypatch.setattr("fedforward.training.build.usable_cores", lambda cores=cores: cores)
        proof = replay.verify(runs("decomfl"))
        assert proof.ok and torch.get_num_threads() == 1
        digests.append(proof.state_digest)
    assert seen == [1, 3] and len(set(digests)) == 1


def first(change: Callable[[ClientResult], ClientResult]) -> Any:
    """A change of the first client's result."""
    return lambda parts: [change(parts[0]), *parts[1:]]


def gradient(part: ClientResult) -> ClientResult:
    if not len(part.report.gradients):
        votes = bytes([part.report.payload[0] ^ 1])
        return replace(part, report=replace(part.report, payload=votes))
    numbers = part.report.gradients.copy()
    numbers[0] += 0.25
    return replace(part, report=replace(part.report, gradients=numbers))


def coefficient(entry: Entry) -> Entry:
    if not entry.contributions:
        return replace(entry, payload=entry.payload[:-1] + bytes([entry.payload[-1] ^ 1]))
    part, *rest = entry.contributions
    return replace(
        entry, contributions=(replace(part, coefficients=part.coefficients * np.float32(2)), *rest)
    )


CHANGES: dict[str, dict[str, Any]] = {
    "gradient": {"results": first(gradient)},
    "weight": {"results": first(lambda part: replace(part, weight=part.weight * 1.5))},
    "rate": {"results": first(lambda part: replace(part, learning_rate=part.learning_rate * 2))},
    "entry": {"entry": coefficient},
    "clients": {"results": lambda parts: parts[:1]},
    "twice": {"results": lambda parts: [parts[0], parts[0]]},
    "none": {"results": lambda parts: []},
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", METHODS)
def test_the_altered_round_is_named(
    runs: Callable[[str], Path], tmp_path: Path, name: str, change: str
) -> None:
    """A round, the chain, the head and the summary are altered together."""
    run = Path(shutil.copytree(runs(name), tmp_path / "run"))
    summarised(run, altered(run / "ledger.sqlite", 4, **CHANGES[change]))
    (run / "metrics.jsonl").unlink()
    differences = replay.verify(run).differences
    assert differences[0].startswith("round 4: "), differences
    command("export", run, "--out", tmp_path / "out").refused("round 4: ")


@pytest.mark.parametrize("name", METHODS)
def test_all_of_an_honest_run_is_made_again(runs: Callable[[str], Path], name: str) -> None:
    found = replay.verify(runs(name))
    assert found.differences == [] and found.unchecked == []
    assert found.rounds == found.length == ROUNDS and found.proofs >= 2


def test_a_loss_that_was_altered_is_not_that_of_the_metrics(
    runs: Callable[[str], Path], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(runs("decomfl"), tmp_path / "run"))
    lower = first(lambda part: replace(part, report=replace(part.report, loss=0.125)))
    summarised(run, altered(run / "ledger.sqlite", 4, lower))
    command("verify", run).refused("metrics.jsonl has training_loss", "after 5 rounds")


def test_what_cannot_be_made_again_is_said(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    options = ["method.name=fedavg", "method.learning_rate=0.1", "federation.rounds=3"]
    assert command("run", config, *options, "--out", tmp_path / "a").code == 0
    said = command("verify", tmp_path / "a").out
    assert "not made again from the reports: entries, whose reports are not kept whole" in said
    for number in (2, 3):
        assert command("verify", tmp_path / "a", "--round", number).code == 0
    command("verify", tmp_path / "a", "--round", 1).refused("state-1.bin", "last two states")
    options = ["method.client_rates=loss", "method.learning_rate=1e-3"]
    assert command("run", config, *options, "--out", tmp_path / "b").code == 0
    assert "learning rates, which depend on who was asked" in command("verify", tmp_path / "b").out


# Copies of which parts are gone.


@pytest.mark.parametrize("keep", [("ledger.head",), ("metrics.jsonl",), ("summary.json",)])
def test_a_shorter_ledger_is_refused_everywhere(
    runs: Callable[[str], Path], tmp_path: Path, keep: tuple[str, ...]
) -> None:
    """The ledger of an earlier moment, beside any one file that knows of more rounds."""
    source = runs("decomfl")
    run = Path(shutil.copytree(source, tmp_path / "run"))
    cut(run / "ledger.sqlite", 5)
    for name in ("ledger.head", "metrics.jsonl", "summary.json"):
        if name not in keep:
            (run / name).unlink(missing_ok=True)
    words = (f"of {ROUNDS}", "rounds are missing", "Copy the whole folder again", "ledger.sqlite")
    command("verify", run).refused(*words)
    command("export", run, "--out", tmp_path / "out").refused(*words)
    options = [f"federation.rounds={ROUNDS}", *METHODS["decomfl"]]
    again = ["run", source.parent / "c.toml", *options, "--out", run, "--resume"]
    command(*again).refused(*words)
    # Whoever has no other copy goes on from what is left.
    (run / keep[0]).unlink()
    assert command(*again).code == 0
    whole, made = (json.loads((r / "summary.json").read_text("utf-8")) for r in (source, run))
    assert (whole["ledger_digest"], whole["state_digest"]) == (
        made["ledger_digest"],
        made["state_digest"],
    )


def cut(ledger: Path, rounds: int) -> None:
    import sqlite3

    database = sqlite3.connect(ledger)
    database.execute("DROP TRIGGER rounds_stay")
    database.execute("DELETE FROM rounds WHERE round >= ?", (rounds,))
    database.commit()
    database.close()


def test_the_main_file_of_a_killed_run_has_all_rounds(
    runs: Callable[[str], Path], tmp_path: Path
) -> None:
    """What a copy of `ledger.sqlite` alone is worth: everything, or a sentence."""
    run = tmp_path / "run"
    run.mkdir()
    for name in ("ledger.sqlite", "config.toml", "plan.json"):
        shutil.copy(runs("decomfl") / name, run)
    assert replay.verify(run).rounds == ROUNDS


# Reading alone.


def test_verify_and_export_leave_a_run_as_it_was(
    runs: Callable[[str], Path], tmp_path: Path
) -> None:
    run = runs("decomfl")
    before = {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in run.rglob("*") if f.is_file()}
    for file in (run, *run.rglob("*")):
        file.chmod(0o555 if file.is_dir() else 0o444)
    assert command("verify", run).code == 0
    assert command("export", run, "--out", tmp_path / "out").code == 0
    after = {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in run.rglob("*") if f.is_file()}
    for file in (run, *run.rglob("*")):
        file.chmod(0o755 if file.is_dir() else 0o644)
    assert after == before


# Earlier rounds.


def test_an_earlier_round(runs: Callable[[str], Path], tmp_path: Path) -> None:
    run = runs("decomfl")
    states = [replay.verify(run, rounds=number) for number in range(ROUNDS + 1)]
    assert [found.rounds for found in states] == [*range(ROUNDS + 1)]
    assert all(not found.differences and found.length == ROUNDS for found in states)
    assert len({found.state_digest for found in states}) == ROUNDS + 1
    # After ten rounds clients have proved their state, and after the last the summary has it.
    assert [found.proofs for found in states] == [1] * 10 + [2] * 3
    assert [found.recorded for found in states] == [False] * ROUNDS + [True]
    whole = replay.verify(run)
    assert whole == states[-1] and whole.ledger_digest != states[-2].ledger_digest
    said = command("verify", run, "--round", 10).out
    assert "10 rounds of 12" in said and states[10].state_digest in said
    for number in (0, 5):
        out = tmp_path / f"after-{number}"
        assert command("export", run, "--out", out, "--round", number).code == 0
    assert command("export", run, "--out", tmp_path / "last").code == 0
    files = [tmp_path / n / "adapter_model.safetensors" for n in ("after-0", "after-5", "last")]
    assert len({file.read_bytes() for file in files}) == 3


@pytest.mark.parametrize("number", [-1, ROUNDS + 1, 10**30])
def test_a_round_that_is_not_there(
    runs: Callable[[str], Path], tmp_path: Path, number: int
) -> None:
    run, words = runs("decomfl"), (f"--round {number}", "12 rounds", "from 0", "to 12")
    command("verify", run, "--round", number).refused(*words)
    command("export", run, "--out", tmp_path / "x", "--round", number).refused(*words)


def test_a_wrong_state_of_an_earlier_round_is_found(
    runs: Callable[[str], Path], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(runs("decomfl"), tmp_path / "run"))

    def lied(part: ClientResult) -> ClientResult:
        return replace(part, report=replace(part.report, digest=bytes(16)))

    altered(run / "ledger.sqlite", 10, lambda parts: [lied(part) for part in parts])
    assert replay.verify(run, rounds=9).differences == []
    (difference,) = replay.verify(run, rounds=10).differences
    assert difference.startswith("round 10: the clients' state was")
    assert difference.endswith("(they agreed up to round 0)")
