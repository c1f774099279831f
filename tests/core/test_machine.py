"""What is said of the machine, where the system says it and where it does not."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from fedforward.core import machine
from tests.support.command_line import write_config


@pytest.fixture
def no_resource(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, which has no `resource`."""
    monkeypatch.setitem(sys.modules, "resource", None)


def test_cores_are_those_that_the_process_is_bound_to() -> None:
    assert machine.usable_cores() == len(os.sched_getaffinity(0))
    code = "from fedforward.core import machine; print(machine.usable_cores())"
    one = min(os.sched_getaffinity(0))
    bound = f"import os; os.sched_setaffinity(0, [{one}]); {code}"
    done = subprocess.run([sys.executable, "-c", bound], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


def test_cores_where_no_process_is_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.delattr(psutil.Process, "cpu_affinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert machine.usable_cores() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert machine.usable_cores() == 1


def test_available_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    available = machine.available_memory()
    assert available is not None and 0 < available < psutil.virtual_memory().total

    def fail() -> None:
        raise RuntimeError("not told")

    monkeypatch.setattr(psutil, "virtual_memory", fail)
    assert machine.available_memory() is None


def test_peak_resident_bytes_grow_with_what_was_held() -> None:
    before = machine.peak_resident_bytes()
    size = before + (64 << 20)
    held = b"\1" * size
    assert machine.peak_resident_bytes() >= len(held)


@pytest.mark.usefixtures("no_resource")
def test_resident_bytes_without_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    size = machine.peak_resident_bytes()
    assert 0.5 < size / psutil.Process().memory_info().rss < 2
    memory = SimpleNamespace(rss=5, peak_wset=7)
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: memory)
    assert machine.peak_resident_bytes() == 7


def test_a_processor_always_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.processor_name()

    def fail(*arguments: object, **options: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", fail)
    monkeypatch.setattr(platform, "processor", lambda: "")
    assert machine.processor_name() == platform.machine()


def test_a_process_that_has_ended_does_not_run() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert machine.process_runs(process.pid)
    process.kill()
    # It is a zombie until somebody waits for it.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not machine.process_runs(process.pid)
    process.communicate()
    assert not machine.process_runs(process.pid)


def test_open_files_as_many_as_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    asked: list[tuple[int, int]] = []

    def macos(what: int, limits: tuple[int, int]) -> None:
        asked.append(limits)
        if limits[0] == 1 << 62:
            raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda what: (256, 1 << 62))
    monkeypatch.setattr(resource, "setrlimit", macos)
    assert machine.raise_open_file_limit() == 10_240
    assert asked == [(1 << 62, 1 << 62), (10_240, 1 << 62)]


@pytest.mark.usefixtures("no_resource")
def test_open_files_where_none_are_counted() -> None:
    assert machine.raise_open_file_limit() is None


def test_a_run_without_what_linux_alone_has(tmp_path: Path) -> None:
    """No `resource`, no `fcntl`, no affinity, no /proc, for whatever this package asks."""
    config = write_config(tmp_path)
    code = """
import os, pathlib, sys
import datasets, filelock, flwr_datasets.partitioner, matplotlib.pyplot, peft, psutil
import transformers.models.llama.modeling_llama
sys.modules["resource"] = sys.modules["fcntl"] = None
del os.sched_getaffinity, psutil.Process.cpu_affinity
real = pathlib.Path.read_text
def read_text(path, *arguments, **options):
    if str(path).startswith("/proc"):
        raise FileNotFoundError(2, "No such file", str(path))
    return real(path, *arguments, **options)
pathlib.Path.read_text = read_text
assert not any(name.startswith("fedforward") for name in sys.modules)
from fedforward.cli.main import main
main()
"""
    out = tmp_path / "run"
    line = [sys.executable, "-c", code, "run", str(config), "run.threads=0", "--out", str(out)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    assert plan["threads"] == os.cpu_count()
    assert json.loads((out / "summary.json").read_text(encoding="utf-8"))["rounds"] == 2
