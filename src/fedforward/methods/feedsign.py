"""FeedSign (arXiv 2501.17610): one bit for each step, and the majority of the clients decides.

In local step h all clients probe along the same directions, as in DeComFL. A report has one bit
for each: whether the loss rises or falls along it. The server takes the majority (Eq. 6 and
Algorithm 1), so that a client moves a vote by one however large the numbers are that it makes up:

    θ ← θ - (η̄ / n) Σ_h Σ_d f_hd z(s_hd),        f_hd = sign(Σ_i sign(g_i,hd)).

η̄ is the mean of the clients' rates. Faithful to the paper for one step and one direction a round;
with more, a client moves along its own votes within the round, and drops that after reporting.
Where as many say yes as no, nothing moves; a scalar of exactly 0 votes as a positive one. Each
client has one vote, however many examples it holds.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedforward.core.errors import MessageError
from fedforward.core.seeds import SHARED, dither_seed
from fedforward.core.steps import Steps, Update
from fedforward.messages.entry import Entry
from fedforward.messages.report import NO_FLOATS, ClientResult, Report
from fedforward.messages.task import Task
from fedforward.methods.base import BatchStream, Capabilities, LocalRound, Method, round_seeds

_RATE = struct.Struct("<f")


@dataclass(frozen=True, kw_only=True)
class FeedSign(Method):
    """One-bit votes along shared directions.

    Example:
        >>> method = FeedSign(local_steps=3)
        >>> pack_votes(np.array([1.0, -1.0, 1.0]))
        b'\\x05'
    """

    capabilities: ClassVar[Capabilities] = Capabilities(contributions=False, votes=True)

    def seeds(self, round_number: int, client: int, payload: bytes = b"") -> NDArray[np.uint64]:
        """s_h, the same for every client."""
        return round_seeds(self.run_seed, round_number, SHARED, self.local_steps, self.directions)

    def local_moves(self, projected: NDArray[np.float32]) -> NDArray[np.float32]:
        """The votes: what is reported is what the client moves by."""
        return signs(projected)

    def local_round(self, task: Task, batches: BatchStream, model: Any = None) -> LocalRound:
        """The usual round, of which the votes are reported."""
        report = yield from super().local_round(task, batches, model)
        return self.with_scalars(report, report.gradients)

    def scalars(self, report: Report) -> NDArray[np.float64]:
        """The votes, 1 or -1 each."""
        return unpack_votes(report.payload, self.local_steps * self.directions)

    def with_scalars(self, report: Report, scalars: NDArray[np.float32]) -> Report:
        """Votes for the signs of these."""
        return replace(report, gradients=NO_FLOATS, payload=pack_votes(signs(scalars)))

    def check_report(self, report: Report, parameters: int) -> None:
        """Refuse other than one bit for each direction."""
        count = self.local_steps * self.directions
        fits = len(report.payload) == _size(count) and not len(report.gradients)
        # Bits beyond the last vote are 0, so that a report says nothing else.
        if not fits or pack_votes(unpack_votes(report.payload, count)) != report.payload:
            raise MessageError(
                f"A report of client {report.client} was refused: it has {len(report.payload)} "
                f"bytes and {len(report.gradients)} projected gradients, not {count} votes in "
                f"{_size(count)} bytes."
            )

    def aggregate(self, round_number: int, results: Sequence[ClientResult], state: Any) -> Entry:
        """η̄ / n as float32, then a bit for each majority; where some are even, which of them."""
        total = np.sum([self.scalars(part.report) for part in results], axis=0)
        rates = [part.learning_rate for part in results]
        rate = math.fsum(rates) / len(rates) / self.directions
        even = total == 0.0
        ties = pack_votes(np.where(even, 1.0, -1.0)) if even.any() else b""
        return Entry(round_number, (), payload=_RATE.pack(rate) + pack_votes(total) + ties)

    def update(self, entry: Entry, state: Any) -> Update:
        """-(η̄ / n) f along each direction.

        Raises:
            MessageError: the entry has no votes of this run.
        """
        count = self.local_steps * self.directions
        rate, votes, ties = (
            entry.payload[: _RATE.size],
            entry.payload[_RATE.size : _RATE.size + _size(count)],
            entry.payload[_RATE.size + _size(count) :],
        )
        whole = len(votes) == _size(count) and len(ties) in (0, _size(count))
        found = _RATE.unpack(rate)[0] if whole else math.nan
        if entry.contributions or not math.isfinite(found):
            raise MessageError(
                f"Ledger round {entry.round} was refused: it has no votes on {count} directions."
            )
        majority = unpack_votes(votes, count)
        if ties:
            majority[unpack_votes(ties, count) > 0.0] = 0.0
        steps = Steps.of(self.seeds(entry.round, SHARED), -found * majority)
        return Update(steps, dither_seed(self.run_seed, entry.round), entry.decay)


def signs(scalars: NDArray[Any]) -> NDArray[np.float32]:
    """1 or -1 for each scalar, float32; 1 for 0."""
    return np.where(scalars < 0.0, np.float32(-1.0), np.float32(1.0))


def pack_votes(votes: NDArray[Any]) -> bytes:
    """A bit for each number, 1 where it is above 0; the first is the lowest of the first byte."""
    return np.packbits(votes > 0.0, bitorder="little").tobytes()


def unpack_votes(data: bytes, count: int) -> NDArray[np.float64]:
    """1 or -1 for each bit, float64 [count].

    Args:
        data: at least so many bits.
    """
    bits = np.unpackbits(np.frombuffer(data, np.uint8), count=count, bitorder="little")
    return np.where(bits, 1.0, -1.0)


def _size(count: int) -> int:
    """Bytes of so many bits."""
    return -(-count // 8)
