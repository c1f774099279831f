"""Processes that are kept running, and that are all stopped, by id, when the one who started them
ends.
"""

import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from fedforward.deployment.transient import TransientErrors

LOGGER = logging.getLogger("fedforward.deployment.supervisor")
#: Seconds before a process that died is started again: doubled each time, up to the last.
FIRST_RESTART_S, LAST_RESTART_S = 1.0, 10.0
#: A process that ran for so many seconds counts as stable when it dies.
STABLE_S = 60.0
#: Seconds between asking a process to end and ending it.
TERMINATE_TIMEOUT_S = 8.0
_DEATH_SIGNAL = 1
#: What the processes print is UTF-8, whatever the locale is.
UTF8 = {"PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8:backslashreplace"}


def free_port() -> int:
    """A port of the loopback device that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _die_with_parent() -> None:
    """In a new process, before its program: be told to end when the parent dies (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGTERM)


class Child:
    """A process in a group of its own, with a log.

    Attributes:
        name: what it is called to people.
        starts: how often it was started.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str],
        on_line: Callable[[str], None] | None = None,
    ) -> None:
        """`on_line` is told each line that it prints; those go to the log as well."""
        self.name = name
        self.command = list(command)
        self.log = log
        self.environment = dict(environment)
        self.on_line = on_line
        self.starts = 0
        self.process: subprocess.Popen[bytes] | None = None
        self._began = 0.0
        self._pause = FIRST_RESTART_S
        self._due = 0.0
        self._read = 0

    @property
    def running(self) -> bool:
        """Whether it is alive."""
        return self.process is not None and self.process.poll() is None

    @property
    def pid(self) -> int:
        """Of the running process; -1 if it does not run."""
        return self.process.pid if self.process is not None and self.running else -1

    def start(self) -> None:
        """Start it now."""
        with self.log.open("ab") as log:
            self._read = log.tell()
            self.process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **UTF8, **self.environment},
                # Ctrl-C is for the one who started it, who then stops it in order.
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        self.starts += 1
        self._began = time.monotonic()

    def keep(self) -> bool:
        """Start it again if it died and its pause is over; True if it was found dead just now."""
        self._forward()
        if self.process is None or self.running:
            return False
        now = time.monotonic()
        if not self._due:
            self._pause = FIRST_RESTART_S if now - self._began > STABLE_S else self._pause
            self._due = now + self._pause
            self._pause = min(2 * self._pause, LAST_RESTART_S)
            return True
        if now >= self._due:
            self._due = 0.0
            self.start()
        return False

    def _forward(self) -> None:
        """Hand on the lines that were printed since the last call."""
        if self.on_line is None or not self.log.is_file():
            return
        with self.log.open("rb") as log:
            log.seek(self._read)
            new = log.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.decode(errors="replace").splitlines():
            self.on_line(line)

    def tail(self, lines: int = 12) -> str:
        """The end of its log."""
        if not self.log.is_file():
            return ""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def stop(self) -> None:
        """Ask it to end, and end it and all that it started if it does not."""
        process = self.process
        if process is None:
            return
        try:
            if process.poll() is None:
                process.terminate()
                process.wait(TERMINATE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            # Whoever is left of its group has no one to stop it any more.
            _kill_group(process.pid)
            process.wait()
            self._forward()


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


class Supervisor:
    """Children that are started in order and stopped in the reverse order."""

    def __init__(self) -> None:
        self.children: list[Child] = []
        self._errors = TransientErrors(LOGGER.warning)

    def __enter__(self) -> "Supervisor":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for child in reversed(self.children):
            child.stop()

    def start(self, child: Child) -> Child:
        """Start a child and keep it from now on."""
        self.children.append(child)
        child.start()
        return child

    def keep(self) -> list[Child]:
        """Start again whoever died; returns those who were found dead just now.

        One that cannot be started is noted, and is tried again by the next call.
        """
        dead = []
        for child in self.children:
            with self._errors.noted(f"{child.name} cannot be looked after"):
                if child.keep():
                    dead.append(child)
        return dead


class Terminated(SystemExit):
    """The process was asked to end (SIGTERM); what it started is stopped on the way out."""


def end_on_sigterm() -> None:
    """Turn SIGTERM, as of a service manager, into an exception that unwinds."""

    def handle(number: int, frame: object) -> None:
        raise Terminated(143)

    signal.signal(signal.SIGTERM, handle)
