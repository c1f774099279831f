"""Secure sums across machines: their bits, who vanishes when, and what the server can see."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedforward.core.errors import FedForwardError
from fedforward.deployment.secure.party import SumParty
from fedforward.deployment.transport import Reply
from fedforward.federation.agreement import QuorumError
from fedforward.federation.ledger import Ledger, Round
from fedforward.federation.secure_sums import is_bare, mean_gradients
from fedforward.messages.envelope import Envelope, MessageKind
from fedforward.messages.refusal import Refusal, RefusalCode
from fedforward.messages.secure import MaskedReport, SumOpening
from fedforward.messages.task import Task
from tests.deployment.test_coordinator_bits import simulated
from tests.support.coordinator import ALL, KilledError, World, configured, rounds

SECURE: dict[str, Any] = {
    "method__name": "decomfl",
    "federation__secure_sums": True,
    "federation__weights": "equal",
}
STEPS = (
    MessageKind.SUM_START,
    MessageKind.SUM_ROSTER,
    MessageKind.SUM_TASK,
    MessageKind.SUM_OPENING,
)


@pytest.fixture
def plain(monkeypatch: Any) -> dict[tuple[int, int], np.ndarray]:
    """What sites were to send before they masked it, by round and client."""
    found: dict[tuple[int, int], np.ndarray] = {}
    mask = SumParty.mask

    def noted(self: SumParty, request: Any, part: MaskedReport) -> MaskedReport:
        old = found.setdefault((part.round, part.client), part.values)
        assert (old == part.values).all(), "one report a round"
        return mask(self, request, part)

    monkeypatch.setattr(SumParty, "mask", noted)
    return found


def records(found: World) -> list[Round]:
    ledger = Ledger(found.out / "ledger.sqlite")
    kept = list(ledger.rounds())
    ledger.close()
    return kept


def check_sums(found: World, plain: dict[tuple[int, int], np.ndarray]) -> None:
    """Every round is of the sum of its clients' own numbers, and of nothing else."""
    for record in records(found):
        assert record.total is not None
        clients = [part.report.client for part in record.results]
        assert record.total.clients == len(clients) >= 3
        own = [plain[record.entry.round, client] for client in clients]
        assert (np.sum(own, axis=0, dtype=np.uint64) == record.total.values).all()
        assert all(is_bare(part.report) for part in record.results)
        (step,) = record.entry.contributions
        rate = record.results[0].learning_rate
        wanted = (-rate * mean_gradients(record.total)).astype(np.float32)
        assert (step.coefficients == wanted).all() and step.coefficients.any()


def round_of(found: World, kind: MessageKind) -> bool:
    return kind in STEPS and found.round == 2


def test_sites_and_simulation_have_the_same_bits(tmp_path: Path) -> None:
    changes = {"federation__rounds": 4, "method__local_steps": 2, "server__momentum": 0.5}
    config = configured(**SECURE, **changes, method__directions=2)
    federation = World(tmp_path / "sites", config)
    summary = federation.run()
    settings = [site.settings for site in federation.inside.values()]
    ledger, digest = simulated(config, settings, tmp_path / "ledger", 1)
    assert federation.ledger == ledger and len(ledger) == 4
    assert summary["state_digest"] == digest
    # Beside none, only what fixed point rounds.
    without = configured(
        **{**SECURE, "federation__secure_sums": False}, **changes, method__directions=2
    )
    simulated(without, settings, tmp_path / "plain", 1)
    both = []
    for path in (tmp_path / "ledger", tmp_path / "plain"):
        kept = Ledger(path)
        first = next(kept.entries()).contributions[0].coefficients
        both.append(first.astype(np.float64))
        kept.close()
    assert np.abs(both[0] - both[1]).max() <= 2e-7 * np.abs(both[1]).max() + 1e-3 * 2.0**-36
    assert len(first) == 4 and first.all()


def test_a_whole_run(world: Any, plain: Any) -> None:
    found = world(**SECURE)
    summary = found.run()
    check_sums(found, plain)
    assert found.clients() == [ALL] * 5
    assert set(found.digests().values()) == {summary["state_digest"]}
    # What the lines say is of sums as well.
    for line, record in zip(found.lines[1:], records(found), strict=True):
        losses = [int(plain[record.entry.round, c][-3]) * 2.0**-36 for c in ALL]
        assert line["training_loss"] == pytest.approx(sum(losses) / 3, rel=1e-9)
        assert line["skipped_steps"] == 0 and "zero_gradients" not in line
    assert not {MessageKind.REPORT} & set(found.transport.kinds("a"))


def test_no_report_of_a_single_site_reaches_the_server(world: Any, plain: Any) -> None:
    """Of all that leaves a site, nothing has its gradients or its loss."""
    found = world(**SECURE)
    found.run()
    for number, name in enumerate("abc"):
        view = b"".join(body for who, _, body in found.transport.answers if who == name)
        for (_, client), values in plain.items():
            if client == number:
                floats = (values[:-2].view(np.int64) * 2.0**-36).astype("<f4")
                for own in [*floats, *values[:-2]]:
                    assert own.tobytes() not in view


@pytest.mark.parametrize("step", STEPS, ids=[step.name for step in STEPS])
@pytest.mark.parametrize("how", ["refuses", "vanishes", "starts again", "noise"])
def test_a_site_that_fails_in_a_step(world: Any, plain: Any, step: MessageKind, how: str) -> None:
    found = world(names="abcd", federation__clients=4, **SECURE)
    began: list[float] = []

    def away() -> list[str]:
        return ["d"] if how == "vanishes" and began and found.round == 2 else []

    def hook(name: str, message: Envelope, answer: Any) -> bytes | Reply:
        if name == "d" and message.kind is step and found.round == 2:
            began.append(found.clock.now)
            if how == "refuses":
                refusal = Refusal(RefusalCode.MEMORY)
                return Envelope(MessageKind.REFUSAL, message.run, refusal.encode()).encode()
            if how == "noise":
                decoded = Envelope.decode(bytes(answer()))
                return Envelope(decoded.kind, decoded.run, decoded.body[:-1] + b"?").encode()
            if how == "vanishes":
                return Reply(name, error="the connection was lost")
            if len(began) == 1:
                found.restart("d")
        return bytes(answer())

    found.transport.hook, found.transport.away = hook, away
    summary = found.run()
    assert began, "the step was reached"
    check_sums(found, plain)
    kept = found.clients()
    assert len(kept) == 5 and all(set(ALL) <= set(clients) for clients in kept)
    full = [clients == [*ALL, 3] for clients in kept]
    if step is MessageKind.SUM_OPENING:
        assert full[2], "its report was in the sum already"
    elif how in ("refuses", "vanishes"):
        assert not full[2]
    assert full[0] and full[1]
    assert set(found.digests().values()) == {summary["state_digest"]}


def test_a_report_that_comes_late_is_dropped(world: Any, plain: Any) -> None:
    found = world(names="abcd", federation__clients=4, federation__deadline=20.0, **SECURE)

    def hook(name: str, message: Envelope, answer: Any) -> bytes | None:
        if message.kind is MessageKind.SUM_TASK and found.round == 2 and name == "d":
            found.transport.later(name, answer(), lambda: found.round == 3)
            return None
        return bytes(answer())

    found.transport.hook = hook
    summary = found.run()
    check_sums(found, plain)
    assert found.clients()[2] == ALL and found.clients()[4] == [*ALL, 3]
    assert found.lines[3]["clients"]["reported"] == 3
    assert set(found.digests().values()) == {summary["state_digest"]}


def test_a_report_that_comes_while_the_sum_is_opened_is_dropped(world: Any, plain: Any) -> None:
    found = world(names="abcd", federation__clients=4, federation__deadline=20.0, **SECURE)
    opening: list[int] = []

    def hook(name: str, message: Envelope, answer: Any) -> bytes | None:
        if found.round == 2 and name == "d" and message.kind is MessageKind.SUM_TASK:
            found.transport.later(name, answer(), lambda: bool(opening))
            return None
        if found.round == 2 and message.kind is MessageKind.SUM_OPENING:
            opening.append(len(SumOpening.decode(message.body).summed))
            begun = found.clock.now
            found.transport.later(name, answer(), lambda: found.clock.now > begun + 2)
            return None
        return bytes(answer())

    found.transport.hook = hook
    found.run()
    assert opening == [3, 3, 3]
    check_sums(found, plain)
    assert found.clients()[2] == ALL


@pytest.mark.parametrize("fresh", [False, True], ids=["same sites", "fresh sites"])
@pytest.mark.parametrize("step", STEPS, ids=[step.name for step in STEPS])
def test_a_coordinator_killed_in_a_step_goes_on(
    world: Any, plain: Any, step: MessageKind, fresh: bool
) -> None:
    quiet = world(**SECURE)
    wanted = quiet.run()

    found = world(**SECURE)

    def hook(name: str, message: Envelope, answer: Callable[..., bytes]) -> bytes:
        if message.kind is step and found.round == 2 and name == "b":
            raise KilledError
        return bytes(answer())

    found.transport.hook = hook
    found.killed()
    assert len(records(found)) == 2
    if fresh:
        found.restart("a", "b", "c")
    summary = found.run(resume=True)
    check_sums(found, plain)
    unproven = [rounds(w.out / "ledger.sqlite", proofs=False) for w in (quiet, found)]
    assert unproven[0] == unproven[1]
    assert summary["state_digest"] == wanted["state_digest"]


def test_a_site_in_another_state_is_not_in_the_sum(world: Any, plain: Any) -> None:
    found = world(names="abcd", federation__clients=4, federation__rounds=12, **SECURE)
    done: list[int] = []

    def hook(name: str, message: Envelope, answer: Any) -> bytes:
        if message.kind is MessageKind.SUM_TASK and name == "d" and found.round == 10 and not done:
            done.append(1)
            model = found.inside["d"].tuning.model
            model.reset()
        return bytes(answer())

    found.transport.hook = hook
    summary = found.run()
    assert found.clients()[10] == ALL and found.clients()[11] == [*ALL, 3]
    check_sums(found, plain)
    assert set(found.digests().values()) == {summary["state_digest"]}


def test_numbers_beyond_all_limits_end_in_a_sentence(world: Any, monkeypatch: Any) -> None:
    found = world(**SECURE)
    mask = SumParty.mask

    def lie(self: SumParty, request: Any, part: MaskedReport) -> MaskedReport:
        if self.client == 1:
            part = MaskedReport(part.round, 1, part.values + np.uint64(2**62), part.digest)
        return mask(self, request, part)

    monkeypatch.setattr(SumParty, "mask", lie)
    with pytest.raises(QuorumError, match="which one cannot be told"):
        found.run()
    assert records(found) == []


def test_a_site_answers_no_task_without_masks(world: Any) -> None:
    found = world(**SECURE)
    found.run()
    site, run = found.inside["a"], found.inside["a"].tuning.run
    task = Task(4, 0, 1e-3, False, ())
    answer = Envelope.decode(site.answer(Envelope(MessageKind.TASK, run, task.encode()).encode()))
    assert answer.kind is MessageKind.REFUSAL
    assert Refusal.decode(answer.body).code is RefusalCode.MESSAGE


def test_two_sites_are_no_federation(world: Any) -> None:
    with pytest.raises(FedForwardError, match=r"secure_threshold = 3 to 1000 clients"):
        world(names="ab", federation__clients=2, **SECURE)


def test_altered_messages_to_a_site_are_refused_and_foreseen(world: Any) -> None:
    """What a server sends instead of a step of a sum ends in a refusal that names no error."""
    found = world(federation__rounds=2, **SECURE)
    random = np.random.default_rng(0)
    codes: set[RefusalCode] = set()

    def hook(name: str, message: Envelope, answer: Any) -> bytes:
        if message.kind in STEPS and name == "a":
            for _ in range(30):
                body = bytearray(message.body)
                for place in random.integers(0, len(body), random.integers(1, 4)):
                    body[place] ^= int(random.integers(1, 256))
                cut = len(body) - int(random.integers(0, 3))
                spoilt = Envelope(message.kind, message.run, bytes(body[:cut])).encode()
                # A site of its own, so that the run's goes on as if nothing had come.
                reply = Envelope.decode(aside.answer(spoilt))
                if reply.kind is MessageKind.REFUSAL:
                    codes.add(Refusal.decode(reply.body).code)
        if name == "a" and message.kind in (MessageKind.HELLO, *STEPS[:1]):
            aside.answer(message_of(message))
        return bytes(answer())

    def message_of(message: Envelope) -> bytes:
        return Envelope(message.kind, message.run, message.body).encode()

    aside = found.site("a")
    found.transport.hook = hook
    found.run()
    assert codes == {RefusalCode.MESSAGE}
