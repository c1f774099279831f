"""The studies' scripts run, go on where they were, and write their pages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_study_of_robustness_runs_and_goes_on(tmp_path: Path) -> None:
    script = ROOT / "studies" / "robustness.py"

    def study(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(script), "--quick", *options],
            env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )

    refused = study()
    assert refused.returncode == 2 and "--quick needs --out FOLDER" in refused.stderr
    folder = tmp_path / "study"
    first = study("--out", str(folder))
    assert first.returncode == 0, first.stderr
    rows = (folder / "robustness.csv").read_text("utf-8").splitlines()
    assert len(rows) == 5 and rows[1].startswith("decomfl,mean,none,0,0,0.4")
    # A cell that is there is not done again, and one that is lost is.
    kept = [rows[0], rows[1].rsplit(",", 1)[0] + ",0.100000", *rows[2:4]]
    (folder / "robustness.csv").write_text("\n".join(kept) + "\n", encoding="utf-8")
    again = study("--out", str(folder))
    assert again.returncode == 0, again.stderr
    assert (folder / "robustness.csv").read_text("utf-8").splitlines() == [*kept, rows[4]]
    page = (folder / "robustness.md").read_text("utf-8")
    assert "| `decomfl` | records | 0.05 | 0.417 | 0.100 | 76 % |" in page
    assert (folder / "robustness.png").stat().st_size > 1000


def quick(study: str, folder: Path, *options: str) -> list[str]:
    """The lines of the CSV that a study writes with `--quick`."""
    script = ROOT / "studies" / f"{study}.py"
    done = subprocess.run(
        [sys.executable, str(script), "--quick", *options, "--out", str(folder)],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (folder / f"{study}.png").stat().st_size > 1000
    return (folder / f"{study}.csv").read_text("utf-8").splitlines()[1:]


@pytest.mark.slow
def test_the_study_of_settings_runs(tmp_path: Path) -> None:
    (row,) = quick("settings", tmp_path, "--group", "rate")
    task, group, setting, seed, start, end, *_ = row.split(",")
    assert (task, group, setting, seed) == ("demo", "rate", "0.003", "0")
    assert float(end) < float(start)
    assert "| 0.003 | 1 | 0.4" in (tmp_path / "settings.md").read_text("utf-8")


@pytest.mark.slow
def test_the_study_of_memory_runs(tmp_path: Path) -> None:
    (row,) = quick("memory", tmp_path)
    shape, *numbers, _ = row.split(",")
    _, parameters, adapter, weights, forward, forward_two, step, one, planned, _ = map(int, numbers)
    assert (shape, weights) == ("quick", 4 * parameters + 64)
    assert adapter > 0 and forward < forward_two and one < step
    assert abs(planned / step - 1.0) < 0.1
    assert "## " not in (tmp_path / "memory.md").read_text("utf-8")


@pytest.mark.slow
def test_the_study_of_rank_runs(tmp_path: Path) -> None:
    rows = quick("rank", tmp_path)
    assert [row.split(",")[:3] for row in rows] == [
        ["demo", "1", "Hessian"],
        ["demo", "1", "Gauss-Newton"],
    ]
    norm, trace = (float(rows[1].split(",")[place]) for place in (4, 5))
    assert 0.0 < norm < trace
    assert "| demo | 1 | Gauss-Newton |" in (tmp_path / "rank.md").read_text("utf-8")


def test_the_study_of_privacy_goes_on_and_writes_its_page(tmp_path: Path) -> None:
    """All runs are there already, so none is done; their figures are those of the page."""
    script = ROOT / "studies" / "privacy.py"

    def study(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(script), "--quick", *options],
            env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )

    refused = study()
    assert refused.returncode == 2 and "--quick needs --out FOLDER" in refused.stderr
    head = (ROOT / "docs/studies/privacy.csv").read_text("utf-8").splitlines()[0]
    rows = [
        f"demo,{epsilon},0.2,0,2,4,360,0.0001,{noise},2.6,0.400000,{end},,"
        for epsilon, noise, end in (
            ("2", "0.5", "0.300000"),
            ("6", "0.25", "0.250000"),
            ("inf", "", "0.200000"),
        )
    ]
    file = tmp_path / "privacy.csv"
    file.write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")
    done = study("--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert file.read_text("utf-8").splitlines() == [head, *rows]
    page = (tmp_path / "privacy.md").read_text("utf-8")
    assert "| 2 | 0.500 | 2.6 | 0.33 | 0.2 | 1 | 0.400 | 0.300 |" in page
    assert "ε = 2: 50 % of the fall without privacy" in page
    assert "ε = 6: 75 % of the fall without privacy" in page
    assert "demo has one seed, and so no interval" in page
    assert (tmp_path / "privacy.png").stat().st_size > 1000
