"""What the studies share: options, the rows of a CSV, intervals, pictures."""

import argparse
import csv
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs" / "studies"
Row = dict[str, str]


def parser(description: str | None, quick: str) -> argparse.ArgumentParser:
    """With `--quick`, which does what `quick` says, and `--out`."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    made.add_argument("--quick", action="store_true", help=quick)
    made.add_argument("--out", type=Path, help="folder of what is written; default docs/studies")
    return made


def parse(made: argparse.ArgumentParser) -> argparse.Namespace:
    """The options; `out` is a folder that exists."""
    arguments = made.parse_args()
    if arguments.quick and arguments.out is None:
        made.error("--quick needs --out FOLDER, so that it does not replace the study's figures")
    arguments.out = arguments.out or DOCS
    arguments.out.mkdir(parents=True, exist_ok=True)
    return arguments


def own_model(made: argparse.ArgumentParser, file: str) -> None:
    """Options of a model and rows that are not the demonstration's."""
    made.add_argument("--model", default="", help="folder of a model; default the demonstration's")
    made.add_argument("--data", default="", help=f"folder with {file}; with --model")


def check_own_model(made: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Both options or neither."""
    if bool(arguments.model) != bool(arguments.data):
        made.error("--model and --data go together")


class Table:
    """A CSV whose rows are written as they are found, so that a study goes on where it was.

    Attributes:
        path: the file; it is made with a header if there is none.
        fields: names of its columns.
        known: its rows, by their first `keys` columns.
    """

    def __init__(self, path: Path, fields: Sequence[str], keys: int) -> None:
        self.path, self.fields, self.keys = path, tuple(fields), keys
        if not path.is_file():
            path.write_text(",".join(fields) + "\n", encoding="utf-8")
        self.known: dict[tuple[str, ...], Row] = {}
        for row in read(path):
            self.known[tuple(row[name] for name in self.fields[:keys])] = row

    def add(self, values: Iterable[object]) -> Row:
        """A row at the end."""
        row = dict(zip(self.fields, map(str, values), strict=True))
        with self.path.open("a", encoding="utf-8", newline="") as lines:
            csv.DictWriter(lines, self.fields, lineterminator="\n").writerow(row)
        self.known[tuple(row[name] for name in self.fields[: self.keys])] = row
        return row


def read(path: Path) -> list[Row]:
    """The rows of a CSV; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % confidence interval; NaN where there is none."""
    from scipy.stats import t

    mean = statistics.fmean(values)
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return mean, math.nan
    error = statistics.stdev(values) / math.sqrt(len(values))
    return mean, float(t.ppf(0.975, len(values) - 1)) * error


def figure(size: tuple[float, float], rows: int = 1, columns: int = 1) -> tuple[Any, list[Any]]:
    """A figure without a window, and its axes row by row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    return made, list(axes.flat)


def save(made: Any, path: Path) -> None:
    """The figure as a PNG that depends on nothing but what is drawn."""
    from matplotlib import pyplot

    made.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(made)
