"""Writing a configuration as TOML: a whole one, or a commented example with every key."""

import json
from typing import Any

from fedforward.config.fields import Section, choices
from fedforward.config.schema import Config, sections_of
from fedforward.methods.base import usable_methods
from fedforward.methods.parameters import Parameter, parameters_of


def to_toml(config: Config) -> str:
    """The configuration as TOML, every key written out, values exactly as they are."""
    lines = []
    for section, values in config.model_dump(exclude_none=True).items():
        lines.append(f"[{section}]")
        if section == "method":
            values |= values.pop("parameters", {})
        lines += [f"{key} = {toml_value(value)}" for key, value in values.items()]
        lines.append("")
    return "\n".join(lines)


def toml_value(value: Any) -> str:
    """A value of a configuration as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if isinstance(value, dict):
        items = (f"{toml_value(key)} = {toml_value(item)}" for key, item in value.items())
        return "{ " + ", ".join(items) + " }" if value else "{}"
    if isinstance(value, str):
        # TOML's basic strings take JSON's escapes, once the delete character is escaped too.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def example() -> str:
    """A commented configuration with every key, for `fedforward init`."""
    return example_of(
        Config,
        "# A fedforward run: `fedforward run THIS_FILE`. Commented keys show their defaults.",
    )


def example_of(kind: type[Section], head: str) -> str:
    """A commented file with every key of a kind of configuration."""
    given = {
        "model.path": '"path/to/model"',
        "data.source": '"data.jsonl"',
    }
    lines = [head, ""]
    for section, part in sections_of(kind).items():
        lines.append(f"[{section}]")
        for key, field in part.model_fields.items():
            if field.annotation == dict[str, bool | int | float | str]:
                lines += _settings()
                continue
            named = choices(field)
            listed = f" ({' | '.join(named)})" if named else ""
            lines.append(f"# {field.description}{listed}")
            if f"{section}.{key}" in given:
                lines.append(f"{key} = {given[f'{section}.{key}']}")
            elif field.default is None:
                lines.append(f"# {key} =")
            else:
                lines.append(f"# {key} = {toml_value(field.default)}")
        lines.append("")
    return "\n".join(lines)


def _settings() -> list[str]:
    """The settings of single methods, which stand in [method] beside the others."""
    owners: dict[Parameter, list[str]] = {}
    for name, kind in usable_methods().items():
        for setting in parameters_of(kind).values():
            owners.setdefault(setting, []).append(name)
    lines = []
    for setting, names in owners.items():
        listed = f" ({' | '.join(setting.choices)})" if setting.choices else ""
        lines.append(f"# {', '.join(names)} only: {setting.meaning}{listed}")
        lines.append(f"# {setting.name} = {toml_value(setting.default)}")
    return lines
