"""The charts of one run, in the order in which a page shows them. Imports no PyTorch."""

from collections.abc import Iterator, Mapping, Sequence
from math import isfinite, nan
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedforward.core.units import quantity
from fedforward.evaluation.text_metrics import LOSSES, SHARES
from fedforward.reporting.charts import (
    MOST_LINES,
    Chart,
    Series,
    bar_chart,
    grid_chart,
    line_chart,
    number,
)
from fedforward.reporting.record import ClientRounds, RunRecord

#: Values that differ by more than this factor have a logarithmic axis.
WIDE = 30.0
#: Rounds that are named one by one in the table of participation.
_MOST_NAMED = 6
#: Clients whose examples are drawn.
_MOST_BARS = 12


def charts_of(record: RunRecord) -> list[Chart]:
    """Every chart of a run that there are figures for."""
    found = [*_loss(record), *_metrics(record)]
    if record.clients is not None:
        found += _of_clients(record, record.clients)
    found += _partition(record)
    if record.rounds:
        found += [*_skipped(record), *_bytes(record), *_memory(record)]
    return found


def heldout(record: RunRecord, name: str, *, x: str = "round") -> Series:
    """A held-out figure at each evaluation, against rounds, seconds or forward passes.

    Args:
        name: "loss", or a metric's.
        x: the key of a metrics line that it is drawn against; where a line has none, the last.
    """
    xs, ys, place = [], [], 0.0
    for line in record.lines:
        place = float(line.get(x, place))
        if "heldout_loss" in line:
            value = line["heldout_loss"] if name == "loss" else line.get("metrics", {}).get(name)
            xs.append(place)
            ys.append(nan if value is None else float(value))
    return Series("held-out", xs, ys, marks=True)


def _training(record: RunRecord, *, score: bool = False) -> Series:
    """The mean training loss of each round, or as a score what is 1 minus it."""
    lines = record.lines[1:]
    known = [nan if line["training_loss"] is None else line["training_loss"] for line in lines]
    values = [1.0 - value for value in known] if score else known
    rounds = [float(line["round"]) for line in lines]
    return Series(f"training, all {_party(record)}s", rounds, values, colour=1, pale=True)


def _drawn(series: Sequence[Series]) -> list[Series]:
    """Those that have a value."""
    return [each for each in series if any(map(isfinite, each.y))]


def _loss(record: RunRecord) -> Iterator[Chart]:
    """Held-out and training loss, of what is optimised if that is a loss."""
    objective = record.config.objective
    name = objective if objective in LOSSES else "loss"
    series = [heldout(record, name)]
    if objective in LOSSES:
        series.insert(0, _training(record))
    what = "cross-entropy of label words" if name == "choice" else "nats per answer token"
    if "withheld" not in record.lines[0] or _drawn(series):
        yield line_chart("Loss", _drawn(series), "round", what)


def _metrics(record: RunRecord) -> Iterator[Chart]:
    """The metrics that are shares together, and each of the others alone."""
    objective = record.config.objective
    names = [n for n in record.lines[0].get("metrics", {}) if n not in ("loss", objective)]
    if objective in record.lines[0].get("metrics", {}) and objective not in LOSSES:
        names.insert(0, objective)
    shares = [name for name in names if name in SHARES]
    if shares:
        series = [
            Series(f"held-out {name}", own.x, own.y, colour=n, marks=True)
            for n, name in enumerate(shares)
            for own in [heldout(record, name)]
        ]
        if objective in shares:
            own = _training(record, score=True)
            series.append(Series(f"training {objective}", own.x, own.y, len(shares), pale=True))
        if kept := _drawn(series):
            yield line_chart("Metrics", kept, "round", "share of examples, or score")
    for name in names:
        if name not in SHARES and (kept := _drawn([heldout(record, name)])):
            yield line_chart(f"Metric: {name}", kept, "round", name)


def _of_clients(record: RunRecord, clients: ClientRounds) -> Iterator[Chart]:
    """What the ledger has of each client."""
    wanted = (
        (f"Training loss of each {_party(record)}", clients.loss, "loss (nats)"),
        (f"Learning rate of each {_party(record)}", clients.rate, "learning rate"),
        ("Size of projected gradients", clients.size, "root mean square"),
    )
    for title, values, words in wanted:
        if np.isfinite(values).any():
            yield _each_client(title, values, clients, words, record)
    yield _participation(clients, record)
    if clients.zeros is not None and np.nansum(clients.zeros) > 0:
        yield _zeros(clients)
    if clients.active is not None:
        yield _blocks(clients.active, clients, record)


def client_name(record: RunRecord, client: int) -> str:
    """How a client is called on a page."""
    return record.sites.get(client) or f"{_party(record)} {client}"


def _party(record: RunRecord) -> str:
    return "site" if record.server else "client"


def _each_client(
    title: str, values: NDArray[np.float64], clients: ClientRounds, words: str, record: RunRecord
) -> Chart:
    """A line for each client, or of many their median and range."""
    rounds = [float(n) for n in range(1, len(values) + 1)]
    known = values[np.isfinite(values) & (values > 0)]
    log = bool(known.size) and known.max() > WIDE * known.min()
    if _all_the_same(values):
        means, alike = _over_clients(np.nanmean, values), f"all {_party(record)}s alike"
        series = [Series(alike, rounds, means)]
        note = f"{alike.capitalize()}."
        return line_chart(title, series, "round", words, log_y=log, note=note)
    if len(clients.clients) <= MOST_LINES:
        series = [
            Series(client_name(record, client), rounds, values[:, n].tolist(), colour=n)
            for n, client in enumerate(clients.clients)
        ]
        return line_chart(title, _drawn(series), "round", words, log_y=log)
    low, middle, high = (
        Series(name, rounds, _over_clients(function, values))
        for name, function in (
            ("lowest", np.nanmin),
            (f"median of {len(clients.clients)} {_party(record)}s", np.nanmedian),
            ("highest", np.nanmax),
        )
    )
    return line_chart(title, [middle], "round", words, log_y=log, band=(low, high))


def _all_the_same(values: NDArray[np.float64]) -> bool:
    rows = values[np.isfinite(values).any(axis=1)]
    same = np.nanmin(rows, axis=1) == np.nanmax(rows, axis=1)
    return values.shape[1] > 1 and bool(same.all())


def _over_clients(function: Any, values: NDArray[np.float64]) -> list[float]:
    """A statistic of each round; NaN where no client has a value."""
    found = np.full(len(values), nan)
    known = np.isfinite(values).any(axis=1)
    found[known] = function(values[known], axis=1)
    return [float(value) for value in found]


def _participation(clients: ClientRounds, record: RunRecord) -> Chart:
    part = clients.took_part
    names = [client_name(record, client) for client in clients.clients]
    table = []
    for n, name in enumerate(names):
        away = (np.flatnonzero(~part[:, n]) + 1).tolist()
        text = ", ".join(map(str, away[:_MOST_NAMED])) or "–"
        if len(away) > _MOST_NAMED:
            text += f" and {len(away) - _MOST_NAMED} more"
        count = int(part[:, n].sum())
        table.append([name, f"{count:,}", f"{100 * count / len(part):.0f} %", text])
    return grid_chart(
        "Participation",
        part.T.astype(np.float64),
        names,
        None,
        "round",
        "",
        head=["", "rounds", "share", "not in round"],
        table=table,
        first=1,
        note=f"Dark: the round was made with this {_party(record)}'s report.",
    )


def _zeros(clients: ClientRounds) -> Chart:
    rounds = [float(n) for n in range(1, len(clients.zeros) + 1)]
    shares = [100 * value for value in _over_clients(np.nanmean, clients.zeros)]
    return line_chart(
        "Projected gradients that are exactly 0",
        [Series("share (%)", rounds, shares, colour=1)],
        "round",
        "% of the round's",
        zero=True,
        note="Such probes told nothing; those of skipped steps are among them.",
    )


def _skipped(record: RunRecord) -> Iterator[Chart]:
    counts = [float(line["skipped_steps"]) for line in record.lines[1:]]
    if any(counts):
        rounds = [float(line["round"]) for line in record.lines[1:]]
        yield line_chart(
            "Skipped steps",
            [Series("steps", rounds, counts, colour=1)],
            "round",
            "local steps",
            zero=True,
            note="Local steps whose loss was not finite, of all clients together.",
        )


def _blocks(active: NDArray[np.float64], clients: ClientRounds, record: RunRecord) -> Chart:
    divided = record.divided
    known = divided is not None and len(divided.blocks) == len(active)
    names = divided.blocks if divided and known else [str(n) for n in range(len(active))]
    columns = [client_name(record, client) for client in clients.clients]
    return grid_chart(
        f"Blocks of each {_party(record)}",
        active,
        names,
        columns,
        "",
        "block",
        head=["block", *columns],
        table=[
            [name, *(_percent(value) for value in row)]
            for name, row in zip(names, active, strict=True)
        ],
        note=f"Share of a {_party(record)}'s rounds in which it tuned the block.",
    )


def _percent(value: float) -> str:
    return "–" if not isfinite(value) else f"{100 * value:.0f} %"


def _partition(record: RunRecord) -> Iterator[Chart]:
    """Labels by client where the folder has them, else how many examples each client has."""
    if record.divided is not None and record.divided.labels:
        yield _labels(record, record.divided.by, record.divided.labels)
        return
    counts = _examples(record)
    if counts:
        few = len(counts) <= _MOST_BARS
        most = counts if few else sorted(counts, key=lambda pair: -pair[1])[:_MOST_BARS]
        note = f"The largest {len(most)} of {len(counts)}." if len(most) < len(counts) else ""
        bars = [(name, float(count), 0) for name, count in most]
        yield bar_chart("Training examples", bars, "examples", number, note=note)


def _examples(record: RunRecord) -> list[tuple[str, int]]:
    summary = record.summary or {}
    if isinstance(found := summary.get("sites"), dict):
        return [(str(name), count) for name, count in found.items() if type(count) is int]
    if isinstance(found := summary.get("examples"), list):
        return [(f"client {n}", count) for n, count in enumerate(found) if type(count) is int]
    if record.clients is not None:
        pairs = zip(record.clients.clients, record.clients.examples.tolist(), strict=True)
        return [(client_name(record, client), count) for client, count in pairs]
    return []


def _labels(record: RunRecord, by: str, rows: Sequence[Mapping[str, int]]) -> Chart:
    names = list(dict.fromkeys(name for row in rows for name in row))
    counts = np.array([[row.get(name, 0) for row in rows] for name in names], np.float64)
    columns = [client_name(record, n) for n in range(len(rows))]
    return grid_chart(
        "Partition of the training examples",
        counts / max(1.0, counts.max()),
        names,
        columns,
        "",
        by,
        head=[by, *columns],
        table=[
            [name, *(f"{int(count):,}" for count in row)]
            for name, row in zip(names, counts, strict=True)
        ],
        texts=[[f"{int(count):,}" for count in row] for row in counts],
        note=f"How many examples of each {by} a client has.",
    )


def tensor_bytes(record: RunRecord) -> int | None:
    """Bytes of the tuned tensors in float32: what FedAvg sends each way; None if not known."""
    count = (record.summary or {}).get("tuned_parameters")
    return 4 * count if type(count) is int and count > 0 else None


def traffic(record: RunRecord) -> tuple[float, float] | None:
    """Mean bytes up and down of a client and round; None where none were counted."""
    found = [line["bytes"] for line in record.lines if "bytes" in line]
    if not found:
        return None
    return tuple(float(np.mean([each[way] for each in found])) for way in ("up", "down"))  # type: ignore[return-value]


def _bytes(record: RunRecord) -> Iterator[Chart]:
    measured, tensors = traffic(record), tensor_bytes(record)
    if measured is None:
        return
    bars = [("up", measured[0], 0), ("down", measured[1], 0)]
    note = ""
    if tensors is not None and record.config.method.name != "fedavg":
        bars.append(("FedAvg, each way", float(tensors), 1))
        note = "FedAvg is not measured: it would send the tuned tensors in float32."
    bars = [bar for bar in bars if bar[1] > 0]
    if bars:
        words = f"bytes of a {_party(record)} and round"
        yield bar_chart("Traffic", bars, words, quantity, log=True, note=note)


def _memory(record: RunRecord) -> Iterator[Chart]:
    summary = record.summary or {}
    peak, plain = summary.get("peak_memory_bytes"), summary.get("inference_memory_bytes")
    if type(peak) is not int or type(plain) is not int or not plain > 0:
        return
    note = f"{peak / plain:.2f} times plain inference on the widest batch, weights included."
    if record.config.method.name != "fedavg":
        note += " A run of fedavg on the same page shows what backpropagation takes."
    bars = [("a step", float(peak), 0), ("plain inference", float(plain), 1)]
    yield bar_chart("Peak memory", bars, "bytes", quantity, note=note)
