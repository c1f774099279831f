"""A site's question for a message is held until there is one, so that it need not ask again.

Flower's SuperNode waits three seconds after each question in vain. Here the question waits instead:
the coordinator tells whom it has sent something (`notices`), and only then the engine is asked
again. An answer that broke off on its way is given again to the same site's next question, which
Flower's engine would not do.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from starlette.requests import ClientDisconnect
from starlette.responses import Response

from fedforward.deployment.flower.notices import ANYBODY, Notices
from fedforward.deployment.flower.requests import Body
from fedforward.deployment.flower.site_auth import SITES_PATH
from fedforward.deployment.flower.timings import Timings

#: The question, and what else a site asks while it waits for nothing.
PULL, HEARTBEAT = SITES_PATH + "pull-messages", SITES_PATH + "send-node-heartbeat"
#: What a site's answer begins with.
PUSH = SITES_PATH + "push-messages"
#: A site's first question in a process's life.
ACTIVATE = SITES_PATH + "activate-node"
#: Bytes of a question, of which Flower's have about twenty.
MAX_BYTES = 1 << 12
#: Seconds that a question is held: a SuperNode waits 30 s for an answer.
HOLD_S = 20.0
#: Seconds between two looks at what the coordinator told.
LOOK_INTERVAL_S = 0.03
#: Sites whose last answer is kept.
MAX_KEPT = 4096

#: Asks the engine; returns its answer.
Ask = Callable[[], Awaitable[Response]]


@dataclass
class _Owner:
    """What is known of a site.

    Attributes:
        wakes: of its questions that wait.
        kept: the last answer with a message, until the site shows that it came.
        pushing: whether it has begun an answer since its last question.
    """

    wakes: list[asyncio.Event] = field(default_factory=list)
    kept: Response | None = None
    pushing: bool = False


class HeldPulls:
    """See the module.

    Attributes:
        name_of: a site's name from what a request shows of it; None where there are no names.
        connects: how often each site began anew.
        transferred: bytes on the wire from and to all sites.
    """

    def __init__(self, sent: Notices, answered: Notices, timings: Timings) -> None:
        """`sent` is read here, `answered` written."""
        self.sent = sent
        self.answered = answered
        self.timings = timings
        self.name_of: Callable[[str], str | None] = lambda owner: None
        self.transferred: Callable[[], tuple[int, int]] = lambda: (0, 0)
        self.connects: dict[str, int] = defaultdict(int)
        self._owners: dict[str, _Owner] = {}
        self._watcher: asyncio.Task[None] | None = None

    def note(self, path: str, owner: str) -> None:
        """A request of a site has come: what it says of those before."""
        if path == HEARTBEAT:
            return
        if path != PULL:
            if path == ACTIVATE:
                self.connects[self.name_of(owner) or owner] += 1
                self.timings.note("connected", self.name_of(owner) or "")
                self._owners.pop(owner, None)
            known = self._owners.get(owner)
            if known is not None:
                known.kept = None
            if path == PUSH:
                self._of(owner).pushing = True
                self.timings.note("answering", self.name_of(owner) or "")
            return
        known = self._of(owner)
        if known.pushing:
            # A SuperNode asks for the next message when all of its answer has gone.
            known.pushing = False
            name = self.name_of(owner)
            up, down = self.transferred()
            self.timings.note("answered", name or "", up=up, down=down)
            self.answered.tell([ANYBODY if name is None else name])

    def _of(self, owner: str) -> _Owner:
        while len(self._owners) >= MAX_KEPT and owner not in self._owners:
            self._owners.pop(next(iter(self._owners)))
        return self._owners.setdefault(owner, _Owner())

    async def answer(self, owner: str, body: Body, ask: Ask, limit_s: float) -> Response:
        """The engine's answer with a message, or without one after a while.

        Args:
            body: of the request, read to its end.
            ask: asks the engine. Errors of it pass.
            limit_s: seconds that the question may be held, at most `HOLD_S`.

        Raises:
            ClientDisconnect: the site no longer waits.
        """
        known = self._of(owner)
        if known.kept is not None:
            return known.kept
        last = time.monotonic() + min(limit_s, HOLD_S)
        with self._waiting(known) as wake:
            async with _disconnect(body) as gone:
                while True:
                    wake.clear()
                    answer = await ask()
                    if answer.status_code != 200 or answer.body:
                        break
                    if not await _woken(wake, gone, last - time.monotonic()):
                        return answer
        if answer.status_code == 200:
            known.kept = answer
            self.timings.note("fetched", self.name_of(owner) or "")
        return answer

    @contextmanager
    def _waiting(self, known: _Owner) -> Iterator[asyncio.Event]:
        wake = asyncio.Event()
        known.wakes.append(wake)
        if self._watcher is None or self._watcher.done():
            self._watcher = asyncio.get_running_loop().create_task(self._watch())
        try:
            yield wake
        finally:
            known.wakes.remove(wake)

    async def _watch(self) -> None:
        """Wake the questions of those who were sent something, as long as there are any."""
        while any(known.wakes for known in self._owners.values()):
            names = self.sent.new()
            if names:
                for owner, known in self._owners.items():
                    name = self.name_of(owner)
                    if name is None or ANYBODY in names or name in names:
                        for wake in known.wakes:
                            wake.set()
            await asyncio.sleep(LOOK_INTERVAL_S)


class _disconnect:  # noqa: N801 - a context manager, used as a function
    """A task that ends when the site no longer waits; it is cancelled at the end."""

    def __init__(self, body: Body) -> None:
        self._body = body

    async def __aenter__(self) -> "asyncio.Task[None]":
        self._task = asyncio.get_running_loop().create_task(self._body.disconnected())
        return self._task

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task


async def _woken(wake: asyncio.Event, gone: "asyncio.Task[None]", seconds: float) -> bool:
    """Wait to be woken; False if the time is over.

    Raises:
        ClientDisconnect: nobody waits for the answer.
    """
    if seconds <= 0:
        return False
    waiting = asyncio.get_running_loop().create_task(wake.wait())
    try:
        await asyncio.wait({waiting, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
    if gone.done():
        raise ClientDisconnect
    return wake.is_set()


async def whole(parts: AsyncIterator[bytes]) -> bytes:
    """All parts of a body that is small."""
    return b"".join([part async for part in parts])
