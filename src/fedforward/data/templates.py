"""Prompt and answer templates: text in which braces stand for a row's fields.

`{name}` is a field's text, `{a.text}`, `{a[0]}` and `{messages[-1].content}` reach into what a
field holds. `{?name}…{/name}` is a part that is there only if the field has text, `{^name}…{/name}`
one that is there only if it has none. A plain brace is written `{{` or `}}`.
"""

import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fedforward.core.errors import FedForwardError

#: Begins a part that is there if the field has text, if it has none, and ends either.
_IF, _UNLESS, _END = "?", "^", "/"


@dataclass(frozen=True)
class Text:
    """Text that stands in every row."""

    text: str


@dataclass(frozen=True)
class Field:
    """A field's text; nothing where it is null."""

    path: str


@dataclass(frozen=True)
class Optional:
    """Parts that are there only if a field has text that is not blank, or only if it has none."""

    path: str
    present: bool
    parts: "tuple[Part, ...]"


Part = Text | Field | Optional


@dataclass(frozen=True)
class Template:
    """A template, parsed.

    Attributes:
        source: as the user typed it.
        parts: in order.

    Example:
        >>> template = Template.parse("Q: {q}{?hint} ({hint}){/hint}", "data.prompt")
        >>> template.fill({"q": "Why?", "hint": None})
        'Q: Why?'
        >>> template.fill({"q": "Why?", "hint": "look"})
        'Q: Why? (look)'
    """

    source: str
    parts: tuple[Part, ...]

    @classmethod
    def parse(cls, source: str, key: str) -> "Template":
        """Read a template.

        Args:
            key: the configuration key, for errors.

        Raises:
            FedForwardError: the braces do not match, are empty, or hold more than a path; or an
                optional part does not end.
        """
        head = f"{key} = {source!r}: "
        try:
            found = list(string.Formatter().parse(source))
        except ValueError as error:
            raise FedForwardError(
                f"{head}{error}. Write fields as {{name}} and a plain brace as {{{{."
            ) from error
        # The innermost part that is open is the last.
        open_parts: list[tuple[str, bool, list[Part]]] = [("", True, [])]
        for literal, name, form, conversion in found:
            if literal:
                open_parts[-1][2].append(Text(literal))
            if name is None:
                continue
            sign, path = (name[0], name[1:]) if name[:1] in (_IF, _UNLESS, _END) else ("", name)
            if not path.strip():
                raise FedForwardError(f"{head}a field needs a name, as in {{question}}.")
            if form or conversion:
                raise FedForwardError(
                    f"{head}only a name may stand between braces, as in {{{path}}}."
                )
            if sign == _END:
                begun, present, inner = open_parts.pop()
                if not open_parts or begun != path:
                    expected = f"{{{_END}{begun}}}" if begun else "nothing"
                    raise FedForwardError(
                        f"{head}{{/{path}}} ends a part where {expected} was to end. "
                        f"Write optional parts as {{?{path}}}…{{/{path}}}."
                    )
                open_parts[-1][2].append(Optional(path, present, tuple(inner)))
            elif sign:
                open_parts.append((path, sign == _IF, []))
            else:
                open_parts[-1][2].append(Field(path))
        if len(open_parts) > 1:
            path = open_parts[-1][0]
            raise FedForwardError(
                f"{head}the part that begins with the field {path} does not end. Write "
                f"{{/{path}}} after it."
            )
        return cls(source, tuple(open_parts[0][2]))

    @property
    def paths(self) -> list[str]:
        """All paths that are looked at, each once, in order."""
        return list(dict.fromkeys(_paths(self.parts)))

    @property
    def shown(self) -> list[str]:
        """The paths whose text is shown, each once, in order."""
        return list(dict.fromkeys(_paths(self.parts, conditions=False)))

    def says_something(self, values: Mapping[str, str | None]) -> bool:
        """Whether a field that is shown, or an optional part, has text.

        Of a template without fields, whether it has any.
        """
        return bool("".join(_said(self.parts, values)).strip()) if self.paths else bool(self.source)

    def fill(self, values: Mapping[str, str | None]) -> str:
        """The text for a row, whose fields' texts are given by path; None is a null."""
        return "".join(_filled(self.parts, values))


def _paths(parts: Sequence[Part], *, conditions: bool = True) -> Iterator[str]:
    for part in parts:
        if isinstance(part, Optional):
            if conditions:
                yield part.path
            yield from _paths(part.parts, conditions=conditions)
        elif isinstance(part, Field):
            yield part.path


def _said(parts: Sequence[Part], values: Mapping[str, str | None]) -> Iterator[str]:
    """The texts of fields and of optional parts."""
    for part in parts:
        if isinstance(part, Field):
            yield values[part.path] or ""
        elif isinstance(part, Optional) and _is_there(part, values):
            yield from _filled(part.parts, values)


def _is_there(part: Optional, values: Mapping[str, str | None]) -> bool:
    return bool((values[part.path] or "").strip()) == part.present


def _filled(parts: Sequence[Part], values: Mapping[str, str | None]) -> Iterator[str]:
    for part in parts:
        if isinstance(part, Text):
            yield part.text
        elif isinstance(part, Field):
            yield values[part.path] or ""
        elif _is_there(part, values):
            yield from _filled(part.parts, values)
