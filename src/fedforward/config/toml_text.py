"""The text of a TOML file: read with errors that point at a line, and where each key stands.

`tomllib` says where a file stops being TOML, and not what a person did; it forgets the lines of
what it reads.
"""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedforward.core.errors import FedForwardError
from fedforward.core.units import format_bytes

#: Bytes of the largest configuration: lists with an entry for each of 65,535 clients fit.
MAX_BYTES = 16 << 20
_HEADER = re.compile(r"\s*\[\s*([^\[\]]+?)\s*\]\s*(#.*)?")
_ITEM = re.compile(r"\s*\[\[\s*([^\[\]]+?)\s*\]\]\s*(#.*)?")
_KEY = re.compile(r"""\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""")
_PLACE = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)")
_SHOWN = 80


@dataclass(frozen=True)
class TomlFile:
    """What a file holds.

    Attributes:
        content: by section and key.
        lines: the number, from 1, of the line on which a section or a `section.key` begins, as far
            as it could be told.
    """

    content: dict[str, Any]
    lines: dict[str, int]


def read(path: Path) -> TomlFile:
    """Read a file.

    Raises:
        FedForwardError: there is none, or it is not TOML; with the line, and what to do.
    """
    text = _text(path)
    lines, doubles = _places(text)
    try:
        return TomlFile(tomllib.loads(text), lines)
    except (ValueError, RecursionError) as error:
        # Numbers of thousands of digits are ValueErrors too.
        reason = _reason(text, doubles, error)
        raise FedForwardError(f"{path} is not valid TOML: {reason}") from error


def _text(path: Path) -> str:
    """The text of a file, without a byte-order mark."""
    try:
        if path.is_dir():
            raise FedForwardError(_folder(path))
        if not path.is_file():
            if path.exists():
                raise FedForwardError(
                    f"{path} is a device or a pipe, and a configuration is read more than once. "
                    "Give a file."
                )
            raise FedForwardError(
                f"{path}: no such configuration file. `fedforward init` writes a commented example."
            )
        if (size := path.stat().st_size) > MAX_BYTES:
            raise FedForwardError(
                f"{path} is of {format_bytes(size)}, and a configuration is of at most "
                f"{format_bytes(MAX_BYTES)}. Give the TOML file, not the data or the model."
            )
        raw = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FedForwardError(f"{path} cannot be read: {reason}.") from error
    if raw and not raw.strip(b"\0"):
        raise FedForwardError(
            f"{path} is not valid TOML: it holds nothing but NUL characters, as a system that went "
            "down may leave a file. Restore it from a copy."
        )
    zeros = raw[:1000].count(0)
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff") or zeros > len(raw[:1000]) / 4:
        raise FedForwardError(
            f"{path} is not valid TOML: it is UTF-16 text. Save it as UTF-8 (in PowerShell: "
            "Set-Content -Encoding utf8)."
        )
    try:
        # Some editors begin a file with a byte-order mark.
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = raw.count(b"\n", 0, error.start) + 1
        raise FedForwardError(
            f"{path} is not valid TOML: line {number} is not UTF-8 text (the byte "
            f"0x{raw[error.start]:02x}). Save the file as UTF-8."
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _folder(path: Path) -> str:
    """The sentence for a folder in place of a file."""
    found = sorted(file.name for file in path.glob("*.toml"))
    advice = f"Give one of its files: {', '.join(found[:3])}." if found else "Give a TOML file."
    return f"{path} is a folder, and no configuration file. {advice}"


def _places(text: str) -> tuple[dict[str, int], dict[int, tuple[str, int]]]:
    """The line of each key, and for each line that says a key again the key and its first line."""
    lines: dict[str, int] = {}
    doubles: dict[int, tuple[str, int]] = {}
    section, closing = "", ""
    for number, line in enumerate(text.split("\n"), start=1):
        if closing:
            closing = "" if closing in line else closing
            continue
        name = ""
        if header := _HEADER.fullmatch(line):
            name = section = _plain(header[1])
        elif item := _ITEM.fullmatch(line):
            # Each item of a list has the same keys.
            section = f"{_plain(item[1])}.{number}"
        elif key := _KEY.match(line):
            name = _plain(f"{section}.{key[1]}" if section else key[1])
            for quotes in ('"""', "'''"):
                if line.count(quotes) % 2:
                    closing = quotes
        if name:
            if name in lines:
                doubles[number] = (name, lines[name])
            lines.setdefault(name, number)
    return lines, doubles


def _plain(name: str) -> str:
    """A dotted key without quotes and spaces."""
    return ".".join(part.strip().strip("\"'") for part in name.split("."))


def _reason(text: str, doubles: dict[int, tuple[str, int]], error: Exception) -> str:
    """What is wrong with a text, as sentences that begin with small letters."""
    message = str(error)
    place = _PLACE.search(message)
    what = _PLACE.sub("", message).strip().rstrip(".")
    lines = text.split("\n")
    if what.startswith(("Cannot overwrite", "Cannot declare", "Cannot mutate", "Duplicate")):
        if doubles:
            number, (name, first) = next(iter(doubles.items()))
            return f"line {number} says {name} again, after line {first}. Leave one of them out."
        at = f"line {place[1]}: " if place and place[1] else ""
        return f"{at}a key or a section is there twice ({what}). Leave one of them out."
    if isinstance(error, RecursionError):
        return "it is nested too deeply."
    number = int(place[1]) if place and place[1] else len(lines) if place else 0
    if not number:
        return f"{what}."
    line = lines[number - 1].strip()
    shown = line if len(line) <= _SHOWN else line[:_SHOWN] + "…"
    at = f"line {number}, `{shown}`:" if shown else f"line {number}:"
    if what.startswith(("Unescaped '\\'", "Invalid hex value", "Escaped character")):
        return (
            f"{at} a backslash in double quotes begins an escape. Write a path in single quotes, "
            "as in 'C:\\models\\tiny', or with forward slashes."
        )
    if what == "Illegal character '\\n'" or what.startswith("Unterminated"):
        return f"{at} a text that begins with a quote does not end with one."
    advice = ""
    if what == "Invalid value":
        advice = " Text needs straight quotes; true and false are written small."
    elif line.startswith("{") and what == "Invalid statement":
        advice = " It looks like JSON, and a configuration is TOML."
    elif re.search(r"=\s*\d+,\d+\s*$", line):
        advice = " A number has a point, as in 0.001."
    elif what.startswith("Expected '=' after a key"):
        advice = " Write key = value, and sections as [section]."
    return f"{at} {what[:1].lower()}{what[1:]}.{advice}"
