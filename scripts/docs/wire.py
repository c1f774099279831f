"""The reference of the wire form, made from the codec's own declarations (`Message.describe`)."""

import numpy as np

from fedforward.directions import VERSION
from fedforward.messages import codec, envelope
from fedforward.messages.codec import Message
from fedforward.messages.entry import Contribution, Entry
from fedforward.messages.report import ClientResult, Report
from fedforward.messages.secure import (
    MaskedReport,
    OpenShare,
    SealedShare,
    SumKeys,
    SumOpened,
    SumOpening,
    SumRoster,
    SumShares,
    SumStart,
    SumTask,
    Total,
)
from fedforward.messages.snapshot import Snapshot
from fedforward.messages.task import Task

#: Name, type and meaning of a field.
Row = tuple[str, str, str]


def layouts() -> dict[str, tuple[str, list[Row]]]:
    """By title: a sentence, and the fields in the order of their numbers and lengths."""

    def rows(kind: type[Message]) -> list[Row]:
        return [(row.name, row.type, row.meaning) for row in kind.describe()]

    return {
        "Envelope": (
            "Across machines every message lies in one. A simulation has none.",
            [
                ("magic", "2 bytes", "says that it is one"),
                ("version", "uint8", "of the envelope"),
                ("kind", "uint8", "what the body is"),
                ("run", f"{envelope.RUN_BYTES} bytes", "the run's random name"),
                ("body", "the rest", "as the kind says"),
                ("checksum", f"{envelope.CHECKSUM_BYTES} bytes", "of the SHA-256 before it"),
            ],
        ),
        "Header": (
            "Every task, report and snapshot begins with it.",
            [
                ("magic", "2 bytes", f"`{codec.MAGIC.decode()}`"),
                ("version", "uint8", "of the wire form"),
                (
                    "kind",
                    "uint8",
                    f"{Task.KIND} task, {Report.KIND} report, {Snapshot.KIND} snapshot, "
                    f"{SumStart.KIND} to {SumOpened.KIND} of secure sums",
                ),
            ],
        ),
        "Task": ("From the server to a site, once a round.", rows(Task)),
        "Ledger entry": (
            "One round's change of the tuned state. The ledger stores the same bytes.",
            rows(Entry),
        ),
        "Contribution": (
            "Steps of an entry that share a client and a set of blocks.",
            rows(Contribution),
        ),
        "Report": ("From a site to the server, once a round.", rows(Report)),
        "Snapshot": (
            "The tuned tensors in place of the entries that led to them.",
            rows(Snapshot),
        ),
        "Client result": (
            "What the ledger keeps of a client's part in a round.",
            rows(ClientResult),
        ),
        "Sum start": (
            "From the server, with secure sums: a site is asked for keys.",
            rows(SumStart),
        ),
        "Sum keys": ("From a site: public keys for one attempt at a sum.", rows(SumKeys)),
        "Sum roster": ("From the server: the keys of all sites of a sum.", rows(SumRoster)),
        "Sum shares": ("From a site: shares of its two secrets for the others.", rows(SumShares)),
        "Sealed share": ("Shares that only their recipient can read.", rows(SealedShare)),
        "Sum task": ("From the server, in place of a task.", rows(SumTask)),
        "Masked report": ("From a site, in place of a report.", rows(MaskedReport)),
        "Sum opening": ("From the server: whose reports are in the sum.", rows(SumOpening)),
        "Sum opened": ("From a site: what takes the masks off the sum.", rows(SumOpened)),
        "Open share": ("A share of one secret of a site, for the server.", rows(OpenShare)),
        "Total": (
            "With secure sums, what the ledger keeps of a round's reports. It is before the client "
            "results, whose reports then are empty.",
            rows(Total),
        ),
    }


def kinds() -> list[tuple[int, str]]:
    """Number and name of each kind of message between a server and its sites."""
    return [(int(kind), kind.name) for kind in envelope.MessageKind]


def versions() -> list[tuple[str, str]]:
    """What two parties compare before anything else."""
    return [
        ("messages", str(codec.WIRE_VERSION)),
        ("envelope", str(envelope.ENVELOPE_VERSION)),
        ("directions", VERSION),
    ]


def page() -> str:
    """The page, in Markdown."""
    parts = [
        "# Wire form\n",
        "This page is made from the codec. Integers and floats are little-endian. A message that "
        "is cut short, too long, of another version or not finite is refused with a sentence.\n",
        "A message is one structure with all numbers, and the length of every variable part, in "
        "the order below. The variable parts follow it in the same order.\n",
        "| what | version |\n|---|---|",
        *(f"| {name} | `{version}` |" for name, version in versions()),
        "",
    ]
    for title, (sentence, rows) in layouts().items():
        parts.append(f"## {title}\n\n{sentence}\n")
        parts.append("| field | type | what it is |\n|---|---|---|")
        parts += [f"| {name} | {kind} | {meaning} |" for name, kind, meaning in rows]
        parts.append("")
    parts.append("## Kinds of message\n")
    parts.append("Kinds below 16 come from the server; the others are a site's answers.\n")
    parts.append("| number | kind |\n|---:|---|")
    parts += [f"| {number} | `{name}` |" for number, name in kinds()]
    example = np.float32(0.1).tobytes().hex(" ")
    parts.append(f"\nA float32 of 0.1 travels as `{example}`.\n")
    return "\n".join(parts)
