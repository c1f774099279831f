"""Predicted memory: near what is counted, never less for more blocks, and plain numbers."""

import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from fedforward.core.batches import TokenBatch
from fedforward.core.errors import FedForwardError
from fedforward.core.steps import ProbePlan
from fedforward.methods.estimators import TwoPoint
from fedforward.models.base import CausalModel
from fedforward.models.blocks import transformer_blocks
from fedforward.models.full import FullModel
from fedforward.planning.memory.calibrate import calibrate
from fedforward.planning.memory.model import Activations, MemoryModel
from fedforward.planning.memory.tracker import bytes_alive, peak_bytes
from fedforward.planning.probe_grouping import step_probes
from tests.models.test_models import lora
from tests.models.test_probing import make

pytestmark = pytest.mark.slow

SEEN = ((1, 8), (2, 40))
NEW = ((3, 16), (9, 40))
#: "few" takes one probe at a time for the largest batches, and cuts them under LoRA.
KINDS = ("lora", "full cache", "full recompute", "lora few", "full few")


@pytest.fixture(scope="module", autouse=True)
def nothing_else() -> Iterator[None]:
    """What was there before is not looked through for tensors each time that they are counted."""
    # Libraries are loaded with the first models of a kind.
    for kind in ("lora", "full cache"):
        calibrate(build(kind)[0], SEEN)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def build(kind: str, family: str = "llama") -> tuple[CausalModel, int]:
    """A model, and the bytes of tensors alive before there was one."""
    before = bytes_alive()
    tune, _, how = kind.partition(" ")
    trajectory = "recompute" if how == "recompute" else "cache"
    plan = ProbePlan(2, 1, trajectory, 4, tokens_per_call=200 if how == "few" else 0)
    network = make(family)
    model = lora(network, plan=plan) if tune == "lora" else FullModel(network, plan=plan)
    return model, before


@pytest.fixture(scope="module", params=KINDS)
def calibrated(request: pytest.FixtureRequest) -> tuple[CausalModel, int, MemoryModel]:
    model, before = build(request.param)
    return model, before, calibrate(model, SEEN)


def sets(blocks: int) -> Iterator[np.ndarray[Any, np.dtype[np.bool_]]]:
    """Every choice of blocks, all but the empty one."""
    for number in range(1, 2**blocks):
        yield np.array([number >> place & 1 for place in range(blocks)], dtype=np.bool_)


def counted(model: CausalModel, active: Any, rows: int, length: int) -> int:
    tokens = np.arange(rows * length).reshape(rows, length) % 97
    probes = step_probes([TokenBatch(tokens, tokens)], 2, TwoPoint(1, 1e-3), active)
    model.clear_cache()
    peak = peak_bytes(lambda: model.evaluate(probes))
    model.clear_cache()
    return peak


def check(model: CausalModel, before: int, memory: MemoryModel, within: float) -> None:
    """Late, early and all blocks, on batches that the calibration has and has not seen."""
    count = len(memory.blocks)
    late, early, every = np.arange(count) == count - 1, np.arange(count) == 0, np.ones(count, bool)
    cases = [(SEEN[0], late), (SEEN[1], early), (SEEN[1], every)]
    cases += [(NEW[0], late), (NEW[0], every), (NEW[1], early)]
    for (rows, length), active in cases:
        measured = counted(model, active, rows, length) - before
        assert memory.peak(active, rows, length) == pytest.approx(measured, rel=within)


def test_a_prediction_is_near_what_is_counted(
    calibrated: tuple[CausalModel, int, MemoryModel],
) -> None:
    check(*calibrated, 0.1)


@pytest.mark.parametrize(("kind", "family"), [("full cache", "gpt2"), ("lora", "gemma2")])
def test_other_families(kind: str, family: str) -> None:
    model, before = build(kind, family)
    check(model, before, calibrate(model, SEEN), 0.1)


def test_more_blocks_never_take_less_and_the_sum_of_costs_is_a_bound(
    calibrated: tuple[CausalModel, int, MemoryModel],
) -> None:
    *_, memory = calibrated
    none = np.zeros(len(memory.blocks), np.bool_)
    for rows, length in (*SEEN, *NEW):
        groups, _ = memory.pass_shape(rows, length)
        slack = memory.fixed(rows, length) - memory.peak(none, rows, length)
        for active in sets(len(memory.blocks)):
            peak = memory.peak(active, rows, length)
            over = memory.fixed(rows, length) + memory.cost[active].sum() - peak
            absent = (memory.probes - groups) * np.array(memory.bank)[active].sum()
            assert 0 <= over <= slack + absent
            if active.all():
                assert over == absent
            for place in np.flatnonzero(~active):
                assert memory.peak(active | (np.arange(len(active)) == place), rows, length) >= peak


def test_what_offloading_blocks_would_save(
    calibrated: tuple[CausalModel, int, MemoryModel],
) -> None:
    """A prediction, from a model that is whole; one that is not is in `models/test_offload.py`."""
    model, _, memory = calibrated
    count = len(transformer_blocks(model.network))
    assert len(memory.residents) == count == 2 and not memory.streams
    streamed = replace(memory, streams=True)
    for active in sets(len(memory.blocks)):
        there = {int(b) for b, on in zip(memory.blocks, active, strict=True) if on and b.isdigit()}
        away = sum(size for n, size in enumerate(memory.residents) if n not in there)
        saved = memory.peak(active, 2, 40) - streamed.peak(active, 2, 40)
        assert away - max(memory.residents) <= saved <= away
        bound = streamed.fixed(2, 40) + streamed.cost[active].sum()
        assert bound >= streamed.peak(active, 2, 40)


def test_what_is_kept_beside_the_step_is_told_apart() -> None:
    model, _ = build("lora")
    once = calibrate(model, SEEN, caches_trajectory=False)
    based = calibrate(model, SEEN, from_base=True)
    active = np.ones(2, np.bool_)
    flat = once.adapters
    assert based.peak(active, 2, 40) - once.peak(active, 2, 40) == flat + model.state_bytes
    model, _ = build("full cache")
    assert not any(calibrate(model, SEEN, caches_trajectory=False).copies)
    assert calibrate(model, SEEN).copies == tuple(4 * n for n in model.layout.block_sizes)


def test_the_model_survives_json(calibrated: tuple[CausalModel, int, MemoryModel]) -> None:
    *_, memory = calibrated
    text = json.dumps(asdict(memory))
    again = MemoryModel.of(json.loads(text))
    assert again == memory
    active = np.ones(len(memory.blocks), np.bool_)
    assert again.peak(active, 3, 20) == memory.peak(active, 3, 20)


def test_using_a_model_needs_no_pytorch(calibrated: tuple[CausalModel, int, MemoryModel]) -> None:
    *_, memory = calibrated
    code = (
        "import json, sys, numpy as np\n"
        "from fedforward.planning.memory.model import MemoryModel\n"
        "memory = MemoryModel.of(json.load(sys.stdin))\n"
        "print(memory.peak(np.ones(len(memory.blocks), bool), 2, 40), 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    text = json.dumps(asdict(memory))
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    peak = memory.peak(np.ones(len(memory.blocks), np.bool_), 2, 40)
    assert done.stdout.split() == [str(peak), "False"]


def test_calibrating_leaves_no_trace(calibrated: tuple[CausalModel, int, MemoryModel]) -> None:
    model, _, memory = calibrated
    blocks = transformer_blocks(model.network)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.network.modules()]
    plan, digest, alive = model.plan, model.digest(), bytes_alive()
    assert calibrate(model, SEEN) == memory
    assert (model.plan, model.digest(), bytes_alive()) == (plan, digest, alive)
    assert len(blocks) == 2
    assert hooks == [
        len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.network.modules()
    ]


def test_an_interrupted_calibration_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = build("full cache")
    plan = model.plan

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model.network, "forward", stop)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, SEEN)
    assert model.plan is plan
    assert not any(m._forward_hooks for m in model.network.modules())


def test_between_and_beyond_what_was_measured() -> None:
    flat = Activations((8,), ((10, 20),), ((100, 300),))
    assert [flat.at(n, 8) for n in (5, 10, 15, 20, 30)] == [0, 100, 200, 300, 500]
    assert flat.at(15, 99) == 200
    single = Activations((8,), ((10,),), ((100,),))
    assert single.at(25, 8) == 250
    # 3 bytes a token, and 2 for each token of a row that a token sees.
    squares = Activations((4, 8), ((4, 8), (8, 16)), ((44, 88), (152, 304)))
    assert squares.at(30, 6) == 30 * (3 + 2 * 6)
    assert squares.at(30, 10) == 30 * (3 + 2 * 10)
    assert squares.at(30, 2) == squares.at(30, 4)


def test_errors_say_what_to_do(calibrated: tuple[CausalModel, int, MemoryModel]) -> None:
    model, _, memory = calibrated
    with pytest.raises(FedForwardError, match=r"active has shape \(1,\), but this model has"):
        memory.peak(np.ones(1, np.bool_), 2, 40)
    with pytest.raises(FedForwardError, match="0 rows of 40 tokens has nothing to predict"):
        memory.fixed(0, 40)
    with pytest.raises(FedForwardError, match="needs the shape of at least one batch"):
        calibrate(model, [])
