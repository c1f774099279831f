"""Commands for runs across machines: certs, server, client, submit, status and stop."""

import json
import shlex
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedforward.cli.console import deployment_log, display, friendly, out_console, say
from fedforward.cli.train import (
    ConfigArgument,
    JsonOption,
    OutOption,
    OverridesArgument,
    ResumeOption,
    RunArgument,
)
from fedforward.core.errors import FedForwardError
from fedforward.core.files import read_object
from fedforward.core.paths import home
from fedforward.core.registry import RUNTIMES
from fedforward.deployment.status import is_status

if TYPE_CHECKING:
    from fedforward.deployment.runtime import Runtime

TlsOption = Annotated[
    Path | None, typer.Option("--tls", help="folder of certificates", show_default=False)
]
InsecureOption = Annotated[
    bool, typer.Option("--insecure", help="no certificates, no keys: to try out on one machine")
]
RuntimeOption = Annotated[str, typer.Option("--runtime", help="engine that carries the messages")]


def server(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    listen: Annotated[str, typer.Option("--listen", help="HOST:PORT")] = "0.0.0.0:9400",
    tls: TlsOption = None,
    insecure: InsecureOption = False,
    runtime: RuntimeOption = "flower",
    out: OutOption = None,
    resume: ResumeOption = False,
    without: Annotated[
        list[str] | None,
        typer.Option(
            "--without", help="leave a site out of a run that goes on; its past rounds stay"
        ),
    ] = None,
    page: Annotated[
        int | None,
        typer.Option(
            "--page",
            min=1,
            max=65535,
            help="serve the run's page to this machine on that port",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Carry out a run over sites on other machines; needs no model and no data."""
    from fedforward.config.site import load_terms
    from fedforward.deployment.state import check_without

    out = out or Path("runs") / config.stem
    again = ["fedforward", "server", str(config), *(overrides or []), "--listen", listen]
    again += ["--tls", str(tls)] if tls else ["--insecure"]
    again += ["--runtime", runtime] if runtime != "flower" else []
    again += ["--out", str(out), "--resume"]
    for name in without or []:
        again += ["--without", name]
    again += ["--page", str(page)] if page is not None else []
    with friendly(f"Continue with: {shlex.join(again)}"):
        settings = load_terms(config, overrides or [])
        if without and not resume:
            raise FedForwardError(
                f"--without {without[0]} is for a run that goes on: give --resume as well."
            )
        if resume:
            check_without(out, without or [], settings)
        engine: Runtime = RUNTIMES.get(runtime)
        with _page(out, page), display() as progress:
            progress.objective = settings.objective
            summary = engine.serve(
                settings,
                out,
                listen=listen,
                tls=tls,
                insecure=insecure,
                resume=resume,
                progress=progress.progress,
                without=without or [],
            )
    from fedforward.training.plots import draw
    from fedforward.training.run_directory import RunDirectory

    directory = RunDirectory(out)
    draw(directory.plot, directory.read_metrics(summary["rounds"]), summary)
    if as_json:
        print(json.dumps(summary, indent=2))
        return
    from fedforward.cli.tables import federation_table

    out_console.print(federation_table(summary))
    say(out_console, f"\neverything is in {out}; each site has what was tuned")


def _page(out: Path, port: int | None) -> AbstractContextManager[object]:
    """The run's page on a port of this machine, while the block lasts; nothing without a port."""
    if port is None:
        return nullcontext()
    from fedforward.deployment.page_server import page_served

    served = page_served(home(out), port)
    deployment_log.info("the page of the run is at http://127.0.0.1:%d/ on this machine", port)
    return served


def client(
    config: Annotated[Path, typer.Argument(help="site.toml", show_default=False)],
    server: Annotated[str, typer.Option("--server", help="HOST:PORT", show_default=False)],
    tls: TlsOption = None,
    key: Annotated[
        Path | None, typer.Option("--key", help="this site's key", show_default=False)
    ] = None,
    insecure: InsecureOption = False,
    once: Annotated[bool, typer.Option("--once", help="end with the first run")] = False,
    runtime: RuntimeOption = "flower",
) -> None:
    """Take part in a server's runs with this site's own data and model, until interrupted."""
    from fedforward.config.site import load_site

    settings = load_site(config)
    engine: Runtime = RUNTIMES.get(runtime)
    engine.take_part(config, settings, server, tls=tls, key=key, insecure=insecure, once=once)


def certs(
    folder: Annotated[Path, typer.Argument(help="folder to write", show_default=False)],
    host: Annotated[
        list[str] | None,
        typer.Option("--host", help="name or address of the server", show_default=False),
    ] = None,
    site: Annotated[
        list[str] | None, typer.Option("--site", help="name of a site", show_default=False)
    ] = None,
    runtime: RuntimeOption = "flower",
) -> None:
    """Make certificates for a server and keys for its sites, or what is missing of them."""
    RUNTIMES.get(runtime).check()
    if not host and not site:
        raise FedForwardError(
            "Nothing to make: give --host, the name that sites reach the server by, and a "
            "--site for each site."
        )
    if runtime == "nvflare":
        from fedforward.deployment.nvflare import kits

        written = kits.make(folder, host or [], site or [])
    else:
        from fedforward.deployment.flower import certificates

        written = certificates.make(folder, host or [], site or [])
    for path in written:
        say(out_console, f"wrote {path}")
    if not written:
        say(out_console, f"{folder} has all of it already")


def submit(
    config: ConfigArgument,
    engine: Annotated[
        str, typer.Option("--engine", help="HOST:PORT of a SuperLink", show_default=False)
    ],
    overrides: OverridesArgument = None,
    authority: Annotated[
        Path | None, typer.Option("--ca", help="its certificate's authority", show_default=False)
    ] = None,
    insecure: InsecureOption = False,
    out: OutOption = None,
) -> None:
    """Hand a run to a Flower engine that is operated without `fedforward server`."""
    from fedforward.config.site import load_terms

    out = out or Path("runs") / config.stem
    settings = load_terms(config, overrides or [])
    RUNTIMES.get("flower").check()
    from fedforward.deployment.flower.engine import hand_over

    if insecure == (authority is not None):
        raise FedForwardError("Give either --ca FILE or --insecure.")
    if authority is not None and not authority.is_file():
        raise FedForwardError(f"--ca {authority}: no such file.")
    with display(f"submitting to {engine}"):
        number = hand_over(settings, out, engine, authority)
    say(
        out_console,
        f"run {number} was submitted; where the engine runs it, it writes {out.absolute()}",
    )


def job(
    config: ConfigArgument,
    out: Annotated[Path, typer.Option("--out", help="folder to write", show_default=False)],
    overrides: OverridesArgument = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--name", help="of the run's folder at the server; default that of --out's last part"
        ),
    ] = None,
) -> None:
    """Write a run as a job that an administrator of NVIDIA FLARE submits as it is."""
    from fedforward.config.site import load_terms

    settings = load_terms(config, overrides or [])
    RUNTIMES.get("nvflare").check()
    from fedforward.deployment.nvflare.job import write_job

    out = home(out)
    write_job(settings, out, name if name is not None else out.absolute().name)
    say(out_console, f"wrote {out}; submit it with: nvflare job submit -j {shlex.quote(str(out))}")


def status(
    run: RunArgument,
    watch: Annotated[
        bool, typer.Option("--watch", help="show it again until the run is over")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show how far a run is, and across machines what its sites do."""
    from fedforward.cli import watching

    run = home(run)

    def read() -> dict[str, Any]:
        return _read_status(run) if (run / "status.json").exists() else watching.local_status(run)

    if watch:
        with friendly(
            f"Watch again with: {shlex.join(['fedforward', 'status', str(run), '--watch'])}"
        ):
            watching.watch(read, as_json=as_json)
        return
    content = read()
    if as_json:
        print(json.dumps(content, indent=2))
        return
    for part in watching.tables(content):
        out_console.print(part)


def stop(run: RunArgument) -> None:
    """Ask a run across machines to stop; it can be resumed."""
    found = _read_status(run)
    if found["state"] != "running":
        raise FedForwardError(f"{run} is not running: it is {found['state']}.")
    (run / "stop").touch()
    say(out_console, f"asked {run} to stop")


def _read_status(run: Path) -> dict[str, Any]:
    path = run / "status.json"
    if not path.is_file():
        raise FedForwardError(
            f"{run} has no status: it is not the --out folder of a `fedforward server` that has "
            "begun its run."
        )
    advice = "A server that runs, or that goes on with --resume, writes it again."
    content = read_object(path, advice)
    if not is_status(content):
        raise FedForwardError(f"{path} is damaged: it is not what a server writes. {advice}")
    return content
