"""The pictures of a diagnosis, PNG."""

from pathlib import Path
from typing import Any

import numpy as np

from fedforward.analysis.result import Diagnosis
from fedforward.training.plots import COLOURS, DARK, PALE

#: Width and height in inches, and dots per inch.
_SIZE, _DPI = (7, 4), 130


def draw(folder: Path, found: Diagnosis) -> list[Path]:
    """Write every picture that there is something for; returns the files."""
    written = []
    if any(point.matrices for point in found.curvature):
        written.append(_picture(folder / "spectrum.png", _spectrum, found))
    if any(matrix.blocks for point in found.curvature for matrix in point.matrices):
        written.append(_picture(folder / "blocks.png", _blocks, found))
    if found.two_point:
        written.append(_picture(folder / "two-point.png", _two_point, found))
    if found.differences is not None:
        written.append(_picture(folder / "clients.png", _clients, found))
    return written


def _picture(path: Path, fill: Any, found: Diagnosis) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    fill(figure, found)
    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    return path


def _spectrum(figure: Any, found: Diagnosis) -> None:
    """Magnitudes of Ritz values against their share of the spectrum."""
    axes = figure.subplots()
    colours = iter(COLOURS * 2)
    for point in found.curvature:
        for matrix in point.matrices:
            nodes, weights = np.abs(matrix.nodes), np.array(matrix.weights)
            kept = (nodes > 0.0) & (weights > 0.0)
            label = f"{matrix.matrix}, {point.point}"
            axes.scatter(nodes[kept], weights[kept], s=14, color=next(colours), label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("magnitude of an eigenvalue (Ritz value)")
    axes.set_ylabel("share of the spectrum")
    axes.set_title("spectral density by Lanczos quadrature", fontsize=10)
    axes.legend(frameon=False, fontsize=8)


def _blocks(figure: Any, found: Diagnosis) -> None:
    """Effective rank of each block."""
    axes = figure.subplots()
    colours = iter(COLOURS * 2)
    for point in found.curvature:
        for matrix in point.matrices:
            values = [block.effective_rank.value for block in matrix.blocks]
            label = f"{matrix.matrix}, {point.point}"
            axes.plot(values, marker="o", ms=4, color=next(colours), label=label)
            names = [block.block for block in matrix.blocks]
            axes.set_xticks(range(len(names)), names)
    axes.set_xlabel("block")
    axes.set_ylabel("tr(H_bb) / ‖H_bb‖")
    axes.set_title("effective rank of each block alone", fontsize=10)
    axes.legend(frameon=False, fontsize=8)


def _two_point(figure: Any, found: Diagnosis) -> None:
    """Bias and noise of the two-point estimate against μ."""
    left, right = figure.subplots(1, 2, sharex=True)
    for dtype, colour in zip(("float32", "bfloat16", "float16"), COLOURS, strict=False):
        own = [error for error in found.two_point if error.dtype == dtype]
        scales = [error.mu for error in own]
        left.plot(scales, [abs(e.bias) for e in own], marker="o", ms=4, color=colour, label=dtype)
        right.plot(scales, [e.noise for e in own], marker="o", ms=4, color=colour, label=dtype)
    for axes, what in ((left, "|bias|"), (right, "noise")):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.axhline(1.0, color=PALE, lw=1.2)
        axes.axvline(found.setting.mu, color=PALE, lw=1.2, ls="--")
        axes.set_xlabel("μ (dashed: method.mu)")
        axes.set_title(f"{what}, as a multiple of ∇F·z", fontsize=10)
    left.legend(frameon=False)


def _clients(figure: Any, found: Diagnosis) -> None:
    """The measured σ_h of each client."""
    axes = figure.subplots()
    assert found.differences is not None
    axes.bar(range(len(found.differences.measured)), found.differences.measured, color=DARK)
    axes.set_xlabel("client")
    axes.set_ylabel("‖∇f - ∇f_i‖, mean of the points")
    axes.set_title("heterogeneity measured from gradients", fontsize=10)
