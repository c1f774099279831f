"""A site that is let in and lies: it neither spoils a round, ends the run, nor holds it up."""

import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fedforward.cli import main as cli
from fedforward.core.errors import FedForwardError
from fedforward.deployment.flower.server import ListenAddress, serve
from fedforward.deployment.state import leave_out
from fedforward.federation.ledger import Ledger
from fedforward.messages.envelope import Enrollment, Envelope, MessageKind, encode_json
from fedforward.messages.report import Report
from fedforward.training.metrics import DivergenceError
from tests.support.coordinator import ALL, KilledError, number


def lying(found: Any, kind: MessageKind, change: Any, name: str = "c") -> None:
    """Site `name` changes what it answers to messages of a kind."""

    def hook(who: str, message: Envelope, answer: Any) -> bytes:
        data: bytes = answer()
        if who != name or message.kind is not kind:
            return data
        envelope = Envelope.decode(data)
        return Envelope(envelope.kind, envelope.run, change(envelope, message)).encode()

    found.transport.hook = hook


def reported(**changes: Any) -> Any:
    def change(envelope: Envelope, _: Envelope) -> bytes:
        report = Report.decode(envelope.body)
        if "gradients" in changes:
            return replace(report, gradients=report.gradients * 0 + changes["gradients"]).encode()
        return replace(report, **changes).encode()

    return change


def test_a_claim_of_examples_does_not_take_the_average(world: Any) -> None:
    found = world()

    def claim(envelope: Envelope, _: Envelope) -> bytes:
        return replace(Enrollment.decode(envelope.json()), examples=2**31).encode()

    lying(found, MessageKind.HELLO, claim)
    found.run()
    ledger = Ledger(found.out / "ledger.sqlite")
    for record in ledger.rounds():
        assert [part.weight for part in record.results][2] == 0.5
    ledger.close()


@pytest.mark.parametrize("loss", [1e30, 3e38])
def test_a_false_loss_does_not_end_a_run(world: Any, loss: float) -> None:
    found = world()
    lying(found, MessageKind.TASK, reported(loss=loss))
    assert found.run()["rounds"] == 5
    assert all(line["training_loss"] < 10 for line in found.lines[1:])


def test_a_false_heldout_loss_does_not_end_a_run(world: Any) -> None:
    found = world()

    def claim(envelope: Envelope, _: Envelope) -> bytes:
        content = {**envelope.json(), "heldout_loss": 1e300, "tokens": 2**52}
        return encode_json(content)

    lying(found, MessageKind.EVALUATION, claim)
    assert found.run()["rounds"] == 5
    assert all(line["heldout_loss"] < 10 for line in found.lines if "heldout_loss" in line)


def test_a_lie_from_the_start_does_not_hide_divergence(world: Any) -> None:
    """The loss at the start is that of most sites, not of the one that says 10^6."""
    found = world()

    def claim(envelope: Envelope, message: Envelope) -> bytes:
        loss = 1e6 if number(message) == 0 else envelope.json()["heldout_loss"]
        return encode_json({**envelope.json(), "heldout_loss": loss})

    lying(found, MessageKind.EVALUATION, claim)
    found.run()
    assert found.lines[0]["heldout_loss"] < 10


def test_a_huge_gradient_is_left_out_and_said(world: Any) -> None:
    found = world(federation__quorum=2)
    seen: list[str] = []

    def change(envelope: Envelope, message: Envelope) -> bytes:
        if number(message) > 1:
            seen.append(found.of("c")["note"])
        return bytes(reported(gradients=3e38)(envelope, message))

    lying(found, MessageKind.TASK, change)
    summary = found.run()
    assert found.clients() == [[0, 1]] * 5 and summary["rounds"] == 5
    assert any("far larger than the others'" in note for note in seen)
    assert set(found.digests().values()) == {summary["state_digest"]}


def test_a_refused_greeting_holds_the_start_up_no_longer_than_the_deadline(world: Any) -> None:
    found = world(limits={"c": {"rounds": 4}}, federation__start_deadline=20.0)
    began = found.clock.now
    assert found.run()["rounds"] == 5
    assert found.clients() == [[0, 1]] * 5
    assert 20.0 <= found.clock.now - began < 60.0


def test_who_never_answers_a_greeting_is_not_waited_for(world: Any) -> None:
    found = world(federation__start_deadline=20.0)
    found.transport.hook = lambda name, message, answer: None if name == "b" else answer()
    assert found.run()["rounds"] == 5
    assert found.clients() == [[0, 1]] * 5


def test_nobody_begins_below_the_quorum(world: Any) -> None:
    found = world(
        limits={"c": {"rounds": 4}, "b": {"rounds": 4}},
        federation__start_deadline=5.0,
        federation__quorum=2,
    )
    with pytest.raises(AssertionError, match="waits for ever"):
        found.run()


def test_a_run_goes_on_without_a_site(world: Any) -> None:
    found = world()

    def dies(name: str, message: Envelope, answer: Any) -> bytes:
        if message.kind is MessageKind.TASK and number(message) == 2:
            raise KilledError
        return bytes(answer())

    found.transport.hook = dies
    found.killed()
    with pytest.raises(FedForwardError, match=r"--without x: the run has no such site\. Its sites"):
        leave_out(found.out, ["x"], found.config)
    leave_out(found.out, ["c"], found.config)
    summary = found.run(resume=True)
    assert found.clients() == [ALL] * 2 + [[0, 1]] * 3
    assert found.of("c")["note"] == "left out by --without"
    assert summary["rounds"] == 5
    leave_out(found.out, [], found.config)
    assert not (found.out / "without.json").exists()


def test_without_on_the_command_line(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text("method.learning_rate = 1e-3\n", encoding="utf-8")
    out = str(tmp_path / "run")
    given = ["server", str(config), "--insecure", "--out", out, "--without", "north"]
    result = CliRunner().invoke(cli.app, given)
    assert result.exit_code == 2 and "give --resume as well" in result.stderr.replace("\n", " ")
    given.append("--resume")
    result = CliRunner().invoke(cli.app, given)
    assert result.exit_code == 2
    assert "--without north" in result.stderr.replace("\n", " ")
    assert "holds no run yet" in result.stderr.replace("\n", " ")
    assert not (tmp_path / "run").exists()


def test_a_start_that_is_refused_keeps_who_was_left_out(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = world()
    found.run()
    leave_out(found.out, ["c"], found.config)
    # Something else has the port.
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = ListenAddress.parse(f"127.0.0.1:{taken.getsockname()[1]}", None, True)
        (found.out / "summary.json").unlink(missing_ok=True)
        with pytest.raises(FedForwardError, match="address"):
            serve(found.config, found.out, address, resume=True)
    assert json.loads((found.out / "without.json").read_text("utf-8")) == ["c"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"federation__quorum": 3}, "leaves 2 of the run's sites, and a round needs 3"),
        ({"evaluation__site": "c"}, "that site evaluates"),
    ],
)
def test_a_run_that_cannot_go_on_without_a_site_says_so(
    world: Any, changes: Any, words: str
) -> None:
    found = world(**changes)
    found.run()
    with pytest.raises(FedForwardError, match=words):
        leave_out(found.out, ["c"], found.config)
    assert not (found.out / "without.json").exists()


@pytest.mark.parametrize(
    "told",
    [
        lambda round_number: 5.0 if round_number else None,
        lambda round_number: None if round_number else 0.0,
        lambda round_number: -1e300,
        lambda round_number: -1.7e308,
    ],
    ids=["more later", "nothing at first", "below 0", "far below 0"],
)
def test_a_plausible_heldout_lie_does_not_end_a_run(world: Any, told: Any) -> None:
    """A run stops by the sites' median."""
    found = world()

    def claim(envelope: Envelope, message: Envelope) -> bytes:
        loss = told(number(message))
        content = {**envelope.json(), "tokens": 2**52}
        return encode_json(content if loss is None else {**content, "heldout_loss": loss})

    lying(found, MessageKind.EVALUATION, claim)
    assert found.run()["rounds"] == 5


def test_one_finite_loss_does_not_hide_that_most_are_not(world: Any) -> None:
    found = world()

    def hook(who: str, message: Envelope, answer: Any) -> bytes:
        data: bytes = answer()
        if message.kind is not MessageKind.EVALUATION or who == "c" or not number(message):
            return data
        envelope = Envelope.decode(data)
        content = {**envelope.json(), "heldout_loss": None}
        return Envelope(envelope.kind, envelope.run, encode_json(content)).encode()

    found.transport.hook = hook
    with pytest.raises(DivergenceError):
        found.run()


def test_a_gradient_fifty_times_as_large_is_left_out(world: Any) -> None:
    found = world(federation__quorum=2)

    def change(envelope: Envelope, _: Envelope) -> bytes:
        report = Report.decode(envelope.body)
        return replace(report, gradients=report.gradients * np.float32(1000.0)).encode()

    lying(found, MessageKind.TASK, change)
    assert found.run()["rounds"] == 5 and found.clients() == [[0, 1]] * 5


def test_late_sites_do_not_let_one_begin_alone(world: Any) -> None:
    """Two are late and the third is there: it is no majority, whatever the quorum is."""
    found = world(federation__start_deadline=5.0, federation__quorum=1)
    found.transport.hook = lambda name, message, answer: answer() if name == "c" else None
    with pytest.raises(AssertionError, match="waits for ever"):
        found.run()


def test_blocks_beyond_any_model_do_not_block_a_resume(world: Any) -> None:
    found = world()

    def claim(envelope: Envelope, _: Envelope) -> bytes:
        return replace(Enrollment.decode(envelope.json()), active_blocks=2**62).encode()

    lying(found, MessageKind.HELLO, claim)
    found.run()
    assert found.run(resume=True)["rounds"] == 5


def test_names_that_are_none_are_a_sentence(tmp_path: Path) -> None:
    from fedforward.deployment.state import read_without

    for text in ('{"a": 1}', "[1]", "", "[" * 100_000, "\\xff"):
        (tmp_path / "without.json").write_text(text, encoding="utf-8")
        with pytest.raises(FedForwardError, match="holds no list of names"):
            read_without(tmp_path)


def test_a_rule_waits_for_as_many_sites_as_it_needs(world: Any) -> None:
    """Two of three report before the deadline, and one may lie: the round waits for the third."""
    found = world(
        method__name="decomfl",
        method__aggregator="trimmed-mean",
        federation__deadline=1.0,
        federation__quorum=1,
    )
    assert found.run()["rounds"] == 5
    assert found.clients() == [ALL] * 5
    found = world(names="ab", method__name="decomfl", method__aggregator="trimmed-mean")
    with pytest.raises(AssertionError, match="waits for ever"):
        found.run()
