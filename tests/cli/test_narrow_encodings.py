"""A system whose encoding is ASCII: what is printed, read and written is right, or is said."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedforward.config.loading import load, parse_override
from fedforward.core.errors import FedForwardError
from fedforward.deployment.supervisor import Child
from tests.support.command_line import MODEL, Outcome, write_config

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems are never ASCII")
ASCII = {
    "LC_ALL": "C",
    "PYTHONUTF8": "0",
    "PYTHONCOERCECLOCALE": "0",
    "PYTHONIOENCODING": "ascii",
}


def narrow(*arguments: object) -> Outcome:
    line = [sys.executable, "-m", "fedforward.cli", *map(str, arguments)]
    done = subprocess.run(
        [os.fsencode(part) for part in line],
        capture_output=True,
        env={**os.environ, **ASCII},
        check=False,
    )
    assert done.stdout.isascii() and done.stderr.isascii()
    return Outcome(done.returncode, done.stdout.decode(), done.stderr.decode())


def wide(path: Path, old: str, new: str) -> Path:
    """A configuration in which one text is changed."""
    path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    return path


def test_help_and_errors_are_printed(tmp_path: Path) -> None:
    assert narrow("--help").code == 0
    config = wide(write_config(tmp_path), "rank", "ränk")
    narrow("run", config).refused("r\\xe4nk")
    config = wide(write_config(tmp_path), str(MODEL), str(tmp_path / "mödel"))
    message = narrow("run", config, "--out", tmp_path / "r").refused("encoding is ascii")
    assert "set PYTHONUTF8=1, or LC_ALL=C.UTF-8" in message
    narrow("run", tmp_path / "ü.toml").refused("no such configuration file")


def test_text_of_the_command_line_is_utf8_whatever_the_locale() -> None:
    kept = "Größe".encode().decode("ascii", "surrogateescape")
    assert parse_override(f"data.example={kept}") == ("data", "example", "Größe")
    assert parse_override("data.example=Größe") == ("data", "example", "Größe")
    with pytest.raises(FedForwardError, match="is no UTF-8 text"):
        parse_override("data.example=\udcff")


def test_the_log_of_a_process_is_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ASCII.items():
        monkeypatch.setenv(name, value)
    lines: list[str] = []
    command = [sys.executable, "-c", "print('Größe 你好')"]
    child = Child("child", command, tmp_path / "child.log", {}, lines.append)
    child.start()
    assert child.process is not None and child.process.wait(30) == 0
    child.stop()
    assert child.tail() == "Größe 你好" and lines == ["Größe 你好"]


@pytest.mark.slow
def test_a_run_is_carried_out_and_verified(tmp_path: Path) -> None:
    config = wide(write_config(tmp_path), "Q: {q}", "Größe “{q}”")
    rows = [{"q": f"Maß {i}?", "a": f"{i} 你好"} for i in range(12)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    out = tmp_path / "ergebnis ü"
    result = narrow("run", config, "data.example=Größe?", "--out", out)
    assert result.code == 0, result
    assert load(out / "config.toml").data.example == "Größe?"
    assert narrow("verify", out).code == 0
