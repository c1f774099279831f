"""Processes are killed at random instants, and the bits are those of a run without kills."""

import random
import time
from pathlib import Path
from typing import Any

import pytest

from fedforward.training.replay import verify
from tests.conftest import DEMO_MODEL
from tests.faults import processes
from tests.faults.federation import federation, result, simulated

pytestmark = [
    pytest.mark.usefixtures("imported_libraries"),
    pytest.mark.timeout(3600),
]


def told(capsys: Any, words: str) -> None:
    with capsys.disabled():
        print(f" {words}", end="", flush=True)


def test_servers_and_sites_are_killed(tmp_path: Path, kills: int, seed: int, capsys: Any) -> None:
    with federation(tmp_path, seed) as found:
        found.run(tmp_path / "quiet", {})
        quiet, number = result(tmp_path / "quiet"), 0
        while min(found.killed.values()) < kills:
            number += 1
            assert number < 20 + kills, "too few kills hit a living process"
            left = {kind: min(12, kills - count) for kind, count in found.killed.items()}
            out = tmp_path / f"run{number}"
            found.run(out, left)
            assert result(out) == quiet, found.log()
        proof = verify(out, base=str(DEMO_MODEL))
        assert proof.ok and proof.state_digest == quiet[1], proof.differences
        sentences = sum(end == processes.SENTENCE for end in found.ends)
    told(
        capsys,
        f"[killed {found.killed['server']} servers and {found.killed['site']} sites in {number} "
        f"runs of 12 rounds; {sentences} servers ended in a sentence]",
    )


def test_a_simulation_is_killed(tmp_path: Path, kills: int, seed: int, capsys: Any) -> None:
    chance, content, context = random.Random(seed), simulated(tmp_path), processes.context()

    def start(out: Path) -> Any:
        made = context.Process(
            target=processes.simulation, args=(content, out, tmp_path / "log"), daemon=True
        )
        made.start()
        return made

    began = time.monotonic()
    assert processes.ended(start(tmp_path / "quiet")) == 0, (tmp_path / "log").read_text()
    whole_s = time.monotonic() - began
    quiet = processes.read(tmp_path / "quiet/summary.json")
    killed = number = 0
    while killed < kills:
        number += 1
        assert number < 20 + kills, "too few kills hit a living process"
        out = tmp_path / f"run{number}"
        while True:
            process = start(out)
            # As long as a whole run, so that some instants are of every part of it.
            process.join(whole_s * chance.random() if killed < kills else 300)
            if process.exitcode is None:
                killed += processes.kill(process)
                continue
            assert process.exitcode == 0, (tmp_path / "log").read_text()[-3000:]
            break
        summary = processes.read(out / "summary.json")
        for key in ("rounds", "state_digest", "ledger_digest"):
            assert summary[key] == quiet[key]
    proof = verify(out)
    assert proof.ok and proof.saved and proof.recorded, proof.differences
    told(capsys, f"[killed {killed} simulations in {number} runs of 25 rounds]")
