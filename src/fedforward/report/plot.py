"""The loss curve of a run as a PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw(path: Path, lines: Sequence[dict[str, Any]], summary: dict[str, Any]) -> None:
    """Held-out and training loss over rounds, written to `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    training = [(line["round"], line["training_loss"]) for line in lines if _known(line)]
    heldout = [(line["round"], line["heldout_loss"]) for line in lines if "heldout_loss" in line]
    if training:
        axes.plot(
            *zip(*training, strict=True), color="#b8c4d6", lw=1.2, label="training, all clients"
        )
    axes.plot(
        *zip(*heldout, strict=True), color="#1b4f9c", lw=2, marker="o", ms=4, label="held-out"
    )
    start, end = heldout[0][1], heldout[-1][1]
    axes.set_title(
        f"{summary['method']}, {summary['clients']} clients: held-out loss "
        f"{start:.3f} to {end:.3f} nats per token",
        fontsize=10,
    )
    axes.set_xlabel("round")
    axes.set_ylabel("loss (nats per answer token)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


def _known(line: dict[str, Any]) -> bool:
    return line.get("training_loss") is not None
