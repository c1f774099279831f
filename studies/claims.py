"""Which claims of the FedMeZO paper hold here: a page from the other studies' figures.

    python studies/claims.py                   # from the CSV files in docs/studies
    python studies/claims.py --out FOLDER      # from those of another folder, into it

Reads `settings.csv`, `memory.csv` and `rank.csv`, and runs nothing. A verdict follows from a rule
that the page states: a difference counts where a paired t test over seeds, corrected by Holm for
the tests of its claim, has p below 0.05.
"""

import argparse
import math
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shared import DOCS, read

from fedforward.analysis.significance import LEVEL, holm, paired

SUPPORTED, REFUTED, UNDECIDED = "supported", "refuted", "not to be told apart"
PARTLY, NOT_MEASURED = "supported in part", "not measured"
Row = Mapping[str, str]
#: The rate of every cell that says nothing else, in `settings.csv`.
BASE = "fedmezo"
SIZES = "0.7 and 4.3 million parameters where they are trained"
PAGE = """# Which claims of the paper hold

Claims of *On the Convergence of Zeroth-Order Federated Tuning for Large Language Models*
(FedMeZO). They are held against the studies of [settings](settings.md), [memory](memory.md) and
[rank](rank.md). `studies/claims.py` makes this page from their figures.

A difference counts where a paired t test over seeds has p below {level:g}, corrected by Holm for
all tests of its claim. Models here have {sizes}, far below the paper's 3 billion.
So a verdict is about these models and rows, not about the paper's.

| claim | verdict | from |
|---|---|---|
{table}

{sections}
"""


@dataclass(frozen=True)
class Claim:
    """What the paper says, and what was found."""

    title: str
    said: str
    verdict: str
    evidence: str
    script: str


class Studies:
    """The rows of the studies' CSV files."""

    def __init__(self, folder: Path) -> None:
        self.settings = read(folder / "settings.csv")
        self.memory = read(folder / "memory.csv")
        self.rank = read(folder / "rank.csv")

    @property
    def tasks(self) -> list[str]:
        """Of the study of settings, in the order in which they were begun."""
        return list(dict.fromkeys(row["task"] for row in self.settings))

    def ends(self, task: str, group: str, setting: str) -> dict[str, float]:
        """Held-out loss at the end, by seed."""
        return {
            row["seed"]: float(row["end"])
            for row in self.settings
            if (row["task"], row["group"], row["setting"]) == (task, group, setting)
        }

    def named(self, task: str, group: str) -> list[str]:
        """Settings of a group that were run."""
        found = [
            row["setting"] for row in self.settings if (row["task"], row["group"]) == (task, group)
        ]
        return list(dict.fromkeys(found))

    def start(self, task: str) -> float:
        """Held-out loss before any round, of all runs of a task."""
        return statistics.fmean(float(r["start"]) for r in self.settings if r["task"] == task)


@dataclass(frozen=True)
class Test:
    """Two settings at the same seeds; `difference` is the second minus the first, in nats."""

    name: str
    difference: float
    half: float
    p: float
    seeds: int


def test(name: str, one: Mapping[str, float], other: Mapping[str, float]) -> Test | None:
    """A paired t test; None with fewer than two seeds that both have and that are finite."""
    seeds = [s for s in one if s in other and math.isfinite(one[s]) and math.isfinite(other[s])]
    if len(seeds) < 2:
        return None
    differences = [other[seed] - one[seed] for seed in seeds]
    p, half = paired(differences)
    return Test(name, statistics.fmean(differences), half, p, len(seeds))


def corrected(tests: Sequence[Test | None]) -> list[tuple[Test, bool]]:
    """Those that there are, and whether each tells its settings apart."""
    found = [each for each in tests if each is not None]
    return [(t, p < LEVEL) for t, p in zip(found, holm([t.p for t in found]), strict=True)]


def shown(found: Sequence[tuple[Test, bool]]) -> str:
    """Tests as a table."""
    lines = [
        "| compared | difference | interval | seeds | p | told apart |",
        "|---|---:|---:|---:|---:|---|",
    ]
    lines += [
        f"| {t.name} | {t.difference:+.4f} | ± {t.half:.4f} | {t.seeds} | {t.p:.3f} | "
        f"{'yes' if apart else 'no'} |"
        for t, apart in found
    ]
    return "\n".join(lines)


# Claims -------------------------------------------------------------------------------------------


def memory(studies: Studies) -> Claim:
    """Inference-level memory."""
    said = "Tuning takes the memory of inference."
    if not studies.memory:
        return Claim("Memory of inference", said, NOT_MEASURED, "", "studies/memory.py")
    rows = sorted(studies.memory, key=lambda row: int(row["parameters"]))
    shares = [int(row["step"]) / int(row["forward_two"]) for row in rows]
    against = [int(row["step"]) / int(row["backpropagation"]) for row in rows]
    verdict = SUPPORTED if max(shares) <= 1.0 else PARTLY if min(shares) <= 1.0 else REFUTED
    text = (
        f"From {int(rows[0]['parameters']) / 1e6:,.0f} to "
        f"{int(rows[-1]['parameters']) / 1e6:,.0f} M parameters a step takes "
        f"{min(shares):.2f} to {max(shares):.2f} of a forward pass with labels of as many rows. "
        f"That is {min(against):.3f} to {max(against):.3f} of backpropagation with the same "
        "adapter. Weights are not in these figures."
    )
    return Claim("Memory of inference", said, verdict, text, "studies/memory.py")


def faster(studies: Studies) -> Claim:
    """FedMeZO against FedAvg."""
    said = "FedMeZO converges faster than FedAvg with backpropagation at the same rate."
    tests = []
    for task in studies.tasks:
        ours = studies.ends(task, "backpropagation", BASE)
        for setting in studies.named(task, "backpropagation"):
            if setting != BASE:
                other = studies.ends(task, "backpropagation", setting)
                tests.append(test(f"{task}: {setting}, against fedmezo", ours, other))
    found = corrected(tests)
    same = [(t, apart) for t, apart in found if "the same rate" in t.name]
    better = [t for t, apart in found if apart and t.difference < 0]
    if not same:
        verdict = NOT_MEASURED
    elif all(apart and t.difference > 0 for t, apart in same):
        verdict = PARTLY if better else SUPPORTED
    elif any(apart and t.difference < 0 for t, apart in same):
        verdict = REFUTED
    else:
        verdict = UNDECIDED
    text = (
        "Losses at the end of as many rounds, steps and examples. Above 0 is in favour "
        "of FedMeZO. The paper gives both the same rate of SGD. With a rate of its own, or with "
        "AdamW, backpropagation is another method.\n\n" + shown(found)
    )
    if better:
        text += f"\n\nBackpropagation is ahead of FedMeZO in {len(better)} of {len(found)} tests."
    return Claim("Faster than FedAvg", said, verdict, text, "studies/settings.py")


def rate(studies: Studies) -> Claim:
    """The learning rate is what matters."""
    said = "The learning rate decides over convergence, more than other settings do."
    lines, wins = [], []
    for task in studies.tasks:
        spreads = {}
        for group in ("rate", "local steps", "mu", "clients", "directions"):
            means = []
            for setting in studies.named(task, group):
                values = list(studies.ends(task, group, setting).values())
                means.append(statistics.fmean(min(v, studies.start(task)) for v in values))
            if len(means) > 1:
                spreads[group] = max(means) - min(means)
        if len(spreads) < 2 or "rate" not in spreads:
            continue
        wins.append(spreads["rate"] == max(spreads.values()))
        lines += [f"| {task} | {group} | {spread:.4f} |" for group, spread in spreads.items()]
    if not wins:
        return Claim("The rate matters most", said, NOT_MEASURED, "", "studies/settings.py")
    verdict = SUPPORTED if all(wins) else PARTLY if any(wins) else REFUTED
    text = (
        "The distance between the best and the worst setting of a group, of means over seeds. A "
        "run that ends above its start, or that diverges, counts as one that stayed there.\n\n"
        "| task | varied | best to worst, nats |\n|---|---|---:|\n" + "\n".join(lines) + "\n\n"
        "The ranges are ours: two and a half decades of the rate, four of mu, and so on. Groups "
        "that were not run are not here. LoRA's rank is not a setting of training: it changes the "
        "model, and at the same rate the length of a step. It moves the loss as much as the rate "
        "does (see the [study of settings](settings.md))."
    )
    return Claim("The rate matters most", said, verdict, text, "studies/settings.py")


def heterogeneity(studies: Studies) -> Claim:
    """Heterogeneous clients against i.i.d. ones."""
    said = (
        "More heterogeneity helps within limits (Theorem 3.6); in its runs, other splits end lower."
    )
    tests = []
    for task in studies.tasks:
        base = studies.ends(task, "alpha", "iid")
        for setting in studies.named(task, "alpha"):
            if setting != "iid":
                name = setting if setting == "by site" else f"Dirichlet {setting}"
                tests.append(
                    test(
                        f"{task}: {name}, against i.i.d.",
                        base,
                        studies.ends(task, "alpha", setting),
                    )
                )
    return _all(
        "Heterogeneity helps",
        said,
        corrected(tests),
        "Below 0 is in favour of heterogeneous clients.",
    )


def client_rates(studies: Studies) -> Claim:
    """Rates of each client."""
    said = "Rates by the difference of models are best, by five rounds' loss second."
    tests = []
    for task in studies.tasks:
        base = studies.ends(task, "client rates", "fixed")
        for setting in studies.named(task, "client rates"):
            if setting != "fixed":
                other = studies.ends(task, "client rates", setting)
                tests.append(test(f"{task}: {setting}, against fixed", base, other))
    return _all(
        "Model-difference rates help",
        said,
        corrected(tests),
        "Below 0 is in favour of the strategy.",
        "update-difference",
    )


def _all(
    title: str, said: str, found: list[tuple[Test, bool]], note: str, about: str = ""
) -> Claim:
    """A claim from tests below 0; the verdict is of those whose name has `about`."""
    script = "studies/settings.py"
    if not found:
        return Claim(title, said, NOT_MEASURED, "", script)
    apart = [t for t, differs in found if differs and about in t.name]
    helped = [t for t in apart if t.difference < 0]
    harmed = [t for t in apart if t.difference > 0]
    if helped and harmed:
        verdict = PARTLY
    else:
        verdict = SUPPORTED if helped else REFUTED if harmed else UNDECIDED
    return Claim(title, said, verdict, f"{note}\n\n{shown(found)}", script)


def low_rank(studies: Studies) -> Claim:
    """The effective rank of the Hessian."""
    said = (
        "The Hessian's effective rank is at most about 200; adapters need at least that rank (3.8)."
    )
    own = [row for row in studies.rank if row["matrix"] == "Hessian"]
    resolved = [row for row in own if float(row["effective_rank_low"]) > 0]
    if not own:
        return Claim("Low effective rank", said, NOT_MEASURED, "", "studies/rank.py")
    parts = []
    for task in dict.fromkeys(row["task"] for row in own):
        rows = [row for row in own if row["task"] == task]
        clear = [row for row in rows if row in resolved]
        if clear:
            values = [float(row["effective_rank"]) for row in clear]
            parts.append(
                f"- {task}: {min(values):.1f} to {max(values):.1f} over ranks "
                f"{clear[0]['rank']} to {clear[-1]['rank']}, at the base."
            )
        else:
            absolute = [float(row["absolute_rank"]) for row in rows]
            parts.append(
                f"- {task}: its trace is not above 0, so tr(H) / ‖H‖ says nothing there. With |H| "
                f"it is {min(absolute):,.0f} to {max(absolute):,.0f}."
            )
    beyond = [row for row in resolved if float(row["effective_rank"]) > 200]
    below = [
        row for row in resolved if float(row["rank"]) < float(row["effective_rank"]) and not beyond
    ]
    verdict = UNDECIDED if not resolved else REFUTED if beyond else SUPPORTED
    if len({row["task"] for row in resolved}) < len({row["task"] for row in own}):
        verdict = PARTLY if verdict == SUPPORTED else verdict
    text = "The effective rank of the Hessian over A and B:\n\n" + "\n".join(parts)
    if below:
        ranks = ", ".join(dict.fromkeys(row["rank"] for row in below))
        text += (
            f"\n\nAdapters of rank {ranks} have less than the effective rank that is measured "
            "with them. What they reach is in the [study of settings](settings.md)."
        )
    return Claim("Low effective rank", said, verdict, text, "studies/rank.py")


CLAIMS: tuple[Callable[[Studies], Claim], ...] = (
    memory,
    faster,
    rate,
    heterogeneity,
    client_rates,
    low_rank,
)


def page(studies: Studies) -> str:
    """The whole page."""
    claims = [claim(studies) for claim in CLAIMS]
    anchors = [claim.title.lower().replace(" ", "-") for claim in claims]
    table = "\n".join(
        f"| [{claim.title}](#{anchor}) | {claim.verdict} | `{claim.script}` |"
        for claim, anchor in zip(claims, anchors, strict=True)
    )
    sections = "\n\n".join(
        f"## {claim.title}\n\n{claim.said}\n\n**{claim.verdict.capitalize()}.** "
        f"{claim.evidence}".rstrip()
        for claim in claims
    )
    return wrapped(PAGE.format(level=LEVEL, table=table, sections=sections, sizes=SIZES)) + "\n"


def wrapped(text: str) -> str:
    """Paragraphs in lines of at most 100 characters; tables, lists and titles as they are."""
    return "\n\n".join(
        part if part.startswith(("|", "#", "- ")) else textwrap.fill(part, 100)
        for part in text.strip().split("\n\n")
    )


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of the studies' files")
    folder = parser.parse_args().out
    if not (folder / "settings.csv").is_file():
        parser.error(f"{folder}: there is no settings.csv; studies/settings.py makes it")
    (folder / "claims.md").write_text(page(Studies(folder)), encoding="utf-8")


if __name__ == "__main__":
    main()
