"""Flower's command line, many commands in one process: most of a command's time is its import.

    python -m fedforward.deployment.flower.commands

Reads a JSON list of argument lists, and prints a JSON list with what each wrote and its exit code.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any


def captured(act: Callable[[], int]) -> dict[str, Any]:
    """What is written to the process's output and error while `act` runs, and what it returns."""
    kept = [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as error:
        try:
            os.dup2(out.fileno(), 1)
            os.dup2(error.fileno(), 2)
            code = act()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, descriptor in enumerate(kept, 1):
                os.dup2(descriptor, number)
                os.close(descriptor)
        out.seek(0)
        error.seek(0)
        texts = [file.read().decode(errors="replace") for file in (out, error)]
    return {"out": texts[0], "error": texts[1], "code": code}


def carry_out(arguments: list[str]) -> int:
    """One command's exit code."""
    from flwr.cli.app import app

    try:
        app(arguments, standalone_mode=False)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except Exception as failed:
        print(str(failed) or type(failed).__name__, file=sys.stderr)
        return 1
    return 0


def main() -> None:
    """See the module."""
    commands = json.load(sys.stdin)
    # Some of Flower's output does not go through `sys.stdout` as it is while a command runs.
    results = [captured(lambda a=arguments: carry_out(a)) for arguments in commands]  # type: ignore[misc]
    print(json.dumps(results))


if __name__ == "__main__":
    main()
