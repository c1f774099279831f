"""A rate found in a few rounds, and the loss against it."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedforward.config.schema import Config
from fedforward.core.errors import FedForwardError
from fedforward.training.tune import MULTIPLES, Tuning, tune
from tests.support.command_line import command, write_config

Configure = Callable[..., Config]
ROUNDS = 4
AUTO = {"method__learning_rate": "auto", "method__name": "fedmezo-auto"}


@pytest.fixture
def tuned(configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tuning:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    done: list[tuple[int, int]] = []
    config = configure(**AUTO, federation__rounds=3)
    found = tune(config, ROUNDS, lambda *so_far: done.append(so_far))
    assert done == [(n, ROUNDS) for n in range(ROUNDS)]
    # Nothing is left, and the configuration is the caller's as it was.
    assert not list(folder.iterdir())
    assert config.federation.rounds == 3
    return found


def test_the_curve_has_the_losses_of_the_run(
    tuned: Tuning, configure: Configure, carry_out: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    changes = {"method__schedule": "constant", "run__evaluate_every": 1}
    config = configure(**AUTO, **changes, federation__rounds=ROUNDS)
    carry_out(config, tmp_path / "run")
    text = (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    losses = [line["heldout_loss"] for line in lines]
    by_multiple = dict(zip(MULTIPLES, tuned.curve, strict=True))
    assert by_multiple[0.0].loss == pytest.approx(losses[ROUNDS - 1], rel=1e-5)
    assert by_multiple[1.0].loss == pytest.approx(losses[ROUNDS], rel=1e-5)
    rates = list(lines[ROUNDS]["learning_rates"].values())
    assert tuned.learning_rate == pytest.approx(sum(rates) / len(rates), rel=0.2)
    assert min(rates) <= tuned.learning_rate <= max(rates)


def test_the_curve_is_of_growing_rates(tuned: Tuning) -> None:
    rates = [point.learning_rate for point in tuned.curve]
    assert rates == [m * tuned.learning_rate for m in MULTIPLES]
    assert tuned.curve[0].error == 0.0
    assert all(point.error > 0.0 for point in tuned.curve[1:])
    assert tuned.best.loss == min(point.loss for point in tuned.curve)
    assert tuned.examples == 6
    assert tuned.passes > ROUNDS * 2 * 16


def test_a_method_without_directions_has_no_such_rate(configure: Configure) -> None:
    with pytest.raises(FedForwardError, match=r"method.learning_rate = 'auto'"):
        tune(configure(method__name="fedavg", method__learning_rate=0.1), 2)


def test_what_else_changes_a_rate_is_left_out(configure: Configure) -> None:
    config = configure(method__schedule="cosine", method__warmup=2)
    assert tune(config, 2).rounds >= 2


@pytest.mark.parametrize(
    "changes",
    [{}, {"method__name": "fedkseed"}, {"method__name": "decomfl"}],
    ids=["fedmezo-auto", "fedkseed", "decomfl"],
)
def test_what_upper_blocks_alone_have_learned(
    configure: Configure,
    carry_out: Callable[..., dict[str, Any]],
    tmp_path: Path,
    changes: dict[str, Any],
) -> None:
    changes = {**AUTO, "method__schedule": "constant", **changes}
    config = configure(**changes, federation__rounds=ROUNDS, run__evaluate_every=ROUNDS)
    found = tune(config, ROUNDS, blocks=True)
    parts = found.upper_blocks
    assert [part.blocks for part in parts] == ["2", "1-2", "0-2"]
    assert [part.cost for part in parts] == pytest.approx([1 / 3, 2 / 3, 1.0])
    # With all blocks it is the update as it was, which the curve has at its own length.
    assert parts[-1].loss == pytest.approx(found.curve[MULTIPLES.index(1.0)].loss, rel=1e-5)
    if found.rounds == ROUNDS:
        carry_out(config, tmp_path / "run")
        text = (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
        start, end = lines[0]["heldout_loss"], lines[-1]["heldout_loss"]
        assert parts[-1].loss == pytest.approx(end, rel=1e-5)
        for part in parts:
            if part.share is not None:
                assert part.loss + part.share * (start - end) == pytest.approx(start, rel=1e-5)


def test_a_single_block_has_no_upper_ones(configure: Configure) -> None:
    with pytest.raises(FedForwardError, match=r"--blocks compares .* there is one\. Leave"):
        tune(configure(**AUTO, model__blocks=[1]), 2, blocks=True)


def test_a_rate_that_is_far_too_large_has_no_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedforward.training.tune.MULTIPLES", (0.0, 1.0, 1e30, 1e38))
    config, picture = write_config(tmp_path), tmp_path / "rates.png"
    shown = command("tune", config, "--rounds", 2, "--png", picture)
    assert shown.code == 0 and " inf " in shown.out, shown
    told = json.loads(command("tune", config, "--rounds", 2, "--json").out)
    assert told["curve"][-1]["loss"] is None
    assert told["best"]["loss"] < 100.0


def test_as_a_command(tmp_path: Path) -> None:
    config, picture = write_config(tmp_path), tmp_path / "rates.png"
    shown = command("tune", config, "--rounds", 3, "--png", picture)
    assert shown.code == 0, shown
    assert "method.learning_rate = " in shown.out
    assert "found in 3 rounds" in shown.out
    assert "model.blocks" not in shown.out
    blocks = command("tune", config, "--rounds", 2, "--blocks")
    assert "model.blocks" in blocks.out and "0-2" in blocks.out
    assert picture.stat().st_size > 10_000
    told = json.loads(command("tune", config, "--rounds", 2, "--json").out)
    assert told["best"] in told["curve"]
    assert told["learning_rate"] > 0.0
    command("tune", config, "--png", tmp_path / "gone" / "x.png").refused("no folder")
    command("tune", config, "method.name=fedavg").refused("method.learning_rate = 'auto'")
