"""The reference of the wire form, made from the codec's own declarations.

`layouts` is the one place that knows how the codec declares its fields: struct formats, and the
names that `fedforward inspect-message` prints beside them.
"""

import struct
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np

#: Name, type and size of a field; the size is text where it depends on another field.
Row = tuple[str, str, str]

CODES = {
    "B": "uint8",
    "H": "uint16",
    "I": "uint32",
    "Q": "uint64",
    "i": "int32",
    "q": "int64",
    "f": "float32",
    "d": "float64",
}


def layouts() -> dict[str, tuple[str, list[Row]]]:
    """By title: a sentence, and the fields in the order in which they travel."""
    from fedforward.cli import message_dump as names
    from fedforward.messages import codec, envelope

    digest = f"0 or {codec.DIGEST_BYTES}"
    header = _fixed(codec.HEADER_FORM, names._HEADER)
    return {
        "Envelope": (
            "Across machines every message lies in one. A simulation has none.",
            [
                *_fixed(
                    _first(envelope, "ENVELOPE_FORM", "HEAD_FORM"),
                    ("magic", "envelope version", "message kind", "run"),
                ),
                ("body", "as the kind says", "the rest"),
                ("checksum", "bytes of the SHA-256 before it", str(envelope.CHECKSUM_BYTES)),
            ],
        ),
        "Header": ("Every task, report and snapshot begins with it.", header),
        "Task": (
            "From the server to a site, once a round.",
            [
                *_fixed(codec.TASK_FORM, names._TASK),
                ("tuned state, for a method that sends tensors", "float32", "4 each"),
                ("blocks to perturb", "a bit each", "none, or blocks / 8 rounded up"),
                ("sampling weights of candidate seeds", "uint16", "2 each"),
                ("snapshot", "a whole snapshot", "0 or more"),
                ("ledger entries", "entries", "as below"),
            ],
        ),
        "Ledger entry": (
            "One round's change of the tuned state. The ledger stores the same bytes.",
            [
                *_fixed(codec.ENTRY_FORM, names._ENTRY),
                ("digest of the state", "bytes", "0 or 32"),
                ("places of increments", "uint32", "4 each"),
                ("increments", "int64", "8 each"),
                ("contributions", "contributions", "as below"),
            ],
        ),
        "Contribution": (
            "Steps of an entry that share a client and a set of blocks.",
            [
                *_fixed(codec.CONTRIBUTION_FORM, names._CONTRIBUTION),
                ("blocks that they move", "a bit each", "none, or blocks / 8 rounded up"),
                ("coefficients", "float32", "4 each"),
            ],
        ),
        "Report": (
            "From a site to the server, once a round.",
            [
                *_fixed(codec.REPORT_FORM, names._REPORT),
                ("digest of the tuned state", "first half of its SHA-256", digest),
                ("projected gradients", "float32", "4 each"),
                ("tuned state, for a method that sends tensors", "float32", "4 each"),
            ],
        ),
        "Snapshot": (
            "The tuned tensors in place of the entries that led to them.",
            [
                *_fixed(codec.SNAPSHOT_FORM, names._SNAPSHOT),
                ("digest", "SHA-256 of the tuned state", "0 or 32"),
                ("tuned tensors", "bytes in the layout's order", "as counted"),
            ],
        ),
    }


def kinds() -> list[tuple[int, str]]:
    """Number and name of each kind of message between a server and its sites."""
    from fedforward.messages import envelope

    kinds_of_message = _first(envelope, "MessageKind", "Kind")
    return [(int(kind), str(kind.name)) for kind in kinds_of_message]


def versions() -> list[tuple[str, str]]:
    """What two parties compare before anything else."""
    from fedforward.directions import VERSION
    from fedforward.messages import codec, envelope

    number = _first(envelope, "ENVELOPE_VERSION", "LETTER_VERSION")
    return [
        ("messages", str(codec.WIRE_VERSION)),
        ("envelope", str(number)),
        ("directions", str(VERSION)),
    ]


def _first(module: ModuleType, *names: str) -> Any:
    """The first of some names that a module has."""
    for name in names:
        if hasattr(module, name):
            return getattr(module, name)
    raise LookupError(f"{module.__name__} has none of {', '.join(names)}: see scripts/docs/wire.py")


def _fixed(form: struct.Struct, names: tuple[str, ...]) -> list[Row]:
    codes = list(_codes(form))
    return [
        (name, _type(code), str(struct.calcsize("<" + code)))
        for name, code in zip(names, codes, strict=True)
    ]


def _codes(form: struct.Struct) -> Iterator[str]:
    """The fields of a format: "<2sBI" has "2s", "B" and "I"."""
    count = ""
    for code in form.format.lstrip("<"):
        if code.isdigit():
            count += code
        else:
            yield count + code
            count = ""


def _type(code: str) -> str:
    return "bytes" if code.endswith("s") else CODES[code]


def _offsets(rows: list[Row]) -> Iterator[str]:
    """Where each field begins, as long as everything before it has a fixed size."""
    place: int | None = 0
    for _, _, size in rows:
        yield "" if place is None else str(place)
        place = place + int(size) if place is not None and size.isdigit() else None


def page() -> str:
    """The page, in Markdown."""
    parts = [
        "# Wire form\n",
        "This page is made from the codec. Integers and floats are little-endian. A message that "
        "is cut short, too long, of another version or not finite is refused with a sentence.\n",
        "| what | version |\n|---|---|",
        *(f"| {name} | `{version}` |" for name, version in versions()),
        "",
    ]
    for title, (sentence, rows) in layouts().items():
        parts.append(f"## {title}\n\n{sentence}\n")
        parts.append("| byte | size | type | field |\n|---:|---:|---|---|")
        for offset, (name, kind, size) in zip(_offsets(rows), rows, strict=True):
            parts.append(f"| {offset} | {size} | {kind} | {name} |")
        fixed = sum(int(size) for _, _, size in rows if size.isdigit())
        parts.append(f"\n{fixed} bytes are fixed.\n")
    parts.append("## Kinds of message\n")
    parts.append("Kinds below 16 come from the server; the others are a site's answers.\n")
    parts.append("| number | kind |\n|---:|---|")
    parts += [f"| {number} | `{name}` |" for number, name in kinds()]
    example = np.float32(0.1).tobytes().hex(" ")
    parts.append(f"\nA float32 of 0.1 travels as `{example}`.\n")
    return "\n".join(parts)
