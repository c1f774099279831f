"""A comparison's runs: what they share, what is kept, and what is refused before anything runs."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedforward.cli import compare as command_module
from fedforward.core.errors import FedForwardError
from fedforward.training import comparison, metrics
from fedforward.training.comparison import Comparison, Trial
from fedforward.training.spending import spent
from fedforward.training.variants import read_variants
from tests.support.command_line import Outcome, command, write_config


def lines_of(run: Path) -> list[dict[str, Any]]:
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def compare(folder: Path, *arguments: object, out: str = "out") -> Outcome:
    return command("compare", folder / "c.toml", *arguments, "--out", folder / out)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A finished comparison of two variants at two seeds, matched by rounds."""
    folder = tmp_path_factory.mktemp("comparison")
    write_config(folder)
    outcome = compare(
        folder, "--methods", "fedmezo,two=decomfl", "--rates", "fedmezo=1e-3", "--seeds", 2,
        "--set", "two:method.local_steps=2",
    )  # fmt: skip
    assert outcome.code == 0, outcome
    return folder, outcome


@pytest.fixture
def copy(made: tuple[Path, Outcome], tmp_path: Path) -> Path:
    """A copy of the comparison's folder with its configuration."""
    return Path(shutil.copytree(made[0], tmp_path / "copy"))


AGAIN = ("--methods", "fedmezo,two=decomfl", "--rates", "fedmezo=1e-3", "--set",
         "two:method.local_steps=2")  # fmt: skip


def test_every_run_is_a_run_of_its_own(made: tuple[Path, Outcome]) -> None:
    folder, outcome = made
    out = folder / "out"
    for label, method, steps in (("fedmezo", "fedmezo", 1), ("two", "decomfl", 2)):
        for seed in (0, 1):
            summary = json.loads((out / label / f"seed-{seed}/summary.json").read_text())
            assert (summary["method"], summary["rounds"]) == (method, 2)
            assert summary["local_steps"] == steps
    assert command("verify", out / "two/seed-1").code == 0
    found = json.loads((out / "compare.json").read_text())
    assert found["measure"] == "loss" and found["matched"] == "2 rounds"
    assert [group["label"] for group in found["groups"]] == ["fedmezo", "two"]
    finals = [lines_of(out / f"two/seed-{n}")[-1]["heldout_loss"] for n in (0, 1)]
    two = found["groups"][1]
    assert two["final"]["mean"] == pytest.approx(sum(finals) / 2, rel=1e-12)
    assert two["final"]["sd"] == pytest.approx(abs(finals[0] - finals[1]) / math.sqrt(2), rel=1e-9)
    assert two["learning_rate"] == "auto" and found["groups"][0]["learning_rate"] == 1e-3
    (difference,) = found["differences"]
    assert difference["test"] == "paired t test" and difference["seeds"] == 2
    table = (out / "compare.csv").read_text().splitlines()
    assert len(table) == 3 and table[1].startswith("fedmezo,fedmezo,0.001,2,0,loss,")
    assert "two (decomfl)" in outcome.out and "compare.html" in outcome.out


def test_what_is_finished_is_kept_and_seeds_are_added(copy: Path) -> None:
    old = copy / "out/two/seed-0/ledger.sqlite"
    before = old.stat().st_mtime_ns
    result = compare(copy, *AGAIN, "--seeds", 3, "--json")
    assert result.code == 0, result
    found = json.loads(result.out)
    assert [run["seed"] for run in found["runs"]] == [0, 1, 2, 0, 1, 2]
    assert old.stat().st_mtime_ns == before


def test_a_run_that_was_cut_short_goes_on(copy: Path) -> None:
    run = copy / "out/two/seed-1"
    whole = json.loads((run / "summary.json").read_text())["state_digest"]
    (run / "summary.json").unlink()
    (run / "metrics.jsonl").write_text(json.dumps(lines_of(run)[0]) + "\n", encoding="utf-8")
    assert compare(copy, *AGAIN, "--seeds", 2).code == 0
    assert json.loads((run / "summary.json").read_text())["state_digest"] == whole


def test_ctrl_c_leaves_runs_that_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(tmp_path)
    whole, begun = comparison._run, []

    def interrupted(*arguments: Any) -> None:
        begun.append(arguments[1])
        if len(begun) == 2:
            raise KeyboardInterrupt
        whole(*arguments)

    monkeypatch.setattr(comparison, "_run", interrupted)
    options = ("--methods", "fedmezo", "--seeds", 2)
    result = compare(tmp_path, *options)
    assert result.code == 130
    assert "Continue with: fedforward compare" in result.error and "--seeds 2" in result.error
    result = compare(tmp_path, *options)
    assert result.code == 0, result
    assert [path.name for path in begun] == ["seed-0", "seed-1", "seed-1"]


def test_other_settings_are_refused_before_anything_runs(copy: Path) -> None:
    message = compare(copy, *AGAIN, "--seeds", 2, "--match", "bytes").refused()
    assert "has another comparison: match is 'rounds' there and 'bytes' here" in message
    other = [word.replace("local_steps=2", "local_steps=3") for word in AGAIN]
    compare(copy, *other).refused("two/seed-0 belongs to another configuration", "local_steps")
    lower = compare(copy, "federation.rounds=1", *AGAIN)
    lower.refused("has 2 rounds already, and federation.rounds = 1")


def test_more_rounds_go_on_from_those_that_are_done(copy: Path) -> None:
    result = compare(copy, "federation.rounds=3", *AGAIN, "--seeds", 1)
    assert result.code == 0, result
    assert len(lines_of(copy / "out/fedmezo/seed-0")) == 4


def test_a_diverged_run_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(tmp_path)
    rates = ("--rates", "good=1e-4", "--seeds", 2, "--json")
    assert compare(tmp_path, "--methods", "good=fedmezo", *rates).code == 0
    # Any held-out loss is too large now.
    monkeypatch.setattr(metrics, "DIVERGED", 0.5)
    result = compare(tmp_path, "--methods", "good=fedmezo,bad=fedmezo", *rates)
    assert result.code == 0, result
    assert "bad, seed 1: The run diverged" in result.error
    good, bad = json.loads(result.out)["groups"]
    assert (good["diverged"], bad["diverged"]) == (0, 2)
    assert bad["verdict"] == "diverged" and bad["final"]["mean"] is None
    (difference,) = json.loads(result.out)["differences"]
    assert difference["why_not"] == "2 of 2 runs of bad diverged"
    page = (tmp_path / "out/compare.html").read_text(encoding="utf-8")
    assert "All runs of bad diverged" in page


@pytest.mark.parametrize("match", ["bytes", "passes"])
def test_all_spend_what_the_first_spends(match: str, tmp_path: Path) -> None:
    write_config(tmp_path)
    result = compare(
        tmp_path, "federation.rounds=4", "--methods", "decomfl,many=decomfl",
        "--set", "many:method.directions=3", "--set", "decomfl:method.local_steps=6",
        "--seeds", 1, "--match", match, "--json",
    )  # fmt: skip
    assert result.code == 0, result
    first, many = json.loads(result.out)["groups"]
    budget = first["spent"][match]["mean"]
    lines = lines_of(tmp_path / "out/many/seed-0")
    costs = spent(lines, match)  # type: ignore[arg-type]
    # It ends with the round that spends the budget.
    assert costs[-2] < budget <= costs[-1] == many["spent"][match]["mean"]
    assert len(lines) > 5
    assert "heldout_loss" in lines[-1]
    summary = json.loads((tmp_path / "out/many/seed-0/summary.json").read_text())
    assert summary["stopped"].startswith("budget: ")
    kept = json.loads((tmp_path / "out/settings.json").read_text())
    assert kept["budget"] == budget and list(kept["lengths"]) == ["many"]
    assert not list((tmp_path / "out").glob(".trial-*"))
    # The second call runs nothing, not even a trial.
    assert "measuring what" not in compare(
        tmp_path, "federation.rounds=4", "--methods", "decomfl,many=decomfl",
        "--set", "many:method.directions=3", "--set", "decomfl:method.local_steps=6",
        "--seeds", 1, "--match", match,
    ).error  # fmt: skip


def test_a_budget_of_seconds_ends_runs(tmp_path: Path) -> None:
    write_config(tmp_path)
    result = compare(
        tmp_path, "--methods", "fedmezo", "--seeds", 1, "--match", "seconds", "--budget", 0.5,
        "--json",
    )  # fmt: skip
    assert result.code == 0, result
    assert json.loads(result.out)["groups"][0]["spent"]["seconds"]["mean"] >= 0.4


def test_a_budget_below_one_round(tmp_path: Path) -> None:
    write_config(tmp_path)
    message = compare(
        tmp_path, "--methods", "fedmezo,fedavg", "--rates", "fedavg=0.1", "--seeds", 1,
        "--match", "bytes",
    ).refused("fedavg: one round takes", "about what fedmezo uses in 2 rounds")  # fmt: skip
    assert "bytes sent and received by one client" in message
    assert not (tmp_path / "out/fedmezo").exists() and not (tmp_path / "out/fedavg").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--methods", "fedmezo", "--seeds", 0), "--seeds 0 is not allowed"),
        (("--methods", "fedmezo", "--match", "joules"), "--match 'joules' is not allowed"),
        (("--methods", "fedmezo", "--budget", "much"), "--budget 'much' is not allowed"),
        (("--methods", "fedmezo", "--budget", 0), "--budget 0 is not allowed: it must be above 0"),
        (("--methods", "fedmezo", "--budget", 0.5), "Below one round nothing can be compared"),
        (("--methods", "fedmezo", "--budget", "nan"), "--budget nan is not allowed"),
        (("--methods", "fedmezo", "--match", "passes", "--budget", "3 kB"), "give a number."),
        (
            ("--methods", "fedavg", "--rates", "fedavg=1", "--match", "passes"),
            "fedavg trains by backpropagation, whose passes are not counted",
        ),
        (("--seeds", 1), "--methods is missing"),
        (("--methods", "fedmezo,fedmezo"), "has the label 'fedmezo' twice"),
        (("--methods", "mezo"), "'mezo' is not a known method"),
    ],
)
def test_bad_options_run_nothing(
    options: tuple[object, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_config(tmp_path)
    monkeypatch.setattr(comparison, "_run", lambda *_: pytest.fail("something ran"))
    compare(tmp_path, *options).refused(words)
    assert not (tmp_path / "out").exists()


def test_folders_that_are_something_else(copy: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("x", encoding="utf-8")
    options = ("compare", copy / "c.toml", "--methods", "fedmezo", "--out")
    command(*options, taken).refused("is not empty and is no comparison")
    command(*options, taken / "mine.txt").refused("is a file")
    command(*options, copy / "out/two/seed-0").refused("is the folder of a single run")
    (copy / "out/settings.json").write_text("{", encoding="utf-8")
    compare(copy, *AGAIN).refused("settings.json is damaged")
    command("compare", tmp_path / "none.toml", "--methods", "fedmezo").refused("none.toml")


def test_finished_runs_are_grouped_by_all_but_their_seed(copy: Path, tmp_path: Path) -> None:
    runs = [copy / f"out/{label}/seed-{seed}" for label in ("two", "fedmezo") for seed in (0, 1)]
    result = command("compare", *runs, "--out", tmp_path / "c", "--json")
    assert result.code == 0, result
    found = json.loads(result.out)
    assert [(group["label"], group["seeds"]) for group in found["groups"]] == [
        ("decomfl", [0, 1]),
        ("fedmezo", [0, 1]),
    ]
    made = json.loads((copy / "out/compare.json").read_text())
    assert found["groups"][0]["final"] == made["groups"][1]["final"]
    assert (tmp_path / "c/compare.html").is_file()
    # Once more in the same folder.
    assert command("compare", runs[0], runs[2], "--out", tmp_path / "c").code == 0
    text = (tmp_path / "c/compare.html").read_text(encoding="utf-8")
    assert "one seed cannot tell" in text


def test_runs_that_cannot_be_compared(copy: Path, tmp_path: Path) -> None:
    one, other = copy / "out/two/seed-0", copy / "out/fedmezo/seed-0"
    out = ("--out", tmp_path / "c")
    command("compare", one, tmp_path, *out).refused("is not a run directory")
    command("compare", one, other, "--seeds", 2, *out).refused("--seeds is for a configuration")
    command("compare", copy / "c.toml", one, *out).refused("is no run directory", "is one")
    same = Path(shutil.copytree(one, tmp_path / "same"))
    command("compare", one, same, *out).refused("the same run.seed = 0")
    config = (other / "config.toml").read_text(encoding="utf-8")
    (other / "config.toml").write_text(config.replace("heldout = 4", "heldout = 5"), "utf-8")
    command("compare", one, other, *out).refused("cannot be compared", "data.heldout is 4")
    (other / "config.toml").write_text(config, encoding="utf-8")
    lines = lines_of(other)
    lines[0]["metrics"] = {"f1": 0.5}
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (other / "metrics.jsonl").write_text(text, encoding="utf-8")
    command("compare", one, other, *out).refused("they have other metrics", "the loss alone and f1")
    assert not (tmp_path / "c").exists()


def test_estimates_of_a_trial() -> None:
    trial = Trial(first=10.0, later=4.0, evaluation=0.5)
    assert trial.total(5, 2) == 27.0
    assert trial.rounds_for(27.0, 2) == 5.0


def test_a_schedule_is_as_long_as_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cosine ends with the last round, so its rounds are the estimate; others may have more."""
    file = write_config(tmp_path, ())
    variants = read_variants(
        file, ["federation.rounds=10"], ["a=decomfl,b=decomfl,c=decomfl"], [],
        ["c:method.schedule='cosine'"],
    )  # fmt: skip
    found = Comparison(variants, [0], tmp_path / "out", match="bytes", budget=1000.0)
    monkeypatch.setattr(Comparison, "_trial", lambda self, variant: Trial(100.0, 10.0, 0.0))
    (tmp_path / "out").mkdir()
    found._plan(None)
    rounds = {label: length.rounds for label, length in found.settings.lengths.items()}
    assert rounds == {"a": 101, "b": 101, "c": 91}


def test_a_page_needs_no_label_to_be_safe(made: tuple[Path, Outcome]) -> None:
    with pytest.raises(FedForwardError, match="--budget 'x' is not allowed"):
        command_module._amount("x", "bytes")
    assert command_module._amount("2 kB", "bytes") == 2000.0
    assert command_module._amount("1_000", "rounds") == 1000.0
