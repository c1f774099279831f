"""Shared parts of the tests: tiny networks, the demonstration model, a tiny configuration."""

import contextlib
import gc
import importlib
import json
import os
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

# A machine that only runs the `gpu` tests need not have hypothesis.
with contextlib.suppress(ImportError):
    from hypothesis import settings

    # Kernels compile in the first example, and shared machines pause: time says nothing here.
    settings.register_profile("fedforward", deadline=None)
    settings.load_profile("fedforward")

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Two workers share two cores (`-n 2`): more threads than one each would only wait for each other.
# It must be said before PyTorch is imported, here and in the processes that tests start.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

#: What a run imports when it gets there, and no test at its top.
LIBRARIES = (
    "datasets",
    "flwr_datasets.partitioner",
    "matplotlib.pyplot",
    "peft",
    "transformers.models.llama.modeling_llama",
)
DEMO_MODEL = Path(str(files("fedforward.demo").joinpath("model")))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Of the tests of faults, in tests/faults."""
    parser.addoption("--kills", type=int, default=100, help="kills of each kind")
    parser.addoption("--fault-seed", type=int, help="of every random choice of these tests")


ROOT = Path(__file__).parents[1]
_BEFORE = pytest.StashKey[set[str]]()


def _names() -> set[str]:
    """Of what lies in the root."""
    return {path.name for path in ROOT.iterdir()}


def pytest_sessionstart(session: pytest.Session) -> None:
    """Note what lies in the root, unless this is a worker of the session that does."""
    if not hasattr(session.config, "workerinput"):
        session.config.stash[_BEFORE] = _names()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail where a test has left a file in the root, and not in a folder of its own."""
    if _BEFORE not in session.config.stash:
        return
    new = _names() - session.config.stash[_BEFORE]
    left = sorted(name for name in new if not name.startswith(".") and name != "runs")
    if left:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        print(f"\nA test has left {', '.join(left)} in {ROOT.name}/.")


@pytest.fixture(scope="session", autouse=True)
def quiet_libraries() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="module", autouse=True)
def libraries_are_no_garbage() -> None:
    """Sets what there is before a module of tests aside from the garbage collector.

    A run counts the tensors alive, for which it collects garbage and looks at every object there
    is: that was half the time of a short run, and nearly all objects were those of libraries.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def imported_libraries() -> None:
    """What a run imports when it gets there is set aside as well."""
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()


@pytest.fixture
def tiny_network() -> Callable[..., Any]:
    """A function that makes a two-block Llama with random weights, the same each time."""

    def make(dtype: str = "float32", tie: bool = True, vocabulary: int = 97) -> Any:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=tie,
            initializer_range=0.1,
        )
        network = LlamaForCausalLM(config).to(getattr(torch, dtype))
        return network.eval().requires_grad_(False)

    return make


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A small data file with two sites."""
    from fedforward.demo.text import site_examples

    examples = site_examples(seed=0, per_site=12)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in examples), encoding="utf-8")
    return path


@pytest.fixture
def configure(rows: Path, imported_libraries: None) -> Callable[..., Any]:
    """A function that makes a configuration of a few short rounds on the demonstration model."""
    pytest.importorskip("pydantic", reason="the configuration needs pydantic")
    from fedforward.config.loading import validate
    from fedforward.config.schema import Config
    from fedforward.demo.text import ANSWER, PROMPT

    def make(**changes: Any) -> Config:
        content: dict[str, dict[str, Any]] = {
            "model": {"path": str(DEMO_MODEL)},
            "lora": {"rank": 2},
            "data": {
                "source": str(rows),
                "prompt": PROMPT,
                "answer": ANSWER,
                "heldout": 6,
                "sequence_length": 64,
            },
            "federation": {"clients": 2, "rounds": 3},
            "method": {"learning_rate": 3e-3, "mu": 1e-2, "local_steps": 2, "batch_size": 2},
            "run": {"evaluate_every": 2, "threads": 1},
        }
        for key, value in changes.items():
            section, _, name = key.partition("__")
            content.setdefault(section, {})[name] = value
        return validate(content)

    return make


@pytest.fixture
def carry_out() -> Callable[..., dict[str, Any]]:
    """A function that runs a configuration and returns its summary."""
    from fedforward.training.run import Run

    def go(config: Any, out: Path, resume: bool = False) -> dict[str, Any]:
        return Run(config, out, resume).fit().to_json()

    return go
