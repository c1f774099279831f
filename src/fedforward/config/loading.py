"""Reading a configuration from TOML and `section.key=value`, with errors that help.

Every error names the key as the user typed it, the value found and what is allowed. For an unknown
key it names the nearest legal one, and for an old key or value the new one.
"""

import difflib
import tomllib
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import ValidationError

from fedforward.config import toml_text
from fedforward.config.fields import Section, choices, names_of
from fedforward.config.names import allowed
from fedforward.config.schema import Config, sections_of
from fedforward.core.errors import FedForwardError
from fedforward.core.registry import METHODS
from fedforward.methods.base import method_class, usable_methods
from fedforward.methods.parameters import parameters_of

Sections = TypeVar("Sections", bound=Section)
#: Keys that had another name before, and what each is called now in the same section.
OLD_KEYS = {
    "method.strategy": "client_rates",
    "method.spread": "rate_spread",
    "model.resting": "offload",
    "server.decay": "state_decay",
    "simulation.failing": "dropout",
    "simulation.slow": "straggler",
    "simulation.lying": "byzantine",
    "simulation.late": "late_join",
    "simulation.late_round": "late_join_round",
    "site.keep_letters": "keep_messages",
    "limits.full_tuning": "tune",
}
#: Values that had another name before, by the key of today.
OLD_VALUES = {
    "federation.partition": {"by": "by-field"},
    "model.offload": {"device": "none"},
    "run.trajectory": {"generate": "recompute", "copy": "cache"},
}


class Content(dict[str, Any]):
    """The content of a file, which knows where each key stands.

    Attributes:
        places: by section and by `section.key`, such as "line 7" or "on the command line".
    """

    def __init__(self, content: Mapping[str, Any], places: Mapping[str, str]) -> None:
        super().__init__(content)
        self.places = places


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file and apply `section.key=value` overrides.

    Relative paths stay as they are: they are relative to the folder of this process.

    Raises:
        FedForwardError: no such file, not TOML, or a key or value that is not legal.
    """
    return validate(read_toml(path, overrides), str(path))


def read_toml(path: Path, overrides: Sequence[str] = ()) -> Content:
    """The content of a TOML file with `section.key=value` overrides, nothing checked yet.

    Raises:
        FedForwardError: no such file, not TOML (with the line), or an override that is none.
    """
    file = toml_text.read(path)
    places = {key: f"line {number}" for key, number in file.lines.items()}
    content = Content(file.content, places)
    for override in overrides:
        section, key, value = parse_override(override)
        assign(content, section, key, value, str(path))
        places[f"{section}.{key}"] = "on the command line"
    return content


def assign(
    content: MutableMapping[str, Any], section: str, key: str, value: Any, origin: str
) -> None:
    """Set a key of a section; dots in the key lead into tables, as in `parameters.tau`.

    Raises:
        FedForwardError: what should be a section or a table is something else.
    """
    *tables, last = key.split(".")
    place: Any = content.setdefault(section, {})
    if not isinstance(place, dict):
        raise FedForwardError(f"{origin}: {section} must be a section, written [{section}].")
    for depth, table in enumerate(tables):
        place = place.setdefault(table, {})
        if not isinstance(place, dict):
            name = ".".join([section, *tables[: depth + 1]])
            raise FedForwardError(
                f"{origin}: {name} = {place!r} is no table, so {section}.{key} cannot be set."
            )
    place[last] = value


def parse_override(text: str) -> tuple[str, str, Any]:
    """("section", "key", value) of `section.key=value`; the value is TOML, or else a string."""
    try:
        # Python keeps bytes of the command line that its encoding does not know as surrogates.
        text = text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError as error:
        raise FedForwardError(f"{text!r} is no UTF-8 text. Write it in UTF-8.") from error
    name, equals, raw = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and all(key.split("."))):
        raise FedForwardError(
            f"{text!r} is not an override. Write section.key=value, as in federation.rounds=50."
        )
    try:
        content = tomllib.loads(f"value = {raw}")
    except (ValueError, RecursionError):
        value = raw.strip()
        if value[:1] == value[-1:] == '"' and len(value) > 1 and "\\" in value:
            raise FedForwardError(
                f"{text!r}: a backslash in double quotes begins an escape. Leave the double quotes "
                "out, or write forward slashes."
            ) from None
        return section, key, raw
    # Text with a line break may read as a second key.
    return section, key, content["value"] if len(content) == 1 else raw


def validate(content: Mapping[str, Any], origin: str = "configuration") -> Config:
    """A `Config` from nested dictionaries.

    Raises:
        FedForwardError: with a line for each thing that is wrong.
    """
    return validate_as(Config, content, origin)


def validate_as(kind: type[Sections], content: Mapping[str, Any], origin: str) -> Sections:
    """A file of sections of any kind; see `validate`."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        sections = sections_of(kind)
        places = content.places if isinstance(content, Content) else {}
        # A value that fits no branch of a union is a problem for each branch; one is enough.
        problems = list(
            {
                problem["loc"][:2]: _place(problem, places) + _sentence(problem, sections, content)
                for problem in error.errors()[::-1]
            }.values()
        )[::-1]
        head = f"{origin}: " if len(problems) == 1 else f"{origin}:\n  "
        raise FedForwardError(head + "\n  ".join(problems)) from error


def _place(problem: Any, places: Mapping[str, str]) -> str:
    """Where the key of a problem stands, in front of its sentence; empty if that is not known."""
    key = ".".join(str(part) for part in problem["loc"][:2])
    place = places.get(key) or next((p for k, p in places.items() if k.startswith(f"{key}.")), "")
    return f"{place}: " if key and place else ""


def renamed(key: str, value: Any) -> str | None:
    """The sentence for an old key or value, without a full stop; None for all others.

    Args:
        key: with its section, as in "method.strategy".
    """
    section, _, name = key.partition(".")
    now = f"{section}.{OLD_KEYS.get(key, name)}"
    values = OLD_VALUES.get(now, {})
    new = values.get(value) if isinstance(value, str) else None
    if key not in OLD_KEYS:
        return None if new is None else f"{key} = {value!r} is now {new!r}"
    return f"{key} is now {now}" if new is None else f"{key} = {value!r} is now {now} = {new!r}"


def _sentence(
    problem: Any, sections: Mapping[str, type[Section]], content: Mapping[str, Any]
) -> str:
    """One validation problem in the user's words."""
    # What follows section and key is pydantic's: a branch of a union, a place in a list.
    location = [str(part) for part in problem["loc"][:2]]
    key, kind, found = ".".join(location), problem["type"], problem["input"]
    if len(problem["loc"]) > 2:
        found = content[location[0]][location[1]]
    if len(location) == 2 and (moved := renamed(key, found)):
        return f"{moved}."
    if kind == "string_unicode" and len(location) < 2:
        # Only a site's JSON can have such keys; a file cannot.
        return f"a key in {key or 'it'} is not text: {found!r}."
    if kind == "string_unicode":
        return f"{key} = {found!r} is no UTF-8 text. Write it in UTF-8."
    if kind == "extra_forbidden":
        legal = list(sections if len(location) == 1 else sections[location[0]].model_fields)
        if location[0] == "method" and len(location) == 2:
            owners = owners_of(location[1])
            if owners:
                name = content["method"].get("name", "fedmezo")
                return (
                    f"{key} is a setting of method.name = {' and '.join(map(repr, owners))}, and "
                    f"method.name is {name!r}. Leave it out."
                )
            legal += _settings(content["method"].get("name", "fedmezo"))
        hint = _misplaced(location, legal, sections, isinstance(found, Mapping))
        what = "section" if len(location) == 1 else "key"
        return f"{key} is not a known {what}.{hint} Allowed are {', '.join(legal)}."
    if kind == "missing":
        if len(location) == 1:
            return f"the section [{key}] is missing. `fedforward init` writes a commented example."
        field = sections[location[0]].model_fields[location[1]]
        return f"{key} is missing ({field.description})."
    if kind == "value_error":
        if len(problem["loc"]) == 2 and isinstance(found, str) and _takes_a_name(key, sections):
            # The sentence begins with the name.
            return f"{key} = {problem['ctx']['error']}."
        return f"{key}: {problem['ctx']['error']}." if key else f"{problem['ctx']['error']}."
    if kind in ("model_type", "model_attributes_type"):
        return f"{key} = {found!r} must be a section, written [{key}]."
    field = sections[location[0]].model_fields[location[1]]
    return f"{key} = {found!r} is not allowed: {_allowed(field)}."


def _misplaced(
    location: Sequence[str],
    legal: Sequence[str],
    sections: Mapping[str, type[Section]],
    table: bool,
) -> str:
    """What an unknown section or key should have been, after a space; empty if nothing is near.

    Args:
        table: whether its value is a table.
    """
    *before, name = location
    owners = (
        []
        if table
        else [section for section, kind in sections.items() if name in kind.model_fields]
    )
    if before and name in sections:
        return f" [{name}] is a section of its own: write [{name}], not [{before[0]}.{name}]."
    if owners and not (before and difflib.get_close_matches(name.lower(), legal, n=1)):
        keys = " or ".join(f"{section}.{name}" for section in owners)
        return f" There is {keys}: write it below [{owners[0]}]."
    near = difflib.get_close_matches(name.strip().lower(), legal, n=1)
    return f" Did you mean {'.'.join([*before, near[0]])}?" if near else ""


def owners_of(setting: str) -> list[str]:
    """The methods that declare a setting of that name."""
    return [name for name, kind in usable_methods().items() if setting in parameters_of(kind)]


def _settings(method: object) -> list[str]:
    if not isinstance(method, str) or method not in METHODS:
        return []
    return list(parameters_of(method_class(method)))


def _takes_a_name(key: str, sections: Mapping[str, type[Section]]) -> bool:
    section, _, name = key.partition(".")
    return names_of(sections[section].model_fields[name]) is not None


def _allowed(field: Any) -> str:
    """What a key takes, from its declared type."""
    types, kind = str(field.annotation), names_of(field)
    if kind is not None:
        noun = "a list of texts" if types.startswith("list") else "text in quotes"
        return f"it must be {noun}. {allowed(kind)}"
    if named := choices(field):
        return "it must be one of " + ", ".join(map(repr, named))
    limits = []
    for constraint in _constraints(field):
        for name, word in (("gt", "above"), ("ge", "at least"), ("lt", "below"), ("le", "at most")):
            if getattr(constraint, name, None) is not None:
                limits.append(f"{word} {getattr(constraint, name)}")
    words = [
        f", or {word!r}"
        for part in get_args(field.annotation)
        if get_origin(part) is Literal
        for word in get_args(part)
    ]
    limit = f", {' and '.join(limits)}" if limits else ""
    return f"it must be {_noun(types)}{limit}{''.join(words)}"


def _noun(types: str) -> str:
    """What values of a type are called; the first part of its text that is found decides."""
    for part, noun in (
        ("dict[str, bool", "a table of numbers, texts, true and false such as { tau = 0.5 }"),
        ("dict", "a table of texts such as { 0 = ' no', 1 = ' yes' }"),
        ("str | list[int]", "text or a list of whole numbers"),
        ("str | list", "text or a list of texts"),
        ("list[int]", "a list of whole numbers"),
        ("list", "a list of texts"),
        ("str", "text in quotes"),
        ("bool", "true or false"),
        ("float", "a number"),
        ("int", "a whole number"),
    ):
        if part in types:
            return noun
    raise AssertionError(types)


def _constraints(field: Any) -> list[Any]:
    found = list(field.metadata)
    for argument in get_args(field.annotation):
        for extra in getattr(argument, "__metadata__", ()):
            found += getattr(extra, "metadata", [extra])
    return found
