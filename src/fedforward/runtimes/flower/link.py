"""Letters over Flower's `Grid`, as the `Link` that a coordinator asks for."""

import time
from collections.abc import Sequence
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict

from fedforward.federation.link import Arrival

#: Record and key that a letter travels under.
RECORD, KEY = "fedforward", "letter"
#: The message type, and the name of the client app's function.
MESSAGE = "query.letter"
#: Seconds between two looks at which nodes are online.
LOOK = 1.0
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


class GridLink:
    """See the module. A site's name is the one that its key was registered under."""

    def __init__(self, grid: Any) -> None:
        self.grid = grid
        self.nodes: dict[str, int] = {}
        self._looked = 0.0
        self._pending: dict[str, str] = {}
        self._lost: list[Arrival] = []

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
        """Push a letter to a node."""
        node = self.nodes.get(site)
        if node is None:
            self._lost.append(Arrival(site, error="it is not connected"))
            return
        message = Message(wrapped(data), node, MESSAGE, ttl=LIFE)
        (number,) = self.grid.push_messages([message]) or (None,)
        if number is None:
            self._lost.append(Arrival(site, error="the engine did not take the letter"))
        else:
            self._pending[number] = site

    def receive(self) -> Sequence[Arrival]:
        """Pull whatever has been answered."""
        arrived, self._lost = self._lost, []
        if not self._pending:
            return arrived
        for message in self.grid.pull_messages(list(self._pending)):
            site = self._pending.pop(message.metadata.reply_to_message_id, None)
            if site is None:
                continue
            if message.has_error():
                arrived.append(Arrival(site, error=f"no answer: {message.error.reason}"))
            else:
                arrived.append(Arrival(site, unwrapped(message.content)))
        return arrived
