"""A message byte by byte, for whoever must know what leaves a site.

What the codec and the envelope say of their own fields is shown; a test holds it to every byte.
Imports no PyTorch.
"""

import json

from rich.table import Table

from fedforward.messages import envelope as envelopes
from fedforward.messages.codec import Listed, Message, Reader, list_numbers
from fedforward.messages.envelope import Envelope, MessageKind
from fedforward.messages.report import Report
from fedforward.messages.secure import (
    MaskedReport,
    SumKeys,
    SumOpened,
    SumOpening,
    SumRoster,
    SumShares,
    SumStart,
    SumTask,
)
from fedforward.messages.snapshot import Snapshot
from fedforward.messages.task import Task

#: Bytes that are shown of a field.
SHOWN = 8
_BODIES: dict[MessageKind, type[Message]] = {
    MessageKind.TASK: Task,
    MessageKind.EVALUATION: Task,
    MessageKind.FINALIZE: Task,
    MessageKind.REPORT: Report,
    MessageKind.SNAPSHOT: Snapshot,
    MessageKind.SUM_START: SumStart,
    MessageKind.SUM_KEYS: SumKeys,
    MessageKind.SUM_ROSTER: SumRoster,
    MessageKind.SUM_SHARES: SumShares,
    MessageKind.SUM_TASK: SumTask,
    MessageKind.MASKED_REPORT: MaskedReport,
    MessageKind.SUM_OPENING: SumOpening,
    MessageKind.SUM_OPENED: SumOpened,
}


def listing(data: bytes) -> list[Listed]:
    """Every byte of a encoded envelope, in order.

    Raises:
        MessageError: it is not a whole envelope.
    """
    envelope = Envelope.decode(data)
    trace: list[Listed] = []
    reader = Reader(data, trace)
    names = (
        "envelope: magic",
        "envelope: version",
        f"envelope: kind ({envelope.kind.name})",
        "envelope: run",
    )
    list_numbers(reader, envelopes.ENVELOPE_FORM, names)
    kind = _BODIES.get(envelope.kind)
    if kind is not None:
        kind.open(reader)
    elif envelope.kind is MessageKind.REJECT:
        reader.take(len(envelope.body), "sentence", lambda raw: envelope.text())
    else:
        reader.take(len(envelope.body), "JSON", lambda raw: json.dumps(envelope.json()))
    reader.take(
        envelopes.CHECKSUM_BYTES, "checksum", lambda raw: "first bytes of the SHA-256 before it"
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
