"""SST-2 by forward passes: loss, choice and accuracy as objectives, beside AdamW, per seed.

    python benchmarks/sst2.py VARIANT … --model FOLDER --data FOLDER --out runs/sst2

Variants: loss, choice, accuracy, adamw and adamw-choice, which is AdamW on the cross-entropy of the
label words. `--data` holds sst2_train.jsonl and sst2_test.jsonl with the fields sentence and label
(0 or 1). Four clients IID; the accuracy is that of the whole test file, the more likely of two
label words, before and after. `zero` is the share of projected gradients that are exactly 0: where
both probes of a batch had as many right answers. Settings may be overridden with `--set
section.key=value`, as on the command line of fedforward.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from fedforward.config.loading import assign, parse_override, validate
from fedforward.config.schema import Config
from fedforward.models.libraries import quiet_libraries
from fedforward.training.metrics import ProgressCallback
from fedforward.training.run import Run

# One block, one kind of module: few parameters for the same steps, and what lies below the block is
# computed once for the 32 probes of a step.
SETTINGS: dict[str, dict[str, Any]] = {
    "model": {"blocks": [7]},
    "lora": {"rank": 8, "alpha": 16, "targets": ["down_proj"]},
    "data": {
        "prompt": "{sentence} It 's",
        "answer": "{label}",
        "label_words": {"0": " bad", "1": " great"},
        "sequence_length": 128,
        "answer_tokens": 8,
    },
    "evaluation": {"metrics": ["accuracy"]},
    "federation": {"clients": 4, "rounds": 8},
    "method": {
        "local_steps": 10,
        "directions": 16,
        "batch_size": 16,
        "learning_rate": 0.2,
        "schedule": "cosine",
        "final": 0.1,
        "mu": 1e-2,
    },
    "run": {"evaluate_every": 8, "tokens_per_call": 8192},
}
ADAMW = {"name": "fedavg", "optimizer": "adamw", "learning_rate": 1e-2, "directions": 1}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "loss": {"method": {"objective": "loss"}},
    "choice": {"method": {"objective": "choice"}},
    "accuracy": {"method": {"objective": "accuracy", "mu": 0.2, "batch_size": 32}},
    "adamw": {"method": {"objective": "loss", **ADAMW}},
    "adamw-choice": {"method": {"objective": "choice", **ADAMW}},
}


def printed(name: str, console: Console) -> ProgressCallback:
    """Prints the rounds that were evaluated."""

    def progress(done: int, total: int, line: dict[str, Any]) -> None:
        if "heldout_loss" in line:
            text = f"{name}: round {done}/{total} held-out {line['heldout_loss']:.4f}"
            accuracy = 100 * line["metrics"]["accuracy"]
            text += f" accuracy {accuracy:.1f} % after {line['seconds']:.0f} s"
            console.print(text, highlight=False)

    return progress


def configure(name: str, seed: int, model: str, data: Path, overrides: Sequence[str]) -> Config:
    content = {section: dict(values) for section, values in SETTINGS.items()}
    content["model"]["path"] = model
    content["data"]["source"] = str(data / "sst2_train.jsonl")
    content["evaluation"]["source"] = str(data / "sst2_test.jsonl")
    content["run"]["seed"] = seed
    for section, values in VARIANTS[name].items():
        content[section].update(values)
    for override in overrides:
        section, key, value = parse_override(override)
        assign(content, section, key, value, override)
    return validate(content)


def row(name: str, summaries: Sequence[dict[str, Any]]) -> list[str]:
    """A variant's means over its seeds."""

    def values(*keys: str) -> list[float]:
        found: list[Any] = list(summaries)
        for key in keys:
            found = [part[key] for part in found]
        return found

    before, after = values("metrics", "accuracy", "start"), values("metrics", "accuracy", "end")
    gains = [100 * (b - a) for a, b in zip(before, after, strict=True)]
    zeros = [share for share in values("zero_gradients") if share is not None]
    return [
        name,
        f"{100 * mean(before):.1f}",
        f"{100 * mean(after):.1f}",
        ", ".join(f"{gain:+.1f}" for gain in gains),
        f"{mean(values('heldout_loss', 'start')):.3f}",
        f"{mean(values('heldout_loss', 'end')):.3f}",
        f"{100 * mean(zeros):.0f} %" if zeros else "",
        f"{mean(values('rounds')):.0f}",
        f"{mean(values('bytes_per_client_round', 'up')):,.0f}",
        f"{mean(values('seconds')):.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("variants", nargs="+", choices=list(VARIANTS))
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    quiet_libraries()
    console = Console(stderr=True)
    summaries: dict[str, list[dict[str, Any]]] = {}
    for name in arguments.variants:
        summaries[name] = []
        for seed in range(arguments.seeds):
            settings = configure(name, seed, arguments.model, arguments.data, arguments.set)
            label = f"{name}-{seed}"
            run = Run(settings, arguments.out / label, False, printed(label, console))
            summaries[name].append(run.fit().to_json())
    if arguments.json:
        print(json.dumps(summaries, indent=2))
        return
    table = Table(title=f"SST-2, 4 clients, {arguments.seeds} seeds; accuracy in per cent")
    columns = ("variant", "before", "after", "gains", "loss before", "after", "zero", "rounds")
    for column in (*columns, "up, bytes", "seconds"):
        table.add_column(column, justify="right")
    for name, of_seeds in summaries.items():
        table.add_row(*row(name, of_seeds))
    Console().print(table)


if __name__ == "__main__":
    main()
