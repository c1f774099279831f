"""The example package adds a method and an objective, and nothing in `src/` knows of it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedforward.core.errors import MessageError
from fedforward.messages.entry import Entry
from fedforward.messages.report import Report
from fedforward.models.quadratic import Quadratic
from tests.conftest import DEMO_MODEL
from tests.federation.test_participation import BLOCKS, ESTIMATOR, SEED, STEPS, D, Federation

PLUGIN = Path(__file__).parents[1] / "examples" / "plugin"
RUN = """
[model]
path = {model!r}

[data]
source = {source!r}
prompt = "{{text}}"
answer = "{{good}}"
label_words = {{ 0 = " no", 1 = " yes" }}
heldout = 8
sequence_length = 48

[federation]
clients = 3
rounds = 3

[method]
name = "sign-vote"
smoothing = 0.5
objective = "margin"
learning_rate = 1e-3
mu = 1e-2
local_steps = 2
batch_size = 4

[evaluation]
metrics = ["margin", "accuracy"]

[run]
evaluate_every = 1
threads = 1
"""


@pytest.fixture
def sign_vote(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(PLUGIN / "src"))
    from fedforward_example import sign_vote

    return sign_vote


def test_a_package_of_its_own_is_installed_and_runs(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    scratch = tmp_path / "installed"
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(scratch)]
    done = subprocess.run([*command, str(PLUGIN)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    texts = [f"The {thing} is {kind}." for thing in "abcdefghijkl" for kind in ("old", "new")]
    rows = [{"text": text, "good": int("new" in text)} for text in texts]
    source, file = tmp_path / "rows.jsonl", tmp_path / "run.toml"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    file.write_text(RUN.format(model=str(DEMO_MODEL), source=str(source)), encoding="utf-8")

    def command_line(*arguments: str, known: bool = True) -> subprocess.CompletedProcess[str]:
        source = str(PLUGIN.parents[1] / "src")
        path = os.pathsep.join([source, str(scratch)] if known else [source])
        return subprocess.run(
            [sys.executable, "-m", "fedforward.cli", *arguments],
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    ran = command_line("run", str(file), "--out", "out", "--json")
    assert ran.returncode == 0, ran.stderr
    summary = json.loads(ran.stdout)
    assert summary["method"] == "sign-vote" and summary["rounds"] == 3
    assert summary["metrics"].keys() == {"margin", "accuracy"}
    assert summary["bytes_per_client_round"]["up"] < 80
    verified = command_line("verify", "out", "--json")
    assert verified.returncode == 0, verified.stderr
    assert json.loads(verified.stdout)["state_digest"] == summary["state_digest"]
    refused = command_line("run", str(file), "method.smoothing=2", "--out", "other")
    assert refused.returncode == 2
    assert "method.smoothing = 2 is not allowed: it must be a number" in refused.stderr
    absent = command_line("verify", "out", known=False)
    assert absent.returncode == 2 and "'sign-vote' is not known" in absent.stderr


def test_its_memory_reaches_late_clients(tmp_path: Path, sign_vote: Any) -> None:
    """By entries and by a client's snapshot; a restarted server has it from the ledger."""
    method = sign_vote.SignVote(run_seed=SEED, local_steps=STEPS, estimator=ESTIMATOR)
    for state_bytes in (4 * D, 1):
        folder = tmp_path / str(state_bytes)
        folder.mkdir()
        federation = Federation(folder / "ledger", method, state_bytes=4 * D)
        early = [0, 1, 2, 3]
        while federation.server.round < (9 if state_bytes > 1 else 60):
            federation.round(early)
        again = federation.opened()
        assert again.state.value == federation.server.state.value > 0
        federation.server = again
        tasks = federation.round()
        assert bool(tasks[4].snapshot) == (state_bytes == 1)
        assert len(set(federation.settle())) == 1
        assert federation.clients[4].replica.state.value == federation.server.state.value
    assert federation.settle()[0] != Quadratic([1.0], D, blocks=BLOCKS).digest()


def test_what_is_no_vote_is_refused(sign_vote: Any) -> None:
    method = sign_vote.SignVote(local_steps=2)
    good = Report(0, 0, 1, 1.0, 0, np.array([1.0, -1.0], np.float32), payload=bytes(4))
    method.check_report(good, 10)
    for gradients, payload in (
        ([1.0, 0.5], bytes(4)),
        ([1.0], bytes(4)),
        ([1.0, 1.0], b""),
        ([1.0, 1.0], np.float32(np.nan).tobytes()),
    ):
        report = Report(0, 0, 1, 1.0, 0, np.array(gradients, np.float32), payload=payload)
        with pytest.raises(MessageError, match="refused"):
            method.check_report(report, 10)
    with pytest.raises(MessageError, match="has no votes"):
        method.update(Entry(0, (), payload=bytes(9)), method.new_state())
