"""The reference of commands, made from the command line's own declarations.

The application is the one that the console script `fedforward` runs.
"""

import importlib
from typing import Any

import typer

MODULE, NAME = "fedforward.cli.main", "app"


def page() -> str:
    """The page, in Markdown."""
    application = getattr(importlib.import_module(MODULE), NAME)
    group: Any = typer.main.get_command(application)
    parts = [
        "# Commands\n",
        "This page is made from the command line itself; `fedforward COMMAND --help` says the "
        "same. A mistake of the user's is one sentence on standard error and exit code 2. "
        "Ctrl-C ends with exit code 130.\n",
    ]
    for name, command in _leaves(group, "fedforward"):
        parts.append(f"## `{name}`\n")
        parts.append(f"{(command.help or '').strip()}\n")
        usage = " ".join(_usage(parameter) for parameter in _visible(command))
        parts.append(f"```text\n{name} {usage}".rstrip() + "\n```\n")
        parts.append(_table(command))
    return "\n".join(parts)


def _leaves(command: Any, name: str) -> list[tuple[str, Any]]:
    """Every command that does something, with all words that it is typed with."""
    inner = getattr(command, "commands", None)
    if not inner:
        return [(name, command)]
    found = [] if not _visible(command) else [(name, command)]
    for word, part in inner.items():
        if not part.hidden:
            found += _leaves(part, f"{name} {word}")
    return found


def _visible(command: Any) -> list[Any]:
    return [part for part in command.params if not getattr(part, "hidden", False)]


def _names(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return str(parameter.name).upper()
    return ", ".join((*parameter.opts, *parameter.secondary_opts))


def _takes_value(parameter: Any) -> bool:
    return not getattr(parameter, "is_flag", False) and parameter.param_type_name == "option"


def _usage(parameter: Any) -> str:
    shown = _names(parameter).split(", ")[0]
    if _takes_value(parameter):
        shown += f" {parameter.type.name.upper()}"
    if parameter.multiple or parameter.nargs == -1:
        shown += " …"
    return shown if parameter.required else f"[{shown}]"


def _table(command: Any) -> str:
    rows = ["| argument | default | what it is |", "|---|---|---|"]
    for parameter in _visible(command):
        default = parameter.default
        if callable(default) or default in (None, False, []):
            shown = "required" if parameter.required else ""
        else:
            shown = f"`{default}`"
        words = (getattr(parameter, "help", None) or "").replace("|", "\\|")
        rows.append(f"| `{_names(parameter)}` | {shown} | {words} |")
    return "\n".join(rows) + "\n" if len(rows) > 2 else ""
