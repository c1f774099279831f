"""What several methods have led to: a table with its spread, what can be told apart, and curves.

The figures are means over seeds with the standard deviation of a sample. Runs that have diverged
are counted and are in no mean. Imports no PyTorch.
"""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite, nan
from typing import Any

import numpy as np

from fedforward.analysis.significance import LEVEL, Difference, compare_all, mean_and_deviation
from fedforward.core.units import quantity
from fedforward.reporting.charts import (
    DASHES,
    SERIES,
    Band,
    Chart,
    Series,
    line_chart,
    number,
    shown,
)
from fedforward.reporting.figures import WIDE, heldout
from fedforward.reporting.groups import (
    Group,
    best,
    final,
    lower_is_better,
    measure_of,
    statistics,
    total,
)
from fedforward.reporting.record import RunRecord
from fedforward.training.spending import RESOURCES, WORDS, Resource, spent

#: Groups of a comparison: more lines cannot be told apart.
MOST_GROUPS = len(SERIES) * len(DASHES)


@dataclass(frozen=True)
class Figure:
    """A figure over seeds: mean and standard deviation, NaN where there is none."""

    mean: float
    sd: float

    def text(self, words: Callable[[float], str] = number) -> str:
        """For people: "0.42 ± 0.03", or one number where all are the same."""
        if not isfinite(self.mean):
            return "–"
        spread = f" ± {words(self.sd)}" if isfinite(self.sd) and self.sd > 0 else ""
        return f"{words(self.mean)}{spread}"


@dataclass(frozen=True)
class Row:
    """A group's figures.

    Attributes:
        label: of the group.
        method: name of the method.
        learning_rate: of the configuration, a number or "auto".
        seeds: of its runs.
        diverged: how many of them have; they are in no figure.
        unfinished: how many runs are not at their end.
        final: the held-out figure at the end.
        best: the best of all evaluations.
        loss: the held-out loss at the end.
        spent: by resource.
        peak_memory_bytes: of a step or of the first commit.
        verdict: how it compares with the best group, in words.
    """

    label: str
    method: str
    learning_rate: float | str
    seeds: list[int]
    diverged: int
    unfinished: int
    final: Figure
    best: Figure
    loss: Figure
    spent: dict[Resource, Figure]
    peak_memory_bytes: Figure
    verdict: str = ""


@dataclass(frozen=True)
class Results:
    """A comparison, as far as its runs tell.

    Attributes:
        measure: the held-out figure that decides.
        lower: whether less of it is better.
        before: that figure of the base model.
        groups: of runs.
        rows: one for each group.
        differences: of each pair of groups.
        matched: what the runs share, in words; empty where that is not known.
        remarks: a sentence for each thing that a reader should know.
    """

    measure: str
    lower: bool
    before: Figure
    groups: list[Group]
    rows: list[Row]
    differences: list[Difference]
    matched: str = ""
    remarks: list[str] = field(default_factory=list)


def compare(groups: Sequence[Group], matched: str = "") -> Results:
    """The figures of all groups, and which of them can be told apart."""
    measure = measure_of(groups)
    lower = lower_is_better(measure)
    rows = [_row(group, measure) for group in groups]
    figures = {
        group.label: {seed: final(run, measure) for seed, run in group.sound.items()}
        for group in groups
    }
    diverged = {
        group.label: f"{group.diverged} of {len(group.runs)} runs of {group.label} diverged"
        for group in groups
        if group.diverged
    }
    differences = compare_all(figures, diverged)
    base = [float(heldout(run, measure).y[0]) for group in groups for run in group.runs.values()]
    return Results(
        measure=measure,
        lower=lower,
        before=Figure(*statistics(base)),
        groups=list(groups),
        rows=_with_verdicts(rows, differences, lower),
        differences=differences,
        matched=matched,
        remarks=_remarks(groups),
    )


def _row(group: Group, measure: str) -> Row:
    runs, sound = list(group.runs.values()), list(group.sound.values())
    peaks = [(run.summary or {}).get("peak_memory_bytes") for run in sound]
    return Row(
        label=group.label,
        method=group.first.config.method.name,
        learning_rate=group.first.config.method.learning_rate,
        seeds=list(group.runs),
        diverged=group.diverged,
        unfinished=sum(run.summary is None for run in runs),
        final=Figure(*statistics(final(run, measure) for run in sound)),
        best=Figure(*statistics(best(run, measure) for run in sound)),
        loss=Figure(*statistics(final(run, "loss") for run in sound)),
        spent={what: Figure(*statistics(total(run, what) for run in sound)) for what in RESOURCES},
        peak_memory_bytes=Figure(
            *mean_and_deviation([float(peak) for peak in peaks if type(peak) is int])
        ),
    )


def _with_verdicts(rows: list[Row], differences: Sequence[Difference], lower: bool) -> list[Row]:
    """The rows with how each compares with the one of the best mean."""
    known = [row for row in rows if isfinite(row.final.mean)]
    if not known:
        return rows
    sign = 1 if lower else -1
    leader = min(known, key=lambda row: sign * row.final.mean)
    pairs = {frozenset((each.first, each.second)): each for each in differences}
    found = []
    for row in rows:
        if row is leader:
            words = "best mean" if len(rows) > 1 else ""
        elif not isfinite(row.final.mean):
            words = "diverged" if row.diverged else "no finite figure"
        else:
            words = _verdict(pairs[frozenset((row.label, leader.label))])
        found.append(Row(**{**vars(row), "verdict": words}))
    return found


def _verdict(found: Difference) -> str:
    if found.why_not:
        return found.why_not
    if found.told_apart:
        return f"worse ({_p(found.adjusted)})"
    return f"indistinguishable ({_p(found.adjusted)})"


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def sentences(results: Results) -> list[str]:
    """What each pair of groups says, in words."""
    return [_sentence(each, results) for each in results.differences]


def _sentence(found: Difference, results: Results) -> str:
    pair = f"{found.second} and {found.first}"
    if found.why_not:
        return f"{pair}: {found.why_not}."
    test = f"{found.test}, {found.seeds} seeds, {_p(found.adjusted)} after Holm's correction"
    if not found.told_apart:
        return f"{pair}: indistinguishable ({test})."
    how = "lower" if found.difference < 0 else "higher"
    interval = f"95 % interval {number(found.low)} to {number(found.high)}"
    return (
        f"{found.second} is {how} than {found.first} by {number(abs(found.difference))} "
        f"({interval}; {test})."
    )


def _remarks(groups: Sequence[Group]) -> list[str]:
    found = []
    runs = [run for group in groups for run in group.runs.values()]
    for group in groups:
        if group.diverged == len(group.runs):
            found.append(f"All runs of {group.label} diverged: it has no figures.")
        elif group.diverged:
            found.append(
                f"{group.diverged} of {len(group.runs)} runs of {group.label} diverged. They are "
                "in no mean, in no test and in no curve, so its figures are of the luckier seeds."
            )
        if unfinished := [run for run in group.runs.values() if run.summary is None]:
            found.append(f"{len(unfinished)} of {len(group.runs)} runs of {group.label} are not "
                         "finished; their figures are those of their last evaluation.")  # fmt: skip
    if len({run.config.model.path for run in runs}) > 1:
        found.append("The runs have different base models.")
    restored = sum("bytes" not in line for run in runs for line in run.lines[1:])
    if restored:
        found.append(f"{restored} rounds were restored from the ledger after an interruption. "
                     "Their bytes are taken to be those of the round before, and their passes and "
                     "seconds are missing.")  # fmt: skip
    return found


# ---- as text ------------------------------------------------------------------------------------


def head(results: Results) -> list[str]:
    """The head of the table."""
    name = _named(results.measure)
    found = ["method", "rate", "seeds", f"final {name}", f"best {name}"]
    if results.measure != "loss":
        found.append("final held-out loss")
    return [*found, "verdict", "rounds", "passes", "seconds", "bytes", "peak memory", "diverged"]


def _named(measure: str) -> str:
    return f"held-out {measure}"


def cells(row: Row, results: Results) -> list[str]:
    """A row of the table, as texts."""
    label = row.label if row.label == row.method else f"{row.label} ({row.method})"
    label = row.label if row.label.startswith(row.method) else label
    rate = row.learning_rate if isinstance(row.learning_rate, str) else f"{row.learning_rate:g}"
    found = [label, rate, str(len(row.seeds)), row.final.text(digits), row.best.text(digits)]
    if results.measure != "loss":
        found.append(row.loss.text(digits))
    found.append(row.verdict)
    found += [row.spent[what].text(_count) for what in ("rounds", "passes", "seconds")]
    found += [row.spent["bytes"].text(quantity), row.peak_memory_bytes.text(quantity)]
    return [*found, f"{row.diverged} of {len(row.seeds)}"]


def digits(value: float) -> str:
    """A held-out figure: four places after the point."""
    return f"{value:.4f}" if abs(value) < 100 else number(value)


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:,.1f}"


def as_json(results: Results) -> dict[str, Any]:
    """Every figure, those of single runs as well."""
    return {
        "measure": results.measure,
        "lower_is_better": results.lower,
        "before": asdict(results.before),
        "matched": results.matched,
        "level": LEVEL,
        "groups": [asdict(row) for row in results.rows],
        "differences": [
            asdict(each) | {"told_apart": each.told_apart} for each in results.differences
        ],
        "sentences": sentences(results),
        "remarks": results.remarks,
        "runs": [
            _run(group, seed, run, results.measure)
            for group in results.groups
            for seed, run in group.runs.items()
        ],
    }


def _run(group: Group, seed: int, run: RunRecord, measure: str) -> dict[str, Any]:
    summary = run.summary or {}
    return {
        "label": group.label,
        "seed": seed,
        "path": str(run.path),
        "state": run.state,
        "final": final(run, measure),
        "best": best(run, measure),
        "final_loss": final(run, "loss"),
        **{what: total(run, what) for what in RESOURCES},
        "peak_memory_bytes": summary.get("peak_memory_bytes"),
        "state_digest": summary.get("state_digest"),
    }


def as_csv(results: Results) -> str:
    """The table with one line for each group, in full precision; what is not known is empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = ("final", "best", "final_loss", *RESOURCES, "peak_memory_bytes")
    names = [f"{name}_{part}" for name in columns for part in ("mean", "sd")]
    writer.writerow(["label", "method", "learning_rate", "seeds", "diverged", "measure", *names,
                     "verdict"])  # fmt: skip
    for row in results.rows:
        found = [row.final, row.best, row.loss, *(row.spent[what] for what in RESOURCES)]
        found.append(row.peak_memory_bytes)
        values = [_exact(part) for each in found for part in (each.mean, each.sd)]
        writer.writerow([row.label, row.method, row.learning_rate, len(row.seeds), row.diverged,
                         results.measure, *values, row.verdict])  # fmt: skip
    return out.getvalue()


def _exact(value: float) -> str:
    return repr(value) if isfinite(value) else ""


# ---- curves -------------------------------------------------------------------------------------


def charts_of(results: Results) -> list[Chart]:
    """The mean with its spread against each resource, of the measure and of the loss."""
    found = []
    for name in dict.fromkeys((results.measure, "loss")):
        for what in RESOURCES:
            chart = _curves(results, name, what)
            if chart is not None:
                found.append(chart)
    return found


def _curves(results: Results, name: str, what: Resource) -> Chart | None:
    series: list[Series] = []
    bands: list[Band] = []
    rows: list[list[str]] = []
    for n, group in enumerate(results.groups):
        runs = list((group.sound or group.runs).values())
        x, means, spread = _mean_curve(runs, name, what)
        if not x or not isfinite(x[-1]) or not any(map(isfinite, means)):
            continue
        colour, dash = n % len(SERIES), n // len(SERIES)
        series.append(Series(group.label, x, means, colour, dash, marks=True))
        points = list(zip(x, means, spread, strict=True))
        if len(runs) > 1:
            low, high = [m - s for _, m, s in points], [m + s for _, m, s in points]
            bands.append(Band(x, low, high, colour))
        rows += [[group.label, *map(number, point)] for point in shown(points)]
    if not series:
        return None
    ends = [each.x[-1] for each in series]
    # A method may take a thousand times what another does.
    log_x = min(ends) > 0 and max(ends) > WIDE * min(ends)
    against = "wall time" if what == "seconds" else what
    words = "nats per answer token" if name == "loss" else name
    return line_chart(
        f"{_named(name).capitalize()} against {against}",
        series,
        WORDS[what],
        words,
        bands=bands,
        log_x=log_x,
        table=(["method", what, "mean", "sd"], rows),
        note="Mean over seeds; shaded: one standard deviation." if bands else "",
    )


def _mean_curve(
    runs: Sequence[RunRecord], name: str, what: Resource
) -> tuple[list[float], list[float], list[float]]:
    """What was spent, mean and standard deviation at each round that all runs have evaluated."""
    tables = []
    for run in runs:
        costs = spent(run.lines, what)
        figures = heldout(run, name)
        measured = [n for n, line in enumerate(run.lines) if "heldout_loss" in line]
        tables.append({n: (costs[n], y) for n, y in zip(measured, figures.y, strict=True)})
    shared = sorted(set.intersection(*(set(table) for table in tables)))
    if not shared:
        return [], [], []
    values = np.array([[table[n] for n in shared] for table in tables], np.float64)
    means = values.mean(axis=0)
    spread = values[..., 1].std(axis=0, ddof=1) if len(runs) > 1 else np.full(len(shared), nan)
    return means[:, 0].tolist(), means[:, 1].tolist(), spread.tolist()
