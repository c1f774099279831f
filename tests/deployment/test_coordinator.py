"""The federation across machines without an engine: messages handed over in one process."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fedforward.cli import main as cli
from fedforward.config import site as sites
from fedforward.core.errors import FedForwardError, MessageError
from fedforward.demo.text import site_examples
from fedforward.deployment.coordinator import Stopped
from fedforward.deployment.site import Site
from fedforward.federation.client import Client
from fedforward.federation.ledger import Ledger
from fedforward.federation.server import Server
from fedforward.messages.envelope import Enrollment, Envelope, MessageKind, encode_json
from fedforward.messages.refusal import Refusal, RefusalCode
from fedforward.methods.base import Method
from fedforward.training import assembly, replay
from fedforward.training.simulation import LocalRuntime
from tests.conftest import DEMO_MODEL
from tests.support.sites import Direct, carry_out, party, rounds, run_toml, site_config

NAMES = ("a", "b", "c")


@pytest.fixture
def three(tmp_path: Path) -> dict[str, Site]:
    return {name: party(tmp_path, name) for name in NAMES}


METHODS = [
    ("method.name=fedmezo", "method.client_rates=update-difference"),
    ("method.name=decomfl",),
    ("method.name=zorba",),
    ("method.name=fedkseed-pro", "method.candidates=16"),
]


@pytest.mark.parametrize("overrides", METHODS, ids=lambda o: o[0].partition("=")[2])
def test_the_same_bits_as_on_one_machine(
    tmp_path: Path, three: dict[str, Site], overrides: tuple[str, ...]
) -> None:
    settings = run_toml(tmp_path, *overrides)
    summary = carry_out(settings, tmp_path / "out", Direct(three))
    assert [site.loads for site in three.values()] == [1, 1, 1]

    parts = [site.tuning for site in three.values()]
    assert all(part is not None for part in parts)
    first = parts[0]
    assert first is not None
    replica = first.replica
    replica.reset()
    method = assembly.build_method(settings)
    assert isinstance(method, Method)
    clients = [
        Client(number, part.client(number).batches, replica)
        for number, part in enumerate(parts)
        if part is not None
    ]
    examples = [len(client.batches) for client in clients]
    ledger = Ledger.create(tmp_path / "local.sqlite", {"local": True})
    server = Server(assembly.server_settings(settings, first.identity, examples), method, ledger)
    runtime = LocalRuntime(server, clients, first.model, together=1)
    for _ in range(settings.federation.rounds):
        runtime.run_round()
    here = [(r.entry.encode(), [o.encode() for o in r.results]) for r in ledger.rounds()]

    def without_digests(found: list[tuple[bytes, list[bytes]]]) -> list[bytes]:
        return [entry for entry, _ in found]

    assert without_digests(rounds(tmp_path / "out")) == without_digests(here)
    replica.catch_up(list(ledger.entries()))
    assert summary["state_digest"] == first.model.digest().hex()


class KillError(BaseException):
    """Ends a coordinator as SIGKILL would."""


@pytest.mark.parametrize("fresh", [False, True], ids=["same sites", "sites started again"])
@pytest.mark.parametrize("look", [2, 4, 6, 8, 9])
def test_killed_and_resumed(tmp_path: Path, three: dict[str, Site], look: int, fresh: bool) -> None:
    settings = run_toml(tmp_path)
    whole = carry_out(settings, tmp_path / "whole", Direct(three))
    transport = Direct({name: party(tmp_path, name) for name in NAMES})

    def kill(number: int) -> None:
        if number == look:
            raise KillError

    transport.each_look = kill
    with pytest.raises(KillError):
        carry_out(settings, tmp_path / "out", transport)
    left = {name: party(tmp_path, name) for name in NAMES} if fresh else transport.parties
    again = carry_out(settings, tmp_path / "out", Direct(left), resume=True)
    assert again["state_digest"] == whole["state_digest"]
    entries = [entry for entry, _ in rounds(tmp_path / "whole")]
    assert [entry for entry, _ in rounds(tmp_path / "out")] == entries
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == list(range(5))


def test_a_site_that_starts_again_in_a_round_catches_up(
    tmp_path: Path, three: dict[str, Site]
) -> None:
    settings = run_toml(tmp_path)
    whole = carry_out(settings, tmp_path / "whole", Direct(three))
    transport = Direct({name: party(tmp_path, name) for name in NAMES})
    tasks = 0

    def restart(name: str, message: Envelope, data: bytes) -> bytes:
        nonlocal tasks
        if message.kind is MessageKind.TASK and name == "b":
            tasks += 1
            if tasks == 3:
                transport.parties["b"] = party(tmp_path, "b")
                return transport.parties["b"].answer(message.encode())
        return data

    transport.tamper = restart
    assert carry_out(settings, tmp_path / "out", transport)["state_digest"] == whole["state_digest"]
    assert tasks > 4


def test_one_joins_and_one_leaves(tmp_path: Path, three: dict[str, Site]) -> None:
    settings = run_toml(tmp_path, "federation.rounds=14", "federation.clients=2")
    late = three.pop("c")
    transport = Direct(three)
    path = tmp_path / "out" / "ledger.sqlite"

    def change(number: int) -> None:
        if not path.is_file():
            return
        ledger = Ledger(path)
        length = ledger.length
        ledger.close()
        if length >= 10:
            transport.parties["c"] = late
        if length >= 12:
            transport.parties.pop("a", None)

    transport.each_look = change
    summary = carry_out(settings, tmp_path / "out", transport)
    assert summary["rounds"] == 14 and set(summary["sites"]) == {"a", "b", "c"}
    digests = [
        json.loads((tmp_path / name / "state.json").read_text())["digest"] for name in ("b", "c")
    ]
    assert digests == [summary["state_digest"]] * 2
    assert not (tmp_path / "a" / "state.json").exists()


def test_altered_messages_are_refused_and_the_round_unharmed(
    tmp_path: Path, three: dict[str, Site]
) -> None:
    settings = run_toml(tmp_path)
    whole = carry_out(settings, tmp_path / "whole", Direct(three))
    transport = Direct({name: party(tmp_path, name) for name in NAMES})
    seen = 0

    def flip(name: str, message: Envelope, data: bytes) -> bytes:
        nonlocal seen
        seen += message.kind is MessageKind.TASK
        if message.kind is MessageKind.TASK and seen % 3 == 0:
            place = len(data) // 2
            return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]
        return data

    transport.tamper = flip
    assert carry_out(settings, tmp_path / "out", transport)["state_digest"] == whole["state_digest"]
    assert seen > 12


def test_a_deadline_closes_without_the_slow(tmp_path: Path, three: dict[str, Site]) -> None:
    settings = run_toml(tmp_path, "federation.deadline=5.0", "federation.rounds=3")
    transport = Direct(three)
    held = 0

    def hold(name: str, message: Envelope, data: bytes) -> bytes | None:
        nonlocal held
        if name == "c" and message.kind is MessageKind.TASK and held < 26:
            held += 1
            return None
        return data

    transport.tamper = hold
    summary = carry_out(settings, tmp_path / "out", transport)
    assert summary["rounds"] == 3
    lines = [json.loads(x) for x in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert set(lines[1]["learning_rates"]) == {"0", "1"}
    assert sum(line.get("clients", {}).get("late", 0) for line in lines) == 1


def test_another_model_is_rejected_with_a_sentence(
    tmp_path: Path, three: dict[str, Site], caplog: pytest.LogCaptureFixture
) -> None:
    answer = three["b"].enroll

    def other(message: Envelope) -> Enrollment:
        from dataclasses import replace

        enrollment = answer(message)
        return replace(enrollment, model=replace(enrollment.model, base="0" * 64))

    three["b"].enroll = other  # type: ignore[method-assign]
    caplog.set_level("INFO", "fedforward")
    summary = carry_out(run_toml(tmp_path), tmp_path / "out", Direct(three))
    assert set(summary["sites"]) == {"a", "c"}
    assert any("its base model has other weights" in text for text in caplog.messages)
    status = json.loads((tmp_path / "out" / "status.json").read_text())
    assert status["state"] == "finished"
    assert "other weights" in next(s["note"] for s in status["sites"] if s["name"] == "b")


def test_no_majority_is_a_sentence(tmp_path: Path, three: dict[str, Site]) -> None:
    del three["c"]
    three["b"].settings = site_config(tmp_path, "b")
    settings = run_toml(tmp_path, "federation.clients=2")
    answer = three["b"].enroll

    def other(message: Envelope) -> Enrollment:
        from dataclasses import replace

        enrollment = answer(message)
        return replace(enrollment, model=replace(enrollment.model, tokenizer="0" * 64))

    three["b"].enroll = other  # type: ignore[method-assign]
    with pytest.raises(FedForwardError, match="none has most: a; b"):
        carry_out(settings, tmp_path / "out", Direct(three))


def said(answer: Envelope) -> Refusal:
    """What a site says in a refusal."""
    assert answer.kind is MessageKind.REFUSAL
    return Refusal.decode(answer.body)


def test_a_site_refuses_terms_with_the_reason(tmp_path: Path, three: dict[str, Site]) -> None:
    three["c"] = party(tmp_path, "c", limits__rounds=3)
    settings = run_toml(tmp_path, "federation.clients=2")
    carry_out(settings, tmp_path / "out", Direct(three))
    status = json.loads((tmp_path / "out" / "status.json").read_text())
    note = next(site["note"] for site in status["sites"] if site["name"] == "c")
    assert note == Refusal(RefusalCode.LIMITS, ("federation.rounds",)).sentence


def test_stopped_and_resumed(tmp_path: Path, three: dict[str, Site]) -> None:
    settings = run_toml(tmp_path)
    transport = Direct(three)

    def stop(number: int) -> None:
        if number == 6:
            (tmp_path / "out" / "stop").touch()

    transport.each_look = stop
    with pytest.raises(Stopped):
        carry_out(settings, tmp_path / "out", transport)
    assert json.loads((tmp_path / "out" / "status.json").read_text())["state"] == "stopped"
    transport.each_look = lambda number: None
    assert carry_out(settings, tmp_path / "out", transport, resume=True)["rounds"] == 4
    with pytest.raises(FedForwardError, match="holds a run already"):
        carry_out(settings, tmp_path / "out", transport)


def test_a_named_evaluator(tmp_path: Path, three: dict[str, Site]) -> None:
    settings = run_toml(tmp_path, 'evaluation.site="b"')
    asked = set()
    transport = Direct(three)

    def watch(name: str, message: Envelope, data: bytes) -> bytes:
        if message.kind is MessageKind.EVALUATION:
            asked.add(name)
        return data

    transport.tamper = watch
    carry_out(settings, tmp_path / "out", transport)
    assert asked == {"b"}


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("fedforward.training.loop", "torch transformers datasets matplotlib"),
        ("fedforward.deployment.coordinator", "torch transformers datasets flwr fedforward.cli"),
        ("fedforward.deployment.model_server", "torch scipy pydantic flwr fedforward.cli"),
        ("fedforward.deployment.site", "flwr fedforward.cli"),
    ],
)
def test_what_a_process_does_not_import(module: str, absent: str) -> None:
    code = f"import sys, {module}; print([m for m in {absent.split()} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- messages and terms -----------------------------------------------------------------------


def test_a_letter_with_any_bit_changed_is_refused() -> None:
    data = Envelope(MessageKind.TASK, b"12345678", b"body of a message").encode()
    assert Envelope.decode(data).body == b"body of a message"
    for place in range(8 * len(data)):
        changed = bytearray(data)
        changed[place // 8] ^= 1 << place % 8
        with pytest.raises(MessageError):
            Envelope.decode(bytes(changed))
    for size in range(len(data)):
        with pytest.raises(MessageError):
            Envelope.decode(data[:size])


@pytest.mark.parametrize("key", ["examples", "heldout", "rounds"])
@pytest.mark.parametrize("value", [-1, 1.5, "3", None, True, 2**70])
def test_enrolments_with_nonsense_are_refused(
    three: dict[str, Site], tmp_path: Path, key: str, value: Any
) -> None:
    content = _an_enrolment()
    assert Enrollment.decode(content).examples == 5
    with pytest.raises(MessageError):
        Enrollment.decode({**content, key: value})


def _an_enrolment() -> dict[str, Any]:
    from fedforward.core.identity import ModelIdentity
    from fedforward.directions import Layout

    model = ModelIdentity(Layout.of({"w": (3, 2), "v": ()}), "base", (), 28, "tokenizer")
    return dict(json.loads(Enrollment("a", model, 5, 2, 0).encode()))


def test_enrolments_of_other_versions_are_refused() -> None:
    content = _an_enrolment()
    for key in ("direction_version", "wire_version"):
        with pytest.raises(MessageError, match="Install the same release"):
            Enrollment.decode({**content, key: "another"})
    for layout in (
        [[], [], [], []],
        [["b", "a"], [[1], [1]], ["all"], [0, 0]],
        [["a"], [[0]], ["all"], [0]],
    ):
        with pytest.raises(MessageError):
            Enrollment.decode({**content, "model": {**content["model"], "layout": layout}})


def test_nothing_of_a_site_travels(tmp_path: Path) -> None:
    given = sites.terms(run_toml(tmp_path))
    assert "simulation" not in given
    for section, key in (("model", "path"), ("data", "source"), ("run", "device")):
        assert key not in given[section]
    joined = sites.join(given, site_config(tmp_path, "a"))
    assert joined.federation.clients == 1 and joined.model.path == str(DEMO_MODEL)
    # The terms say the objective, whatever the default of a site's version is.
    assert joined.method == run_toml(tmp_path).with_objective().method


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method.name=fedavg", "method.name = 'fedavg'"),
        ("simulation.dropout=0.1", r"\[simulation\]"),
        ("federation.partition=dirichlet", "federation.partition"),
        ("evaluation.source=x.jsonl", "evaluation.source"),
    ],
)
def test_terms_that_need_one_machine_are_refused(tmp_path: Path, override: str, words: str) -> None:
    extra = ["federation.field=site"] if "partition" in override else []
    with pytest.raises(FedForwardError, match=words):
        run_toml(tmp_path, override, *extra)


def test_a_sites_file(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text(sites.example_site(), encoding="utf-8")
    assert sites.load_site(path).limits == sites.LimitsSection()
    path.write_text("model.path = 'm'\ndata.source = 'd'\nlimits.tunes = ['lora']\n")
    with pytest.raises(FedForwardError, match=r"Did you mean limits\.tune\?"):
        sites.load_site(path)


def test_fields_of_other_names(tmp_path: Path) -> None:
    rows = site_examples(seed=0, per_site=9)
    names = {key: f"their {key}" for key in rows[0]}
    own = tmp_path / "own.jsonl"
    own.write_text(
        "".join(json.dumps({names[k]: v for k, v in row.items()}) + "\n" for row in rows[0::3]),
        encoding="utf-8",
    )
    given = sites.terms(run_toml(tmp_path))
    hello = Envelope(MessageKind.HELLO, b"12345678", json.dumps({"terms": given}).encode()).encode()
    there = Envelope.decode(
        party(tmp_path, "a", data__source=str(own), data__fields=names).answer(hello)
    )
    usual = Envelope.decode(party(tmp_path, "a").answer(hello))
    assert (there.kind, there.body) == (MessageKind.ENROLLMENT, usual.body)
    wrong = {next(iter(names)): "nothing"}
    answer = Envelope.decode(party(tmp_path, "a", data__fields=wrong).answer(hello))
    assert said(answer) == Refusal(RefusalCode.DATA)


def test_a_servers_run_is_verified_and_exported_with_the_sites_model(
    tmp_path: Path, three: dict[str, Site]
) -> None:
    from fedforward.training import replay as artefacts

    out = tmp_path / "out"
    summary = carry_out(run_toml(tmp_path), out, Direct(three))
    with pytest.raises(FedForwardError, match="Give --model FOLDER"):
        artefacts.verify(out)
    result = artefacts.verify(out, str(DEMO_MODEL))
    assert result.differences == [] and result.proofs
    assert result.state_digest == summary["state_digest"]
    artefacts.export(out, tmp_path / "adapter", merge=False, base=str(DEMO_MODEL))
    name = "adapter_model.safetensors"
    kept = (tmp_path / "a" / "adapter" / name).read_bytes()
    assert (tmp_path / "adapter" / name).read_bytes() == kept
    shown = CliRunner().invoke(cli.app, ["status", str(out)])
    assert "finished: 4 of 4 rounds" in shown.stdout and "takes part" not in shown.stdout
    (out / "summary.json").write_text(
        (out / "summary.json").read_text().replace(summary["state_digest"], "00" * 32)
    )
    (difference,) = artefacts.verify(out, str(DEMO_MODEL)).differences
    assert "state_digest" in difference


def test_sites_go_on_from_the_same_adapter(tmp_path: Path, three: dict[str, Site]) -> None:
    """Two sites have it and one has another; the run directory verifies with it alone."""
    from fedforward.models.lora import LoraModel

    for name, seed in (("one", 1), ("other", 2)):
        LoraModel.from_pretrained(DEMO_MODEL, rank=2, device="cpu", seed=seed).save(tmp_path / name)
    for name, adapter in (("a", "one"), ("b", "one"), ("c", "other")):
        three[name] = party(tmp_path, name, model__adapter=str(tmp_path / adapter))
    settings = run_toml(tmp_path, "run.seed=5")
    summary = carry_out(settings, tmp_path / "out", Direct(three))
    header = Ledger(tmp_path / "out/ledger.sqlite").header
    tuning = [site.tuning for site in three.values()]
    assert [part.identity.adapter == header["adapter"] for part in tuning if part] == [
        True,
        True,
        False,
    ]
    base = str(DEMO_MODEL)
    with pytest.raises(FedForwardError, match="Give --adapter FOLDER"):
        replay.verify(tmp_path / "out", base)
    with pytest.raises(FedForwardError, match=r"\(model\.adapter\) is another"):
        replay.verify(tmp_path / "out", base, adapter=str(tmp_path / "other"))
    result = replay.verify(tmp_path / "out", base, adapter=str(tmp_path / "one"))
    assert result.differences == [] and result.state_digest == summary["state_digest"]


@pytest.mark.parametrize(
    ("factors", "alignment"), [("both", "forward"), ("R", "forward"), ("R", "backward")]
)
def test_sites_begin_with_the_same_aligned_a(
    tmp_path: Path, three: dict[str, Site], factors: str, alignment: str
) -> None:
    """Two sites have the file and one has another; without one a site refuses the terms."""
    from fedforward.models.aligned import align
    from fedforward.models.lora import LoraModel

    form = {"factors": factors, "alignment": alignment}
    model = LoraModel.from_pretrained(DEMO_MODEL, rank=2, device="cpu", seed=5, **form)
    for number, name in enumerate(("one", "other")):
        texts = [np.arange(3 + number, 40)]
        (tmp_path / f"{name}.safetensors").write_bytes(align(model, texts).data)
    for name, file in (("a", "one"), ("b", "one"), ("c", "other")):
        path = str(tmp_path / f"{file}.safetensors")
        three[name] = party(tmp_path, name, lora__init_file=path)
    method = 'method.name="fedmezo-auto"' if factors == "R" else "method.mu=1e-3"
    form = {"init": "aligned", **form}
    wanted = (*(f'lora.{key}="{value}"' for key, value in form.items()), method)
    settings = run_toml(tmp_path, "run.seed=5", *wanted)
    summary = carry_out(settings, tmp_path / "out", Direct(three))
    header = Ledger(tmp_path / "out/ledger.sqlite").header
    tuning = [site.tuning for site in three.values()]
    same = [part.identity.initial_a == header["initial_a"] for part in tuning if part]
    assert same == [True, True, False]
    base = str(DEMO_MODEL)
    with pytest.raises(FedForwardError, match="Give --init-file FILE"):
        replay.verify(tmp_path / "out", base)
    with pytest.raises(FedForwardError, match=r"\(lora\.init_file\) is another"):
        replay.verify(tmp_path / "out", base, init_file=str(tmp_path / "other.safetensors"))
    one = str(tmp_path / "one.safetensors")
    result = replay.verify(tmp_path / "out", base, init_file=one)
    assert result.differences == [] and result.state_digest == summary["state_digest"]
    three["a"] = party(tmp_path, "a")
    assert three["a"].settings.lora.init_file is None
    hello = Envelope(MessageKind.HELLO, b"12345678", encode_json({"terms": sites.terms(settings)}))
    answer = Envelope.decode(three["a"].answer(hello.encode()))
    assert said(answer) == Refusal(RefusalCode.TERMS, ("lora.init", "lora.init_file"))
    gone = party(tmp_path, "a", lora__init_file=str(tmp_path / "gone.safetensors"))
    answer = Envelope.decode(gone.answer(hello.encode()))
    assert said(answer) == Refusal(RefusalCode.MODEL, ("lora.init_file",))


def test_a_server_has_no_aligned_a(tmp_path: Path) -> None:
    with pytest.raises(FedForwardError, match=r"lora\.init_file = 'a': each site has the file"):
        run_toml(tmp_path, 'lora.init="aligned"', 'lora.init_file="a"')
    with pytest.raises(FedForwardError, match=r"data\.public = 'a' is read by `fedforward align`"):
        run_toml(tmp_path, 'data.public="a"')


def test_sites_have_the_same_mask(tmp_path: Path, three: dict[str, Site]) -> None:
    """Two sites have the file and one has another; without one a site refuses the terms."""
    from fedforward.core.batches import TokenBatch
    from fedforward.models.lora import LoraModel
    from fedforward.models.masks import sensitivity_mask

    model = LoraModel.from_pretrained(DEMO_MODEL, rank=2, device="cpu", seed=5)
    tokens = np.arange(3, 40)[None]
    for name, density in (("one", 0.01), ("other", 0.02)):
        made = sensitivity_mask(model, [TokenBatch(tokens, tokens.copy())], density)
        (tmp_path / f"{name}.safetensors").write_bytes(made.data)
    for name, file in (("a", "one"), ("b", "one"), ("c", "other")):
        path = str(tmp_path / f"{file}.safetensors")
        three[name] = party(tmp_path, name, method__mask_file=path)
    settings = run_toml(tmp_path, "run.seed=5", 'method.mask="file"')
    summary = carry_out(settings, tmp_path / "out", Direct(three))
    header = Ledger(tmp_path / "out/ledger.sqlite").header
    tuning = [site.tuning for site in three.values()]
    same = [["file", part.identity.mask] == header["mask"] for part in tuning if part]
    assert same == [True, True, False]
    base, one = str(DEMO_MODEL), str(tmp_path / "one.safetensors")
    with pytest.raises(FedForwardError, match="Give --mask-file FILE"):
        replay.verify(tmp_path / "out", base)
    result = replay.verify(tmp_path / "out", base, mask_file=one)
    assert result.differences == [] and result.state_digest == summary["state_digest"]
    hello = Envelope(MessageKind.HELLO, b"12345678", encode_json({"terms": sites.terms(settings)}))
    answer = Envelope.decode(party(tmp_path, "a").answer(hello.encode()))
    assert said(answer) == Refusal(RefusalCode.TERMS, ("method.mask", "method.mask_file"))
    with pytest.raises(FedForwardError, match=r"method\.mask_file = 'a': each site has the file"):
        run_toml(tmp_path, 'method.mask="file"', 'method.mask_file="a"')
