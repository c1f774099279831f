"""The command line: thin functions that read arguments, call the library and print for people.

Errors of the user's making are one sentence on standard error and exit code 2. PyTorch and
transformers are imported only by the commands that need them.
"""

import json
import logging
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from fedforward.cli.tables import figure
from fedforward.core.errors import FedForwardError
from fedforward.core.logs import PHASES, quiet_libraries, shown

# PyTorch's threads spin for long before they sleep; on a busy machine that takes the cores from
# those that work. It must be said before PyTorch is loaded (docs/architecture.md, "Threads").
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

app = typer.Typer(
    help="Federated fine-tuning of language models with forward passes only.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out_console = Console()
console = Console(stderr=True)

OutOption = Annotated[Path | None, typer.Option("--out", help="run directory", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="print the result as JSON")]


@contextmanager
def _friendly(resume_hint: str = "") -> Iterator[None]:
    """Sentences instead of tracebacks for what a user can cause."""
    try:
        yield
    except FedForwardError as error:
        _complain(str(error))
        raise typer.Exit(2) from error
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _complain(f"{where}{error.strerror or error}. Look at the path, its rights and its room.")
        raise typer.Exit(2) from error
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        _complain(
            "there is not enough memory. Lower method.batch_size, data.sequence_length or "
            f"run.probes_per_call, or take a smaller model. {resume_hint}"
        )
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        _say(console, f"interrupted. {resume_hint}")
        raise typer.Exit(130) from None


def _out_of_memory(error: Exception) -> bool:
    """Whether memory ran out; PyTorch's allocators say so in words only."""
    words = str(error).lower()
    told = "out of memory" in words or "can't allocate memory" in words
    return isinstance(error, MemoryError) or told


def _complain(message: str) -> None:
    console.print(Text.assemble(("error:", "bold red"), " ", message), soft_wrap=True)


def _say(where: Console, text: str) -> None:
    """Print as it is: paths may hold what rich takes for markup, and must not be wrapped."""
    where.print(Text(text), soft_wrap=True)


class Lines(logging.Handler):
    """What a command logs, as plain lines."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the line."""
        _say(console, record.getMessage())


class Display(logging.Handler):
    """What a run logs and its rounds: a live line on a terminal, plain lines elsewhere."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(logging.INFO)
        self.rich = progress
        self.task = progress.add_task("starting", total=None)
        self.heldout = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Show what the run does just now, or say what has happened."""
        text = record.getMessage()
        if record.name != PHASES.name:
            _say(console, text)
            return
        self.rich.update(self.task, description=text)
        if not console.is_terminal:
            console.print(text, highlight=False)

    def progress(self, done: int, total: int, line: dict[str, Any]) -> None:
        """A `ProgressCallback`: a round is done."""
        if "heldout_loss" in line:
            self.heldout = f"  held-out {line['heldout_loss']:.3f}"
            for name, value in line.get("metrics", {}).items():
                self.heldout += f"  {name} {figure(name, value)}" if name != "loss" else ""
        training = line["training_loss"]
        losses = f"training {training:.3f}" if training is not None else "training not finite"
        text = f"round {done}/{total}  {losses}{self.heldout}"
        self.rich.update(self.task, description=text, total=total, completed=done)
        if not console.is_terminal and ("heldout_loss" in line or done == total):
            console.print(f"{text}  {line['seconds']:.0f} s", highlight=False)


@contextmanager
def _display() -> Iterator[Display]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TextColumn("elapsed,"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    live = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not live) as progress:
        display = Display(progress)
        with shown(display):
            yield display


def _carry_out(config: Any, out: Path, resume: bool, as_json: bool) -> None:
    """Run a configuration and show its result."""
    with _display() as display:
        PHASES.info("loading libraries")
        quiet_libraries()
        from fedforward.training.run import Run
        from fedforward.training.run_directory import strict

        summary = Run(config, out, resume, display.progress).fit().to_json()
    if as_json:
        print(json.dumps(strict(summary), indent=2))
        return
    from fedforward.cli.tables import summary_table

    out_console.print(summary_table(summary))
    folder = "adapter" if config.model.tune == "lora" else "model"
    _say(out_console, f"\neverything is in {out}: see summary.json, loss.png and {folder}")


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="TOML file", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value …", show_default=False)
    ] = None,
    out: OutOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="continue the run in --out, if there is one")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Carry out a run: federated tuning of one model over simulated clients."""
    from fedforward.config import schema as configuration

    out = out or Path("runs") / config.stem
    again = ["fedforward", "run", str(config), *(overrides or []), "--out", str(out), "--resume"]
    with _friendly(f"Continue with: {shlex.join(again)}"):
        _carry_out(configuration.load(config, overrides or []), out, resume, as_json)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="run directory")] = Path("runs/demo"),
    resume: Annotated[
        bool, typer.Option("--resume", help="continue the run in --out, if there is one")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Tune the small model that ships with fedforward, over four sites, in about a minute."""
    from fedforward.demo import run as demonstration

    with _friendly(f"Continue with: fedforward demo --out {shlex.quote(str(out))} --resume"):
        data = out.parent / f"{out.name}-data" / "sites.jsonl"
        _carry_out(demonstration.prepare(data), out, resume, as_json)


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="TOML file", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value …", show_default=False)
    ] = None,
    picture: Annotated[
        Path | None, typer.Option("--png", help="also draw the plan", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a run will need, before it runs: memory, blocks of each client, bytes."""
    from fedforward.config import schema as configuration

    with _friendly():
        settings = configuration.load(config, overrides or [])
        if picture is not None and not picture.absolute().parent.is_dir():
            raise FedForwardError(f"--png {picture}: there is no folder {picture.parent}.")
        with _display():
            PHASES.info("loading libraries")
            quiet_libraries()
            from fedforward.training.preview import preview

            result = preview(settings)
        from fedforward.cli import plan_tables as show

        if as_json:
            print(json.dumps(result.as_json(), indent=2))
        else:
            for part in show.render(result):
                out_console.print(part)
        if picture is not None:
            show.draw(picture, result)
            if not as_json:
                _say(out_console, f"\nwrote {picture}")


TlsOption = Annotated[
    Path | None, typer.Option("--tls", help="folder of certificates", show_default=False)
]
BaseOption = Annotated[
    str | None,
    typer.Option(
        "--model", help="base model, where the run directory is a server's", show_default=False
    ),
]
InsecureOption = Annotated[
    bool, typer.Option("--insecure", help="no certificates, no keys: to try out on one machine")
]


@app.command()
def server(
    config: Annotated[Path, typer.Argument(help="TOML file", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value …", show_default=False)
    ] = None,
    listen: Annotated[str, typer.Option("--listen", help="HOST:PORT")] = "0.0.0.0:9400",
    tls: TlsOption = None,
    insecure: InsecureOption = False,
    out: OutOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="continue the run in --out, if there is one")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Carry out a run over sites on other machines; needs no model and no data."""
    from fedforward.config.site import load_terms
    from fedforward.deployment import supervisor as supervision

    out = out or Path("runs") / config.stem
    again = ["fedforward", "server", str(config), *(overrides or []), "--listen", listen]
    again += ["--tls", str(tls)] if tls else ["--insecure"]
    again += ["--out", str(out), "--resume"]
    with _friendly(f"Continue with: {shlex.join(again)}"):
        settings = load_terms(config, overrides or [])
        _check_flower()
        from fedforward.deployment.flower.server import ListenAddress, serve

        address = ListenAddress.parse(listen, tls, insecure)
        supervision.end_on_sigterm()
        with _display() as display:
            summary = serve(settings, out, address, resume=resume, progress=display.progress)
    from fedforward.training.plots import draw
    from fedforward.training.run_directory import RunDirectory

    directory = RunDirectory(out)
    draw(directory.plot, directory.read_metrics(summary["rounds"]), summary)
    if as_json:
        print(json.dumps(summary, indent=2))
        return
    from fedforward.cli.tables import federation_table

    out_console.print(federation_table(summary))
    _say(out_console, f"\neverything is in {out}; each site has what was tuned")


@app.command()
def submit(
    config: Annotated[Path, typer.Argument(help="TOML file", show_default=False)],
    engine: Annotated[
        str, typer.Option("--engine", help="HOST:PORT of a SuperLink", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value …", show_default=False)
    ] = None,
    authority: Annotated[
        Path | None, typer.Option("--ca", help="its certificate's authority", show_default=False)
    ] = None,
    insecure: InsecureOption = False,
    out: OutOption = None,
) -> None:
    """Hand a run to a Flower engine that is operated without `fedforward server`."""
    from fedforward.config.site import load_terms

    out = out or Path("runs") / config.stem
    with _friendly():
        settings = load_terms(config, overrides or [])
        _check_flower()
        from fedforward.deployment.flower.engine import hand_over

        if insecure == (authority is not None):
            raise FedForwardError("Give either --ca FILE or --insecure.")
        if authority is not None and not authority.is_file():
            raise FedForwardError(f"--ca {authority}: no such file.")
        number = hand_over(settings, out, engine, authority)
    _say(
        out_console,
        f"run {number} was submitted; where the engine runs it, it writes {out.absolute()}",
    )


@app.command()
def client(
    config: Annotated[Path, typer.Argument(help="site.toml", show_default=False)],
    server: Annotated[str, typer.Option("--server", help="HOST:PORT", show_default=False)],
    tls: TlsOption = None,
    key: Annotated[
        Path | None, typer.Option("--key", help="this site's key", show_default=False)
    ] = None,
    insecure: InsecureOption = False,
    once: Annotated[bool, typer.Option("--once", help="end with the first run")] = False,
) -> None:
    """Take part in a server's runs with this site's own data and model, until interrupted."""
    from fedforward.config.site import load_site
    from fedforward.deployment import supervisor as supervision

    with _friendly():
        settings = load_site(config)
        _check_flower()
        from fedforward.deployment.flower import client as site

        site.check(tls, key, insecure)
        supervision.end_on_sigterm()
        with shown(Lines()):
            site.take_part(config, settings, server, tls=tls, key=key, once=once)


@app.command()
def certs(
    folder: Annotated[Path, typer.Argument(help="folder to write", show_default=False)],
    host: Annotated[
        list[str] | None,
        typer.Option("--host", help="name or address of the server", show_default=False),
    ] = None,
    site: Annotated[
        list[str] | None, typer.Option("--site", help="name of a site", show_default=False)
    ] = None,
) -> None:
    """Make certificates for a server and keys for its sites, or what is missing of them."""
    with _friendly():
        _check_flower()
        from fedforward.deployment.flower import certificates

        if not host and not site:
            raise FedForwardError(
                "Nothing to make: give --host, the name that sites reach the server by, and a "
                "--site for each site."
            )
        written = certificates.make(folder, host or [], site or [])
    for path in written:
        _say(out_console, f"wrote {path}")
    if not written:
        _say(out_console, f"{folder} has all of it already")


@app.command()
def status(
    run: Annotated[Path, typer.Argument(help="run directory", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Show how far a run across machines is, and what its sites do."""
    with _friendly():
        content = _read_status(run)
        if as_json:
            print(json.dumps(content, indent=2))
            return
        from fedforward.cli.tables import status_tables

        for part in status_tables(content):
            out_console.print(part)


@app.command()
def stop(run: Annotated[Path, typer.Argument(help="run directory", show_default=False)]) -> None:
    """Ask a run across machines to stop; it can be resumed."""
    with _friendly():
        found = _read_status(run)
        if found["state"] != "running":
            raise FedForwardError(f"{run} is not running: it is {found['state']}.")
        (run / "stop").touch()
    _say(out_console, f"asked {run} to stop")


@app.command("inspect-message")
def inspect_message(
    paths: Annotated[list[Path], typer.Argument(help="files of OUT/messages", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Show messages that a site has kept, byte by byte."""
    from fedforward.cli.message_dump import listing, message_table

    shown = []
    with _friendly():
        for path in paths:
            try:
                data = path.read_bytes()
            except OSError as error:
                raise FedForwardError(f"{path} cannot be read: {error.strerror}.") from error
            try:
                shown.append((path, listing(data)))
            except FedForwardError as error:
                raise FedForwardError(f"{path}: {error}") from error
    if as_json:
        content = {
            str(path): [
                {"place": f.place, "bytes": f.data.hex(), "what": f.name, "value": f.value}
                for f in fields
            ]
            for path, fields in shown
        }
        print(json.dumps(content, indent=2))
        return
    for path, fields in shown:
        out_console.print(
            message_table(f"{path.name}: {sum(len(f.data) for f in fields)} bytes", fields)
        )


def _read_status(run: Path) -> dict[str, Any]:
    path = run / "status.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise FedForwardError(
            f"{run} has no status: it is not the --out folder of a `fedforward server` that has "
            "begun its run."
        ) from error


def _check_flower() -> None:
    from importlib.util import find_spec

    if find_spec("flwr") is None:
        raise FedForwardError(
            "Federations across machines run on Flower, which is not installed. Install it with: "
            "pip install 'fedforward[flower]'"
        )


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="file to write")] = Path("fedforward.toml"),
    site: Annotated[
        bool, typer.Option("--site", help="a site's half of a configuration across machines")
    ] = False,
) -> None:
    """Write a commented example configuration."""
    from fedforward.config import schema as configuration
    from fedforward.config.site import example_site

    with _friendly():
        if path.exists():
            raise FedForwardError(f"{path} exists already. Choose another name.")
        try:
            text = example_site() if site else configuration.example()
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise FedForwardError(f"{path} cannot be written: {error.strerror}.") from error
    _say(
        out_console,
        f"wrote {path}: set model.path and data.source, then fedforward "
        f"{'client' if site else 'run'} {path}",
    )


@app.command()
def verify(
    run: Annotated[Path, typer.Argument(help="run directory", show_default=False)],
    model: BaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Rebuild the tuned parameters from base and ledger, and say whether every bit agrees."""
    with _friendly():
        with console.status("rebuilding from base and ledger"):
            quiet_libraries()
            from dataclasses import asdict

            from fedforward.training import replay as artefacts

            result = artefacts.verify(run, model)
        if as_json:
            print(json.dumps(asdict(result), indent=2))
        elif not result.differences:
            how = "rebuilt from base and ledger" if result.replayed else "state file and ledger"
            checked = ["the saved tensors"] if result.saved else []
            checked += [f"{result.proofs} state digests in reports"] if result.proofs else []
            _say(
                out_console,
                f"bit-identical: {result.rounds} rounds, {how}, agree with "
                f"{' and '.join(checked) or 'each other (nothing else was saved yet)'}\n"
                f"state digest   {result.state_digest}\nledger digest  {result.ledger_digest}",
            )
        if result.differences:
            raise FedForwardError(f"{run} does not verify: " + "; ".join(result.differences) + ".")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="run directory", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="new folder", show_default=False)],
    merge: Annotated[bool, typer.Option("--merge", help="a whole model, adapters merged")] = False,
    model: BaseOption = None,
) -> None:
    """Write the adapter (PEFT format) or a merged model, rebuilt from the ledger."""
    with _friendly(), console.status("rebuilding from base and ledger"):
        quiet_libraries()
        from fedforward.training import replay as artefacts

        artefacts.export(run, out, merge=merge, base=model)
    _say(out_console, f"wrote {out}")


@app.callback(invoke_without_command=True)
def _version(
    show: Annotated[bool, typer.Option("--version", help="print the version and exit")] = False,
) -> None:
    if show:
        out_console.print(f"fedforward {version('fedforward')}", highlight=False)
        raise typer.Exit


def main() -> None:
    """The entry point of the `fedforward` command."""
    app()


if __name__ == "__main__":
    main()
