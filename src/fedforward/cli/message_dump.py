"""A message byte by byte, for whoever must know what leaves a site.

Reads what `messages.envelope` and `messages.codec` write, from their own structures; a test holds
it to every byte. Imports no PyTorch.
"""

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table

from fedforward.messages import codec as messages
from fedforward.messages import envelope as envelopes
from fedforward.messages.envelope import Envelope, MessageKind

#: Bytes that are shown of a field.
SHOWN = 8
_HEADER = ("magic", "wire version", "message kind")
_TASK = (
    "round",
    "client",
    "learning rate",
    "flags: 1 prove the state, 2 start again",
    "ledger entries",
    "numbers of a state",
    "bytes of blocks",
    "odds of candidate seeds",
    "bytes of a snapshot",
)
_ENTRY = ("round", "decay", "contributions", "bytes of a state's digest", "increments")
_CONTRIBUTION = ("client", "coefficients", "age in rounds", "bytes of blocks")
_REPORT = (
    "round",
    "client",
    "training examples",
    "mean training loss",
    "skipped steps",
    "projected gradients",
    "bytes of the state's digest",
    "numbers of a state",
)
_SNAPSHOT = ("rounds", "bytes of the digest", "bytes of the tuned tensors")


@dataclass(frozen=True)
class Field:
    """Some bytes of a envelope.

    Attributes:
        place: of the first, from 0.
        data: the bytes.
        name: what they are.
        value: what they mean.
    """

    place: int
    data: bytes
    name: str
    value: str


def listing(data: bytes) -> list[Field]:
    """Every byte of an encoded envelope, in order.

    Raises:
        MessageError: it is not a whole envelope.
    """
    envelope = Envelope.decode(data)
    cursor = _Cursor(data)
    cursor.numbers("envelope", envelopes.ENVELOPE_FORM, ("magic", "version", "kind", "run"))
    readers = {MessageKind.TASK: _task, MessageKind.EVALUATION: _task, MessageKind.FINALIZE: _task}
    readers |= {MessageKind.REPORT: _report, MessageKind.SNAPSHOT: _snapshot}
    if envelope.kind in readers:
        readers[envelope.kind](cursor)
    elif envelope.kind in (MessageKind.REFUSAL, MessageKind.REJECT):
        cursor.take(len(envelope.body), "sentence", lambda raw: envelope.text())
    elif envelope.body:
        cursor.take(len(envelope.body), "JSON", lambda raw: json.dumps(envelope.json()))
    cursor.take(
        envelopes.CHECKSUM_BYTES, "checksum", lambda raw: "first bytes of the SHA-256 before it"
    )
    return cursor.fields


class _Cursor:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.fields: list[Field] = []
        self.place = 0

    def take(self, size: int, name: str, meaning: Callable[[bytes], str]) -> None:
        raw = self.data[self.place : self.place + size]
        if size:
            self.fields.append(Field(self.place, raw, name, meaning(raw)))
        self.place += size

    def numbers(self, what: str, form: struct.Struct, names: tuple[str, ...]) -> tuple[Any, ...]:
        """The fields of a structure, each by itself."""
        values = form.unpack_from(self.data, self.place)
        codes = iter(_codes(form))
        for name, value in zip(names, values, strict=True):
            self.take(struct.calcsize("<" + next(codes)), f"{what}: {name}", _shown(name, value))
        return values

    def floats(self, count: int, name: str) -> None:
        self.take(4 * count, f"{name}, {count} × float32", _floats)


def _shown(name: str, value: Any) -> Callable[[bytes], str]:
    if name == "magic":
        text = value.decode()
    elif name == "kind":
        text = f"{value}, {MessageKind(value).name}"
    elif value == messages.NO_INCREMENTS:
        text = "all clients" if name == "client" else "none"
    elif isinstance(value, float):
        text = f"{value:.9g}"
    else:
        text = value.hex() if isinstance(value, bytes) else str(value)
    return lambda raw: text


def _codes(form: struct.Struct) -> Iterator[str]:
    """The fields of a structure's format: "<2sBI" has "2s", "B" and "I"."""
    count = ""
    for code in form.format.lstrip("<"):
        if code.isdigit():
            count += code
        else:
            yield count + code
            count = ""


def _floats(raw: bytes) -> str:
    values = np.frombuffer(raw, "<f4")
    shown = ", ".join(f"{value:.6g}" for value in values[:4])
    return shown + (", …" if len(values) > 4 else "")


def _bits(raw: bytes) -> str:
    return " ".join(f"{byte:08b}"[::-1] for byte in raw)


def _task(cursor: _Cursor) -> None:
    cursor.numbers("message", messages.HEADER_FORM, _HEADER)
    values = cursor.numbers("task", messages.TASK_FORM, _TASK)
    entries, size, width, odds, stored = values[4:]
    cursor.floats(size, "state")
    cursor.take(width, "blocks to perturb, a bit each", _bits)
    cursor.take(2 * odds, "odds of candidate seeds, uint16", lambda raw: "")
    if stored:
        _snapshot(cursor)
    for _ in range(entries):
        _entry(cursor)


def _entry(cursor: _Cursor) -> None:
    _, _, contributions, digest, increments = cursor.numbers("entry", messages.ENTRY_FORM, _ENTRY)
    cursor.take(digest, "digest of the state", lambda raw: "")
    if increments != messages.NO_INCREMENTS:
        cursor.take(4 * increments, "places of increments, uint32", lambda raw: "")
        cursor.take(8 * increments, "increments, int64", lambda raw: "")
    for _ in range(contributions):
        _, count, _, width = cursor.numbers(
            "contribution", messages.CONTRIBUTION_FORM, _CONTRIBUTION
        )
        cursor.take(width, "blocks that it moves, a bit each", _bits)
        cursor.floats(count, "coefficients of seeded directions")


def _report(cursor: _Cursor) -> None:
    cursor.numbers("message", messages.HEADER_FORM, _HEADER)
    *_, count, digest, size = cursor.numbers("report", messages.REPORT_FORM, _REPORT)
    cursor.take(digest, "digest of the tuned state", lambda raw: "first half of its SHA-256")
    cursor.floats(count, "projected gradients")
    cursor.floats(size, "state")


def _snapshot(cursor: _Cursor) -> None:
    cursor.numbers("message", messages.HEADER_FORM, _HEADER)
    _, digest, size = cursor.numbers("snapshot", messages.SNAPSHOT_FORM, _SNAPSHOT)
    cursor.take(digest, "digest of the tuned state", lambda raw: "SHA-256")
    cursor.take(size, "tuned tensors", lambda raw: "")


def message_table(title: str, fields: list[Field]) -> Table:
    """A message for people."""
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
