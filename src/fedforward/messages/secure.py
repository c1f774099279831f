"""What a server and its sites send each other for a secure sum, and what the ledger keeps of one.

The protocol is that of Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving
Machine Learning" (CCS 2017, Figure 4), without its consistency check. `deployment.secure` carries
it out. A session is one attempt at one round's sum.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedforward.messages.codec import U8, U16, U32, Message, data, many, wire, words
from fedforward.messages.report import DIGEST_BYTES

#: Bytes of a session's random name, of a public key, of a shared secret, and of a commitment.
SESSION_BYTES, KEY_BYTES, SECRET_BYTES, COMMITMENT_BYTES = 16, 32, 16, 32
#: Fewest and most sites that a sum may be of. Of two, each knows the other's part.
LEAST_SITES, MOST_SITES = 3, 1000
#: Bytes of two shares, encrypted and authenticated.
SEALED_BYTES = 2 * SECRET_BYTES + 16


def _session() -> bytes:
    return wire(data("B", SESSION_BYTES), "the attempt's random name")  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False)
class SumStart(Message):
    """The server begins a sum: it asks a site for keys.

    Attributes:
        round: its number, from 0.
        client: whom it is for.
        session: 16 bytes, the attempt's random name.
    """

    KIND: ClassVar[int] = 4

    round: int = wire(U32, "its number, from 0")
    client: int = wire(U32, "whom it is for")
    session: bytes = _session()


@dataclass(frozen=True, eq=False)
class SumKeys(Message):
    """A site's public keys for one session.

    Attributes:
        round: of the start that it answers.
        client: whose keys they are.
        session: 16 bytes, the attempt's random name.
        share_key: 32 bytes, X25519: shares for this site are encrypted with it.
        mask_key: 32 bytes, X25519: the masks that this site shares with others come of it.
        commitment: 32 bytes, SHA-256 of the secret of the site's own mask.
        opened: clients of the sum of this round that the site has helped to open before, each
            once; usually none.
    """

    KIND: ClassVar[int] = 5

    round: int = wire(U32, "of the start that it answers")
    client: int = wire(U32, "whose keys they are")
    session: bytes = _session()
    share_key: bytes = wire(
        data("B", KEY_BYTES), "X25519: shares for this site are encrypted to it"
    )
    mask_key: bytes = wire(data("B", KEY_BYTES), "X25519: masks shared with other sites come of it")
    commitment: bytes = wire(data("B", COMMITMENT_BYTES), "SHA-256 of the own mask's secret")
    opened: NDArray[np.uint64] = wire(
        words("H"),
        "clients of this round's sum that the site has helped to open before",
        default_factory=lambda: np.empty(0, np.uint64),
    )


@dataclass(frozen=True, eq=False)
class SumRoster(Message):
    """The keys of all sites of a session.

    Attributes:
        round: its number, from 0.
        session: 16 bytes, the attempt's random name.
        members: the keys, sorted by client.
    """

    KIND: ClassVar[int] = 6

    round: int = wire(U32, "its number, from 0")
    session: bytes = _session()
    members: tuple[SumKeys, ...] = wire(many(SumKeys, "H"), "keys of all sites, by client")


@dataclass(frozen=True, eq=False)
class SealedShare(Message):
    """Two shares that only their recipient can read.

    Attributes:
        sender: whose secrets they are of.
        recipient: who can read them.
        sealed: 48 bytes, ChaCha20-Poly1305 of a share of each secret.
    """

    sender: int = wire(U32, "whose secrets they are of")
    recipient: int = wire(U32, "who can read them")
    sealed: bytes = wire(data("B", SEALED_BYTES), "the shares, ChaCha20-Poly1305")


@dataclass(frozen=True, eq=False)
class SumShares(Message):
    """A site's shares of its two secrets for all other sites.

    Attributes:
        round: its number, from 0.
        client: whose secrets they are of.
        session: 16 bytes, the attempt's random name.
        shares: one for each other site, by recipient.
    """

    KIND: ClassVar[int] = 7

    round: int = wire(U32, "its number, from 0")
    client: int = wire(U32, "whose secrets they are of")
    session: bytes = _session()
    shares: tuple[SealedShare, ...] = wire(
        many(SealedShare, "H"), "one for each other site, by recipient"
    )


@dataclass(frozen=True, eq=False)
class SumTask(Message):
    """A task whose report is to be masked.

    Attributes:
        session: 16 bytes, the attempt's random name.
        task: an encoded `Task`.
        shares: for this site, of all others that gave shares; its masks are with those.
    """

    KIND: ClassVar[int] = 8

    session: bytes = _session()
    task: bytes = wire(data("Q"), "an encoded task")
    shares: tuple[SealedShare, ...] = wire(
        many(SealedShare, "H"), "for this site, of the sites whose masks it shares"
    )


@dataclass(frozen=True, eq=False)
class MaskedReport(Message):
    """A report in fixed point, masked. In a simulation the masks are 0.

    Attributes:
        round: of the task that it answers.
        client: who reports.
        values: uint64 [local steps * directions + 3], see `federation.secure_sums`.
        digest: the first 16 bytes of the tuned state's SHA-256, or empty if not asked for.
        session: 16 bytes, the attempt's random name; empty in a simulation.
    """

    KIND: ClassVar[int] = 9

    round: int = wire(U32, "of the task that it answers")
    client: int = wire(U32, "who reports")
    values: NDArray[np.uint64] = wire(
        words("H"), "gradients, loss, whether there is one, skipped steps: fixed point plus masks"
    )
    digest: bytes = wire(
        data("B", 0, DIGEST_BYTES), "first half of the tuned state's SHA-256", default=b""
    )
    session: bytes = wire(
        data("B", 0, SESSION_BYTES), "the attempt's random name; none in a simulation", default=b""
    )


@dataclass(frozen=True, eq=False)
class SumOpening(Message):
    """The server asks for what takes the masks off the sum.

    Attributes:
        round: its number, from 0.
        session: 16 bytes, the attempt's random name.
        summed: clients whose masked reports are in the sum, ascending.
    """

    KIND: ClassVar[int] = 10

    round: int = wire(U32, "its number, from 0")
    session: bytes = _session()
    summed: NDArray[np.uint64] = wire(words("H"), "clients whose masked reports are in the sum")


@dataclass(frozen=True, eq=False)
class OpenShare(Message):
    """A share of one secret, for the server.

    Attributes:
        owner: whose secret it is of.
        secret: 0 of its own mask, for a site in the sum; 1 of its mask key, for one that is not.
        share: 16 bytes.
    """

    owner: int = wire(U32, "whose secret it is of")
    secret: int = wire(U8, "0 of the own mask, of a site in the sum; 1 of the mask key, else")
    share: bytes = wire(data("B", SECRET_BYTES), "of Shamir's scheme over GF(2^128)")


@dataclass(frozen=True, eq=False)
class SumOpened(Message):
    """What a site gives to take the masks off the sum.

    Attributes:
        round: its number, from 0.
        client: who gives it.
        session: 16 bytes, the attempt's random name.
        shares: at most one for each site of the session, by owner.
    """

    KIND: ClassVar[int] = 11

    round: int = wire(U32, "its number, from 0")
    client: int = wire(U32, "who gives it")
    session: bytes = _session()
    shares: tuple[OpenShare, ...] = wire(many(OpenShare, "H"), "one for each site, by owner")


@dataclass(frozen=True, eq=False)
class Total(Message):
    """The sum of a round's reports, as the ledger keeps it in their place.

    Attributes:
        clients: reports that it is of.
        values: uint64 [local steps * directions + 3], two's complement, see
            `federation.secure_sums`.
    """

    clients: int = wire(U16, "reports that it is of")
    values: NDArray[np.uint64] = wire(
        words("H"), "sums of gradients, loss, losses, skipped steps, in fixed point"
    )
