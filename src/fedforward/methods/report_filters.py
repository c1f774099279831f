"""What a site may change of its report before it leaves: a list on the site's side.

A filter is an object that is called with a report and returns another. It sees scalars only, and
neither model nor data.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import numpy as np

from fedforward.core.errors import FedForwardError
from fedforward.core.registry import REPORT_FILTERS
from fedforward.messages.report import NO_FLOATS, Report


class ReportFilter(Protocol):
    """A step between the client's report and the wire."""

    def __call__(self, report: Report) -> Report:
        """The report that leaves in place of this one."""
        ...


@dataclass(frozen=True)
class Clip:
    """Clips every projected gradient to [-limit, limit].

    Attributes:
        limit: above 0.
    """

    limit: float = 1.0

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise FedForwardError(f"'clip:{self.limit:g}' is not allowed: a limit is above 0.")

    def __call__(self, report: Report) -> Report:
        """See `ReportFilter`."""
        limit = np.float32(self.limit)
        return replace(report, gradients=np.clip(report.gradients, -limit, limit))


@dataclass(frozen=True)
class WithholdLoss:
    """Sends NaN in place of the training loss, and no losses along the last update.

    Rates that look at losses then have none of this client, and it gets the base rate. A learning
    rate that is found follows what the other clients measure.

    Attributes:
        withholds_loss: a run whose rates follow losses refuses such a filter in its own list.
    """

    withholds_loss: ClassVar[bool] = True

    def __call__(self, report: Report) -> Report:
        """See `ReportFilter`."""
        return replace(report, loss=float("nan"), line_search=NO_FLOATS)


def build_filters(names: Sequence[str], key: str) -> tuple[ReportFilter, ...]:
    """Filters by name, in the order in which they are applied.

    Args:
        names: such as "clip:0.5" or "withhold-loss"; what follows a colon is the filter's number.
        key: as the user typed it, for errors.

    Raises:
        FedForwardError: a name is unknown, or its number is none.
    """
    made = []
    for text in names:
        name, colon, number = text.partition(":")
        kind: Callable[..., ReportFilter] = REPORT_FILTERS.get(name)
        try:
            found = kind(float(number)) if colon else kind()
        except FedForwardError as error:
            raise FedForwardError(f"{key}: {error}") from error
        except (TypeError, ValueError) as error:
            raise FedForwardError(
                f"{key}: {text!r} is not allowed: write a filter's name, or its name, a colon and "
                "a number, as in 'clip:0.5'."
            ) from error
        if not callable(found):
            raise FedForwardError(
                f"{key}: {text!r} is no filter; mend or remove the package that adds it."
            )
        made.append(found)
    return tuple(made)
