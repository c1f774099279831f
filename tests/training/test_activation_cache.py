"""Runs that keep activations: the same bits on resume, with any memory, and for many clients."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedforward.config.schema import Config
from fedforward.core.errors import FedForwardError
from fedforward.models.base import CausalModel
from fedforward.training import activation_cache, replay
from fedforward.training.run import Run
from tests.support.configurations import content, refusal

Configure = Callable[..., Config]
CarryOut = Callable[..., dict[str, Any]]
UPPER = {"model__blocks": [2], "federation__clients": 3}


def plan_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    return found


def losses(out: Path) -> list[Any]:
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [(json.loads(line).get("heldout_loss"), json.loads(line).get("training_loss"))
            for line in lines]  # fmt: skip


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_memory_and_resume_change_no_bit(
    configure: Configure, carry_out: CarryOut, tmp_path: Path, tune: str
) -> None:
    changes = {**UPPER, "model__tune": tune}
    whole = carry_out(configure(**changes), tmp_path / "whole")
    assert plan_of(tmp_path / "whole")["keeps_activations"] is True
    assert replay.verify(tmp_path / "whole").differences == []
    for name, first, second in (("one", "60 KB", "auto"), ("two", "auto", "none")):
        out = tmp_path / name
        carry_out(configure(**changes, run__activation_cache=first, federation__rounds=1), out)
        found = carry_out(configure(**changes, run__activation_cache=second), out, True)
        assert found["ledger_digest"] == whole["ledger_digest"]
        assert found["state_digest"] == whole["state_digest"]
        # A run of one round is evaluated after it as well.
        assert losses(out)[2:] == losses(tmp_path / "whole")[2:]
        assert replay.verify(out).differences == []


def test_clients_in_turn_or_in_lockstep(
    configure: Configure, carry_out: CarryOut, tmp_path: Path
) -> None:
    """Rows of one client are not those of another, however many are measured together."""
    one = configure(**UPPER, method__learning_rate=1e-9, federation__rounds=1)
    carry_out(one, tmp_path / "one")
    together = one.model_copy(update={"run": one.run.model_copy(update={"probes_per_call": 6})})
    carry_out(together, tmp_path / "two")
    pairs = zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True)
    for (heldout, training), (other_heldout, other_training) in pairs:
        assert heldout == other_heldout
        assert (training or 0.0) == pytest.approx(other_training or 0.0, rel=1e-5)


def test_passes_of_rounds(configure: Configure, carry_out: CarryOut, tmp_path: Path) -> None:
    """Two probes of a third of the blocks, and lower blocks once for a row."""
    config = configure(**UPPER, method__batch_size=6, federation__rounds=5, run__evaluate_every=10)
    summary = carry_out(config, tmp_path / "run")
    text = (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    passes = [line["passes"] for line in lines[1:]]
    steps = 3 * 2
    assert passes == sorted(passes)
    assert steps * 2 / 3 - 0.01 <= passes[0] <= steps * (2 + 2) / 3
    assert passes[0] > steps * 2 / 3 + 0.5
    # After four rounds of two steps of six rows a client has seen all that it has.
    assert max(summary["examples"]) <= 48
    assert passes[4] - passes[3] == pytest.approx(steps * 2 / 3, abs=0.01)


def test_none_keeps_nothing(configure: Configure, carry_out: CarryOut, tmp_path: Path) -> None:
    carry_out(configure(**UPPER, run__activation_cache="none"), tmp_path / "none")
    plan = plan_of(tmp_path / "none")
    assert (plan["keeps_activations"], plan["not_kept"]) == (False, "")
    carry_out(configure(), tmp_path / "all")
    plan = plan_of(tmp_path / "all")
    assert (plan["keeps_activations"], plan["not_kept"]) == (False, "")


def test_a_run_of_before(configure: Configure, carry_out: CarryOut, tmp_path: Path) -> None:
    """Its plan and configuration lack the keys: it goes on as it began."""
    whole = carry_out(configure(**UPPER, run__activation_cache="none"), tmp_path / "whole")
    out = tmp_path / "parts"
    carry_out(configure(**UPPER, run__activation_cache="none", federation__rounds=1), out)
    plan = plan_of(out)
    del plan["keeps_activations"], plan["not_kept"]
    (out / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    text = (out / "config.toml").read_text(encoding="utf-8")
    kept = [line for line in text.splitlines() if "activation_cache" not in line]
    assert len(kept) == len(text.splitlines()) - 1
    (out / "config.toml").write_text("\n".join(kept), encoding="utf-8")
    resumed = carry_out(configure(**UPPER), out, True)
    assert resumed["ledger_digest"] == whole["ledger_digest"]
    assert plan_of(out)["keeps_activations"] is False


def test_too_small(configure: Configure, carry_out: CarryOut, tmp_path: Path) -> None:
    small = configure(**UPPER, run__activation_cache="2 KB")
    with pytest.raises(FedForwardError, match=r"run\.activation_cache = '2 KB' is too small") as at:
        carry_out(small, tmp_path / "run")
    least = str(at.value).split("at least ")[1].split(",")[0]
    assert not (tmp_path / "run/config.toml").exists()
    config = configure(**UPPER, run__activation_cache=least, federation__rounds=1)
    carry_out(config, tmp_path / "least")
    with pytest.raises(FedForwardError, match="is too small"):
        carry_out(configure(**UPPER, run__activation_cache="2 KB"), tmp_path / "least", True)


def test_asked_for_where_it_cannot_be(
    configure: Configure, carry_out: CarryOut, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    carry_out(configure(run__activation_cache="1 MB", federation__rounds=1), tmp_path / "all")
    plan = plan_of(tmp_path / "all")
    assert (plan["keeps_activations"], plan["not_kept"]) == (
        False, "the first transformer block is tuned",
    )  # fmt: skip
    assert "run.activation_cache = '1 MB' keeps nothing: the first" in caplog.text


def test_a_network_that_changed(
    configure: Configure, carry_out: CarryOut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carry_out(configure(**UPPER, federation__rounds=1), tmp_path / "run")
    monkeypatch.setattr(CausalModel, "keep_activations", lambda *_: "blocks take more from below")
    with pytest.raises(FedForwardError, match="was started with kept activations"):
        carry_out(configure(**UPPER), tmp_path / "run", True)


def test_little_free_memory(
    configure: Configure, carry_out: CarryOut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default takes a quarter of it, and keeps nothing where that does not hold a batch."""
    monkeypatch.setattr(activation_cache, "available_memory", lambda: 4000)
    carry_out(configure(**UPPER, federation__rounds=1), tmp_path / "run")
    assert plan_of(tmp_path / "run")["not_kept"].startswith("one batch takes more than the 1000 B")


def test_memory_is_counted(configure: Configure, tmp_path: Path) -> None:
    """On a CPU what can come together over a run is part of the peak."""
    found = {}
    for given in ("none", "1 GiB"):
        run = Run(configure(**UPPER, run__activation_cache=given), tmp_path / given)
        run._measure_memory()
        found[given] = run._peak_memory
        largest = activation_cache.largest_bytes(run.model, run.corpus)
        run.ledger.close()
        run.directory.unlock()
    assert 0.5 * largest < found["1 GiB"] - found["none"] < 1.5 * largest


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("1 gigs", ["activation_cache: '1 gigs' is no amount of memory", "'auto' or 'none'"]),
        ("0 B", ["activation_cache = '0 B' keeps nothing", "'none'"]),
    ],
)
def test_no_amount(given: str, words: list[str]) -> None:
    sentence = refusal(content(run__activation_cache=given))
    assert all(word in sentence for word in words)


def test_backpropagation_keeps_nothing() -> None:
    whole = content(method__name="fedavg", run__activation_cache="1 GiB")
    assert "run.activation_cache = '1 GiB' keeps what probes share" in refusal(whole)
