"""`fedforward status`, once and watched, of runs on this machine and of a server's folder."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedforward.cli import watching
from fedforward.training.folder_lock import FolderLock
from tests.support.command_line import command, write_config

SITE = {"label": "museum", "number": 0, "examples": 7, "present": True, "rounds": 1, "pending": "",
        "waiting": 0.0, "note": "", "name": "n"}  # fmt: skip
SERVER = {"state": "running", "what": "round 2", "error": "", "round": 1, "rounds": 3,
          "heldout_loss": 0.5, "sites": [SITE]}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("status")
    assert command("run", write_config(folder), "--out", folder / "run").code == 0
    return folder / "run"


def test_the_status_of_a_run_on_this_machine(run: Path) -> None:
    found = json.loads(command("status", run, "--json").out)
    assert (found["state"], found["round"], found["rounds"]) == ("finished", 2, 2)
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert found["heldout_loss"] == summary["heldout_loss"]["end"]
    result = command("status", run)
    assert result.code == 0 and result.out.startswith("finished: 2 of 2 rounds")
    assert f"{found['heldout_loss']:.3f}" in result.out


def test_who_holds_the_folder_says_whether_it_runs(run: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    (copy / "summary.json").unlink()
    lines = (copy / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[:2]), encoding="utf-8")
    assert watching.local_status(copy)["state"] == "not running"
    lock = FolderLock(copy, "--out")
    lock.acquire()
    try:
        found = watching.local_status(copy)
        assert found["state"] == "running" and found["round"] == 1
        assert found["seconds_left"] == pytest.approx(found["seconds"])
        (copy / "metrics.jsonl").unlink()
        assert watching.local_status(copy)["what"] == "measuring the base model"
    finally:
        lock.release()


def test_watching_prints_a_line_for_each_change(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "out_console", Console(width=100))
    states = [SERVER, SERVER, {**SERVER, "round": 2}, {**SERVER, "state": "finished", "round": 3}]
    left = iter(states)
    waited: list[float] = []
    watching.watch(lambda: next(left), sleep=waited.append)
    assert capsys.readouterr().out.splitlines() == [
        "running: round 1 of 3  held-out loss 0.500  1 of 1 sites connected  round 2",
        "running: round 2 of 3  held-out loss 0.500  1 of 1 sites connected  round 2",
        "finished: round 3 of 3  held-out loss 0.500  1 of 1 sites connected  round 2",
    ]
    assert len(waited) == 3
    left = iter(states)
    watching.watch(lambda: next(left), as_json=True, sleep=waited.append)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3]


def test_on_a_terminal_the_table_stays_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(watching, "out_console", Console(file=out, force_terminal=True, width=100))
    left: Any = iter([SERVER, {**SERVER, "state": "failed", "error": "it broke"}])
    watching.watch(lambda: next(left), sleep=lambda _: None)
    text = out.getvalue()
    assert "museum" in text and "error: it broke" in text
    # The cursor goes back up before the second table.
    assert "\x1b[1A" in text


def test_a_watched_run_that_is_over_ends_at_once(run: Path, tmp_path: Path) -> None:
    result = command("status", run, "--watch")
    assert result.code == 0 and result.out.startswith("finished: round 2 of 2  held-out loss")
    command("status", tmp_path, "--watch").refused("has no status")
    (tmp_path / "status.json").write_text("{}", encoding="utf-8")
    command("status", tmp_path, "--watch").refused("is damaged")
