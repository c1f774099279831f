"""What a site will not do, whatever the terms say: `[limits]` of its `site.toml`.

Terms are another party's. Nothing in them has been checked when they are looked at here. Imports
no PyTorch.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedforward.config import rules
from fedforward.config.site import SiteConfig
from fedforward.core.errors import FedForwardError
from fedforward.core.paths import home
from fedforward.core.registry import METHODS
from fedforward.data import chat
from fedforward.data.readers import begins
from fedforward.data.templates import Template

Terms = Mapping[str, Any]
#: Most entries of lists and tables that terms may have.
_LONGEST = {
    "data.classes": 1000,
    "data.label_words": 1000,
    "evaluation.metrics": 20,
    "lora.targets": 100,
    "method.parameters": 100,
    "method.report_filters": 20,
    "model.blocks": 10_000,
}
#: Characters of a refusal in the site's log.
_MOST_SHOWN = 1000
_NAME = re.compile(r"[\w.-]{1,200}")
#: A key of the terms, and what is wrong with its value.
Refused = tuple[str, str]


def refusals(given: Terms, settings: SiteConfig) -> list[Refused]:
    """Why a site will not take part on these terms: a key and a sentence each; usually none.

    Args:
        given: terms as a server sent them.
        settings: the site's own file, with its limits.

    Example:
        >>> refusals({**terms, "lora": {"rank": 1000}}, settings)
        [('lora.rank', "lora.rank = 1000 is above this site's limits.rank = 64")]
    """
    found = [*_too_much(given, settings), *_not_allowed(given, settings)]
    found += _too_long(given)
    found += _unreleased(given, settings)
    return [(key, f"{key} = {_shown(words)}") for key, words in found]


def _too_much(given: Terms, settings: SiteConfig) -> Iterator[Refused]:
    limits = settings.limits
    for key, most in (
        ("federation.rounds", limits.rounds),
        ("method.local_steps", limits.local_steps),
        ("method.directions", limits.directions),
        ("method.batch_size", limits.batch_size),
        ("lora.rank", limits.rank),
        ("data.answer_tokens", limits.answer_tokens),
    ):
        value = _value(given, key)
        if type(value) is not int or value > most:
            yield key, f"{value!r} is above this site's limits.{key.partition('.')[2]} = {most}"


def _not_allowed(given: Terms, settings: SiteConfig) -> Iterator[Refused]:
    limits = settings.limits
    for key, legal in (("model.tune", limits.tune), ("model.head", limits.head)):
        if (value := _value(given, key)) not in legal:
            limit = key.partition(".")[2]
            yield key, f"{value!r} is not in this site's limits.{limit} = {list(legal)!r}"
    found = _value(given, "federation.secure_threshold")
    least = found if _value(given, "federation.secure_sums") is True else 1
    if type(least) is not int or least < limits.sum_of:
        words = (
            f"{found!r}, with secure_sums = {_value(given, 'federation.secure_sums')!r}, is below"
        )
        yield "federation.secure_threshold", f"{words} this site's limits.sum_of = {limits.sum_of}"
    name = _value(given, "method.name")
    if isinstance(name, str) and name in METHODS and not rules.capabilities(name).forward_only:
        yield "method.name", f"{name!r} would send tensors, and this site sends scalars only"
    for key in ("method.objective", "evaluation.metrics"):
        value = _value(given, key)
        names = value if isinstance(value, list) else [value]
        if any(":" in str(name) for name in names) and not limits.functions:
            words = "would be run as Python code here, and this site has limits.functions = false"
            yield key, f"{value!r} {words}"
    if (partition := _value(given, "federation.partition")) != "iid":
        yield "federation.partition", f"{partition!r} divides a site's rows by a field of theirs"


def _too_long(given: Terms) -> Iterator[Refused]:
    """Lists that would take a site long to look at, and patterns that may never end."""
    for key, most in _LONGEST.items():
        value = _value(given, key)
        if isinstance(value, list | dict) and len(value) > most:
            yield key, f"a list of {len(value)}, and a site looks at {most} at most"
    targets = _value(given, "lora.targets")
    names = targets if isinstance(targets, list) else [targets]
    if targets is not None and not all(isinstance(n, str) and _NAME.fullmatch(n) for n in names):
        yield "lora.targets", "a pattern; a site takes 'all-linear' and names of modules"


def spending_folder(settings: SiteConfig) -> Path:
    """Where a site keeps what it has answered with noise, and what that has cost."""
    return home(settings.site.out) / "privacy"


def released(settings: SiteConfig) -> set[str]:
    """The fields that terms may name, with all that lies in them."""
    return {*settings.limits.fields, *(settings.data.fields or {})}


def _unreleased(given: Terms, settings: SiteConfig) -> Iterator[Refused]:
    """Keys of the terms that name fields which the site has not released."""
    open_fields = released(settings)
    for key in ("data.prompt", "data.answer", "data.chat"):
        try:
            paths = _fields_of(key, given, settings)
        except FedForwardError as error:
            yield key, f"{_value(given, key)!r} cannot be read: {error}"
            continue
        closed = [path for path in paths if not any(begins(name, path) for name in open_fields)]
        if closed:
            listed = sorted(open_fields)
            yield (
                key,
                f"{_value(given, key)!r} names {', '.join(map(repr, closed))}, and this site has "
                f"released {', '.join(map(repr, listed)) or 'no fields'} (limits.fields)",
            )


def _fields_of(key: str, given: Terms, settings: SiteConfig) -> list[str]:
    """The fields that a key of the terms names.

    Raises:
        FedForwardError: it holds no template.
    """
    value, own_chat = _value(given, key), settings.data.chat is not None
    if key == "data.chat":
        if value is None or own_chat:
            return []
        wanted, more = chat.paths(_text(value))
        return [*wanted, *more]
    if own_chat or _value(given, "data.chat") is not None:
        # A conversation is read in place of what the templates name.
        return []
    return Template.parse(_text(value), key).paths


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise FedForwardError("it is no text")
    return value


def _value(content: Terms, key: str) -> Any:
    """The value of `section.key`; None where there is none."""
    section, _, name = key.partition(".")
    part = content.get(section)
    return part.get(name) if isinstance(part, dict) else None


def _shown(words: str) -> str:
    """Words with a value of the terms in front, as long as a log can bear."""
    return words if len(words) <= _MOST_SHOWN else f"{words[: _MOST_SHOWN // 2]} … {words[-200:]}"
