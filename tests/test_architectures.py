"""Architectures of transformers at tiny sizes: they run as they must, or say why not."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pydantic", reason="the configuration needs pydantic")

from fedforward.training.run import Run

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/reference/architectures.md"


def load() -> Any:
    """The script, imported as it is started from its folder."""
    folder = str(ROOT / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("architectures")
    finally:
        sys.path.remove(folder)


@pytest.mark.parametrize(
    ("family", "lora", "full"),
    [
        ("llama", "works", "works"),
        ("mixtral", "works", "works, one probe a pass"),
        ("mamba", "works", "works"),
        ("bert", "refused: not causal", "refused: not causal"),
    ],
)
def test_an_architecture(family: str, lora: str, full: str) -> None:
    """First loss of transformers, last of PEFT, of the merged and of the saved model."""
    script = load()
    rows = script.outcomes(family)
    assert [script.kind_of(row) for row in rows] == [lora, full], rows


def test_a_difference_and_a_crash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    script = load()
    right = script.reference_loss
    monkeypatch.setattr(script, "reference_loss", lambda *given: right(*given) * 1.001)
    rows = script.outcomes("llama")
    assert {row["outcome"] for row in rows} == {"differs"}
    assert "the first loss is" in rows[0]["says"]
    monkeypatch.setattr(script, "reference_loss", lambda *_: 1 / 0)
    rows = script.outcomes("llama")
    assert {row["outcome"] for row in rows} == {"crash"}
    assert "ZeroDivisionError" in rows[0]["traceback"]


def test_one_probe_a_pass_is_in_the_plan_and_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script = load()
    script.folder_of("mixtral", tmp_path / "mixtral")
    script.rows_into(tmp_path / "rows.jsonl")
    config = script.configuration(tmp_path / "mixtral", tmp_path / "rows.jsonl", "full")
    with caplog.at_level("WARNING", logger="fedforward"):
        first = Run(config, tmp_path / "run")
    assert "One probe a forward pass: the network does not keep the rows" in caplog.text
    first.fit()
    plan = json.loads((tmp_path / "run/plan.json").read_text(encoding="utf-8"))
    assert plan["probes_per_call"] == 1
    assert plan["alone"] == first.plan.alone != ""
    again = Run(config, tmp_path / "run", resume=True)
    assert again.plan == first.plan
    again.fit()
    assert again.model.digest() == first.model.digest()


def recorded() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(PAGE.with_suffix(".json").read_text(encoding="utf-8"))
    return content


def test_the_page_is_made_of_the_outcomes_beside_it() -> None:
    script = load()
    rows = recorded()["rows"]
    assert script.page(rows, recorded()["versions"]) == PAGE.read_text(encoding="utf-8")
    assert not [row for row in rows if row["outcome"] in ("crash", "differs")]
    if recorded()["versions"]["transformers"] == script.installed()["transformers"]:
        assert {row["architecture"] for row in rows} == set(script.architectures())


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_architecture_is_what_the_page_says() -> None:
    """No crash and no difference; with the versions of the page, the very outcomes of it."""
    script = load()
    rows: list[dict[str, Any]] = []
    script.in_processes(script.architectures(), rows.append)
    bad = [row for row in rows if row["outcome"] in ("crash", "differs")]
    assert not bad
    if recorded()["versions"] == script.installed():
        expected = {(r["architecture"], r["tune"]): script.kind_of(r) for r in recorded()["rows"]}
        assert {(r["architecture"], r["tune"]): script.kind_of(r) for r in rows} == expected
