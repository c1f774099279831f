"""The keys of sites that are let in come and go with the files in the server's folder."""

import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

from fedforward.core.errors import FedForwardError
from fedforward.deployment.flower import certificates, site_keys
from fedforward.deployment.flower.site_keys import SiteKeys


class Engine:
    """What `SiteKeys` asks of Flower's command line."""

    def __init__(self) -> None:
        self.known: dict[int, str] = {}
        self.down = False

    def register(self, new: dict[str, Path]) -> dict[str, int | str]:
        if self.down:
            raise FedForwardError("it does not answer")
        found: dict[str, int | str] = {}
        for name, path in new.items():
            found[name] = 1 + max(self.known, default=0)
            self.known[int(found[name])] = path.read_text()
        return found

    def unregister(self, node: int) -> None:
        if self.down:
            raise FedForwardError("it does not answer")
        del self.known[node]


@pytest.fixture
def flower(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(site_keys, "RETRY_KEY_S", 0.0)
    return Engine()


def test_keys_come_and_go(tmp_path: Path, flower: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Also while the engine is being started again, or a file cannot be read."""
    folder = tmp_path / "sites"
    folder.mkdir()
    caplog.set_level("INFO", "fedforward")
    keys = SiteKeys(tmp_path, tmp_path / "r.json", flower)
    (folder / "a.pub").write_text("A")
    (folder / "b.pub").symlink_to(tmp_path / "nowhere")
    keys.look()
    assert flower.known == {1: "A"} and "cannot be read" in caplog.messages[0]
    flower.down = True
    (folder / "a.pub").unlink()
    (folder / "c.pub").write_text("C")
    for _ in range(3):
        keys.look()
    assert flower.known == {1: "A"} and len(caplog.messages) == 3
    assert "cannot be taken away" in caplog.messages[1] and "is not taken" in caplog.messages[2]
    flower.down = False
    keys.look()
    assert list(flower.known.values()) == ["C"]
    assert caplog.messages[-1] == "site a: its key was taken away"
    # A server that begins anew knows whom it let in.
    again = SiteKeys(tmp_path, tmp_path / "r.json", flower)
    (folder / "c.pub").write_text("D")
    again.look()
    assert list(flower.known.values()) == ["D"]


def public(folder: Path, name: str) -> bytes:
    """What Flower sends of a site's key."""
    found = site_keys.read_public_key((folder / "sites" / f"{name}.pub").read_bytes())
    assert found is not None
    return found[0]


def test_the_proxy_has_the_keys_that_are_there_and_that_the_engine_knows(
    tmp_path: Path, flower: Any
) -> None:
    certificates.make(tmp_path, [], ["a", "b"])
    (tmp_path / "sites" / "none.pub").write_text("no key")
    keys = SiteKeys(tmp_path, tmp_path / "r.json", flower)
    a, b = public(tmp_path, "a"), public(tmp_path, "b")
    assert keys.public == {}
    keys.look()
    assert keys.public is not None and set(keys.public) == {a, b}
    (tmp_path / "sites" / "a.pub").unlink()
    flower.down = True
    keys.look()
    assert len(flower.known) == 3 and set(keys.public) == {b}
    certificates.make(tmp_path, [], ["c"])
    keys.look()
    assert set(keys.public) == {b}
    flower.down = False
    keys.look()
    assert set(keys.public) == {b, public(tmp_path, "c")}
    again = SiteKeys(tmp_path, tmp_path / "r.json", flower)
    again.look()
    assert again.public == keys.public
    assert SiteKeys(None, tmp_path / "r.json", flower).public is None


def test_files_that_cannot_be_opened_for_a_moment_shut_nobody_out(
    tmp_path: Path, flower: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificates.make(tmp_path, [], ["a", "b"])
    keys = SiteKeys(tmp_path, tmp_path / "r.json", flower)
    keys.look()
    before, known = keys.public, dict(flower.known)

    def fails(*arguments: Any, **options: Any) -> Any:
        raise OSError(24, "Too many open files")

    for target, name in ((Path, "read_bytes"), (os, "listdir")):
        with monkeypatch.context() as patched:
            patched.setattr(target, name, fails)
            try:
                keys.look()
            except OSError:
                assert target is os
        assert keys.public == before and flower.known == known
    keys.look()
    assert keys.public == before and flower.known == known


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1}', '{"a": {"key": "00"}}', "[" * 100_000])
def test_a_damaged_record_is_a_sentence(tmp_path: Path, flower: Any, text: str) -> None:
    record = tmp_path / "flower" / "registered.json"
    record.parent.mkdir()
    record.write_text(text)
    with pytest.raises(FedForwardError, match=r"registered\.json .*which keys the engine knows"):
        SiteKeys(tmp_path, record, flower)
