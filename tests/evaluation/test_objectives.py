"""Objectives without a gradient and metrics of a task: what is measured, optimised and refused."""

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedforward.config.schema import Config
from fedforward.config.template import to_toml
from fedforward.core.batches import IGNORED, AnswerBatch, ChoiceBatch, JoinedRows, PromptBatch
from fedforward.core.errors import FedForwardError
from fedforward.core.logs import PHASES
from fedforward.core.steps import NO_STEPS, Probe, Steps, Update
from fedforward.data import labels
from fedforward.data.encoding import TextEncoder
from fedforward.data.examples import Example
from fedforward.data.sampler import collate, collate_prompts
from fedforward.data.table import Row
from fedforward.data.templates import Template
from fedforward.data.tokenise import ChoiceMaker, Tally
from fedforward.directions import Distribution
from fedforward.evaluation import heldout as evaluation
from fedforward.evaluation.objectives import Accuracy, Choice, Context, Loss, Score, build_objective
from fedforward.messages.task import Task
from fedforward.methods.estimators import TwoPoint
from fedforward.methods.fedmezo import FedMeZO
from fedforward.models.base import CausalModel
from fedforward.models.full import FullModel
from fedforward.models.lora import LoraModel
from fedforward.training import replay as artefacts
from fedforward.training.metrics import reason_to_stop
from fedforward.training.run import Run
from tests.conftest import DEMO_MODEL
from tests.models.test_models import PERTURBATION, TRAJECTORY, batch, displace, lora, plan
from tests.support.command_line import command
from tests.support.corpora import Letters

Make = Callable[..., Any]
Configure = Callable[..., Config]
CarryOut = Callable[..., dict[str, Any]]
WORDS = {"0": " no", "1": " yes"}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO_MODEL)


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """Short texts with a truth value each."""
    things = ("lamp", "bell", "door", "chair", "clock", "table", "book", "cup")
    rows = [
        {"text": f"The {thing} is {word}.", "good": int(word == "golden")}
        for thing in things
        for word in ("golden", "broken")
    ]
    path = tmp_path / "reviews.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def classify(configure: Configure, reviews: Path) -> Configure:
    """A function that makes a configuration of a classification."""

    def make(**changes: Any) -> Config:
        task: dict[str, Any] = {
            "data__source": str(reviews),
            "data__prompt": "{text}",
            "data__answer": "{good}",
            "data__label_words": WORDS,
            "data__answer_tokens": 3,
            "method__mu": 0.05,
            "evaluation__metrics": ["accuracy", "perplexity"],
        }
        return configure(**(task | changes))

    return make


def tokenised(rows: Sequence[dict[str, Any]], tokenizer: Any, **changes: Any) -> list[Example]:
    """The examples of rows with label words, those that are left out aside."""
    options = {"prompt": "{text}", "answer": "{good}", "sequence_length": 32, "words": WORDS}
    options |= changes
    maker = ChoiceMaker(
        Template.parse(str(options["prompt"]), "data.prompt"),
        Template.parse(str(options["answer"]), "data.answer"),
        options["words"],  # type: ignore[arg-type]
        TextEncoder(tokenizer),
        options["sequence_length"],  # type: ignore[arg-type]
    )
    read = [Row({k: str(v) for k, v in row.items()}, f"line {n}") for n, row in enumerate(rows, 1)]
    return [example for example in maker.make(read, Tally()) if example is not None]


def choices(seed: int = 0, examples: int = 6, count: int = 3) -> ChoiceBatch:
    """Random prompts of several lengths with choices of one and of two tokens."""
    random = np.random.default_rng(seed)
    made = []
    for number in range(examples):
        prompt = random.integers(3, 97, 4 + number)
        ends = [random.integers(3, 97, 1 + place // 2) for place in range(count)]
        rows = tuple(np.concatenate((prompt, end)) for end in ends)
        right = number % count
        made.append(Example(rows[right], len(prompt), "", rows, right))
    return Accuracy().batch(made)  # type: ignore[return-value]


def by_hand(network: Any, data: ChoiceBatch) -> list[float]:
    """1 for each example whose right answer is not the likeliest, by plain transformers."""
    wrong = []
    count = len(data.rows.tokens) // len(data.right)
    for example, right in enumerate(data.right.tolist()):
        losses = []
        for row in range(example * count, (example + 1) * count):
            counted = data.rows.labels[row] != IGNORED
            last = int(np.flatnonzero(counted)[-1]) + 1
            given = torch.from_numpy(data.rows.tokens[row : row + 1, :last])
            wanted = torch.from_numpy(data.rows.labels[row : row + 1, :last])
            with torch.inference_mode():
                mean = float(network(input_ids=given, labels=wanted).loss)
            losses.append(mean * int(counted.sum()))
        wrong.append(float(int(np.argmin(losses)) != right))
    return wrong


def score_of(name: str) -> Any:
    """The function of answers and references behind an objective that scores answers."""
    objective = build_objective(name, Context(Numbers(), 12))
    assert isinstance(objective, Score)
    return objective.function


def built(network: Any, tune: str) -> CausalModel:
    return lora(network, plan=plan(1)) if tune == "lora" else FullModel(network, plan=plan(1))


def test_label_words_become_choices(tokenizer: Any) -> None:
    rows = [{"text": "A bell.", "good": 1}, {"text": "A door, broken.", "good": 0}]
    first, second = tokenised(rows, tokenizer)
    assert tokenizer.decode(first.tokens[first.prompt_length :]) == " yes"
    assert [tokenizer.decode(c[second.prompt_length :]) for c in second.choices] == [" no", " yes"]
    assert (first.right, second.right, second.reference) == (1, 0, " no")
    assert first.tokens is first.choices[1]
    data = Accuracy().batch([first, second])
    assert len(data.tokens) == 4 and data.right.tolist() == [1, 0]
    counted = [row[row != IGNORED].tolist() for row in data.rows.labels]
    words = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in WORDS.values()]
    assert counted == words * 2
    # The training loss is the right word's.
    plain = collate([first, second])
    assert plain.labels[0][plain.labels[0] != IGNORED].tolist() == words[1]
    surrounded = tokenised(rows, tokenizer, answer=" Verdict:{good}!")[0]
    assert surrounded.reference == " Verdict: yes!"


def test_what_does_not_fit_is_dropped(tokenizer: Any) -> None:
    rows = [{"text": "A bell.", "good": 1}, {"text": "A bell " * 9, "good": 0}]
    (kept,) = tokenised(rows, tokenizer, sequence_length=12)
    assert kept.right == 1 and len(kept.tokens) <= 12


@pytest.mark.parametrize(
    ("rows", "changes", "words"),
    [
        (
            [{"text": "A bell.", "good": -1}],
            {},
            ["no word for good = '-1'", "words for '0', '1'"],
        ),
        (
            [{"text": "A bell.", "good": 1}],
            {"words": {"0": "", "1": " yes"}},
            ["the word '' has no tokens"],
        ),
    ],
)
def test_labels_without_words_are_refused(
    tokenizer: Any, rows: Any, changes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(FedForwardError) as caught:
        tokenised(rows, tokenizer, **changes)
    for word in ["data.label_words", *words]:
        assert word in str(caught.value)


def test_words_of_the_same_tokens_are_refused() -> None:
    class Deaf(Letters):
        def __call__(self, text: Any, *_: Any, **__: Any) -> dict[str, Any]:
            return {"input_ids": [[3] for _ in text] if isinstance(text, list) else [3]}

    with pytest.raises(FedForwardError, match=r"' no' and ' yes' are the same tokens"):
        tokenised([{"text": "A bell.", "good": 1}], Deaf())


@pytest.mark.parametrize("answer", ["{good} {text}", "yes"])
def test_label_words_need_one_field(answer: str) -> None:
    with pytest.raises(FedForwardError, match=r"data\.answer = .* names \d fields\. Name one"):
        labels.word_path(Template.parse(answer, "data.answer"))


@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("tokens_per_call", [0, 24])
def test_accuracy_is_that_of_plain_transformers(
    tiny_network: Make, tune: str, tokens_per_call: int
) -> None:
    """At the weights as they are and at displaced ones, batches whole and cut by rows."""
    from dataclasses import replace

    network = tiny_network()
    how = replace(plan(4), tokens_per_call=tokens_per_call)
    model: CausalModel = lora(network, plan=how) if tune == "lora" else FullModel(network, plan=how)
    data = [choices(seed) for seed in range(4)]
    probes = [Probe(part, TRAJECTORY, PERTURBATION) for part in data]
    before = model.evaluate([Probe(part) for part in data])
    probed = model.evaluate(probes)
    assert [e.sums.tolist() for e in before] == [by_hand(model.network, part) for part in data]
    displace(model.tensors, model.layout, TRAJECTORY + PERTURBATION, Distribution.GAUSSIAN)
    found = [e.sums.tolist() for e in probed]
    assert found == [by_hand(model.network, part) for part in data]
    assert found != [e.sums.tolist() for e in before]
    assert probed[0].counts.tolist() == [1] * 6


def test_choices_of_broken_weights_are_not_finite(tiny_network: Make) -> None:
    network = tiny_network()
    network.model.norm.weight.data[0] = math.nan
    (evaluation_,) = FullModel(network, plan=plan(1)).evaluate([Probe(choices())])
    assert math.isnan(evaluation_.mean)


def test_kinds_of_batches_may_be_mixed(tiny_network: Make) -> None:
    model = FullModel(tiny_network(), plan=plan(4))
    kinds = [batch(), choices(), batch(1), choices(1)]
    mixed = model.evaluate([Probe(data) for data in kinds])
    for result, data in zip(mixed, kinds, strict=True):
        (alone,) = model.evaluate([Probe(data)])
        assert result.sums == pytest.approx(alone.sums, rel=1e-5)
    assert model.evaluate([]) == []


def test_probing_raises_an_accuracy(tiny_network: Make) -> None:
    """Every right answer is the choice that the base model likes least; no loss is looked at."""
    model = lora(tiny_network(), plan=plan(2))
    random = np.random.default_rng(0)
    prompts = [random.integers(3, 97, 6) for _ in range(32)]
    rows = [tuple(np.append(prompt, word) for word in (5, 6)) for prompt in prompts]
    examples = [Example(choice[0], 6, "", choice, 0) for choice in rows]
    (base,) = model.evaluate([Probe(Accuracy().batch(examples))])
    if base.mean < 0.5:
        examples = [Example(choice[1], 6, "", choice, 1) for choice in rows]
    data = Accuracy().batch(examples)
    (start,) = model.evaluate([Probe(data)])

    class Same:
        def __len__(self) -> int:
            return len(examples)

        def __getitem__(self, step: int) -> ChoiceBatch:
            return data

    method = FedMeZO(run_seed=1, local_steps=60, estimator=TwoPoint(directions=2, mu=0.1))
    task = Task(0, 0, 0.05, False, (), np.empty(0, np.float32))
    turn = method.local_round(task, Same())
    evaluations: Any = None
    try:
        while True:
            probes = turn.send(evaluations)
            evaluations = model.evaluate(probes)
    except StopIteration as done:
        report = done.value
    (end,) = model.evaluate([Probe(data, probes[0].trajectory)])
    assert start.mean >= 0.5
    assert end.mean <= start.mean - 0.3
    # Counts of right answers change by whole examples, so that some probes see no difference.
    steps = report.gradients * 2 * 0.1 * len(examples)
    assert steps == pytest.approx(np.round(steps), abs=1e-4)
    assert (report.gradients == 0).any()


class Numbers:
    """A tokenizer whose words are numbers; 0 and 2 are special."""

    eos_token_id = 2
    pad_token_id = 0
    bos_token_id = None

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return [" ".join(str(t) for t in row if t not in (0, 2)) for row in rows]


def prompts(seed: int = 0) -> PromptBatch:
    random = np.random.default_rng(seed)
    rows = [random.integers(3, 97, length) for length in (5, 9, 2)]
    return collate_prompts(rows, Numbers(), 12)


def one_by_one(network: Any, data: PromptBatch) -> list[list[int]]:
    """Greedy continuations without padding and without a cache."""
    results = []
    for row, mask in zip(data.tokens, data.mask, strict=True):
        ids = row[mask == 1].tolist()
        begin = len(ids)
        for _ in range(data.most_tokens):
            with torch.inference_mode():
                logits = network(input_ids=torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
            if ids[-1] == 2:
                break
        results.append(ids[begin:])
    return results


@pytest.mark.parametrize("tune", ["lora", "full-recompute", "full-cache", "full-bfloat16", "gpt2"])
def test_generation_at_displaced_weights(tiny_network: Make, tune: str) -> None:
    """Equal to generation once the weights have moved, with padding, a cache and without."""
    network = tiny_network("bfloat16" if tune == "full-bfloat16" else "float32")
    if tune == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        small = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        network = GPT2LMHeadModel(GPT2Config(**small, initializer_range=0.1)).eval()
        network.requires_grad_(False)
    trajectory = "cache" if tune == "full-cache" else "recompute"
    model: CausalModel = (
        lora(network) if tune == "lora" else FullModel(network, plan=plan(2, trajectory))
    )
    if tune == "lora":
        model.commit([Update(Steps.of([1], [0.2]), 0)])
    data = prompts()
    opposite = Steps.of([11], [-0.05])
    probes = [
        Probe(data),
        Probe(data, TRAJECTORY[:2], PERTURBATION),
        Probe(data, TRAJECTORY, PERTURBATION),
        Probe(data, TRAJECTORY, opposite),
    ]
    before = model.digest()
    generated = model.generate(probes)
    assert model.digest() == before
    assert len({part.tobytes() for part in generated}) > 1
    originals = {name: tensor.clone() for name, tensor in model.tensors.items()}
    for probe, found in zip(probes, generated, strict=True):
        for name, tensor in model.tensors.items():
            tensor.copy_(originals[name])
        model.clear_cache()
        both = probe.trajectory + probe.perturbation
        displace(model.tensors, model.layout, both, Distribution.GAUSSIAN)
        (expected,) = model.generate([Probe(data)])
        assert np.array_equal(found, expected)
        if tune != "full-bfloat16":
            wanted = one_by_one(model.network, data)
            assert [row[: len(want)].tolist() for row, want in zip(found, wanted, strict=True)] == (
                wanted
            )


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_answers_are_scored(tiny_network: Make, tune: str) -> None:
    model = built(tiny_network(), tune)
    data = prompts()
    (generated,) = model.generate([Probe(data, NO_STEPS, PERTURBATION)])
    texts = Numbers().batch_decode(generated.tolist(), True)
    references = [texts[0], "unlike", " ".join(texts[2].split()[:6])]
    scored = AnswerBatch(data, references, build_objective("f1", Context(Numbers(), 12)))
    (result,) = model.evaluate([Probe(scored, NO_STEPS, PERTURBATION)])
    assert result.sums[:2].tolist() == [0.0, 1.0]
    assert 0.0 < result.sums[2] < 1.0
    assert result.counts.tolist() == [1, 1, 1]


def test_sums_of_absent_clients_are_dropped(tiny_network: Make) -> None:
    model = lora(tiny_network())
    assert isinstance(model, LoraModel)
    for seed in range(5):
        model.generate([Probe(prompts(), Steps.of([seed], [0.01]), PERTURBATION)])
        assert len(model.trajectory_cache) <= 1


OBJECTIVES = ["choice", "accuracy", "exact-match", "f1", "rougeL", "own_scores:length"]
OWN = """
def length(predictions, references):
    return [-abs(len(p) - len(r)) for p, r in zip(predictions, references)]

def short(predictions, references):
    return [1.0]

def words(predictions, references):
    return ["one"] * len(predictions)

def infinite(predictions, references):
    return [float("inf")] * len(predictions)

def failing(predictions, references):
    raise KeyError("x")

number = 3
"""


@pytest.fixture
def own_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of the user's in the working directory."""
    (tmp_path / "own_scores.py").write_text(OWN, encoding="utf-8")
    (tmp_path / "own_broken.py").write_text("import nothing_of_the_kind\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_scores", raising=False)


@pytest.mark.usefixtures("own_scores")
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_of_every_objective_resumes_and_verifies(
    classify: Configure, carry_out: CarryOut, tmp_path: Path, objective: str
) -> None:
    changes: dict[str, Any] = {"method__objective": objective}
    changes["model__tune"] = "full" if objective in ("accuracy", "f1") else "lora"
    whole = carry_out(classify(**changes), tmp_path / "whole")
    carry_out(classify(**changes, federation__rounds=1), tmp_path / "parts")
    resumed = carry_out(classify(**changes), tmp_path / "parts", True)
    assert [whole[key] for key in ("ledger_digest", "state_digest")] == [
        resumed[key] for key in ("ledger_digest", "state_digest")
    ]
    result = artefacts.verify(tmp_path / "parts")
    assert result.differences == [] and result.replayed and result.saved
    assert whole["objective"] == objective and objective in whole["metrics"]
    lines = [
        json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()
    ]
    assert [line["metrics"].keys() for line in lines if "heldout_loss" in line] == [
        whole["metrics"].keys()
    ] * 3
    shares = [line["zero_gradients"] for line in lines[1:]]
    assert whole["zero_gradients"] == pytest.approx(sum(shares) / 3)
    assert all(share * 4 == round(share * 4) for share in shares)


def test_label_words_are_told_apart_unless_it_is_said(
    classify: Configure, carry_out: CarryOut, tmp_path: Path
) -> None:
    """`choice` is the default, is written down, and its words of one token share a row."""
    whole = carry_out(classify(), tmp_path / "whole")
    assert whole["objective"] == "choice" and "choice" in whole["metrics"]
    assert 'objective = "choice"' in (tmp_path / "whole/config.toml").read_text()
    plan = json.loads((tmp_path / "whole/plan.json").read_text())
    assert plan["joins_choices"] and plan["most_branching"] > 0
    said = carry_out(classify(method__objective="choice"), tmp_path / "said")
    assert said["ledger_digest"] == whole["ledger_digest"]
    carry_out(classify(federation__rounds=1), tmp_path / "parts")
    resumed = carry_out(classify(), tmp_path / "parts", True)
    assert resumed["ledger_digest"] == whole["ledger_digest"]


def test_an_older_run_goes_on_as_it_began(
    classify: Configure, carry_out: CarryOut, tmp_path: Path
) -> None:
    """It began when label words meant the loss of the right one, and each had a row of its own."""
    older = classify(method__objective="loss")
    whole = carry_out(older, tmp_path / "whole")
    carry_out(classify(method__objective="loss", federation__rounds=1), tmp_path / "parts")
    path = tmp_path / "parts/plan.json"
    plan = json.loads(path.read_text())
    del plan["joins_choices"], plan["most_branching"]
    path.write_text(json.dumps(plan))
    run = Run(classify(), tmp_path / "parts", resume=True)
    (accuracy,) = (o for o in run.heldout.objectives.values() if isinstance(o, Accuracy))
    assert not isinstance(accuracy.batch(run.corpus.heldout).rows, JoinedRows)
    resumed = run.fit().to_json()
    assert resumed["objective"] == "loss"
    assert resumed["ledger_digest"] == whole["ledger_digest"]


@pytest.mark.parametrize("name", ["fedavg", "fedmezo"])
def test_training_on_choices_lowers_their_cross_entropy(
    classify: Configure, carry_out: CarryOut, tmp_path: Path, name: str
) -> None:
    """By backpropagation and by forward passes alike; both verify and go on where they stopped."""
    settings: dict[str, Any] = {
        "method__name": name,
        "method__local_steps": 8,
        "method__batch_size": 8,
        "federation__rounds": 4,
    }
    if name == "fedavg":
        settings |= {"method__optimizer": "adamw", "method__learning_rate": 3e-3}
    else:
        settings |= {"method__learning_rate": 0.01, "method__directions": 4}
    summary = carry_out(classify(**settings), tmp_path / "run")
    assert summary["objective"] == "choice"
    choice = summary["metrics"]["choice"]
    assert choice["end"] < (0.5 if name == "fedavg" else 0.98) * choice["start"]
    assert artefacts.verify(tmp_path / "run").differences == []


def test_metrics_beside_the_loss(
    classify: Configure, carry_out: CarryOut, tmp_path: Path, reviews: Path
) -> None:
    every = ["loss", "perplexity", "choice", "accuracy", "exact-match", "f1", "rougeL"]
    settings = classify(
        method__objective="loss",
        evaluation__metrics=every,
        evaluation__source=str(reviews),
        evaluation__limit=10,
        run__patience=1,
    )
    summary = carry_out(settings, tmp_path / "run")
    assert summary["heldout_examples"] == 10 and sum(summary["examples"]) == 16
    assert list(summary["metrics"]) == every
    for when in ("start", "end"):
        metrics = {name: value[when] for name, value in summary["metrics"].items()}
        assert metrics["loss"] == summary["heldout_loss"][when]
        assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
        assert 10 * metrics["accuracy"] == pytest.approx(round(10 * metrics["accuracy"]))
    assert summary["zero_gradients"] == 0.0
    more = ["federation.rounds=4", "--out", tmp_path / "run", "--resume"]
    result = command("run", tmp_path / "run/config.toml", *more)
    assert result.code == 0
    for name in ("accuracy", "perplexity", "rougeL"):
        assert f"\n{name} " in result.out
    assert "%" in result.error and "accuracy" in result.error


def test_answers_of_a_free_text(configure: Configure, carry_out: CarryOut, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"evaluation__metrics": ["f1", "exact-match"]}
    changes |= {"data__answer_tokens": 24, "federation__rounds": 1}
    summary = carry_out(configure(**changes), tmp_path / "run")
    assert summary["metrics"]["f1"]["start"] > 0.0
    assert summary["metrics"]["exact-match"]["start"] == 0.0


def test_the_wanted_objective_decides_when_patience_ends(
    classify: Configure, carry_out: CarryOut, tmp_path: Path
) -> None:
    """A learning rate of next to nothing: accuracy stays, whatever the loss does."""
    changes: dict[str, Any] = {"method__objective": "accuracy", "method__learning_rate": 1e-12}
    changes |= {"run__evaluate_every": 1, "run__patience": 1}
    summary = carry_out(classify(**changes), tmp_path / "run")
    assert summary["stopped"] == "patience: 1 evaluations without a better accuracy"


def test_a_choice_that_gets_worse_stops_a_run(classify: Configure) -> None:
    """By patience where it no longer falls, and as diverged where guessing is much better."""
    settings = classify(run__patience=2)

    def lines(*values: float) -> list[dict[str, Any]]:
        return [
            {
                "heldout_loss": 3.0 - number,
                "metrics": {"choice": value},
                "training_loss": 9.0 if number else None,
                "skipped_steps": 0,
                "learning_rates": {0: 1.0},
            }
            for number, value in enumerate(values)
        ]

    assert reason_to_stop(settings, lines(0.1, 0.4, 0.09)) == ""
    assert reason_to_stop(settings, lines(0.1, 0.4, 0.3)) == (
        "patience: 2 evaluations without a lower held-out choice"
    )
    # 1.5 log 2 is 1.04, and 1.5 times 1.2 is 1.8.
    assert reason_to_stop(settings, lines(0.1, 1.05)).startswith("diverged: the held-out choice is")
    assert reason_to_stop(settings, lines(1.2, 1.75)) == ""
    assert "1.850, from 1.200" in reason_to_stop(settings, lines(1.2, 1.85))
    assert "nan" in reason_to_stop(settings, lines(0.6, math.nan))


def test_a_long_evaluation_says_how_far_it_is(
    tiny_network: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", PHASES.name)
    monkeypatch.setattr(evaluation, "FIRST_LINE_S", 0.0)
    monkeypatch.setattr(evaluation, "NEXT_LINE_S", 0.0)
    groups = [[Example(np.arange(3, 9), 2, "5 6")] * 2] * 3
    scores = {"f1": score_of("f1")}
    heldout = evaluation.HeldOut(groups, ("f1",), {"loss": Loss()}, scores, Numbers(), 4)
    figures = evaluation.measure(FullModel(tiny_network(), plan=plan(1)), heldout)
    assert figures.keys() == {"heldout_loss", "metrics"}
    assert caplog.messages == [
        f"evaluating {what}: {done} of 6 examples"
        for what in ("loss", "answers")
        for done in (0, 2, 4)
    ]


@pytest.mark.parametrize("joined", [False, True])
def test_one_pass_measures_loss_choice_and_accuracy(tiny_network: Make, joined: bool) -> None:
    """A row for each example where words share one; the figures are those of a pass for each."""
    model = FullModel(tiny_network(), plan=plan(1))
    random = np.random.default_rng(0)
    prompts = [random.integers(3, 97, 4 + number) for number in range(6)]
    words = [tuple(np.append(prompt, word) for word in (5, 6, 7)) for prompt in prompts]
    made = [Example(w[n % 3], len(w[0]) - 1, "", w, n % 3) for n, w in enumerate(words)]
    objectives = {"loss": Loss(), "choice": Choice(joined), "accuracy": Accuracy(joined)}
    held = evaluation.HeldOut(
        [made[:3], made[3:]], ("choice", "accuracy"), objectives, {}, Numbers(), 4
    )
    given: list[int] = []
    block = model.network.get_submodule("model.layers.0")
    hook = block.register_forward_hook(lambda _, args, out: given.append(len(args[0])))
    figures = evaluation.measure(model, held)
    hook.remove()
    assert given == ([3, 3] if joined else [9, 9])
    apart = {
        name: objective.metric(model.evaluate([Probe(objective.batch(made))])[0].mean)
        for name, objective in objectives.items()
    }
    assert figures["heldout_loss"] == pytest.approx(apart["loss"], rel=1e-5)
    for name in ("choice", "accuracy"):
        assert figures["metrics"][name] == pytest.approx(apart[name], rel=1e-5)


@pytest.mark.usefixtures("own_scores")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("own_missing:f", ["own_missing cannot be imported", "ModuleNotFoundError", "the folder"]),
        ("own_broken:f", ["own_broken cannot be imported", "nothing_of_the_kind"]),
        ("own_scores:missing", ["own_scores has no function missing"]),
        ("own_scores:number", ["not as a function, number"]),
        ("own_scores:short", ["returned 1 scores for 2 predictions", "one for each"]),
        ("own_scores:words", ["returned 'one' for the prediction 'a'", "a finite number"]),
        ("own_scores:infinite", ["returned inf for the prediction 'a'"]),
        ("own_scores:failing", ["failed (KeyError: 'x')", "the first of them 'a'"]),
    ],
)
def test_functions_that_do_not_work(name: str, words: list[str]) -> None:
    with pytest.raises(FedForwardError) as caught:
        score_of(name)(["a", "b"], ["c", "d"])
    for word in [f"method.objective = {name!r}", *words]:
        assert word in str(caught.value)


def test_numbers_of_other_libraries_are_numbers(
    own_scores: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = score_of("own_scores:length")
    module = sys.modules["own_scores"]
    monkeypatch.setattr(module, "length", lambda p, r: np.array([0.5, 1.0], np.float32))
    assert score(["a", "bb"], ["a", "b"]) == [0, -1]
    assert score_of("own_scores:length")(["a", "b"], ["", ""]) == [0.5, 1.0]


@pytest.mark.usefixtures("own_scores")
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["method.objective=accurcy"],
            ["method.objective = 'accurcy'", "Did you mean 'accuracy'?"],
        ),
        (["method.objective=own_scores:none"], ["own_scores has no function none"]),
        (["method.objective=own_scores:failing"], ["own_scores:failing'", "failed (KeyError"]),
        (["method.objective=accuracy", "method.name=fedavg"], ["no gradient", "fedmezo"]),
        (["evaluation.source=none.jsonl"], ["evaluation.source = 'none.jsonl'", "no such file"]),
        (["data.label_words={ 0 = ' no', 2 = ' yes' }"], ["no word for good = '1'"]),
        (["data.answer={good}{text}"], ["data.answer = '{good}{text}' names 2 fields"]),
        (
            ["method.objective=f1", "data.answer_tokens=4000"],
            ["data.answer_tokens = 4000", "positions that this model takes", "sequence_length"],
        ),
    ],
)
def test_bad_input_gets_a_sentence(
    classify: Configure, tmp_path: Path, overrides: list[str], words: list[str]
) -> None:
    path = tmp_path / "c.toml"
    path.write_text(to_toml(classify()), encoding="utf-8")
    command("run", path, *overrides, "--out", tmp_path / "run").refused(*words)
    assert not (tmp_path / "run/config.toml").exists()


def test_evaluation_data_need_the_fields(classify: Configure, rows: Path, tmp_path: Path) -> None:
    settings = classify(evaluation__source=str(rows))
    with pytest.raises(FedForwardError, match=r"data\.prompt \(with evaluation\.source = .*\{text"):
        Run(settings, tmp_path / "run")
