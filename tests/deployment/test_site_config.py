"""The two halves of a configuration across machines: what travels, and what a site refuses."""

import json
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fedforward.config import site as sites
from fedforward.config.loading import validate, validate_as
from fedforward.config.schema import Config, sections_of
from fedforward.config.site import SiteConfig, join, terms
from fedforward.core.errors import FedForwardError
from fedforward.demo.text import ANSWER, PROMPT, site_examples
from fedforward.deployment import limits as limits_module
from fedforward.deployment.tuning import RefusedError, build
from fedforward.messages.refusal import Refusal, RefusalCode
from fedforward.training import build as experiment
from tests.conftest import DEMO_MODEL

#: Fields that terms of these tests name.
FIELDS = ["question", "answer", "instruction", "input", "output"]
#: A run in which no key has its default, as far as the keys go together.
RUN: dict[str, dict[str, Any]] = {
    "model": {"dtype": "bfloat16", "blocks": [0, 2]},
    "lora": {"rank": 3, "alpha": 5.0, "targets": ["q_proj"], "factors": "B"},
    "data": {
        "prompt": "{question}?",
        "answer": " {answer}",
        "label_words": {"0": " no", "1": " yes"},
        "answer_tokens": 7,
        "heldout": 0.25,
        "sequence_length": 33,
    },
    "evaluation": {"metrics": ["perplexity", "f1"], "site": "north"},
    "federation": {
        "clients": 4,
        "rounds": 7,
        "participation": 0.75,
        "weights": "equal",
        "quorum": 2,
        "deadline": 9.5,
    },
    "method": {
        "name": "zorba",
        "learning_rate": 0.1 + 0.2,
        "client_rates": "loss",
        "rate_spread": 0.01,
        "schedule": "cosine",
        "warmup": 2,
        "final": 0.5,
        "mu": 1e-7,
        "local_steps": 5,
        "directions": 2,
        "estimator": "fzoo",
        "distribution": "rademacher",
        "batch_size": 3,
        "objective": "f1",
    },
    "server": {"learning_rate": 0.5, "state_decay": 0.99, "momentum": 0.9, "window": 3},
    "planning": {"epsilon": 0.5, "objective": "worst", "dimension_penalty": 0.2},
    "run": {"seed": 12, "evaluate_every": 3, "patience": 4},
}
#: Keys of a site or of a simulation, with values that a server might have.
LOCAL: dict[str, dict[str, Any]] = {
    "model": {"path": "somewhere", "adapter": "begun", "device_map": "auto", "offload": "host"},
    "lora": {"init_file": "a.safetensors"},
    "method": {"mask_file": "m.safetensors", "aggregator": "median", "tolerated": 2},
    "data": {
        "source": "rows.jsonl",
        "public": "public.jsonl",
        "public_rows": 7,
        "weights": [1.0],
        "chat_template": "chat.jinja",
        "subset": "small",
        "split": "validation",
        "limit": 5,
        "example": "Well?",
        "fields": {"question": "q"},
    },
    "evaluation": {"source": "test.jsonl", "subset": "other", "split": "dev", "limit": 3},
    "run": {
        "device": "cuda",
        "threads": 3,
        "probes_per_call": 4,
        "tokens_per_call": 99,
        "memory_budget": "6 GiB",
        "trajectory": "cache",
        "activation_cache": "1 GiB",
        "callbacks": ["csv"],
        "on_divergence": "rollback",
    },
    "planning": {"budgets": "6 GiB", "active": [1, 1]},
    "simulation": {"dropout": 0.5},
}


def validated(content: dict[str, dict[str, Any]]) -> Config:
    whole = {**content}
    whole["model"] = {"path": sites.AT_SITES, **whole.get("model", {})}
    whole["data"] = {"source": sites.AT_SITES, **whole.get("data", {})}
    return validate(whole)


def refusals(given: Any, **limits: Any) -> list[str]:
    """The sentences of a site with these limits."""
    settings = site(**{f"limits__{key}": value for key, value in limits.items()})
    found = limits_module.refusals(given, settings)
    assert all(words.startswith(f"{key} = ") for key, words in found)
    return [words for _, words in found]


def site(**changes: Any) -> SiteConfig:
    content: dict[str, dict[str, Any]] = {
        "model": {"path": "m"},
        "data": {"source": "d.jsonl"},
        "limits": {"fields": FIELDS},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        content.setdefault(section, {})[name] = value
    return validate_as(SiteConfig, content, "site.toml")


def wire(content: Any) -> Any:
    """Terms as they arrive."""
    return json.loads(json.dumps(content))


@pytest.fixture
def written(tmp_path: Path) -> Any:
    """A function that writes TOML to a file and returns its path."""

    def write(text: str) -> Path:
        path = tmp_path / "written.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


# What travels.


def test_keys_of_a_site_do_not_travel() -> None:
    config = validated(RUN)
    given = wire(terms(config))
    assert "simulation" not in given
    for section, keys in LOCAL.items():
        assert not keys.keys() & given.get(section, {}).keys(), section
    # Every other key does.
    for section, values in config.model_dump().items():
        expected = set(values) - LOCAL.get(section, {}).keys()
        assert given.get(section, {}).keys() == (set() if section == "simulation" else expected)
    text = json.dumps(terms(validated({"data": {"source": "/secret/rows.jsonl"}})))
    assert "secret" not in text and sites.AT_SITES not in text


def test_no_key_is_forgotten() -> None:
    """A new key of a run must be put on one side or the other."""
    here = {section: set(keys) for section, keys in LOCAL.items()}
    for section, part in sections_of(Config).items():
        if section == "simulation":
            continue
        known = RUN.get(section, {}).keys() | here.get(section, set())
        optional = {"model": {"tune", "head", "quantization"}, "server": {"normalise"}}
        optional |= {
            "lora": {"alignment", "init"},
            "data": {"chat", "classes", "loss_on"},
            "federation": {
                "partition",
                "field",
                "alpha",
                "weight_ratio",
                "weight_share",
                "start_deadline",
                "secure_sums",
                "secure_threshold",
            },
            "method": {"mask", "density", "report_filters", "parameters"},
            "planning": {"weights"},
            "privacy": {
                "clip",
                "level",
                "mechanism",
                "adjacency",
                "noise_multiplier",
                "target_epsilon",
                "delta",
                "examples",
                "heldout",
            },
        }
        assert set(part.model_fields) == known | optional.get(section, set()), section


def test_a_site_joins_with_the_same_configuration() -> None:
    config = validated(RUN)
    own = site(
        data__limit=9,
        data__split="all",
        data__fields={"question": "q"},
        run__device="cpu",
        run__threads=2,
        run__tokens_per_call=64,
    )
    joined = join(wire(terms(config)), own)
    expected, found = config.model_dump(), joined.model_dump()
    expected["model"]["path"] = "m"
    expected["data"] |= {"source": "d.jsonl", "limit": 9, "split": "all"}
    expected["data"]["fields"] = {"question": "q"}
    expected["run"] |= {"device": "cpu", "threads": 2, "tokens_per_call": 64}
    # A site is one client of one.
    expected["federation"] |= {"clients": 1, "participation": 1.0, "quorum": 1}
    assert found == expected
    assert join(wire(terms(joined)), own) == joined


def test_a_site_may_keep_another_share_for_evaluation() -> None:
    given = wire(terms(validated(RUN)))
    assert join(given, site()).data.heldout == 0.25
    assert join(given, site(data__heldout=6.0)).data.heldout == 6


def test_a_server_with_more_clients_than_one_site_can_be_joined() -> None:
    given = wire(terms(validated({"federation": {"clients": 9, "quorum": 9}})))
    assert join(given, site()).federation.clients == 1


def test_terms_that_do_not_fit_are_a_sentence() -> None:
    head = "the server's terms with this site's configuration: "
    good = wire(terms(validated(RUN)))
    for section, key, value in (
        ("method", "learning_rate", "much"),
        ("method", "unheard_of", 1),
        ("federation", "rounds", -1),
        ("unheard_of", "key", 1),
        ("lora", "rank", None),
    ):
        bad = wire(good)
        bad.setdefault(section, {})[key] = value
        with pytest.raises(FedForwardError, match=f"^{head}{section}"):
            join(bad, site())
    for section in good:
        # Sections that are none fall away, and defaults or sentences take their place.
        try:
            join({**good, section: 5}, site())
        except FedForwardError as error:
            assert str(error).startswith(head)


@pytest.mark.parametrize(
    ("section", "key"),
    [
        (section, key)
        for section, keys in LOCAL.items()
        for key in keys
        # Keys that every site has a value for are overwritten.
        if (section, key)
        in {
            ("data", "subset"),
            ("lora", "init_file"),
            ("method", "mask_file"),
            ("data", "public"),
            ("data", "limit"),
            ("data", "example"),
            ("data", "fields"),
            ("evaluation", "source"),
            ("evaluation", "subset"),
            ("evaluation", "split"),
            ("evaluation", "limit"),
            ("run", "memory_budget"),
            ("planning", "budgets"),
        }
    ],
)
def test_a_server_cannot_set_what_is_a_sites_own(section: str, key: str) -> None:
    """Least of all name a file of the site's machine to evaluate on."""
    given = wire(terms(validated({"method": {"name": "zorba"}})))
    forced = wire(given)
    forced.setdefault(section, {})[key] = LOCAL[section][key]
    try:
        joined = join(forced, site())
    except FedForwardError as error:
        assert key in str(error)
    else:
        assert joined == join(given, site())


def test_what_every_site_has_is_its_own() -> None:
    forced = wire(terms(validated({})))
    forced["model"] |= {"path": "elsewhere", "device_map": "auto"}
    forced["data"] |= {"source": "elsewhere", "split": "other"}
    forced["run"] |= {"device": "cuda", "threads": 7, "trajectory": "cache"}
    assert join(forced, site()) == join(wire(terms(validated({}))), site())


# What a site refuses.


def test_terms_within_the_limits_are_not_refused() -> None:
    assert refusals(wire(terms(validated(RUN)))) == []
    assert refusals(wire(terms(validated({})))) == []


@pytest.mark.parametrize(
    ("section", "key", "least", "limit"),
    [
        ("federation", "rounds", 1001, 1000),
        ("method", "local_steps", 1001, 1000),
        ("method", "directions", 65, 64),
        ("method", "batch_size", 1025, 1024),
        ("lora", "rank", 65, 64),
        ("data", "answer_tokens", 513, 512),
    ],
)
def test_a_run_above_a_limit_is_refused(section: str, key: str, least: int, limit: int) -> None:
    given = wire(terms(validated(RUN)))
    given[section][key] = limit
    assert refusals(given) == []
    given[section][key] = least
    assert refusals(given) == [
        f"{section}.{key} = {least} is above this site's limits.{key} = {limit}"
    ]
    assert refusals(given, **{key: least}) == []
    given[section][key] = True
    assert len(refusals(given)) == 1


def test_full_tuning_is_refused_unless_it_is_allowed() -> None:
    given = wire(terms(validated({"model": {"tune": "full"}})))
    assert refusals(given) == ["model.tune = 'full' is not in this site's limits.tune = ['lora']"]
    assert refusals(given, tune=["lora", "full"]) == []
    assert len(refusals(wire(terms(validated({}))), tune=["full"])) == 1


def test_a_classifier_is_refused_unless_it_is_allowed() -> None:
    given = wire(terms(validated({"model": {"head": "classification"}})))
    (sentence,) = refusals(given)
    assert sentence == (
        "model.head = 'classification' is not in this site's limits.head = ['causal']"
    )
    assert refusals(given, head=["causal", "classification"]) == []


def test_tensors_are_refused_whatever_the_limits() -> None:
    given = wire(terms(validated({"method": {"name": "fedavg", "learning_rate": 1e-3}})))
    (sentence,) = refusals(given, tune=["lora", "full"], functions=True)
    assert "fedavg" in sentence and "tensors" in sentence


@pytest.mark.parametrize(
    "where",
    [
        {"method": {"objective": "shutil:rmtree"}},
        {"evaluation": {"metrics": ["loss", "shutil:rmtree"]}},
    ],
    ids=["objective", "metric"],
)
def test_functions_are_refused_unless_they_are_allowed(where: Any) -> None:
    given = wire(terms(validated(where)))
    (sentence,) = refusals(given)
    assert "'shutil:rmtree'" in sentence and "limits.functions = false" in sentence
    assert refusals(given, functions=True) == []


def test_every_reason_is_given_at_once() -> None:
    given = wire(terms(validated({"model": {"tune": "full"}})))
    given["federation"]["rounds"] = given["method"]["local_steps"] = 10**9
    given["method"] |= {"name": "fedavg", "objective": "os:system"}
    assert len(refusals(given)) == 5


@pytest.mark.parametrize(
    ("data", "closed"),
    [
        ({"prompt": "{question} {name}"}, ["name"]),
        ({"prompt": "{?name}x{/name}{question}"}, ["name"]),
        ({"prompt": "{^name}x{/name}{question}"}, ["name"]),
        ({"answer": "{name.first}"}, ["name.first"]),
        ({"answer": "{answers[0]}"}, ["answers[0]"]),
        ({"answer": "{answer_other}"}, ["answer_other"]),
        ({"chat": "messages"}, ["messages", "system", "tools", "functions"]),
        (
            {"chat": "prompt-completion"},
            ["prompt", "completion", "system", "tools", "functions"],
        ),
    ],
)
def test_terms_name_only_fields_that_the_site_has_released(data: Any, closed: list[str]) -> None:
    given = wire(terms(validated({"data": data})))
    (sentence,) = refusals(given)
    assert f"names {', '.join(map(repr, closed))}, and this site has released" in sentence
    assert "'question'" in sentence and "(limits.fields)" in sentence
    roots = [re.split(r"[.\[]", path)[0] for path in closed]
    assert refusals(given, fields=[*FIELDS, *roots]) == []


def test_a_site_releases_nothing_unless_it_says_so() -> None:
    given = wire(terms(validated(RUN)))
    assert len(refusals(given, fields=[])) == 2
    assert "has released no fields" in refusals(given, fields=[])[0]
    renamed = site(limits__fields=[], data__fields={"question": "asked", "answer": "record"})
    assert limits_module.refusals(given, renamed) == []
    # A conversation that the site itself names is read in place of what the terms name.
    assert limits_module.refusals(given, site(limits__fields=[], data__chat="talk")) == []


@pytest.mark.parametrize("value", [None, 3, ["{question}"], "{", "{question!r}", "{?a}"])
def test_a_template_that_cannot_be_read_is_refused(value: Any) -> None:
    given = wire(terms(validated(RUN)))
    given["data"]["prompt"] = value
    (sentence,) = refusals(given)
    assert sentence.startswith(f"data.prompt = {value!r} cannot be read: ")


def test_rows_are_not_divided_by_a_field_that_terms_name() -> None:
    given = wire(terms(validated(RUN)))
    given["federation"] |= {"partition": "by-field", "field": "name"}
    assert refusals(given) == [
        "federation.partition = 'by-field' divides a site's rows by a field of theirs"
    ]


JUNK: list[Any] = [None, True, -1, 3, 2.5, "text", "", [], ["x"], [None], {}, {"a": 1}]


@pytest.mark.parametrize("section", ["federation", "method", "model", "data", "lora"])
def test_malformed_sections_are_refused_and_never_raise(section: str) -> None:
    good = wire(terms(validated(RUN)))
    for value in JUNK:
        assert refusals({**good, section: value}), (section, value)
    del good[section]
    assert refusals(good)
    assert len(refusals({})) >= 4


def test_malformed_values_are_refused_and_never_raise() -> None:
    for section, key in (
        ("federation", "rounds"),
        ("method", "local_steps"),
        ("method", "directions"),
        ("model", "tune"),
        ("model", "head"),
        ("data", "prompt"),
        ("data", "answer"),
        ("lora", "rank"),
    ):
        for value in (None, "100", [1], {}, 2.5, 10**30):
            bad = wire(terms(validated(RUN)))
            bad[section][key] = value
            # A prompt may be any text, and a field that is none is not there to be released.
            legal = key in ("prompt", "answer") and isinstance(value, str)
            assert legal or any(f"{section}.{key}" in words for words in refusals(bad))
    for value in JUNK:
        bad = wire(terms(validated(RUN)))
        bad["method"]["objective"] = bad["method"]["name"] = value
        assert isinstance(refusals(bad), list)


@pytest.mark.parametrize("value", JUNK, ids=repr)
def test_malformed_metrics_never_raise(value: Any) -> None:
    bad = wire(terms(validated(RUN)))
    bad["evaluation"]["metrics"] = value
    assert isinstance(refusals(bad), list)
    assert isinstance(refusals({**bad, "evaluation": value}), list)


# run.toml


def test_a_servers_file_needs_neither_model_nor_data(written: Any) -> None:
    config = sites.load_terms(written("[federation]\nrounds = 4\n"), ["method.local_steps=3"])
    assert (config.federation.rounds, config.method.local_steps) == (4, 3)
    assert config.model.path == config.data.source == sites.AT_SITES
    named = sites.load_terms(written('[model]\npath = "here"\n[data]\nsource = "x.jsonl"\n'), [])
    assert (named.model.path, named.data.source) == ("here", "x.jsonl")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('[method]\nname = "fedavg"', r"method\.name = 'fedavg'"),
        ("[simulation]\ndropout = 0.1", r"\[simulation\]"),
        (
            '[federation]\npartition = "by-field"\nfield = "site"',
            r"federation\.partition = 'by-field'",
        ),
        (
            '[federation]\npartition = "dirichlet"\nfield = "site"',
            r"federation\.partition = 'dirichlet'",
        ),
        (
            '[method]\nname = "zorba"\n[planning]\nbudgets = "6 GiB"',
            r"planning\.budgets = '6 GiB'",
        ),
        (
            '[method]\nname = "zorba"\n[planning]\nactive = [1, 2, 3]',
            r"planning\.active = \[1, 2, 3\]",
        ),
        ('[evaluation]\nsource = "x.jsonl"', r"evaluation\.source = 'x\.jsonl'"),
    ],
)
def test_what_cannot_be_done_across_machines_is_refused(written: Any, text: str, key: str) -> None:
    path = written(text)
    with pytest.raises(FedForwardError, match=rf"written\.toml: .*{key}"):
        sites.load_terms(path, [])


def test_all_that_is_wrong_with_a_servers_file_is_said(written: Any) -> None:
    path = written('[simulation]\ndropout = 0.1\n[evaluation]\nsource = "x.jsonl"')
    with pytest.raises(FedForwardError) as caught:
        sites.load_terms(path, [])
    assert len(str(caught.value).split("\n  ")) == 3
    with pytest.raises(FedForwardError, match=r"model = 5 must be a section"):
        sites.load_terms(written("model = 5"), [])
    with pytest.raises(FedForwardError, match=r"Did you mean federation\.rounds\?"):
        sites.load_terms(written("[federation]\nround = 3"), [])
    with pytest.raises(FedForwardError, match="no such configuration file"):
        sites.load_terms(path.with_name("absent.toml"), [])


# site.toml


def test_the_example_parses(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text(sites.example_site(), encoding="utf-8")
    config = sites.load_site(path)
    own = {"model__path": config.model.path, "data__source": config.data.source}
    assert config == site(**own, limits__fields=[])
    # Every key is there, and what the comments show are the defaults.
    lines = [line.lstrip("# ") for line in sites.example_site().splitlines()[2:]]
    shown = "\n".join(line for line in lines if line.startswith("[") or " = " in line)
    content = tomllib.loads(
        "\n".join(line for line in shown.splitlines() if '{ instruction = "question" }' not in line)
    )
    assert validate_as(SiteConfig, content, "shown") == config
    for section, part in sections_of(SiteConfig).items():
        for key in part.model_fields:
            assert f"{key} =" in sites.example_site().partition(f"[{section}]")[2]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[limits]\nround = 3", r"limits\.round is not .* Did you mean limits\.rounds\?"),
        ("[data]\nsorce = 'x'", r"data\.sorce is not .* Did you mean data\.source\?"),
        ("[site]\nnames = 'x'", r"Did you mean site\.name\?"),
        ("[run]\nthread = 2", r"Did you mean run\.threads\?"),
        ("[limit]\nrounds = 3", r"limit is not a known section\. Did you mean limits\?"),
        ("[limits]\nrounds = 0", r"limits\.rounds = 0 is not allowed: .* whole number"),
        ("[limits]\nfull_tuning = true", r"limits\.full_tuning is now limits\.tune"),
        ("[limits]\ntune = []", r"limits\.tune = \[\] is not allowed: .*list of texts"),
        ("[limits]\nhead = ['other']", r"limits\.head = \['other'\] is not allowed"),
        ("[limits]\nfields = ['a', 'a']", r"limits\.fields.* there twice"),
        ("[data]\nclasses = ['a']", r"data\.classes.* two or more names"),
        ("[limits]\nheldout = 0", r"limits\.heldout = 0 is not allowed: .* at least 1"),
        ("[limits]\nactive_blocks = 0", r"limits\.active_blocks = 0 is not allowed"),
        ("[site]\nname = 'a/b'", r"site\.name = 'a/b' is not allowed"),
        ("[data]\nheldout = -1.0", r"data\.heldout = -1\.0 is not allowed: .*above 0"),
        ("[data]\nfields = ['a']", r"data\.fields = \['a'\] is not allowed: .*table of texts"),
        ("[method]\nname = 'zorba'", r"method\.name is not a known key"),
        ("", r"the section \[model\] is missing"),
        ("[model]", r"model\.path is missing"),
    ],
)
def test_a_wrong_site_file_is_a_sentence_with_the_nearest_key(
    written: Any, text: str, words: str
) -> None:
    with pytest.raises(FedForwardError, match=words):
        sites.load_site(written(text))


# data.fields


@pytest.fixture
def renamed(tmp_path: Path) -> Any:
    """A function that tokenises rows whose fields have other names."""

    def read(rows: list[dict[str, str]], fields: dict[str, str] | None) -> Any:
        path = tmp_path / "renamed.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        given = {"data": {"prompt": PROMPT, "answer": ANSWER, "heldout": 2, "sequence_length": 64}}
        own = site(
            model__path=str(DEMO_MODEL),
            data__source=str(path),
            data__fields=fields,
            run__threads=1,
            run__device="cpu",
        )
        return build(b"renamed!", wire(terms(validated(given))), own).corpus

    return read


ROWS = [
    {"question": row["question"], "answer": row["answer"]}
    for row in site_examples(seed=1, per_site=2)
]


def texts(corpus: Any) -> list[Any]:
    return [
        [(e.tokens.tolist(), e.prompt_length, e.reference) for e in part]
        for part in (corpus.heldout, *corpus.clients)
    ]


def test_fields_are_called_what_the_templates_call_them(renamed: Any) -> None:
    plain = texts(renamed(ROWS, None))
    other = [{"frage": row["question"], "antwort": row["answer"]} for row in ROWS]
    assert texts(renamed(other, {"question": "frage", "answer": "antwort"})) == plain
    # A field of the template's name that means something else gives way.
    both = [{**row, "question": "!", "frage": row["question"]} for row in ROWS]
    assert texts(renamed(both, {"question": "frage"})) == plain
    assert texts(renamed(ROWS, {"question": "question"})) == plain


def test_a_field_that_is_not_there_names_those_that_are(
    renamed: Any,
) -> None:
    words = r"data\.fields: question = 'frage' is not a field of .*are question, answer"
    with pytest.raises(RefusedError, match=words) as caught:
        renamed(ROWS, {"question": "frage"})
    assert caught.value.refusal == Refusal(RefusalCode.DATA)


def test_two_fields_can_change_places(renamed: Any) -> None:
    swapped = [{"question": row["answer"], "answer": row["question"]} for row in ROWS]
    fields = {"question": "answer", "answer": "question"}
    assert texts(renamed(swapped, fields)) == texts(renamed(ROWS, None))


def read_rows(config: Config) -> list[dict[str, Any]]:
    """The values of the training rows."""
    rows = experiment.corpus_reader(config).rows
    return [rows.table[int(number)].values for number in rows.train]


def test_the_configuration_of_a_simulation_has_fields_too(configure: Any, tmp_path: Path) -> None:
    config = configure(data__fields={"question": "answer"}, data__answer="{question}")
    rows = read_rows(configure(data__prompt="{question}", data__answer="{answer}"))
    read = read_rows(configure(data__prompt="{question}", data__answer="{question}"))
    assert [row["question"] for row in read] == [row["question"] for row in rows]
    moved = read_rows(config)
    assert [row["question"] for row in moved] == [row["answer"] for row in rows]


def test_another_list_of_merges_is_another_tokenizer(tmp_path: Path) -> None:
    """With the same vocabulary, and the same pieces of the sentences that it is tried on."""
    from transformers import AutoTokenizer

    from fedforward.models.fingerprints import PROBE_TEXTS, tokenizer_fingerprint

    shutil.copytree(DEMO_MODEL, tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    mine = AutoTokenizer.from_pretrained(tmp_path / "model")
    content = json.loads(file.read_text(encoding="utf-8"))
    del content["model"]["merges"][-1]
    file.write_text(json.dumps(content), encoding="utf-8")
    other = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert other.get_vocab() == mine.get_vocab()
    assert all(mine(text)["input_ids"] == other(text)["input_ids"] for text in PROBE_TEXTS)
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(mine)


def test_a_site_may_take_part_in_sums_alone() -> None:
    given = wire(terms(validated({})))
    assert refusals(given, sum_of=1) == []
    (sentence,) = refusals(given, sum_of=5)
    assert sentence == (
        "federation.secure_threshold = 3, with secure_sums = False, is below this site's "
        "limits.sum_of = 5"
    )
    given["federation"]["secure_sums"] = True
    assert "secure_sums = True, is below" in refusals(given, sum_of=5)[0]
    given["federation"]["secure_threshold"] = 5
    assert refusals(given, sum_of=5) == []
    given["federation"]["secure_threshold"] = "many"
    assert len(refusals(given, sum_of=5)) == 1
