"""`fedforward server`: Flower's engine, a reverse proxy before it, and a run.

The run is begun again until it is over.

Nothing here knows of rounds. Processes that die are started again; the coordinator, which Flower
starts as its server app, goes on from the ledger each time.
"""

import hashlib
import json
import logging
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from fedforward.config.schema import Config
from fedforward.core.errors import FedForwardError
from fedforward.core.logs import PHASES
from fedforward.core.machine import process_runs, raise_open_file_limit
from fedforward.deployment.flower import certificates, engine
from fedforward.deployment.flower.reverse_proxy import ReverseProxy
from fedforward.deployment.state import CoordinatorState
from fedforward.deployment.supervisor import Child, Supervisor, free_port
from fedforward.training.metrics import ProgressCallback, RoundingWatch
from fedforward.training.run_directory import RunDirectory, write_json

LOGGER = logging.getLogger("fedforward.deployment.server")
#: Seconds between two looks at the run.
POLL_INTERVAL_S = 0.5
#: Seconds between two looks at the keys of sites.
KEYS_INTERVAL_S = 5.0
#: Seconds after which a key that was not taken is tried again.
RETRY_KEY_S = 60.0
#: Seconds for the engine to start, and for the coordinator to begin or to be seen again.
TIMEOUT_S = 90.0
#: How often a run is begun again without getting a round further.
MAX_RETRIES = 5
#: Seconds without a sign of life of the coordinator before it is begun again.
SILENCE_TIMEOUT_S = 180.0


@dataclass
class ListenAddress:
    """Where sites connect.

    Attributes:
        host: to listen on.
        port: likewise.
        tls: the folder of certificates and of sites' public keys; None is plaintext, for trying
            out on one machine.
    """

    host: str
    port: int
    tls: Path | None

    @classmethod
    def parse(cls, listen: str, tls: Path | None, insecure: bool) -> "ListenAddress":
        """From the command line's options.

        Raises:
            FedForwardError: an address that is none, or neither certificates nor `insecure`.
        """
        host, colon, port = listen.rpartition(":")
        if not colon or not port.isdigit() or not 0 < int(port) < 65536:
            raise FedForwardError(
                f"--listen {listen!r} is not allowed: it must be HOST:PORT, as in 0.0.0.0:9400."
            )
        if tls is None and not insecure:
            raise FedForwardError(
                "--tls FOLDER is missing. `fedforward certs FOLDER --host HOST --site NAME` makes "
                "certificates and keys; --insecure goes without, for trying out on one machine."
            )
        if tls is not None and insecure:
            raise FedForwardError("--tls and --insecure exclude each other. Leave one out.")
        if tls is not None:
            certificates.check_server(tls)
        return cls(host.strip("[]"), int(port), tls)


def serve(
    config: Config,
    out: Path,
    address: ListenAddress,
    *,
    resume: bool,
    progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """Carry out a run with whatever sites come; returns its summary.

    Args:
        progress: told of each round.

    Raises:
        FedForwardError: the run cannot be begun, was stopped or failed; what was done is kept.
    """
    engine.check_installed()
    directory = RunDirectory(out)
    over = _finished(directory, config) if resume else None
    if over is not None:
        LOGGER.info("the run was over already")
        return over
    # Every site has a connection or two.
    raise_open_file_limit()
    with directory.locked(), Supervisor() as supervisor:
        config = CoordinatorState(directory).open(config, resume)
        return _Service(config, directory, address, supervisor, progress).run()


def _finished(directory: RunDirectory, config: Config) -> dict[str, Any] | None:
    """The summary of a run that has had all its rounds."""
    if not directory.summary.is_file():
        return None
    directory.check_same(config)
    try:
        summary = json.loads(directory.summary.read_text(encoding="utf-8"))
        done = summary["rounds"] >= config.federation.rounds
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dict(summary) if done else None


class _Service:
    """The parts of a server and the loop that watches them."""

    def __init__(
        self,
        config: Config,
        directory: RunDirectory,
        address: ListenAddress,
        supervisor: Supervisor,
        progress: ProgressCallback | None,
    ) -> None:
        self.config = config
        self.directory = directory
        self.address = address
        self.supervisor = supervisor
        self.progress = progress
        self.home = directory.path / "flower"
        self.home.mkdir(mode=0o700, exist_ok=True)
        self.status = directory.path / "status.json"
        self.port = free_port()
        self.lines_seen = 0
        self.rounding = RoundingWatch(config)
        self.notes: dict[str, str] = {}
        self.run_number = self.phase = ""

    def run(self) -> dict[str, Any]:
        """Start everything, and watch it until the run is over."""
        PHASES.info("starting the engine")
        inner = self._inner_certificates()
        proxy = self._open_proxy(inner)
        try:
            secret = self.home / "secret"
            secret.write_bytes(os.urandom(32))
            secret.chmod(0o600)
            self._start(
                "superlink", engine.superlink(self.port, self.home / "engine.sqlite", secret, inner)
            )
            self._wait_for_engine(inner)
            self._start("superexec", engine.superexec(self.port, secret, inner))
            authority = None if inner is None else inner / "ca.crt"
            flower = engine.CommandLine(self.home, f"127.0.0.1:{self.port}", authority)
            keys = SiteKeys(self.address.tls, self.home / "registered.json", flower)
            keys.look()
            proxy.ready = True
            app = engine.write_app(self.home / "app", self.config, self.directory.path)
            scheme = "https" if self.address.tls else "http"
            LOGGER.info(f"sites are served at {scheme}://{self.address.host}:{self.address.port}")
            return self._watch(flower, app, keys)
        finally:
            proxy.close()

    def _inner_certificates(self) -> Path | None:
        """Certificates between proxy and engine, which asks for some where keys are used."""
        if self.address.tls is None:
            return None
        folder = self.home / "loopback"
        certificates.make(folder, ["127.0.0.1"], [])
        return folder

    def _open_proxy(self, inner: Path | None) -> ReverseProxy:
        tls = self.address.tls
        pair = None if tls is None else (str(tls / "server.crt"), str(tls / "server.key"))
        scheme = "http" if inner is None else "https"
        trust = None if inner is None else certificates.trust(inner)
        url = f"{scheme}://127.0.0.1:{self.port}"
        proxy = ReverseProxy(self.address.host, self.address.port, url, trust, pair)
        proxy.open()
        return proxy

    def _start(self, name: str, command: Any) -> Child:
        log = self.home / f"{name}.log"
        child = Child(name, command, log, engine.environment(self.home))
        return self.supervisor.start(child)

    def _wait_for_engine(self, inner: Path | None) -> None:
        (superlink,) = self.supervisor.children
        scheme = "http" if inner is None else "https"
        verify = True if inner is None else certificates.trust(inner)
        last = time.monotonic() + TIMEOUT_S
        while True:
            try:
                httpx.get(
                    f"{scheme}://127.0.0.1:{self.port}/health", verify=verify, trust_env=False
                )
                return
            except httpx.HTTPError:
                if not superlink.running or time.monotonic() > last:
                    raise FedForwardError(
                        f"Flower's engine did not start; the end of {superlink.log} is:\n"
                        f"{superlink.tail()}"
                    ) from None
                time.sleep(0.1)

    def _watch(self, flower: engine.CommandLine, app: Path, keys: "SiteKeys") -> dict[str, Any]:
        """Begin the run, again if its coordinator dies, until it is over."""
        tries, round_before, looked = 0, -1, 0.0
        self._begin(flower, app)
        while True:
            time.sleep(POLL_INTERVAL_S)
            for child in self.supervisor.keep():
                LOGGER.info(f"{child.name} ended unexpectedly and is started again")
            now = time.monotonic()
            if now - looked > KEYS_INTERVAL_S:
                looked = now
                keys.look()
            status = self._read_status()
            if status is None:
                alive = now - self.began < TIMEOUT_S
            else:
                self._show(status)
                if status["state"] in ("finished", "failed", "stopped"):
                    return self._end(status)
                alive = process_runs(int(status["pid"])) and _age(self.status) < SILENCE_TIMEOUT_S
                if status["round"] > round_before:
                    tries, round_before = 0, status["round"]
            if alive:
                continue
            tries += 1
            if tries > MAX_RETRIES:
                log = self.home / "superexec.log"
                raise FedForwardError(
                    f"The run was begun {tries} times and ended each time without a round. See "
                    f"{log}; everything up to round {max(0, round_before)} is kept."
                )
            LOGGER.info("the coordinator ended unexpectedly; the run goes on from the ledger")
            self._begin(flower, app)

    def _begin(self, flower: engine.CommandLine, app: Path) -> None:
        """Submit the run to the engine, in place of one that was submitted before."""
        if self.run_number:
            # It may have ended, or the engine have forgotten it.
            with suppress(FedForwardError):
                flower.stop(self.run_number)
        self.status.unlink(missing_ok=True)
        last = time.monotonic() + TIMEOUT_S
        while True:
            try:
                self.run_number = flower.submit(app)
                break
            except FedForwardError:
                # The engine itself may be the one that is being started again.
                self.supervisor.keep()
                if time.monotonic() > last:
                    raise
                time.sleep(POLL_INTERVAL_S)
        self.began = time.monotonic()

    def _read_status(self) -> dict[str, Any] | None:
        try:
            return dict(json.loads(self.status.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return None

    def _show(self, status: dict[str, Any]) -> None:
        """Log what has changed."""
        for site in status["sites"]:
            words = _words(site)
            if self.notes.get(site["name"]) != words:
                self.notes[site["name"]] = words
                LOGGER.info(f"site {site['label']}: {words}")
        lines = self.directory.read_metrics(self.config.federation.rounds)
        if len(lines) > self.lines_seen:
            for line in lines[max(1, self.lines_seen) :]:
                # The coordinator is another process, whose log nobody sees.
                if words := self.rounding.look(line):
                    LOGGER.warning(words)
            self.lines_seen = len(lines)
            if len(lines) > 1:
                total = self.config.federation.rounds
                if self.progress is not None:
                    self.progress(lines[-1]["round"], total, lines[-1])
        elif not lines and status["what"] != self.phase:
            self.phase = status["what"]
            PHASES.info(self.phase)

    def _end(self, status: dict[str, Any]) -> dict[str, Any]:
        if status["state"] != "finished":
            raise FedForwardError(status["error"] or f"The run {status['state']}.")
        return dict(json.loads(self.directory.summary.read_text(encoding="utf-8")))


class SiteKeys:
    """The public keys of the sites that are let in: those in the folder, at any time."""

    def __init__(self, tls: Path | None, record: Path, flower: engine.CommandLine) -> None:
        self.folder = None if tls is None else tls / "sites"
        self.record = record
        self.flower = flower
        self.known: dict[str, dict[str, Any]] = {}
        if record.is_file():
            self.known = json.loads(record.read_text(encoding="utf-8"))
        self.complaints: dict[tuple[str, str], str] = {}
        self.tried: dict[tuple[str, str], float] = {}

    def look(self) -> None:
        """Let in new keys, and no longer those that are gone or were replaced."""
        if self.folder is None or not self.folder.is_dir():
            return
        found = self._read(self.folder)
        for name in [n for n in self.known if found.get(n, ("", ""))[1] != self.known[n]["key"]]:
            try:
                self.flower.unregister(self.known[name]["node"])
            except FedForwardError as error:
                # Until it has worked, the site is still let in; the next look tries again.
                self._complain(name, "", f"its key cannot be taken away: {error}")
                continue
            LOGGER.info(f"site {name}: its key was taken away")
            del self.known[name]
            self._save()
        now = time.monotonic()
        new = {
            name: path
            for name, (path, key) in found.items()
            if name not in self.known
            and now - self.tried.get((name, key), -RETRY_KEY_S) >= RETRY_KEY_S
        }
        self.tried |= {(name, found[name][1]): now for name in new}
        try:
            nodes = self.flower.register(new)
        except FedForwardError as error:
            nodes = {name: str(error) for name in new}
        for name, node in nodes.items():
            if isinstance(node, str):
                self._complain(name, found[name][1], f"its key {new[name]} is not taken: {node}")
            else:
                self.known[name] = {"key": found[name][1], "node": node}
        if nodes:
            self._save()

    def _read(self, folder: Path) -> dict[str, tuple[Path, str]]:
        """The public keys that are there: file and fingerprint, by name."""
        found = {}
        for path in sorted(folder.glob("*.pub")):
            try:
                found[path.stem] = (path, hashlib.sha256(path.read_bytes()).hexdigest())
            except OSError as error:
                self._complain(path.stem, "", f"its key {path} cannot be read: {error.strerror}")
        return found

    def _complain(self, name: str, key: str, words: str) -> None:
        """Say what is wrong with a site's key, once."""
        if self.complaints.get((name, key)) != words:
            self.complaints[name, key] = words
            LOGGER.info(f"site {name}: {words}")

    def _save(self) -> None:
        write_json(self.record, self.known)


def _words(site: dict[str, Any]) -> str:
    """What a site is doing, for people."""
    if site["note"]:
        return str(site["note"])
    if not site["present"]:
        return "not connected"
    if not site["ready"]:
        return "connected, loading model and data"
    return f"takes part with {site['examples']} examples"


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0
