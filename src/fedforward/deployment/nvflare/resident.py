"""A site's model server: its process, and one that lasts as long as a job. Imports no FLARE."""

import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from fedforward.config.site import load_site
from fedforward.core.errors import FedForwardError
from fedforward.core.paths import home
from fedforward.deployment.nvflare.names import SITE
from fedforward.deployment.supervisor import Child, Supervisor
from fedforward.training.folder_lock import FolderLock

#: Seconds between two looks at the model server's process.
KEEP_INTERVAL_S = 0.5


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
