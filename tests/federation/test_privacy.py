"""The accountant against published values, and simulated runs with noise: resume, verify, lines."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedforward.core.errors import FedForwardError, MessageError
from fedforward.federation import privacy
from fedforward.federation.ledger import Ledger
from fedforward.federation.privacy import ORDERS, Guarantee, epsilon, rdp
from fedforward.federation.releases import Releases
from fedforward.messages.report import Report
from fedforward.messages.task import Task
from tests.support.command_line import command, write_config
from tests.support.configurations import content, refusal

PRIVATE = [
    "federation.rounds=4",
    "federation.weights=equal",
    "method.learning_rate=1e-3",
    "method.local_steps=2",
    "method.batch_size=2",
    "privacy.clip=20.0",
    "privacy.delta=1e-3",
    "privacy.examples=4",
]
SIGMA, TARGET = "privacy.noise_multiplier=1.5", "privacy.target_epsilon=8.0"


def test_the_published_setting_of_mnist() -> None:
    """Abadi et al. (2016): ε of about 3 by the conversion of Mironov (2017); Balle's is tighter."""
    chance, steps = 256 / 60_000, 60 * 60_000 // 256
    curve = rdp(chance, 1.1, steps)
    classic = min(r + math.log(1e5) / (a - 1) for a, r in zip(ORDERS, curve, strict=True))
    assert classic == pytest.approx(3.008, abs=1e-3)
    # The library dp-accounting 0.6.0 has 2.5966 by its RDP accountant, and 2.3817 by its PLD one.
    assert epsilon(chance, 1.1, steps, 1e-5) == pytest.approx(2.5966, abs=1e-3)


def test_without_sampling_it_is_the_gaussian_mechanism() -> None:
    assert rdp(1.0, 2.0, 3) == pytest.approx([3 * order / 8 for order in ORDERS])


@pytest.mark.parametrize(("target", "wanted"), [(2.0, 13.791), (6.0, 5.272)])
def test_the_settings_of_dpzero(target: float, wanted: float) -> None:
    """n = 1,000, B = 64 and 10,000 steps at δ = 1e-5."""
    asked = Guarantee(200.0, 0.0, 1e-5, batch_size=64, examples=1000, local_steps=1)
    found = asked.calibrated(target, 10_000).noise_multiplier
    assert found == pytest.approx(wanted, abs=2e-3)
    assert epsilon(0.064, found, 10_000, 1e-5) <= target
    assert epsilon(0.064, found * (1 - 3e-4), 10_000, 1e-5) > target


def test_epsilon_grows_with_steps_and_begins_at_none() -> None:
    found = [epsilon(0.1, 1.0, steps, 1e-5) for steps in (0, 1, 2, 50)]
    assert found[0] == 0.0 and found == sorted(found) and len(set(found)) == 4


def test_a_target_that_no_noise_keeps() -> None:
    with pytest.raises(FedForwardError, match=r"privacy.target_epsilon = 1e-09 cannot be kept"):
        Guarantee(1.0, 0.0, 1e-5, 9, 9, local_steps=10).calibrated(1e-9, 1000)


def test_a_missing_accountant_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    privacy._accountant.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FedForwardError, match=r"pip install 'fedforward\[privacy\]'"):
        rdp(0.5, 1.0, 1)


SECTION = {"privacy__clip": 1.0, "privacy__delta": 1e-3, "privacy__examples": 100}
GOOD = SECTION | {
    "privacy__noise_multiplier": 1.0,
    "federation__weights": "equal",
    "method__learning_rate": 1e-3,
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method__learning_rate": "auto"}, ["method.learning_rate = 'auto' reads", "a number"]),
        ({"method__client_rates": "loss"}, ["method.client_rates = 'loss' reads", "'fixed'"]),
        ({"federation__weights": "examples"}, ["federation.weights = 'examples'", "'equal'"]),
        ({"method__name": "feedsign"}, ["method.name = 'feedsign'", "use 'fedmezo'"]),
        ({"method__name": "fedkseed"}, ["method.name = 'fedkseed'", "use 'fedmezo'"]),
        ({"method__name": "fedavg"}, ["method.name = 'fedavg'"]),
        ({"method__name": "zorba"}, ["method.name = 'zorba'", "use 'fedmezo'", "'decomfl'"]),
        (
            {"method__estimator": "fzoo", "method__directions": 2},
            ["method.estimator = 'fzoo'", "'two-point' or 'one-sided'"],
        ),
        (
            {"method__name": "decomfl", "federation__secure_sums": True},
            ["federation.secure_sums = true"],
        ),
        ({"lora__init": "aligned"}, ["lora.init = 'aligned'", "data.public"]),
        ({"method__objective": "a.b:c"}, ["method.objective = 'a.b:c'", "such as 'loss'"]),
        ({"method__batch_size": 101}, ["method.batch_size = 101", "privacy.examples = 100"]),
        ({"privacy__delta": 0.01}, ["delta = 0.01 is not below 1 / examples = 0.01", "0.001"]),
        ({"privacy__target_epsilon": 2.0}, ["noise_multiplier or target_epsilon", "not both"]),
        ({"privacy__clip": None}, ["clip is missing"]),
        ({"privacy__mechanism": "laplace"}, ["delta = 0.001", "'laplace' epsilon always holds"]),
        ({"privacy__noise_multiplier": 1e-4}, ["noise_multiplier", "0.001"]),
    ],
)
def test_what_privacy_does_not_go_with(changes: dict[str, Any], words: list[str]) -> None:
    whole = content(**{**GOOD, **changes})
    if changes == {"privacy__clip": None}:
        del whole["privacy"]["clip"]
    said = refusal(whole)
    assert all(word in said for word in words), said


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", ["fedmezo", "decomfl"])
def test_a_simulated_run(tmp_path: Path, method: str) -> None:
    config = write_config(tmp_path)
    options = [*PRIVATE, SIGMA, f"method.name={method}"]
    first = command("run", config, *options, "--out", tmp_path / "run")
    assert first.code == 0, first
    assert "epsilon" in first.out + first.error and "at delta 0.001" in first.out + first.error
    found = lines(tmp_path / "run")
    assert [line.get("epsilon") for line in found] == [
        None,
        *(epsilon(0.5, 1.5, 2 * rounds, 1e-3) for rounds in (1, 2, 3, 4)),
    ]
    assert all(line["training_loss"] is None and not line["skipped_steps"] for line in found[1:])
    ledger = Ledger(tmp_path / "run" / "ledger.sqlite")
    reports = [part.report for record in ledger.rounds() for part in record.results]
    assert ledger.header["privacy"] == [20.0, 1.5, 1e-3, 0.5, "gaussian", "add-remove", "example"]
    ledger.close()
    assert {report.examples for report in reports} == {4}
    assert all(math.isnan(report.loss) and report.gradients.all() for report in reports)
    assert command("verify", tmp_path / "run").code == 0
    # What was drawn cannot be drawn again.
    assert command("run", config, *options, "--out", tmp_path / "again").code == 0
    ledger = Ledger(tmp_path / "again" / "ledger.sqlite")
    others = [part.report for record in ledger.rounds() for part in record.results]
    ledger.close()
    assert all(
        (one.gradients != other.gradients).all() for one, other in zip(reports, others, strict=True)
    )


def test_a_run_with_laplace_noise_has_no_delta(tmp_path: Path) -> None:
    config, out = write_config(tmp_path), tmp_path / "run"
    options = [option for option in PRIVATE if not option.startswith("privacy.delta")]
    options += ["privacy.mechanism=laplace", "privacy.adjacency=replace-one"]
    done = command("run", config, *options, "privacy.target_epsilon=8.0", "--out", out)
    assert done.code == 0 and "epsilon" in done.out + done.error, done
    assert "at delta" not in done.out + done.error
    last = lines(out)[-1]
    assert 7.99 < last["epsilon"] <= 8.0 and last["delta"] == 0.0
    assert command("verify", out).code == 0
    more = [*options, "privacy.target_epsilon=8.0", "--out", out, "--resume"]
    command("run", config, *more, "privacy.adjacency=add-remove").refused("noise")


def test_masks_blocks_aligned_adapters_and_several_steps_go_with_it(tmp_path: Path) -> None:
    config, out = write_config(tmp_path), tmp_path / "run"
    public = tmp_path / "public.jsonl"
    public.write_text('{"q": "what?", "a": "that."}\n' * 9, encoding="utf-8")
    options = [
        *PRIVATE,
        SIGMA,
        "method.local_steps=3",
        "method.estimator=one-sided",
        "method.directions=3",
        "method.mask=random",
        "method.density=0.5",
        "model.blocks=[1]",
        "lora.init=aligned",
        f"data.public={public}",
    ]
    done = command("run", config, *options, "--out", out)
    assert done.code == 0, done
    found = lines(out)
    assert [line["epsilon"] for line in found[1:]] == [
        epsilon(0.5, 1.5, 3 * rounds, 1e-3) for rounds in (1, 2, 3, 4)
    ]
    ledger = Ledger(out / "ledger.sqlite")
    sizes = {len(part.report.gradients) for record in ledger.rounds() for part in record.results}
    ledger.close()
    assert sizes == {9}
    assert command("verify", out).code == 0


def test_a_rate_is_not_looked_for_on_private_rows(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    command("tune", config, *PRIVATE, SIGMA).refused("tune", "public rows", "data.source")


def test_a_run_goes_on_with_its_own_noise(tmp_path: Path) -> None:
    config, out = write_config(tmp_path), tmp_path / "run"
    assert command("run", config, *PRIVATE, SIGMA, "--out", out).code == 0
    more = [*PRIVATE, "federation.rounds=6"]
    done = command("run", config, *more, SIGMA, "--out", out, "--resume")
    assert done.code == 0, done
    assert lines(out)[-1]["epsilon"] == epsilon(0.5, 1.5, 12, 1e-3)
    assert command("verify", out).code == 0


def test_a_target_is_kept_and_more_rounds_are_refused(tmp_path: Path) -> None:
    config, out = write_config(tmp_path), tmp_path / "run"
    assert command("run", config, *PRIVATE, TARGET, "--out", out).code == 0
    assert 7.9 < lines(out)[-1]["epsilon"] <= 8.0
    more = [*PRIVATE, TARGET, "federation.rounds=6"]
    command("run", config, *more, "--out", out, "--resume").refused("noise", "target_epsilon")
    assert len(lines(out)) == 5


REPORT = Report(2, 0, 100, float("nan"), 0, np.array([0.5, -0.5], np.float32))


def test_a_round_is_answered_once(tmp_path: Path) -> None:
    task = Task(2, 0, 0.1, False, ())
    kept = Releases(tmp_path / "deep" / "run.json")
    assert kept.again(task, b"state") is None
    kept.note(task, b"state", REPORT)
    # After a restart as well.
    for found in (kept, Releases(tmp_path / "deep" / "run.json")):
        again = found.again(task, b"state")
        assert again is not None and again.encode() == REPORT.encode()
        for other, state in (
            (task, b"other"),
            (Task(2, 0, 0.2, False, ()), b"state"),
            (Task(1, 0, 0.1, False, ()), b"state"),
        ):
            with pytest.raises(MessageError, match="a round is answered once"):
                found.again(other, state)
        assert found.again(Task(3, 0, 0.1, False, ()), b"state") is None
    (tmp_path / "deep" / "run.json").write_text("{}")
    with pytest.raises(FedForwardError, match=r"run\.json says which rounds"):
        Releases(tmp_path / "deep" / "run.json")
