"""Held-out loss and task metric against forward-pass equivalents, way by way, each at its own rate.

    python benchmarks/efficiency.py --model FOLDER --task gsm8k --data FOLDER --budget 1080

A forward-pass equivalent is a plain pass over a reference batch (`--batch`): tokens times the
blocks that they ran through, over tokens times all blocks. Probes, passes of lower blocks for kept
activations, probes of the line search of "auto" and passes that align adapters are counted.
Evaluations are not, nor what measures memory before a run. A step of FedAvg with AdamW counts as
three passes over all blocks.

A way with several rates tries each in a short run of its own (`--tuning`, at seed 0, on held-out
rows of the training data) and goes on with the best. `--sweep` runs nine fixed rates and "auto" for
as many rounds in place of that. `--results FILE` is written after each run, and a study that was
interrupted goes on from it. `--write` makes docs/reference/efficiency.md of all studies in it.
Settings may be overridden with `--set section.key=value`, or `--set WAY:section.key=value`.
"""

import argparse
import fcntl
import gc
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any

import common
from common import Column, Reach, Row

from fedforward.config.loading import assign, parse_override, validate
from fedforward.config.schema import Config
from fedforward.core.errors import FedForwardError
from fedforward.evaluation import heldout as evaluation
from fedforward.federation.rate_search import SCALES, line_search_batches
from fedforward.models.loading import longest_sequence
from fedforward.training import build
from fedforward.training.metrics import DivergenceError, ProgressCallback, heldout_objective
from fedforward.training.run import Run

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/reference/efficiency.md"
#: Passes that a step of backpropagation counts as.
BACKPROPAGATION = 3
#: Of a run that chooses a rate; those that are reported have others.
TUNING_SEED = 0
#: Held-out rows where none are asked for and the task has no file of its own for them.
HELDOUT = 500
AUTO_REACH = Reach(">=", 0.9)


@dataclass(frozen=True)
class Task:
    """Rows, how they become text, and what is held out.

    Attributes:
        training, evaluation: files of the data folder; without the second, rows of the first are
            held out.
        batch: rows of the reference batch.
        other: the task whose text shows what was forgotten.
    """

    training: str
    evaluation: str | None
    batch: int
    other: str
    data: Mapping[str, Any]


TREC_WORDS = {
    "DESC": " description",
    "ENTY": " thing",
    "ABBR": " abbreviation",
    "HUM": " person",
    "NUM": " number",
    "LOC": " place",
}
TASKS = {
    "sst2": Task(
        "sst2_train.jsonl",
        "sst2_validation.jsonl",
        16,
        "gsm8k",
        {
            "prompt": "{sentence} It was",
            "answer": "{label}",
            "label_words": {"0": " terrible", "1": " great"},
            "sequence_length": 128,
        },
    ),
    "trec": Task(
        "trec_train.jsonl",
        "trec_test.jsonl",
        16,
        "gsm8k",
        {
            "prompt": "{text} The answer is a",
            "answer": "{label}",
            "label_words": TREC_WORDS,
            "sequence_length": 128,
        },
    ),
    "gsm8k": Task(
        "gsm8k_train.jsonl",
        None,
        4,
        "code",
        {
            # The space is the answer's: a token holds it and the word after it.
            "prompt": "Question: {question}\nAnswer:",
            "answer": " {answer}",
            "sequence_length": 256,
        },
    ),
    "code": Task(
        "code_alpaca.jsonl",
        None,
        4,
        "gsm8k",
        {
            "prompt": "### Instruction:\n{instruction}\n\n### Response:\n",
            "answer": "{output}",
            "sequence_length": 256,
        },
    ),
}


@dataclass(frozen=True)
class Way:
    """A method with the settings that its paper has, and the rates that it tries."""

    method: Mapping[str, Any]
    rates: tuple[float | str, ...]
    lora: Mapping[str, Any]


RATES = (1e-3, 3e-3, 1e-2, 3e-2)
NORMALISED = (3e-3, 1e-2, 3e-2, 1e-1)
DECAY = {"schedule": "cosine", "final": 0.2}
ONLY_B = {"factors": "B"}
# Only B is tuned where a paper leaves it open: it is the better half for forward passes.
WAYS = {
    "fedmezo": Way(
        {"name": "fedmezo", "local_steps": 30, "batch_size": 1, "mu": 1e-3, **DECAY}, RATES, ONLY_B
    ),
    "decomfl": Way(
        {
            "name": "decomfl",
            "estimator": "one-sided",
            "directions": 5,
            "local_steps": 1,
            "mu": 1e-3,
            **DECAY,
        },
        RATES,
        ONLY_B,
    ),
    # The paper has 200 local steps, so that few rounds fit a budget.
    "fedkseed": Way(
        {"name": "fedkseed", "local_steps": 30, "batch_size": 1, "mu": 1e-3, **DECAY}, RATES, ONLY_B
    ),
    "fzoo": Way(
        {
            "name": "fedmezo",
            "estimator": "fzoo",
            "directions": 8,
            "distribution": "rademacher",
            "local_steps": 1,
            "mu": 1e-3,
            **DECAY,
        },
        NORMALISED,
        ONLY_B,
    ),
    # Its own defaults, untouched.
    "fedmezo-auto": Way({"name": "fedmezo-auto"}, ("auto",), {}),
    "fedavg-adamw": Way(
        {"name": "fedavg", "optimizer": "adamw", "local_steps": 5, **DECAY},
        (3e-4, 1e-3, 3e-3, 1e-2),
        {},
    ),
}
#: Batches of a step in reference batches, for ways whose batch follows the task: 32 and 16 rows
#: where label words are told apart, as in the papers, and 8 and 4 of text.
REFERENCE_BATCHES = {"decomfl": 2, "fzoo": 1, "fedavg-adamw": 1}
SWEPT = ("fedmezo", "fedmezo-auto")
#: Nine rates, each the root of ten above the one before; in the middle is what "auto" found.
SPREAD = tuple(10 ** (place / 2) for place in range(-4, 5))


# One run ------------------------------------------------------------------------------------------


class Measured(Run):
    """A run that knows what its evaluations took and how many texts were run to align adapters.

    Attributes:
        aligned: passes over one text each, before the first round.
        evaluated: seconds of evaluations so far, by rounds.
    """

    def __init__(self, config: Config, out: Path, progress: ProgressCallback) -> None:
        self.aligned = 0
        self.evaluated: dict[int, float] = {}
        super().__init__(config, out, False, progress)

    def _begin_aligned(self) -> None:
        def count(_: object, __: object, found: Any) -> None:
            self.aligned += len(found)

        handle = self.model.network.get_input_embeddings().register_forward_hook(count)
        try:
            super()._begin_aligned()
        finally:
            handle.remove()
        if self.config.lora.alignment == "backward":
            # A pass back, for each label word, counts as two.
            self.aligned *= 1 + 2 * max(1, len(self.config.data.label_words or ()))

    def evaluate(self, rounds: int) -> dict[str, Any]:
        began = time.monotonic()
        figures = super().evaluate(rounds)
        # The seconds of a run do not have those of its first evaluation.
        if rounds:
            self.evaluated[rounds] = time.monotonic() - began
        return figures


def configure(given: argparse.Namespace, way: str, seed: int, rate: Any, tuning: bool) -> Config:
    """The configuration of a run, but for its rounds and evaluations."""
    task, chosen, rows = TASKS[given.task], WAYS[way], given.evaluation or HELDOUT
    data = {**task.data, "source": str(given.data / task.training)}
    content: dict[str, Any] = {
        "model": {"path": str(given.model), "blocks": given.blocks},
        "lora": dict(chosen.lora),
        "data": data,
        "federation": {"clients": given.clients},
        "method": {**chosen.method, "learning_rate": rate},
        "run": {"seed": seed, "threads": given.threads, "device": given.device},
    }
    if way in REFERENCE_BATCHES:
        content["method"]["batch_size"] = REFERENCE_BATCHES[way] * given.batch
    if "label_words" in data:
        content["evaluation"] = {"metrics": ["accuracy"]}
    if task.evaluation and not tuning:
        content.setdefault("evaluation", {})["source"] = str(given.data / task.evaluation)
        if given.evaluation:
            content["evaluation"]["limit"] = given.evaluation
    else:
        data["heldout"] = float(rows)
    for override in given.set:
        owner, colon, text = override.partition(":")
        if not colon or owner not in WAYS:
            owner, text = way, override
        if owner == way:
            section, key, value = parse_override(text)
            assign(content, section, key, value, override)
    return validate(content)


def backpropagates(config: Config) -> bool:
    return config.method.name == "fedavg"


def clients_of(config: Config) -> int:
    return max(1, round(config.federation.participation * config.federation.clients))


def rounds_within(given: argparse.Namespace, config: Config, budget: float) -> int:
    """The most rounds of a run whose passes are expected to stay within a budget."""
    method, clients = config.method, clients_of(config)
    steps = method.local_steps
    if backpropagates(config):
        return int(budget * given.batch / (BACKPROPAGATION * clients * steps * method.batch_size))
    lower = (min(config.model.tuned_blocks) if config.model.tuned_blocks else 0) / given.depth
    probes = steps * method.probes_per_step
    searched = line_search_batches(probes)
    if method.learning_rate != "auto":
        searched = 0
    rows = clients * method.batch_size
    upper = (probes + searched * len(SCALES)) * rows * (1.0 - lower)
    seen = (steps + searched) * rows * lower
    aligned = config.data.public_rows if config.lora.init == "aligned" else 0
    examples = budget * given.batch - aligned
    # Lower blocks are run once for every row that a step sees. Once all are kept, only upper ones
    # are run. Rows with endings of several tokens are not kept.
    most_rows = rows_in(given.data / TASKS[given.task].training)
    within = examples / (upper + seen)
    if seen and given.kept and within * seen > most_rows * lower:
        within = (examples - most_rows * lower) / upper
    return int(within)


def rows_in(path: Path) -> int:
    with path.open(encoding="utf-8") as lines:
        return sum(1 for _ in lines)


def with_rounds(config: Config, rounds: int, points: int) -> Config:
    """The configuration with so many rounds and about so many evaluations."""
    return config.model_copy(
        update={
            "federation": config.federation.model_copy(update={"rounds": rounds}),
            "run": config.run.model_copy(update={"evaluate_every": max(1, rounds // points)}),
        }
    )


def finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def points_of(given: argparse.Namespace, run: Measured) -> list[dict[str, Any]]:
    """What was measured, by evaluation: losses, metrics, passes, examples and seconds."""
    config, found, spent = run.config, [], 0.0
    with run.directory.metrics.open(encoding="utf-8") as lines:
        for line in map(json.loads, lines):
            number = line["round"]
            spent += run.evaluated.get(number, 0.0)
            if "heldout_loss" not in line:
                continue
            if backpropagates(config):
                steps = number * clients_of(config) * config.method.local_steps
                examples = float(BACKPROPAGATION * steps * config.method.batch_size)
            else:
                examples = line.get("passes", 0.0) * config.method.batch_size
                examples += run.aligned if number else 0
            known = line["heldout_loss"] is not None
            found.append(
                {
                    "round": number,
                    "passes": round(examples / given.batch, 3),
                    "examples": round(examples, 1),
                    "value": finite(heldout_objective(config.objective, line)) if known else None,
                    "heldout_loss": finite(line["heldout_loss"]),
                    "accuracy": line.get("metrics", {}).get("accuracy"),
                    "seconds": round(max(0.0, line["seconds"] - spent), 2),
                }
            )
    return found


def other_text(given: argparse.Namespace, run: Run) -> Callable[[], float | None]:
    """What measures the perplexity of answers of another task at a run's weights."""
    task, rows = TASKS[TASKS[given.task].other], min(given.evaluation or 100, 100)
    content: dict[str, Any] = {
        "model": {"path": str(given.model)},
        "data": {
            **task.data,
            "source": str(given.data / task.training),
            "heldout": float(rows),
            "limit": rows + 8,
        },
        "federation": {"clients": 1},
        "method": {"learning_rate": 1e-3},
    }
    config = validate(content)
    reader = build.corpus_reader(config)
    corpus = build.read_corpus(config, reader, run.tokenizer, longest_sequence(run.model.network))
    heldout = evaluation.prepare(config, corpus.heldout, run.tokenizer, run.plan)

    def perplexity() -> float | None:
        loss = evaluation.measure(run.model, heldout)["heldout_loss"]
        return finite(math.exp(min(loss, 700.0)))

    return perplexity


def carry_out(given: argparse.Namespace, config: Config, label: str) -> dict[str, Any]:
    """A run in a folder of its own that is gone afterwards."""

    def told(done: int, total: int, line: dict[str, Any]) -> None:
        if "heldout_loss" in line:
            value = abs(heldout_objective(config.objective, line))
            text = f"{label}: round {done}/{total} {config.objective} {value:.4f}"
            if "accuracy" in line.get("metrics", {}):
                text += f" accuracy {100 * line['metrics']['accuracy']:.1f} %"
            common.note(f"{text} after {line['seconds']:.0f} s")

    forgotten: dict[str, Any] = {}
    # Networks hold themselves in circles, and the one of the last run is large.
    gc.collect()
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        run = Measured(config, Path(folder) / "run", told)
        setup = time.monotonic() - began
        if given.forgetting:
            perplexity = other_text(given, run)
            forgotten = {"other": TASKS[given.task].other, "before": perplexity()}
        diverged = ""
        try:
            run.fit()
        except DivergenceError as error:
            diverged = str(error).replace(folder, "FOLDER")
        if given.forgetting:
            forgotten["after"] = perplexity()
        points = points_of(given, run)
        with run.directory.metrics.open(encoding="utf-8") as lines:
            read = [json.loads(line) for line in lines][1:]
        once = run.directory.initial_a
        return {
            "objective": config.objective,
            "rounds": read[-1]["round"] if read else 0,
            "points": points,
            "diverged": diverged,
            "up": mean([line["bytes"]["up"] for line in read if "bytes" in line]),
            "down": mean([line["bytes"]["down"] for line in read if "bytes" in line]),
            "once_bytes": once.stat().st_size if once.is_file() else 0,
            "aligned_examples": run.aligned,
            "setup_seconds": round(setup, 2),
            "rates": [mean(list(line["learning_rates"].values())) for line in read],
            "forgetting": forgotten or None,
            "method": config.method.model_dump(mode="json", exclude={"learning_rate"}),
            "lora": config.lora.model_dump(mode="json", exclude={"init_file"}),
        }


def mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


# Results that stay --------------------------------------------------------------------------------


def as_json(runs: Sequence[dict[str, Any]]) -> str:
    content = {"benchmark": "efficiency", "runs": list(runs)}
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


class Results:
    """Finished runs, in a file that is written after each of them.

    Processes may share it: it is read again, locked, before a run is added.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.runs: list[dict[str, Any]] = self.read()

    def read(self) -> list[dict[str, Any]]:
        """The runs as they are in the file now."""
        if self.path is None or not self.path.is_file():
            return []
        try:
            runs: list[dict[str, Any]] = json.loads(self.path.read_text(encoding="utf-8"))["runs"]
        except (ValueError, KeyError, TypeError):
            common.stop(f"--results {self.path}: this is no file of efficiency.py. Name another.")
        return runs

    def find(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The run of such a key; the key is as JSON has it."""
        return next((run for run in self.runs if run["key"] == key), None)

    def add(self, run: dict[str, Any]) -> None:
        if self.path is None:
            self.runs.append(run)
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # It stays, so that all who wait for it wait for the same one.
        name = blake2b(str(self.path.resolve()).encode(), digest_size=8).hexdigest()
        lock = Path(tempfile.gettempdir()) / f"efficiency-{name}.lock"
        with lock.open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            self.runs = [*self.read(), run]
            written = self.path.with_name(self.path.name + ".new")
            written.write_text(as_json(self.runs), encoding="utf-8")
            written.replace(self.path)


def study_of(given: argparse.Namespace) -> dict[str, Any]:
    """What the runs of one study have in common."""
    return {
        "model": given.model.resolve().name,
        "task": given.task,
        "budget": given.budget,
        "batch": given.batch,
        "clients": given.clients,
        "blocks": given.blocks,
        "evaluation": given.evaluation,
        "set": list(given.set),
        "forgetting": given.forgetting,
        "quick": given.quick,
    }


def once(
    given: argparse.Namespace,
    results: Results,
    kind: str,
    way: str,
    seed: int,
    rate: float | str,
    rounds: int = 0,
) -> dict[str, Any]:
    """A run, unless it is among the results.

    Args:
        kind: "final", "tuning" or "sweep".
        rounds: 0 is as many as the budget holds.
    """
    tuning = kind == "tuning"
    budget = given.tuning if tuning else given.budget
    key = {"study": study_of(given), "kind": kind, "way": way, "seed": seed, "rate": rate}
    key |= {"budget": budget} | ({"rounds": rounds} if rounds else {})
    found = results.find(key)
    if found is not None:
        return found
    config = configure(given, way, seed, rate, tuning)
    rounds = rounds or rounds_within(given, config, budget)
    if rounds < 1:
        common.stop(
            f"A round of {way} takes more than the {budget:g} passes of its {kind} run. Raise "
            "--budget or --tuning, or lower method.local_steps with --set."
        )
    config = with_rounds(config, rounds, 1 if tuning else given.points)
    # Forgetting is of the runs that are reported.
    own = argparse.Namespace(**{**vars(given), "forgetting": given.forgetting and not tuning})
    label = f"{key['study']['model']} {given.task} {way} {kind} rate {rate} seed {seed}"
    made = {"key": key, **carry_out(own, config, label)}
    made["machine"] = common.machine(given.threads, given.device)
    results.add(made)
    return made


# Studies ------------------------------------------------------------------------------------------


def outcome(run: Mapping[str, Any]) -> float:
    """What a run optimised, at its end; infinite if it diverged."""
    last = run["points"][-1]["value"]
    return math.inf if run["diverged"] or last is None else last


def best_rate(given: argparse.Namespace, results: Results, way: str) -> float | str:
    """The rate with the best short run; the only one is taken as it is."""
    rates = given.rates.get(way, WAYS[way].rates)
    if len(rates) == 1:
        return rates[0]
    tried = {rate: once(given, results, "tuning", way, TUNING_SEED, rate) for rate in rates}
    return min(tried, key=lambda rate: outcome(tried[rate]))


def within(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The points of a run up to its budget; a pass in fifty more is rounding."""
    limit = 1.02 * run["key"]["budget"]
    return [point for point in run["points"] if point["passes"] <= limit]


def passes_to(points: Sequence[Mapping[str, Any]], value: float) -> float | None:
    """Passes until a value is reached, on the lines between evaluations; None if it is not."""
    for before, after in pairwise(points):
        if before["value"] is None or after["value"] is None or after["value"] > value:
            continue
        if before["value"] <= value:
            return float(before["passes"])
        share = (before["value"] - value) / (before["value"] - after["value"])
        return float(before["passes"] + share * (after["passes"] - before["passes"]))
    return None


def spread(values: Sequence[float | None]) -> list[float] | None:
    known = [value for value in values if value is not None]
    return [min(known), max(known)] if known else None


def summarise(
    runs: Sequence[Mapping[str, Any]], reference: Mapping[int, Mapping[str, Any]], tries: int
) -> Row:
    """A row of one way: the means over its seeds.

    Args:
        reference: the runs of the way that others are held against, by seed.
        tries: rates that were tried.
    """
    key = runs[0]["key"]
    firsts = [run["points"][0] for run in runs]
    lasts = [within(run)[-1] for run in runs]
    values = [None if run["diverged"] else p["value"] for run, p in zip(runs, lasts, strict=True)]
    reached: list[float | None] = []
    ratios: list[float | None] = []
    for run in runs:
        other = reference.get(run["key"]["seed"])
        target = other and within(other)[-1]
        if not target or target["value"] is None or target["value"] >= firsts[0]["value"]:
            continue
        found = passes_to(within(run), target["value"])
        reached.append(found)
        ratios.append(target["passes"] / found if found else None)
    forgotten = [run["forgetting"] for run in runs if run["forgetting"]]
    whole = all(value is not None for value in reached)
    return {
        "name": f"{key['study']['model']} {key['study']['task']} {key['way']}",
        "model": key["study"]["model"],
        "task": key["study"]["task"],
        "way": key["way"],
        "rate": str(key["rate"]) if key["rate"] == "auto" else f"{key['rate']:g}",
        "tries": tries,
        "seeds": len(runs),
        "objective": runs[0]["objective"],
        "diverged": sum(bool(run["diverged"]) for run in runs),
        "rounds": runs[0]["rounds"],
        "passes": mean([point["passes"] for point in lasts]),
        "examples": mean([point["examples"] for point in lasts]),
        "start": mean([point["value"] for point in firsts]),
        "end": mean(values),
        "end_spread": spread(values),
        "heldout_start": mean([point["heldout_loss"] for point in firsts]),
        "heldout_end": mean([point["heldout_loss"] for point in lasts]),
        "accuracy_start": mean([point["accuracy"] for point in firsts]),
        "accuracy_end": mean([point["accuracy"] for point in lasts]),
        "accuracy_spread": spread([point["accuracy"] for point in lasts]),
        "to_reference": mean(reached) if reached and whole else None,
        "fewer": mean(ratios) if ratios and whole else None,
        "reached": f"{sum(v is not None for v in reached)} of {len(reached)}" if reached else None,
        "up": mean([run["up"] for run in runs]),
        "once_bytes": runs[0]["once_bytes"],
        "seconds": mean(
            [
                point["seconds"] + run["setup_seconds"]
                for run, point in zip(runs, lasts, strict=True)
            ]
        ),
        "other": forgotten[0]["other"] if forgotten else None,
        "perplexity_before": mean([found["before"] for found in forgotten]),
        "perplexity_after": mean([found["after"] for found in forgotten]),
        "reaches": {},
    }


def rows_of(runs: Sequence[dict[str, Any]], reference: str) -> list[Row]:
    """The rows of all studies among some runs."""
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for run in runs:
        if run["key"]["kind"] == "final":
            study = json.dumps(run["key"]["study"], sort_keys=True)
            own = groups.setdefault(study, {})
            own.setdefault(run["key"]["way"], []).append(run)
    rows = []
    for study, ways in groups.items():
        held = {run["key"]["seed"]: run for run in ways.get(reference, [])}
        for way, own in ways.items():
            tried = {
                run["key"]["rate"]
                for run in runs
                if (run["key"]["kind"], run["key"]["way"]) == ("tuning", way)
                and json.dumps(run["key"]["study"], sort_keys=True) == study
            }
            rows.append(summarise(own, held, len(tried)) | {"study": own[0]["key"]["study"]})
    return rows


def compare(given: argparse.Namespace, results: Results) -> list[dict[str, Any]]:
    """Every way at its best rate, with every seed; the runs that are reported."""
    runs = []
    for way in given.ways:
        rate = best_rate(given, results, way)
        runs += [once(given, results, "final", way, seed, rate) for seed in given.seeds]
    names = {run["key"]["way"] for run in runs}
    wanted = json.dumps(study_of(given), sort_keys=True)
    tuned = [
        run
        for run in results.runs
        if run["key"]["kind"] == "tuning"
        and run["key"]["way"] in names
        and json.dumps(run["key"]["study"], sort_keys=True) == wanted
    ]
    return runs + tuned


def sweep(given: argparse.Namespace, results: Results) -> list[dict[str, Any]]:
    """Nine fixed rates about the one that "auto" found, and "auto", for as many rounds."""
    made = []
    for way in given.ways:
        for seed in given.seeds:
            if backpropagates(configure(given, way, seed, 1e-3, False)):
                common.stop(f"--sweep is of ways with forward passes, and {way} has none.")
            fixed = configure(given, way, seed, 1e-3, False)
            rounds = max(1, rounds_within(given, fixed, given.budget))
            auto = once(given, results, "sweep", way, seed, "auto", rounds)
            late = [rate for rate in auto["rates"][len(auto["rates"]) // 2 :] if rate]
            centre = given.rates.get(way, (None,))[0]
            if not isinstance(centre, float):
                centre = statistics.geometric_mean(late) if late else 1e-2
            made.append(auto)
            for factor in SPREAD:
                rate = float(f"{centre * factor:.3g}")
                made.append(once(given, results, "sweep", way, seed, rate, rounds))
    return made


def swept(runs: Sequence[dict[str, Any]]) -> list[Row]:
    """A row for each run of the sweeps, and one with "auto" over the best for each of them."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        if run["key"]["kind"] == "sweep":
            key = {name: run["key"][name] for name in ("study", "way", "seed", "rounds")}
            groups.setdefault(json.dumps(key, sort_keys=True), []).append(run)
    rows: list[Row] = []
    for own in groups.values():
        key = own[0]["key"]
        name = f"{key['study']['model']} {key['study']['task']} {key['way']} seed {key['seed']}"
        start = own[0]["points"][0]["value"]
        falls: dict[float | str, float | None] = {}
        # Fixed rates in order, then "auto".
        for run in sorted(own, key=lambda run: (run["key"]["rate"] == "auto", _order(run))):
            end, rate = outcome(run), run["key"]["rate"]
            falls[rate] = start - end if math.isfinite(end) else None
            rows.append(
                {
                    "name": name,
                    "rate": "auto" if rate == "auto" else f"{rate:.3g}",
                    "start": start,
                    "end": finite(end),
                    "fall": falls[rate],
                    "diverged": int(bool(run["diverged"])),
                    "rounds": run["rounds"],
                    "passes": run["points"][-1]["passes"],
                    "reaches": {},
                }
            )
        fixed = {rate: fall for rate, fall in falls.items() if fall is not None and rate != "auto"}
        if len(own) < 1 + len(SPREAD) or not fixed:
            continue
        best = max(fixed, key=lambda rate: fixed[rate])
        numbers = [float(rate) for rate in falls if rate != "auto"]
        at_end = best in (min(numbers), max(numbers))
        ratio = None
        if fixed[best] > 0.0:
            ratio = (falls["auto"] or 0.0) / fixed[best]
        rows.append(
            {
                "name": name,
                "rate": f"auto over {best:.3g}, the best" + (", at an end" if at_end else ""),
                "start": start,
                "fall": fixed[best],
                "auto_over_best": ratio,
                "reaches": {} if key["study"]["quick"] else {"auto_over_best": AUTO_REACH},
            }
        )
    return rows


def _order(run: Mapping[str, Any]) -> float:
    rate = run["key"]["rate"]
    return 0.0 if rate == "auto" else float(rate)


# Tables and curves --------------------------------------------------------------------------------

COLUMNS = (
    Column("model", "model"),
    Column("task", "task"),
    Column("way", "way"),
    Column("rate", "rate"),
    Column("tries", "tried", "d"),
    Column("seeds", "seeds", "d"),
    Column("rounds", "rounds", "d"),
    Column("passes", "passes", ",.0f"),
    Column("examples", "examples", ",.0f"),
    Column("start", "start", ".3f"),
    Column("end", "end", ".3f"),
    Column("accuracy_start", "accuracy (%)", ".1f", 100.0),
    Column("accuracy_end", "after (%)", ".1f", 100.0),
    Column("to_reference", "to reference", ",.0f"),
    Column("fewer", "times fewer", ".1f"),
    Column("reached", "seeds there"),
    Column("up", "bytes up", ",.0f"),
    Column("once_bytes", "once", ",d"),
    Column("seconds", "seconds", ",.0f"),
    Column("perplexity_before", "other text", ".2f"),
    Column("perplexity_after", "after", ".2f"),
    Column("diverged", "diverged", "d"),
)
SWEEP_COLUMNS = (
    Column("name", "what"),
    Column("rate", "rate"),
    Column("rounds", "rounds", "d"),
    Column("passes", "passes", ",.0f"),
    Column("start", "start", ".3f"),
    Column("end", "end", ".3f"),
    Column("fall", "fall", ".3f"),
    Column("auto_over_best", "auto / best", ".2f"),
    Column("diverged", "diverged", "d"),
)


def remarks(given: argparse.Namespace) -> list[str]:
    found = [
        f"Passes are of {given.batch} rows; start and end are in nats, of what is optimised.",
        "Seconds are of rounds and of what comes before them, without evaluations.",
        "A step of FedAvg counts as three passes over all blocks, whatever blocks it tunes.",
    ]
    config = configure(given, given.ways[0], 0, 1e-3, False)
    first = min(config.model.tuned_blocks or (), default=0)
    if first and "fedavg-adamw" in given.ways:
        upper = 1.0 - first / given.depth
        found.append(
            f"With blocks {given.blocks} it runs {1 + 2 * upper:.2f}: one forward, and backward "
            "through the upper blocks alone."
        )
    return found


def markdown(rows: Sequence[Row], columns: Sequence[Column]) -> list[str]:
    shown = [c for c in columns if any(row.get(c.key) is not None for row in rows)]
    lines = ["| " + " | ".join(column.title for column in shown) + " |"]
    lines.append("|" + "|".join("--:" if column.form else "---" for column in shown) + "|")
    lines += ["| " + " | ".join(column.cell(row) for column in shown) + " |" for row in rows]
    return lines


def page(runs: Sequence[dict[str, Any]], reference: str, drawn: bool) -> str:
    """The page about all studies."""
    lines = [
        "# Efficiency",
        "",
        "<!-- Written by benchmarks/efficiency.py --write; do not edit. -->",
        "",
        "What a way reaches for the forward passes that it runs.",
        "A pass is one over a reference batch: tokens times the blocks that they ran through,",
        "over tokens times all blocks.",
        "Counted are probes, lower blocks for kept activations, the line search of `auto`,",
        "and the passes that align adapters.",
        "A step of FedAvg with AdamW counts as three passes over all blocks.",
        "",
        "Each way has the rate that was best in short runs of equal budget, at another seed.",
        "Rates lie on a grid, and a best one at its end may have a better one beyond it.",
        "`fedmezo`, `decomfl`, `fedkseed` and `fzoo` tune B alone, with a cosine to a fifth.",
        "`fedkseed` takes 30 local steps; its paper has 200. `fedmezo-auto` has its defaults.",
        "`decomfl` compares five directions with each other; its paper compares them with θ.",
        "Start and end are held-out, in nats, of what is optimised:",
        "the cross-entropy of the label words, or the loss of an answer's token.",
        "Figures are means over seeds, and bands in the curves reach from least to greatest.",
        f"The reference of the columns about passes is `{reference}` at the end of its budget.",
        "Seconds are of rounds and of what comes before them, without evaluations.",
        "",
    ]
    if drawn:
        lines += ["![Held-out value against forward-pass equivalents](efficiency.svg)", ""]
    rows = rows_of(runs, reference)
    studies: dict[str, list[Row]] = {}
    for row in rows:
        studies.setdefault(json.dumps(row["study"], sort_keys=True), []).append(row)
    for own in studies.values():
        lines += [f"## {own[0]['model']}, {own[0]['task']}", "", *described(own[0]["study"]), ""]
        if own[0]["other"]:
            lines += [f"The other text is of the task {own[0]['other']}.", ""]
        lines += [*markdown(own, COLUMNS[2:]), ""]
    found = swept(runs)
    if found:
        lines += [
            '## "auto" against nine fixed rates',
            "",
            "All have the same rounds. Fixed rates are a factor of √10 apart,",
            "about the rate that `auto` ended with, or about one that was given.",
            "",
            *markdown(found, SWEEP_COLUMNS),
            "",
        ]
    machines = dict.fromkeys(
        ", ".join(f"{name} {value}" for name, value in run["machine"].items()) for run in runs
    )
    lines += ["## Machines", "", *(f"- {words}" for words in machines), ""]
    return "\n".join(lines)


def described(study: Mapping[str, Any]) -> list[str]:
    rows = f"{study['evaluation']} held-out rows" if study["evaluation"] else "all held-out rows"
    lines = [
        f"{study['clients']} clients, blocks {study['blocks']}, {rows}.",
        f"The budget is {study['budget']:g} passes of {study['batch']} rows.",
    ]
    if study["set"]:
        lines.append("Set: " + ", ".join(f"`{text}`" for text in study["set"]) + ".")
    return lines


def curves(runs: Sequence[dict[str, Any]], path: Path) -> bool:
    """Draw every study's curves; False where matplotlib is not installed or nothing is there."""
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for run in runs:
        if run["key"]["kind"] == "final":
            study = json.dumps(run["key"]["study"], sort_keys=True)
            groups.setdefault(study, {}).setdefault(run["key"]["way"], []).append(run)
    if not groups:
        return False
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        return False
    wide = min(2, len(groups))
    high = -(-len(groups) // wide)
    # The same runs make the same file.
    with rc_context({"svg.hashsalt": "efficiency"}):
        figure = Figure(figsize=(5.5 * wide, 3.8 * high), layout="constrained")
        FigureCanvasSVG(figure)
        panels = figure.subplots(high, wide, squeeze=False).ravel()
        for axes, ways in zip(panels, groups.values(), strict=False):
            for place, (way, own) in enumerate(ways.items()):
                _curve(axes, way, [within(run) for run in own], f"C{place}")
            study = next(iter(ways.values()))[0]["key"]["study"]
            axes.set_title(f"{study['model']}, {study['task']}", fontsize=10)
            axes.set_xlabel(f"forward-pass equivalents of {study['batch']} rows")
            axes.set_ylabel("held-out (nats)")
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False)
        for axes in panels[len(groups) :]:
            axes.set_visible(False)
        figure.savefig(path, metadata={"Date": None})
    return True


def _curve(axes: Any, way: str, seeds: Sequence[Sequence[dict[str, Any]]], colour: str) -> None:
    """The mean of a way over its seeds, and the band between the least and the greatest."""
    at = list(zip(*seeds, strict=False))
    at = [points for points in at if all(point["value"] is not None for point in points)]
    passes = [statistics.fmean(point["passes"] for point in points) for points in at]
    values = [[point["value"] for point in points] for points in at]
    axes.plot(
        passes, list(map(statistics.fmean, values)), color=colour, marker="o", ms=3, label=way
    )
    axes.fill_between(
        passes, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.15, lw=0
    )


def write(results: Results, reference: str, where: Path) -> None:
    """Write the page, the runs and the curves beside it."""
    runs = results.read()
    where.parent.mkdir(parents=True, exist_ok=True)
    drawn = curves(runs, where.with_suffix(".svg"))
    where.write_text(page(runs, reference, drawn), encoding="utf-8")
    beside = where.with_suffix(".json")
    if results.path is None or beside.resolve() != results.path.resolve():
        beside.write_text(as_json(runs), encoding="utf-8")


# The command line ---------------------------------------------------------------------------------

QUICK_ROWS = [
    {"sentence": f"{'a dull' if n % 2 == 0 else 'a fine'} film", "label": n % 2} for n in range(40)
]
QUICK_TEXT = [
    {"question": f"What is {n} and {n}?", "answer": f"It is {2 * n}."} for n in range(120)
]


def quick_data(folder: Path) -> Path:
    """Small files of two tasks."""
    for name, rows in (
        ("sst2_train", QUICK_ROWS),
        ("sst2_validation", QUICK_ROWS[:8]),
        ("gsm8k_train", QUICK_TEXT),
    ):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


def parse_rates(texts: Sequence[str], ways: Sequence[str]) -> dict[str, tuple[float | str, ...]]:
    """Rates by way, of "r1,r2" for all ways or "WAY=r1,r2" for one."""
    found: dict[str, tuple[float | str, ...]] = {}
    for text in texts:
        way, equals, listed = text.rpartition("=")
        if equals and way not in WAYS:
            common.stop(f"--rates {text}: {way!r} is no way. Allowed are {', '.join(WAYS)}.")
        rates: list[float | str] = []
        for word in listed.split(","):
            try:
                rates.append(word if word == "auto" else float(word))
            except ValueError:
                common.stop(f"--rates {text}: {word!r} is neither a number nor 'auto'.")
        numbers = tuple(dict.fromkeys(rates))
        # A way that finds its rate goes on doing so unless it is named.
        named = [way] if equals else [w for w in ways if WAYS[w].rates != ("auto",)]
        found |= dict.fromkeys(named, numbers)
    return found


def words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def all_kept(task: Task, model: Path) -> bool:
    """Whether rows of a task can be kept: its label words, if any, are one token each."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    found = task.data.get("label_words", {}).values()
    return all(len(tokenizer(w, add_special_tokens=False)["input_ids"]) == 1 for w in found)


def depth_of(model: Path) -> int:
    """Transformer blocks of a model."""
    from transformers import AutoConfig

    try:
        loaded = AutoConfig.from_pretrained(str(model))
    except (OSError, ValueError) as error:
        common.stop(f"--model {model}: this is no folder of a model: {str(error).splitlines()[0]}")
    return int(loaded.get_text_config().num_hidden_layers)


def parse(given: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--model", type=Path, help="folder of a model; none only writes the page")
    parser.add_argument("--task", choices=tuple(TASKS), default="sst2")
    parser.add_argument("--data", type=Path, help="folder of the data")
    parser.add_argument("--ways", type=words, help=",".join(WAYS))
    parser.add_argument("--rates", action="append", default=[], metavar="[WAY=]r1,r2")
    parser.add_argument("--budget", type=float, default=300.0, help="passes of a way")
    parser.add_argument("--tuning", type=float, default=0.0, help="of a try; 0 is budget / 6")
    parser.add_argument("--batch", type=int, default=0, help="rows of a pass; 0 is the task's")
    parser.add_argument("--seeds", type=words, default=["1", "2", "3"])
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--blocks", default="all", help='tuned, as in "22-29"')
    parser.add_argument("--evaluation", type=int, default=0, help="rows; 0 is all (or 500)")
    parser.add_argument("--points", type=int, default=8, help="evaluations of a run, about")
    parser.add_argument("--reference", choices=tuple(WAYS), default="fedmezo")
    parser.add_argument("--sweep", action="store_true", help='nine fixed rates and "auto"')
    parser.add_argument("--forgetting", action="store_true", help="perplexity of other text")
    parser.add_argument("--results", type=Path, help="JSON of finished runs")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    parser.add_argument("--page", type=Path, default=PAGE, help="another place for it")
    parser.add_argument("--set", action="append", default=[], metavar="[WAY:]section.key=value")
    arguments = parser.parse_args(given)
    wanted = arguments.ways or list(SWEPT if arguments.sweep else WAYS)
    for way in wanted:
        if way not in WAYS:
            common.stop(f"--ways: {way!r} is no way. Allowed are {', '.join(WAYS)}.")
    arguments.ways = wanted
    if not all(seed.isdigit() for seed in arguments.seeds):
        common.stop("--seeds must be whole numbers, as in 1,2,3.")
    arguments.seeds = list(map(int, arguments.seeds))
    arguments.rates = parse_rates(arguments.rates, wanted)
    if arguments.write and arguments.results is None:
        arguments.results = arguments.page.with_suffix(".json")
    return arguments


def measure(arguments: argparse.Namespace, results: Results) -> list[dict[str, Any]]:
    arguments.batch = arguments.batch or TASKS[arguments.task].batch
    arguments.tuning = arguments.tuning or arguments.budget / 6
    arguments.depth = depth_of(arguments.model)
    arguments.kept = all_kept(TASKS[arguments.task], arguments.model)
    try:
        return sweep(arguments, results) if arguments.sweep else compare(arguments, results)
    except FedForwardError as error:
        common.stop(str(error))


def main(given: Sequence[str] | None = None) -> None:
    arguments = parse(given)
    common.prepare(arguments)
    results = Results(arguments.results)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.quick:
            from fedforward.demo import text

            arguments.model = Path(text.__file__).with_name("model")
            arguments.data = quick_data(Path(folder))
            arguments.clients, arguments.points = 2, 2
            arguments.set += ["method.local_steps=2", "method.batch_size=2", "lora.rank=2"]
            arguments.evaluation = min(arguments.evaluation or 8, 8)
        if arguments.model is None:
            if not arguments.write:
                common.stop("--model is the folder of a model. Give one, or --write alone.")
            write(results, arguments.reference, arguments.page)
            return
        if arguments.data is None or not arguments.data.is_dir():
            common.stop(f"--data {arguments.data}: this is no folder. Give the one with the data.")
        runs = measure(arguments, results)
        said = remarks(arguments)
    if arguments.write:
        write(results, arguments.reference, arguments.page)
    if arguments.sweep:
        common.finish(arguments, "efficiency", swept(runs), SWEEP_COLUMNS, said)
    else:
        rows = rows_of(runs, arguments.reference)
        common.finish(arguments, "efficiency", rows, COLUMNS, said)


if __name__ == "__main__":
    main()
