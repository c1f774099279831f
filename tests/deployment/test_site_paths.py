"""No path leaves a site: what it refuses is said without them, and its log has them."""

import json
import shutil
from pathlib import Path

import pytest

from fedforward.config import site as sites
from fedforward.messages.envelope import Envelope, MessageKind
from tests.conftest import DEMO_MODEL
from tests.support.sites import party, run_toml


def hello(tmp_path: Path) -> bytes:
    terms = {"terms": sites.terms(run_toml(tmp_path))}
    return Envelope(MessageKind.HELLO, b"12345678", json.dumps(terms).encode()).encode()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__path": "{}/secret model"}, "no such folder"),
        ({"model__path": "{}/modle"}, "no such folder"),
        ({"model__path": "{}/broken"}, "is damaged or cut short"),
        ({"model__path": "./broken"}, "is damaged or cut short"),
        ({"model__path": "~/secret/model"}, "no such folder"),
        ({"model__path": "C:\\secret\\model"}, "no such folder"),
        ({"data__source": "{}/secret.jsonl"}, "no such file"),
        ({"data__source": "secret/../secret.jsonl"}, "no such file"),
    ],
)
def test_a_refusal_has_no_path(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, str],
    words: str,
) -> None:
    caplog.set_level("INFO", "fedforward.deployment")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    broken = shutil.copytree(DEMO_MODEL, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"\xff" * 100)
    own = {key: text.replace("{}", str(tmp_path)) for key, text in changes.items()}
    answer = Envelope.decode(party(tmp_path, "a", **own).answer(hello(tmp_path)))
    text = answer.text()
    assert answer.kind is MessageKind.REFUSAL and words in text
    for part in (str(tmp_path), tmp_path.name, "secret", "broken", "'model", "site.toml", "/"):
        assert part not in text.replace("https://huggingface.co", ""), text
    assert "(a path of this site)" in text
    assert next(iter(own.values())) in caplog.text.replace("\\\\", "\\")


def test_refusals_keep_what_is_no_path(tmp_path: Path) -> None:
    site = party(tmp_path, "a", data__fields={"question": "nothing"})
    answer = Envelope.decode(site.answer(hello(tmp_path)))
    assert answer.kind is MessageKind.REFUSAL and "Their fields are" in answer.text()
    assert "is not a field of (a path of this site). Their" in answer.text()
    assert "data.fields: question = 'nothing'" in answer.text()
