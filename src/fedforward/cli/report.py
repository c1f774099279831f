"""The command `report`: one page of a run, or of several."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fedforward.cli.console import display, out_console, say
from fedforward.cli.train import JsonOption
from fedforward.core.errors import FedForwardError
from fedforward.core.paths import home

#: Of a page that has no other name.
NAME = "report.html"


def report(
    runs: Annotated[list[Path], typer.Argument(help="run directories", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="page to write; report.html in the run directory, or here for several runs",
            show_default=False,
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="rebuild each run first, and say what was found")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write one HTML page of a run, or of several: curves, tables, and how to repeat them."""
    paths = list(dict.fromkeys(home(path) for path in runs))
    page = home(out) if out is not None else _place(paths)
    size = write_report(paths, page, verify=verify)
    if as_json:
        content = {"page": str(page), "bytes": size, "runs": [str(path) for path in paths]}
        print(json.dumps(content, indent=2))
        return
    say(out_console, f"{page}: {size / 1000:.0f} kB")


def _place(paths: list[Path]) -> Path:
    return paths[0] / NAME if len(paths) == 1 else Path(NAME)


def write_report(paths: list[Path], page: Path, *, verify: bool = False) -> int:
    """Read runs and write their page; returns its bytes.

    Raises:
        FedForwardError: a folder is no run's, or the page cannot be written; or with `verify` a
            run cannot be rebuilt.
    """
    with display("reading the runs") as progress:
        from fedforward.reporting.page import check_out, make_page, write_page
        from fedforward.reporting.record import read_run

        # What is no run has a sentence of its own, which comes first.
        records = [read_run(path) for path in paths]
        check_out(page)
        said = {}
        if verify:
            for path in paths:
                progress.phase(f"verifying {path.name}")
                said[path] = _verified(path, progress)
        progress.phase("drawing")
        return write_page(page, make_page(records, said))


def _verified(path: Path, progress: object) -> str:
    """What `verify` says of a run, in words."""
    from fedforward.models.libraries import quiet_libraries

    quiet_libraries()
    from fedforward.training import replay

    try:
        result = replay.verify(path, on_round=progress.count)  # type: ignore[attr-defined]
    except FedForwardError as error:
        raise FedForwardError(
            f"{path} cannot be verified for its page: {error} `fedforward verify` has options for "
            "files that have moved; without --verify the page is written all the same."
        ) from error
    if result.differences:
        return "Does not verify: " + "; ".join(result.differences) + "."
    words = (
        f"Bit-identical: {result.rounds} rounds, rebuilt from base and ledger; state digest "
        f"{result.state_digest}"
    )
    if not result.replayed:
        words = (
            f"Bit-identical: {result.rounds} rounds, state file and ledger; state digest "
            f"{result.state_digest}"
        )
    if result.unchecked:
        words += f"; not made again from the reports: {'; '.join(result.unchecked)}"
    return words + "."
