"""Targets that act on what they are sent: a server, a site, the two sides of a sum, the proxy."""

import asyncio
import atexit
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any
from unittest.mock import patch

import numpy as np

from fedforward.core.errors import FedForwardError, MessageError
from fedforward.deployment.asked import Asked
from fedforward.deployment.site import Site
from fedforward.deployment.tuning import Tuning
from fedforward.federation.agreement import QuorumError
from fedforward.federation.client import Client, Replica
from fedforward.messages.codec import Message
from fedforward.messages.entry import Contribution, Entry
from fedforward.messages.envelope import Envelope, MessageKind
from fedforward.messages.refusal import Refusal, RefusalCode
from fedforward.messages.report import Report
from fedforward.messages.secure import (
    MaskedReport,
    SumKeys,
    SumOpened,
    SumOpening,
    SumRoster,
    SumShares,
    SumTask,
)
from fedforward.messages.snapshot import Snapshot
from tests.fuzz import worlds
from tests.fuzz.targets import RUN, sealed, whole
from tests.support.sums import NUMBERS, Sum, random_values


def site(data: bytes) -> None:
    """Any message to a site that has a model and two rounds; the first byte is its kind."""
    if not data:
        return
    held, tuning = _site()
    tuning.replica.reset()
    tuning.replica.known = {}
    tuning.replica.catch_up([entry(0), entry(1)])
    tuning.asked = Asked()
    with np.errstate(all="ignore"):
        reply = Envelope.decode(held.answer(sealed(data[0], data[1:])))
    if reply.kind is MessageKind.REFUSAL:
        assert Refusal.decode(reply.body).code is not RefusalCode.UNFORESEEN
    assert tuning.replica.rounds >= 0 and len(tuning.model.digest()) == 32


def entry(number: int) -> Entry:
    """A round that the site's replica takes."""
    return Entry(number, (Contribution(2**32 - 1, np.array([0.1, 0.2], np.float32)),))


@lru_cache
def _site() -> tuple[Site, Any]:
    from fedforward.config.loading import validate
    from fedforward.config.site import AT_SITES
    from fedforward.models.quadratic import Quadratic
    from tests.fuzz.targets import _site_settings

    logging.getLogger("fedforward").setLevel(logging.CRITICAL)
    model: Any = Quadratic([2.0, 1.0], dimension=16, blocks=2)
    config = validate(
        {
            "model": {"path": AT_SITES},
            "data": {"source": AT_SITES, "prompt": "{question}", "answer": "{answer}"},
            "federation": {"rounds": 5},
            "method": {"name": "decomfl", "local_steps": 2, "learning_rate": 1e-3},
        }
    )
    tuned = worlds.method()
    replica = Replica(model, tuned)

    class Batches:
        def __len__(self) -> int:
            return 10

        def __getitem__(self, place: int) -> None:
            return None

    class Quick(Tuning):
        """Without data: what a site measures is the quadratic."""

        def client(self, number: int) -> Client:
            if number != 0:
                raise MessageError(f"A task of client {number} was refused: this site is 0.")
            return Client(0, Batches(), self.replica)

    parts: dict[str, Any] = dict.fromkeys(("corpus", "collate", "heldout", "identity"), None)
    tuning = Quick(
        run=RUN,
        terms={},
        config=config,
        replica=replica,
        method=tuned,
        **parts,
    )
    out = tempfile.mkdtemp(prefix="fedforward-fuzz-")
    atexit.register(shutil.rmtree, out, ignore_errors=True)
    settings = _site_settings()
    section = settings.site.model_copy(update={"out": out})
    held = Site(settings.model_copy(update={"site": section}))
    held.tuning = tuning
    # What needs data is left out: it is asked only after the task was taken.
    held._evaluate = held._keep = _synced  # type: ignore[method-assign]
    return held, tuning


def _synced(tuning: Any, task: Any, body: bytes) -> tuple[MessageKind, bytes]:
    tuning.client(task.client).sync(task)
    return MessageKind.METRICS, b"{}"


def server(data: bytes) -> None:
    """Reports and a snapshot to a server, and what it makes of them.

    Each has a byte in front that says who sends it and what it is, and two of its length.
    """
    held = worlds.server()
    held.open_round()
    place = 0
    with np.errstate(all="ignore"):
        for _ in range(6):
            if place + 3 > len(data):
                break
            head, size = data[place], int.from_bytes(data[place + 1 : place + 3], "little")
            body = data[place + 3 : place + 3 + size]
            place += 3 + size
            kind: type[Message] = Snapshot if head & 16 else Report
            with suppress(MessageError):
                if head & 16:
                    held.receive_snapshot(whole(kind, body), head % 4)
                else:
                    held.receive(whole(kind, body), head % 4)
            if head & 32 or not held.missing():
                _closed(held)
        _closed(held)
    held.sync_task(0)


def _closed(held: Any) -> None:
    before = held.round
    try:
        held.close_round()
    except QuorumError:
        pass
    except FedForwardError:
        assert held.round == before
    held.open_round()


class Repeated:
    """Secrets that are the same each time, so that bytes of one sum fit the next."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, size: int) -> bytes:
        self.count += 1
        return hashlib.shake_128(self.count.to_bytes(4, "little")).digest(size)


@contextmanager
def repeated_sum() -> Iterator[Sum]:
    """A sum of four sites, before its first step."""
    source = Repeated()
    with (
        patch.object(os, "urandom", source),
        patch("Crypto.Protocol.SecretSharing.rng", source),
    ):
        yield Sum(random_values(range(4)))


def sum_session(data: bytes) -> None:
    """Keys, shares or openings from one of four sites to the server of a sum; the first byte is of
    which step.
    """
    if not data:
        return
    step, body = data[0] % 3, data[1:]
    with repeated_sum() as made, suppress(MessageError, QuorumError):
        session = made.session
        if step == 0:
            for client in range(3):
                session.take_keys(made.keys(client).encode(), client)
            session.take_keys(whole(SumKeys, body), 3)
            session.make_roster()
        elif step == 1:
            made.begin(without_shares=[3])
            session.take_shares(whole(SumShares, body), 3)
            session.task(0, b"task")
        else:
            made.begin()
            summed = made.mask()
            for client in summed[1:]:
                session.take_opened(made.opened(client, summed).encode(), client)
            session.take_opened(whole(SumOpened, body), 0)
            session.masks(NUMBERS)


def sum_party(data: bytes) -> None:
    """What a server sends a site in a sum: a roster, a task or an opening; the first byte says."""
    if not data:
        return
    step, body = data[0] % 3, data[1:]
    with repeated_sum() as made, suppress(FedForwardError):
        party = made.parties[1]
        if step == 0:
            made.keys(0), made.keys(1)
            party.share(SumRoster.decode(whole(SumRoster, body)))
            return
        made.begin()
        if step == 1:
            request = SumTask.decode(whole(SumTask, body))
            if party.masked(request) is None:
                party.mask(request, MaskedReport(4, 1, made.values[1]))
        else:
            made.mask()
            party.open(SumOpening.decode(whole(SumOpening, body)))


class _Transport(asyncio.Transport):
    """Takes what the proxy writes, and is closed by it."""

    def __init__(self) -> None:
        super().__init__({"peername": ("192.0.2.1", 1), "sockname": ("192.0.2.2", 2)})
        self.written: list[bytes] = []
        self.closed = False

    def write(self, data: Any) -> None:
        self.written.append(bytes(data))

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    abort = close

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


@lru_cache
def _proxy() -> tuple[Any, Any, Any, list[BaseException]]:
    import httpx
    from cryptography.hazmat.primitives.asymmetric import ec
    from uvicorn.server import ServerState

    from fedforward.deployment.flower.reverse_proxy import ReverseProxy

    logging.getLogger("fedforward").setLevel(logging.CRITICAL)
    private = ec.derive_private_key(7, ec.SECP384R1())
    proxy = ReverseProxy(
        "127.0.0.1", 1, "http://engine", None, None, {b"key": private.public_key()}
    )
    proxy.ready = True

    async def engine(request: httpx.Request) -> httpx.Response:
        await request.aread()
        return httpx.Response(200, content=b"answer")

    proxy._client = httpx.AsyncClient(
        base_url="http://engine", transport=httpx.MockTransport(engine)
    )
    wrong: list[BaseException] = []
    answer: Callable[..., Any] = proxy._answer

    async def watched(*arguments: Any) -> Any:
        from starlette.requests import ClientDisconnect

        from fedforward.deployment.flower.requests import RefusedError

        try:
            return await answer(*arguments)
        except (RefusedError, ClientDisconnect, asyncio.CancelledError):
            raise
        except BaseException as error:
            wrong.append(error)
            raise

    proxy._answer = watched  # type: ignore[method-assign]
    loop = asyncio.new_event_loop()
    config = proxy._server.config
    if not config.loaded:
        config.load()
    return proxy, loop, (config, ServerState), wrong


def proxy_head(data: bytes) -> None:
    """What anybody sends to the public port; the first bit says whether keys are asked for."""
    if not data:
        return
    from fedforward.deployment.flower.connections import BoundedProtocol

    proxy, loop, (config, state), wrong = _proxy()
    keys = proxy.keys
    proxy.keys = keys if data[0] & 1 else None
    transport = _Transport()

    async def talk() -> None:
        protocol = BoundedProtocol(
            config=config, server_state=state(), app_state={}, _loop=asyncio.get_running_loop()
        )
        protocol.connection_made(transport)
        half = len(data) // 2 if data[0] & 2 else len(data)
        for part in (data[1:half], data[max(1, half) :]):
            if part:
                protocol.data_received(part)
                for _ in range(4):
                    await asyncio.sleep(0)
        protocol.connection_lost(None)
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    try:
        loop.run_until_complete(talk())
    finally:
        proxy.keys = keys
        proxy.bytes_open = 0
    assert sum(map(len, transport.written)) < 10_000
    if wrong:
        error = wrong[0]
        wrong.clear()
        raise error
