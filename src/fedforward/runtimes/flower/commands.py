"""Flower's command line, many commands in one process: most of a command's time is its import.

    python -m fedforward.runtimes.flower.commands

Reads a JSON list of argument lists, and prints a JSON list with what each wrote and its exit code.
"""

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from typing import Any


def carry_out(arguments: list[str]) -> dict[str, Any]:
    """One command's output and exit code."""
    from flwr.cli.app import app

    out, error = io.StringIO(), io.StringIO()
    code: object = 0
    with redirect_stdout(out), redirect_stderr(error):
        try:
            app(arguments, standalone_mode=False)
        except SystemExit as ended:
            code = ended.code
        except Exception as failed:
            code = 1
            print(str(failed) or type(failed).__name__, file=sys.stderr)
    return {
        "out": out.getvalue(),
        "error": error.getvalue(),
        "code": code if isinstance(code, int) else int(code is not None),
    }


def main() -> None:
    """See the module."""
    print(json.dumps([carry_out(arguments) for arguments in json.load(sys.stdin)]))


if __name__ == "__main__":
    main()
