"""The command `report`: one page of a run, or of several."""

import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fedforward.cli.console import display, friendly, out_console, say
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
    watch: Annotated[
        bool, typer.Option("--watch", help="write it again until the runs are finished")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write one HTML page of a run, or of several: curves, tables, and how to repeat them."""
    paths = list({path.resolve(): path for path in map(home, runs)}.values())
    page = home(out) if out is not None else _place(paths)
    failures: list[str] = []
    if watch:
        if verify:
            raise FedForwardError(
                "--watch and --verify exclude each other: a run is verified when it is finished."
            )
        size = _watch(paths, page)
    else:
        size, failures = write_report(paths, page, verify=verify)
    if as_json:
        content = {"page": str(page), "bytes": size, "runs": [str(path) for path in paths]}
        print(json.dumps(content, indent=2))
    else:
        say(out_console, f"{page}: {size / 1000:.0f} kB")
    if failures:
        raise FedForwardError(f"The page is written, and says so: {' '.join(failures)}")


def _place(paths: list[Path]) -> Path:
    return paths[0] / NAME if len(paths) == 1 else Path(NAME)


def _watch(paths: list[Path], page: Path) -> int:
    """Write the page until the runs are finished, or Ctrl-C; returns its bytes."""
    again = shlex.join(["fedforward", "report", *map(str, paths), "--out", str(page), "--watch"])
    with friendly(f"Watch again with: {again}"), display("waiting for figures") as progress:
        from fedforward.reporting.live import watch
        from fedforward.reporting.page import check_out
        from fedforward.training.run_directory import RunDirectory

        for path in paths:
            RunDirectory(path).config()
        check_out(page)

        def told(records: Sequence[Any], size: int) -> None:
            done = ", ".join(
                f"{r.name} {r.rounds} of {r.config.federation.rounds}" for r in records
            )
            progress.phase(f"{page}: {size / 1000:.0f} kB, rounds: {done}")

        return watch(paths, page, told)


def write_report(paths: list[Path], page: Path, *, verify: bool = False) -> tuple[int, list[str]]:
    """Read runs and write their page.

    Returns:
        Its bytes; and, with `verify`, a sentence for each run that does not verify.

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
        said, failures = {}, []
        for path in paths if verify else []:
            progress.phase(f"verifying {path.name}")
            result = _verification(path, progress.count)
            if result.differences:
                said[path] = f"Does not verify: {'; '.join(result.differences)}."
                failures.append(f"{path} does not verify: {'; '.join(result.differences)}.")
            else:
                said[path] = _agreement(result)
        progress.phase("drawing")
        return write_page(page, make_page(records, said)), failures


def _verification(path: Path, on_round: Callable[[int, int], None]) -> Any:
    from fedforward.models.libraries import quiet_libraries

    quiet_libraries()
    from fedforward.training import replay

    try:
        return replay.verify(path, on_round=on_round)
    except FedForwardError as error:
        raise FedForwardError(
            f"{path} cannot be verified for its page: {error} `fedforward verify` has options for "
            "files that have moved; without --verify the page is written all the same."
        ) from error


def _agreement(result: Any) -> str:
    """What `verify` says of a run whose bits agree."""
    how = "rebuilt from base and ledger" if result.replayed else "state file and ledger"
    words = f"Bit-identical: {result.rounds} rounds, {how}; state digest {result.state_digest}"
    if result.unchecked:
        words += f"; not made again from the reports: {'; '.join(result.unchecked)}"
    return f"{words}."
