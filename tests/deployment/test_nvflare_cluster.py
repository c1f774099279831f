"""Federations over NVIDIA FLARE of real processes on the loopback device, in `make test-cluster`.

Recovery times are printed, and kept as those of `test_cluster.py`.
"""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nvflare", reason="the extra nvflare is not installed")

from fedforward.deployment.nvflare import kits, workspace
from fedforward.deployment.nvflare.admin import Admin
from fedforward.deployment.supervisor import Child, Supervisor
from tests.deployment.test_cluster import entries, other_models, record, simulated
from tests.support.cluster import peak_bytes, processes
from tests.support.flare_cluster import FlareCluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]
#: Local steps that take some seconds, so that a round has a middle.
LONG = 40
#: In every text of every site, and nowhere else.
SECRET = "xyzzyplugh"


def flare_files(folder: Path) -> list[Path]:
    """What FLARE's processes have written: logs, jobs, statistics, and what they printed."""
    return [p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()]


def test_three_sites_have_the_bits_of_one_machine(tmp_path: Path) -> None:
    """Equal entries and state; and a secret in the sites' texts is in nothing that FLARE has."""
    changes = {"method__local_steps": 5, "method__learning_rate": 3e-3, "federation__rounds": 4}
    with FlareCluster(tmp_path, "abc", **changes) as cluster:
        for name in "abc":
            file = tmp_path / f"{name}.jsonl"
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            field = next(iter(rows[0]))
            for row in rows:
                row[field] = f"{SECRET} {row[field]}"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        cluster.begin()
        cluster.wait_for_round(1)
        coordinator = int(cluster.status()["pid"])
        assert "libtorch" not in Path(f"/proc/{coordinator}/maps").read_text()
        record("flare: peak of the coordinator, MB", peak_bytes(coordinator) / 1e6)
        summary = cluster.finish()
        here, digest, _ = simulated(cluster, 4)
        assert entries(cluster) == here
        assert summary["state_digest"] == digest
        for name in cluster.sites:
            assert cluster.kept(name)["digest"] == digest
            assert cluster.log(name).count("ready:") == 1
        # At the server everything, at a site what FLARE's client and its jobs have.
        looked = flare_files(cluster.out)
        for name in cluster.sites:
            looked += flare_files(tmp_path / name / "nvflare")
            looked.append(tmp_path / name / "connection.log")
        assert len(looked) > 40
        for path in looked:
            assert SECRET.encode() not in path.read_bytes(), path
    assert processes(str(tmp_path)) == []


@pytest.mark.parametrize(
    ("word", "site"),
    [
        ("fedforward.deployment.model_server", "a"),
        pytest.param(
            "client_train", "a", marks=pytest.mark.xfail(reason="FLARE counts the site as present")
        ),
        ("worker_process", "a"),
        ("runner_process", ""),
        ("server_train", ""),
    ],
)
def test_a_process_is_killed_in_the_middle_of_a_round(tmp_path: Path, word: str, site: str) -> None:
    """A model server, FLARE's client, a job's process at a site and at the server, and FLARE."""
    changes = {"method__local_steps": LONG, "federation__rounds": 4, "federation__quorum": 1}
    with FlareCluster(tmp_path, "ab", **changes) as cluster:
        cluster.begin()
        cluster.wait_for_round(1)
        cluster.wait("a round's middle", lambda: cluster.site("b")["pending"] == "task")
        mine = str(tmp_path / site) if site else str(tmp_path / "out")
        found = [
            p.pid
            for p in cluster.processes()
            if word in p.command and (mine in p.command or f"{site}.toml" in p.command)
        ]
        assert len(found) == 1, f"{word}: {found}"
        before = entries(cluster)
        os.kill(found[0], signal.SIGKILL)
        number = len(before)
        seconds = cluster.wait_for_round(number + 2)
        record(f"flare: {word} of {site or 'the server'} killed, two rounds later", seconds)
        assert entries(cluster)[:number] == before, "nothing committed is lost"
        summary = cluster.finish()
        assert summary["rounds"] == 4 == cluster.committed
        assert cluster.kept("b")["digest"] == summary["state_digest"]
    assert processes(str(tmp_path)) == []


def test_the_server_is_killed_and_goes_on(tmp_path: Path) -> None:
    changes = {"method__local_steps": LONG, "federation__rounds": 4}
    with FlareCluster(tmp_path, "ab", **changes) as cluster:
        cluster.begin()
        cluster.wait_for_round(2)
        before = entries(cluster)
        os.kill(cluster.commands["server"].pid, signal.SIGKILL)
        cluster.ended("server")
        began = time.monotonic()
        cluster.serve("--resume")
        cluster.wait_for_round(len(before) + 1)
        record("flare: the server killed and started again", time.monotonic() - began)
        summary = cluster.finish()
        assert entries(cluster)[: len(before)] == before
        here, digest, _ = simulated(cluster, 4)
        assert entries(cluster) == here and summary["state_digest"] == digest
    assert processes(str(tmp_path)) == []


def test_sites_that_do_not_belong(tmp_path: Path) -> None:
    """Another base model, refused terms, no credentials: a sentence there, and the others go on."""
    changes = {"federation__rounds": 3, "federation__clients": 2, "federation__quorum": 1}
    with FlareCluster(tmp_path, "abcd", **changes) as cluster:
        cluster.write_site("c", 2, other_models(tmp_path)[0])
        limited = (tmp_path / "d.toml").read_text()
        (tmp_path / "d.toml").write_text(limited.replace("[limits]", "[limits]\nrank = 1"))
        cluster.serve()
        for name in "abcd":
            cluster.join(name, once=False)
        kits.make(tmp_path / "foreign", [f"localhost:{cluster.port}"], ["a"])
        shutil.copy(tmp_path / "a.toml", tmp_path / "e.toml")
        text = (tmp_path / "e.toml").read_text().replace(f'"{tmp_path}/a"', f'"{tmp_path}/e"')
        (tmp_path / "e.toml").write_text(text)
        cluster.join("e", kit="foreign/sites/a", once=False)
        cluster.wait_for_words("e", "is not signed by the authority of this site's startup kit")
        cluster.wait("end of the run", lambda: cluster.commands["server"].poll() is not None)
        assert cluster.ended("server") == 0, cluster.said("server")
        assert cluster.summary()["rounds"] == 3
        assert set(cluster.summary()["sites"]) <= {"a", "b"}
        assert "limits.rank = 1" in cluster.said("d")
        assert "the server will not have this site" in cluster.said("c")
        for name in "abcde":
            cluster.interrupt(name)
    assert processes(str(tmp_path)) == []


def test_a_job_for_a_flare_that_runs_already(tmp_path: Path) -> None:
    """FLARE's own server and clients, `fedforward job`, and an administrator's session."""
    changes = {"method__local_steps": 5, "federation__rounds": 3}
    with FlareCluster(tmp_path, "ab", **changes) as cluster:
        job = cluster.start("job", "job", "run.toml", "--out", "first")
        assert job.wait(120) == 0, cluster.said("job")
        del cluster.commands["job"]
        with Supervisor() as supervisor:
            _start(supervisor, cluster, "server", tmp_path / "kits/server", {})
            for name in "ab":
                _start(supervisor, cluster, name, tmp_path / "kits/sites" / name, {})
            shutil.copytree(tmp_path / "kits/admin", tmp_path / "ws/admin")
            session = Admin(tmp_path / "ws/admin", kits.ADMIN)
            try:
                cluster.wait("sites", lambda: _sites(session) == {"a", "b"})
                numbers = [session.submit(tmp_path / "first")]
                run = tmp_path / "ws/server/fedforward/first"
                cluster.wait("the end", lambda: session.job(numbers[0]).startswith("FINISHED"))
                assert session.job(numbers[0]) == "FINISHED:COMPLETED"
            finally:
                session.stop()
        shutil.move(run, cluster.out)
        here, digest, _ = simulated(cluster, 3)
        assert entries(cluster) == here
        for name in "ab":
            assert cluster.kept(name)["digest"] == digest
    assert processes(str(tmp_path)) == []


def _start(
    supervisor: Supervisor, cluster: FlareCluster, name: str, kit: Path, changes: dict[str, Any]
) -> Child:
    """FLARE as its own scripts start it, with this package's classes allowed."""
    place = cluster.folder / "ws" / name
    workspace.prepare(kit, place)
    file = workspace.SERVER if name == "server" else workspace.CLIENT
    if file == workspace.CLIENT:
        shutil.copy(cluster.folder / f"{name}.toml", place / "local/site.toml")
    return supervisor.start(
        workspace.child(name, place, file, cluster.folder / f"{name}.log", changes)
    )


def _sites(session: Admin) -> set[str]:
    from fedforward.core.errors import FedForwardError

    try:
        return set(session.sites())
    except FedForwardError:
        return set()
