"""Records on disk that are written once and read in any order; only what is read is in memory.

What a run keeps of its data (the texts of its rows, the tokens of its examples) may be larger than
memory. It lies in files without a name, which are gone when the process ends, however it ends.
"""

import json
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedforward.core.errors import FedForwardError

_BUFFER = 1 << 20


class Spool:
    """Byte records, appended and then read by number.

    Example:
        >>> spool = Spool()
        >>> spool.append(b"one"); spool.append(b"two")
        >>> len(spool), spool[1]
        (2, b'two')
    """

    def __init__(self) -> None:
        self._data = _Column(np.uint8)
        self._ends = _Column(np.int64)
        self._size = 0

    def append(self, record: bytes) -> None:
        """Add a record.

        Raises:
            FedForwardError: the disk is full.
        """
        self._data.append(record)
        self._size += len(record)
        self._ends.append(self._size.to_bytes(8, "little"))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> bytes:
        """A record, from 0."""
        ends = self._ends.values()
        begin = int(ends[number - 1]) if number else 0
        return self._data.values()[begin : int(ends[number])].tobytes()

    def sizes(self) -> NDArray[np.int64]:
        """The bytes of every record, int64 [records]."""
        return np.diff(self._ends.values(), prepend=0)


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


class _Column:
    """A growing array of one type in a file; read through a memory map."""

    def __init__(self, dtype: Any) -> None:
        self._dtype = np.dtype(dtype)
        self._file = tempfile.TemporaryFile(prefix="fedforward-", buffering=_BUFFER)  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._bytes = 0
        self._map: NDArray[Any] | None = None

    def append(self, data: bytes) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise _disk_is_full(error) from error
        self._bytes += len(data)
        self._map = None

    def __len__(self) -> int:
        return self._bytes // int(self._dtype.itemsize)

    def values(self) -> NDArray[Any]:
        if self._map is None:
            try:
                self._file.flush()
            except OSError as error:
                raise _disk_is_full(error) from error
            self._map = (
                np.memmap(self._file, self._dtype, "r", shape=(len(self),))
                if self._bytes
                else np.empty(0, self._dtype)
            )
        return self._map


def _disk_is_full(error: OSError) -> FedForwardError:
    return FedForwardError(
        f"The folder for temporary files, {tempfile.gettempdir()}, cannot be written "
        f"({error.strerror}). The data of a run lie there in pieces while it runs. Make room, or "
        "name another folder with TMPDIR."
    )
