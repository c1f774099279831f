"""The tables of docs/performance.md, in Markdown, from what the benchmarks print with `--json`.

    python benchmarks/tables.py FOLDER      # with step.json, memory.json, …

A figure that has a reach shows it; one that falls short of it is set in bold.
"""

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

from common import Column, Reach

BENCHMARKS = ("directions", "step", "memory", "simulation", "replay", "llama3b")


def markdown(content: dict[str, Any], columns: tuple[Column, ...]) -> str:
    """One benchmark's rows as a table; columns without any value are left out."""
    rows = content["rows"]
    shown = [c for c in columns if any(row.get(c.key) is not None for row in rows)]
    lines = ["| " + " | ".join(column.title for column in shown) + " |"]
    lines.append("|" + "|".join("---:" if column.form else "---" for column in shown) + "|")
    lines += ["| " + " | ".join(cell(row, column) for column in shown) + " |" for row in rows]
    return "\n".join(lines)


def cell(row: dict[str, Any], column: Column) -> str:
    """A value with its reach."""
    text = column.cell(row)
    reach = row["reaches"].get(column.key)
    if reach is None:
        return text
    sign, limit = reach.split()
    met = Reach({"≤": "<=", "≥": ">=", "<": "<"}[sign], float(limit)).met(row[column.key])
    return text if met else f"**{text}**"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for name in BENCHMARKS:
        path = folder / f"{name}.json"
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            columns = importlib.import_module(name).COLUMNS
            print(f"### `{name}.py`\n\n{markdown(content, columns)}\n")
            print("\n".join(content["remarks"]), end="\n\n")


if __name__ == "__main__":
    main()
