"""Charts as SVG text that takes its colours from the page, each with the table of its numbers.

matplotlib draws; its colours are then replaced by the page's CSS variables, so one picture serves
light, dark and print. Words stay words. Legends are the page's own, so they cover no curve.
Imports no PyTorch.
"""

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Of Okabe and Ito's palette, which colour-blind people tell apart; the page has their dark forms.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b88700", "#3fa0d8", "#7a5c3e")
INK, MUTED, GRID = "#010203", "#040506", "#070809"
#: Of words on a dark cell, in both themes.
LIGHT = "#fefefe"
#: Of the lines between cells: the page itself.
PAPER = "#0a0b0c"
#: More cells than this have no lines between them.
_MOST_LINED = 24
DASHES = ("-", "--", ":")
#: Rows of a table; of more rounds every so many are shown.
MOST_ROWS = 60
#: Points of a line: of more rounds each point is the mean of some.
MOST_POINTS = 250
#: Lines of single clients; of more clients a band is drawn.
MOST_LINES = len(SERIES)
#: A logarithmic axis that spans less than this factor is marked at 1, 2 and 5.
_FEW_TICKS = 200
_TAG = re.compile(r"<[^>]+>")
#: Inches. A phone shows it at its own size, so that words stay legible.
WIDTH, HEIGHT = 4.5, 2.5


@dataclass(frozen=True)
class Key:
    """An entry of a legend: a colour of `SERIES` and a dash of `DASHES`, by number."""

    name: str
    colour: int
    dash: int = 0
    band: bool = False


@dataclass(frozen=True)
class Chart:
    """A picture with its words and numbers.

    Attributes:
        title: what is shown.
        svg: the picture.
        alt: what a person who does not see it is told.
        head: of the table.
        rows: of the table, as texts.
        keys: the legend; empty where there is one series.
        note: a sentence below the picture, or empty.
    """

    title: str
    svg: str
    alt: str
    head: list[str]
    rows: list[list[str]]
    keys: list[Key] = field(default_factory=list)
    note: str = ""


@dataclass(frozen=True)
class Series:
    """A line of a chart; NaN leaves a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    dash: int = 0
    marks: bool = False
    pale: bool = False


@dataclass(frozen=True)
class Band:
    """What is shaded between two lines.

    Attributes:
        x: places.
        low: the lower line.
        high: the upper line.
        colour: of `SERIES`, by number.
    """

    x: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    colour: int = 0


def number(value: float | None) -> str:
    """A number for people: 4 digits, "–" for none."""
    if value is None or not np.isfinite(value):
        return "–"
    if value == int(value) and abs(value) < 1e7:
        return f"{int(value):,}"
    return f"{value:,.1f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"


def line_chart(
    title: str,
    series: Sequence[Series],
    xlabel: str,
    ylabel: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    zero: bool = False,
    note: str = "",
    x_name: str = "",
    band: tuple[Series, Series] | None = None,
    bands: Sequence[Band] = (),
    table: tuple[list[str], list[list[str]]] | None = None,
) -> Chart:
    """Lines over a common axis.

    Args:
        band: the lowest and the highest of many, between which the picture is shaded.
        bands: shaded around lines, each in its line's colour.
        table: head and rows in place of a column for each series.
        log_x: a logarithmic axis of places, from the first above 0.
        zero: whether the axis of values begins at 0.
        x_name: head of the table's first column; `xlabel` if empty.
    """

    def draw(axes: Any) -> None:
        if band is not None:
            x, low = _thinned(band[0].x, band[0].y)
            _, high = _thinned(band[1].x, band[1].y)
            axes.fill_between(x, low, high, color=SERIES[band[0].colour], alpha=0.22, lw=0)
        for each_band in bands:
            x, low = _thinned(each_band.x, each_band.low)
            _, high = _thinned(each_band.x, each_band.high)
            colour = SERIES[each_band.colour % len(SERIES)]
            axes.fill_between(x, low, high, color=colour, alpha=0.16, lw=0)
        for each in series:
            x, y = _thinned(each.x, each.y)
            axes.plot(
                x,
                y,
                color=SERIES[each.colour % len(SERIES)],
                ls=DASHES[each.dash % len(DASHES)],
                lw=1.1 if each.pale else 1.8,
                alpha=0.55 if each.pale else 1.0,
                marker="o" if each.marks and len(x) <= 60 else None,
                ms=3,
            )
        if log_x:
            axes.set_xscale("log", nonpositive="mask")
        elif all(x == int(x) for each in series for x in each.x if np.isfinite(x)):
            axes.xaxis.get_major_locator().set_params(integer=True)
        if log_y and any(value > 0 for each in series for value in each.y):
            axes.set_yscale("log")
        if zero:
            axes.set_ylim(bottom=0)

    keys = [Key(each.name, each.colour, each.dash) for each in series] if len(series) > 1 else []
    if band is not None:
        keys = [*(keys or [Key(s.name, s.colour, s.dash) for s in series])]
        keys.append(Key("lowest to highest", band[0].colour, band=True))
    everything = [*series, *(band or ())]
    head, rows = table or _table(x_name or xlabel, everything)
    ends = "; ".join(f"{s.name} from {first} to {last}" for s in series[:8]
                     if (first := _end(s.y, 0)) and (last := _end(s.y, -1)))  # fmt: skip
    svg = _svg(draw, xlabel, ylabel)
    return Chart(title, svg, f"{title} over {xlabel}: {ends}.", head, rows, keys, note)


def _end(values: Sequence[float], place: int) -> str:
    known = [value for value in values if np.isfinite(value)]
    return number(known[place]) if known else ""


def _thinned(
    x: Sequence[float], y: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """At most `MOST_POINTS` points: means of neighbours, and the last one as it is."""
    xs, ys = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(xs) <= MOST_POINTS:
        return xs, ys
    groups = np.array_split(np.arange(len(xs)), MOST_POINTS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        means = [(xs[g].mean(), np.nanmean(ys[g])) for g in groups]
    points = np.array([*means, (xs[-1], ys[-1])])
    return points[:, 0], points[:, 1]


def _table(x_name: str, series: Sequence[Series]) -> tuple[list[str], list[list[str]]]:
    """One row for each place that a series has, every so many of them."""
    values: dict[float, dict[int, float]] = {}
    for n, each in enumerate(series):
        for x, y in zip(each.x, each.y, strict=True):
            if np.isfinite(y):
                values.setdefault(x, {})[n] = y
    places = shown(sorted(values))
    rows = [[number(x), *(number(values[x].get(n)) for n in range(len(series)))] for x in places]
    return [x_name, *(each.name for each in series)], rows


def shown(places: Sequence[Any]) -> list[Any]:
    """At most about `MOST_ROWS` of them, evenly spread, the last among them."""
    step = -(-len(places) // MOST_ROWS)
    kept = list(places[:: max(1, step)])
    if places and kept[-1] != places[-1]:
        kept.append(places[-1])
    return kept


def bar_chart(
    title: str, bars: Sequence[tuple[str, float, int]], xlabel: str, words: Callable[[float], str],
    *, log: bool = False, note: str = "",
) -> Chart:  # fmt: skip
    """Bars with their values beside them.

    Args:
        bars: name, value and colour of each, from the top.
        words: a value as text.
    """

    def draw(axes: Any) -> None:
        values = [value for _, value, _ in bars]
        colours = [SERIES[colour % len(SERIES)] for *_, colour in bars]
        places = range(len(bars))
        axes.barh(places, values, color=colours, height=0.55)
        axes.set_yticks(places, [_cut(name) for name, *_ in bars])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        most = max(values, default=1.0)
        if log:
            axes.set_xscale("log")
            axes.set_xlim(max(min(values) / 4, 0.1), most * 30)
        else:
            axes.set_xlim(0, most * 1.35)
        for place, value in enumerate(values):
            axes.annotate(
                words(value), (value, place), (4, 0), textcoords="offset points", va="center",
                color=INK,
            )  # fmt: skip

    told = "; ".join(f"{name}: {words(value)}" for name, value, _ in bars)
    rows = [[name, words(value)] for name, value, _ in bars]
    height = 0.75 + 0.34 * len(bars)
    svg = _svg(draw, xlabel, "", height)
    return Chart(title, svg, f"{title}. {told}.", ["", xlabel], rows, [], note)


def grid_chart(
    title: str,
    values: NDArray[np.float64],
    rows: Sequence[str],
    columns: Sequence[str] | None,
    xlabel: str,
    ylabel: str,
    *,
    head: list[str],
    table: list[list[str]],
    texts: Sequence[Sequence[str]] | None = None,
    note: str = "",
    first: int = 0,
) -> Chart:
    """Cells, the darker the larger.

    Args:
        values: [rows, columns], from 0 to 1; NaN is nothing.
        rows: names of the rows.
        columns: names of the columns; None numbers them from `first`.
        texts: of the cells, which are written in where they are few enough.
    """
    tall, wide = values.shape

    def draw(axes: Any) -> None:
        picture = np.zeros((tall, wide, 4))
        picture[..., :3] = (0.0, 0.447, 0.698)
        picture[..., 3] = 0.06 + 0.86 * np.clip(np.nan_to_num(values), 0, 1)
        axes.imshow(
            picture, aspect="auto", interpolation="none",
            extent=(first - 0.5, first + wide - 0.5, tall - 0.5, -0.5),
        )  # fmt: skip
        axes.grid(visible=False)
        for y in range(1, tall if tall <= _MOST_LINED else 1):
            axes.axhline(y - 0.5, color=PAPER, lw=1.2)
        for x in range(1, wide if wide <= _MOST_LINED else 1):
            axes.axvline(first + x - 0.5, color=PAPER, lw=1.2)
        kept = shown_few(tall, 12)
        axes.set_yticks(kept, [_cut(rows[n]) for n in kept])
        if columns is not None:
            few = shown_few(wide, 12)
            turned = max((len(_cut(columns[n])) for n in few), default=0) * len(few) > 46
            axes.set_xticks(
                [first + n for n in few], [_cut(columns[n]) for n in few],
                rotation=35 if turned else 0, ha="right" if turned else "center",
                rotation_mode="anchor" if turned else None,
            )  # fmt: skip
        else:
            axes.xaxis.get_major_locator().set_params(integer=True)
        if texts is not None and wide <= 8 and tall <= 12:
            for y in range(tall):
                for x in range(wide):
                    axes.text(
                        first + x, y, texts[y][x], ha="center", va="center",
                        color=LIGHT if values[y, x] > 0.55 else INK,
                    )  # fmt: skip

    height = min(4.2, 1.0 + 0.2 * min(tall, 16))
    svg = _svg(draw, xlabel, ylabel, height)
    alt = f"{title}: {ylabel} by {xlabel}, {tall} by {wide} cells; the numbers are in the table."
    return Chart(title, svg, alt, head, table, [], note)


def shown_few(count: int, most: int) -> list[int]:
    """At most about `most` of `count` numbers, evenly spread."""
    return list(range(0, count, max(1, -(-count // most))))


def _cut(name: str) -> str:
    """A name that leaves room for the picture."""
    plain = " ".join(name.split())
    return plain if len(plain) <= 18 else f"{plain[:17]}…"


_SETTINGS = {
    "svg.fonttype": "none",
    # The same numbers make the same page.
    "svg.hashsalt": "fedforward",
    "text.parse_math": False,
    "axes.unicode_minus": True,
    "font.size": 8.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "path.simplify_threshold": 0.3,
}


def _svg(draw: Callable[[Any], None], xlabel: str, ylabel: str, height: float = HEIGHT) -> str:
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    with mpl.rc_context(_SETTINGS), warnings.catch_warnings():
        # Letters that matplotlib's own font lacks; the page's font has them.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        draw(axes)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log":
                low, high = axis.get_view_interval()
                if high < _FEW_TICKS * low:
                    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
                axis.set_minor_formatter(NullFormatter())
        if axes.xaxis.get_scale() != "log" and axes.get_xlim()[1] >= 10_000:
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        out = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    return themed(out.getvalue())


def short(value: float) -> str:
    """A tick's number: 1500000 is "1.5M"."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--rule",
    PAPER: "--paper",
    **{colour: f"--s{n}" for n, colour in enumerate(SERIES)},
}


def themed(svg: str) -> str:
    """matplotlib's SVG with the page's colours and font; only tags are changed, never words."""
    svg = svg[svg.index("<svg") :]
    for kind in ("metadata", "style"):
        svg = re.sub(rf"<{kind}[ >].*?</{kind}>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    # What is drawn has the page's width.
    svg = re.sub(r'(<svg [^>]*?) width="[^"]*" height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", svg, count=1)
    return re.sub(r"\n\s*", "\n", _TAG.sub(_themed_tag, svg)).strip()


def _themed_tag(found: re.Match[str]) -> str:
    tag = found[0]
    for colour, variable in _VARIABLES.items():
        tag = tag.replace(colour, f"var({variable})")
    return re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", tag)


def named(svg: str, mark: str) -> str:
    """The picture with names that no other picture of the page has."""

    def fix(found: re.Match[str]) -> str:
        tag = re.sub(r'( id="|href="#)', rf"\g<1>{mark}-", found[0])
        return tag.replace("url(#", f"url(#{mark}-")

    return _TAG.sub(fix, svg)
