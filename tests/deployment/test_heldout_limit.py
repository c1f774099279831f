"""A site whose held-out examples are few tells no held-out figures."""

from typing import Any

import pytest

from fedforward.core.errors import FedForwardError
from fedforward.messages.envelope import Enrollment, Envelope, MessageKind
from fedforward.messages.task import Task


def test_few_examples_are_not_told_of(world: Any) -> None:
    """The others evaluate; its reports count, and its state is proven in rounds."""
    found = world(limits={"b": {"heldout": 3}})
    summary = found.run()
    enrollments = [
        Enrollment.decode(Envelope(kind, b"", body).json()).heldout
        for name, kind, body in found.transport.answers
        if kind is MessageKind.ENROLLMENT
    ]
    assert sorted(enrollments) == [0, 2, 2]
    assert not found.transport.bodies("b", MessageKind.EVALUATION)
    assert found.transport.bodies("a", MessageKind.EVALUATION)
    assert found.clients() == [[0, 1, 2]] * 5
    assert set(found.digests().values()) == {summary["state_digest"]}


def test_a_server_that_asks_in_spite_of_it_hears_nothing(world: Any) -> None:
    found = world(limits={"b": {"heldout": 3}})
    found.run()
    run = found.inside["b"].tuning.run
    task = Task(5, 1, 0.0, True, ())
    for kind in (MessageKind.EVALUATION, MessageKind.FINALIZE):
        answer = found.inside["b"].answer(Envelope(kind, run, task.encode()).encode())
        content = Envelope.decode(answer).json()
        assert content.keys() == {"rounds", "digest", "examples", "tokens"}
        assert (content["examples"], content["tokens"]) == (0, 0)


def test_where_no_site_tells_the_run_ends_with_a_sentence(world: Any) -> None:
    few = {name: {"heldout": 3} for name in "abc"}
    found = world(limits=few, federation__start_deadline=20.0)
    with pytest.raises(FedForwardError, match=r"a, b, c hold out fewer .* limits\.heldout"):
        found.run()
    assert found.clock.now - 1000.0 < 40.0


def test_the_default_is_any_number() -> None:
    from fedforward.config.site import LimitsSection

    assert LimitsSection().heldout == 1
