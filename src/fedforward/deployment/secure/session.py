"""The server's side of one attempt at a secure sum: it hands on what sites give, and opens the sum.

It sees public keys, commitments, shares that it cannot read, masked reports, and of each site the
shares of one of its two secrets. What it makes of these is held against the commitments and public
keys, so that a wrong share changes no sum.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedforward.core.errors import MessageError
from fedforward.deployment.secure import primitives
from fedforward.deployment.secure.party import context_of, pairwise
from fedforward.federation.agreement import QuorumError
from fedforward.federation.secure_sums import threshold_of
from fedforward.messages.secure import (
    SESSION_BYTES,
    SumKeys,
    SumOpened,
    SumOpening,
    SumRoster,
    SumShares,
    SumStart,
    SumTask,
)


class SumSession:
    """See the module.

    Attributes:
        round: its number, from 0.
        name: the session's random name.
        keys: of the sites that have sent them, by client.
        shares: of the sites that have sent them for all others, by client.
        opened: what sites gave to open the sum, by client.
        threshold: shares that tell a secret; 0 before the roster is made.
    """

    def __init__(self, run: bytes, round_number: int, least: int) -> None:
        """`least` is `federation.secure_threshold`."""
        self.run = run
        self.round = round_number
        self.least = least
        self.name = os.urandom(SESSION_BYTES)
        self.keys: dict[int, SumKeys] = {}
        self.shares: dict[int, SumShares] = {}
        self.opened: dict[int, SumOpened] = {}
        self.threshold = 0
        self._roster = b""
        self._summed: tuple[int, ...] = ()

    # ---- what sites are sent -------------------------------------------------------------------

    def start(self, client: int) -> bytes:
        """The encoded request for a site's keys."""
        return SumStart(self.round, client, self.name).encode()

    def make_roster(self) -> None:
        """Take the sites that have sent keys as those of the session; later ones are too late.

        Raises:
            QuorumError: they are too few.
        """
        members = tuple(self.keys[client] for client in sorted(self.keys))
        self.threshold = threshold_of(len(members), self.least)
        self.check_enough(len(members), "keys")
        self._roster = SumRoster(self.round, self.name, members).encode()

    def roster(self) -> bytes:
        """The encoded keys of all sites."""
        return self._roster

    def task(self, client: int, task: bytes) -> bytes:
        """An encoded task with the shares that others gave for a site."""
        shares = [
            share
            for sender in sorted(self.shares)
            for share in self.shares[sender].shares
            if share.recipient == client
        ]
        return SumTask(self.name, task, tuple(shares)).encode()

    def opening(self, summed: Sequence[int]) -> bytes:
        """The encoded request to open the sum of these clients' reports, ascending."""
        self._summed = tuple(summed)
        return SumOpening(self.round, self.name, np.array(summed, np.uint64)).encode()

    def check_enough(self, found: int, what: str) -> None:
        """Refuse to go on with too few sites.

        Raises:
            QuorumError: see above.
        """
        if found < self.threshold:
            raise QuorumError(
                f"Round {self.round} cannot be closed: {found} sites have sent {what}, and a sum "
                f"takes {self.threshold} (federation.secure_threshold, or two thirds of all)."
            )

    # ---- what they answer ----------------------------------------------------------------------

    def take_keys(self, body: bytes, client: int) -> None:
        """Keep a site's keys.

        Raises:
            MessageError: they are damaged, of another session, or too late.
        """
        keys = SumKeys.decode(body)
        self._check(keys, client)
        if self._roster:
            raise MessageError(f"Keys of client {client} were refused: they came too late.")
        trial = primitives.private_key(primitives.new_secret(), b"")
        for key in (keys.share_key, keys.mask_key):
            primitives.agreed(trial, key, b"trial", b"")
        theirs = {key for k in self.keys.values() for key in (k.share_key, k.mask_key)}
        if keys.share_key == keys.mask_key or theirs & {keys.share_key, keys.mask_key}:
            raise MessageError(f"Keys of client {client} were refused: one is there already.")
        self.keys[client] = keys

    def take_shares(self, body: bytes, client: int) -> None:
        """Keep a site's shares, which only their recipients can read.

        Raises:
            MessageError: they are damaged, of another session, not for all other sites, or too
                late.
        """
        shares = SumShares.decode(body)
        self._check(shares, client)
        others = [other for other in sorted(self.keys) if other != client]
        found = [(share.sender, share.recipient) for share in shares.shares]
        if not self._roster or client not in self.keys:
            raise MessageError(f"Shares of client {client} were refused: nobody asked for them.")
        if found != [(client, other) for other in others]:
            raise MessageError(
                f"Shares of client {client} were refused: they are not one for each other site."
            )
        self.shares[client] = shares

    def take_opened(self, body: bytes, client: int) -> None:
        """Keep what a site gives to open the sum.

        Raises:
            MessageError: it is damaged, of another session, or not what was asked for.
        """
        opened = SumOpened.decode(body)
        self._check(opened, client)
        owners = [share.owner for share in opened.shares]
        if owners != sorted(set(owners)) or not self.shares.keys() >= set(owners):
            raise MessageError(f"Shares of client {client} were refused: not one for each site.")
        for share in opened.shares:
            if share.secret != int(share.owner not in self._summed):
                raise MessageError(
                    f"Shares of client {client} were refused: one is of the secret that nobody "
                    "asked for."
                )
        self.opened[client] = opened

    def _check(self, message: Any, client: int) -> None:
        if (message.client, message.round, message.session) != (client, self.round, self.name):
            raise MessageError(
                f"A message of client {client} was refused: it is of another site, or of another "
                "attempt at a sum."
            )

    # ---- the sum -------------------------------------------------------------------------------

    def required(self) -> tuple[int, ...]:
        """The clients that the sum must be of, where some sites have opened this round's before.

        They open no other sum of it. Empty where none has.
        """
        before = {tuple(keys.opened.tolist()) for keys in self.keys.values()} - {()}
        return min(before) if before else ()

    def masks(self, count: int) -> NDArray[np.uint64]:
        """The sum of all masks in the reports that are summed, modulo 2⁶⁴, uint64 [count].

        Raises:
            QuorumError: the shares are too few, or wrong.
        """
        self.check_enough(len(self.opened), "shares to open the sum")
        context = context_of(self.run, self.name, self.round)
        places = {client: place for place, client in enumerate(sorted(self.keys))}
        total = np.zeros(count, np.uint64)
        for owner in sorted(self.shares):
            shares = [
                (places[client], share.share)
                for client, opened in sorted(self.opened.items())
                for share in opened.shares
                if share.owner == owner
            ]
            if owner in self._summed:
                secret = self._secret(owner, shares, "commitment", context)
                total = total + primitives.mask(
                    primitives.derived(secret, b"own mask", context), count
                )
            else:
                secret = self._secret(owner, shares, "mask_key", context)
                key = primitives.private_key(secret, context)
                for other in self._summed:
                    # What the other has added for the one that is gone, with its sign.
                    shared = pairwise(key, owner, other, self.keys[other], context, count)
                    total = total - shared
        return total

    def _secret(
        self, owner: int, shares: Sequence[tuple[int, bytes]], proof: str, context: bytes
    ) -> bytes:
        """A site's secret from shares, of which a few may be wrong."""
        wanted = getattr(self.keys[owner], proof)
        for begin in range(max(1, len(shares)) if len(shares) >= self.threshold else 0):
            # As many neighbours in a ring: a wrong share is outside some of them.
            ring = [*shares[begin:], *shares[:begin]][: self.threshold]
            secret = primitives.combined(ring)
            made = (
                primitives.commitment(secret)
                if proof == "commitment"
                else primitives.public_bytes(primitives.private_key(secret, context))
            )
            if made == wanted:
                return secret
            if len(shares) == self.threshold:
                break
        raise QuorumError(
            f"Round {self.round} cannot be closed: the masks of client {owner} cannot be taken off "
            f"the sum with the {len(shares)} shares that came. It, or a site that gave one, has "
            "sent wrong ones; leave sites out with --without."
        )
