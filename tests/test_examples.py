"""The examples and the README's commands do what they say."""

import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fedforward.config import site
from fedforward.config.loading import load, validate
from fedforward.config.schema import Config, sections_of
from fedforward.deployment.limits import refusals

ROOT = Path(__file__).parents[1]


def test_the_example_configuration_is_valid() -> None:
    loaded = load(ROOT / "examples/own_data.toml", ["federation.rounds=20"])
    assert loaded.federation.rounds == 20


def test_the_example_of_a_comparison_is_the_demonstrations_task(tmp_path: Path) -> None:
    from fedforward.demo.run import prepare
    from fedforward.training.variants import check_same_task, read_variants

    path = ROOT / "examples/compare.toml"
    methods = ["fedmezo,fedmezo-auto,decomfl,feedsign,fedavg"]
    variants = read_variants(path, [], methods, ["feedsign=3e-3,fedavg=0.1"])
    demo = prepare(tmp_path / "sites.jsonl")
    same = {"source": demo.data.source, "example": demo.data.example}
    config = variants[1].config
    config = config.model_copy(update={"data": config.data.model_copy(update=same)})
    check_same_task("the example", config, "the demonstration", demo)
    assert config.federation.field == demo.federation.field
    assert (ROOT / config.model.path / "model.safetensors").is_file()


def test_the_federation_example_is_a_run_and_three_sites_within_their_limits() -> None:
    folder = ROOT / "examples/federation"
    terms = site.terms(site.load_terms(folder / "run.toml", []))
    names = [path for path in sorted(folder.glob("*.toml")) if path.name != "run.toml"]
    assert len(names) == terms["federation"]["clients"] == 3
    for path in names:
        settings = site.load_site(path)
        assert refusals(terms, settings) == []
        joined = site.join(terms, settings)
        assert joined.data.source == f"{path.stem}.jsonl" and settings.site.out == path.stem
        assert joined.method.local_steps == terms["method"]["local_steps"]


def test_the_library_example_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["library_use.py", "--steps", "2", "--rounds", "1"])
    runpy.run_path(str(ROOT / "examples/library_use.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert "after 1 rounds" in shown and "loss of one batch after 2 steps" in shown


def test_the_readme_names_keys_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for block in text.split("```toml")[1:]:
        validate(tomllib.loads(block.split("```")[0]))
    for section, kind in sections_of(Config).items():
        for key in text.split(f"`{section}.")[1:]:
            name = key.split("`")[0].split(" ")[0].split("=")[0]
            # `run.toml` is a file, `run.…` are keys.
            assert name == "toml" or name in kind.model_fields, f"{section}.{name}"


@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_a_federation_on_one_machine(tmp_path: Path) -> None:
    pytest.importorskip("flwr")
    command = [sys.executable, str(ROOT / "examples/federation/start.py"), str(tmp_path / "fed")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "garden the run is over after 10 rounds" in done.stdout
    printed = re.findall(r"^\$ fedforward (\w+)", done.stdout, re.MULTILINE)
    assert printed == ["certs", "server", "client", "client", "client"]
    assert list((tmp_path / "fed/garden/messages").glob("*-out-report"))
    # The same command finds that there is nothing left to do.
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "the run was over already" in done.stdout
