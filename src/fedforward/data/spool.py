"""Records on disk that are written once and read in any order; only what is read is in memory.

What a run keeps of its data (the texts of its rows, the tokens of its examples) may be larger than
memory. It lies in files without a name, which are gone when the process ends, however it ends.
"""

import json
import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedforward.core.errors import FedForwardError

_BUFFER = 1 << 20
#: Bytes of an end.
_WIDTH = 8


#: Row numbers, in the narrowest type that holds them all.
Numbers = NDArray[np.integer[Any]]


def narrow(numbers: NDArray[np.int64]) -> Numbers:
    """The numbers in 4 bytes each where they fit, for there may be tens of millions."""
    fits = not len(numbers) or int(numbers.max()) < 2**31
    return numbers.astype(np.int32) if fits else numbers


class Spool:
    """Byte records, appended and then read by number.

    Example:
        >>> spool = Spool()
        >>> spool.append(b"one"); spool.append(b"two")
        >>> len(spool), spool[1]
        (2, b'two')
    """

    def __init__(self) -> None:
        self._data = _File()
        # Where each record ends, int64.
        self._ends = _File()

    def append(self, record: bytes) -> None:
        """Add a record.

        Raises:
            FedForwardError: the disk is full.
        """
        self._data.write(record)
        self._ends.write(self._data.size.to_bytes(_WIDTH, "little"))

    def __len__(self) -> int:
        return self._ends.size // _WIDTH

    def __getitem__(self, number: int) -> bytes:
        """A record, from 0."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        first = max(0, number - 1)
        ends = np.frombuffer(self._ends.read(_WIDTH * first, _WIDTH * (number + 1)), "<i8")
        begin = int(ends[-2]) if number else 0
        return self._data.read(begin, int(ends[-1]))


class JsonSpool:
    """Records of JSON values."""

    def __init__(self, records: Iterable[Any] = ()) -> None:
        self._spool = Spool()
        for record in records:
            self.append(record)

    def append(self, record: Any) -> None:
        """Add a record; see `Spool.append`."""
        self._spool.append(json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass"))

    def __len__(self) -> int:
        return len(self._spool)

    def __getitem__(self, number: int) -> Any:
        return json.loads(self._spool[number].decode("utf-8", "surrogatepass"))

    def __iter__(self) -> Iterator[Any]:
        return (self[number] for number in range(len(self)))


class _File:
    """A file without a name that is written at its end and read anywhere; little stays in memory.

    It is read and not mapped: pages of a map count as the memory of the process.
    """

    def __init__(self) -> None:
        self._file: Any = None
        self._waiting = bytearray()
        self._written = 0

    @property
    def size(self) -> int:
        return self._written + len(self._waiting)

    def write(self, data: bytes) -> None:
        self._waiting += data
        if len(self._waiting) >= _BUFFER:
            self._flush()

    def read(self, begin: int, end: int) -> bytes:
        if begin >= self._written:
            return bytes(self._waiting[begin - self._written : end - self._written])
        if end > self._written:
            self._flush()
        if hasattr(os, "pread"):
            return os.pread(self._file.fileno(), end - begin, begin)
        self._file.seek(begin)
        data: bytes = self._file.read(end - begin)
        return data

    def _flush(self) -> None:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="fedforward-", buffering=0)  # noqa: SIM115
                weakref.finalize(self, self._file.close)
            self._file.seek(0, os.SEEK_END)
            done = 0
            while done < len(self._waiting):
                done += self._file.write(self._waiting[done:])
        except OSError as error:
            raise _disk_is_full(error) from error
        self._written += len(self._waiting)
        self._waiting = bytearray()


def _disk_is_full(error: OSError) -> FedForwardError:
    return FedForwardError(
        f"The folder for temporary files, {tempfile.gettempdir()}, cannot be written "
        f"({error.strerror}). The data of a run lie there in pieces while it runs. Make room, or "
        "name another folder with TMPDIR."
    )
