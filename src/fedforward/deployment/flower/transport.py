"""Letters over Flower's `Grid`, as the `Link` that a coordinator asks for."""

import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict

from fedforward.deployment.transport import Arrival

#: Record and key that a letter travels under.
RECORD, KEY = "fedforward", "letter"
#: The message type, and the name of the client app's function.
MESSAGE = "query.letter"
#: Seconds between two looks at which nodes are online.
LOOK = 1.0
#: Seconds between two looks at what has been answered, and in how many groups at once.
PULL, GROUPS = 0.3, 16
#: How often an answer that cannot be read is looked at again.
FAILURES = 3
#: Letters that are pushed at once.
TOGETHER = 100
#: Seconds that a letter may take, both ways.
LIFE = 24 * 3600.0


def wrapped(data: bytes) -> RecordDict:
    """A letter as the content of a message. Floats would travel as float64; bytes as they are."""
    return RecordDict({RECORD: ConfigRecord({KEY: data})})


def unwrapped(content: RecordDict) -> bytes:
    """The letter in a message; empty if there is none."""
    record = content.get(RECORD)
    data = record.get(KEY) if isinstance(record, ConfigRecord) else None
    return data if isinstance(data, bytes) else b""


class _Pull:
    """Looks whether some letters have been answered, in a thread of its own."""

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


class GridLink:
    """See the module. A site's name is the one that its key was registered under.

    Flower waits for minutes for the rest of an answer whose upload broke off. So answers are looked
    for in groups, beside the coordinator: such a site holds up nobody, or only those of its group.
    """

    def __init__(self, grid: Any) -> None:
        self.grid = grid
        self.nodes: dict[str, int] = {}
        self._looked = 0.0
        self._pending: dict[str, str] = {}
        self._out: list[tuple[str, Any]] = []
        self._lost: list[Arrival] = []
        self._pulls: list[_Pull] = []
        self._failures: Counter[str] = Counter()
        self._pulled = 0.0

    def present(self) -> Sequence[str]:
        """The names of the nodes that are online."""
        now = time.monotonic()
        if now - self._looked >= LOOK:
            self._looked = now
            found = {node.name or f"node-{node.node_id}": node for node in self.grid.get_nodes()}
            self.nodes = {
                name: node.node_id
                for name, node in found.items()
                if not node.status or node.status == "online"
            }
        return list(self.nodes)

    def send(self, site: str, data: bytes) -> None:
        """Keep a letter for a node until the next `receive`, which pushes all of them together."""
        node = self.nodes.get(site)
        if node is None:
            self._lost.append(Arrival(site, error="it is not connected"))
        else:
            self._out.append((site, Message(wrapped(data), node, MESSAGE, ttl=LIFE)))

    def _push(self) -> None:
        while self._out:
            some, self._out = self._out[:TOGETHER], self._out[TOGETHER:]
            numbers: list[str | None] = list(
                self.grid.push_messages([message for _, message in some])
            )
            numbers += [None] * (len(some) - len(numbers))
            for (site, _), number in zip(some, numbers, strict=True):
                if number:
                    self._pending[number] = site
                else:
                    self._lost.append(Arrival(site, error="the engine did not take the letter"))

    def receive(self) -> Sequence[Arrival]:
        """Push what is to go, and return whatever has been answered since the last call."""
        self._push()
        arrived = self._taken()
        for pull in [pull for pull in self._pulls if pull.done]:
            self._pulls.remove(pull)
            if pull.error is not None:
                self._retry(pull)
            arrived += [a for m in pull.messages if (a := self._arrival(m)) is not None]
        now = time.monotonic()
        if now - self._pulled >= PULL:
            self._pulled = now
            asked = {number for pull in self._pulls for number in pull.numbers}
            idle = [number for number in self._pending if number not in asked]
            alone = [number for number in idle if number in self._failures]
            idle = [number for number in idle if number not in self._failures]
            groups = [idle[begin::GROUPS] for begin in range(min(GROUPS, len(idle)))]
            groups += [[number] for number in alone[:GROUPS]]
            self._pulls += [_Pull(self.grid, group) for group in groups]
        return [*arrived, *self._taken()]

    def _retry(self, pull: _Pull) -> None:
        """One answer that cannot be read must not cost the others theirs: each is pulled alone."""
        for number in pull.numbers:
            self._failures[number] += 1
            if self._failures[number] > FAILURES and number in self._pending:
                site = self._pending.pop(number)
                self._lost.append(Arrival(site, error=f"its answer cannot be read: {pull.error}"))

    def _taken(self) -> list[Arrival]:
        lost, self._lost = self._lost, []
        return lost

    def _arrival(self, message: Any) -> Arrival | None:
        self._failures.pop(message.metadata.reply_to_message_id, None)
        site = self._pending.pop(message.metadata.reply_to_message_id, None)
        if site is None:
            return None
        if message.has_error():
            return Arrival(site, error=f"no answer: {message.error.reason}")
        return Arrival(site, unwrapped(message.content))
