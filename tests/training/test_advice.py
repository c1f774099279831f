"""What a run says when its loss surges or stays, or its memory grows; each is provoked here."""

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedforward.config.schema import Config
from fedforward.federation.ledger import Round
from fedforward.messages.entry import Contribution, Entry
from fedforward.messages.report import ClientResult, Report
from fedforward.planning.memory import growth
from fedforward.planning.memory.growth import GrowthWatch
from fedforward.training.advice import Adviser
from fedforward.training.run import Run
from tests.support.command_line import Outcome, command, write_config

Configure = Callable[..., Config]


def carried_out(folder: Path, *changes: str) -> Outcome:
    common = ["method.local_steps=4", "method.batch_size=4", "run.evaluate_every=2"]
    return command("run", write_config(folder), *common, *changes, "--out", folder / "run")


def test_a_rate_that_is_too_large_is_said_by_how_much(tmp_path: Path) -> None:
    shown = carried_out(tmp_path, "method.learning_rate=0.02", "federation.rounds=12")
    assert shown.error.count("has surged") == 1, shown
    assert "By its projected gradients method.learning_rate = 0.02 is at least" in shown.error
    assert "times too large: try " in shown.error
    assert "by round 12" in shown.error and "The run goes on" not in shown.error, "the last one"


def test_a_mu_that_is_too_large_is_said_by_how_much(
    configure: Configure, tmp_path: Path, caplog: Any
) -> None:
    changes = {"method__mu": 0.3, "method__learning_rate": 1e-9, "method__batch_size": 8}
    Run(configure(**changes, federation__rounds=4), tmp_path / "run").fit()
    told = [entry.message for entry in caplog.records if "at the probes" in entry.message]
    assert len(told) == 1
    assert "method.mu = 0.3 is about" in told[0] and "times too large: try 0.0" in told[0]


def test_a_loss_that_stays_is_said(tmp_path: Path) -> None:
    shown = carried_out(tmp_path, "method.learning_rate=1e-9", "federation.rounds=12")
    assert shown.error.count("has stayed within 0.2 %") == 1, shown
    assert "The steps are too short" in shown.error and "try" in shown.error.lower()
    assert "Try method.learning_rate = 1e-07 (it is 1e-09)" in shown.error
    assert "fedforward diagnose" in shown.error and "The run goes on." in shown.error


def test_a_usual_run_is_given_no_advice(tmp_path: Path) -> None:
    shown = carried_out(tmp_path, "method.learning_rate=1e-4", "federation.rounds=6")
    assert shown.code == 0 and "warning" not in shown.error, shown


def record(gradients: list[float], rate: float = 0.1) -> Round:
    report = Report(0, 0, 9, 1.0, 0, np.array(gradients, np.float32))
    entry = Entry(0, (Contribution(0, np.array([0.5], np.float32)),))
    return Round(entry, (ClientResult(1.0, rate, report),))


def line(number: int, training: float | None, heldout: float | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"round": number, "training_loss": training, "learning_rates": {0: 0.1}}
    return found if heldout is None else found | {"heldout_loss": heldout}


def test_by_how_much_is_the_parabolas(configure: Configure) -> None:
    """f(η) = -a η + b η² with a = g² = 4: a rise of 1.2 at η = 0.1 makes the best rate 0.0125."""
    adviser = Adviser(configure(method__learning_rate=0.1, method__batch_size=16))
    words = adviser.look([line(0, None, 2.0), line(1, 2.0, 3.2)], record([2.0]))
    assert "is at least 8 times too large: try 0.01," in words
    assert adviser.look([line(0, None, 2.0), line(1, 2.0, 9.0)], record([2.0])) == ""


def test_a_training_loss_that_surges(configure: Configure) -> None:
    adviser = Adviser(configure(method__learning_rate=0.1, method__batch_size=16))
    lines = [line(0, None, 2.0), line(1, 2.0)]
    assert adviser.look(lines, record([2.0])) == ""
    assert adviser.look([*lines, line(2, 2.4)], record([2.0])) == ""
    assert "training loss has surged from 2.000 to 2.600" in adviser.look(
        [*lines, line(2, 2.4), line(3, 2.6)], record([2.0])
    )


@pytest.mark.parametrize(
    "changes", [{"method__learning_rate": "auto"}, {"method__objective": "f1"}]
)
def test_rates_that_are_found_and_other_objectives(
    configure: Configure, changes: dict[str, Any]
) -> None:
    adviser = Adviser(configure(**changes))
    assert adviser.look([line(0, None, 2.0), line(1, 9.0, 9.0)], record([2.0])) == ""


def test_noise_is_told_from_short_steps(configure: Configure) -> None:
    adviser = Adviser(configure(method__learning_rate=0.1, method__local_steps=1))
    lines = [line(0, None, 2.0)]
    for number in range(1, 13):
        heldout = 2.0 if number % 4 == 0 else None
        lines.append(line(number, 2.0, heldout))
        words = adviser.look(lines, record([1.0]))
        assert ("noise takes it back" in words) is (number == 12)


@pytest.mark.parametrize(
    "changes",
    [
        {"method__name": "feedsign"},
        {"method__name": "decomfl", "federation__secure_sums": True},
        {"method__name": "fedavg"},
        {"method__estimator": "fzoo", "method__directions": 4},
        {"server__normalise": True},
    ],
)
def test_where_reports_have_no_sizes_nothing_is_said_of_them(
    configure: Configure, changes: dict[str, Any]
) -> None:
    few = {"method__learning_rate": 0.1, "method__local_steps": 1, "federation__clients": 4}
    adviser = Adviser(configure(**few, federation__weights="equal", **changes))
    lines = [line(n, None if n == 0 else 2.0, 2.0) for n in range(11)]
    words = [adviser.look(lines[: n + 1], record([])) for n in range(1, 11)][-1]
    assert "has stayed" in words and "nats" not in words and "noise" not in words
    assert "Raise method.learning_rate, 0.1 now" in words


def test_a_private_run_is_not_sent_to_a_rate_that_privacy_forbids(configure: Configure) -> None:
    changes = {
        "method__learning_rate": 0.1,
        "method__local_steps": 1,
        "method__batch_size": 2,
        "federation__weights": "equal",
        "privacy__clip": 1.0,
        "privacy__noise_multiplier": 1.0,
        "privacy__delta": 1e-3,
        "privacy__examples": 10,
    }
    adviser = Adviser(configure(**changes))
    words = adviser.look([line(0, None, 2.0), line(1, None, 3.2)], record([2.0]))
    assert "has surged" in words and "try 0.03. A shorter" in words
    # Projected gradients are mostly noise, and say nothing of how long steps are.
    assert "'auto'" not in words and "projected gradients method" not in words
    adviser = Adviser(configure(**changes))
    lines = [line(n, None, 2.0) for n in range(11)]
    words = [adviser.look(lines[: n + 1], record([0.01])) for n in range(1, 11)][-1]
    assert "has stayed" in words and "The noise of [privacy] may hide" in words
    assert "auto" not in words and "too short" not in words and "diagnose" not in words


def test_a_clients_large_numbers_do_not_overflow(configure: Configure) -> None:
    adviser = Adviser(configure(method__learning_rate=0.1, method__batch_size=16))
    with np.errstate(over="raise"):
        words = adviser.look([line(0, None, 2.0), line(1, 2.0, 3.2)], record([3e38]))
    assert "is at least 2 times too large" in words


def test_a_run_that_goes_on_says_nothing_of_rounds_that_it_has_not_seen(
    configure: Configure,
) -> None:
    adviser = Adviser(configure(method__learning_rate=0.1, method__local_steps=1))
    lines = [line(n, None if n == 0 else 2.0, 2.0) for n in range(11)]
    words = adviser.look(lines, record([0.01]))
    assert "has stayed" in words and "nats" not in words
    risen = [line(0, None, 1.0), *lines[1:], line(11, 2.0, 3.2)]
    adviser = Adviser(configure(method__learning_rate=0.1, method__local_steps=1))
    assert "The steps are too long: try 0.03" in adviser.look(risen, record([2.0]))


def test_memory_above_the_plan_says_what_grew(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(growth, "INTERVAL_S", 0.0)
    run = Run(configure(federation__rounds=3), tmp_path / "run")
    kept: list[torch.Tensor] = []
    plain = run.runtime.run_round

    def leaking() -> Any:
        kept.append(torch.zeros(20_000_000))
        return plain()

    monkeypatch.setattr(run.runtime, "run_round", leaking)
    run.fit()
    told = [entry.message for entry in caplog.records if "were planned" in entry.message]
    assert len(told) == 1
    # What rests when a commit begins is freed by the end of the next one.
    assert re.search(r"What grew: other tensors by (79|80)\.\d MB", told[0])
    assert told[0].startswith("After round 2 ")


def test_what_grew_most_decides_the_advice() -> None:
    sizes: Iterator[int] = iter([100, 100_000_100])
    sums: Iterator[int] = iter([0, 0, 90_000_000])
    times: Iterator[float] = iter([0.0, 1.0, 31.0, 62.0, 93.0])
    watch = GrowthWatch(
        lambda: {"sums of local steps": next(sums)},
        lambda: next(sizes),
        clock=lambda: next(times),
    )
    watch.begin(100)
    said = [watch.look(50_000_000, number) for number in range(1, 5)]
    assert [bool(words) for words in said] == [False, False, True, False]
    assert "sums of local steps by 90.0 MB, other tensors by 10.0 MB" in said[2]
    assert "about 150.0 MB" in said[2] and "Lower run.probes_per_call" in said[2]
    assert math.isclose(growth.SHARE, 0.1)
