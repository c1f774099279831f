"""Rooms that must not need PyTorch do not import it; `make lint` holds the order of all rooms."""

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import fedforward

ROOT = Path(fedforward.__file__).parent
#: By room: the modules that need PyTorch, "*" where all but those after it do.
NEEDS_TORCH = {
    "core": set(),
    "config": set(),
    "messages": set(),
    "methods": set(),
    "data": set(),
    "federation": {"client"},
    "deployment": {"site", "tuning"},
    "reporting": set(),
    "analysis": {"derivatives", "diagnose", "federated", "subject"},
    "cli": {"plan_tables", "tuning_tables"},
}
SINGLE = [
    "fedforward",
    "fedforward.directions",
    "fedforward.directions.spec",
    "fedforward.evaluation.text_metrics",
    "fedforward.planning.activation",
    "fedforward.planning.allocator",
    "fedforward.training.assembly",
    "fedforward.training.comparison",
    "fedforward.training.divided",
    "fedforward.training.faults",
    "fedforward.training.loop",
    "fedforward.training.metrics",
    "fedforward.training.run_directory",
    "fedforward.training.spending",
    "fedforward.training.summary",
    "fedforward.training.variants",
]


def modules(room: str) -> list[str]:
    found = pkgutil.walk_packages([str(ROOT / room)], f"fedforward.{room}.")
    names = [module.name for module in found if not module.name.endswith("__main__")]
    return [name for name in names if name.split(".")[2] not in NEEDS_TORCH[room]]


@pytest.mark.parametrize("room", [*NEEDS_TORCH, "single modules"])
def test_a_room_needs_no_torch(room: str) -> None:
    names = SINGLE if room == "single modules" else modules(room)
    assert names
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, name\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *names], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_every_room_is_in_the_contract() -> None:
    import tomllib

    project = tomllib.loads((ROOT.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    layers = project["tool"]["importlinter"]["contracts"][0]["layers"]
    rooms = {path.name for path in ROOT.iterdir() if (path / "__init__.py").is_file()}
    assert rooms == set(layers)
