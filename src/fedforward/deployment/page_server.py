"""The page of a run on a port of the loopback device, for the people at the server's machine.

It serves that one page and nothing else: GET and HEAD of "/", to 127.0.0.1, for requests that name
this machine. It reads the run's folder, changes nothing, and knows no more of the sites than
`fedforward report` shows. Imports no PyTorch.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from fedforward.core.errors import FedForwardError
from fedforward.reporting.live import RELOAD_S, signature
from fedforward.reporting.page import make_page, waiting_page
from fedforward.reporting.record import read_run

LOGGER = logging.getLogger("fedforward.deployment.page")
HOST = "127.0.0.1"
#: What a request may call this machine: a page of another name could read the answer otherwise.
HOSTS = frozenset({"127.0.0.1", "localhost"})
#: Seconds for a request to come, and connections at a time.
TIMEOUT_S, MAX_CONNECTIONS = 10.0, 16
#: Seconds between two drawings, and as a multiple of what the last one took.
LEAST_PAUSE_S, PAUSE = 5.0, 10.0
_HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class _LatestPage:
    """The page of a run as it is now, drawn when something has changed."""

    def __init__(self, run: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.run = run
        self.clock = clock
        self._lock = threading.Lock()
        self._page, self._of = b"", ""
        self._next = 0.0

    def get(self) -> bytes:
        """The bytes of the page."""
        with self._lock:
            now = self.clock()
            found = signature(self.run)
            if not self._page or (found != self._of and now >= self._next):
                self._page, self._of = self._drawn(), found
                took = self.clock() - now
                self._next = self.clock() + max(LEAST_PAUSE_S, PAUSE * took)
            return self._page

    def _drawn(self) -> bytes:
        try:
            page = make_page([read_run(self.run)], reload_s=RELOAD_S)
        except (FedForwardError, OSError) as error:
            LOGGER.debug("the page of %s: %s", self.run, error)
            page = waiting_page()
        return page.encode("utf-8", "replace")


class _Server(ThreadingHTTPServer):
    """At most so many requests at a time."""

    daemon_threads = True
    block_on_close = False
    # Another process of this machine must not take the port over.
    allow_reuse_port = False

    def __init__(self, port: int, page: _LatestPage) -> None:
        self.page = page
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__((HOST, port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Hand a request to a thread, or close it where there are too many."""
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer one request."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that breaks off says nothing."""
        LOGGER.debug("a request for the page broke off", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = TIMEOUT_S
    server_version, sys_version = "fedforward", ""

    def do_GET(self) -> None:
        """The page."""
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        """The page's headers."""
        self._answer(with_body=False)

    def _refuse(self) -> None:
        self._send(405, b"only GET and HEAD\n", plain=True, more={"Allow": "GET, HEAD"})

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = _refuse  # noqa: N815

    def _answer(self, *, with_body: bool) -> None:
        named = self.headers.get_all("Host") or []
        if len(named) != 1 or not _is_here(named[0]):
            self._send(403, b"this page is for 127.0.0.1 only\n", plain=True, body=with_body)
        elif self.path != "/":
            self._send(404, b"there is one page here: /\n", plain=True, body=with_body)
        else:
            self._send(200, self.server.page.get(), body=with_body)

    def _send(
        self,
        code: int,
        content: bytes,
        *,
        plain: bool = False,
        body: bool = True,
        more: dict[str, str] | None = None,
    ) -> None:
        self.send_response(code)
        headers = {**_HEADERS, **(more or {}), "Content-Length": str(len(content))}
        if plain:
            headers["Content-Type"] = "text/plain; charset=utf-8"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Requests are not logged."""


def _is_here(named: str) -> bool:
    """Whether a Host header names this machine; its port may be that of a tunnel."""
    name, colon, port = named.strip().rpartition(":")
    return (name if colon else port).lower() in HOSTS and (not colon or port.isdigit())


@contextmanager
def page_served(run: Path, port: int) -> Iterator[str]:
    """Serve the page of a run while the block lasts; gives its address.

    Args:
        run: the run directory, which may not be there yet.
        port: of 127.0.0.1.

    Raises:
        FedForwardError: the port cannot be had.
    """
    try:
        server = _Server(port, _LatestPage(run))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FedForwardError(
            f"--page {port}: {HOST}:{port} cannot be listened on: {reason}. Choose another port."
        ) from error
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.2}, name="page", daemon=True
    )
    thread.start()
    try:
        yield f"http://{HOST}:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join(5.0)
        server.server_close()
