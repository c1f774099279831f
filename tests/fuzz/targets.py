"""What is fuzzed: functions of bytes from others, each of which may end in a sentence or a value.

A target raises nothing for bytes that are only wrong. What it raises is a crash: an error that is
no `FedForwardError`, or an `AssertionError` where two readings of the same bytes differ. Checksums,
headers and chains are made to fit here, so that what lies behind them is met.
"""

import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from fedforward.cli.message_dump import listing
from fedforward.core.errors import FedForwardError
from fedforward.messages import envelope as envelopes
from fedforward.messages.codec import HEADER, MAGIC, WIRE_VERSION, Message
from fedforward.messages.entry import Entry
from fedforward.messages.envelope import Envelope, MessageKind
from fedforward.messages.report import ClientResult, Report, decode_results
from fedforward.messages.secure import (
    MaskedReport,
    SumKeys,
    SumOpened,
    SumOpening,
    SumRoster,
    SumShares,
    SumStart,
    SumTask,
    Total,
)
from fedforward.messages.snapshot import Snapshot
from fedforward.messages.task import Task
from tests.fuzz.mutators import mutated_bytes, mutated_json, mutated_toml

Mutate = Callable[[bytes, random.Random], bytes | None]
SUMS: tuple[type[Message], ...] = (
    SumStart,
    SumKeys,
    SumRoster,
    SumShares,
    SumTask,
    MaskedReport,
    SumOpening,
    SumOpened,
    Total,
)
RUN = b"8 bytes."


@dataclass(frozen=True)
class Target:
    """One thing that is fuzzed.

    Attributes:
        run: takes bytes, and raises only for a crash.
        mutate: keeps the form of the bytes; None where it cannot.
        weight: share of the time of a run of all targets.
    """

    run: Callable[[bytes], None]
    mutate: Mutate = mutated_bytes
    weight: int = 1


def sealed(kind: int, body: bytes, run: bytes = RUN) -> bytes:
    """An envelope whose checksum fits, of any kind."""
    head = envelopes.ENVELOPE_FORM.pack(b"FL", envelopes.ENVELOPE_VERSION, kind % 256, run)
    return head + body + envelopes.checksum(head + body)


def whole(kind: type[Message], body: bytes) -> bytes:
    """A message with its header in front."""
    head = HEADER.pack(MAGIC, WIRE_VERSION, kind.KIND) if kind.KIND else b""
    return head + body


def message(kind: type[Message], data: bytes) -> None:
    """The body of a message: what can be decoded has one form, and every byte is listed."""
    with suppress(FedForwardError):
        found = kind.decode(whole(kind, data))
        again = found.encode()
        assert kind.decode(again).encode() == again
        if again[-1:] < b"\x10":
            # It is for people and takes long; some are enough.
            assert b"".join(part.data for part in kind.listing(again)) == again


def sums(data: bytes) -> None:
    """A message of secure sums; the first byte says which."""
    if data:
        message(SUMS[data[0] % len(SUMS)], data[1:])


def results(data: bytes) -> None:
    """What a row of a ledger says of a round's reports."""
    with suppress(FedForwardError):
        found = list(decode_results(data))
        again = b"".join(part.encode() for part in found)
        assert b"".join(part.encode() for part in decode_results(again)) == again


def envelope(data: bytes) -> None:
    """Bytes from the network, as they are; and with the first as kind and a checksum that fits."""
    with suppress(FedForwardError):
        Envelope.decode(data)
    if data:
        with suppress(FedForwardError):
            made = sealed(data[0], data[1:])
            found = Envelope.decode(made)
            found.text()
            assert found.encode() == made
            assert b"".join(part.data for part in listing(made)) == made


def enrollment(data: bytes) -> None:
    """What a site says of itself."""
    from fedforward.messages.envelope import Enrollment, difference

    with suppress(FedForwardError):
        found = Enrollment.decode(Envelope(MessageKind.ENROLLMENT, RUN, data).json())
        again = Enrollment.decode(Envelope(MessageKind.ENROLLMENT, RUN, found.encode()).json())
        assert again == found and difference(found.model, again.model) == ""
        hash(found.model)


def metrics(data: bytes) -> None:
    """What a site says that it measured, alone and with others."""
    from fedforward.deployment.site_metrics import SiteMetrics, combined

    with suppress(FedForwardError):
        found = SiteMetrics.decode(Envelope(MessageKind.METRICS, RUN, data).json())
        found.complete(["accuracy"])
        one = SiteMetrics(1, "00", 2, 3, 0.5, dict.fromkeys(found.metrics, 0.5))
        for answers in ([found], [found, one], [one, found, one]):
            if found.loss is not None:
                combined(answers)


def refusal(data: bytes) -> None:
    """What a site says when it will not do something."""
    from fedforward.messages.refusal import Refusal

    with suppress(FedForwardError):
        found = Refusal.decode(data)
        assert Refusal.decode(found.encode()) == found
        assert found.sentence.isprintable()


@lru_cache
def _site_settings() -> Any:
    from fedforward.config.loading import validate_as
    from fedforward.config.site import SiteConfig

    content = {
        "model": {"path": "model"},
        "data": {"source": "rows.jsonl"},
        "limits": {"fields": ["question", "answer"], "head": ["causal", "classification"]},
    }
    return validate_as(SiteConfig, content, "site.toml")


def hello(data: bytes) -> None:
    """A server's terms, as far as a site looks at them before it loads a model."""
    from fedforward.config.site import join, terms
    from fedforward.deployment.limits import refusals
    from fedforward.training.assembly import build_method

    with suppress(FedForwardError):
        given = Envelope(MessageKind.HELLO, RUN, data).json()
        if refusals(given, _site_settings()):
            return
        config = join(given, _site_settings())
        build_method(config)
        terms(config)


def template(data: bytes) -> None:
    """A template of a prompt, and a path of a conversation."""
    from fedforward.data import chat
    from fedforward.data.templates import Template

    text = data.decode("utf-8", "surrogateescape")
    with suppress(FedForwardError):
        found = Template.parse(text, "data.prompt")
        assert all(isinstance(path, str) for path in found.paths)
    with suppress(FedForwardError):
        chat.paths(text)


def _later(name: str) -> Callable[[bytes], None]:
    """A target of another module, whose imports take long."""

    def run(data: bytes) -> None:
        from tests.fuzz import file_targets, live_targets

        found = getattr(live_targets, name, None) or getattr(file_targets, name)
        found(data)

    return run


def _after_first(mutate: Mutate) -> Mutate:
    """A mutation of all but the first byte."""

    def mutated(data: bytes, chance: random.Random) -> bytes | None:
        found = mutate(data[1:], chance)
        return None if found is None else data[:1] + found

    return mutated


TARGETS: dict[str, Target] = {
    "task": Target(partial(message, Task)),
    "report": Target(partial(message, Report)),
    "entry": Target(partial(message, Entry)),
    "snapshot": Target(partial(message, Snapshot)),
    "client_result": Target(partial(message, ClientResult)),
    "sums": Target(sums),
    "results": Target(results),
    "envelope": Target(envelope),
    "enrollment": Target(enrollment, mutated_json),
    "metrics": Target(metrics, mutated_json),
    "refusal": Target(refusal, mutated_json),
    "hello": Target(hello, mutated_json),
    "template": Target(template),
    "site": Target(_later("site"), weight=2),
    "server": Target(_later("server"), weight=2),
    "sum_session": Target(_later("sum_session")),
    "sum_party": Target(_later("sum_party")),
    "proxy_head": Target(_later("proxy_head")),
    "ledger_rows": Target(_later("ledger_rows"), weight=2),
    "ledger_file": Target(_later("ledger_file")),
    "run_files": Target(_later("run_files"), _after_first(mutated_json)),
    "config": Target(_later("config"), mutated_toml),
    "site_config": Target(_later("site_config"), mutated_toml),
    "rows": Target(_later("rows")),
}
