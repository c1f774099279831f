"""What travels, and its binary form: `Task` down, `Report` up, and the `Entry` that both build on.

Every message is versioned and size-checked, and its numbers are finite; a message that is not is
refused with a sentence. All integers are little-endian; floats travel as their bits.
"""

import math
import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedforward.errors import FedForwardError
from fedforward.seeds import direction_seed, dither_seed
from fedforward.steps import Steps, Update

WIRE_VERSION = 1
MAGIC = b"FF"
TASK, REPORT = 1, 2
_HEADER = struct.Struct("<2sBB")
_ENTRY = struct.Struct("<IfHB")
_CONTRIBUTION = struct.Struct("<IH")
_TASK = struct.Struct("<IIdBII")
_REPORT = struct.Struct("<IIIfHHBI")
#: A training loss above this does not fit float32; it is reported as NaN.
LARGEST = 3.4e38
#: Bytes of a state digest on the wire (its first half).
DIGEST_BYTES = 16


class MessageError(FedForwardError):
    """A message that is damaged, of another version, or not what was asked for."""


@dataclass(frozen=True, eq=False)
class Contribution:
    """One client's share of a round: the coefficients of its steps, weights and rates included.

    Attributes:
        client: its number.
        coefficients: float32 [local steps * directions]; the seeds follow from the position.
    """

    client: int
    coefficients: NDArray[np.float32]


@dataclass(frozen=True)
class Entry:
    """One round of the ledger: how the tuned state changed.

    Attributes:
        round: its number, from 0.
        contributions: in the order in which their steps are added.
        decay: multiplies the state before.
        state: for a method whose update is a tensor, the SHA-256 of the state after the round;
            empty otherwise.
    """

    round: int
    contributions: tuple[Contribution, ...]
    decay: float = 1.0
    state: bytes = b""

    def update(self, run_seed: int, directions: int) -> Update:
        """The steps with their seeds, which are derived and never stored."""
        seeds = [
            direction_seed(run_seed, self.round, part.client, *divmod(place, directions))
            for part in self.contributions
            for place in range(len(part.coefficients))
        ]
        coefficients = np.concatenate(
            [part.coefficients for part in self.contributions] or [np.empty(0, np.float32)]
        )
        steps = Steps(np.array(seeds, dtype=np.uint64), coefficients)
        return Update(steps, dither_seed(run_seed, self.round), self.decay)

    def encode(self) -> bytes:
        """The wire and ledger form."""
        parts = [
            _ENTRY.pack(self.round, self.decay, len(self.contributions), len(self.state)),
            self.state,
        ]
        for part in self.contributions:
            parts += [_CONTRIBUTION.pack(part.client, len(part.coefficients)), _floats(part)]
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
        number, decay, count, state_size = reader.unpack(_ENTRY)
        if not math.isfinite(decay):
            raise MessageError("A ledger entry whose decay is not a number was refused.")
        state = reader.take(state_size)
        contributions = []
        for _ in range(count):
            client, size = reader.unpack(_CONTRIBUTION)
            contributions.append(Contribution(client, reader.floats(size)))
        return cls(number, tuple(contributions), decay, state)


def _floats(part: Contribution) -> bytes:
    return part.coefficients.astype("<f4").tobytes()


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
    """

    round: int
    client: int
    learning_rate: float
    digest_wanted: bool
    entries: tuple[Entry, ...]
    state: NDArray[np.float32]

    def encode(self) -> bytes:
        """The wire form."""
        head = _TASK.pack(
            self.round,
            self.client,
            self.learning_rate,
            self.digest_wanted,
            len(self.entries),
            len(self.state),
        )
        return b"".join(
            (
                _HEADER.pack(MAGIC, WIRE_VERSION, TASK),
                head,
                self.state.astype("<f4").tobytes(),
                *(entry.encode() for entry in self.entries),
            )
        )

    @classmethod
    def decode(cls, data: bytes) -> "Task":
        """Raises `MessageError` for anything but a whole, finite task."""
        reader = _Reader(data)
        reader.header(TASK)
        number, client, rate, wanted, count, size = reader.unpack(_TASK)
        state = reader.floats(size)
        entries = tuple(Entry._read(reader) for _ in range(count))
        reader.finish()
        if not math.isfinite(rate):
            raise MessageError("A task with a learning rate that is not a number was refused.")
        return cls(number, client, rate, bool(wanted), entries, state)


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
        head = _REPORT.pack(
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
                _HEADER.pack(MAGIC, WIRE_VERSION, REPORT),
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
        number, client, examples, loss, skipped, count, digest, size = reader.unpack(_REPORT)
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
        magic, version, found = self.unpack(_HEADER)
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

    def finish(self) -> None:
        if self.place != len(self.data):
            raise MessageError(
                f"A message was refused: {len(self.data) - self.place} bytes follow its end."
            )
