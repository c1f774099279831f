"""The command `diagnose` on the demonstration model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedforward.analysis.diagnose import Effort, diagnose
from fedforward.analysis.subject import check
from fedforward.config.schema import Config
from fedforward.training.run import Run
from tests.support.command_line import command, write_config

Configure = Callable[..., Config]
SMALL = Effort(
    rows=2,
    probes=6,
    steps=4,
    block_steps=2,
    gradient_rows=8,
    points=2,
    directions=4,
    error_rows=1,
    scales=(1e-5, 1e-3),
)


def test_as_a_command(tmp_path: Path) -> None:
    config, out, file = write_config(tmp_path), tmp_path / "out", tmp_path / "d.json"
    shown = command("diagnose", config, "--quick", "--out", out, "--json", file)
    assert shown.code == 0, shown
    for words in ("effective rank", "learning rate", "two-point", "Spearman", "every B is 0"):
        assert words in shown.out
    told = json.loads(file.read_text(encoding="utf-8"))
    assert told == json.loads((out / "diagnosis.json").read_text(encoding="utf-8"))
    hessian, other = told["curvature"][0]["matrices"]
    assert hessian["matrix"] == "Hessian" and other["matrix"] == "Gauss-Newton"
    assert other["least"] > -1e-4 and other["effective_rank"]["value"] > 1.0
    assert told["assumed"]["smoothness"] >= hessian["norm"]
    bound = told["assumed"]["bound"]
    assert bound["rate"] == min(bound["curvature"], bound["clients"], bound["steps"])
    assert {error["dtype"] for error in told["two_point"]} == {"float32", "bfloat16", "float16"}
    for name in ("spectrum.png", "two-point.png", "clients.png"):
        assert (out / name).stat().st_size > 8_000
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "effective rank" in page and page.count("data:image/png;base64,") == 3
    assert "http:" not in page and "https:" not in page and "<script" not in page
    assert "<!-- fedforward report -->" in page and "prefers-color-scheme: dark" in page
    assert '<th scope="col">effective rank</th>' in page and "<h2>curvature</h2>" in page
    again = command("diagnose", config, "--quick", "--json", "-")
    repeated = json.loads(again.out)
    assert repeated["curvature"] == told["curvature"]
    assert repeated["assumed"] == told["assumed"]


def test_half_precision_spoils_small_perturbations(configure: Configure) -> None:
    found = diagnose(configure(), effort=SMALL)
    noise = {(error.dtype, error.mu): error.noise for error in found.two_point}
    assert 3.0 * noise["float32", 1e-5] < noise["bfloat16", 1e-5]
    assert noise["bfloat16", 1e-3] < noise["bfloat16", 1e-5]


def test_a_trained_point_and_blocks(configure: Configure, tmp_path: Path) -> None:
    config = configure(method__local_steps=1)
    Run(config, tmp_path / "run").fit()
    adapter = tmp_path / "run/adapter"
    of_run = diagnose(config, at=str(tmp_path / "run"), effort=SMALL)
    of_adapter = diagnose(config, at=str(adapter), effort=SMALL)
    base, trained = of_run.curvature
    assert base.point == "base" and trained.point == str(tmp_path / "run")
    assert trained.loss != base.loss
    assert of_adapter.curvature[1].loss == pytest.approx(trained.loss, rel=1e-6)
    assert of_adapter.curvature[0].matrices == base.matrices
    matrix = trained.matrices[1]
    assert [own.block for own in matrix.blocks] == ["0", "1", "2"]
    total = sum(own.trace.value for own in matrix.blocks)
    assert total == pytest.approx(matrix.trace.value, rel=0.2)
    assert all(own.norm <= 1.001 * matrix.norm for own in matrix.blocks)


def test_label_words_have_label_divergence(configure: Configure, tmp_path: Path) -> None:
    rows = [{"q": f"is {n} odd", "a": n % 2, "s": f"s{n % 3}"} for n in range(60)]
    data = tmp_path / "words.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = configure(
        data__source=str(data),
        data__prompt="{q}",
        data__answer="{a}",
        data__label_words={"0": " no", "1": " yes"},
        federation__clients=3,
        federation__partition="by-field",
        federation__field="s",
        method__objective="choice",
    )
    found = diagnose(config, effort=SMALL)
    assert found.differences is not None
    names = {own.name: own for own in found.differences.indices}
    assert np.isfinite(names["label divergence"].values).all()
    assert names["update difference"].correlation is not None
    assert found.curvature[0].matrices[1].least > -1e-4


def test_one_client_has_no_heterogeneity(configure: Configure) -> None:
    found = diagnose(configure(federation__clients=1), effort=SMALL)
    assert found.differences is None
    assert found.assumed is not None and found.assumed.heterogeneity is None
    assert any("federation.clients = 1" in note for note in found.notes)


def test_without_derivatives_forward_passes_remain(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure()
    sentence = "model.offload = 'host' …"
    monkeypatch.setattr("fedforward.analysis.subject.check", lambda _: sentence)
    found = diagnose(config, effort=SMALL)
    assert found.notes[0] == sentence
    assert found.curvature[0].matrices == () and found.assumed is None
    assert np.isfinite(found.curvature[0].forward[0].trace.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__quantization": "nf4"}, "quantised layers"),
        ({"model__offload": "host", "model__tune": "full"}, "fetched and dropped"),
        ({}, ""),
    ],
)
def test_why_there_are_no_derivatives(
    configure: Configure, changes: dict[str, Any], words: str
) -> None:
    found = check(configure(**changes))
    assert words in found and bool(found) == bool(words)


def test_bad_input_is_a_sentence(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    command("diagnose", config, "method.objective=f1").refused("has no derivative", "=loss")
    shown = command("diagnose", config, "--at", tmp_path / "gone")
    shown.refused("neither a run directory")
    assert "loading the model" not in shown.error, "before anything is computed"
    command("diagnose", config, "--json", tmp_path / "a/b.json").refused("there is no folder")
    command("diagnose", config, "--json", tmp_path).refused("is a folder")
    shown = command("diagnose", config, "--quick", "--out", "/proc/none")
    shown.refused("/proc/none")
    assert "loading" not in shown.error, "before anything is computed"
    (tmp_path / "file").write_text("", encoding="utf-8")
    command("diagnose", config, "--out", tmp_path / "file").refused("is a file")
