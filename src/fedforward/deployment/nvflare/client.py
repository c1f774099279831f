"""`fedforward client --runtime nvflare`: a site's model server and FLARE's client, kept running."""

import logging
import re
import time
from pathlib import Path

from fedforward.config.site import SiteConfig
from fedforward.core.errors import FedForwardError
from fedforward.deployment.nvflare import workspace
from fedforward.deployment.nvflare.names import SOCKET
from fedforward.deployment.nvflare.resident import model_server
from fedforward.deployment.site_folder import site_folders
from fedforward.deployment.supervisor import Supervisor

LOGGER = logging.getLogger("fedforward.deployment.client")
#: Seconds between two looks at the processes.
POLL_INTERVAL_S = 0.3
#: Seconds for FLARE to end a job that is over.
END_TIMEOUT_S = 5.0
#: What the log of FLARE's client says, and what that means.
_MEANINGS = (
    (r"Successfully registered client", "connected to the server"),
    (
        r"CERTIFICATE_VERIFY_FAILED|SSLCertVerificationError|certificate verify failed",
        "the server's certificate is not signed by the authority of this site's startup kit, or "
        "is for another host",
    ),
    (
        r"TLSV1_ALERT_UNKNOWN_CA|SSLV3_ALERT|alert unknown ca|tlsv13 alert|alert certificate",
        "the server does not let this site in: the startup kit is not of its authority",
    ),
    (
        r"disabled|not authorized|AuthenticationError|unable to authenticate|failed to register",
        "the server does not let this site in: its operator has shut it out, or the startup kit is "
        "not of its authority",
    ),
    (
        r"ClientConnectorError|Connect call failed|Connection refused|Cannot connect to host"
        r"|Name or service not known",
        "the server cannot be reached; trying again",
    ),
    (r"Launched job", "a job begins"),
    (
        r"is not in allow_list",
        "FLARE refuses the job: class_allow_list in the kit's local/resources.json lacks "
        "fedforward.deployment.nvflare.",
    ),
)


def check(tls: Path | None, key: Path | None, insecure: bool, server: str) -> Path:
    """Make sure that the options of a site go together; returns its startup kit.

    Raises:
        FedForwardError: they do not.
    """
    if insecure:
        raise FedForwardError(
            "--insecure: FLARE has no connections without certificates. Give the site's startup "
            "kit with --tls FOLDER."
        )
    if key is not None:
        raise FedForwardError("--key: a FLARE startup kit has the site's key. Leave --key out.")
    if tls is None:
        raise FedForwardError(
            "--tls FOLDER is missing: this site's startup kit. It comes from the server's "
            "operator, who makes it with `fedforward certs --runtime nvflare`."
        )
    kit = workspace.check_kit(tls, workspace.CLIENT, f"--tls {tls}")
    target = workspace.target(kit, tls)
    if server != target:
        raise FedForwardError(
            f"--server {server}: the startup kit {tls} is for {target}. Give that, or another kit."
        )
    workspace.subject(tls, "client.crt")
    return tls


def take_part(path: Path, settings: SiteConfig, kit: Path, *, once: bool) -> None:
    """Take part in whatever the server carries out, until interrupted.

    Args:
        path: of the site's configuration, for the model server.
        kit: the site's startup kit.
        once: whether to end with the first run.

    Raises:
        FedForwardError: the site's folder cannot be written, or its configuration is wrong.
    """
    with site_folders(settings) as (out, private):
        workspace.prepare(kit, out / "nvflare")
        with Supervisor() as supervisor:
            _watch(supervisor, path, out, private / "s", once)


def _watch(supervisor: Supervisor, path: Path, out: Path, socket: Path, once: bool) -> None:
    over = False

    def on_line(line: str) -> None:
        nonlocal over
        if line.startswith(("Loading weights", "Traceback", " ")) or "Warning" in line:
            return
        LOGGER.info(line)
        over = over or line.startswith("the run is over")

    model = supervisor.start(model_server(path, socket, out / "model-server.log", on_line))
    connection = _Connection()
    supervisor.start(
        workspace.child(
            "connection",
            out / "nvflare",
            workspace.CLIENT,
            out / "connection.log",
            {SOCKET: str(socket)},
            connection.line,
        )
    )
    while True:
        time.sleep(POLL_INTERVAL_S)
        for dead in supervisor.keep():
            if dead is model and model.starts == 1 and not socket.exists():
                # It never got as far as to answer: its configuration is at fault.
                raise FedForwardError(
                    f"the site's model server could not start; the end of {model.log} is:\n"
                    f"{model.tail()}"
                )
            if dead is model:
                LOGGER.info("the model server ended unexpectedly and is started again")
            else:
                connection.ended()
        if once and over:
            # The server's last message is answered before the connection goes.
            time.sleep(END_TIMEOUT_S)
            return


class _Connection:
    """Reads the log of FLARE's client for people."""

    def __init__(self) -> None:
        self.said = ""

    def line(self, line: str) -> None:
        """Look at a line of the log."""
        for pattern, words in _MEANINGS:
            if re.search(pattern, line):
                self._say(words)
                return

    def ended(self) -> None:
        """FLARE's client ended."""
        self._say("FLARE's client ended unexpectedly and is started again")

    def _say(self, words: str) -> None:
        if words != self.said:
            self.said = words
            LOGGER.info(words)
