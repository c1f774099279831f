"""A plan as people read it: tables, a grid of blocks, and the same as a picture."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from fedforward.core.units import quantity
from fedforward.planning.activation import UNLIMITED, Activation
from fedforward.training.preview import Preview

#: Rows and columns that a terminal shows; the rest is in the picture and in `--json`.
MOST_CLIENTS, MOST_COLUMNS, MOST_BLOCKS = 40, 7, 96


def render(plan: Preview) -> Iterator[RenderableType]:
    """Everything that is worth a look, in order."""
    size, unit = _unit(plan)
    yield Text(
        f"predicted peak memory of a step in {unit}, by active blocks (the last blocks first)"
    )
    yield memory_table(plan, size)
    if plan.kept_bytes:
        there = "among these" if plan.resources.memory.kept else "beside these, in host memory"
        yield Text(f"kept activations: {plan.kept_bytes / size:.1f} {unit}, {there}")
    if not plan.resources.memory.streams:
        yield Text('on host: given less what model.offload = "host" keeps off a CUDA device')
    if len(plan.examples) > MOST_CLIENTS:
        yield Text(f"… and {len(plan.examples) - MOST_CLIENTS} clients more (--json has them all)")
    yield Text("\nwho perturbs which block")
    yield grid(plan)
    yield _coverage(plan)
    if plan.activation is not None:
        yield Text("")
        yield from _certificates(plan.activation, plan.config.planning.active is not None)
    if plan.front:
        yield Text("\nconvergence against memory")
        yield front_table(plan.front)
    yield Text(
        f"\nbytes a round and client: {quantity(plan.up)} up, {quantity(plan.down)} down, every "
        "tenth round 16 B more up; "
        f"the tuned tensors are {quantity(4 * plan.parameters)} in float32"
    )


def _columns(blocks: int) -> list[int]:
    """Numbers of active blocks that get a column, ends included."""
    return sorted({round(x) for x in np.linspace(0, blocks, min(blocks + 1, MOST_COLUMNS))})


def _unit(plan: Preview) -> tuple[int, str]:
    """A unit that the smallest of the peaks is ten of, and its name."""
    least = min(plan.peaks(0))
    units = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))
    return next((unit for unit in units if least >= 10 * unit[0]), units[-1])


def memory_table(plan: Preview, unit: int) -> Table:
    """Budget and predicted peak of every client, by how many blocks are active.

    Args:
        unit: bytes that the table counts in.
    """
    shown = _columns(len(plan.blocks))
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("client", justify="right")
    table.add_column("examples", justify="right")
    table.add_column("budget", justify="right")
    for count in shown:
        table.add_column(str(count), justify="right")
    table.add_column("given", justify="right", style="bold")
    if not plan.resources.memory.streams:
        table.add_column("on host", justify="right")
    for client, examples in list(enumerate(plan.examples))[:MOST_CLIENTS]:
        budget = int(plan.resources.budgets[client])
        peaks = plan.peaks(client)
        elsewhere = []
        if not plan.resources.memory.streams:
            elsewhere.append(f"{plan.predicted(client, streams=True) / unit:.1f}")
        table.add_row(
            str(client),
            f"{examples:,}",
            "none" if budget == UNLIMITED else f"{budget / unit:.1f}",
            *(_within(peaks[count], budget, unit) for count in shown),
            f"{int(plan.matrix[client].sum())}: {plan.predicted(client) / unit:.1f}",
            *elsewhere,
        )
    return table


def _within(peak: int, budget: int, unit: int) -> Text:
    return Text(f"{peak / unit:.1f}", style="" if peak <= budget else "red strike")


def grid(plan: Preview) -> Table:
    """Who perturbs which block, a mark each."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("client", justify="right")
    table.add_column("".join(_initial(name) for name in plan.blocks[:MOST_BLOCKS]))
    for client, row in list(enumerate(plan.matrix[:, :MOST_BLOCKS]))[:MOST_CLIENTS]:
        table.add_row(str(client), "".join("█" if on else "·" for on in row))
    marks = "".join(" ▁▂▃▄▅▆▇█"[int(np.ceil(8 * share - 1e-9))] for share in _shares(plan))
    table.add_row("all", marks[:MOST_BLOCKS])
    return table


def _shares(plan: Preview) -> NDArray[np.float64]:
    """The share of the clients, by their weight in the average, that perturbs each block."""
    if plan.activation is not None:
        return plan.activation.coverage
    return np.ones(len(plan.blocks))


def _coverage(plan: Preview) -> Text:
    coverage = _shares(plan)
    least, most = (plan.blocks[int(place)] for place in (coverage.argmin(), coverage.argmax()))
    return Text(
        f"coverage, as a share of the average: from {coverage.min():.2f} (block {least}) to "
        f"{coverage.max():.2f} (block {most})"
    )


def _initial(name: str) -> str:
    """One character for a block: its last digit, or a letter."""
    return name[-1] if name.isdigit() else name[0]


def _certificates(plan: Activation, counted: bool) -> Iterator[Text]:
    proven = "proven least" if plan.gap <= 1e-9 else f"within {100 * plan.gap:.2g} % of the least"
    yield Text(
        f"convergence surrogate: {plan.surrogate:.4f} (least {plan.best_surrogate:.4f}, {proven}; "
        f"epsilon {plan.epsilon:g})"
    )
    proven = "proven least" if plan.memory_gap <= 1e-9 else f"gap {100 * plan.memory_gap:.2g} %"
    if counted:
        return
    yield Text(
        f"{plan.objective} memory: {quantity(plan.used)} ({proven}), planned in "
        f"{plan.seconds:.2f} s"
    )


def front_table(front: list[Activation]) -> Table:
    """Convergence against memory over ε."""
    table = Table(title=Text("Pareto front"), title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("epsilon", "surrogate", "total memory", "worst client", "active blocks", "gap"):
        table.add_column(name, justify="right")
    for point in front:
        table.add_row(
            f"{point.epsilon:g}",
            f"{point.surrogate:.4f}",
            quantity(int(point.memory.sum())),
            quantity(int(point.memory.max())),
            str(int(point.matrix.sum())),
            f"{100 * max(point.gap, point.memory_gap):.2g} %",
        )
    return table


def draw(path: Path, plan: Preview) -> None:
    """The grid, the coverage of blocks and the Pareto front as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    matrix = plan.matrix
    panels = 2 if plan.front else 1
    figure = Figure(figsize=(6.5 * panels, 4.5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    axes[0].imshow(matrix, aspect="auto", cmap="Blues", vmin=0, vmax=1.25, interpolation="nearest")
    axes[0].set_title("blocks that each client perturbs", fontsize=10)
    axes[0].set_xlabel("block")
    axes[0].set_ylabel("client")
    if len(plan.blocks) <= 24:
        axes[0].set_xticks(range(len(plan.blocks)), plan.blocks, fontsize=7)
    if len(matrix) <= 24:
        axes[0].set_yticks(range(len(matrix)))
    if plan.front:
        memory = [point.used / 1e6 for point in plan.front]
        axes[1].plot(memory, [p.surrogate for p in plan.front], "o-", color="#1b4f9c")
        for point, x in zip(plan.front, memory, strict=True):
            axes[1].annotate(f"ε = {point.epsilon:g}", (x, point.surrogate), fontsize=7)
        axes[1].set_title("Pareto front", fontsize=10)
        axes[1].set_xlabel(f"{plan.front[0].objective} memory (MB)")
        axes[1].set_ylabel("convergence surrogate")
        axes[1].grid(alpha=0.25)
    figure.savefig(path)
