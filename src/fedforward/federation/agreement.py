"""Whose tuned state is right: that of most clients. Digests only, no weights."""

from collections import Counter
from collections.abc import Collection, Mapping

from fedforward.core.errors import MessageError


class QuorumError(MessageError):
    """Too few clients reported, or agreed, for a round to be closed."""


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
        QuorumError: no state is that of most.
    """
    if len(set(digests.values())) < 2:
        return set()
    own = [digest for client, digest in digests.items() if client not in unproven]
    votes = own or list(digests.values())
    right, count = Counter(votes).most_common(1)[0]
    if 2 * count <= len(votes):
        first, *rest = digests
        other = next(client for client in rest if digests[client] != digests[first])
        raise QuorumError(
            f"Clients {first} and {other} hold different tuned states ({digests[first].hex()} and "
            f"{digests[other].hex()}) in round {round_number}, and no majority tells which is "
            "right. One of them has another base model or a damaged state; it must start again "
            "from the base."
        )
    return {client for client, digest in digests.items() if digest != right}
