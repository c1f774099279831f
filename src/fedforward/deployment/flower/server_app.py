"""Flower's server app, which runs the coordinator; and a configuration in Flower's words."""

from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import ServerApp

from fedforward.config.fields import AT_SITES
from fedforward.config.loading import assign, parse_override, validate
from fedforward.config.schema import Config
from fedforward.config.site import check_terms
from fedforward.config.template import toml_value
from fedforward.core.errors import FedForwardError
from fedforward.deployment.coordinator import Coordinator
from fedforward.deployment.flower.transport import GridTransport
from fedforward.deployment.transport import Transport
from fedforward.training.folder_lock import COORDINATOR_LOCK, FolderLock
from fedforward.training.run_directory import RunDirectory

#: In front of lists and tables, which Flower's configuration does not have.
_TOML = "toml:"

server_app = ServerApp()


def run_config(config: Config) -> dict[str, Any]:
    """A configuration as Flower's users write it: dotted kebab-case keys and plain values."""
    return {
        f"{section}.{key}".replace("_", "-"): (
            _TOML + toml_value(value) if isinstance(value, list | dict) else value
        )
        for section, values in config.model_dump(exclude_none=True).items()
        for key, value in values.items()
    }


def config_of(given: dict[str, Any]) -> tuple[Config, Path]:
    """The configuration and run directory that `run_config` and `--run-config` make.

    Raises:
        FedForwardError: for keys and values that are not legal.
    """
    origin = "the app's configuration"
    overrides, content = [], {"model": {"path": AT_SITES}, "data": {"source": AT_SITES}}
    out = Path("runs/flower")
    for name, value in given.items():
        key = name.replace("-", "_")
        if key == "out":
            out = Path(str(value))
        elif isinstance(value, str) and value.startswith(_TOML):
            overrides.append(f"{key}={value.removeprefix(_TOML)}")
        else:
            section, _, rest = key.partition(".")
            assign(content, section, rest, value, origin)
    for override in overrides:
        section, key, value = parse_override(override)
        assign(content, section, key, value, origin)
    config = validate(content, origin)
    check_terms(config, origin)
    return config, out


@server_app.main()  # type: ignore[untyped-decorator]
def main(grid: Any, context: Context) -> None:
    """Carry out the run, or go on with it. What it has to say is in the run directory."""
    config, out = config_of(dict(context.run_config))
    try:
        carry_out(config, out, GridTransport(grid, out / "flower"))
    except FedForwardError as error:
        # It is in status.json; a traceback would tell nobody more.
        print(f"error: {error}", flush=True)


def carry_out(config: Config, out: Path, transport: Transport) -> None:
    """Carry out a run unless another coordinator does: nothing is written then.

    Raises:
        FedForwardError: another one does, or the run cannot go on.
    """
    directory = RunDirectory(out)
    if not directory.started:
        directory.claim()
    lock = FolderLock(directory.path, "out", COORDINATOR_LOCK)
    lock.acquire()
    try:
        Coordinator(config, directory.path, transport, resume=True).run()
    finally:
        lock.release()
