"""Reading configurations: what is refused and with which words, overrides, files."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedforward import config
from fedforward.config.loading import load, parse_override, validate
from fedforward.config.site import load_site
from fedforward.core.errors import FedForwardError
from tests.support.configurations import content, refusal


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"method__learning_rat": 1.0},
            ["method.learning_rat", "Did you mean method.learning_rate?"],
        ),
        ({"methd__mu": 1.0}, ["methd is not a known section", "Did you mean method?"]),
        ({"federation__clients": "3"}, ["federation.clients = '3'", "a whole number, at least 1"]),
        ({"federation__clients": True}, ["federation.clients = True", "a whole number"]),
        ({"federation__clients": 2.5}, ["federation.clients = 2.5", "a whole number"]),
        ({"federation__clients": 0}, ["federation.clients = 0", "at least 1"]),
        ({"federation__clients": 70000}, ["70000", "at most 65535"]),
        ({"model__blocks": "4-"}, ["blocks = '4-'", "'all', a range such as '8-15'"]),
        ({"model__blocks": "7-4"}, ["blocks = '7-4'", "a list of whole numbers from 0"]),
        ({"model__blocks": [-1]}, ["blocks = [-1]", "whole numbers from 0"]),
        ({"model__blocks": []}, ["blocks = []", "whole numbers from 0"]),
        ({"run__memory_budget": "6 gigs"}, ["'6 gigs' is no amount of memory", "'6 GiB'"]),
        ({"run__memory_budget": "6"}, ["'6' is no amount of memory"]),
        (
            {"run__memory_budget": "6 GiB", "run__probes_per_call": 4},
            ["memory_budget = '6 GiB' chooses probes_per_call", "set to 4"],
        ),
        ({"run__tokens_per_call": -1}, ["run.tokens_per_call = -1", "at least 0"]),
        ({"federation__participation": 1.5}, ["1.5", "above 0.0 and at most 1.0"]),
        ({"method__mu": float("nan")}, ["method.mu = nan", "a number, above 0.0"]),
        ({"method__mu": float("inf")}, ["method.mu = inf"]),
        (
            {"method__name": "fedmezzo"},
            [
                "method.name = 'fedmezzo' is not",
                "Did you mean 'fedmezo'?",
                "'fedmezo', 'fedmezo-auto'",
            ],
        ),
        ({"method__name": 3}, ["method.name = 3", "text in quotes. Allowed are 'fedmezo'"]),
        ({"method__name": "a.b:c"}, ["method.name = 'a.b:c' is not known"]),
        ({"method__estimator": "fzo"}, ["method.estimator = 'fzo'", "Did you mean 'fzoo'?"]),
        ({"method__aggregator": "bulyan"}, ["method.aggregator = 'bulyan'", "Allowed are 'mean'"]),
        (
            {"method__report_filters": ["clop:2"]},
            ["method.report_filters: 'clop:2' is not known", "Did you mean 'clip'?"],
        ),
        ({"method__report_filters": "clip"}, ["report_filters = 'clip'", "a list of texts"]),
        (
            {"method__parameters": {"tau": [1]}},
            ["method.parameters = {'tau': [1]}", "a table of numbers, texts, true and false"],
        ),
        ({"method__parameters": {"a b": 1}}, ["method.parameters: 'a b' cannot name a parameter"]),
        ({"method__parameters": {"lambda": 1}}, ["'lambda' cannot name a parameter"]),
        ({"method__client_rates": "zzz"}, ["method.client_rates = 'zzz'", "'update-difference'"]),
        (
            {"method__rate_spread": 1.0, "method__learning_rate": 1e-3},
            ["rate_spread = 1.0", "learning_rate = 0.001", "0 to learning_rate"],
        ),
        ({"method__local_steps": 40000, "method__directions": 2}, ["80000", "at most 65535"]),
        ({"data__prompt": 3}, ["data.prompt = 3", "text in quotes"]),
        ({"lora__targets": [1]}, ["lora.targets", "text or a list of texts"]),
        ({"run__seed": -1}, ["run.seed = -1", "at least 0"]),
        ({"run__seed": 2**63}, ["run.seed", "below 9223372036854775808"]),
        ({"federation__partition": "by-field"}, ["partition = 'by-field'", "federation.field"]),
        (
            {"method__objective": "rougel"},
            ["method.objective = 'rougel'", "Did you mean 'rougeL'?"],
        ),
        ({"method__objective": "a.b:"}, ["'a.b:' is not known", "'package.module:function'"]),
        ({"method__objective": 3}, ["method.objective = 3", "text in quotes"]),
        (
            {"method__objective": "accuracy"},
            ["method.objective = 'accuracy' needs data.label_words", "'exact-match', 'f1'"],
        ),
        (
            {"evaluation__metrics": ["f1", "accuracy"]},
            ["evaluation.metrics with 'accuracy' needs data.label_words"],
        ),
        (
            {"method__objective": "choice"},
            ["method.objective = 'choice' needs data.label_words", "the objective 'loss'"],
        ),
        (
            {"evaluation__metrics": ["choice"]},
            ["evaluation.metrics with 'choice' needs data.label_words"],
        ),
        ({"evaluation__metrics": "f1"}, ["evaluation.metrics = 'f1'", "a list of texts"]),
        ({"evaluation__metrics": ["bleu"]}, ["evaluation.metrics: 'bleu' is not known"]),
        ({"evaluation__metrics": ["f1", "f1"]}, ["'f1' is there twice"]),
        ({"evaluation__limit": 0}, ["evaluation.limit = 0", "at least 1"]),
        ({"data__answer_tokens": 0}, ["data.answer_tokens = 0", "at least 1"]),
        ({"data__label_words": " yes"}, ["data.label_words = ' yes'", "a table of texts such as"]),
        ({"data__label_words": {"0": 1, "1": "b"}}, ["data.label_words = {'0': 1,", "a table of"]),
        ({"data__label_words": {"0": " no"}}, ["data.label_words: {'0': ' no'}", "two or more"]),
        ({"data__label_words": {"0": "a", "1": "a"}}, ["two or more different words"]),
    ],
)
def test_what_is_refused(changes: dict[str, Any], words: list[str]) -> None:
    message = refusal(content(**changes))
    assert message.startswith("c.toml: ") and "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("content", [{"\ud800": {}}, {"run": {"\ud800": 1}}])
def test_a_key_that_is_half_a_character_is_a_sentence(content: dict[str, Any]) -> None:
    with pytest.raises(FedForwardError, match="is not text"):
        validate(content)


def test_missing_keys_and_sections_are_named() -> None:
    assert "data.source is missing (file" in refusal({"model": {"path": "m"}, "data": {}})
    message = refusal({})
    assert "[model] is missing" in message and "[data] is missing" in message
    assert "model = 3 must be a section, written [model]" in refusal(content() | {"model": 3})


def test_every_problem_gets_one_line() -> None:
    message = refusal(content(lora__targets=[1, 2], method__mu=-1, run__sed=3))
    assert len(message.splitlines()) == 4
    assert "Did you mean run.seed?" in message


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a.b=3", 3),
        ("a.b=1e-3", 1e-3),
        ("a.b=true", True),
        ("a.b=word", "word"),
        ('a.b="3"', "3"),
        ("a.b=x=y=z", "x=y=z"),
        ("a.b={q} = {a}", "{q} = {a}"),
        ('a.b=["q_proj", "v_proj"]', ["q_proj", "v_proj"]),
        ('a.b={ 0 = " no", "not 1" = " yes" }', {"0": " no", "not 1": " yes"}),
        ("a.b=", ""),
        ("a.b=1\nc=2", "1\nc=2"),
        ("a.b=" + "9" * 5000, "9" * 5000),
        ("a.b=x.y", "x.y"),
        ("a.b=" + "[" * 5000, "[" * 5000),
    ],
)
def test_overrides(text: str, value: Any) -> None:
    assert parse_override(text) == ("a", "b", value)


@pytest.mark.parametrize(
    "text", ["rounds", "rounds=3", "=3", ".b=3", "a.=3", "a..b=3", "a.b.=3", ""]
)
def test_what_is_not_an_override(text: str) -> None:
    with pytest.raises(FedForwardError, match=re.escape(repr(text)) + r".*section\.key=value"):
        parse_override(text)


def test_overrides_replace_what_the_file_says(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('[model]\npath="m"\n[data]\nsource="d"\n[method]\nmu = 0.5\n', encoding="utf-8")
    assert load(path).method.mu == 0.5
    assert load(path, ["method.mu=0.25", "run.seed=7"]).method.mu == 0.25
    assert load(path, ["run.seed=7"]).run.seed == 7
    with pytest.raises(FedForwardError, match="mu is not a known key"):
        load(path, ["run.mu=1"])


@pytest.mark.parametrize(
    "raw", [b"[model", bytes(range(256)), b"[model]\nseed = " + b"9" * 5000, b"a=" + b"[" * 5000]
)
def test_files_that_are_not_toml(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "c.toml"
    path.write_bytes(raw)
    with pytest.raises(FedForwardError, match=r"c\.toml is not valid TOML"):
        load(path)


def test_a_section_that_is_a_value_takes_no_override(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("model = 3\n", encoding="utf-8")
    with pytest.raises(FedForwardError, match=r"model must be a section, written \[model\]"):
        load(path, ["model.path=m"])


def test_an_override_leads_into_a_table(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('[model]\npath="m"\n[data]\nsource="d"\n', encoding="utf-8")
    found = load(path, ["data.fields.prompt=question", "data.fields.answer=reply"])
    assert found.data.fields == {"prompt": "question", "answer": "reply"}
    with pytest.raises(
        FedForwardError, match=r"data\.source = 'd' is no table, so data\.source\.x"
    ):
        load(path, ["data.source.x=1"])


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_bytes(b'\xef\xbb\xbf[model]\npath = "./model"\n[data]\nsource = "d.jsonl"\n')
    assert load(path).model.path == "./model"
    assert load_site(path).model.path == "./model"


def test_the_room_needs_neither_pytorch_nor_transformers() -> None:
    modules = sorted(p.stem for p in Path(config.__file__).parent.glob("*.py"))
    assert "schema" in modules and "names" in modules
    code = "import sys, importlib\nfor name in sys.argv[1:]:\n"
    code += "    importlib.import_module(f'fedforward.config.{name}')\n"
    code += "print({'torch', 'transformers', 'numba', 'scipy'} & sys.modules.keys())"
    done = subprocess.run(
        [sys.executable, "-c", code, *modules], capture_output=True, text=True, check=False
    )
    assert done.stdout == "set()\n", done.stdout + done.stderr
