"""Probes that move different blocks: as if the weights of those blocks had moved, and no others."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fedforward.core.steps import Probe, Steps, Update
from fedforward.directions import Distribution
from fedforward.directions.ops import accumulate
from fedforward.methods.estimators import TwoPoint
from fedforward.models.base import CausalModel
from fedforward.models.blocks import transformer_blocks
from fedforward.models.full import FullModel
from fedforward.models.masks import random_mask, small_weights_mask
from fedforward.planning.memory.tracker import peak_bytes
from fedforward.planning.probe_grouping import step_probes
from tests.models.test_models import batch, hugging_face_loss, lora, plan
from tests.models.test_probing import make

Make = Callable[..., Any]
FAMILIES = ("llama", "gpt2", "opt", "gemma2")


def build(tune: str, network: Any, together: int = 4, trajectory: str = "recompute") -> CausalModel:
    model: CausalModel
    if tune == "lora":
        model = lora(network, plan=plan(together))
    else:
        model = FullModel(network, plan=plan(together, trajectory), reload=lambda: make("llama"))
    # Somewhere else than at the base, so that inactive blocks are not neutral either.
    model.commit([Update(Steps.of([77], [0.02]), 0)])
    return model


def displaced_loss(tune: str, network: Any, steps: Steps, data: Any) -> float:
    """The loss of plain transformers on weights that were moved block by block."""
    model = build(tune, network, 1)
    layout = model.layout
    for name, tile, owner in zip(layout.names, layout.first_tiles, layout.owners, strict=True):
        own = steps.block(owner)
        accumulate(
            model.tensors[name],
            own.seeds,
            own.coefficients,
            first_tile=tile,
            distribution=Distribution.GAUSSIAN,
            out=model.tensors[name],
        )
    return hugging_face_loss(network, data)


def of_blocks(model: CausalModel, blocks: list[str], seeds: list[int], size: float) -> Steps:
    active = np.array([name in blocks for name in model.layout.blocks])
    return Steps.of(seeds, [size] * len(seeds)).within(active)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("trajectory", ["recompute", "cache"])
def test_clients_with_different_blocks_in_one_call(family: str, tune: str, trajectory: str) -> None:
    model = build(tune, make(family), 4, trajectory)
    names = model.layout.blocks
    sets = [[names[-1]], ["0"], ["1"], [*names]]
    probes = []
    for client, blocks in enumerate(sets):
        along = of_blocks(model, blocks, [5, 6], 0.03)
        data = batch(client, 2, 9 + client)
        probes += [
            Probe(data, along, of_blocks(model, blocks, [11], sign)) for sign in (0.05, -0.05)
        ]
    together = model.evaluate(probes)
    alone = [model.evaluate([probe])[0] for probe in probes]
    for probe, one, other in zip(probes, together, alone, strict=True):
        expected = displaced_loss(
            tune, make(family), probe.trajectory + probe.perturbation, probe.batch
        )
        assert one.mean == pytest.approx(expected, rel=1e-5)
        assert other.mean == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_prefix_is_shared_below_the_first_active_block(tune: str) -> None:
    network = make("llama")
    model = build(tune, network)
    seen: list[int] = []
    transformer_blocks(network)[0].register_forward_hook(
        lambda _, args, out: seen.append(len(out if torch.is_tensor(out) else out[0]))
    )
    data = batch(1, 3)
    late = [Probe(data, perturbation=of_blocks(model, ["1"], [3], s)) for s in (0.1, -0.1)]
    early = [Probe(data, perturbation=of_blocks(model, ["0"], [3], s)) for s in (0.1, -0.1)]
    trailing = [
        Probe(data, of_blocks(model, ["0"], [9], 0.1), probe.perturbation) for probe in late
    ]
    for probes in (late, early, trailing):
        model.evaluate(probes)
    assert seen == [3, 6, 6]


def test_the_blocks_of_a_network() -> None:
    tied = FullModel(make("llama"), plan=plan(1)).layout
    assert tied.blocks == ("embeddings", "0", "1", "norm", "head")
    assert sum(tied.block_sizes) == tied.parameters
    assert FullModel(make("gpt2"), plan=plan(1)).layout.blocks == ("embeddings", "0", "1", "norm")
    assert lora(make("opt"), plan=plan(1)).layout.blocks[:2] == ("0", "1")
    for layout in (tied, lora(make("llama"), plan=plan(1)).layout):
        ends = [0, *(end for _, _, end in layout.segments)]
        assert [begin for _, begin, _ in layout.segments] == ends[:-1]
        assert ends[-1] == layout.tiles
        for name, owner in zip(layout.names, layout.owners, strict=True):
            block = layout.blocks[owner]
            assert not block.isdigit() or f".{block}." in name


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_commit_by_blocks_is_the_commit_of_each_block(tune: str) -> None:
    model, other = build(tune, make("llama")), build(tune, make("llama"))
    steps = of_blocks(model, ["0"], [5], 0.1) + of_blocks(model, ["1"], [6, 7], 0.2)
    before = {name: tensor.clone() for name, tensor in model.tensors.items()}
    model.commit([Update(steps, 1, 0.5), Update(Steps.of([8], [0.1]), 2)])
    displaced_loss_steps = [Update(steps, 1, 0.5), Update(Steps.of([8], [0.1]), 2)]
    for update in displaced_loss_steps:
        other.commit([update])
    assert model.digest() == other.digest()
    assert all((model.tensors[name] != before[name]).any() for name in before)


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_state_travels_as_bytes_and_goes_back_to_the_base(tune: str) -> None:
    fresh = build(tune, make("llama"))
    model = build(tune, make("llama"))
    model.commit([Update(Steps.of([8], [0.1]), 2)])
    fresh.assign_bytes(model.export_bytes())
    assert fresh.digest() == model.digest()
    with pytest.raises(Exception, match=r"state of 3 bytes was refused"):
        fresh.assign_bytes(b"abc")
    model.reset()
    start = (
        lora(make("llama"), plan=plan(4))
        if tune == "lora"
        else FullModel(make("llama"), plan=plan(4))
    )
    assert model.digest() == start.digest()
    # An update from the base does not see what came before it.
    fresh.reset()
    fresh.keep_base()
    fresh.commit([Update(Steps.of([1], [0.5]), 0), Update(Steps.of([8], [0.1]), 2, from_base=True)])
    model.commit([Update(Steps.of([8], [0.1]), 2)])
    assert fresh.digest() == model.digest()


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_fewer_active_blocks_take_less_memory(tune: str) -> None:
    """The bank of adapters, and the float32 copy under full tuning, hold active blocks alone."""
    network = make("llama")
    model = build(tune, network, 2, "cache")
    peaks = []
    for blocks in (["1"], ["0", "1"], list(model.layout.blocks)):
        active = np.array([name in blocks for name in model.layout.blocks])
        probes = step_probes([batch(1, 1, 5)], 2, TwoPoint(1, 1e-3), active)
        model.evaluate(probes)
        model.clear_cache()
        peaks.append(peak_bytes(lambda probes=probes: model.evaluate(probes)))  # type: ignore[misc]
    assert peaks[0] < peaks[1]
    assert (peaks[1] < peaks[2]) == (tune == "full")


@pytest.mark.parametrize("kind", ["random", "small"])
@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("trajectory", ["recompute", "cache"])
def test_a_mask_lets_the_rest_rest(kind: str, tune: str, trajectory: str) -> None:
    """A probe under a mask is the loss of weights of which only the masked ones moved."""
    network = make("llama")
    model = build(tune, network, 2, trajectory)
    if kind == "random":
        masks = random_mask(model.tensors, model.layout, 0.25, 3)
        share = sum(int(m.sum()) for m in masks.values()) / model.layout.parameters
        assert share == pytest.approx(0.25, abs=0.02)
    else:
        masks = small_weights_mask(model.tensors, 0.25)
        assert all(0.2 < float(m.float().mean()) < 0.3 for m in masks.values() if m.numel() > 40)
    along, across = Steps.of([5, 6], [0.1, 0.1]), Steps.of([11], [0.2])
    data = batch(1, 2)
    (free,) = model.evaluate([Probe(data, along, across)])
    model.clear_cache()
    model.masks = masks
    probes = [Probe(data, along, across), Probe(data, along, Steps.of([11], [-0.2]))]
    found, other = model.evaluate(probes)
    before = {name: tensor.clone() for name, tensor in model.tensors.items()}
    model.commit([Update(along + across, 0)])
    for name, tensor in model.tensors.items():
        moved = tensor != before[name]
        assert not moved[~masks[name]].any() and moved[masks[name]].float().mean() > 0.99
    assert found.mean == pytest.approx(hugging_face_loss(network, data), rel=1e-5)
    assert found.mean != pytest.approx(free.mean, rel=1e-4)
    assert found.mean != pytest.approx(other.mean, rel=1e-5)
