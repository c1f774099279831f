"""What a terminal shows of a run: a bar for a long evaluation, and held-out figures by name."""

import errno
import io
import logging
import os
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from rich.console import Console

from fedforward.cli import console as shown
from fedforward.cli.tables import heldout_values, summary_table
from fedforward.core.logs import PHASES, PROGRESS


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function that makes standard error a terminal or a file, and returns what is written."""

    def make(live: bool) -> io.StringIO:
        text = io.StringIO()
        made = Console(file=text, force_terminal=live, width=100, color_system=None)
        monkeypatch.setattr(shown, "console", made)
        return text

    monkeypatch.setattr(logging.getLogger("fedforward"), "level", logging.WARNING)
    yield make


def evaluated(done: int, level: int = PROGRESS) -> None:
    how_far = {"done": done, "total": 40}
    PHASES.log(level, "evaluating choice: %d of 40 examples", done, extra=how_far)


def test_a_long_evaluation_has_a_bar_of_its_own(terminal: Any) -> None:
    terminal(True)
    with shown.display("evaluating the base model") as progress:
        (before,) = progress.rich.tasks
        evaluated(8, logging.INFO)
        _, bar = progress.rich.tasks
        assert (bar.description, bar.completed, bar.total) == ("evaluating choice", 8, 40)
        # The line of the run stays what it was.
        assert before.description == "evaluating the base model"
        evaluated(24)
        assert bar.completed == 24 and bar.percentage == 60
        evaluated(40)
        assert len(progress.rich.tasks) == 1


def test_elsewhere_it_is_a_line_now_and_then(terminal: Any) -> None:
    text = terminal(False)
    with shown.display() as progress:
        evaluated(8, logging.INFO)
        for done in (16, 24, 40):
            evaluated(done)
        assert len(progress.rich.tasks) == 1
    assert text.getvalue().split("\n") == ["evaluating choice: 8 of 40 examples", ""]


def test_what_is_optimised_comes_first() -> None:
    metrics = {"choice": 0.25, "accuracy": 0.9}
    assert heldout_values("choice", 3.0, metrics) == {
        "choice": "0.250",
        "loss": "3.000",
        "accuracy": "90.0 %",
    }
    assert list(heldout_values("loss", 3.0, metrics).items()) == [
        ("", "3.000"),
        ("choice", "0.250"),
        ("accuracy", "90.0 %"),
    ]


def test_a_summary_names_each_number_once() -> None:
    summary: dict[str, Any] = {
        "method": "fedmezo",
        "objective": "choice",
        "model": "a/b",
        "tuned_parameters": 10,
        "heldout_loss": {"start": 3.0, "end": 2.5, "lowest": 2.5},
        "metrics": {
            "choice": {"start": 0.8, "end": 0.4},
            "accuracy": {"start": 0.5, "end": 0.75},
        },
        "bytes_per_client_round": {"up": 1.0, "down": 1.0},
        "example": {"prompt": "p", "before": "b", "after": "a", "expected": None},
        "peak_memory_bytes": 1,
        "inference_memory_bytes": 1,
        "rounds": 1,
        "local_steps": 1,
        "clients": 1,
        "examples": [1],
        "seconds": 1.0,
        "catch_up": {"break_even_rounds": None},
        "absences": {},
        "skipped_steps": 0,
        "zero_gradients": 0,
        "changed_share": None,
        "answers_cut": 0,
        "rows_dropped": 0,
        "stopped": None,
    }
    text = io.StringIO()
    Console(file=text, width=120).print(summary_table(summary))
    lines = [" ".join(line.split()) for line in text.getvalue().splitlines()]
    assert lines[1:4] == [
        "held-out choice 0.800 before, 0.400 after (-50.0 %)",
        "held-out loss 3.000 before, 2.500 after (-16.7 %)",
        "accuracy 50.0 % before, 75.0 % after",
    ]


def test_what_may_pass_by_itself_has_an_exit_code_of_its_own(terminal: Any) -> None:
    """A service manager starts again what ended for that, and not what a user must mend."""
    text = terminal(False)
    for number, code in ((errno.ENOSPC, 75), (errno.EMFILE, 75), (errno.EACCES, 2)):
        with pytest.raises(typer.Exit) as ended, shown.friendly():
            raise OSError(number, os.strerror(number), "/some/path")
        assert ended.value.exit_code == code
        assert f"/some/path: {os.strerror(number)}." in text.getvalue()
