"""`import fedforward as ff`: lazy, its examples run, and its runs are those of the command line."""

import doctest
import importlib
import inspect
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import fedforward as ff
from fedforward.config.loading import load
from fedforward.core.errors import FedForwardError
from fedforward.training.run import Run
from tests.conftest import DEMO_MODEL

PUBLIC = [name for name in ff.__all__ if name != "__version__"]


def test_the_face_is_lazy() -> None:
    code = (
        "import sys, fedforward as ff; ff.DeComFL, ff.Steps, ff.METHODS, dir(ff);"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_name_is_there_and_documented() -> None:
    assert set(ff.__all__) <= set(dir(ff))
    for name in PUBLIC:
        found = getattr(ff, name)
        if inspect.isclass(found) or inspect.isfunction(found):
            assert found.__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'Simulatoin'"):
        _ = ff.Simulatoin


@pytest.mark.parametrize(
    "module",
    [
        "fedforward", "fedforward.core.registry", "fedforward.core.steps",
        "fedforward.methods.aggregation", "fedforward.methods.decomfl",
        "fedforward.methods.estimators", "fedforward.methods.fedavg",
        "fedforward.methods.fedkseed", "fedforward.methods.fedmezo", "fedforward.methods.zorba",
        "fedforward.models.full", "fedforward.models.lora", "fedforward.models.quadratic",
        "fedforward.training.api",
    ],
)  # fmt: skip
def test_examples_in_docstrings_run(module: str) -> None:
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted and not result.failed


FEDKSEED = ff.FedKSeed(local_steps=2, candidates=40, estimator=ff.TwoPoint(mu=1e-2))


@dataclass(frozen=True)
class Weighted(ff.TwoPoint):
    """An estimator with a setting that a configuration cannot say."""

    weight: float = 1.0


@pytest.fixture
def simulation(rows: Path, tmp_path: Path) -> Any:
    """A function that makes the same small simulation each time."""

    def make(out: str = "run", method: Any = FEDKSEED, **changes: Any) -> ff.Simulation:
        from fedforward.demo.text import ANSWER, PROMPT

        model = ff.LoraModel.from_pretrained(DEMO_MODEL, rank=2, device="cpu", seed=3)
        data = ff.Dataset.from_file(rows, prompt=PROMPT, answer=ANSWER, heldout=6)
        settings: dict[str, Any] = {
            "learning_rate": 3e-3,
            "batch_size": 2,
            "run": {"evaluate_every": 1, "threads": 1},
        }
        divided = data.partition(clients=2, by="site")
        # `changes` may have the sections "model", "data" and "method" too.
        sections = changes.pop("sections", {})
        return ff.Simulation(
            model, divided, method, out=tmp_path / out, **settings | changes | sections
        )

    return make


def test_a_run_of_the_face_is_a_run(simulation: Any, tmp_path: Path) -> None:
    """Its directory verifies, and its configuration gives the same bits as a command."""
    seen: list[int] = []
    result = simulation().fit(rounds=2, progress=lambda done, total, line: seen.append(done))
    assert seen == [1, 2] and len(result.history["heldout_loss"]) == 3
    assert ff.verify(tmp_path / "run").ok
    config = load(tmp_path / "run/config.toml")
    assert config.method.parameters == {"candidates": 40}
    again = Run(config, tmp_path / "again").fit()
    assert again.to_json()["state_digest"] == result.summary.to_json()["state_digest"]
    saved = result.save_adapter(tmp_path / "adapter")
    assert (saved / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "run/adapter/adapter_model.safetensors"
    ).read_bytes()
    assert isinstance(result.answer("### Question:\nWhat?\n\n### Answer:\n"), str)
    assert json.loads((tmp_path / "run/summary.json").read_text())["method"] == "fedkseed"


def test_a_fit_goes_on(simulation: Any, tmp_path: Path) -> None:
    simulation("one").fit(rounds=3)
    simulation("two").fit(rounds=1)
    with pytest.raises(FedForwardError, match="holds a run already"):
        simulation("two").fit(rounds=3)
    result = simulation("two").fit(rounds=3, resume=True)
    digests = [json.loads((tmp_path / n / "summary.json").read_text()) for n in ("one", "two")]
    assert digests[0]["state_digest"] == digests[1]["state_digest"]
    assert result.summary.rounds == 3
    with pytest.raises(FedForwardError, match=r"has 3 rounds already, and federation\.rounds = 1"):
        simulation("two").fit(rounds=1, resume=True)
    assert simulation("two").fit(rounds=3, resume=True).summary.rounds == 3


def test_what_does_not_fit_is_a_sentence(simulation: Any) -> None:
    for changes, words in (
        ({"learning_rate": -1.0}, r"method\.learning_rate = -1\.0"),
        ({"run": {"evaluate_evry": 1}}, r"Did you mean run\.evaluate_every"),
        ({"method": ff.ZorBA(), "planning": {"active": [1]}}, r"planning\.active has 1 entries"),
        ({"method": ff.ZorBA}, "Write one with its settings"),
        ({"run": 3}, r"run = 3 is not allowed: it must be the keys of the section \[run\]"),
        ({"sections": {"method": {"local_steps": 5}}}, "says 2 already"),
        ({"sections": {"data": {"limit": 0}}}, r"data\.limit = 0"),
        ({"sections": {"model": {"blocks": "0-0"}}}, r"model\.blocks = '0-0' comes too late"),
        ({"sections": {"lora": {"rank": 4}}}, "says 2 already"),
        ({"federation": {"rounds": 7}}, r"is said in fit\(rounds=...\)"),
    ):
        with pytest.raises(FedForwardError, match=words):
            simulation(**changes)
    with pytest.raises(FedForwardError, match="takes a model of LoraModel"):
        ff.Simulation(
            ff.Quadratic([1.0], 4),  # type: ignore[arg-type]
            ff.Dataset.from_file("d", prompt="{a}", answer="{b}"),
            ff.FedMeZO(),
            learning_rate=1.0,
            out="x",
        )


def test_a_method_that_could_not_be_replayed_is_refused(simulation: Any) -> None:
    ff.ESTIMATORS.register("weighted")(Weighted)
    try:
        simulation(method=ff.DeComFL(estimator=Weighted(mu=1e-2)))
        with pytest.raises(FedForwardError, match="cannot be written down as it is"):
            simulation(method=ff.DeComFL(estimator=Weighted(mu=1e-2, weight=2.0)))
    finally:
        ff.ESTIMATORS.forget("weighted")


def test_parts_of_the_wrong_kind_are_refused() -> None:
    with pytest.raises(FedForwardError, match="'median' is no Aggregator"):
        ff.DeComFL(aggregator="median")  # type: ignore[arg-type]
    with pytest.raises(FedForwardError, match="'two-point' is no Estimator"):
        ff.DeComFL(estimator="two-point")  # type: ignore[arg-type]
    for make, words in (
        (lambda: ff.FedMeZO(local_steps=0), "local_steps = 0 is not allowed"),
        (lambda: ff.FedKSeed(candidates=0), "candidates = 0 is not allowed.*at least 1"),
        (lambda: ff.TwoPoint(mu=0.0), "mu = 0.0 is not allowed"),
        (lambda: ff.TwoPoint(directions=0), "directions = 0 is not allowed"),
        (lambda: ff.FZOO(mu=-1.0), "mu = -1.0 is not allowed"),
    ):
        with pytest.raises(FedForwardError, match=words):
            make()
    for wrong in (
        {"rank": 0},
        {"dtype": "float8"},
        {"device": "gpu"},
        {"distribution": "normal"},
        {"factors": "A"},
        {"quantization": "int8"},
    ):
        ((key, value),) = wrong.items()
        with pytest.raises(FedForwardError, match=f"{key} = {value!r} is not allowed"):
            ff.LoraModel.from_pretrained(DEMO_MODEL, **wrong)  # type: ignore[arg-type]


def test_masks_of_a_model_that_is_there_are_set(simulation: Any, tmp_path: Path) -> None:
    sections = {"method": {"mask": "random", "density": 0.1}}
    result = simulation(method=ff.DeComFL(local_steps=1), sections=sections).fit(rounds=1)
    assert result.model.masks and ff.verify(tmp_path / "run").ok


def test_every_section_can_be_said(simulation: Any, tmp_path: Path) -> None:
    """Also those that have the name of a part; and threads are the run's from the first fit on."""
    import torch

    sections = {"method": {"report_filters": ["clip:0.5"]}, "data": {"limit": 30}}
    torch.set_num_threads(2)
    simulation(sections=sections).fit(rounds=1)
    assert torch.get_num_threads() == 1
    config = load(tmp_path / "run/config.toml")
    assert config.method.report_filters == ["clip:0.5"] and config.data.limit == 30
    ff.export(str(tmp_path / "run"), str(tmp_path / "adapter"))
    assert (tmp_path / "adapter/adapter_config.json").is_file()


def test_full_tuning_in_half_precision_and_a_loop_by_hand(rows: Path) -> None:
    from fedforward.demo.text import ANSWER, PROMPT

    model = ff.FullModel.from_pretrained(DEMO_MODEL, dtype="bfloat16", device="cpu")
    batch = ff.Dataset.from_file(rows, prompt=PROMPT, answer=ANSWER, heldout=2).batches(model, 2)[0]
    before = model.digest()
    z = ff.Steps.of([1], [1.0])
    plus, minus = model.evaluate([ff.Probe(batch, perturbation=s * 1e-2 * z) for s in (1, -1)])
    assert model.digest() == before and plus.mean != minus.mean
    model.apply(-1e-3 * (plus.mean - minus.mean) * z)
    assert model.digest() != before
    model.reset()
    assert model.digest() == before
