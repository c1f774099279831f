"""Commands that show what was written: the listing of a message, byte by byte."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fedforward.cli.console import out_console
from fedforward.cli.train import JsonOption
from fedforward.core.errors import FedForwardError

MessagesArgument = Annotated[
    list[Path], typer.Argument(help="files of OUT/letters", show_default=False)
]


def inspect_message(paths: MessagesArgument, as_json: JsonOption = False) -> None:
    """Show messages that a site has kept (site.keep_letters), byte by byte."""
    from fedforward.cli.message_dump import listing, message_table

    shown = []
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
        title = f"{path.name}: {sum(len(f.data) for f in fields)} bytes"
        out_console.print(message_table(title, fields))


def letter(paths: Annotated[list[Path] | None, typer.Argument()] = None) -> None:
    """Name the command that has taken the place of this one."""
    files = " ".join(map(str, paths or [Path("FILE")]))
    raise FedForwardError(
        f"`fedforward letter` is called `fedforward inspect-message` now. Type: fedforward "
        f"inspect-message {files}"
    )
