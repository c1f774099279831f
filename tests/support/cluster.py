"""A federation of real processes on the loopback device, for tests and `benchmarks/cluster.py`.

A `Cluster` is a folder with certificates, a server's `run.toml` and sites with data of their own,
and the commands that were started on them. On the way out all are stopped by their ids, and
nothing that any of them started may be left.
"""

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fedforward.config.template import toml_value
from fedforward.demo.text import ANSWER, PROMPT, site_examples
from fedforward.deployment.flower import certificates
from fedforward.deployment.supervisor import free_port
from fedforward.federation.ledger import Ledger

#: Seconds for whatever should happen: machines are shared, and pause.
PATIENCE = 300.0
#: Seconds in which everything that was told to end must be gone.
GONE = 20.0
#: Names a cluster in the environment of everything that it starts.
MARK = "FEDFORWARD_CLUSTER"
MODEL = Path(str(files("fedforward.demo").joinpath("model")))
#: What tells a process's role from its command line.
_ROLES = {
    "fedforward.cli": "command",
    "fedforward.deployment.model_server": "model server",
    "flower-superlink": "superlink",
    "flower-superexec": "superexec",
    "flower-supernode": "supernode",
    "flwr-serverapp": "coordinator",
    "fedforward.deployment.flower.executor": "executor",
    "nvflare.private.fed.app.server.server_train": "FLARE's server",
    "nvflare.private.fed.app.server.runner_process": "coordinator",
    "nvflare.private.fed.app.client.client_train": "FLARE's client",
    "nvflare.private.fed.app.client.worker_process": "FLARE's job at a site",
    "fedforward.deployment.nvflare.admin": "FLARE's session",
}

Settings = dict[str, Any]


@dataclass(frozen=True)
class Process:
    """A process that a cluster's commands, or what they started, have started."""

    pid: int
    parent: int
    command: str

    @property
    def role(self) -> str:
        """What it does; empty for Flower's short commands."""
        return next((role for word, role in _ROLES.items() if word in self.command), "")


def processes(mark: str) -> list[Process]:
    """All living processes whose environment or command line mentions `mark`, but this one."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        # It may end, or be another user's, while it is looked at; one that is dead has neither.
        with suppress(OSError):
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
            if mark.encode() in command + (entry / "environ").read_bytes():
                state = (entry / "stat").read_text().rpartition(")")[2].split()
                found.append(Process(int(entry.name), int(state[1]), command.decode().strip()))
    return found


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_bytes(pid: int) -> int:
    """The most memory that a process has held (VmHWM)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def to_toml(content: dict[str, Settings]) -> str:
    """Sections as TOML."""
    return "\n".join(
        f"[{section}]\n" + "".join(f"{key} = {toml_value(value)}\n" for key, value in part.items())
        for section, part in content.items()
    )


class Cluster:
    """See the module.

    Attributes:
        commands: what was started and should be running, "server" and each site's name.
    """

    def __init__(
        self, folder: Path, sites: Sequence[str], *, secure: bool = True, **changes: Any
    ) -> None:
        """`changes` are of `run.toml`, as in `method__local_steps=5`."""
        self.folder = folder
        self.sites = tuple(sites)
        self.secure = secure
        self.port = free_port()
        self.commands: dict[str, subprocess.Popen[bytes]] = {}
        self.out = folder / "out"
        folder.mkdir(parents=True, exist_ok=True)
        certificates.make(folder / "certs", ["localhost"], self.sites)
        content: dict[str, Settings] = {
            "lora": {"rank": 2},
            "data": {
                "prompt": PROMPT,
                "answer": ANSWER,
                "heldout": 3,
                "sequence_length": 64,
            },
            "federation": {"clients": len(sites), "rounds": 2, "quorum": len(sites)},
            "method": {"learning_rate": 1e-4, "mu": 1e-2, "local_steps": 2, "batch_size": 2},
            "run": {"evaluate_every": 100},
        }
        for key, value in changes.items():
            section, _, name = key.partition("__")
            content.setdefault(section, {})[name] = value
        (folder / "run.toml").write_text(to_toml(content), encoding="utf-8")
        for number, name in enumerate(self.sites):
            self.write_site(name, number)

    def write_site(self, name: str, number: int, model: Path = MODEL) -> None:
        """A site's folder: its `site.toml` and data that no other site has."""
        rows = site_examples(seed=0, per_site=60)[number :: max(3, len(self.sites))][:24]
        source = self.folder / f"{name}.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        content: dict[str, Settings] = {
            "site": {"out": str(self.folder / name)},
            "model": {"path": str(model)},
            "data": {"source": str(source)},
            "run": {"threads": 1, "probes_per_call": 2},
            "limits": {"local_steps": 100_000, "fields": list(rows[0]), "heldout": 1},
        }
        (self.folder / f"{name}.toml").write_text(to_toml(content), encoding="utf-8")

    # ---- commands --------------------------------------------------------------------------------

    def start(self, name: str, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start a `fedforward` command; what it says is appended to `NAME.out`."""
        with (self.folder / f"{name}.out").open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "fedforward.cli", *arguments],
                cwd=self.folder,
                env={**os.environ, **environment, MARK: str(self.folder)},
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                # As a shell does: Ctrl-C is sent to a group of its own.
                start_new_session=True,
            )
        self.commands[name] = process
        return process

    def serve(self, *options: str) -> subprocess.Popen[bytes]:
        """Start the server."""
        security = ["--tls", "certs"] if self.secure else ["--insecure"]
        listen = ["--listen", f"127.0.0.1:{self.port}"]
        return self.start(
            "server", "server", "run.toml", *listen, *security, "--out", "out", *options
        )

    def join(
        self,
        name: str,
        *,
        tls: str | None = "certs",
        key: str | None = None,
        port: int | None = None,
        once: bool = True,
        **environment: str,
    ) -> subprocess.Popen[bytes]:
        """Start a site; `tls=None` is plaintext."""
        command = ["client", f"{name}.toml", "--server", f"localhost:{port or self.port}"]
        if tls is None or not self.secure:
            command.append("--insecure")
        else:
            command += ["--tls", tls, "--key", key or f"certs/sites/{name}.key"]
        return self.start(name, *command, *(["--once"] if once else []), **environment)

    def said(self, name: str) -> str:
        """What a command has said so far."""
        path = self.folder / f"{name}.out"
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    def interrupt(self, name: str) -> None:
        """Ctrl-C, as a terminal sends it to the group in its foreground."""
        os.killpg(self.commands[name].pid, signal.SIGINT)

    def ended(self, name: str, seconds: float = PATIENCE) -> int:
        """Wait for a command to end; returns its exit status."""
        return self.commands.pop(name).wait(seconds)

    # ---- what goes on ----------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """`status.json`, or a run that has not begun."""
        with suppress(OSError, ValueError):
            return dict(json.loads((self.out / "status.json").read_text(encoding="utf-8")))
        return {"round": 0, "state": "", "sites": [], "pid": -1}

    def site(self, name: str) -> dict[str, Any]:
        """What the coordinator says of a site; nothing if it has not seen it."""
        found = [site for site in self.status()["sites"] if site["name"] == name]
        return dict(found[0]) if found else {"note": "", "rounds": 0, "pending": None}

    @property
    def committed(self) -> int:
        """Rounds in the ledger."""
        path = self.out / "ledger.sqlite"
        if not path.is_file():
            return 0
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10.0)) as ledger:
            return int(ledger.execute("SELECT COUNT(*) FROM rounds").fetchone()[0])

    def summary(self) -> dict[str, Any]:
        """Of a run that is over."""
        return dict(json.loads((self.out / "summary.json").read_text(encoding="utf-8")))

    def kept(self, name: str) -> dict[str, Any]:
        """What a site wrote down at the end."""
        text = (self.folder / name / "state.json").read_text(encoding="utf-8")
        return dict(json.loads(text))

    def log(self, name: str) -> str:
        """The log of a site's model server."""
        path = self.folder / name / "model-server.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    def rounds(self) -> list[tuple[bytes, list[bytes]]]:
        """The ledger: each round's entry, and what it was made from."""
        path = self.out / "ledger.sqlite"
        if not path.is_file():
            return []
        ledger = Ledger(path)
        found = [(r.entry.encode(), [o.encode() for o in r.results]) for r in ledger.rounds()]
        ledger.close()
        return found

    def wait(self, what: str, seen: Callable[[], Any], seconds: float = PATIENCE) -> float:
        """Wait until something is seen; returns how long. Ends at once if a command fails."""
        began = time.monotonic()
        while not seen():
            for name, process in self.commands.items():
                if process.poll() and not seen():
                    raise AssertionError(
                        f"{name} ended with {process.returncode} before {what}:\n{self.said(name)}"
                    )
            if time.monotonic() - began > seconds:
                outputs = "\n".join(f"--- {n}\n{self.said(n)[-1500:]}" for n in self.commands)
                raise AssertionError(f"no {what} in {seconds:.0f} s; {self.status()}\n{outputs}")
            time.sleep(0.1)
        return time.monotonic() - began

    def wait_for_round(self, number: int) -> float:
        """Wait until a round is in the ledger."""
        return self.wait(f"round {number}", lambda: self.committed >= number)

    def wait_for_words(self, name: str, sentence: str) -> float:
        """Wait until a command has said something."""
        return self.wait(f"{sentence!r} of {name}", lambda: sentence in self.said(name))

    def wait_for_work(self, *names: str) -> None:
        """Wait until the sites' model servers are in the middle of a round's steps."""

        def working(name: str) -> bool:
            before = self.committed
            if self.site(name)["pending"] != "task":
                return False
            pid = self.pid("model server", name)
            used = cpu_seconds(pid)
            time.sleep(0.5)
            return before == self.committed and cpu_seconds(pid) > used + 0.1

        self.wait("work on a round", lambda: all(working(name) for name in names))

    def finish(self) -> dict[str, Any]:
        """Wait until the server, and the sites that end with the run, have ended well."""
        self.wait("end of the run", lambda: self.commands["server"].poll() is not None)
        for name in list(self.commands):
            code = self.ended(name, 60.0)
            assert code == 0, f"{name} ended with {code}:\n{self.said(name)}"
        return self.summary()

    # ---- processes -------------------------------------------------------------------------------

    def processes(self) -> list[Process]:
        """Everything alive that this cluster has started."""
        return processes(str(self.folder))

    def below(self, pid: int) -> list[Process]:
        """What a process has started, and what that has started."""
        return list(_below(self.processes(), pid))

    def pid(self, role: str, site: str = "server") -> int:
        """A process by what it does.

        Args:
            role: "command", "superlink", "superexec", "coordinator", "model server", "supernode"
                or "executor".
            site: whose; "server" for the server's.
        """
        if role == "coordinator":
            return int(self.status()["pid"])
        command = self.commands[site].pid
        if role == "command":
            return command
        found = [
            process.pid
            for process in self.processes()
            if process.parent == command and process.role == role
        ]
        assert len(found) == 1, f"{len(found)} processes are the {role} of {site}"
        return found[0]

    def kill(self, role: str, site: str = "server") -> int:
        """SIGKILL a process; returns the id that it had."""
        pid = self.pid(role, site)
        if role == "command":
            process = self.commands.pop(site)
            process.kill()
            process.wait()
        else:
            os.kill(pid, signal.SIGKILL)
        return pid

    def gone(self, pids: Sequence[int], seconds: float = GONE) -> None:
        """Make sure that processes end within some seconds."""
        left = set(pids)
        last = time.monotonic() + seconds
        while left:
            left &= {process.pid for process in self.processes()}
            if left and time.monotonic() > last:
                names = [p.command for p in self.processes() if p.pid in left]
                raise AssertionError(f"still alive after {seconds:.0f} s: {names}")
            time.sleep(0.1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self.commands.values():
            process.terminate()
        for process in self.commands.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(2 * GONE)
        try:
            self.gone([process.pid for process in self.processes()])
        except AssertionError:
            for process in self.processes():
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            if error is None:
                raise
        finally:
            for process in self.commands.values():
                process.wait()


def _below(everything: Sequence[Process], pid: int) -> Iterator[Process]:
    for process in everything:
        if process.parent == pid:
            yield process
            yield from _below(everything, process.pid)


class Forwarder:
    """A port of the loopback device that hands on to another one, counting bytes.

    Attributes:
        port: to connect to.
        up: bytes from those who connected.
        down: bytes to them.
    """

    def __init__(self, target: int, alter: Callable[[bytes], bytes] = bytes) -> None:
        """`alter` may change what goes up."""
        self.up = self.down = 0
        self._target = target
        self._alter = alter
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listening.accept()
                threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        # Either side may break off; the other is then closed as well.
        with (
            near,
            suppress(OSError),
            socket.create_connection(("127.0.0.1", self._target)) as far,
        ):
            back = threading.Thread(target=self._copy, args=(far, near, False), daemon=True)
            back.start()
            self._copy(near, far, True)
            back.join()

    def _copy(self, source: socket.socket, target: socket.socket, upwards: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if upwards:
                    self.up += len(data)
                    data = self._alter(data)
                else:
                    self.down += len(data)
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.close()
