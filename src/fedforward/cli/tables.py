"""The result of a run as a table that a person understands."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from fedforward.core.units import quantity
from fedforward.evaluation.text_metrics import LOSSES, SHARES

#: What follows a value of that name.
UNITS = {"held-out loss": " nats per answer token", "held-out choice": " nats per example"}


def shown(name: str, value: float | None) -> str:
    """A metric's value: a share in per cent, anything else as a number."""
    if value is None:
        return "not finite"
    return f"{100 * value:.1f} %" if name in SHARES else f"{value:.3f}"


def heldout_values(
    objective: str, loss: float | None, metrics: Mapping[str, float | None]
) -> dict[str, str]:
    """Held-out figures as texts by name, what is optimised first where it is another loss.

    Where the loss of the answers' tokens is what is optimised, or nothing better is known, it comes
    first, without a name.
    """
    first = objective if objective in LOSSES - {"loss"} and objective in metrics else ""
    found = {first: metrics[first], "loss": loss} if first else {"": loss}
    found |= {name: value for name, value in metrics.items() if name not in ("loss", first)}
    return {name: shown(name, value) for name, value in found.items()}


def _changes(summary: dict[str, Any]) -> list[tuple[str, Any]]:
    """Losses and metrics of a run with their values before and after, what is optimised first."""
    loss = summary["heldout_loss"]
    rows = [] if loss is None else [("held-out loss", loss)]
    metrics = {n: value for n, value in summary["metrics"].items() if n != "loss"}
    if summary["objective"] in LOSSES and summary["objective"] in metrics:
        name = summary["objective"]
        rows.insert(0, (f"held-out {name}", metrics.pop(name)))
    return [*rows, *metrics.items()]


def _relative(change: Any) -> str:
    start, end = change["start"], change["end"]
    return "" if not start or end is None else f" ({100 * (end / start - 1):+.1f} %)"


def summary_table(summary: dict[str, Any]) -> Table:
    """Loss, example, traffic, memory and time of a run."""
    traffic, example = summary["bytes_per_client_round"], summary["example"]
    peak, plain = summary["peak_memory_bytes"], summary["inference_memory_bytes"]
    what = f"{summary['method']} on {'/'.join(Path(summary['model']).parts[-2:])}"
    table = Table(
        title=Text(what), show_header=False, title_justify="left", box=None, padding=(0, 2, 0, 0)
    )
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    tensor_bytes = 4 * summary["tuned_parameters"]
    rows = [
        *(
            (
                name,
                f"{shown(name, value['start'])} before, {shown(name, value['end'])} after"
                + (_relative(value) if name.startswith("held-out") else ""),
            )
            for name, value in _changes(summary)
        ),
        ("prompt", example["prompt"].strip()),
        ("answer before", example["before"]),
        ("answer after", example["after"]),
        (
            "sent per client and round",
            f"{quantity(traffic['up'])} up, {quantity(traffic['down'])} down "
            f"(the tuned tensors are {quantity(tensor_bytes)})",
        ),
        (
            "peak memory of a step",
            f"{quantity(peak)}, beside {quantity(plain)} for plain inference "
            f"({peak / plain:.2f} x)",
        ),
        ("rounds", f"{summary['rounds']} × {summary['local_steps']} local steps"),
        ("clients", f"{summary['clients']}, with {_counts(summary['examples'])} examples"),
        ("time", f"{summary['seconds']:.1f} s"),
    ]
    if example["expected"]:
        place = [name for name, _ in rows].index("answer after") + 1
        rows.insert(place, ("expected", example["expected"].strip()))
    catch_up = summary["catch_up"]
    if catch_up["break_even_rounds"]:
        rows.append(
            (
                "a client that was away",
                f"{quantity(catch_up['entry_bytes'])} for each round it missed; beyond "
                f"{catch_up['break_even_rounds']:,} rounds a snapshot "
                f"({quantity(catch_up['snapshot_bytes'])}) is less",
            )
        )
    if any(summary["absences"].values()):
        absences = ", ".join(f"{n} {what}" for what, n in summary["absences"].items())
        rows.append(("reports that did not count", absences))
    if summary["skipped_steps"]:
        rows.append(("skipped steps", f"{summary['skipped_steps']} (loss not finite)"))
    if summary["zero_gradients"]:
        share = f"{100 * summary['zero_gradients']:.1f} % of the projected gradients"
        rows.append(("exactly zero", share))
    if summary["changed_share"] is not None:
        rows.append(("weights changed a round", f"{100 * summary['changed_share']:.1f} %"))
    if summary["answers_cut"] or summary["rows_dropped"]:
        rows.append(
            (
                "data",
                f"{summary['answers_cut']} answers cut, {summary['rows_dropped']} rows dropped",
            )
        )
    if summary["stopped"]:
        rows.append(("stopped early", summary["stopped"]))
    for name, value in rows:
        table.add_row(name, Text(value))
    return table


def _counts(examples: list[int]) -> str:
    if len(examples) <= 8:
        return ", ".join(map(str, examples))
    return f"{min(examples)} to {max(examples)}"


def federation_table(summary: dict[str, Any]) -> Table:
    """The result of a run across machines, for people."""
    up, down = summary["message_bytes"]["up"], summary["message_bytes"]["down"]
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    rows = [
        *(
            (
                name,
                f"{shown(name, value['start'])} to {shown(name, value['end'])}"
                + UNITS.get(name, ""),
            )
            for name, value in _changes(summary)
        ),
        ("method", f"{summary['method']}, {summary['tune']}"),
        ("rounds", f"{summary['rounds']} × {summary['local_steps']} local steps"),
        ("sites", ", ".join(f"{n} ({e} examples)" for n, e in summary["sites"].items())),
        ("time", f"{summary['seconds']:.1f} s"),
        ("messages", f"{quantity(up)} up, {quantity(down)} down for a site and round"),
        ("state digest", str(summary["state_digest"])),
    ]
    if summary["stopped"]:
        rows.append(("stopped early", summary["stopped"]))
    for row in rows:
        table.add_row(*row)
    return table


def status_tables(content: dict[str, Any]) -> list[Any]:
    """How far a run across machines is, for people."""
    head = f"{content['state']}: {content['round']} of {content['rounds']} rounds"
    if content["state"] == "running":
        head += f"; {content['what']}"
    if content["heldout_loss"] is not None:
        head += f"; held-out loss {content['heldout_loss']:.3f}"
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("site", "number", "examples", "connected", "holds", "reports", "asked for"):
        table.add_column(column, justify="left" if column in ("site", "asked for") else "right")
    table.add_column("last trouble")
    for site in content["sites"]:
        waiting = f"{site['pending']} for {site['waiting']:.0f} s" if site["pending"] else ""
        table.add_row(
            site["label"],
            "" if site["number"] is None else str(site["number"]),
            str(site["examples"]),
            "yes" if site["present"] else "no",
            str(site.get("holds", "")),
            str(site["rounds"]),
            waiting,
            site["note"],
        )
    return [head, table] + ([f"error: {content['error']}"] if content["error"] else [])
