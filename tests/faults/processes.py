"""What runs in processes that are killed: a coordinator, a site, and a simulated run.

A fork server imports everything once, so that a process is there at once. Sites are the model
server's own loop behind its own socket. Only the engine between is left out: a coordinator asks the
sockets of a folder. Waits are made short.
"""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from fedforward.core.errors import FedForwardError
from fedforward.deployment import coordinator as coordinators
from fedforward.deployment import model_server, participants
from fedforward.deployment.coordinator import Coordinator
from fedforward.deployment.transport import Reply
from fedforward.messages.envelope import Envelope, MessageKind
from fedforward.training.folder_lock import COORDINATOR_LOCK, FolderLock

#: Exit code of what ends in a sentence, as the command's.
SENTENCE = 2


def context() -> ForkServerContext:
    """Processes that have PyTorch and all else from the beginning."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["tests.faults.preloaded"])
    return made


class Sockets:
    """A transport to the model servers whose sockets lie in a folder.

    Sites have their numbers in the order in which they enrol. So that it is the same in each run,
    the first enrollments are handed over together, by name.
    """

    def __init__(self, folder: Path, names: str) -> None:
        self.folder = folder
        self.came: SimpleQueue[Reply] = SimpleQueue()
        self.wanted, self.first = set(names), dict[str, Reply]()

    def present(self) -> Sequence[str]:
        return sorted(path.stem for path in self.folder.glob("*.socket"))

    def send(self, site: str, data: bytes) -> None:
        threading.Thread(target=self._ask, args=(site, data), daemon=True).start()

    def _ask(self, site: str, data: bytes) -> None:
        try:
            answer = model_server.ask(str(self.folder / f"{site}.socket"), data, timeout_s=0.0)
        except OSError as error:
            self.came.put(Reply(site, error=f"the connection was lost: {error}"))
        else:
            self.came.put(Reply(site, answer))

    def receive(self) -> Sequence[Reply]:
        found = []
        with suppress(Empty):
            while True:
                reply = self.came.get_nowait()
                if self.wanted and reply.data and _is_enrollment(reply.data):
                    self.first[reply.site] = reply
                else:
                    found.append(reply)
        if self.wanted and self.wanted <= self.first.keys():
            found += [self.first[name] for name in sorted(self.wanted)]
            self.wanted = set()
        return found


def _is_enrollment(data: bytes) -> bool:
    return Envelope.decode(data).kind is MessageKind.ENROLLMENT


def _in_child(log: Path, run: Callable[[], None]) -> None:
    """Run something with its own log; a `FedForwardError` is a sentence in it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    try:
        run()
    except FedForwardError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(SENTENCE)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(70)
    os._exit(0)


def site(settings: Path, socket: Path, log: Path) -> None:
    """A site's model server, until it is killed."""
    model_server.POLL_INTERVAL_S = 0.02
    _in_child(log, lambda: model_server.serve(settings, socket))


def server(content: dict[str, Any], out: Path, sockets: Path, log: Path) -> None:
    """A coordinator, begun or gone on with, to the end of its run."""
    coordinators.POLL_INTERVAL_S = 0.02
    participants.RETRY_REFUSED_S, participants.RECONNECT_TIMEOUT_S = 0.5, 20.0
    participants.MAX_RETRIES = 20

    def run() -> None:
        from tests.support.coordinator import configured

        out.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(out, "--out", COORDINATOR_LOCK)
        lock.acquire()
        Coordinator(configured(**content), out, Sockets(sockets, "abc"), resume=True).run()

    _in_child(log, run)


def simulation(content: dict[str, Any], out: Path, log: Path) -> None:
    """A simulated run, begun or gone on with."""

    def run() -> None:
        from fedforward.config.loading import validate
        from fedforward.training.run import Run

        Run(validate(content), out, resume=(out / "config.toml").is_file()).fit()

    _in_child(log, run)


def ended(process: BaseProcess, seconds: float = 300.0) -> int:
    """Wait for a process; returns its exit code."""
    process.join(seconds)
    assert process.exitcode is not None, "the process has not ended"
    return process.exitcode


def kill(process: BaseProcess) -> bool:
    """SIGKILL; whether the process was alive."""
    alive = process.is_alive()
    process.kill()
    process.join(30)
    return alive


def wait_until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    """Wait for something that must come."""
    last = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < last, "it did not come"
        time.sleep(0.01)


def read(path: Path) -> dict[str, Any]:
    """A JSON object."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
