"""Clients vote on the sign of each shared direction, and the steps follow their usual size.

In local step h all clients probe along the same directions, as in DeComFL. A report carries the
signs of its projected gradients (as ±1) and, in its payload, their mean magnitude m_i. The server
takes the weighted majority of the signs, and the size of a step from a running mean of magnitudes:

    s_t = λ s_{t-1} + (1 - λ) Σ_i p_i m_i,        θ ← θ - η̄ s_t Σ_h vote_h z(s_h).

s_t is the method's memory: the server and every replica keep it, and a snapshot carries it.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedforward.core.errors import MessageError
from fedforward.core.seeds import SHARED, dither_seed
from fedforward.core.steps import Steps, Update
from fedforward.messages.entry import Entry
from fedforward.messages.report import ClientResult, Report
from fedforward.messages.task import Task
from fedforward.methods.base import BatchStream, Capabilities, LocalRound, Method, round_seeds
from fedforward.methods.parameters import parameter

_MAGNITUDE = struct.Struct("<f")
_HEAD = struct.Struct("<ff")


@dataclass(frozen=True, kw_only=True)
class SignVote(Method):
    """See the module.

    Attributes:
        smoothing: λ.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(shared_directions=True, contributions=False)
    smoothing: float = parameter(
        0.9, "how much of the running magnitude a round keeps", at_least=0.0, at_most=0.999
    )

    def seeds(self, round_number: int, client: int, payload: bytes = b"") -> NDArray[np.uint64]:
        """s_h, the same for every client."""
        return round_seeds(self.run_seed, round_number, SHARED, self.local_steps, self.directions)

    def new_state(self) -> "Magnitude":
        """s_0 = 0: the first round sets it."""
        return Magnitude()

    def local_round(self, task: Task, batches: BatchStream, model: object = None) -> LocalRound:
        """The usual round; signs and a mean magnitude are reported of it."""
        report = yield from super().local_round(task, batches, model)
        magnitude = float(np.abs(report.gradients).mean())
        return replace(
            report, gradients=np.sign(report.gradients), payload=_MAGNITUDE.pack(magnitude)
        )

    def check_report(self, report: Report, parameters: int) -> None:
        """Signs, and a finite magnitude that is not negative."""
        super().check_report(replace(report, payload=b""), parameters)
        signs = np.isin(report.gradients, (-1.0, 0.0, 1.0)).all()
        magnitude = _unpacked(_MAGNITUDE, report.payload)
        if not signs or magnitude is None or magnitude[0] < 0:
            raise MessageError(
                f"A report of client {report.client} was refused: it has no signs with a magnitude."
            )

    def aggregate(
        self, round_number: int, results: Sequence[ClientResult], state: "Magnitude"
    ) -> Entry:
        """The votes, int8 each, behind the round's magnitude and mean rate."""
        weights = np.array([part.weight for part in results])
        signs = np.array([part.report.gradients for part in results], np.float64)
        found = [_MAGNITUDE.unpack(part.report.payload)[0] for part in results]
        rate = float(weights @ np.array([part.learning_rate for part in results]))
        votes = np.sign(weights @ signs).astype(np.int8)
        head = _HEAD.pack(float(weights @ np.array(found)), rate / self.directions)
        return Entry(round_number, (), payload=head + votes.tobytes())

    def observe(self, entry: Entry, results: Sequence[ClientResult], state: "Magnitude") -> None:
        """The server's running magnitude."""
        state.take(self._read(entry)[0], self.smoothing)

    def update(self, entry: Entry, state: "Magnitude") -> Update:
        """-η̄ s_t vote_h along each direction, with the entry's magnitude in s_t."""
        magnitude, rate, votes = self._read(entry)
        state.take(magnitude, self.smoothing)
        steps = Steps.of(self.seeds(entry.round, SHARED), -rate * state.value * votes)
        return Update(steps, dither_seed(self.run_seed, entry.round), entry.decay)

    def _read(self, entry: Entry) -> tuple[float, float, NDArray[np.float64]]:
        head = _unpacked(_HEAD, entry.payload[: _HEAD.size])
        votes = np.frombuffer(entry.payload[_HEAD.size :], np.int8).astype(np.float64)
        if head is None or len(votes) != self.local_steps * self.directions:
            raise MessageError(f"Ledger round {entry.round} was refused: it has no votes.")
        return head[0], head[1], votes


class Magnitude:
    """What server and replicas remember.

    Attributes:
        value: s_t, or 0 before the first round.
    """

    def __init__(self) -> None:
        self.value = 0.0

    def take(self, magnitude: float, smoothing: float) -> None:
        """Take in a round's mean magnitude; it is rounded to float32 once."""
        kept = smoothing * self.value if self.value else smoothing * magnitude
        self.value = float(np.float32(kept + (1.0 - smoothing) * magnitude))

    def encode(self) -> bytes:
        """The wire form, 4 bytes."""
        return _MAGNITUDE.pack(self.value)

    def restore(self, data: bytes) -> None:
        """Take over another party's.

        Raises:
            MessageError: it is not one finite number.
        """
        found = _unpacked(_MAGNITUDE, data)
        if found is None:
            raise MessageError(f"A snapshot with a memory of {len(data)} bytes was refused.")
        self.value = found[0]


def _unpacked(form: struct.Struct, data: bytes) -> tuple[float, ...] | None:
    """The numbers, if the bytes are that many finite ones."""
    if len(data) != form.size:
        return None
    numbers: tuple[float, ...] = form.unpack(data)
    return numbers if all(map(math.isfinite, numbers)) else None
