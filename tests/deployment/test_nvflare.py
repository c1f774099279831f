"""The adapter to NVIDIA FLARE without its processes; `test_nvflare_cluster.py` has those."""

import io
import json
import shutil
import stat
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("nvflare", reason="the extra nvflare is not installed")

from nvflare.apis.dxo import DXO
from nvflare.apis.dxo_filter import DXOFilter
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal

from fedforward.config.site import load_terms
from fedforward.config.template import to_toml
from fedforward.core.errors import FedForwardError
from fedforward.core.registry import RUNTIMES
from fedforward.deployment.coordinator import Coordinator, Stopped
from fedforward.deployment.nvflare import (
    admin,
    client,
    executor,
    job,
    kits,
    resident,
    server,
    workspace,
)
from fedforward.deployment.nvflare.controller import CoordinatorController, carry_out
from fedforward.deployment.nvflare.transport import FlareTransport, unwrap, wrap
from fedforward.deployment.site import Site
from fedforward.training.run_directory import RunDirectory
from tests.support.sites import Clock, Direct, run_toml, site_config


class FakeFlare:
    """FLARE's controller and engine: hands each task to a function, in a thread as FLARE does."""

    def __init__(self, sites: dict[str, Any]) -> None:
        self.sites = sites
        self.gone: dict[str, float] = {}
        self.cancelled: list[Any] = []
        # Models are not loaded by several threads of one process.
        self._one_by_one = threading.Lock()

    def get_clients(self) -> list[Any]:
        return [SimpleNamespace(name=name) for name in self.sites]

    def get_client_disconnect_time(self, name: str) -> float | None:
        return self.gone.get(name)

    @contextmanager
    def new_context(self) -> Any:
        yield None

    def cancel_task(self, task: Any) -> None:
        self.cancelled.append(task)

    def send(self, task: Any, context: Any, targets: list[str]) -> None:
        (name,) = task.targets = targets
        assert task.name == "envelope"

        def work() -> None:
            with self._one_by_one:
                result = self.sites[name](task.data)
            if result is None:
                return
            done = SimpleNamespace(client=SimpleNamespace(name=name), task=task, result=result)
            task.result_received_cb(client_task=done, fl_ctx=None)
            task.completion_status = SimpleNamespace(value="ok")
            task.task_done_cb(task=task, fl_ctx=None)

        threading.Thread(target=work, daemon=True).start()


def transport(sites: dict[str, Any]) -> tuple[FakeFlare, FlareTransport, Signal]:
    flare, abort = FakeFlare(sites), Signal()
    return flare, FlareTransport(flare, flare, abort), abort


def replies(over: FlareTransport, count: int) -> dict[str, Any]:
    found: list[Any] = []
    for _ in range(100):
        found += over.receive()
        if len(found) >= count:
            break
        over.wait(0.1)
    assert len({reply.site for reply in found}) == len(found) == count
    return {reply.site: reply for reply in found}


def test_a_task_carries_the_envelope_and_nothing_else() -> None:
    content = wrap(b"abc")
    assert unwrap(content) == b"abc"
    assert content["DXO"] == {"kind": "APP_DEFINED", "data": {"envelope": b"abc"}, "meta": {}}
    assert unwrap(make_reply("OK")) == b""
    assert unwrap(DXO("APP_DEFINED", {"envelope": "text"}).to_shareable()) == b""


def test_filters_of_flare_see_the_bytes() -> None:
    """What an operator puts into `privacy.json` works on the same bytes that travel."""
    seen = []

    class Look(DXOFilter):
        def __init__(self) -> None:
            super().__init__(None, None)

        def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: Any) -> None:
            seen.append(dxo.data)

    assert unwrap(Look().process(wrap(b"abc"), None)) == b"abc"
    assert seen == [{"envelope": b"abc"}]


def test_messages_as_tasks() -> None:
    flare, over, _ = transport(
        {
            "a": lambda data: wrap(unwrap(data)[::-1]),
            "b": lambda data: make_reply("EXECUTION_EXCEPTION"),
            "c": lambda data: None,
        }
    )
    assert list(over.present()) == ["a", "b", "c"]
    for name in "abc":
        over.send(name, b"abc")
    came = replies(over, 2)
    assert came["a"].data == b"cba" and not came["a"].error
    assert "EXECUTION_EXCEPTION" in came["b"].error and not came["b"].data
    # One that is gone is not waited for; it may be asked again when it is back.
    flare.gone["c"] = 1.0
    assert list(over.present()) == ["a", "b"]
    assert replies(over, 1)["c"].error == "it is gone from the job"
    assert len(flare.cancelled) == 1
    assert over.receive() == []


def test_a_task_that_was_given_up_answers_for_no_other() -> None:
    flare, over, _ = transport({"a": lambda data: None})
    over.send("a", b"old")
    old = over._tasks["a"]
    flare.gone["a"] = 1.0
    assert replies(over, 1)["a"].error
    del flare.gone["a"]
    over.send("a", b"new")
    late = SimpleNamespace(client=SimpleNamespace(name="a"), task=old, result=wrap(b"late"))
    old.result_received_cb(client_task=late, fl_ctx=None)
    assert over.receive() == []


def test_a_job_that_is_aborted_stops_the_coordinator() -> None:
    _, over, abort = transport({})
    abort.trigger(True)
    with pytest.raises(Stopped, match="Everything up to here is kept"):
        over.receive()


def test_the_run_is_that_of_any_transport(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: Any
) -> None:
    """Entries and state of the same run: over FLARE's tasks, and handed over directly."""
    monkeypatch.setattr("fedforward.deployment.site.build", models)
    settings = run_toml(tmp_path)
    made = {}
    for kind in ("direct", "flare"):
        sites = {}
        for name in "abc":
            (tmp_path / kind).mkdir(exist_ok=True)
            sites[name] = Site(site_config(tmp_path / kind, name))
        out = tmp_path / kind / "out"
        if kind == "direct":
            clock = Clock()
            Coordinator(settings, out, Direct(sites), clock=clock, sleep=clock.sleep).run()
        else:
            answering = {
                name: lambda data, site=site: wrap(site.answer(unwrap(data)))
                for name, site in sites.items()
            }
            carry_out(settings, out, transport(answering)[1])
            # The next job of a run that is over finds nothing to do.
            carry_out(settings, out, transport(answering)[1])
        from fedforward.federation.ledger import Ledger

        ledger = Ledger(RunDirectory(out).ledger, read_only=True)
        summary = json.loads((out / "summary.json").read_text())
        made[kind] = [entry.encode() for entry in ledger.entries()], summary["state_digest"]
        ledger.close()
    assert made["direct"] == made["flare"]
    assert len(made["flare"][0]) == settings.federation.rounds


def test_a_job_with_too_few_sites_is_refused_before_it_waits(tmp_path: Path) -> None:
    settings = run_toml(tmp_path)
    assert settings.federation.clients > 1
    with pytest.raises(FedForwardError, match=r"started with 1 sites \(a\).*submit it again"):
        carry_out(settings, tmp_path / "out", transport({"a": None})[1])
    assert not (tmp_path / "out").exists()


def test_the_job_is_one_that_flare_takes(tmp_path: Path) -> None:
    from nvflare.private.fed.server.job_meta_validator import JobMetaValidator

    settings = run_toml(tmp_path)
    folder = job.write_job(settings, tmp_path / "job", "first")
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert files == {
        "meta.json",
        "app/config/config_fed_server.json",
        "app/config/config_fed_client.json",
        "app/config/run.toml",
    }
    assert load_terms(folder / "app/config/run.toml", []) == settings
    archive = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path, "job"))
    valid, error, meta = JobMetaValidator().validate("job", archive.read_bytes())
    assert valid, error
    assert meta["name"] == "first" and not meta.get("byoc"), "it has no code"
    # The same may be written again; what an administrator has changed is not written over.
    assert job.write_job(settings, folder, "first") == folder
    before = (folder / "meta.json").read_text(encoding="utf-8")
    with pytest.raises(FedForwardError, match=r"another job: its meta\.json differs"):
        job.write_job(settings, folder, "second")
    assert (folder / "meta.json").read_text(encoding="utf-8") == before
    (folder / "mine.txt").touch()
    with pytest.raises(FedForwardError, match="is no job's folder"):
        job.write_job(settings, folder, "first")
    for name, place in (("a/b", "x"), ("..", "x"), ("", "x"), ("a", "with space")):
        with pytest.raises(FedForwardError, match=r"--(name|out)"):
            job.write_job(settings, tmp_path / place, name)
    with pytest.raises(ValueError, match=r"'\.\./up' is not allowed"):
        CoordinatorController("../up")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kits of a server and two sites."""
    folder = tmp_path_factory.mktemp("kits") / "kits"
    assert len(kits.make(folder, ["localhost:9871"], ["a", "b"])) == 4
    return folder


def test_kits_and_one_more_site(made: Path, tmp_path: Path) -> None:
    assert kits.make(made, [], ["a"]) == []
    authority = (made / "server/startup/rootCA.pem").read_bytes()
    assert kits.make(made, ["localhost:9871"], ["c"]) == [made / "sites" / "c"]
    assert (made / "sites/c/startup/rootCA.pem").read_bytes() == authority
    assert workspace.subject(made / "sites/c", "client.crt") == ("c", kits.PROJECT)
    for secret in [*made.rglob("*.key"), made / "fedforward/state/cert.json"]:
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600, secret
    for hosts, sites, words in (
        (["other.example.org"], [], "has kits for localhost:9871"),
        (["a", "b"], [], "Give one --host"),
        (["x y"], [], "--host 'x y'"),
        (["x:0"], [], "--host 'x:0'"),
        (["x:99999"], [], "--host"),
        ([], ["a.b"], "--site 'a.b'"),
        ([], ["server"], "--site 'server'"),
    ):
        with pytest.raises(FedForwardError, match=words):
            kits.make(made, hosts, sites)
    with pytest.raises(FedForwardError, match="--host is missing"):
        kits.make(tmp_path / "new", [], ["a"])
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/participants.json").write_text("{}")
    with pytest.raises(FedForwardError, match="cannot be read"):
        kits.make(tmp_path / "damaged", [], ["a"])


def test_a_workspace_keeps_what_an_operator_set(made: Path, tmp_path: Path) -> None:
    kit = tmp_path / "kit"
    shutil.copytree(made / "sites/a", kit)
    (kit / "local/privacy.json").write_text('{"scopes": []}')
    for _ in range(2):
        workspace.prepare(kit, tmp_path / "ws")
    local = tmp_path / "ws/local"
    assert (local / "privacy.json").read_text() == '{"scopes": []}'
    resources = json.loads((local / "resources.json").read_text())
    assert resources["class_allow_list"].count("fedforward.deployment.nvflare.") == 1
    assert resources["class_list_enforcement_mode"] == "enforce"
    assert resources["allow_log_streaming"] is False
    assert "log" not in " ".join(c["id"] for c in resources["components"])
    workspace.prepare(made / "server", tmp_path / "server")
    written = (tmp_path / "server/local/resources.json").read_text()
    assert str(tmp_path / "server/jobs") in written and "/tmp/nvflare" not in written
    (kit / "local/resources.json").write_text("[]")
    with pytest.raises(FedForwardError, match=r"resources\.json cannot be used"):
        workspace.prepare(kit, tmp_path / "ws")


def test_options_that_do_not_go_together(made: Path, tmp_path: Path) -> None:
    assert server.check(made, False, "0.0.0.0:9871") == (made, 9871)
    for call, words in (
        (lambda: server.check(None, False, "x:1"), "No --tls: FLARE has no connections without"),
        (lambda: server.check(None, True, "x:1"), "--insecure: FLARE has no"),
        (lambda: server.check(made, False, "0.0.0.0:9400"), "Give --listen 0.0.0.0:9871"),
        (lambda: server.check(tmp_path, False, "0.0.0.0:9400"), "must be a FLARE startup kit"),
        (lambda: client.check(None, None, False, "x:1"), "--tls FOLDER is missing"),
        (lambda: client.check(None, None, True, "x:1"), "--insecure: FLARE has no"),
        (lambda: client.check(made, made, False, "x:1"), "Leave --key out"),
        (lambda: client.check(made / "server", None, False, "x:1"), "must be a FLARE startup kit"),
        (
            lambda: client.check(made / "sites/a", None, False, "localhost:1"),
            "is for localhost:9871",
        ),
    ):
        with pytest.raises(FedForwardError, match=words):
            call()
    kit = made / "sites/a"
    assert client.check(kit, None, False, "localhost:9871") == kit
    shutil.copytree(kit, tmp_path / "kit")
    (tmp_path / "kit/startup/client.crt").write_text("nonsense")
    with pytest.raises(FedForwardError, match="no certificate of FLARE's"):
        client.check(tmp_path / "kit", None, False, "localhost:9871")


def test_the_commands_import_no_flare() -> None:
    """They live as long as the run, beside FLARE's own processes."""
    code = (
        "import sys, fedforward.deployment.nvflare.server, fedforward.deployment.nvflare.client;"
        "print({'torch', 'nvflare', 'grpc', 'flwr'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_without_flare_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedforward.deployment.runtime.find_spec", lambda name: None)
    with pytest.raises(FedForwardError, match=r"pip install 'fedforward\[nvflare\]'"):
        RUNTIMES.get("nvflare").check()


def test_the_executor_tells_the_server_a_code_and_the_site_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    local = tmp_path / "local"
    local.mkdir()
    place = SimpleNamespace(get_site_config_dir=lambda: str(local))
    context = SimpleNamespace(
        get_engine=lambda: SimpleNamespace(get_workspace=lambda: place),
        get_identity_name=lambda: "a",
    )
    runs = executor.SiteExecutor()

    def execute(name: str = "envelope", aborted: bool = False) -> Any:
        signal = Signal()
        signal.trigger(aborted)
        return runs.execute(name, wrap(b"abc"), context, signal)

    assert execute("train").get_return_code() == "TASK_UNSUPPORTED"
    with caplog.at_level("WARNING"):
        answer = execute()
    assert answer.get_return_code() == "EXECUTION_EXCEPTION"
    assert "site.toml is missing" in caplog.text and "site.toml" not in str(answer)
    (local / "site.toml").touch()
    assert resident.site_file(local, "a").name == "site.toml"
    (local / "a.toml").touch()
    assert resident.site_file(local, "a").name == "a.toml"
    monkeypatch.setenv(executor.SOCKET, "there")
    monkeypatch.setattr(executor, "ask", lambda path, data: path.encode() + data)
    assert unwrap(execute()) == b"thereabc"
    hold = threading.Event()
    monkeypatch.setattr(executor, "ask", lambda path, data: hold.wait(20) and b"")
    assert execute(aborted=True).get_return_code() == "TASK_ABORTED"
    hold.set()


def test_a_site_without_a_fedforward_client_has_a_model_server_for_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "site.toml"
    file.write_text(to_toml(site_config(tmp_path, "a")), encoding="utf-8")  # type: ignore[arg-type]
    model = resident.ResidentModel(file)
    try:
        with pytest.raises(FedForwardError, match="in use by another fedforward process"):
            resident.ResidentModel(file)
        assert b'{"code":"message",' in executor.ask(str(model.socket), b"nonsense")
        pid = model._child.pid
    finally:
        model.stop()
    assert not Path(f"/proc/{pid}").exists() and not model.socket.exists()


def test_an_administrators_session_begins_anew() -> None:
    """A server that was started again knows nothing of the old session."""

    class Session(admin.Session):
        opened = 0

        def _open(self) -> Any:
            self.opened += 1
            if self.opened < 2:
                raise ConnectionError("no server")
            return SimpleNamespace(
                submit_job=lambda folder: f"job of {folder}",
                get_job_meta=lambda number: {}[number],
            )

    answers = io.StringIO()
    questions = io.StringIO('["submit", "x"]\n["job", "1"]\n')
    admin.answer_all(questions, answers, Session("", ""))
    first, second = map(json.loads, answers.getvalue().splitlines())
    assert first == {"value": "job of x"} and second == {"error": "'1'"}


def test_a_session_process_that_ends_is_a_sentence(tmp_path: Path) -> None:
    asked = admin.Admin(tmp_path, "nobody@nowhere.invalid")
    with pytest.raises(FedForwardError, match="FLARE"):
        asked.sites()
    asked.stop()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("Successfully registered client:a for project", "connected to the server"),
        ("ClientConnectorError: Cannot connect to host x", "cannot be reached"),
        ("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed", "is not signed by"),
        ("Component 'x' at config path '' is not in allow_list", "class_allow_list"),
    ],
)
def test_what_is_wrong_with_a_connection_is_said_once(
    line: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    connection = client._Connection()
    with caplog.at_level("INFO"):
        for _ in range(2):
            connection.line(line)
            connection.line("something else")
    assert caplog.text.count(words) == 1
