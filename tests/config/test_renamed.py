"""Keys and values of before: one sentence each, with the name of today."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedforward.config.loading import OLD_KEYS, OLD_VALUES
from fedforward.config.schema import Config, sections_of
from fedforward.config.site import SiteConfig
from fedforward.core.errors import FedForwardError
from fedforward.training.run_directory import RunDirectory
from tests.support.command_line import command, write_config
from tests.support.configurations import content, refusal

#: Old key, an old value, and the sentence.
RUN = [
    ("method.strategy", "loss", "method.strategy is now method.client_rates."),
    ("method.spread", 1e-4, "method.spread is now method.rate_spread."),
    ("federation.partition", "by", "federation.partition = 'by' is now 'by-field'."),
    ("run.trajectory", "generate", "run.trajectory = 'generate' is now 'recompute'."),
    ("run.trajectory", "copy", "run.trajectory = 'copy' is now 'cache'."),
    ("model.resting", "host", "model.resting is now model.offload."),
    ("model.resting", "device", "model.resting = 'device' is now model.offload = 'none'."),
    ("model.offload", "device", "model.offload = 'device' is now 'none'."),
    ("server.decay", 0.99, "server.decay is now server.state_decay."),
    ("simulation.failing", 0.1, "simulation.failing is now simulation.dropout."),
    ("simulation.slow", 0.1, "simulation.slow is now simulation.straggler."),
    ("simulation.lying", 0.1, "simulation.lying is now simulation.byzantine."),
    ("simulation.late", 1, "simulation.late is now simulation.late_join."),
    ("simulation.late_round", 2, "simulation.late_round is now simulation.late_join_round."),
]
SITE = [
    ("site.keep_letters", True, "site.keep_letters is now site.keep_messages."),
    ("limits.full_tuning", True, "limits.full_tuning is now limits.tune."),
    ("model.resting", "device", "model.resting = 'device' is now model.offload = 'none'."),
    ("run.trajectory", "copy", "run.trajectory = 'copy' is now 'cache'."),
]
#: What a run that was saved before wrote, beside keys that have not changed.
SAVED = {
    "model.resting": "device",
    "method.strategy": "fixed",
    "server.decay": 1.0,
    "simulation.failing": 0.0,
    "simulation.slow": 0.0,
    "simulation.lying": 0.0,
    "simulation.late": 0,
    "simulation.late_round": 1,
}


@pytest.mark.parametrize(("key", "value", "sentence"), RUN)
def test_an_old_key_or_value_of_a_run(key: str, value: Any, sentence: str) -> None:
    assert refusal(content(**{key.replace(".", "__"): value})) == f"c.toml: {sentence}"


@pytest.mark.parametrize(("key", "value", "sentence"), SITE)
def test_an_old_key_or_value_of_a_site(key: str, value: Any, sentence: str) -> None:
    found = refusal(content(**{key.replace(".", "__"): value}), SiteConfig)
    assert found == f"c.toml: {sentence}"


def test_the_tables_are_whole_and_lead_to_names_of_today() -> None:
    tested = [(key, value) for key, value, _ in (*RUN, *SITE)]
    whole = sections_of(SiteConfig) | sections_of(Config)
    for old, new in OLD_KEYS.items():
        section, _, name = old.partition(".")
        assert new in whole[section].model_fields and name not in whole[section].model_fields
        assert old in dict(tested)
    for key, values in OLD_VALUES.items():
        section, _, name = key.partition(".")
        assert name in whole[section].model_fields
        for old in values:
            assert (key, old) in tested


def test_all_old_names_of_a_file_are_said_at_once_beside_other_errors() -> None:
    old = {key.replace(".", "__"): value for key, value, _ in RUN}
    message = refusal(content(**old, method__mue=1.0, run__seed=-1))
    lines = message.split("\n  ")
    last = {key: sentence for key, _, sentence in RUN}
    assert lines[0] == "c.toml:" and len(lines) == 1 + len(last) + 2
    assert set(last.values()) < set(lines)
    assert any("Did you mean method.mu?" in line for line in lines)


def test_an_old_value_of_another_key_has_no_new_name() -> None:
    message = refusal(content(federation__weights="by", model__dtype="copy"))
    assert "is now" not in message and "'equal', 'examples'" in message


def test_the_command_line_says_it_with_exit_code_2(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    for arguments in (["run", path, "--out", tmp_path / "run"], ["plan", path]):
        done = command(*arguments, "method.strategy=loss", "federation.partition=by")
        message = done.refused("method.strategy is now method.client_rates.")
        assert "federation.partition = 'by' is now 'by-field'." in message.replace("\n", " ")
    site = tmp_path / "site.toml"
    site.write_text('site.keep_letters = true\nmodel.path = "m"\ndata.source = "d"\n', "utf-8")
    done = command("client", site, "--server", "localhost:1", "--insecure")
    done.refused("site.keep_letters is now site.keep_messages.")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A run directory as an older version left it."""
    lines: dict[str, list[str]] = {"model": ['path = "m"'], "data": ['source = "d"']}
    for key, value in SAVED.items():
        section, _, name = key.partition(".")
        lines.setdefault(section, []).append(f"{name} = {json.dumps(value)}")
    text = "".join(f"[{name}]\n" + "\n".join(part) + "\n" for name, part in lines.items())
    (tmp_path / "old").mkdir()
    (tmp_path / "old/config.toml").write_text(text, encoding="utf-8")
    return tmp_path / "old"


def test_a_saved_run_of_before_says_all_of_its_old_names(saved: Path) -> None:
    with pytest.raises(FedForwardError) as caught:
        RunDirectory(saved).load()
    lines = str(caught.value).split("\n  ")
    assert lines[0] == f"{saved / 'config.toml'}:" and len(lines) == 1 + len(SAVED)
    assert any(line.endswith(": method.strategy is now method.client_rates.") for line in lines)
    assert all(line.startswith("line ") for line in lines[1:])
    done = command("verify", saved)
    assert done.code == 2 and "server.decay is now server.state_decay." in done.error


def test_a_saved_plan_of_before_says_its_old_value(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    write_config(tmp_path).rename(tmp_path / "config.toml")
    plan = {"probes_per_call": 2, "threads": 1, "trajectory": "copy", "evaluation_rows": 4}
    (tmp_path / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    with pytest.raises(FedForwardError, match=r"plan\.json: trajectory = 'copy' is now 'cache'"):
        directory.load()
    (tmp_path / "plan.json").write_text(json.dumps(plan | {"trajectory": "cache"}), "utf-8")
    config, found = directory.load()
    assert isinstance(config, Config) and found.trajectory == "cache"
