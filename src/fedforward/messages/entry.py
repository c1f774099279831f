"""One round of the ledger: how the tuned state changed. Server and sites exchange these."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fedforward.core.errors import MessageError
from fedforward.messages.codec import F32, U16, U32, Message, blocks, data, floats, many, wire

#: `Entry.keeps` of a round that takes none back.
ALL_ROUNDS = 2**32 - 1


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
        keeps: rounds that stay; the state is again what it was after them. ALL_ROUNDS for a round
            that takes none back. One that does has nothing else.
    """

    round: int = wire(U32, "its number, from 0")
    contributions: tuple[Contribution, ...] = wire(
        many(Contribution, "H"), "in the order in which their steps are added"
    )
    decay: float = wire(F32, "multiplies the tuned state before", default=1.0)
    payload: bytes = wire(data("I"), "what the method adds; it alone reads it", default=b"")
    keeps: int = wire(
        U32,
        "rounds that stay where later ones are taken back; 4,294,967,295 takes none back",
        default=ALL_ROUNDS,
    )

    @property
    def goes_back(self) -> bool:
        """Whether it takes rounds back."""
        return self.keeps != ALL_ROUNDS

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
        if not self.goes_back:
            return
        if self.keeps > self.round or self.contributions or self.payload or self.decay != 1.0:
            raise MessageError(
                f"A ledger entry of round {self.round} that keeps {self.keeps} rounds was refused: "
                "it keeps at most those before it, and has no steps of its own."
            )


def remaining(entries: Iterable[Entry]) -> list[Entry]:
    """The entries that no later one of them takes back, in their order.

    Example:
        >>> taken = [Entry(0, ()), Entry(1, ()), Entry(2, (), keeps=1)]
        >>> sorted(entry.round for entry in remaining(taken))
        [0, 2]
    """
    found: list[Entry] = []
    for entry in entries:
        while entry.goes_back and found and found[-1].round >= entry.keeps:
            found.pop()
        found.append(entry)
    return found


def takes_back(entries: Sequence[Entry], rounds: int) -> bool:
    """Whether entries from round `rounds` on take back any of the rounds before it."""
    return any(entry.round >= rounds > entry.keeps for entry in entries)
