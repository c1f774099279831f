"""The examples and the README's commands do what they say."""

import runpy
import tomllib
from pathlib import Path

import pytest

from fedforward import config

ROOT = Path(__file__).parents[1]


def test_the_example_configuration_is_valid() -> None:
    loaded = config.load(ROOT / "examples/own_data.toml", ["federation.rounds=20"])
    assert loaded.federation.rounds == 20


def test_the_library_example_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["library_use.py", "--steps", "2"])
    runpy.run_path(str(ROOT / "examples/library_use.py"), run_name="__main__")
    assert "loss of one batch at the end" in capsys.readouterr().out


def test_the_readme_names_keys_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for block in text.split("```toml")[1:]:
        config.validate(tomllib.loads(block.split("```")[0]))
    for section, kind in config.SECTIONS.items():
        for key in text.split(f"`{section}.")[1:]:
            name = key.split("`")[0].split(" ")[0].split("=")[0]
            # `run.toml` is a file, `run.…` are keys.
            assert name == "toml" or name in kind.model_fields, f"{section}.{name}"
