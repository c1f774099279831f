"""Envelopes: encoded, decoded again bit for bit, and refused if anything is wrong."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedforward.core.errors import MessageError
from fedforward.core.identity import ModelIdentity
from fedforward.deployment.site_metrics import SiteMetrics, combined, weighted_mean
from fedforward.directions import VERSION, Layout
from fedforward.messages import envelope as envelopes
from fedforward.messages.codec import WIRE_VERSION
from fedforward.messages.envelope import (
    RUN_BYTES,
    Enrollment,
    Envelope,
    MessageKind,
    deviation,
    difference,
    encode_json,
)

RUN = bytes(range(RUN_BYTES))
LAYOUT = Layout.of({"a": (700,), "b": (50, 60)}, {"0": ["b"], "1": ["a"]})
MODEL = ModelIdentity(LAYOUT, base="ab" * 32, classes=(), state_bytes=14800, tokenizer="cd" * 32)
ENROLLMENT = Enrollment("north", MODEL, examples=20, heldout=4, rounds=3, active_blocks=2)


@pytest.mark.parametrize("kind", list(MessageKind))
@given(run=st.binary(min_size=RUN_BYTES, max_size=RUN_BYTES), body=st.binary(max_size=300))
def test_a_letter_is_opened_as_it_was_encoded(kind: MessageKind, run: bytes, body: bytes) -> None:
    message = Envelope(kind, run, body)
    assert Envelope.decode(message.encode()) == message


def test_every_flipped_bit_is_refused() -> None:
    whole = Envelope(MessageKind.ENROLLMENT, RUN, ENROLLMENT.encode()).encode()
    for place in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        with pytest.raises(MessageError):
            Envelope.decode(bytes(flipped))


def test_every_truncation_and_every_addition_is_refused() -> None:
    whole = Envelope(MessageKind.TASK, RUN, b"what is to be done").encode()
    for size in range(len(whole)):
        with pytest.raises(MessageError):
            Envelope.decode(whole[:size])
    for end in range(256):
        with pytest.raises(MessageError):
            Envelope.decode(whole + bytes([end]))
    with pytest.raises(MessageError, match="cut short"):
        Envelope.decode(b"")


@given(data=st.binary(max_size=200))
def test_noise_is_refused(data: bytes) -> None:
    with pytest.raises(MessageError):
        Envelope.decode(data)
    with pytest.raises(MessageError):
        Envelope.decode(b"FL" + bytes([envelopes.ENVELOPE_VERSION]) + data)


def encoded(head: bytes) -> bytes:
    """A message whose checksum is right, whatever its head is."""
    content = head + RUN + b"{}"
    return content + envelopes.checksum(content)


def test_another_version_kind_or_origin_is_told_apart() -> None:
    version = envelopes.ENVELOPE_VERSION
    assert (
        Envelope.decode(encoded(bytes([*b"FL", version, MessageKind.METRICS]))).kind
        is MessageKind.METRICS
    )
    with pytest.raises(MessageError, match=rf"version {version + 1} .* speaks {version}"):
        Envelope.decode(encoded(bytes([*b"FL", version + 1, MessageKind.METRICS])))
    with pytest.raises(MessageError, match="kind 99 was refused"):
        Envelope.decode(encoded(bytes([*b"FL", version, 99])))
    with pytest.raises(MessageError, match="not fedforward's"):
        Envelope.decode(encoded(bytes([*b"XY", version, MessageKind.METRICS])))
    with pytest.raises(MessageError, match="altered or damaged"):
        Envelope.decode(encoded(bytes([*b"FL", version, MessageKind.METRICS]))[:-1] + b"\0")


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1, 2]", b"3", b'"text"', b"null", b"\xff\xfe", b"{'a': 1}", b"\x80{}"]
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(MessageError, match="kind METRICS was refused"):
        Envelope(MessageKind.METRICS, RUN, body).json()


def test_json_nested_too_deeply_is_refused() -> None:
    with pytest.raises(MessageError, match="kind METRICS was refused"):
        Envelope(MessageKind.METRICS, RUN, b"[" * 200_000).json()


def test_json_and_text_come_back() -> None:
    content = {"a": [1, 2.5, None], "b": "größer"}
    assert Envelope(MessageKind.METRICS, RUN, encode_json(content)).json() == content
    assert b" " not in encode_json(content)
    assert Envelope(MessageKind.REJECT, RUN, "zu groß".encode()).text() == "zu groß"
    assert "a\ufffd" in Envelope(MessageKind.REJECT, RUN, b"a\xff").text()
    # It is shown in another party's terminal.
    assert Envelope(MessageKind.REJECT, RUN, b"a\x1b[2J\nb").text() == "a [2J b"
    assert (
        len(Envelope(MessageKind.REJECT, RUN, b"a" * 10**6).text()) == envelopes.MAX_SENTENCE_BYTES
    )


@pytest.mark.parametrize("active", [None, 1, 2])
def test_an_enrolment_comes_back(active: int | None) -> None:
    enrollment = replace(ENROLLMENT, active_blocks=active)
    found = Enrollment.decode(json.loads(enrollment.encode()))
    assert found == enrollment
    assert found.model.layout.fingerprint == LAYOUT.fingerprint
    classes = replace(ENROLLMENT, model=replace(MODEL, classes=("no", "yes")))
    assert Enrollment.decode(json.loads(classes.encode())) == classes


def content() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ENROLLMENT.encode())
    return found


def test_an_enrolment_that_lacks_anything_is_refused() -> None:
    for key in content():
        part = content()
        del part[key]
        with pytest.raises(MessageError, match="refused"):
            Enrollment.decode(part)
    for key in content()["model"]:
        part = content()
        del part["model"][key]
        with pytest.raises(MessageError, match=f"An enrollment was refused: .*{key}"):
            Enrollment.decode(part)
    with pytest.raises(MessageError):
        Enrollment.decode({})


BAD_COUNTS = [None, -1, 2**63, 10**30, 1.5, 3.0, True, "3", [], {}, math.nan]


@pytest.mark.parametrize("key", ["examples", "heldout", "rounds", "active_blocks"])
def test_an_enrolment_with_a_wrong_count_is_refused(key: str) -> None:
    # Without a number of active blocks a site has all of them.
    for value in BAD_COUNTS[key == "active_blocks" :]:
        with pytest.raises(MessageError, match=r"An enrollment was refused: .*is not a count"):
            Enrollment.decode({**content(), key: value})


@pytest.mark.parametrize("value", BAD_COUNTS, ids=repr)
def test_a_model_with_a_wrong_size_is_refused(value: Any) -> None:
    part = content()
    part["model"]["state_bytes"] = value
    with pytest.raises(MessageError, match="is not a count"):
        Enrollment.decode(part)


def layouts() -> dict[str, Callable[[list[Any]], Any]]:
    """Ways to spoil [names, shapes, blocks, owners]."""

    def changed(part: int, value: Any) -> Callable[[list[Any]], Any]:
        return lambda layout: [*layout[:part], value, *layout[part + 1 :]]

    return {
        "no list": lambda layout: None,
        "text": lambda layout: "abcd",
        "three parts": lambda layout: layout[:3],
        "five parts": lambda layout: [*layout, []],
        "no tensors": lambda layout: [[], [], ["0", "1"], []],
        "unsorted": changed(0, ["b", "a"]),
        "twice": changed(0, ["a", "a"]),
        "a name too few": changed(0, ["a"]),
        "a shape too many": changed(1, [[700], [50, 60], [1]]),
        "an empty tensor": changed(1, [[700], [0, 60]]),
        "a negative size": changed(1, [[700], [-50, -60]]),
        "a huge size": changed(1, [[700], [2**63, 1]]),
        "a size that is text": changed(1, [["700"], [50, 60]]),
        "a shape that is a number": changed(1, [700, [50, 60]]),
        "shapes that are nothing": changed(1, None),
        "an unknown block": changed(3, [0, 2]),
        "a negative block": changed(3, [0, -1]),
        "a block that is text": changed(3, ["0", "1"]),
        "no blocks": changed(2, []),
        "blocks that are a number": changed(2, 2),
        "owners that are nothing": changed(3, None),
    }


@pytest.mark.parametrize("spoil", list(layouts()))
def test_a_spoilt_layout_is_refused(spoil: str) -> None:
    part = content()
    part["model"]["layout"] = layouts()[spoil](part["model"]["layout"])
    with pytest.raises(MessageError, match="An enrollment was refused"):
        Enrollment.decode(part)


@pytest.mark.parametrize("value", [None, 3, "text", [], [1]], ids=repr)
def test_a_model_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(MessageError, match="An enrollment was refused"):
        Enrollment.decode({**content(), "model": value})


@pytest.mark.parametrize(
    ("key", "value"),
    [("base", 5), ("base", None), ("tokenizer", ["x"]), ("classes", "ab"), ("classes", [1, 2])],
)
def test_a_model_with_parts_of_another_type_is_refused(key: str, value: Any) -> None:
    part = content()
    part["model"][key] = value
    with pytest.raises(MessageError, match="An enrollment was refused"):
        Enrollment.decode(part)


@pytest.mark.parametrize(
    ("key", "mine"), [("direction_version", VERSION), ("wire_version", WIRE_VERSION)]
)
def test_another_version_of_directions_or_messages_is_a_sentence(key: str, mine: Any) -> None:
    for other in ("another", None, -1):
        words = f"A site of {key.replace('_', ' ')} {other!r} was refused; this server has {mine}"
        with pytest.raises(MessageError, match=words):
            Enrollment.decode({**content(), key: other})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"base": "00" * 32}, "other weights"),
        ({"tokenizer": ""}, "tokenizer"),
        ({"layout": Layout.of({"a": (700,), "b": (50, 60)})}, "names, shapes or blocks"),
        ({"classes": ("no", "yes")}, "other classes"),
        ({"state_bytes": 7400}, "another size"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_two_models_have_not_in_common_is_named(change: Any, words: str) -> None:
    assert words in difference(replace(MODEL, **change), MODEL)


def test_models_that_agree_have_no_difference() -> None:
    assert difference(Enrollment.decode(content()).model, MODEL) == ""


def test_the_weighted_mean() -> None:
    assert weighted_mean([1.0, 4.0], [3, 1]) == 1.75
    assert math.isnan(weighted_mean([], [])) and math.isnan(weighted_mean([1.0], [0]))
    assert math.isnan(weighted_mean([1.0, math.nan], [1, 1]))


METRICS = {"rounds": 2, "digest": "ab", "examples": 3, "tokens": 5, "heldout_loss": 1.5}


@pytest.mark.parametrize(
    "change",
    [
        {"rounds": None},
        {"rounds": -1},
        {"rounds": True},
        {"digest": "xy"},
        {"digest": 5},
        {"examples": 2**60},
        {"tokens": 1.0},
        {"heldout_loss": "1"},
        {"heldout_loss": 10**400},
        {"heldout_loss": True},
        {"metrics": [1]},
        {"metrics": {"f1": {}}},
    ],
)
def test_figures_that_are_none_are_refused(change: dict[str, Any]) -> None:
    assert SiteMetrics.decode(METRICS).loss == 1.5
    with pytest.raises(MessageError, match="Metrics were refused"):
        SiteMetrics.decode({**METRICS, **change})
    with pytest.raises(MessageError, match="Metrics were refused"):
        SiteMetrics.decode(
            {k: v for k, v in METRICS.items() if k not in {"tokens"} | change.keys()}
        )


def test_a_site_that_diverged_is_left_out_as_long_as_another_is_there() -> None:
    """null stands for what is not finite."""
    sound, lost = SiteMetrics.decode(METRICS), SiteMetrics.decode({**METRICS, "heldout_loss": None})
    assert combined([lost, sound])["heldout_loss"] == 1.5
    assert math.isnan(combined([lost, lost])["heldout_loss"])
    place = {key: METRICS[key] for key in ("rounds", "digest", "examples", "tokens")}
    assert combined([SiteMetrics.decode(place)]) == {} == combined([])


def test_what_a_site_has_other_than_a_ledger() -> None:
    pinned = {"base": "a", "tokenizer": "b", "run": "c"}
    assert deviation(pinned, None) == deviation(pinned, {**pinned, "more": 1}) == ""
    assert "other weights" in deviation({**pinned, "base": "x"}, pinned)
    assert "tokenizer" in deviation({**pinned, "tokenizer": "x"}, pinned)
    assert "settings" in deviation({**pinned, "run": "x"}, pinned)
