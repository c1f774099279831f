"""The page of a run that goes on: when it is written, and that it stops loading itself again."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedforward.core.errors import FedForwardError
from fedforward.reporting import live
from fedforward.reporting.live import LivePage, watch
from fedforward.reporting.page import make_page, waiting_page
from fedforward.reporting.record import read_run
from tests.support.command_line import command, write_config
from tests.support.pages import Page


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two rounds that has kept its page; tests copy it."""
    folder = tmp_path_factory.mktemp("live")
    result = command("run", write_config(folder), "--report", "--out", folder / "run")
    assert result.code == 0, result
    assert result.out.splitlines()[-1] == str(folder / "run/report.html")
    return folder / "run"


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def page_of(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


class Clock:
    """Seconds that pass only when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_run_with_report_ends_with_a_page_that_stays(run: Path) -> None:
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "finished" in text and not Page(text).reloads


def test_only_the_page_of_a_run_in_progress_loads_itself_again(copy: Path) -> None:
    assert not Page(make_page([read_run(copy)], reload_s=9)).reloads
    (copy / "summary.json").unlink()
    again = make_page([read_run(copy)], reload_s=9)
    assert Page(again).reloads and "every 9 seconds" in again
    assert not Page(make_page([read_run(copy)])).reloads
    metas = {meta.get("http-equiv"): meta.get("content") for meta in Page(again).metas}
    assert metas["refresh"] == "9"
    # Nothing else may be loaded, whatever the page holds.
    assert str(metas["Content-Security-Policy"]).startswith("default-src 'none'")
    assert Page(waiting_page()).reloads


def test_it_is_written_at_evaluations_and_not_all_the_time(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    drawn: list[float] = []

    def slow(*arguments: Any, **options: Any) -> str:
        drawn.append(clock.now)
        clock.now += 2.0
        return make_page(*arguments, **options)

    monkeypatch.setattr(live, "make_page", slow)
    page = LivePage(copy, copy / "report.html", clock)
    page.progress(1, 9, {"training_loss": 1.0})
    assert drawn == []
    page.progress(2, 9, {"heldout_loss": 1.0})
    assert drawn == [0.0]
    # It took 2 s, so the next may begin 10 s later.
    clock.now = 11.0
    page.progress(3, 9, {"heldout_loss": 1.0})
    assert drawn == [0.0]
    clock.now = 12.5
    page.progress(4, 9, {"heldout_loss": 1.0})
    assert drawn == [0.0, 12.5]
    assert page.write() and drawn == [0.0, 12.5, 14.5]


def test_a_page_that_cannot_be_written_does_not_end_the_run(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    page = LivePage(copy, Path("/proc/report.html"))
    page.progress(1, 2, {"heldout_loss": 1.0})
    page.progress(2, 2, {"heldout_loss": 1.0})
    assert len(caplog.records) == 1 and "The run goes on." in caplog.text
    (copy / "report.html").write_text("mine", encoding="utf-8")
    with pytest.raises(FedForwardError, match="is no report"):
        LivePage(copy, copy / "report.html")


def test_a_watched_run_is_drawn_when_it_has_something_new(copy: Path, tmp_path: Path) -> None:
    metrics, summary = copy / "metrics.jsonl", copy / "summary.json"
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    finished = summary.read_bytes()
    summary.unlink()
    metrics.write_text(lines[0][:20], encoding="utf-8")
    page = tmp_path / "page.html"
    steps = iter(range(20))
    seen: list[tuple[int, bool]] = []

    def sleep(seconds: float) -> None:
        step = next(steps)
        if step == 1:
            # The base model's line was not whole before.
            assert not page.exists()
            metrics.write_text(lines[0], encoding="utf-8")
        elif step == 5:
            metrics.write_text("".join(lines[:2]), encoding="utf-8")
        elif step == 9:
            metrics.write_text("".join(lines), encoding="utf-8")
            summary.write_bytes(finished)

    def told(records: Any, size: int) -> None:
        assert size == page.stat().st_size
        seen.append((records[0].rounds, page_of(page).reloads))

    assert watch([copy], page, told, sleep=sleep) == page.stat().st_size
    assert seen == [(0, True), (1, True), (2, False)]


def test_the_command_watches_until_the_run_is_finished(copy: Path, tmp_path: Path) -> None:
    page = tmp_path / "p.html"
    result = command("report", copy, "--watch", "--out", page, "--json")
    assert result.code == 0, result
    assert json.loads(result.out)["bytes"] == page.stat().st_size
    command("report", copy, "--watch", "--verify").refused("--watch and --verify exclude")
    command("report", tmp_path, "--watch").refused("is not a run directory")


def test_an_interrupted_run_leaves_a_page_that_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedforward.training.run import Run

    whole = Run.run_round

    def cut(self: Run) -> Any:
        if self.ledger.length == 1:
            raise KeyboardInterrupt
        return whole(self)

    monkeypatch.setattr(Run, "run_round", cut)
    result = command("run", write_config(tmp_path), "--report", "--out", tmp_path / "run")
    assert result.code == 130 and "--resume --report" in result.error
    text = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert "not finished: 1 of 2 rounds" in text and not Page(text).reloads
