"""What the tests of bad input share: a small data set, a configuration file, the command line."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from typer.testing import CliRunner

from fedforward.cli.main import app

MODEL = Path(str(files("fedforward.demo").joinpath("model")))
EXAMPLES = 12


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    error: str

    def refused(self, *words: str) -> str:
        """Exit code 2 and one message with all the words; returns what was on standard error."""
        assert self.code == 2, self
        assert "Traceback" not in self.error
        assert self.error.count("error:") == 1, self.error
        message = self.error.partition("error:")[2]
        for word in words:
            assert word in message, f"{word!r} is not in {message!r}"
        return message


def command(*arguments: object) -> Outcome:
    """`fedforward …` in this process; an exception that escapes fails the test."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    return Outcome(result.exit_code, result.stdout, result.stderr)


def limited(largest_file: int, *arguments: object) -> Outcome:
    """`fedforward …` in a process that cannot write beyond `largest_file` bytes of a file."""
    code = (
        "import resource, sys\n"
        "import datasets, transformers, fedforward.training.loop, fedforward.models.lora\n"
        "size = int(sys.argv.pop(1))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))\n"
        "from fedforward.cli.main import main\n"
        "main()\n"
    )
    line = [sys.executable, "-c", code, str(largest_file), *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, env=dict(os.environ), check=False)
    return Outcome(done.returncode, done.stdout, done.stderr)


def write_rows(path: Path, count: int = EXAMPLES) -> Path:
    rows = [
        {"q": f"what is {i}?", "a": f"it is {7 * i}.", "site": f"s{i % 3}"} for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_config(folder: Path, overrides: Sequence[str] = ()) -> Path:
    """A configuration file of two short rounds beside its data."""
    from fedforward.config.loading import validate
    from fedforward.config.template import to_toml

    data = write_rows(folder / "rows.jsonl")
    content = {
        "model": {"path": str(MODEL)},
        "lora": {"rank": 2},
        "data": {
            "source": str(data),
            "prompt": "Q: {q}\nA:",
            "answer": " {a}",
            "heldout": 4,
            "sequence_length": 48,
        },
        "federation": {"clients": 2, "rounds": 2},
        "method": {"local_steps": 1},
        "run": {"device": "cpu", "threads": 1, "evaluate_every": 1},
    }
    path = folder / "c.toml"
    path.write_text(to_toml(validate(content)), encoding="utf-8")
    return path
