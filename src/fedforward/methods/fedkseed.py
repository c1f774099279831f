"""FedKSeed (arXiv 2312.06353): every direction of a run comes from K candidate seeds.

Faithful to the paper: a client draws a candidate for each local step; what a run has done to θ is
one accumulator for each candidate, θ = θ_base - Σ_j a_j z(s_j), so that catching up costs at most
K directions however many rounds were missed. It departs in exactness: accumulators are 64-bit
integers in units of 2^-40 and θ is always rounded once from the base, so that the order of
additions is without effect and every party holds the same bits. Which candidate a step drew is
derived from (run seed, round, client, step), so that a report is H scalars and no indices.

FedKSeed-Pro draws candidates by importance: softmax of the candidates' mean |g|, scaled to [0, 1]
between the least and the greatest (our reading; the wire form, 16-bit weights, is ours too).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedforward.core.errors import MessageError, UpdateNotFiniteError
from fedforward.core.seeds import derive, dither_seed, draws
from fedforward.core.steps import Steps, Update
from fedforward.messages.entry import Entry
from fedforward.messages.report import ClientResult
from fedforward.messages.snapshot import Snapshot
from fedforward.methods.base import Capabilities, Method
from fedforward.methods.parameters import parameter

#: 2^-40: what an accumulator counts.
ACCUMULATOR_UNIT = 2.0**-40
#: Sampling weight of the least likely candidate; the most likely has e times as much.
LEAST_WEIGHT = 20000
#: A sum of so many of a round's amounts still fits 64 bits.
MAX_AMOUNT = 2.0**46
#: Candidates are counted in 16 bits.
MAX_CANDIDATES = 65535


@dataclass(frozen=True, kw_only=True)
class FedKSeed(Method):
    """Directions from K candidates.

    Attributes:
        candidates: K.
        importance: of the class: whether candidates are drawn by importance (FedKSeed-Pro).

    Example:
        >>> method = FedKSeed(local_steps=100, candidates=2)
        >>> len(set(method.seeds(round_number=0, client=0).tolist()))
        2
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        contributions=False, from_base=True, scales=True
    )
    importance: ClassVar[bool] = False
    candidates: int = parameter(
        4096,
        "K, seeds that all directions of the run come from",
        at_least=1,
        at_most=MAX_CANDIDATES,
    )

    def draw(self, round_number: int, client: int, payload: bytes) -> NDArray[np.int64]:
        """Which candidates a client draws in a round, int64 [H * n]; integer arithmetic alone.

        Args:
            payload: the sampling weights of the round's tasks; empty draws uniformly.

        Raises:
            MessageError: the weights are of another number of candidates, or all 0.
        """
        drawn = draws(
            self.run_seed, "draw", self.local_steps * self.directions, round_number, client
        )
        if not payload:
            uniform: NDArray[np.int64] = (drawn % np.uint64(self.candidates)).astype(np.int64)
            return uniform
        weights = np.frombuffer(payload, "<u2") if len(payload) % 2 == 0 else np.empty(0, "<u2")
        if len(weights) != self.candidates or not weights.any():
            raise MessageError(
                f"A task with sampling weights in {len(payload)} bytes was refused: this run has "
                f"{self.candidates} candidate seeds (method.candidates) of 2 bytes each."
            )
        ends = np.cumsum(weights.astype(np.uint64))
        weighted: NDArray[np.int64] = np.searchsorted(ends, drawn % ends[-1], side="right")
        return weighted.astype(np.int64)

    def seeds(self, round_number: int, client: int, payload: bytes = b"") -> NDArray[np.uint64]:
        """The seeds of the candidates that were drawn; see `draw`."""
        known = candidate_seeds(self.run_seed, self.candidates)
        return known[self.draw(round_number, client, payload)]

    def new_state(self) -> "KSeedState":
        """Accumulators, and the amplitudes that importance needs."""
        return KSeedState(self)

    def update(self, entry: Entry, state: "KSeedState") -> Update:
        """θ = round(θ_base + Σ_j a_j z(s_j)), with the entry's increments in the a_j."""
        state.add(Increments.decode(entry))
        return state.update(entry.round)

    def round_steps(self, entry: Entry) -> Steps:
        """See `Method`: the entry's increments."""
        places, amounts = Increments.decode(entry)
        seeds = candidate_seeds(self.run_seed, self.candidates)[places]
        return Steps(seeds, (amounts * ACCUMULATOR_UNIT).astype(np.float32))

    def taken_back(self, round_number: int, entry: Entry) -> Entry:
        """See `Method`: the increments with the other sign, which is exact."""
        places, amounts = Increments.decode(entry)
        return Entry(round_number, (), payload=Increments(places, -amounts).encode())

    def restore(self, model: object, snapshot: Snapshot, state: "KSeedState") -> None:
        """Take over the accumulators and build the weights from the base."""
        state.restore(snapshot.state)
        model.commit([state.update(snapshot.rounds - 1)])  # type: ignore[attr-defined]

    def task_payload(self, state: "KSeedState") -> bytes:
        """The sampling weights, uint16 [K], where importance asks for them."""
        return state.sampling_weights().astype("<u2").tobytes()

    def aggregate(
        self, round_number: int, results: Sequence[ClientResult], state: "KSeedState"
    ) -> Entry:
        """-p_i (η_i / n) g_ih for each candidate, rounded to the accumulators' unit, added up.

        An aggregator may shorten what a client adds.

        Raises:
            UpdateNotFiniteError: an amount is beyond 64 bits.
        """
        payload = self.task_payload(state)
        places = [self.draw(round_number, part.report.client, payload) for part in results]
        amounts = []
        for part, scale in zip(results, self._scales(results, places), strict=True):
            rate = -scale * part.weight * (part.learning_rate / self.directions)
            exact = np.rint(rate * part.report.gradients.astype(np.float64) / ACCUMULATOR_UNIT)
            if not (np.abs(exact) < MAX_AMOUNT).all():
                raise UpdateNotFiniteError(
                    f"The update of round {round_number + 1} is beyond what accumulators hold and "
                    "was not written. Lower method.learning_rate; the rounds before are kept."
                )
            amounts.append(exact.astype(np.int64))
        touched, where = np.unique(np.concatenate(places), return_inverse=True)
        sums = np.zeros(len(touched), np.int64)
        np.add.at(sums, where, np.concatenate(amounts))
        return Entry(round_number, (), payload=Increments(touched, sums).encode())

    def _scales(
        self, results: Sequence[ClientResult], places: Sequence[NDArray[np.int64]]
    ) -> list[float]:
        """What the aggregator multiplies each client's update with.

        An update here is η_i times a client's sum for each candidate that it drew, as long as that.
        Rules that compare clients' sums candidate by candidate are refused: with thousands of
        candidates and a few hundred draws, few of them are drawn by more than one client a round.
        """
        if self.aggregator.scales is None:
            return [1.0] * len(results)
        sums = np.zeros((len(results), self.local_steps * self.directions))
        for row, part, drawn in zip(sums, results, places, strict=True):
            where = np.unique(drawn, return_inverse=True)[1]
            np.add.at(row, where, part.learning_rate * part.report.gradients.astype(np.float64))
        scales: list[float] = self.aggregator.scales(sums).tolist()
        return scales

    def observe(self, entry: Entry, results: Sequence[ClientResult], state: "KSeedState") -> None:
        """Increments into the accumulators, and |g| into the amplitudes."""
        payload = self.task_payload(state)
        if self.importance:
            for part in results:
                places = self.draw(entry.round, part.report.client, payload)
                state.take_amplitudes(places, part.report.gradients)
        state.add(Increments.decode(entry))


class FedKSeedPro(FedKSeed):
    """FedKSeed with candidates drawn by importance.

    Example:
        >>> FedKSeedPro().importance
        True
    """

    importance: ClassVar[bool] = True


class Increments(NamedTuple):
    """What a round adds to the accumulators: an entry's payload.

    Attributes:
        places: [M], which candidates, ascending; uint32 each on the wire.
        amounts: int64 [M], in units of `ACCUMULATOR_UNIT`.
    """

    places: NDArray[np.int64]
    amounts: NDArray[np.int64]

    def encode(self) -> bytes:
        """The places, then the amounts."""
        return self.places.astype("<u4").tobytes() + self.amounts.astype("<i8").tobytes()

    @classmethod
    def decode(cls, entry: Entry) -> "Increments":
        """From an entry.

        Raises:
            MessageError: its payload is not such increments.
        """
        count, left = divmod(len(entry.payload), 12)
        if left or not count or entry.contributions:
            raise MessageError(
                f"Ledger round {entry.round} was refused: it has no increments of candidate seeds."
            )
        places = np.frombuffer(entry.payload[: 4 * count], "<u4").astype(np.int64)
        if (np.diff(places) <= 0).any():
            raise MessageError(
                f"Ledger round {entry.round} was refused: its candidate seeds are not in order."
            )
        return cls(places, np.frombuffer(entry.payload[4 * count :], "<i8").astype(np.int64))


class KSeedState:
    """What a run has done to θ so far, and how large each candidate's projected gradients were.

    Attributes:
        values: int64 [K], one exact number for each candidate, in units of `ACCUMULATOR_UNIT`.
        sums: float64 [K], of |g| of each candidate over all reports; at the server.
        counts: int64 [K], of these.
    """

    def __init__(self, method: FedKSeed) -> None:
        self.method = method
        self.values = np.zeros(method.candidates, np.int64)
        self.sums = np.zeros(method.candidates, np.float64)
        self.counts = np.zeros(method.candidates, np.int64)

    def encode(self) -> bytes:
        """The accumulators, which a client can take over in place of entries."""
        return self.values.astype("<i8").tobytes()

    def restore(self, data: bytes) -> None:
        """Take over accumulators.

        Raises:
            MessageError: they are of another number of candidates.
        """
        if len(data) != 8 * len(self.values):
            raise MessageError(
                f"A snapshot of {len(data)} bytes was refused: the accumulators of "
                f"{len(self.values)} candidate seeds are {8 * len(self.values)}."
            )
        self.values = np.frombuffer(data, "<i8").astype(np.int64)

    def add(self, increments: Increments) -> None:
        """Take in a round.

        Raises:
            MessageError: it names a candidate that does not exist.
        """
        places, amounts = increments
        if int(places[-1]) >= len(self.values):
            raise MessageError(
                f"A ledger entry for candidate seed {int(places[-1])} was refused: this run has "
                f"{len(self.values)} (method.candidates)."
            )
        self.values[places] += amounts

    def update(self, round_number: int) -> Update:
        """θ = round(θ_base + Σ_j a_j z(s_j)), in the order of the candidates."""
        places = np.flatnonzero(self.values)
        seeds = candidate_seeds(self.method.run_seed, len(self.values))[places]
        amounts = (self.values[places] * ACCUMULATOR_UNIT).astype(np.float32)
        dither = dither_seed(self.method.run_seed, round_number)
        return Update(Steps(seeds, amounts), dither, from_base=True)

    def take_amplitudes(self, places: NDArray[np.int64], gradients: NDArray[np.float32]) -> None:
        """Add a client's |g|, float32 [H * n], of the candidates that it drew."""
        np.add.at(self.sums, places, np.abs(gradients.astype(np.float64)))
        np.add.at(self.counts, places, 1)

    def sampling_weights(self) -> NDArray[np.uint16]:
        """uint16 [K]: softmax of the mean |g| scaled to [0, 1]; empty where all are equal.

        Candidates that were not drawn yet have a mean of 0.
        """
        means = self.sums / np.maximum(1, self.counts)
        width = float(means.max() - means.min())
        if not self.method.importance or not width:
            return np.empty(0, np.uint16)
        scaled = (means - means.min()) / width
        weights: NDArray[np.uint16] = np.rint(LEAST_WEIGHT * np.exp(scaled)).astype(np.uint16)
        return weights


@cache
def candidate_seeds(run_seed: int, candidates: int) -> NDArray[np.uint64]:
    """The seeds of all candidates, uint64 [K]."""
    return np.array(
        [derive(run_seed, "candidate", place) for place in range(candidates)], dtype=np.uint64
    )
