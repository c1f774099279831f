"""Amounts of memory as people write them. Imports nothing of the package."""

import re

_UNITS = {"B": 1}
_UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate("kMGT", start=1)}
_UNITS |= {f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", start=1)}


def parse_bytes(text: str) -> int:
    """Bytes from text such as "6 GiB", "512MB" or "1.5 GB".

    Raises:
        ValueError: it is not such text.
    """
    match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]+)?)\s*([A-Za-z]+)\s*", text)
    units = {unit.lower(): size for unit, size in _UNITS.items()}
    if match is None or match[2].lower() not in units:
        raise ValueError(f"{text!r} is no amount of memory; write it as '6 GiB' or '512 MB'")
    return int(float(match[1]) * units[match[2].lower()])


def format_bytes(size: int) -> str:
    """Bytes for people, such as "1.50 GiB"."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size >= _UNITS[unit]:
            return f"{size / _UNITS[unit]:.2f} {unit}"
    return f"{size} B"


def quantity(size: float | None) -> str:
    """Bytes with a unit: 161 B, 42.3 kB, 17.3 MB (powers of ten)."""
    if size is None:
        return "not measured"
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError
