"""What the server asks of a client in a round."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedforward.messages.codec import F64, FLAG, U16, U32, Message, blocks, data, many, wire
from fedforward.messages.entry import Entry


@dataclass(frozen=True, eq=False)
class Task(Message):
    """A client's part of a round.

    Attributes:
        round: its number, from 0.
        client: whom the task is for.
        learning_rate: η_i of this client and round.
        digest_wanted: whether the report must prove the tuned state.
        entries: the ledger entries that the client lacks, oldest first.
        reset: whether the client must first go back to the base model.
        blocks: the blocks that the client perturbs, bool [B]; None is all.
        payload: what the method adds: bytes that it alone reads.
        line_search: batches on which to measure the last round's update first; 0 is none.
        snapshot: an encoded `Snapshot` to start from before the entries; or empty.
    """

    KIND: ClassVar[int] = 1

    round: int = wire(U32, "its number, from 0")
    client: int = wire(U32, "whom the task is for")
    learning_rate: float = wire(F64, "of this client and round")
    digest_wanted: bool = wire(FLAG, "whether the report must prove the tuned state")
    entries: tuple[Entry, ...] = wire(many(Entry, "I"), "ledger entries that the client lacks")
    reset: bool = wire(FLAG, "whether to go back to the base model first", default=False)
    blocks: NDArray[np.bool_] | None = wire(
        blocks(), "blocks to perturb; none stands for all", default=None
    )
    payload: bytes = wire(data("I"), "what the method adds; it alone reads it", default=b"")
    line_search: int = wire(
        U16, "batches on which to measure the last round's update first", default=0
    )
    snapshot: bytes = wire(data("Q"), "an encoded snapshot to start from", default=b"")
