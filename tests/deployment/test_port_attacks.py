"""Whoever reaches the port without a key can neither end the server nor block it."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

pytest.importorskip("flwr")

from fedforward.deployment.flower import certificates, connections, requests, reverse_proxy
from fedforward.deployment.supervisor import free_port
from tests.support.proxy import PULL, Key, connected, head, proxied, soon, until_closed

#: Seconds within which somebody else must have an answer, also on a busy machine.
ANSWER_S = 1.0


@contextmanager
def others_are_served(port: int) -> Iterator[None]:
    """Meanwhile somebody else asks again and again, and never waits long."""
    stop = threading.Event()
    waits: list[float] = []
    failures: list[int] = []

    def ask() -> None:
        with httpx.Client() as client:
            while not stop.is_set():
                began = time.monotonic()
                status = client.post(f"http://127.0.0.1:{port}{PULL}").status_code
                waits.append(time.monotonic() - began)
                if status != 200:
                    failures.append(status)
                stop.wait(0.02)

    def answers(more: int) -> bool:
        wanted, last = len(waits) + more, time.monotonic() + 10
        while len(waits) < wanted and time.monotonic() < last:
            time.sleep(0.005)
        return len(waits) >= wanted

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    try:
        assert answers(2)
        yield
        assert answers(2)
    finally:
        stop.set()
        thread.join(10)
    assert not failures and max(waits) < ANSWER_S


SERVER = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]),) * 2)
from fedforward.deployment.flower import connections
from fedforward.deployment.flower.reverse_proxy import ReverseProxy
connections.HEAD_TIMEOUT_S = 1.5
proxy = ReverseProxy("127.0.0.1", int(sys.argv[2]), "http://127.0.0.1:1", None, None)
proxy.ready = True
proxy.open()
print("open", flush=True)
for line in sys.stdin:
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(10)]
    for file in files:
        os.close(file)
    print("ok", proxy.connections.refused, flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other loopback addresses are Linux's")
def test_idle_connections_leave_files_to_the_process() -> None:
    port = free_port()
    command = [sys.executable, "-c", SERVER, "160", str(port)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdin is not None and server.stdout is not None

    def said() -> str:
        server.stdin.write("?\n")  # type: ignore[union-attr]
        server.stdin.flush()  # type: ignore[union-attr]
        return str(server.stdout.readline())  # type: ignore[union-attr]

    try:
        assert server.stdout.readline() == "open\n"
        with ExitStack() as idle:
            began = time.monotonic()
            for number in range(400):
                # From eight addresses, so that the bound on all together is met.
                source = (f"127.0.0.{2 + number % 8}", 0)
                idle.enter_context(
                    socket.create_connection(("127.0.0.1", port), 10.0, source_address=source)
                )
            assert time.monotonic() - began < 5.0
            while (words := said()) != "ok 320\n":
                # The last few are just being refused.
                assert words.startswith("ok ") and time.monotonic() - began < 5.0
                time.sleep(0.02)
            # Those that wait are closed when they have asked nothing, and a site gets in.
            while True:
                try:
                    status = httpx.post(f"http://127.0.0.1:{port}{PULL}").status_code
                    break
                except httpx.TransportError:
                    assert time.monotonic() - began < 8.0
                    time.sleep(0.05)
            assert status == 503
        assert server.poll() is None
    finally:
        server.stdin.close()
        server.wait(10)
        server.stdout.close()


def test_one_address_cannot_have_all_connections() -> None:
    with proxied() as (proxy, _, port), ExitStack() as stack:
        proxy.connections.most, proxy.connections.most_each = 12, 4
        mine = [stack.enter_context(connected(port)) for _ in range(10)]
        assert soon(lambda: proxy.connections.refused == 6)
        assert all(until_closed(connection)[0] == b"" for connection in mine[4:])
        if sys.platform == "linux":
            transport = httpx.HTTPTransport(local_address="127.0.0.2")
            with httpx.Client(transport=transport) as client:
                assert client.post(f"http://127.0.0.1:{port}{PULL}").status_code == 200
        mine[0].close()
        last = time.monotonic() + 5
        while time.monotonic() < last:
            try:
                assert httpx.post(f"http://127.0.0.1:{port}{PULL}").status_code == 200
                break
            except httpx.TransportError:
                time.sleep(0.02)
        else:
            raise AssertionError("a connection that was closed still counts")


@pytest.mark.parametrize(
    ("host", "counted"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
        ("", ""),
    ],
)
def test_what_counts_as_one_address(host: str, counted: str) -> None:
    assert connections.network(host) == counted


@pytest.mark.parametrize(
    ("files", "limits"),
    [(None, (512, 256)), (160, (80, 40)), (1 << 30, (1024, 256)), (-1, (1024, 256))],
)
def test_connections_follow_from_files(
    files: int | None, limits: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "raise_open_file_limit", lambda: files)
    assert connections.connection_limits() == limits


@pytest.mark.parametrize("before", [b"", head(size=0)], ids=["alone", "behind another"])
@pytest.mark.parametrize("line", [b"a:b\r\n", b"accept: application/protobuf\r\n"])
def test_forty_thousand_headers_are_refused_at_once(line: bytes, before: bytes) -> None:
    with proxied() as (_, engine, port), others_are_served(port), connected(port) as connection:
        began = time.monotonic()
        request = before + head()[:-2] + 40_000 * line + b"\r\n"
        sender = threading.Thread(target=_send, args=(connection, request), daemon=True)
        sender.start()
        answer, _ = until_closed(connection)
        assert time.monotonic() - began < ANSWER_S
        assert answer == b"" or answer.startswith(b"HTTP/1.1 400 ")
        assert not engine.paths or len(engine.headers[-1]) < 20
        sender.join(5)


def test_a_few_headers_too_many_are_refused() -> None:
    with proxied() as (_, engine, port):
        for number, status in ((60, b"200"), (70, b"400")):
            with connected(port) as connection:
                connection.sendall(head()[:-2] + number * b"a:b\r\n" + b"connection: close\r\n\r\n")
                assert until_closed(connection)[0].startswith(b"HTTP/1.1 " + status)
        assert len(engine.paths) == 1


def _send(connection: socket.socket, data: bytes) -> int:
    """Send as much as is taken; returns the bytes."""
    sent = 0
    try:
        while sent < len(data):
            sent += connection.send(data[sent : sent + (1 << 16)])
    except OSError:
        pass
    return sent


def test_big_bodies_without_a_key_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "REST_TIMEOUT_S", 0.2)
    key = Key()
    with proxied(key.known) as (proxy, engine, port):
        memory = psutil.Process().memory_info
        before = memory().rss
        chunk, began = bytes(1 << 16), time.monotonic()
        for headers in ({}, Key().headers()):
            sent = 0
            with connected(port) as connection:
                connection.sendall(head("/v1/fleet/push-object", 1000 << 20, **headers))
                try:
                    while sent < 1000 << 20:
                        sent += connection.send(chunk)
                except OSError:
                    pass
            # What the sockets of both sides keep is in it.
            assert sent < 16 << 20
        assert time.monotonic() - began < ANSWER_S
        assert memory().rss - before < 32 << 20
        assert proxy.received == 0 and engine.paths == []
        # Who waits with the body reads the answer.
        with connected(port) as connection:
            connection.sendall(head("/v1/fleet/push-object", 1000 << 20))
            assert until_closed(connection)[0].startswith(b"HTTP/1.1 401 ")


def test_a_head_must_come_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_TIMEOUT_S", 0.4)
    with proxied() as (_, _, port):

        def trickle(connection: socket.socket) -> float:
            began = time.monotonic()
            try:
                for byte in head(size=0) * 20:
                    connection.sendall(bytes([byte]))
                    time.sleep(0.05)
            except OSError:
                pass
            return time.monotonic() - began

        with connected(port) as idle, connected(port) as slow, connected(port) as later:
            assert 0.2 < trickle(slow) < 2.0
            assert until_closed(idle)[1] < 1.0
            # Also the head of a second request, on a connection that was idle before.
        with connected(port) as later:
            later.sendall(head(size=0))
            assert later.recv(12) == b"HTTP/1.1 200"
            time.sleep(0.6)
            later.sendall(head(size=0))
            time.sleep(0.1)
            assert b"HTTP/1.1 200" in later.recv(1 << 16)
            assert 0.2 < trickle(later) < 2.0


def test_tls_must_be_agreed_on_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HANDSHAKE_TIMEOUT_S", 0.4)
    monkeypatch.setattr(connections, "HEAD_TIMEOUT_S", 0.4)
    certificates.make(tmp_path, ["localhost"], [])
    pair = (str(tmp_path / "server.crt"), str(tmp_path / "server.key"))
    with proxied(certificate=pair) as (_, _, port):
        with connected(port) as silent:
            assert until_closed(silent)[1] < 2.0
        trust = certificates.trust(tmp_path)
        with connected(port, trust) as idle:
            assert until_closed(idle)[1] < 2.0
        answer = httpx.post(f"https://localhost:{port}{PULL}", verify=trust, content=b"x")
        assert answer.status_code == 200


def test_a_body_must_come_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reverse_proxy, "BODY_TIMEOUT_S", 0.3)
    monkeypatch.setattr(reverse_proxy, "BODY_RATE", 1 << 10)
    monkeypatch.setattr(requests, "REST_TIMEOUT_S", 0.1)
    with proxied() as (proxy, engine, port), connected(port) as connection:
        connection.sendall(head(size=1000))
        began = time.monotonic()
        try:
            for _ in range(100):
                connection.sendall(b"a")
                time.sleep(0.02)
        except OSError:
            pass
        assert time.monotonic() - began < 1.5
        assert soon(lambda: proxy.bytes_open == 0) and engine.paths == []
        with connected(port) as connection:
            connection.sendall(head(size=1000) + bytes(10))
            answer, seconds = until_closed(connection)
            assert answer.startswith(b"HTTP/1.1 408 ") and seconds < 1.5
        # Who keeps up with the rate is given more time than the first seconds.
        with connected(port) as connection:
            connection.sendall(head(size=1000))
            for _ in range(10):
                connection.sendall(bytes(100))
                time.sleep(0.06)
            assert connection.recv(12) == b"HTTP/1.1 200"


@pytest.mark.parametrize("size", [32 << 20, 200_000])
def test_an_answer_must_be_read_in_time(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "READER_TIMEOUT_S", 0.4)
    monkeypatch.setattr(connections, "LINGER_S", 0.2)
    monkeypatch.setattr(connections, "KEEP_ALIVE_S", 1)
    with proxied() as (proxy, engine, port):
        engine.answer = lambda: (200, {}, [bytes(1 << 16) for _ in range(size >> 16)])
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(10)
            connection.connect(("127.0.0.1", port))
            before = psutil.Process().memory_info().rss
            connection.sendall(head(size=0))
            assert soon(lambda: proxy.connections.open == 1)
            assert soon(lambda: proxy.connections.open == 0)
            assert psutil.Process().memory_info().rss - before < size // 2 + (8 << 20)
        assert httpx.post(f"http://127.0.0.1:{port}{PULL}").status_code == 200
