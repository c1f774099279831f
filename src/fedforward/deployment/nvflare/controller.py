"""FLARE's workflow of a job, which runs the coordinator in the job's server process.

The job's `run.toml` is the configuration. The run's folder lies outside of the job, in
`fedforward/NAME` of the server's workspace. So the next job of that name goes on where the last one
ended.
"""

import logging
import os
import time
from pathlib import Path
from typing import Any

from nvflare.apis.impl.controller import Controller

from fedforward.config.schema import Config
from fedforward.config.site import load_terms
from fedforward.core.errors import FedForwardError
from fedforward.deployment.coordinator import Coordinator, Stopped
from fedforward.deployment.nvflare.names import RUN, RUN_NAME, RUN_TOML
from fedforward.deployment.nvflare.transport import FlareTransport
from fedforward.training.assembly import quorum_of
from fedforward.training.folder_lock import COORDINATOR_LOCK, FolderLock
from fedforward.training.run_directory import RunDirectory

LOGGER = logging.getLogger("fedforward.deployment.nvflare")
#: Seconds for the coordinator of a job whose server was killed to be gone.
TAKEOVER_TIMEOUT_S = 60.0


class CoordinatorController(Controller):  # type: ignore[misc]
    """See the module; FLARE builds it from the job's `config_fed_server.json`."""

    def __init__(self, run: str) -> None:
        """`run`: name of the run's folder.

        Raises:
            ValueError: it cannot be a folder's name.
        """
        super().__init__()
        if not isinstance(run, str) or not RUN_NAME.fullmatch(run):
            raise ValueError(f"run = {run!r} is not allowed: use letters, digits, '.', '_', '-'.")
        self.run = run

    def start_controller(self, fl_ctx: Any) -> None:
        """Nothing is to be done before the workflow begins."""

    def stop_controller(self, fl_ctx: Any) -> None:
        """Nothing is left to be done: the ledger has it all."""

    def process_result_of_unknown_task(
        self, client: Any, task_name: str, client_task_id: str, result: Any, fl_ctx: Any
    ) -> None:
        """Drop what a site reports of a task that was given up."""

    def control_flow(self, abort_signal: Any, fl_ctx: Any) -> None:
        """Carry out the run, or go on with it; what it has to say is in the run's folder."""
        engine = fl_ctx.get_engine()
        workspace = engine.get_workspace()
        file = Path(workspace.get_app_config_dir(fl_ctx.get_job_id())) / RUN_TOML
        folder = Path(
            os.environ.get(RUN) or Path(workspace.get_root_dir()) / "fedforward" / self.run
        )
        try:
            transport = FlareTransport(self, engine, abort_signal)
            carry_out(load_terms(file, []), folder, transport)
        except Stopped as stopped:
            LOGGER.info("%s", stopped)
        except FedForwardError as error:
            # It is in status.json; a traceback would tell nobody more.
            self.system_panic(str(error), fl_ctx)


def carry_out(config: Config, out: Path, transport: FlareTransport) -> None:
    """Carry out a run once no other coordinator does.

    Raises:
        FedForwardError: another one does, too few sites are in the job, or the run cannot go on.
        Stopped: it was asked to stop.
    """
    directory = RunDirectory(out)
    if not directory.started:
        check_sites(config, transport)
        directory.claim()
    lock = FolderLock(directory.path, "run", COORDINATOR_LOCK)
    last = time.monotonic() + TAKEOVER_TIMEOUT_S
    while True:
        try:
            lock.acquire()
            break
        except FedForwardError:
            # A process whose parent was killed takes a moment to end.
            if time.monotonic() > last or transport.abort.triggered:
                raise
            time.sleep(0.5)
    try:
        Coordinator(config, directory.path, transport, resume=True, sleep=transport.wait).run()
    finally:
        lock.release()


def check_sites(config: Config, transport: FlareTransport) -> None:
    """Refuse to begin a run that would wait for sites for ever: none joins a job that runs.

    Raises:
        FedForwardError: the job has fewer sites than the run begins with.
    """
    names = sorted(transport.present())
    wanted = max(config.federation.clients, quorum_of(config))
    if len(names) < wanted:
        raise FedForwardError(
            f"The job was started with {len(names)} sites ({', '.join(names) or 'none'}), and the "
            f"run begins with {wanted} (federation.clients, federation.quorum). No site joins a "
            "job that runs: wait until all are connected, and submit it again."
        )
