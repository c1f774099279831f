"""One process at a time writes to a run directory."""

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


@pytest.mark.usefixtures("libraries_are_no_garbage")
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


def test_a_folder_of_other_things_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(FedForwardError, match="not a run directory"):
        RunDirectory(tmp_path).lock()
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]
