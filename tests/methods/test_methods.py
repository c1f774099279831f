"""Every method against its equations on a quadratic, and every ledger against its live model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedforward.core.seeds import SHARED, direction_seed
from fedforward.core.steps import NO_STEPS, Probe, Steps, Update
from fedforward.directions import Distribution, reference
from fedforward.federation.client import Replica
from fedforward.federation.ledger import Origin, Round
from fedforward.federation.server_optimizer import ServerOptimizer
from fedforward.messages.codec import NO_ODDS, Contribution, Entry, MessageError, Report, Task
from fedforward.methods.base import Method, Returned
from fedforward.methods.decomfl import DeComFL
from fedforward.methods.estimators import FZOO, TwoPoint
from fedforward.methods.fedkseed import FedKSeed, candidate_seeds
from fedforward.methods.fedmezo import FedMeZO
from fedforward.methods.zorba import ZorBA
from fedforward.models.quadratic import Quadratic

from .test_quadratic import NO_STATE, Constant

BLOCKS, SIZE, MU, RATE, STEPS = 4, 30, 1e-2, 0.05, 3
D = BLOCKS * SIZE
#: Which of four blocks each of three clients has; block 3 belongs to nobody.
ACTIVE = np.array([[1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 1, 0]], np.bool_)
WEIGHTS = [0.5, 0.3, 0.2]
SHIFTS = [np.zeros(D), np.linspace(-0.1, 0.1, D), np.full(D, 0.05)]


def quadratic() -> Quadratic:
    return Quadratic([3.0, 2.0, 1.0, 1.0, 0.5], D, blocks=BLOCKS)


def z(model: Quadratic, seed: int) -> np.ndarray:
    """A whole direction, block after block, from the reference."""
    whole = reference.direction(
        seed, model.layout.tiles * 2048, distribution=model.distribution
    ).numpy()
    parts = [whole[2048 * tile : 2048 * tile + SIZE] for tile in model.layout.first_tiles]
    return np.concatenate(parts).astype(np.float64)


def report_of(
    method: Method, model: Quadratic, client: int, number: int = 0, odds: Any = NO_ODDS
) -> Report:
    task = Task(number, client, RATE, False, (), NO_STATE, odds=odds)
    active = ACTIVE[client] if method.by_block else None
    generator = method.local_round(task, Constant(SHIFTS[client]), active)
    probes = next(generator)
    while True:
        try:
            probes = generator.send(model.evaluate(probes))
        except StopIteration as done:
            return done.value


def returned(method: Method, model: Quadratic, number: int = 0, odds: Any = NO_ODDS) -> list:
    return [
        Returned(
            WEIGHTS[client],
            RATE,
            report_of(method, model, client, number, odds),
            ACTIVE[client] if method.by_block else None,
        )
        for client in range(3)
    ]


def trajectories(
    model: Quadratic, seeds: Sequence[Sequence[int]], masks: Sequence[np.ndarray]
) -> list[list[float]]:
    """Every client's projected gradients, computed in float64 from the definition."""
    found = []
    for client in range(3):
        local, own = model.theta.numpy().astype(np.float64), []
        for seed in seeds[client]:
            direction = z(model, seed) * masks[client]
            plus = model.loss(local + MU * direction, SHIFTS[client])
            minus = model.loss(local - MU * direction, SHIFTS[client])
            own.append((plus - minus) / (2 * MU))
            local = local - RATE * own[-1] * direction
        found.append(own)
    return found


def masks_of(active: np.ndarray) -> np.ndarray:
    return np.repeat(active, SIZE, axis=-1).astype(np.float64)


def test_decomfl_averages_one_scalar_per_direction() -> None:
    model, method = quadratic(), DeComFL(5, STEPS, TwoPoint(1, MU))
    seeds = [direction_seed(5, 0, SHARED, step, 0) for step in range(STEPS)]
    expected = trajectories(model, [seeds] * 3, [np.ones(D)] * 3)
    reports = returned(method, model)
    for part, own in zip(reports, expected, strict=True):
        np.testing.assert_allclose(part.report.gradients, own, rtol=2e-4, atol=2e-5)
    theta = -RATE * sum(
        np.dot(WEIGHTS, [own[step] for own in expected]) * z(model, seed)
        for step, seed in enumerate(seeds)
    )
    entry = method.aggregate(0, reports, NO_ODDS)
    assert len(entry.contributions) == 1
    model.commit([entry.update(5, 1, BLOCKS)])
    np.testing.assert_allclose(model.theta.numpy(), theta, rtol=1e-3, atol=1e-6)


def test_zorba_averages_each_block_over_who_had_it() -> None:
    model, method = quadratic(), ZorBA(5, STEPS, TwoPoint(1, MU))
    seeds = [direction_seed(5, 0, SHARED, step, 0) for step in range(STEPS)]
    expected = trajectories(model, [seeds] * 3, masks_of(ACTIVE))
    reports = returned(method, model)
    for part, own in zip(reports, expected, strict=True):
        np.testing.assert_allclose(part.report.gradients, own, rtol=2e-4, atol=2e-5)
    theta = np.zeros(D)
    for block in range(BLOCKS):
        part = slice(block * SIZE, (block + 1) * SIZE)
        share = np.array(WEIGHTS) * ACTIVE[:, block]
        if share.sum():
            for step, seed in enumerate(seeds):
                mean = np.dot(share, [own[step] for own in expected]) / share.sum()
                theta[part] -= RATE * mean * z(model, seed)[part]
    entry = method.aggregate(0, reports, NO_ODDS)
    model.commit([entry.update(5, 1, BLOCKS)])
    np.testing.assert_allclose(model.theta.numpy(), theta, rtol=1e-3, atol=1e-6)
    assert not model.theta[3 * SIZE :].any(), "nobody had the last block"


def test_zorba_with_all_blocks_is_decomfl() -> None:
    models = [quadratic(), quadratic()]
    for model, kind in zip(models, (ZorBA, DeComFL), strict=True):
        method = kind(5, STEPS, TwoPoint(2, MU))
        parts = [
            Returned(w, RATE, report_of(DeComFL(5, STEPS, TwoPoint(2, MU)), model, c))
            for c, w in enumerate(WEIGHTS)
        ]
        model.commit([method.aggregate(0, parts, NO_ODDS).update(5, 2, BLOCKS)])
    assert models[0].digest() == models[1].digest()


def test_blocks_of_an_absent_client_stay() -> None:
    """Only client 0 reports: blocks 2 and 3 get no update."""
    model, method = quadratic(), ZorBA(5, STEPS, TwoPoint(1, MU))
    entry = method.aggregate(0, returned(method, model)[:1], NO_ODDS)
    model.commit([entry.update(5, 1, BLOCKS)])
    assert model.theta[: 2 * SIZE].all() and not model.theta[2 * SIZE :].any()


def test_fedkseed_is_a_sum_over_candidates_from_the_base() -> None:
    model, method = quadratic(), FedKSeed(5, STEPS, TwoPoint(1, MU), pool=7)
    replica = Replica(model, 5, 1, method.candidates)  # type: ignore[arg-type]
    pool = candidate_seeds(5, 7)
    exact = np.zeros(7)
    for number in range(6):
        drawn = [method.places(number, client, NO_ODDS) for client in range(3)]
        assert all(((places >= 0) & (places < 7)).all() for places in drawn)
        seeds = [[int(pool[place]) for place in places] for places in drawn]
        expected = trajectories(model, seeds, [np.ones(D)] * 3)
        parts = returned(method, model, number)
        for part, own in zip(parts, expected, strict=True):
            np.testing.assert_allclose(part.report.gradients, own, rtol=3e-4, atol=3e-5)
        for weight, places, part in zip(WEIGHTS, drawn, parts, strict=True):
            np.add.at(exact, places, -weight * RATE * part.report.gradients.astype(np.float64))
        replica.catch_up([method.aggregate(number, parts, NO_ODDS)])
    theta = sum(a * z(model, int(seed)) for a, seed in zip(exact, pool, strict=True))
    np.testing.assert_allclose(model.theta.numpy(), theta, rtol=1e-4, atol=1e-6)


def test_fedkseed_does_not_depend_on_the_order_of_rounds_in_a_sum() -> None:
    """One client commits round after round, another all at once from the accumulators."""
    method = FedKSeed(5, STEPS, TwoPoint(1, MU), pool=5)
    live, late, third = (Replica(quadratic(), 5, 1, 5) for _ in range(3))  # type: ignore[arg-type]
    entries = []
    for number in range(8):
        parts = returned(method, live.model, number)  # type: ignore[arg-type]
        entries.append(method.aggregate(number, parts, NO_ODDS))
        live.catch_up(entries[-1:])
    late.catch_up(entries)
    assert late.model.digest() == live.model.digest()
    from fedforward.messages.codec import Snapshot

    values = live._accumulators.values.astype("<i8").tobytes()
    third.restore(Snapshot(8, b"", values))
    assert third.model.digest() == live.model.digest()
    assert third.rounds == 8
    with pytest.raises(MessageError, match=r"accumulators of 5 candidate seeds are 40"):
        Replica(quadratic(), 5, 1, 5).restore(Snapshot(8, b"", b"123"))  # type: ignore[arg-type]


def test_importance_prefers_candidates_with_large_gradients() -> None:
    method = FedKSeed(5, 50, TwoPoint(1, MU), pool=4, importance=True)
    tracker = method.tracker()
    assert len(tracker.odds()) == 0, "nothing is known yet"
    for number in range(3):
        places = method.places(number, 0, tracker.odds())
        gradients = np.where(places == 2, 9.0, 0.5).astype(np.float32)
        tracker.observe(number, [Report(number, 0, 1, 1.0, 0, gradients)])
    odds = tracker.odds()
    assert odds.argmax() == 2 and odds.max() / odds.min() == pytest.approx(np.e, rel=1e-3)
    drawn = np.concatenate([method.places(number, 1, odds) for number in range(40)])
    share = (drawn == 2).mean()
    assert share == pytest.approx(odds[2] / odds.sum(), abs=0.04)
    with pytest.raises(MessageError, match=r"odds of 3 candidate seeds .* this run has 4"):
        method.seeds(0, 0, odds[:3])


def test_fzoo_follows_its_equation() -> None:
    model, estimator = quadratic(), FZOO(4, MU)
    seeds = [11, 12, 13, 14]
    units = [Steps.of([seed], [1.0]) for seed in seeds]
    probes = estimator.probes(None, NO_STEPS, units)
    assert len(probes) == estimator.probes_per_step == 5
    gradients, loss = estimator.gradients(model.evaluate(probes))
    base = model.loss(np.zeros(D))
    losses = np.array([model.loss(MU * z(model, seed)) for seed in seeds])
    np.testing.assert_allclose(gradients, (losses - base) / losses.std(ddof=1), rtol=1e-3)
    assert loss == pytest.approx(np.mean([base, *losses]))
    same = model.evaluate([Probe(None)] * 5)
    assert not estimator.gradients(same)[0].any(), "equal losses say nothing"
    same[3].sums[0] = np.nan
    assert np.isnan(estimator.gradients(same)[0]).all()


@pytest.mark.parametrize(
    ("estimator", "distribution", "rate"),
    [(TwoPoint(4, 1e-3), Distribution.GAUSSIAN, 0.05), (FZOO(4, 1e-3), "rademacher", 4e-3)],
)
@pytest.mark.parametrize("name", ["fedmezo", "decomfl", "zorba", "fedkseed", "fedkseed-pro"])
def test_every_method_learns(name: str, estimator: Any, distribution: Any, rate: float) -> None:
    model = Quadratic([1.0] * 8, 400, blocks=BLOCKS, distribution=Distribution(distribution))
    method: Method = {
        "fedmezo": FedMeZO(1, 5, estimator),
        "decomfl": DeComFL(1, 5, estimator),
        "zorba": ZorBA(1, 5, estimator),
        "fedkseed": FedKSeed(1, 5, estimator, 512),
        "fedkseed-pro": FedKSeed(1, 5, estimator, 512, importance=True),
    }[name]
    replica = Replica(model, 1, 4, method.candidates)  # type: ignore[arg-type]
    start = model.loss(np.zeros(400))
    # Here block 3 belongs to client 0 too.
    active = ACTIVE | np.array([[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]], np.bool_)
    tracker = method.tracker()
    for number in range(60):
        parts = []
        for client in range(3):
            mask = active[client] if method.by_block else None
            task = Task(number, client, rate, False, (), NO_STATE, odds=tracker.odds())
            generator = method.local_round(task, Constant(), mask)
            probes = next(generator)
            while True:
                try:
                    probes = generator.send(model.evaluate(probes))
                except StopIteration as done:
                    parts.append(Returned(1 / 3, rate, done.value, mask))
                    break
        entry = method.aggregate(number, parts, tracker.odds())
        tracker.observe(number, [part.report for part in parts])
        replica.catch_up([Entry.decode(entry.encode())])
    assert model.loss(model.theta.numpy().astype(np.float64)) < 0.2 * start


# What the server does to a round's steps.


def plain_round(number: int, value: float) -> Round:
    entry = Entry(number, (Contribution(0, np.full(2, value, np.float32)),))
    report = Report(number, 0, 1, 1.0, 0, np.full(2, value, np.float32))
    return Round(entry, (Origin(0.1, 1.0, report),))


def test_windowed_momentum_is_a_sum_of_old_steps() -> None:
    """θ_t = θ_{t-1} + Σ_{a<W} β^a Δ_{t-a}, on weights, against the recursion of the updates."""
    optimizer, beta, window = ServerOptimizer(0.5, 0.9, 0.5, 3), 0.5, 3
    model, history, updates = Quadratic([1.0], 50), [], []
    theta = np.zeros(50)
    for number in range(6):
        record = plain_round(number, 0.1 * (number + 1))
        entry = optimizer.apply(record.entry, history)
        seeds = [direction_seed(4, number, 0, step, 0) for step in range(2)]
        updates.append(
            0.5
            * 0.1
            * (number + 1)
            * sum(
                reference.direction(seed, 50, distribution=Distribution.GAUSSIAN)
                .numpy()
                .astype(np.float64)
                for seed in seeds
            )
        )
        moved = sum(beta**age * updates[-1 - age] for age in range(min(window, len(updates))))
        theta = 0.9 * theta + moved
        history.append(Round(Entry.decode(entry.encode()), record.origins))
        model.commit([history[-1].entry.update(4, 1, 1)])
        np.testing.assert_allclose(model.theta.numpy(), theta, rtol=1e-5, atol=1e-6)


def test_the_normalised_step_follows_the_size_of_gradients() -> None:
    optimizer = ServerOptimizer(normalise=True, window=2)
    history = [plain_round(0, 2.0), plain_round(1, 4.0), plain_round(2, 6.0)]
    assert optimizer.rate_factor(None, []) == 1.0
    assert optimizer.rate_factor(history[0], history[:1]) == 1.0
    expected = 2.0 / np.sqrt((16.0 + 36.0) / 2)
    assert optimizer.rate_factor(history[0], history) == pytest.approx(expected)
    assert optimizer.rate_factor(plain_round(0, 0.0), [plain_round(0, 0.0)]) == 1.0
    assert ServerOptimizer().rate_factor(history[0], history) == 1.0


# Steps by block.

coefficients = st.lists(st.floats(-1, 1, width=32), min_size=BLOCKS * 3, max_size=BLOCKS * 3).map(
    lambda values: np.array(values, np.float32).reshape(BLOCKS, 3)
)


@given(coefficients, coefficients)
def test_steps_by_block_add_up(first: np.ndarray, second: np.ndarray) -> None:
    seeds = np.arange(3, dtype=np.uint64)
    a, b = Steps(seeds, first), Steps(seeds + np.uint64(9), second)
    both = a + b
    assert both[:3].starts_with(a) and both.starts_with(a) and both.starts_with(NO_STEPS)
    assert not a.starts_with(both)
    for block in range(BLOCKS):
        row = np.concatenate((first[block], second[block]))
        assert both.moves(block) == row.any()
        np.testing.assert_array_equal(both.block(block).coefficients, row[row != 0])
    flat = Steps.of([1], [0.5]) + a
    np.testing.assert_array_equal(flat.coefficients[:, 0], np.full(BLOCKS, 0.5))
    active = np.array([True, False, True, False])
    assert not a.within(active).moves(1)
    np.testing.assert_array_equal(a.within(active).coefficients[0], first[0])


def test_a_step_that_does_not_move_a_block_leaves_its_bits() -> None:
    model = quadratic()
    model.theta[0] = -0.0
    steps = Steps.of([3], [0.1]).within(np.array([False, True, False, False]))
    model.commit([Update(steps, 0)])
    assert np.signbit(model.theta.numpy()[0]), "adding 0 would have turned -0 into 0"
    assert model.theta[SIZE : 2 * SIZE].all() and not model.theta[2 * SIZE :].any()


# Aggregation, whatever is reported.

rounds = st.integers(1, 5).flatmap(
    lambda clients: st.tuples(
        st.lists(st.floats(0.05, 1.0), min_size=clients, max_size=clients),
        st.lists(st.floats(1e-6, 1e-1), min_size=clients, max_size=clients),
        st.lists(
            st.lists(st.booleans(), min_size=BLOCKS, max_size=BLOCKS).filter(any),
            min_size=clients,
            max_size=clients,
        ),
        st.lists(
            st.lists(st.floats(-50, 50, width=32), min_size=4, max_size=4),
            min_size=clients,
            max_size=clients,
        ),
    )
)


@given(rounds)
def test_aggregates_are_weighted_means_block_by_block(drawn: Any) -> None:
    """Against the definitions in float64; seeds of one entry are one stretch for each method."""
    weights, rates, active, gradients = (np.array(part) for part in drawn)
    shares = weights / weights.sum()
    parts = [
        Returned(share, rate, Report(3, client, 1, 1.0, 0, own.astype(np.float32)), blocks)
        for client, (share, rate, own, blocks) in enumerate(
            zip(shares, rates, gradients, active, strict=True)
        )
    ]
    moves = -(shares * rates)[:, None] * gradients / 2
    estimator = TwoPoint(2, MU)
    update = ZorBA(5, 2, estimator).aggregate(3, parts, NO_ODDS).update(5, 2, BLOCKS)
    for block in range(BLOCKS):
        on = active[:, block].astype(bool)
        steps = update.steps.block(block)
        found = dict(zip(steps.seeds.tolist(), steps.coefficients.tolist(), strict=True))
        wanted = moves[on].sum(axis=0) / shares[on].sum() if on.any() else np.zeros(4)
        for place in range(4):
            seed = direction_seed(5, 3, SHARED, *divmod(place, 2))
            assert found.pop(seed, 0.0) == pytest.approx(wanted[place], rel=1e-4, abs=1e-9)
        assert not found
    mean = DeComFL(5, 2, estimator).aggregate(3, parts, NO_ODDS).contributions[0].coefficients
    np.testing.assert_allclose(mean, moves.sum(axis=0), rtol=1e-4, atol=1e-9)
    own = FedMeZO(5, 2, estimator).aggregate(3, parts, NO_ODDS).contributions
    for part, wanted in zip(own, moves, strict=True):
        np.testing.assert_allclose(part.coefficients, wanted, rtol=1e-5, atol=1e-9)
    method = FedKSeed(5, 2, estimator, 6)
    increments = method.aggregate(3, parts, NO_ODDS).increments
    assert increments is not None and (np.diff(increments.places.astype(int)) > 0).all()
    assert increments.amounts.sum() * 2.0**-40 == pytest.approx(moves.sum(), abs=1e-10)
    # Whoever comes first: the order of reports is without effect.
    again = method.aggregate(3, parts[::-1], NO_ODDS).increments
    assert again is not None and (again.amounts == increments.amounts).all()
