"""How many kills, and from which seed."""

import os
from typing import Any

import pytest

from tests.deployment.conftest import models, world

__all__ = ["models", "world"]
#: Kills of each kind in `make test`.
FEW = 3
#: Few kills are in `make test`; as many as `--kills` says in `make test-faults`.
AMOUNTS = ["few", pytest.param("many", marks=pytest.mark.faults)]


@pytest.fixture(params=AMOUNTS)
def kills(request: Any) -> int:
    return FEW if request.param == "few" else int(request.config.getoption("--kills"))


@pytest.fixture
def seed(request: Any, capsys: Any) -> int:
    """Of every random choice, printed, so that a failure can be had again with `--fault-seed`."""
    given = request.config.getoption("--fault-seed")
    chosen = int.from_bytes(os.urandom(4), "little") if given is None else int(given)
    with capsys.disabled():
        print(f" --fault-seed {chosen}", end="", flush=True)
    return chosen
