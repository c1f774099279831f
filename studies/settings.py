"""What FedMeZO's settings are worth: each varied alone, over seeds.

Without options the model and the rows are those of `fedforward demo`. With `--model` and `--data`
it is GSM8K: DATA has `gsm8k_train.jsonl`. Each cell is a run; its held-out loss at the start and at
the end is kept in a CSV as it is done, so that a study that was stopped goes on where it was.
Tables have means with 95 % confidence intervals over seeds (Student's t). The page is made of all
rows of the CSV.

    python studies/settings.py                  # the demonstration, about an hour on one core
    python studies/settings.py --group alpha    # one group
    python studies/settings.py --model FOLDER --data FOLDER
    python studies/settings.py --quick --out FOLDER    # two rounds of a few cells
"""

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

import shared
from rich.progress import track

from fedforward.config.loading import validate
from fedforward.config.schema import Config
from fedforward.core.errors import FedForwardError
from fedforward.demo.run import prepare
from fedforward.training import build
from fedforward.training.run import Run

ROUNDS, STEPS, CLIENTS, BATCH, RATE = 20, 10, 4, 4, 3e-3
#: Passes that a step of backpropagation counts as.
BACKPROPAGATION = 3
FIELDS = ("task", "group", "setting", "seed", "start", "end", "passes", "bytes", "seconds")
DEMO = "demo"
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
            for rank in (1, 2, 4, 8, 16, 32, 64, 128)
        },
    ),
}
QUICK = (("rate", "0.003"), ("backpropagation", "fedavg, AdamW, 3e-3"), ("alpha", "0.1"))
PAGE = """# Settings of FedMeZO

What each setting is worth, varied alone. `{script}` makes this page.

LoRA is of rank 8 on all linear layers. Unless a table says otherwise there are {clients} clients
with rows at random, and {rounds} rounds of {steps} local steps. A step has one two-point Gaussian
direction on {batch} examples, with mu 1e-3 and rate {rate:g}. Figures are held-out losses in nats:
means over seeds with 95 % confidence intervals. Passes are of one batch, and a step of
backpropagation counts as three.
Bytes are what a client sends in a round, at most. A group or a seed that is not here was not run.

![Held-out loss at the end, by setting](settings.png)
{tables}
"""
#: What a task's rows are, and what is otherwise with them.
TASKS = {
    DEMO: "The demonstration: the model and the rows of `fedforward demo`.",
    "gsm8k": (
        "GSM8K on `{model}`: {rounds} rounds, rows of at most 128 tokens, 100 of them held out."
    ),
}
#: With a model of one's own: fewer rounds, and groups that rows without sites can have.
OWN_ROUNDS = 6
OWN_GROUPS: dict[str, tuple[int, tuple[str, ...]]] = {
    "rate": (3, ("0.001", "0.003", "0.01", "0.03")),
    "backpropagation": (
        3,
        ("fedmezo", "fedavg, SGD, the same rate", "fedavg, SGD, 0.1", "fedavg, AdamW, 3e-3"),
    ),
    "rank": (3, ("1", "4", "16", "64", "128")),
}


@dataclass(frozen=True)
class Task:
    """What is tuned on what.

    Attributes:
        name: as it stands in the CSV.
        model, data: folders; empty for the demonstration.
        rounds: of a run, unless its setting says otherwise.
    """

    name: str = DEMO
    model: str = ""
    data: str = ""
    rounds: int = ROUNDS

    def content(self, rows: Path) -> dict[str, Any]:
        """The sections of the model and the rows."""
        if not self.data:
            return prepare(rows).model_dump(exclude_unset=True)
        return {
            "model": {"path": self.model},
            "data": {
                "source": str(Path(self.data) / "gsm8k_train.jsonl"),
                "prompt": "Question: {question}\nAnswer:",
                "answer": " {answer}",
                "sequence_length": 128,
                "heldout": 100,
            },
        }

    def settings(self, group: str) -> tuple[int, tuple[str, ...]]:
        """Seeds of a group, and the names of its settings."""
        if self.data:
            return OWN_GROUPS[group]
        return GROUPS[group][0], tuple(GROUPS[group][1])

    @property
    def groups(self) -> tuple[str, ...]:
        """Of its study."""
        return tuple(OWN_GROUPS if self.data else GROUPS)


@dataclass(frozen=True)
class Cell:
    """One run."""

    task: Task
    group: str
    setting: str
    seed: int

    @property
    def key(self) -> tuple[str, ...]:
        """As it stands in the CSV."""
        return self.task.name, self.group, self.setting, str(self.seed)

    def configuration(self, rows: Path, most_rounds: int | None) -> Config:
        """The task's model and rows with the settings of the cell."""
        content = self.task.content(rows)
        content["federation"] = {}
        content["method"] = {}
        for part in (
            BASE,
            federation(rounds=self.task.rounds),
            GROUPS[self.group][1][self.setting],
        ):
            for section, values in part.items():
                content.setdefault(section, {}).update(values)
        if most_rounds is not None:
            content["federation"]["rounds"] = min(most_rounds, content["federation"]["rounds"])
        if content["method"]["name"] == "fedavg":
            del content["method"]["mu"]
        rounds = content["federation"]["rounds"]
        content["run"] = {"evaluate_every": rounds, "threads": 1, "seed": self.seed}
        return validate(content)


def cells(task: Task, groups: Sequence[str]) -> list[Cell]:
    """Every run of some groups, seed after seed."""
    found = []
    for group in groups:
        seeds, settings = task.settings(group)
        found += [Cell(task, group, each, seed) for each in settings for seed in range(seeds)]
    return sorted(found, key=lambda cell: cell.seed)


class Study:
    """Does cells one after another."""

    def __init__(self, folder: Path, most_rounds: int | None) -> None:
        self.most_rounds = most_rounds
        self.folder = folder
        self.table = shared.Table(folder / "settings.csv", FIELDS, 4)
        self.known = self.table.known

    def take(self, cell: Cell) -> None:
        """Do a cell that is not known yet."""
        if cell.key in self.known:
            return
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            config = cell.configuration(Path(scratch) / "rows.jsonl", self.most_rounds)
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
        self.table.add((*cell.key, *figures))

    def rows(self, task: str, group: str, setting: str) -> list[dict[str, str]]:
        """Of a setting, by seed."""
        return [row for key, row in self.known.items() if key[:3] == (task, group, setting)]


def table(study: Study, task: str, group: str) -> str:
    """A group in lines; empty where nothing of it is done."""
    lines = [
        f"\n### {group.capitalize()}\n",
        "| setting | seeds | loss before | at the end | interval | diverged | passes | bytes up |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for setting in GROUPS[group][1]:
        rows = study.rows(task, group, setting)
        if not rows:
            continue
        ends = [float(row["end"]) for row in rows]
        good = [end for end in ends if math.isfinite(end)]
        mean, half = shared.interval(good) if good else (math.nan, math.nan)
        shown = f"{mean:.3f}" if good else ""
        width = f"± {half:.3f}" if math.isfinite(half) else ""
        sent = max(int(row["bytes"]) for row in rows)
        start = statistics.fmean(float(row["start"]) for row in rows)
        lines.append(
            f"| {setting} | {len(rows)} | {start:.3f} | {shown} | {width} | "
            f"{len(ends) - len(good)} | {int(rows[0]['passes']):,} | "
            f"{sent or '':{',' if sent else ''}} |"
        )
    return "\n".join(lines) if len(lines) > 3 else ""


def tables(study: Study) -> str:
    """All that is done, task by task."""
    found = []
    for task in dict.fromkeys(key[0] for key in study.known):
        kind, _, model = task.partition(", ")
        text = TASKS[kind].format(model=model, rounds=OWN_ROUNDS)
        found += [f"\n## {task.replace('gsm8k', 'GSM8K')}\n\n{text}".replace("## demo", "## Demo")]
        found += filter(None, (table(study, task, group) for group in GROUPS))
    return "\n".join(found)


def draw(study: Study, path: Path) -> None:
    """Every group of every task as a row of points."""
    done = list(dict.fromkeys(key[:2] for key in study.known))
    done.sort(key=lambda pair: (pair[0] != DEMO, pair[0], list(GROUPS).index(pair[1])))
    columns = 3
    rows = -(-len(done) // columns)
    figure, axes = shared.figure((11, 2.6 * rows), rows, columns)
    for one in axes[len(done) :]:
        one.set_visible(False)
    for one, (task, group) in zip(axes, done, strict=False):
        settings = [each for each in GROUPS[group][1] if study.rows(task, group, each)]
        for number, setting in enumerate(settings):
            ends = [float(row["end"]) for row in study.rows(task, group, setting)]
            ends = [end for end in ends if math.isfinite(end)]
            one.plot([number] * len(ends), ends, "o", color="tab:blue", alpha=0.6)
        short = [setting.split(",")[-1].strip() for setting in settings]
        one.set_xticks(range(len(settings)), short, rotation=30, ha="right", fontsize=7)
        one.set_title(f"{task}: {group}", fontsize=9)
        one.set_ylabel("held-out loss", fontsize=8)
    shared.save(figure, path)


def write_page(study: Study) -> None:
    """The page and the picture of all that is in the CSV."""
    text = PAGE.format(
        script="studies/settings.py",
        clients=CLIENTS,
        rounds=ROUNDS,
        steps=STEPS,
        batch=BATCH,
        rate=RATE,
        tables=tables(study),
    )
    (study.folder / "settings.md").write_text(text, encoding="utf-8")
    draw(study, study.folder / "settings.png")


def main() -> None:
    """See the module."""
    parser = shared.parser(__doc__, "two rounds of a few cells")
    parser.add_argument("--page", action="store_true", help="the page of what is done, and no run")
    parser.add_argument("--group", choices=tuple(GROUPS), action="append", help="these alone")
    shared.own_model(parser, "gsm8k_train.jsonl")
    arguments = shared.parse(parser)
    shared.check_own_model(parser, arguments)
    task = Task()
    if arguments.model:
        name = f"gsm8k, {Path(arguments.model).name}"
        task = Task(name, arguments.model, arguments.data, OWN_ROUNDS)
    unknown = set(arguments.group or ()) - set(task.groups)
    if unknown:
        parser.error(f"with --model the groups are {', '.join(task.groups)}")
    study = Study(arguments.out, 2 if arguments.quick else None)
    wanted = cells(task, arguments.group or task.groups)
    if arguments.quick:
        wanted = [cell for cell in wanted if cell.key[1:3] in QUICK and cell.seed == 0]
    for cell in () if arguments.page else track(wanted, "Running"):
        study.take(cell)
    write_page(study)


if __name__ == "__main__":
    main()
