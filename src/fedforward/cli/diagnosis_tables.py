"""A diagnosis as people read it."""

import math
from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from fedforward.analysis.assumptions import Constants
from fedforward.analysis.result import Assumed, Diagnosis, Differences, PointCurvature
from fedforward.analysis.spectrum import Interval


def render(found: Diagnosis) -> Iterator[RenderableType]:
    """Everything that is worth a look, in order."""
    yield _setting(found)
    yield _curvature(found.curvature)
    for point in found.curvature:
        if any(matrix.blocks for matrix in point.matrices):
            yield from _blocks(point)
    if found.assumed is not None:
        yield _assumed(found.assumed)
        yield _rates(found)
    if found.differences is not None:
        yield _clients(found.differences)
        yield _indices(found.differences)
    if found.two_point:
        yield _two_point(found)
    for note in found.notes:
        yield Text(f"note: {note}")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    return table


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "not known"
    return f"{value:.3g}" if abs(value) < 1000 or abs(value) >= 1e6 else f"{value:,.0f}"


def _interval(value: Interval) -> str:
    if not math.isfinite(value.low):
        return _number(value.value)
    half = (value.high - value.low) / 2.0
    if abs(value.low + value.high - 2.0 * value.value) <= 1e-6 * abs(half):
        return f"{_number(value.value)} ± {_number(half)}"
    return f"{_number(value.value)} ({_number(value.low)} to {_number(value.high)})"


def _setting(found: Diagnosis) -> RenderableType:
    own = found.setting
    return Text(
        f"{own.tuned_parameters:,} tuned parameters, {own.method} with {own.clients} clients, "
        f"H = {own.local_steps}, n = {own.directions}, μ = {own.mu:g}; curvature of {own.rows} "
        f"rows ({own.counted:,} counted), {own.probes} probes; ± is the 95 % interval of the probes"
    )


def _curvature(points: tuple[PointCurvature, ...]) -> Table:
    table = _table("curvature", "point", "matrix", "trace", "norm", "effective rank", "tr|H|/‖H‖")
    for point in points:
        for matrix in point.matrices:
            table.add_row(
                point.point,
                matrix.matrix,
                _interval(matrix.trace),
                _number(matrix.norm) + ("" if matrix.converged else " at least"),
                _interval(matrix.effective_rank),
                _number(matrix.absolute_rank.value),
            )
        for forward in point.forward:
            between = f"{_number(forward.least_rank)} to {_number(forward.most_rank)}"
            known = math.isfinite(forward.least_rank)
            table.add_row(
                point.point,
                "passes alone" if forward.part == "all" else f"passes, {forward.part}",
                _interval(forward.trace),
                f"≤ {_number(math.sqrt(max(forward.squares.value, 0.0)))}",
                between if known else "not known",
                "",
            )
    return table


def _blocks(point: PointCurvature) -> Iterator[Table]:
    for matrix in point.matrices:
        title = f"blocks alone, {matrix.matrix} at {point.point}"
        table = _table(title, "block", "parameters", "trace", "norm", "effective rank")
        for row in matrix.blocks:
            table.add_row(
                row.block,
                f"{row.parameters:,}",
                _interval(row.trace),
                _number(row.norm),
                _interval(row.effective_rank),
            )
        yield table


def _assumed(found: Assumed) -> Table:
    where = f"{found.clients} clients × {found.batches} batches of {found.batch_size}"
    title = f"assumptions of the paper, from {where} at {len(found.points)} points"
    table = _table(title, "constant", "estimate", "of")
    table.add_row("L (A3)", _number(found.smoothness), "largest that was met: a lower bound")
    _constants(table, "g", "A4", found.noise)
    if found.heterogeneity is not None:
        _constants(table, "h", "A6", found.heterogeneity)
    squares = ", ".join(map(_number, found.gradient_squares))
    table.add_row("‖∇f‖²", squares, "at the points, without noise")
    for column in table.columns[1:]:
        column.justify = "left"
    return table


def _constants(table: Table, letter: str, assumption: str, found: Constants) -> None:
    how = "least squares" if found.told else "points too alike to tell: the least that is allowed"
    table.add_row(f"c_{letter} ({assumption})", _interval(found.slope), how)
    enough = f"{_number(found.enough)} holds at every point"
    table.add_row(f"σ_{letter}² ({assumption})", _interval(found.rest), enough)


def _rates(found: Diagnosis) -> Table:
    assert found.assumed is not None
    own, bound, local = found.assumed, found.assumed.bound, found.assumed.local
    table = _table("learning rate, and what the rates of the paper depend on", "", "value", "from")
    table.columns[2].justify = "left"
    gain = f"; a round gains {_number(local.gain)} nats" if math.isfinite(local.gain) else ""
    how = f"measured: ∇f, noise, tr ({own.trace_from}){gain}"
    table.add_row("learning rate", _number(local.rate), how)
    table.add_row("its bound", _number(bound.rate), f"theory: {bound.binding}")
    table.add_row("γ", _number(own.rates.gamma), "theory: (d r + d - 2) / (n (d + 2))")
    table.add_row("ζ", _number(own.rates.zeta), "theory: Θ(1 / (r d))")
    table.add_row("i.i.d.", _number(own.rates.iid), "theory: order r^{3/2} (N H T)^{-1/2}")
    if own.rates.non_iid is not None:
        table.add_row("non-i.i.d.", _number(own.rates.non_iid), "theory: with (c_h + N) N for N")
    return table


def _clients(found: Differences) -> Table:
    names = [own.name for own in found.indices]
    table = _table("clients", "client", "measured σ_h", *names)
    for client, measured in enumerate(found.measured):
        values = [_number(own.values[client]) for own in found.indices]
        table.add_row(str(client), _number(measured), *values)
    return table


def _indices(found: Differences) -> Table:
    title = "rank correlation of each index with the measured σ_h (Spearman)"
    table = _table(title, "index", "correlation", "p")
    for own in found.indices:
        known = own.correlation is not None
        table.add_row(
            own.name,
            f"{own.correlation:+.2f}" if known else "not defined",
            _number(own.chance) if known else "",
        )
    return table


def _two_point(found: Diagnosis) -> Table:
    table = _table(
        "two-point estimate against ∇F·z: bias and noise as multiples of it",
        "μ",
        *(f"{dtype}: bias, noise" for dtype in dict.fromkeys(e.dtype for e in found.two_point)),
    )
    for mu in dict.fromkeys(error.mu for error in found.two_point):
        own = [error for error in found.two_point if error.mu == mu]
        cells = [
            f"{error.bias:+.1%} {error.noise:8.1%}" if error.finite else "not finite"
            for error in own
        ]
        table.add_row(f"{mu:g}", *cells)
    return table
