"""What a client sends back, and what the ledger keeps of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedforward.core.errors import MessageError
from fedforward.messages.codec import (
    F32_OR_NAN,
    F64,
    U16,
    U32,
    Form,
    Message,
    Reader,
    blocks,
    data,
    floats,
    wire,
)

NO_FLOATS = np.empty(0, np.float32)
NO_FLOATS.flags.writeable = False
#: Bytes of a state digest on the wire (its first half).
DIGEST_BYTES = 16


@dataclass(frozen=True, eq=False)
class Report(Message):
    """What a client sends back: scalars, and what its method adds.

    Attributes:
        round: of the task that it answers.
        client: who reports.
        examples: how many training examples the client holds.
        loss: its mean training loss over the round, in nats per token; NaN where no step was
            finite, or where the site withholds it.
        skipped: steps whose losses were not finite; their projected gradients are 0.
        gradients: float32 [local steps * directions], the projected gradients.
        digest: the first 16 bytes of the tuned state's SHA-256, or empty if not asked for.
        payload: what the method adds: bytes that it alone reads.
        line_search: float32 [4] where the task asked for it, else empty: the mean loss on the
            client's next batches at 0, 1 and 2 times the last round's update, and the standard
            error of the difference between the first two.
    """

    KIND: ClassVar[int] = 2

    round: int = wire(U32, "of the task that it answers")
    client: int = wire(U32, "who reports")
    examples: int = wire(U32, "training examples that the client holds")
    loss: float = wire(F32_OR_NAN, "mean training loss over the round, in nats")
    skipped: int = wire(U16, "steps whose losses were not finite")
    gradients: NDArray[np.float32] = wire(floats("H"), "the projected gradients")
    digest: bytes = wire(
        data("B", 0, DIGEST_BYTES), "first half of the tuned state's SHA-256", default=b""
    )
    payload: bytes = wire(data("I"), "what the method adds; it alone reads it", default=b"")
    line_search: NDArray[np.float32] = wire(
        floats("B"),
        "losses at 0, 1 and 2 times the last update, and the error of their difference",
        default_factory=lambda: NO_FLOATS,
    )


@dataclass(frozen=True)
class _OneReport(Form):
    """A report in a message, without its header."""

    def number(self, value: Report) -> int:
        return 1

    def content(self, value: Report) -> bytes:
        return value.body()

    def read(self, number: int, reader: Reader, name: str) -> Report:
        if number != 1:
            raise MessageError(f"A ledger row with {number} reports was refused.")
        return Report.read(reader, f"{name}: ")


@dataclass(frozen=True, eq=False)
class ClientResult(Message):
    """A client's part in a round, as the server closes it and as the ledger keeps it.

    Attributes:
        weight: p_i, the client's share of the average; the weights of a round sum to one.
        learning_rate: η_i, by which its projected gradients count.
        report: what it sent.
        blocks: the blocks that it was given, bool [B]; None is all.
    """

    weight: float = wire(F64, "share of the average")
    learning_rate: float = wire(F64, "by which its projected gradients count")
    report: Report = wire(_OneReport("B", "Report"), "what the client sent")
    blocks: NDArray[np.bool_] | None = wire(
        blocks(), "blocks that it was given; none stands for all", default=None
    )


def decode_results(content: bytes) -> Iterator[ClientResult]:
    """The client results of a ledger row, one after another."""
    reader = Reader(content)
    while reader.place < len(content):
        yield ClientResult.read(reader)
