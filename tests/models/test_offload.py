"""Blocks offloaded to host memory: the bits of a model that is whole, and what it takes.

On the CPU "the device" is main memory too, so that everything but the saving can be seen there.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedforward.core.batches import PromptBatch, TokenBatch
from fedforward.core.errors import FedForwardError
from fedforward.core.steps import Evaluation, Probe, ProbePlan, Steps, Update
from fedforward.federation.ledger import Ledger
from fedforward.methods.estimators import TwoPoint
from fedforward.models.base import CausalModel
from fedforward.models.blocks import transformer_blocks
from fedforward.models.full import FullModel
from fedforward.models.offload import place_the_rest
from fedforward.planning.memory.calibrate import calibrate
from fedforward.planning.memory.tracker import bytes_alive, peak_bytes
from fedforward.planning.probe_grouping import step_probes
from tests.models.test_models import PERTURBATION, TRAJECTORY, batch, lora, plan
from tests.models.test_probing import make

Make = Callable[..., Any]
KINDS = ("lora", "lora B", "full cache", "full recompute")
GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")],
)


def build(kind: str, family: str, device: str, offloads: bool) -> CausalModel:
    tune, _, how = kind.partition(" ")
    network = make(family)
    if offloads:
        # As they are loaded.
        place_the_rest(network, device)
    else:
        network.to(device)
    model: CausalModel
    if tune == "lora":
        model = lora(network, factors=how or "both", plan=plan(2))
    else:
        model = FullModel(network, plan=plan(2, how), reload=lambda: make(family))
    if offloads:
        model.offload_to_host()
    return model


def moved(model: CausalModel, blocks: Sequence[str], steps: Steps) -> Steps:
    return steps.within(np.array([name in blocks for name in model.layout.blocks]))


def step(model: CausalModel, blocks: Sequence[str]) -> list[Evaluation]:
    """Both signs of a client that perturbs some blocks, in the middle of its round."""
    trajectory = moved(model, blocks, TRAJECTORY)
    signs = [moved(model, blocks, PERTURBATION.scaled(sign)) for sign in (1.0, -1.0)]
    return model.evaluate([Probe(batch(), trajectory, sign) for sign in signs])


def life(model: CausalModel) -> list[Any]:
    """What a model goes through in two rounds and a catching-up, and what it answers."""
    found: list[Any] = []
    for blocks in (["0"], ["1"], ["1", "norm", "head"], ["0", "1"], []):
        found += [e.sums.tolist() for e in step(model, blocks)]
        found += [e.sums.tolist() for e in model.evaluate([Probe(batch(1))])]
    model.commit([Update(TRAJECTORY.scaled(0.1), 3), Update(PERTURBATION, 4, decay=0.9)])
    found += [model.digest(), model.export_state().tolist()]
    found += [e.sums.tolist() for e in step(model, ["1"])]
    prompts = PromptBatch(np.array([[5, 6, 7]]), np.ones((1, 3), np.int64), 4, None)
    found += [own.tolist() for own in model.generate([Probe(prompts)])]
    model.assign_bytes(model.export_bytes())
    model.reset()
    found += [e.sums.tolist() for e in step(model, ["0"])]
    found += [model.digest()]
    return found


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("kind", KINDS)
def test_where_blocks_wait_changes_no_bit(kind: str, family: str, device: str) -> None:
    assert life(build(kind, family, device, True)) == life(build(kind, family, device, False))


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_what_blocks_share_stays(tune: str) -> None:
    """A weight of two blocks, and one of a block and the head, are on the device all the time."""

    def shared(offloads: bool) -> CausalModel:
        network = make("llama")
        first, second = transformer_blocks(network)
        second.mlp.down_proj.weight = first.mlp.down_proj.weight
        first.beside = network.lm_head
        model = (
            lora(network, plan=plan(2), targets=["q_proj", "down_proj"])
            if tune == "lora"
            else FullModel(network, plan=plan(2), reload=lambda: None)
        )
        if offloads:
            model.offload_to_host()
        return model

    models = [shared(offloads) for offloads in (True, False)]
    offload = models[0].offload
    assert offload is not None
    block = transformer_blocks(models[0].network)[0]
    down = block.mlp.down_proj.base_layer if tune == "lora" else block.mlp.down_proj
    stays = {id(down.weight), id(models[0].network.lm_head.weight)}
    moving = {tensor.data_ptr() for tensor in offload.moving()}
    for weight in models[0].network.parameters():
        assert not (id(weight) in stays and weight.data_ptr() in moving)
    found = []
    for model in models:
        steps = [step(model, ["0"]), step(model, ["1"])]
        model.commit([Update(TRAJECTORY, 3)])
        steps += [step(model, ["1"]), step(model, ["0", "1"])]
        found.append([[e.sums.tolist() for e in own] for own in steps] + [model.digest()])
    assert found[0] == found[1]


def test_a_device_that_is_full_leaves_a_model_that_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = [build("full cache", "llama", "cpu", offloads) for offloads in (True, False)]
    offload = models[0].offload
    assert offload is not None
    step(models[0], ["1"])
    with monkeypatch.context() as full:

        def fail(*_: Any) -> None:
            raise RuntimeError("out of memory")

        full.setattr(offload.blocks[0], "fetch", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            step(models[0], ["0"])
    assert offload.pinned == set()
    assert life(models[0]) == life(models[1])


def test_an_interrupted_pass_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is no `Exception`: what had been fetched is dropped when blocks move next."""
    models = [build("full recompute", "llama", "cpu", offloads) for offloads in (True, False)]
    block = transformer_blocks(models[0].network)[0]
    with monkeypatch.context() as broken:

        def stop(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        broken.setattr(block.mlp, "forward", stop)
        with pytest.raises(KeyboardInterrupt):
            step(models[0], ["1"])
    for model in models:
        model.commit([Update(TRAJECTORY, 3)])
    assert life(models[0]) == life(models[1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_committed_where_it_waits(tiny_network: Make, dtype: str) -> None:
    models = [FullModel(tiny_network(dtype), plan=plan(2)) for _ in range(2)]
    models[0].offload_to_host()
    for model in models:
        step(model, ["1"])
        model.commit([Update(TRAJECTORY, 3), Update(PERTURBATION, 4)])
    assert models[0].digest() == models[1].digest()
    assert models[0].changed_share == models[1].changed_share


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_is_there_while_it_runs(kind: str) -> None:
    model = build(kind, "llama", "cpu", True)
    offload = model.offload
    assert offload is not None
    step(model, ["1"])
    assert offload.pinned == {1}
    blocks = transformer_blocks(model.network)
    waiting = [weight.data_ptr() for weight in blocks[0].parameters()]
    held = [weight.data_ptr() for weight in blocks[1].parameters()]
    seen: list[list[int]] = []
    hooks = [
        block.register_forward_pre_hook(
            lambda *_: seen.append([w.data_ptr() for w in blocks[0].parameters()])
        )
        for block in blocks
    ]
    step(model, ["1"])
    model.evaluate([Probe(batch(1))])
    for hook in hooks:
        hook.remove()
    flat = {id(tensor) for tensor in model.tensors.values()}
    moves = [id(weight) not in flat for weight in blocks[0].parameters()]
    assert any(moves)
    for place, inside in enumerate(moves):
        there = [pointers[place] != waiting[place] for pointers in seen]
        # Once while the first block runs, and no more while the second does.
        assert there == ([True, False] * (len(seen) // 2) if inside else [False] * len(seen))
    assert [weight.data_ptr() for weight in blocks[0].parameters()] == waiting
    assert [weight.data_ptr() for weight in blocks[1].parameters()] == held
    step(model, ["norm"])
    assert offload.pinned == set()


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_merged_model_is_whole_again(device: str) -> None:
    """In host memory, with nothing left of what moved its blocks."""
    models = [build("lora", "llama", device, offloads) for offloads in (True, False)]
    for model in models:
        step(model, ["1"])
        model.commit([Update(TRAJECTORY, 3)])
    offloaded, whole = (model.merge() for model in models)
    assert not any(m._forward_hooks for m in transformer_blocks(offloaded))
    for (name, one), (_, other) in zip(
        offloaded.named_parameters(), whole.named_parameters(), strict=True
    ):
        assert one.device.type == "cpu"
        assert torch.allclose(one, other.cpu(), atol=0 if device == "cpu" else 1e-6), name


def test_an_error_in_a_block_sends_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("full recompute", "llama", "cpu", True)
    expected = step(model, ["1"])
    block = transformer_blocks(model.network)[0]
    waiting = [weight.data_ptr() for weight in block.parameters()]
    with monkeypatch.context() as broken:

        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError("out of memory")

        broken.setattr(block.mlp, "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            step(model, ["1"])
    assert [weight.data_ptr() for weight in block.parameters()] == waiting
    again = step(model, ["1"])
    assert [e.sums.tolist() for e in again] == [e.sums.tolist() for e in expected]


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("kind", KINDS)
def test_what_it_takes_is_what_is_predicted(kind: str, device: str) -> None:
    """Within a tenth; on the CPU what waits is counted as well, and is taken off."""
    shapes = [(1, 8), (4, 40)]
    # On CUDA the tensors of before, without the matrix library's workspace: the prediction has it.
    before = bytes_alive(device if device == "cuda" else None)
    model = large(kind, device)
    assert model.offload is not None
    waiting = sum(model.offload.sizes) if device == "cpu" else 0
    memory = calibrate(model, shapes)
    assert memory.streams and model.offload.sizes == memory.residents
    depth = len(memory.residents)
    peaks = []
    for count in (0, 1, depth // 2, depth):
        active = np.array([b.isdigit() and int(b) >= depth - count for b in memory.blocks])
        for rows, length in shapes:
            tokens = np.arange(rows * length).reshape(rows, length) % 97
            probes = step_probes([TokenBatch(tokens, tokens)], 2, TwoPoint(1, 1e-3), active)
            model.evaluate(probes)
            model.clear_cache()
            measured = peak_bytes(lambda probes=probes: model.evaluate(probes)) - before - waiting
            model.clear_cache()
            predicted = memory.peak(active, rows, length)
            if count:
                assert predicted == pytest.approx(measured, rel=0.1)
            assert memory.fixed(rows, length) + memory.cost[active].sum() >= predicted
        peaks.append(memory.peak(active, *shapes[0]))
    # Offloaded blocks cost one block at most.
    assert peaks[1] - peaks[0] < peaks[3] - peaks[2]
    assert peaks[3] - peaks[2] > 0.9 * sum(memory.residents[: depth // 2]) - memory.residents[0]


def large(kind: str, device: str) -> CausalModel:
    """A model that is mostly blocks."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        hidden_size=96,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=256,
        vocab_size=97,
        max_position_embeddings=64,
    )
    network = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False).to(device)
    tune, _, how = kind.partition(" ")
    model: CausalModel
    if tune == "lora":
        model = lora(network, factors=how or "both", plan=ProbePlan(2, 1, "cache", 4))
    else:
        model = FullModel(network, plan=ProbePlan(2, 1, how, 4))
    model.offload_to_host()
    return model


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_run_has_the_same_ledger(
    configure: Any, carry_out: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tune: str
) -> None:
    # Whole runs need the configuration, which needs pydantic; the other tests do not.
    from fedforward.training import build as experiment
    from fedforward.training import replay as artefacts

    settings = configure(
        model__tune=tune,
        method__name="zorba",
        planning__active=[2, 3] if tune == "lora" else [3, 5],
    )
    carry_out(settings, tmp_path / "whole")
    offloaded: list[CausalModel] = []
    original = CausalModel.offload_to_host
    monkeypatch.setattr(experiment, "offloads", lambda *_: True)
    monkeypatch.setattr(
        CausalModel, "offload_to_host", lambda self: (offloaded.append(self), original(self))[1]
    )
    carry_out(settings, tmp_path / "offloads")
    assert offloaded
    whole, offloads = (Ledger(tmp_path / name / "ledger.sqlite") for name in ("whole", "offloads"))
    assert whole.length and whole.chain == offloads.chain
    assert artefacts.verify(tmp_path / "offloads").differences == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__quantization": "nf4"}, ["offload = 'host'", "quantization = 'nf4'"]),
        ({"model__device_map": "auto"}, ["offload = 'host'", "device_map = 'auto'"]),
        ({"method__name": "fedavg"}, ["model.offload = 'host'", "'fedavg' has no probes"]),
        ({"run__memory_budget": "1 GiB"}, ["run.memory_budget = '1 GiB'", "offload = 'host'"]),
        ({"model__offload": "disk"}, ["model.offload = 'disk'", "'none', 'host'"]),
    ],
)
def test_what_does_not_go_with_it(configure: Any, changes: Any, words: list[str]) -> None:
    with pytest.raises(FedForwardError) as refused:
        configure(**({"model__offload": "host"} | changes))
    assert all(word in str(refused.value) for word in words)
