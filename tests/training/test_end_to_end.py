"""Whole runs on the demonstration model: repeatable, resumable, verifiable, exportable."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedforward.config.schema import Config
from fedforward.config.template import to_toml
from fedforward.core.errors import FedForwardError
from fedforward.messages.report import Report
from fedforward.methods.fedmezo import FedMeZO
from fedforward.models.lora import LoraModel
from fedforward.planning.memory.tracker import bytes_alive
from fedforward.training import metrics as progress
from fedforward.training import replay as artefacts
from fedforward.training import run as run_module
from fedforward.training.run import Run
from fedforward.training.run_directory import RunDirectory

Configure = Callable[..., Config]
CarryOut = Callable[..., dict[str, Any]]
DIGESTS = ("ledger_digest", "state_digest")


def digests(summary: dict[str, Any]) -> tuple[str, ...]:
    return tuple(summary[name] for name in DIGESTS)


def interrupted(run: Run, *rest: Any) -> None:
    """Stands for Ctrl-C."""
    run.ledger.close()
    raise KeyboardInterrupt


def test_a_run_leaves_what_it_should(
    configure: Configure, carry_out: CarryOut, tmp_path: Path
) -> None:
    summary = carry_out(configure(), tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        "adapter", "clients.json", "config.toml", "environment.json", "ledger.head",
        "ledger.sqlite", "lock", "loss.png", "metrics.jsonl", "plan.json", "summary.json",
    }  # fmt: skip
    assert json.loads((tmp_path / "run/summary.json").read_text()) == summary
    needed = "method model tuned_parameters clients rounds local_steps heldout_loss seconds"
    needed += " bytes_per_client_round peak_memory_bytes inference_memory_bytes"
    assert {*needed.split(), *DIGESTS} <= summary.keys()
    assert summary["rounds"] == 3
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1, 2, 3]
    assert ["heldout_loss" in line for line in lines] == [True, False, True, True]
    assert summary["bytes_per_client_round"]["up"] < 70
    assert summary["inference_memory_bytes"] < summary["peak_memory_bytes"]


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_twice_the_same(
    configure: Configure, carry_out: CarryOut, tmp_path: Path, tune: str
) -> None:
    one, two = (carry_out(configure(model__tune=tune), tmp_path / name) for name in "ab")
    other = carry_out(configure(model__tune=tune, run__seed=1), tmp_path / "c")
    assert digests(one) == digests(two)
    assert digests(one)[1] != digests(other)[1]


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_blocks_within_a_budget(
    configure: Configure, carry_out: CarryOut, tmp_path: Path, tune: str
) -> None:
    """Only two upper blocks are tuned; the plan that fits is kept and resumed with."""
    # What other tests have left in the process counts as well.
    budget = f"{bytes_alive() // 2**20 + 20} MiB"
    changes = {"model__tune": tune, "model__blocks": [1, 2], "run__memory_budget": budget}
    whole = carry_out(configure(**changes, method__directions=2), tmp_path / "whole")
    plan = json.loads((tmp_path / "whole/plan.json").read_text())
    assert plan["probes_per_call"] == (8 if tune == "lora" else 4)
    out = tmp_path / "parts"
    carry_out(configure(**changes, method__directions=2, federation__rounds=1), out)
    resumed = configure(**changes, method__directions=2)
    assert digests(carry_out(resumed, out, True)) == digests(whole)
    assert artefacts.verify(out).differences == []
    with pytest.raises(FedForwardError, match=r"run\.memory_budget = 1\.00 MiB is too small"):
        carry_out(configure(run__memory_budget="1 MiB"), tmp_path / "small")
    with pytest.raises(FedForwardError, match=r"model\.blocks names block 3, but this model has"):
        carry_out(configure(model__blocks="2-9"), tmp_path / "none")


OPTIONS: list[dict[str, Any]] = [
    {"method__client_rates": "update-difference", "federation__weights": "equal"},
    {"method__client_rates": "random", "method__directions": 2, "lora__factors": "B"},
    {"method__client_rates": "loss-window", "method__distribution": "rademacher"},
    {"federation__partition": "by-field", "federation__field": "site", "federation__clients": 4},
    {"federation__partition": "dirichlet", "federation__field": "site"},
    {"federation__participation": 0.5, "federation__clients": 4, "method__schedule": "cosine"},
    {"model__tune": "full", "model__dtype": "bfloat16", "run__trajectory": "recompute"},
    {"model__tune": "full", "model__dtype": "float16", "method__mu": 0.02},
    {"model__dtype": "bfloat16", "federation__clients": 1},
    {"run__probes_per_call": 4, "method__warmup": 2, "lora__targets": ["q_proj", "v_proj"]},
    {"method__name": "decomfl", "method__directions": 2, "method__client_rates": "loss"},
    {"method__name": "zorba", "planning__active": [2, 3]},
    {"method__name": "zorba", "model__tune": "full", "planning__active": [3, 5]},
    {"method__name": "zorba", "method__client_rates": "update-difference", "model__blocks": "0-2"},
    {"method__name": "fedkseed", "method__candidates": 40, "model__tune": "full"},
    {
        "method__name": "fedkseed-pro",
        "method__candidates": 40,
        "federation__participation": 0.5,
    },
    {"method__name": "fedkseed", "method__candidates": 9, "model__dtype": "bfloat16"},
    {"method__mask": "random", "method__density": 0.2},
    {"method__mask": "small", "model__tune": "full", "method__name": "decomfl"},
    {
        "method__estimator": "fzoo",
        "method__directions": 3,
        "method__distribution": "rademacher",
        "method__learning_rate": 1e-5,
    },
    {"server__momentum": 0.5, "server__state_decay": 0.999, "server__normalise": True},
    {"method__name": "zorba", "server__momentum": 0.5, "planning__active": [2, 3]},
]


@pytest.mark.parametrize(
    "changes", OPTIONS, ids=lambda changes: "-".join(map(str, changes.values()))
)
def test_every_option_runs_and_verifies(
    configure: Configure, carry_out: CarryOut, tmp_path: Path, changes: dict[str, Any]
) -> None:
    summary = carry_out(configure(**changes), tmp_path / "run")
    result = artefacts.verify(tmp_path / "run")
    assert result.differences == [] and result.replayed and result.saved
    assert result.state_digest == summary["state_digest"]
    assert result.proofs >= 1


def test_copy_and_generate_are_one_run(
    configure: Configure, carry_out: CarryOut, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"model__tune": "full", "model__dtype": "bfloat16"}
    one, two = (
        carry_out(configure(**changes, run__trajectory=way), tmp_path / way)
        for way in ("cache", "recompute")
    )
    assert digests(one) == digests(two)


def test_verify_sees_a_changed_bit(
    configure: Configure, carry_out: CarryOut, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    carry_out(configure(), tmp_path / "run")
    path = tmp_path / "run/adapter/adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name].view(torch.uint8).view(-1)[0] ^= 1
    save_file(tensors, path, metadata={"format": "pt"})
    (difference,) = artefacts.verify(tmp_path / "run").differences
    assert name in difference and "1 values" in difference


def test_verify_sees_a_changed_frozen_factor_and_setting(
    configure: Configure, carry_out: CarryOut, tmp_path: Path
) -> None:
    """With only B tuned the ledger says nothing of A and of alpha; the seed and the header do."""
    from safetensors.torch import load_file, save_file

    carry_out(configure(lora__factors="B"), tmp_path / "run")
    path = tmp_path / "run/adapter/adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if ".lora_A." in name)
    tensors[name] *= 100
    save_file(tensors, path, metadata={"format": "pt"})
    settings = tmp_path / "run/adapter/adapter_config.json"
    content = json.loads(settings.read_text())
    settings.write_text(json.dumps(content | {"lora_alpha": 999}))
    differences = artefacts.verify(tmp_path / "run").differences
    assert len(differences) == 2
    assert name in differences[0] and "lora_alpha 999" in differences[1]


def test_an_extended_run_that_stopped_verifies(
    configure: Configure, carry_out: CarryOut, tmp_path: Path
) -> None:
    carry_out(configure(), tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            carry_out(configure(federation__rounds=5), tmp_path / "run", resume=True)
    result = artefacts.verify(tmp_path / "run")
    assert result.differences == [] and result.rounds == 5 and not result.saved


def test_a_model_that_is_spread_otherwise_is_refused_on_resume(
    configure: Configure, carry_out: CarryOut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The placement of `model.device_map` is in the plan, as losses depend on it."""
    spread = "embeddings on 0, layers.1 on cpu"
    monkeypatch.setattr(run_module, "placement", lambda network: spread)
    carry_out(configure(federation__rounds=1), tmp_path / "run")
    plan = json.loads((tmp_path / "run/plan.json").read_text())
    assert plan["placement"] == spread
    carry_out(configure(federation__rounds=2), tmp_path / "run", resume=True)
    monkeypatch.undo()
    with pytest.raises(FedForwardError, match=rf"on {spread}, and here it is on one device"):
        carry_out(configure(federation__rounds=3), tmp_path / "run", resume=True)


def test_changed_data_are_refused_on_resume(
    configure: Configure, carry_out: CarryOut, tmp_path: Path, rows: Path
) -> None:
    carry_out(configure(), tmp_path / "run")
    with rows.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"site": "garden", "question": "More?", "answer": "yes"}) + "\n")
    with pytest.raises(FedForwardError, match="data are not those of the run"):
        carry_out(configure(federation__rounds=5), tmp_path / "run", resume=True)


def test_lost_metrics_do_not_change_when_a_run_stops(
    configure: Configure, carry_out: CarryOut, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "federation__rounds": 9,
        "run__patience": 2,
        "run__evaluate_every": 1,
        "method__learning_rate": 1e-12,
    }
    whole = carry_out(configure(**settings), tmp_path / "whole")
    assert whole["rounds"] < 9
    reason = progress.reason_to_stop

    def killed(settings: Config, lines: Sequence[dict[str, Any]]) -> str:
        if lines[-1]["round"] == whole["rounds"] - 1:
            raise KeyboardInterrupt
        return reason(settings, lines)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "reason_to_stop", killed)
        with pytest.raises(KeyboardInterrupt):
            carry_out(configure(**settings), tmp_path / "cut")
    metrics = tmp_path / "cut/metrics.jsonl"
    metrics.write_text(metrics.read_text().split("\n")[0] + "\n")
    assert digests(carry_out(configure(**settings), tmp_path / "cut", resume=True)) == digests(
        whole
    )


def test_the_fall_is_real(configure: Configure, carry_out: CarryOut, tmp_path: Path) -> None:
    """Tuning teaches; the same run with its gradients dealt to other steps does not."""
    settings: dict[str, Any] = {
        "federation__rounds": 12,
        "method__local_steps": 10,
        "method__batch_size": 4,
        "method__learning_rate": 6e-3,
        "lora__rank": 8,
        "lora__alpha": 16,
        "run__evaluate_every": 12,
    }
    tuned = carry_out(configure(**settings), tmp_path / "tuned")["heldout_loss"]
    aggregate = FedMeZO.aggregate

    def permuted(self: FedMeZO, number: int, results: Any, state: Any) -> Any:
        from dataclasses import replace

        random = np.random.default_rng(len(results))
        mixed = [
            replace(p, report=replace(p.report, gradients=random.permutation(p.report.gradients)))
            for p in results
        ]
        return aggregate(self, number, mixed, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FedMeZO, "aggregate", permuted)
        control = carry_out(configure(**settings), tmp_path / "control")["heldout_loss"]
    assert tuned["end"] < 0.93 * tuned["start"]
    assert control["end"] > 0.98 * control["start"]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_fedavg_by_backpropagation(
    configure: Configure, carry_out: CarryOut, tmp_path: Path, optimizer: str
) -> None:
    settings: dict[str, Any] = {
        "method__name": "fedavg",
        "method__optimizer": optimizer,
        "method__learning_rate": 0.3 if optimizer == "sgd" else 1e-2,
        "method__local_steps": 5,
    }
    summary = carry_out(configure(**settings), tmp_path / "run")
    assert summary["heldout_loss"]["end"] < 0.9 * summary["heldout_loss"]["start"]
    assert summary["bytes_per_client_round"]["up"] > 4 * summary["tuned_parameters"]
    result = artefacts.verify(tmp_path / "run")
    assert result.differences == [] and not result.replayed
    again = carry_out(configure(**settings), tmp_path / "again")
    assert digests(again) == digests(summary)


@pytest.mark.parametrize("name", ["fedmezo", "fedavg"])
def test_stopped_between_rounds_and_resumed(
    configure: Configure, carry_out: CarryOut, tmp_path: Path, name: str
) -> None:
    """Stopped at the worst moments: after the ledger and before the metrics, and in a round."""
    settings: dict[str, Any] = {
        "method__name": name,
        "federation__rounds": 5,
        "federation__participation": 0.5,
        "federation__clients": 3,
        "method__client_rates": "loss-window",
    }
    whole = carry_out(configure(**settings), tmp_path / "whole")
    out = tmp_path / "stopped"
    write = RunDirectory.append_metrics

    def killed(self: RunDirectory, line: dict[str, Any]) -> None:
        if line["round"] == 3:
            raise KeyboardInterrupt
        write(self, line)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDirectory, "append_metrics", killed)
        with pytest.raises(KeyboardInterrupt):
            carry_out(configure(**settings), out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Report, "encode", lambda self: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            carry_out(configure(**settings), out, resume=True)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"round": 9, "train')
    resumed = carry_out(configure(**settings), out, resume=True)
    assert digests(resumed) == digests(whole)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1, 2, 3, 4, 5]


def test_a_ledger_that_lost_rounds_is_not_resumed(
    configure: Configure, carry_out: CarryOut, tmp_path: Path
) -> None:
    settings = configure(federation__rounds=2)
    carry_out(settings, tmp_path / "run")
    (tmp_path / "run/ledger.sqlite").unlink()
    with pytest.raises(FedForwardError, match="metrics are of 2 rounds, and its ledger has 0"):
        carry_out(settings, tmp_path / "run", resume=True)


def test_killed_and_resumed(configure: Configure, carry_out: CarryOut, tmp_path: Path) -> None:
    """SIGKILL of the real command in mid-run, then --resume: the digests of an unbroken run."""
    whole = carry_out(configure(federation__rounds=40), tmp_path / "whole")
    file = tmp_path / "run.toml"
    file.write_text(to_toml(configure(federation__rounds=40)), encoding="utf-8")
    command = [sys.executable, "-m", "fedforward.cli", "run", str(file), "--out"]
    command += [str(tmp_path / "killed"), "--json"]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = tmp_path / "killed/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= 4):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed/summary.json").exists()
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=True)
    assert digests(json.loads(done.stdout)) == digests(whole)


def test_resuming_a_finished_run_changes_nothing(
    configure: Configure, carry_out: CarryOut, tmp_path: Path
) -> None:
    first = carry_out(configure(), tmp_path / "run")
    again = carry_out(configure(), tmp_path / "run", resume=True)
    assert digests(first) == digests(again)
    longer = carry_out(configure(federation__rounds=5), tmp_path / "run", resume=True)
    assert longer["rounds"] == 5
    assert digests(longer) == digests(carry_out(configure(federation__rounds=5), tmp_path / "new"))


def test_another_configuration_is_refused(
    configure: Configure, carry_out: CarryOut, tmp_path: Path
) -> None:
    carry_out(configure(), tmp_path / "run")
    with pytest.raises(FedForwardError, match=r"method\.mu is 0\.01 there and 0\.02 here"):
        carry_out(configure(method__mu=0.02), tmp_path / "run", resume=True)
    with pytest.raises(FedForwardError, match="--resume"):
        carry_out(configure(), tmp_path / "run")


def test_patience_and_divergence_stop_a_run(
    configure: Configure, carry_out: CarryOut, tmp_path: Path
) -> None:
    patient = carry_out(
        configure(federation__rounds=50, run__patience=2, method__learning_rate=1e-12),
        tmp_path / "p",
    )
    assert patient["rounds"] < 50 and patient["stopped"].startswith("patience")
    with pytest.raises(progress.DivergenceError, match=r"Lower method\.learning_rate"):
        carry_out(configure(federation__rounds=50, method__learning_rate=1.0), tmp_path / "d")
    summary = json.loads((tmp_path / "d/summary.json").read_text())
    assert summary["rounds"] < 50 and summary["stopped"].startswith("diverged")
    assert artefacts.verify(tmp_path / "d").differences == []


def test_exports_answer_alike(configure: Configure, carry_out: CarryOut, tmp_path: Path) -> None:
    """The adapter under PEFT and the merged model give the logits of the tuned model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = configure(method__learning_rate=1e-3, lora__alpha=16)
    carry_out(settings, tmp_path / "run")
    artefacts.export(tmp_path / "run", tmp_path / "adapter", merge=False)
    artefacts.export(tmp_path / "run", tmp_path / "merged", merge=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    tokens = torch.tensor(
        [tokenizer("### Question:\nTell me about", add_special_tokens=False)["input_ids"]]
    )
    base = AutoModelForCausalLM.from_pretrained(settings.model.path, dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.inference_mode():
        plain = base(input_ids=tokens).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")(input_ids=tokens).logits
        whole = merged(input_ids=tokens).logits
    torch.testing.assert_close(adapted, whole, rtol=1e-4, atol=1e-4)
    assert (adapted - plain).abs().max() > 1e-3
    with pytest.raises(FedForwardError, match="not an empty folder"):
        artefacts.export(tmp_path / "run", tmp_path / "merged", merge=True)


def test_full_tuning_exports_a_model(
    configure: Configure, carry_out: CarryOut, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    carry_out(configure(model__tune="full", model__dtype="bfloat16"), tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert model.dtype is torch.bfloat16
    assert AutoTokenizer.from_pretrained(tmp_path / "run/model").eos_token_id == 2


def test_memory_does_not_grow_with_clients(configure: Configure, tmp_path: Path) -> None:
    """Bytes of tensors alive at the peak of a round: 1 client against 16, by at most 5 %."""
    from fedforward.planning.memory.tracker import peak_bytes

    peaks = {}
    for clients in (1, 16):
        settings = configure(federation__clients=clients, data__limit=48)
        run = Run(settings, tmp_path / str(clients))
        assert isinstance(run.model, LoraModel)
        run.runtime.run_round()
        run.catch_up()
        peaks[clients] = peak_bytes(run.runtime.run_round)
        run.ledger.close()
        del run
    assert peaks[16] <= 1.05 * peaks[1], peaks
