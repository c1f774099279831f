"""The rows of a run: read once from their sources, of each what is used, kept on disk."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedforward.core.errors import FedForwardError
from fedforward.core.logs import PHASES
from fedforward.core.seeds import generator
from fedforward.data import readers
from fedforward.data.chat import USUAL
from fedforward.data.sources import Source
from fedforward.data.spool import JsonSpool, Numbers, narrow
from fedforward.data.values import (
    Number,
    Repeated,
    first_name,
    listed,
    plain,
    reach,
    steps,
    text_of,
)

LOGGER = logging.getLogger("fedforward.data")
#: Seconds after which reading says how far it is, and between its saying so.
FIRST_LINE_S = NEXT_LINE_S = 2.0


@dataclass(frozen=True)
class Wanted:
    """What is read of each row, by the names that templates have for it.

    Attributes:
        texts: paths whose values must be text, and the keys that name them, for errors.
        values: paths that may hold anything, as a conversation does, with their keys.
        optional: paths among `values` that need not be there.
        names: what paths of the templates are called in this source, where that differs.
    """

    texts: Mapping[str, str]
    values: Mapping[str, str]
    optional: frozenset[str]
    names: Mapping[str, str]

    @property
    def all(self) -> list[str]:
        """All paths, in the order in which values are kept."""
        return list(dict.fromkeys((*self.texts, *self.values)))

    def found(self, path: str) -> str:
        """What a path is called in the source."""
        return self.names.get(path, path)


class Row(NamedTuple):
    """What was read of a row.

    Attributes:
        values: by path; texts, or null, or the parts of a conversation.
        where: for errors, such as "line 3 of rows.jsonl".
    """

    values: dict[str, Any]
    where: str


class Table:
    """Rows of sources, in an order that the run's seed gives; read by number.

    Attributes:
        sources: where they come from.
        origins: int16 [rows], the number of the source of each.
    """

    def __init__(self, sources: Sequence[Source], wanted: Wanted) -> None:
        self.sources = sources
        self._paths = wanted.all
        self._records = JsonSpool()
        self._order: Numbers = np.empty(0, np.int64)
        self.origins: NDArray[np.int16] = np.empty(0, np.int16)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, number: int) -> Row:
        """A row, by its place in the order."""
        source, file, place, *values = self._records[int(self._order[number])]
        return Row(
            dict(zip(self._paths, values, strict=True)), self.sources[source].where(file, place)
        )

    @classmethod
    def read(
        cls,
        sources: Sequence[Source],
        wanted: Wanted,
        *,
        seed: int,
        purpose: str,
        limit: int | None,
        shares: Sequence[float] = (),
        prefix: str = "",
    ) -> "Table":
        """Read what is wanted of all rows, or of some drawn at random.

        Args:
            seed: of the order.
            purpose: names the order's stream of random numbers.
            limit: most rows.
            shares: of each source among the rows that `limit` leaves; none is by size.
            prefix: what stands before the fields' names in errors.

        Raises:
            FedForwardError: a source cannot be read or is empty, or a field is nowhere in it or
                holds what it must not.
        """
        table = cls(sources, wanted)
        picked = _Picked(sources, seed, purpose, limit, shares)
        progress = Progress()
        missing = (set(wanted.all) | set(wanted.names)) - wanted.optional
        origins: list[NDArray[np.int16]] = []
        for number, source in enumerate(sources):
            keep, kept = picked.of(number), 0
            lacking = _Lacking(missing, wanted, source, keep is not None)
            paths = [wanted.found(path) for path in missing | wanted.optional]
            for file, place, row in source.read(paths, keep):
                kept += 1
                if kept % 1024 == 0:
                    progress.show(f"reading {source.name}", kept)
                lacking.look(row, file)
                table._records.append(
                    [number, file, place, *_values(row, wanted, source, file, place)]
                )
            if not kept and (keep is None or not len(keep)):
                raise FedForwardError(
                    f"{source.key} = {source.name!r}: the file holds no examples."
                )
            if lacking.paths and keep is not None:
                # A field may be in rows that were not drawn.
                for file, _, row in source.read(paths):
                    lacking.look(row, file)
                    if not lacking.paths:
                        break
            lacking.refuse(prefix)
            origins.append(np.full(kept, number, np.int16))
        table._order = picked.order(len(table._records))
        table.origins = np.concatenate(origins)[table._order]
        return table


class _Picked:
    """Which rows are kept, and their order: that of a permutation of all, up to the limit."""

    def __init__(
        self,
        sources: Sequence[Source],
        seed: int,
        purpose: str,
        limit: int | None,
        shares: Sequence[float],
    ) -> None:
        self._random = generator(seed, purpose)
        self._all: NDArray[np.int64] | None = None
        if limit is None:
            return
        counts = [source.count() for source in sources]
        order = self._random.permutation(sum(counts))
        if shares and len(sources) > 1:
            # Of each source its share of the limit, in the order of the whole.
            ends = np.cumsum(counts)
            origins = np.searchsorted(ends, order, side="right")
            total = sum(shares)
            dealt = np.round(np.cumsum([0.0, *shares]) * (limit / total)).astype(int)
            kept = [order[origins == n][:most] for n, most in enumerate(np.diff(dealt))]
            chosen = np.zeros(len(order), np.bool_)
            chosen[np.concatenate(kept)] = True
            self._all = order[chosen[order]]
        else:
            self._all = order[:limit]
        self._begins = np.cumsum([0, *counts])

    def of(self, source: int) -> NDArray[np.bool_] | None:
        """Which rows of a source are kept; None for all."""
        if self._all is None:
            return None
        begin, end = self._begins[source : source + 2]
        keep = np.zeros(end - begin, np.bool_)
        mine = self._all[(self._all >= begin) & (self._all < end)]
        keep[mine - begin] = True
        return keep

    def order(self, kept: int) -> Numbers:
        """The order of the rows that were kept, as places among them."""
        if self._all is None:
            return narrow(self._random.permutation(kept))
        return narrow(np.argsort(np.argsort(self._all, kind="stable"), kind="stable"))


def _values(
    row: Mapping[str, Any], wanted: Wanted, source: Source, file: int, place: int
) -> Iterator[Any]:
    where = source.where(file, place)
    for path in wanted.all:
        name = wanted.found(path)
        value = reach(row, name, where)
        # A number by itself is text, as everywhere.
        text = path in wanted.texts or isinstance(value, Number | bool)
        yield text_of(value, name, where) if text else _json(value, where)


def _json(value: Any, where: str) -> Any:
    """A value that JSON can hold, its numbers as Python has them."""
    if isinstance(value, Repeated):
        twice = min(value.keys_twice)
        raise FedForwardError(f"{where} has the key {twice!r} more than once. Keep one of them.")
    if isinstance(value, Number):
        return plain(value)
    if isinstance(value, str):
        return text_of(value, "of a conversation", where)
    if isinstance(value, Mapping):
        return {key: _json(item, where) for key, item in value.items()}
    if isinstance(value, list):
        return [_json(item, where) for item in value]
    if value is None or isinstance(value, str | int | float):
        return value
    return text_of(value, "of a conversation", where)


class _Lacking:
    """The paths whose fields no row has had yet."""

    def __init__(self, paths: set[str], wanted: Wanted, source: Source, sampled: bool) -> None:
        self._sampled = sampled
        self.paths, self._wanted, self._source = set(paths), wanted, source
        self._all = frozenset(paths)
        self._known: dict[str, None] = {}
        #: Of each file that rows came from, the paths that none of them has had.
        self._files: dict[int, set[str]] = {}

    def look(self, row: Mapping[str, Any], file: int) -> None:
        """Take out what a row has."""
        mine = self._files.setdefault(file, set(self._all))
        if mine:
            self._known.update(dict.fromkeys(row))
            found = {path for path in mine if _has(row, self._wanted.found(path))}
            mine -= found
            self.paths -= found

    def refuse(self, prefix: str) -> None:
        """Refuse data in which one is nowhere, or is missing from the header of a file.

        Raises:
            FedForwardError: with the fields that there are.
        """
        source = self._source
        if not self.paths:
            for file, mine in self._files.items():
                for path in sorted(mine):
                    if len(steps(self._wanted.found(path))) > 1:
                        continue
                    what = f"{source.files[file]} has no field {self._wanted.found(path)!r}"
                    if readers.form_of(source.files[file]) in ("json lines", "json"):
                        if not self._sampled:
                            LOGGER.warning("%s in any row, and other files have it", what)
                        continue
                    raise FedForwardError(
                        f"{source.key} = {source.name!r}: {what}, and other files have it. Give "
                        "all files the same columns."
                    )
        if self.paths:
            every = (*self._wanted.all, *self._wanted.names)
            first = next(path for path in every if path in self.paths)
            known = dict.fromkeys([*source.columns(), *self._known])
            raise _no_field(first, self._wanted, source, known, prefix)


def _has(row: Mapping[str, Any], name: str) -> bool:
    """Whether a row has a field; of one that is reached into, whether something lies there."""
    if first_name(name, row) not in row:
        return False
    if name in row or len(steps(name)) < 2:
        return True
    try:
        return reach(row, name, "") is not None
    except FedForwardError:
        # It is refused with its row where its value is read.
        return True


def _no_field(
    path: str, wanted: Wanted, source: Source, known: Mapping[str, Any], prefix: str
) -> FedForwardError:
    fields = f"Their fields are {listed(known) or 'none'}."
    if path in wanted.names:
        return FedForwardError(
            f"data.fields: {path} = {wanted.names[path]!r} is not a field of {source.name}. "
            f"{fields}"
        )
    key = wanted.texts.get(path) or wanted.values[path]
    if key == "federation.field":
        return FedForwardError(f"federation.field = {path!r} is not a field of the data. {fields}")
    hint = ""
    if len(known) == 1 and any(mark in next(iter(known)) for mark in ";\t|"):
        hint = " Cells of a .csv file are separated by commas, and those of a .tsv file by tabs."
    if chat := next((name for name in USUAL if name in known), None):
        hint = f" If the field {chat} has conversations, say data.chat = {chat!r} instead."
    return FedForwardError(
        f"{key}{prefix} names the field {{{path}}}, which the data do not have. {fields}{hint}"
    )


class Progress:
    """Logs how far a long piece of work is, once it has taken a while."""

    def __init__(self) -> None:
        self._due = time.monotonic() + FIRST_LINE_S

    def show(self, what: str, done: int, total: int | None = None) -> None:
        """Say it, if it is time."""
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + NEXT_LINE_S
        of = "" if total is None else f" of {total:,}"
        PHASES.info("%s: %s%s rows", what, f"{done:,}", of)
