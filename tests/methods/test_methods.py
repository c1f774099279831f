"""Every method against its equations on a quadratic, and every ledger against its live model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedforward.core.errors import FedForwardError, MessageError
from fedforward.core.seeds import SHARED, direction_seed
from fedforward.core.steps import NO_STEPS, Probe, Steps, Update
from fedforward.directions import Distribution, reference
from fedforward.federation.client import Replica
from fedforward.federation.ledger import Round
from fedforward.federation.server_optimizer import ServerOptimizer
from fedforward.messages.entry import Contribution, Entry
from fedforward.messages.report import ClientResult, Report
from fedforward.messages.task import Task
from fedforward.methods.aggregation import clipped_mean, median, trimmed_mean
from fedforward.methods.base import Method
from fedforward.methods.decomfl import DeComFL
from fedforward.methods.estimators import FZOO, TwoPoint
from fedforward.methods.fedavg import FedAvg
from fedforward.methods.fedkseed import (
    ACCUMULATOR_UNIT,
    FedKSeed,
    FedKSeedPro,
    Increments,
    KSeedState,
    candidate_seeds,
)
from fedforward.methods.fedmezo import FedMeZO
from fedforward.methods.parameters import check_parameters
from fedforward.methods.report_filters import build_filters
from fedforward.methods.zorba import ZorBA
from fedforward.models.quadratic import Quadratic

from .test_quadratic import Constant

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
    method: Method, model: Quadratic, client: int, number: int = 0, payload: bytes = b""
) -> Report:
    active = ACTIVE[client] if method.capabilities.blocks else None
    task = Task(number, client, RATE, False, (), blocks=active, payload=payload)
    generator = method.local_round(task, Constant(SHIFTS[client]))
    probes = next(generator)
    while True:
        try:
            probes = generator.send(model.evaluate(probes))
        except StopIteration as done:
            return done.value


def returned(method: Method, model: Quadratic, number: int = 0, payload: bytes = b"") -> list:
    return [
        ClientResult(
            WEIGHTS[client],
            RATE,
            report_of(method, model, client, number, payload),
            ACTIVE[client] if method.capabilities.blocks else None,
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
    model, method = quadratic(), DeComFL(run_seed=5, local_steps=STEPS, estimator=TwoPoint(1, MU))
    seeds = [direction_seed(5, 0, SHARED, step, 0) for step in range(STEPS)]
    expected = trajectories(model, [seeds] * 3, [np.ones(D)] * 3)
    reports = returned(method, model)
    for part, own in zip(reports, expected, strict=True):
        np.testing.assert_allclose(part.report.gradients, own, rtol=2e-4, atol=2e-5)
    theta = -RATE * sum(
        np.dot(WEIGHTS, [own[step] for own in expected]) * z(model, seed)
        for step, seed in enumerate(seeds)
    )
    entry = method.aggregate(0, reports, method.new_state())
    assert len(entry.contributions) == 1
    model.commit([method.update(entry, method.new_state())])
    np.testing.assert_allclose(model.theta.numpy(), theta, rtol=1e-3, atol=1e-6)


def test_zorba_averages_each_block_over_who_had_it() -> None:
    model, method = quadratic(), ZorBA(run_seed=5, local_steps=STEPS, estimator=TwoPoint(1, MU))
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
    entry = method.aggregate(0, reports, method.new_state())
    model.commit([method.update(entry, method.new_state())])
    np.testing.assert_allclose(model.theta.numpy(), theta, rtol=1e-3, atol=1e-6)
    assert not model.theta[3 * SIZE :].any(), "nobody had the last block"


def test_zorba_with_all_blocks_is_decomfl() -> None:
    models = [quadratic(), quadratic()]
    for model, kind in zip(models, (ZorBA, DeComFL), strict=True):
        method = kind(run_seed=5, local_steps=STEPS, estimator=TwoPoint(2, MU))
        parts = [
            ClientResult(
                w,
                RATE,
                report_of(
                    DeComFL(run_seed=5, local_steps=STEPS, estimator=TwoPoint(2, MU)), model, c
                ),
            )
            for c, w in enumerate(WEIGHTS)
        ]
        entry = method.aggregate(0, parts, method.new_state())
        model.commit([method.update(entry, method.new_state())])
    assert models[0].digest() == models[1].digest()


def test_blocks_of_an_absent_client_stay() -> None:
    """Only client 0 reports: blocks 2 and 3 get no update."""
    model, method = quadratic(), ZorBA(run_seed=5, local_steps=STEPS, estimator=TwoPoint(1, MU))
    entry = method.aggregate(0, returned(method, model)[:1], method.new_state())
    model.commit([method.update(entry, method.new_state())])
    assert model.theta[: 2 * SIZE].all() and not model.theta[2 * SIZE :].any()


def test_fedkseed_is_a_sum_over_candidates_from_the_base() -> None:
    model, method = (
        quadratic(),
        FedKSeed(run_seed=5, local_steps=STEPS, estimator=TwoPoint(1, MU), candidates=7),
    )
    replica = Replica(model, method)  # type: ignore[arg-type]
    pool = candidate_seeds(5, 7)
    exact = np.zeros(7)
    for number in range(6):
        drawn = [method.draw(number, client, b"") for client in range(3)]
        assert all(((places >= 0) & (places < 7)).all() for places in drawn)
        seeds = [[int(pool[place]) for place in places] for places in drawn]
        expected = trajectories(model, seeds, [np.ones(D)] * 3)
        parts = returned(method, model, number)
        for part, own in zip(parts, expected, strict=True):
            np.testing.assert_allclose(part.report.gradients, own, rtol=3e-4, atol=3e-5)
        for weight, places, part in zip(WEIGHTS, drawn, parts, strict=True):
            np.add.at(exact, places, -weight * RATE * part.report.gradients.astype(np.float64))
        replica.catch_up([method.aggregate(number, parts, method.new_state())])
    theta = sum(a * z(model, int(seed)) for a, seed in zip(exact, pool, strict=True))
    np.testing.assert_allclose(model.theta.numpy(), theta, rtol=1e-4, atol=1e-6)


def test_fedkseed_does_not_depend_on_the_order_of_rounds_in_a_sum() -> None:
    """One client commits round after round, another all at once from the accumulators."""
    method = FedKSeed(run_seed=5, local_steps=STEPS, estimator=TwoPoint(1, MU), candidates=5)
    live, late, third = (Replica(quadratic(), method) for _ in range(3))  # type: ignore[arg-type]
    entries = []
    for number in range(8):
        parts = returned(method, live.model, number)  # type: ignore[arg-type]
        entries.append(method.aggregate(number, parts, method.new_state()))
        live.catch_up(entries[-1:])
    late.catch_up(entries)
    assert late.model.digest() == live.model.digest()
    from fedforward.messages.snapshot import Snapshot

    third.restore(Snapshot(8, b"", b"", live.state.encode()))
    assert third.model.digest() == live.model.digest()
    assert third.rounds == 8
    with pytest.raises(MessageError, match=r"accumulators of 5 candidate seeds are 40"):
        Replica(quadratic(), method).restore(Snapshot(8, b"", b"", b"123"))  # type: ignore[arg-type]


def test_importance_prefers_candidates_with_large_gradients() -> None:
    method = FedKSeedPro(run_seed=5, local_steps=50, estimator=TwoPoint(1, MU), candidates=4)
    state = KSeedState(method)
    assert method.task_payload(state) == b"", "nothing is known yet"
    for number in range(3):
        places = method.draw(number, 0, method.task_payload(state))
        gradients = np.where(places == 2, 9.0, 0.5).astype(np.float32)
        result = ClientResult(1.0, RATE, Report(number, 0, 1, 1.0, 0, gradients))
        method.observe(method.aggregate(number, [result], state), [result], state)
    payload = method.task_payload(state)
    weights = np.frombuffer(payload, "<u2").astype(np.float64)
    assert weights.argmax() == 2 and weights.max() / weights.min() == pytest.approx(np.e, rel=1e-3)
    drawn = np.concatenate([method.draw(number, 1, payload) for number in range(40)])
    assert (drawn == 2).mean() == pytest.approx(weights[2] / weights.sum(), abs=0.04)
    for broken in (payload[:6], payload[:7], bytes(8)):
        with pytest.raises(MessageError, match="this run has 4 candidate seeds"):
            method.seeds(0, 0, broken)


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
        "fedmezo": FedMeZO(run_seed=1, local_steps=5, estimator=estimator),
        "decomfl": DeComFL(run_seed=1, local_steps=5, estimator=estimator),
        "zorba": ZorBA(run_seed=1, local_steps=5, estimator=estimator),
        "fedkseed": FedKSeed(run_seed=1, local_steps=5, estimator=estimator, candidates=512),
        "fedkseed-pro": FedKSeedPro(run_seed=1, local_steps=5, estimator=estimator, candidates=512),
    }[name]
    replica = Replica(model, method)  # type: ignore[arg-type]
    start = model.loss(np.zeros(400))
    # Here block 3 belongs to client 0 too.
    active = ACTIVE | np.array([[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]], np.bool_)
    state = method.new_state()
    for number in range(60):
        parts = []
        for client in range(3):
            mask = active[client] if method.capabilities.blocks else None
            payload = method.task_payload(state)
            task = Task(number, client, rate, False, (), blocks=mask, payload=payload)
            generator = method.local_round(task, Constant())
            probes = next(generator)
            while True:
                try:
                    probes = generator.send(model.evaluate(probes))
                except StopIteration as done:
                    parts.append(ClientResult(1 / 3, rate, done.value, mask))
                    break
        entry = method.aggregate(number, parts, state)
        method.observe(entry, parts, state)
        replica.catch_up([Entry.decode(entry.encode())])
    assert model.loss(model.theta.numpy().astype(np.float64)) < 0.2 * start


# What the server does to a round's steps.


def plain_round(number: int, value: float) -> Round:
    entry = Entry(number, (Contribution(0, np.full(2, value, np.float32)),))
    report = Report(number, 0, 1, 1.0, 0, np.full(2, value, np.float32))
    return Round(entry, (ClientResult(1.0, 0.1, report),))


def test_windowed_momentum_is_a_sum_of_old_steps() -> None:
    """θ_t = θ_{t-1} + Σ_{a<W} β^a Δ_{t-a}, on weights, against the recursion of the updates."""
    optimizer, beta, window = ServerOptimizer(0.5, 0.9, 0.5, 3), 0.5, 3
    model, history, updates = Quadratic([1.0], 50), [], []
    method = FedMeZO(run_seed=4, local_steps=2)
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
        history.append(Round(Entry.decode(entry.encode()), record.results))
        model.commit([method.update(history[-1].entry, method.new_state())])
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
        ClientResult(share, rate, Report(3, client, 1, 1.0, 0, own.astype(np.float32)), blocks)
        for client, (share, rate, own, blocks) in enumerate(
            zip(shares, rates, gradients, active, strict=True)
        )
    ]
    moves = -(shares * rates)[:, None] * gradients / 2
    estimator = TwoPoint(2, MU)
    zorba = ZorBA(run_seed=5, local_steps=2, estimator=estimator)
    update = zorba.update(zorba.aggregate(3, parts, None), None)
    for block in range(BLOCKS):
        on = active[:, block].astype(bool)
        steps = update.steps.block(block)
        found = dict(zip(steps.seeds.tolist(), steps.coefficients.tolist(), strict=True))
        wanted = moves[on].sum(axis=0) / shares[on].sum() if on.any() else np.zeros(4)
        for place in range(4):
            seed = direction_seed(5, 3, SHARED, *divmod(place, 2))
            assert found.pop(seed, 0.0) == pytest.approx(wanted[place], rel=1e-4, abs=1e-9)
        assert not found
    decomfl = DeComFL(run_seed=5, local_steps=2, estimator=estimator)
    mean = decomfl.aggregate(3, parts, None).contributions[0].coefficients
    np.testing.assert_allclose(mean, moves.sum(axis=0), rtol=1e-4, atol=1e-9)
    fedmezo = FedMeZO(run_seed=5, local_steps=2, estimator=estimator)
    own = fedmezo.aggregate(3, parts, None).contributions
    for part, wanted in zip(own, moves, strict=True):
        np.testing.assert_allclose(part.coefficients, wanted, rtol=1e-5, atol=1e-9)
    method = FedKSeed(run_seed=5, local_steps=2, estimator=estimator, candidates=6)
    increments = Increments.decode(method.aggregate(3, parts, method.new_state()))
    assert (np.diff(increments.places) > 0).all()
    assert increments.amounts.sum() * 2.0**-40 == pytest.approx(moves.sum(), abs=1e-10)
    # Whoever comes first: the order of reports is without effect.
    again = Increments.decode(method.aggregate(3, parts[::-1], method.new_state()))
    assert (again.amounts == increments.amounts).all()


def test_the_median_is_of_shared_directions_and_refused_elsewhere() -> None:
    gradients = np.array([[1.0, -2.0], [3.0, 0.5], [900.0, 0.25]], np.float32)
    results = [
        ClientResult(1 / 3, RATE, Report(0, c, 1, 1.0, 0, own)) for c, own in enumerate(gradients)
    ]
    method = DeComFL(local_steps=2, aggregator=median)
    found = method.aggregate(0, results, None).contributions[0].coefficients
    np.testing.assert_allclose(found, -RATE * np.median(gradients, axis=0), rtol=1e-6)
    for kind in (FedMeZO, FedKSeed, FedAvg):
        with pytest.raises(FedForwardError, match="multiply different directions"):
            kind(local_steps=2, aggregator=median)


def test_own_directions_are_clipped_to_the_median_length() -> None:
    gradients = np.array([[3.0, 4.0], [0.0, 1.0], [0.0, 500.0]], np.float32)
    results = [
        ClientResult(1 / 3, RATE, Report(0, c, 1, 1.0, 0, own)) for c, own in enumerate(gradients)
    ]
    entry = FedMeZO(local_steps=2, aggregator=clipped_mean).aggregate(0, results, None)
    found = [part.coefficients for part in entry.contributions]
    wanted = -RATE / 3 * np.array([[3.0, 4.0], [0.0, 1.0], [0.0, 7.5]])
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    with pytest.raises(FedForwardError, match="joins them in its own way"):
        FedAvg(local_steps=2, aggregator=clipped_mean)


def test_blocks_that_too_few_clients_have_do_not_move() -> None:
    """Of three blocks the first is on three clients, of which one may lie; the others on two."""
    shares = [[True, True, False], [True, False, True], [True, True, True]]
    results = [
        ClientResult(
            1 / 3,
            RATE,
            Report(0, c, 1, 1.0, 0, np.full(1, c + 1.0, np.float32)),
            np.array(blocks),
        )
        for c, blocks in enumerate(shares)
    ]
    entry = ZorBA(local_steps=1, aggregator=trimmed_mean).aggregate(0, results, None)
    (part,) = entry.contributions
    assert part.blocks is not None and part.blocks.tolist() == [True, False, False]
    np.testing.assert_allclose(part.coefficients, [-RATE * 2.0], rtol=1e-6)


def test_filters_change_what_leaves_and_nothing_else() -> None:
    report = Report(1, 2, 3, 0.5, 0, np.array([3.0, -0.1, -7.0], np.float32), bytes(16))
    clip, withhold = build_filters(["clip:0.5", "withhold-loss"], "method.report_filters")
    np.testing.assert_array_equal(clip(report).gradients, np.float32([0.5, -0.1, -0.5]))
    assert np.isnan(withhold(report).loss)
    assert (withhold(report).gradients == report.gradients).all()
    for names, match in ((["clip:0"], "above 0"), (["clip:x"], "clip:x"), (["clop"], "'clip'")):
        with pytest.raises(FedForwardError, match=match):
            build_filters(names, "method.report_filters")


def test_settings_of_a_method_are_checked_by_name() -> None:
    assert check_parameters(FedKSeed, {"candidates": 7}) == {"candidates": 7}
    for kind, typed, match in (
        (FedKSeed, {"candidats": 7}, r"Did you mean method\.candidates\?"),
        (FedKSeed, {"candidates": 0}, "a whole number, at least 1"),
        (FedKSeed, {"candidates": 1.5}, "a whole number"),
        (FedMeZO, {"candidates": 7}, "are none"),
        (FedAvg, {"optimizer": "adam"}, "one of 'sgd', 'adamw'"),
    ):
        with pytest.raises(FedForwardError, match=match):
            check_parameters(kind, typed)


def test_an_entry_of_another_method_is_refused() -> None:
    entry = Entry(0, (Contribution(0, np.ones(3, np.float32)),))
    for method in (FedMeZO(local_steps=2), FedKSeed(local_steps=2)):
        with pytest.raises(MessageError, match="Ledger round 0 was refused"):
            method.update(entry, method.new_state())
    seeds = FedKSeed(candidates=5)
    for payload in (
        b"",
        bytes(11),
        Increments(np.array([3, 1]), np.array([1, 1])).encode(),
        Increments(np.array([5]), np.array([1])).encode(),
    ):
        with pytest.raises(MessageError, match="refused"):
            seeds.update(Entry(0, (), payload=payload), seeds.new_state())


def test_fedkseed_clips_what_a_client_adds_to_its_candidates() -> None:
    """To 1.5 times the median length of the clients' sums, steps on one candidate added up."""
    settings = {"run_seed": 5, "local_steps": 2, "candidates": 1}
    gradients = np.array([[3.0, 4.0], [1.0, 0.0], [-500.0, 0.0]], np.float32)
    results = [
        ClientResult(0.25, 0.5, Report(0, c, 1, 1.0, 0, own)) for c, own in enumerate(gradients)
    ]
    lengths = np.array([7.0, 1.0, 500.0])
    plain, clipped = (
        Increments.decode(method.aggregate(0, results, method.new_state())).amounts
        for method in (FedKSeed(**settings), FedKSeed(**settings, aggregator=clipped_mean))
    )
    kept = np.minimum(1.0, 1.5 * np.median(lengths) / lengths) * [7.0, 1.0, -500.0]
    np.testing.assert_allclose(plain * ACCUMULATOR_UNIT, -0.125 * (7 + 1 - 500))
    np.testing.assert_allclose(clipped * ACCUMULATOR_UNIT, -0.125 * kept.sum())
    with pytest.raises(FedForwardError, match="multiply different"):
        FedKSeed(aggregator=median)
