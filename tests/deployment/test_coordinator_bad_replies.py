"""Replies that make no sense, or that nobody asked for, end nothing."""

import json
import math
from typing import Any

import pytest

from fedforward.messages.envelope import Envelope, MessageKind, encode_json
from fedforward.messages.refusal import Refusal, RefusalCode
from tests.support.coordinator import ALL, MOMENTS, Undisturbed, number

BAD_METRICS: dict[str, Any] = {
    "metrics are a list": {"metrics": [1, 2]},
    "metrics are text": {"metrics": "good"},
    "tokens are text": {"tokens": "many"},
    "tokens are infinite": {"tokens": math.inf},
    "tokens are missing": {"tokens": None},
    "the loss is text": {"heldout_loss": "low"},
    "the loss is huge": {"heldout_loss": 10**400},
    "the loss is not a number": {"heldout_loss": math.nan},
}


@pytest.mark.parametrize("what", list(BAD_METRICS))
def test_metrics_that_are_none_end_nothing(world: Any, what: str) -> None:
    """The others' metrics are what they are; nothing that one site sends ends the run."""
    found = world(evaluation__metrics=["perplexity"], federation__rounds=3)

    def hook(name: str, message: Envelope, answer: Any) -> bytes:
        data: bytes = answer()
        if message.kind is MessageKind.EVALUATION and number(message) == 2 and name == "a":
            metrics = {**Envelope.decode(data).json(), **BAD_METRICS[what]}
            return Envelope(MessageKind.METRICS, message.run, json.dumps(metrics).encode()).encode()
        return data

    found.transport.hook = hook
    assert found.run()["rounds"] == 3
    assert math.isfinite(found.lines[2]["heldout_loss"])


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b"[]",
        b"\xff",
        b"[" * 200_000,
    ],
    ids=["empty", "list", "noise", "deep"],
)
@pytest.mark.parametrize("kind", [MessageKind.HELLO, MessageKind.EVALUATION])
def test_json_that_is_none_ends_nothing(world: Any, kind: MessageKind, body: bytes) -> None:
    found = world(names="abcd", federation__rounds=2)

    def hook(name: str, message: Envelope, answer: Any) -> bytes:
        if name == "d" and message.kind is kind:
            wanted = MessageKind.ENROLLMENT if kind is MessageKind.HELLO else MessageKind.METRICS
            return Envelope(wanted, message.run, body).encode()
        return bytes(answer())

    found.transport.hook = hook
    assert found.run()["rounds"] == 2
    if kind is MessageKind.HELLO:
        assert found.clients() == [ALL] * 2 and "refused" in found.of("d")["note"]
    else:
        assert found.clients() == [[0, 1, 2, 3]] * 2


def test_an_enrollment_that_is_no_text_ends_nothing(world: Any) -> None:
    """Half a surrogate pair is legal JSON, and cannot be written to a file."""
    found = world(names="abcd", federation__rounds=2)

    def hook(name: str, message: Envelope, answer: Any) -> bytes:
        data: bytes = answer()
        if name == "d" and message.kind is MessageKind.HELLO:
            content = Envelope.decode(data).json()
            content["name"] = content["model"]["base"] = "\ud800"
            content["model"]["layout"][2][0] = "\ud800"
            return Envelope(MessageKind.ENROLLMENT, message.run, encode_json(content)).encode()
        return data

    found.transport.hook = hook
    assert found.run()["rounds"] == 2
    assert found.clients() == [ALL] * 2 and not found.of("d")["ready"]


def test_out_of_sync_in_reply_to_a_hello_ends_nothing(world: Any) -> None:
    found = world()
    MOMENTS["in a round"](found)
    found.killed()
    done: list[str] = []

    def hook(name: str, message: Envelope, answer: Any) -> bytes:
        if message.kind is MessageKind.HELLO and name == "a" and not done:
            done.append(name)
            return Envelope(
                MessageKind.OUT_OF_SYNC, message.run, encode_json({"rounds": 0})
            ).encode()
        return bytes(answer())

    found.transport.hook = hook
    assert found.run(resume=True)["rounds"] == 5


@pytest.mark.parametrize(
    "kind",
    [MessageKind.UNKNOWN_RUN, MessageKind.OUT_OF_SYNC, MessageKind.HELLO, MessageKind.REFUSAL],
)
def test_messages_that_nobody_asked_for_change_nothing(
    world: Any, undisturbed: Undisturbed, kind: MessageKind
) -> None:
    found = world(names="abcd", limits={"d": {"rounds": 4}})

    def hook(name: str, message: Envelope, answer: Any) -> bytes:
        if name == "a" and message.kind is MessageKind.TASK:
            body = encode_json({"rounds": 2**70})
            found.transport.later("d", Envelope(kind, message.run, body).encode(), lambda: True)
            found.transport.later("nobody", b"", lambda: True)
        return bytes(answer())

    found.transport.hook = hook
    summary = found.run()
    assert found.ledger == undisturbed.ledger and summary["state_digest"] == undisturbed.digest


def test_a_participant_that_fails_for_a_while_does_not_end_the_run(world: Any) -> None:
    """The sample of each round is a function of who is there, and it is one of them."""
    found = world(federation__participation=0.34, federation__rounds=6)

    def hook(name: str, message: Envelope, answer: Any) -> bytes:
        if name == "c" and message.kind is MessageKind.TASK:
            body = Refusal(RefusalCode.MEMORY).encode()
            return Envelope(MessageKind.REFUSAL, message.run, body).encode()
        return bytes(answer())

    found.transport.hook = hook
    assert found.run()["rounds"] == 6
    assert 2 not in [client for clients in found.clients() for client in clients]
    assert found.of("c")["note"] in (Refusal(RefusalCode.MEMORY).sentence, "")


def test_a_participant_that_is_silent_is_replaced_after_the_deadline(world: Any) -> None:
    found = world(
        names="abcd",
        federation__clients=4,
        federation__participation=0.5,
        federation__quorum=2,
        federation__rounds=6,
        federation__deadline=5.0,
    )

    def hook(name: str, message: Envelope, answer: Any) -> bytes | None:
        return None if name == "c" and message.kind is MessageKind.TASK else bytes(answer())

    found.transport.hook = hook
    assert found.run()["rounds"] == 6
    assert all(2 not in clients and len(clients) == 2 for clients in found.clients())
