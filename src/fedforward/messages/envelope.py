"""What a server and its sites send each other across machines: messages in envelopes.

An envelope names its run and the kind of its message, and ends in a checksum. One that is damaged,
or of another run, is refused before its body is read. The checksum is no signature: who may send
at all is decided by the engine (keys and TLS). Hellos and metrics are JSON; what is sent in every
round is binary (`fedforward.messages.codec`). Imports no PyTorch.
"""

import hashlib
import json
import reprlib
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from fedforward.core.errors import MessageError
from fedforward.core.identity import ModelIdentity
from fedforward.directions import VERSION, Layout
from fedforward.messages.codec import WIRE_VERSION

ENVELOPE_VERSION = 1
#: Bytes of a sentence that are shown.
MAX_SENTENCE_BYTES = 2000
#: Training examples that a site can have, and axes of a tuned tensor.
MAX_EXAMPLES, MAX_AXES = 2**31, 8
#: Blocks that a site can say it perturbs; no model has more.
MAX_BLOCKS = 2**20
#: Characters of a site's name for itself.
MAX_NAME_CHARACTERS = 64
#: Bytes of a run's random name.
RUN_BYTES = 8
ENVELOPE_FORM = struct.Struct(f"<2sBB{RUN_BYTES}s")
_MAGIC = b"FL"
CHECKSUM_BYTES = 8


class MessageKind(IntEnum):
    """What a message is. Below 16: from the server; from 16 on: a site's reply."""

    #: JSON: the terms of the run. Answered by ENROLLMENT.
    HELLO = 1
    #: A `Task`. Answered by REPORT.
    TASK = 2
    #: A `Task` without steps: come to this round and evaluate. Answered by METRICS.
    EVALUATION = 3
    #: Nothing. Answered by SNAPSHOT.
    SNAPSHOT_REQUEST = 4
    #: A `Task` without steps: the run is over, keep what was tuned. Answered by METRICS.
    FINALIZE = 5
    #: A sentence: why the server will not have this site. Answered by METRICS.
    REJECT = 6
    #: A `SumStart`. Answered by SUM_KEYS.
    SUM_START = 7
    #: A `SumRoster`. Answered by SUM_SHARES.
    SUM_ROSTER = 8
    #: A `SumTask`. Answered by MASKED_REPORT.
    SUM_TASK = 9
    #: A `SumOpening`. Answered by SUM_OPENED.
    SUM_OPENING = 10

    #: JSON: who the site is, and what it has in common with the others.
    ENROLLMENT = 16
    #: A `Report`.
    REPORT = 17
    #: JSON: what was measured, and the digest of the tuned state.
    METRICS = 18
    #: A `Snapshot`.
    SNAPSHOT = 19
    #: A `Refusal`: a code and names of keys.
    REFUSAL = 20
    #: Nothing: the site does not know the run, and must be sent a HELLO first.
    UNKNOWN_RUN = 21
    #: JSON: how many rounds the site really holds. The task must be sent again with what it lacks.
    OUT_OF_SYNC = 22
    #: A `SumKeys`: public keys for one attempt at a sum.
    SUM_KEYS = 23
    #: A `SumShares`: encrypted shares of two secrets, for the other sites.
    SUM_SHARES = 24
    #: A `MaskedReport`.
    MASKED_REPORT = 25
    #: A `SumOpened`: shares that take the masks off the sum.
    SUM_OPENED = 26


@dataclass(frozen=True)
class Envelope:
    """A message on its way.

    Attributes:
        kind: what the message is.
        run: the run's random name, 8 bytes.
        body: a message, JSON or a sentence, as its kind says.
    """

    kind: MessageKind
    run: bytes
    body: bytes = b""

    def encode(self) -> bytes:
        """The wire form."""
        content = ENVELOPE_FORM.pack(_MAGIC, ENVELOPE_VERSION, self.kind, self.run) + self.body
        return content + checksum(content)

    @classmethod
    def decode(cls, data: bytes) -> "Envelope":
        """Raises `MessageError` for anything but a whole envelope of this version."""
        if len(data) < ENVELOPE_FORM.size + CHECKSUM_BYTES:
            raise MessageError(f"A message of {len(data)} bytes was refused: it is cut short.")
        magic, version, kind, run = ENVELOPE_FORM.unpack_from(data)
        if magic != _MAGIC:
            raise MessageError("A message that is not fedforward's was refused.")
        if version != ENVELOPE_VERSION:
            raise MessageError(
                f"A message of version {version} was refused; this side speaks {ENVELOPE_VERSION}. "
                "Install the same release of fedforward on both sides."
            )
        if checksum(data[:-CHECKSUM_BYTES]) != data[-CHECKSUM_BYTES:]:
            raise MessageError("A message was refused: it was altered or damaged on its way.")
        try:
            return cls(MessageKind(kind), run, data[ENVELOPE_FORM.size : -CHECKSUM_BYTES])
        except ValueError as error:
            raise MessageError(f"A message of kind {kind} was refused: there is none.") from error

    def json(self) -> dict[str, Any]:
        """The body of a message that is JSON.

        Raises:
            MessageError: it is not an object of JSON.
        """
        try:
            content = json.loads(self.body, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise MessageError(
                f"A message of kind {self.kind.name} was refused: {error}."
            ) from error
        if not isinstance(content, dict):
            raise MessageError(f"A message of kind {self.kind.name} was refused: no JSON object.")
        return content

    def text(self) -> str:
        """The body of a message that is a sentence, as it may be shown: it is another party's."""
        return printable(self.body[:MAX_SENTENCE_BYTES].decode(errors="replace"))


def printable(text: str) -> str:
    """Another party's text as it may be put on a terminal."""
    return "".join(character if character.isprintable() else " " for character in text)


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def checksum(content: bytes) -> bytes:
    """The first 8 bytes of the SHA-256 of what is before it."""
    return hashlib.sha256(content).digest()[:CHECKSUM_BYTES]


def encode_json(content: Any) -> bytes:
    """JSON without white space."""
    return json.dumps(content, separators=(",", ":"), sort_keys=True).encode()


@dataclass(frozen=True)
class Enrollment:
    """What a site says of itself in reply to a HELLO.

    Attributes:
        name: what the site calls itself; empty for the name that its key was registered under.
        model: what it must have in common with the others.
        examples: training examples.
        heldout: examples that it keeps for evaluation.
        rounds: ledger rounds of this run that it holds already.
        active_blocks: blocks that it can perturb; None is all.
    """

    name: str
    model: ModelIdentity
    examples: int
    heldout: int
    rounds: int
    active_blocks: int | None = None

    def encode(self) -> bytes:
        """The body of an ENROLLMENT."""
        layout = self.model.layout
        return encode_json(
            {
                "name": self.name,
                "examples": self.examples,
                "heldout": self.heldout,
                "rounds": self.rounds,
                "active_blocks": self.active_blocks,
                "direction_version": VERSION,
                "wire_version": WIRE_VERSION,
                "model": {
                    "layout": [layout.names, layout.shapes, layout.blocks, layout.owners],
                    "base": self.model.base,
                    "tokenizer": self.model.tokenizer,
                    "adapter": self.model.adapter,
                    "initial_a": self.model.initial_a,
                    "mask": self.model.mask,
                    "classes": self.model.classes,
                    "state_bytes": self.model.state_bytes,
                },
            }
        )

    @classmethod
    def decode(cls, content: dict[str, Any]) -> "Enrollment":
        """From a message's JSON.

        Raises:
            MessageError: something is missing or of another type, or the site derives directions
                or writes messages in another version.
        """
        _check_version("direction_version", content, VERSION)
        _check_version("wire_version", content, WIRE_VERSION)
        try:
            model = content["model"]
            names, shapes, blocks, owners = model["layout"]
            layout = Layout(
                tuple(map(str, names)),
                tuple(tuple(map(_count, shape[:MAX_AXES])) for shape in shapes),
                tuple(map(str, blocks)),
                tuple(map(_count, owners)),
            )
            layout.check()
            identity = ModelIdentity(
                layout=layout,
                base=_text(model["base"]),
                classes=tuple(map(_text, _list(model["classes"]))),
                state_bytes=_count(model["state_bytes"]),
                tokenizer=_text(model["tokenizer"]),
                adapter=_text(model["adapter"]),
                initial_a=_text(model["initial_a"]),
                mask=_text(model["mask"]),
            )
            active = content["active_blocks"]
            return cls(
                name=printable(_text(content["name"]))[:MAX_NAME_CHARACTERS],
                model=identity,
                examples=_examples(content["examples"]),
                heldout=_count(content["heldout"]),
                rounds=_count(content["rounds"]),
                active_blocks=None if active is None else max(1, min(_count(active), MAX_BLOCKS)),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise MessageError(f"An enrollment was refused: {error!r} in it.") from error


def _count(value: Any) -> int:
    """A whole number from 0 that fits the wire's largest field."""
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{reprlib.repr(value)} is not a count")
    return value


def _examples(value: Any) -> int:
    """Training examples: they weigh a site's part, so they are some, and a number of this world."""
    if not 1 <= _count(value) <= MAX_EXAMPLES:
        raise ValueError(f"{reprlib.repr(value)} training examples")
    return int(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{reprlib.repr(value)} is not text")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{reprlib.repr(value)} is not a list")
    return value


def _check_version(key: str, content: dict[str, Any], mine: object) -> None:
    found = content.get(key)
    if found != mine:
        raise MessageError(
            f"A site of {key.replace('_', ' ')} {reprlib.repr(found)} was refused; this server has "
            f"{mine}. Install the same release of fedforward on both sides."
        )


#: What two parties with different models are told, by what differs.
_DIFFERENCES = {
    "base": "its base model has other weights than the other sites' (model.path)",
    "tokenizer": "its tokenizer splits text in another way than the other sites' (model.path)",
    "adapter": "it begins with another adapter than the other sites (model.adapter)",
    "initial_a": "its adapters begin with another A than the other sites' (lora.init_file)",
    "mask": "it lets other weights move than the other sites (method.mask_file)",
    "layout": "its tuned tensors have other names, shapes or blocks than the other sites'",
    "classes": "its data have other classes than the other sites'",
    "state_bytes": "its tuned tensors are of another size than the other sites'",
}


def difference(mine: ModelIdentity, others: ModelIdentity) -> str:
    """Why a site cannot take part: what it has not in common with the others, or nothing."""
    for key, words in _DIFFERENCES.items():
        if getattr(mine, key) != getattr(others, key):
            return words
    return ""


def deviation(header: dict[str, Any], pinned: dict[str, Any] | None) -> str:
    """Why a site cannot take part in a run that has a ledger, or nothing.

    Args:
        header: that the ledger would have with the site's model.
        pinned: that it has; None before there is one.
    """
    if pinned is None:
        return ""
    differing = [key for key, value in header.items() if pinned.get(key) != value]
    other = "it has not the model and settings that the run was started with"
    return next((_DIFFERENCES.get(key, other) for key in differing), "")
