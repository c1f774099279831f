"""The command `bench-federation`: what a round costs on the user's own machines, part by part."""

import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from fedforward.cli.console import deployment_log, display, friendly, out_console, say
from fedforward.cli.deploy import InsecureOption, TlsOption
from fedforward.cli.train import JsonOption, OutOption, OverridesArgument
from fedforward.core.errors import FedForwardError
from fedforward.core.paths import check_new_folder, home
from fedforward.core.registry import RUNTIMES

if TYPE_CHECKING:
    from fedforward.deployment.flower.bench import Measured, Part
    from fedforward.deployment.supervisor import Child

#: Seconds between two looks at the sites that were started.
_LOOK_INTERVAL_S = 0.5


def bench_federation(
    config: Annotated[
        Path | None,
        typer.Argument(help="TOML file; without it, sites on this machine", show_default=False),
    ] = None,
    overrides: OverridesArgument = None,
    listen: Annotated[
        str | None, typer.Option("--listen", help="HOST:PORT for your sites", show_default=False)
    ] = None,
    tls: TlsOption = None,
    insecure: InsecureOption = False,
    sites: Annotated[
        int | None,
        typer.Option("--sites", min=1, help="sites on this machine", show_default="3"),
    ] = None,
    local_steps: Annotated[
        int | None,
        typer.Option("--local-steps", min=1, help="of those sites", show_default="10"),
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=3, help="of which one warms up")] = 9,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure seconds of a round by part, bytes on the wire and reconnects."""
    RUNTIMES.get("flower").check()
    if out is not None:
        check_new_folder(home(out), "--out")
    if config is None:
        if listen is not None or tls is not None or insecure:
            raise FedForwardError(
                "--listen, --tls and --insecure are for sites of your own: give a run.toml too. "
                "Without one, sites are started on this machine."
            )
        found = _on_this_machine(out, sites or 3, local_steps or 10, rounds)
    else:
        if sites is not None or local_steps is not None:
            raise FedForwardError(
                "--sites and --local-steps are for sites on this machine. With a run.toml your "
                "own sites come, with its method.local_steps. Leave them out."
            )
        changes = [*(overrides or []), f"federation.rounds={rounds}"]
        changes.append(f"run.evaluate_every={rounds}")
        found = _with_own_sites(config, changes, listen or "0.0.0.0:9400", tls, insecure, out)
    if as_json:
        print(json.dumps(found.as_json(), indent=2))
        return
    for table in tables(found):
        out_console.print(table)
    if found.steps is None:
        say(out_console, "\nwhat a site does with its time stands in its own model-server.log")


def _with_own_sites(
    config: Path,
    overrides: list[str],
    listen: str,
    tls: Path | None,
    insecure: bool,
    out: Path | None,
) -> "Measured":
    """Serve a short run to sites that its user starts."""
    from fedforward.config.site import load_terms
    from fedforward.deployment.flower import bench

    out = out or Path("runs") / f"{config.stem}-bench"
    settings = load_terms(config, overrides)
    with friendly(), display() as progress, _noted():
        RUNTIMES.get("flower").serve(
            settings,
            out,
            listen=listen,
            tls=tls,
            insecure=insecure,
            resume=False,
            progress=progress.progress,
        )
    return bench.measured(home(out), {})


def _on_this_machine(out: Path | None, sites: int, local_steps: int, rounds: int) -> "Measured":
    """Start a server and sites with the demonstration's model on the loopback device."""
    if out is not None:
        place = home(out)
        if place.is_dir() and any(place.iterdir()):
            raise FedForwardError(f"--out {out} has files in it. Give the name of a new folder.")
        return _in_folder(place, sites, local_steps, rounds)
    with tempfile.TemporaryDirectory(prefix="fedforward-bench-") as folder:
        return _in_folder(Path(folder), sites, local_steps, rounds)


def _in_folder(folder: Path, sites: int, local_steps: int, rounds: int) -> "Measured":
    from fedforward.config.site import load_terms
    from fedforward.demo import federation
    from fedforward.deployment.flower import bench, certificates
    from fedforward.deployment.supervisor import Child, Supervisor, free_port

    folder.mkdir(parents=True, exist_ok=True)
    places = federation.write(folder, sites, rounds, local_steps)
    certificates.make(folder / "certs", ["localhost"], list(places))
    run, port = folder / "run", free_port()
    with friendly(), display() as progress, _noted(), Supervisor() as supervisor:
        for name, path in places.items():
            command = [sys.executable, "-m", "fedforward.cli", "client", str(path), "--once"]
            command += ["--server", f"localhost:{port}", "--tls", str(folder / "certs")]
            command += ["--key", str(folder / "certs" / "sites" / f"{name}.key")]
            supervisor.start(Child(name, command, folder / f"{name}.log", {}))
        ended: list[Child] = []
        with _watched(supervisor.children, run, ended):
            try:
                RUNTIMES.get("flower").serve(
                    load_terms(folder / "run.toml", []),
                    run,
                    listen=f"127.0.0.1:{port}",
                    tls=folder / "certs",
                    insecure=False,
                    resume=False,
                    progress=progress.progress,
                )
            except FedForwardError as error:
                if not ended:
                    raise
                raise FedForwardError(
                    f"{ended[0].name} ended before the run was over. Its last lines are:\n"
                    f"{ended[0].tail()}"
                ) from error
    return bench.measured(run, {name: folder / name for name in places})


@contextmanager
def _noted() -> Iterator[None]:
    """Have the server and the sites that are started meanwhile note when what happens."""
    from fedforward.deployment.flower.timings import VARIABLE

    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "1"
    try:
        yield
    finally:
        del os.environ[VARIABLE]
        if before is not None:
            os.environ[VARIABLE] = before


@contextmanager
def _watched(sites: "list[Child]", run: Path, ended: "list[Child]") -> Iterator[None]:
    """Stop the run when a site ends that should not."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_LOOK_INTERVAL_S):
            dead = [site for site in sites if site.process is not None and site.process.poll()]
            if dead and run.is_dir():
                ended.extend(dead)
                deployment_log.info("%s ended; the run is stopped", dead[0].name)
                (run / "stop").touch()
                return

    thread = threading.Thread(target=watch, name="sites", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def tables(found: "Measured") -> list[Table]:
    """What was measured, for people."""
    many = "site" if found.sites == 1 else "sites"
    title = f"seconds of a round, {found.sites} {many}, {found.rounds} rounds"
    seconds = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("part", "median", "most"):
        seconds.add_column(name, justify="left" if name == "part" else "right")

    def add(part: "Part", style: str | None = None) -> None:
        seconds.add_row(part.part, f"{part.median:.2f}", f"{part.most:.2f}", style=style)

    for part in found.parts:
        add(part)
        if part.part.endswith("the model server") and found.steps is not None:
            add(found.steps, "dim")
    add(found.round, "bold")
    traffic = Table(title="bytes, site and round", title_justify="left", box=None)
    for name in ("", "up", "down"):
        traffic.add_column(name, justify="right" if name else "left")
    for words, ways in (("messages", found.messages), ("on the wire", found.wire)):
        values = ["not counted here"] * 2 if ways is None else [f"{ways[w]:,.0f}" for w in ways]
        traffic.add_row(words, *values)
    connections = Table(title="reconnects", title_justify="left", box=None, show_header=False)
    for name, count in found.reconnects.items():
        connections.add_row(name, str(count))
    return [seconds, traffic, connections]
