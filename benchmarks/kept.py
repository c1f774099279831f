"""A step of upper blocks on kept activations, against the same step of all blocks without them.

    python benchmarks/kept.py --model FOLDER --data FOLDER [--json] [--check]

A step is nine probes of one batch: the point and eight one-sided Rademacher directions, on LoRA
adapters of rank 8 of all linear layers of which B is tuned. Four ways take turns in one process:
all blocks tuned; upper blocks tuned, lower ones once for the probes of a pass; upper blocks on rows
that are kept already; and on rows that are new, as in the first epoch. `--data` holds
sst2_train.jsonl (16 rows, the word after "{sentence} It was") and gsm8k_train.jsonl (4 rows of at
most 256 tokens, the answer). Passes are forward-pass equivalents: tokens times the blocks that they
ran through, over those of a plain pass of the batch.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import common
import numpy as np
from common import Column, Reach, Row

from fedforward.core.batches import IGNORED, TokenBatch
from fedforward.core.steps import NO_STEPS, Steps
from fedforward.directions import Distribution
from fedforward.methods.estimators import FZOO
from fedforward.models.lora import LoraModel

DIRECTIONS, MU = 8, 1e-2
REACH = Reach("<=", 0.35)
#: By task: rows of a batch, most tokens of a row.
TASKS = {"sst2": (16, 128), "gsm8k": (4, 256)}


def read(task: str, folder: Path, tokenizer: Any) -> TokenBatch:
    """The first rows of a task."""
    rows, most = TASKS[task]
    texts = (folder / f"{task}_train.jsonl").read_text(encoding="utf-8").splitlines()[:rows]
    parts = [json.loads(text) for text in texts]
    if task == "sst2":
        words = (" terrible", " great")
        pairs = [(f"{row['sentence']} It was", words[row["label"]]) for row in parts]
    else:
        pairs = [(f"Question: {row['question']}\nAnswer:", f" {row['answer']}") for row in parts]
    prompts, answers = (
        [tokenizer(text)["input_ids"] for text in own] for own in zip(*pairs, strict=True)
    )
    length = min(most, max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True)))
    tokens = np.zeros((rows, length), np.int64)
    labels = np.full((rows, length), IGNORED, np.int64)
    for place, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        whole = (prompt + answer)[:length]
        tokens[place, : len(whole)] = whole
        labels[place, len(prompt) : len(whole)] = whole[len(prompt) :]
    return TokenBatch(tokens, labels)


def network(arguments: argparse.Namespace) -> Any:
    if arguments.quick:
        return common.network("quick", "float32", arguments.device)
    from transformers import AutoModelForCausalLM

    made = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=common.DTYPES["float32"])
    return made.to(arguments.device).eval().requires_grad_(False)


def adapted(arguments: argparse.Namespace, blocks: Sequence[int] | None) -> LoraModel:
    return LoraModel(
        network(arguments),
        rank=8,
        alpha=16.0,
        factors="B",
        blocks=blocks,
        distribution=Distribution.RADEMACHER,
        plan=common.make_plan(arguments, DIRECTIONS + 1),
    )


def step_of(model: LoraModel, batch: TokenBatch) -> Callable[[], None]:
    """A step with directions of its own in every call."""
    numbers = count()
    estimator = FZOO(DIRECTIONS, MU)

    def step() -> None:
        number = next(numbers)
        units = [Steps.of([1000 * number + k], [1.0]) for k in range(DIRECTIONS)]
        estimator.gradients(model.evaluate(estimator.probes(batch, NO_STEPS, units)))

    return step


def measure(
    arguments: argparse.Namespace, task: str, batch: TokenBatch, every: LoraModel, upper: LoraModel
) -> Row:
    reason = upper.keep_activations(1 << 32)
    kept = upper.kept
    if kept is None:
        common.stop(f"--model {arguments.model}: nothing can be kept: {reason}.")
    step = step_of(upper, batch)

    def plain() -> None:
        upper.kept = None
        step()

    def known() -> None:
        upper.kept = kept
        step()

    def new() -> None:
        kept.clear()
        known()

    actions = {"all": step_of(every, batch), "upper": plain, "new": new, "kept": known}
    passes = {}
    for name, action in actions.items():
        model = every if name == "all" else upper
        before = replace(model.work)
        action()
        passes[name] = model.work.since(before).passes
    samples: dict[str, list[float]] = {name: [] for name in actions}
    for repeat in range(arguments.repeats or (1 if arguments.quick else 5)):
        for name, action in common.turned(actions, repeat).items():
            if name == "kept":
                # Whatever came before, its rows are there.
                kept.rows(batch.tokens, batch.input_lengths)
            samples[name].append(common.seconds(action, arguments.device))
        common.note(f"{task}: {repeat + 1} repeats")
    times = common.medians(samples)
    ratios = common.medians(
        {
            name: [one / other for one, other in zip(own, samples["all"], strict=True)]
            for name, own in samples.items()
        }
    )
    return {
        "name": task,
        "rows": len(batch.tokens),
        "length": batch.tokens.shape[1],
        "blocks": every.prefix.count,
        "first_block": kept.lower.depth,
        "bytes": kept.size,
        **{f"{name}_seconds": times[name] for name in actions},
        **{f"{name}_passes": passes[name] for name in actions},
        **{f"{name}_over_all": ratios[name] for name in actions if name != "all"},
        "reaches": {} if arguments.quick else {"kept_over_all": REACH},
    }


def main(given: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--model", default="", help="folder of a model")
    parser.add_argument("--data", type=Path, default=Path(), help="folder of the data")
    parser.add_argument("--first", type=int, default=22, help="the first tuned block")
    parser.add_argument("--tasks", nargs="+", choices=tuple(TASKS), default=list(TASKS))
    arguments = parser.parse_args(given)
    common.prepare(arguments)
    first = 1 if arguments.quick else arguments.first
    every = adapted(arguments, None)
    upper = adapted(arguments, range(first, every.prefix.count))
    if arguments.quick:
        batches = {"quick": common.token_batch("quick", 16, longest=8)}
    else:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        batches = {task: read(task, arguments.data, tokenizer) for task in arguments.tasks}
    rows = [measure(arguments, task, batch, every, upper) for task, batch in batches.items()]
    columns = [
        Column("name", "what"),
        Column("rows", "rows"),
        Column("length", "tokens"),
        Column("all_seconds", "all blocks (s)", ".2f"),
        Column("upper_seconds", "upper (s)", ".2f"),
        Column("new_seconds", "new rows (s)", ".2f"),
        Column("kept_seconds", "kept rows (s)", ".2f"),
        Column("upper_over_all", "upper / all", ".3f"),
        Column("new_over_all", "new / all", ".3f"),
        Column("kept_over_all", "kept / all", ".3f"),
        Column("all_passes", "passes, all", ".2f"),
        Column("upper_passes", "upper", ".2f"),
        Column("new_passes", "new", ".2f"),
        Column("kept_passes", "kept", ".2f"),
    ]
    common.finish(arguments, "kept", rows, columns)


if __name__ == "__main__":
    main()
