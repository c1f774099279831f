"""The command `privacy`: what runs have spent of the privacy of a site's rows."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fedforward.cli.console import out_console, say
from fedforward.cli.train import JsonOption


def privacy(
    config: Annotated[Path, typer.Argument(help="site.toml", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Show what runs with [privacy] have spent of a site's rows, and what limits.epsilon leaves."""
    from fedforward.config.site import load_site
    from fedforward.data.rows import fingerprints
    from fedforward.data.sources import find
    from fedforward.deployment.limits import spending_folder
    from fedforward.federation.budget import Accounts

    settings = load_site(config)
    data, limits = settings.data, settings.limits
    names = [data.source] if isinstance(data.source, str) else data.source
    key = "data.source"
    rows = fingerprints(find(n, split=data.split, subset=data.subset, key=key) for n in names)
    accounts = Accounts(spending_folder(settings))
    epsilon, delta = accounts.spent(rows)
    content: dict[str, Any] = {
        "rows": len(rows),
        "epsilon": epsilon,
        "delta": delta,
        "limit_epsilon": limits.epsilon,
        "limit_delta": None if limits.epsilon is None else limits.delta,
        "runs": [asdict(each) for each in accounts.all()],
    }
    if as_json:
        print(json.dumps(content, indent=2))
        return
    if content["runs"]:
        out_console.print(_table(content["runs"]))
    else:
        say(out_console, "no run with [privacy] has had an answer from this site")
    left = "no limits.epsilon is set"
    if limits.epsilon is not None:
        left = (
            f"limits.epsilon = {limits.epsilon:g} leaves {max(0.0, limits.epsilon - epsilon):.4g}"
        )
    say(
        out_console,
        f"the {len(rows):,} rows of {', '.join(names)}: at most epsilon {epsilon:.4g} spent on "
        f"one, at delta {delta:.2g}; {left}",
    )


def _table(runs: list[dict[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("run", "rows", "last answer", "rounds", "epsilon", "delta"):
        table.add_column(column, justify="left" if column in ("run", "rows") else "right")
    for run in runs:
        table.add_row(
            run["run"][:8],
            run["rows"][:8],
            run["day"],
            str(run["rounds"]),
            f"{run['epsilon']:.4g}",
            f"{run['delta']:.2g}",
        )
    return table
