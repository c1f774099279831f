"""A comparison as tables that fit a terminal."""

from typing import Any

from rich.table import Table
from rich.text import Text

from fedforward.reporting.comparison import Results, cells, digits, head, sentences


def render(results: Results) -> list[Any]:
    """Title, figures, and what can be told apart.

    The figures are in two tables, as one is wider than a terminal.
    """
    names, rows = head(results), [cells(row, results) for row in results.rows]
    cut = names.index("rounds")
    first, last = list(range(cut)), [0, *range(cut, len(names))]
    title = f"held-out {results.measure}, of the base model {results.before.text(digits)}"
    if results.matched:
        title += f"; equal for all: {results.matched}"
    parts: list[Any] = [Text(title), "", _table(first, names, rows, results.measure)]
    parts += ["", _table(last, names, rows, results.measure)]
    told = [*sentences(results), *results.remarks]
    return parts + (["", *map(Text, told)] if told else [])


def _table(wanted: list[int], names: list[str], rows: list[list[str]], measure: str) -> Table:
    """The columns of these numbers; the title has said what is measured."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for place in wanted:
        name = names[place]
        words = name in ("method", "verdict")
        table.add_column(
            name.removesuffix(f" held-out {measure}"),
            justify="left" if words else "right",
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(Text(row[place]) for place in wanted))
    return table
