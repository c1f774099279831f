"""The binary form of messages, declared field by field: encode, decode, describe, list the bytes.

A message is a frozen dataclass whose fields are made by `wire`. Its form is one structure with all
numbers, and the length of everything of variable size, in the order of the fields; the variable
parts follow in the same order. Integers are little-endian, floats travel as their bits. Reading
checks every size before it reads, and refuses numbers that are not finite.
"""

import dataclasses
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from fedforward.core.errors import MessageError

WIRE_VERSION = 5
MAGIC = b"FF"
HEADER = struct.Struct("<2sBB")
#: A float64 beyond this does not fit float32.
MAX_FLOAT32 = 3.4e38

_NAMES = {"B": "uint8", "H": "uint16", "I": "uint32", "Q": "uint64", "f": "float32", "d": "float64"}


@dataclass(frozen=True)
class Form:
    """How a field travels.

    Attributes:
        code: of `struct`: of the number itself, or of the length of what follows.
        name: of the type, as the documentation calls it.
    """

    code: str
    name: str

    def number(self, value: Any) -> int | float:
        """What stands in the structure: the number, or the length."""
        return len(value)

    def content(self, value: Any) -> bytes:
        """What follows the structure."""
        return b""

    def read(self, number: Any, reader: "Reader", name: str) -> Any:
        """The value from its number in the structure, and what follows."""
        return number

    def shown(self, value: Any) -> str:
        """The value, for people."""
        return f"{value:.9g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Number(Form):
    """An integer or a float.

    Attributes:
        nan: whether NaN is a value. A float that is too large for float32 becomes NaN there.
    """

    nan: bool = False

    def number(self, value: Any) -> int | float:
        """See `Form`."""
        if self.nan:
            return float(value) if abs(value) < MAX_FLOAT32 else math.nan
        return value  # type: ignore[no-any-return]

    def read(self, number: Any, reader: "Reader", name: str) -> Any:
        """See `Form`."""
        if isinstance(number, float) and not (
            math.isfinite(number) or (self.nan and number != number)
        ):
            raise MessageError(f"A message whose {name} is {number} was refused.")
        return number


@dataclass(frozen=True)
class Flag(Form):
    """A boolean in a byte of 0 or 1."""

    def number(self, value: Any) -> int:
        """See `Form`."""
        return int(value)

    def read(self, number: Any, reader: "Reader", name: str) -> bool:
        """See `Form`."""
        if number > 1:
            raise MessageError(f"A message whose {name} is {number} was refused: it is 0 or 1.")
        return bool(number)


@dataclass(frozen=True)
class Data(Form):
    """Bytes, with their number.

    Attributes:
        sizes: that are allowed; empty is any.
    """

    sizes: tuple[int, ...] = ()

    def content(self, value: bytes) -> bytes:
        """See `Form`."""
        return value

    def read(self, number: Any, reader: "Reader", name: str) -> bytes:
        """See `Form`."""
        if self.sizes and number not in self.sizes:
            raise MessageError(
                f"A message whose {name} has {number} bytes was refused; allowed are "
                f"{' or '.join(map(str, self.sizes))}."
            )
        return reader.take(number, name)

    def shown(self, value: bytes) -> str:
        """See `Form`."""
        return f"{len(value)} bytes"


@dataclass(frozen=True)
class Floats(Form):
    """A float32 array, with its length; every number is finite."""

    def content(self, value: NDArray[np.float32]) -> bytes:
        """See `Form`."""
        return value.astype("<f4").tobytes()

    def read(self, number: Any, reader: "Reader", name: str) -> NDArray[np.float32]:
        """See `Form`."""
        raw = reader.take(4 * number, f"{name}, {number} × float32", _some_floats)
        values = np.frombuffer(raw, "<f4").astype(np.float32)
        if not np.isfinite(values).all():
            raise MessageError(f"A message whose {name} are not all finite was refused.")
        return values


@dataclass(frozen=True)
class Words(Form):
    """A uint64 array, with its length."""

    def content(self, value: NDArray[np.uint64]) -> bytes:
        """See `Form`."""
        return value.astype("<u8").tobytes()

    def read(self, number: Any, reader: "Reader", name: str) -> NDArray[np.uint64]:
        """See `Form`."""
        raw = reader.take(8 * number, f"{name}, {number} × uint64", _some_words)
        return np.frombuffer(raw, "<u8").astype(np.uint64)


@dataclass(frozen=True)
class Blocks(Form):
    """A set of the model's blocks, bool [B], a bit each with the first lowest; None is all."""

    def number(self, value: NDArray[np.bool_] | None) -> int:
        """See `Form`."""
        return 0 if value is None or value.all() else len(value)

    def content(self, value: NDArray[np.bool_] | None) -> bytes:
        """See `Form`."""
        if value is None or value.all():
            return b""
        return np.packbits(value, bitorder="little").tobytes()

    def read(self, number: Any, reader: "Reader", name: str) -> NDArray[np.bool_] | None:
        """See `Form`."""
        if not number:
            return None
        raw = reader.take(-(-number // 8), f"{name}, a bit each", _bits)
        bits = np.unpackbits(np.frombuffer(raw, np.uint8), bitorder="little").astype(np.bool_)
        if bits[number:].any():
            raise MessageError(f"A message whose {name} name blocks beyond {number} was refused.")
        return bits[:number]


@dataclass(frozen=True)
class Many(Form):
    """Messages in a message, one after another, with their number."""

    kind: Any = None

    def content(self, value: Sequence["Message"]) -> bytes:
        """See `Form`."""
        return b"".join(part.body() for part in value)

    def read(self, number: Any, reader: "Reader", name: str) -> tuple["Message", ...]:
        """See `Form`."""
        return tuple(self.kind.read(reader, f"{name}: ") for _ in range(number))


def _form(cls: type[Form], code: str, suffix: str = "", **options: Any) -> Form:
    return cls(code, f"{suffix}{_NAMES[code]}", **options)


U8, U16, U32, U64 = (_form(Number, code) for code in "BHIQ")
F32, F64 = _form(Number, "f"), _form(Number, "d")
F32_OR_NAN = _form(Number, "f", "NaN or ", nan=True)
FLAG = Flag("B", "uint8, 0 or 1")


def data(code: str, *sizes: int) -> Form:
    """Bytes with a length of that `struct` code."""
    return _form(Data, code, "bytes, length ", sizes=sizes)


def floats(code: str) -> Form:
    """Finite float32 numbers with a length of that `struct` code."""
    return _form(Floats, code, "float32 each, length ")


def words(code: str) -> Form:
    """Numbers modulo 2⁶⁴ with a length of that `struct` code."""
    return _form(Words, code, "uint64 each, length ")


def blocks() -> Form:
    """A set of blocks."""
    return _form(Blocks, "H", "a bit for each block, their number ")


def many(kind: type["Message"], code: str) -> Form:
    """Messages in a message."""
    return _form(Many, code, f"{kind.__name__} each, length ", kind=kind)


def wire(form: Form, meaning: str, **options: Any) -> Any:
    """A field of a message dataclass: its form and what it means; `options` as of `field`."""
    return dataclasses.field(metadata={"form": form, "meaning": meaning}, **options)


@dataclass(frozen=True)
class FieldDescription:
    """A field as the wire reference lists it."""

    name: str
    type: str
    meaning: str


@dataclass(frozen=True)
class Listed:
    """Some bytes of a message.

    Attributes:
        place: of the first byte, from 0.
        data: the bytes.
        name: what they are.
        value: what they mean.
    """

    place: int
    data: bytes
    name: str
    value: str


class Reader:
    """A cursor over a message that refuses to read past its end.

    Attributes:
        trace: where every part that is read is listed, or None.
    """

    def __init__(self, data: bytes, trace: list[Listed] | None = None, place: int = 0) -> None:
        self.data = data
        self.place = place
        self.trace = trace

    def take(
        self, size: int, name: str = "", shown: Callable[[bytes], str] = lambda raw: ""
    ) -> bytes:
        """The next bytes.

        Raises:
            MessageError: the message ends before.
        """
        if self.place + size > len(self.data):
            raise MessageError(
                f"A message of {len(self.data)} bytes was refused: it ends where byte "
                f"{self.place + size} was expected."
            )
        begin, self.place = self.place, self.place + size
        raw = self.data[begin : self.place]
        if self.trace is not None and size:
            self.trace.append(Listed(begin, raw, name, shown(raw)))
        return raw

    def finish(self) -> None:
        """Refuse bytes after the end.

        Raises:
            MessageError: there are some.
        """
        if self.place != len(self.data):
            raise MessageError(
                f"A message was refused: {len(self.data) - self.place} bytes follow its end."
            )


class Message:
    """Base of the message dataclasses.

    Attributes:
        KIND: of a message that travels by itself, in its header; 0 for a part of others.
    """

    KIND: ClassVar[int] = 0
    _plan: ClassVar[tuple[struct.Struct, tuple[tuple[str, Form], ...]] | None] = None

    @classmethod
    def plan(cls) -> tuple[struct.Struct, tuple[tuple[str, Form], ...]]:
        """The structure of the numbers and lengths, and the fields with their forms."""
        if "_plan" not in cls.__dict__ or cls._plan is None:
            fields = tuple(
                (field.name, field.metadata["form"])
                for field in dataclasses.fields(cls)  # type: ignore[arg-type]
            )
            cls._plan = struct.Struct("<" + "".join(form.code for _, form in fields)), fields
        return cls._plan

    def body(self) -> bytes:
        """The binary form without a header."""
        form, fields = self.plan()
        numbers, contents = [], [b""]
        for name, field in fields:
            value = getattr(self, name)
            numbers.append(field.number(value))
            contents.append(field.content(value))
        contents[0] = form.pack(*numbers)
        return b"".join(contents)

    def encode(self) -> bytes:
        """The binary form, with a header if the message travels by itself."""
        head = HEADER.pack(MAGIC, WIRE_VERSION, self.KIND) if self.KIND else b""
        return head + self.body()

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """The message that fills `data` exactly.

        Raises:
            MessageError: it is damaged, of another version or kind, or its values make no sense.
        """
        reader = Reader(data)
        message = cls.open(reader)
        reader.finish()
        return message

    @classmethod
    def open(cls, reader: Reader) -> Self:
        """Read header and body at the reader's place; see `decode`."""
        if cls.KIND:
            magic, version, kind = HEADER.unpack(list_numbers(reader, HEADER, _HEADER_NAMES))
            if magic != MAGIC:
                raise MessageError("A message that is not fedforward's was refused.")
            if version != WIRE_VERSION:
                raise MessageError(
                    f"A message of wire version {version} was refused; this side speaks "
                    f"{WIRE_VERSION}. Install the same release of fedforward on both sides."
                )
            if kind != cls.KIND:
                raise MessageError(
                    f"A message of kind {kind} was refused where {cls.KIND} was expected."
                )
        return cls.read(reader)

    @classmethod
    def read(cls, reader: Reader, prefix: str = "") -> Self:
        """Read the body at the reader's place; see `decode`."""
        form, fields = cls.plan()
        names, heads = _names(cls, prefix)  # type: ignore[arg-type]
        numbers = form.unpack(list_numbers(reader, form, heads))
        values = {
            key: field.read(number, reader, name)
            for (key, field), number, name in zip(fields, numbers, names, strict=True)
        }
        message = cls(**values)
        message.check()
        return message

    def check(self) -> None:
        """Whether the values fit together; after reading.

        Raises:
            MessageError: they do not.
        """

    @classmethod
    def describe(cls) -> list[FieldDescription]:
        """The fields in their order, for the wire reference."""
        return [
            FieldDescription(field.name, field.metadata["form"].name, field.metadata["meaning"])
            for field in dataclasses.fields(cls)  # type: ignore[arg-type]
        ]

    @classmethod
    def listing(cls, data: bytes) -> list[Listed]:
        """Every byte of an encoded message, in order; see `decode` for errors."""
        trace: list[Listed] = []
        reader = Reader(data, trace)
        cls.open(reader)
        reader.finish()
        return trace


@lru_cache
def _names(kind: type[Message], prefix: str) -> tuple[list[str], list[str]]:
    """What a listing calls the fields of a message, and the numbers at its head."""
    fields = kind.plan()[1]
    names = [f"{prefix}{name.replace('_', ' ')}" for name, _ in fields]
    heads = [
        name if isinstance(field, Number | Flag) else f"length of {name}"
        for name, (_, field) in zip(names, fields, strict=True)
    ]
    return names, heads


_HEADER_NAMES = ("magic", "wire version", "message kind")


def list_numbers(reader: Reader, form: struct.Struct, names: Sequence[str]) -> bytes:
    """Take the bytes of a structure, listed number by number where the reader lists."""
    if reader.trace is None:
        return reader.take(form.size)
    begin = reader.place
    trace, reader.trace = reader.trace, None
    raw = reader.take(form.size)
    reader.trace = trace
    for code, name in zip(_codes(form), names, strict=True):
        size = struct.calcsize("<" + code)
        part = raw[:size]
        (value,) = struct.unpack("<" + code, part)
        text = f"{value:.9g}" if isinstance(value, float) else str(value)
        if isinstance(value, bytes):
            text = value.decode("ascii") if value.isalpha() else value.hex()
        trace.append(Listed(begin, part, name, text))
        raw, begin = raw[size:], begin + size
    return reader.data[reader.place - form.size : reader.place]


def _codes(form: struct.Struct) -> Iterator[str]:
    """The numbers of a structure's format: "<2sBI" has "2s", "B" and "I"."""
    count = ""
    for code in form.format.lstrip("<"):
        if code.isdigit():
            count += code
        else:
            yield count + code
            count = ""


def _some_floats(raw: bytes) -> str:
    values = np.frombuffer(raw, "<f4")
    shown = ", ".join(f"{value:.6g}" for value in values[:4])
    return shown + (", …" if len(values) > 4 else "")


def _some_words(raw: bytes) -> str:
    values = np.frombuffer(raw, "<u8")
    return ", ".join(map(str, values[:4].tolist())) + (", …" if len(values) > 4 else "")


def _bits(raw: bytes) -> str:
    return " ".join(f"{byte:08b}"[::-1] for byte in raw)
