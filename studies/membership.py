"""Can a server tell from a site's scalars whether a row was in its batch?

The attack is passive, but for cells in which the server picks directions. It knows the base model,
the seeds and a site's report, and has the row that it asks about. It runs the row along the site's
own trajectory and directions, and compares the row's slopes with the reported ones. The model and
the rows are those of `fedforward demo`. Rows of the site's batches are members; rows of the same
kind that it does not hold are not. Cells are kept in a CSV as they are done, so that a study that
was stopped goes on where it was.

    python studies/membership.py            # all cells, about ten minutes on one core
    python studies/membership.py --quick --out FOLDER    # two trials of two cells
"""

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import shared
from numpy.typing import NDArray
from rich.progress import track
from scipy.special import logsumexp
from scipy.stats import mannwhitneyu

import fedforward as ff
from fedforward.core.steps import Evaluation, Steps
from fedforward.data.sampler import Batches, collate
from fedforward.demo.text import ANSWER, PROMPT, site_examples
from fedforward.messages.task import Task

Floats = NDArray[np.float64]
#: Of a two-point estimate, and of a local step.
MU, RATE = 1e-2, 1e-3
#: Rounds that are attacked; in each, rows that are no members, and the attacker's public rows.
TRIALS, OTHERS, PUBLIC = 15, 24, 32
#: Members in all, and of a round, that are asked about.
LEAST_MEMBERS, MOST_MEMBERS = 30, 16
#: Resamples of rounds for an interval of 95 %.
RESAMPLES = 500


@dataclass(frozen=True)
class Cell:
    """A way to report: steps, directions, rows of a batch, sites in a mean, and noise.

    Attributes:
        steps: local steps, each on a batch of its own.
        directions: of a step, two-point.
        batch: rows.
        sites: whose mean is seen; 1 is what the server sees.
        noise: multiplier of Gaussian noise on clipped slopes of single rows; -1 for neither.
        pool: directions of which an active server picks those that tell most of the row that it
            asks about; 0 for a server that takes what the seed gives.
    """

    steps: int
    directions: int
    batch: int
    sites: int = 1
    noise: float = -1.0
    pool: int = 0


#: Trials of an active server, which measure many directions.
ACTIVE_TRIALS = 6
ACTIVE = (
    *(Cell(1, 32, batch, pool=128) for batch in (4, 16)),
    *(Cell(1, 32, 4, noise=noise, pool=128) for noise in (0.5, 2.0)),
)
CELLS = (
    *(Cell(1, directions, 1) for directions in (1, 8, 32)),
    *(Cell(1, 32, batch) for batch in (4, 16)),
    Cell(10, 8, 4),
    Cell(1, 32, 4, sites=4),
    *(Cell(1, 32, 4, noise=noise) for noise in (0.0, 0.5, 1.0, 2.0)),
    *ACTIVE,
)
QUICK = (Cell(1, 8, 1), Cell(2, 4, 2, sites=2), Cell(1, 4, 2, pool=8))
NAMES = [field.name for field in fields(Cell)]
FIELDS = [*NAMES, "members", "others", "auc", "auc_low", "auc_high", "tpr"]
PAGE = """# What scalars tell of membership

Whether a server that sees a site's report can tell that a row was in the site's batches.
`studies/membership.py` makes this page.

The model and the rows are those of `fedforward demo`; adapters of rank 8 on all linear modules.
Each trial is a first round of one site. Its rows are members; {others} rows of the same four sites'
texts, which it does not hold, are not. The attack knows the base, the seeds, the rate and the
report, and {public} public rows that were in no batch.

For a row x it measures the slopes u(x) along the site's directions, at each point of the site's
trajectory. The score is a likelihood ratio: slopes of rows are taken for normal, with the public
rows' mean and variance for each direction. The table has the area under the ROC curve (AUC, 0.5 is
a guess) with an interval of 95 % over rounds. Beside it is the share of members that are found
while 1 % of the others are.

![AUC of each way to report](membership.png)

{table}

`sites` is how many reports are averaged before they are seen. 4 is what another site sees with
`decomfl`, and what a server sees with [secure sums](../how-to/secure-sums.md).
`noise` is the multiplier of Gaussian noise on the sum of the rows' slopes, each clipped to the
median length. `0` clips alone.

## What this shows

{conclusions}

## A server that picks what it asks

Directions follow from the run's seed, which the terms fix for all rounds. So a server can try out
seeds before a run, and no more.

{active}

What a server can send that does not keep to the protocol, and who finds it out:

| what a server sends | who finds out |
|---|---|
| another base model | nobody need: a site loads its own folder, and no message carries one |
| other seeds | they are not sent; a site derives them from the terms |
| terms with another seed each time | the site: another run, and `limits.terms` bounds how many |
| other entries to one site | that site: its `state.json` has another `digest` than the others' |
| a snapshot that the entries do not lead to | the same, and whoever replays the ledger |
| the same round again, at other weights | the site, with `[privacy]`: it refuses |

A test has such a server tamper with every entry to one site, and forge that site's digests on the
way back. The run ends as if all were well. The digest in the site's own `state.json` then differs
from those of the other sites. It differs from that of the run's summary as well.
So operators should compare these digests after a run, by another way than the server.
Until then the site has answered at weights of the server's choice. `[privacy]` bounds what that
tells: its ε holds for any weights and directions.

## What it does not show

- It is one small model, one kind of text, and rounds from the base. An attack on many rounds of the
  same rows has more to go by.
- Rows of one site are alike in kind. A row of another kind is easier to tell.
- With `fedmezo` the server sees the same scalars along other seeds, so its rows are the same.
- What a server learns from weights of its choice was not measured. [What each party
  sees](../privacy.md#what-is-not-defended-against) has what bounds that.
"""


class Attack:
    """The site, and who looks at its reports.

    Attributes:
        model: at its base.
        examples: rows as tokens, in a fixed order.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        rows = folder / "rows.jsonl"
        texts = site_examples(seed=seed, per_site=120)
        rows.write_text("".join(json.dumps(row) + "\n" for row in texts), encoding="utf-8")
        self.model = ff.LoraModel.from_pretrained(
            str(files("fedforward.demo").joinpath("model")), rank=8
        )
        data = ff.Dataset.from_file(rows, prompt=PROMPT, answer=ANSWER, heldout=0.01)
        self.examples: Sequence[Any] = data.batches(self.model, batch_size=1).examples
        self.random = np.random.default_rng(seed)
        self._wide: dict[tuple[int, int], Floats] = {}

    def method(self, cell: Cell) -> Any:
        """The method of a cell; its run seed is that of the library."""
        estimator = ff.TwoPoint(mu=MU, directions=cell.directions)
        return ff.DeComFL(local_steps=cell.steps, estimator=estimator)

    def trial(self, cell: Cell, number: int) -> tuple[Floats, Floats]:
        """Scores of members and of others in one round."""
        held = cell.steps * cell.batch
        if cell.pool:
            return self._active(cell, number)
        order = self.random.permutation(len(self.examples))
        public, others = order[:PUBLIC], order[PUBLIC : PUBLIC + OTHERS]
        rest = order[PUBLIC + OTHERS :]
        sites = [rest[site * held : (site + 1) * held] for site in range(cell.sites)]
        if len(rest) < cell.sites * held:
            raise SystemExit(f"{cell}: too few rows for {cell.sites} sites of {held}.")
        reports = [self._report(cell, number, site) for site in sites]
        members = np.concatenate(sites)
        if cell.noise < 0.0:
            members = self.random.permutation(members)[:MOST_MEMBERS]
        asked = [*public, *members, *others]
        slopes = self._slopes(cell, number, asked, reports[0])
        seen = np.mean(reports, axis=0)
        noise = 0.0
        if cell.noise >= 0.0:
            seen, slopes, noise = self._private(cell, slopes, len(members))
        scores = likelihood_ratios(slopes, seen, cell, noise)
        return scores[PUBLIC : PUBLIC + len(members)], scores[PUBLIC + len(members) :]

    def _active(self, cell: Cell, number: int) -> tuple[Floats, Floats]:
        """Scores where each row that is asked about has the directions that tell most of it."""
        members = slice(PUBLIC + OTHERS, PUBLIC + OTHERS + MOST_MEMBERS)
        if (cell.pool, number) not in self._wide:
            order = self.random.permutation(len(self.examples))
            asked = [*order[:PUBLIC], *order[members], *order[PUBLIC : PUBLIC + OTHERS]]
            wide = replace(cell, directions=cell.pool, pool=0)
            self._wide[cell.pool, number] = self._slopes(wide, number, asked, np.empty(0))
        slopes = self._wide[cell.pool, number]
        public = slopes[:PUBLIC]
        # How far each row is from the public ones, along each direction.
        away = np.abs(slopes - public.mean(0)) / (public.std(0) + 1e-30)
        picked = np.argsort(-away, axis=1)[:, : cell.directions]
        found = np.empty(len(slopes))
        for row in range(PUBLIC, len(slopes)):
            own = slopes[:, picked[row]]
            begin = PUBLIC
            if row < PUBLIC + MOST_MEMBERS:
                # Of the batches of members, the one that the row is in.
                begin += (row - PUBLIC) // cell.batch * cell.batch
            batch = own[begin : begin + cell.batch]
            seen, noise = batch.mean(0), 0.0
            if cell.noise >= 0.0:
                rows = np.concatenate([own[:PUBLIC], batch, own[row : row + 1]])
                seen, clipped, noise = self._private(cell, rows, len(batch))
                own = np.concatenate([clipped[:PUBLIC], clipped[-1:]])
                found[row] = likelihood_ratios(own, seen, cell, noise)[-1]
            else:
                found[row] = likelihood_ratios(own, seen, cell, noise)[row]
        end = PUBLIC + MOST_MEMBERS
        return found[PUBLIC:end], found[end:]

    def _report(self, cell: Cell, number: int, rows: NDArray[np.int64]) -> Floats:
        """Projected gradients of a round as a client makes them, float64 [H * P]."""
        held = [self.examples[row] for row in rows]
        batches = Batches(held, batch_size=cell.batch, run_seed=0, client=0)
        # A round is an epoch, so that each row is in it once.
        task = Task(number, 0, RATE, digest_wanted=False, entries=())
        turn = self.method(cell).local_round(task, batches)
        probes = next(turn)
        while True:
            try:
                probes = turn.send(self.model.evaluate(probes))
            except StopIteration as done:
                return np.asarray(done.value.gradients, np.float64)

    def _slopes(
        self, cell: Cell, number: int, asked: Sequence[int], report: Floats
    ) -> NDArray[np.float64]:
        """Slopes of single rows along the site's directions and trajectory [rows, H * P]."""
        rows = collate([self.examples[row] for row in asked])
        seeds = self.method(cell).seeds(number, 0)
        found = np.empty((len(asked), len(seeds)))
        count = cell.directions
        for step in range(cell.steps):
            # On a mean of sites the trajectory of none is known: the base stands for all.
            known = step * count if cell.sites == 1 else 0
            moved = Steps.of(seeds[:known], -RATE / count * report[:known])
            for place in range(step * count, (step + 1) * count):
                z = Steps.of(seeds[place : place + 1], [1.0])
                plus, minus = self.model.evaluate(
                    [ff.Probe(rows, moved, sign * MU * z) for sign in (1, -1)]
                )
                found[:, place] = (mean_losses(plus) - mean_losses(minus)) / (2 * MU)
        return found

    def _private(self, cell: Cell, slopes: Floats, members: int) -> tuple[Floats, Floats, float]:
        """A report of clipped slopes with noise as DPZero has it, the slopes, the noise's variance.

        Args:
            slopes: float64 [rows, P]; public rows come first, and then the members.
            members: how many they are; one local step alone.
        """
        lengths = np.linalg.norm(slopes, axis=1, keepdims=True)
        limit = float(np.median(lengths[:PUBLIC]))
        clipped = slopes * np.minimum(1.0, limit / np.maximum(lengths, 1e-30))
        noise = cell.noise * limit / members
        seen = clipped[PUBLIC : PUBLIC + members].mean(0)
        seen = seen + noise * self.random.standard_normal(slopes.shape[1])
        return seen, clipped, noise**2


def mean_losses(evaluation: Evaluation) -> Floats:
    """The mean loss of each row's tokens, in nats."""
    losses: Floats = evaluation.sums / np.maximum(evaluation.counts, 1)
    return losses


def likelihood_ratios(slopes: Floats, seen: Floats, cell: Cell, noise: float) -> Floats:
    """How much likelier each row makes what was seen, if it was in the batch of one of the steps.

    Slopes of rows are taken for normal, with the public rows' mean and variance for each direction.

    Args:
        slopes: float64 [rows, H * P]; the first rows are public.
        seen: float64 [H * P].
        noise: variance that was added to each number.

    Returns:
        The logarithm of the ratio, float64 [rows].
    """
    mean, variance = slopes[:PUBLIC].mean(0), slopes[:PUBLIC].var(0) + 1e-30
    rows = cell.batch * cell.sites
    without = variance / rows + noise
    # A little more than none, since the last bits of a loss depend on the batch.
    within = variance * ((rows - 1) / rows**2 + 1e-4) + noise
    rest = seen - mean
    ratios = rest**2 / without - (rest - (slopes - mean) / rows) ** 2 / within
    ratios += np.log(without / within)
    steps = 0.5 * ratios.reshape(len(slopes), cell.steps, cell.directions).sum(2)
    found: Floats = logsumexp(steps, axis=1)
    return found


def area(members: Floats, others: Floats) -> float:
    """The area under the ROC curve: the share of pairs in which the member scores higher."""
    pairs = len(members) * len(others)
    return float(mannwhitneyu(members, others).statistic) / pairs


def measured(trials: Sequence[tuple[Floats, Floats]]) -> dict[str, str]:
    """What the trials of a cell come to."""
    members, others = (np.concatenate([trial[side] for trial in trials]) for side in (0, 1))
    random = np.random.default_rng(0)
    again = []
    for _ in range(RESAMPLES):
        picked = [trials[place] for place in random.integers(len(trials), size=len(trials))]
        again.append(area(*(np.concatenate([t[side] for t in picked]) for side in (0, 1))))
    low, high = np.quantile(again, [0.025, 0.975])
    found = float(np.mean(members > np.quantile(others, 0.99)))
    return {
        "members": str(len(members)),
        "others": str(len(others)),
        "auc": f"{area(members, others):.3f}",
        "auc_low": f"{low:.3f}",
        "auc_high": f"{high:.3f}",
        "tpr": f"{found:.3f}",
    }


def trials_of(cell: Cell, quick: bool) -> int:
    """Rounds that give enough members, and rounds enough."""
    if cell.pool and not quick:
        return ACTIVE_TRIALS
    return 2 if quick else max(TRIALS, LEAST_MEMBERS // (cell.steps * cell.batch * cell.sites))


def active_table(done: Sequence[dict[str, str]]) -> str:
    """The cells of an active server, beside the passive one of the same kind."""
    known = {tuple(row[name] for name in NAMES): row for row in done}
    if all(row["pool"] == "0" for row in done):
        return "What it could learn if it picked directions for one row has not been measured here."
    lines = [
        "The table has what it could learn if it picked directions for one row. It takes those of",
        "a pool along which the row is farthest from the public ones. There are",
        f"{ACTIVE_TRIALS} rounds with {MOST_MEMBERS} members each.",
        "",
        "| batch | noise | picked | AUC | 95 % | at 1 % | AUC without picking |",
        "|---:|---:|---:|---:|---|---:|---:|",
    ]
    for row in done:
        if row["pool"] == "0":
            continue
        noise = "" if float(row["noise"]) < 0 else f"{float(row['noise']):g}"
        passive = known.get(tuple("0" if name == "pool" else row[name] for name in NAMES))
        auc = f"{float(passive['auc']):.2f}" if passive else ""
        lines.append(
            f"| {row['batch']} | {noise} | {row['directions']} of {row['pool']} | "
            f"{float(row['auc']):.2f} | {float(row['auc_low']):.2f} to "
            f"{float(row['auc_high']):.2f} | {100 * float(row['tpr']):.0f} % | "
            f"{auc} |"
        )
    return "\n".join(lines)


def table(done: Sequence[dict[str, str]]) -> str:
    """For people."""
    lines = [
        "| local steps | directions | batch | sites | noise | members | AUC | 95 % | at 1 % |",
        "|---:|---:|---:|---:|---:|---:|---:|---|---:|",
    ]
    for row in done:
        if row["pool"] != "0":
            continue
        noise = "" if float(row["noise"]) < 0 else f"{float(row['noise']):g}"
        lines.append(
            f"| {row['steps']} | {row['directions']} | {row['batch']} | {row['sites']} | {noise} | "
            f"{row['members']} | {float(row['auc']):.2f} | "
            f"{float(row['auc_low']):.2f} to {float(row['auc_high']):.2f} | "
            f"{100 * float(row['tpr']):.0f} % |"
        )
    return "\n".join(lines)


def conclusions(done: Sequence[dict[str, str]]) -> str:
    """What the figures say, with the figures in it."""
    known = {tuple(row[name] for name in NAMES): row for row in done}

    def auc(cell: Cell) -> str:
        row = known.get(tuple(map(str, astuple(cell))))
        return f"{float(row['auc']):.2f}" if row else "not measured"

    return "\n".join(
        [
            "- A batch of one row is told from its slopes: the AUC is "
            f"{auc(Cell(1, 1, 1))}, {auc(Cell(1, 8, 1))} and {auc(Cell(1, 32, 1))}",
            "  at 1, 8 and 32 directions.",
            "- Larger batches hide a row: at 32 directions it is "
            f"{auc(Cell(1, 32, 1))}, {auc(Cell(1, 32, 4))} and {auc(Cell(1, 32, 16))}",
            "  with 1, 4 and 16 rows.",
            f"- A mean of four sites: {auc(Cell(1, 32, 4, sites=4))} in place of "
            f"{auc(Cell(1, 32, 4))}, at 32 directions and 4 rows each.",
            f"- Clipping alone leaves {auc(Cell(1, 32, 4, noise=0.0))}; noise of 0.5, 1 and 2 "
            f"{auc(Cell(1, 32, 4, noise=0.5))},",
            f"  {auc(Cell(1, 32, 4, noise=1.0))} and {auc(Cell(1, 32, 4, noise=2.0))}.",
        ]
    )


def draw(done: Sequence[dict[str, str]], path: Path) -> None:
    """AUC with its interval, a bar for each cell."""
    labels, values, errors = [], [], []
    for row in done:
        label = f"{row['steps']} × {row['directions']}, batch {row['batch']}"
        if row["sites"] != "1":
            label += f", {row['sites']} sites"
        if float(row["noise"]) >= 0:
            label += f", noise {float(row['noise']):g}"
        if row["pool"] != "0":
            label += ", picked"
        labels.append(label)
        auc, low, high = (float(row[name]) for name in ("auc", "auc_low", "auc_high"))
        values.append(auc)
        errors.append((max(0.0, auc - low), max(0.0, high - auc)))
    figure, (axes,) = shared.figure((8, 0.34 * len(done) + 1.2))
    places = range(len(done))
    axes.errorbar(values, places, xerr=np.array(errors).T, fmt="o", color="#0072b2", capsize=3)
    axes.axvline(0.5, color="#999999", linestyle="--", linewidth=1)
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.set_xlim(0.4, 1.01)
    axes.set_xlabel("AUC of the attack (0.5 is a guess)")
    shared.save(figure, path)


def main() -> None:
    """See the module."""
    parser = shared.parser(__doc__, "two trials of two cells")
    arguments = shared.parse(parser)
    folder = arguments.out
    cells_done = shared.Table(folder / "membership.csv", FIELDS, len(NAMES))
    known = cells_done.known
    cells = QUICK if arguments.quick else CELLS
    with tempfile.TemporaryDirectory() as scratch:
        # Slopes along many directions are those of all active cells.
        active = Attack(Path(scratch), seed=len(cells)) if cells[-1].pool else None
        for place, cell in enumerate(track(cells, "Attacking")):
            key = tuple(map(str, astuple(cell)))
            if key in known:
                continue
            attack = active if cell.pool else Attack(Path(scratch), seed=place)
            assert attack is not None
            count = trials_of(cell, arguments.quick)
            found = measured([attack.trial(cell, number) for number in range(count)])
            cells_done.add((*key, *(found[name] for name in FIELDS[len(NAMES) :])))
    done = [known[key] for cell in cells if (key := tuple(map(str, astuple(cell)))) in known]
    text = PAGE.format(
        others=OTHERS,
        public=PUBLIC,
        table=table(done),
        conclusions=conclusions(done),
        active=active_table(done),
    )
    (folder / "membership.md").write_text(text, encoding="utf-8")
    draw(done, folder / "membership.png")


if __name__ == "__main__":
    main()
