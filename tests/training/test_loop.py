"""The loop of a run with a runner that only writes a ledger: what is written, and when it ends."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedforward.config.fields import AT_SITES
from fedforward.config.loading import validate
from fedforward.config.schema import Config
from fedforward.core.errors import UpdateNotFiniteError
from fedforward.federation.ledger import Ledger, Round
from fedforward.messages.entry import Contribution, Entry
from fedforward.messages.report import ClientResult, Report
from fedforward.training.loop import Loop
from fedforward.training.metrics import (
    Attendance,
    DivergenceError,
    RoundOutcome,
    Traffic,
    reason_to_stop,
    round_line,
)
from fedforward.training.run_directory import RunDirectory
from fedforward.training.summary import DeploymentSummary, Lines, MeanTraffic, mean_traffic

ROUNDS = 5


def configured(rate: float | str = 1e-3, batch_size: int = 16, **run: Any) -> Config:
    return validate(
        {
            "model": {"path": AT_SITES},
            "data": {"source": AT_SITES, "prompt": "{a}", "answer": "{b}"},
            "federation": {"clients": 1, "rounds": ROUNDS},
            "method": {"local_steps": 1, "learning_rate": rate, "batch_size": batch_size},
            "run": {"evaluate_every": 2, **run},
        }
    )


def outcome(number: int, loss: float = 1.0) -> RoundOutcome:
    report = Report(number, 0, 3, loss, 0, np.array([1.0, 0.0], np.float32))
    entry = Entry(number, (Contribution(0, np.array([0.5], np.float32)),))
    record = Round(entry, (ClientResult(1.0, 1e-3, report),))
    return RoundOutcome(record, Traffic(10.0, 20.0), Attendance(2, 1, late=1))


class Runner:
    """One client that always reports the same; `losses` are the held-out ones by round."""

    def __init__(self, ledger: Ledger, losses: Callable[[int], float | None]) -> None:
        self.ledger = ledger
        self.losses = losses
        self.asked: list[int] = []
        self.restored: list[int] = []
        self.not_finite_after = ROUNDS

    def restore(self, rounds: int) -> Iterator[RoundOutcome]:
        for record in self.ledger.rounds(rounds):
            self.restored.append(record.entry.round)
            yield RoundOutcome(record)

    def run_round(self) -> RoundOutcome:
        if self.ledger.length == self.not_finite_after:
            raise UpdateNotFiniteError("no")
        found = outcome(self.ledger.length)
        self.ledger.append(found.record)
        return found

    def go_back(self, rounds: int) -> RoundOutcome:
        record = Round(Entry(self.ledger.length, (), keeps=rounds), ())
        self.ledger.append(record)
        return RoundOutcome(record)

    def evaluate(self, rounds: int) -> dict[str, Any]:
        self.asked.append(rounds)
        loss = self.losses(rounds)
        return {} if loss is None else {"heldout_loss": loss}

    def finish(self, lines: Lines) -> DeploymentSummary:
        return DeploymentSummary({"a": 3}, 1, mean_traffic(lines), "ab")


class Begun:
    """A run directory with a ledger, and the loop on it."""

    def __init__(self, folder: Path, losses: Callable[[int], float | None], **run: Any) -> None:
        self.directory = RunDirectory(folder)
        path = self.directory.ledger
        self.ledger = Ledger(path) if path.is_file() else Ledger.create(path, {})
        self.runner = Runner(self.ledger, losses)
        self.shown: list[int] = []
        self.loop = Loop(
            configured(**run),
            self.directory,
            self.ledger,
            self.runner,
            progress=lambda done, total, line: self.shown.append(done),
        )

    def lines(self) -> list[dict[str, Any]]:
        text = self.directory.metrics.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]


def falling(rounds: int) -> float:
    return 2.0 - 0.1 * rounds


def test_lines_and_summary(tmp_path: Path) -> None:
    begun = Begun(tmp_path, falling)
    summary = begun.loop.run()
    assert begun.runner.asked == [0, 2, 4, 5] and begun.shown == [1, 2, 3, 4, 5]
    lines = begun.lines()
    assert [line["round"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert lines[1]["bytes"] == {"up": 10.0, "down": 20.0}
    assert lines[1]["clients"] == {"asked": 2, "reported": 1, "late": 1}
    assert lines[1]["zero_gradients"] == 0.5 and "heldout_loss" not in lines[1]
    content = json.loads(begun.directory.summary.read_text(encoding="utf-8"))
    assert content == summary.to_json()
    assert content["heldout_loss"] == {"start": 2.0, "end": 1.5, "lowest": 1.5}
    assert content["message_bytes"] == {"up": 10.0, "down": 20.0}
    assert content["stopped"] is None and content["state_digest"] == "ab"
    # What only a simulation has is not there.
    assert not {"simulation", "deployment", "example", "peak_memory_bytes"} & content.keys()


@pytest.mark.parametrize("kept", range(ROUNDS + 1))
def test_lost_lines_are_written_again(tmp_path: Path, kept: int) -> None:
    whole = Begun(tmp_path, falling)
    whole.loop.run()
    before = whole.lines()
    raw = whole.directory.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    cut = "".join(raw[: kept + 1]) + '{"round": 9, "tra'
    whole.directory.metrics.write_text(cut, encoding="utf-8")
    again = Begun(tmp_path, falling)
    again.loop.run()
    assert again.runner.restored == list(range(kept, ROUNDS))
    known = {"round", "training_loss", "heldout_loss", "learning_rates"}
    for old, new in zip(before, again.lines(), strict=True):
        assert {k: v for k, v in old.items() if k in known} == {
            k: v for k, v in new.items() if k in known
        }


def test_an_evaluation_that_is_missing_is_made_up_for(tmp_path: Path) -> None:
    """Also that of the base model, which is asked for until it is there."""
    times = iter([None, None, 2.0])
    begun = Begun(tmp_path, lambda rounds: next(times) if rounds == 0 else None)
    begun.loop.run()
    assert begun.runner.asked == [0, 0, 0, 2, 4, 5, 5]
    assert "heldout_loss" not in begun.lines()[-1]
    again = Begun(tmp_path, falling)
    again.loop.run()
    assert again.runner.asked == [5] and again.lines()[-1]["heldout_loss"] == 1.5


def test_patience_ends_a_run(tmp_path: Path) -> None:
    begun = Begun(tmp_path, lambda rounds: 2.0, patience=1)
    summary = begun.loop.run()
    assert summary.rounds == 2 and str(summary.stopped).startswith("patience: 1 evaluations")


@pytest.mark.parametrize(
    ("losses", "not_finite_after", "words"),
    [
        (lambda rounds: 2.0 + rounds, ROUNDS, "the held-out loss is 4.000, from 2.000 after round"),
        (falling, 3, "the update of the next round was not finite after round 3. Lower method."),
        (lambda rounds: float("nan"), ROUNDS, "The loss of the base model itself is not a number"),
    ],
    ids=["rises", "not finite", "base"],
)
def test_divergence_is_one_sentence_after_the_results(
    tmp_path: Path, losses: Callable[[int], float], not_finite_after: int, words: str
) -> None:
    begun = Begun(tmp_path, losses)
    begun.runner.not_finite_after = not_finite_after
    with pytest.raises(DivergenceError) as error:
        begun.loop.run()
    assert words in str(error.value)
    content = json.loads(begun.directory.summary.read_text(encoding="utf-8"))
    assert content["stopped"].startswith("diverged") and content["rounds"] < ROUNDS
    assert begun.loop.summary is not None


def test_a_line_of_a_round_that_was_read_has_what_the_ledger_has() -> None:
    found = outcome(4, loss=float("inf"))
    line = round_line(RoundOutcome(found.record), 7.0)
    assert line == {
        "round": 5,
        "training_loss": None,
        "skipped_steps": 0,
        "zero_gradients": 0.5,
        "learning_rates": {0: 1e-3},
        "seconds": 7.0,
    }
    assert mean_traffic([line]) == MeanTraffic(None, None)


def lines_of(
    heldout: list[float | None], training: list[float | None] | None = None, skipped: int = 0
) -> list[dict[str, Any]]:
    """The base model's line with a loss of 2, and the lines of rounds."""
    lines: list[dict[str, Any]] = [{"round": 0, "heldout_loss": 2.0}]
    for number, loss in enumerate(heldout, 1):
        line: dict[str, Any] = {
            "round": number,
            "training_loss": training[number - 1] if training else 2.0,
            "skipped_steps": skipped,
            "learning_rates": {0: 1e-3},
        }
        lines.append(line if loss is None else line | {"heldout_loss": loss})
    return lines


NAN = float("nan")


@pytest.mark.parametrize(
    "lines",
    [
        lines_of([9.0]),
        lines_of([NAN]),
        lines_of([2.0, 2.0], [2.0, 9.0]),
        lines_of([None], [None], skipped=1),
    ],
    ids=["held-out", "not a number", "training", "no step"],
)
def test_a_bad_round_that_may_be_taken_back_is_no_divergence(lines: list[dict[str, Any]]) -> None:
    """With a number it is; where a rate is found, only three in a row are."""
    assert reason_to_stop(configured(), lines).startswith("diverged")
    auto = configured("auto")
    for _ in range(2):
        assert not reason_to_stop(auto, lines)
        lines = [*lines, lines[-1] | {"round": len(lines)}]
    assert reason_to_stop(auto, lines).startswith("diverged")


@pytest.mark.parametrize("rate", [1e-3, "auto"])
def test_few_hard_examples_are_no_divergence(rate: float | str) -> None:
    """Of rounds of four examples, the last four that were told must all have risen."""
    few = configured(rate, batch_size=4)
    hard = [2.0, 2.0, 2.0, 2.0, 3.5, 2.0, None, 3.5]
    for end in range(1, len(hard) + 1):
        assert not reason_to_stop(few, lines_of([None] * end, hard[:end]))
    worse = [2.0] * 4 + [9.0] * 6
    found = reason_to_stop(few, lines_of([None] * len(worse), worse))
    assert found == "diverged: the training loss is 9.000, from 2.000"


def test_evaluations_in_a_row_count_and_not_the_rounds_between() -> None:
    auto = configured("auto")
    assert not reason_to_stop(auto, lines_of([9.0, None, 9.0]))
    assert not reason_to_stop(auto, lines_of([9.0, 2.0, 9.0, 9.0]))
    assert reason_to_stop(auto, lines_of([9.0, 9.0, None, 9.0]))
    assert not reason_to_stop(auto, lines_of([9.0, 9.0, None, 1.9]))


def test_the_last_round_is_never_taken_back() -> None:
    auto = configured("auto")
    assert reason_to_stop(auto, lines_of([1.9] * (ROUNDS - 1) + [9.0])).startswith("diverged")
    assert not reason_to_stop(auto, lines_of([9.0] + [1.9] * (ROUNDS - 1)))
    # Nothing mends a base model.
    broken = [{"round": 0, "heldout_loss": NAN}, *lines_of([NAN])[1:]]
    assert reason_to_stop(auto, broken).startswith("diverged")
