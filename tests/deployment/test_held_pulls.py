"""A site's question for a message, which the reverse proxy holds until there is one."""

import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

pytest.importorskip("flwr")

from fedforward.deployment.flower import held_pulls
from fedforward.deployment.flower.held_pulls import HeldPulls
from fedforward.deployment.flower.notices import ANSWERED, ANYBODY, SENT, Notices
from fedforward.deployment.flower.reverse_proxy import ReverseProxy
from fedforward.deployment.flower.timings import Timings
from tests.support.proxy import PULL, Engine, Key, connected, head, proxied, soon

CONFIRM = "/v1/fleet/confirm-message-received"


def test_names_are_told_once_and_lost_ones_are_anybody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, reader = Notices(tmp_path / "names"), Notices(tmp_path / "names")
    writer.tell(["before there is a file"])
    assert reader.new() == set()
    writer.create()
    writer.tell(["a", "b"])
    assert reader.new() == {"a", "b"} and reader.new() == set()
    assert Notices(tmp_path / "names").new() == set()
    with (tmp_path / "names").open("ab") as file:
        file.write(b"hal")
    assert reader.new() == set()
    writer.tell(["f"])
    assert reader.new() == {"half"}
    monkeypatch.setattr("fedforward.deployment.flower.notices.MAX_BYTES", 5)
    writer.tell(["c"])
    assert reader.new() == {ANYBODY, "c"}
    (tmp_path / "names").unlink()
    assert reader.new() == set()


class Site:
    """A site with a key, its proxy, and the engine behind that, which has no message at first."""

    def __init__(self, folder: Path, proxy: ReverseProxy, engine: Engine, port: int) -> None:
        self.proxy, self.engine, self.port = proxy, engine, port
        self.sent, self.answered = Notices(folder / SENT), Notices(folder / ANSWERED)
        self.key = Key()
        proxy.keys = self.key.known
        assert proxy.held is not None
        self.held = proxy.held
        self.held.name_of = {b64encode(self.key.sent).decode(): "a"}.get
        self.has(b"")
        self.answers: list[httpx.Response] = []

    def has(self, message: bytes) -> None:
        """What the engine answers from now on."""
        self.engine.answer = lambda: (200, {"content-type": "x/y"}, [message])

    def post(self, path: str = PULL, age_s: float = 0.0) -> httpx.Response:
        headers = self.key.headers(age_s)
        url = f"http://127.0.0.1:{self.port}{path}"
        return httpx.post(url, content=b"node", headers=headers, timeout=30.0)

    def ask(self) -> threading.Thread:
        """Ask in a thread, until the engine has answered once."""
        before = len(self.engine.paths)
        thread = threading.Thread(target=lambda: self.answers.append(self.post()), daemon=True)
        thread.start()
        assert soon(lambda: len(self.engine.paths) > before)
        return thread


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    for name in (SENT, ANSWERED):
        Notices(tmp_path / name).create()
    held = HeldPulls(Notices(tmp_path / SENT), Notices(tmp_path / ANSWERED), Timings(None))
    with proxied(held=held) as (proxy, engine, port):
        yield Site(tmp_path, proxy, engine, port)


def test_a_question_waits_until_its_site_is_sent_something(site: Site) -> None:
    thread = site.ask()
    site.has(b"message")
    site.sent.tell(["b"])
    thread.join(0.4)
    assert thread.is_alive() and site.engine.sizes == [4]
    began = time.monotonic()
    site.sent.tell(["a"])
    thread.join(5)
    assert time.monotonic() - began < 1.0
    assert (site.answers[0].status_code, site.answers[0].content) == (200, b"message")
    assert site.answers[0].headers["content-type"] == "x/y"
    assert site.engine.sizes == [4, 4] and site.proxy.sent == 7
    assert soon(lambda: site.proxy.bytes_open == 0)


def test_without_names_any_notice_is_for_everybody(site: Site) -> None:
    site.held.name_of = lambda owner: None
    thread = site.ask()
    site.has(b"message")
    site.sent.tell(["node-17"])
    thread.join(5)
    assert site.answers[0].content == b"message"


def test_what_is_sent_while_the_engine_is_asked_is_not_missed(site: Site) -> None:
    def late() -> tuple[int, dict[str, str], list[bytes]]:
        # The engine has looked, and then a message comes.
        site.has(b"message")
        site.sent.tell(["a"])
        time.sleep(0.3)
        return 200, {}, [b""]

    site.engine.answer = late
    thread = site.ask()
    thread.join(5)
    assert site.answers[0].content == b"message"


def test_a_question_is_answered_in_the_end(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_pulls, "HOLD_S", 0.3)
    began = time.monotonic()
    answer = site.post()
    assert answer.status_code == 200 and answer.content == b""
    assert 0.3 <= time.monotonic() - began < 2.0 and len(site.engine.paths) == 1
    # Nor is it held longer than the engine takes its signature.
    monkeypatch.setattr(held_pulls, "HOLD_S", 20.0)
    assert site.post(age_s=300).content == b""
    assert time.monotonic() - began < 4.0


def test_an_answer_that_did_not_arrive_is_given_again(site: Site) -> None:
    """Flower's engine gives each message once; a site shows by its next request that it came."""
    site.has(b"first")
    assert site.post().content == b"first"
    site.has(b"second")
    assert site.post().content == b"first"
    assert site.post("/v1/fleet/send-node-heartbeat").status_code == 200
    assert site.post().content == b"first"
    asked = site.engine.paths.count(PULL)
    site.post(CONFIRM)
    assert site.post().content == b"second"
    assert site.engine.paths.count(PULL) == asked + 1
    # A process that begins anew has lost what the last one had; the engine says what becomes of it.
    site.post("/v1/fleet/activate-node")
    site.has(b"third")
    assert site.post().content == b"third"
    assert site.held.connects == {"a": 1}


def test_a_site_that_has_gone_takes_no_message(site: Site) -> None:
    with connected(site.port) as connection:
        connection.sendall(head(PULL, 4, **site.key.headers()) + b"node")
        assert soon(lambda: len(site.engine.paths) == 1)
    assert soon(lambda: site.proxy.connections.open == 0)
    site.has(b"message")
    site.sent.tell(["a"])
    time.sleep(0.3)
    assert len(site.engine.paths) == 1
    assert site.post().content == b"message"


def test_a_key_that_is_taken_away_gets_no_message(site: Site) -> None:
    thread = site.ask()
    site.proxy.keys = {}
    site.has(b"message")
    site.sent.tell(["a"])
    thread.join(5)
    assert site.answers[0].status_code == 401 and len(site.engine.paths) == 1


def test_errors_of_the_engine_pass_and_are_not_kept(site: Site) -> None:
    site.engine.answer = lambda: (503, {}, [b"busy"])
    assert site.post().status_code == 503
    site.has(b"message")
    assert site.post().content == b"message"


def test_the_coordinator_is_told_when_an_answer_is_whole(site: Site) -> None:
    site.has(b"message")
    site.post()
    for path in ("push-messages", "push-object", "push-object"):
        site.post(f"/v1/fleet/{path}")
        site.post("/v1/fleet/send-node-heartbeat")
        assert site.answered.new() == set()
    site.post()
    assert site.answered.new() == {"a"}
    site.post()
    assert site.answered.new() == set()


def test_a_server_that_ends_answers_nothing_instead_of_an_error(site: Site) -> None:
    """After an error 500 a SuperNode ends; after a connection that broke off it tries again."""
    errors: list[Exception] = []

    def ask() -> None:
        try:
            site.answers.append(site.post())
        except httpx.HTTPError as error:
            errors.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    assert soon(lambda: len(site.engine.paths) == 1)
    site.proxy.close()
    thread.join(5)
    assert site.answers == []
    assert isinstance(errors[0], httpx.RemoteProtocolError | httpx.ReadError)
