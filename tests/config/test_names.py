"""The names that a configuration may choose from: built in, added by a plug-in, and refused."""

from collections.abc import Iterator
from typing import Any, get_args

import pytest

from fedforward.config import names
from fedforward.config.loading import load, validate, validate_as
from fedforward.config.site import SiteConfig
from fedforward.config.template import example, to_toml
from fedforward.core import registry
from fedforward.methods.fedmezo import FedMeZO
from tests.support.configurations import content, refusal

REGISTRIES: dict[str, registry.Registry] = {
    "method": registry.METHODS,
    "estimator": registry.ESTIMATORS,
    "objective": registry.OBJECTIVES,
    "metric": registry.OBJECTIVES,
    "aggregator": registry.AGGREGATORS,
    "report-filter": registry.REPORT_FILTERS,
}
#: Something of each kind that fits where the kind is asked for.
RULES = (
    "mean",
    "clipped-mean",
    "median",
    "trimmed-mean",
    "geometric-median",
    "krum",
    "multi-krum",
)
THINGS: dict[str, Any] = {
    "method": FedMeZO,
    "estimator": registry.ESTIMATORS.get("two-point"),
    "aggregator": registry.AGGREGATORS.get("mean"),
    "report-filter": registry.REPORT_FILTERS.get("clip"),
}


@pytest.fixture(autouse=True)
def nothing_stays_registered() -> Iterator[None]:
    yield
    for each in REGISTRIES.values():
        each.forget("mine-1")


def test_every_kind_has_its_built_in_names() -> None:
    assert names.known("estimator") == ("two-point", "one-sided", "fzoo")
    assert names.known("aggregator") == RULES
    assert names.known("report-filter") == ("clip", "withhold-loss")
    assert names.known("metric") == (*names.known("objective"), "perplexity")
    for kind in get_args(names.Kind):
        for name in names.known(kind):
            assert names.check(kind, name) == name


def test_a_registered_name_comes_last_and_once() -> None:
    for _ in range(2):
        registry.AGGREGATORS.register("mine-1")(THINGS["aggregator"])
    assert names.known("aggregator") == (*RULES, "mine-1")
    with pytest.raises(ValueError, match=r"Did you mean 'mine-1'\? Allowed are 'mean', 'clipped"):
        names.check("aggregator", "mine")


@pytest.mark.parametrize(
    ("kind", "key", "several"),
    [
        ("method", "method__name", False),
        ("estimator", "method__estimator", False),
        ("objective", "method__objective", False),
        ("aggregator", "method__aggregator", False),
        ("metric", "evaluation__metrics", True),
        ("report-filter", "method__report_filters", True),
    ],
)
def test_a_registered_name_is_a_value_of_its_key(
    tmp_path: Any, kind: names.Kind, key: str, several: bool
) -> None:
    """In a file, in the way back to a file, and in the example's comment."""
    section, _, name = key.partition("__")
    whole = content(**{key: ["mine-1"] if several else "mine-1"})
    sign = ":" if several else " ="
    assert f"{section}.{name}{sign} 'mine-1' is not known" in refusal(whole)
    REGISTRIES[kind].register("mine-1")(THINGS.get(kind, object()))
    config = validate(whole)
    path = tmp_path / "c.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert load(path) == config
    listed = "mine-1 | perplexity" if kind == "metric" else "mine-1"
    assert f"{listed})\n# {name} =" in example()


def test_a_sites_filters_are_registered_names_too() -> None:
    whole = content(site__filters=["clip:0.5", "noise"])
    assert "site.filters: 'noise' is not known" in refusal(whole, SiteConfig)
    whole["site"]["filters"] = ["clip:0.5", "withhold-loss"]
    assert validate_as(SiteConfig, whole, "site.toml").site.filters == ["clip:0.5", "withhold-loss"]
    whole["site"]["filters"] = ["clip", "clip"]
    assert "site.filters: 'clip' is there twice" in refusal(whole, SiteConfig)
