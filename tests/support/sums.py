"""Sites and a server of one secure sum, without models: only what they say to each other."""

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedforward.deployment.secure.party import SumParty
from fedforward.deployment.secure.session import SumSession
from fedforward.messages.secure import (
    MaskedReport,
    SumKeys,
    SumOpened,
    SumOpening,
    SumRoster,
    SumShares,
    SumStart,
    SumTask,
)

RUN = b"run name"
NUMBERS = 13


@dataclass
class Sum:
    """One attempt, and all bytes that the server was sent in it, by client."""

    values: dict[int, NDArray[np.uint64]]
    least: int = 3
    round: int = 4
    parties: dict[int, SumParty] = field(default_factory=dict)
    seen: dict[int, list[bytes]] = field(default_factory=dict)
    reports: dict[int, MaskedReport] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for client in self.values:
            self.parties.setdefault(client, SumParty(RUN, client, self.least))
        self.seen = {client: [] for client in self.values}
        self.session = SumSession(RUN, self.round, self.least)

    def sent(self, client: int, data: bytes) -> bytes:
        self.seen[client].append(data)
        return data

    def keys(self, client: int) -> SumKeys:
        request = SumStart.decode(self.session.start(client))
        return SumKeys.decode(self.sent(client, self.parties[client].start(request).encode()))

    def shares(self, client: int) -> SumShares:
        request = SumRoster.decode(self.session.roster())
        return SumShares.decode(self.sent(client, self.parties[client].share(request).encode()))

    def task(self, client: int) -> SumTask:
        return SumTask.decode(self.session.task(client, b"task"))

    def report(self, client: int) -> MaskedReport:
        part = MaskedReport(self.round, client, self.values[client])
        masked = self.parties[client].mask(self.task(client), part)
        return MaskedReport.decode(self.sent(client, masked.encode()))

    def opened(self, client: int, summed: Collection[int]) -> SumOpened:
        request = SumOpening.decode(self.session.opening(sorted(summed)))
        return SumOpened.decode(self.sent(client, self.parties[client].open(request).encode()))

    def begin(
        self, without_keys: Collection[int] = (), without_shares: Collection[int] = ()
    ) -> None:
        """Keys and shares of all but those."""
        for client in self.values.keys() - set(without_keys):
            self.session.take_keys(self.keys(client).encode(), client)
        self.session.make_roster()
        for client in self.session.keys.keys() - set(without_shares):
            self.session.take_shares(self.shares(client).encode(), client)
        self.session.check_enough(len(self.session.shares), "shares")

    def mask(self, without: Collection[int] = ()) -> list[int]:
        """Masked reports of all but those; whose came."""
        self.reports = {c: self.report(c) for c in self.session.shares.keys() - set(without)}
        return sorted(self.reports)

    def open(self, summed: Collection[int], without: Collection[int] = ()) -> NDArray[np.uint64]:
        """The sum of these clients' reports, opened by all of them but some."""
        for client in sorted(set(summed) - set(without)):
            self.session.take_opened(self.opened(client, summed).encode(), client)
        masks = self.session.masks(NUMBERS)
        total = np.sum([self.reports[c].values for c in summed], axis=0, dtype=np.uint64)
        return np.asarray(total - masks)


def random_values(clients: Collection[int], seed: int = 0) -> dict[int, NDArray[np.uint64]]:
    random = np.random.default_rng(seed)
    return {client: random.integers(-(2**50), 2**50, NUMBERS).view(np.uint64) for client in clients}


def plain(values: dict[int, NDArray[np.uint64]], clients: Collection[int]) -> list[int]:
    """The sum without any masks."""
    return [sum(int(values[c].view(np.int64)[n]) for c in clients) for n in range(NUMBERS)]
