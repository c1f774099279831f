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


def claims(folder: Path) -> dict[str, str]:
    """The verdicts of the page of claims, by title."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "studies" / "claims.py"), "--out", str(folder)],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = (folder / "claims.md").read_text("utf-8").splitlines()
    rows = [line.split("|") for line in lines if line.startswith("| [")]
    return {row[1].split("]")[0].strip(" ["): row[2].strip() for row in rows}


def test_verdicts_on_claims_follow_from_figures(tmp_path: Path) -> None:
    header = "task,group,setting,seed,start,end,passes,bytes,seconds"

    def settings(*cells: tuple[str, str, tuple[float, ...]]) -> None:
        rows = [
            f'demo,{group},"{setting}",{seed},1.0,{end},1,1,1'
            for group, setting, ends in cells
            for seed, end in enumerate(ends)
        ]
        (tmp_path / "settings.csv").write_text("\n".join([header, *rows]) + "\n", "utf-8")

    same, none = "fedavg, SGD, the same rate", "not measured"
    settings(
        ("backpropagation", "fedmezo", (0.50, 0.51, 0.52)),
        ("backpropagation", same, (0.40, 0.411, 0.421)),
        ("rate", "1", (0.9, 0.9, 0.9)),
        ("rate", "2", (float("inf"), 0.2, 0.2)),
        ("mu", "1", (0.5, 0.5, 0.5)),
        ("mu", "2", (0.4, 0.4, 0.4)),
        ("alpha", "iid", (0.5, 0.6, 0.7)),
        ("alpha", "0.1", (0.6, 0.5, 0.7)),
        ("client rates", "fixed", (0.50, 0.60, 0.70)),
        ("client rates", "update-difference", (0.40, 0.501, 0.602)),
        ("client rates", "random", (0.60, 0.70, 0.801)),
    )
    assert claims(tmp_path) == {
        "Memory of inference": none,
        "Faster than FedAvg": "refuted",
        "The rate matters most": "supported",
        "Heterogeneity helps": "not to be told apart",
        "Model-difference rates help": "supported",
        "Low effective rank": none,
    }
    settings(
        ("backpropagation", "fedmezo", (0.50, 0.51, 0.52)),
        ("backpropagation", same, (0.60, 0.611, 0.621)),
        ("backpropagation", "fedavg, AdamW, 3e-3", (0.10, 0.111, 0.121)),
    )
    assert claims(tmp_path)["Faster than FedAvg"] == "supported in part"
    memory = "shape,parameters,weights,forward_two,step,backpropagation\n"
    (tmp_path / "memory.csv").write_text(f"{memory}a,1,4,100,50,400\nb,2,8,200,210,800\n", "utf-8")
    rank = "task,matrix,rank,effective_rank,effective_rank_low,absolute_rank\n"
    (tmp_path / "rank.csv").write_text(f"{rank}demo,Hessian,1,20,15,30\n", "utf-8")
    verdicts = claims(tmp_path)
    assert verdicts["Memory of inference"] == "supported in part"
    assert verdicts["Low effective rank"] == "supported"
    page = (tmp_path / "claims.md").read_text("utf-8")
    assert "takes 0.50 to 1.05 of a forward pass" in page
    assert "Adapters of rank 1 have less than the effective rank" in page
