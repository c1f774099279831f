"""The page of a run on a loopback port: that page alone, for those on this machine alone."""

import http.client
import json
import shutil
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from fedforward.core.errors import FedForwardError
from fedforward.deployment import page_server
from fedforward.deployment.page_server import MAX_CONNECTIONS, page_served
from fedforward.deployment.supervisor import free_port
from tests.support.command_line import command, write_config
from tests.support.pages import Page


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    assert command("run", write_config(folder), "--out", folder / "run").code == 0
    return folder / "run"


@pytest.fixture(scope="module")
def port(run: Path) -> Iterator[int]:
    number = free_port()
    with page_served(run, number) as address:
        assert address == f"http://127.0.0.1:{number}/"
        yield number


def ask(
    port: int, method: str = "GET", path: str = "/", headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], str]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request(method, path, headers=headers or {})
        answer = connection.getresponse()
        text = answer.read().decode()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, text


def test_it_is_the_report_and_nothing_may_be_loaded(port: int, run: Path) -> None:
    status, headers, text = ask(port)
    assert status == 200 and "<title>Run run" in text and "finished" in text
    assert int(headers["content-length"]) == len(text.encode())
    assert headers["content-security-policy"].startswith("default-src 'none'")
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["cache-control"] == "no-store"
    assert headers["x-content-type-options"] == "nosniff"
    assert "python" not in headers["server"].lower()
    assert "access-control-allow-origin" not in headers
    status, headers, body = ask(port, "HEAD")
    assert status == 200 and body == "" and int(headers["content-length"]) == len(text.encode())


@pytest.mark.parametrize(
    "method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT"]
)
def test_nothing_can_be_sent(port: int, method: str) -> None:
    status, headers, _ = ask(port, method)
    assert status == 405 and headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize(
    "path",
    ["/config.toml", "/ledger.sqlite", "/../run/config.toml", "/?x=1", "/%2e%2e/", "/index",
     "http://127.0.0.1/"],
)  # fmt: skip
def test_there_is_no_other_page(port: int, path: str) -> None:
    status, _, text = ask(port, path=path)
    assert status == 404 and text == "there is one page here: /\n"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200), ("localhost:1234", 200), ("LOCALHOST", 200), ("127.0.0.1:9", 200),
        ("evil.example", 403), ("evil.example:80", 403), ("127.0.0.1.evil.example", 403),
        ("localhost.", 403), ("", 403), ("127.0.0.1:x", 403), ("[::1]:80", 403),
        ("evil.example:127.0.0.1", 403), ("127.0.0.1:80:80", 403),
    ],
)  # fmt: skip
def test_the_host_must_be_this_machine(port: int, host: str, status: int) -> None:
    assert ask(port, headers={"Host": host})[0] == status


def test_two_hosts_or_none_are_refused(port: int) -> None:
    for headers in (b"", b"Host: localhost\r\nHost: evil.example\r\n"):
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            connection.sendall(b"GET / HTTP/1.0\r\n" + headers + b"\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.0 403 ")


def test_only_the_loopback_device_is_listened_on(port: int) -> None:
    with closing(socket.socket()) as other, pytest.raises(OSError):
        other.settimeout(5)
        # Another address of this machine, on the same device.
        other.connect(("127.0.0.2", port))


def test_many_idle_connections_are_bounded_and_pass(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_server._Handler, "timeout", 0.5)
    number = free_port()
    with page_served(run, number):
        idle = [socket.create_connection(("127.0.0.1", number)) for _ in range(MAX_CONNECTIONS + 4)]
        ended = 0
        for each in idle:
            each.settimeout(20)
            # The last are closed at once, the others when their time is over.
            ended += each.recv(1) == b""
            each.close()
        assert ended == len(idle)
        assert ask(number)[0] == 200


def test_the_page_follows_the_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_server, "LEAST_PAUSE_S", 0.0)
    monkeypatch.setattr(page_server, "PAUSE", 0.0)
    number, folder = free_port(), tmp_path / "run"
    with page_served(folder, number):
        status, _, text = ask(number)
        assert status == 200 and "No figures yet" in text and Page(text).reloads
        shutil.copytree(run, folder)
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8")
        summary = (folder / "summary.json").read_text(encoding="utf-8")
        (folder / "summary.json").unlink()
        (folder / "metrics.jsonl").write_text(lines.splitlines()[0] + "\n", encoding="utf-8")
        text = ask(number)[2]
        assert "not finished: 0 of 2 rounds" in text and Page(text).reloads
        (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
        (folder / "summary.json").write_text(summary, encoding="utf-8")
        text = ask(number)[2]
        assert "finished" in text and not Page(text).reloads
        # What is damaged says nothing of itself here.
        (folder / "config.toml").write_text("secret = [", encoding="utf-8")
        (folder / "metrics.jsonl").write_text(lines + "\n", encoding="utf-8")
        text = ask(number)[2]
        assert "No figures yet" in text and "secret" not in text and str(folder) not in text
    with pytest.raises(OSError):
        ask(number)


def test_a_page_is_drawn_once_for_many_requests(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    whole = page_server.make_page
    monkeypatch.setattr(
        page_server, "make_page", lambda *a, **k: (drawn.append(1), whole(*a, **k))[1]
    )
    number = free_port()
    with page_served(run, number):
        assert {ask(number)[0] for _ in range(5)} == {200}
        # Something new is drawn only after a pause.
        (run / "summary.json").touch()
        assert ask(number)[0] == 200
    assert len(drawn) == 1


def test_a_port_that_is_taken(run: Path, tmp_path: Path) -> None:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        with pytest.raises(FedForwardError, match=f"--page {number}: 127.0.0.1:{number} cannot be"):
            page_served(run, number).__enter__()
        config = write_config(tmp_path)
        text = config.read_text(encoding="utf-8").partition("[data]")
        terms = tmp_path / "terms.toml"
        terms.write_text(
            "[model]\n[data]" + text[2].partition("source")[0]
            + "prompt = 'Q: {q}'\nanswer = ' {a}'\n[federation]\nrounds = 2\n", "utf-8",
        )  # fmt: skip
        result = command(
            "server", terms, "--insecure", "--listen", f"127.0.0.1:{free_port()}",
            "--page", number, "--out", tmp_path / "out",
        )  # fmt: skip
        result.refused(f"--page {number}")
        assert not (tmp_path / "out").exists()
    assert command("server", terms, "--insecure", "--page", 70000).code == 2


def test_what_is_served_has_no_answers_of_a_site(run: Path, tmp_path: Path) -> None:
    """A server's folder has none; one that had some would not show them."""
    from fedforward.config.fields import AT_SITES

    folder = Path(shutil.copytree(run, tmp_path / "server"))
    config = (folder / "config.toml").read_text(encoding="utf-8")
    start = config.index("path = ")
    end = config.index("\n", start)
    config = f"{config[:start]}path = {json.dumps(AT_SITES)}{config[end:]}"
    (folder / "config.toml").write_text(config, encoding="utf-8")
    number = free_port()
    with page_served(folder, number):
        text = ask(number)[2]
    assert "the sites&#39; own" in text and "answered before and after" not in text
