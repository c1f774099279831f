"""The names that a configuration may choose from: built in, registered, and refused."""

from typing import Any, get_args

import pytest

from fedforward.config import names
from fedforward.config.loading import load, validate, validate_as
from fedforward.config.site import SiteConfig
from fedforward.config.template import example, to_toml
from tests.support.configurations import content, refusal


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in get_args(names.Kind):
        monkeypatch.setitem(names.REGISTERED, kind, ())


def test_every_kind_has_its_built_in_names() -> None:
    assert set(names.BUILT_IN) == set(get_args(names.Kind))
    assert names.known("estimator") == ("two-point", "fzoo")
    assert names.known("aggregator") == ("mean",)
    assert names.known("report-filter") == ()
    for kind in get_args(names.Kind):
        for name in names.known(kind):
            assert names.check(kind, name) == name


def test_a_registered_name_comes_last_and_once() -> None:
    for name in ("krum", "mean", "krum"):
        names.register("aggregator", name)
    assert names.known("aggregator") == ("mean", "krum")
    with pytest.raises(ValueError, match=r"Did you mean 'krum'\? Allowed are 'mean', 'krum'$"):
        names.check("aggregator", "krumm")


@pytest.mark.parametrize("name", ["", "a b", "a:b", "-a", "a\n", "é"])
def test_a_name_of_other_characters_is_not_registered(name: str) -> None:
    with pytest.raises(ValueError, match="cannot name an aggregator: letters, digits"):
        names.register("aggregator", name)


def test_a_kind_that_is_none_is_not_registered() -> None:
    kind: Any = "optimizer"
    with pytest.raises(ValueError, match=r"'optimizer' is not a kind of name; the kinds are 'meth"):
        names.register(kind, "lion")


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
    names.register(kind, "mine-1")
    config = validate(whole)
    path = tmp_path / "c.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert load(path) == config
    assert f"mine-1)\n# {name} = " in example()


def test_a_sites_filters_are_registered_names_too() -> None:
    whole = content(site__filters=["clip", "noise"])
    assert "site.filters: 'clip' is not known" in refusal(whole, SiteConfig)
    names.register("report-filter", "clip")
    names.register("report-filter", "noise")
    assert validate_as(SiteConfig, whole, "site.toml").site.filters == ["clip", "noise"]
    whole["site"]["filters"] = ["clip", "clip"]
    assert "site.filters: 'clip' is there twice" in refusal(whole, SiteConfig)
