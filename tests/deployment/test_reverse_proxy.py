"""The reverse proxy before the engine: what passes, and who is let in."""

import json
import logging
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

pytest.importorskip("flwr")

from fedforward.core.errors import FedForwardError
from fedforward.deployment.flower import requests, reverse_proxy, site_auth
from fedforward.deployment.flower.reverse_proxy import ReverseProxy
from fedforward.deployment.flower.site_auth import ROUTES
from tests.support.proxy import PULL, Key, connected, head, proxied, soon, until_closed


def test_only_the_sites_part_passes_and_only_flowers_headers() -> None:
    with proxied() as (proxy, engine, port):
        engine.answer = lambda: (
            207,
            {"content-type": "application/protobuf", "x-inside": "secret", "set-cookie": "a=b"},
            [b"an", b"swer"],
        )
        url = f"http://127.0.0.1:{port}"
        headers = {
            "content-type": "application/protobuf",
            "flwr-public-key": "k",
            "flwr-task-token": "stolen",
            "x-forwarded-for": "10.0.0.1",
            "authorization": "Bearer x",
            "cookie": "a=b",
        }
        answer = httpx.post(url + PULL, content=b"body", headers=headers)
        assert (answer.status_code, answer.content) == (207, b"answer")
        assert set(answer.headers) == {"date", "content-type", "content-length"}
        assert set(engine.headers[0]) == {
            "accept", "accept-encoding", "connection", "content-length", "content-type",
            "flwr-public-key", "host", "user-agent",
        }  # fmt: skip
        assert "httpx" not in engine.headers[0]["user-agent"]
        assert (engine.paths, engine.sizes) == ([PULL], [4])
        assert (proxy.received, proxy.sent) == (4, 6)
        assert soon(lambda: proxy.bytes_open == 0)
        for path in ("/v1/control/register-node", "/v1/runtime/acquire-task", "/docs", "/"):
            assert httpx.post(url + path, content=b"b", headers=headers).status_code == 404
        assert httpx.get(url + PULL).status_code == 404
        assert len(engine.paths) == 1 and proxy.refused == 5


@pytest.mark.parametrize(
    "path",
    [
        "/v1/fleet/pull-messages%00",
        "/v1/fleet/%00",
        "/v1/fleet/%252e%252e/control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/pull-messages?x=1",
        "/v1/fleet/pull%2dmessages",
        "/v1/fleet//pull-messages",
        "/v1/fleet/pull-messages/",
        "//v1/fleet/pull-messages",
        "http://127.0.0.1/v1/fleet/pull-messages",
        "/v1/fleet/%ff%fe",
    ],
)
def test_a_path_is_taken_as_it_is_written(path: str, caplog: pytest.LogCaptureFixture) -> None:
    with proxied() as (_, engine, port), connected(port) as connection:
        connection.sendall(head(path))
        answer, _ = until_closed(connection)
        assert answer.startswith(b"HTTP/1.1 404 ")
        assert engine.paths == []
    assert not caplog.records


def test_routes_headers_and_answers_are_flowers() -> None:
    from flwr.common import constant
    from flwr.supercore import constant as more
    from flwr.supercore.error import ApiErrorCode, FlowerError
    from flwr.supercore.error.catalog import API_ERROR_MAP
    from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

    assert {path for _, path in PROTOBUF_REQUEST_TYPES if "/fleet/" in path} == ROUTES
    assert site_auth.PUBLIC_KEY == more.FLEET_HTTP_PUBLIC_KEY_HEADER
    assert site_auth.SIGNATURE == more.FLEET_HTTP_SIGNATURE_HEADER
    assert site_auth.TIMESTAMP == constant.TIMESTAMP_HEADER
    assert site_auth.SIGNATURE_AGE_S == constant.TIMESTAMP_TOLERANCE
    assert site_auth.CLOCK_TOLERANCE_S == constant.SYSTEM_TIME_TOLERANCE
    names = (
        more.FLWR_PACKAGE_NAME_METADATA_KEY,
        more.FLWR_PACKAGE_VERSION_METADATA_KEY,
        more.FLWR_COMPONENT_NAME_METADATA_KEY,
    )
    assert set(names) <= requests.REQUEST_HEADERS
    assert more.VERSION_INCOMPATIBILITY_MESSAGE_METADATA_KEY in reverse_proxy.ANSWER_HEADERS
    for name, code in (
        ("activate-node", ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED),
        ("register-node", ApiErrorCode.FLEET_SUPERNODE_REGISTRATION_DISABLED),
    ):
        said = site_auth.refusal(f"/v1/fleet/{name}", Key().headers(), {})
        assert said is not None
        spec = API_ERROR_MAP[code]
        assert said.status == spec.http_status_code
        assert json.loads(said.content) == FlowerError(code, "").to_json(spec.public_message)


def test_who_signs_with_a_known_key_just_now_is_let_in() -> None:
    key, other = Key(), Key()
    with proxied(key.known) as (proxy, engine, port):

        def asked(headers: dict[str, str], name: str = "pull-messages") -> tuple[int, str]:
            url = f"http://127.0.0.1:{port}/v1/fleet/{name}"
            answer = httpx.post(url, content=b"b", headers=headers)
            if answer.status_code >= 400:
                assert answer.headers["content-type"] == "application/json"
                assert answer.headers["connection"] == "close"
            return answer.status_code, answer.text

        refused = 401, '{"detail": "Invalid SuperNode authentication"}'
        assert asked(key.headers())[0] == 200
        assert asked(key.headers(age_s=290))[0] == asked(key.headers(age_s=-3))[0] == 200
        assert len(engine.paths) == 3
        for age_s in (306, -6):
            assert asked(key.headers(age_s)) == refused
        assert asked({}) == refused
        for name in key.headers():
            assert asked({k: v for k, v in key.headers().items() if k != name}) == refused
            assert asked(key.headers() | {name: "!"}) == refused
        assert (
            asked(key.headers() | {"flwr-signature": key.headers(1)["flwr-signature"]}) == refused
        )
        public = {"flwr-public-key": key.headers()["flwr-public-key"]}
        assert asked(other.headers() | public) == refused
        assert asked(other.headers()) == refused
        assert asked(other.headers(), "activate-node")[0] == 412
        assert "Failed to activate SuperNode" in asked(other.headers(), "activate-node")[1]
        assert len(engine.paths) == 3
        proxy.keys = other.known
        assert asked(other.headers())[0] == 200
        assert asked(key.headers()) == refused


def test_before_the_keys_are_known_sites_are_to_try_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reverse_proxy, "START_TIMEOUT_S", 0.2)
    with proxied(Key().known) as (proxy, engine, port):
        proxy.ready = False
        for path in (PULL, "/v1/fleet/"):
            assert httpx.post(f"http://127.0.0.1:{port}{path}").status_code == 503
        assert httpx.post(f"http://127.0.0.1:{port}/docs").status_code == 404
        assert engine.paths == []


@pytest.mark.parametrize(
    ("more", "status"),
    [
        (b"content-length: 2\r\ncontent-length: 3\r\n", 400),
        (b"content-length: 2\r\naccept: a\r\naccept: b\r\n", 400),
        (b"content-length: 2\r\naccept: \xe9\r\n", 400),
        (b"transfer-encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n", 411),
        (b"transfer-encoding: chunked\r\ncontent-length: 2\r\n", 411),
        (b"transfer-encoding: chunked\r\n\r\nno number", 400),
        (b"", 411),
        (b"content-length: 99999999999\r\n", 413),
    ],
)
def test_a_form_that_sites_do_not_use_is_refused(
    more: bytes, status: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(requests, "REST_TIMEOUT_S", 0.2)
    with proxied() as (_, engine, port), connected(port) as connection:
        connection.sendall(f"POST {PULL} HTTP/1.1\r\nhost: x\r\n".encode() + more + b"\r\n")
        answer, _ = until_closed(connection)
        assert answer.startswith(f"HTTP/1.1 {status} ".encode())
        assert engine.paths == []
    assert not caplog.records


def test_a_body_is_handed_on_in_pieces() -> None:
    size = 192 << 20
    with proxied() as (proxy, engine, port), connected(port) as connection:
        process = psutil.Process()
        before = process.memory_info().rss
        connection.sendall(head(size=size, flwr_public_key="a"))
        most = 0
        for _ in range(size >> 20):
            connection.sendall(bytes(1 << 20))
            most = max(most, process.memory_info().rss - before)
        assert connection.recv(12) == b"HTTP/1.1 200"
        assert engine.sizes == [size] and proxy.received == size
        assert most < 64 << 20


def test_what_is_too_much_at_a_time_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reverse_proxy, "BIG_BYTES", 10)
    monkeypatch.setattr(reverse_proxy, "MAX_BIG", 1)
    monkeypatch.setattr(reverse_proxy, "MAX_BYTES_TOGETHER", 32)
    with proxied() as (proxy, _, port):
        url = f"http://127.0.0.1:{port}{PULL}"

        def status(size: int, key: str = "a") -> int:
            headers = {"flwr-public-key": key}
            return httpx.post(url, content=bytes(size), headers=headers).status_code

        assert status(33) == 413
        with connected(port) as one:
            one.sendall(head(size=20, flwr_public_key="a") + b"half")
            assert soon(lambda: proxy.bytes_open == 20)
            # One big request of a site at a time, and 32 bytes of all.
            assert [status(10), status(9), status(10, "b"), status(13, "b")] == [503, 200, 200, 503]
            monkeypatch.setattr(reverse_proxy, "MAX_REQUESTS", 1)
            assert status(1) == 503 and soon(lambda: status(1, "b") == 200)
        assert soon(lambda: proxy.bytes_open == 0)
        assert status(20) == 200


def test_half_an_answer_does_not_pass_for_a_whole_one(caplog: pytest.LogCaptureFixture) -> None:
    with proxied() as (_, engine, port):
        engine.answer = lambda: (200, {"content-length": "100"}, [b"half"])
        with pytest.raises(httpx.TransportError):
            httpx.post(f"http://127.0.0.1:{port}{PULL}")
        engine.answer = lambda: (200, {}, [b"whole"])
        assert httpx.post(f"http://127.0.0.1:{port}{PULL}").text == "whole"
        engine.shutdown()
        engine.server_close()
        time.sleep(0.1)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_an_engine_that_is_gone_is_waited_for_by_sites() -> None:
    with proxied() as (_, engine, port):
        engine.shutdown()
        engine.server_close()
        assert httpx.post(f"http://127.0.0.1:{port}{PULL}", content=b"x").status_code == 503


def test_an_address_that_cannot_be_had(tmp_path: Path) -> None:
    with proxied() as (_, _, port):
        for host in ("127.0.0.1", "192.0.2.1"):
            proxy = ReverseProxy(host, port, "http://127.0.0.1:1", None, None)
            with pytest.raises(FedForwardError, match="cannot be listened on"):
                proxy.open()


def test_all_addresses_of_a_host_are_listened_on() -> None:
    import fedforward.deployment.flower.connections as module

    count = module.ConnectionCount(8)
    listeners: Any = module.listen("localhost", 0, count)
    for listener in listeners:
        with listener, socket.create_connection(listener.getsockname()[:2], timeout=5):
            accepted, _ = listener.accept()
            accepted.close()
    assert count.refused == 0
