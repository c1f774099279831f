"""A run works from any folder: its paths are absolute, and what lies there is told by digests."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedforward.config.loading import load
from fedforward.config.paths import absolute, as_started
from fedforward.core.errors import FedForwardError
from fedforward.federation.ledger import Ledger
from tests.support.command_line import MODEL, Outcome, command, write_config, write_rows


def relative(folder: Path) -> Path:
    """A folder with a model, rows and a configuration that names both by relative paths."""
    folder.mkdir(parents=True, exist_ok=True)
    path = write_config(folder)
    shutil.copytree(MODEL, folder / "model")
    text = path.read_text(encoding="utf-8").replace(str(MODEL), "./model")
    path.write_text(text.replace(str(folder / "rows.jsonl"), "rows.jsonl"), encoding="utf-8")
    return path


def digests(out: Path) -> tuple[str, str]:
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return summary["state_digest"], summary["ledger_digest"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a run was started and ended; tests do not write there."""
    folder = tmp_path_factory.mktemp("project")
    config = relative(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert command("run", config.name, "--out", "run").code == 0
    return folder


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another folder, which is the current one."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_what_is_kept_names_whole_paths(project: Path) -> None:
    kept = load(project / "run/config.toml")
    assert kept.model.path == str(project / "model")
    assert kept.data.source == str(project / "rows.jsonl")
    adapter = json.loads((project / "run/adapter/adapter_config.json").read_text("utf-8"))
    assert adapter["base_model_name_or_path"] == str(project / "model")


def test_peft_finds_the_base_from_any_folder(project: Path, elsewhere: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    AutoPeftModelForCausalLM.from_pretrained(project / "run/adapter")


def test_a_run_is_verified_exported_and_resumed_from_any_folder(
    project: Path, elsewhere: Path
) -> None:
    run = shutil.copytree(project / "run", elsewhere / "moved run #1 %20 ü")
    assert command("verify", run).code == 0
    assert command("export", run, "--out", "adapter").code == 0
    adapter = json.loads((elsewhere / "adapter/adapter_config.json").read_text("utf-8"))
    assert adapter["base_model_name_or_path"] == str(project / "model")
    before = digests(run)
    result = command("run", project / "c.toml", "--out", run, "--resume")
    assert result.code == 0, result
    assert f"model.path = './model' is {project / 'model'}, as when" in result.error
    more = command("run", project / "c.toml", "federation.rounds=3", "--out", run, "--resume")
    assert more.code == 0 and digests(run) != before
    assert load(run / "config.toml").model.path == str(project / "model")


def test_the_same_run_in_two_folders_has_the_same_digests(project: Path, elsewhere: Path) -> None:
    relative(elsewhere / "a")
    there = command(
        "run", "a/c.toml", "model.path=a/model", "data.source=a/../a/rows.jsonl", "--out", "r"
    )
    assert there.code == 0, there
    assert digests(elsewhere / "r") == digests(project / "run")
    ledger = Ledger(elsewhere / "r/ledger.sqlite")
    assert str(elsewhere) not in json.dumps(ledger.header)
    ledger.close()
    assert str(elsewhere).encode() not in (elsewhere / "r/ledger.sqlite").read_bytes()


def test_a_base_that_has_moved_is_found_by_its_option(elsewhere: Path) -> None:
    config = relative(elsewhere / "a")
    assert command("run", config, "model.path=a/model", "data.source=a/rows.jsonl").code == 0
    run = elsewhere / "runs/c"
    (elsewhere / "a").rename(elsewhere / "b")
    config = elsewhere / "b/c.toml"
    again: list[Any] = ["run", config, "--resume"]
    command("verify", run).refused("model.path = ", "no such folder", "--model FOLDER")
    command("export", run, "--out", "e").refused("no such folder", "--model FOLDER")
    command(*again, "model.path=a/model").refused("is not there any more", "--model FOLDER")
    data = command(*again, "--model", "b/model", "data.source=a/rows.jsonl")
    data.refused("data.source = 'a/rows.jsonl'", "not there any more", "data.source=PATH")
    command("verify", run, "--model", "./b/modle").refused("--model = './b/modle'", "'b/model'?")
    command("verify", run, "--model", "b/modle").refused("no such folder", "'b/model'?")
    command("verify", run, "--model", "").refused("--model '' is empty")
    assert command("verify", run, "--model", "b/model").code == 0
    assert command("export", run, "--out", "e", "--model", "b/model").code == 0
    adapter = json.loads((elsewhere / "e/adapter_config.json").read_text("utf-8"))
    assert adapter["base_model_name_or_path"] == str(elsewhere / "b/model")
    result = command(*again, "--model", "b/model", "data.source=b/rows.jsonl")
    assert result.code == 0, result
    assert command("verify", run).code == 0


def test_another_base_or_other_data_are_refused_and_nothing_is_written(
    project: Path, elsewhere: Path
) -> None:
    from safetensors.torch import load_file, save_file

    run = shutil.copytree(project / "run", elsewhere / "run")
    other = shutil.copytree(MODEL, elsewhere / "model")
    weights = load_file(other / "model.safetensors")
    next(w for name, w in weights.items() if "down_proj" in name)[0, 0] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    write_rows(elsewhere / "rows.jsonl", count=13)
    kept = (run / "config.toml").read_bytes()

    def refused(words: str, *arguments: Any) -> Outcome:
        result = command(*arguments)
        result.refused(words)
        assert (run / "config.toml").read_bytes() == kept
        return result

    refused("other weights than that of the run", "verify", run, "--model", "model")
    resume: tuple[Any, ...] = ("run", project / "c.toml", "--out", run, "--resume")
    refused("other weights than that of the run", *resume, f"data.source={project}/rows.jsonl")
    refused("the data are not those of the run", *resume, "--model", project / "model")


def test_which_path_is_the_one_of_before(
    tmp_path: Path, elsewhere: Path, configure: Callable[..., Any]
) -> None:
    (tmp_path / "x/models/tiny").mkdir(parents=True)
    started = configure(model__path=str(tmp_path / "x/models/tiny"))
    for text in ("models/tiny", "./models/tiny", "../models/tiny", "tiny", "a/../tiny"):
        found = as_started(configure(model__path=text), started)
        assert found.model.path == started.model.path
    for text in ("models/small", "./x/tiny", "/models/tiny", "gpt2"):
        assert as_started(configure(model__path=text), started).model.path == text
    # What is here is what is meant.
    (elsewhere / "tiny").mkdir()
    assert as_started(configure(model__path="tiny"), started).model.path == "tiny"
    assert absolute(configure(model__path="tiny")).model.path == str(elsewhere / "tiny")
    hub = configure(model__path="org/name", data__source="org/rows")
    assert absolute(hub) == hub
    shutil.rmtree(tmp_path / "x")
    with pytest.raises(FedForwardError, match="not there any more"):
        as_started(configure(model__path="models/tiny"), started)
