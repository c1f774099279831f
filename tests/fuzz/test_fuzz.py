"""The corpus and all that ever crashed, through every target; and some mutations of each."""

import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedforward.core.errors import FedForwardError, MessageError
from fedforward.messages.codec import Message
from fedforward.messages.entry import Entry
from fedforward.messages.report import ClientResult, Report
from fedforward.messages.snapshot import Snapshot
from fedforward.messages.task import Task
from tests.fuzz import corpus
from tests.fuzz.mutators import mutated_bytes, mutated_json
from tests.fuzz.targets import SUMS, TARGETS, whole

HERE = Path(__file__).parent
#: Mutations of each piece of the corpus in every run of the tests.
MUTATIONS = 20


@pytest.fixture(autouse=True)
def log_level() -> Iterator[None]:
    """Targets keep the package quiet; tests after them are to hear it."""
    logger = logging.getLogger("fedforward")
    level = logger.level
    yield
    logger.setLevel(level)


def pieces(target: str) -> list[bytes]:
    """What is in the tree of a target."""
    folders = (HERE / "corpus" / target, HERE / "crashes" / target)
    return [
        path.read_bytes()
        for folder in folders
        if folder.is_dir()
        for path in sorted(folder.iterdir())
    ]


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_and_old_crashes_end_in_values_or_sentences(name: str) -> None:
    found = pieces(name)
    assert found
    for data in [b"", *found]:
        TARGETS[name].run(data)


@pytest.mark.parametrize("name", TARGETS)
def test_mutations_end_in_values_or_sentences(name: str) -> None:
    target, chance = TARGETS[name], random.Random(name)
    for data in pieces(name):
        for _ in range(MUTATIONS):
            made = target.mutate(data, chance)
            if made is None:
                made = mutated_bytes(data, chance)
            target.run(made)


def test_the_corpus_is_what_the_script_writes() -> None:
    made = corpus.make()
    there = {
        folder.name: {path.name: path.read_bytes() for path in folder.iterdir()}
        for folder in (HERE / "corpus").iterdir()
    }
    assert made == there, "python -m tests.fuzz.corpus writes it anew"


KINDS: dict[str, type[Message]] = {
    "task": Task,
    "report": Report,
    "entry": Entry,
    "snapshot": Snapshot,
    "client_result": ClientResult,
}


def test_the_corpus_gets_past_the_first_checks() -> None:
    """A corpus that is refused at once would let a fuzzer find nothing."""
    made = corpus.make()
    for name, kind in KINDS.items():
        for data in made[name].values():
            assert isinstance(kind.decode(whole(kind, data)), kind)
    assert {type(SUMS[d[0]].decode(whole(SUMS[d[0]], d[1:]))) for d in made["sums"].values()} == {
        *SUMS
    }


def _answers(name: str, watched: Any, attribute: str, monkeypatch: Any) -> dict[str, Any]:
    """What a function returns for each piece of a target's corpus; None where it raises."""
    inner = getattr(watched, attribute)
    results: list[Any] = []

    def noted(*arguments: Any, **options: Any) -> Any:
        results.append(None)
        results[-1] = inner(*arguments, **options)
        return results[-1]

    monkeypatch.setattr(watched, attribute, noted)
    found = {}
    for key, data in corpus.make()[name].items():
        results.clear()
        TARGETS[name].run(data)
        found[key] = list(results)
    return found


def test_live_targets_get_to_the_end(monkeypatch: Any) -> None:
    from fedforward.deployment.secure.session import SumSession
    from fedforward.deployment.site import Site
    from fedforward.federation.server import Server

    closed = _answers("server", Server, "close_round", monkeypatch)
    assert len([record for record in closed["whole"] if record is not None]) == 2
    masks = _answers("sum_session", SumSession, "masks", monkeypatch)
    assert masks["opened"][0] is not None
    reports = _answers("site", Site, "_report", monkeypatch)
    assert all(reports[name][0] is not None for name in ("plain", "again", "snapshot"))


def test_a_ledger_of_the_corpus_is_audited(monkeypatch: Any) -> None:
    from fedforward.federation.audit import Audit

    taken = _answers("ledger_rows", Audit, "_compared", monkeypatch)
    assert taken["two"] == ["", ""]


def test_a_crash_is_one() -> None:
    """The fuzzer's own test: what is raised and is no declared error comes through."""

    class Broken(Report):
        @classmethod
        def read(cls, reader: Any, prefix: str = "") -> Any:
            found = super().read(reader, prefix)
            if found.client == 77:
                raise KeyError("a defect")
            return found

    from tests.fuzz.targets import message

    data = corpus.make()["report"]["plain"]
    message(Broken, data)
    with pytest.raises(KeyError):
        message(Broken, data[:4] + (77).to_bytes(4, "little") + data[8:])
    assert issubclass(MessageError, FedForwardError)


def test_json_stays_json() -> None:
    chance = random.Random(0)
    made = [mutated_json(b'{"a": [1, {"b": "x"}]}', chance) for _ in range(50)]
    assert None not in made and len(set(made)) > 20
    assert mutated_json(b"{", chance) is None
