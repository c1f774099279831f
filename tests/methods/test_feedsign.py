"""Votes of one bit: their bytes, the majority, and that liars move it by one vote each."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedforward.core.errors import FedForwardError, MessageError
from fedforward.core.seeds import SHARED
from fedforward.federation.client import Client, Replica
from fedforward.messages.entry import Entry
from fedforward.messages.report import NO_FLOATS, ClientResult, Report
from fedforward.messages.task import Task
from fedforward.methods.aggregation import median
from fedforward.methods.estimators import TwoPoint
from fedforward.methods.feedsign import FeedSign, pack_votes, unpack_votes
from fedforward.models.quadratic import Quadratic

from .test_quadratic import Constant

METHOD = FeedSign(run_seed=5, local_steps=11, estimator=TwoPoint(1, 1e-2))


def report(votes: np.ndarray, client: int = 0) -> Report:
    empty = Report(0, client, 9, 1.0, 0, NO_FLOATS)
    return METHOD.with_scalars(empty, np.asarray(votes, np.float32))


def closed(votes: np.ndarray, rates: list[float] | None = None) -> Entry:
    """The entry of clients with such votes, [clients, 11]; the first one weighs nearly all."""
    weights = [0.9, *[0.1 / (len(votes) - 1)] * (len(votes) - 1)]
    results = [
        ClientResult(weights[n], 0.5 if rates is None else rates[n], report(row, n))
        for n, row in enumerate(votes)
    ]
    return METHOD.aggregate(0, results, METHOD.new_state())


def coefficients(entry: Entry) -> list[float]:
    update = METHOD.update(Entry.decode(entry.encode()), METHOD.new_state())
    assert update.steps.seeds.tolist() == METHOD.seeds(0, SHARED).tolist()
    return update.steps.coefficients.ravel().tolist()


def test_a_scalar_is_a_bit_on_the_wire() -> None:
    votes = np.array([1, -1, -1, 1, 1, 1, -1, 1, -1, -1, 1])
    made = report(votes)
    assert len(made.payload) == 2 and not len(made.gradients)
    back = Report.decode(made.encode())
    assert METHOD.scalars(back).tolist() == votes.tolist()
    plain = Report(0, 0, 9, 1.0, 0, np.zeros(11, np.float32)).encode()
    assert len(made.encode()) == len(plain) - 4 * 11 + 2


def test_the_majority_decides_whatever_clients_weigh() -> None:
    random = np.random.default_rng(0)
    for clients in (3, 4, 10):
        votes = random.choice([-1.0, 1.0], (clients, 11))
        found = coefficients(closed(votes))
        assert found == (-0.5 * np.sign(votes.sum(axis=0))).tolist()
    even = np.array([[1.0] * 11, [-1.0] * 11])
    assert not any(coefficients(closed(even))), "nobody has a majority"
    assert coefficients(closed(np.ones((2, 11)), [0.25, 0.75])) == [-0.5] * 11


def test_an_update_is_the_same_whatever_size_two_liars_say() -> None:
    honest = np.ones((8, 11))
    lies = np.array([[-1.0] * 11, [-1e30] * 11])
    assert coefficients(closed(np.vstack([honest, lies]))) == [-0.5] * 11


def test_a_client_moves_by_its_votes() -> None:
    """The second step is measured where the first vote has led."""
    model = Quadratic([3.0, 2.0, 1.0, 1.0, 0.5], 40, blocks=4)
    method = FeedSign(run_seed=5, local_steps=2, estimator=TwoPoint(1, 1e-2))
    task = Task(0, 0, 0.25, False, ())
    rounds = method.local_round(task, Constant(np.zeros(40)))
    first = next(rounds)
    assert not any(len(probe.trajectory) for probe in first)
    evaluations = model.evaluate(first)
    vote = 1.0 if evaluations[0].mean >= evaluations[1].mean else -1.0
    second = rounds.send(evaluations)
    assert second[0].trajectory.coefficients.ravel().tolist() == [-0.25 * vote]
    with pytest.raises(StopIteration) as done:
        rounds.send(model.evaluate(second))
    method.check_report(done.value.value, 40)


@pytest.mark.parametrize(
    "payload", [b"", b"\x01", b"\x01\x08", b"\x01\x02\x03"], ids=["none", "few", "beyond", "many"]
)
def test_other_bytes_are_refused(payload: bytes) -> None:
    with pytest.raises(MessageError, match=r"client 0 was refused.*not 11 votes in 2 bytes"):
        METHOD.check_report(Report(0, 0, 9, 1.0, 0, NO_FLOATS, payload=payload), 1)
    with pytest.raises(MessageError, match="not 11 votes"):
        METHOD.check_report(Report(0, 0, 9, 1.0, 0, np.ones(1, np.float32), payload=b"aa"), 1)
    for wrong in (payload, b"\x00\x00\x80\x7f\x01\x01"):
        with pytest.raises(MessageError, match="no votes on 11 directions"):
            METHOD.update(Entry(0, (), payload=wrong), METHOD.new_state())


def test_bits_are_packed_from_the_lowest() -> None:
    assert pack_votes(np.array([1, -1, -1, -1, -1, -1, -1, -1, 1])) == b"\x01\x01"
    assert unpack_votes(b"\x01\x01", 9).tolist() == [1, *[-1] * 7, 1]


def test_no_rule_joins_votes() -> None:
    with pytest.raises(FedForwardError, match=r"aggregator = 'median' joins scalars.* majority"):
        FeedSign(aggregator=median)


def test_a_filter_changes_votes() -> None:
    """The signs that it leaves are sent; it is not passed by."""
    method = FeedSign(run_seed=5, local_steps=3, estimator=TwoPoint(1, 1e-2))
    sent = []
    for filters in ((), (lambda report: replace(report, gradients=-report.gradients),)):
        model: Any = Quadratic([3.0, 2.0, 1.0, 1.0, 0.5], 40, blocks=4)
        client = Client(0, Constant(np.zeros(40)), Replica(model, method), filters)
        rounds = client.answer(Task(0, 0, 0.25, False, ()).encode())
        probes = next(rounds)
        with pytest.raises(StopIteration) as done:
            while True:
                probes = rounds.send(model.evaluate(probes))
        report = Report.decode(done.value.value)
        method.check_report(report, 40)
        sent.append(method.scalars(report))
    assert np.array_equal(sent[1], -sent[0])
