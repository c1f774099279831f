"""No path leaves a site: what it refuses is said without them, and its log has them."""

import json
import shutil
from pathlib import Path
from typing import Any

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
        ({"data__source": "{}/secret.jsonl"}, "own log says why"),
        ({"data__source": "secret/../secret.jsonl"}, "own log says why"),
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
    assert ("(a path of this site)" in text) == ("data__source" not in own)
    assert next(iter(own.values())) in caplog.text.replace("\\\\", "\\")


DIAGNOSES = [
    {"diagnosis": "HIV positive", "talk": [{"from": "Dr. Mueller", "value": "x"}]},
    {"diagnosis": "none", "talk": [{"from": "Dr. Mueller", "value": "x"}]},
]


@pytest.mark.parametrize(
    "changes",
    [
        {"data__fields": {"question": "diagnosis"}},
        {"data__chat": "talk"},
        {"data__source": "patients"},
        {"data__fields": {"question": "nothing"}},
    ],
)
def test_a_refusal_has_nothing_of_the_data(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, Any],
) -> None:
    """No value, no name of a field and no name of a file; the site's log has the sentence."""
    caplog.set_level("INFO", "fedforward.deployment")
    monkeypatch.chdir(tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in DIAGNOSES), encoding="utf-8")
    (tmp_path / "patients").mkdir()
    (tmp_path / "patients" / "mueller.xlsx").write_text("x", encoding="utf-8")
    own = {"data__source": str(rows)} | changes
    answer = Envelope.decode(party(tmp_path, "a", **own).answer(hello(tmp_path)))
    assert answer.kind is MessageKind.REFUSAL
    for part in ("diagnosis", "HIV", "Mueller", "mueller", "rows", "patients", "talk", "nothing"):
        assert part not in answer.text()
    assert "the data: " in caplog.text or "chat = 'talk'" in caplog.text
