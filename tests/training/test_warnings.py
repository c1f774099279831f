"""What a run says once, without ending: losses that round to the same number, no end token."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedforward.training.metrics import RoundingWatch
from tests.support.command_line import MODEL, command, write_config


def line(zeros: float, skipped: int = 0, loss: float | None = 2.0) -> dict[str, Any]:
    return {
        "round": 1,
        "training_loss": loss,
        "skipped_steps": skipped,
        "zero_gradients": zeros,
        "learning_rates": {0: 1e-3, 1: 1e-3},
    }


@pytest.mark.parametrize(("dtype", "larger"), [("float32", "0.001"), ("bfloat16", "0.003")])
def test_equal_losses_are_said_once(tmp_path: Path, dtype: str, larger: str) -> None:
    config = write_config(tmp_path)
    out = tmp_path / "run"
    options = ["method.mu=1e-12", f"model.dtype={dtype}", "method.local_steps=3"]
    result = command("run", config, *options, "federation.rounds=3", "--out", out)
    assert result.code == 0, result
    words = "6 of 6 projected gradients were exactly 0: with method.mu = 1e-12 both losses of"
    assert result.error.count("projected gradients") == 1 and words in result.error
    assert f"Raise method.mu (try {larger})" in result.error
    assert ("model.dtype = 'float32'" in result.error) is (dtype == "bfloat16")
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(text)["zero_gradients"] for text in lines[1:]] == [1.0] * 3


def test_a_usual_scale_says_nothing(tmp_path: Path) -> None:
    result = command("run", write_config(tmp_path), "method.local_steps=3", "--out", tmp_path / "r")
    assert result.code == 0 and "warning" not in result.error


@pytest.mark.parametrize(
    ("changes", "zeros", "lines", "said"),
    [
        ({}, 0.05, 1, False),
        ({}, 0.05, 2, True),
        ({}, 0.01, 20, False),
        ({"method__objective": "f1"}, 1.0, 3, False),
    ],
)
def test_how_many_zeros_are_too_many(
    configure: Callable[..., Any], changes: dict[str, Any], zeros: float, lines: int, said: bool
) -> None:
    watch = RoundingWatch(configure(method__local_steps=20, **changes))
    sentences = [watch.look(line(zeros)) for _ in range(lines)]
    assert any(sentences) is said
    assert not said or watch.look(line(1.0)) == ""


def test_zeros_with_another_reason_do_not_count(configure: Callable[..., Any]) -> None:
    watch = RoundingWatch(configure(method__local_steps=20))
    for other in (line(1.0, skipped=3), line(1.0, loss=0.0), line(1.0, loss=None)):
        assert watch.look(other) == ""
    assert watch.look({key: value for key, value in line(1.0).items() if "zero" not in key}) == ""
    assert watch.look(line(1.0))


def test_a_tokenizer_without_an_end_token_is_said_at_the_start(tmp_path: Path) -> None:
    model = shutil.copytree(MODEL, tmp_path / "model")
    for name in ("tokenizer_config.json", "special_tokens_map.json", "config.json"):
        path = model / name
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            content.pop("eos_token", None)
            path.write_text(json.dumps(content), encoding="utf-8")
    config = write_config(tmp_path)
    result = command("run", config, f"model.path={model}", "--out", tmp_path / "r")
    assert result.code == 0, result
    assert result.error.count("has no end-of-sequence token") == 1
    assert result.error.index("end-of-sequence") < result.error.index("round ")
    assert "data.answer_tokens = 48 tokens" in result.error
    words = 'data.label_words={ "0" = " no", "1" = " yes" }'
    rows = [{"q": f"is {i} odd?", "a": str(i % 2)} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = command(
        "run", config, f"model.path={model}", words, "data.answer={a}", "--out", tmp_path / "l"
    )
    assert result.code == 0 and "end-of-sequence" not in result.error
