"""A site's resident client app, against the Runtime API of Flower's own SuperNode."""

import hashlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("flwr")

import uvicorn
from flwr.app import Context, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeStateFactory

from fedforward.deployment.flower import executor as module
from fedforward.deployment.flower.executor import Executor
from fedforward.deployment.flower.timings import Timings, read
from fedforward.deployment.flower.transport import MESSAGE_TYPE, unwrap, wrap
from fedforward.deployment.model_server import ModelServerGoneError
from fedforward.deployment.supervisor import free_port

SECRET, RUN, NODE = bytes(range(32)), 7, 11
FAB = hashlib.sha256(b"an app that nobody may unpack").hexdigest()


class SuperNode:
    """Flower's Runtime API and the state behind it, as `flower-supernode` has them."""

    def __init__(self) -> None:
        self.factory = NodeStateFactory(ObjectStoreFactory())
        self.state = self.factory.state()
        self.state.set_node_id(NODE)
        fab = Fab(FAB, b"an app that nobody may unpack", {})
        run = Run.create_empty(RUN)
        run.fab_hash = fab.hash_str
        self.state.store_run(run)
        self.state.store_fab(fab)
        context = Context(
            run_id=RUN, node_id=NODE, node_config={}, state=RecordDict(), run_config={}
        )
        self.state.set_run_series_context(run.series_id, context)
        self.port = free_port()
        application = create_app(self.factory, SECRET)
        options: dict[str, Any] = {"log_level": "critical", "access_log": False, "ws": "none"}
        self.server = uvicorn.Server(uvicorn.Config(application, port=self.port, **options))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        self.executors: list[Executor] = []

    def executor(self, secret: bytes = SECRET, timings: Timings | None = None) -> Executor:
        address = f"127.0.0.1:{self.port}"
        self.executors.append(Executor(address, secret, "socket", timings or Timings(None)))
        return self.executors[-1]

    def task(self) -> None:
        """What a SuperNode does first of all when a message comes."""
        assert self.state.create_task(TaskType.CLIENT_APP, RUN, fab_hash=FAB) is not None

    def message(self, data: bytes, kind: str = MESSAGE_TYPE, pause_s: float = 0.0) -> None:
        """What it does after that."""
        message = Message(wrap(data), NODE, kind)
        message.metadata.__dict__["_message_id"] = message.object_id
        store = self.state.object_store
        store.preregister(RUN, get_object_tree(message))
        self.state.store_message(message)
        for number, thing in get_all_nested_objects(message).items():
            time.sleep(pause_s)
            store.put(number, thing.deflate())

    def reply(self) -> Any:
        """The reply that it would send on; its content is in pieces."""
        (reply,) = self.state.get_messages_legacy(is_reply=True)
        return reply


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Iterator[SuperNode]:
    for key, value in (("_run_id", RUN), ("_node_id", 1), ("_task_id", 1)):
        monkeypatch.setattr(TaskIdentity, key, value)
    node = SuperNode()
    last = time.monotonic() + 30
    while not node.server.started and time.monotonic() < last:
        time.sleep(0.02)
    yield node
    for executor in node.executors:
        executor.client.close()
    node.server.should_exit = True
    node.thread.join(10)


def test_a_task_is_answered_and_the_app_is_not_unpacked(
    node: SuperNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(module, "ask", lambda path, data: data[::-1] + path.encode())
    (tmp_path / "timings").write_text("")
    executor = node.executor(timings=Timings(tmp_path / "timings"))
    assert not executor.take()
    for data in (b"abc", b"def"):
        node.task()
        node.message(data)
        assert executor.take() and not executor.take()
        reply = node.reply()
        assert not reply.has_error()
        parts = [node.state.object_store.get(tree) or b"" for tree in _parts(node, reply)]
        assert any(data[::-1] + b"socket" in part for part in parts)
    (task, other) = node.state.get_tasks()
    assert {task.status.status, other.status.status} == {"finished"}
    assert not (tmp_path / "home").exists()
    assert [line["what"] for line in read(tmp_path / "timings")][:4] == [
        "taken", "asked", "replied", "pushed",
    ]  # fmt: skip


def _parts(node: SuperNode, reply: Any) -> list[str]:
    from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

    tree = node.state.object_store.get_object_tree(reply.metadata.message_id)
    return [part.object_id for part in iterate_object_tree(tree)]


def test_a_task_whose_message_is_still_coming_costs_no_second(
    node: SuperNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A SuperNode makes the task first; Flower's client app would then wait for a second."""
    monkeypatch.setattr(module, "ask", lambda path, data: data)
    node.task()

    def late() -> None:
        time.sleep(0.2)
        node.message(b"abc", pause_s=0.05)

    thread = threading.Thread(target=late, daemon=True)
    thread.start()
    pauses: list[float] = []
    pull = module.pull_and_inflate_object_from_tree

    def spied(*arguments: Any, **options: Any) -> Any:
        pauses.append(options["initial_backoff"])
        return pull(*arguments, **options)

    monkeypatch.setattr(module, "pull_and_inflate_object_from_tree", spied)
    assert node.executor().take()
    thread.join()
    # Not by the clock: a busy machine has seconds of its own.
    assert pauses == [module.MESSAGE_INTERVAL_S] and pauses[0] < 0.1
    assert not node.reply().has_error()


def test_a_message_that_cannot_be_answered_says_why(
    node: SuperNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says nothing that an error may have out of the site's files."""
    for error, reason in (
        (ModelServerGoneError("secret"), "the site's model server does not answer"),
        (KeyError("secret"), "KeyError"),
    ):

        def ask(path: str, data: bytes, error: Exception = error) -> bytes:
            raise error

        monkeypatch.setattr(module, "ask", ask)
        node.task()
        node.message(b"abc")
        assert node.executor().take()
        told = node.reply().error
        assert told.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
        assert told.reason == reason
    node.task()
    node.message(b"abc", kind="train")
    assert node.executor().take()
    assert "type 'train'" in node.reply().error.reason


def test_a_task_is_for_who_has_the_secret(node: SuperNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ask", lambda path, data: data)
    node.task()
    node.message(b"abc")
    with pytest.raises(httpx.HTTPStatusError, match=r"401|403"):
        node.executor(bytes(32)).take()
    assert node.executor().take()


def test_a_task_is_kept_alive_while_the_model_works(
    node: SuperNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats = []
    monkeypatch.setattr(module, "HEARTBEAT_INTERVAL_S", 0.05)
    acknowledge = node.state.acknowledge_task_heartbeat
    monkeypatch.setattr(
        node.state,
        "acknowledge_task_heartbeat",
        lambda task: beats.append(task) or acknowledge(task),
    )

    def ask(path: str, data: bytes) -> bytes:
        last = time.monotonic() + 5
        while len(beats) < 2 and time.monotonic() < last:
            time.sleep(0.01)
        return unwrap(wrap(data))

    monkeypatch.setattr(module, "ask", ask)
    node.task()
    node.message(b"abc")
    assert node.executor().take()
    assert len(set(beats)) == 1 and len(beats) >= 2


def test_a_task_is_asked_for_when_the_log_grows_and_seldom_otherwise(tmp_path: Path) -> None:
    log = tmp_path / "log"
    waiting = module.Waiting(log)

    def questions(begin: float, seconds: float, found: bool = False) -> list[float]:
        asked = []
        for tick in range(round(seconds / 0.03)):
            if waiting.over(now := begin + 0.03 * tick):
                asked.append(now - begin)
                waiting.asked(now, found)
        return asked

    assert len(questions(0.0, 3.0)) == 3
    log.write_text("Receiving\n")
    first, *others = questions(3.5, 3.0)
    assert first == 0.0 and 4 <= sum(at < 0.4 for at in others) <= 6
    assert sum(at >= 0.4 for at in others) <= 3
    # A task that was found is the only one: a SuperNode gives out one at a time.
    log.write_text("Receiving\nSent\n")
    assert len(questions(10.0, 0.9, found=True)) == 1
