"""`fedforward server`: Flower's engine, a reverse proxy before it, and a run.

The run is begun again until it is over.

Nothing here knows of rounds. Processes that die are started again; the coordinator, which Flower
starts as its server app, goes on from the ledger each time.
"""

import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
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
from fedforward.deployment.flower.held_pulls import HeldPulls
from fedforward.deployment.flower.notices import ANSWERED, SENT, Notices
from fedforward.deployment.flower.reverse_proxy import ReverseProxy
from fedforward.deployment.flower.site_auth import PublicKeys
from fedforward.deployment.flower.site_keys import SiteKeys
from fedforward.deployment.flower.timings import Timings
from fedforward.deployment.run_watch import RunWatch, finished
from fedforward.deployment.state import CoordinatorState, leave_out
from fedforward.deployment.supervisor import Child, Supervisor, free_port
from fedforward.deployment.transient import TransientErrors
from fedforward.training.metrics import ProgressCallback
from fedforward.training.run_directory import RunDirectory

LOGGER = logging.getLogger("fedforward.deployment.server")
#: Seconds between two looks at the run.
POLL_INTERVAL_S = 0.5
#: Seconds between two looks at the keys of sites.
KEYS_INTERVAL_S = 5.0
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
    without: Sequence[str] = (),
) -> dict[str, Any]:
    """Carry out a run with whatever sites come; returns its summary.

    Args:
        progress: told of each round.
        without: names of sites that a run leaves out that goes on.

    Raises:
        FedForwardError: the run cannot be begun, was stopped or failed; what was done is kept.
    """
    engine.check_installed()
    directory = RunDirectory(out)
    over = finished(directory, config) if resume else None
    if over is not None:
        LOGGER.info("the run was over already")
        return over
    # Every site has a connection or two.
    raise_open_file_limit()
    with directory.locked(), Supervisor() as supervisor:
        config = CoordinatorState(directory).open(config, resume)
        service = _Service(config, directory, address, supervisor, progress)
        return service.run(without if resume else None)


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
        self.home = directory.path / "flower"
        self.home.mkdir(mode=0o700, exist_ok=True)
        self.watch = RunWatch(config, directory, progress)
        self.port = free_port()
        self.names: Mapping[str, str] = {}
        self.run_number = ""
        self.errors = TransientErrors(LOGGER.warning)
        self.tries, self.round_before = 0, -1

    def run(self, without: Sequence[str] | None) -> dict[str, Any]:
        """Start everything, and watch it until the run is over.

        Args:
            without: sites that a run leaves out that goes on; None for a new run.
        """
        PHASES.info("starting the engine")
        inner = self._inner_certificates()
        proxy = self._open_proxy(inner)
        try:
            if without is not None:
                # The last that may refuse to start was the port.
                leave_out(self.directory.path, without, self.config)
            secret = self.home / "secret"
            secret.unlink(missing_ok=True)
            certificates.write_new(secret, os.urandom(32), secret=True)
            self._start(
                "superlink", engine.superlink(self.port, self.home / "engine.sqlite", secret, inner)
            )
            self._wait_for_engine(inner)
            self._start("superexec", engine.superexec(self.port, secret, inner))
            authority = None if inner is None else inner / "ca.crt"
            flower = engine.CommandLine(self.home, f"127.0.0.1:{self.port}", authority)
            keys = SiteKeys(self.address.tls, self.home / "registered.json", flower)
            keys.look()
            proxy.keys, self.names = keys.public, keys.names
            proxy.ready = True
            app = engine.write_app(self.home / "app", self.config, self.directory.path)
            scheme = "https" if self.address.tls else "http"
            LOGGER.info(f"sites are served at {scheme}://{self.address.host}:{self.address.port}")
            return self._watch(flower, app, keys, proxy)
        finally:
            proxy.close()

    def _inner_certificates(self) -> Path | None:
        """Certificates between proxy and engine, which asks for some where keys are used."""
        if self.address.tls is None:
            return None
        folder = self.home / "loopback"
        try:
            certificates.check_server(folder)
        except FedForwardError:
            # There are none yet, or a start was cut short: nobody else has them.
            shutil.rmtree(folder, ignore_errors=True)
            certificates.make(folder, ["127.0.0.1"], [])
        return folder

    def _open_proxy(self, inner: Path | None) -> ReverseProxy:
        tls = self.address.tls
        pair = None if tls is None else (str(tls / "server.crt"), str(tls / "server.key"))
        scheme = "http" if inner is None else "https"
        trust = None if inner is None else certificates.trust(inner)
        url = f"{scheme}://127.0.0.1:{self.port}"
        keys: PublicKeys | None = None if tls is None else {}
        host, port = self.address.host, self.address.port
        proxy = ReverseProxy(host, port, url, trust, pair, keys, self._held())
        proxy.open()
        return proxy

    def _held(self) -> HeldPulls:
        """What holds sites' questions until the coordinator, another process, tells of messages."""
        sent, answered = Notices(self.home / SENT), Notices(self.home / ANSWERED)
        sent.create()
        answered.create()
        held = HeldPulls(sent, answered, Timings.begin(self.home))
        held.name_of = lambda owner: self.names.get(owner)
        return held

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

    def _watch(
        self, flower: engine.CommandLine, app: Path, keys: SiteKeys, proxy: ReverseProxy
    ) -> dict[str, Any]:
        """Begin the run, again if its coordinator dies, until it is over."""
        looked = 0.0
        self._begin(flower, app)
        while True:
            time.sleep(POLL_INTERVAL_S)
            for child in self.supervisor.keep():
                LOGGER.info(f"{child.name} ended unexpectedly and is started again")
            if time.monotonic() - looked > KEYS_INTERVAL_S:
                looked = time.monotonic()
                with self.errors.noted("the sites' keys cannot be looked at"):
                    keys.look()
                proxy.keys, self.names = keys.public, keys.names
            with self.errors.noted("the run cannot be looked at"):
                summary = self._look(flower, app)
                if summary is not None:
                    return summary

    def _look(self, flower: engine.CommandLine, app: Path) -> dict[str, Any] | None:
        """Show what is new of the run, and begin it again if its coordinator died.

        Returns:
            Its summary, once it is over.
        """
        status = self.watch.status()
        if status is None:
            alive = time.monotonic() - self.began < TIMEOUT_S
        else:
            self.watch.show(status)
            if status["state"] in ("finished", "failed", "stopped"):
                return self._end(status)
            alive = process_runs(int(status["pid"])) and self.watch.silent_s() < SILENCE_TIMEOUT_S
            if status["round"] > self.round_before:
                self.tries, self.round_before = 0, status["round"]
        if alive:
            return None
        if self.tries >= MAX_RETRIES:
            log = self.home / "superexec.log"
            raise FedForwardError(
                f"The run was begun {self.tries + 1} times and ended each time without a round. "
                f"See {log}; everything up to round {max(0, self.round_before)} is kept."
            )
        LOGGER.info("the coordinator ended unexpectedly; the run goes on from the ledger")
        self._begin(flower, app)
        self.tries += 1
        return None

    def _begin(self, flower: engine.CommandLine, app: Path) -> None:
        """Submit the run to the engine, in place of one that was submitted before."""
        if self.run_number:
            # It may have ended, or the engine have forgotten it.
            with suppress(FedForwardError):
                flower.stop(self.run_number)
        self.watch.status_file.unlink(missing_ok=True)
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

    def _end(self, status: dict[str, Any]) -> dict[str, Any]:
        if status["state"] != "finished":
            raise FedForwardError(status["error"] or f"The run {status['state']}.")
        return self.watch.summary()
