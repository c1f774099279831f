"""Who is told of a run's figures: whole after a kill, numbers alone, and never the end of a run."""

import csv
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from socket import gethostname
from typing import Any

import pytest

from fedforward.core.registry import CALLBACKS
from fedforward.training.callbacks import _public, figures
from fedforward.training.metrics import DivergenceError
from tests.support.command_line import command, write_config
from tests.training.test_loop import Begun

OPTIONS = ["method.learning_rate=1e-3", "run.evaluate_every=2"]


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]


def run_with(names: str, tmp_path: Path, *more: str) -> Any:
    config = tmp_path / "config.toml"
    if not config.is_file():
        config = write_config(tmp_path)
    return command(
        "run", config, *OPTIONS, f"run.callbacks={names}", *more, "--out", tmp_path / "run"
    )


def rows_of(run: Path) -> list[dict[str, str]]:
    with (run / "figures.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def scalars(run: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    return {
        tag: {
            event.step: float(tensor_util.make_ndarray(event.tensor_proto))
            for event in events.Tensors(tag)
        }
        for tag in events.Tags()["tensors"]
    }


def test_csv_has_every_figure_of_every_round(tmp_path: Path) -> None:
    assert run_with('["csv"]', tmp_path, "federation.rounds=3").code == 0
    lines, rows = lines_of(tmp_path / "run"), rows_of(tmp_path / "run")
    assert [int(row["round"]) for row in rows] == [0, 1, 2, 3]
    for line, row in zip(lines, rows, strict=True):
        wanted = figures(line)
        assert {name: float(value) for name, value in row.items() if value} == wanted
    assert rows[0]["learning_rate"] == "" and float(rows[1]["learning_rate"]) == 1e-3


def test_what_is_written_is_whole_after_a_kill(tmp_path: Path) -> None:
    names = '["csv","tensorboard"]'
    assert run_with(names, tmp_path, "federation.rounds=3").code == 0
    # A kill came between a round and its row.
    file = tmp_path / "run/figures.csv"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-2]))
    assert run_with(names, tmp_path, "federation.rounds=5", "--resume").code == 0
    lines = lines_of(tmp_path / "run")
    assert [int(row["round"]) for row in rows_of(tmp_path / "run")] == list(range(6))
    found = scalars(tmp_path / "run")
    assert list(found["training_loss"]) == [1, 2, 3, 4, 5]
    for line in lines[1:]:
        assert found["training_loss"][line["round"]] == pytest.approx(line["training_loss"])
    assert list(found["heldout_loss"]) == [n for n in range(6) if "heldout_loss" in lines[n]]


def test_wandb_is_told_numbers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    for key in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(key, str(tmp_path / "own"))
    assert run_with('["wandb"]', tmp_path).code == 0
    name = (tmp_path / "run/wandb.id").read_text()
    (sent,) = (tmp_path / "run/wandb").glob(f"offline-run-*-{name}/run-{name}.wandb")
    content = sent.read_bytes()
    assert b"training_loss" in content and b"learning_rate" in content
    line = lines_of(tmp_path / "run")[0]["example"]
    # Nor is the machine, or what is installed on it.
    assert f"B{chr(len(gethostname()))}{gethostname()}".encode() not in content
    assert not list(sent.parent.rglob("requirements.txt"))
    # The prompt, its answer, the fields' names and the data's place are none of its business.
    for secret in (line["prompt"], line["expected"], "{q}", "rows.jsonl"):
        assert secret.encode() not in content


def test_a_callback_of_a_package_that_fails_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[Mapping[str, Any]] = []

    class Failing:
        def begin(self, config: Any, folder: Path, lines: Any) -> None:
            assert [line["round"] for line in lines] == [0]

        def line(self, line: Mapping[str, Any]) -> None:
            seen.append(line)
            raise OSError("no room")

        def end(self) -> None:
            raise AssertionError("it was left out")

    CALLBACKS.register("failing")(Failing)
    try:
        with caplog.at_level(logging.WARNING):
            assert run_with('["failing","csv"]', tmp_path).code == 0
    finally:
        CALLBACKS.forget("failing")
    assert len(seen) == 1 and "example" not in seen[0]
    assert "'failing' failed (no room) and is left out; the run goes on." in caplog.text
    assert len(rows_of(tmp_path / "run")) == 3


def test_what_is_not_there_is_said_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_with('["csvv"]', tmp_path).refused("run.callbacks", "'csvv'", "Did you mean 'csv'?")
    monkeypatch.setattr("fedforward.training.callbacks.find_spec", lambda name: None)
    run_with('["wandb"]', tmp_path).refused("run.callbacks", "pip install 'fedforward[wandb]'")
    assert not (tmp_path / "run").exists()


def test_a_figure_that_is_measured_when_the_run_ends_is_told(tmp_path: Path) -> None:
    begun = Begun(tmp_path, lambda rounds: 1.0 + rounds / 8, callbacks=["csv", "tensorboard"])
    begun.runner.not_finite_after = 3
    with pytest.raises(DivergenceError):
        begun.loop.run()
    rows = rows_of(tmp_path)
    assert [row["heldout_loss"] for row in rows] == ["1.0", "", "1.25", "1.375"]
    found = scalars(tmp_path)
    assert found["heldout_loss"] == {0: 1.0, 2: 1.25, 3: 1.375}
    assert list(found["training_loss"]) == [1, 2, 3]


def test_of_a_configuration_no_place_is_sent() -> None:
    section = {"field": "a", "mask_file": "b", "mu": 1.0, "parameters": {"n": 3, "file": "/c"}}
    assert _public(section) == {"mu": 1.0, "parameters": {"n": 3}}


def test_figures_are_of_no_single_site() -> None:
    line = {
        "round": 3,
        "training_loss": None,
        "heldout_loss": math.inf,
        "sites": {"north": 1.0},
        "clients": {"asked": 4},
        "learning_rates": {"0": 1.0, "1": 2.0},
        "example": {"prompt": 3.0},
    }
    wanted = {"round": 3, "heldout_loss": math.inf, "clients/asked": 4, "learning_rate": 1.5}
    assert figures(line) == wanted
