"""A tuned state in place of the ledger entries that led to it."""

from dataclasses import dataclass
from typing import ClassVar

from fedforward.messages import codec
from fedforward.messages.codec import U32, Message, wire

#: Bytes of a SHA-256 digest.
SHA256_BYTES = 32


@dataclass(frozen=True, eq=False)
class Snapshot(Message):
    """What a client that is far behind takes over.

    Attributes:
        rounds: ledger rounds that it contains.
        digest: SHA-256 of the tuned state (32 bytes); empty where the server made it.
        data: the tuned tensors' bytes in the layout's order; empty where what the method
            remembers is the tuned state.
        state: what the method remembers.
    """

    KIND: ClassVar[int] = 3

    rounds: int = wire(U32, "ledger rounds that it contains")
    digest: bytes = wire(codec.data("B", 0, SHA256_BYTES), "SHA-256 of the tuned state")
    data: bytes = wire(codec.data("Q"), "the tuned tensors, unless the state alone gives them")
    state: bytes = wire(codec.data("Q"), "what the method remembers", default=b"")
