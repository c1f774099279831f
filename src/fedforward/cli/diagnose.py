"""The command `diagnose`."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from fedforward.cli.console import display, out_console, say
from fedforward.cli.train import ConfigArgument, OverridesArgument
from fedforward.core.errors import FedForwardError
from fedforward.core.files import write_bytes
from fedforward.core.paths import check_new_folder, home


def diagnose(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    at: Annotated[
        str | None,
        typer.Option(
            "--at", help="run directory or adapter: a point beside the base", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="folder for a page, JSON and pictures", show_default=False),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="file to write as JSON, - to print it", show_default=False),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option("--rows", min=1, help="rows whose loss is looked at", show_default="4"),
    ] = None,
    probes: Annotated[
        int | None,
        typer.Option("--probes", min=2, help="random vectors of a trace", show_default="12"),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="fewer of everything, and no blocks")
    ] = False,
) -> None:
    """Measure curvature, noise and heterogeneity on a model and data; nothing is trained."""
    from fedforward.config.loading import load

    settings = load(config, overrides or [])
    _check(out, json_file)
    with display("loading libraries"):
        from fedforward.models.libraries import quiet_libraries

        quiet_libraries()
        from fedforward.analysis.diagnose import QUICK, Effort, with_rows
        from fedforward.analysis.diagnose import diagnose as measure

        effort = with_rows(QUICK if quick else Effort(), rows, probes)
        found = measure(settings, at=at, effort=effort)
        pictures = _write(out, json_file, found)
    if json_file == Path("-"):
        print(json.dumps(found.as_json(), indent=2))
        return
    from fedforward.cli.diagnosis_tables import render

    for part in render(found):
        out_console.print(part, "")
    if out is not None:
        names = ", ".join(path.name for path in pictures)
        say(out_console, f"wrote {out}: index.html, diagnosis.json, {names}")
    if json_file is not None:
        say(out_console, f"wrote {json_file}")


def _check(out: Path | None, json_file: Path | None) -> None:
    """Refuse what could not be written, before anything is computed."""
    if out is not None:
        check_new_folder(home(out), "--out")
        home(out).mkdir(parents=True, exist_ok=True)
        if not os.access(home(out), os.W_OK):
            raise FedForwardError(f"--out {out} cannot be written to. Choose another --out.")
    if json_file is None or json_file == Path("-"):
        return
    path = home(json_file)
    if path.is_dir():
        raise FedForwardError(f"--json {json_file} is a folder. Give a file, or - to print it.")
    if not path.absolute().parent.is_dir():
        raise FedForwardError(f"--json {json_file}: there is no folder {path.parent}.")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise FedForwardError(f"--json {json_file} cannot be written to. Choose another file.")


def _write(out: Path | None, json_file: Path | None, found: Any) -> list[Path]:
    """Write what was asked for; returns the pictures."""
    data = (json.dumps(found.as_json(), indent=2) + "\n").encode()
    if json_file is not None and json_file != Path("-"):
        write_bytes(home(json_file), data)
    if out is None:
        return []
    from fedforward.analysis.plots import draw

    folder = home(out)
    write_bytes(folder / "diagnosis.json", data)
    pictures = draw(folder, found)
    from fedforward.cli.diagnosis_page import page

    write_bytes(folder / "index.html", page(found, pictures).encode())
    return pictures
