"""`fedforward bench-federation`: where the seconds of a round went."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

from fedforward.core.errors import FedForwardError
from fedforward.demo import federation
from fedforward.deployment.flower import bench, connections, timeline
from fedforward.deployment.flower.timings import FILE, VARIABLE, Timings, read
from fedforward.messages.envelope import Envelope, MessageKind
from fedforward.messages.task import Task
from tests.support.command_line import command

#: Seconds from a round's beginning to each moment of the slower site.
MOMENTS = {
    "sending": 0.1,
    "sent": 0.3,
    "fetched": 0.6,
    "taken": 1.0,
    "asked": 1.5,
    "replied": 2.1,
    "answering": 2.8,
    "answered": 3.6,
    "arrived": 4.5,
}
LASTS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]


def events(rounds: int) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """What a server and its sites "a" and "b" note: "b" is twice as fast."""
    server: list[dict[str, Any]] = [
        {"at": 0.0, "what": "connected", "site": "a"},
        {"at": 1.0, "what": "connected", "site": "a"},
        {"at": 1.0, "what": "connected", "site": "b"},
    ]
    # An evaluation before the rounds is no round.
    for what, at in (("sending", 5.0), ("sent", 5.1), ("arrived", 10.0)):
        server.append({"at": at, "what": what, "site": "a", "kind": "EVALUATION"})
    sites: dict[str, list[dict[str, Any]]] = {"a": [], "b": []}
    for number in range(rounds):
        began = 10.0 + 4.5 * number
        for site, speed in (("a", 1.0), ("b", 0.5)):
            for what, after in MOMENTS.items():
                own = what in timeline.SITE_MOMENTS
                event: dict[str, Any] = {"at": began + speed * after, "what": what, "site": site}
                if what == "sending":
                    event |= {"at": began + 0.1, "kind": "TASK", "round": number + 1}
                if what == "answered":
                    event |= {"up": 1000 * (number + 1), "down": 500 * (number + 1)}
                (sites[site] if own else server).append(event)
    return server, sites


def test_the_parts_of_a_round_add_up_on_the_way_of_who_answers_last() -> None:
    server, sites = events(3)
    answered = timeline.messages(reversed(server))
    assert [message["round"] for message in answered] == [None, 1, 1, 2, 2, 3, 3]
    # Nobody knows what a site did: its part is one.
    without = timeline.rounds(answered)
    assert [found.site for found in without] == ["a", "a"]
    assert list(without[0].seconds.values()) == pytest.approx([0.1, 0.2, 0.3, 2.2, 0.8, 0.9])
    assert timeline.AT_SITE[2] in without[0].seconds
    timeline.with_sites(answered, sites)
    for found in timeline.rounds(answered):
        assert list(found.seconds.values()) == pytest.approx(LASTS)
        assert list(found.seconds) == [words for _, _, words in timeline.PARTS]
        assert found.total == pytest.approx(4.5)
        assert (found.up, found.down) == (1000, 500)


def test_a_site_that_is_asked_again_is_still_of_its_round() -> None:
    server, sites = events(3)
    server.append({"at": 17.0, "what": "sending", "site": "a", "kind": "TASK", "round": 2})
    answered = timeline.messages(server)
    assert len(answered) == 7
    timeline.with_sites(answered, sites)
    second, third = timeline.rounds(answered)
    assert second.total == pytest.approx(4.5) and third.total == pytest.approx(4.5)
    # It was lost on its way at first: that is in the first part whose end was noted again.
    assert second.seconds[timeline.PARTS[2][2]] == 0.0


def test_a_task_is_noted_with_its_round(tmp_path: Path) -> None:
    task = Task(round=6, client=0, learning_rate=0.1, digest_wanted=False, entries=())
    (tmp_path / FILE).touch()
    notes = Timings.of(tmp_path)
    for kind, body in ((MessageKind.TASK, task.encode()), (MessageKind.HELLO, b"{}")):
        notes.note_envelope("sending", "a", Envelope(kind, bytes(8), body).encode())
    kept = [(line["kind"], line.get("round")) for line in read(tmp_path / FILE)]
    assert kept == [("TASK", 7), ("HELLO", None)]


def run_folder(folder: Path, rounds: int) -> dict[str, Path]:
    """A server's and two sites' folders after a run."""
    server, sites = events(rounds)
    (folder / "flower").mkdir(parents=True)
    lines = [json.dumps(event) for event in server]
    (folder / "flower" / FILE).write_text("\n".join([*lines, '{"cut of']), encoding="utf-8")
    metrics: list[dict[str, Any]] = [
        {"round": 0, "heldout_loss": 0.4, "state_digest": "00", "example": None, "seconds": 0.0}
    ]
    metrics += [
        {
            "round": number,
            "training_loss": 0.4,
            "skipped_steps": 0,
            "zero_gradients": 0.0,
            "learning_rates": {"0": 0.1},
            "seconds": 4.5 * number,
            "bytes": {"up": 90.0, "down": 230.0},
        }
        for number in range(1, rounds + 1)
    ]
    text = "".join(json.dumps(line) + "\n" for line in metrics)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    for name, notes in sites.items():
        home = folder / name
        (home / "flower").mkdir(parents=True)
        text = "".join(json.dumps(event) + "\n" for event in notes)
        (home / "flower" / FILE).write_text(text, encoding="utf-8")
        log = [f"round {n}: 10 steps in {0.1 * n + (name == 'a')} s" for n in (1, 2, 3)]
        (home / "model-server.log").write_text("\n".join(log), encoding="utf-8")
    return {name: folder / name for name in sites}


def test_what_is_measured_of_a_run(tmp_path: Path) -> None:
    sites = run_folder(tmp_path, 3)
    found = bench.measured(tmp_path, sites)
    assert (found.sites, found.rounds) == (2, 2)
    assert found.round.median == pytest.approx(4.5) and found.round.most == pytest.approx(4.5)
    assert [part.median for part in found.parts] == pytest.approx(LASTS)
    # Of rounds 2 and 3, the slower site's.
    assert found.steps is not None and found.steps.most == pytest.approx(1.3)
    assert found.wire == {"up": 500.0, "down": 250.0}
    assert found.messages == {"up": 90, "down": 230}
    assert found.reconnects == {"a": 1, "b": 0}
    assert json.loads(json.dumps(found.as_json()))["parts"][3]["median"] == pytest.approx(0.4)
    elsewhere = bench.measured(tmp_path, {})
    assert elsewhere.steps is None and len(elsewhere.parts) == 6


def test_a_run_of_one_round_is_too_short(tmp_path: Path) -> None:
    with pytest.raises(FedForwardError, match="fewer than two rounds"):
        bench.measured(tmp_path, run_folder(tmp_path, 1))


def test_notes_are_kept_only_where_they_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    (tmp_path / FILE).write_text("old")
    Timings.begin(tmp_path).note("fetched", "a")
    assert not (tmp_path / FILE).exists()
    monkeypatch.setenv(VARIABLE, "1")
    Timings.begin(tmp_path).note("fetched", "a", up=3)
    Timings.of(tmp_path).note("answered", "a")
    assert [line["what"] for line in read(tmp_path / FILE)] == ["fetched", "answered"]
    assert set(read(tmp_path / FILE)[0]) == {"at", "what", "site", "up"}


def test_bytes_on_the_wire_are_the_systems() -> None:
    count = connections.ConnectionCount(8)
    (listener,) = connections.listen("127.0.0.1", 0, count)
    with listener, socket.create_connection(listener.getsockname()) as client:
        accepted, _ = listener.accept()
        client.sendall(bytes(1000))
        received = b""
        while len(received) < 1000:
            received += accepted.recv(1000)
        accepted.sendall(bytes(200))
        assert len(client.recv(200)) == 200
        if not hasattr(socket, "TCP_INFO"):
            assert count.transferred == (0, 0)
            accepted.close()
            return
        assert count.transferred[0] == 1000
        accepted.close()
        assert count.transferred[0] == 1000 and not count.open_now and count.open == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--tls", "certs"], "give a run.toml too"),
        (["--insecure"], "give a run.toml too"),
        (["run.toml", "--sites", "2"], "Leave them out"),
        (["absent.toml", "--insecure"], "absent.toml"),
        (["--out", "full"], "has files in it"),
    ],
)
def test_options_that_do_not_go_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], sentence: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    monkeypatch.chdir(tmp_path)
    command("bench-federation", *arguments).refused(sentence)


def test_a_federation_of_the_demonstration_can_be_loaded(tmp_path: Path) -> None:
    from fedforward.config.site import load_site, load_terms

    places = federation.write(tmp_path, 3, rounds=4, local_steps=7)
    terms = load_terms(tmp_path / "run.toml", [])
    assert (terms.federation.rounds, terms.method.local_steps) == (4, 7)
    assert [load_site(path).site.out for path in places.values()] == [
        str(tmp_path / name) for name in places
    ]


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_a_federation_on_this_machine_is_measured(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "fedforward.cli", "bench-federation", "--json"]
    line += ["--sites", "2", "--rounds", "4"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["sites"], found["rounds"]) == (2, 3)
    assert len(found["parts"]) == len(timeline.PARTS)
    seconds = [part["median"] for part in found["parts"]]
    assert all(value >= 0 for value in seconds) and sum(seconds) > 0.5 * found["round"]["median"]
    assert found["steps"]["median"] > 0
    assert found["messages"]["up"] < found["wire"]["up"] < 40_000
    assert set(found["reconnects"].values()) == {0}
    assert os.listdir(tmp_path) == []  # noqa: PTH208
