"""What a section derives from its keys."""

import pytest

from fedforward.config.loading import validate
from fedforward.config.method_sections import MethodSection
from fedforward.config.run_section import RunSection
from fedforward.config.sections import ModelSection
from fedforward.config.simulation import SimulationSection


def test_blocks_and_budgets_are_read() -> None:
    assert ModelSection(path="m").tuned_blocks is None
    assert ModelSection(path="m", blocks="4-7").tuned_blocks == (4, 5, 6, 7)
    assert ModelSection(path="m", blocks="3-3").tuned_blocks == (3,)
    assert ModelSection(path="m", blocks=[5, 0, 5]).tuned_blocks == (0, 5)
    sizes = {"6 GiB": 6 * 2**30, "4GB": 4 * 10**9, "1.5 mib": 3 * 2**19, "100 B": 100}
    for text, size in sizes.items():
        assert RunSection(memory_budget=text).budget == size
    assert RunSection().budget is None


@pytest.mark.parametrize(("estimator", "probes"), [("two-point", 6), ("fzoo", 4)])
def test_a_method_says_its_probes(estimator: str, probes: int) -> None:
    assert MethodSection(estimator=estimator, directions=3).probes_per_step == probes


def test_settings_of_a_method_may_stand_among_the_keys() -> None:
    beside = MethodSection(name="fedkseed", candidates=9)  # type: ignore[call-arg]
    assert beside.parameters == {"candidates": 9}
    assert beside == MethodSection(name="fedkseed", parameters={"candidates": 9})


def test_a_simulation_is_plain_when_nothing_goes_wrong() -> None:
    assert SimulationSection().plain
    for key in ("dropout", "straggler", "byzantine"):
        assert not SimulationSection(**{key: 0.5}).plain
    assert not SimulationSection(late_join=1).plain


WORDS = {"0": " no", "1": " yes"}


@pytest.mark.parametrize(
    ("asked", "words", "head", "found", "metrics"),
    [
        (None, None, "causal", "loss", ()),
        (None, WORDS, "causal", "choice", ("choice",)),
        ("loss", WORDS, "causal", "loss", ()),
        ("choice", WORDS, "causal", "choice", ("choice",)),
        ("accuracy", WORDS, "causal", "accuracy", ("accuracy",)),
        (None, None, "classification", "loss", ()),
        (None, WORDS, "classification", "loss", ()),
        ("choice", None, "classification", "loss", ()),
        ("accuracy", None, "classification", "accuracy", ("accuracy",)),
    ],
)
def test_the_objective_follows_from_the_data(
    asked: str | None, words: dict[str, str] | None, head: str, found: str, metrics: tuple[str, ...]
) -> None:
    content = {
        "model": {"path": "m", "head": head},
        "data": {"source": "d.jsonl", "label_words": words},
        "method": {"objective": asked},
    }
    config = validate(content)
    assert (config.objective, config.metrics) == (found, metrics)
    # What is stored says it, whatever the default will be.
    assert config.with_objective().method.objective == found
    assert config.with_objective("f1").method.objective == ("f1" if asked is None else found)
