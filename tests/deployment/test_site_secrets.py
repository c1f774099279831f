"""Nothing of a site's text leaves it: no value, no name of a field, no path, in any message."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedforward.config import site as sites
from fedforward.config.sections import DataSection
from fedforward.core.errors import MessageError
from fedforward.deployment.site import Site
from fedforward.messages.envelope import Envelope, MessageKind
from fedforward.messages.refusal import Refusal, RefusalCode
from fedforward.messages.task import Task
from tests.conftest import DEMO_MODEL
from tests.support.coordinator import World, configured
from tests.support.sites import party, run_toml

RUN = b"12345678"
#: In every value, name of a field, label and path of the planted site.
SECRET = "Zq7MuellerHIV"
RELEASED = ["question", "answer", "label"]


def hello(terms: Any) -> bytes:
    return Envelope(MessageKind.HELLO, RUN, json.dumps({"terms": terms}).encode()).encode()


def refusal(answer: bytes) -> Refusal:
    envelope = Envelope.decode(answer)
    assert envelope.kind is MessageKind.REFUSAL
    return Refusal.decode(envelope.body)


@pytest.mark.parametrize(
    ("changes", "code", "keys"),
    [
        ({"model__path": "{}/secret model"}, "model", ("model.path",)),
        ({"model__path": "{}/modle"}, "model", ("model.path",)),
        ({"model__path": "{}/broken"}, "model", ("model.path",)),
        ({"model__path": "./broken"}, "model", ("model.path",)),
        ({"model__path": "~/secret/model"}, "model", ("model.path",)),
        ({"model__path": "C:\\secret\\model"}, "model", ("model.path",)),
        ({"data__source": "{}/secret.jsonl"}, "data", ()),
        ({"data__source": "secret/../secret.jsonl"}, "data", ()),
    ],
)
def test_a_refusal_has_no_path(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, str],
    code: str,
    keys: tuple[str, ...],
) -> None:
    """The site's log has the whole sentence."""
    caplog.set_level("INFO", "fedforward.deployment")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    broken = shutil.copytree(DEMO_MODEL, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"\xff" * 100)
    own = {key: text.replace("{}", str(tmp_path)) for key, text in changes.items()}
    answer = party(tmp_path, "a", **own).answer(hello(sites.terms(run_toml(tmp_path))))
    assert refusal(answer) == Refusal(RefusalCode(code), keys)
    assert next(iter(own.values())) in caplog.text.replace("\\\\", "\\")


def planted(folder: Path, **changes: Any) -> Site:
    """A site whose rows, names of fields, labels and paths all hold the secret."""
    place = folder / SECRET
    place.mkdir(exist_ok=True)
    rows = [
        {
            "question": f"{SECRET} asks {number}?",
            "answer": f"{SECRET}{number} is the answer.",
            "label": f"{SECRET}{number % 2}",
            f"{SECRET}field": f"{SECRET} value {number}",
            "messages": [
                {"role": "user", "content": f"{SECRET} says"},
                {"role": "assistant", "content": f"{SECRET} replies {number}"},
            ],
        }
        for number in range(24)
    ]
    source = place / f"{SECRET}.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    model = place / f"{SECRET}-model"
    if not model.exists():
        shutil.copytree(DEMO_MODEL, model)
    content: dict[str, Any] = {
        "site": {"out": str(place / "out"), "name": "north"},
        "model": {"path": str(model)},
        "data": {"source": str(source)},
        "run": {"threads": 1},
        "limits": {"fields": RELEASED, "head": ["causal", "classification"], "terms": 10**6},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        content[section][name] = value
    return Site(sites.validate_as(sites.SiteConfig, content, "site.toml"))


def check(answer: bytes) -> Envelope:
    """A reply has nothing of the secret, in any spelling that a program would make of it."""
    for text in (SECRET, SECRET.lower(), SECRET[::-1], SECRET.encode().hex(), "Mueller", "HIV"):
        assert text.encode() not in answer
        assert text.encode("utf-16-le") not in answer
    return Envelope.decode(answer)


def good(folder: Path) -> dict[str, Any]:
    terms: dict[str, Any] = json.loads(json.dumps(sites.terms(run_toml(folder))))
    terms["data"]["prompt"], terms["data"]["answer"] = "{question}", " {answer}"
    terms["data"]["heldout"] = 4.0
    return terms


FIELDS = ["question", "answer", "label", "messages", "messages[0].content", "nothing", "a.b"]
TEMPLATES = st.lists(
    st.one_of(
        st.sampled_from([*FIELDS, f"{SECRET[:3]}x"]).map(lambda name: "{" + name + "}"),
        st.sampled_from(["{?label}x{/label}", "{^label}y{/label}", "{", "{{x}}", " Q: ", "{!r}"]),
    ),
    min_size=1,
    max_size=4,
).map("".join)
JUNK = st.one_of(st.none(), st.integers(-2, 2**40), st.text(max_size=5), st.just([]), st.just({}))
#: Changes of single keys of good terms, legal ones first.
CHANGES = st.one_of(
    st.tuples(st.sampled_from(["data.prompt", "data.answer"]), TEMPLATES),
    st.tuples(st.just("data.chat"), st.sampled_from([None, *FIELDS, "alpaca"])),
    st.tuples(
        st.just("data.label_words"),
        st.sampled_from([None, {"0": " a", "1": " b"}, {"x": "y"}]),
    ),
    st.tuples(st.just("data.classes"), st.sampled_from([None, ["a", "b"], ["a"], "a"])),
    st.tuples(st.just("model.head"), st.sampled_from(["causal", "classification"])),
    st.tuples(st.just("data.heldout"), st.sampled_from([1.0, 4.0, 0.5, 30.0, -1.0])),
    st.tuples(st.just("data.sequence_length"), st.sampled_from([1, 4, 32, 10**6])),
    st.tuples(
        st.just("evaluation.metrics"),
        st.sampled_from([[], ["exact-match"], ["accuracy"], ["os:getcwd"], "f1"]),
    ),
    st.tuples(st.just("method.objective"), st.sampled_from([None, "loss", "choice", "f1"])),
    st.tuples(
        st.sampled_from(
            ["federation.field", "federation.partition", "method.name", "run.seed", "lora.targets"]
        ),
        JUNK,
    ),
)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(changes=st.lists(CHANGES, max_size=3))
def test_no_terms_make_a_site_send_its_text(tmp_path: Path, changes: list[tuple[str, Any]]) -> None:
    site = planted(tmp_path)
    terms = good(tmp_path)
    for key, value in changes:
        section, _, name = key.partition(".")
        terms[section][name] = value
    answer = check(site.answer(hello(terms)))
    assert answer.kind in (MessageKind.ENROLLMENT, MessageKind.REFUSAL)
    if answer.kind is MessageKind.REFUSAL:
        Refusal.decode(answer.body)
        return
    for kind in (MessageKind.TASK, MessageKind.EVALUATION, MessageKind.FINALIZE):
        task = Task(0, 0, 1e-3, True, ())
        check(site.answer(Envelope(kind, RUN, task.encode()).encode()))
    check(site.answer(Envelope(MessageKind.SNAPSHOT_REQUEST, RUN).encode()))


def test_a_classifiers_classes_are_never_a_sites_values(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With the default limits there is no such head; with any, names come from a configuration."""
    terms = good(tmp_path)
    terms["model"]["head"], terms["data"]["answer"] = "classification", "{answer}"
    closed = planted(tmp_path, limits__head=["causal"])
    assert refusal(closed.answer(hello(terms))) == Refusal(RefusalCode.LIMITS, ("model.head",))
    site = planted(tmp_path)
    found = refusal(site.answer(hello(terms)))
    assert found.code is RefusalCode.TERMS and "data.classes" in found.keys
    # The classes of the terms are not those of the data: which are, stays here.
    terms["data"]["classes"] = ["yes", "no"]
    answer = site.answer(hello(terms))
    check(answer)
    assert refusal(answer) == Refusal(RefusalCode.DATA)
    assert f"data.classes has no '{SECRET}" in caplog.text
    terms["data"]["classes"] = None
    own = planted(tmp_path, data__classes=["yes", "no"], data__fields={"answer": "kind"})
    rows = Path(str(own.settings.data.source))
    text = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    kinds = [{**row, "kind": ("yes", "no")[n % 2]} for n, row in enumerate(text)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in kinds), encoding="utf-8")
    enrolled = check(own.answer(hello(terms)))
    assert enrolled.json()["model"]["classes"] == ["yes", "no"]


def test_conversations_that_nobody_named_are_not_read(tmp_path: Path) -> None:
    terms = json.loads(json.dumps(sites.terms(run_toml(tmp_path))))
    for key in ("prompt", "answer"):
        terms["data"][key] = DataSection.model_fields[key].default
    site = planted(tmp_path, limits__fields=["instruction", "input", "output"])
    assert refusal(site.answer(hello(terms))) == Refusal(RefusalCode.DATA)


def test_terms_are_looked_at_only_so_often(tmp_path: Path) -> None:
    """Each change of terms asks the data another question."""
    site, terms = planted(tmp_path, limits__terms=2), good(tmp_path)
    for seed, wanted in ((0, True), (1, True), (1, True), (2, False), (1, True), (3, False)):
        terms["run"]["seed"] = seed
        answer = site.answer(hello(terms))
        if wanted:
            assert Envelope.decode(answer).kind is MessageKind.ENROLLMENT
        else:
            assert refusal(answer) == Refusal(RefusalCode.LIMITS, ("limits.terms",))


def test_a_secret_site_in_a_whole_run(tmp_path: Path) -> None:
    """Neither messages nor the server's files hold anything of a site's text."""
    found = World(tmp_path / "run", configured(), None, "abc", {})
    for name in "ab":
        source = Path(str(found.settings(name).data.source))
        rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
        fields = found.settings(name).limits.fields
        marked = [{**r, **{f: f"{SECRET} {r[f]}" for f in fields}, SECRET: SECRET} for r in rows]
        source.write_text("".join(json.dumps(r) + "\n" for r in marked), encoding="utf-8")
        found.inside[name] = Site(found.inside[name].settings)
    found.run()
    assert found.transport.answers
    for _, kind, body in found.transport.answers:
        check(Envelope(kind, RUN, body).encode())
    for path in found.out.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("kind", list(MessageKind))
def test_an_unforeseen_error_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: MessageKind
) -> None:
    site = planted(tmp_path)

    def fails(*_: object) -> None:
        raise RuntimeError(SECRET)

    monkeypatch.setattr(site, "_answer", fails)
    answer = site.answer(Envelope(kind, RUN, b"").encode())
    check(answer)
    assert refusal(answer) == Refusal(RefusalCode.UNFORESEEN)
    monkeypatch.setattr(site, "_answer", lambda _: (_ for _ in ()).throw(MessageError(SECRET)))
    assert refusal(site.answer(Envelope(kind, RUN, b"").encode())).code is RefusalCode.MESSAGE
