"""Clients that miss rounds, come late, hold wrong states or lie: all with their own weights."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedforward.core.errors import FedForwardError, MessageError
from fedforward.core.steps import Steps, Update
from fedforward.directions import Distribution
from fedforward.federation.client import Client, Replica
from fedforward.federation.learning_rates import RateSettings
from fedforward.federation.ledger import Ledger, Round
from fedforward.federation.server import QuorumError, Server, ServerSettings
from fedforward.federation.server_optimizer import ServerOptimizer
from fedforward.messages.entry import Entry
from fedforward.messages.report import Report
from fedforward.messages.snapshot import Snapshot
from fedforward.messages.task import Task
from fedforward.methods.base import Method
from fedforward.methods.decomfl import DeComFL
from fedforward.methods.estimators import TwoPoint
from fedforward.methods.fedkseed import FedKSeed, FedKSeedPro
from fedforward.methods.fedmezo import FedMeZO
from fedforward.methods.feedsign import FeedSign
from fedforward.methods.zorba import ZorBA
from fedforward.models.quadratic import Quadratic
from fedforward.training.faults import Faults
from tests.methods.test_quadratic import Constant

BLOCKS, D, CLIENTS, STEPS, SEED = 4, 120, 5, 3, 9
ESTIMATOR = TwoPoint(1, 1e-3)
METHODS: dict[str, Method] = {
    "fedmezo": FedMeZO(run_seed=SEED, local_steps=STEPS, estimator=ESTIMATOR),
    "decomfl": DeComFL(run_seed=SEED, local_steps=STEPS, estimator=ESTIMATOR),
    "zorba": ZorBA(run_seed=SEED, local_steps=STEPS, estimator=ESTIMATOR),
    "feedsign": FeedSign(run_seed=SEED, local_steps=STEPS, estimator=ESTIMATOR),
    "fedkseed": FedKSeed(run_seed=SEED, local_steps=STEPS, estimator=ESTIMATOR, candidates=32),
    "fedkseed-pro": FedKSeedPro(
        run_seed=SEED, local_steps=STEPS, estimator=ESTIMATOR, candidates=32
    ),
}


def allocate(participants: Any) -> np.ndarray:
    """Client i does not perturb block i modulo 4."""
    rows = [np.arange(BLOCKS) != client % BLOCKS for client in participants]
    return np.array(rows, np.bool_)


class Federation:
    """A server and clients with a model each, on which anything may happen to messages."""

    def __init__(self, path: Path, method: Method, **changes: Any) -> None:
        self.method = method
        values: dict[str, Any] = {
            "run_seed": SEED,
            "examples": (10, 20, 30, 40, 50),
            "participation": 1.0,
            "weights": "examples",
            "rates": RateSettings(0.05, 0.02, "loss", "constant", 0, 100, 0.0),
            "layout": Quadratic([1.0], D, blocks=BLOCKS).layout,
            "distribution": Distribution.GAUSSIAN,
            "allocate": allocate if method.capabilities.blocks else None,
            "state_bytes": 4 * D,
        }
        self.settings = ServerSettings(**(values | changes))
        self.path = path
        self.server = self.opened()
        self.clients = [self.client(number) for number in range(CLIENTS)]
        self.bytes_down: dict[int, int] = {}

    def opened(self) -> Server:
        """A server from the ledger on disk."""
        there = self.path.is_file()
        ledger = Ledger(self.path) if there else Ledger.create(self.path, {})
        return Server(self.settings, self.method, ledger)

    def client(self, number: int) -> Client:
        model = Quadratic([2.0, 1.0, 1.0], D, blocks=BLOCKS)
        replica = Replica(model, self.method)  # type: ignore[arg-type]
        shift = 0.02 * number * np.ones(D)
        return Client(number, Constant(shift, 10 * number + 10), replica)

    def answer(self, number: int, task: bytes) -> bytes:
        client = self.clients[number]
        generator = client.answer(task)
        probes = next(generator)
        while True:
            try:
                probes = generator.send(client.replica.model.evaluate(probes))
            except StopIteration as done:
                return done.value

    def round(self, there: Any = None, gone: Any = (), change: Any = None) -> dict[int, Task]:
        giver = self.server.snapshot_wanted(there)
        if giver is not None:
            self.server.receive_snapshot(self.clients[giver].replica.snapshot().encode(), giver)
        tasks = self.server.open_round(there)
        for number, task in tasks.items():
            if number in gone:
                continue
            self.bytes_down[number] = len(task)
            data = self.answer(number, task)
            self.server.receive(change(number, data) if change else data)
        self.server.close_round()
        return {number: Task.decode(task) for number, task in tasks.items()}

    def settle(self) -> list[bytes]:
        """Every client's digest after it has committed what the ledger has."""
        for client in self.clients:
            client.replica.catch_up(list(self.server.ledger.entries(client.replica.rounds)))
        return [client.replica.model.digest() for client in self.clients]


@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.parametrize(
    "optimizer",
    [ServerOptimizer(), ServerOptimizer(0.9, 0.99, 0.5, 3, True)],
    ids=["plain", "momentum"],
)
def test_everyone_ends_with_the_same_bits(
    tmp_path: Path, name: str, optimizer: ServerOptimizer
) -> None:
    """Rounds missed, a late joiner, a restarted server: one state, and the ledger's replay."""
    if not METHODS[name].capabilities.contributions:
        optimizer = ServerOptimizer(normalise=optimizer.normalise, window=3)
    federation = Federation(tmp_path / "ledger", METHODS[name], optimizer=optimizer)
    early = [0, 1, 2, 3]
    for number in range(14):
        gone = {number % 4} if number % 3 == 0 else set()
        federation.round(early if number < 9 else None, gone)
        if number == 6:
            reopened = federation.opened()
            assert reopened.held == federation.server.held
            here, there = federation.server.open_round(early), reopened.open_round(early)
            assert here == there, "a restarted server asks the same of everyone"
            federation.server = reopened
    digests = federation.settle()
    assert len(set(digests)) == 1
    assert digests[0] != Quadratic([1.0], D, blocks=BLOCKS).digest()
    replayed = federation.client(0).replica
    replayed.catch_up(list(Ledger(tmp_path / "ledger").entries()))
    assert replayed.model.digest() == digests[0]


def test_a_late_client_is_sent_a_snapshot_where_that_is_less(tmp_path: Path) -> None:
    federation = Federation(tmp_path / "ledger", METHODS["fedmezo"])
    early = [0, 1, 2, 3]
    while federation.server.round < 12:
        federation.round(early)
    entry = federation.server.entry_bytes
    break_even = federation.server.break_even()
    assert break_even == -(-4 * D // entry) and 1 < break_even < 12
    tasks = federation.round()
    assert tasks[4].snapshot and len(tasks[4].entries) < 2
    assert all(not tasks[number].snapshot for number in early)
    assert all(task.digest_wanted for task in tasks.values()), "arriving is proven"
    assert len(set(federation.settle())) == 1
    # Two missed rounds are fewer bytes as entries.
    federation.round([0, 1, 2, 3])
    federation.round([0, 1, 2, 3])
    tasks = federation.round()
    assert not tasks[4].snapshot and len(tasks[4].entries) == 3
    assert len(set(federation.settle())) == 1


def test_accumulators_are_the_snapshot_of_fedkseed(tmp_path: Path) -> None:
    federation = Federation(tmp_path / "ledger", METHODS["fedkseed"])
    while federation.server.round < 9:
        federation.round([0, 1, 2, 3])
    assert federation.server.snapshot_wanted() is None, "no client is needed for it"
    tasks = federation.round()
    assert len(Snapshot.decode(tasks[4].snapshot).state) == 8 * 32
    assert federation.server.snapshot_bytes == 8 * 32
    assert len(set(federation.settle())) == 1


def test_a_forged_snapshot_is_refused(tmp_path: Path) -> None:
    replica = Federation(tmp_path / "ledger", METHODS["fedmezo"]).clients[0].replica
    good = replica.snapshot()
    with pytest.raises(MessageError, match="not what its digest says"):
        replica.restore(Snapshot(3, good.digest, bytes(4 * D - 1) + b"\x01"))
    assert replica.rounds == 0
    server = Federation(tmp_path / "other", METHODS["fedmezo"]).server
    for bad in (Snapshot(0, good.digest, b"short"), Snapshot(7, good.digest, good.data)):
        with pytest.raises(MessageError, match=r"the ledger has 0 rounds"):
            server.receive_snapshot(bad.encode(), 0)
    # One of rounds that were taken back, from a site that was asked before they were.
    for number in range(3):
        server.ledger.append(Round(Entry(number, ()), ()))
    server.go_back(1)
    for rounds in (2, 3):
        with pytest.raises(MessageError, match="the last of them was taken back"):
            server.receive_snapshot(Snapshot(rounds, good.digest, good.data).encode(), 0)
    server.receive_snapshot(Snapshot(1, good.digest, good.data).encode(), 0)
    assert server.snapshots.newest is not None
    # Without a digest nobody could prove it.
    unproven = Snapshot(3, b"", good.data)
    with pytest.raises(MessageError, match="not what its digest says"):
        replica.restore(unproven)
    with pytest.raises(MessageError, match="0 bytes of digest was refused: a client sends 32"):
        server.receive_snapshot(unproven.encode(), 0)


@pytest.mark.parametrize("snapshots", [False, True])
def test_a_client_with_another_state_starts_again_from_the_base(
    tmp_path: Path, snapshots: bool
) -> None:
    size = 4 * D if snapshots else 0
    federation = Federation(tmp_path / "ledger", METHODS["fedmezo"], state_bytes=size)
    while federation.server.round < 10:
        federation.round()
    # Client 2's weights were damaged; round 10 asks for proofs.
    federation.clients[2].replica.model.commit([Update(Steps.of([1], [0.1]), 0)])
    federation.round()
    assert federation.server.reset == {2}
    last = list(federation.server.ledger.rounds())[-1]
    assert [origin.report.client for origin in last.results] == [0, 1, 3, 4]
    assert sum(origin.weight for origin in last.results) == pytest.approx(1.0)
    tasks = federation.round()
    begin = Snapshot.decode(tasks[2].snapshot).rounds if snapshots else 0
    assert tasks[2].reset and begin == (10 if snapshots else 0)
    assert [entry.round for entry in tasks[2].entries] == list(range(begin, 11))
    assert federation.server.reset == set()
    assert len(set(federation.settle())) == 1


def test_a_quorum_is_needed_and_a_deadline_ends_the_waiting(tmp_path: Path) -> None:
    federation = Federation(tmp_path / "ledger", METHODS["zorba"], quorum=3, deadline=60.0)
    server = federation.server
    tasks = server.open_round()
    assert not server.ready(math.inf)
    for number in (0, 4):
        server.receive(federation.answer(number, tasks[number]))
    assert not server.ready(61.0), "two are below the quorum"
    with pytest.raises(QuorumError, match=r"2 of 5 clients .* the quorum is 3"):
        server.close_round()
    server.receive(federation.answer(1, tasks[1]))
    assert not server.ready(59.0) and server.ready(60.0)
    late = federation.answer(2, tasks[2])
    server.close_round()
    with pytest.raises(MessageError, match="round 1 is open"):
        server.receive(late)
    assert server.refused == 1


@pytest.mark.parametrize("name", list(METHODS))
def test_reports_from_an_older_round_change_nothing(tmp_path: Path, name: str) -> None:
    federation = Federation(tmp_path / "ledger", METHODS[name])
    first = federation.server.open_round()
    old = federation.answer(0, first[0])
    for number, task in first.items():
        federation.server.receive(federation.answer(number, task))
    federation.server.close_round()
    chain = federation.server.ledger.chain
    with pytest.raises(MessageError):
        federation.server.receive(old)
    assert federation.server.ledger.chain == chain


def test_blocks_of_another_model_are_refused(tmp_path: Path) -> None:
    federation = Federation(tmp_path / "ledger", METHODS["zorba"])
    task = Task.decode(federation.server.open_round()[0])
    from dataclasses import replace

    for count in (3, 9):
        other = np.arange(count) > 0
        with pytest.raises(MessageError, match=r"this model has 4 blocks"):
            federation.answer(0, replace(task, blocks=other).encode())


# What the simulation does to clients.


def test_faults_are_the_same_every_time() -> None:
    faults = Faults(3, dropout=0.3, straggler=0.2, byzantine=0.4, late_join=2, late_join_round=5)
    again = Faults(3, dropout=0.3, straggler=0.2, byzantine=0.4, late_join=2, late_join_round=5)
    choices = [(r, a, c) for r in range(40) for a in range(2) for c in range(10)]
    assert [faults.fails(*c) for c in choices] == [again.fails(*c) for c in choices]
    share = np.mean([faults.fails(*c) for c in choices])
    assert share == pytest.approx(0.3, abs=0.06)
    assert faults.available(3, 6) == [0, 1, 2, 3] and faults.available(4, 6) == list(range(6))
    report = Report(0, 0, 1, 1.0, 0, np.ones(2, np.float32), bytes(16))
    sent = {faults.sent(client, report.encode()) for client in range(60)}
    assert len(sent) == 4, "honest, wrong numbers, wrong state, cut short"


@pytest.mark.parametrize("name", ["fedmezo", "zorba", "fedkseed-pro"])
def test_a_run_with_faults_verifies(
    configure: Any, carry_out: Any, tmp_path: Path, name: str
) -> None:
    """Failing, slow, lying and late clients: the run ends, and replays bit for bit."""
    from fedforward.training.replay import verify

    settings = configure(
        method__name=name,
        **({"method__candidates": 50} if name == "fedkseed-pro" else {}),
        federation__clients=5,
        federation__rounds=12,
        federation__quorum=2,
        federation__deadline=1.0,
        method__local_steps=1,
        method__learning_rate=1e-5,
        simulation__dropout=0.3,
        simulation__straggler=0.2,
        simulation__byzantine=0.4,
        simulation__late_join=1,
        simulation__late_join_round=6,
        run__seed=5,
        run__evaluate_every=12,
    )
    summary = carry_out(settings, tmp_path / "run")
    assert summary["rounds"] == 12
    assert summary["absences"]["failed"] and summary["absences"]["late"]
    assert summary["absences"]["refused"]
    result = verify(tmp_path / "run")
    assert not result.differences and result.rounds == 12


def test_a_quorum_out_of_reach_is_a_sentence(
    configure: Any, carry_out: Any, tmp_path: Path
) -> None:
    settings = configure(simulation__dropout=0.9, federation__quorum=2, federation__rounds=20)
    with pytest.raises(FedForwardError, match=r"the quorum is 2"):
        carry_out(settings, tmp_path / "run")
