"""The command line: the application, its commands in groups, and the options common to all.

The commands themselves are thin functions that read arguments, call the library and print for
people. An error of the user's making is one sentence on standard error and exit code 2. PyTorch
and transformers are imported only by the commands that need them.
"""

import functools
import inspect as signatures
import os
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from fedforward.cli import deploy, inspect, train
from fedforward.cli.bench import bench_federation
from fedforward.cli.compare import compare
from fedforward.cli.console import friendly, out_console, set_up_logging
from fedforward.cli.diagnose import diagnose
from fedforward.cli.privacy import privacy
from fedforward.cli.report import report
from fedforward.core.logs import tolerate_narrow_encodings
from fedforward.core.version import __version__

# PyTorch's threads spin for long before they sleep; on a busy machine that takes the cores from
# those that work. It must be said before PyTorch is loaded (docs/architecture.md, "Threads").
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

app = typer.Typer(
    help="Federated fine-tuning of language models with forward passes only.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Command = Callable[..., None]

#: The commands in the groups that `--help` shows.
GROUPS: dict[str, dict[str, Command]] = {
    "Runs on this machine": {
        "demo": train.demo,
        "init": train.init,
        "preview": train.preview,
        "plan": train.plan,
        "align": train.align,
        "mask": train.mask,
        "tune": train.tune,
        "diagnose": diagnose,
        "run": train.run,
        "compare": compare,
    },
    "Results": {"report": report, "verify": train.verify, "export": train.export},
    "Runs across machines": {
        "certs": deploy.certs,
        "server": deploy.server,
        "client": deploy.client,
        "submit": deploy.submit,
        "job": deploy.job,
        "status": deploy.status,
        "privacy": privacy,
        "stop": deploy.stop,
        "bench-federation": bench_federation,
    },
    "Inspection": {"inspect-message": inspect.inspect_message},
}
#: Names of an earlier form, which say what to type instead.
RENAMED: dict[str, Command] = {"letter": inspect.letter}


class _Command(TyperCommand):
    """A command that knows what is meant by an option that looks like a configuration key."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As in click; an unknown option such as `--method.mu` is told from a key's form."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            # The parser's own package is typer's to choose.
            option = str(getattr(error, "option_name", ""))
            names = {parameter.name for parameter in self.params}
            keys = bool(names & {"overrides", "arguments"})
            if keys and ("." in option or option in ("--set", "--key", "--override")):
                key = option.lstrip("-") if "." in option else "section.key"
                error.message = f"No such option {option!r}. Write {key}=VALUE, without dashes."  # type: ignore[attr-defined]
                error.possibilities = []  # type: ignore[attr-defined]
            raise


def _common_options(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="show what is done, in detail")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="show the result and errors, and no progress")
    ] = False,
) -> None:
    set_up_logging(verbose=verbose, quiet=quiet)


def _with_common_options(command: Command) -> Command:
    """The command with the options common to all, its errors shown as sentences."""

    @functools.wraps(command)
    def carry_out(*, verbose: bool, quiet: bool, **arguments: Any) -> None:
        with friendly():
            _common_options(verbose, quiet)
            command(**arguments)

    own, common = signatures.signature(command), signatures.signature(_common_options)
    parameters = [*own.parameters.values(), *common.parameters.values()]
    # What typer reads the options from.
    carry_out.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    carry_out.__annotations__ = command.__annotations__ | _common_options.__annotations__
    return carry_out


for group, commands in GROUPS.items():
    for name, function in commands.items():
        app.command(name, cls=_Command, rich_help_panel=group)(_with_common_options(function))
for name, function in RENAMED.items():
    app.command(name, hidden=True)(_with_common_options(function))


@app.callback(invoke_without_command=True)
def _version(
    show: Annotated[bool, typer.Option("--version", help="print the version and exit")] = False,
) -> None:
    if show:
        out_console.print(f"fedforward {__version__}", highlight=False)
        raise typer.Exit


def main() -> None:
    """The entry point of the `fedforward` command."""
    tolerate_narrow_encodings()
    app()


if __name__ == "__main__":
    main()
