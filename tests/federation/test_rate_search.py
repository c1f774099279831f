"""Learning rates that are found: from what clients measure along the last update, in the ledger."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedforward.core.errors import MessageError
from fedforward.core.steps import Evaluation, Probe
from fedforward.directions import Distribution
from fedforward.federation import rate_search
from fedforward.federation.client import Client, Replica, along_update
from fedforward.federation.learning_rates import RateSettings
from fedforward.federation.ledger import Round
from fedforward.federation.rate_search import (
    GROWTH,
    LEAST_SHRINKAGE,
    SHRINKAGE,
    LineSearch,
    RateSearch,
    line_search,
)
from fedforward.federation.server import Server
from fedforward.messages.entry import Entry
from fedforward.messages.report import ClientResult, Report
from fedforward.messages.task import Task
from fedforward.methods.base import Method
from fedforward.methods.decomfl import DeComFL
from fedforward.methods.estimators import FZOO, OneSided, TwoPoint
from fedforward.methods.fedkseed import ACCUMULATOR_UNIT, FedKSeed, FedKSeedPro, Increments
from fedforward.methods.fedmezo import FedMeZO
from fedforward.methods.report_filters import build_filters
from fedforward.methods.zorba import ZorBA
from fedforward.models.quadratic import Quadratic
from tests.federation.test_participation import BLOCKS, SEED, Federation
from tests.federation.test_participation import D as SIZE
from tests.methods.test_quadratic import Constant

MU, STEPS = 1e-3, 4
TWO_POINT: dict[str, Any] = {"run_seed": SEED, "local_steps": STEPS, "estimator": TwoPoint(1, MU)}
METHODS: dict[str, Method] = {
    "fedmezo": FedMeZO(**TWO_POINT),
    "decomfl": DeComFL(**TWO_POINT),
    "zorba": ZorBA(**TWO_POINT),
    "fedkseed": FedKSeed(**TWO_POINT, candidates=512),
    "fedkseed-pro": FedKSeedPro(**TWO_POINT, candidates=512),
    "one-sided": FedMeZO(run_seed=SEED, local_steps=STEPS, estimator=OneSided(8, MU)),
    "fzoo": FedMeZO(run_seed=SEED, local_steps=STEPS, estimator=FZOO(8, MU)),
}
FIXED = RateSettings(1.0, 0.5, "fixed", "constant", 0, 100, 0.0)


class Examples(Quadratic):
    """A quadratic whose batches are several examples: float64 [examples, d], shifts of each."""

    def evaluate(self, probes: Sequence[Probe]) -> list[Evaluation]:
        results = []
        for probe in probes:
            single = [replace(probe, batch=shift) for shift in probe.batch]
            losses = np.concatenate([part.sums for part in super().evaluate(single)])
            results.append(Evaluation(losses, np.ones(len(losses), np.int64)))
        return results


class Searching(Federation):
    """A federation whose rates are found, on batches of a few examples."""

    def __init__(self, path: Path, method: Method, start: float = MU, **changes: Any) -> None:
        search = RateSearch(start, method.directions)
        super().__init__(path, method, **{"rates": FIXED, "search": search, **changes})

    def client(self, number: int) -> Client:
        distribution = self.settings.distribution
        model = Examples([2.0, 1.0, 1.0], SIZE, blocks=BLOCKS, distribution=distribution)
        replica = Replica(model, self.method)  # type: ignore[arg-type]
        shifts = 0.01 * np.random.default_rng(number).standard_normal((6, SIZE))
        return Client(number, Constant(shifts, 10 * number + 10), replica)

    def loss(self) -> float:
        """The mean over all clients at the state of the ledger."""
        self.settle()
        return float(
            np.mean(
                [
                    client.replica.model.evaluate([Probe(client.batches[0])])[0].mean
                    for client in self.clients
                ]
            )
        )


def method_is_cheap(name: str) -> bool:
    return METHODS[name].directions == 1


@pytest.mark.parametrize("name", list(METHODS))
def test_a_rate_is_found_from_a_start_that_is_too_small(tmp_path: Path, name: str) -> None:
    changes = {"distribution": Distribution.RADEMACHER} if name == "fzoo" else {}
    found = Searching(tmp_path / "l", METHODS[name], start=MU / 100, **changes)
    losses, rates = [found.loss()], []
    for _ in range(30 if method_is_cheap(name) else 16):
        found.round()
        losses.append(found.loss())
        rates.append(found.server.search.rate)
    assert losses[-1] < 0.25 * losses[0], losses
    assert max(losses) < 1.2 * losses[0], losses
    assert max(rates) > 50 * MU / 100, rates
    # A rate grows no faster than it may.
    assert all(after <= GROWTH * before * 1.000001 for before, after in pairwise(rates))
    assert len(set(found.settle())) == 1


@pytest.mark.parametrize("name", list(METHODS))
def test_an_update_that_raises_the_loss_is_taken_back(tmp_path: Path, name: str) -> None:
    method = METHODS[name]
    found = Searching(tmp_path / "l", method, start=3.0)
    found.settle()
    base = found.clients[0].replica.model.theta.clone()
    start = found.loss()
    found.round()
    rate = found.server.search.rate
    bad = found.loss()
    assert bad > 2 * start
    tasks = found.round()
    batches = 2 if method.directions == 8 else 1
    assert all(task.line_search == batches for task in tasks.values())
    first, second = found.server.ledger.entries()
    if isinstance(method, FedKSeed):
        places, amounts = Increments.decode(second)
        assert amounts.any() and (places == Increments.decode(first).places).all()
        assert (amounts == -Increments.decode(first).amounts).all()
    else:
        assert [part.age for part in second.contributions] == [1] * len(first.contributions)
        for before, after in zip(first.contributions, second.contributions, strict=True):
            assert before.client == after.client
            assert (after.coefficients == -before.coefficients).all()
            assert (before.blocks is None) == (after.blocks is None)
            assert before.blocks is None or (before.blocks == after.blocks).all()
        own = method.update(first, None).steps
        undone = method.update(second, None).steps
        assert (own.seeds == undone.seeds).all()
        assert (own.coefficients == -undone.coefficients).all()
        assert not method.round_steps(second).coefficients.any()
    assert found.loss() == pytest.approx(start, rel=1e-3)
    theta = found.clients[0].replica.model.theta
    if isinstance(method, FedKSeed):
        assert (theta == base).all(), "sums of increments are exact"
    assert np.allclose(theta.numpy(), base.numpy(), atol=1e-5)
    assert LEAST_SHRINKAGE * rate <= found.server.search.rate <= SHRINKAGE * rate
    assert found.server.search.applied == 0.0
    # There is no update to measure along, and the next one is of the lower rate.
    tasks = found.round()
    assert all(task.line_search == 0 for task in tasks.values())
    assert 0 < found.server.search.applied <= found.server.search.rate
    assert list(found.server.ledger.rounds())[2].results[0].report.line_search.size == 0


def test_rates_that_are_too_large_fall_until_the_loss_does(tmp_path: Path) -> None:
    found = Searching(tmp_path / "l", METHODS["fedmezo"], start=3.0)
    losses = [found.loss()]
    for _ in range(20):
        found.round()
        losses.append(found.loss())
    assert max(losses) > 1.5 * losses[0], "the start was too large"
    assert min(losses[-2:]) < 0.5 * losses[0], losses
    assert found.server.search.rate < 2.0
    assert any(part.age for entry in found.server.ledger.entries() for part in entry.contributions)


def test_decay_goes_on_where_an_update_is_taken_back(tmp_path: Path) -> None:
    from fedforward.federation.server_optimizer import ServerOptimizer

    optimizer = ServerOptimizer(0.5, 0.75)
    found = Searching(tmp_path / "l", METHODS["decomfl"], start=5.0, optimizer=optimizer)
    found.round()
    found.round()
    first, second = found.server.ledger.entries()
    assert [part.age for part in second.contributions] == [1]
    assert (second.contributions[0].coefficients == -first.contributions[0].coefficients).all()
    assert first.decay == second.decay == 0.75


@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.parametrize("start", [MU / 100, 3.0])
def test_a_server_that_was_killed_goes_on_with_the_same_bits(
    tmp_path: Path, name: str, start: float
) -> None:
    changes: dict[str, Any] = {"participation": 0.6}
    whole = Searching(tmp_path / "whole", METHODS[name], start=start, **changes)
    for _ in range(6):
        whole.round()
    killed = Searching(tmp_path / "killed", METHODS[name], start=start, **changes)
    for number in range(6):
        if number in (1, 2, 4):
            # In the middle of a round: some have reported.
            tasks = killed.server.open_round()
            asked = list(tasks)
            killed.server.receive(killed.answer(asked[0], tasks[asked[0]]))
            killed.server.ledger.close()
            killed.server = killed.opened()
            for client, replica in enumerate(client.replica for client in killed.clients):
                # Sites say what they hold when they come back.
                killed.server.enrol(client, killed.settings.examples[client], replica.rounds)
        killed.round()
    assert vars(killed.server.search) == vars(whole.server.search)
    assert [entry.encode() for entry in killed.server.ledger.entries()] == [
        entry.encode() for entry in whole.server.ledger.entries()
    ]
    for one, other in zip(whole.server.ledger.rounds(), killed.server.ledger.rounds(), strict=True):
        for before, after in zip(one.results, other.results, strict=True):
            # Whoever comes back may have to prove its state.
            plain = [replace(part.report, digest=b"").encode() for part in (before, after)]
            assert plain[0] == plain[1]
            assert before.learning_rate == after.learning_rate
    assert killed.settle() == whole.settle()


@pytest.mark.parametrize("name", list(METHODS))
def test_the_ledger_alone_rebuilds_the_state(tmp_path: Path, name: str) -> None:
    found = Searching(tmp_path / "l", METHODS[name], start=1.0)
    for _ in range(5):
        found.round()
    entries = list(found.server.ledger.entries())
    fresh = found.client(0).replica
    proofs = 0
    for record in found.server.ledger.rounds():
        for part in record.results:
            if part.report.digest:
                proofs += 1
                assert part.report.digest == fresh.digest()
        fresh.catch_up([record.entry])
        assert fresh.last_entry is not None and fresh.last_entry.round == record.entry.round
    assert proofs and len(entries) == 5
    assert {fresh.model.digest()} == set(found.settle())


def test_a_task_that_is_sent_again_asks_for_the_same(tmp_path: Path) -> None:
    found = Searching(tmp_path / "l", METHODS["fedmezo"])
    for number in range(4):
        tasks = found.server.open_round()
        batches = {Task.decode(task).line_search for task in tasks.values()}
        assert batches == {1 if number else 0}
        for client, task in tasks.items():
            again = found.server.task(client)
            assert Task.decode(again).line_search == Task.decode(task).line_search
            # The client has it done once already, as if its report was lost.
            first = found.answer(client, task)
            second = found.answer(client, again)
            assert first == second
            found.server.receive(second)
            assert {found.server._search_batches} == batches
        found.server.close_round()


def test_passes_along_the_update_are_a_fifth_of_a_round_at_most() -> None:
    """A fifth of its probes, to the nearest batch; and one batch where a round is shorter."""
    found = RateSearch(MU, 1)
    found.applied = 1.0
    for steps, directions in ((4, 8), (30, 2), (100, 2), (7, 4), (10, 3)):
        for estimator in (TwoPoint(directions, MU), OneSided(directions, MU)):
            method = FedMeZO(local_steps=steps, estimator=estimator)
            spent = steps * estimator.probes_per_step
            batches = Server._search_batches.fget(  # type: ignore[attr-defined]
                type("S", (), {"search": found, "method": method})
            )
            assert batches >= 1
            if spent >= 30:
                assert 3 * batches <= 0.2 * spent + 1.5, (steps, directions, batches)


# Clients that cannot measure.


def test_a_snapshot_brings_the_last_update_along(tmp_path: Path) -> None:
    """Who has the state from a snapshot measures as all others do: bits are the same."""
    method = FedMeZO(run_seed=SEED, local_steps=10, estimator=TwoPoint(1, MU))
    found = Searching(tmp_path / "l", method, state_bytes=4 * SIZE)
    for _ in range(3):
        found.round()
    found.clients[4].replica.reset()
    found.server.enrol(4, 50, 0)
    tasks = found.round()
    assert tasks[4].snapshot and [entry.round for entry in tasks[4].entries] == [2]
    record = list(found.server.ledger.rounds())[-1]
    assert [len(part.report.line_search) for part in record.results] == [4] * 5
    assert len(set(found.settle())) == 1


@pytest.mark.parametrize("name", ["fedkseed", "fedkseed-pro"])
def test_accumulators_bring_the_last_update_along(tmp_path: Path, name: str) -> None:
    method = replace(METHODS[name], candidates=8)
    found = Searching(tmp_path / "l", method, participation=0.4)
    brought = 0
    for number in range(12):
        tasks = found.round()
        brought += sum(bool(task.snapshot) for task in tasks.values())
        record = list(found.server.ledger.rounds())[-1]
        wanted = 4 if number and tasks[min(tasks)].line_search else 0
        assert {len(part.report.line_search) for part in record.results} == {wanted}
    assert brought
    assert len(set(found.settle())) == 1


def test_a_client_without_the_last_update_sends_none_and_the_round_closes(tmp_path: Path) -> None:
    found = Searching(tmp_path / "l", METHODS["fedmezo"])
    for _ in range(2):
        found.round()

    def round_without(unknowing: Sequence[int]) -> tuple[list[int], bool]:
        """The numbers of each report, and whether the rate has changed."""
        before = found.server.search.rate
        tasks = found.server.open_round()
        found.settle()
        for number, task in tasks.items():
            if number in unknowing:
                found.clients[number].replica.last_entry = None
            bare = replace(Task.decode(task), entries=()).encode()
            found.server.receive(found.answer(number, bare))
        results = found.server.close_round().results
        numbers = [len(part.report.line_search) for part in results]
        return numbers, found.server.search.rate != before

    assert round_without([1]) == ([4, 0, 4, 4, 4], True)
    assert round_without(range(5)) == ([0] * 5, False)
    assert len(set(found.settle())) == 1


def test_a_site_that_withholds_its_loss_withholds_the_others_too(tmp_path: Path) -> None:
    found = Searching(tmp_path / "l", METHODS["fedmezo"])
    found.clients[2].filters = build_filters(["withhold-loss"], "site.filters")
    for _ in range(3):
        found.round()
    for record in list(found.server.ledger.rounds())[1:]:
        assert [len(part.report.line_search) for part in record.results] == [4, 4, 0, 4, 4]
        assert math.isnan(record.results[2].report.loss)


# Reports that are refused.


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ([1.0, 1.0, 1.0], "3 numbers along the last update, which are 4"),
        ([1.0, 1.0, 1.0, 0.1, 0.1], "5 numbers along the last update, which are 4"),
        ([1.0, 1.0, 1.0, -0.1], "a standard error of -0.1 along the last update"),
    ],
)
def test_reports_with_other_numbers_are_refused(
    tmp_path: Path, numbers: list[float], words: str
) -> None:
    found = Searching(tmp_path / "l", METHODS["fedmezo"])
    found.round()
    tasks = found.server.open_round()
    honest = found.answer(0, tasks[0])
    lie = replace(Report.decode(honest), line_search=np.array(numbers, np.float32)).encode()
    with pytest.raises(MessageError, match=f"report of client 0 was refused: it has {words}"):
        found.server.receive(lie, 0)
    assert found.server.refused == 1
    found.server.receive(honest, 0)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_no_report(tmp_path: Path, number: float) -> None:
    found = Searching(tmp_path / "l", METHODS["fedmezo"])
    found.round()
    tasks = found.server.open_round()
    told = np.array([1.0, number, 1.0, 0.1], np.float32)
    report = replace(Report.decode(found.answer(0, tasks[0])), line_search=told)
    with pytest.raises(MessageError):
        found.server.receive(report.encode(), 0)


def test_what_was_not_asked_for_is_refused(tmp_path: Path) -> None:
    """In the first round there is no update to measure along; with a fixed rate there never is."""
    told = np.array([1.0, 1.0, 1.0, 0.1], np.float32)
    for name, changes in (("first", {}), ("fixed", {"search": None})):
        found = Searching(tmp_path / name, METHODS["fedmezo"], **changes)
        if name == "fixed":
            found.round()
        report = Report.decode(found.answer(0, found.server.open_round()[0]))
        with pytest.raises(MessageError, match="4 numbers along the last update, which were not"):
            found.server.receive(replace(report, line_search=told).encode(), 0)


# Numbers.


def evaluation(losses: Sequence[float], counts: Sequence[int]) -> Evaluation:
    return Evaluation(np.array(losses, np.float64), np.array(counts, np.int64))


def test_what_a_client_measures_is_a_mean_with_its_error() -> None:
    random = np.random.default_rng(3)
    counts = [[2, 5, 1], [3, 1]]
    points = [[random.uniform(1, 9, len(part)) for part in counts] for _ in range(3)]
    found = along_update(
        [[evaluation(*part) for part in zip(point, counts, strict=True)] for point in points]
    )
    assert found.dtype == np.float32 and found.shape == (4,)
    flat = [np.concatenate(point) for point in points]
    assert found[:3] == pytest.approx([sums.sum() / 12 for sums in flat], rel=1e-6)
    # Of the mean over tokens, examples counted as independent.
    rises = (flat[1] - flat[0]) * 5 / 12
    assert found[3] == pytest.approx(np.std(rises, ddof=1) / np.sqrt(5), rel=1e-6)


def test_a_single_example_says_nothing_of_chance() -> None:
    found = along_update([[evaluation([loss], [1])] for loss in (1.0, 3.0, 9.0)])
    assert found.tolist() == [1.0, 3.0, 9.0, 2.0]
    assert not search_of(found).has_risen


def search_of(*rows: Any, weights: Sequence[float] = ()) -> LineSearch:
    shares = weights or [1 / len(rows)] * len(rows)
    found = line_search([result(row, weight=w) for row, w in zip(rows, shares, strict=True)])
    assert found is not None
    return found


def result(row: Any, weight: float = 1.0, client: int = 0, gradient: float = 1.0) -> ClientResult:
    told = np.array(row, np.float32)
    report = Report(0, client, 1, 1.0, 0, np.full(2, gradient, np.float32), line_search=told)
    return ClientResult(weight, 1.0, report)


def test_clients_are_averaged_by_weight_and_errors_add_up() -> None:
    found = search_of([1.0, 2.0, 3.0, 0.3], [2.0, 2.0, 2.0, 0.4], weights=(0.25, 0.75))
    assert found.losses == pytest.approx([1.75, 2.0, 2.25])
    assert found.error == pytest.approx(math.hypot(0.25 * 0.3, 0.75 * 0.4))
    # Who has not measured does not count.
    found = search_of([1.0, 2.0, 3.0, 0.3], [], weights=(0.25, 0.75))
    assert found.losses == pytest.approx([1.0, 2.0, 3.0]) and found.error == pytest.approx(0.3)
    assert line_search([result([])]) is None


@pytest.mark.parametrize("examples", [1, 4])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_an_update_without_a_finite_loss_has_to_go(examples: int, broken: float) -> None:
    ones, wrong = [1.0] * examples, [broken] + [1.0] * (examples - 1)
    counts = [1] * examples
    after = [[evaluation(part, counts)] for part in (ones, wrong, wrong)]
    told = along_update(after)
    assert np.isfinite(told).all()
    assert search_of(told).has_risen
    # One client of many is enough.
    assert search_of(told, [1.0, 0.9, 0.8, 0.01], weights=(0.01, 0.99)).has_risen
    # Where the update before has broken it, taking back this one mends nothing.
    assert not search_of(
        along_update([[evaluation(part, counts)] for part in (wrong, wrong, wrong)])
    ).has_risen


def test_a_longer_update_without_a_finite_loss_stops_growth() -> None:
    found = RateSearch(1.0, 1)
    found.mean_square, found.applied = 1.0, 1.0
    calm, edge = result([3.0, 2.5, 2.1, 0.1]), result([3.0, 2.5, 3e38, 0.1])
    (rated,) = found.rated([calm], {0: 1.0})
    assert rated.learning_rate > 1.0
    (rated,) = found.rated([edge], {0: 1.0})
    assert rated.learning_rate <= 1.0


def test_the_rate_is_where_the_parabola_is_least() -> None:
    """Slopes and curvatures are those of f(t) = 2 - 3t + t², with its least value at 1.5."""
    found = LineSearch(np.array([2.0, 0.0, 0.0]), 0.0)
    assert found.slope == pytest.approx(3.0) and found.curvature == pytest.approx(2.0)
    search = RateSearch(0.1, 4)
    assert search.rate == pytest.approx(0.2), "as long as a probe's step"
    search.mean_square, search.applied = 4.0, search.rate
    (rated,) = search.rated([result([2.0, 0.0, 0.0, 0.1])], {0: 0.5})
    assert rated.learning_rate == pytest.approx(0.5 * 1.5 * 0.2 / 2.0)


def test_the_first_round_counts_at_its_own_gradients_size() -> None:
    search = RateSearch(0.1, 1)
    assert search.factor(1.0) == 0.0
    (rated,) = search.rated([result([], gradient=4.0)], {0: 1.0})
    assert rated.learning_rate == pytest.approx(0.1 / 4.0)
    # Where all are 0, nothing is known, and nothing moves.
    (rated,) = search.rated([result([], gradient=0.0)], {0: 1.0})
    assert rated.learning_rate == 0.0


def test_fedkseed_moves_along_its_increments() -> None:
    method = METHODS["fedkseed"]
    state = method.new_state()
    places, amounts = np.array([3, 5]), np.array([2**38, -(2**39)])
    entry = Entry(0, (), payload=Increments(places, amounts).encode())
    steps = method.round_steps(entry)
    assert steps.coefficients.tolist() == [2**38 * ACCUMULATOR_UNIT, -(2**39) * ACCUMULATOR_UNIT]
    method.update(entry, state)
    update = method.update(method.taken_back(1, entry), state)
    assert update.from_base and not len(update.steps.seeds), "nothing is left of it"


def test_single_examples_of_several_clients_say_what_chance_is() -> None:
    """Each takes its whole rise for chance; their spread tells that all have risen alike."""
    alike = [np.array([1.0, 1.0 + rise, 5.0, rise]) for rise in (0.9, 1.0, 1.1, 1.0)]
    found = search_of(*alike)
    rises = np.array([0.9, 1.0, 1.1, 1.0])
    wanted = rises.std(ddof=1) / np.sqrt(4) * (1 + 2 / 3)
    assert found.error == pytest.approx(wanted, rel=1e-6)
    assert found.has_risen
    # One of four has risen, which may be chance.
    single = [np.array([1.0, 1.0 + rise, 1.0, rise]) for rise in (0.0, 0.0, 2.0, 0.0)]
    assert not search_of(*single).has_risen
    # Three are too few to tell.
    assert search_of(*alike[:3]).error == pytest.approx(np.sqrt(np.sum(rises[:3] ** 2)) / 3)
    assert not search_of(*alike[:3]).has_risen


def test_what_clients_are_sure_of_is_not_made_less_sure() -> None:
    rows = [np.array([1.0, 1.0 + rise, 1.0, 0.1]) for rise in (-1.0, 1.0, 2.0, -1.5)]
    assert search_of(*rows).error == pytest.approx(0.05)


def measured(*losses: float, error: float = 0.01) -> LineSearch:
    return LineSearch(np.array(losses), error)


def test_a_loss_that_rises_in_a_line_says_nothing_of_the_length() -> None:
    line = measured(1.0, 1.1, 1.2)
    assert line.has_risen and line.bounds and not line.was_too_long
    assert measured(1.0, 1.1, 1.4).was_too_long
    assert measured(1.0, 0.98, 1.4).was_too_long
    assert not measured(1.0, 0.9, 1.0).was_too_long
    assert measured(1.0, 2e30, 2e30).was_too_long


def searched(
    noise: float,
    start: float,
    rounds: int,
    seed: int,
    schedule: Callable[[float], float] = lambda part: 1.0,
    floor: float = 0.0,
) -> list[float]:
    """Rates of a search over a parabola with slope 1 and curvature 10 that clients see noisily.

    The best rate is 0.1. `noise` is the standard error of a round's slope, and `floor` that of its
    losses, however short the step.
    """
    random, search, rates = np.random.default_rng(seed), RateSearch(start, 1), []
    for number in range(rounds):
        length, results = search.applied, []
        for client in range(4):
            slope = 1.0 + 2.0 * noise * random.standard_normal()
            losses = [1.0 - slope * u + 5.0 * u * u for u in (0.0, length, 2.0 * length)]
            losses = [loss + 2.0 * floor * random.standard_normal() for loss in losses]
            told = [*losses, abs(losses[1] - losses[0])] if length else []
            report = Report(number, client, 1, 1.0, 0, np.ones(1, np.float32))
            report = replace(report, line_search=np.array(told, np.float32))
            results.append(ClientResult(0.25, 0.0, report))
        rated = search.rated(results, dict.fromkeys(range(4), schedule(number / rounds)))
        search.observe(Round(Entry(number, ()), tuple(rated)))
        rates.append(search.rate)
    return rates


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("floor", [0.005, 0.02])
def test_short_steps_at_the_end_of_a_schedule_do_not_move_a_rate(floor: float, seed: int) -> None:
    """The noise of a loss, divided by a step's length, is no slope."""

    def cosine(part: float) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * part))

    rates = np.array(searched(1.0, 0.3, 600, seed, cosine, floor))[120:]
    assert rates.min() > 0.001 and rates.max() < 1.0, (rates.min(), rates.max())


@pytest.mark.parametrize("lie", [1e30, 50.0, -50.0])
@pytest.mark.parametrize("place", [1, 2])
def test_one_of_three_neither_stops_nor_drives_a_rate(lie: float, place: int) -> None:
    honest = [np.array([1.0 + n, 0.9 + n, 0.85 + n, 0.02]) for n in range(2)]
    liar = np.array([1.0, 0.9, 0.85, 0.02])
    liar[place] = lie
    found, without = search_of(*honest, liar), search_of(*honest)
    assert found.slope == without.slope and found.curvature == without.curvature
    assert found.error == without.error and not found.has_risen
    # Nor by saying that nothing is certain.
    found = search_of(*honest, np.array([1.0, 0.9, 0.85, 1e9]))
    assert found.error < 0.1 and found.has_fallen == without.has_fallen
    # Two of three are most.
    assert search_of(honest[0], liar, liar).slope != without.slope


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("start", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("noise", [0.3, 1.0, 3.0])
def test_chance_does_not_drive_a_rate_away(noise: float, start: float, seed: int) -> None:
    """Within a factor of the best rate, though a single round's slope may be three times wrong."""
    rates = np.array(searched(noise, start, 300, seed))[50:]
    typical = float(np.exp(np.log(rates).mean()))
    assert 0.015 < typical < 0.15, typical
    assert rates.max() < 0.4, rates.max()
    if noise < 1.0:
        assert 0.08 < typical < 0.12, typical


def test_a_rate_that_lies_drive_up_stays_finite() -> None:
    search = RateSearch(0.1, 1)
    search.mean_square = 1.0
    for number in range(700):
        search.applied = search.rate
        told = np.array([1.0, 0.5, 0.1, 0.0], np.float32)
        report = replace(Report(number, 0, 1, 1.0, 0, np.ones(1, np.float32)), line_search=told)
        search.observe(Round(Entry(number, ()), (ClientResult(1.0, search.rate, report),)))
    assert search.rate == rate_search.LARGEST_RATE


def test_no_rate_is_0_or_infinite_in_noise_alone() -> None:
    rates = searched(1000.0, 0.1, 300, 0)
    assert min(rates) > 1e-4 and max(rates) < 1e3


@pytest.mark.parametrize(
    ("losses", "error", "risen"),
    [
        # Four clients of one example each, local steps on directions that all share: as measured
        # on the demonstration's model, where the rises were 0.97, 0.35, 0.38 and 1.92.
        ((0.394, 1.288, 8.491), 0.541, True),
        ((0.381, 0.829, 7.121), 0.311, True),
        # Neither is far above what was there, or chance would explain it.
        ((0.394, 0.430, 8.491), 0.030, False),
        # The demonstration goes on from such a round, and is lower for it.
        ((0.228, 0.351, 1.429), 0.092, False),
        ((0.394, 1.288, 2.200), 0.541, False),
        ((0.394, 1.288, 8.491), 0.950, False),
    ],
)
def test_a_loss_that_leaps_is_taken_back(
    losses: tuple[float, ...], error: float, risen: bool
) -> None:
    assert LineSearch(np.array(losses), error).has_risen is risen
