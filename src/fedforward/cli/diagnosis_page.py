"""A diagnosis as one HTML page: the tables as a console shows them, and the pictures, inlined."""

import base64
from collections.abc import Sequence
from html import escape
from io import StringIO
from pathlib import Path

from rich.console import Console

from fedforward.analysis.result import Diagnosis
from fedforward.cli.diagnosis_tables import render

#: Characters of a line of the page's tables.
WIDTH = 110
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>body {{ max-width: 60rem; margin: 1rem auto; padding: 0 1rem; color: #111;
background: #fff; font-family: sans-serif }} pre {{ overflow-x: auto }} img {{ max-width: 100% }}
</style></head><body><h1>{title}</h1><pre>{tables}</pre>{pictures}</body></html>
"""


def page(found: Diagnosis, pictures: Sequence[Path]) -> str:
    """The page; it needs no other file and no network.

    Args:
        pictures: PNG files.
    """
    console = Console(file=StringIO(), width=WIDTH, color_system=None)
    for part in render(found):
        console.print(part, "")
    text = console.file.getvalue()  # type: ignore[attr-defined]
    images = "".join(
        f'<p><img alt="{escape(path.stem)}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}"></p>'
        for path in pictures
    )
    title = f"Diagnosis of {Path(found.setting.model).name}"
    return _PAGE.format(title=escape(title), tables=escape(text), pictures=images)
