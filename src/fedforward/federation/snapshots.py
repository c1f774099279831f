"""Snapshots of clients at the server: whether one pays, who made it, who was sent it.

A snapshot is a tuned state in place of ledger entries. It comes from a client, and is trusted only
once the client that was sent it has shown the digest of the others.
"""

from collections.abc import Callable, Collection, Iterable, Sequence

from fedforward.core.errors import MessageError
from fedforward.messages.snapshot import SHA256_BYTES, Snapshot


class Snapshots:
    """The newest snapshot of a run, if any.

    Attributes:
        state_bytes: of the tuned tensors, which a snapshot carries; 0 where there are none.
        recipients: clients that were sent the snapshot and have not shown their state since.
        excluded: clients whose snapshots are not asked for any more.
    """

    def __init__(self, state_bytes: int) -> None:
        self.state_bytes = state_bytes
        self.newest: Snapshot | None = None
        self.source = -1
        self.recipients: set[int] = set()
        self.excluded: set[int] = set()

    def wanted(
        self,
        there: Sequence[int],
        held: Callable[[int], int],
        reset: Collection[int],
        entry_bytes: Callable[[int], int],
    ) -> int | None:
        """The client that is to make a snapshot, if one pays.

        It pays where the ledger entries that some participant lacks are more bytes than the tuned
        tensors.

        Args:
            there: clients of the coming round.
            held: ledger rounds that a client holds.
            reset: clients that start again from the base.
            entry_bytes: bytes of the ledger entries from a round on.
        """
        if not self.state_bytes:
            return None
        sources = [c for c in there if c not in reset and c not in self.excluded]
        latest = max((held(client) for client in sources), default=0)
        oldest = min(0 if client in reset else held(client) for client in there)
        if self.newest is not None:
            oldest = max(oldest, self.newest.rounds)
        if latest - oldest < 2 or entry_bytes(oldest) <= self.state_bytes:
            return None
        return next(client for client in sources if held(client) == latest)

    def receive(
        self, data: bytes, source: int, rounds: int, taken_back: Callable[[int], bool]
    ) -> None:
        """Keep a snapshot for the clients that are far behind.

        Args:
            source: the client that made it.
            rounds: of the ledger.
            taken_back: whether the last of so many rounds was.

        Raises:
            MessageError: it is damaged, of another size than the tuned tensors, or of rounds that
                were taken back.
        """
        snapshot = Snapshot.decode(data)
        if len(snapshot.digest) != SHA256_BYTES:
            raise MessageError(
                f"A snapshot with {len(snapshot.digest)} bytes of digest was refused: a client "
                f"sends {SHA256_BYTES}, by which others prove it."
            )
        if len(snapshot.data) != self.state_bytes or snapshot.rounds > rounds:
            raise MessageError(
                f"A snapshot of {len(snapshot.data)} bytes after {snapshot.rounds} rounds was "
                f"refused: the tuned tensors are {self.state_bytes} bytes, and the ledger has "
                f"{rounds} rounds."
            )
        if taken_back(snapshot.rounds):
            raise MessageError(
                f"A snapshot after {snapshot.rounds} rounds was refused: the last of them was "
                "taken back."
            )
        self.newest, self.source = snapshot, source
        self.recipients.clear()

    def for_client(self, client: int, begin: int, size: int) -> Snapshot | None:
        """The snapshot for a client that lacks entries of `size` bytes from round `begin` on."""
        snapshot = self.newest
        if snapshot is None or size <= self.state_bytes or snapshot.rounds <= begin:
            return None
        self.recipients.add(client)
        return snapshot

    def invalidate(self, client: int) -> None:
        """Note that a client could do nothing with what it was sent, or came to a wrong state.

        Where that began with the snapshot, the snapshot may be at fault: it is not sent again, nor
        is another asked for from its source.
        """
        if client in self.recipients:
            self.excluded.add(self.source)
            self.newest = None
            self.recipients.clear()

    def forget_after(self, rounds: int) -> None:
        """Drop a snapshot that holds more rounds than these: the others were taken back."""
        if self.newest is not None and self.newest.rounds > rounds:
            self.newest = None
            self.recipients.clear()

    def shown(self, clients: Iterable[int]) -> None:
        """Note that clients have shown their state."""
        self.recipients -= set(clients)
