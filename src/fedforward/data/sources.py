"""Reading a data set: JSONL, CSV, Parquet or the hub, through `datasets`, with errors that point.

The library reads; this module only looks first at what a person can get wrong, and on failure
finds the line to blame.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedforward.errors import FedForwardError

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
    if path.suffix.lower() not in BUILDERS:
        if path.exists() or source.startswith((".", "/", "~")):
            raise FedForwardError(
                f"{key} = {source!r}: the ending {path.suffix!r} is not known. Allowed are "
                f"{', '.join(BUILDERS)}, or the name of a hub data set."
            )
        return _read_hub(source, split, subset, key)
    if not path.is_file():
        raise FedForwardError(f"{key} = {source!r}: no such file.")
    if not path.read_bytes()[:4096].strip() and not path.read_bytes().strip():
        raise FedForwardError(f"{key} = {source!r}: the file is empty.")
    builder = BUILDERS[path.suffix.lower()]
    options: dict[str, Any] = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
    datasets.disable_progress_bars()
    try:
        data = datasets.load_dataset(builder, data_files=str(path), split="train", **options)
    except Exception as error:
        # The library wraps every reader's failure in its own types; the file tells more.
        raise FedForwardError(_blame(path, builder, key, source, error)) from error
    finally:
        datasets.enable_progress_bars()
    if not len(data):
        raise FedForwardError(f"{key} = {source!r}: the file holds no examples.")
    return data


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
    if builder == "json":
        line = _bad_json_line(path)
        if line:
            return f"{key} = {source!r}: {line}"
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    reason = str(cause).strip().split("\n")[0]
    return f"{key} = {source!r} is not a readable {path.suffix[1:]} file: {reason}"


def _bad_json_line(path: Path) -> str | None:
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            if not raw.strip():
                continue
            try:
                row = json.loads(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                return f"line {number} is not UTF-8 text ({error.reason} at byte {error.start})."
            except json.JSONDecodeError as error:
                return (
                    f"line {number} is not a JSON object: {error.msg} at column {error.colno}. "
                    "Each line must be one whole object."
                )
            if not isinstance(row, dict):
                return f"line {number} is {type(row).__name__}, not a JSON object."
    return None
