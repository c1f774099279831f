"""Rows of one file, in each of the forms that are known, a row at a time and as written.

Every reader yields (place, row): the number of the line or row that an error names, and the row's
fields. Numbers of JSON files keep their text, cells of CSV files are text, and columns of Parquet
and Arrow files are read by their declared types. Nothing is held but the row, or the batch, at
hand; a `.json` file that is one object is the exception, and is read whole.
"""

import codecs
import csv
import io
import json
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fedforward.core.errors import FedForwardError
from fedforward.data.values import Number, Repeated, listed

Row = dict[str, Any]
#: (place, row): the number of the line or row, from 1, and its fields.
Rows = Iterator[tuple[int, Row]]
#: What a compressed file ends in, and what `pyarrow` calls it.
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
#: What a file of rows ends in; the first three also with one of COMPRESSIONS after it.
FORMS = {
    ".jsonl": "json lines",
    ".ndjson": "json lines",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
#: Keys of one object under which its rows lie.
WRAPPERS = ("data", "rows", "examples", "items", "records", "instances", "train")
#: Fields that hold conversations under their usual names.
CONVERSATIONS = ("messages", "conversations", "conversation")
_BATCH_ROWS = 4096
_CHUNK = 1 << 20


def form_of(path: Path) -> str | None:
    """The form of a file by its ending, or None."""
    suffix = path.suffix.lower()
    form = FORMS.get(suffix)
    if suffix in COMPRESSIONS:
        form = FORMS.get(Path(path.stem).suffix.lower())
        return form if form in ("json lines", "json", "csv") else None
    return form


def place_word(path: Path) -> str:
    """What a place counts: lines of text, rows of tables."""
    return "row" if form_of(path) in ("parquet", "arrow") else "line"


def columns(path: Path) -> list[str]:
    """The names of a file's fields, as far as its header or its first row says them.

    Raises:
        FedForwardError: see `read`.
    """
    form = form_of(path)
    with _explained(path):
        if form == "csv":
            return next((cells for cells in _csv_rows(path) if cells), [])
        if form == "parquet":
            import pyarrow.parquet as pq

            return list(pq.ParquetFile(path).schema_arrow.names)
        if form == "arrow":
            with _arrow(path) as table:
                return list(table.schema.names)
    return list(next(read(path), (0, {}))[1])


def count(path: Path) -> int:
    """How many rows a file has.

    Raises:
        FedForwardError: see `read`.
    """
    form = form_of(path)
    with _explained(path):
        if form == "parquet":
            import pyarrow.parquet as pq

            return int(pq.ParquetFile(path).metadata.num_rows)
        if form == "json lines":
            return sum(bool(line) and not line.isspace() for _, line in _raw_lines(path))
    return sum(1 for _ in read(path))


def read(
    path: Path, wanted: Collection[str] | None = None, keep: Iterator[bool] | None = None
) -> Rows:
    """The rows of a file.

    Args:
        wanted: the fields that are used; those of a Parquet or Arrow file are read alone.
        keep: says of one row after another whether it is wanted; None is all. What is not wanted
            is not looked at where that can be.

    Raises:
        FedForwardError: while reading, with the line or row: the file cannot be read, is cut short
            or malformed, is no UTF-8 text, or holds what is not of its form.
    """
    readers: dict[str | None, Callable[[], Rows]] = {
        "json lines": lambda: _json_lines(path, keep),
        "json": lambda: _json(path),
        "csv": lambda: _csv(path),
        "parquet": lambda: _parquet(path, wanted),
        "arrow": lambda: _arrow_rows(path, wanted),
    }
    form = form_of(path)
    with _explained(path):
        rows = readers[form]()
        yield from rows if keep is None or form == "json lines" else kept(rows, keep)


def kept(rows: Rows, keep: Iterator[bool]) -> Rows:
    """The rows that are wanted."""
    return (row for row in rows if next(keep, False))


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns what readers raise into sentences."""
    import pyarrow as pa

    try:
        yield
    except FedForwardError:
        raise
    except csv.Error as error:
        raise FedForwardError(
            f"{path} is not CSV: {error}. A quote inside a quoted cell is written twice."
        ) from error
    except RecursionError as error:
        raise FedForwardError(
            f"{path} is nested too deeply. Give rows with fewer levels."
        ) from error
    except UnicodeDecodeError as error:
        raise FedForwardError(
            f"{path} holds text that is not UTF-8 ({error.reason}: {error.object[:40]!r}). Write "
            "it again."
        ) from error
    except OverflowError as error:
        raise FedForwardError(
            f"{path} holds a date or a number that Python does not have: {error}. Write it as text."
        ) from error
    except (OSError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise FedForwardError(
            f"{path} cannot be read: {reason}. Give a whole file that this user may read."
        ) from error
    except pa.ArrowException as error:
        reason = " ".join(str(error).split("\n")[0].split()).rstrip(".")
        raise FedForwardError(
            f"{path} is not a readable {path.suffix.lower()[1:]} file: {reason}. Write it again."
        ) from error


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked."""
    kind = COMPRESSIONS.get(path.suffix.lower())
    if kind is None:
        with path.open("rb", buffering=_CHUNK) as file:
            yield file
        return
    import pyarrow as pa

    with pa.input_stream(str(path), compression=kind) as stream:
        yield io.BufferedReader(stream, _CHUNK)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file with their numbers, from 1, without a byte order mark."""
    return ((number, _decoded(path, number, raw)) for number, raw in _raw_lines(path))


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """As `_lines`, in bytes."""
    with _opened(path) as file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                _check_encoding(path, raw)
                raw = raw.removeprefix(codecs.BOM_UTF8)
            yield number, raw


def _decoded(path: Path, number: int, raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FedForwardError(
            f"line {number} of {path} is not UTF-8 text ({error.reason} at byte {error.start}). "
            "Save the file as UTF-8."
        ) from error


def _check_encoding(path: Path, raw: bytes) -> None:
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise FedForwardError(f"{path} is UTF-16 text. Save the file as UTF-8.")
    if b"\0" in raw[:_CHUNK]:
        raise FedForwardError(
            f"line 1 of {path} has zero bytes, so it is no UTF-8 text. Save the file as UTF-8."
        )


# ---- JSON ----------------------------------------------------------------------------------------


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    names = [name for name, _ in pairs]
    repeated = Repeated(found)
    repeated.keys_twice = frozenset(name for name in names if names.count(name) > 1)
    return repeated


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=Number, parse_float=Number, parse_constant=Number
)


def parse_json(text: str) -> Any:
    """A JSON value whose numbers are `Number`, and whose objects know keys that stand twice.

    Raises:
        json.JSONDecodeError: it is not JSON.
    """
    return _DECODER.decode(text)


def _json_lines(path: Path, keep: Iterator[bool] | None = None) -> Rows:
    for number, raw in _raw_lines(path):
        if raw.isspace() or not raw or (keep is not None and not next(keep, False)):
            continue
        line = _decoded(path, number, raw)
        try:
            row = _DECODER.decode(line)
        except json.JSONDecodeError as error:
            raise FedForwardError(
                f"line {number} of {path} is not a JSON object: {error.msg} at column "
                f"{error.colno}. Each line must be one whole object."
            ) from error
        except RecursionError as error:
            raise FedForwardError(f"line {number} of {path} is nested too deeply.") from error
        yield number, _checked(row, path, f"line {number}")


def _checked(row: Any, path: Path, place: str) -> Row:
    if not isinstance(row, dict):
        found = {list: "an array", str: "a string", bool: "a truth value", type(None): "null"}
        raise FedForwardError(
            f"{place} of {path} is {found.get(type(row), 'a number')}, not a JSON object. Each row "
            "must be one whole object."
        )
    return row


def _json(path: Path) -> Rows:
    """Rows of a `.json` file: an array of objects, an object that holds one, or a row a line."""
    stream = _Stream(path)
    with stream:
        first = stream.peek()
        if first == "[":
            yield from stream.items()
            return
    if first == "":
        return
    if first != "{":
        raise FedForwardError(
            f"{path} begins with {first!r} and is no JSON. Give an array of objects, or an object "
            "a line."
        )
    number, line = next((n, text) for n, text in _lines(path) if not text.isspace())
    try:
        row = _DECODER.decode(line)
    except json.JSONDecodeError:
        row = None
    held = any(isinstance(value, list | dict) for value in (row or {}).values())
    if row is None or (held and _is_alone(path, number)):
        yield from _wrapped(path)
    else:
        yield from _json_lines(path)


def _is_alone(path: Path, number: int) -> bool:
    """Whether nothing follows this line."""
    return all(text.isspace() for n, text in _lines(path) if n > number)


def _wrapped(path: Path) -> Rows:
    """The rows of one object that holds them under one of its keys."""
    text = "".join(line for _, line in _lines(path))
    try:
        whole = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise FedForwardError(
            f"line {error.lineno} of {path} is not JSON: {error.msg} at column {error.colno}."
        ) from error
    except RecursionError as error:
        raise FedForwardError(f"{path} is nested too deeply.") from error
    lists = {name: value for name, value in whole.items() if isinstance(value, list)}
    held = [name for name in WRAPPERS if name in lists]
    if len(whole) == 1 and lists and next(iter(lists)) not in CONVERSATIONS:
        held = list(lists)
    if len(held) > 1:
        raise FedForwardError(
            f"{path} is one object with lists of rows under {listed(held)}. Save one of them as a "
            "file of its own."
        )
    if held and (not lists[held[0]] or isinstance(lists[held[0]][0], dict)):
        for number, row in enumerate(lists[held[0]], start=1):
            yield number, _checked(row, path, f"item {number} of {held[0]!r}")
        return
    if _holds_columns(whole):
        columns = list(whole)
        raise FedForwardError(
            f"{path} holds columns ({listed(columns)}) in place of rows. Save it by rows: an array "
            'of objects, or an object a line (in pandas: to_json(..., orient="records", '
            "lines=True))."
        )
    yield 1, whole


def _holds_columns(whole: Mapping[str, Any]) -> bool:
    """Whether an object is a table as pandas writes one: columns, or rows by their index."""
    values = list(whole.values())
    if all(isinstance(value, list) for value in values):
        plain = not any(isinstance(item, dict) for value in values for item in value[:1])
        return len(values) > 1 and plain and len({len(value) for value in values}) == 1
    if not all(isinstance(value, dict) for value in values):
        return False
    same = len({tuple(value) for value in values}) == 1
    return (same and len(values) > 1) or all(map(_is_column, values))


def _is_column(value: Any) -> bool:
    """Whether this is a column as pandas writes it: an object with the keys "0", "1", …"""
    return (
        isinstance(value, dict) and bool(value) and list(value) == list(map(str, range(len(value))))
    )


class _Stream:
    """The items of a JSON array, as many at a time as a chunk holds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._chunks = _chunks(path)
        self._text = ""
        self._place = 0
        # What was dropped before the text: lines, and characters of the last of them.
        self._lines = self._columns = 0
        # Up to where lines were counted, and how many there are.
        self._counted = self._found = 0

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self._chunks.close()  # type: ignore[attr-defined]

    def peek(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            match = _NO_SPACE.search(self._text, self._place)
            if match:
                self._place = match.start()
                return match[0]
            self._place = len(self._text)
            if not self._more():
                return ""

    def items(self) -> Rows:
        """The objects of the array that begins here, numbered by the lines they begin in."""
        self._place += 1
        expected = "an object or ]"
        while (char := self.peek()) != "]":
            if char == "," and expected == ", or ]":
                self._place += 1
                expected = "an object"
                continue
            if char in ("", ",") or expected == ", or ]":
                raise self._wrong(f"{expected} is expected")
            line = self._line()
            yield line, _checked(self._item(), self.path, f"the item at line {line}")
            expected = ", or ]"
        self._place += 1
        if self.peek():
            raise self._wrong("something follows the array")

    def _item(self) -> Any:
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._place)
            except json.JSONDecodeError as error:
                if not self._more():
                    self._place = error.pos
                    raise self._wrong(error.msg) from error
            except RecursionError as error:
                raise self._wrong("it is nested too deeply") from error
            else:
                # A number or word at the end of what was read may go on.
                if end < len(self._text) or not self._more():
                    self._place = end
                    return value

    def _more(self) -> bool:
        """Read on: a chunk, or as much as is there already."""
        rest = self._text[self._place :]
        parts, size = [rest], 0
        while size < max(_CHUNK, len(rest)):
            chunk = next(self._chunks, "")
            if not chunk:
                break
            parts.append(chunk)
            size += len(chunk)
        if not size:
            return False
        dropped = self._text[: self._place]
        lines = dropped.count("\n")
        self._lines += lines
        self._columns = len(dropped) - dropped.rfind("\n") - 1 + (0 if lines else self._columns)
        self._text, self._place = "".join(parts), 0
        self._counted = self._found = 0
        return True

    def _line(self) -> int:
        self._found += self._text.count("\n", self._counted, self._place)
        self._counted = self._place
        return self._lines + self._found + 1

    def _wrong(self, reason: str) -> FedForwardError:
        before = self._text[: self._place]
        lines = before.count("\n")
        column = len(before) - before.rfind("\n") - 1 + (0 if lines else self._columns)
        return FedForwardError(
            f"line {self._lines + lines + 1} of {self.path} is not JSON: {reason} at column "
            f"{column + 1}."
        )


def _chunks(path: Path) -> Iterator[str]:
    """The text of a file in parts of any length, without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    lines = 0
    with _opened(path) as file:
        raw = file.read(_CHUNK)
        _check_encoding(path, raw)
        raw = raw.removeprefix(codecs.BOM_UTF8)
        while raw:
            try:
                text = decoder.decode(raw)
            except UnicodeDecodeError as error:
                line = lines + error.object.count(b"\n", 0, error.start) + 1
                raise FedForwardError(
                    f"line {line} of {path} is not UTF-8 text ({error.reason}). Save the file as "
                    "UTF-8."
                ) from error
            lines += text.count("\n")
            if text:
                yield text
            raw = file.read(_CHUNK)


_NO_SPACE = re.compile(r"[^ \t\r\n]")


# ---- CSV -----------------------------------------------------------------------------------------


def _csv_rows(path: Path) -> Any:
    """A reader of the cells of each row; it counts the lines."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    csv.field_size_limit(sys.maxsize if sys.maxsize < 2**31 else 2**31 - 1)
    lines = (text for _, text in _lines(path))
    return csv.reader(lines, delimiter="\t" if ".tsv" in suffixes[-2:] else ",", strict=True)


def _csv(path: Path) -> Rows:
    reader = _csv_rows(path)
    names: list[str] | None = None
    begin = 1
    try:
        for cells in reader:
            place, begin = begin, reader.line_num + 1
            if not cells:
                continue
            if names is None:
                names = cells
                continue
            if len(cells) != len(names):
                raise FedForwardError(
                    f"line {place} of {path} has {len(cells)} cells, and its header has "
                    f"{len(names)}. Put cells that hold {reader.dialect.delimiter!r} in quotes."
                    f"{_separator_hint(path)}"
                )
            yield place, _object(list(zip(names, cells, strict=True)))
    except csv.Error as error:
        raise FedForwardError(
            f"line {begin} of {path} is not CSV: {error}. A quote inside a quoted cell is "
            f"written twice, and lines end in a line feed.{_separator_hint(path)}"
        ) from error


def _separator_hint(path: Path) -> str:
    """What to do where a header looks as if other marks than commas stood between its cells."""
    _, first = next(_lines(path), (0, ""))
    if any(first.count(mark) > first.count(",") for mark in ";|\t") and ".csv" in path.name.lower():
        return " Cells of a .csv file are separated by commas: save it so, or as .tsv with tabs."
    return ""


# ---- Parquet and Arrow ---------------------------------------------------------------------------


def _parquet(path: Path, wanted: Collection[str] | None) -> Rows:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    names = _present(file.schema_arrow.names, wanted)
    yield from table_rows(file.iter_batches(batch_size=_BATCH_ROWS, columns=names), names)


@contextmanager
def _arrow(path: Path) -> Iterator[Any]:
    """A reader of an Arrow file, in either of its two forms."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        try:
            reader = pa.ipc.open_file(source)
        except pa.ArrowInvalid:
            source.seek(0)
            reader = pa.ipc.open_stream(source)
        yield reader


def _arrow_rows(path: Path, wanted: Collection[str] | None) -> Rows:
    with _arrow(path) as reader:
        names = _present(reader.schema.names, wanted)
        random = hasattr(reader, "num_record_batches")
        batches = map(reader.get_batch, range(reader.num_record_batches)) if random else reader
        yield from table_rows(batches, names)


def _present(names: Sequence[str], wanted: Collection[str] | None) -> list[str]:
    """The columns to read: those wanted, and those that a wanted path begins with."""
    if wanted is None:
        return list(names)
    return [name for name in names if any(begins(name, path) for path in wanted)]


def begins(name: str, path: str) -> bool:
    """Whether a path may begin with a column of this name."""
    return path == name or path.startswith((f"{name}.", f"{name}["))


def table_rows(batches: Any, names: Sequence[str]) -> Rows:
    """The rows of Arrow record batches, their values in the documented forms.

    Dates and times are ISO 8601 text, decimals have the digits that are stored, and floating-point
    numbers the fewest digits that give them back at their own width.
    """
    place = 0
    for batch in batches:
        for begin in range(0, batch.num_rows, _BATCH_ROWS):
            part = batch.slice(begin, _BATCH_ROWS)
            # By place: a table may have two columns of one name.
            chosen = [n for n, name in enumerate(part.schema.names) if name in names]
            found = [column_values(part.column(n)) for n in chosen]
            own = [part.schema.names[n] for n in chosen]
            for values in zip(*found, strict=True) if chosen else [()] * part.num_rows:
                place += 1
                yield place, _object(list(zip(own, values, strict=True)))


def column_values(column: Any) -> list[Any]:
    """An Arrow column as Python values; see `table_rows`."""
    kind = column.type
    written = _written_type(kind)
    if written != kind:
        column = column.cast(written)
    values: list[Any] = column.to_pylist()
    convert = _converter(kind)
    return values if convert is None else [convert(value) for value in values]


def _written_type(kind: Any) -> Any:
    """The type with moments as text, which Python's own types would round to microseconds."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return _written_type(kind.value_type)
    if pa.types.is_timestamp(kind) or pa.types.is_time(kind):
        return pa.string()
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_written_type(field.type)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(_written_type(kind.value_type))
    if pa.types.is_large_list(kind):
        return pa.large_list(_written_type(kind.value_type))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_written_type(kind.value_type), kind.list_size)
    if pa.types.is_map(kind):
        return pa.map_(_written_type(kind.key_type), _written_type(kind.item_type))
    return kind


def _converter(kind: Any) -> Callable[[Any], Any] | None:
    """What gives a value of this type its documented form; None where Python's is that already."""
    import pyarrow as pa

    types = pa.types
    if types.is_dictionary(kind):
        return _converter(kind.value_type)
    if types.is_timestamp(kind) or types.is_time(kind):
        return _unless_null(_iso)
    if types.is_float32(kind) or types.is_float16(kind):
        width = np.float32 if types.is_float32(kind) else np.float16
        return _unless_null(lambda value: Number(str(width(value))))
    if types.is_map(kind):
        item = _converter(kind.item_type) or (lambda value: value)
        return _unless_null(lambda pairs: {str(key): item(value) for key, value in pairs})
    if types.is_struct(kind):
        inner = {field.name: _converter(field.type) for field in kind}
        changed = {name: convert for name, convert in inner.items() if convert is not None}
        if not changed:
            return None
        return _unless_null(
            lambda row: row | {name: convert(row[name]) for name, convert in changed.items()}
        )
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        convert = _converter(kind.value_type)
        if convert is None:
            return None
        return _unless_null(lambda values: [convert(value) for value in values])
    return None


def _unless_null(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else convert(value)


def _iso(text: str) -> str:
    """Arrow's text of a moment as ISO 8601, without a fraction's last zeros."""
    day, _, time = text.rpartition(" ")
    match = re.fullmatch(r"(\d+:\d+:\d+)(?:\.(\d+))?(Z|[+-]\d{4})?", time)
    if match is None:
        # A moment beyond the years that Arrow writes.
        return text
    fraction = (match[2] or "").rstrip("0")
    zone = match[3] or ""
    zone = f"{zone[:3]}:{zone[3:]}" if len(zone) == 5 else zone
    return (f"{day}T" if day else "") + match[1] + (f".{fraction}" if fraction else "") + zone
