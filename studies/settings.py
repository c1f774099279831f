"""What FedMeZO's settings are worth: each varied alone, over seeds, on a model of seconds.

The model and the rows are those of `fedforward demo`. Each cell is a run; its held-out loss at the
start and at the end is kept in a CSV as it is done, so that a study that was stopped goes on where
it was. Tables have means with 95 % confidence intervals over seeds (Student's t).

    python studies/settings.py                  # all cells, about an hour on one core
    python studies/settings.py --group alpha    # one group
    python studies/settings.py --quick          # two rounds of a few cells, in another folder
"""

import argparse
import csv
import math
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from rich.progress import track

from fedforward.config.loading import validate
from fedforward.config.schema import Config
from fedforward.core.errors import FedForwardError
from fedforward.demo.run import prepare
from fedforward.training import build
from fedforward.training.run import Run

DOCS = Path(__file__).parents[1] / "docs" / "studies"
ROUNDS, STEPS, CLIENTS, BATCH, RATE = 20, 10, 4, 4, 3e-3
#: Passes that a step of backpropagation counts as.
BACKPROPAGATION = 3
FIELDS = ("group", "setting", "seed", "start", "end", "passes", "bytes", "seconds")
#: Of every cell that says nothing else.
BASE: dict[str, dict[str, Any]] = {
    "lora": {"rank": 8, "alpha": 16.0},
    "federation": {"clients": CLIENTS, "partition": "iid", "rounds": ROUNDS},
    "method": {
        "name": "fedmezo",
        "learning_rate": RATE,
        "local_steps": STEPS,
        "batch_size": BATCH,
        "mu": 1e-3,
    },
}
Settings = Mapping[str, Mapping[str, Any]]


def method(**values: Any) -> Settings:
    """Keys of `[method]`."""
    return {"method": values}


def federation(**values: Any) -> Settings:
    """Keys of `[federation]`."""
    return {"federation": {"field": None, **values}}


def _dirichlet(alpha: float) -> Settings:
    return federation(partition="dirichlet", field="site", alpha=alpha)


BY_SITE = federation(partition="by-field", field="site")
#: Settings of each group by name, and how many seeds each has.
GROUPS: dict[str, tuple[int, dict[str, Settings]]] = {
    "rate": (
        3,
        {f"{rate:g}": method(learning_rate=rate) for rate in (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)},
    ),
    "backpropagation": (
        3,
        {
            "fedmezo": {},
            "fedavg, SGD, the same rate": method(name="fedavg", optimizer="sgd"),
            **{
                f"fedavg, SGD, {rate:g}": method(name="fedavg", optimizer="sgd", learning_rate=rate)
                for rate in (0.03, 0.1, 0.3)
            },
            "fedavg, AdamW, 3e-3": method(name="fedavg", optimizer="adamw", learning_rate=3e-3),
            "fedavg, AdamW, 1e-2": method(name="fedavg", optimizer="adamw", learning_rate=1e-2),
        },
    ),
    "alpha": (
        5,
        {
            "by site": BY_SITE,
            **{f"{alpha:g}": _dirichlet(alpha) for alpha in (0.1, 0.5, 1.0, 10.0)},
            "iid": {},
        },
    ),
    "client rates": (
        5,
        {
            name: {**BY_SITE, "method": {"client_rates": name}}
            for name in ("fixed", "random", "loss", "loss-window", "update-difference")
        },
    ),
    "local steps": (
        3,
        {
            f"{steps} in {rounds} rounds": {
                "federation": {"rounds": rounds},
                "method": {"local_steps": steps},
            }
            for steps, rounds in ((1, 200), (5, 40), (10, 20), (40, 5))
        },
    ),
    "mu": (3, {f"{mu:g}": method(mu=mu) for mu in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)}),
    "directions": (
        3,
        {
            "gaussian, 1": {},
            "rademacher, 1": method(distribution="rademacher"),
            "gaussian, 5 in steps a fifth as many": method(directions=5, local_steps=2),
            "the same at five times the rate": method(
                directions=5, local_steps=2, learning_rate=5 * RATE
            ),
        },
    ),
    "clients": (
        3,
        {f"{clients}": federation(clients=clients) for clients in (3, 10, 20, 40)},
    ),
    "rank": (
        3,
        {
            f"{rank}": {"lora": {"rank": rank, "alpha": 2.0 * rank}}
            for rank in (1, 2, 4, 8, 16, 32, 64)
        },
    ),
}
QUICK = (("rate", "0.003"), ("backpropagation", "fedavg, AdamW, 3e-3"), ("alpha", "0.1"))
PAGE = """# Settings of FedMeZO

What each setting is worth, varied alone. `{script}` makes this page.

The model and the rows are those of `fedforward demo`; LoRA of rank 8 on all linear layers.
Unless a table says otherwise: 4 clients with rows at random, {rounds} rounds of {steps} local
steps, one two-point Gaussian direction on {batch} examples, mu 1e-3, rate {rate:g}.
Figures are held-out losses in nats, means over seeds with 95 % confidence intervals.
Passes are of one batch; a step of backpropagation counts as three.

![Held-out loss at the end, by setting](settings.png)
{tables}
"""


@dataclass(frozen=True)
class Cell:
    """One run."""

    group: str
    setting: str
    seed: int

    @property
    def key(self) -> tuple[str, ...]:
        """As it stands in the CSV."""
        return self.group, self.setting, str(self.seed)


def cells(groups: Sequence[str]) -> list[Cell]:
    """Every run of some groups, seed after seed."""
    found = [
        Cell(group, setting, seed)
        for group in groups
        for setting in GROUPS[group][1]
        for seed in range(GROUPS[group][0])
    ]
    return sorted(found, key=lambda cell: cell.seed)


def configuration(cell: Cell, rows: Path, most_rounds: int | None) -> Config:
    """The demonstration's model and rows with the settings of a cell."""
    content: dict[str, Any] = prepare(rows).model_dump(exclude_unset=True)
    content["federation"] = {}
    content["method"] = {}
    for part in (BASE, GROUPS[cell.group][1][cell.setting]):
        for section, values in part.items():
            content.setdefault(section, {}).update(values)
    if most_rounds is not None:
        content["federation"]["rounds"] = min(most_rounds, content["federation"]["rounds"])
    if content["method"]["name"] == "fedavg":
        del content["method"]["mu"]
    rounds = content["federation"]["rounds"]
    content["run"] = {"evaluate_every": rounds, "threads": 1, "seed": cell.seed}
    return validate(content)


class Study:
    """Does cells one after another."""

    def __init__(self, folder: Path, most_rounds: int | None) -> None:
        self.most_rounds = most_rounds
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.file = folder, folder / "settings.csv"
        if not self.file.is_file():
            self.file.write_text(",".join(FIELDS) + "\n", encoding="utf-8")
        with self.file.open(encoding="utf-8", newline="") as lines:
            self.known = {tuple(row[f] for f in FIELDS[:3]): row for row in csv.DictReader(lines)}

    def take(self, cell: Cell) -> None:
        """Do a cell that is not known yet."""
        if cell.key in self.known:
            return
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            config = configuration(cell, Path(scratch) / "rows.jsonl", self.most_rounds)
            built = build.build_model(config, build.resolve_plan(config), ())
            run = Run(config, Path(scratch) / "run", built=built)
            try:
                summary = run.fit().to_json()
                start, end = summary["heldout_loss"]["start"], summary["heldout_loss"]["end"]
                sent = summary["bytes_per_client_round"]["up"]
            except FedForwardError:
                # It has diverged.
                start, end, sent = run.directory.read_metrics(1)[0]["heldout_loss"], math.inf, 0.0
        steps = config.federation.rounds * config.method.local_steps * config.federation.clients
        probes = config.method.probes_per_step
        passes = steps * (BACKPROPAGATION if config.method.name == "fedavg" else probes)
        seconds = time.monotonic() - began
        figures = (f"{start:.6f}", f"{end:.6f}", str(passes), f"{sent:.0f}", f"{seconds:.1f}")
        row = dict(zip(FIELDS, (*cell.key, *figures), strict=True))
        with self.file.open("a", encoding="utf-8", newline="") as lines:
            csv.DictWriter(lines, FIELDS, lineterminator="\n").writerow(row)
        self.known[cell.key] = row

    def ends(self, group: str, setting: str) -> list[float]:
        """The last losses of a setting, by seed."""
        rows = [row for key, row in self.known.items() if key[:2] == (group, setting)]
        return [float(row["end"]) for row in rows]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % confidence interval; NaN of one value."""
    from scipy.stats import t

    mean = statistics.fmean(values)
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return mean, math.nan
    error = statistics.stdev(values) / math.sqrt(len(values))
    return mean, float(t.ppf(0.975, len(values) - 1)) * error


def table(study: Study, group: str) -> str:
    """A group in lines; empty where nothing of it is done."""
    lines = [
        f"\n## {group.capitalize()}\n",
        "| setting | seeds | loss at the end | interval | diverged | passes | bytes up |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for setting in GROUPS[group][1]:
        rows = [row for key, row in study.known.items() if key[:2] == (group, setting)]
        if not rows:
            continue
        ends = [float(row["end"]) for row in rows]
        good = [end for end in ends if math.isfinite(end)]
        mean, half = interval(good) if good else (math.nan, math.nan)
        shown = f"{mean:.3f}" if good else ""
        width = f"± {half:.3f}" if math.isfinite(half) else ""
        sent = max(int(row["bytes"]) for row in rows)
        lines.append(
            f"| {setting} | {len(rows)} | {shown} | {width} | {len(ends) - len(good)} | "
            f"{int(rows[0]['passes']):,} | {sent or '':{',' if sent else ''}} |"
        )
    return "\n".join(lines) if len(lines) > 3 else ""


def draw(study: Study, path: Path) -> None:
    """Every group as a row of points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = 3
    figure, axes = pyplot.subplots(
        -(-len(GROUPS) // columns), columns, figsize=(11, 8), layout="constrained", squeeze=False
    )
    for place, group in enumerate(GROUPS):
        one = axes[place // columns][place % columns]
        settings = list(GROUPS[group][1])
        for number, setting in enumerate(settings):
            ends = [end for end in study.ends(group, setting) if math.isfinite(end)]
            one.plot([number] * len(ends), ends, "o", color="tab:blue", alpha=0.6)
        short = [setting.split(",")[-1].strip() for setting in settings]
        one.set_xticks(range(len(settings)), short, rotation=30, ha="right", fontsize=7)
        one.set_title(group, fontsize=9)
        one.set_ylabel("held-out loss", fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two rounds of a few cells")
    parser.add_argument("--group", choices=tuple(GROUPS), action="append", help="these alone")
    parser.add_argument("--out", type=Path, help="folder of what is written; default docs/studies")
    arguments = parser.parse_args()
    if arguments.quick and arguments.out is None:
        parser.error("--quick needs --out FOLDER, so that it does not replace the study's figures")
    study = Study(arguments.out or DOCS, 2 if arguments.quick else None)
    wanted = cells(arguments.group or tuple(GROUPS))
    if arguments.quick:
        wanted = [cell for cell in wanted if cell.key[:2] in QUICK and cell.seed == 0]
    for cell in track(wanted, "Running"):
        study.take(cell)
    tables = "\n".join(filter(None, (table(study, group) for group in GROUPS)))
    text = PAGE.format(
        script="studies/settings.py",
        rounds=ROUNDS,
        steps=STEPS,
        batch=BATCH,
        rate=RATE,
        tables=tables,
    )
    (study.folder / "settings.md").write_text(text, encoding="utf-8")
    draw(study, study.folder / "settings.png")


if __name__ == "__main__":
    main()
