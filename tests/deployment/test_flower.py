"""The adapter to Flower without an engine; `test_cluster.py` has one."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("flwr")

from flwr.app import Message

from fedforward.core.errors import FedForwardError
from fedforward.deployment import model_server
from fedforward.deployment.flower import certificates, engine
from fedforward.deployment.flower.server import ListenAddress
from fedforward.deployment.flower.server_app import carry_out, config_of, run_config
from fedforward.deployment.flower.transport import GridTransport, unwrap, wrap
from fedforward.deployment.supervisor import Child, Supervisor, free_port
from tests.support.sites import run_toml, site_config


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_a_configuration_in_flowers_words(tmp_path: Path) -> None:
    overrides = ['evaluation.metrics=["perplexity"]', 'data.label_words={ 0 = " no", 1 = " yes" }']
    settings = run_toml(tmp_path, *overrides)
    given = run_config(settings)
    assert all(isinstance(value, str | int | float | bool) for value in given.values())
    assert "method.learning-rate" in given
    assert config_of({"out": "here", **given}) == (settings, Path("here"))
    app = engine.write_app(tmp_path / "app", settings, tmp_path / "out")
    from flwr.cli.build import build_fab_from_disk
    from flwr.common.config import get_fused_config_from_dir

    assert build_fab_from_disk(app)
    assert config_of(get_fused_config_from_dir(app, {}))[0] == settings
    changed = get_fused_config_from_dir(app, {"federation.rounds": 7})
    assert config_of(changed)[0].federation.rounds == 7


def test_a_folder_has_one_coordinator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one ends with a sentence, and writes nothing; a lock that a kill left is free."""
    out, began = tmp_path / "out", []

    class Coordinator:
        def __init__(self, config: Any, path: Path, transport: Any, resume: bool) -> None:
            began.append(sorted(file.name for file in path.iterdir()))

        def run(self) -> None:
            if len(began) == 1:
                with pytest.raises(FedForwardError, match="in use by another fedforward process"):
                    carry_out(settings, out, transport)

    monkeypatch.setattr("fedforward.deployment.flower.server_app.Coordinator", Coordinator)
    settings, transport = run_toml(tmp_path), GridTransport(FakeGrid())
    carry_out(settings, out, transport)
    carry_out(settings, out, transport)
    assert began == [["coordinator.lock", "coordinator.lock.json"]] * 2


def test_another_release_of_flower_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    engine.check_installed()
    monkeypatch.setattr(engine, "version", lambda name: "1.42.0")
    with pytest.raises(FedForwardError, match=r"Flower 1\.42\.0 is installed.*1\.41\.\*"):
        engine.check_installed()


def test_the_client_app_imports_little() -> None:
    """A process of it is started for every message."""
    code = (
        "import sys, fedforward.deployment.flower.client_app;"
        "print({'torch', 'scipy', 'pydantic', 'fedforward.config.schema'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


class FakeGrid:
    """Answers each message with its envelope reversed; `node-2` never does, and may hold one up."""

    def __init__(self) -> None:
        self.pushed: dict[str, Any] = {}
        self.pulled: list[list[str]] = []
        self.free = threading.Event()

    def get_nodes(self) -> list[Any]:
        names = [("a", 1, "online"), ("", 2, "online"), ("c", 3, "offline")]
        return [SimpleNamespace(name=n, node_id=i, status=s) for n, i, s in names]

    def push_messages(self, messages: list[Any]) -> list[str]:
        numbers = []
        for message in messages:
            numbers.append(f"m{len(self.pushed)}")
            self.pushed[numbers[-1]] = message
        return numbers

    def pull_messages(self, numbers: list[str]) -> list[Any]:
        self.pulled.append(numbers)
        replies = []
        for number in numbers:
            message = self.pushed[number]
            if message.metadata.dst_node_id == 2:
                self.free.wait(30)
                continue
            content = wrap(unwrap(message.content)[::-1])
            metadata = SimpleNamespace(reply_to_message_id=number)
            replies.append(
                SimpleNamespace(metadata=metadata, content=content, has_error=lambda: False)
            )
        return replies


def test_messages_over_a_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.supercore.task_identity import TaskIdentity

    for key in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, key, 1)
    grid = FakeGrid()
    transport = GridTransport(grid)
    assert list(transport.present()) == ["a", "node-2"]
    for name in ("a", "node-2", "c"):
        transport.send(name, b"abc")
    arrived = {}
    last = time.monotonic() + 10
    while len(arrived) < 2 and time.monotonic() < last:
        arrived |= {reply.site: reply for reply in transport.receive()}
    assert arrived["a"].data == b"cba" and arrived["c"].error and "node-2" not in arrived
    assert transport.receive() == []
    # Who is held up is not asked for again meanwhile.
    assert sum("m1" in numbers for numbers in grid.pulled) == 1
    grid.free.set()
    assert isinstance(Message(wrap(b"x"), 1, "query.envelope"), Message)


def test_whoever_the_proxy_names_is_pulled_and_the_others_seldom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flwr.supercore.task_identity import TaskIdentity

    from fedforward.deployment.flower import transport as module
    from fedforward.deployment.flower.notices import ANSWERED, ANYBODY, SENT, Notices

    for key in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, key, 1)
    sent, answered = Notices(tmp_path / SENT), Notices(tmp_path / ANSWERED)
    sent.create()
    answered.create()
    grid = FakeGrid()
    grid.free.set()
    transport = GridTransport(grid, tmp_path)
    transport.present()
    # The first look is at all, when nothing has been sent yet.
    assert transport.receive() == []
    for name in ("a", "node-2"):
        transport.send(name, b"abc")

    def receive(seconds: float = 5.0) -> list[Any]:
        last = time.monotonic() + seconds
        while not (found := list(transport.receive())) and time.monotonic() < last:
            time.sleep(0.01)
        return found

    assert receive(0.5) == [] and grid.pulled == []
    assert sent.new() == {"a", "node-2"}
    answered.tell(["node-2", "nobody"])
    assert receive(0.3) == [] and grid.pulled == [["m1"]]
    answered.tell(["a"])
    assert [reply.data for reply in receive()] == [b"cba"]
    assert grid.pulled == [["m1"], ["m0"]]
    answered.tell([ANYBODY])
    receive(0.2)
    assert grid.pulled[2:] == [["m1"]]
    monkeypatch.setattr(module, "TOLD_POLL_INTERVAL_S", 0.1)
    receive(0.3)
    assert len(grid.pulled) > 3
    # A server of another kind tells nothing: then all are asked for.
    assert GridTransport(grid, tmp_path / "elsewhere").answered is None


def test_an_answer_that_cannot_be_read_costs_nobody_else_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from flwr.supercore.task_identity import TaskIdentity

    from fedforward.deployment.flower import transport as module

    for key in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, key, 1)
    monkeypatch.setattr(module, "POLL_INTERVAL_S", 0.0)
    monkeypatch.setattr(module, "PULL_GROUPS", 1)

    class Broken(FakeGrid):
        def get_nodes(self) -> list[Any]:
            return [
                SimpleNamespace(name=n, node_id=i, status="online") for i, n in ((1, "a"), (3, "c"))
            ]

        def pull_messages(self, numbers: list[str]) -> list[Any]:
            if any(self.pushed[number].metadata.dst_node_id == 3 for number in numbers):
                raise ValueError("nothing that Flower knows")
            return super().pull_messages(numbers)

    transport = GridTransport(Broken())
    transport.present()
    for name in ("a", "c"):
        transport.send(name, b"abc")
    arrived: dict[str, Any] = {}
    last = time.monotonic() + 10
    while len(arrived) < 2 and time.monotonic() < last:
        arrived |= {reply.site: reply for reply in transport.receive()}
        time.sleep(0.01)
    assert arrived["a"].data == b"cba"
    assert "cannot be read: nothing that Flower knows" in arrived["c"].error


def test_flowers_commands_together(tmp_path: Path) -> None:
    """Each by itself: what one says is not another's."""
    done = subprocess.run(
        [sys.executable, "-m", "fedforward.deployment.flower.commands"],
        input=json.dumps([["nonsense"], ["--help"], ["supernode", "register", "no/key", "x"]]),
        env={**os.environ, **engine.environment(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    wrong, helped, missing = json.loads(done.stdout)
    assert wrong["code"] and "nonsense" in wrong["error"] and not wrong["out"]
    assert helped["code"] == 0 and "supernode" in helped["out"]
    assert missing["code"] and "no/key" in missing["error"] + missing["out"]
    flower = engine.CommandLine(tmp_path, "127.0.0.1:1", None)
    (tmp_path / "bad.pub").write_text("no key")
    registered = flower.register({"a": tmp_path / "bad.pub"})
    assert isinstance(registered["a"], str) and registered["a"]
    with pytest.raises(FedForwardError, match=r"`flwr stop 1 fedforward` failed: \S"):
        flower.stop("1")
    assert flower.register({}) == {}


@pytest.mark.parametrize(
    ("listen", "insecure", "words"),
    [
        ("9400", True, "--listen '9400'"),
        ("host:99999", True, "--listen"),
        ("0.0.0.0:9400", False, "--tls FOLDER is missing"),
    ],
)
def test_an_address_that_is_none(listen: str, insecure: bool, words: str) -> None:
    with pytest.raises(FedForwardError, match=re.escape(words)):
        ListenAddress.parse(listen, None, insecure)


def test_what_is_wrong_with_a_connection_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedforward.deployment.flower.reverse_proxy.START_TIMEOUT_S", 0.3)
    from fedforward.deployment.flower.client import trouble
    from fedforward.deployment.flower.reverse_proxy import ReverseProxy

    for name in ("ours", "elsewhere"):
        certificates.make(tmp_path / name, ["localhost"], [])
    pair = (str(tmp_path / "ours" / "server.crt"), str(tmp_path / "ours" / "server.key"))
    ours, elsewhere = tmp_path / "ours" / "ca.crt", tmp_path / "elsewhere" / "ca.crt"
    ports = {"tls": free_port(), "plain": free_port()}
    nobody = "http://127.0.0.1:1"
    proxies = [
        ReverseProxy("127.0.0.1", ports["tls"], nobody, None, pair),
        ReverseProxy("127.0.0.1", ports["plain"], nobody, None, None),
    ]
    for proxy in proxies:
        proxy.open()
    for port, authority, words in (
        ("tls", None, "one side speaks TLS and the other does not"),
        ("plain", ours, "one side speaks TLS and the other does not"),
        ("tls", elsewhere, "is not signed by --tls's ca.crt"),
        ("tls", ours, "the server is being started"),
    ):
        assert words in trouble(f"localhost:{ports[port]}", authority)
    for proxy in proxies:
        proxy.close()
    assert "cannot be reached" in trouble(f"localhost:{ports['plain']}", None)
    assert "cannot be reached" in trouble("nobody.invalid:1", None)


def test_a_model_server_replies_over_its_socket_and_is_not_waited_for(tmp_path: Path) -> None:
    settings = site_config(tmp_path, "a")
    from fedforward.config.template import to_toml

    file, place = tmp_path / "site.toml", tmp_path / "s"
    file.write_text(to_toml(settings), encoding="utf-8")  # type: ignore[arg-type]
    command = [sys.executable, "-m", "fedforward.deployment.model_server", str(file), str(place)]
    with Supervisor() as supervisor:
        child = supervisor.start(Child("model server", command, tmp_path / "log", {}))
        assert b'{"code":"message",' in model_server.ask(str(place), b"nonsense")
        assert stat.S_IMODE(place.stat().st_mode) == 0o600
        pid = child.pid
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while child.starts < 2 and time.monotonic() < deadline:
            supervisor.keep()
            time.sleep(0.1)
        assert b'{"code":"message",' in model_server.ask(str(place), b"nonsense")
        assert child.pid not in (pid, -1)
        last = child.pid
    with pytest.raises(ProcessLookupError):
        os.kill(last, 0)
    with pytest.raises(model_server.ModelServerGoneError, match="does not answer"):
        model_server.ask(str(place), b"nonsense", timeout_s=0.3)
