"""The names that a configuration may choose from: those of the registries, and the metrics.

The registries know names without importing what they stand for, so that checking one costs no
PyTorch.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fedforward.core import registry

Kind = Literal["method", "estimator", "objective", "metric", "aggregator", "report-filter"]
_REGISTRIES: Mapping[Kind, registry.Registry] = {
    "method": registry.METHODS,
    "estimator": registry.ESTIMATORS,
    "objective": registry.OBJECTIVES,
    "metric": registry.OBJECTIVES,
    "aggregator": registry.AGGREGATORS,
    "report-filter": registry.REPORT_FILTERS,
}
#: Metrics that no run can optimise.
_METRICS_ONLY = ("perplexity",)
#: Kinds that also take a user's function, as `package.module:function`.
_FUNCTIONS: tuple[Kind, ...] = ("objective", "metric")
_FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def known(kind: Kind) -> tuple[str, ...]:
    """All names of a kind: the built-in ones first, then those of other packages."""
    names = _REGISTRIES[kind].names()
    return (*names, *_METRICS_ONLY) if kind == "metric" else names


def check(kind: Kind, name: str) -> str:
    """The name, if it is known.

    Raises:
        ValueError: it is not; the message has the nearest known name, and all of them.
    """
    names = known(kind)
    # What follows a filter's name is its number.
    wanted = name.partition(":")[0] if kind == "report-filter" else name
    if wanted in names or (kind in _FUNCTIONS and _FUNCTION.fullmatch(name)):
        return name
    near = difflib.get_close_matches(wanted, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name!r} is not known.{hint} {allowed(kind)}")


def allowed(kind: Kind) -> str:
    """What is allowed for a kind, without a full stop."""
    names = known(kind)
    own = ", or a function of your own as 'package.module:function'" if kind in _FUNCTIONS else ""
    return f"Allowed {'is' if len(names) == 1 else 'are'} {', '.join(map(repr, names))}{own}"


@dataclass(frozen=True)
class Known:
    """`check` for one kind, as a function of the name alone: a validator of a field."""

    kind: Kind

    def __call__(self, name: str) -> str:
        """See `check`."""
        return check(self.kind, name)
