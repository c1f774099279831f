"""How far a run is, once or again and again: of a run on this machine, and of one across machines.

On a terminal it is a table that stays in its place; elsewhere it is a line for each change.
"""

import json
import time
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.table import Table

from fedforward.cli.console import out_console, say
from fedforward.cli.tables import heldout_values, status_tables
from fedforward.core.errors import FedForwardError

#: Seconds between two looks.
POLL_INTERVAL_S = 1.0
#: States of a run of which nothing new comes.
OVER = frozenset({"finished", "failed", "stopped", "diverged", "not running"})


def local_status(run: Path) -> dict[str, Any]:
    """How far a run on this machine is.

    Raises:
        FedForwardError: this is not a run's folder, or it is a server's that has no status yet.
    """
    from fedforward.reporting.record import read_run
    from fedforward.training.folder_lock import FolderLock
    from fedforward.training.run_directory import RunDirectory

    directory = RunDirectory(run)
    if not directory.started:
        raise FedForwardError(
            f"{run} has no status: it is neither a run directory nor the --out folder of a "
            "`fedforward server` that has begun its run."
        )
    held = bool(FolderLock(directory.path, "RUN").note())
    config = directory.config()
    found: dict[str, Any] = {
        "state": "running" if held else "not running",
        "what": "" if held else "go on with --resume",
        "round": 0,
        "rounds": config.federation.rounds,
        "method": config.method.name,
        "objective": config.objective,
        "heldout_loss": None,
        "metrics": {},
        "training_loss": None,
        "seconds": 0.0,
        "seconds_left": None,
    }
    try:
        record = read_run(directory.path)
    except FedForwardError:
        found["what"] = "measuring the base model" if held else found["what"]
        return found
    told = [line for line in record.lines if "heldout_loss" in line][-1]
    last = record.lines[-1]
    found |= {
        "round": record.rounds,
        "heldout_loss": _finite(told["heldout_loss"]),
        "metrics": {name: _finite(value) for name, value in told.get("metrics", {}).items()},
        "training_loss": _finite(last.get("training_loss")),
        "seconds": last["seconds"],
    }
    if record.summary is not None and not held:
        stopped = record.summary.get("stopped") or ""
        found["state"] = "diverged" if stopped.startswith("diverged") else "finished"
        found["what"] = stopped
    elif record.rounds:
        left = config.federation.rounds - record.rounds
        found["seconds_left"] = last["seconds"] / record.rounds * left
    return found


def _finite(value: float | None) -> float | None:
    return value if value is not None and isfinite(value) else None


def tables(content: dict[str, Any]) -> list[Any]:
    """What is known, for people."""
    if "sites" in content:
        return status_tables(content)
    values = heldout_values(content["objective"], content["heldout_loss"], content["metrics"])
    head = f"{content['state']}: {content['round']} of {content['rounds']} rounds"
    if content["what"]:
        head += f"; {content['what']}"
    rows = [("method", content["method"])]
    if content["heldout_loss"] is not None:
        rows += [(f"held-out {name or 'loss'}", value) for name, value in values.items()]
    if content["training_loss"] is not None:
        rows.append(("training loss", f"{content['training_loss']:.3f}"))
    rows.append(("time", f"{content['seconds']:,.0f} s"))
    if content["seconds_left"] is not None:
        rows.append(("left", f"about {content['seconds_left']:,.0f} s"))
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*row)
    return [head, table]


def watch(
    read: Callable[[], dict[str, Any]],
    *,
    as_json: bool = False,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Show what `read` gives until the run is over.

    Args:
        as_json: print a JSON object, in one line, for each change.
        sleep: waits for seconds.
    """
    if as_json or not out_console.is_terminal:
        _lines(read, as_json, sleep)
        return
    with Live(console=out_console, auto_refresh=False) as live:
        while True:
            content = read()
            live.update(Group(*tables(content)), refresh=True)
            if content["state"] in OVER:
                return
            sleep(POLL_INTERVAL_S)


def _lines(
    read: Callable[[], dict[str, Any]], as_json: bool, sleep: Callable[[float], None]
) -> None:
    before = ""
    while True:
        content = read()
        line = json.dumps(content) if as_json else _line(content)
        if line != before:
            print(line, flush=True) if as_json else say(out_console, line)
            before = line
        if content["state"] in OVER:
            return
        sleep(POLL_INTERVAL_S)


def _line(content: dict[str, Any]) -> str:
    """What is known, in one line that changes when there is something new."""
    words = f"{content['state']}: round {content['round']} of {content['rounds']}"
    if content["heldout_loss"] is not None:
        words += f"  held-out loss {content['heldout_loss']:.3f}"
    if "sites" in content:
        here = sum(bool(site["present"]) for site in content["sites"])
        words += f"  {here} of {len(content['sites'])} sites connected"
    return f"{words}  {content['what']}".rstrip()
