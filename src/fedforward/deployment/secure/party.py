"""A site's side of secure sums: its secrets, its masks, and what it gives to open a sum.

A site answers each step of a session once. Asked again it says the same, or nothing: two reports
under one mask, or both secrets of a site, would tell what the site has sent. Of a round whose sum
it has helped to open it opens no other sum, whose difference would tell the same.
"""

import hashlib
from dataclasses import dataclass, field, replace

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from fedforward.core.errors import MessageError
from fedforward.deployment.secure import primitives
from fedforward.federation.secure_sums import threshold_of
from fedforward.messages.secure import (
    MOST_SITES,
    SECRET_BYTES,
    MaskedReport,
    OpenShare,
    SealedShare,
    SumKeys,
    SumOpened,
    SumOpening,
    SumRoster,
    SumShares,
    SumStart,
    SumTask,
)


def context_of(run: bytes, session: bytes, round_number: int) -> bytes:
    """What keys of a session are bound to."""
    return run + session + round_number.to_bytes(4, "little")


def pair(first: int, second: int) -> bytes:
    """Two sites in the order that matters."""
    return first.to_bytes(4, "little") + second.to_bytes(4, "little")


@dataclass
class _Session:
    """What a site knows of one attempt at a sum.

    Attributes:
        own: secret of its own mask.
        mask_secret: that its mask key follows from.
        share_secret: that its share key follows from.
        members: the other sites' keys and its own, by client; empty before the roster.
        roster: SHA-256 of the list with the members.
        threshold: shares that tell a secret.
        shares: of its own two secrets for itself.
        given: the sites whose masks it shares, with their shares for it; None where those could
            not be read.
    """

    keys: SumKeys
    own: bytes
    mask_secret: bytes
    share_secret: bytes
    members: dict[int, SumKeys] = field(default_factory=dict)
    roster: bytes = b""
    threshold: int = 0
    shares: bytes = b""
    given: dict[int, bytes | None] = field(default_factory=dict)
    sealed: SumShares | None = None
    report: MaskedReport | None = None
    summed: tuple[int, ...] = ()
    opened: SumOpened | None = None


class SumParty:
    """See the module.

    Attributes:
        client: the site's number.
    """

    def __init__(self, run: bytes, client: int, least: int) -> None:
        """`least` is the fewest sites that may open a sum, `federation.secure_threshold`."""
        self.run = run
        self.client = client
        self.least = least
        self._session: _Session | None = None
        self._opened: dict[int, tuple[int, ...]] = {}

    def start(self, request: SumStart) -> SumKeys:
        """Keys for a new session; the one before is over.

        Raises:
            MessageError: it is for another site.
        """
        if request.client != self.client:
            raise MessageError(
                f"A sum of client {request.client} was refused: this one is another."
            )
        session = self._session
        if session is not None and session.keys.session == request.session:
            return session.keys
        own, mask_secret, share_secret = (primitives.new_secret() for _ in range(3))
        context = context_of(self.run, request.session, request.round)
        keys = SumKeys(
            request.round,
            self.client,
            request.session,
            primitives.public_bytes(primitives.private_key(share_secret, context + b"share")),
            primitives.public_bytes(primitives.private_key(mask_secret, context)),
            primitives.commitment(own),
            np.array(self._opened.get(request.round, ()), np.uint64),
        )
        self._session = _Session(keys, own, mask_secret, share_secret)
        return keys

    def share(self, roster: SumRoster) -> SumShares:
        """Encrypted shares of the own secrets, for each other site.

        Raises:
            MessageError: the roster is too short, not in order, or not that of before.
        """
        session = self._current(roster.session, roster.round)
        members = {keys.client: keys for keys in roster.members}
        if session.sealed is not None:
            if _same(members, session.members):
                return session.sealed
            raise MessageError("Another list of sites was refused: this sum has one already.")
        self._check_roster(session, roster, members)
        session.members = members
        # Who was told of other sites cannot read these shares.
        session.roster = hashlib.sha256(roster.encode()).digest()
        session.threshold = threshold = threshold_of(len(members), self.least)
        if len(members) < threshold:
            raise MessageError(
                f"A sum of {len(members)} sites was refused: it takes {threshold} "
                "(federation.secure_threshold)."
            )
        secrets = (session.own, session.mask_secret)
        halves = [primitives.split(secret, threshold, len(members)) for secret in secrets]
        sealed = []
        for other, first, second in zip(sorted(members), *halves, strict=True):
            if other == self.client:
                session.shares = first + second
                continue
            key = self._share_key(session, other, pair(self.client, other))
            sealed.append(SealedShare(self.client, other, primitives.seal(key, first + second)))
        session.sealed = SumShares(roster.round, self.client, roster.session, tuple(sealed))
        return session.sealed

    def _check_roster(
        self, session: _Session, roster: SumRoster, members: dict[int, SumKeys]
    ) -> None:
        order = [keys.client for keys in roster.members]
        own = members.get(self.client)
        keys = {key for k in roster.members for key in (k.mask_key, k.share_key)}
        if (
            order != sorted(set(order))
            or len(order) > MOST_SITES
            or len(keys) != 2 * len(order)
            or own is None
            or own.encode() != session.keys.encode()
            or any((k.round, k.session) != (roster.round, roster.session) for k in roster.members)
        ):
            raise MessageError(
                "A list of sites for a sum was refused: it is not in order, has a site or a key "
                "twice, or has not the keys of this site."
            )

    def mask(self, request: SumTask, part: MaskedReport) -> MaskedReport:
        """A part of the sum with masks; the same one each time it is asked for.

        Raises:
            MessageError: too few sites share masks, or one of them is not of the session.
        """
        session = self._current(request.session, part.round)
        if session.report is not None:
            return session.report
        others = [share.sender for share in request.shares]
        known = session.members.keys() - {self.client}
        if others != sorted(set(others)) or not known.issuperset(others):
            raise MessageError("Shares of sites that are not of the sum, or twice, were refused.")
        if len(others) + 1 < max(session.threshold, 1) or session.sealed is None:
            raise MessageError(
                f"A sum of {len(others) + 1} sites was refused: it takes {session.threshold} "
                "(federation.secure_threshold)."
            )
        session.given = {share.sender: self._unsealed(session, share) for share in request.shares}
        count = len(part.values)
        context = self._context(session)
        values = part.values + primitives.mask(
            primitives.derived(session.own, b"own mask", context), count
        )
        key = primitives.private_key(session.mask_secret, context)
        for other in others:
            values = values + pairwise(
                key, self.client, other, session.members[other], context, count
            )
        session.report = replace(part, values=values, session=session.keys.session)
        return session.report

    def open(self, request: SumOpening) -> SumOpened:
        """Shares that take the masks off a sum.

        Of a site in the sum it is a share of the own mask's secret, and of one that is not the
        mask key's; never both.

        Raises:
            MessageError: too few sites are in the sum, or not this one, or it has opened another
                of this round.
        """
        session = self._current(request.session, request.round)
        summed = tuple(request.summed.tolist())
        if session.opened is not None:
            if summed == session.summed:
                return session.opened
            raise MessageError("A second sum of one round was refused.")
        members = {self.client, *session.given}
        if (
            session.report is None
            or summed != tuple(sorted(set(summed)))
            or not members.issuperset(summed)
            or self.client not in summed
            or len(summed) < session.threshold
        ):
            raise MessageError(
                f"The opening of a sum of {len(summed)} sites was refused: it takes "
                f"{session.threshold} that share masks, this one among them "
                "(federation.secure_threshold)."
            )
        if self._opened.get(request.round, summed) != summed:
            raise MessageError("A second sum of one round was refused.")
        self._opened[request.round] = summed
        shares = [
            OpenShare(owner, secret, content[secret * SECRET_BYTES :][:SECRET_BYTES])
            for owner in sorted(members)
            for secret in [int(owner not in summed)]
            if (content := session.shares if owner == self.client else session.given[owner])
        ]
        session.summed = summed
        session.opened = SumOpened(request.round, self.client, request.session, tuple(shares))
        # What is not needed any more cannot be asked for.
        session.own = session.mask_secret = session.share_secret = b""
        return session.opened

    def masked(self, request: SumTask) -> MaskedReport | None:
        """The report of a session, if it was made before."""
        session = self._session
        if session is None or session.keys.session != request.session:
            return None
        return session.report

    def _current(self, name: bytes, round_number: int) -> _Session:
        session = self._session
        if session is None or (session.keys.session, session.keys.round) != (name, round_number):
            raise MessageError("A message of another attempt at a sum was refused.")
        return session

    def _context(self, session: _Session) -> bytes:
        return context_of(self.run, session.keys.session, session.keys.round)

    def _share_key(self, session: _Session, other: int, direction: bytes) -> bytes:
        context = self._context(session)
        own = primitives.private_key(session.share_secret, context + b"share")
        keys = session.members[other]
        bound = context + session.roster + direction
        return primitives.agreed(own, keys.share_key, b"shares", bound)

    def _unsealed(self, session: _Session, share: SealedShare) -> bytes | None:
        """A share for this site; None where its sender has sent nonsense."""
        if share.recipient != self.client:
            raise MessageError("A share for another site was refused.")
        key = self._share_key(session, share.sender, pair(share.sender, self.client))
        try:
            return primitives.unseal(key, share.sealed)
        except MessageError:
            # The others' shares may be enough.
            return None


def pairwise(
    key: X25519PrivateKey,
    client: int,
    other: int,
    keys: SumKeys,
    context: bytes,
    count: int,
) -> NDArray[np.uint64]:
    """What a site adds for another, which adds as much with the other sign; uint64 [count]."""
    low, high = sorted((client, other))
    shared = primitives.agreed(key, keys.mask_key, b"pair", context + pair(low, high))
    mask = primitives.mask(shared, count)
    return mask if client < other else np.uint64(0) - mask


def _same(one: dict[int, SumKeys], other: dict[int, SumKeys]) -> bool:
    return [k.encode() for k in one.values()] == [k.encode() for k in other.values()]
