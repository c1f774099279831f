"""A refusal is a code and names of keys, whatever it is made of."""

import json

import pytest

from fedforward.core.errors import MessageError
from fedforward.messages.refusal import MAX_KEYS, MAX_REFUSAL_BYTES, Refusal, RefusalCode


@pytest.mark.parametrize("code", list(RefusalCode))
def test_what_is_sent_is_what_is_read(code: RefusalCode) -> None:
    refusal = Refusal(code, ("lora.rank", "data.answer_tokens"))
    assert Refusal.decode(refusal.encode()) == refusal
    assert json.loads(refusal.encode()) == {"code": str(code), "keys": list(refusal.keys)}
    assert "(lora.rank, data.answer_tokens)" in refusal.sentence
    assert "(" not in Refusal(code).sentence and Refusal(code).sentence.endswith("says why.")


def test_a_refusal_is_short() -> None:
    many = Refusal.of(RefusalCode.TERMS, [f"planning.{'x' * 30}{c}" for c in "abcdefghijk"] * 2)
    assert len(many.keys) == MAX_KEYS and len(many.encode()) <= MAX_REFUSAL_BYTES
    assert Refusal.of(RefusalCode.TERMS, ["a.b", "a.b"]).keys == ("a.b",)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no room",
        b"[]",
        b"null",
        b'{"code":"other","keys":[]}',
        b'{"code":["limits"],"keys":[]}',
        b'{"code":"limits"}',
        b'{"code":"limits","keys":"a.b"}',
        b'{"code":"limits","keys":[3]}',
        b'{"code":"limits","keys":["HIV positive"]}',
        b'{"code":"limits","keys":["data./home/me"]}',
        b'{"code":"limits","keys":[],"why":"words"}',
        b'{"code":"limits","keys":["a.b","a.b","a.b","a.b","a.b","a.b","a.b","a.b","a.b"]}',
        b'{"code":"limits","keys":["a.' + b"b" * 40 + b'"]}',
        b'{"code":"limits","keys":[' + b" " * MAX_REFUSAL_BYTES + b"]}",
        b"[" * 10_000,
    ],
)
def test_words_are_no_refusal(body: bytes) -> None:
    with pytest.raises(MessageError, match="no code with keys"):
        Refusal.decode(body)
