"""What differential privacy costs: runs at ε = 2, 6 and without noise beside each other.

Without options the model and the rows are those of `fedforward demo`. With `--model` and `--data`
it is SST-2 with label words: DATA has `sst2_train.jsonl` and `sst2_validation.jsonl`. Where several
rates are given, each ε has the one that is best on a seed of its own. Runs are kept in a CSV as
they are done, so that a study that was stopped goes on where it was. The page is made of all rows
of the CSV.

    python studies/privacy.py                     # the demonstration
    python studies/privacy.py --model FOLDER --data FOLDER --name tiny-llama
    python studies/privacy.py --model FOLDER --data FOLDER --name smollm2 --blocks 28-29 --seeds 1
    python studies/privacy.py --quick --out FOLDER    # two rounds, one seed
"""

import argparse
import json
import math
import os
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import shared
from rich.progress import track
from shared import Row

from fedforward.config.loading import validate
from fedforward.config.schema import Config
from fedforward.core.errors import FedForwardError
from fedforward.core.steps import Steps
from fedforward.data.public import public_examples
from fedforward.data.sampler import by_length
from fedforward.demo.run import prepare
from fedforward.demo.text import site_examples
from fedforward.training import build
from fedforward.training.assembly import build_method, guarantee_of
from fedforward.training.run import Run

EPSILONS = (2.0, 6.0, math.inf)
#: Stands for the least noise that a configuration allows: rows are clipped, and ε says nothing.
CLIPPED, LEAST_NOISE = 1e9, 1e-3
CLIENTS, TRIED_SEED = 4, 100
#: Rows that anyone may see: for A and U, and for the bound of a row's projected gradients.
PUBLIC = 256
#: The adapters' A and U, which all runs of a task begin with.
INITIAL = "initial_a.safetensors"
FIELDS = (
    "task",
    "epsilon",
    "rate",
    "seed",
    "rounds",
    "batch",
    "examples",
    "delta",
    "noise",
    "clip",
    "start",
    "end",
    "accuracy_start",
    "accuracy_end",
)


@dataclass(frozen=True)
class Task:
    """What is tuned on what.

    Attributes:
        name: as it stands in the CSV.
        model, data: folders; empty for the demonstration.
        blocks: `model.blocks`; empty is all.
        rounds, batch, examples, delta: of a run; `examples` of each client.
        rates: that are tried.
        seeds: of the runs that count.
        clipped: whether runs are done that clip and have next to no noise.
    """

    name: str
    model: str
    data: str
    blocks: str
    rounds: int
    batch: int
    examples: int
    delta: float
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    clipped: bool = False

    def configuration(
        self, folder: Path, epsilon: float, rate: float, seed: int, clip: float
    ) -> Config:
        """A run of `fedmezo-auto` with a rate that is given."""
        if not self.data:
            content = prepare(folder / "rows.jsonl").model_dump(exclude_unset=True)
            rows = site_examples(seed=1, per_site=PUBLIC // 4)
        else:
            content = {
                "model": {"path": self.model},
                "data": {
                    "source": str(folder / "rows.jsonl"),
                    "prompt": "{sentence} It was",
                    "answer": "{label}",
                    "label_words": {"0": " terrible", "1": " great"},
                    "sequence_length": 96,
                },
                "evaluation": {
                    "source": str(Path(self.data) / "sst2_validation.jsonl"),
                    "metrics": ["accuracy"],
                },
                "federation": {},
            }
            text = (Path(self.data) / "sst2_train.jsonl").read_text(encoding="utf-8")
            every = [json.loads(line) for line in text.splitlines()]
            rows = every[:PUBLIC]
            _write(folder / "rows.jsonl", every[PUBLIC:])
        _write(folder / "public.jsonl", rows)
        if self.blocks:
            content["model"]["blocks"] = self.blocks
        content["data"] |= {"public": str(folder / "public.jsonl"), "public_rows": len(rows)}
        if (initial := folder / INITIAL).is_file():
            content["lora"] = {"init_file": str(initial)}
        content["federation"] |= {"clients": CLIENTS, "rounds": self.rounds, "weights": "equal"}
        content["method"] = {
            "name": "fedmezo-auto",
            "learning_rate": rate,
            "batch_size": self.batch,
        }
        content["run"] = {"evaluate_every": self.rounds, "threads": 1, "seed": seed}
        if math.isfinite(epsilon):
            noise = {"target_epsilon": epsilon}
            if epsilon == CLIPPED:
                noise = {"noise_multiplier": LEAST_NOISE}
            content["privacy"] = noise | {
                "clip": clip,
                "delta": self.delta,
                "examples": self.examples,
            }
        return validate(content)


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


class Study:
    """Does the runs of a task one after another, on one model."""

    def __init__(self, folder: Path, task: Task, scratch: Path) -> None:
        self.task, self.scratch = task, scratch
        self.table = shared.Table(folder / "privacy.csv", FIELDS, 4)
        self.known = self.table.known
        self.epsilons = (*EPSILONS, CLIPPED) if task.clipped else EPSILONS
        self._built: Any = None
        self._clip: float | None = None

    def carry_out(self) -> None:
        """Try the rates, and do each seed with the best one."""
        task = self.task
        tries = [(e, rate, TRIED_SEED) for e in EPSILONS for rate in task.rates]
        if len(task.rates) > 1:
            for epsilon, rate, seed in track(tries, f"{task.name}: rates"):
                self.take(epsilon, rate, seed)
        for epsilon, seed in track(
            [(e, seed) for seed in task.seeds for e in self.epsilons], f"{task.name}: seeds"
        ):
            rate = task.rates[0]
            if len(task.rates) > 1 and epsilon != CLIPPED:
                rate = best_rate(list(self.known.values()), task.name, epsilon)
            self.take(epsilon, rate, seed)

    def take(self, epsilon: float, rate: float, seed: int) -> None:
        """Do a run that is not known yet."""
        task = self.task
        key = (task.name, f"{epsilon:g}", f"{rate:g}", str(seed))
        if key in self.known:
            return
        clip = self._bound()
        config = task.configuration(self.scratch, epsilon, rate, seed, clip)
        given = guarantee_of(config)
        self._built[0].reset()
        with tempfile.TemporaryDirectory() as out:
            run = Run(config, Path(out) / "run", built=self._built)
            try:
                found = run.fit().to_json()
                loss, metrics = found["heldout_loss"], found["metrics"]
            except FedForwardError:
                # It has diverged: what it ends at is beyond where it began.
                loss, metrics = {"start": math.nan, "end": math.inf}, {}
        choice, right = metrics.get("choice", loss), metrics.get("accuracy", {})
        values = (
            *key,
            task.rounds,
            task.batch,
            task.examples,
            f"{task.delta:g}",
            f"{given.noise_multiplier:.4f}" if given else "",
            f"{clip:.4g}",
            f"{choice['start']:.6f}",
            f"{choice['end']:.6f}",
            *(f"{right[side]:.6f}" if right else "" for side in ("start", "end")),
        )
        self.table.add(values)

    def _bound(self) -> float:
        """The median length of a public row's projected gradients, at the base."""
        if self._clip is None:
            folder = self.scratch
            config = self.task.configuration(folder, math.inf, 1.0, TRIED_SEED, 1.0)
            self._built = build.build_model(config, build.resolve_plan(config), ())
            model, tokenizer = self._built
            look = Run(config, folder / "look", built=self._built)
            look.ledger.close()
            look.directory.unlock()
            shutil.copy(look.directory.initial_a, folder / INITIAL)
            method, rows = build_method(config), public_examples(config, tokenizer, ())
            directions = [Steps.of([seed], [1.0]) for seed in method.seeds(0, 0)]
            lengths: list[float] = []
            for part in by_length(rows, 16):
                probes = method.estimator.probes(look.collate(part), Steps.of([], []), directions)
                found = method.estimator.by_example(model.evaluate(probes))  # type: ignore[attr-defined]
                lengths += np.linalg.norm(found, axis=1).tolist()
            self._clip = float(f"{statistics.median(lengths):.2g}")
        return self._clip


def best_rate(rows: Sequence[Row], task: str, epsilon: float) -> float:
    """The rate whose run ended lowest on the seed of the tries."""
    found = [
        (float(row["end"]), float(row["rate"]))
        for row in rows
        if (row["task"], row["epsilon"], row["seed"]) == (task, f"{epsilon:g}", str(TRIED_SEED))
    ]
    return min(found)[1]


def interval(values: Sequence[float], digits: int = 3) -> str:
    """The mean with an interval of 95 % by Student's t; one value alone has none."""
    mean, half = shared.interval(values)
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if math.isfinite(half) else "")


def tasks(rows: Sequence[Row]) -> list[str]:
    """In the order in which they were begun."""
    return list(dict.fromkeys(row["task"] for row in rows))


def counted(rows: Sequence[Row], task: str, epsilon: float) -> list[Row]:
    """The runs that count, of the rate that was chosen."""
    return [
        row
        for row in rows
        if (row["task"], row["epsilon"]) == (task, f"{epsilon:g}")
        and row["seed"] != str(TRIED_SEED)
    ]


def table(rows: Sequence[Row]) -> str:
    """For people: a line for each task and ε."""
    lines = [
        "| task | rounds | B | n | δ | ε | σ | C | σC / B | rate | seeds | before | after | "
        "accuracy before | after |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for task in tasks(rows):
        for epsilon in (*EPSILONS[:-1], CLIPPED, math.inf):
            found = counted(rows, task, epsilon)
            if not found:
                continue
            one = found[0]
            start, end = ([float(row[name]) for row in found] for name in ("start", "end"))
            right = ["", ""]
            if one["accuracy_end"]:
                right = [
                    interval([100 * float(row[name]) for row in found])
                    for name in ("accuracy_start", "accuracy_end")
                ]
            noise = f"{float(one['noise']):.3f}" if one["noise"] else "0"
            shown = "∞" if math.isinf(epsilon) else f"{epsilon:g}"
            shown = "clip alone" if epsilon == CLIPPED else shown
            each = ""
            if one["noise"]:
                each = f"{float(one['noise']) * float(one['clip']) / int(one['batch']):.2f}"
            lines.append(
                f"| {task} | {one['rounds']} | {one['batch']} | {one['examples']} | "
                f"{one['delta']} | {shown} | {noise} | "
                f"{one['clip'] if one['noise'] else '–'} | {each} | {one['rate']} | {len(found)} | "
                f"{statistics.fmean(start):.3f} | {interval(end)} | {right[0]} | {right[1]} |"
            )
    return "\n".join(lines)


def conclusions(rows: Sequence[Row]) -> str:
    """How much of the fall without noise is left, by task, from seeds in pairs."""
    lines = []
    for task in tasks(rows):
        free = {row["seed"]: row for row in counted(rows, task, math.inf)}
        for epsilon in (*EPSILONS[:-1], CLIPPED):
            shares = [
                100 * _fall(row) / _fall(free[row["seed"]])
                for row in counted(rows, task, epsilon)
                if row["seed"] in free
            ]
            if not shares:
                continue
            what = "clipped rows without noise" if epsilon == CLIPPED else f"ε = {epsilon:g}"
            lines += [
                f"- {task}, {what}: {interval(shares, 0)} % of the fall without privacy,",
                f"  by seed {', '.join(f'{share:.0f}' for share in shares)} %.",
            ]
    return "\n".join(lines)


def _fall(row: Row) -> float:
    return float(row["start"]) - float(row["end"])


def tries(rows: Sequence[Row]) -> str:
    """The rates that were tried, with their section; empty where none was."""
    if all(row["seed"] != str(TRIED_SEED) for row in rows):
        return ""
    lines = [
        "## The rates",
        "",
        f"Rates were tried on seed {TRIED_SEED}, which does not count above: each ε has the best.",
        "What this search tells of the rows is not in ε. A federation would take a rate from",
        "public rows.",
        "",
        "| task | ε | rate | after |",
        "|---|---:|---:|---:|",
    ]
    for row in rows:
        if row["seed"] == str(TRIED_SEED):
            epsilon = row["epsilon"].replace("inf", "∞")
            end = float(row["end"])
            after = f"{end:.3f}" if math.isfinite(end) else "diverged"
            lines.append(f"| {row['task']} | {epsilon} | {row['rate']} | {after} |")
    return "\n".join(lines) + "\n\n"


PAGE = """# What privacy costs

How far a run learns at ε = 2 and 6, beside one without noise. `studies/privacy.py` makes this page.

Each run is [`fedmezo-auto`](../how-to/efficiency.md) with a rate that is given. It has 16 one-sided
directions, one local step, a cosine, and the R of aligned adapters of rank 8. There are four
clients. With noise it is [Gaussian](../how-to/privacy.md), for examples that are added or removed.
σ follows from ε over all rounds. C is the median length of a public row's projected gradients at
the base. A and U are made of the same {public} public rows, which no client has.

- `demo` is the model and the rows of `fedforward demo`. The figure is the held-out loss in nats.
{others}
{clipped}∞ has no privacy: its batches are shuffled, and its rows count as they are.
B is the expected sample and n the number of a client's examples. σC / B is the deviation of the
noise in each reported number.
Intervals are of 95 % over seeds, by Student's t.

![Held-out figure at each ε](privacy.png)

{table}

## What this shows

{conclusions}

A typical row has slopes of about C / 4 along each of 16 directions. Where rows agree, a sample's
mean is as large, and σC / B is what lies over it.

{tries}## What it does not show

- Noise and samples come from the system's entropy, so no run can be repeated to the bit. The seeds
  fix directions, division and the order of rows.
- {seeds}
- ∞ differs in more than noise. Its rows are not clipped, and a batch's loss is a mean over tokens,
  where a private one is a mean over rows. So a share above 100 % is not a gain by noise.
{only}- C was not tuned. A clipped row has less to say, which keeps a rare one from a large step.
- The bound C is good for the base. Later slopes are shorter, so that noise weighs more.
- A client's noise is for its own rows. More clients average more noise away at the same ε.
"""


def draw(rows: Sequence[Row], path: Path) -> None:
    """Each task's seeds at each ε, and their means."""
    names = tasks(rows)
    figure, every = shared.figure((3.6 * len(names) + 0.8, 3.6), 1, len(names))
    for axes, task in zip(every, names, strict=True):
        means = []
        for place, epsilon in enumerate(EPSILONS):
            ends = [float(row["end"]) for row in counted(rows, task, epsilon)]
            axes.plot([place] * len(ends), ends, "o", color="#0072b2", alpha=0.6)
            means.append(statistics.fmean(ends) if ends else math.nan)
        axes.plot(range(3), means, color="#0072b2")
        starts = [float(row["start"]) for row in rows if row["task"] == task]
        axes.axhline(np.nanmean(starts), color="#999999", linestyle="--", linewidth=1)
        axes.set_xticks(range(3), ["ε = 2", "ε = 6", "no noise"])
        axes.set_title(task)
        axes.set_ylabel("held-out, nats (dashed: before)")
    shared.save(figure, path)


def write_page(folder: Path) -> None:
    """The page and the picture of all that is in the CSV."""
    rows = shared.read(folder / "privacy.csv")
    few = [
        task
        for task in tasks(rows)
        if len({row["seed"] for row in counted(rows, task, math.inf)}) < 2
    ]
    seeds = "Three seeds are few, and their intervals are wide."
    if few:
        seeds = f"{', '.join(few)} has one seed, and so no interval. Three are few as well."
    others, only, clipped = "", "", ""
    if any(row["epsilon"] == f"{CLIPPED:g}" for row in rows):
        clipped = "`clip alone` has samples and clipped rows, and next to no noise.\n"
    if tasks(rows) == ["demo"]:
        only = (
            "- The demonstration alone was run. Its rows ask for one format, so their slopes\n"
            "  probably agree, and little is lost in noise. Other tasks may lose far more.\n"
            "  The script runs SST-2 with `--model` and `--data`.\n"
        )
    else:
        others = (
            "- Others are SST-2 with label words, on a folder of that name. The figure is the\n"
            "  cross-entropy of the words. A guess has 0.693. All rows of the validation file are\n"
            "  held out.\n"
        )
    text = PAGE.format(
        public=PUBLIC,
        table=table(rows),
        conclusions=conclusions(rows),
        tries=tries(rows),
        seeds=seeds,
        others=others,
        only=only,
        clipped=clipped,
    )
    (folder / "privacy.md").write_text(text, encoding="utf-8")
    draw(rows, folder / "privacy.png")


def task_of(arguments: argparse.Namespace) -> Task:
    """What the options ask for."""
    seeds = tuple(range(arguments.seeds))
    if not arguments.model:
        task = ("demo", "", "", "", 20, 18, 360, 1e-4, (0.2,), seeds)
    else:
        name = arguments.name or Path(arguments.model).name
        rates = tuple(arguments.rates)
        rounds, batch = arguments.rounds, arguments.batch
        task = (
            name,
            arguments.model,
            arguments.data,
            arguments.blocks,
            rounds,
            batch,
            1600,
            1e-5,
            rates,
            seeds,
        )
    made = Task(*task, clipped=arguments.clipped)
    if arguments.quick:
        made = Task(*(*task[:4], 2, 4, *task[6:8], task[8][:1], (0,)))
    return made


def main() -> None:
    """See the module."""
    parser = shared.parser(__doc__, "two rounds, one seed")
    shared.own_model(parser, "SST-2's files")
    parser.add_argument("--name", default="", help="of the task; default the model's folder")
    parser.add_argument("--blocks", default="", help="model.blocks")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batch", type=int, default=32, help="expected examples of a sample")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.2])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--clipped", action="store_true", help="clip without noise as well")
    arguments = shared.parse(parser)
    shared.check_own_model(parser, arguments)
    folder = arguments.out
    with tempfile.TemporaryDirectory() as scratch:
        Study(folder, task_of(arguments), Path(scratch)).carry_out()
    write_page(folder)


if __name__ == "__main__":
    main()
