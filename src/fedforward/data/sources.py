"""Where rows come from: a file, a folder or pattern of files, or a data set of the hub.

A source is read a row at a time and as often as is wanted. What its files hold is the affair of
`readers`.
"""

import glob
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedforward.core.errors import FedForwardError
from fedforward.core.paths import home, matches
from fedforward.data import readers
from fedforward.data.readers import Row

if TYPE_CHECKING:
    import datasets

LOGGER = logging.getLogger("fedforward.data")
_KNOWN = ", ".join((*readers.FORMS, ".jsonl.gz", ".csv.zst"))
_MOST_FILES = 3


@dataclass(frozen=True, eq=False)
class Source:
    """Rows of files or of one split of a hub data set.

    Attributes:
        name: as the user typed it.
        key: the configuration key that names it, for errors.
        files: in the order in which they are read; none for a hub data set.
        table: of a hub data set.
    """

    name: str
    key: str
    files: tuple[Path, ...] = ()
    table: "datasets.Dataset | None" = None

    def columns(self) -> list[str]:
        """The names of the fields, as far as the first row or header says them."""
        if self.table is not None:
            return list(self.table.column_names)
        with self._named():
            return list(dict.fromkeys(n for file in self.files for n in readers.columns(file)))

    def count(self) -> int:
        """How many rows there are.

        Raises:
            FedForwardError: as `read`.
        """
        if self.table is not None:
            return len(self.table)
        with self._named():
            return sum(map(readers.count, self.files))

    def read(
        self, wanted: Collection[str] | None = None, keep: Iterable[bool] | None = None
    ) -> Iterator[tuple[int, int, Row]]:
        """The rows, each with the number of its file and its place there; see `where`.

        Args:
            wanted: the paths that are used; the other columns of tables are not read.
            keep: of each row, whether it is wanted; None is all.

        Raises:
            FedForwardError: a file cannot be read, or holds what is not of its form, with the line.
        """
        flags = None if keep is None else iter(keep)
        if self.table is not None:
            names = self.table.column_names
            if wanted is not None:
                names = [n for n in names if any(readers.begins(n, path) for path in wanted)]
            batches = self.table.with_format("arrow").iter(batch_size=4096)
            rows = readers.table_rows(batches, names)
            for place, row in rows if flags is None else readers.kept(rows, flags):
                yield 0, place, row
            return
        with self._named():
            for number, file in enumerate(self.files):
                for place, row in readers.read(file, wanted, flags):
                    yield number, place, row

    def where(self, file: int, place: int) -> str:
        """A row for an error, such as "line 3 of rows.jsonl"."""
        if self.table is not None:
            return f"row {place} of {self.name}"
        path = self.files[file]
        return f"{readers.place_word(path)} {place} of {path}"

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Puts the key before what a reader says."""
        try:
            yield
        except FedForwardError as error:
            raise FedForwardError(f"{self.key} = {self.name!r}: {error}") from error.__cause__


def find(name: str, *, split: str = "train", subset: str | None = None, key: str) -> Source:
    """The source of a name; nothing is read yet but what a hub data set needs.

    Args:
        name: a file, a folder or a pattern of files that end in one of `readers.FORMS`, or a hub
            name.
        split: of a hub data set.
        subset: configuration name of a hub data set, if it has several.
        key: the configuration key to name in errors, such as "data.source".

    Raises:
        FedForwardError: there is no such file, its ending is not known, or the hub cannot be
            reached.
    """
    path = home(name)
    try:
        files = _files(name, path, key)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FedForwardError(f"{key} = {name!r} cannot be looked at: {reason}.") from error
    if files:
        return Source(name, key, tuple(files))
    return Source(name, key, table=_hub(name, split, subset, key))


def _files(name: str, path: Path, key: str) -> list[Path]:
    """The files that a name stands for; none for what can only be a hub data set."""
    if path.is_dir():
        return _of_folder(name, path, key)
    if path.is_file():
        if readers.form_of(path) is None:
            raise FedForwardError(
                f"{key} = {name!r}: the ending {path.suffix!r} is not known. Allowed are {_KNOWN}, "
                "or the name of a hub data set."
            )
        return [path]
    if path.exists():
        raise FedForwardError(f"{key} = {name!r} is neither a file nor a folder.")
    if glob.has_magic(name):
        found = [Path(match) for match in matches(name) if Path(match).is_file()]
        if not found:
            raise FedForwardError(
                f"{key} = {name!r}: no file has a name like that. Look at the pattern, and at the "
                "folder that it starts from."
            )
        return _of_one_form(name, found, key)
    if readers.form_of(path) is not None:
        raise FedForwardError(f"{key} = {name!r}: no such file.")
    if name.startswith((".", "/", "~", "\\")) or name.count("/") > 1 or name.endswith("/"):
        raise FedForwardError(
            f"{key} = {name!r}: no such file or folder. Files end in {_KNOWN}; hub data sets are "
            "called owner/name."
        )
    return []


def _of_folder(name: str, path: Path, key: str) -> list[Path]:
    """The data files of a folder, those of one that `datasets` saved in its own order."""
    import json

    state = path / "state.json"
    if state.is_file() and (path / "dataset_info.json").is_file():
        content = json.loads(state.read_text(encoding="utf-8"))
        files = [entry.get("filename") for entry in content.get("_data_files", ())]
        if not files or not all(isinstance(file, str) for file in files):
            raise FedForwardError(
                f"{key} = {name!r}: its state.json names no data files. Save it again with "
                "`save_to_disk`, or name the files."
            )
        return [path / str(file) for file in files]
    if (path / "dataset_dict.json").is_file():
        content = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))
        splits = content.get("splits") or ["none"]
        raise FedForwardError(
            f"{key} = {name!r} holds the splits {', '.join(splits)}. Name the folder of one, such "
            f"as {str(path / splits[0])!r}."
        )
    found = sorted(file for file in path.iterdir() if file.is_file() and file.name[0] != ".")
    known = [file for file in found if readers.form_of(file) is not None]
    if not known:
        listed = ", ".join(file.name for file in found[:_MOST_FILES]) or "no files"
        raise FedForwardError(
            f"{key} = {name!r} is a folder without data ({listed}). Its files must end in {_KNOWN}."
        )
    plain = [file.name.removesuffix(".gz").removesuffix(".zst") for file in known]
    if twice := sorted({stem for stem in plain if plain.count(stem) > 1}):
        raise FedForwardError(
            f"{key} = {name!r} has {twice[0]} twice, once compressed. Name the files to read with "
            "a pattern."
        )
    others = [file.name for file in sorted(path.iterdir()) if file not in known]
    others = [file for file in others if file[0] != "."]
    if others:
        shown = ", ".join(others[:_MOST_FILES]) + (", …" if len(others) > _MOST_FILES else "")
        LOGGER.warning("%s = %r: %d others in it are not read: %s", key, name, len(others), shown)
    return _of_one_form(name, known, key)


def _of_one_form(name: str, files: Sequence[Path], key: str) -> list[Path]:
    """Files that belong together.

    Raises:
        FedForwardError: they are of several forms, or of one that is not known.
    """
    forms = {readers.form_of(file): file for file in files}
    if None in forms:
        raise FedForwardError(
            f"{key} = {name!r} takes in {forms[None].name!r}, whose ending is not known. Allowed "
            f"are {_KNOWN}."
        )
    if len(forms) > 1:
        examples = " and ".join(file.name for file in list(forms.values())[:2])
        raise FedForwardError(
            f"{key} = {name!r} takes in files of several forms, such as {examples}. Say which with "
            "a pattern, as in 'folder/*.jsonl'."
        )
    return list(files)


@contextmanager
def _private_files() -> Iterator[None]:
    """Files and folders that are made meanwhile can be read by their owner alone."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def _hub(name: str, split: str, subset: str | None, key: str) -> "datasets.Dataset":
    import datasets

    try:
        # The library keeps the rows in the user's cache, where others could read them.
        with _private_files():
            return datasets.load_dataset(name, subset, split=split)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise FedForwardError(
            f"{key} = {name!r} is neither a file nor a hub data set that can be read: {reason}"
        ) from error
