"""One HTML page of a run, or of several: it needs no other file, no script and no network.

Everything that comes from a run is escaped by Jinja2; the charts alone are put in as they are.
Imports no PyTorch.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fedforward.config.fields import AT_SITES
from fedforward.core.errors import FedForwardError
from fedforward.core.files import write_bytes
from fedforward.core.units import quantity
from fedforward.core.version import __version__
from fedforward.reporting import comparison
from fedforward.reporting.charts import DASHES, SERIES, Chart, Series, line_chart, named, number
from fedforward.reporting.comparison import MOST_GROUPS, Results
from fedforward.reporting.figures import charts_of, heldout, tensor_bytes, traffic
from fedforward.reporting.groups import final
from fedforward.reporting.record import RunRecord

#: Runs of a page: more lines cannot be told apart.
MOST_RUNS = len(SERIES) * len(DASHES)
#: How a page begins; a file that begins otherwise is not written over.
BEGINS = "<!doctype html>\n<!-- fedforward report -->\n"


@dataclass(frozen=True)
class RunView:
    """A run as the template shows it.

    Attributes:
        name: of its folder, or its path where names are alike.
        record: what was read.
        facts: what was run, with its figures: names and texts.
        repeat: command lines.
        versions: names and texts.
        digests: names and texts.
        verified: what `verify` said; empty if it was not asked.
        charts: with names of their own.
    """

    name: str
    record: RunRecord
    facts: list[tuple[str, str]]
    repeat: list[str]
    versions: list[tuple[str, str]]
    digests: list[tuple[str, str]]
    verified: str
    charts: list[Chart]


def check_out(path: Path) -> None:
    """Refuse a file that a page cannot be written to, before anything is read.

    Raises:
        FedForwardError: it is a folder, there is no folder for it, or it is no report.
    """
    if path.is_dir():
        raise FedForwardError(f"--out {path} is a folder. Give a file, such as {path}/report.html.")
    if not path.absolute().parent.is_dir():
        raise FedForwardError(f"--out {path}: there is no folder {path.parent}.")
    if path.is_file():
        try:
            with path.open("rb") as file:
                own = file.read(len(BEGINS)) in (BEGINS.encode(), b"")
        except OSError as error:
            raise FedForwardError(f"--out {path} cannot be read: {error.strerror}.") from error
        if not own:
            raise FedForwardError(
                f"--out {path} is there already and is no report. Choose another name."
            )


def write_page(path: Path, page: str) -> int:
    """Write a page as a whole or not at all; returns its bytes.

    Raises:
        FedForwardError: it cannot be written.
    """
    data = page.encode("utf-8", "replace")
    try:
        write_bytes(path, data)
    except OSError as error:
        raise FedForwardError(
            f"{path} cannot be written: {error.strerror}. Choose another place with --out."
        ) from error
    return len(data)


def make_page(
    records: Sequence[RunRecord],
    verified: Mapping[Path, str] | None = None,
    *,
    reload_s: int | None = None,
) -> str:
    """The page of one run or of several.

    Args:
        records: at most `MOST_RUNS`.
        verified: what `verify` said of each run, by its path.
        reload_s: seconds after which a browser loads the page of unfinished runs again, from
            where it has it; None never.

    Raises:
        FedForwardError: there are too many runs.
    """
    if len(records) > MOST_RUNS:
        raise FedForwardError(
            f"A page shows at most {MOST_RUNS} runs, and {len(records)} were given. Leave out some."
        )
    names = names_of(records)
    said = verified or {}
    runs = [
        _view(record, name, said.get(record.path, ""))
        for name, record in zip(names, records, strict=True)
    ]
    together = _together(runs) if len(runs) > 1 else []
    _name_charts(together, *(run.charts for run in runs))
    return rendered(
        "report.html",
        title=f"Run {names[0]}" if len(runs) == 1 else f"{len(runs)} runs",
        runs=runs,
        together=together,
        tables=_table(runs),
        reload_s=reload_s if any(record.summary is None for record in records) else None,
    )


def waiting_page(reload_s: int = 5) -> str:
    """The page of a run that has no figures yet; it loads itself again after so many seconds."""
    return rendered("report.html", title="No figures yet", waiting=True, reload_s=reload_s)


def make_comparison_page(results: Results, repeat: Sequence[str] = ()) -> str:
    """The page of a comparison: its table, what can be told apart, and curves over seeds.

    Args:
        results: of at most `comparison.MOST_GROUPS` groups.
        repeat: command lines that carry it out again.

    Raises:
        FedForwardError: there are too many groups.
    """
    if len(results.groups) > MOST_GROUPS:
        raise FedForwardError(
            f"A page shows at most {MOST_GROUPS} groups of runs, and there are "
            f"{len(results.groups)}. Leave out some."
        )
    charts = comparison.charts_of(results)
    _name_charts(charts)
    view = ComparisonView(
        remarks=results.remarks,
        facts=_comparison_facts(results),
        table={
            "head": comparison.head(results),
            "rows": [comparison.cells(row, results) for row in results.rows],
        },
        sentences=comparison.sentences(results),
        charts=charts,
        runs=_comparison_runs(results),
        repeat=list(repeat),
    )
    title = f"{len(results.groups)} methods compared" if len(results.groups) > 1 else "One method"
    return rendered("comparison.html", title=title, comparison=view)


@dataclass(frozen=True)
class ComparisonView:
    """A comparison as the template shows it.

    Attributes:
        remarks: sentences at the top.
        facts: what was compared: names and texts.
        table: head and rows.
        sentences: what can be told apart.
        charts: with names of their own.
        runs: head and rows, one for each run.
        repeat: command lines; may be empty.
    """

    remarks: list[str]
    facts: list[tuple[str, str]]
    table: dict[str, list[Any]]
    sentences: list[str]
    charts: list[Chart]
    runs: dict[str, list[Any]]
    repeat: list[str]


def _comparison_facts(results: Results) -> list[tuple[str, str]]:
    configs = [run.config for group in results.groups for run in group.runs.values()]
    seeds = sorted({config.run.seed for config in configs})
    shown = ", ".join(map(str, seeds[:12])) + (" …" if len(seeds) > 12 else "")
    models = sorted({config.model.path for config in configs})
    clients = sorted({config.federation.clients for config in configs})
    found = [
        ("measure", f"held-out {results.measure}, {'lower' if results.lower else 'higher'} is "
                    "better"),
        ("base model's", results.before.text(comparison.digits)),
        ("equal for all", results.matched),
        ("seeds", shown),
        ("clients", ", ".join(map(str, clients))),
        ("model", ", ".join("the sites' own" if m == AT_SITES else m for m in models)),
    ]  # fmt: skip
    return [(name, text) for name, text in found if text]


def _comparison_runs(results: Results) -> dict[str, list[Any]]:
    rows = [
        [group.label, str(seed), number(final(run, results.measure)), f"{run.rounds:,}", run.state,
         str((run.summary or {}).get("state_digest") or "–")[:12], str(run.path)]
        for group in results.groups
        for seed, run in group.runs.items()
    ]  # fmt: skip
    head = ["method", "seed", f"final held-out {results.measure}", "rounds", "state",
            "state digest", "folder"]  # fmt: skip
    return {"head": head, "rows": rows}


def _name_charts(*parts: list[Chart]) -> None:
    """Give every chart of a page names of its own, in place."""
    count = 0
    for charts in parts:
        for place, chart in enumerate(charts):
            count += 1
            charts[place] = replace(chart, svg=Markup(named(chart.svg, f"c{count}")))


def rendered(template: str, *, title: str, reload_s: int | None = None, **values: Any) -> str:
    """A page of the package's own look, from one of its templates.

    Args:
        template: its name; what it shows is in `values`.
        reload_s: seconds after which a browser loads the page again; None never.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("fedforward.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    empty: dict[str, Any] = {"runs": [], "together": [], "tables": None, "waiting": False}
    body = environment.get_template(template).render(
        **{**empty, **values}, title=title, reload_s=reload_s, version=__version__
    )
    return BEGINS + body


def names_of(records: Sequence[RunRecord]) -> list[str]:
    """What tells runs apart: the names of their folders, or their paths where those are alike."""
    names = [record.name for record in records]
    return [
        name if names.count(name) == 1 else str(record.path)
        for name, record in zip(names, records, strict=True)
    ]


def _view(record: RunRecord, name: str, verified: str) -> RunView:
    return RunView(
        name=name,
        record=record,
        facts=_facts(record),
        repeat=_repeat(record),
        versions=_versions(record.environment),
        digests=_digests(record),
        verified=verified,
        charts=charts_of(record),
    )


def _change(record: RunRecord, name: str) -> str:
    values = [value for value in heldout(record, name).y if isfinite(value)]
    if not values:
        return "withheld" if "withheld" in record.lines[0] else "not finite"
    first, last = values[0], values[-1]
    relative = f" ({100 * (last / first - 1):+.1f} %)" if first > 0 and len(values) > 1 else ""
    return f"{number(first)} → {number(last)}{relative}"


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    """What was run and what came of it."""
    config, summary = record.config, record.summary or {}
    method = config.method
    metrics = [name for name in record.lines[0].get("metrics", {}) if name != "loss"]
    rate = method.learning_rate
    found = [
        ("held-out loss", _change(record, "loss")),
        *((f"held-out {name}", _change(record, name)) for name in metrics),
        ("state", record.state),
        ("method", method.name),
        ("objective", config.objective),
        ("model", "the sites' own" if record.server else config.model.path),
        ("tuned", f"{config.model.tune}{_parameters(summary)}"),
        ("rounds", f"{record.rounds:,} of {config.federation.rounds:,}"),
        ("local steps", f"{method.local_steps:,} a round, batch size {method.batch_size:,}"),
        ("learning rate", rate if isinstance(rate, str) else f"{rate:g}"),
        ("sites" if record.server else "clients", _clients(record)),
        ("time", f"{record.lines[-1]['seconds']:,.1f} s"),
    ]
    if (size := traffic(record)) is not None:
        found.append(
            (
                f"a {'site' if record.server else 'client'} and round",
                f"{quantity(size[0])} up, {quantity(size[1])} down",
            )
        )
    if (tensors := tensor_bytes(record)) is not None:
        found.append(("FedAvg would send", f"{quantity(tensors)} each way"))
    skipped = sum(line["skipped_steps"] for line in record.lines[1:])
    zeros = [line["zero_gradients"] for line in record.lines[1:] if "zero_gradients" in line]
    found.append(("skipped steps", f"{skipped:,}"))
    if zeros:
        found.append(("projected gradients of 0", f"{100 * sum(zeros) / len(zeros):.2f} %"))
    return found


def _parameters(summary: Mapping[str, Any]) -> str:
    count = summary.get("tuned_parameters")
    return f", {count:,} numbers" if type(count) is int else ""


def _clients(record: RunRecord) -> str:
    count = (record.summary or {}).get("clients")
    if type(count) is not int:
        count = record.config.federation.clients
    return f"{count:,}" if type(count) is int else "not known yet"


def _repeat(record: RunRecord) -> list[str]:
    """Command lines that carry the run out again, and prove what it has led to."""
    folder = record.path.absolute()
    configuration = shlex.quote(str(folder / "config.toml"))
    if record.server:
        return [
            f"fedforward server {configuration} --out NEW-FOLDER",
            f"fedforward verify {shlex.quote(str(folder))} --model BASE-MODEL",
        ]
    return [
        f"fedforward run {configuration} --out NEW-FOLDER",
        f"fedforward verify {shlex.quote(str(folder))}",
    ]


def _versions(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    packages = environment.get("packages")
    found = dict(environment) | (packages if isinstance(packages, dict) else {})
    return [
        (str(name), "not installed" if value is None else str(value))
        for name, value in found.items()
        if name != "packages"
    ]


def _digests(record: RunRecord) -> list[tuple[str, str]]:
    state = (record.summary or {}).get("state_digest")
    found = [("state", state if isinstance(state, str) else ""), ("ledger", record.ledger_digest)]
    return [(name, digest) for name, digest in found if digest]


def _together(runs: Sequence[RunView]) -> list[Chart]:
    """Held-out curves of all runs: against rounds, seconds and forward passes."""
    charts = []
    shared = [set(run.record.lines[0].get("metrics", {})) for run in runs]
    names = ["loss", *sorted(set.intersection(*shared) - {"loss"})]
    for name in names:
        charts += _curves(runs, name, "round", "round")
    charts += _curves(runs, "loss", "seconds", "seconds")
    if all(any("passes" in line for line in run.record.lines) for run in runs):
        charts += _curves(runs, "loss", "passes", "forward passes over a batch")
    return charts


def _curves(runs: Sequence[RunView], name: str, key: str, xlabel: str) -> list[Chart]:
    series = []
    for n, run in enumerate(runs):
        own = heldout(run.record, name, x=key)
        colour, dash = n % len(SERIES), n // len(SERIES)
        series.append(Series(run.name, own.x, own.y, colour, dash, marks=True))
    series = [each for each in series if any(map(isfinite, each.y))]
    title = f"Held-out {name} against {'rounds' if key == 'round' else key}"
    words = "nats per answer token" if name == "loss" else name
    return [line_chart(title, series, xlabel, words)] if series else []


def _table(runs: Sequence[RunView]) -> dict[str, list[Any]]:
    """The figures of all runs, side by side."""
    head = ["run", "method", "rounds", "loss before", "loss after", "lowest", "up", "down"]
    head += ["peak memory", "seconds", "state"]
    rows = []
    for run in runs:
        record = run.record
        losses = [value for value in heldout(record, "loss").y if isfinite(value)]
        up, down = traffic(record) or (None, None)
        peak = (record.summary or {}).get("peak_memory_bytes")
        rows.append(
            [
                run.name,
                record.config.method.name,
                f"{record.rounds:,}",
                *map(number, (losses[0], losses[-1], min(losses)) if losses else (None,) * 3),
                quantity(up) if up is not None else "–",
                quantity(down) if down is not None else "–",
                quantity(peak) if type(peak) is int else "–",
                f"{record.lines[-1]['seconds']:,.1f}",
                record.state,
            ]
        )
    return {"head": head, "rows": rows}
