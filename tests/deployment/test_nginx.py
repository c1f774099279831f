"""nginx before the port, as the deployment page has it; skipped where nginx is not installed."""

import re
import shutil
import socket
import subprocess
import textwrap
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import pytest

pytest.importorskip("flwr")

from fedforward.deployment.flower import certificates
from fedforward.deployment.supervisor import free_port
from tests.support.proxy import PULL, Key, connected, head, proxied, until_closed

NGINX = shutil.which("nginx") or ""
PAGE = Path(__file__).parents[2] / "docs" / "deployment.md"

pytestmark = pytest.mark.skipif(not NGINX, reason="nginx is not installed")


def configuration(first: str) -> str:
    """The block of the page that begins with a line."""
    blocks = re.findall(r"(?:(?:^    .*|^)\n)+", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    (found,) = [block for block in blocks if block.lstrip("\n").startswith(f"    {first}")]
    return textwrap.dedent(found)


@contextmanager
def nginx(folder: Path, content: str, inner: int, certs: Path) -> Iterator[int]:
    """A running nginx with a configuration of the page; its port."""
    port = free_port()
    content = content.replace("127.0.0.1:9401", f"127.0.0.1:{inner}")
    content = content.replace("listen 9400", f"listen 127.0.0.1:{port}")
    content = content.replace("/etc/fedforward/certs", str(certs))
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    places = "".join(f"{kind}_temp_path {folder / kind};\n" for kind in kinds)
    if content.lstrip().startswith("stream"):
        module = next(Path(NGINX).parents[1].glob("lib*/nginx/modules/ngx_stream_module.so"), None)
        if module is None:
            pytest.skip("nginx has no stream module")
        content = f"load_module {module};\n{content}"
    else:
        content = f"http {{\naccess_log off;\n{places}{content}}}\n"
    ours = f"daemon off;\nworker_processes 1;\npid {folder}/pid;\nerror_log {folder}/log info;\n"
    modules, rest = re.match(r"((?:load_module.*\n)?)([^\0]*)", content).groups()  # type: ignore[union-attr]
    file = folder / "nginx.conf"
    file.write_text(f"{modules}{ours}events {{}}\n{rest}", encoding="utf-8")
    command = [NGINX, "-e", str(folder / "log"), "-p", str(folder), "-c", str(file)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        last = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1.0).close()
                break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < last
                time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait(10)


@pytest.mark.parametrize("first", ["limit_conn_zone", "stream {"])
def test_the_configuration_of_the_page(first: str, tmp_path: Path) -> None:
    certs, key = tmp_path / "certs", Key()
    certificates.make(certs, ["localhost"], [])
    pair = (str(certs / "server.crt"), str(certs / "server.key"))
    trust = certificates.trust(certs)
    with (
        proxied(key.known, pair) as (_, engine, inner),
        nginx(tmp_path, configuration(first), inner, certs) as port,
        httpx.Client(base_url=f"https://localhost:{port}", verify=trust) as client,
    ):
        answer = client.post(PULL, content=bytes(3 << 20), headers=key.headers())
        assert (answer.status_code, answer.text) == (200, "answer")
        assert engine.sizes == [3 << 20]
        stranger = Key().headers()
        refused = client.post("/v1/fleet/activate-node", content=b"x", headers=stranger)
        assert refused.status_code == 412 and "Failed to activate" in refused.text
        assert client.post(PULL, content=b"x", headers=key.headers(400)).status_code == 401
        for path in ("/docs", "/v1/control/start-run", PULL + "?x", "/v1/fleet/%252e%252e/x"):
            assert client.post(path, content=b"x", headers=key.headers()).status_code == 404
        with connected(port, trust) as connection:
            many = head()[:-2] + 40_000 * b"a: b\r\n" + b"\r\n"
            began = time.monotonic()
            with suppress(OSError):
                connection.sendall(many)
            said, _ = until_closed(connection)
            assert time.monotonic() - began < 2.0
            assert said == b"" or said.startswith(b"HTTP/1.1 400 ")
        assert len(engine.paths) == 1
        if first.startswith("stream"):
            with ExitStack() as stack:
                # One address has so many connections; what it opens beyond them is closed.
                idle = [stack.enter_context(connected(port)) for _ in range(80)]
                assert sum(_closed(connection) for connection in idle) >= 80 - 64
        assert client.post(PULL, content=b"x", headers=key.headers()).status_code == 200


def _closed(connection: socket.socket) -> bool:
    connection.settimeout(0.01)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True
