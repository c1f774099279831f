"""A diagnosis as one HTML page: the tables of the console, and the pictures, inlined."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from fedforward.analysis.result import Diagnosis
from fedforward.cli.diagnosis_tables import render
from fedforward.reporting.page import rendered


def page(found: Diagnosis, pictures: Sequence[Path]) -> str:
    """The page; it needs no other file, no script and no network.

    Args:
        pictures: PNG files.
    """
    shown = [
        {
            "title": path.stem.replace("-", " "),
            "source": f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}",
        }
        for path in pictures
    ]
    title = f"Diagnosis of {Path(found.setting.model).name}"
    parts = [_part(each) for each in render(found)]
    return rendered("diagnosis.html", title=title, parts=parts, pictures=shown)


def _part(shown: Any) -> dict[str, Any]:
    """A table of the console as titles and rows, or a text."""
    if not isinstance(shown, Table):
        return {"text": str(shown)}
    columns = [[str(cell) for cell in column.cells] for column in shown.columns]
    return {
        "text": "",
        "title": str(shown.title),
        "head": [str(column.header) for column in shown.columns],
        "rows": list(zip(*columns, strict=True)),
    }
