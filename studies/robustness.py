"""How far a run learns while two of ten clients attack: each attack against each rule.

The model and the rows are those of `fedforward demo`, divided among ten clients. Each cell of the
table is the fall of the held-out loss in percent of the clean fall, which is that of the same
method with the mean and no attack. Cells are kept in a CSV as they are done, so that a study that
was stopped goes on where it was.

    python studies/robustness.py            # all cells, about half an hour on one core
    python studies/robustness.py --quick    # two rounds of a few cells, into a folder of its own
"""

import os
import statistics
import tempfile
from collections.abc import Iterator
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
from fedforward.demo.text import site_examples
from fedforward.training import build
from fedforward.training.run import Run

CLIENTS, LIARS, SEEDS, ROUNDS = 10, (3, 7), (0, 1, 2), 20
#: Attacks with their factors.
ATTACKS: dict[str, tuple[str, float | None]] = {
    "none": ("none", None),
    "sign flip": ("sign-flip", None),
    "times 10": ("scale", 10.0),
    "times -10": ("scale", -10.0),
    "times 1000": ("scale", 1000.0),
    "constant": ("constant", None),
    "random": ("random", None),
    "little is enough": ("little-is-enough", None),
    "trim": ("trim", None),
    "krum": ("krum", None),
}
#: Where the answer is which site a question belongs to, one of four words.
LABELLED: dict[str, tuple[str, float | None]] = {
    "labels": ("none", None),
    "label flip": ("label-flip", None),
}
#: Those in which liars look at what others report.
COLLUSION = ("little is enough", "trim", "krum")
SHARED = (
    "clipped-mean",
    "median",
    "trimmed-mean",
    "geometric-median",
    "krum",
    "multi-krum",
)
WITH_TOLERATED = ("trimmed-mean", "krum", "multi-krum")
RATES = {"decomfl": 0.05, "feedsign": 0.03, "fedmezo": 0.1}
WAYS = (
    ("decomfl", "mean"),
    *(("decomfl", rule) for rule in SHARED),
    ("feedsign", "mean"),
    ("fedmezo", "clipped-mean"),
)
ONE_LIAR = ("sign flip", "times 10", "times 1000")
LABEL_RATES = RATES | {"feedsign": 0.06}
FIELDS = ("method", "rule", "attack", "liars", "seed", "start", "end")


Known = dict[tuple[str, ...], dict[str, str]]
PAGE = """# Robustness

How far a run learns while two of ten clients attack. `{script}` makes this page.

The model and the rows are those of `fedforward demo`, divided among ten clients at random.
Each run has 20 rounds of one local step, with eight one-sided Rademacher directions on one
example. The R of aligned adapters of rank 8 is tuned. A figure is the mean of {seeds} seeds.
For `label flip` the answer is one of four words: which of the sites a question belongs to.
It has one seed.
Clients 3 and 7 attack in every round, and `method.tolerated` is 2.

![Each attack against each rule](robustness.png)

## Without an attack

{0}

## With two attackers

The fall of the held-out loss, in percent of what the same method reaches with `mean` and no attack.
A figure above 100 is of a run that fell further: a longer step can be a better one.
`times 1000` is left out by the [server](../privacy.md#what-is-not-defended-against) before any rule
sees it. The other attacks are [described here](../concepts/rounds.md#who-takes-part).

{1}

## What was to be reached

{2}

## One attacker and FedMeZO

The held-out loss after 20 rounds; without an attack and with `mean` it is in the first table.

{3}

## What this does not show

- The loss of labels begins far above that of a guess, 1.386. Most of its fall is towards a guess,
  which liars with wrong labels want as well.
- The clients' rows are alike. Where they differ, honest reports are further from each other.
- A rule cannot tell a liar that has directions of its own and reports plausible sizes.
  `clipped-mean` bounds how far it moves the model; a flipped sign still undoes an honest one.
- Rates are given. A rate that is found also follows losses, about which liars can lie.
"""


@dataclass(frozen=True)
class Cell:
    """One run: a method, the rule that joins its reports, an attack, and a seed."""

    method: str
    rule: str
    attack: str
    liars: tuple[int, ...]
    seed: int

    @property
    def key(self) -> tuple[str, ...]:
        """As it stands in the CSV."""
        return self.method, self.rule, self.attack, str(len(self.liars)), str(self.seed)


QUICK = (
    Cell("decomfl", "mean", "none", (), 0),
    Cell("decomfl", "median", "none", (), 0),
    Cell("decomfl", "median", "sign flip", LIARS, 0),
    Cell("feedsign", "mean", "sign flip", LIARS, 0),
)


def cells(seeds: tuple[int, ...]) -> Iterator[Cell]:
    """Every run of the study, seed after seed."""
    for seed in seeds:
        for attack in ATTACKS:
            for method, rule in WAYS:
                yield Cell(method, rule, attack, () if attack == "none" else LIARS, seed)
        yield Cell("fedmezo", "mean", "none", (), seed)
        # One liar, without a rule and with one.
        for rule in ("mean", "clipped-mean"):
            for attack in ONE_LIAR:
                yield Cell("fedmezo", rule, attack, LIARS[:1], seed)
    for seed in seeds[:1]:
        for method in RATES:
            yield Cell(method, "mean", "labels", (), seed)
        for method, rule in WAYS:
            yield Cell(method, rule, "label flip", LIARS, seed)


def configuration(cell: Cell, rows: Path, rounds: int) -> Config:
    """The demonstration's model and rows, ten clients, and a rate that was tried out."""
    content = prepare(rows).model_dump(exclude_unset=True)
    attack, factor = (ATTACKS | LABELLED)[cell.attack]
    rates = RATES
    if cell.attack in LABELLED:
        rates = LABEL_RATES
        sites = dict.fromkeys(str(row["site"]) for row in site_examples(seed=0, per_site=1))
        content["data"] |= {"answer": "{site}", "label_words": {name: name for name in sites}}
    simulation: dict[str, Any] = {}
    if attack != "none":
        simulation = {"attack": attack, "attackers": list(cell.liars), "attack_factor": factor}
    method: dict[str, Any] = {
        "name": cell.method,
        "aggregator": cell.rule,
        "learning_rate": rates[cell.method],
        "estimator": "one-sided",
        "directions": 8,
        "distribution": "rademacher",
        "local_steps": 1,
        "batch_size": 1,
        "mu": 1e-2,
    }
    if cell.rule in WITH_TOLERATED:
        method["tolerated"] = len(LIARS)
    return validate(
        {
            **content,
            "lora": {"factors": "R", "init": "aligned"},
            "federation": {"clients": CLIENTS, "rounds": rounds},
            "method": method,
            "simulation": simulation,
            "run": {"evaluate_every": rounds, "threads": 1, "seed": cell.seed},
        }
    )


class Study:
    """Does cells one after another, on one model for each seed."""

    def __init__(self, folder: Path, rounds: int) -> None:
        self.folder, self.rounds = folder, rounds
        self.table = shared.Table(folder / "robustness.csv", FIELDS, 5)
        self.known = self.table.known
        self._model: tuple[int, Any] = (-1, None)

    def take(self, cell: Cell) -> None:
        """Do a cell that is not known yet."""
        if cell.key in self.known:
            return
        with tempfile.TemporaryDirectory() as scratch:
            config = configuration(cell, Path(scratch) / "rows.jsonl", self.rounds)
            if self._model[0] != cell.seed:
                self._model = cell.seed, build.build_model(config, build.resolve_plan(config), ())
            model = self._model[1]
            model[0].reset()
            run = Run(config, Path(scratch) / "run", built=model)
            try:
                loss = run.fit().to_json()["heldout_loss"]
                start, end = loss["start"], loss["end"]
            except FedForwardError:
                # It has diverged: what it ends at is beyond where it began.
                start, end = run.evaluate(1)["heldout_loss"], float("inf")
        self.table.add((*cell.key, f"{start:.6f}", f"{end:.6f}"))


def fall(row: dict[str, str]) -> float:
    """The fall of the held-out loss as a share of where it began."""
    return 1.0 - float(row["end"]) / float(row["start"])


def shares(known: Known, method: str, rule: str, attack: str, liars: int) -> list[float]:
    """The falls of a cell in each seed, as shares of the clean ones."""
    found = []
    for key, row in known.items():
        base = "labels" if attack == "label flip" else "none"
        clean = known.get((method, "mean", base, "0", key[4]))
        if key[:4] == (method, rule, attack, str(liars)) and clean is not None:
            found.append(fall(row) / fall(clean))
    return found


def percent(found: list[float]) -> str:
    """A mean share in percent; words where a run has diverged, or there is none yet."""
    if not found:
        return ""
    mean = statistics.fmean(found)
    return f"{100 * mean:.0f}" if mean > -10 else "diverged"


def clean(known: Known) -> str:
    """The clean runs, in lines."""
    lines = [
        "| method | answers | rate | loss before | after, mean | falls by seed |",
        "|---|---|---:|---:|---:|---|",
    ]
    for attack, words, rates in (("none", "records", RATES), ("labels", "labels", LABEL_RATES)):
        for method, rate in rates.items():
            rows = [row for key, row in known.items() if key[:4] == (method, "mean", attack, "0")]
            if rows:
                start, end = (
                    statistics.fmean(float(row[name]) for row in rows) for name in FIELDS[5:]
                )
                falls = ", ".join(f"{100 * fall(row):.0f} %" for row in rows)
                lines.append(
                    f"| `{method}` | {words} | {rate:g} | {start:.3f} | {end:.3f} | {falls} |"
                )
    return "\n".join(lines)


def table(known: Known) -> str:
    """Every attack against every rule, in percent of the clean fall."""
    titles = [f"{method}, {rule}" for method, rule in WAYS]
    lines = ["| attack | " + " | ".join(titles) + " |", "|---|" + "---:|" * len(WAYS)]
    for attack in (*ATTACKS, "label flip"):
        liars = 0 if attack == "none" else len(LIARS)
        found = [percent(shares(known, *way, attack, liars)) for way in WAYS]
        lines.append(f"| {attack} | " + " | ".join(found) + " |")
    return "\n".join(lines)


def one_liar(known: Known) -> str:
    """FedMeZO with one liar: the loss at the end, mean over seeds."""
    lines = ["| one liar of ten | `mean` | `clipped-mean` |", "|---|---:|---:|"]
    for attack in ONE_LIAR:
        found = []
        for rule in ("mean", "clipped-mean"):
            wanted = ("fedmezo", rule, attack, "1")
            ends = [float(row["end"]) for key, row in known.items() if key[:4] == wanted]
            mean = statistics.fmean(ends) if ends else float("nan")
            found.append(f"{mean:.3f}" if mean < float("inf") else "diverged")
        lines.append(f"| {attack} | " + " | ".join(found) + " |")
    return "\n".join(lines)


def reaches(known: Known) -> str:
    """What was to be reached, and what was."""
    lines = ["| reach | found | |", "|---|---|---|"]
    for attack in (*ATTACKS, "label flip"):
        if attack == "none":
            continue
        means = {
            rule: statistics.fmean(found)
            for rule in SHARED
            if (found := shares(known, "decomfl", rule, attack, len(LIARS)))
        }
        if means:
            best = max(means, key=lambda rule: means[rule])
            met = "reached" if means[best] >= 0.8 else "**missed**"
            lines.append(
                f"| best rule for shared directions, {attack}: 80 % | `{best}`: "
                f"{100 * means[best]:.0f} % | {met} |"
            )
    for attack in (*ATTACKS, "label flip"):
        found = shares(known, "fedmezo", "clipped-mean", attack, len(LIARS))
        if found and attack not in COLLUSION:
            met = "reached" if statistics.fmean(found) >= 0.7 else "**missed**"
            lines.append(f"| `fedmezo`, clipped, {attack}: 70 % | {percent(found)} % | {met} |")
    for method, rule in WAYS[1:]:
        found = shares(known, method, rule, "none", 0)
        if found and rule != "mean":
            cost = 100 * (1.0 - statistics.fmean(found))
            met = "reached" if cost <= 5 else "**missed**"
            lines.append(f"| cost of `{rule}` with `{method}`: 5 % | {cost:.1f} % | {met} |")
    return "\n".join(lines)


def draw(known: Known, path: Path) -> None:
    """The table as a picture."""
    titles = (*ATTACKS, "label flip")
    values = [
        [
            max(0.0, statistics.fmean(found)) if (found := cell) else float("nan")
            for cell in (
                shares(known, *way, attack, 0 if attack == "none" else len(LIARS)) for way in WAYS
            )
        ]
        for attack in titles
    ]
    figure, (axes,) = shared.figure((9, 5))
    image = axes.imshow(values, vmin=0.0, vmax=1.1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(WAYS)), [", ".join(way) for way in WAYS], rotation=30, ha="right")
    axes.set_yticks(range(len(titles)), titles)
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center")
    figure.colorbar(image, label="share of the clean fall")
    shared.save(figure, path)


def main() -> None:
    """See the module."""
    parser = shared.parser(__doc__, "two rounds of a few cells")
    arguments = shared.parse(parser)
    study = Study(arguments.out, 2 if arguments.quick else ROUNDS)
    wanted = list(cells(SEEDS[:1] if arguments.quick else SEEDS))
    if arguments.quick:
        wanted = [cell for cell in wanted if cell in QUICK]
    for cell in track(wanted, "Attacking"):
        study.take(cell)
    known = study.known
    parts = (clean(known), table(known), reaches(known), one_liar(known))
    text = PAGE.format(*parts, script="studies/robustness.py", seeds=len({k[4] for k in known}))
    (study.folder / "robustness.md").write_text(text, encoding="utf-8")
    draw(known, study.folder / "robustness.png")


if __name__ == "__main__":
    main()
