"""Privacy of whole clients: bounds in whole units, noise of sums, a ledger of noisy sums."""

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedforward.federation.client_privacy import ClientBound, SumNoise
from fedforward.federation.ledger import Ledger
from fedforward.federation.privacy import epsilon
from fedforward.federation.secure_sums import EXTRA, LIMIT, UNIT, part_of
from fedforward.messages.report import Report
from fedforward.messages.secure import Total
from tests.federation.test_privacy import lines
from tests.methods.test_privacy import Seeded
from tests.support.command_line import command, write_config
from tests.support.configurations import content, refusal


def report(*gradients: float, loss: float = 0.5, skipped: int = 2) -> Report:
    return Report(3, 1, 9, loss, skipped, np.array(gradients, np.float32))


@pytest.mark.parametrize(("noise", "power"), [("gaussian", 2), ("laplace", 1)])
def test_a_client_is_bounded_in_the_units_of_a_sum(noise: Any, power: int) -> None:
    random = np.random.default_rng(0)
    bound = ClientBound(0.8, noise)
    most = Fraction(0.8) / Fraction(UNIT)
    for scale in (1e-3, 1.0, 1e4):
        found = bound(report(*(scale * random.standard_normal(50))))
        assert math.isnan(found.loss) and found.skipped == 0
        units = [int(value) for value in part_of(found).values.view(np.int64)]
        assert units[-EXTRA:] == [0, 0, 0]
        length = sum(abs(value) ** power for value in units)
        assert length <= most**power
        if scale == 1e4:
            assert length > 0.999 * most**power
    wild = bound(report(math.nan, 1.0))
    assert not wild.gradients.any()


def test_noise_of_a_sum_is_whole_and_stays_in_range() -> None:
    noise = SumNoise.of(2.0, 3.0, "gaussian")
    assert noise.scale == 6 * 2**36
    sums = np.array([5, -7, 11, 123, 4, 2], np.int64).view(np.uint64)
    drawn = Seeded(1).gaussian(3, noise.scale)
    found = SumNoise(noise.scale, entropy=Seeded(1)).added(Total(4, sums))
    assert found.values.view(np.int64).tolist() == [*(np.array([5, -7, 11]) + drawn), 0, 0, 0]
    far = SumNoise(10 * round(LIMIT / UNIT), entropy=Seeded(1)).added(Total(4, sums))
    assert np.abs(far.values.view(np.int64)).max() <= 4 * round(LIMIT / UNIT)


OPTIONS = [
    "federation.rounds=3",
    "federation.clients=4",
    "federation.weights=equal",
    "federation.secure_sums=true",
    "method.name=decomfl",
    "method.learning_rate=1e-3",
    "method.local_steps=2",
    "privacy.level=client",
    "privacy.clip=20.0",
    "privacy.delta=1e-3",
    "privacy.noise_multiplier=5.0",
]


def sums(folder: Path) -> list[np.ndarray]:
    ledger = Ledger(folder / "ledger.sqlite")
    found = [record.total.values.view(np.int64) for record in ledger.rounds() if record.total]
    assert ledger.header["privacy"] == [20.0, 5.0, 1e-3, 1.0, "gaussian", "add-remove", "client"]
    ledger.close()
    return found


def test_a_run_whose_ledger_has_noisy_sums_alone(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    for name in ("one", "two"):
        done = command("run", config, *OPTIONS, "--out", tmp_path / name)
        assert done.code == 0, done
        assert command("verify", tmp_path / name).code == 0
    first, second = sums(tmp_path / "one"), sums(tmp_path / "two")
    assert len(first) == 3 and all(len(total) == 2 + EXTRA for total in first)
    # What was drawn cannot be drawn again, and nothing else is in a sum.
    assert all((a[:2] != b[:2]).all() for a, b in zip(first, second, strict=True))
    assert not any(total[2:].any() for total in first)
    found = lines(tmp_path / "one")[1:]
    assert [line["epsilon"] for line in found] == [epsilon(1.0, 5.0, n, 1e-3) for n in (1, 2, 3)]
    assert all(line["training_loss"] is None for line in found)
    text = (tmp_path / "one" / "metrics.jsonl").read_text("utf-8").splitlines()[-1]
    assert json.loads(text)["delta"] == 1e-3


GOOD = {
    "privacy__level": "client",
    "privacy__clip": 1.0,
    "privacy__delta": 1e-3,
    "privacy__noise_multiplier": 1.0,
    "federation__weights": "equal",
    "federation__secure_sums": True,
    "method__learning_rate": 1e-3,
    "method__name": "decomfl",
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"federation__secure_sums": False}, ["federation.secure_sums = true", "'decomfl'"]),
        ({"method__name": "fedmezo"}, ["method.name = 'fedmezo'", "needs single reports"]),
        ({"privacy__examples": 10}, ["examples = 10", "leave examples out"]),
        ({"privacy__delta": 0.4}, ["delta = 0.4 is not below 1 / federation.clients"]),
        ({"federation__participation": 0.5}, ["federation.participation"]),
        ({"method__learning_rate": "auto"}, ["method.learning_rate = 'auto'"]),
        ({"lora__init": "aligned"}, ["lora.init = 'aligned'", "data.public"]),
    ],
)
def test_what_privacy_of_clients_does_not_go_with(changes: Any, words: list[str]) -> None:
    said = refusal(content(**{**GOOD, **changes}))
    assert all(word in said for word in words), said
