"""A reverse proxy before a stand-in for the engine, and raw connections to knock at it."""

import datetime
import http.server
import socket
import ssl
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedforward.deployment.flower.held_pulls import HeldPulls
from fedforward.deployment.flower.reverse_proxy import ReverseProxy
from fedforward.deployment.flower.site_auth import PublicKeys
from fedforward.deployment.supervisor import free_port

PULL = "/v1/fleet/pull-messages"

#: What the stand-in answers: status, headers and the parts of the body.
Answer = tuple[int, dict[str, str], list[bytes]]


class Engine(http.server.ThreadingHTTPServer):
    """Keeps what it was asked: paths, headers and the sizes of bodies."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.sizes: list[int] = []
        self.answer: Callable[[], Answer] = lambda: (200, {}, [b"answer"])


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Engine

    def do_POST(self) -> None:
        left = size = int(self.headers["content-length"])
        while left and (part := self.rfile.read(min(left, 1 << 16))):
            left -= len(part)
        if left:
            self.close_connection = True
            return
        self.server.paths.append(self.path)
        self.server.headers.append({k.lower(): v for k, v in self.headers.items()})
        self.server.sizes.append(size)
        status, headers, parts = self.server.answer()
        self.send_response(status)
        headers = {"content-length": str(sum(map(len, parts))), **headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            for part in parts:
                self.wfile.write(part)
        except OSError:
            self.close_connection = True
        if int(headers["content-length"]) != sum(map(len, parts)):
            self.close_connection = True

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def proxied(
    keys: PublicKeys | None = None,
    certificate: tuple[str, str] | None = None,
    held: HeldPulls | None = None,
) -> Iterator[tuple[ReverseProxy, Engine, int]]:
    """A proxy that is ready, its engine, and its port."""
    with Engine() as engine:
        threading.Thread(target=engine.serve_forever, args=(0.05,), daemon=True).start()
        port = free_port()
        url = f"http://127.0.0.1:{engine.server_port}"
        proxy = ReverseProxy("127.0.0.1", port, url, None, certificate, keys, held)
        proxy.ready = True
        proxy.open()
        try:
            yield proxy, engine, port
        finally:
            proxy.close()
            engine.shutdown()


def head(path: str = PULL, size: int = 0, **headers: str) -> bytes:
    """The head of a request; `_` in names is `-`."""
    lines = [f"POST {path} HTTP/1.1", "host: x", f"content-length: {size}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode()


@contextmanager
def connected(port: int, trust: ssl.SSLContext | None = None) -> Iterator[socket.socket]:
    """A raw connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=10.0) as plain:
        if trust is None:
            yield plain
        else:
            with trust.wrap_socket(plain, server_hostname="localhost") as wrapped:
                yield wrapped


def until_closed(connection: socket.socket, seconds: float = 5.0) -> tuple[bytes, float]:
    """What comes until the other side closes, and the seconds until then."""
    began, found = time.monotonic(), b""
    connection.settimeout(seconds)
    try:
        while part := connection.recv(1 << 16):
            found += part
    except ConnectionError:
        pass
    return found, time.monotonic() - began


def soon(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether something comes true."""
    last = time.monotonic() + seconds
    while not condition() and time.monotonic() < last:
        time.sleep(0.01)
    return condition()


class Key:
    """A site's key, which signs as Flower does."""

    def __init__(self) -> None:
        self.private = ec.generate_private_key(ec.SECP384R1())
        self.sent = self.private.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    @property
    def known(self) -> PublicKeys:
        """As the proxy knows it."""
        return {self.sent: self.private.public_key()}

    def headers(self, age_s: float = 0.0) -> dict[str, str]:
        """The headers of a request that was signed so many seconds ago."""
        signed = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=age_s)
        time_sent = signed.isoformat()
        signature = self.private.sign(time_sent.encode(), ec.ECDSA(hashes.SHA256()))
        return {
            "flwr-public-key": b64encode(self.sent).decode(),
            "flwr-timestamp": time_sent,
            "flwr-signature": b64encode(signature).decode(),
        }
