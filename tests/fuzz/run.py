"""Fuzz the targets with atheris, one after another, from the corpus on.

    python -m tests.fuzz.run [--target NAME ...] [--seconds 60] [--found FOLDER]

Each target has a process of its own and its share of the seconds. What is found goes on from what
was found before, in `--found` (default runs/fuzz). Ends with 1 where something crashed; the bytes
are in FOUND/TARGET-crashes, and belong into tests/fuzz/crashes/TARGET once they are mended.
"""

import argparse
import os
import random
import re
import subprocess
import sys
from pathlib import Path

from tests.fuzz.mutators import mutated_bytes

HERE = Path(__file__).parent
#: Seconds that one execution may take.
SLOW_S = 10


def fuzz(name: str, arguments: list[str]) -> None:
    """Fuzz one target in this process, which ends with it."""
    import atheris

    # Kernels are compiled by numba, which does not know the fuzzer's counters.
    import fedforward.directions.ops  # noqa: F401

    with atheris.instrument_imports(include=["fedforward"], enable_loader_override=False):
        from tests.fuzz.targets import TARGETS

        target = TARGETS[name]
        # What is imported or compiled late is so by then.
        for folder in seeds(name):
            for path in folder.iterdir():
                target.run(path.read_bytes())

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        chance = random.Random(seed)
        found = target.mutate(data, chance) if chance.random() < 0.5 else None
        if found is None or len(found) > most:
            found = bytes(atheris.Mutate(data, most))
        return found

    # The fuzzer's own mutations are as good for bytes, and many times as fast.
    own = {} if target.mutate is mutated_bytes else {"custom_mutator": mutate}
    atheris.Setup([name, *arguments], target.run, **own)
    atheris.Fuzz()


def share(name: str, seconds: float, found: Path) -> tuple[int, int]:
    """Fuzz one target in a process of its own; returns its executions, and its crashes."""
    own, crashes = found / name, found / f"{name}-crashes"
    own.mkdir(parents=True, exist_ok=True)
    crashes.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.fuzz.run", "--one", name, "--"]
    command += [f"-max_total_time={max(1, round(seconds))}", "-print_final_stats=1"]
    command += [f"-artifact_prefix={crashes}/", f"-timeout={SLOW_S}", "-rss_limit_mb=4096"]
    command += ["-max_len=8192", "-verbosity=0", "-close_fd_mask=1"]
    command += [str(own), *(str(part) for part in seeds(name))]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
    (found / f"{name}.log").write_text(done.stderr, encoding="utf-8")
    counted = re.search(r"stat::number_of_executed_units:\s*(\d+)", done.stderr)
    executions = int(counted[1]) if counted else 0
    if done.returncode and not any(crashes.iterdir()):
        print(done.stderr[-2000:], file=sys.stderr)
        raise SystemExit(f"{name}: the fuzzer ended with {done.returncode}")
    return executions, int(done.returncode != 0)


def seeds(name: str) -> list[Path]:
    """The folders with bytes to begin with."""
    return [path for part in ("corpus", "crashes") if (path := HERE / part / name).is_dir()]


def main() -> None:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    made.add_argument("--one", help=argparse.SUPPRESS)
    made.add_argument("--target", nargs="+", help="those alone")
    made.add_argument("--seconds", type=float, default=60.0, help="for all of them together")
    made.add_argument("--found", type=Path, default=Path("runs/fuzz"))
    made.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    arguments = made.parse_args()
    if arguments.one:
        fuzz(arguments.one, arguments.rest)
        return
    from tests.fuzz.targets import TARGETS

    names = arguments.target or list(TARGETS)
    if unknown := [name for name in names if name not in TARGETS]:
        raise SystemExit(f"no target {unknown[0]!r}; there are {', '.join(TARGETS)}")
    whole = sum(TARGETS[name].weight for name in names)
    total = crashed = 0
    for name in names:
        seconds = arguments.seconds * TARGETS[name].weight / whole
        executions, crashes = share(name, seconds, arguments.found)
        total, crashed = total + executions, crashed + crashes
        print(f"{name}: {executions:,} executions{', CRASHED' if crashes else ''}", flush=True)
    print(f"all: {total:,} executions, {crashed} targets crashed")
    raise SystemExit(int(crashed > 0))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
