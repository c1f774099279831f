"""Full disks, read-only folders, clocks that jump, and two starts at once."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedforward.config.loading import validate
from fedforward.core.errors import FedForwardError
from fedforward.training.replay import verify
from fedforward.training.run import Run
from tests.faults import processes
from tests.faults.federation import simulated

pytestmark = [
    pytest.mark.usefixtures("imported_libraries"),
    pytest.mark.timeout(1800),
]
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")
DIGESTS = ("rounds", "state_digest", "ledger_digest")


def digests(summary: dict[str, Any]) -> list[Any]:
    return [summary[key] for key in DIGESTS]


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: Any) -> tuple[dict[str, Any], list[Any], Path]:
    """A run that nothing disturbs: its configuration, its digests, its folder."""
    folder = tmp_path_factory.mktemp("quiet")
    content = simulated(folder)
    content["federation"]["rounds"] = 8
    summary = Run(validate(content), folder / "run").fit().to_json()
    return content, digests(summary), folder / "run"


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[Path]:
    """A file system in memory of so many bytes.

    Skips where this user may not mount one.
    """
    place.mkdir()
    mount = shutil.which("mount")
    if sys.platform != "linux" or mount is None or os.geteuid() != 0:
        pytest.skip("a small disk takes Linux and the right to mount one")
    done = subprocess.run(
        [mount, "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def remount(place: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(place)], check=True)


def test_a_disk_that_fills_loses_no_round(
    tmp_path: Path, quiet: Any, kills: int, seed: int
) -> None:
    """A random number of bytes is left; then there is room again."""
    content, wanted, run = quiet
    used = sum(path.stat().st_blocks * 512 for path in run.rglob("*") if path.is_file())
    chance, full = random.Random(seed), 0
    with small_disk(tmp_path / "disk", 16 << 20) as disk:
        for number in range(max(2, kills // 10)):
            out, filler = disk / f"run{number}", disk / "filler"
            left = chance.randrange(4096, used)
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            filler.write_bytes(bytes(max(0, free - left)))
            try:
                found = digests(Run(validate(content), out).fit().to_json())
            except FedForwardError as error:
                full += 1
                assert "space" in str(error) or "full" in str(error), error
                assert not list(out.glob("*.partial")) or not (out / "config.toml").exists()
                filler.unlink()
                again = (out / "config.toml").is_file()
                found = digests(Run(validate(content), out, resume=again).fit().to_json())
            filler.unlink(missing_ok=True)
            assert found == wanted
            assert verify(out).ok
            shutil.rmtree(out)
    assert full


def test_read_only_media_can_be_verified_and_not_written(tmp_path: Path, quiet: Any) -> None:
    content, wanted, run = quiet
    with small_disk(tmp_path / "disk", 16 << 20) as disk:
        out = Path(shutil.copytree(run, disk / "run"))
        remount(disk, "ro")
        proof = verify(out)
        assert proof.ok and [proof.state_digest, proof.ledger_digest] == wanted[1:]
        with pytest.raises(FedForwardError, match=r"Read-only|cannot be (locked|written)"):
            Run(validate(content), out, resume=True).fit()
        with pytest.raises(FedForwardError, match=r"cannot be|Read-only"):
            Run(validate(content), disk / "new").fit()
        remount(disk, "rw")
        assert digests(Run(validate(content), out, resume=True).fit().to_json()) == wanted


JUMPS = """
import json, sys
from pathlib import Path
from tests.support.coordinator import World, configured

found = World(Path(sys.argv[1]), configured(federation__rounds=int(sys.argv[2])))
import select, time
found.clock.__class__.__call__ = lambda self: time.monotonic()
# Not time.sleep: libfaketime 0.9.10 spoils its absolute deadline.
found.clock.__class__.sleep = lambda self, seconds: select.select([], [], [], 0.02)
summary = found.run()
print(json.dumps([summary["rounds"], summary["state_digest"], 0]))
"""


@pytest.mark.slow
def test_clocks_that_jump_change_nothing(tmp_path: Path, seed: int, kills: int) -> None:
    """A coordinator and sites, while the time of day goes back and forth by up to ten years."""
    if not FAKETIME.is_file():
        pytest.skip(f"{FAKETIME} is missing: apt-get install libfaketime")
    rounds, chance = str(max(6, kills // 4)), random.Random(seed)
    clock = tmp_path / "clock"
    clock.write_text("+0\n")
    environment = {**os.environ, "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1"}
    environment |= {"LD_PRELOAD": str(FAKETIME), "FAKETIME_DONT_FAKE_MONOTONIC": "1"}

    def started(name: str, env: dict[str, str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", JUMPS, str(tmp_path / name), rounds],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=env,
        )

    def told(process: subprocess.Popen[str]) -> Any:
        out, _ = process.communicate(timeout=600)
        assert process.returncode == 0, out
        return json.loads(out.splitlines()[-1])

    with started("quiet", dict(os.environ)) as plain, started("jumps", environment) as jumping:
        jumps = 0
        while jumping.poll() is None:
            time.sleep(0.3 * chance.random())
            seconds = chance.choice([1, 3600, 86400, 3 * 10**8]) * chance.choice([-1, 1])
            partial = clock.with_suffix(".new")
            partial.write_text(f"{seconds:+d}\n")
            partial.replace(clock)
            jumps += 1
        assert told(jumping)[:2] == told(plain)[:2]
    assert jumps > 3


@pytest.mark.slow
def test_of_two_starts_one_is_refused(tmp_path: Path, kills: int, seed: int) -> None:
    """Again and again, one after the other or the other way round by a few milliseconds."""
    content, context, chance = simulated(tmp_path), processes.context(), random.Random(seed)
    content["federation"]["rounds"] = 3
    for number in range(max(2, kills // 10)):
        out, logs = tmp_path / f"run{number}", [tmp_path / f"{number}.{n}.log" for n in range(2)]
        both = []
        for log in logs:
            process = context.Process(
                target=processes.simulation, args=(content, out, log), daemon=True
            )
            process.start()
            both.append(process)
            time.sleep(0.03 * chance.random())
        codes = sorted(processes.ended(process) for process in both)
        text = "".join(log.read_text() for log in logs)
        # Where the second came late, it went on with a run that was finished.
        assert codes in ([0, processes.SENTENCE], [0, 0]), text
        if codes[1]:
            assert "is in use by another fedforward process" in text
        assert "Traceback" not in text
        assert verify(out).ok
