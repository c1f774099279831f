"""What methods and estimators do not go with, by name, and with which words it is said."""

import tomllib
from dataclasses import dataclass
from typing import Any

import pytest

from fedforward.config.loading import validate
from fedforward.config.template import example, to_toml
from fedforward.core.registry import METHODS
from fedforward.methods.base import Method
from fedforward.methods.fedmezo import FedMeZO
from fedforward.methods.parameters import parameter
from fedforward.training.assembly import build_method
from tests.support.configurations import content, refusal

FEDAVG = {"method__name": "fedavg"}
FEEDSIGN = {"method__name": "feedsign", "method__learning_rate": 1e-3}
FLIP = {"simulation__attack": "sign-flip", "simulation__attackers": [0]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            FEDAVG | {"method__objective": "f1"},
            [
                "method.objective = 'f1' has no gradient",
                "use method.objective = 'loss' or 'choice', or one of 'fedmezo', 'fedmezo-auto'",
            ],
        ),
        (
            FEDAVG | {"method__client_rates": "update-difference"},
            ["method.client_rates = 'update-difference'", "allowed are 'fixed', 'random'"],
        ),
        (FEDAVG | {"model__offload": "host"}, ["model.offload = 'host'", "= 'fedavg' has no"]),
        (FEDAVG | {"run__memory_budget": "6 GiB"}, ["run.memory_budget = '6 GiB'", "has none"]),
        (FEDAVG | {"method__mask": "random"}, ["method.mask = 'random'", "= 'fedavg'"]),
        (FEDAVG | {"server__normalise": True}, ["[server] section", "'fedavg' has tensors"]),
        (FEDAVG | {"server__momentum": 0.5}, ["[server] section", "'fedavg' has tensors"]),
        (FEDAVG | {"simulation__dropout": 0.5}, ["[simulation] section", "'fedavg' leave it"]),
        (
            {"method__name": "fedkseed-pro", "server__state_decay": 0.5},
            ["server.state_decay", "method.name = 'fedkseed-pro'", "leave them at 1, 1 and 0"],
        ),
        (
            {"method__mask": "random", "method__client_rates": "update-difference"},
            ["method.mask = 'random'", "method.client_rates = 'update-difference'"],
        ),
        (
            {"planning__active": [1, 1, 1]},
            ["planning.active", "method.name = 'fedmezo' all clients have the same", "use 'zorba'"],
        ),
        (
            {"planning__budgets": "6 GiB"},
            ["planning.budgets", "method.name = 'fedmezo' all clients have the same"],
        ),
        (
            {"method__estimator": "fzoo"},
            ["method.estimator = 'fzoo'", "method.directions = 1 has none", "2 or more"],
        ),
        (
            {"method__aggregator": "median"},
            ["method.aggregator = 'median'", "'fedmezo' multiply different", "'decomfl', 'zorba'"],
        ),
        (
            FEDAVG | {"method__aggregator": "clipped-mean"},
            ["method.aggregator = 'clipped-mean' shortens", "'fedmezo', 'fedmezo-auto', 'decomfl'"],
        ),
        (
            {"method__name": "fedkseed", "method__aggregator": "median"},
            ["'fedkseed' multiply different", "method.aggregator = 'mean' or 'clipped-mean'"],
        ),
        (
            {"method__name": "feedsign"},
            ["method.learning_rate = 'auto' follows the size", "only their signs", "give a number"],
        ),
        (
            FEEDSIGN | {"method__aggregator": "median"},
            ["method.aggregator = 'median' joins scalars", "their majority is the update"],
        ),
        (
            FEEDSIGN | {"server__normalise": True},
            ["server.normalise = true divides", "'feedsign' only their signs", "leave it out"],
        ),
        (
            FEEDSIGN | {"server__momentum": 0.5},
            ["server.momentum", "'feedsign' writes rounds in a form of its own"],
        ),
        (
            {"simulation__attack": "scale"},
            ["attack = 'scale' needs attackers", "attackers = [3, 7]"],
        ),
        (
            {"simulation__attackers": [0]},
            ["attackers = [0] says more of an attack", "leave attackers out"],
        ),
        (
            {"simulation__attack_factor": 2.0},
            ["attack_factor = 2.0 says more of an attack", "leave attack_factor out"],
        ),
        (
            FLIP | {"simulation__attack_factor": 2.0},
            ["attack_factor = 2 is a number for 'scale'", "attack = 'sign-flip'; leave it out"],
        ),
        (
            FLIP | {"simulation__attackers": [1, 1]},
            ["attackers = [1, 1] names a client twice"],
        ),
        (
            FLIP | {"simulation__attackers": [0, 3]},
            ["simulation.attackers = [0, 3] names client 3", "numbered from 0 to 2"],
        ),
        (
            {"simulation__attack": "label-flip", "simulation__attackers": [0]},
            ["simulation.attack = 'label-flip' exchanges labels", "set data.label_words"],
        ),
        (
            {"method__tolerated": 1},
            ["method.tolerated = 1 is a number for", "'krum'", "it is 'mean'; leave it out"],
        ),
        (
            {
                "method__name": "decomfl",
                "method__aggregator": "krum",
                "method__tolerated": 2,
                "federation__clients": 6,
            },
            ["'krum' with method.tolerated = 2 needs 7 clients in each round, and there are 6"],
        ),
        (
            {
                "method__name": "decomfl",
                "method__aggregator": "trimmed-mean",
                "federation__clients": 10,
                "federation__participation": 0.2,
            },
            ["'trimmed-mean' with method.tolerated = 1 needs 3 clients", "there are 2"],
        ),
        (
            {"method__name": "fedkseed", "method__candidates": 0},
            ["method.candidates = 0 is not allowed", "a whole number, at least 1"],
        ),
        (
            {"method__candidates": 40},
            ["method.candidates is a setting of method.name = 'fedkseed' and 'fedkseed-pro'"],
        ),
        (
            {"method__parameters": {"tau": 0.5, "beta": 1}},
            ["method.tau is not a known key", "The settings of this method are none"],
        ),
    ],
)
def test_what_a_name_does_not_go_with(changes: dict[str, Any], words: list[str]) -> None:
    message = refusal(content(**changes))
    assert message.startswith("c.toml: ") and message.endswith(".") and "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "changes",
    [
        {"method__name": "fedkseed", "server__normalise": True, "method__learning_rate": 1e-3},
        {"server__momentum": 0.5, "method__learning_rate": 1e-3},
        {"method__name": "fedkseed"},
        {"server__state_decay": 0.9, "server__learning_rate": 0.5},
        {"method__name": "zorba", "planning__active": [1, 1, 1]},
        {"method__estimator": "fzoo", "method__directions": 2},
        {"method__mask": "random", "method__client_rates": "loss"},
    ],
)
def test_what_goes_together_is_accepted(changes: dict[str, Any]) -> None:
    validate(content(**changes))


@dataclass(frozen=True, kw_only=True)
class Mine(FedMeZO):
    """A plug-in's method with settings of each type."""

    tau: float = parameter(0.1, "of something", at_least=0)
    steps: int = parameter(1, "of something")
    fast: bool = parameter(False, "or slow")
    kind: str = parameter("x", "of something", choices=("x", "y"))


def test_a_plug_in_declares_its_settings() -> None:
    settings = {"tau": 1, "steps": 3, "fast": True, "kind": "y"}
    typed = {f"method__{key}": value for key, value in settings.items()}
    changes: dict[str, Any] = {"method__name": "mine", "simulation__dropout": 0.5, **typed}
    assert "'mine' is not known" in refusal(content(**changes))
    METHODS.register("mine")(Mine)
    try:
        config = validate(content(**changes))
        method = build_method(config)
        assert isinstance(method, Mine) and method.name == "mine"
        assert {key: getattr(method, key) for key in settings} == settings
        assert tomllib.loads(to_toml(config))["method"]["kind"] == "y"
        assert "# mine only: or slow\n# fast = false" in example()
        for key, value, words in (
            ("tau", -1, "method.tau = -1 is not allowed: it must be a number, at least 0"),
            ("kind", "z", "it must be one of 'x', 'y'"),
            ("fast", 1, "it must be true or false"),
        ):
            assert words in refusal(content(**(changes | {f"method__{key}": value})))
    finally:
        METHODS.forget("mine")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (FEDAVG, ["method.learning_rate = 'auto'", "of method.name = 'fedavg' send tensors"]),
        (
            {"server__momentum": 0.5},
            ["method.learning_rate = 'auto'", "server.momentum = 0.5 repeats steps", "a number"],
        ),
        (
            {"server__normalise": True},
            ["method.learning_rate = 'auto'", "server.normalise = true scales them as well"],
        ),
        (
            {"method__rate_spread": 1e-4},
            ["rate_spread = 0.0001 is a part of a learning_rate, which is 'auto'; leave it out"],
        ),
        ({"method__learning_rate": "best"}, ["method.learning_rate = 'best'", "'auto'"]),
        ({"method__learning_rate": 0}, ["method.learning_rate = 0"]),
    ],
)
def test_what_a_rate_that_is_found_does_not_go_with(
    changes: dict[str, Any], words: list[str]
) -> None:
    found = refusal(content(**changes))
    for part in words:
        assert part in found, found


AUTO = {"method__name": "fedmezo-auto"}


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        (
            AUTO,
            {
                "estimator": "one-sided",
                "directions": 16,
                "distribution": "rademacher",
                "mu": 1e-2,
                "learning_rate": "auto",
                "factors": "R",
                "init": "aligned",
            },
        ),
        (
            AUTO | {"method__directions": 3, "method__mu": 1e-3, "lora__init": "random"},
            {"directions": 3, "mu": 1e-3, "init": "random", "factors": "R", "local_steps": 1},
        ),
        (AUTO | {"method__estimator": "two-point"}, {"estimator": "two-point", "directions": 16}),
        (
            AUTO | {"model__tune": "full"},
            {"estimator": "one-sided", "mu": 1e-3, "init": "random", "factors": "both"},
        ),
        (AUTO | {"model__adapter": "old"}, {"init": "random", "factors": "B", "mu": 1e-2}),
        (AUTO | {"model__head": "classification"}, {"init": "aligned", "factors": "B"}),
        ({}, {"estimator": "two-point", "directions": 1, "init": "random", "mu": 1e-3}),
    ],
)
def test_a_method_has_defaults_and_every_key_overrides_them(
    changes: dict[str, Any], wanted: dict[str, Any]
) -> None:
    config = validate(content(**changes))
    found = {**config.method.model_dump(), **config.lora.model_dump()}
    assert {key: found[key] for key in wanted} == wanted
    # What was written out is the same configuration.
    assert validate(tomllib.loads(to_toml(config))) == config


@pytest.mark.parametrize(
    "changes", [{"model__head": "classification"}, {"model__adapter": "old"}], ids=["head", "old"]
)
def test_r_is_of_new_adapters_of_causal_models(changes: dict[str, Any]) -> None:
    found = refusal(content(lora__factors="R", **changes))
    (key,) = changes
    for part in ("lora.factors = 'R'", key.replace("__", "."), "lora.factors = 'B'"):
        assert part in found, found


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"factors": "B", "init": "aligned"}, "factors = 'B'; set factors = 'R'"),
        ({"init": "aligned"}, "factors = 'both'; set factors = 'R'"),
        ({"factors": "R"}, "init = 'random'; set init = 'aligned'"),
    ],
)
def test_a_u_of_each_module_is_aligned(changes: dict[str, str], words: str) -> None:
    found = refusal(
        content(lora__alignment="backward", **{f"lora__{k}": v for k, v in changes.items()})
    )
    assert words in found, found


def test_rates_by_losses_need_the_losses() -> None:
    changes = {"method__report_filters": ["withhold-loss"], "method__client_rates": "loss"}
    words = "reads the losses that method.report_filters = ['withhold-loss'] withholds"
    assert words in refusal(content(**changes))
    changes["method__client_rates"] = "random"
    words = "'auto' reads losses, which method.report_filters = ['withhold-loss'] withholds; give"
    assert words in refusal(content(**changes))
    assert validate(content(**changes, method__learning_rate=1e-3))
    wrong = refusal(content(method__report_filters=["clip:0"]))
    assert "method.report_filters: 'clip:0' is not allowed: a limit is above 0" in wrong


class Half(Method):
    """No whole method: it has no `aggregate`."""

    def seeds(self, *_: Any) -> Any:
        return []


@pytest.mark.parametrize(
    ("found", "words"), [(Half, "does not define aggregate"), (7, "is 7, which is no subclass")]
)
def test_a_broken_plug_in_is_refused_where_it_is_used(found: Any, words: str) -> None:
    METHODS.register("broken")(found)
    try:
        assert words in refusal(content(method__name="broken"))
        assert "broken only" not in example()
        wrong = refusal(content(method__candidates=5))
        assert "method.candidates is a setting of method.name = 'fedkseed'" in wrong
    finally:
        METHODS.forget("broken")
