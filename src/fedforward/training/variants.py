"""The variants that a comparison runs: one configuration, with another method or other settings.

A variant has a label and a configuration for each seed. It is what `fedforward run` would carry
out with `method.name` set, except for its learning rate, which is the variant's own. Imports no
PyTorch.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedforward.config.loading import (
    Content,
    assign,
    owners_of,
    parse_override,
    read_toml,
    validate,
)
from fedforward.config.schema import Config
from fedforward.core.errors import FedForwardError
from fedforward.core.registry import METHODS
from fedforward.methods.base import method_class
from fedforward.methods.parameters import parameters_of

MOST_SEEDS = 1000
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
#: Characters of a value in a sentence.
_SHOWN = 80
#: Keys of the data that change no held-out figure.
_NOT_MEASURED = {"data.example", "data.public", "data.public_rows"}
_RATE = ("method", "learning_rate")


@dataclass(frozen=True)
class Variant:
    """What a row of the comparison is.

    Attributes:
        label: its name.
        config: at the first seed.
    """

    label: str
    config: Config

    def at(self, seed: int, *, rounds: int | None = None, every: int | None = None) -> Config:
        """The configuration at a seed, with so many rounds and rounds between evaluations."""
        config = self.config
        run = {"seed": seed} | ({} if every is None else {"evaluate_every": every})
        federation = {} if rounds is None else {"rounds": rounds}
        return config.model_copy(
            update={
                "run": config.run.model_copy(update=run),
                "federation": config.federation.model_copy(update=federation),
            }
        )


def read_variants(
    path: Path,
    overrides: Sequence[str],
    methods: Sequence[str],
    rates: Sequence[str] = (),
    settings: Sequence[str] = (),
) -> list[Variant]:
    """The variants of a configuration file, all of them valid.

    Args:
        overrides: `section.key=value`, for all.
        methods: `METHOD` or `LABEL=METHOD` each; several in a text are divided by commas.
        rates: `LABEL=RATE` each; several in a text are divided by commas.
        settings: `LABEL:section.key=value` each.

    Raises:
        FedForwardError: with what is wrong, and with which variant.
    """
    labels = _labels(methods)
    own = _settings(settings, labels)
    given = _rates(rates, labels)
    content = read_toml(path, overrides)
    for_all = {parse_override(text)[:2] for text in overrides}
    if ("method", "name") in for_all:
        raise FedForwardError(
            "method.name is what --methods says for each variant. Leave the override out."
        )
    found = []
    for label, method in labels.items():
        changed = _content(content, method, keep_rate=_RATE in for_all)
        places = dict(content.places)
        for section, key, value in own[label]:
            assign(changed, section, key, value, f"--set {label}:{section}.{key}")
            places[f"{section}.{key}"] = "in --set"
        if label in given:
            assign(changed, *_RATE, given[label], f"--rates {label}")
            places[".".join(_RATE)] = "in --rates"
        _check_rate(label, method, changed)
        config = validate(Content(changed, places), f"{path}, {label}")
        found.append(Variant(label, config))
    for other in found[1:]:
        check_same_task(found[0].label, found[0].config, other.label, other.config)
    return found


def check_same_task(one: str, config: Config, other: str, its: Config) -> None:
    """Refuse two configurations whose held-out figures are not of the same.

    Args:
        one: what the first is called in a sentence.
        other: what the second is called.

    Raises:
        FedForwardError: other data, another way to measure them, or other metrics.
    """
    first, second = _measured(config), _measured(its)
    for key in first:
        if first[key] != second[key]:
            raise FedForwardError(
                f"{one} and {other} cannot be compared, as their held-out figures are of other "
                f"data or measured otherwise: {key} is {_cut(first[key])} and "
                f"{_cut(second[key])}. Compare what has one task."
            )


def _measured(config: Config) -> dict[str, Any]:
    """What decides which held-out examples there are, and how they are measured."""
    found = {f"data.{key}": value for key, value in config.data.model_dump().items()}
    found |= {f"evaluation.{key}": value for key, value in config.evaluation.model_dump().items()}
    found["evaluation.metrics"] = sorted({*config.metrics, "loss"})
    found["model.head"] = config.model.head
    return {key: value for key, value in found.items() if key not in _NOT_MEASURED}


def _cut(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def check_seeds(count: int, first: int) -> list[int]:
    """The seeds of a comparison.

    Raises:
        FedForwardError: there is none, or too many.
    """
    if not 1 <= count <= MOST_SEEDS or first + count > 2**63:
        raise FedForwardError(
            f"--seeds {count} is not allowed: it is how many seeds there are, from 1 to "
            f"{MOST_SEEDS}. The first is run.seed."
        )
    return list(range(first, first + count))


def _words(texts: Iterable[str]) -> list[str]:
    return [part.strip() for text in texts for part in text.split(",") if part.strip()]


def _labels(methods: Sequence[str]) -> dict[str, str]:
    """Methods by label."""
    found: dict[str, str] = {}
    for word in _words(methods):
        label, equals, method = word.partition("=")
        label, method = label.strip(), method.strip() if equals else label.strip()
        if not _LABEL.fullmatch(label):
            raise FedForwardError(
                f"--methods {word!r}: {label!r} cannot be a label, which names a folder. Use up to "
                "64 letters, digits, '_', '.' and '-', as in few=fedmezo-auto."
            )
        if method not in METHODS:
            near = difflib.get_close_matches(method, METHODS.names(), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise FedForwardError(
                f"--methods {word!r}: {method!r} is not a known method.{hint} Allowed are "
                f"{', '.join(map(repr, METHODS.names()))}."
            )
        if same := [other for other in found if other.lower() == label.lower()]:
            raise FedForwardError(
                f"--methods has the label {same[0]!r} twice. Give one of them another label, as in "
                f"other={method}."
            )
        found[label] = method
    if not found:
        raise FedForwardError(
            "--methods is missing: the methods to compare, divided by commas, as in "
            "--methods fedmezo,decomfl or --methods fedmezo,few=fedmezo-auto."
        )
    return found


def _known(option: str, label: str, labels: Mapping[str, str]) -> str:
    if label not in labels:
        raise FedForwardError(
            f"{option}: {label!r} is not one of --methods, which are "
            f"{', '.join(map(repr, labels))}."
        )
    return label


def _rates(rates: Sequence[str], labels: Mapping[str, str]) -> dict[str, float | str]:
    found: dict[str, float | str] = {}
    for word in _words(rates):
        label, equals, text = word.partition("=")
        if not equals:
            raise FedForwardError(
                f"--rates {word!r} is not allowed: write LABEL=RATE, as in fedmezo=1e-3."
            )
        _known(f"--rates {word}", label.strip(), labels)
        if label.strip() in found:
            raise FedForwardError(f"--rates gives {label.strip()!r} twice. Leave one out.")
        try:
            found[label.strip()] = "auto" if text.strip() == "auto" else float(text)
        except ValueError:
            raise FedForwardError(
                f"--rates {word!r}: {text.strip()!r} is no rate. Give a number above 0, or auto."
            ) from None
    return found


def _settings(
    settings: Sequence[str], labels: Mapping[str, str]
) -> dict[str, list[tuple[str, str, Any]]]:
    found: dict[str, list[tuple[str, str, Any]]] = {label: [] for label in labels}
    for text in settings:
        label, colon, override = text.partition(":")
        if not colon or "=" in label:
            raise FedForwardError(
                f"--set {text!r} is not allowed: write LABEL:section.key=value, as in "
                "fedmezo:method.mu=0.01."
            )
        _known(f"--set {text}", label.strip(), labels)
        section, key, value = parse_override(override)
        if (section, key) in (("method", "name"), ("run", "seed"), ("federation", "rounds")):
            option = {"method": "--methods", "run": "run.seed=N for all, and --seeds"}.get(
                section, "federation.rounds=N for all, or --match and --budget"
            )
            raise FedForwardError(
                f"--set {text}: {section}.{key} cannot be a variant's own. Use {option}."
            )
        found[label.strip()].append((section, key, value))
    return found


def _content(content: Content, method: str, *, keep_rate: bool) -> dict[str, Any]:
    """The file with another method: without the settings of other methods and without its rate."""
    changed = deepcopy(dict(content))
    section = changed.setdefault("method", {})
    if not isinstance(section, dict):
        return changed
    own = parameters_of(method_class(method))
    tables = [section]
    if isinstance(section.get("parameters"), dict):
        tables.append(section["parameters"])
    for table in tables:
        for key in [key for key in table if key not in own and owners_of(key)]:
            del table[key]
    section["name"] = method
    if not keep_rate:
        section["learning_rate"] = "auto"
    return changed


def _check_rate(label: str, method: str, content: Mapping[str, Any]) -> None:
    """Refuse "auto" where the method cannot find a rate."""
    section, can = content.get("method"), method_class(method).capabilities
    rate = section.get("learning_rate", "auto") if isinstance(section, dict) else "auto"
    if rate == "auto" and (can.votes or not can.forward_only):
        raise FedForwardError(
            f"{label}: method.name = {method!r} cannot find a learning rate by itself. Give one, "
            f"as in --rates {label}=1e-3."
        )
