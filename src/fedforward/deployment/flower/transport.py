"""Envelopes over Flower's `Grid`, as the `Transport` that a coordinator asks for."""

import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict

from fedforward.deployment.flower.notices import ANSWERED, ANYBODY, SENT, Notices
from fedforward.deployment.flower.timings import Timings
from fedforward.deployment.transport import Reply

#: Record and key that an envelope travels under.
RECORD, KEY = "fedforward", "envelope"
#: The message type, and the name of the client app's function.
MESSAGE_TYPE = "query.envelope"
#: Seconds between two looks at which nodes are online.
NODES_INTERVAL_S = 1.0
#: Seconds between two looks at what has been answered.
POLL_INTERVAL_S = 0.3
#: The same where the reverse proxy tells who has answered.
TOLD_POLL_INTERVAL_S = 5.0
#: Groups of messages whose answers are looked for at once.
PULL_GROUPS = 16
#: How often an answer that cannot be read is looked at again.
MAX_RETRIES = 3
#: Messages that are pushed at once.
PUSH_BATCH = 100
#: Seconds that a message may take, both ways.
MESSAGE_TTL_S = 24 * 3600.0


def wrap(data: bytes) -> RecordDict:
    """An envelope as the content of a message: bytes, which travel as they are."""
    return RecordDict({RECORD: ConfigRecord({KEY: data})})


def unwrap(content: RecordDict) -> bytes:
    """The envelope in a message; empty if there is none."""
    record = content.get(RECORD)
    data = record.get(KEY) if isinstance(record, ConfigRecord) else None
    return data if isinstance(data, bytes) else b""


class _Pull:
    """Looks whether some messages have been answered, in a thread of its own."""

    def __init__(self, grid: Any, numbers: Sequence[str]) -> None:
        self.grid = grid
        self.numbers = numbers
        self.messages: list[Any] = []
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="pull", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether it has looked."""
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self.messages = list(self.grid.pull_messages(list(self.numbers)))
        except Exception as error:
            self.error = error


class GridTransport:
    """See the module. A site's name is the one that its key was registered under.

    Flower waits for minutes for the rest of an answer whose upload broke off. So answers are looked
    for in groups, beside the coordinator: such a site holds up nobody, or only those of its group.
    """

    def __init__(self, grid: Any, home: Path | None = None) -> None:
        """`home`: the `flower` folder of a `fedforward server` on this machine, if there is one."""
        self.grid = grid
        self.sent: Notices | None = None
        self.answered: Notices | None = None
        self.timings = Timings(None)
        self._told: set[str] = set()
        if home is not None and (home / ANSWERED).is_file():
            self.sent, self.answered = Notices(home / SENT), Notices(home / ANSWERED)
            self.timings = Timings.of(home)
        self.nodes: dict[str, int] = {}
        self._looked = 0.0
        self._pending: dict[str, str] = {}
        self._out: list[tuple[str, Any]] = []
        self._lost: list[Reply] = []
        self._pulls: list[_Pull] = []
        self._failures: Counter[str] = Counter()
        self._pulled = 0.0

    def present(self) -> Sequence[str]:
        """The names of the nodes that are online."""
        now = time.monotonic()
        if now - self._looked >= NODES_INTERVAL_S:
            self._looked = now
            found = {node.name or f"node-{node.node_id}": node for node in self.grid.get_nodes()}
            self.nodes = {
                name: node.node_id
                for name, node in found.items()
                if not node.status or node.status == "online"
            }
        return list(self.nodes)

    def send(self, site: str, data: bytes) -> None:
        """Keep an envelope for a node until the next `receive`, which pushes all together."""
        node = self.nodes.get(site)
        if node is None:
            self._lost.append(Reply(site, error="it is not connected"))
        else:
            self._out.append((site, Message(wrap(data), node, MESSAGE_TYPE, ttl=MESSAGE_TTL_S)))

    def _push(self) -> None:
        while self._out:
            some, self._out = self._out[:PUSH_BATCH], self._out[PUSH_BATCH:]
            for site, message in some:
                self.timings.note_envelope("sending", site, unwrap(message.content))
            numbers: list[str | None] = list(
                self.grid.push_messages([message for _, message in some])
            )
            numbers += [None] * (len(some) - len(numbers))
            for site, _ in some:
                self.timings.note("sent", site)
            if self.sent is not None:
                self.sent.tell(site for site, _ in some)
            for (site, _), number in zip(some, numbers, strict=True):
                if number:
                    self._pending[number] = site
                else:
                    self._lost.append(Reply(site, error="the engine did not take the message"))

    def receive(self) -> Sequence[Reply]:
        """Push what is to go, and return whatever has been answered since the last call."""
        self._push()
        replies = self._take_lost()
        for pull in [pull for pull in self._pulls if pull.done]:
            self._pulls.remove(pull)
            if pull.error is not None:
                self._retry(pull)
            replies += [a for m in pull.messages if (a := self._reply(m)) is not None]
        idle = self._worth_a_look()
        if idle:
            alone = [number for number in idle if number in self._failures]
            idle = [number for number in idle if number not in self._failures]
            groups = [idle[begin::PULL_GROUPS] for begin in range(min(PULL_GROUPS, len(idle)))]
            groups += [[number] for number in alone[:PULL_GROUPS]]
            self._pulls += [_Pull(self.grid, group) for group in groups]
        return [*replies, *self._take_lost()]

    def _worth_a_look(self) -> list[str]:
        """Messages that may have been answered, and that no pull asks for already."""
        now = time.monotonic()
        interval_s = POLL_INTERVAL_S
        if self.answered is not None:
            interval_s = TOLD_POLL_INTERVAL_S
            self._told |= self.answered.new()
        asked = {number for pull in self._pulls for number in pull.numbers}
        idle = [number for number in self._pending if number not in asked]
        if now - self._pulled >= interval_s or ANYBODY in self._told:
            self._pulled = now
            self._told.clear()
            return idle
        idle = [number for number in idle if self._pending[number] in self._told]
        if idle:
            self._pulled = now
        self._told &= set(self._pending.values()) - {self._pending[number] for number in idle}
        return idle

    def _retry(self, pull: _Pull) -> None:
        """One answer that cannot be read must not cost the others theirs: each is pulled alone."""
        for number in pull.numbers:
            self._failures[number] += 1
            if self._failures[number] > MAX_RETRIES and number in self._pending:
                site = self._pending.pop(number)
                self._lost.append(Reply(site, error=f"its answer cannot be read: {pull.error}"))

    def _take_lost(self) -> list[Reply]:
        lost, self._lost = self._lost, []
        return lost

    def _reply(self, message: Any) -> Reply | None:
        self._failures.pop(message.metadata.reply_to_message_id, None)
        site = self._pending.pop(message.metadata.reply_to_message_id, None)
        if site is None:
            return None
        self.timings.note("arrived", site)
        if message.has_error():
            return Reply(site, error=f"no answer: {message.error.reason}")
        return Reply(site, unwrap(message.content))
