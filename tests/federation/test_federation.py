"""Messages, ledger, learning rates and server: scalars, bytes and refusals."""

import contextlib
import sqlite3
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedforward.core.errors import FedForwardError, MessageError
from fedforward.core.seeds import direction_seed
from fedforward.directions import TILE, Distribution, Layout, reference
from fedforward.federation import learning_rates
from fedforward.federation.client import Replica
from fedforward.federation.learning_rates import (
    RateSettings,
    normalized_scores,
    rates,
    update_differences,
)
from fedforward.federation.ledger import Ledger, Round
from fedforward.federation.server import Server, ServerSettings
from fedforward.messages.entry import Contribution, Entry
from fedforward.messages.report import ClientResult, Report
from fedforward.messages.snapshot import Snapshot
from fedforward.messages.task import Task
from fedforward.methods.estimators import TwoPoint
from fedforward.methods.fedmezo import FedMeZO
from fedforward.models.quadratic import Quadratic

LAYOUT = Layout.of({"a": (700,), "b": (50, 60)})


def report(client: int, gradients: Any, loss: float = 1.0, number: int = 0, **more: Any) -> Report:
    own = {"loss": loss, "skipped": 0, "gradients": np.array(gradients, np.float32), **more}
    return Report(number, client, 10, **own)


def record(number: int, losses: dict[int, float], rate: float = 0.1) -> Round:
    reports = [report(c, [float(c + 1), -0.5], loss, number) for c, loss in losses.items()]
    method = FedMeZO(run_seed=1, local_steps=2, estimator=TwoPoint(1, 1e-3))
    results = tuple(ClientResult(1 / len(reports), rate, r) for r in reports)
    return Round(method.aggregate(number, results, method.new_state()), results)


def rate_settings(**changes: Any) -> RateSettings:
    values: dict[str, Any] = {
        "base": 1.0,
        "spread": 0.5,
        "client_rates": "fixed",
        "schedule": "constant",
        "warmup": 0,
        "rounds": 10,
        "final": 0.0,
    }
    return RateSettings(**(values | changes))


def server(ledger: Ledger, **changes: Any) -> Server:
    values: dict[str, Any] = {
        "run_seed": 3,
        "examples": (10, 20, 30),
        "participation": 1.0,
        "weights": "equal",
        "rates": rate_settings(),
        "layout": LAYOUT,
        "distribution": Distribution.GAUSSIAN,
    }
    return Server(
        ServerSettings(**(values | changes)),
        FedMeZO(run_seed=3, local_steps=2, estimator=TwoPoint(1, 1e-3)),
        ledger,
    )


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger.create(tmp_path / "ledger.sqlite", {"run_seed": 3})


# Messages.

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
arrays = st.lists(floats, max_size=40).map(lambda values: np.array(values, np.float32))
active = st.none() | st.lists(st.booleans(), min_size=1, max_size=20).map(
    lambda values: np.array(values, np.bool_)
)
entries = st.builds(
    Entry,
    st.integers(0, 2**32 - 1),
    st.lists(
        st.builds(Contribution, st.integers(0, 2**32 - 1), arrays, active),
        max_size=4,
    ).map(tuple),
    floats,
    st.binary(max_size=40),
)


@given(entries)
def test_entries_survive_the_wire(entry: Entry) -> None:
    again = Entry.decode(entry.encode())
    assert again.encode() == entry.encode()
    assert [part.client for part in again.contributions] == [
        part.client for part in entry.contributions
    ]


@given(st.lists(entries, max_size=3).map(tuple), st.binary(max_size=9), st.booleans(), active)
def test_tasks_survive_the_wire(parts: Any, payload: bytes, wanted: bool, own: Any) -> None:
    task = Task(7, 2, 0.125, wanted, parts, blocks=own, payload=payload)
    again = Task.decode(task.encode())
    assert again.encode() == task.encode()
    assert (again.round, again.client, again.learning_rate) == (7, 2, 0.125)
    assert again.digest_wanted == wanted


@given(arrays, st.sampled_from([b"", bytes(16)]), st.binary(min_size=1, max_size=8))
def test_reports_survive_and_damage_is_refused(gradients: Any, digest: bytes, tail: bytes) -> None:
    data = report(1, gradients, digest=digest).encode()
    again = Report.decode(data)
    assert again.gradients.tobytes() == gradients.tobytes()
    assert again.digest == digest
    for broken in (data[:-1], data + tail, b"XX" + data[2:], data[:2] + b"\x09" + data[3:], b""):
        with pytest.raises(MessageError):
            Report.decode(broken)
    with pytest.raises(MessageError, match="kind"):
        Task.decode(data)


@settings(max_examples=300)
@given(st.binary(max_size=120))
def test_noise_is_never_more_than_refused(data: bytes) -> None:
    for kind in (Report, Task, Entry, Snapshot):
        for message in (data, struct.pack("<2sBB", b"FF", 2, 1) + data):
            with contextlib.suppress(MessageError):
                kind.decode(message)  # type: ignore[attr-defined]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(MessageError, match="finite"):
        Report.decode(report(0, [1.0, bad]).encode())


def test_an_upload_of_thirty_steps_is_at_most_200_bytes() -> None:
    assert len(report(0, np.ones(30), digest=bytes(16)).encode()) <= 200


# Ledger.


def test_the_ledger_remembers(ledger: Ledger) -> None:
    first, second = record(0, {0: 1.0, 2: 3.0}), record(1, {1: 2.0})
    ledger.append(first)
    before = ledger.chain
    ledger.append(second)
    ledger.close()
    again = Ledger(ledger.path)
    assert again.length == 2 and again.chain == ledger.chain != before
    assert [e.encode() for e in again.entries(1)] == [second.entry.encode()]
    (kept,) = again.rounds(1)
    assert kept.results[0].encode() == second.results[0].encode()
    assert again.header == {"run_seed": 3}


def test_the_ledger_cannot_be_rewritten(ledger: Ledger) -> None:
    ledger.append(record(0, {0: 1.0}))
    ledger.close()
    database = sqlite3.connect(ledger.path)
    again = "INSERT OR REPLACE INTO rounds SELECT * FROM rounds"
    for statement in ("UPDATE rounds SET chain = x'00'", "DELETE FROM rounds", again):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            database.execute(statement)
    database.close()
    with pytest.raises(ValueError, match="cannot follow"):
        Ledger(ledger.path).append(record(5, {0: 1.0}))


@pytest.mark.parametrize("column", ["entry", "origin", "chain"])
def test_a_changed_ledger_is_refused(ledger: Ledger, column: str) -> None:
    for number in range(3):
        ledger.append(record(number, {0: 1.0}))
    ledger.close()
    database = sqlite3.connect(ledger.path)
    database.execute("DROP TRIGGER rounds_kept")
    (value,) = database.execute(f"SELECT {column} FROM rounds WHERE round = 1").fetchone()
    changed = value[:-1] + bytes([value[-1] ^ 1])
    database.execute(f"UPDATE rounds SET {column} = ? WHERE round = 1", (changed,))
    database.commit()
    database.close()
    with pytest.raises(FedForwardError, match="round 1 does not follow"):
        Ledger(ledger.path)


def test_a_full_disk_loses_nothing(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.append(record(0, {0: 1.0}))
    ledger.close()
    connect = sqlite3.connect

    def limited(*where: Any, **options: Any) -> sqlite3.Connection:
        database = connect(*where, **options)
        database.execute("PRAGMA max_page_count = 1")
        return database

    with monkeypatch.context() as full:
        full.setattr(sqlite3, "connect", limited)
        ledger = Ledger(ledger.path)
    big = Round(Entry(1, (Contribution(0, np.ones(60_000, np.float32)),)), ())
    with pytest.raises(sqlite3.OperationalError, match="full"):
        ledger.append(big)
    assert ledger.length == 1
    ledger.close()
    again = Ledger(ledger.path)
    assert again.length == 1 and again.chain == ledger.chain
    again.append(record(1, {0: 1.0}))


# Learning rates.


def test_phi_is_the_papers() -> None:
    assert normalized_scores({0: 1.0, 1: 2.0, 2: 6.0}, [0, 1, 2]) == pytest.approx(
        {0: -2 / 3, 1: -1 / 3, 2: 1.0}
    )


def test_phi_of_equal_clients_and_of_absent_ones() -> None:
    assert normalized_scores({0: 2.0, 1: 2.0 + 1e-15}, [0, 1]) == {0: 0.0, 1: 0.0}
    assert normalized_scores({0: 1.0, 1: 3.0, 7: 100.0}, [0, 1, 2]) == {0: -1.0, 1: 1.0, 2: 0.0}
    assert normalized_scores({0: float("nan")}, [0, 1]) == {0: 0.0, 1: 0.0}
    assert normalized_scores({}, [4]) == {4: 0.0}


@given(
    st.dictionaries(st.integers(0, 20), st.floats(-1e6, 1e6), max_size=20),
    st.sets(st.integers(0, 20), min_size=1),
)
def test_phi_stays_within_one(scores: dict[int, float], participants: set[int]) -> None:
    result = normalized_scores(scores, sorted(participants))
    assert set(result) == participants
    assert all(-1.0 <= value <= 1.0 for value in result.values())


def differences(row: Round, layout: Layout, kind: Distribution, seed: int) -> dict[int, float]:
    method = FedMeZO(run_seed=seed, local_steps=2, estimator=TwoPoint(1, 1e-3))

    updates = {part.report.client: method.own_update(row.entry.round, part) for part in row.results}
    return update_differences(updates, [part.weight for part in row.results], layout, kind)


def all_rates(client_rates: str, history: list[Round], **changes: Any) -> dict[int, float]:
    return rates(
        rate_settings(client_rates=client_rates, **changes),
        len(history),
        [0, 1, 2],
        history,
        run_seed=1,
        differences=lambda: differences(history[-1], LAYOUT, Distribution.GAUSSIAN, 1),
    )


def test_the_strategies_look_where_they_should() -> None:
    history = [record(n, {0: 1.0, 1: 2.0, 2: 9.0}) for n in range(4)]
    history.append(record(4, {0: 9.0, 1: 8.0, 2: 7.0}))
    assert all_rates("fixed", history) == {0: 1.0, 1: 1.0, 2: 1.0}
    assert all_rates("loss", history) == pytest.approx({0: 1.5, 1: 1.0, 2: 0.5})
    means = np.array([13 / 5, 16 / 5, 43 / 5])
    expected = 1 + 0.5 * (means - means.mean()) / np.abs(means - means.mean()).max()
    window = all_rates("loss-window", history)
    np.testing.assert_allclose(list(window.values()), expected)
    for client_rates in ("loss", "loss-window", "update-difference"):
        assert set(all_rates(client_rates, []).values()) == {1.0}


def test_an_absent_client_gets_the_base_rate() -> None:
    history = [record(0, {0: 1.0, 1: 3.0})]
    assert all_rates("loss", history) == {0: 0.5, 1: 1.5, 2: 1.0}
    assert all_rates("update-difference", history)[2] == 1.0


def test_random_rates_are_in_range_and_repeatable() -> None:
    history = [record(0, {0: 1.0})]
    drawn = all_rates("random", history)
    assert drawn == all_rates("random", history)
    assert len(set(drawn.values())) == 3
    assert all(0.5 <= rate <= 1.5 for rate in drawn.values())
    assert drawn != all_rates("random", [*history, record(1, {0: 1.0})])


def test_the_schedule_scales_rate_and_spread() -> None:
    history = [record(n, {0: 1.0, 1: 3.0}) for n in range(5)]
    linear = all_rates("loss", history, schedule="linear")
    assert linear == {0: 0.25, 1: 0.75, 2: 0.5}
    assert rate_settings(schedule="cosine").factor(5) == pytest.approx(0.5)
    assert rate_settings(schedule="cosine", final=0.1).factor(10) == pytest.approx(0.1)
    assert rate_settings(warmup=4).factor(0) == 0.25


def test_update_differences_need_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the plain computation on whole vectors, over several chunks of tiles."""
    monkeypatch.setattr(learning_rates, "TILES_AT_ONCE", 1)
    layout = Layout.of({"a": (700,), "b": (2 * TILE + 5,)})
    row = record(4, {0: 1.0, 1: 1.0, 3: 1.0}, rate=0.2)
    vectors: dict[int, np.ndarray] = {}
    for origin in row.results:
        client = origin.report.client
        vectors[client] = np.zeros(layout.tiles * TILE)
        for step, g in enumerate(origin.report.gradients):
            seed = direction_seed(9, 4, client, step, 0)
            whole = reference.direction(
                seed, layout.tiles * TILE, distribution=Distribution.RADEMACHER
            )
            vectors[client] += -0.2 * float(g) * whole.numpy()
    mean = sum(vectors.values()) / 3
    parts = [slice(0, 700), slice(TILE, 3 * TILE + 5)]
    expected = {
        client: sum(np.linalg.norm((vector - mean)[part]) for part in parts)
        for client, vector in vectors.items()
    }
    found = differences(row, layout, Distribution.RADEMACHER, 9)
    assert found == pytest.approx(expected, rel=1e-5)


# Server.


def answer(data: bytes, gradients: Any = (1.0, 2.0), **more: Any) -> bytes:
    task = Task.decode(data)
    proof = {"digest": bytes(16)} if task.digest_wanted else {}
    return report(task.client, gradients, number=task.round, **(proof | more)).encode()


def test_a_round_weighs_by_examples_or_equally(ledger: Ledger, tmp_path: Path) -> None:
    for weights, expected in (("equal", [1 / 3] * 3), ("examples", [1 / 6, 2 / 6, 3 / 6])):
        book = Ledger.create(tmp_path / f"{weights}.sqlite", {})
        side = server(book, weights=weights)
        for task in side.open_round().values():
            side.receive(answer(task))
        row = side.close_round()
        found = [-part.coefficients[1] / 2.0 for part in row.entry.contributions]
        assert found == pytest.approx(expected)


def test_wrong_reports_are_refused(ledger: Ledger) -> None:
    side = server(ledger)
    tasks = side.open_round()
    side.receive(answer(tasks[0]))
    for data, match in (
        (answer(tasks[0]), "second report"),
        (answer(tasks[1], (1.0,)), "1 projected gradients, not 2"),
        (report(9, [1.0, 2.0]).encode(), "no task"),
        (report(1, [1.0, 2.0], number=4).encode(), "round 0 is open"),
        (answer(tasks[1], digest=b""), "lacks the digest"),
        (answer(tasks[1], skipped=2), "do not fit together"),
        (answer(tasks[1], skipped=3), "do not fit together"),
        (answer(tasks[1], payload=bytes(9)), "refused"),
    ):
        with pytest.raises(MessageError, match=match):
            side.receive(data)


def test_clients_that_disagree_are_named(ledger: Ledger) -> None:
    side = server(ledger)
    for client, task in side.open_round().items():
        side.receive(answer(task, digest=bytes([client]) * 16))
    with pytest.raises(
        MessageError, match=r"clients hold different tuned states .*: 0 \(0{32}\) and 1 \("
    ):
        side.close_round()
    assert ledger.length == 0


def test_an_absent_client_is_sent_just_what_it_lacks(ledger: Ledger) -> None:
    side = server(ledger, participation=0.34, examples=(10,) * 3)
    seen = {0: 0, 1: 0, 2: 0}
    for number in range(12):
        assert side.participants() == side.participants()
        for data in side.open_round().values():
            task = Task.decode(data)
            assert [e.round for e in task.entries] == list(range(seen[task.client], number))
            assert task.digest_wanted == (number % 10 == 0 or len(task.entries) > 1)
            seen[task.client] = number
            side.receive(answer(data))
        side.close_round()
    assert len(set(seen.values())) > 1
    reopened = server(ledger, participation=0.34, examples=(10,) * 3)
    assert reopened.held == side.held


def test_a_reopened_server_gives_the_same_rates(ledger: Ledger) -> None:
    side = server(ledger, rates=rate_settings(client_rates="loss-window"))
    for number in range(7):
        for client, task in side.open_round().items():
            side.receive(answer(task, loss=float(client * number)))
        side.close_round()
    again = server(ledger, rates=rate_settings(client_rates="loss-window"))
    rates_of = [Task.decode(t).learning_rate for t in side.open_round().values()]
    assert [Task.decode(t).learning_rate for t in again.open_round().values()] == rates_of
    assert len(set(rates_of)) > 1


def test_a_replica_refuses_a_gap() -> None:
    replica = Replica(Quadratic([1.0], 10), FedMeZO(local_steps=2))  # type: ignore[arg-type]
    part = (Contribution(0, np.ones(2, np.float32)),)
    replica.catch_up([Entry(0, part)])
    replica.catch_up([Entry(0, part), Entry(1, part)])
    assert replica.rounds == 2
    before = replica.model.digest()
    with pytest.raises(MessageError, match="missing"):
        replica.catch_up([Entry(2, part), Entry(4, part)])
    assert replica.rounds == 2 and replica.model.digest() == before


def test_the_server_side_needs_no_torch() -> None:
    code = (
        "import sys; import fedforward.federation.server, fedforward.federation.state_file, "
        "fedforward.methods.fedmezo; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
