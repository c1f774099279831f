"""Reading a data set: JSONL, CSV, Parquet or the hub, through `datasets`, with errors that point.

The library reads; this module only looks first at what a person can get wrong, and on failure
finds the line to blame.
"""

import glob
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedforward.core.errors import FedForwardError

if TYPE_CHECKING:
    from datasets import Dataset

BUILDERS = {
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}


def read(source: str, *, split: str = "train", subset: str | None = None, key: str) -> "Dataset":
    """The examples of a file, or of one split of a hub data set.

    Args:
        source: a path ending in one of `BUILDERS`, or a hub name.
        split: of a hub data set.
        subset: configuration name of a hub data set, if it has several.
        key: the configuration key to name in errors, such as "data.source".

    Raises:
        FedForwardError: missing, empty, malformed (with the line) or unreachable.
    """
    import datasets

    path = Path(source).expanduser()
    if path.is_dir():
        raise FedForwardError(
            f"{key} = {source!r} is a folder. Give a file ending in {', '.join(BUILDERS)}."
        )
    if path.suffix.lower() not in BUILDERS:
        if path.exists() or source.startswith((".", "/", "~")):
            raise FedForwardError(
                f"{key} = {source!r}: the ending {path.suffix!r} is not known. Allowed are "
                f"{', '.join(BUILDERS)}, or the name of a hub data set."
            )
        return _read_hub(source, split, subset, key)
    if not path.is_file():
        raise FedForwardError(f"{key} = {source!r}: no such file.")
    builder = BUILDERS[path.suffix.lower()]
    try:
        problem = _look(path, text=builder != "parquet")
    except OSError as error:
        problem = f"the file cannot be read: {error.strerror}."
    if problem:
        raise FedForwardError(f"{key} = {source!r}: {problem}")
    options: dict[str, Any] = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
    try:
        with _quiet():
            # The library takes a path for a pattern.
            files = glob.escape(str(path.resolve()))
            return datasets.load_dataset(builder, data_files=files, split="train", **options)
    except Exception as error:
        # The library wraps every reader's failure in its own types; the file tells more.
        raise FedForwardError(_blame(path, builder, key, source, error)) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's progress bars, and without what it logs before it raises."""
    import datasets

    verbosity = datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        datasets.enable_progress_bars()


def _look(path: Path, *, text: bool) -> str | None:
    """What is wrong with a file whatever its format: nothing in it, or not text."""
    empty = True
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            empty = empty and not raw.strip()
            if not text:
                break
            try:
                raw.decode("utf-8")
            except UnicodeDecodeError as error:
                return (
                    f"line {number} is not UTF-8 text ({error.reason} at byte {error.start}). "
                    "Save the file as UTF-8."
                )
    return "the file is empty." if empty else None


def _read_hub(name: str, split: str, subset: str | None, key: str) -> "Dataset":
    import datasets

    try:
        return datasets.load_dataset(name, subset, split=split)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise FedForwardError(
            f"{key} = {name!r} is neither a file nor a hub data set that can be read: {reason}"
        ) from error


def _blame(path: Path, builder: str, key: str, source: str, error: Exception) -> str:
    """The sentence for a file that its reader refused, with the line where one can be found."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, OSError) and cause.errno is not None:
        return (
            f"{key} = {source!r}: the cache of the `datasets` library cannot be written "
            f"({cause.strerror}). Make room, or set HF_DATASETS_CACHE to another folder."
        )
    if builder == "json":
        line = _bad_json(path)
        if line:
            return f"{key} = {source!r}: {line}"
    reason = str(cause).strip().split("\n")[0]
    if "corresponds to no data" in reason:
        return f"{key} = {source!r}: the file holds no examples."
    return f"{key} = {source!r} is not a readable {path.suffix[1:]} file: {reason}"


def _bad_json(path: Path) -> str | None:
    """The line of a JSON file that no reader takes; None if each by itself is well formed."""
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            return f"line {error.lineno} is not JSON: {error.msg} at column {error.colno}."
        return None
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            return (
                f"line {number} is not a JSON object: {error.msg} at column {error.colno}. "
                "Each line must be one whole object."
            )
        if not isinstance(row, dict):
            found = {list: "an array", str: "a string", bool: "a truth value", type(None): "null"}
            return (
                f"line {number} is {found.get(type(row), 'a number')}, not a JSON object. "
                "Each line must be one whole object."
            )
    return None
