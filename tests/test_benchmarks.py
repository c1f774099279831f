"""The benchmarks run, say what they measured, and name what falls short. Sizes are tiny."""

import argparse
import importlib
import json
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def importable(imported_libraries: None) -> Iterator[None]:
    """The benchmarks import each other as they do when they are started from their folder."""
    threads = torch.get_num_threads()
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))
    torch.set_num_threads(threads)


def load(name: str) -> Any:
    return importlib.import_module(name)


def results(capsys: pytest.CaptureFixture[str], name: str, *arguments: str) -> dict[str, Any]:
    """The JSON of a benchmark at its tiny sizes."""
    load(name).main(["--quick", "--json", "--threads", "1", *arguments])
    content: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert content["benchmark"] == name
    assert content["rows"]
    assert {"processor", "cores", "threads", "torch"} <= content["machine"].keys()
    return content


def test_step(capsys: pytest.CaptureFixture[str]) -> None:
    rows = results(capsys, "step")["rows"]
    kinds = {(r["tune"], r["horizon"], r["trajectory"], r["distribution"]) for r in rows}
    for distribution in ("gaussian", "rademacher"):
        assert ("lora", 30, None, distribution) in kinds
        assert ("full", 1, None, distribution) in kinds
        assert ("full", 30, "recompute", distribution) in kinds
        assert ("full", 30, "cache", distribution) in kinds
    for row in rows:
        assert row["over_two_forwards"] == row["ours_seconds"] / row["two_forwards_seconds"]
        assert row["over_twice_batch"] > 0
        assert row["in_place_over_ours"] > 0
        assert (row["over_two_forwards_peft"] is not None) == (row["tune"] == "lora")


def test_step_in_half_precision(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--dtype", "bfloat16", "--tokens", "8", "--distributions", "rademacher")
    rows = results(capsys, "step", *arguments)["rows"]
    assert {row["dtype"] for row in rows} == {"bfloat16"}


def test_choice(capsys: pytest.CaptureFixture[str]) -> None:
    rows = results(capsys, "choice")["rows"]
    assert len(rows) == 8
    for row in rows:
        if row["before_seconds"] is not None:
            assert row["over_before"] == row["seconds"] / row["before_seconds"]
    for row in rows[0::4]:
        assert row["name"].startswith("evaluation") and row["joined"] and row["most_branching"] > 0


@pytest.mark.slow
def test_memory(capsys: pytest.CaptureFixture[str]) -> None:
    rows = results(capsys, "memory", "--tune", "lora")["rows"]
    assert [row["probes_per_call"] for row in rows] == [2]
    for row in rows:
        assert row["process_bytes"] > 0
        assert row["plain_process_bytes"] > 0
        assert row["plain_tensor_bytes"] > 0
        assert row["process_over_plain"] == row["process_bytes"] / row["plain_process_bytes"]
        assert "process_over_plain" in row["reaches"]


def test_memory_has_both_modes_of_a_trajectory() -> None:
    memory = load("memory")
    wished = argparse.Namespace(
        distributions=["gaussian", "rademacher"], probes_per_call=[2, 1], horizons=[1, 30]
    )
    found = [tuple(s.values()) for s in memory.settings(wished, "full")]
    assert len(found) == len(set(found)) == 7
    assert memory.reach("~30M", 2, None).sense == "<="
    assert memory.reach("~110M", 2, "recompute").sense == "<"
    assert memory.reach("~110M", 2, "cache") is None
    assert memory.reach("~110M", 1, None) is None


def test_directions(capsys: pytest.CaptureFixture[str]) -> None:
    rows = results(capsys, "directions")["rows"]
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16", "float16"}
    assert {row["seeds"] for row in rows} == {1, 90}
    held = [row for row in rows if row["reaches"]]
    assert len(held) == 12
    assert all(row["times_naive"] > 0 and row["times_in_place"] > 0 for row in rows)


def test_simulation(capsys: pytest.CaptureFixture[str]) -> None:
    rows = results(capsys, "simulation")["rows"]
    assert [row["way"] for row in rows] == ["lockstep 4", "one by one", "in pairs"]
    assert rows[0]["times_one_by_one"] == rows[1]["seconds"] / rows[0]["seconds"]
    assert all(row["tensor_bytes"] > 0 for row in rows)


def test_replay(capsys: pytest.CaptureFixture[str]) -> None:
    rows = results(capsys, "replay")["rows"]
    assert {(row["tune"], row["dtype"]) for row in rows} == {
        ("lora", "float32"),
        ("full", "float32"),
        ("full", "bfloat16"),
    }
    for row in rows:
        assert row["bit_identical"]
        assert row["naive_steps_timed"] >= 6
        assert row["naive_extrapolated"]


def test_llama3b(capsys: pytest.CaptureFixture[str]) -> None:
    rows = results(capsys, "llama3b")["rows"]
    names = " ".join(row["name"] for row in rows)
    for word in ("memory of a step, lora", "memory of a step, full", "a step, lora", "up per"):
        assert word in names
    assert "replay of 90 seeds" in names
    assert not any(row["reaches"] for row in rows)


def test_llama3b_needs_a_cuda_device(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        load("llama3b").main([])
    assert end.value.code == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_gpu_runs_every_part_whatever_becomes_of_the_others(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu = load("gpu")
    parts = [
        gpu.Part("fails", ("-c", "import sys; sys.exit('no such thing')"), 60),
        gpu.Part("hangs", ("-c", "import time; print('begun'); time.sleep(60)"), 1),
        gpu.script("directions", 120, "--quick", "--threads", "1", "--dtypes", "float32"),
        gpu.Part("garbles", ("-c", "print('no JSON')"), 60, "step"),
    ]
    monkeypatch.setattr(gpu, "parts", lambda _: parts)
    with pytest.raises(SystemExit) as end:
        gpu.main(["--device", "cpu", "--out", str(tmp_path)])
    assert end.value.code == 1
    shown = capsys.readouterr()
    assert "Failed: fails, hangs, garbles" in shown.err
    content = json.loads((tmp_path / "gpu.json").read_text())
    found = {part["name"]: part for part in content["parts"]}
    assert [part["exit"] for part in found.values()] == [1, None, 0, None]
    assert "no such thing" in found["fails"]["said"]
    assert "ended after 1 s: begun" in found["hangs"]["said"]
    assert "no JSON" in found["garbles"]["said"]
    assert len(found["directions"]["rows"]) == 4
    assert content["machine"]["device"] == "cpu"
    assert content["versions"]["torch"]
    for words in ("float32 gaussian 90 seeds nearest", "G coordinates/s", "no such thing"):
        assert words in shown.out
        assert words in (tmp_path / "gpu.txt").read_text()


def test_gpu_begins_nothing_without_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu = load("gpu")
    monkeypatch.setattr(gpu, "DEADLINE", 1.0)
    [result] = gpu.go([gpu.Part("late", ("-c", "raise SystemExit(3)"), 60)], tmp_path)
    assert result.exit is None
    assert "no time" in result.said


def test_gpu_knows_its_parts(capsys: pytest.CaptureFixture[str]) -> None:
    gpu = load("gpu")
    assert [p.name for p in gpu.parts("cuda")][:2] == ["tests", "directions"]
    assert len({p.name for p in gpu.parts("cuda")}) == len(gpu.parts("cuda"))
    names = {"test_gpu.py", "test_cuda_kernels.py", "test_offload.py", "test_loading.py"}
    assert names <= {Path(name).name for name in gpu.test_files()}
    with pytest.raises(SystemExit):
        gpu.main(["--parts", "nothing"])
    assert "there is tests, directions" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_gpu_in_its_tiniest_form(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    load("gpu").main(["--device", "cpu", "--out", str(tmp_path)])
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert all(part["exit"] == 0 for part in content["parts"])
    assert all(part["rows"] for part in content["parts"] if part["name"] != "tests")
    assert "tests" in capsys.readouterr().out


def test_a_reach_is_met_or_named() -> None:
    common = load("common")
    most, less, least = (common.Reach(sense, 1.0) for sense in ("<=", "<", ">="))
    assert (most.met(1.0), less.met(1.0), least.met(1.0)) == (True, False, True)
    assert (most.met(1.1), less.met(0.9), least.met(0.9)) == (False, True, False)
    assert not most.met(float("nan"))
    assert not most.met(None)
    rows = [
        {"name": "good", "ratio": 0.9, "reaches": {"ratio": most}},
        {"name": "bad", "ratio": 1.25, "times": 2.0, "reaches": {"ratio": most, "times": least}},
        {"name": "free", "ratio": 9.0, "reaches": {}},
    ]
    assert common.shortfalls(rows) == ["bad: ratio is 1.25, the reach is ≤ 1"]
    common.check(rows[:1])


def test_check_exits_1_and_names_the_figure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directions, common = load("directions"), load("common")
    arguments = ["--quick", "--check", "--threads", "1", "--dtypes", "float32"]
    out_of_reach = dict.fromkeys(directions.REACHES, common.Reach(">=", 1e9))
    monkeypatch.setattr(directions, "REACHES", out_of_reach)
    with pytest.raises(SystemExit) as end:
        directions.main(arguments)
    assert end.value.code == 1
    shown = capsys.readouterr()
    assert "float32 gaussian 1 seeds nearest: times_naive is" in shown.err
    assert "≥ 1e+09" in shown.out
    within = dict.fromkeys(directions.REACHES, common.Reach(">=", 0.0))
    monkeypatch.setattr(directions, "REACHES", within)
    directions.main(arguments)


@pytest.mark.parametrize("strata", [1, 2, 4, 28])
def test_sampled_lengths_stand_for_the_whole_trajectory(strata: int) -> None:
    weights = load("common").sampled_lengths(30, strata)
    assert sum(weights.values()) == pytest.approx(1.0)
    mean = sum(length * weight for length, weight in weights.items())
    # Where there are two middles the upper one is taken, which is not in our favour.
    assert 14.5 <= mean + 1e-9 <= 15.0 + 1e-9
    assert load("common").sampled_lengths(1, 4) == {0: 1.0}


def test_the_machine_has_no_name() -> None:
    described = json.dumps(load("common").machine(1, "cpu"))
    assert platform.node() not in described
    assert "/" not in described


@pytest.mark.slow
def test_memory_model(capsys: pytest.CaptureFixture[str]) -> None:
    rows = results(capsys, "memory_model", "--tune", "lora")["rows"]
    assert all(abs(row["whole_error"]) < 0.1 for row in rows if "whole_error" in row)


@pytest.mark.slow
def test_kept(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = results(capsys, "kept")["rows"]
    # Nine probes of two blocks, the upper one tuned.
    passes = [row[f"{name}_passes"] for name in ("all", "upper", "new", "kept")]
    assert passes == [9.0, 5.0, 5.0, 4.5]
    assert row["kept_over_all"] == row["kept_seconds"] / row["all_seconds"]
    assert row["bytes"] == 2 * 7 * 32 * 4


def test_prefix(capsys: pytest.CaptureFixture[str]) -> None:
    rows = results(capsys, "prefix")["rows"]
    assert {row["tune"] for row in rows} == {"lora", "full"}
    for row in rows:
        assert row["upper_over_all"] == row["upper_seconds"] / row["all_seconds"]


@pytest.mark.slow
def test_activation(capsys: pytest.CaptureFixture[str]) -> None:
    assert results(capsys, "activation")["rows"]


@pytest.mark.slow
def test_federation(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The demonstration's model, few rounds: sizes are those of the real thing."""
    from tests.conftest import DEMO_MODEL

    module = load("federation")
    monkeypatch.setattr(module, "LATE", 12)
    monkeypatch.setattr(module, "BLOCKS", 3)
    arguments = ["federation.py", "--model", str(DEMO_MODEL), "--parts", "bytes", "late", "--json"]
    monkeypatch.setattr(sys, "argv", arguments)
    module.main()
    content = json.loads(capsys.readouterr().out)
    up = {row["method"]: row["up"] for row in content["bytes"]}
    assert up["zorba"] <= 128 and up["decomfl"] <= 128 and up["fedavg"] > 100 * up["zorba"]
    assert all(row["same_state"] for row in content["late"])


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("flwr")
    found = {row["name"]: row["value"] for row in results(capsys, "cluster")["rows"]}
    for name in ("start-up: the first round opened", "overhead of a round, median"):
        assert found[name] > 0
    for way in ("up", "down"):
        assert found[f"wire {way}, client and round"] > found[f"messages {way}, client and round"]
        assert found[f"idle polling {way}, site and minute"] > 0
    assert found["server: all"] > found["server: coordinator"] > 0
    assert found["site: all but the model server"] > 0


@pytest.mark.slow
def test_data(capsys: pytest.CaptureFixture[str]) -> None:
    ours, plain = results(capsys, "data")["rows"]
    assert ours["examples"] == plain["examples"] == 300
    assert ours["peak_megabytes"] >= 0 and ours["seconds"] > 0


def test_seams(capsys: pytest.CaptureFixture[str]) -> None:
    rows = results(capsys, "seams")["rows"]
    assert len(rows) == 12 and {row["run_differs"] for row in rows} == {0.0}
    assert any(row["apart_differs"] > 0 for row in rows)


def test_chat(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from tests.conftest import DEMO_MODEL
    from tests.data.test_chat import TEMPLATES

    for name in ("chatml", "begins"):
        tokenizer = AutoTokenizer.from_pretrained(str(DEMO_MODEL))
        tokenizer.chat_template = TEMPLATES[name]
        tokenizer.save_pretrained(tmp_path / name)
    folders = [str(tmp_path / name) for name in ("chatml", "begins")]
    rows = results(capsys, "chat", "--tokenizers", *folders)["rows"]
    assert {row["equal"] for row in rows} == {100.0} and len(rows) == 6


def test_masks(capsys: pytest.CaptureFixture[str]) -> None:
    rows = results(capsys, "masks")["rows"]
    ways = {(row["tune"], row["distribution"], row["way"]) for row in rows}
    assert len(ways) == len(rows) == 12
    for row in rows:
        assert row["replay_seconds"] > 0 and row["probes_over_passes"] > 0
        assert (row["replay_over_all"] == 1.0) == (row["way"] == "all weights")


EFFICIENCY = ("--budget", "12", "--tuning", "2", "--seeds", "1", "--forgetting")


@pytest.mark.slow
def test_efficiency_way_by_way(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page = tmp_path / "efficiency.md"
    arguments = (
        *EFFICIENCY,
        *("--ways", "fedmezo,fedmezo-auto,fedavg-adamw", "--page", str(page), "--write"),
        *("--rates", "fedmezo=1e-3,1e-2", "--rates", "fedavg-adamw=1e-2"),
    )
    rows = results(capsys, "efficiency", *arguments)["rows"]
    assert [row["way"] for row in rows] == ["fedmezo", "fedmezo-auto", "fedavg-adamw"]
    tuned, found, tensors = rows
    assert (tuned["tries"], tuned["fewer"]) == (2, 1.0) and tuned["once_bytes"] == 0
    assert found["rate"] == "auto" and found["once_bytes"] > 0
    # Two clients, two steps of two rows: two probes each, eight, and a step of three passes.
    assert tuned["examples"] == 16 * tuned["rounds"]
    aligned = 40
    assert found["examples"] == 64 * found["rounds"] + aligned
    assert tensors["examples"] == 24 * tensors["rounds"] and tensors["end"] < tensors["start"]
    assert all(row["perplexity_after"] != row["perplexity_before"] for row in rows)
    written = page.read_text(encoding="utf-8")
    assert "| fedmezo-auto | auto |" in written and "efficiency.svg" in written
    # Finished runs stay: none is run again.
    module = load("efficiency")
    monkeypatch.setattr(module, "carry_out", None)
    assert results(capsys, "efficiency", *arguments)["rows"] == rows


def test_efficiency(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--ways", "fedmezo", "--rates", "1e-2", "--budget", "2", "--seeds", "1")
    (row,) = results(capsys, "efficiency", *arguments)["rows"]
    assert (row["rounds"], row["passes"], row["tries"]) == (2, 2.0, 0)
    assert row["up"] > 0 and row["end"] < row["start"]
    # Of three blocks the lowest is run once for both probes of a step.
    arguments = (*arguments, "--blocks", "1-2")
    (row,) = results(capsys, "efficiency", *arguments)["rows"]
    assert row["rounds"] == 2 and row["examples"] == pytest.approx(2 * 16 * 5 / 6, abs=0.1)


@pytest.mark.slow
def test_efficiency_sweeps_rates(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--sweep", "--ways", "fedmezo", "--budget", "3", "--seeds", "1")
    rows = results(capsys, "efficiency", *arguments)["rows"]
    assert len(rows) == 11 and [row["rate"] for row in rows].count("auto") == 1
    *runs, verdict = rows
    falls = {row["rate"]: row["fall"] for row in runs}
    fixed = [fall for rate, fall in falls.items() if rate != "auto" and fall is not None]
    assert verdict["fall"] == max(fixed)
    assert verdict["auto_over_best"] == falls["auto"] / max(fixed)


def test_efficiency_counts_passes_to_a_value() -> None:
    passes_to = load("efficiency").passes_to
    points = [{"passes": at, "value": value} for at, value in ((0, 4.0), (10, 2.0), (20, None))]
    assert passes_to(points, 3.0) == 5.0
    assert passes_to(points, 1.0) is None


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--ways", "fedmezo,mezo"), "--ways: 'mezo' is no way. Allowed are fedmezo, decomfl"),
        (("--rates", "fedmezo=1e-3,fast"), "'fast' is neither a number nor 'auto'"),
        (("--ways", "fedmezo", "--budget", "0.5"), "A round of fedmezo takes more than"),
        (("--set", "method.mu=0"), "method.mu"),
    ],
)
def test_efficiency_refuses(
    arguments: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        load("efficiency").main(["--quick", "--threads", "1", *arguments])
    assert end.value.code == 2
    assert sentence in capsys.readouterr().err


def test_secure_sums(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["secure_sums.py", "--sites", "3", "6", "--json"])
    load("secure_sums").main()
    rows = json.loads(capsys.readouterr().out)
    assert [(row["sites"], row["gone"]) for row in rows] == [(3, 0), (6, 0), (6, 1)]
    assert all(row["up"] > row["up, none"] > 0 and row["server s"] > 0 for row in rows)


def test_load_has_seconds_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    row = load("load").ledger(12, 2)
    assert row["rounds"] == 12 and len(row["state digest"]) == 16
    assert row["verify cpu"] >= 0 and row["open seconds"] < 2
    made = load("load").Stopwatch().stop()
    assert made.seconds >= 0 and made.cpu >= 0
