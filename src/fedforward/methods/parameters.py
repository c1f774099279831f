"""What a method's class declares of its own settings, so that a configuration can check them."""

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

from fedforward.core.errors import FedForwardError


@dataclass(frozen=True)
class Parameter:
    """A setting that one method, or one estimator, has and others have not.

    Attributes:
        name: the key in the section `[method]`.
        default: its value if the key is left out; its type is the type of the setting.
        meaning: for the commented example and the reference.
        at_least: the least number, or None.
        at_most: the greatest number, or None.
        choices: the allowed texts; empty is any.
    """

    name: str
    default: Any
    meaning: str
    at_least: float | None = None
    at_most: float | None = None
    choices: tuple[str, ...] = ()

    @property
    def allowed(self) -> str:
        """What the setting takes, in words."""
        if self.choices:
            return "one of " + ", ".join(map(repr, self.choices))
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        limits = [
            f"{word} {limit}"
            for word, limit in (("at least", self.at_least), ("at most", self.at_most))
            if limit is not None
        ]
        said = words.get(type(self.default), "a value")
        return said + (f", {' and '.join(limits)}" if limits else "")

    def check(self, value: Any, key: str) -> Any:
        """The value, a whole number as a float where one is wanted.

        Args:
            key: as the user typed it.

        Raises:
            FedForwardError: it is of another type, or not allowed.
        """
        kind = type(self.default)
        fits = type(value) is kind or (kind is float and type(value) is int)
        if fits and self.choices:
            fits = value in self.choices
        if fits and not isinstance(value, str):
            fits = value == value and (self.at_least is None or value >= self.at_least)
            fits = fits and (self.at_most is None or value <= self.at_most)
        if not fits:
            raise FedForwardError(f"{key} = {value!r} is not allowed: it must be {self.allowed}.")
        return float(value) if kind is float else value


def parameter(default: Any, meaning: str, **limits: Any) -> Any:
    """A dataclass field that is a setting; `limits` as in `Parameter`."""
    return dataclasses.field(default=default, metadata={"meaning": meaning, "limits": limits})


def parameters_of(kind: Any) -> dict[str, Parameter]:
    """The settings that a dataclass declares with `parameter`, by name."""
    return {
        field.name: Parameter(
            field.name, field.default, field.metadata["meaning"], **field.metadata["limits"]
        )
        for field in dataclasses.fields(kind)
        if "meaning" in field.metadata
    }


def check_parameters(kind: Any, values: dict[str, Any], prefix: str = "method.") -> dict[str, Any]:
    """The settings that were given, checked.

    Raises:
        FedForwardError: one is unknown to `kind`, or not allowed.
    """
    declared = parameters_of(kind)
    for name in values:
        if name not in declared:
            near = difflib.get_close_matches(name, declared, n=1)
            hint = f" Did you mean {prefix}{near[0]}?" if near else ""
            listed = ", ".join(declared) or "none"
            raise FedForwardError(
                f"{prefix}{name} is not a known key.{hint} The settings of this method are "
                f"{listed}."
            )
    return {name: declared[name].check(value, prefix + name) for name, value in values.items()}
