"""Reports in fixed point: what a site adds to a secure sum, and what the sum says.

A sum of integers is exact in any order, so masks fall away without a trace, and server, replicas
and replay have the same bits. Whether there are masks is not seen here: `deployment.secure` adds
them at sites, and a simulation has none. Imports no PyTorch and no cryptography.
"""

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedforward.core.errors import FedForwardError, MessageError
from fedforward.messages.report import NO_FLOATS, Report
from fedforward.messages.secure import LEAST_SITES, MaskedReport, Total

#: Least step of a number in fixed point.
UNIT = 2.0**-36
#: Most that a number of one site may be, either sign; times `MOST_SITES` it fits 63 bits.
LIMIT = 2.0**16
#: Numbers that follow the projected gradients: loss, whether there is one, skipped steps.
EXTRA = 3


def threshold_of(sites: int, least: int) -> int:
    """Sites that must help to open a sum, and that must be in it; more than two thirds of all.

    Two groups of so many have more than a third in common, so a server that tells sites different
    things cannot have both secrets of one (Bonawitz et al., 2017, section 7).

    Args:
        sites: that a session has.
        least: `federation.secure_threshold`.

    Example:
        >>> threshold_of(10, 3)
        7
    """
    return max(least, LEAST_SITES, 2 * sites // 3 + 1)


def to_fixed(value: float, what: str) -> int:
    """A number in units of 2⁻³⁶, rounded to nearest, ties to even.

    Raises:
        FedForwardError: it is beyond ±65,536.
    """
    if not abs(value) <= LIMIT:
        raise FedForwardError(
            f"{what} is {value:g}, and federation.secure_sums carries numbers between "
            f"-{LIMIT:,.0f} and {LIMIT:,.0f}. Lower method.learning_rate, or raise method.mu."
        )
    return round(value / UNIT)


def part_of(report: Report) -> MaskedReport:
    """A client's part of a sum, without masks.

    Raises:
        FedForwardError: a number is too large for fixed point, or the report has more than sums
            carry.
    """
    if report.payload or len(report.line_search):
        raise MessageError("A report with more than projected gradients cannot be summed.")
    has_loss = math.isfinite(report.loss)
    numbers = [
        *(
            to_fixed(value, f"A projected gradient of round {report.round + 1}")
            for value in report.gradients.tolist()
        ),
        to_fixed(report.loss, f"The loss of round {report.round + 1}") if has_loss else 0,
        int(has_loss),
        report.skipped,
    ]
    values = np.array(numbers, np.int64).view(np.uint64)
    return MaskedReport(report.round, report.client, values, report.digest)


def bare_report(part: MaskedReport, examples: int) -> Report:
    """What the ledger keeps of one client's part: that it was there, and its proof."""
    return Report(
        round=part.round,
        client=part.client,
        examples=examples,
        loss=math.nan,
        skipped=0,
        gradients=NO_FLOATS,
        digest=part.digest,
    )


def is_bare(report: Report) -> bool:
    """Whether a report has nothing that is its client's alone."""
    kept = replace(report, digest=b"", round=0, client=0, examples=0).encode()
    nothing = Report(0, 0, 0, math.nan, 0, NO_FLOATS).encode()
    return kept == nothing


def check_total(total: Total, steps: int, numbers: int) -> None:
    """Refuse a sum that parts within their limits cannot have.

    Args:
        steps: local steps of a round.
        numbers: projected gradients of one report.

    Raises:
        MessageError: see above.
    """
    if len(total.values) != numbers + EXTRA:
        raise MessageError(
            f"A sum of {len(total.values)} numbers was refused; this run has {numbers + EXTRA}."
        )
    # Not `abs`: the least int64 has none.
    signed = [int(value) for value in total.values.view(np.int64)]
    most = round(total.clients * LIMIT / UNIT)
    counted, skipped = signed[-2:]
    sound = all(abs(value) <= most for value in signed[:-2])
    if not (sound and 0 <= counted <= total.clients and 0 <= skipped <= total.clients * steps):
        raise MessageError(
            f"The sum of {total.clients} reports was refused: it is beyond what they may have. One "
            "of the sites sent other numbers than its own; which one cannot be told. Leave sites "
            "out with --without in turn, or go on without federation.secure_sums in a new run."
        )


def mean_gradients(total: Total) -> NDArray[np.float64]:
    """ḡ = (1/n) Σ_i g_i, float64 [local steps * directions]."""
    sums = total.values[:-EXTRA].view(np.int64).astype(np.float64)
    mean: NDArray[np.float64] = sums * UNIT / total.clients
    return mean


def mean_loss(total: Total) -> float:
    """The mean of the losses that there are, in nats; NaN where there is none."""
    loss, counted, _ = (int(value) for value in total.values[-EXTRA:].view(np.int64))
    return loss * UNIT / counted if counted else math.nan


def skipped_steps(total: Total) -> int:
    """Steps of all clients whose losses were not finite."""
    return int(total.values[-1].view(np.int64))
