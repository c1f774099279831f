"""Every sentence that a user can be shown, collected from the source by its syntax tree.

A value that is filled in at run time is shown as its expression between angle quotes.
"""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

#: Exceptions whose message is written for the user, and where a plain ValueError is one too.
SHOWN = {
    "FedForwardError",
    "MessageError",
    "QuorumError",
    "DivergenceError",
    "UpdateNotFiniteError",
}
VALUE_ERRORS_OF = "config"


def sentences(package: Path) -> Iterator[tuple[str, str]]:
    """(room, sentence) of each error that is raised with a sentence.

    Args:
        package: the folder `src/fedforward`.
    """
    for path in sorted(package.rglob("*.py")):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)):
                continue
            name = getattr(node.exc.func, "id", getattr(node.exc.func, "attr", ""))
            shown = name in SHOWN or (name == "ValueError" and room == VALUE_ERRORS_OF)
            if shown and node.exc.args:
                text = _text(node.exc.args[0])
                if " " in text.strip():
                    yield room, text


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return f"‹{ast.unparse(node.value)}›" if _short(node.value) else "‹…›"
    return ""


def _short(node: ast.expr) -> bool:
    """Whether an expression says something to a reader: a name, or a name's attribute."""
    return isinstance(node, ast.Name | ast.Attribute)


def page(package: Path) -> str:
    """The page, in Markdown."""
    by_room = defaultdict(list)
    for room, sentence in sentences(package):
        by_room[room].append(" ".join(sentence.split()))
    parts = [
        "# All error sentences\n",
        "This page is made from the source. ‹…› stands for what is filled in. "
        "[Troubleshooting](../troubleshooting.md) says what to do about each family.\n",
    ]
    for room, found in sorted(by_room.items()):
        parts.append(f"## `{room}`\n")
        parts += [f"- {_escaped(sentence)}" for sentence in sorted(set(found))]
        parts.append("")
    return "\n".join(parts)


def _escaped(sentence: str) -> str:
    for sign in "\\`*_[]{}<>#|":
        sentence = sentence.replace(sign, "\\" + sign)
    return sentence
