"""What one row for all label words saves: an evaluation of the accuracy, and a training step.

    python benchmarks/choice.py --model FOLDER --data FILE.jsonl

Each figure is divided by what it replaces, in turns in one process: a pass for the loss and one for
the accuracy, both with a row for each word. `--data` has the fields sentence and label (0 or 1), as
SST-2 does. A step has the two probes of one direction on one batch.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
from common import Column, Reach, Row

from fedforward.config.loading import validate
from fedforward.core.steps import Probe, Steps
from fedforward.data.sampler import by_length, take
from fedforward.evaluation import heldout
from fedforward.evaluation.objectives import Accuracy, Choice, Loss, Objective
from fedforward.models.base import CausalModel
from fedforward.training import build

DEMO = Path(__file__).parent.parent / "src" / "fedforward" / "demo" / "model"
COLUMNS = (
    Column("name", "what"),
    Column("examples", "examples", ","),
    Column("seconds", "ours (ms)", ".1f", 1000.0),
    Column("before_seconds", "a row for each word (ms)", ".1f", 1000.0),
    Column("over_before", "ours / before", ".3f"),
    Column("over_loss", "ours / the step with `loss`", ".3f"),
)


def configure(arguments: Any, source: Path, words: Sequence[str]) -> Any:
    """The configuration whose parts are measured."""
    return validate(
        {
            "model": {"path": arguments.model, "tune": arguments.tune},
            "data": {
                "source": str(source),
                "prompt": "{sentence} It was",
                "answer": "{label}",
                "label_words": {str(number): word for number, word in enumerate(words)},
                "heldout": arguments.examples,
                "sequence_length": 128,
            },
            "evaluation": {"metrics": ["accuracy"]},
            "federation": {"clients": 1},
            "method": {
                "batch_size": arguments.batch_size,
                "distribution": "rademacher",
                "learning_rate": 1e-3,
            },
            "run": {"threads": arguments.threads, "device": arguments.device},
        }
    )


def before(model: CausalModel, examples: Any) -> list[float]:
    """The loss and the accuracy as two passes with a row for each word."""
    means = []
    for objective in (Loss(), Accuracy()):
        total, count = 0.0, 0
        for group in by_length(examples, model.plan.evaluation_rows):
            (found,) = model.evaluate([Probe(objective.batch(group))])
            total, count = total + found.sums.sum(), count + found.counts.sum()
        means.append(objective.metric(float(total / count)))
    return means


def measure(arguments: Any, source: Path, words: Sequence[str]) -> list[Row]:
    config = configure(arguments, source, words)
    model, tokenizer = build.build_model(config, build.resolve_plan(config), ())
    corpus = build.read_corpus(config, build.corpus_reader(config), tokenizer, None)
    model.plan = build.settle_plan(config, model, build_method(config))
    held = heldout.prepare(config, corpus.heldout, tokenizer, model.plan)
    expected, found = before(model, corpus.heldout), heldout.measure(model, held)
    if abs(found["metrics"]["accuracy"] - expected[1]) > 0.5 / len(corpus.heldout):
        common.note(f"the accuracy is {found['metrics']['accuracy']}, and was {expected[1]}")
    name = ", ".join(word.strip() for word in words)
    repeats = arguments.repeats or (1 if arguments.quick else 5)
    actions = {
        "ours": lambda: heldout.measure(model, held),
        "before": lambda: before(model, corpus.heldout),
    }
    times = common.medians(common.interleave(actions, repeats, arguments.device))
    evaluation: Row = {
        "name": f"evaluation ({name})",
        "examples": len(corpus.heldout),
        "seconds": times["ours"],
        "before_seconds": times["before"],
        "over_before": times["ours"] / times["before"],
        "joined": model.plan.joins_choices,
        "most_branching": model.plan.most_branching,
        "reaches": {} if arguments.quick else {"over_before": Reach("<=", 0.4)},
    }
    return [evaluation, *steps(arguments, model, corpus.clients[0], name, repeats)]


def steps(arguments: Any, model: CausalModel, examples: Any, name: str, repeats: int) -> list[Row]:
    """A step with each objective, words in one row and in a row for each."""
    plan = model.plan
    groups = by_length(examples, arguments.batch_size)
    # The batch in the middle of the lengths.
    own = take(groups[len(groups) // 2], range(arguments.batch_size))
    joined = (plan.joins_choices, plan.most_branching)
    made: dict[str, Objective] = {
        "loss": Loss(),
        "choice": Choice(*joined),
        "choice, before": Choice(),
        "accuracy": Accuracy(*joined),
        "accuracy, before": Accuracy(),
    }
    batches = {key: replace(o.batch(own), objective=o) for key, o in made.items()}
    pairs = {
        key: [Probe(batch, perturbation=Steps.of([7], [sign * 1e-2])) for sign in (1.0, -1.0)]
        for key, batch in batches.items()
    }
    actions = {key: lambda probes=probes: model.evaluate(probes) for key, probes in pairs.items()}
    common.interleave(actions, 1, arguments.device)
    times = common.medians(common.interleave(actions, repeats, arguments.device))
    return [
        {
            "name": f"step, {key} ({name})",
            "examples": arguments.batch_size,
            "seconds": times[key],
            "before_seconds": times.get(f"{key}, before"),
            "over_before": times[key] / times[f"{key}, before"] if key != "loss" else None,
            "over_loss": times[key] / times["loss"],
        }
        for key in ("loss", "choice", "accuracy")
    ]


def build_method(config: Any) -> Any:
    from fedforward.training.assembly import build_method as built

    return built(config)


def main(given: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--model", default=str(DEMO), help="default: the demonstration's")
    parser.add_argument("--data", type=Path, help="FILE.jsonl; made-up rows unless given")
    parser.add_argument("--examples", type=int, default=128, help="that are evaluated")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--tune", choices=("lora", "full"), default="lora")
    arguments = parser.parse_args(given)
    common.prepare(arguments)
    if arguments.quick:
        arguments.examples = arguments.batch_size = 2
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        source = arguments.data or Path(folder) / "rows.jsonl"
        if arguments.data is None:
            things = ("lamp", "bell", "door", "chair", "clock", "table", "book", "cup")
            made = [
                {"sentence": f"the {t} is {w} .", "label": n}
                for t in things * 32
                for n, w in enumerate(("broken", "golden"))
            ]
            source.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
        for words in ((" terrible", " great"), (" a great disappointment", " a great pleasure")):
            rows += measure(arguments, source, words)
    common.finish(arguments, "choice", rows, COLUMNS)


if __name__ == "__main__":
    main()
