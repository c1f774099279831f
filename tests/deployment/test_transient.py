"""What the operating system refuses for a moment ends nothing."""

import errno
import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from fedforward.deployment.state import CoordinatorState
from fedforward.deployment.supervisor import Child, Supervisor
from fedforward.deployment.transient import TransientErrors


def too_many(*arguments: Any, **options: Any) -> Any:
    raise OSError(errno.EMFILE, "Too many open files")


def test_each_error_is_noted_once_until_it_has_passed() -> None:
    said: list[str] = []
    errors = TransientErrors(said.append)

    def look(number: int) -> None:
        with errors.noted("x cannot be read"):
            if number:
                raise OSError(number, f"words {number}")

    for number in (1, 1, 2, 0, 2):
        look(number)
    assert said == [f"x cannot be read: words {n}; it is tried again" for n in (1, 2, 2)]
    with pytest.raises(ValueError, match="no error of the system"), errors.noted("x"):
        raise ValueError("no error of the system")


def test_a_process_that_cannot_be_looked_after_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with Supervisor() as supervisor:
        for name in ("one", "two"):
            supervisor.start(Child(name, command, tmp_path / name, {}, lambda line: None))
        with monkeypatch.context() as patched:
            patched.setattr(Path, "open", too_many)
            assert supervisor.keep() == supervisor.keep() == []
        assert supervisor.keep() == [] and all(child.running for child in supervisor.children)
    assert [r.message.partition(":")[0] for r in caplog.records] == [
        "one cannot be looked after",
        "two cannot be looked after",
    ]
    assert all(record.levelno == logging.WARNING for record in caplog.records)


def test_a_run_goes_on_where_its_status_cannot_be_written(
    world: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor its folder be looked at."""
    monkeypatch.setattr(CoordinatorState, "write_status", too_many)
    exists = Path.exists
    monkeypatch.setattr(
        Path, "exists", lambda path: too_many() if path.name == "stop" else exists(path)
    )
    summary = world().run()
    assert summary["rounds"] > 0
    said = [record.message for record in caplog.records if "Too many" in record.message]
    assert {words.partition(":")[0] for words in said} == {
        "status.json cannot be written",
        "the run's folder cannot be looked at",
    }
    assert len(said) == 2
