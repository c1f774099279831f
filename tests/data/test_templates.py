"""Templates, and how they reach into rows."""

from typing import Any

import pytest

from fedforward.core.errors import FedForwardError
from fedforward.data.readers import parse_json
from fedforward.data.templates import Template
from fedforward.data.values import plain, reach, steps, text_of


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{q", "expected '}'"),
        ("q}", "Single '}'"),
        ("{}", "a field needs a name"),
        ("{?}x{/}", "a field needs a name"),
        ("{q:>d}", "only a name may stand between braces, as in {q}"),
        ("{q:}{q!r}", "only a name"),
        ("{q!r:{a}}", "only a name"),
        ("{?q}x", "the part that begins with the field q does not end"),
        ("{?q}{^a}x{/q}{/a}", "{/q} ends a part where {/a} was to end"),
        ("x{/q}", "{/q} ends a part where nothing was to end"),
    ],
)
def test_templates_that_are_refused(template: str, words: str) -> None:
    with pytest.raises(FedForwardError) as caught:
        Template.parse(template, "data.prompt")
    assert words in str(caught.value) and "data.prompt" in str(caught.value)


ALPACA = "{?input}Use: {input}\n{/input}{^input}Alone. {/input}{q}"


@pytest.mark.parametrize(
    ("template", "values", "text"),
    [
        ("{{{q}}} {a}|{a b}", {"q": "{a}", "a": None, "a b": "3"}, "{{a}} |3"),
        (ALPACA, {"q": "x", "input": "y"}, "Use: y\nx"),
        (ALPACA, {"q": "x", "input": None}, "Alone. x"),
        (ALPACA, {"q": "x", "input": " \n"}, "Alone. x"),
        ("{?a}({?b}{b}{/b}){/a}", {"a": "1", "b": "2"}, "(2)"),
        ("{?a}({?b}{b}{/b}){/a}", {"a": "1", "b": ""}, "()"),
        ("{?a}({?b}{b}{/b}){/a}", {"a": "", "b": "2"}, ""),
        ("{?m[0].x}{m[0].x}{/m[0].x}", {"m[0].x": "deep"}, "deep"),
    ],
)
def test_templates_are_filled(template: str, values: dict[str, str | None], text: str) -> None:
    assert Template.parse(template, "data.prompt").fill(values) == text


def test_the_paths_of_a_template() -> None:
    template = Template.parse("{b}{?a}{c[0]}{b}{/a}", "data.prompt")
    assert template.paths == ["b", "a", "c[0]"] and template.shown == ["b", "c[0]"]


ROW = """{"q": "x", "a.text": "whole", "a": {"text": ["It is 8.", 7], "none": null},
"turns": [{"content": "first"}, {"content": "last"}], "empty": [], "n": 5.0, "on": true,
"pair": {"k": 1, "k": 2}, "half": "\\ud800", "emoji": "\\ud83d\\ude00"}"""


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("q", "x"),
        ("a.text", "whole"),
        ("a.text[0]", "It is 8."),
        ("a.text[1]", "7"),
        ("a.none", None),
        ("a.none.deeper", None),
        ("a.gone", None),
        ("gone[3]", None),
        ("turns[-1].content", "last"),
        ("turns[0].content", "first"),
        ("n", "5.0"),
        ("on", "true"),
        ("emoji", "😀"),
    ],
)
def test_paths_reach_into_rows(path: str, text: str | None) -> None:
    assert text_of(reach(parse_json(ROW), path, "line 1"), path, "line 1") == text


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (
            "a",
            "holds an object with the keys text, none and no text. Name what is meant, as in {a.",
        ),
        (
            "turns",
            "holds a list of 2 and no text. Name an item, as in {turns[0].content}, or say",
        ),
        ("empty", "holds a list of 0 and no text. Name an item, as in {empty[0]}."),
        ("turns[2].content", "asks for item 2 of turns, which has 2"),
        ("empty[-1]", "asks for item -1 of empty, which has 0"),
        ("turns.content", "goes into turns, which is a list of 2"),
        ("q.x", "goes into q, which is text"),
        ("n[0]", "goes into n, which is a number"),
        ("a[0]", "goes into a, which is an object with the keys text, none"),
        ("pair.k", "has the key 'k' more than once"),
        ("half", "half of a surrogate pair"),
    ],
)
def test_values_that_are_refused(path: str, words: str) -> None:
    with pytest.raises(FedForwardError) as caught:
        text_of(reach(parse_json(ROW), path, "line 7"), path, "line 7")
    assert words in str(caught.value) and str(caught.value).startswith("line 7")


@pytest.mark.parametrize("path", ["", ".a", "[0]", "a..b", "a[x]", "a[0", "a]"])
def test_what_is_no_path_is_a_name(path: str) -> None:
    assert steps(path) == ()
    assert reach({path: "x"}, path, "") == "x" and reach({"a": "y"}, path, "") is None


def test_plain_values_are_those_of_json() -> None:
    import json

    text = '{"a": [1, 2.50, 1e3, {"b": -7}], "c": "1", "d": null, "e": NaN}'
    found: Any = plain(parse_json(text))
    assert repr(found) == repr(json.loads(text))
