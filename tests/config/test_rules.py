"""What methods and estimators do not go with, by name, and with which words it is said."""

from typing import Any

import pytest

from fedforward.config import names
from fedforward.config.loading import validate
from tests.support.configurations import content, refusal

FEDAVG = {"method__name": "fedavg"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            FEDAVG | {"method__objective": "f1"},
            [
                "method.objective = 'f1' has no gradient",
                "use method.name = 'fedmezo' or method.objective = 'loss'",
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
        ({"planning__active": [1, 1, 1]}, ["planning.active", "method.name is 'fedmezo'"]),
        ({"planning__budgets": "6 GiB"}, ["planning.budgets", "method.name is 'fedmezo'"]),
        (
            {"method__estimator": "fzoo"},
            ["method.estimator = 'fzoo'", "method.directions = 1 has none", "2 or more"],
        ),
        (
            {"method__parameters": {"tau": 0.5, "beta": 1}},
            ["method.parameters has tau, beta", "method.name = 'fedmezo' takes none"],
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
        {"method__name": "fedkseed", "server__normalise": True},
        {"method__name": "zorba", "planning__active": [1, 1, 1]},
        {"method__estimator": "fzoo", "method__directions": 2},
        {"method__mask": "random", "method__client_rates": "loss"},
    ],
)
def test_what_goes_together_is_accepted(changes: dict[str, Any]) -> None:
    validate(content(**changes))


def test_a_plug_in_meets_no_rule_and_takes_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(names.REGISTERED, "method", ())
    changes: dict[str, Any] = {
        "method__name": "mine",
        "method__parameters": {"tau": 0.5, "steps": 3, "fast": True, "kind": "x"},
        "server__state_decay": 0.5,
        "simulation__dropout": 0.5,
    }
    assert "'mine' is not known" in refusal(content(**changes))
    names.register("method", "mine")
    parameters = validate(content(**changes)).method.parameters
    assert parameters == {"tau": 0.5, "steps": 3, "fast": True, "kind": "x"}
    assert [type(value) for value in parameters.values()] == [float, int, bool, str]
