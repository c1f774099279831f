"""Sums in fixed point: what they round, what they refuse, and how a simulated run keeps them."""

import json
import math
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedforward.core.errors import FedForwardError, MessageError
from fedforward.federation.ledger import Ledger
from fedforward.federation.ledger_head import Head, write_head
from fedforward.federation.secure_sums import (
    EXTRA,
    LIMIT,
    UNIT,
    check_total,
    is_bare,
    mean_gradients,
    mean_loss,
    part_of,
    skipped_steps,
    threshold_of,
)
from fedforward.messages.codec import Reader
from fedforward.messages.report import Report, decode_results
from fedforward.messages.secure import Total
from fedforward.training import replay
from tests.support.command_line import command, write_config
from tests.support.configurations import content, refusal
from tests.support.forgery import rechained

#: Clients prove their state in the first and the eleventh round.
ROUNDS = 12
SECURE = [
    "federation.secure_sums=true",
    "federation.weights=equal",
    "federation.clients=3",
    "method.name=decomfl",
    "method.learning_rate=1e-3",
]
finite = st.floats(-LIMIT, LIMIT, width=32)


def report(gradients: list[float], loss: float = 1.5, skipped: int = 0, client: int = 0) -> Report:
    return Report(3, client, 10, loss, skipped, np.array(gradients, np.float32))


def total_of(reports: list[Report]) -> Total:
    parts = [part_of(own).values for own in reports]
    return Total(len(parts), np.sum(parts, axis=0, dtype=np.uint64))


@given(st.lists(st.lists(finite, min_size=2, max_size=2), min_size=1, max_size=6))
def test_a_mean_is_exact_but_for_rounding_to_a_unit(gradients: list[list[float]]) -> None:
    total = total_of([report(own) for own in gradients])
    check_total(total, 1, 2)
    wanted = np.array(
        [math.fsum(column) / len(gradients) for column in zip(*gradients, strict=True)]
    )
    assert np.abs(mean_gradients(total) - wanted).max() <= UNIT / 2 + 1e-15 * LIMIT


def test_ties_go_to_even_and_signs_are_kept() -> None:
    values = part_of(report([UNIT / 2, 3 * UNIT / 2, -UNIT / 2, -3 * UNIT / 2, -1.0])).values
    assert values.view(np.int64)[:5].tolist() == [0, 2, 0, -2, -(2**36)]


def test_losses_and_skipped_steps_are_summed() -> None:
    total = total_of(
        [report([1.0], 1.0), report([2.0], math.nan, skipped=1), report([3.0], 2.0, skipped=1)]
    )
    assert mean_loss(total) == 1.5 and skipped_steps(total) == 2
    assert math.isnan(mean_loss(total_of([report([1.0], math.nan)])))


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (report([70_000.0]), "A projected gradient of round 4 is 70000"),
        (report([-np.inf]), "A projected gradient of round 4 is -inf"),
        (report([np.nan]), "A projected gradient of round 4 is nan"),
        (report([1.0], loss=1e6), r"The loss of round 4 is 1e\+06"),
    ],
)
def test_what_fixed_point_cannot_hold_is_a_sentence(own: Report, words: str) -> None:
    with pytest.raises(FedForwardError, match=words + ", and federation.secure_sums carries"):
        part_of(own)


def test_what_is_no_sum_is_refused() -> None:
    for own in (
        replace(report([1.0]), payload=b"x"),
        replace(report([1.0]), line_search=np.zeros(4, np.float32)),
    ):
        with pytest.raises(MessageError, match="cannot be summed"):
            part_of(own)


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("value", [-(2**63), 2**63 - 1, -(2**54)])
def test_a_sum_beyond_its_parts_is_refused(place: int, value: int) -> None:
    """Of one gradient, the loss, its count, and the skipped steps."""
    total = total_of([report([LIMIT], LIMIT, 2)] * 3)
    check_total(total, 2, 1)
    values = total.values.copy()
    values[place] = np.int64(value).view(np.uint64)
    with pytest.raises(MessageError, match="beyond what they may have"):
        check_total(replace(total, values=values), 2, 1)
    with pytest.raises(MessageError, match="this run has 5"):
        check_total(total, 2, 2)
    assert EXTRA == 3


def test_thresholds_are_more_than_two_thirds() -> None:
    for sites in range(3, 200):
        least = threshold_of(sites, 3)
        # Two groups that open different sums have more than a third in common.
        assert 2 * least - sites > sites / 3 and least <= sites
    assert threshold_of(3, 3) == 3 and threshold_of(3, 7) == 7


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method__name": "fedmezo"}, ["needs single reports; use 'decomfl'"]),
        ({"method__name": "zorba"}, ["needs single reports; use 'decomfl'"]),
        ({"method__name": "fedkseed"}, ["needs single reports; use 'decomfl'"]),
        ({"method__aggregator": "median"}, ["method.aggregator = 'median'", "use 'mean'"]),
        ({"method__aggregator": "clipped-mean"}, ["method.aggregator", "use 'mean'"]),
        ({"method__client_rates": "loss"}, ["method.client_rates = 'loss'", "use 'fixed'"]),
        ({"method__client_rates": "update-difference"}, ["client_rates", "use 'fixed'"]),
        ({"federation__weights": "examples"}, ["federation.weights = 'examples'", "'equal'"]),
        ({"federation__participation": 0.5}, ["federation.participation = 0.5", "use 1.0"]),
        ({"method__learning_rate": "auto"}, ["learning_rate = 'auto' reads", "such as 1e-3"]),
        ({"server__normalise": True}, ["server.normalise = true", "leave it out"]),
        ({"simulation__byzantine": 0.2}, ["simulation.byzantine = 0.2", "leave one"]),
        ({"federation__clients": 2}, ["secure_threshold = 3 to 1000 clients", "there are 2"]),
        ({"federation__clients": 1}, ["secure_threshold = 3 to 1000 clients", "there are 1"]),
        ({"federation__clients": 1001}, ["there are 1001"]),
        ({"federation__secure_threshold": 7}, ["secure_threshold = 7 to 1000", "there are 6"]),
        (
            {"simulation__attack": "trim", "simulation__attackers": [0]},
            ["simulation.attack = 'trim' changes single reports"],
        ),
        ({"federation__secure_threshold": 2}, ["federation.secure_threshold = 2"]),
    ],
)
def test_what_needs_single_reports_is_refused(change: dict[str, Any], words: list[str]) -> None:
    given_values: dict[str, Any] = {
        "federation__secure_sums": True,
        "federation__weights": "equal",
        "federation__clients": 6,
        "method__name": "decomfl",
        "method__learning_rate": 1e-3,
        **change,
    }
    found = refusal(content(**given_values))
    for part in words:
        assert part in found, found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("secure")
    config = write_config(folder, [])
    given_options = [f"federation.rounds={ROUNDS}", *SECURE, "server.momentum=0.5"]
    assert command("run", config, *given_options, "--out", folder / "run").code == 0
    return folder / "run"


class TestRun:
    def test_a_run_keeps_sums_and_verifies(self, run: Path, tmp_path: Path) -> None:
        ledger = Ledger(run / "ledger.sqlite", read_only=True)
        records = list(ledger.rounds())
        assert ledger.sums and len(records) == ROUNDS
        ledger.close()
        for record in records:
            assert record.total is not None and record.total.clients == 3
            assert all(is_bare(part.report) for part in record.results)
            assert mean_gradients(record.total).any()
        found = replay.verify(run)
        assert found.differences == [] and found.unchecked == []
        assert found.proofs >= 2
        assert command("export", run, "--out", tmp_path / "out").code == 0
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert lines[1]["training_loss"] == mean_loss(records[0].total)  # type: ignore[arg-type]

    def test_a_run_that_was_cut_goes_on(self, run: Path, tmp_path: Path) -> None:
        config = write_config(tmp_path)
        given_options = [*SECURE, "server.momentum=0.5"]
        out = ["--out", tmp_path / "run"]
        assert command("run", config, "federation.rounds=5", *given_options, *out).code == 0
        more = [f"federation.rounds={ROUNDS}", *given_options, *out, "--resume"]
        assert command("run", config, *more).code == 0
        chains = []
        for path in (run, tmp_path / "run"):
            ledger = Ledger(path / "ledger.sqlite", read_only=True)
            chains.append([entry.encode() for entry in ledger.entries()])
            ledger.close()
        assert chains[0] == chains[1]

    @pytest.mark.parametrize("change", ["total", "clients", "report", "range", "none"])
    def test_an_altered_round_is_named(self, run: Path, tmp_path: Path, change: str) -> None:
        copy = Path(shutil.copytree(run, tmp_path / "run"))
        spoil(copy / "ledger.sqlite", CHANGES[change])
        (copy / "metrics.jsonl").unlink()
        (copy / "summary.json").unlink()
        command("verify", copy).refused("ound 4")

    def test_clients_that_drop_out_are_not_in_the_sum(self, tmp_path: Path) -> None:
        config = write_config(tmp_path)
        given_options = [
            *SECURE,
            "federation.clients=4",
            "simulation.dropout=0.2",
            "federation.rounds=6",
        ]
        assert command("run", config, *given_options, "--out", tmp_path / "run").code == 0
        ledger = Ledger(tmp_path / "run" / "ledger.sqlite", read_only=True)
        counts = [(r.total.clients if r.total else 0, len(r.results)) for r in ledger.rounds()]
        ledger.close()
        assert {count for count, _ in counts} == {3, 4}
        assert all(count == results for count, results in counts)
        assert replay.verify(tmp_path / "run").differences == []


def spoil(path: Path, change: Callable[[Total, bytes], bytes]) -> None:
    """Round 4 with another origin, and chain and head that fit it."""
    database = sqlite3.connect(path)
    database.execute("DROP TRIGGER IF EXISTS rounds_kept")
    (origin,) = database.execute("SELECT origin FROM rounds WHERE round = 4").fetchone()
    reader = Reader(origin)
    total = Total.read(reader)
    changed = change(total, origin[reader.place :])
    database.execute("UPDATE rounds SET origin = ? WHERE round = 4", (changed,))
    length, chain = rechained(database)
    database.close()
    write_head(path, Head(length, chain))


def _with(total: Total, place: int, more: int) -> Total:
    values = total.values.copy()
    values[place] += np.uint64(more)
    return replace(total, values=values)


def _with_a_gradient(rest: bytes) -> bytes:
    first, *others = decode_results(rest)
    own = replace(first.report, gradients=np.ones(1, np.float32))
    return b"".join(part.encode() for part in (replace(first, report=own), *others))


CHANGES: dict[str, Callable[[Total, bytes], bytes]] = {
    "total": lambda total, rest: _with(total, 0, 2**30).encode() + rest,
    "clients": lambda total, rest: replace(total, clients=2).encode() + rest,
    "report": lambda total, rest: total.encode() + _with_a_gradient(rest),
    "range": lambda total, rest: _with(total, 1, 2**62).encode() + rest,
    "none": lambda total, rest: rest,
}
