"""One round of the ledger: how the tuned state changed. Server and sites exchange these."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fedforward.core.errors import MessageError
from fedforward.messages.codec import F32, U16, U32, Message, blocks, data, floats, many, wire


@dataclass(frozen=True, eq=False)
class Contribution(Message):
    """Steps of a round that share a client and a set of blocks, weights and rates included.

    Attributes:
        client: whose directions they are; SHARED where all clients have the same.
        coefficients: float32 [local steps * directions]; the method knows their seeds.
        blocks: the blocks that they move, bool [B]; None is all.
        age: how many rounds ago the directions were probed (momentum repeats old ones).
    """

    client: int = wire(U32, "whose directions they are; 4,294,967,295 where all have the same")
    coefficients: NDArray[np.float32] = wire(
        floats("H"), "of the directions, in the order of the steps"
    )
    blocks: NDArray[np.bool_] | None = wire(
        blocks(), "blocks that they move; none stands for all", default=None
    )
    age: int = wire(U16, "rounds since the directions were probed", default=0)


@dataclass(frozen=True)
class Entry(Message):
    """One round of the ledger.

    Attributes:
        round: its number, from 0.
        contributions: in the order in which their steps are added.
        decay: multiplies the state before.
        payload: what the method adds: bytes that it alone reads.
    """

    round: int = wire(U32, "its number, from 0")
    contributions: tuple[Contribution, ...] = wire(
        many(Contribution, "H"), "in the order in which their steps are added"
    )
    decay: float = wire(F32, "multiplies the tuned state before", default=1.0)
    payload: bytes = wire(data("I"), "what the method adds; it alone reads it", default=b"")

    def body(self) -> bytes:
        """See `Message`. Made once: a server sends the same entry to every client."""
        return self._body

    @cached_property
    def _body(self) -> bytes:
        return super().body()

    def check(self) -> None:
        """See `Message`."""
        for part in self.contributions:
            if part.age > self.round:
                raise MessageError(
                    f"A ledger entry of round {self.round} with steps from {part.age} rounds "
                    "before was refused."
                )
