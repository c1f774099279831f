"""What there is to run on a GPU, in one command of at most nine minutes: tests, then figures.

    PYTHONPATH=src python benchmarks/gpu.py [--parts tests directions] [--out runs/gpu]

Each part is a process of its own with a time limit of its own: one that fails or hangs stops no
other. The sizes say something about a GPU and are short; the scripts by themselves have the long
ones. `gpu.json` in the folder has every row, the exit code and seconds of each part, the machine
and the versions, and is written again after each part; `gpu.txt` is the table that is printed at
the end. Needs PyTorch, Triton, transformers, peft, numba, pytest and rich. Tests of whole runs need
pydantic too and are skipped without it. `--device cpu` rehearses all of it in its tiniest form.

Exits 1 if a part failed, naming it.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
#: Seconds of the whole command, and those below which a part is not begun.
DEADLINE, LEAST = 530.0, 5.0
PACKAGES = ("torch", "triton", "transformers", "peft", "numba", "numpy", "pydantic")
#: Columns of a benchmark's rows that the table at the end shows.
SHOWN = {
    "directions": ("giga_coordinates_per_second", "times_naive", "times_in_place"),
    "step": ("ours_seconds", "over_two_forwards", "in_place_over_ours"),
    "memory": ("tensor_bytes", "tensors_over_plain"),
    "replay": ("ours_seconds", "times_naive", "giga_coordinates_per_second"),
    "simulation": ("seconds", "times_one_by_one", "times_in_pairs"),
    "llama3b": ("ours", "unit", "beside", "ratio", "what"),
}


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        command: the arguments of the Python interpreter.
        seconds: after which it is ended.
        benchmark: whose JSON it prints; empty for none.
    """

    name: str
    command: Sequence[str]
    seconds: float
    benchmark: str = ""


@dataclass
class Result:
    """What came of a part; `exit` is None where it was ended, never begun, or gave no rows."""

    name: str
    command: str
    seconds: float = 0.0
    exit: int | None = None
    said: str = ""
    benchmark: str = ""
    content: dict[str, Any] = field(default_factory=dict)


def test_files() -> list[str]:
    """The test modules that have tests for a GPU."""
    modules = sorted((ROOT / "tests").rglob("test_*.py"))
    return [
        str(module.relative_to(ROOT))
        for module in modules
        if "mark.gpu" in module.read_text(encoding="utf-8")
    ]


def script(name: str, seconds: float, *options: str, part: str = "") -> Part:
    command = (f"benchmarks/{name}.py", "--json", *options)
    return Part(f"{name} {part}".strip(), command, seconds, name)


def parts(device: str) -> list[Part]:
    """All of them, in the order in which they run; timings have the machine to themselves."""
    pytest = ["-m", "pytest", "-m", "gpu", "-W", "ignore", "-p", "no:cacheprovider"]
    if device == "cpu":
        tiny = ("--quick", "--threads", "1")
        names = ("directions", "step", "replay", "simulation", "llama3b")
        return [
            Part("tests", (*pytest, "-n", "0", *test_files()), 120),
            *(script(name, 120, *tiny) for name in names),
            script("memory", 120, *tiny, "--tune", "lora"),
        ]
    workers = str(min(8, len(os.sched_getaffinity(0))))
    cuda = ("--device", "cuda")
    half = ("--dtype", "bfloat16", "--shapes", "~110M")
    return [
        Part("tests", (*pytest, "-n", workers, "--dist", "worksteal", *test_files()), 150),
        script("directions", 60, *cuda),
        *(
            script("llama3b", limit, *cuda, "--parts", name, *more, part=name)
            for name, limit, more in (
                ("step", 150, ("--seconds", "5")),
                ("replay", 60, ()),
                ("memory", 90, ()),
                ("rounds", 70, ("--rounds", "1")),
            )
        ),
        script("step", 80, *cuda, *half, "--tokens", "512", "2048", "--seconds", "4"),
        script(
            "simulation", 60, *cuda, "--shapes", "small", "~30M", "--dtypes", "bfloat16",
            "--clients", "8", "--lengths", "short", "--probes-per-call", "16", "--seconds", "6",
        ),
        script("replay", 60, *cuda, "--naive-steps", "60", "--seconds", "4"),
        script(
            "memory", 60, *cuda, *half, "--tokens", "2048", "--distributions", "rademacher",
            "--probes-per-call", "2", "--tune", "lora",
        ),
    ]  # fmt: skip


def run(part: Part, limit: float) -> Result:
    """One part to its end, or to the end of its time; what it started ends with it."""
    result = Result(part.name, " ".join(("python", *part.command)), benchmark=part.benchmark)
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *part.command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=limit)
        result.exit = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
    result.seconds = time.perf_counter() - begin
    if result.exit is None:
        result.said = f"ended after {limit:.0f} s: {_last(err or out)}"
    elif result.exit != 0:
        # Of tests the output says what failed, of scripts the errors.
        said = (err, out) if part.benchmark else (out, err)
        result.said = next((text.strip() for text in said if text.strip()), "")[-4000:]
    elif part.benchmark:
        try:
            result.content = json.loads(out)
        except json.JSONDecodeError:
            result.exit, result.said = None, f"it printed no JSON: {_last(out)}"
    else:
        result.said = _last(out)
    return result


def _last(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def report(results: Sequence[Result], seconds: float) -> dict[str, Any]:
    """All there is to keep."""
    machines = [result.content["machine"] for result in results if result.content]
    return {
        "benchmark": "gpu",
        "machine": machines[0] if machines else None,
        "versions": versions(),
        "seconds": round(seconds, 1),
        "parts": [
            {
                "name": result.name,
                "command": result.command,
                "seconds": round(result.seconds, 1),
                "exit": result.exit,
                "said": result.said,
                "remarks": result.content.get("remarks", []),
                "rows": result.content.get("rows", []),
            }
            for result in results
        ],
    }


def table(results: Sequence[Result], seconds: float) -> Any:
    """A line for each part and each of its rows."""
    from rich.table import Table

    machines = [result.content["machine"] for result in results if result.content]
    told = machines[0] if machines else {}
    about = ", ".join(f"{told[key]}" for key in ("device", "torch", "processor") if key in told)
    made = Table(title=f"{about}, {seconds:.0f} s" if about else f"{seconds:.0f} s")
    for title in ("part", "s", "exit", "what", "figures"):
        made.add_column(title, justify="right" if title in ("s", "exit") else "left")
    for result in results:
        ended = "none" if result.exit is None else str(result.exit)
        said = _last(result.said) if result.said else ""
        made.add_row(result.name, f"{result.seconds:.0f}", ended, said, "", style="bold")
        for row in result.content.get("rows", []):
            made.add_row("", "", "", row["name"], figures(result.benchmark, row))
    return made


def figures(benchmark: str, row: dict[str, Any]) -> str:
    """The columns of a row that the table has room for, each with its title and reach."""
    columns = {column.key: column for column in importlib.import_module(benchmark).COLUMNS}
    shown = [columns[key] for key in SHOWN[benchmark] if row.get(key) is not None]
    return ", ".join(f"{column.title} {column.cell(row)}" for column in shown)


def go(chosen: Sequence[Part], folder: Path) -> list[Result]:
    """Run parts one after another and keep what they say."""
    from rich.console import Console

    folder.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    results: list[Result] = []
    for part in chosen:
        left = DEADLINE - (time.perf_counter() - begin)
        print(f"{part.name} …", file=sys.stderr, flush=True)
        if left < LEAST:
            result = Result(part.name, " ".join(part.command), said="no time was left for it")
        else:
            result = run(part, min(part.seconds, left))
        results.append(result)
        content = report(results, time.perf_counter() - begin)
        text = json.dumps(content, indent=1, allow_nan=False)
        (folder / "gpu.json").write_text(text + "\n", encoding="utf-8")
    made = table(results, time.perf_counter() - begin)
    with (folder / "gpu.txt").open("w", encoding="utf-8") as file:
        Console(file=file, width=200).print(made)
    Console(width=None if sys.stdout.isatty() else 200).print(made)
    return results


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder, made if needed")
    parser.add_argument("--parts", nargs="+", help="only these, by the first word of their names")
    arguments = parser.parse_args(argv)
    every = parts(arguments.device)
    names = list(dict.fromkeys(part.name.split()[0] for part in every))
    for name in arguments.parts or ():
        if name not in names:
            parser.error(f"--parts {name}: there is {', '.join(names)}")
    wanted = arguments.parts or names
    results = go([part for part in every if part.name.split()[0] in wanted], arguments.out)
    failed = [result.name for result in results if result.exit != 0]
    if failed:
        print(f"Failed: {', '.join(failed)}. See {arguments.out / 'gpu.json'}.", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
