"""Sequence classifiers: the loss of transformers, heads in the bank, runs that others can load."""

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedforward.config.schema import Config
from fedforward.config.template import to_toml
from fedforward.core.batches import IGNORED, TokenBatch
from fedforward.core.errors import FedForwardError
from fedforward.core.steps import NO_STEPS, Probe, Steps, Update
from fedforward.data import labels
from fedforward.data.examples import Example
from fedforward.data.sources import Source
from fedforward.data.table import Row
from fedforward.data.templates import Template
from fedforward.directions import Distribution
from fedforward.evaluation.objectives import ClassError, ClassLoss, Objective
from fedforward.models.base import CausalModel
from fedforward.models.fingerprints import fingerprint
from fedforward.models.full import FullModel
from fedforward.models.loading import load, weights
from fedforward.models.lora import LoraModel
from fedforward.training import build as experiment
from fedforward.training import replay as artefacts
from tests.conftest import DEMO_MODEL
from tests.models.test_models import PERTURBATION, TRAJECTORY, displace, lora, plan
from tests.support.command_line import command

pytestmark = pytest.mark.slow

Make = Callable[..., Any]
Configure = Callable[..., Config]
CarryOut = Callable[..., dict[str, Any]]
TUNES = ["lora", "full"]
KINDS = ["llama", "bert", "roberta", "distilbert"]
CLASSES = ("bad", "fair", "good")


def classifier(
    kind: str = "llama", dtype: str = "float32", classes: int = 3, vocabulary: int = 97
) -> Any:
    """A two-block network with random weights, the same each time."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,
        "pad_token_id": 0,
    }
    if kind == "distilbert":
        sizes |= {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
        sizes = {k: v for k, v in sizes.items() if "hidden_" not in k or k == "hidden_dim"}
    settings = AutoConfig.for_model(kind, **sizes, num_labels=classes)
    network = AutoModelForSequenceClassification.from_config(settings)
    return network.to(getattr(torch, dtype)).eval().requires_grad_(False)


CLASS_LOSS = ClassLoss()


def examples(seed: int = 0, count: int = 5) -> list[Example]:
    """Texts of several lengths; 0 is the padding token and does not occur."""
    random = np.random.default_rng(seed)
    texts = [random.integers(3, 97, 4 + 3 * (place % 3)) for place in range(count)]
    return [Example(t, len(t), right=place % 3) for place, t in enumerate(texts)]


def batch(seed: int = 0, count: int = 5, objective: Objective = CLASS_LOSS) -> Any:
    return objective.batch(examples(seed, count))


def built(network: Any, tune: str, probes: int = 4) -> CausalModel:
    if tune == "lora":
        return lora(network, plan=plan(probes))
    return FullModel(network, plan=plan(probes))


def one_by_one(network: Any, texts: Sequence[Example]) -> tuple[list[float], list[int]]:
    """Loss and likeliest class of each text on its own, by plain transformers."""
    losses, likeliest = [], []
    for text in texts:
        with torch.inference_mode():
            result = network(
                input_ids=torch.from_numpy(text.tokens)[None], labels=torch.tensor([text.right])
            )
        losses.append(float(result.loss))
        likeliest.append(int(result.logits.argmax()))
    return losses, likeliest


@pytest.fixture
def folder(tmp_path: Path, tiny_network: Make) -> Path:
    """A tiny random causal Llama with a tokenizer, as a folder."""
    path = tmp_path / "tiny"
    tiny_network(vocabulary=958).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, path / name)
    return path


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """Short texts with a number each, of which there are two."""
    things = ("lamp", "bell", "door", "chair", "clock", "table", "book", "cup")
    rows = [
        {"text": f"The {thing} is {word}.", "stars": stars}
        for thing in things
        for word, stars in (("golden", 10), ("broken", 2))
    ]
    path = tmp_path / "reviews.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def classify(configure: Configure, reviews: Path) -> Configure:
    """A function that makes a configuration with a classification head."""

    def make(**changes: Any) -> Config:
        task: dict[str, Any] = {
            "model__head": "classification",
            "data__source": str(reviews),
            "data__prompt": "{text}",
            "data__answer": "{stars}",
            "evaluation__metrics": ["accuracy"],
            "method__learning_rate": 3e-4,
        }
        return configure(**(task | changes))

    return make


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tune", TUNES)
def test_the_loss_is_the_one_of_transformers(kind: str, tune: str) -> None:
    """Row by row, and of a padded batch with its mask."""
    network = classifier(kind)
    losses, likeliest = one_by_one(network, examples())
    tokens = torch.from_numpy(batch().tokens)
    right = torch.tensor([example.right for example in examples()])
    with torch.inference_mode():
        mask = (tokens != 0).long()
        whole = float(network(input_ids=tokens, attention_mask=mask, labels=right).loss)
    model = built(network, tune)
    loss, wrong = model.evaluate([Probe(batch()), Probe(batch(objective=ClassError()))])
    np.testing.assert_allclose(loss.sums, losses, rtol=2e-6)
    assert loss.mean == pytest.approx(whole, rel=1e-6)
    assert loss.counts.tolist() == wrong.counts.tolist() == [1] * 5
    expected = [int(k != e.right) for k, e in zip(likeliest, examples(), strict=True)]
    assert wrong.sums.tolist() == expected
    assert 0 < sum(expected) < 5
    assert float(model.loss(batch())) == pytest.approx(whole, rel=1e-6)
    assert model.layout.blocks[-1] == "head"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tune", TUNES)
def test_several_probes_in_one_pass(kind: str, tune: str) -> None:
    """Equal to one by one, whatever batches are beside them, and to moved weights."""
    probes = [
        Probe(batch(1), TRAJECTORY, PERTURBATION),
        Probe(batch(1), TRAJECTORY, Steps.of([11], [-0.05])),
        Probe(batch(2, 3), TRAJECTORY[:1], PERTURBATION),
        Probe(batch(3, 1)),
    ]
    model = built(classifier(kind), tune)
    together = model.evaluate(probes)
    for probe, joint in zip(probes, together, strict=True):
        (alone,) = model.evaluate([probe])
        np.testing.assert_allclose(joint.sums, alone.sums, rtol=1e-5)
        moved = built(classifier(kind), tune)
        displace(
            moved.tensors,
            moved.layout,
            probe.trajectory + probe.perturbation,
            Distribution.GAUSSIAN,
        )
        (expected,) = moved.evaluate([Probe(probe.batch)])
        np.testing.assert_allclose(joint.sums, expected.sums, rtol=1e-5)
    assert len({round(result.mean, 4) for result in together}) == 4


@pytest.mark.parametrize("tune", TUNES)
def test_steps_in_the_head_alone(tune: str) -> None:
    model: CausalModel = lora(classifier())
    if tune == "full":
        model = FullModel(classifier(), plan=plan(), reload=classifier)
    blocks = np.array([name == "head" for name in model.layout.blocks])
    step = PERTURBATION.within(blocks)
    plain, moved, other = model.evaluate(
        [Probe(batch()), Probe(batch(), NO_STEPS, step), Probe(batch(), step, step)]
    )
    assert len({plain.mean, moved.mean, other.mean}) == 3
    model.commit([Update(step, 0)])
    (committed,) = model.evaluate([Probe(batch())])
    np.testing.assert_allclose(committed.sums, moved.sums, rtol=1e-6)
    model.reset()
    (again,) = model.evaluate([Probe(batch())])
    assert again.sums.tobytes() == plain.sums.tobytes()


def test_lora_tunes_the_head_in_float32_beside_a_narrow_base() -> None:
    model = lora(classifier(dtype="bfloat16"), factors="B", blocks=[1])
    names = [name for name in model.tensors if ".lora_" not in name]
    assert names == ["base_model.model.score.weight"]
    assert model.tensors[names[0]].dtype is torch.float32
    assert all(".layers.1." in name for name in model.tensors if name not in names)
    tiny = Steps.of([11], [1e-6])
    plain, moved = model.evaluate([Probe(batch()), Probe(batch(), NO_STEPS, tiny)])
    assert (plain.sums != moved.sums).all()


def test_full_tuning_of_some_blocks_tunes_the_head() -> None:
    model = FullModel(classifier(), plan=plan(), blocks=[1])
    assert model.layout.blocks == ("1", "head")
    assert set(model.prefix.depths) == {0}


def test_rows_cut_from_a_batch_are_the_same() -> None:
    model = lora(classifier(), plan=plan(2))
    probes = [Probe(batch(), NO_STEPS, PERTURBATION), Probe(batch())]
    whole = model.evaluate(probes)
    model.plan = plan(2).__class__(2, 1, "cache", 4, tokens_per_call=24)
    parts = model.evaluate(probes)
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one.sums, other.sums, rtol=1e-5)


@pytest.mark.parametrize("tune", TUNES)
def test_probes_never_touch_the_weights(tune: str) -> None:
    network = classifier()
    model = built(network, tune)
    before = {name: p.clone() for name, p in network.named_parameters()}
    model.evaluate([Probe(batch(), TRAJECTORY, PERTURBATION)] * 3)
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_a_batch_of_tokens_is_refused() -> None:
    tokens = np.full((1, 4), 5)
    with pytest.raises(FedForwardError, match=r"class logits and no token losses"):
        lora(classifier()).evaluate([Probe(TokenBatch(tokens, tokens))])


def test_a_new_head_comes_from_the_seed(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    def loaded(run_seed: int, classes: Sequence[str] = CLASSES) -> Any:
        torch.manual_seed(run_seed + 100 * len(classes))
        torch.rand(len(CLASSES))
        with caplog.at_level(logging.WARNING, "transformers.modeling_utils"):
            return load(str(folder), "float32", "cpu", classes=classes, run_seed=run_seed)[0]

    one, other = loaded(1), loaded(2)
    torch.rand(5)
    same = loaded(1)
    assert not caplog.records
    identities = [fingerprint(weights(network)) for network in (one, same, other)]
    assert identities[0] == identities[1] != identities[2]
    assert float(one.score.weight.std()) == pytest.approx(0.1, rel=0.2)
    assert one.config.id2label == dict(enumerate(CLASSES))
    narrow = load(str(folder), "bfloat16", "cpu", classes=CLASSES, run_seed=1)[0]
    assert torch.equal(narrow.score.weight, one.score.weight.bfloat16())


def test_a_head_that_is_there_is_kept(folder: Path, tmp_path: Path) -> None:
    first = load(str(folder), "float32", "cpu", classes=("b", "a"))[0]
    made = tmp_path / "made"
    shutil.copytree(folder, made)
    first.save_pretrained(made)
    again = load(str(made), "float32", "cpu", classes=("a", "b"), run_seed=9)[0]
    assert torch.equal(again.score.weight, first.score.weight)
    assert again.config.id2label == {0: "b", 1: "a"}
    with pytest.raises(FedForwardError, match=r"model\.path.*2 classes, and the data have 3: bad"):
        load(str(made), "float32", "cpu", classes=CLASSES)


def test_an_encoder_from_a_folder(folder: Path, tmp_path: Path) -> None:
    """Its body without a head is enough; without its pooler it is not."""
    from transformers import BertForMaskedLM

    whole = tmp_path / "encoder"
    shutil.copytree(folder, whole)
    body = classifier("bert", vocabulary=1000).bert
    body.save_pretrained(whole)
    one, same = (load(str(whole), "float32", "cpu", classes=CLASSES)[0] for _ in range(2))
    assert fingerprint(weights(one)) == fingerprint(weights(same))
    assert not one.classifier.bias.any() and one.classifier.weight.any()
    assert torch.equal(one.bert.pooler.dense.weight, body.pooler.dense.weight)
    part = tmp_path / "part"
    shutil.copytree(folder, part)
    BertForMaskedLM(body.config).save_pretrained(part)
    with pytest.raises(FedForwardError, match=r"lack 2 tensors .*such as bert\.pooler"):
        load(str(part), "float32", "cpu", classes=CLASSES)


def test_a_model_without_padding_gets_one(folder: Path) -> None:
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    settings["pad_token_id"] = None
    path.write_text(json.dumps(settings))
    network, tokenizer = load(str(folder), "float32", "cpu", classes=CLASSES)
    assert network.config.pad_token_id == tokenizer.pad_token_id
    losses, _ = one_by_one(network, examples())
    (result,) = lora(network).evaluate([Probe(batch())])
    np.testing.assert_allclose(result.sums, losses, rtol=2e-6)


def test_the_padding_token_is_the_networks_own() -> None:
    """Batches are filled with 0, which may be a token of a text."""
    network = classifier()
    network.config.pad_token_id = 96
    texts = [Example(np.array(tokens), len(tokens)) for tokens in ([5, 0], [0, 7, 8, 0, 9], [0])]
    losses, _ = one_by_one(network, texts)
    (result,) = lora(network).evaluate([Probe(CLASS_LOSS.batch(texts))])
    np.testing.assert_allclose(result.sums, losses, rtol=2e-6)


def test_a_quantised_base_keeps_a_plain_head() -> None:
    pytest.importorskip("bitsandbytes")
    network = load(str(DEMO_MODEL), "float32", "cpu", classes=CLASSES, quantization="nf4")[0]
    model = lora(network)
    model.commit([Update(TRAJECTORY, 0)])
    (tuned,) = model.evaluate([Probe(batch())])
    losses, _ = one_by_one(model.merge(), examples())
    np.testing.assert_allclose(tuned.sums, losses, rtol=1e-5)


def test_a_class_that_is_not_named_is_refused() -> None:
    row = Row({"a": "maybe"}, "line 3 of rows.jsonl")
    assert labels.class_number("no", {"yes": 0, "no": 1}, row) == 1
    words = r"data\.classes has no 'maybe', .* in line 3 of rows\.jsonl\. It has 'yes', 'no'\."
    with pytest.raises(FedForwardError, match=words):
        labels.class_number("maybe", {"yes": 0, "no": 1}, row)


def test_classes_and_their_order() -> None:
    answer = Template.parse("{a}", "data.answer")
    rows = [Row({"a": text}, "") for text in ("10", " 9", "2", "9", None, "-1")]
    assert labels.classes(rows, answer, None) == ("-1", "2", "9", "10")
    assert labels.classes([*rows, Row({"a": "x"}, "")], answer, None) == ("-1", "10", "2", "9", "x")
    assert labels.classes((), answer, {"1": " yes", "0": " no"}) == ("yes", "no")
    with pytest.raises(FedForwardError, match=r"data\.answer = '\{a\}' has only 1 different"):
        labels.classes(rows[:1], answer, None)
    with pytest.raises(FedForwardError, match=r"has 1001 different .*2 to 1000 classes"):
        labels.classes([Row({"a": str(n)}, "") for n in range(1001)], answer, None)
    with pytest.raises(FedForwardError, match=r"data\.label_words = .*must be different"):
        labels.classes((), answer, {"1": " yes", "0": "yes"})


def test_a_class_of_held_out_data_alone(
    classify: Configure, carry_out: CarryOut, tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "The cup is grey.", "stars": 5}\n', encoding="utf-8")
    wanted = classify(evaluation__source=str(other), federation__rounds=1)
    assert experiment.corpus_reader(wanted).classes() == ("2", "5", "10")
    assert carry_out(wanted, tmp_path / "run")["classes"] == ["2", "5", "10"]


def test_data_are_read_once(
    classify: Configure, carry_out: CarryOut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the classes and for the corpus."""
    seen: list[str] = []
    read = Source.read

    def counted(source: Source, *wanted: Any) -> Any:
        seen.append(source.key)
        return read(source, *wanted)

    monkeypatch.setattr(Source, "read", counted)
    carry_out(classify(federation__rounds=1), tmp_path / "run")
    assert seen == ["data.source"]


@pytest.mark.parametrize("tune", TUNES)
@pytest.mark.parametrize("objective", ["loss", "accuracy"])
def test_a_run_verifies_resumes_and_exports(
    classify: Configure, carry_out: CarryOut, tmp_path: Path, tune: str, objective: str
) -> None:
    changes: dict[str, Any] = {"model__tune": tune, "method__objective": objective}
    whole = carry_out(classify(**changes), tmp_path / "whole")
    out = tmp_path / "parts"
    carry_out(classify(**changes, federation__rounds=1), out)
    summary = carry_out(classify(**changes), out, resume=True)
    for name in ("ledger_digest", "state_digest"):
        assert summary[name] == whole[name]
    assert summary["classes"] == ["2", "10"]
    assert {summary["example"][when] for when in ("before", "after", "expected")} <= {"2", "10"}
    assert 0.0 <= summary["metrics"]["accuracy"]["end"] <= 1.0
    # Neither proof nor export needs the data.
    Path(classify().data.source).rename(tmp_path / "away")
    assert artefacts.verify(out).differences == []
    stored = next(iter((out / ("adapter" if tune == "lora" else "model")).glob("*.safetensors")))
    content = bytearray(stored.read_bytes())
    content[-2] ^= 1
    stored.write_bytes(bytes(content))
    assert artefacts.verify(out).differences != []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tune", TUNES)
def test_what_is_exported_answers_alike_elsewhere(
    classify: Configure, carry_out: CarryOut, tmp_path: Path, tune: str, dtype: str
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    wanted = classify(model__tune=tune, model__dtype=dtype, federation__rounds=2)
    carry_out(wanted, tmp_path / "run")
    model = artefacts.rebuild(artefacts.RunDirectory(tmp_path / "run")).model
    data = batch()
    tokens, mask = torch.from_numpy(data.tokens), torch.from_numpy(data.tokens != 0).long()
    expected = torch.from_numpy(model.class_logits([Probe(data)])[0]).float()

    def answers(network: Any) -> Any:
        with torch.inference_mode():
            return network.eval()(input_ids=tokens, attention_mask=mask).logits.float()

    near: dict[str, float] = {"rtol": 1e-5, "atol": 1e-5}
    if dtype == "bfloat16":
        near = {"rtol": 0.05, "atol": 0.05}
    merged = artefacts.export(tmp_path / "run", tmp_path / "merged", merge=True)
    network = AutoModelForSequenceClassification.from_pretrained(merged)
    assert network.config.id2label == {0: "2", 1: "10"}
    assert network.dtype is getattr(torch, dtype)
    torch.testing.assert_close(answers(network), expected, **near)
    if tune == "lora":
        folder = artefacts.export(tmp_path / "run", tmp_path / "adapter", merge=False)
        torch.manual_seed(5)
        fresh = AutoModelForSequenceClassification.from_pretrained(
            DEMO_MODEL, num_labels=2, dtype=getattr(torch, dtype)
        )
        unlike = answers(fresh)
        torch.testing.assert_close(
            answers(PeftModel.from_pretrained(fresh, folder)), expected, **near
        )
        assert not torch.allclose(unlike, expected, **near)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_and_its_head_loads_through_peft(kind: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model = lora(classifier(kind))
    model.commit([Update(TRAJECTORY, 0)])
    model.save(tmp_path / "adapter")
    losses, _ = one_by_one(
        PeftModel.from_pretrained(classifier(kind), tmp_path / "adapter"), examples()
    )
    (result,) = model.evaluate([Probe(batch())])
    np.testing.assert_allclose(result.sums, losses, rtol=1e-5)


def test_other_data_are_refused_on_resume(
    classify: Configure, carry_out: CarryOut, tmp_path: Path
) -> None:
    carry_out(classify(federation__rounds=1), tmp_path / "run")
    source = Path(classify().data.source)
    source.write_text(source.read_text().replace('"stars": 2', '"stars": 3'), encoding="utf-8")
    with pytest.raises(FedForwardError, match=r"other classes than when the run started"):
        carry_out(classify(), tmp_path / "run", resume=True)


def test_words_name_the_classes(classify: Configure, carry_out: CarryOut, tmp_path: Path) -> None:
    words = {"10": " great", "2": " poor"}
    summary = carry_out(classify(data__label_words=words), tmp_path / "run")
    assert summary["classes"] == ["great", "poor"]
    assert summary["example"]["expected"] in summary["classes"]
    with pytest.raises(FedForwardError, match=r"data\.label_words has no word for stars = '2'"):
        carry_out(classify(data__label_words={"10": "a", "3": "b"}), tmp_path / "other")


def test_the_first_order_baseline_learns(
    classify: Configure, carry_out: CarryOut, tmp_path: Path
) -> None:
    wanted = classify(method__name="fedavg", method__optimizer="adamw", method__learning_rate=1e-2)
    summary = carry_out(wanted, tmp_path / "run")
    assert summary["heldout_loss"]["end"] < summary["heldout_loss"]["start"]


def test_labels_are_part_of_the_data(classify: Configure) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    reader = experiment.corpus_reader(classify())
    corpus = reader.corpus(tokenizer, None, ("2", "10"))
    swapped = reader.corpus(tokenizer, None, ("10", "2"))
    assert corpus.fingerprint() != swapped.fingerprint()
    data = CLASS_LOSS.batch(corpus.heldout)
    assert ((data.labels != IGNORED).sum(axis=1) == 1).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model__head": "regression"},
            ["model.head = 'regression'", "'causal', 'classification'"],
        ),
        ({"method__objective": "rougeL"}, ["method.objective = 'rougeL'", "'loss', 'choice'"]),
        ({"evaluation__metrics": ["perplexity"]}, ["evaluation.metrics = 'perplexity'"]),
        ({"evaluation__metrics": ["a.b:c"]}, ["evaluation.metrics = 'a.b:c'"]),
        (
            {"method__name": "zorba", "planning__budgets": "1 GiB"},
            ["planning.budgets = '1 GiB'", "use planning.active"],
        ),
    ],
)
def test_settings_that_do_not_fit(
    classify: Configure, changes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(FedForwardError) as caught:
        classify(**changes)
    for word in words:
        assert word in str(caught.value)


def test_no_plan_of_memory(classify: Configure, tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(to_toml(classify()), encoding="utf-8")
    command("plan", path).refused("model.head = 'classification'", "fedforward run")


def test_a_head_that_is_not_linear_is_refused_for_lora() -> None:
    network = classifier()
    network.score = torch.nn.Sequential(torch.nn.LayerNorm(32), torch.nn.Linear(32, 3))
    with pytest.raises(FedForwardError, match=r"score\.0 of this model is a LayerNorm"):
        LoraModel(network, rank=2, alpha=4.0, plan=plan())
