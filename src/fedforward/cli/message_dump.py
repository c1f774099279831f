"""A message byte by byte, for whoever must know what leaves a site.

What the codec and the envelope say of their own fields is shown; a test holds it to every byte.
Imports no PyTorch.
"""

import json

from rich.table import Table

from fedforward.messages import envelope as letters
from fedforward.messages.codec import Listed, Message, Reader, list_numbers
from fedforward.messages.envelope import Kind, Letter
from fedforward.messages.report import Report
from fedforward.messages.snapshot import Snapshot
from fedforward.messages.task import Task

#: Bytes that are shown of a field.
SHOWN = 8
_BODIES: dict[Kind, type[Message]] = {
    Kind.TASK: Task,
    Kind.EVALUATION: Task,
    Kind.FAREWELL: Task,
    Kind.REPORT: Report,
    Kind.SNAPSHOT: Snapshot,
}


def listing(data: bytes) -> list[Listed]:
    """Every byte of a sealed letter, in order.

    Raises:
        MessageError: it is not a whole letter.
    """
    letter = Letter.open(data)
    trace: list[Listed] = []
    reader = Reader(data, trace)
    names = (
        "letter: magic",
        "letter: version",
        f"letter: kind ({letter.kind.name})",
        "letter: run",
    )
    list_numbers(reader, letters.HEAD_FORM, names)
    kind = _BODIES.get(letter.kind)
    if kind is not None:
        kind.open(reader)
    elif letter.kind in (Kind.REFUSAL, Kind.DISMISSAL):
        reader.take(len(letter.body), "sentence", lambda raw: letter.text())
    else:
        reader.take(len(letter.body), "JSON", lambda raw: json.dumps(letter.json()))
    reader.take(
        letters.CHECKSUM_BYTES, "checksum", lambda raw: "first bytes of the SHA-256 before it"
    )
    reader.finish()
    return trace


def message_table(title: str, fields: list[Listed]) -> Table:
    """A message as a table, a row a field."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("byte", justify="right")
    table.add_column("size", justify="right")
    table.add_column("bytes", style="cyan", no_wrap=True)
    table.add_column("what", overflow="fold")
    table.add_column("value", overflow="fold")
    for field in fields:
        shown = field.data[:SHOWN].hex(" ") + (" …" if len(field.data) > SHOWN else "")
        table.add_row(str(field.place), str(len(field.data)), shown, field.name, field.value)
    return table
