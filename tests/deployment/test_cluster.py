"""Federations of real processes on the loopback device, killed, joined, left and knocked at.

One test is in `make test`; the others are in `make test-cluster`. Recovery times are printed, and
written to the JSON file that the environment variable FEDFORWARD_CLUSTER_FIGURES names.
"""

import json
import os
import shutil
import signal
import ssl
import threading
import time
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

import fedforward
from fedforward.config.site import load_site, load_terms, terms
from fedforward.deployment.flower import certificates
from fedforward.deployment.tuning import build
from fedforward.federation.client import Client
from fedforward.federation.ledger import Ledger
from fedforward.federation.server import Server
from fedforward.methods.base import Method
from fedforward.training import assembly
from fedforward.training.simulation import LocalRuntime
from tests.support.cluster import MODEL, Cluster, Forwarder, peak_bytes, processes
from tests.support.proxy import Key, connected, head

#: Local steps that take some seconds, so that a round has a middle.
LONG = 900


def record(name: str, seconds: float) -> None:
    """Keep a figure for the notes of a release."""
    print(f"{name}: {seconds:.1f} s")
    if path := os.environ.get("FEDFORWARD_CLUSTER_FIGURES"):
        figures: dict[str, float] = {}
        with suppress(OSError):
            figures = json.loads(Path(path).read_text(encoding="utf-8"))
        figures[name] = round(seconds, 1)
        Path(path).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def simulated(cluster: Cluster, rounds: int) -> tuple[list[bytes], str, Any]:
    """The same run on one machine: its entries, the digest of the tuned state, and the model."""
    settings = load_terms(cluster.folder / "run.toml", [])
    enrolled = json.loads((cluster.out / "federation.json").read_text())["sites"]
    names = sorted(enrolled, key=lambda name: enrolled[name]["number"])
    parts = [
        build(b"12345678", terms(settings), load_site(cluster.folder / f"{name}.toml"))
        for name in names
    ]
    replica, method = parts[0].replica, assembly.build_method(settings)
    assert isinstance(method, Method)
    clients = [
        Client(number, part.client(number).batches, replica) for number, part in enumerate(parts)
    ]
    ledger = Ledger.create(cluster.folder / "local.sqlite", {})
    examples = [len(client.batches) for client in clients]
    server = Server(assembly.server_settings(settings, parts[0].identity, examples), method, ledger)
    runtime = LocalRuntime(server, clients, parts[0].model, together=1)
    for _ in range(rounds):
        runtime.run_round()
    replica.catch_up(list(ledger.entries()))
    entries = [entry.encode() for entry in ledger.entries()]
    ledger.close()
    return entries, parts[0].model.digest().hex(), parts[0].model


def entries(cluster: Cluster) -> list[bytes]:
    return [entry for entry, _ in cluster.rounds()]


def begin(cluster: Cluster, *, once: bool = True) -> None:
    cluster.serve()
    for name in cluster.sites:
        cluster.join(name, once=once)


@pytest.mark.timeout(600)
def test_two_sites_over_tls_with_keys(tmp_path: Path) -> None:
    with Cluster(tmp_path, "ab") as cluster:
        begin(cluster)
        cluster.wait_for_round(1)
        coordinator = cluster.pid("coordinator")
        assert "libtorch" not in Path(f"/proc/{coordinator}/maps").read_text()
        assert peak_bytes(coordinator) < 300e6
        summary = cluster.finish()
        assert summary["rounds"] == 2 == cluster.committed
        assert "cannot be used" not in cluster.said("server")
        for name in cluster.sites:
            assert cluster.kept(name)["digest"] == summary["state_digest"]
            assert cluster.log(name).count("ready:") == 1
        cluster.gone([process.pid for process in cluster.processes()])
    assert processes(str(tmp_path)) == []


@pytest.mark.cluster
@pytest.mark.timeout(1200)
def test_three_sites_have_the_bits_of_one_machine(tmp_path: Path, imported_libraries: None) -> None:
    from safetensors import safe_open

    changes = {"method__local_steps": 5, "method__learning_rate": 3e-3, "federation__rounds": 4}
    with Cluster(tmp_path, "abc", **changes) as cluster:
        begin(cluster)
        summary = cluster.finish()
        here, digest, model = simulated(cluster, 4)
        assert entries(cluster) == here
        assert summary["state_digest"] == digest
        model.save(tmp_path / "local")

        def tensors(folder: Path) -> dict[str, bytes]:
            (file,) = folder.glob("*.safetensors")
            with safe_open(file, "np") as content:
                return {name: content.get_tensor(name).tobytes() for name in content.keys()}  # noqa: SIM118

        whole = tensors(tmp_path / "local")
        assert whole
        for name in cluster.sites:
            assert cluster.kept(name)["digest"] == digest
            assert tensors(tmp_path / name / "adapter") == whole
            assert cluster.log(name).count("ready:") == 1


@pytest.mark.cluster
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("role", "where"),
    [
        ("model server", "a"),
        ("supernode", "a"),
        ("executor", "a"),
        ("command", "a"),
        ("coordinator", "server"),
        ("superlink", "server"),
        ("superexec", "server"),
        ("command", "server"),
    ],
    ids=lambda text: {"a": "site"}.get(text, text),
)
def test_a_kill_in_a_round_loses_nothing(tmp_path: Path, role: str, where: str) -> None:
    with Cluster(tmp_path, "ab", federation__rounds=3, method__local_steps=LONG) as cluster:
        begin(cluster)
        cluster.wait_for_round(1)
        cluster.wait_for_work("a", "b")
        before = cluster.rounds()
        below = cluster.below(cluster.pid(role, where))
        began = time.monotonic()
        killed = cluster.kill(role, where)
        cluster.gone([killed, *(process.pid for process in below)])
        if role == "command":
            cluster.serve("--resume") if where == "server" else cluster.join(where)
        cluster.wait_for_round(len(before) + 1)
        record(f"next round after SIGKILL of the {where}'s {role}", time.monotonic() - began)
        summary = cluster.finish()
        assert summary["rounds"] == 3 == cluster.committed
        assert cluster.rounds()[: len(before)] == before
        for name in cluster.sites:
            assert cluster.kept(name)["digest"] == summary["state_digest"]
        assert "Traceback" not in cluster.said("server") + cluster.said("a") + cluster.said("b")


@pytest.mark.cluster
@pytest.mark.timeout(1200)
def test_one_joins_late_and_one_leaves(tmp_path: Path) -> None:
    changes = {"federation__rounds": 26, "federation__clients": 2, "federation__quorum": 1}
    with Cluster(tmp_path, "abc", method__local_steps=20, **changes) as cluster:
        cluster.serve()
        cluster.join("a")
        cluster.join("b")
        cluster.wait_for_round(10)
        began = time.monotonic()
        cluster.join("c")
        cluster.wait("report of the late site", lambda: cluster.site("c")["rounds"])
        record("first report of a site that joins after ten rounds", time.monotonic() - began)
        began, done = time.monotonic(), cluster.committed
        left = cluster.below(cluster.commands["a"].pid)
        cluster.commands["a"].terminate()
        assert cluster.ended("a") == 143
        cluster.gone([process.pid for process in left])
        cluster.wait_for_round(done + 2)
        record("two rounds after a site has left", time.monotonic() - began)
        summary = cluster.finish()
        assert summary["rounds"] == 26
        assert set(summary["sites"]) == {"a", "b", "c"}
        for name in ("b", "c"):
            assert cluster.kept(name)["digest"] == summary["state_digest"]
        assert not (tmp_path / "a" / "state.json").exists()


@pytest.mark.cluster
@pytest.mark.timeout(1200)
def test_a_straggler_is_not_waited_for_beyond_the_deadline(
    tmp_path: Path, imported_libraries: None
) -> None:
    """One site hangs in a round and comes to itself later; the other alone evaluates."""
    from fedforward.training import replay as artefacts

    changes = {"federation__rounds": 16, "federation__quorum": 1, "federation__deadline": 30.0}
    changes |= {"evaluation__site": "a", "method__local_steps": 20}
    with Cluster(tmp_path, "ab", **changes) as cluster:
        begin(cluster)
        cluster.wait_for_round(1)
        hanging = cluster.pid("model server", "b")
        os.kill(hanging, signal.SIGSTOP)
        done = cluster.committed
        cluster.wait_for_round(done + 3)
        os.kill(hanging, signal.SIGCONT)
        summary = cluster.finish()
        lines = [json.loads(x) for x in (cluster.out / "metrics.jsonl").read_text().splitlines()]
        counted = [line["clients"] for line in lines if "clients" in line]
        assert {"asked": 2, "reported": 1, "late": 0} in counted
        assert sum(clients["late"] for clients in counted) == 1
        for name in cluster.sites:
            assert cluster.kept(name)["digest"] == summary["state_digest"]
        assert "held-out loss" in cluster.log("a") and "held-out loss" not in cluster.log("b")
        # Any site can make the adapter from a copy of the server's folder.
        result = artefacts.verify(cluster.out, str(MODEL))
        assert result.differences == [] and result.state_digest == summary["state_digest"]
        name = "adapter_model.safetensors"
        artefacts.export(cluster.out, tmp_path / "made", merge=False, base=str(MODEL))
        kept = (tmp_path / "b" / "adapter" / name).read_bytes()
        assert (tmp_path / "made" / name).read_bytes() == kept


@pytest.mark.cluster
@pytest.mark.timeout(1200)
def test_ctrl_c_ends_in_order_and_the_run_goes_on(tmp_path: Path) -> None:
    with Cluster(tmp_path, "ab", federation__rounds=3, method__local_steps=LONG) as cluster:
        begin(cluster)
        cluster.wait_for_round(1)
        for name in ("server", "a"):
            if name == "server":
                cluster.wait_for_work("a", "b")
            before = cluster.rounds()
            below = cluster.below(cluster.commands[name].pid)
            began = time.monotonic()
            cluster.interrupt(name)
            assert cluster.ended(name, 60.0) == 130
            cluster.gone([process.pid for process in below])
            record(f"everything of {name} gone after Ctrl-C", time.monotonic() - began)
            assert "interrupted." in cluster.said(name)
            assert "Traceback" not in cluster.said(name)
        assert "--resume" in cluster.said("server")
        cluster.serve("--resume")
        cluster.join("a")
        summary = cluster.finish()
        assert summary["rounds"] == 3 == cluster.committed
        assert cluster.rounds()[: len(before)] == before
        for name in cluster.sites:
            assert cluster.kept(name)["digest"] == summary["state_digest"]


#: What a site says, or the server of it, that is not let in.
REFUSED = {
    "unknown-key": "it does not know the key",
    "copied-key": "it still holds this site's last connection",
    "plaintext": "one side speaks TLS and the other does not",
    "other-authority": "the server's certificate is not signed by --tls's ca.crt",
    "other-model": "its base model has other weights",
    "other-tokenizer": "its tokenizer splits text in another way",
    "other-version": "Install the same release of fedforward on both sides",
}
REGISTERED = ("other-model", "other-tokenizer", "other-version")


def other_models(folder: Path) -> tuple[Path, Path]:
    """The model with another weight, and the model with another tokenizer."""
    import torch
    from safetensors.torch import load_file, save_file

    weights, words = folder / "other-weights", folder / "other-words"
    for copy in (weights, words):
        shutil.copytree(MODEL, copy)
    file = weights / "model.safetensors"
    tensors = load_file(file)
    first = min(tensors)
    tensors[first] = torch.nextafter(tensors[first], torch.tensor(9.0, dtype=tensors[first].dtype))
    save_file(tensors, file, {"format": "pt"})
    tokenizer = json.loads((words / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    one, other = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (words / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return weights, words


def other_release(folder: Path) -> Path:
    """A folder to import `fedforward` from, whose directions are of another version."""
    source = Path(fedforward.__file__).parent
    shutil.copytree(source, folder / "fedforward")
    file = folder / "fedforward" / "directions" / "spec.py"
    text = file.read_text(encoding="utf-8")
    changed = text.replace('VERSION = "', 'VERSION = "not-')
    assert changed != text
    file.write_text(changed, encoding="utf-8")
    return folder


@pytest.mark.cluster
@pytest.mark.timeout(1200)
def test_who_is_refused_hears_why_and_harms_no_round(
    tmp_path: Path, imported_libraries: None
) -> None:
    changes = {"federation__clients": 2, "federation__quorum": 2, "federation__rounds": 500}
    with Cluster(tmp_path, ("a", "b", *REGISTERED), **changes) as cluster:
        weights, words = other_models(tmp_path)
        for number, name in enumerate(REFUSED):
            cluster.write_site(name, number)
        cluster.write_site("other-model", 2, weights)
        cluster.write_site("other-tokenizer", 3, words)
        certificates.make(tmp_path / "elsewhere", ["localhost"], ["x"])
        cluster.serve()
        cluster.join("a")
        cluster.join("b")
        cluster.wait_for_round(2)
        cluster.join("unknown-key", key="elsewhere/sites/x.key")
        cluster.join("copied-key", key="certs/sites/a.key")
        cluster.join("plaintext", tls=None)
        cluster.join("other-authority", tls="elsewhere", key="elsewhere/sites/x.key")
        cluster.join("other-model")
        cluster.join("other-tokenizer")
        release = other_release(tmp_path / "release")
        cluster.join("other-version", PYTHONPATH=str(release))
        for name, sentence in REFUSED.items():
            # The coordinator tells a site of another release nothing: it may not understand.
            place = "server" if name == "other-version" else name
            cluster.wait(
                f"{sentence!r} of {name}", lambda p=place, s=sentence: s in cluster.said(p)
            )
        cluster.wait_for_round(cluster.committed + 2)
        assert set(json.loads((cluster.out / "federation.json").read_text())["sites"]) == {"a", "b"}
        assert not cluster.site("a")["note"] and not cluster.site("b")["note"]
        assert all(len(origins) == 2 for _, origins in cluster.rounds())
        cluster.start("stop", "stop", "out")
        assert cluster.ended("server") == 2
        assert "asked to stop" in cluster.said("server")
        here, _, _ = simulated(cluster, cluster.committed)
        assert entries(cluster) == here
        for name in REFUSED:
            assert "Traceback" not in cluster.said(name)


@pytest.mark.cluster
@pytest.mark.timeout(1200)
def test_an_altered_report_is_refused_and_the_round_unharmed(tmp_path: Path) -> None:
    """In plaintext, where someone between a site and the server can alter anything.

    Flower gives an answer up that never becomes whole after three minutes; it is asked for again.
    """
    report, altered = b"FL\x01\x11", 0

    def alter(data: bytes) -> bytes:
        nonlocal altered
        place = data.find(report)
        if place < 0 or place + 40 > len(data) or altered:
            return data
        altered += 1
        return data[: place + 30] + bytes([data[place + 30] ^ 1]) + data[place + 31 :]

    changes = {"federation__clients": 2, "federation__quorum": 2, "federation__rounds": 3}
    with (
        Cluster(tmp_path, "abc", secure=False, **changes) as cluster,
        Forwarder(cluster.port, alter) as between,
    ):
        cluster.serve()
        cluster.join("a")
        cluster.join("b", port=between.port)
        cluster.secure = True
        cluster.join("c")
        sentence = "one side speaks TLS and the other does not"
        cluster.wait_for_words("c", sentence)
        cluster.commands["c"].terminate()
        assert cluster.ended("c") == 143
        began = time.monotonic()
        cluster.wait_for_round(1)
        record("a round with an altered report", time.monotonic() - began)
        summary = cluster.finish()
        assert altered == 1
        # Without keys the engine has no names, so that nobody knows here who is client 0.
        assert all(len(origins) == 2 for _, origins in cluster.rounds())
        assert summary["rounds"] == 3 == cluster.committed
        for name in ("a", "b"):
            assert cluster.kept(name)["digest"] == summary["state_digest"]


@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_a_run_goes_on_while_its_port_is_attacked(tmp_path: Path) -> None:
    """By idle connections, many headers, big bodies, and one that reads nothing."""
    over = threading.Event()
    done = Counter[str]()

    def attack(port: int, trust: ssl.SSLContext) -> None:
        heads = {
            "headers": head()[:-2] + 40_000 * b"a: b\r\n" + b"\r\n",
            "body": head("/v1/fleet/push-object", 1 << 30, **Key().headers()) + bytes(4 << 20),
            "slow": head()[:20],
        }
        while not over.is_set():
            with ExitStack() as stack:
                for _ in range(300):
                    with suppress(OSError):
                        stack.enter_context(connected(port))
                for name, content in heads.items():
                    with suppress(OSError):
                        stack.enter_context(connected(port, trust)).sendall(content)
                    done[name] += 1
                over.wait(1.0)

    with Cluster(tmp_path, "ab", federation__rounds=3) as cluster:
        begin(cluster)
        cluster.wait_for_round(1)
        trust = certificates.trust(tmp_path / "certs")
        thread = threading.Thread(target=attack, args=(cluster.port, trust), daemon=True)
        thread.start()
        try:
            summary = cluster.finish()
        finally:
            over.set()
            thread.join(30)
        assert summary["rounds"] == 3 and min(done.values()) > 1
        for name in cluster.sites:
            assert cluster.kept(name)["digest"] == summary["state_digest"]
        assert "Traceback" not in cluster.said("server") + cluster.said("a") + cluster.said("b")
