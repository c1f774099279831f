"""Effective rank of the curvature against the rank of the adapters (Conjecture 3.8 of FedMeZO).

Without options the model and the rows are those of `fedforward demo`. With `--model` and `--data`
it is GSM8K: DATA has `gsm8k_train.jsonl`. For each rank of LoRA, the Hessian and the Gauss-Newton
matrix of the mean loss of some rows are measured at the base, as `fedforward diagnose` does. A
figure is kept in a CSV when it is done, so that a study that was stopped goes on where it was.
The page is made of all rows of the CSV.

    python studies/rank.py                              # the demonstration, five minutes
    python studies/rank.py --model FOLDER --data FOLDER
    python studies/rank.py --quick --out FOLDER         # one rank with little effort
"""

import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import shared
from rich.progress import track

from fedforward.analysis.diagnose import QUICK, Effort, diagnose
from fedforward.analysis.spectrum import Interval
from fedforward.config.loading import validate
from fedforward.demo.run import prepare

RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
OWN_RANKS = (1, 4, 16, 64, 128)
DEMO = "demo"
#: What a diagnosis measures beside the spectra is not looked at.
EFFORT = Effort(
    block_steps=0, gradient_rows=8, points=2, directions=1, error_rows=1, scales=(1e-3,)
)
INTERVALS = ("trace", "effective_rank", "absolute_rank")
FIELDS = (
    "task",
    "rank",
    "matrix",
    "loss",
    "norm",
    *(f"{name}{end}" for name in INTERVALS for end in ("", "_low", "_high")),
    "seconds",
)
PAGE = """# Effective rank against the rank of LoRA

How many directions the curvature has, for each rank of the adapters. `studies/rank.py` makes this
page.

LoRA is on all linear layers, with alpha twice its rank. The matrices are those of the mean loss of
{rows} rows at the base, over A and B. The effective rank is tr(H) / ‖H‖, as in the paper. The
absolute rank is tr|H| / ‖H‖, which negative curvature does not make smaller. Intervals of 95 % are
of the {probes} random vectors. [Diagnosis](../how-to/diagnose.md) says how they are measured.

![Effective rank against the rank of LoRA](rank.png)

{table}

The paper conjectures (3.8) that adapters should have at least the effective rank of the Hessian.
What a rank does to the loss is in the [study of settings](settings.md).
"""


def configuration(scratch: Path, rank: int, model: str, data: str) -> dict[str, Any]:
    """The content of a configuration file."""
    if not data:
        content = prepare(scratch / "rows.jsonl").model_dump(exclude_unset=True)
    else:
        content = {
            "model": {"path": model},
            "data": {
                "source": str(Path(data) / "gsm8k_train.jsonl"),
                "prompt": "Question: {question}\nAnswer:",
                "answer": " {answer}",
                "sequence_length": 128,
                "heldout": 100,
            },
            "federation": {"clients": 4, "rounds": 1, "partition": "iid"},
        }
    content["lora"] = {"rank": rank, "alpha": 2.0 * rank}
    content["method"] = {"name": "fedmezo", "learning_rate": 3e-3}
    content["run"] = {"threads": 1}
    return content


def measure(task: str, rank: int, model: str, data: str, effort: Effort) -> list[dict[str, str]]:
    """Both matrices of a rank."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        found = diagnose(validate(configuration(Path(scratch), rank, model, data)), effort=effort)
    base = found.curvature[0]
    rows = []
    for matrix in base.matrices:
        row = {
            "task": task,
            "rank": str(rank),
            "matrix": matrix.matrix,
            "loss": f"{base.loss:.4f}",
            "norm": f"{matrix.norm:.5g}",
        }
        for name in INTERVALS:
            interval: Interval = getattr(matrix, name)
            row[name] = f"{interval.value:.5g}"
            row[f"{name}_low"], row[f"{name}_high"] = f"{interval.low:.5g}", f"{interval.high:.5g}"
        row["seconds"] = f"{time.monotonic() - began:.0f}"
        rows.append(row)
    return rows


def table(rows: list[dict[str, str]]) -> str:
    """For people."""
    lines = [
        "| task | rank of LoRA | matrix | trace | norm | effective rank | absolute rank |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        shown = [row["trace"], row["norm"]]
        shown += [
            f"{float(row[name]):,.1f} ({float(row[f'{name}_low']):,.1f} to "
            f"{float(row[f'{name}_high']):,.1f})"
            for name in INTERVALS[1:]
        ]
        numbers = [f"{float(value):.3g}" for value in shown[:2]] + shown[2:]
        lines.append(f"| {row['task']} | {row['rank']} | {row['matrix']} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """Both matrices of each task, with their intervals."""
    figure, panels = shared.figure((10, 4), 1, 2)
    for axes, name in zip(panels, INTERVALS[1:], strict=True):
        for task, matrix in dict.fromkeys((row["task"], row["matrix"]) for row in rows):
            own = [row for row in rows if (row["task"], row["matrix"]) == (task, matrix)]
            ranks, values = ([float(row[key]) for row in own] for key in ("rank", name))
            spread = [
                [value - float(row[f"{name}_low"]) for value, row in zip(values, own, strict=True)],
                [
                    float(row[f"{name}_high"]) - value
                    for value, row in zip(values, own, strict=True)
                ],
            ]
            axes.errorbar(ranks, values, spread, marker="o", capsize=3, label=f"{task}: {matrix}")
        axes.plot((1, 128), (1, 128), ":", color="gray", label="the rank of LoRA")
        axes.set_xscale("log", base=2)
        axes.set_yscale("symlog", linthresh=10)
        axes.set_xlabel("rank of LoRA")
        axes.set_title(name.replace("_", " "))
        axes.legend(fontsize=7)
    shared.save(figure, path)


def main() -> None:
    """See the module."""
    parser = shared.parser(__doc__, "one rank with little effort")
    parser.add_argument("--ranks", nargs="+", type=int)
    shared.own_model(parser, "gsm8k_train.jsonl")
    arguments = shared.parse(parser)
    shared.check_own_model(parser, arguments)
    folder = arguments.out
    file = folder / "rank.csv"
    task = f"GSM8K, {Path(arguments.model).name}" if arguments.model else DEMO
    ranks = arguments.ranks or (OWN_RANKS if arguments.model else RANKS)
    effort = QUICK if arguments.quick else EFFORT
    done = shared.Table(file, FIELDS, 3)
    for rank in track(ranks[:1] if arguments.quick else ranks, "Measuring"):
        if (task, str(rank), "Gauss-Newton") not in done.known:
            for row in measure(task, rank, arguments.model, arguments.data, effort):
                done.add(row[field] for field in FIELDS)
    rows = sorted(
        done.known.values(),
        key=lambda row: (row["task"] != DEMO, row["task"], row["matrix"], int(row["rank"])),
    )
    text = PAGE.format(rows=effort.rows, probes=effort.probes, table=table(rows))
    (folder / "rank.md").write_text(text, encoding="utf-8")
    draw(rows, folder / "rank.png")


if __name__ == "__main__":
    main()
