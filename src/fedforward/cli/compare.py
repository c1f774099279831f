"""The command `compare`: several methods at several seeds, or runs that are there already."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fedforward.cli.console import display, friendly, out_console, say
from fedforward.cli.train import JsonOption
from fedforward.core.errors import FedForwardError
from fedforward.core.paths import home
from fedforward.core.units import parse_bytes

#: Characters of a line that goes to no terminal.
FILE_WIDTH = 160
PAGE, RESULT, TABLE = "compare.html", "compare.json", "compare.csv"


def compare(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG [section.key=value …] | RUN …",
            help="a configuration with overrides, or run directories",
            show_default=False,
        ),
    ],
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--methods", help="METHOD or LABEL=METHOD, divided by commas", show_default=False
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option("--seeds", help="how many seeds; 3 if left out", show_default=False),
    ] = None,
    match: Annotated[
        str | None,
        typer.Option(
            "--match",
            help="what all spend the same of: rounds (if left out), bytes, passes or seconds",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            help="how much of it; if left out, what the first method spends",
            show_default=False,
        ),
    ] = None,
    rates: Annotated[
        list[str] | None,
        typer.Option(
            "--rates", help="LABEL=RATE, divided by commas; auto if left out", show_default=False
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="LABEL:section.key=value, of one method", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="folder for runs, tables and page", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run several methods at several seeds with the same budget, and say which differ."""
    given = {
        "--methods": methods, "--seeds": seeds, "--match": match, "--budget": budget,
        "--rates": rates, "--set": settings,
    }  # fmt: skip
    places = [home(Path(text)) for text in arguments]
    if places[0].is_dir():
        _compare_runs(places, given, out or Path("runs/comparison"), as_json)
        return
    config, overrides = places[0], arguments[1:]
    for text, place in zip(overrides, places[1:], strict=True):
        if place.is_dir():
            raise FedForwardError(
                f"{config} is no run directory, and {text} is one. Give a configuration with "
                "overrides, or run directories alone."
            )
    out = home(out or Path("runs") / f"{config.stem}-compare")
    again = ["fedforward", "compare", *arguments]
    for option, value in given.items():
        for each in value if isinstance(value, list) else [value]:
            again += [] if each is None else [option, str(each)]
    again += ["--out", str(out)]
    with friendly(f"Continue with: {shlex.join(again)}"):
        _carry_out(config, overrides, given, out, [shlex.join(again)], as_json)


def _carry_out(
    config: Path,
    overrides: Sequence[str],
    given: dict[str, Any],
    out: Path,
    repeat: list[str],
    as_json: bool,
) -> None:
    """Run what is not finished, and write the results."""
    from fedforward.training.comparison import Comparison, check_match
    from fedforward.training.spending import WORDS
    from fedforward.training.variants import check_seeds, read_variants

    match = check_match(given["--match"] or "rounds")
    amount = _amount(given["--budget"], match)
    variants = read_variants(
        config, overrides, given["--methods"] or [], given["--rates"] or [], given["--set"] or []
    )
    count = 3 if given["--seeds"] is None else given["--seeds"]
    seeds = check_seeds(count, variants[0].config.run.seed)
    comparison = Comparison(variants, seeds, out, match=match, budget=amount)
    _check_page(out)
    with display("loading libraries") as progress:
        from fedforward.models.libraries import quiet_libraries

        quiet_libraries()
        progress.objective = variants[0].config.objective

        def began(number: int, total: int, name: str) -> None:
            progress.title = f"{number}/{total} {name}: "
            progress.phase("building")

        comparison.run(progress.progress, began)
        progress.title = ""
        kept = comparison.settings
        budget = kept.rounds if match == "rounds" else kept.budget
        matched = f"{budget:,.0f} {WORDS[match]}"
        _write(_groups(comparison.folders), out, matched, repeat, as_json)


def _compare_runs(paths: list[Path], given: dict[str, Any], out: Path, as_json: bool) -> None:
    """Compare runs that are there."""
    for option, value in given.items():
        if value is not None:
            raise FedForwardError(
                f"{option} is for a configuration that is to be run, and {paths[0]} is a run "
                "directory. Leave it out."
            )
    out = home(out)
    with display("reading the runs"):
        from fedforward.reporting.groups import check_comparable, grouped
        from fedforward.reporting.record import read_run
        from fedforward.training.comparison import check_folder

        unique = list({path.resolve(): path for path in paths}.values())
        groups = grouped([read_run(path) for path in unique])
        check_comparable(groups)
        check_folder(out)
        _check_page(out)
        out.mkdir(parents=True, exist_ok=True)
        line = shlex.join(["fedforward", "compare", *map(str, unique), "--out", str(out)])
        _write(groups, out, "", [line], as_json)


def _check_page(out: Path) -> None:
    """Refuse a folder whose page cannot be written, before anything runs."""
    from fedforward.reporting.page import check_out

    if (out / PAGE).exists():
        check_out(out / PAGE)


def _groups(folders: dict[str, dict[int, Path]]) -> list[Any]:
    from fedforward.reporting.groups import Group
    from fedforward.reporting.record import read_run

    return [
        Group(label, {seed: read_run(path) for seed, path in runs.items()})
        for label, runs in folders.items()
    ]


def _write(groups: list[Any], out: Path, matched: str, repeat: list[str], as_json: bool) -> None:
    """Write table, JSON and page, and show the table."""
    from fedforward.reporting import comparison
    from fedforward.reporting.page import make_comparison_page, write_page
    from fedforward.training.run_directory import strict, write_json, write_text

    results = comparison.compare(groups, matched)
    content = comparison.as_json(results)
    page = make_comparison_page(results, repeat)
    write_json(out / RESULT, content)
    write_text(out / TABLE, comparison.as_csv(results))
    size = write_page(out / PAGE, page)
    if as_json:
        files = {"page": str(out / PAGE), "page_bytes": size}
        print(json.dumps(strict(content | files), indent=2))
        return
    from fedforward.cli.comparison_tables import render

    where = out_console if out_console.is_terminal else Console(width=FILE_WIDTH)
    for part in render(results):
        where.print(part)
    say(out_console, f"\n{out / TABLE}\n{out / RESULT}\n{out / PAGE}: {size / 1000:.0f} kB")


def _amount(text: str | None, match: str) -> float | None:
    """A budget in units of what is matched.

    Raises:
        FedForwardError: it is no number, or no amount of bytes.
    """
    if text is None:
        return None
    try:
        return float(text.replace("_", ""))
    except ValueError:
        pass
    try:
        if match == "bytes":
            return float(parse_bytes(text))
    except ValueError:
        pass
    example = "a number of bytes or an amount such as '1 MB'" if match == "bytes" else "a number"
    raise FedForwardError(f"--budget {text!r} is not allowed: with --match {match} give {example}.")
