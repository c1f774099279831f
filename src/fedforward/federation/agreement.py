"""Whose tuned state is right: that of most clients. Digests only, no weights."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

from fedforward.core.errors import MessageError


class QuorumError(MessageError):
    """Too few clients reported, or agreed, for a round to be closed."""


class TieError(QuorumError):
    """No state is that of most clients.

    Attributes:
        sides: clients by the digest that they gave, 16 bytes each, in the order of their numbers.
        final: whether they had started again from the base before, so that to do so once more
            would not tell who is right.
    """

    def __init__(self, sides: Mapping[bytes, Sequence[int]], round_number: int) -> None:
        self.sides = {digest: tuple(clients) for digest, clients in sides.items()}
        self.round = round_number
        self.final = False
        super().__init__(self.sentence("clients"))

    def sentence(self, what: str, name: Callable[[int], str] = str) -> str:
        """The sentence for people, with all sides.

        Args:
            what: the clients are called.
            name: of a client.
        """
        sides = " and ".join(
            f"{', '.join(map(name, clients))} ({digest.hex()})"
            for digest, clients in self.sides.items()
        )
        words = (
            f"The {what} hold different tuned states in round {self.round}, and no majority tells "
            f"which is right: {sides}."
        )
        if not self.final:
            return f"{words} They start again from the base."
        return (
            f"{words} They had started again from the base before. `fedforward verify` with "
            f"--round {self.round} says which digest is right; leave the others out with --without."
        )


def majority(
    digests: Mapping[int, bytes], unproven: Collection[int], round_number: int
) -> set[int]:
    """The clients whose state is not that of most.

    Args:
        digests: of the tuned state of each client; empty where it was not asked for.
        unproven: clients that took their state from another; they have no vote of their own
            while others have.
        round_number: for the error.

    Raises:
        TieError: no state is that of most.
    """
    if len(set(digests.values())) < 2:
        return set()
    own = [digest for client, digest in digests.items() if client not in unproven]
    votes = own or list(digests.values())
    right, count = Counter(votes).most_common(1)[0]
    if 2 * count <= len(votes):
        sides: dict[bytes, list[int]] = {}
        for client in sorted(digests):
            sides.setdefault(digests[client], []).append(client)
        raise TieError(sides, round_number)
    return {client for client, digest in digests.items() if digest != right}
