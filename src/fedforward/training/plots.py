"""The curves of a run as a PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedforward.evaluation.text_metrics import LOSSES, SHARES

PALE, DARK = "#b8c4d6", "#1b4f9c"
COLOURS = (DARK, "#c2571a", "#2d7d46", "#7a3e9d")


def draw(path: Path, lines: Sequence[dict[str, Any]], summary: dict[str, Any]) -> None:
    """Losses over rounds, and below them the metrics that are shares, written to `path`.

    What the clients optimise is drawn with the loss, or as a score with the metrics; where it is
    the cross-entropy of label words, that is the loss that is drawn. Nothing is drawn where all
    losses are withheld.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shares = [name for name in summary["metrics"] if name in SHARES]
    if not any("heldout_loss" in line or _known(line) for line in lines):
        return
    figure = Figure(figsize=(7, 6.5 if shares else 4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes, *below = figure.subplots(2 if shares else 1, squeeze=False, sharex=True)[:, 0]
    training = [(line["round"], line["training_loss"]) for line in lines if _known(line)]
    objective = summary["objective"]
    heldout = [
        (line["round"], line["metrics"]["choice"] if objective == "choice" else found)
        for line in lines
        if (found := line.get("heldout_loss")) is not None
    ]
    if training and objective in LOSSES:
        _pale(axes, training, "training, all clients")
    title = f"{summary['method']}, {summary['clients']} clients"
    if heldout:
        _line(axes, heldout, DARK, "held-out")
        start, end = heldout[0][1], heldout[-1][1]
        title += (
            (": held-out choice " if objective == "choice" else ": held-out loss ")
            + f"{start:.3f} to {end:.3f} nats per "
            + ("example" if objective == "choice" else "token")
        )
    axes.set_title(title, fontsize=10)
    axes.set_ylabel(
        "cross-entropy of the label words (nats)"
        if objective == "choice"
        else "loss (nats per answer token)"
    )
    for lower in below:
        if training and objective in shares:
            scores = [(number, 1.0 - value) for number, value in training]
            _pale(lower, scores, f"training {objective}, all clients")
        for name, colour in zip(shares, COLOURS, strict=False):
            points = [(line["round"], line["metrics"][name]) for line in lines if "metrics" in line]
            _line(lower, points, colour, name)
        lower.set_ylabel("score")
    for each in (axes, *below):
        each.grid(alpha=0.25)
        each.spines[["top", "right"]].set_visible(False)
        each.legend(frameon=False)
    (axes, *below)[-1].set_xlabel("round")
    figure.savefig(path)


def _line(axes: Any, points: Sequence[tuple[int, float]], colour: str, label: str) -> None:
    axes.plot(*zip(*points, strict=True), color=colour, lw=2, marker="o", ms=4, label=label)


def _pale(axes: Any, points: Sequence[tuple[int, float]], label: str) -> None:
    axes.plot(*zip(*points, strict=True), color=PALE, lw=1.2, label=label)


def _known(line: dict[str, Any]) -> bool:
    return line.get("training_loss") is not None
