"""A tuned state in place of the ledger entries that led to it."""

from dataclasses import dataclass
from typing import ClassVar

from fedforward.messages.codec import U32, Message, data, wire


@dataclass(frozen=True, eq=False)
class Snapshot(Message):
    """What a client that is far behind takes over.

    Attributes:
        rounds: ledger rounds that it contains.
        digest: SHA-256 of the tuned state (32 bytes); empty where the server made it from what
            the method remembers.
        data: the tuned tensors' bytes in the layout's order, or what the method remembers.
    """

    KIND: ClassVar[int] = 3

    rounds: int = wire(U32, "ledger rounds that it contains")
    digest: bytes = wire(data("B", 0, 32), "SHA-256 of the tuned state")
    data: bytes = wire(data("Q"), "the tuned tensors, or what the method remembers")
