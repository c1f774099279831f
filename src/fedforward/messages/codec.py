"""What travels, and its binary form: `Task`, `Report`, `Snapshot`, and the ledger's `Entry`.

Every message is versioned and size-checked, and its numbers are finite; a message that is not is
refused with a sentence. All integers are little-endian; floats travel as their bits.
"""

import math
import struct
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedforward.core.errors import FedForwardError
from fedforward.core.seeds import direction_seed, dither_seed
from fedforward.core.steps import Steps, Update

WIRE_VERSION = 2
MAGIC = b"FF"
TASK, REPORT, SNAPSHOT = 1, 2, 3
HEADER_FORM = struct.Struct("<2sBB")
ENTRY_FORM = struct.Struct("<IfHBI")
CONTRIBUTION_FORM = struct.Struct("<IHHB")
TASK_FORM = struct.Struct("<IIdBIIBIQ")
SNAPSHOT_FORM = struct.Struct("<IBQ")
REPORT_FORM = struct.Struct("<IIIfHHBI")
#: A training loss above this does not fit float32; it is reported as NaN.
LARGEST = 3.4e38
#: Bytes of a state digest on the wire (its first half).
DIGEST_BYTES = 16
#: Stands for an entry without increments, which is not the same as one with none.
NO_INCREMENTS = 0xFFFFFFFF
NO_ODDS = np.empty(0, np.uint16)


class MessageError(FedForwardError):
    """A message that is damaged, of another version, or not what was asked for."""


@dataclass(frozen=True, eq=False)
class Contribution:
    """Steps of a round that share a client and a set of blocks, weights and rates included.

    Attributes:
        client: whose directions they are; SHARED where all clients have the same.
        coefficients: float32 [local steps * directions]; the seeds follow from the position.
        blocks: the blocks that they move, packed by `pack_blocks`; empty is all.
        age: how many rounds ago the directions were probed (momentum repeats old ones).
    """

    client: int
    coefficients: NDArray[np.float32]
    blocks: bytes = b""
    age: int = 0


@dataclass(frozen=True, eq=False)
class Increments:
    """What a round adds to the accumulators of candidate seeds, in units of `ACCUMULATOR_UNIT`.

    Attributes:
        places: uint32 [M], which candidates, ascending.
        amounts: int64 [M].
    """

    places: NDArray[np.uint32]
    amounts: NDArray[np.int64]


#: 2^-40: what a FedKSeed accumulator counts.
ACCUMULATOR_UNIT = 2.0**-40


@dataclass(frozen=True)
class Entry:
    """One round of the ledger: how the tuned state changed.

    Attributes:
        round: its number, from 0.
        contributions: in the order in which their steps are added.
        decay: multiplies the state before.
        state: for a method whose update is a tensor, the SHA-256 of the state after the round;
            empty otherwise.
        increments: for a method whose state is a sum over candidate seeds; None otherwise.
    """

    round: int
    contributions: tuple[Contribution, ...]
    decay: float = 1.0
    state: bytes = b""
    increments: Increments | None = None

    def update(self, run_seed: int, directions: int, blocks: int) -> Update:
        """The steps with their seeds, which are derived and never stored.

        Args:
            directions: of each local step.
            blocks: of the layout.
        """
        seeds = [
            direction_seed(run_seed, self.round - part.age, part.client, *divmod(place, directions))
            for part in self.contributions
            for place in range(len(part.coefficients))
        ]
        coefficients = np.concatenate(
            [part.coefficients for part in self.contributions] or [np.empty(0, np.float32)]
        )
        steps = Steps(np.array(seeds, dtype=np.uint64), coefficients)
        if any(part.blocks for part in self.contributions):
            moved = [
                np.repeat(unpack_blocks(part.blocks, blocks)[:, None], len(part.coefficients), 1)
                for part in self.contributions
            ]
            rows = np.where(np.concatenate(moved, axis=1), coefficients, np.float32(0.0))
            steps = Steps(steps.seeds, rows)
        return Update(steps, dither_seed(run_seed, self.round), self.decay)

    def encode(self) -> bytes:
        """The wire and ledger form."""
        return self._encoded

    @cached_property
    def _encoded(self) -> bytes:
        # A server sends the same entry to every client.
        count = NO_INCREMENTS if self.increments is None else len(self.increments.places)
        parts = [
            ENTRY_FORM.pack(
                self.round, self.decay, len(self.contributions), len(self.state), count
            ),
            self.state,
        ]
        if self.increments is not None:
            parts += [
                self.increments.places.astype("<u4").tobytes(),
                self.increments.amounts.astype("<i8").tobytes(),
            ]
        for part in self.contributions:
            size = len(part.coefficients)
            parts += [
                CONTRIBUTION_FORM.pack(part.client, size, part.age, len(part.blocks)),
                part.blocks,
                part.coefficients.astype("<f4").tobytes(),
            ]
        return b"".join(parts)

    @classmethod
    def decode(cls, data: bytes) -> "Entry":
        """The entry that fills `data` exactly."""
        reader = _Reader(data)
        entry = cls._read(reader)
        reader.finish()
        return entry

    @classmethod
    def _read(cls, reader: "_Reader") -> "Entry":
        number, decay, count, state_size, moved = reader.unpack(ENTRY_FORM)
        if not math.isfinite(decay):
            raise MessageError("A ledger entry whose decay is not a number was refused.")
        state = reader.take(state_size)
        increments = None
        if moved != NO_INCREMENTS:
            places = reader.numbers("<u4", moved).astype(np.uint32)
            increments = Increments(places, reader.numbers("<i8", moved).astype(np.int64))
            if (np.diff(places.astype(np.int64)) <= 0).any():
                raise MessageError("A ledger entry with unordered candidate seeds was refused.")
        contributions = []
        for _ in range(count):
            client, size, age, width = reader.unpack(CONTRIBUTION_FORM)
            if age > number:
                raise MessageError(
                    f"A ledger entry of round {number} with steps from {age} rounds before was "
                    "refused."
                )
            blocks = reader.take(width)
            contributions.append(Contribution(client, reader.floats(size), blocks, age))
        return cls(number, tuple(contributions), decay, state, increments)


def pack_blocks(active: NDArray[np.bool_]) -> bytes:
    """A set of blocks (bool [B]) as bits, the first block lowest; all blocks are no bytes."""
    return b"" if active.all() else np.packbits(active, bitorder="little").tobytes()


def unpack_blocks(data: bytes, blocks: int) -> NDArray[np.bool_]:
    """The set that `pack_blocks` packed, bool [blocks].

    Raises:
        MessageError: it is of another number of blocks.
    """
    if not data:
        return np.ones(blocks, np.bool_)
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little").astype(np.bool_)
    if len(data) != -(-blocks // 8) or bits[blocks:].any():
        raise MessageError(
            f"A set of blocks in {len(data)} bytes was refused: this model has {blocks} blocks."
        )
    return bits[:blocks]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A tuned state in place of the ledger entries that led to it.

    Attributes:
        rounds: ledger rounds that it contains.
        digest: SHA-256 of the tuned state (32 bytes); empty for accumulators, which the ledger
            itself determines.
        data: the tuned tensors' bytes in the layout's order, or the accumulators as int64.
    """

    rounds: int
    digest: bytes
    data: bytes

    def encode(self) -> bytes:
        """The wire form."""
        head = SNAPSHOT_FORM.pack(self.rounds, len(self.digest), len(self.data))
        return b"".join(
            (HEADER_FORM.pack(MAGIC, WIRE_VERSION, SNAPSHOT), head, self.digest, self.data)
        )

    @classmethod
    def decode(cls, data: bytes) -> "Snapshot":
        """Raises `MessageError` for anything but a whole snapshot."""
        reader = _Reader(data)
        reader.header(SNAPSHOT)
        rounds, digest, size = reader.unpack(SNAPSHOT_FORM)
        if digest not in (0, 32):
            raise MessageError(f"A snapshot with a digest of {digest} bytes was refused.")
        proof, content = reader.take(digest), reader.take(size)
        reader.finish()
        return cls(rounds, proof, content)


@dataclass(frozen=True, eq=False)
class Task:
    """What the server asks of a client in a round.

    Attributes:
        round: its number.
        client: whom the task is for.
        learning_rate: η_i of this client and round.
        digest_wanted: whether the report must prove the tuned state.
        entries: the ledger entries that the client lacks, oldest first.
        state: float32, the tuned state, for a method whose update is a tensor; else empty.
        blocks: the blocks that the client perturbs, packed by `pack_blocks`; empty is all.
        odds: uint16 [K], how likely each candidate seed is to be drawn, for a method that has
            candidates and prefers some; else empty.
        reset: whether the client must first go back to the base model.
        snapshot: an encoded `Snapshot` to start from before the entries; or empty.
    """

    round: int
    client: int
    learning_rate: float
    digest_wanted: bool
    entries: tuple[Entry, ...]
    state: NDArray[np.float32]
    blocks: bytes = b""
    odds: NDArray[np.uint16] = field(default_factory=lambda: NO_ODDS)
    reset: bool = False
    snapshot: bytes = b""

    def encode(self) -> bytes:
        """The wire form."""
        head = TASK_FORM.pack(
            self.round,
            self.client,
            self.learning_rate,
            self.digest_wanted + 2 * self.reset,
            len(self.entries),
            len(self.state),
            len(self.blocks),
            len(self.odds),
            len(self.snapshot),
        )
        return b"".join(
            (
                HEADER_FORM.pack(MAGIC, WIRE_VERSION, TASK),
                head,
                self.state.astype("<f4").tobytes(),
                self.blocks,
                self.odds.astype("<u2").tobytes(),
                self.snapshot,
                *(entry.encode() for entry in self.entries),
            )
        )

    @classmethod
    def decode(cls, data: bytes) -> "Task":
        """Raises `MessageError` for anything but a whole, finite task."""
        reader = _Reader(data)
        reader.header(TASK)
        number, client, rate, flags, count, size, width, odds, stored = reader.unpack(TASK_FORM)
        state, blocks = reader.floats(size), reader.take(width)
        likely = reader.numbers("<u2", odds).astype(np.uint16)
        snapshot = reader.take(stored)
        entries = tuple(Entry._read(reader) for _ in range(count))
        reader.finish()
        if not math.isfinite(rate):
            raise MessageError("A task with a learning rate that is not a number was refused.")
        if flags > 3 or (len(likely) and not likely.any()):
            raise MessageError("A task with flags or odds that have no meaning was refused.")
        wanted, reset = bool(flags & 1), bool(flags & 2)
        return cls(number, client, rate, wanted, entries, state, blocks, likely, reset, snapshot)


@dataclass(frozen=True, eq=False)
class Report:
    """What a client sends back: scalars, never weights (the first-order baseline aside).

    Attributes:
        round: of the task that it answers.
        client: who reports.
        examples: how many training examples the client holds.
        loss: its mean training loss over the round, in nats per token.
        skipped: steps whose losses were not finite; their projected gradients are 0.
        gradients: float32 [local steps * directions], the projected gradients.
        digest: the first 16 bytes of the tuned state's SHA-256, or empty if not asked for.
        state: float32, the client's tuned state, for a method whose update is a tensor.
    """

    round: int
    client: int
    examples: int
    loss: float
    skipped: int
    gradients: NDArray[np.float32]
    digest: bytes = b""
    state: NDArray[np.float32] | None = None

    def encode(self) -> bytes:
        """The wire form."""
        state = np.empty(0, np.float32) if self.state is None else self.state
        head = REPORT_FORM.pack(
            self.round,
            self.client,
            self.examples,
            self.loss if abs(self.loss) < LARGEST else math.nan,
            self.skipped,
            len(self.gradients),
            len(self.digest),
            len(state),
        )
        return b"".join(
            (
                HEADER_FORM.pack(MAGIC, WIRE_VERSION, REPORT),
                head,
                self.digest,
                self.gradients.astype("<f4").tobytes(),
                state.astype("<f4").tobytes(),
            )
        )

    @classmethod
    def decode(cls, data: bytes) -> "Report":
        """Raises `MessageError` for anything but a whole report with finite scalars.

        The loss may be NaN: that is how a client says that none of its steps was finite.
        """
        reader = _Reader(data)
        reader.header(REPORT)
        number, client, examples, loss, skipped, count, digest, size = reader.unpack(REPORT_FORM)
        if math.isinf(loss):
            raise MessageError("A report with an infinite loss was refused.")
        if digest not in (0, DIGEST_BYTES):
            raise MessageError(f"A report with a digest of {digest} bytes was refused.")
        proof = reader.take(digest)
        gradients = reader.floats(count)
        state = reader.floats(size) if size else None
        reader.finish()
        return cls(number, client, examples, loss, skipped, gradients, proof, state)


class _Reader:
    """A cursor over a message that refuses to read past its end."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.place = 0

    def take(self, size: int) -> bytes:
        if self.place + size > len(self.data):
            raise MessageError(
                f"A message of {len(self.data)} bytes was refused: it ends where byte "
                f"{self.place + size} was expected."
            )
        self.place += size
        return self.data[self.place - size : self.place]

    def unpack(self, form: struct.Struct) -> tuple:  # type: ignore[type-arg]
        return form.unpack(self.take(form.size))

    def header(self, kind: int) -> None:
        magic, version, found = self.unpack(HEADER_FORM)
        if magic != MAGIC:
            raise MessageError("A message that is not fedforward's was refused.")
        if version != WIRE_VERSION:
            raise MessageError(
                f"A message of wire version {version} was refused; this side speaks "
                f"{WIRE_VERSION}. Install the same release of fedforward on both sides."
            )
        if found != kind:
            raise MessageError(f"A message of kind {found} was refused where {kind} was expected.")

    def floats(self, count: int) -> NDArray[np.float32]:
        values = np.frombuffer(self.take(4 * count), dtype="<f4").astype(np.float32)
        if not np.isfinite(values).all():
            raise MessageError("A message with numbers that are not finite was refused.")
        return values

    def numbers(self, kind: str, count: int) -> NDArray[Any]:
        return np.frombuffer(self.take(np.dtype(kind).itemsize * count), dtype=kind)

    def finish(self) -> None:
        if self.place != len(self.data):
            raise MessageError(
                f"A message was refused: {len(self.data) - self.place} bytes follow its end."
            )
