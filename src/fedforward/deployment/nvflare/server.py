"""`fedforward server --runtime nvflare`: FLARE's server, and a run as one job after another.

A job's sites are settled when it begins, and a job dies with its server. So where a server was
killed, or a site comes that is not in the job, the run goes on from the ledger in a new job.
"""

import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedforward.config.schema import Config
from fedforward.core.errors import FedForwardError
from fedforward.core.machine import process_runs, raise_open_file_limit
from fedforward.deployment.nvflare import kits, workspace
from fedforward.deployment.nvflare.admin import Admin
from fedforward.deployment.nvflare.job import write_job
from fedforward.deployment.nvflare.names import ABORTED, RUN
from fedforward.deployment.run_watch import RunWatch, finished
from fedforward.deployment.state import CoordinatorState, leave_out, read_without
from fedforward.deployment.supervisor import Supervisor
from fedforward.training.assembly import quorum_of
from fedforward.training.metrics import ProgressCallback
from fedforward.training.run_directory import RunDirectory

LOGGER = logging.getLogger("fedforward.deployment.server")
#: Seconds between two looks at the run, and at who is connected.
POLL_INTERVAL_S, SITES_INTERVAL_S = 0.5, 2.0
#: Seconds for FLARE's server to start, and for a job's coordinator to begin.
TIMEOUT_S, JOB_TIMEOUT_S = 90.0, 180.0
#: Seconds without a sign of life of the coordinator before it is begun again.
SILENCE_TIMEOUT_S = 180.0
#: How often a run is begun again without getting a round further.
MAX_RETRIES = 5
#: Seconds without a heartbeat after which a site is not counted as connected.
HEARTBEAT_TIMEOUT_S = 30.0
#: Seconds that sites of a run which goes on are waited for, where enough are there.
RETURN_TIMEOUT_S = 15.0
#: Seconds that a site is connected without being in the job before a new job takes it in, and
#: seconds that a job has at least.
OUTSIDE_S, JOB_S = 10.0, 45.0
#: Seconds for a job to end in order.
END_TIMEOUT_S = 30.0


def check(tls: Path | None, insecure: bool, listen: str) -> tuple[Path, int]:
    """Make sure that the options of a server go together; returns its kits and its port.

    Raises:
        FedForwardError: they do not.
    """
    if insecure or tls is None:
        given = "--insecure" if insecure else "No --tls"
        raise FedForwardError(
            f"{given}: FLARE has no connections without certificates. "
            "`fedforward certs FOLDER --runtime nvflare --host HOST --site NAME` makes startup "
            "kits; give that folder with --tls."
        )
    kit = workspace.check_kit(tls / "server", workspace.SERVER, f"--tls {tls}")
    workspace.check_kit(tls / "admin", workspace.ADMIN, f"--tls {tls}")
    target = workspace.target(kit, tls / "server")
    port = int(target.rpartition(":")[2])
    if listen.rpartition(":")[2] != str(port):
        raise FedForwardError(
            f"--listen {listen}: the kits of {tls} are made for {target}. Give --listen "
            f"0.0.0.0:{port}, or make other kits."
        )
    return tls, port


def serve(
    config: Config,
    out: Path,
    tls: Path,
    port: int,
    *,
    resume: bool,
    progress: ProgressCallback | None = None,
    without: Sequence[str] = (),
) -> dict[str, Any]:
    """Carry out a run with whatever sites come; returns its summary.

    Args:
        tls: the folder of kits.
        port: that they are made for.

    Raises:
        FedForwardError: the run cannot be begun, was stopped or failed; what was done is kept.
    """
    directory = RunDirectory(out)
    over = finished(directory, config) if resume else None
    if over is not None:
        LOGGER.info("the run was over already")
        return over
    raise_open_file_limit()
    with directory.locked(), Supervisor() as supervisor:
        config = CoordinatorState(directory).open(config, resume)
        if resume:
            leave_out(directory.path, without, config)
        service = _Service(config, directory, tls, port, supervisor, progress)
        try:
            return service.run()
        finally:
            service.admin.stop()


class _Service:
    """FLARE's server, the job of the moment, and the loop that watches them."""

    def __init__(
        self,
        config: Config,
        directory: RunDirectory,
        tls: Path,
        port: int,
        supervisor: Supervisor,
        progress: ProgressCallback | None,
    ) -> None:
        self.config = config
        self.directory = directory
        self.tls = tls
        self.port = port
        self.supervisor = supervisor
        self.watch = RunWatch(config, directory, progress)
        self.home = directory.path.absolute() / "nvflare"
        self.home.mkdir(mode=0o700, exist_ok=True)
        shutil.rmtree(self.home / "admin", ignore_errors=True)
        shutil.copytree(tls / "admin", self.home / "admin")
        self.admin = Admin(self.home / "admin", kits.ADMIN)
        self.job = ""
        self.began = self.looked = 0.0
        self.tries, self.round_before = 0, -1
        self.replacing = False
        self.old_pid = -1
        self.outside: dict[str, float] = {}

    def run(self) -> dict[str, Any]:
        """Start everything, and watch it until the run is over."""
        self.watch.phase("starting FLARE's server")
        place = self.home / "server"
        workspace.prepare(self.tls / "server", place)
        child = workspace.child(
            "FLARE's server",
            place,
            workspace.SERVER,
            self.home / "server.log",
            {RUN: str(self.directory.path.absolute())},
        )
        self.supervisor.start(child)
        last = time.monotonic() + TIMEOUT_S
        while True:
            try:
                self.admin.sites()
                break
            except FedForwardError as error:
                if not child.running or time.monotonic() > last:
                    raise FedForwardError(
                        f"FLARE's server did not start ({error}); the end of {child.log} is:\n"
                        f"{child.tail()}"
                    ) from error
        LOGGER.info("sites are served at port %d", self.port)
        self._begin()
        while True:
            time.sleep(POLL_INTERVAL_S)
            for dead in self.supervisor.keep():
                LOGGER.info("%s ended unexpectedly and is started again", dead.name)
            summary = self._look()
            if summary is not None:
                self._wait_for_end()
                return summary

    def _sites(self) -> set[str]:
        """The names of the sites that are connected; none where FLARE's server does not answer."""
        try:
            heard = self.admin.sites()
        except FedForwardError:
            return set()
        return {name for name, at in heard.items() if time.time() - at < HEARTBEAT_TIMEOUT_S}

    def _begin(self) -> None:
        """Wait for sites and submit the run as a job, in place of one that was submitted before."""
        quorum = quorum_of(self.config)
        state = CoordinatorState(self.directory)
        state.open(self.config, resume=True)
        begun = self.directory.ledger.is_file()
        wanted = max(quorum, len(state.sites) if begun else self.config.federation.clients)
        since = time.monotonic()
        while True:
            there = self._sites()
            waited = time.monotonic() - since
            if len(there) >= wanted or (
                begun and len(there) >= quorum and waited > RETURN_TIMEOUT_S
            ):
                break
            if state.stop_file.exists():
                state.stop_file.unlink(missing_ok=True)
                raise FedForwardError("The run was asked to stop. Everything up to here is kept.")
            self.watch.phase(f"waiting for sites: {len(there)} of {wanted} are connected")
            self.supervisor.keep()
            time.sleep(POLL_INTERVAL_S)
        self._wait_for_end()
        before = self.watch.status()
        self.old_pid = -1 if before is None else int(before["pid"])
        self.watch.status_file.unlink(missing_ok=True)
        folder = self.home / "job"
        shutil.rmtree(folder, ignore_errors=True)
        write_job(self.config, folder, "run")
        last = time.monotonic() + TIMEOUT_S
        while True:
            try:
                self.job = self.admin.submit(folder)
                break
            except FedForwardError:
                # FLARE's server may be the one that is being started again.
                self.supervisor.keep()
                if time.monotonic() > last:
                    raise
                time.sleep(POLL_INTERVAL_S)
        self.began = time.monotonic()
        self.outside, self.replacing = {}, False
        self.watch.phase("starting a job at the sites")

    def _wait_for_end(self) -> None:
        """Let the job that was submitted last end in order."""
        last = time.monotonic() + END_TIMEOUT_S
        while self.job and time.monotonic() < last:
            try:
                if self.admin.job(self.job).startswith("FINISHED"):
                    return
            except FedForwardError:
                return
            time.sleep(POLL_INTERVAL_S)

    def _look(self) -> dict[str, Any] | None:
        """Show what is new of the run, and begin a new job where that is needed.

        Returns:
            The run's summary, once it is over.
        """
        try:
            status = self.watch.status()
        except OSError:
            return None
        if status is None or int(status["pid"]) == self.old_pid:
            # The last job's coordinator may live for a moment longer, and write.
            alive = time.monotonic() - self.began < JOB_TIMEOUT_S and not self._job_ended()
        else:
            self.watch.show(status)
            if status["state"] == "finished":
                return self.watch.summary()
            if status["state"] == "stopped" and self.replacing:
                self._begin()
                return None
            # FLARE aborts a job that has fewer sites than a round needs.
            aborted = status["state"] == "stopped" and status["error"] == ABORTED
            if status["state"] in ("failed", "stopped") and not aborted:
                raise FedForwardError(status["error"] or f"The run {status['state']}.")
            alive = process_runs(int(status["pid"])) and not aborted
            alive = alive and self.watch.silent_s() < SILENCE_TIMEOUT_S
            if status["round"] > self.round_before:
                self.tries, self.round_before = 0, status["round"]
            if alive:
                self._look_outside(status)
        if alive:
            return None
        if self.tries >= MAX_RETRIES:
            raise FedForwardError(
                f"The run was begun {self.tries + 1} times and ended each time without a round. "
                f"See {self.home / 'server.log'}; everything up to round "
                f"{max(0, self.round_before)} is kept."
            )
        LOGGER.info("the job ended unexpectedly; the run goes on from the ledger in a new one")
        self.tries += 1
        self._begin()
        return None

    def _job_ended(self) -> bool:
        """Whether FLARE says so, asked now and then."""
        if time.monotonic() - self.looked < SITES_INTERVAL_S:
            return False
        self.looked = time.monotonic()
        try:
            return self.admin.job(self.job).startswith("FINISHED")
        except FedForwardError:
            return not self.supervisor.children[0].running

    def _look_outside(self, status: dict[str, Any]) -> None:
        """Have the coordinator stop, for a new job, where a site is connected and not in it."""
        now = time.monotonic()
        if self.replacing or now - self.looked < SITES_INTERVAL_S:
            return
        self.looked = now
        inside = {site["name"] for site in status["sites"] if site["present"]}
        out = self._sites() - inside - read_without(self.directory.path)
        self.outside = {name: self.outside.get(name, now) for name in out}
        waiting = sorted(n for n, since in self.outside.items() if now - since > OUTSIDE_S)
        if waiting and now - self.began > JOB_S:
            names = ", ".join(waiting)
            LOGGER.info("site %s is connected and not in the job: a new job begins", names)
            self.replacing = True
            CoordinatorState(self.directory).stop_file.touch()
