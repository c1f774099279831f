"""One process at a time writes to a run directory."""

import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedforward.core.errors import FedForwardError
from fedforward.training.run_directory import RunDirectory
from tests.support.command_line import command, write_config

HOLD = (
    "import sys; from pathlib import Path\n"
    "from fedforward.training.run_directory import RunDirectory\n"
    "directory = RunDirectory(Path(sys.argv[1]))\n"
    "directory.lock()\n"
    "print('locked', flush=True)\n"
    "sys.stdin.read()\n"
)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that has locked `tmp_path / "run"`."""
    pipe = subprocess.PIPE
    line = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(line, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_a_second_run_in_a_folder_is_refused(
    holder: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    config, out = write_config(tmp_path), tmp_path / "run"
    for options in ([], ["--resume"]):
        result = command("run", config, "--out", out, *options)
        words = f"is in use by another fedforward process (process {holder.pid}, since 20"
        result.refused(str(out), words, "choose another --out")
        assert sorted(file.name for file in out.iterdir()) == ["lock", "lock.json"]
    # A killed process holds nothing.
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert command("run", config, "--out", out).code == 0
    command("run", config, "--out", out).refused("holds a run already", "--resume")
    assert command("run", config, "--out", out, "--resume").code == 0


def test_a_lock_is_held_until_it_is_given_up(tmp_path: Path) -> None:
    first, second = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "run")
    with first.locked():
        with pytest.raises(FedForwardError, match="in use by another"):
            second.lock()
        first.lock()
    assert list((tmp_path / "run").iterdir()) == []
    second.lock()
    with pytest.raises(FedForwardError, match="in use by another"), first.locked():
        pass
    second.unlock()


def note(**changes: object) -> str:
    content = {"pid": os.getpid(), "host": platform.node(), "since": "2026-01-02 03:04:05+00:00"}
    return json.dumps(content | changes)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (note(pid=1 << 22), "fedforward process. Wait"),
        (note(pid=-5), "fedforward process. Wait"),
        (note(pid=10**30), "fedforward process. Wait"),
        (
            note(host="other"),
            f"(process {os.getpid()} on other, since 2026-01-02 03:04:05+00:00)",
        ),
        (note(), "(this one, since 2026-01-02 03:04:05+00:00)"),
        ("", "fedforward process. Wait"),
        ("[]", "fedforward process. Wait"),
        ('{"pid": null}', "fedforward process. Wait"),
        ("\0\0", "fedforward process. Wait"),
    ],
    # The number of this process must not be in a test's name.
    ids=range(9),
)
def test_what_is_written_of_a_holder_is_believed_only_if_it_can_be(
    tmp_path: Path, text: str, words: str
) -> None:
    first, second = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "run")
    with first.locked():
        (tmp_path / "run/lock.json").write_text(text, encoding="utf-8")
        with pytest.raises(FedForwardError) as caught:
            second.lock()
        assert words in str(caught.value)
    # What others have left does no harm, in whatever state it is.
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run/lock").touch()
    (tmp_path / "run/lock.json").write_text(text, encoding="utf-8")
    with second.locked():
        written = json.loads((tmp_path / "run/lock.json").read_text(encoding="utf-8"))
        assert written["pid"] == os.getpid() and written["host"] == platform.node()
    assert list((tmp_path / "run").iterdir()) == []


def test_a_lock_that_cannot_be_taken_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "run/lock").mkdir(parents=True)
    with pytest.raises(FedForwardError, match=r"lock cannot be locked: .*choose another --out"):
        RunDirectory(tmp_path / "run").lock()
    (tmp_path / "run/lock").rmdir()
    (tmp_path / "run/lock.json").mkdir()
    # The note is a help to people, and nothing that a run needs.
    directory = RunDirectory(tmp_path / "run")
    directory.lock()
    directory.unlock()


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert RunDirectory(Path("~/run")).path == tmp_path / "run"


def test_a_folder_of_other_things_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(FedForwardError, match="not a run directory"):
        RunDirectory(tmp_path).lock()
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]
