"""Measures what a step takes in memory, and fills a `MemoryModel` with it.

Sizes follow from the layout and the probe plan; only the activations of a forward pass are
measured, in a few passes. `model` predicts from the result without PyTorch.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import isqrt
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedforward.core.batches import TokenBatch
from fedforward.core.errors import FedForwardError
from fedforward.core.steps import NO_STEPS, Probe, Steps
from fedforward.directions import TILE
from fedforward.models import devices
from fedforward.models.base import CausalModel
from fedforward.models.blocks import transformer_blocks
from fedforward.models.lm_head import LOGITS_AT_ONCE, tile_rows
from fedforward.models.lora import LoraModel
from fedforward.planning.memory.model import (
    ALONE,
    STAGES,
    TOGETHER,
    UNDISPLACED,
    Activations,
    MemoryModel,
    total_bytes,
)
from fedforward.planning.memory.tracker import Tracker, bytes_alive


def calibrate(
    model: CausalModel,
    shapes: Sequence[tuple[int, int]],
    probes_per_step: int = 2,
    *,
    caches_trajectory: bool = True,
    from_base: bool = False,
) -> MemoryModel:
    """Measure the activations of a model's forward passes, and derive the rest.

    The shortest and the longest rows are measured: one of them, as many as the largest pass takes,
    and a number between. So at most six passes are run with adapters, and eighteen where weights
    are displaced. The model is left as it was, but for what it keeps between calls (`clear_cache`).
    Where inactive blocks are offloaded to host memory, one block is moved and measured for all, so
    that no more than that has to fit.

    Args:
        model: with the plan that is to be predicted.
        shapes: rows and length of the batches of interest, at least one; `peak` reads between
            them, and goes on along straight lines beyond them.
        probes_per_step: of a client.
        caches_trajectory: whether clients take more than one local step, and cache their sum.
        from_base: whether the method keeps a copy of the tuned tensors' first values.

    Raises:
        FedForwardError: there are no shapes, or one that has nothing to predict.
    """
    if not shapes:
        raise FedForwardError("Calibrating memory needs the shape of at least one batch.")
    derived = _derive(model, probes_per_step, caches_trajectory, from_base)
    plan, kept = model.plan, model.kept
    # A plain pass takes as much as one on kept rows, and leaves none of these texts behind.
    model.kept = None
    model.clear_cache()
    try:
        _peaks(model, derived, 1, 1, 2)
        model.clear_cache()
        derived = replace(derived, library=_library(model.device))
        tables = {
            f"{stage} {mode}": table
            for mode in _modes(derived, shapes)
            for stage, table in _tables(model, derived, mode, shapes).items()
        }
    finally:
        model.plan, model.kept = plan, kept
        model.clear_cache()
    return replace(derived, activations=tables)


def _modes(derived: MemoryModel, shapes: Sequence[tuple[int, int]]) -> list[str]:
    """What has to be told apart for batches of these shapes.

    An adapter from the bank computes what one that is not displaced computes.
    """
    groups = {derived.pass_shape(*shape)[0] for shape in shapes}
    found = [TOGETHER] if max(groups) > 1 else []
    if derived.cuts_rows:
        return found or [ALONE]
    return [UNDISPLACED, *([ALONE] if 1 in groups else []), *found]


def _tables(
    model: CausalModel, derived: MemoryModel, mode: str, shapes: Sequence[tuple[int, int]]
) -> dict[str, Activations]:
    """Activations of each stage for one mode of meeting weights."""
    passes = [(*derived.pass_shape(*shape), shape[1]) for shape in shapes]
    if mode == TOGETHER:
        passes = [found for found in passes if found[0] > 1]
    elif mode == ALONE:
        passes = [found for found in passes if found[0] == 1]
    groups = 1 if mode == UNDISPLACED else max(group for group, _, _ in passes)
    most = max(group * height * length for group, height, length in passes)
    lengths = sorted({edge(length for *_, length in passes) for edge in (min, max)})
    tokens: list[tuple[int, ...]] = []
    peaks: list[list[tuple[int, ...]]] = []
    for length in lengths:
        highest = max(1, most // (groups * length))
        heights = sorted({1, isqrt(highest), highest})
        tokens.append(tuple(groups * height * (length - 1) for height in heights))
        found = [_peaks(model, derived, groups, height, length, mode) for height in heights]
        peaks.append(list(zip(*found, strict=True)))
    fed = tuple(length - 1 for length in lengths)
    return {
        stage: Activations(fed, tuple(tokens), tuple(own))
        for stage, own in zip(STAGES, zip(*peaks, strict=True), strict=True)
    }


def _peaks(
    model: CausalModel,
    derived: MemoryModel,
    groups: int,
    height: int,
    length: int,
    mode: str = TOGETHER,
) -> tuple[int, ...]:
    """One measured pass: what each stage took beyond what is derived, in the order of `STAGES`."""
    on = _measured_blocks(derived)
    vocabulary = model.network.get_input_embeddings().weight.shape[0]
    tokens = np.arange(height * length, dtype=np.int64).reshape(height, length) % vocabulary
    moves = [Steps.of([k // 2], [1e-3 if k % 2 == 0 else -1e-3]) for k in range(groups)]
    if not on.all():
        moves = [move.within(on) for move in moves]
    # A batch for each probe, so that no prefix is shared, whichever blocks are tuned.
    probes = [
        Probe(TokenBatch(tokens, tokens), NO_STEPS, NO_STEPS if mode == UNDISPLACED else move)
        for move in moves
    ]
    model.clear_cache()
    model.plan = replace(
        model.plan, probes_per_call=groups, tokens_per_call=0, trajectory="recompute"
    )
    found = _measure(model, probes)
    moving = 0 if mode == UNDISPLACED else groups
    scratch = zip(derived.blocks, derived.scratch, on, strict=True)
    tile = max((size for b, size, own in scratch if own and b != "embeddings"), default=0)
    last = max(tile, *derived.head_scratch)
    displaced = moving and any(derived.head_scratch)
    size, most = derived.logits
    logits = size * min(most, (height if displaced else groups * height) * (length - 1))
    bank = moving * total_bytes(derived.bank, on)
    body_known = bank + moving * tile
    known = (bank, body_known, body_known, bank + moving * last + logits)
    return tuple(max(0, found[stage] - own) for stage, own in zip(STAGES, known, strict=True))


def _measured_blocks(derived: MemoryModel) -> NDArray[np.bool_]:
    """The blocks that a measured pass moves, bool [B]: all, or one transformer block at most."""
    places = [place for place, name in enumerate(derived.blocks) if name.isdigit()]
    on = np.ones(len(derived.blocks), np.bool_)
    if derived.streams and places:
        largest = max(places, key=lambda place: derived.residents[int(derived.blocks[place])])
        on[[place for place in places if place != largest]] = False
    return on


def _measure(model: CausalModel, probes: Sequence[Probe]) -> dict[str, int]:
    """Peak bytes of each stage of one forward pass above what was there before."""
    found = dict.fromkeys(STAGES, 0)
    blocks = transformer_blocks(model.network)
    offload = model.offload
    with _meter(model.device) as take:

        def ended(stage: str, number: int | None = None, once: bool = False) -> Any:
            def hook(*_: Any) -> None:
                # What follows the head may be asked for by running the network around it.
                if once and found[stage]:
                    return
                passing = 0
                if offload is not None and number is not None:
                    passing = 0 if number in offload.pinned else offload.sizes[number]
                found[stage] = max(found[stage], take() - passing)

            return hook

        hooks = [
            block.register_forward_hook(ended("block", number))
            for number, block in enumerate(blocks)
        ]
        # Before the first block is fetched, if it has to be.
        hooks += [
            block.register_forward_pre_hook(ended("embeddings"), prepend=True)
            for block in blocks[:1]
        ]
        hooks.append(model.network.base_model.register_forward_hook(ended("norm", once=True)))
        try:
            model.evaluate(probes)
        finally:
            for handle in hooks:
                handle.remove()
        ended("head")()
    return found


@contextmanager
def _meter(device: torch.device) -> Iterator[Any]:
    """A function that gives the peak of bytes since it was last called, above the beginning."""
    if not devices.is_accelerator(device):
        with Tracker() as tracker:

            def since() -> int:
                peak: int = tracker.peak
                tracker.peak = tracker.now
                return peak

            yield since
        return
    begin = devices.allocated(device)

    def allocated() -> int:
        peak = devices.peak_allocated(device)
        devices.reset_peak(device)
        return peak - begin

    allocated()
    yield allocated


def _library(device: torch.device) -> int:
    """What an accelerator's allocator has given out that no tensor is."""
    if not devices.is_accelerator(device):
        return 0
    return max(0, devices.allocated(device) - bytes_alive(device.type))


# What follows from layout and plan ----------------------------------------------------------------


def _derive(
    model: CausalModel, probes_per_step: int, caches_trajectory: bool, from_base: bool
) -> MemoryModel:
    """Everything but the activations."""
    layout, plan = model.layout, model.plan
    nothing = (0,) * len(layout.blocks)
    bank = scratch = head_scratch = copies = nothing
    flat = 0
    if isinstance(model, LoraModel):
        tiles = np.zeros(len(layout.blocks), np.int64)
        for block, begin, end in layout.segments:
            tiles[block] += end - begin
        bank = tuple((4 * TILE * tiles).tolist())
        flat = model.flat.untyped_storage().nbytes()
    else:
        scratch, head_scratch = _scratch(model)
        if caches_trajectory and plan.trajectory == "cache":
            copies = tuple(4 * size for size in layout.block_sizes)
    outside, residents = _weights(model)
    return MemoryModel(
        blocks=layout.blocks,
        depths=tuple(depth * model.plan.shares_prefix for depth in model.prefix.depths),
        outside=outside,
        residents=residents,
        adapters=flat,
        trajectory_cache=flat if caches_trajectory else 0,
        base=model.state_bytes if from_base else 0,
        library=0,
        bank=bank,
        copies=copies,
        scratch=scratch,
        head_scratch=head_scratch,
        logits=_logit_tile(model),
        probes=min(plan.probes_per_call, probes_per_step),
        tokens_per_call=plan.tokens_per_call,
        cuts_rows=isinstance(model, LoraModel),
        streams=model.offload is not None,
        activations={},
    )


def _scratch(model: CausalModel) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """For each block the largest tile of its matrices, and that of the output layer."""
    # Embeddings are taken by the rows that are present.
    tables = {
        module.weight.data_ptr()
        for module in model.network.modules()
        if isinstance(module, nn.Embedding)
    }
    head = getattr(model.head.module, "weight", None)
    own, last = ([0] * len(model.layout.blocks) for _ in range(2))
    for owner, tensor in zip(model.layout.owners, model.tensors.values(), strict=True):
        if tensor.dim() != 2:
            continue
        rows = tile_rows(tensor, model.device.type)
        tile = rows * tensor.shape[1] * tensor.element_size()
        if head is not None and tensor.data_ptr() == head.data_ptr():
            last[owner] = max(last[owner], tile)
        elif tensor.data_ptr() not in tables:
            own[owner] = max(own[owner], tile)
    return tuple(own), tuple(last)


def _logit_tile(model: CausalModel) -> tuple[int, int]:
    """Bytes of one token's logits in a tile of the vocabulary, and the tokens taken at once."""
    if not model.head.sliceable:
        return 0, 0
    assert model.head.module is not None
    weight: Any = model.head.module.weight
    rows = tile_rows(weight)
    at_once = LOGITS_AT_ONCE.get(weight.device.type, LOGITS_AT_ONCE["cuda"])
    size = weight.element_size()
    # A soft cap takes a tile before and one after it; half precision is widened beside the tile.
    copies, casts = (3, 2) if model.head.after is not None else (1, 1)
    return rows * max(copies * size, casts * size + (4 if size < 4 else 0)), max(1, at_once // rows)


def _weights(model: CausalModel) -> tuple[int, tuple[int, ...]]:
    """Bytes of the network on its device, outside of and in each of its transformer blocks.

    LoRA's flat storage, of which the adapters are parts, is left out.
    """
    flat = getattr(model, "flat", None)
    seen = set() if flat is None else {flat.untyped_storage().data_ptr()}

    def fresh(module: Any) -> int:
        size = 0
        for tensor in _tensors_of(module):
            storage = tensor.untyped_storage()
            if tensor.device.type == model.device.type and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                size += storage.nbytes()
        return size

    if model.offload is not None:
        seen.update(tensor.untyped_storage().data_ptr() for tensor in model.offload.moving())
        return fresh(model.network), model.offload.sizes
    blocks = tuple(fresh(block) for block in transformer_blocks(model.network))
    return fresh(model.network), blocks


def _tensors_of(module: Any) -> Iterable[torch.Tensor]:
    """Parameters, buffers, and the scales of quantised weights."""
    yield from module.parameters()
    yield from module.buffers()
    for part in module.modules():
        state = getattr(getattr(part, "weight", None), "quant_state", None)
        for held in (state, getattr(state, "state2", None)):
            if held is not None:
                yield from (v for v in vars(held).values() if isinstance(v, torch.Tensor))
