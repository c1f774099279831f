"""What the sections are made of: their base class, shared types of values, what a field may be.

Imports neither PyTorch nor transformers.
"""

from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from fedforward.config.names import Kind, Known, known
from fedforward.core.paths import as_path

Share = Annotated[float, Field(gt=0.0, le=1.0)]
Chance = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
#: Stands in a server's configuration for what only sites have.
AT_SITES = "(each site's own)"
#: What a report or a ledger entry counts in 16 bits: clients, and the steps of a round.
MOST_COUNTED = 65535
PathText = Annotated[str, AfterValidator(as_path)]
Method = Annotated[str, AfterValidator(Known("method"))]
Estimator = Annotated[str, AfterValidator(Known("estimator"))]
Objective = Annotated[str, AfterValidator(Known("objective"))]
Metric = Annotated[str, AfterValidator(Known("metric"))]
Aggregator = Annotated[str, AfterValidator(Known("aggregator"))]


def no_repeats(names: list[str]) -> list[str]:
    """The names, if each is there once.

    Raises:
        ValueError: one is there twice.
    """
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{name!r} is there twice; leave one of them out")
        seen.add(name)
    return names


Metrics = Annotated[list[Metric], AfterValidator(no_repeats)]
ReportFilters = Annotated[
    list[Annotated[str, AfterValidator(Known("report-filter"))]], AfterValidator(no_repeats)
]


def named_classes(names: list[str]) -> list[str]:
    """The names of a classifier's classes, if they are two or more different ones.

    Raises:
        ValueError: they are not.
    """
    if len(names) < 2 or any(not name or name != name.strip() for name in names):
        raise ValueError(
            f"{names!r} is not allowed: it must be two or more names, without outer spaces"
        )
    return no_repeats(names)


Classes = Annotated[list[str], AfterValidator(named_classes)]


class Section(BaseModel):
    """Keys of a configuration file, or its sections: nothing unknown, nothing converted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def names_of(field: Any) -> Kind | None:
    """The kind of name that a field, or each item of its list, takes; None for other fields."""
    items = [m for a in get_args(field.annotation) for m in getattr(a, "__metadata__", ())]
    for validator in (*field.metadata, *items):
        if isinstance(check := getattr(validator, "func", None), Known):
            return check.kind
    return None


def choices(field: Any) -> tuple[str, ...]:
    """The texts that a field may be, as far as they can be listed; else empty."""
    kind = names_of(field)
    if kind is not None:
        return known(kind)
    literal = get_origin(field.annotation) is Literal
    return tuple(a for a in get_args(field.annotation) if isinstance(a, str)) if literal else ()
