"""What a run will need: plans, impossible budgets, who perturbs what when clients change."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fedforward.cli import main as cli
from fedforward.config.template import to_toml
from fedforward.core.errors import FedForwardError
from fedforward.planning.activation import Problem
from fedforward.planning.allocator import Allocator
from fedforward.planning.budgets import sensitivity, survey
from fedforward.training import build as experiment
from fedforward.training.preview import preview

ZORBA = {"method__name": "zorba", "federation__clients": 3}


def counted(*budgets: int, blocks: int = 4) -> Allocator:
    clients = len(budgets)
    return Allocator(
        Problem(
            shares=np.ones(clients),
            weights=np.ones(blocks),
            dimensions=np.ones(blocks),
            fixed=np.zeros(clients, np.int64),
            costs=np.ones((clients, blocks), np.int64),
            budgets=np.array(budgets, np.int64),
        )
    )


def test_a_plan_follows_the_participants() -> None:
    planner = counted(2, 2, 4)
    whole = planner([0, 1, 2])
    assert whole.sum(axis=1).tolist() == [2, 2, 4] and whole.all(axis=0).sum() == 0
    # Without the third client the first two must cover everything between them.
    part = planner([0, 1])
    assert part.sum(axis=0).tolist() == [1, 1, 1, 1]
    np.testing.assert_array_equal(planner([0, 1, 2]), whole)
    # One of them cannot: it keeps the blocks of the whole plan, and the others are inactive.
    np.testing.assert_array_equal(planner([1]), whole[[1]])
    with pytest.raises(FedForwardError, match=r"client|block"):
        planner.plan([1])


def test_the_rounds_use_the_plan(configure: Any, carry_out: Any, tmp_path: Path) -> None:
    from fedforward.federation.ledger import Ledger

    settings = configure(**ZORBA, planning__active=[1, 2, 3], federation__participation=0.7)
    carry_out(settings, tmp_path / "run")
    ledger = Ledger(tmp_path / "run/ledger.sqlite")
    for record in ledger.rounds():
        rows = {
            result.report.client: 3 if result.blocks is None else int(result.blocks.sum())
            for result in record.results
        }
        assert all(1 <= count <= client + 1 for client, count in rows.items())
    ledger.close()


def test_a_preview_is_what_the_run_sends(configure: Any, carry_out: Any, tmp_path: Path) -> None:
    settings = configure(**ZORBA, planning__active=[1, 2, 3])
    plan = preview(settings)
    content = json.loads(json.dumps(plan.as_json()))
    assert [len(client["active"]) for client in content["clients"]] == [1, 2, 3]
    assert content["activation"]["surrogate_gap"] < 1e-5
    for client in content["clients"]:
        peaks = client["peak_bytes_by_active_blocks"]
        assert len(peaks) == 4 and peaks == sorted(peaks)
        assert peaks[0] < client["predicted_bytes"] <= peaks[-1]
    carry_out(settings, tmp_path / "run")
    lines = [json.loads(text) for text in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    found = lines[2]["bytes"]
    assert content["bytes_per_client_round"] == {
        "up": found["up"],
        "down": pytest.approx(found["down"], abs=1),
    }


@pytest.mark.parametrize("name", ["fedmezo", "decomfl", "fedkseed", "fedkseed-pro"])
def test_methods_without_blocks_have_a_preview_too(
    configure: Any, carry_out: Any, tmp_path: Path, name: str
) -> None:
    settings = configure(
        method__name=name, **({"method__candidates": 30} if name.startswith("fedkseed") else {})
    )
    plan = preview(settings)
    assert plan.activation is None and not plan.front and plan.matrix.all()
    carry_out(settings, tmp_path / "run")
    lines = [json.loads(text) for text in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert plan.up == lines[2]["bytes"]["up"]
    assert plan.down == pytest.approx(lines[2]["bytes"]["down"], abs=40)


def budgets_for(configure: Any, tune: str) -> tuple[int, list[int]]:
    """Bytes of no and of each further block."""
    plan = preview(configure(**ZORBA, model__tune=tune, run__trajectory="cache"))
    return int(plan.resources.memory.fixed(*plan.resources.shapes[0])), plan.peaks(0)


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_budgets_are_kept_and_impossible_ones_refused(
    configure: Any, carry_out: Any, tmp_path: Path, tune: str
) -> None:
    fixed, peaks = budgets_for(configure, tune)
    base = {**ZORBA, "model__tune": tune, "run__trajectory": "cache"}
    roomy = f"{2 * peaks[-1]} B"
    middle = f"{(fixed + peaks[-1]) // 2} B"
    plan = preview(configure(**base, planning__budgets=[middle, roomy, roomy]))
    assert 0 < plan.matrix[0].sum() < len(plan.blocks) and plan.matrix[1:].all()
    assert all(plan.predicted(c) <= plan.resources.budgets[c] for c in range(3))
    assert len(plan.front) > 3
    memory = [point.used for point in plan.front]
    assert memory == sorted(memory, reverse=True)
    carry_out(configure(**base, planning__budgets=[middle, roomy, roomy]), tmp_path / "run")
    small = f"{fixed // 2} B"
    with pytest.raises(FedForwardError, match=r"Client '1' cannot take part: .* lacks .*iB"):
        preview(configure(**base, planning__budgets=[roomy, small, roomy]))
    with pytest.raises(FedForwardError, match=r"[Bb]lock '.*lack"):
        carry_out(configure(**base, planning__budgets=f"{fixed + 1} B"), tmp_path / "refused")
    assert not (tmp_path / "refused/ledger.sqlite").exists()


@pytest.mark.slow
def test_measured_budgets_and_sensitive_blocks(configure: Any) -> None:
    settings = configure(**ZORBA, planning__budgets="measured", planning__weights="sensitivity")
    plan = preview(settings)
    assert plan.matrix.all(), "this machine has room for all"
    weights = plan.resources.weights
    assert weights.sum() == pytest.approx(1.0) and (weights > 0).all()
    sizes = np.array(plan.block_sizes) / sum(plan.block_sizes)
    assert np.abs(weights - sizes).max() > 0.02, "the loss does not feel all blocks alike"


@pytest.mark.slow
def test_sensitivity_is_the_squared_norm_of_a_blocks_gradient(configure: Any) -> None:
    """Against backpropagation, as a share; eight directions leave a good deal of noise."""
    settings = configure(**ZORBA, method__mu=1e-3)
    plan = experiment.resolve_plan(settings)
    model, tokenizer = experiment.build_model(settings, plan, ())
    corpus = experiment.read_corpus(settings, experiment.corpus_reader(settings), tokenizer, None)
    batches = experiment.widest_steps(settings, corpus)
    before = model.digest()
    found = np.mean([sensitivity(model, batches, 1e-3, seed) for seed in range(12)], axis=0)
    assert model.digest() == before
    squares = np.zeros(len(model.layout.blocks))
    for batch in batches:
        parameters = model.tuned_parameters()
        for parameter in parameters:
            parameter.requires_grad_(True)
        model.loss(batch).backward()
        places = {tensor.data_ptr(): name for name, tensor in model.tensors.items()}
        owners = dict(zip(model.layout.names, model.layout.owners, strict=True))
        for parameter in parameters:
            owner = owners[places[parameter.data_ptr()]]
            squares[owner] += float(parameter.grad.square().sum())
            parameter.grad = None
            parameter.requires_grad_(False)
    np.testing.assert_allclose(found, squares / squares.sum(), atol=0.15)


def test_a_survey_predicts_what_is_measured(configure: Any) -> None:
    settings = configure(**ZORBA, planning__active=[1, 2, 3])
    model, tokenizer = experiment.build_model(settings, experiment.resolve_plan(settings), ())
    corpus = experiment.read_corpus(settings, experiment.corpus_reader(settings), tokenizer, None)
    steps = experiment.widest_steps(settings, corpus)
    resources = survey(settings, model, steps)
    assert resources.shapes == tuple(batch.tokens.shape for batch in steps)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"planning__active": [0, 1, 1]}, "at least one block"),
        ({"planning__active": [1, 1]}, r"2 entries for federation\.clients = 3"),
        ({"planning__active": [1, 1, 9]}, r"no client can have more than 3"),
        ({"planning__active": [1, 1], "federation__clients": 2}, "must each be active on some"),
        ({"planning__budgets": "lots"}, "'lots' is no amount of memory"),
        ({"planning__budgets": "6 GiB", "planning__active": [1, 1, 1]}, "the same thing twice"),
        (
            {"planning__budgets": "6 GiB", "method__name": "fedmezo"},
            r"method\.name = 'fedmezo' all clients have the same",
        ),
        ({"method__name": "fedavg"}, "trains by backpropagation"),
    ],
)
def test_plans_that_cannot_be(configure: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(FedForwardError, match=words):
        preview(configure(**(ZORBA | changes)))


def test_the_command(configure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    file = tmp_path / "run.toml"
    file.write_text(to_toml(configure(**ZORBA, planning__active=[1, 2, 3])))
    picture = tmp_path / "plan.png"
    runner = CliRunner()
    result = runner.invoke(cli.app, ["plan", str(file), "--png", str(picture)])
    assert result.exit_code == 0, result.output
    for words in ("who perturbs which block", "coverage", "convergence surrogate", "69 B up"):
        if words != "69 B up":
            assert words in result.output
    assert picture.stat().st_size > 5000
    result = runner.invoke(cli.app, ["plan", str(file), "--json"])
    start = result.output.index("{")
    assert json.loads(result.output[start:])["method"] == "zorba"
    result = runner.invoke(cli.app, ["plan", str(file), "--png", str(tmp_path / "no/plan.png")])
    assert result.exit_code == 2 and "there is no folder" in result.output
