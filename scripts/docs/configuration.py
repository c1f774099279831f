"""The reference of configuration keys, made from the schema by introspection."""

import re
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from fedforward.config.fields import Section, names_of
from fedforward.config.names import known
from fedforward.config.schema import Config
from fedforward.config.site import SiteConfig
from fedforward.core.registry import METHODS
from fedforward.methods.parameters import parameters_of

FILES: dict[type[Section], tuple[str, str]] = {
    Config: (
        "A run",
        "The configuration of `fedforward run`, `plan` and `server`. `fedforward init run.toml` "
        "writes it with every key. A server's file leaves out `model.path` and `data.source`.",
    ),
    SiteConfig: (
        "A site",
        "The configuration of `fedforward client`, which stays at the site. "
        "`fedforward init site.toml --site` writes it with every key.",
    ),
}


def sections(kind: type[BaseModel]) -> Iterator[tuple[str, str, type[BaseModel]]]:
    """Name, docstring and class of each section of a file."""
    for name, field in kind.model_fields.items():
        section = _section(field.annotation)
        if section is not None:
            yield name, section.__doc__ or "", section


def _section(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def page() -> str:
    """The page, in Markdown."""
    parts = [
        "# Configuration keys\n",
        "This page is made from the schema. A file is TOML; on the command line a key is written "
        "`section.key=value`. Unknown keys and values outside the limits are refused, with exit "
        "code 2.\n",
    ]
    for file, (title, introduction) in FILES.items():
        parts.append(f"## {title}\n\n{introduction}\n")
        for section, docstring, kind in sections(file):
            anchor = f"{file.__name__.lower()}-{section}"
            parts.append(f"### `[{section}]` {{ #{anchor} }}\n")
            extra = re.sub(r"^\[\w+\][,.]?\s*", "", docstring.strip().splitlines()[0])
            if extra:
                parts.append(extra[0].upper() + extra[1:].rstrip(".") + ".\n")
            parts.append(_table(kind))
    parts.append(
        "## Settings of methods\n\nA method declares settings of its own. They stand in "
        "`[method]` beside the other keys, and are refused with another method.\n"
    )
    parts.append(_settings())
    return "\n".join(parts)


def _settings() -> str:
    """What each known method declares beside the keys that all share."""
    rows = ["| key | method | default | allowed | what it is |", "|---|---|---|---|---|"]
    for name in METHODS:
        for own in parameters_of(METHODS.get(name)).values():
            default = f'"{own.default}"' if isinstance(own.default, str) else own.default
            cells = (f"`{own.name}`", f"`{name}`", f"`{default}`", own.allowed, own.meaning)
            rows.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _table(kind: type[BaseModel]) -> str:
    rows = ["| key | default | allowed | what it is |", "|---|---|---|---|"]
    for key, field in kind.model_fields.items():
        # Braces at the end of a cell would be read as the cell's attributes.
        description = (field.description or "").replace("{", "&#123;").replace("}", "&#125;")
        cells = (f"`{key}`", _default(field), allowed(field), description)
        rows.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True) if not field.is_required() else None
    if field.is_required() or value is PydanticUndefined:
        return "required"
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, str):
        shown = value.replace("\n", "\\n")
        return f'`"{shown}"`'
    return f"`{value!r}`"


def allowed(field: FieldInfo) -> str:
    """What a key takes: its values, or its type with its limits."""
    kinds = list(dict.fromkeys(_kinds(field.annotation)))
    if (registered := names_of(field)) is not None:
        names = known(registered)
        listed = ", ".join(f'`"{name}"`' for name in names) + ", or what a plugin registers"
        kinds = [f"list of {listed}" if kinds[0].startswith("list") else listed]
    limits = []
    for constraint in _constraints(field):
        for name, word in (("gt", "above"), ("ge", "at least"), ("lt", "below"), ("le", "at most")):
            value = getattr(constraint, name, None)
            if value is not None:
                limits.append(f"{word} {value}" if value != 2**63 else "below 2^63")
    return " or ".join(kinds) + (f", {', '.join(limits)}" if limits else "")


def _kinds(annotation: Any) -> Iterator[str]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    names = {int: "whole number", float: "number", str: "text", bool: "true or false"}
    if origin is Literal:
        yield from (f"`{value!r}`".replace("'", '"') for value in arguments)
    elif origin is list or origin is tuple:
        yield f"list of {' or '.join(_plural(kind) for kind in _kinds(arguments[0]))}"
    elif origin is dict:
        yield "table of texts" if arguments[1] is str else "table"
    elif hasattr(annotation, "__metadata__"):
        yield from _kinds(arguments[0])
    elif arguments:
        for argument in arguments:
            if argument is not type(None):
                yield from _kinds(argument)
    else:
        yield names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _plural(kind: str) -> str:
    return kind + "s" if kind in ("whole number", "number", "text") else kind


def _constraints(field: FieldInfo) -> list[Any]:
    found = list(field.metadata)
    for argument in get_args(field.annotation):
        for extra in getattr(argument, "__metadata__", ()):
            found += getattr(extra, "metadata", [extra])
    return found
