"""`fedforward client`: a site's model server and its connection, both kept running."""

import logging
import math
import os
import re
import ssl
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import httpx

from fedforward.config.site import SiteConfig
from fedforward.core.errors import FedForwardError
from fedforward.deployment.flower import certificates, engine
from fedforward.deployment.flower.site_auth import SITES_PATH
from fedforward.deployment.flower.timings import Timings
from fedforward.deployment.site_folder import site_folders
from fedforward.deployment.supervisor import Child, Supervisor, free_port

LOGGER = logging.getLogger("fedforward.deployment.client")
#: Seconds between two looks at the processes.
POLL_INTERVAL_S = 0.3
#: What the connection's log says when something is wrong, and what that means.
_MEANINGS = (
    (
        r"certificate.verify.failed|CERTIFICATE_VERIFY_FAILED|certificate verify failed",
        "the server's certificate is not signed by --tls's ca.crt, or is for another host than "
        "--server names",
    ),
    (
        r"Failed to activate SuperNode|Invalid SuperNode authentication",
        "the server does not let this site in: it does not know the key (its operator puts "
        "NAME.pub into the sites folder of --tls), or it still holds this site's last connection, "
        "which it lets go within a minute",
    ),
    (
        r"WRONG_VERSION_NUMBER|record layer failure|HTTP_REQUEST|Server disconnected without",
        "one side speaks TLS and the other does not; --tls or --insecure must be the same on both",
    ),
    (
        r"ConnectError|ConnectTimeout|Connection refused|Name or service not known"
        r"|No route to host|timed out",
        "the server cannot be reached; trying again",
    ),
)
#: What the log says of a request that failed and is tried again; why, it does not say.
_FAILED, _MENDED = "Connection attempt failed", "Connection successful after"
#: Seconds between two looks at why, and for one look.
_DIAGNOSE_INTERVAL_S, _DIAGNOSE_TIMEOUT_S = 5.0, 8.0


def check(tls: Path | None, key: Path | None, insecure: bool) -> None:
    """Make sure that the options of a site go together.

    Raises:
        FedForwardError: they do not, or a file cannot be used.
    """
    if insecure:
        if tls is not None or key is not None:
            raise FedForwardError("--insecure goes without --tls and --key. Leave one out.")
        return
    if tls is None or key is None:
        missing = "--tls FOLDER (with the server's ca.crt)" if tls is None else "--key FILE"
        raise FedForwardError(
            f"{missing} is missing. Both come from the server's operator, who makes them with "
            "`fedforward certs`; --insecure goes without, for trying out on one machine."
        )
    certificates.check_site(tls, key)


def take_part(
    path: Path,
    settings: SiteConfig,
    server: str,
    *,
    tls: Path | None,
    key: Path | None,
    once: bool,
) -> None:
    """Take part in whatever the server carries out, until interrupted.

    Args:
        path: of the site's configuration, for the model server.
        server: HOST:PORT.
        once: whether to end with the first run.

    Raises:
        FedForwardError: the site's folder cannot be written, or an option is wrong.
    """
    engine.check_installed()
    if not re.fullmatch(r".+:\d{1,5}", server):
        raise FedForwardError(
            f"--server {server!r} is not allowed: it must be HOST:PORT, as in fed.example.org:9400."
        )
    with site_folders(settings) as (out, private), Supervisor() as supervisor:
        engine_home = out / "flower"
        engine_home.mkdir(exist_ok=True)
        _watch(supervisor, path, out, engine_home, private, server, tls, key, once)


def _watch(
    supervisor: Supervisor,
    path: Path,
    out: Path,
    home: Path,
    private: Path,
    server: str,
    tls: Path | None,
    key: Path | None,
    once: bool,
) -> None:
    over = False

    def on_line(line: str) -> None:
        nonlocal over
        if line.startswith(("Loading weights", "Traceback", " ")) or "Warning" in line:
            return
        LOGGER.info(line)
        over = over or line.startswith("the run is over")

    authority = None if tls is None else tls / "ca.crt"
    socket, secret, port = private / "s", private / "secret", free_port()
    certificates.write_new(secret, os.urandom(32), secret=True)
    connection = _Connection(partial(trouble, server, authority))
    environment = engine.environment(home)
    supervisor.start(
        Child(
            "model server",
            [sys.executable, "-m", "fedforward.deployment.model_server", str(path), str(socket)],
            out / "model-server.log",
            environment,
            on_line,
        )
    )
    model_server = supervisor.children[0]
    supervisor.start(
        Child(
            "connection",
            engine.supernode(server, port, authority, key, secret),
            out / "connection.log",
            environment,
            connection.line,
        )
    )
    Timings.begin(home)
    command = engine.executor(port, secret, socket, home, out / "connection.log")
    supervisor.start(Child("executor", command, out / "executor.log", environment))
    children = {model_server.name: "the model server", "executor": "the executor of messages"}
    while True:
        time.sleep(POLL_INTERVAL_S)
        for child in supervisor.keep():
            if child is model_server and model_server.starts == 1 and not socket.exists():
                # It never got as far as to answer: its configuration is at fault.
                raise FedForwardError(
                    f"the site's model server could not start; the end of {model_server.log} is:\n"
                    f"{model_server.tail()}"
                )
            if child.name in children:
                LOGGER.info(f"{children[child.name]} ended unexpectedly and is started again")
            else:
                connection.ended()
        if once and over:
            # The server's last message is answered before the connection goes.
            time.sleep(3.0)
            return


def trouble(server: str, authority: Path | None) -> str:
    """Why a server cannot be spoken to, found out by trying it; nothing if it answers."""
    scheme = "http" if authority is None else "https"
    trust = True if authority is None else ssl.create_default_context(cafile=str(authority))
    try:
        answer = httpx.post(
            f"{scheme}://{server}{SITES_PATH}",
            verify=trust,
            timeout=_DIAGNOSE_TIMEOUT_S,
            trust_env=False,
        )
    except httpx.HTTPError as error:
        words = f"{type(error).__name__}: {error}"
        return _meaning(words) or f"the server cannot be reached ({words}); trying again"
    except httpx.InvalidURL as error:
        return f"--server {server!r} is no address: {error}"
    return "the server is being started; trying again" if answer.status_code == 503 else ""


def _meaning(line: str) -> str:
    """What a line of the log means; nothing if it is not about trouble."""
    return next((words for pattern, words in _MEANINGS if re.search(pattern, line)), "")


class _Connection:
    """Reads the connection's log for people."""

    def __init__(self, look: Callable[[], str]) -> None:
        """`look`: at the server, for why it cannot be spoken to."""
        self.look = look
        self.said = ""
        self.reason = ""
        self._looked = -math.inf

    def line(self, line: str) -> None:
        """Look at a line of the log."""
        if "SuperNode ID" in line:
            self.reason = ""
            self._say("connected to the server")
        elif _MENDED in line and self.reason:
            self.reason = ""
            self._say("the server answers again")
        elif _FAILED in line:
            now = time.monotonic()
            if now - self._looked > _DIAGNOSE_INTERVAL_S:
                self._looked = now
                self._because(self.look())
        else:
            self._because(_meaning(line))

    def ended(self) -> None:
        """The connection's process ended."""
        self._say(self.reason or "the connection ended; trying again")

    def _because(self, words: str) -> None:
        if words:
            self.reason = words
            self._say(words)

    def _say(self, words: str) -> None:
        if words != self.said:
            self.said = words
            LOGGER.info(words)
