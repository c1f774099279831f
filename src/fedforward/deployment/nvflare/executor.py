"""FLARE's executor at a site: it hands envelopes to the site's model server, and knows no more.

The model server is the one that `fedforward client` keeps, for all jobs. Where a FLARE client was
started by other means, a job's own process starts one, and ends it with the job. It reads
`site.toml` from the client's `local` folder. Imports no PyTorch.
"""

import logging
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import Shareable, make_reply

from fedforward.config.site import load_site
from fedforward.core.errors import FedForwardError
from fedforward.core.paths import home
from fedforward.deployment.model_server import ask
from fedforward.deployment.nvflare.transport import TASK, unwrap, wrap
from fedforward.deployment.supervisor import Child, Supervisor
from fedforward.training.folder_lock import FolderLock

LOGGER = logging.getLogger("fedforward.deployment.nvflare")
#: Environment variable with the socket of a model server that runs already.
SOCKET = "FEDFORWARD_SOCKET"
#: Environment variable with the path of `site.toml`, instead of the one in `local`.
SITE = "FEDFORWARD_SITE"
#: Seconds between two looks at the model server's process, and at FLARE's signal to abort.
KEEP_INTERVAL_S, ABORT_INTERVAL_S = 0.5, 0.5


def site_file(local: Path, name: str) -> Path:
    """The `site.toml` of a site.

    Args:
        local: the FLARE client's folder of that name.
        name: of the site; a simulator has `NAME.toml` for each.

    Raises:
        FedForwardError: there is none.
    """
    if given := os.environ.get(SITE):
        return Path(given)
    for file in (local / f"{name}.toml", local / "site.toml"):
        if file.is_file():
            return file
    raise FedForwardError(
        f"{local / 'site.toml'} is missing. It says where this site's model and data are; "
        "`fedforward init site.toml --site` writes a commented one."
    )


def model_server(
    file: Path, socket: Path, log: Path, on_line: Callable[[str], None] | None = None
) -> Child:
    """The process with a site's model, to be started.

    Args:
        file: the site's configuration.
        on_line: is told each line that it prints.
    """
    command = [sys.executable, "-m", "fedforward.deployment.model_server", str(file), str(socket)]
    return Child("model server", command, log, {}, on_line)


class ResidentModel:
    """A model server of one job, kept running in a thread until `stop`."""

    def __init__(self, file: Path) -> None:
        """Start it.

        Raises:
            FedForwardError: the site's configuration is wrong, or its folder is in use.
        """
        out = home(load_site(file).site.out)
        out.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(out, "site.out")
        self._lock.acquire()
        # A socket's path must be short, and its folder this user's alone.
        self._private = Path(tempfile.mkdtemp(prefix="fedforward-"))
        self.socket = self._private / "s"
        self.log = out / "model-server.log"
        self._child = model_server(file, self.socket, self.log)
        self._stopped = threading.Event()
        # The kernel ends a child with the thread that started it: that one must last.
        self._thread = threading.Thread(target=self._keep, name="model server", daemon=True)
        self._thread.start()

    def _keep(self) -> None:
        with Supervisor() as supervisor:
            supervisor.start(self._child)
            while not self._stopped.wait(KEEP_INTERVAL_S):
                supervisor.keep()

    def stop(self) -> None:
        """End it and wait until it is gone."""
        self._stopped.set()
        self._thread.join()
        shutil.rmtree(self._private, ignore_errors=True)
        self._lock.release()


class SiteExecutor(Executor):  # type: ignore[misc]
    """See the module; FLARE builds it from the job's `config_fed_client.json`."""

    def __init__(self) -> None:
        super().__init__()
        self._model: ResidentModel | None = None
        self._starting = threading.Lock()

    def handle_event(self, event_type: str, fl_ctx: Any) -> None:
        """FLARE's events: the model server of a job ends with it."""
        if event_type == EventType.END_RUN and self._model is not None:
            model, self._model = self._model, None
            model.stop()

    def execute(self, task_name: str, shareable: Any, fl_ctx: Any, abort_signal: Any) -> Shareable:
        """Bring an envelope to the model server, and its reply back.

        Whatever goes wrong is told here; the server gets one of FLARE's return codes.
        """
        if task_name != TASK:
            return make_reply(ReturnCode.TASK_UNSUPPORTED)
        try:
            reply = self._ask(self._socket(fl_ctx), unwrap(shareable), abort_signal)
        except (FedForwardError, OSError) as error:
            # FLARE may send logs of errors to the server, so that this is none.
            LOGGER.warning("%s", error)
            return make_reply(ReturnCode.EXECUTION_EXCEPTION)
        return make_reply(ReturnCode.TASK_ABORTED) if reply is None else wrap(reply)

    def _socket(self, fl_ctx: Any) -> str:
        if given := os.environ.get(SOCKET):
            return given
        with self._starting:
            if self._model is None:
                local = Path(fl_ctx.get_engine().get_workspace().get_site_config_dir())
                self._model = ResidentModel(site_file(local, fl_ctx.get_identity_name()))
                LOGGER.info("the site's own log is %s", self._model.log)
            return str(self._model.socket)

    def _ask(self, socket: str, data: bytes, abort_signal: Any) -> bytes | None:
        """The model server's reply; None if FLARE aborts the job first.

        Raises:
            OSError: there is no model server, or it died over the message.
        """
        answers: list[bytes] = []
        errors: list[OSError] = []

        def work() -> None:
            try:
                answers.append(ask(socket, data))
            except OSError as error:
                errors.append(error)

        thread = threading.Thread(target=work, name="ask", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(ABORT_INTERVAL_S)
            if abort_signal.triggered:
                return None
        if errors:
            raise errors[0]
        return answers[0]
