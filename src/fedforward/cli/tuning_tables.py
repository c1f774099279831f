"""The loss against the learning rate, as a table and as a picture."""

import math
from pathlib import Path

from rich.table import Table

from fedforward.training.plots import COLOURS, DARK, PALE
from fedforward.training.tune import Tuning


def table(tuning: Tuning) -> Table:
    """The loss against the learning rate of one update, the least and the rate found marked."""
    title = f"held-out {tuning.objective} against the learning rate of the last update"
    shown = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("learning rate", tuning.objective, "change", "standard error", ""):
        shown.add_column(name, justify="right" if name else "left")
    without = tuning.curve[0]
    for point in tuning.curve:
        notes = ["found"] if point.learning_rate == tuning.learning_rate else []
        notes += ["least"] if point is tuning.best else []
        shown.add_row(
            f"{point.learning_rate:.3g}",
            f"{point.loss:.4f}",
            f"{point.loss - without.loss:+.4f}" if point is not without else "",
            f"{point.error:.4f}" if point is not without else "",
            ", ".join(notes),
        )
    return shown


def blocks_table(tuning: Tuning) -> Table:
    """What is left of the fall of the loss where only the upper blocks have moved."""
    title = f"held-out {tuning.objective} where only the upper blocks have moved"
    shown = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("model.blocks", "passes", tuning.objective, "share of the fall"):
        shown.add_column(name, justify="right")
    for part in tuning.upper_blocks:
        share = "" if part.share is None else f"{100 * part.share:.0f} %"
        shown.add_row(part.blocks, f"{100 * part.cost:.0f} %", f"{part.loss:.4f}", share)
    return shown


def draw(path: Path, tuning: Tuning) -> None:
    """The loss against the learning rate of one update, written to `path`.

    Points that are far above the loss without the update, or not finite, are not shown.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    without, *points = tuning.curve
    points = [point for point in points if math.isfinite(point.loss)]
    rates = [point.learning_rate for point in points]
    losses = [point.loss for point in points]
    axes.errorbar(
        rates, losses, [p.error for p in points], color=DARK, lw=2, marker="o", ms=4, capsize=2
    )
    axes.axhline(without.loss, color=PALE, lw=1.2, label="without the update")
    axes.axvline(
        tuning.learning_rate, color=COLOURS[1], lw=1.2, ls="--", label='the rate that "auto" found'
    )
    # The errors of what is no longer than the update itself.
    errors = [p.error for p in points if p.learning_rate <= tuning.learning_rate]
    fall = max(without.loss - tuning.best.loss, *errors, 1e-6)
    axes.set_ylim(tuning.best.loss - 0.3 * fall, without.loss + 2.0 * fall)
    axes.set_xscale("log")
    axes.set_title(f"{tuning.examples} held-out examples after {tuning.rounds} rounds", fontsize=10)
    axes.set_xlabel("learning rate of the last update")
    axes.set_ylabel(f"held-out {tuning.objective}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
