"""What a comparison runs: labels, rates and settings of each variant, and what is refused."""

from pathlib import Path

import pytest

from fedforward.core.errors import FedForwardError
from fedforward.training.spending import spent
from fedforward.training.variants import check_seeds, read_variants
from tests.support.command_line import write_config

TEXT = """
[model]
path = "m"
[data]
source = "d.jsonl"
[federation]
rounds = 7
[method]
name = "fedavg"
optimizer = "adamw"
learning_rate = 0.5
batch_size = 3
[run]
seed = 4
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "c.toml"
    file.write_text(TEXT, encoding="utf-8")
    return file


def test_a_variant_is_the_configuration_with_another_method(path: Path) -> None:
    found = read_variants(
        path,
        ["method.mu=0.01"],
        ["fedmezo, few=fedmezo-auto", "fedavg"],
        ["fedavg=1e-2,few=0.25"],
        ["few:method.directions=8", "few:lora.rank=2"],
    )
    assert [variant.label for variant in found] == ["fedmezo", "few", "fedavg"]
    one, few, backprop = (variant.config for variant in found)
    # The rate of the file belongs to its method, and so does its optimiser.
    assert one.method.learning_rate == "auto" and one.method.parameters == {}
    assert one.method.batch_size == 3 and one.method.mu == 0.01
    assert few.method.name == "fedmezo-auto" and few.method.learning_rate == 0.25
    assert few.method.directions == 8 and few.lora.rank == 2 and one.lora.rank != 2
    # A default of the method holds where the file says nothing.
    assert few.method.estimator == "one-sided" and one.method.estimator == "two-point"
    assert backprop.method.parameters == {"optimizer": "adamw"}
    assert backprop.method.learning_rate == 1e-2
    later = found[0].at(9, rounds=30, every=4)
    assert (later.run.seed, later.federation.rounds, later.run.evaluate_every) == (9, 30, 4)


def test_a_rate_on_the_command_line_is_for_all(path: Path) -> None:
    found = read_variants(path, ["method.learning_rate=0.1"], ["fedmezo,feedsign"], ["feedsign=2"])
    assert [variant.config.method.learning_rate for variant in found] == [0.1, 2.0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": []}, "--methods is missing"),
        ({"methods": ["fedmeso"]}, "'fedmeso' is not a known method. Did you mean 'fedmezo'?"),
        ({"methods": ["fedmezo,fedmezo"]}, "has the label 'fedmezo' twice"),
        ({"methods": ["a=fedmezo,A=decomfl"]}, "has the label 'a' twice"),
        ({"methods": ["../x=fedmezo"]}, "'../x' cannot be a label"),
        ({"methods": ["=fedmezo"]}, "'' cannot be a label"),
        ({"rates": ["x=1"]}, "'x' is not one of --methods, which are 'fedmezo', 'b'"),
        ({"rates": ["b"]}, "--rates 'b' is not allowed: write LABEL=RATE"),
        ({"rates": ["b=fast"]}, "'fast' is no rate"),
        ({"rates": ["b=1,b=2"]}, "--rates gives 'b' twice"),
        ({"rates": ["b=-1"]}, "method.learning_rate = -1.0 is not allowed"),
        ({"rates": ["b=nan"]}, "method.learning_rate = nan is not allowed"),
        ({"settings": ["method.mu=1"]}, "--set 'method.mu=1' is not allowed"),
        ({"settings": ["x:method.mu=1"]}, "'x' is not one of --methods"),
        ({"settings": ["b:mu"]}, "'mu' is not an override"),
        ({"settings": ["b:method.name='zorba'"]}, "method.name cannot be a variant's own"),
        ({"settings": ["b:run.seed=2"]}, "run.seed cannot be a variant's own"),
        ({"settings": ["b:federation.rounds=2"]}, "federation.rounds cannot be a variant's own"),
        ({"settings": ["b:method.nu=2"]}, "c.toml, b: in --set: method.nu is not"),
        ({"settings": ["b:method.optimizer='sgd'"]}, "is a setting of method.name = 'fedavg'"),
        ({"settings": ["b:data.heldout=3"]}, "fedmezo and b cannot be compared"),
        ({"settings": ["b:evaluation.metrics=['perplexity']"]}, "evaluation.metrics is ['loss']"),
        ({"overrides": ["method.name='fedmezo'"]}, "is what --methods says"),
        ({"methods": ["feedsign"]}, "feedsign: method.name = 'feedsign' cannot find a learning"),
        ({"methods": ["x=fedavg"]}, "as in --rates x=1e-3"),
    ],
)
def test_what_is_refused(path: Path, changes: dict[str, list[str]], words: str) -> None:
    given = {"overrides": [], "methods": ["fedmezo,b=decomfl"], "rates": [], "settings": []}
    given |= changes
    with pytest.raises(FedForwardError) as caught:
        read_variants(path, given["overrides"], given["methods"], given["rates"], given["settings"])
    assert words in str(caught.value)


def test_seeds_are_counted_from_the_runs_own() -> None:
    assert check_seeds(3, 4) == [4, 5, 6]
    for count, first in ((0, 0), (-1, 0), (1001, 0), (2, 2**63 - 1)):
        with pytest.raises(FedForwardError, match=f"--seeds {count} is not allowed"):
            check_seeds(count, first)


def test_a_whole_file_may_be_compared(tmp_path: Path) -> None:
    """Even one with every key, as a run keeps it."""
    file = write_config(tmp_path)
    assert "candidates" not in file.read_text(encoding="utf-8")
    assert len(read_variants(file, [], ["fedmezo,decomfl,fedkseed"])) == 3


def test_what_a_run_has_spent() -> None:
    lines = [
        {"round": 0, "seconds": 0.0},
        {"round": 1, "seconds": 2.0, "learning_rates": {0: 1, 1: 1}, "passes": 4.0,
         "bytes": {"up": 10.0, "down": 5.0, "snapshots": 8}},
        # Restored from the ledger: its bytes are those of the round before.
        {"round": 2, "seconds": 2.0, "learning_rates": {0: 1}},
        {"round": 3, "seconds": 5.0, "learning_rates": {0: 1}, "passes": 9.0,
         "clients": {"asked": 4, "reported": 1}, "bytes": {"up": 1.0, "down": 1.0, "snapshots": 4}},
    ]  # fmt: skip
    assert spent(lines, "rounds") == [0.0, 1.0, 2.0, 3.0]
    assert spent(lines, "seconds") == [0.0, 2.0, 2.0, 5.0]
    assert spent(lines, "passes") == [0.0, 4.0, 4.0, 9.0]
    assert spent(lines, "bytes") == [0.0, 19.0, 38.0, 41.0]
    assert str(spent([*lines[:1], lines[2]], "bytes")) == "[0.0, nan]"
    assert str(spent([*lines[:1], lines[2]], "passes")) == "[0.0, nan]"
