"""What a client's step will take in memory, predicted from plain numbers for any choice of blocks.

`calibrate` fills a `MemoryModel` from a model: sizes follow from the layout and the probe plan, and
only the activations of a forward pass are measured, in a few passes. Using the result needs no
PyTorch, which is imported where something is measured and nowhere else.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from math import isqrt
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedforward.core.errors import FedForwardError
from fedforward.core.steps import NO_STEPS, Probe, Steps
from fedforward.directions import TILE

if TYPE_CHECKING:
    import torch

    from fedforward.models.base import CausalModel

#: The parts of a forward pass, whose peaks are told apart.
STAGES = ("embeddings", "block", "norm", "head")
#: What weights are when a stage runs: as they are, displaced for one probe, for several.
RESTING, ALONE, TOGETHER = "resting", "alone", "together"


@dataclass(frozen=True)
class Activations:
    """Peak bytes of one stage of a forward pass, at the tokens and lengths that were measured.

    Attributes:
        lengths: tokens that a row feeds to the network, ascending.
        tokens: for each length, tokens of the passes over rows of it, ascending.
        peaks: bytes of each of these.
    """

    lengths: tuple[int, ...]
    tokens: tuple[tuple[int, ...], ...]
    peaks: tuple[tuple[int, ...], ...]

    def at(self, tokens: int, length: int) -> int:
        """Bytes for a pass of so many tokens in rows of so many.

        Straight lines between tokens, then between lengths at equal tokens; the latter is exact for
        what grows with the square of a length. Beyond what was measured the lines go on.
        """
        places = zip(self.tokens, self.peaks, strict=True)
        values = [_line(tokens, known, peaks) for known, peaks in places]
        # Rows shorter than any that was measured are not expected to take less for being short.
        found = values[0]
        if len(values) > 1:
            found = _line(max(length, self.lengths[0]), self.lengths, values)
        return max(0, round(found))


def _line(x: float, places: Sequence[float], values: Sequence[float]) -> float:
    """Piecewise linear through points; a single point stands for proportion."""
    if len(places) == 1:
        return values[0] * x / places[0]
    ends = enumerate(places[1:])
    left = next((place for place, end in ends if x <= end), len(places) - 2)
    share = (x - places[left]) / (places[left + 1] - places[left])
    return values[left] + share * (values[left + 1] - values[left])


@dataclass(frozen=True)
class MemoryModel:
    """Bytes of tensors alive at the worst moment of a client's step; B is the layout's blocks.

    `activations` and `library` are measured, everything else follows from layout and plan. Sizes
    are in bytes.

    Attributes:
        blocks: [B], names of the layout's blocks.
        depths: [B], the transformer block below which nothing depends on a block.
        outside: the network's weights outside of its transformer blocks.
        residents: the weights of each transformer block.
        adapters: tuned tensors that lie beside the network's weights (LoRA's flat storage).
        carried: LoRA's sum of a client's local steps: all adapters, whichever blocks are active.
        base: a copy of the tuned tensors for updates from the base, or 0.
        library: what the device's libraries hold; 0 on the CPU.
        bank: [B], a block's adapters in the bank, for each probe of a forward pass.
        copies: [B], a block's float32 copy that carries local steps.
        scratch: [B], the largest tile of a block's displaced weights, for each probe.
        head_scratch: [B], the largest tile of the output layer, for each probe, at the block that
            its weight belongs to ("embeddings" if it is tied); 0 at the others.
        logits: of one token in a tile of the vocabulary, and the tokens that are taken at once.
        probes: most probes in a forward pass.
        tokens_per_call: of the plan; 0 is any number.
        cuts_rows: whether a batch is cut by rows to keep to it.
        streams: whether transformer blocks that are not active wait in host memory and come to the
            device in turn (`model.offload = "host"`); what lies on the host is not counted then.
            Replace it to see what that would change.
        activations: by "stage way" (of `STAGES`, and `RESTING`, `ALONE` or `TOGETHER`), what a
            stage takes beyond all of the above.
    """

    blocks: tuple[str, ...]
    depths: tuple[int, ...]
    outside: int
    residents: tuple[int, ...]
    adapters: int
    carried: int
    base: int
    library: int
    bank: tuple[int, ...]
    copies: tuple[int, ...]
    scratch: tuple[int, ...]
    head_scratch: tuple[int, ...]
    logits: tuple[int, int]
    probes: int
    tokens_per_call: int
    cuts_rows: bool
    streams: bool
    activations: dict[str, Activations]

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "MemoryModel":
        """The model from what `dataclasses.asdict` made of it, also after a way through JSON."""
        tables = {
            name: Activations(**{key: _tuples(value) for key, value in table.items()})
            for name, table in content["activations"].items()
        }
        plain = {key: _tuples(content[key]) for key in content if key != "activations"}
        return cls(**plain, activations=tables)

    def peak(self, active: NDArray[np.bool_], rows: int, length: int) -> int:
        """Bytes at the worst moment of a step in the middle of a round, the weights included.

        The tokens of the batch are taken to differ, and all to be labelled: the worst case for
        embeddings and head. More active blocks never take less.

        Args:
            active: bool [B], the blocks that the client perturbs.
            rows: of the batch.
            length: tokens in a row.

        Raises:
            FedForwardError: `active` is not [B], or there is no row or no token to predict.
        """
        active = np.asarray(active, dtype=np.bool_)
        if active.shape != (len(self.blocks),):
            raise FedForwardError(
                f"active has shape {active.shape}, but this model has {len(self.blocks)} blocks: "
                f"{', '.join(self.blocks)}."
            )
        groups, height = self.pass_shape(rows, length)
        weights = sum(self._staying(number, active) for number in range(len(self.residents)))
        kept = groups * _total(self.bank, active) + _total(self.copies, active)
        return self._always + weights + kept + self._worst_stage(active, groups, height, length)

    def fixed(self, rows: int, length: int) -> int:
        """Bytes before blocks cost anything: with the active blocks' `cost` never below `peak`.

        Scratch and activations are those of all blocks, the worst there are. So the sum is above
        `peak` by at most `fixed(rows, length) - peak(no block, rows, length)`, and by the active
        blocks' bank for probes that do not fit into the pass; where blocks are streamed, also by
        the largest of them. Where every block is active and every probe in the pass it is `peak`,
        and that block more.

        Args and errors: see `peak`.
        """
        groups, height = self.pass_shape(rows, length)
        every = np.ones(len(self.blocks), np.bool_)
        weights = max(self.residents, default=0) if self.streams else sum(self.residents)
        return self._always + weights + self._worst_stage(every, groups, height, length)

    @cached_property
    def cost(self) -> NDArray[np.int64]:
        """int64 [B], bytes that an active block adds to `fixed`, whatever rows and length."""
        own = [
            self.residents[int(name)] if self.streams and name.isdigit() else 0
            for name in self.blocks
        ]
        bank, copies = np.array(self.bank, np.int64), np.array(self.copies, np.int64)
        return np.array(own, np.int64) + self.probes * bank + copies

    def pass_shape(self, rows: int, length: int) -> tuple[int, int]:
        """Probes in the largest forward pass of a step, and rows of each, as the plan has them.

        Raises:
            FedForwardError: there is no row or no token to predict.
        """
        if rows < 1 or length < 2:
            raise FedForwardError(
                f"A batch of {rows} rows of {length} tokens has nothing to predict: at least one "
                "row of two tokens is needed."
            )
        most = self.tokens_per_call or rows * length * self.probes
        if self.cuts_rows:
            rows = min(rows, max(1, most // (length * self.probes)))
        return max(1, min(self.probes, most // (rows * length))), rows

    @property
    def _always(self) -> int:
        """What is there whichever blocks are active, the transformer blocks' weights aside."""
        return self.outside + self.adapters + self.carried + self.base + self.library

    def _staying(self, number: int, active: NDArray[np.bool_]) -> int:
        """Bytes of a transformer block's weights that are on the device all the time."""
        named = dict(zip(self.blocks, active, strict=True))
        return self.residents[number] if not self.streams or named.get(str(number)) else 0

    def _worst_stage(self, active: NDArray[np.bool_], groups: int, height: int, length: int) -> int:
        """Scratch and activations, for `groups` probes of `height` rows in a pass.

        Rows below the first active block go through once. That the rows then lie there twice while
        that block runs is not counted: the embeddings, which networks hold on to, lie there once.
        """
        on = {name for name, own in zip(self.blocks, active, strict=True) if own}
        scratch = {b: s for b, s in zip(self.blocks, self.scratch, strict=True) if b in on}
        depths = [depth for depth, own in zip(self.depths, active, strict=True) if own]
        first = min(depths, default=0) if groups > 1 else 0
        tokens = height * (length - 1)
        moved = TOGETHER if groups > 1 else ALONE

        def taken(stage: str, displaced: bool, below: bool = False) -> int:
            ways = (RESTING, moved) if displaced else (RESTING,)
            count = tokens if below else groups * tokens
            return max(self._table(stage, way).at(count, length - 1) for way in ways)

        tile = scratch.get("embeddings", 0)
        peaks = [groups * tile + taken("embeddings", "embeddings" in on, first > 0)]
        for number in range(len(self.residents)):
            # A scratch that has grown stays until the end of the pass.
            tile = max(tile, scratch.get(str(number), 0))
            passing = self.residents[number] - self._staying(number, active)
            taken_here = taken("block", str(number) in on, number < first)
            peaks.append(passing + groups * tile + taken_here)
        tile = max(tile, scratch.get("norm", 0))
        peaks.append(groups * tile + taken("norm", "norm" in on))
        peaks.append(self._head_stage(active, tile, groups, tokens, length - 1))
        return max(peaks)

    def _head_stage(
        self, active: NDArray[np.bool_], tile: int, groups: int, tokens: int, length: int
    ) -> int:
        """Scratch, logits and the rest while losses are taken from what the head is given.

        Args:
            tile: of the scratch that is there, for each probe.
            tokens: of each probe.
        """
        own = _total(self.head_scratch, active)
        tokens_met = tokens if own else groups * tokens
        size, most = self.logits
        logits = size * min(most, tokens_met)
        if not own:
            return groups * tile + logits + self._table("head", RESTING).at(groups * tokens, length)
        # A head taken by tiles is given the same, displaced or not. Otherwise it is a module.
        ways = (RESTING,) if size else (RESTING, TOGETHER if groups > 1 else ALONE)
        given = max(self._table("head", way).at(groups * tokens, length) for way in ways)
        # A scratch that grows is there twice for a moment, before the first logits.
        growing = tile + own if own > tile else 0
        return given + max(groups * max(tile, own) + logits, groups * growing)

    def _table(self, stage: str, way: str) -> Activations:
        """As measured for this way of meeting weights, or for the nearest one that was."""
        near = {
            RESTING: (RESTING, ALONE, TOGETHER),
            ALONE: (ALONE, TOGETHER, RESTING),
            TOGETHER: (TOGETHER, ALONE, RESTING),
        }
        names = (f"{stage} {other}" for other in near[way])
        return next(self.activations[name] for name in names if name in self.activations)


def _total(sizes: Sequence[int], active: NDArray[np.bool_]) -> int:
    return sum(size for size, own in zip(sizes, active, strict=True) if own)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


# Calibration --------------------------------------------------------------------------------------


def calibrate(
    model: "CausalModel",
    shapes: Sequence[tuple[int, int]],
    probes_per_step: int = 2,
    *,
    carries: bool = True,
    from_base: bool = False,
) -> MemoryModel:
    """Measure the activations of a model's forward passes, and derive the rest.

    The shortest and the longest rows are measured: one of them, as many as the largest pass takes,
    and a number between. So at most six passes are run with adapters, and eighteen where weights
    are displaced. The model is left as it was, but for what it keeps between calls (`forget`).
    Where resting blocks wait in host memory, one block is moved and measured for all, so that no
    more than that has to fit.

    Args:
        model: with the plan that is to be predicted.
        shapes: rows and length of the batches of interest, at least one; `peak` reads between
            them, and goes on along straight lines beyond them.
        probes_per_step: of a client.
        carries: whether clients take more than one local step, so that a sum of them is kept.
        from_base: whether the method keeps a copy of the tuned tensors' first values.

    Raises:
        FedForwardError: there are no shapes, or one that has nothing to predict.
    """
    if not shapes:
        raise FedForwardError("Calibrating memory needs the shape of at least one batch.")
    derived = _derive(model, probes_per_step, carries, from_base)
    plan = model.plan
    model.forget()
    try:
        _peaks(model, derived, 1, 1, 2)
        model.forget()
        derived = replace(derived, library=_library(model.device))
        tables = {
            f"{stage} {way}": table
            for way in _ways(derived, shapes)
            for stage, table in _tables(model, derived, way, shapes).items()
        }
    finally:
        model.plan = plan
        model.forget()
    return replace(derived, activations=tables)


def _ways(derived: MemoryModel, shapes: Sequence[tuple[int, int]]) -> list[str]:
    """What has to be told apart for batches of these shapes.

    An adapter from the bank computes what one that rests computes.
    """
    groups = {derived.pass_shape(*shape)[0] for shape in shapes}
    found = [TOGETHER] if max(groups) > 1 else []
    if derived.cuts_rows:
        return found or [ALONE]
    return [RESTING, *([ALONE] if 1 in groups else []), *found]


def _tables(
    model: "CausalModel", derived: MemoryModel, way: str, shapes: Sequence[tuple[int, int]]
) -> dict[str, Activations]:
    """Activations of each stage for one way of meeting weights."""
    passes = [(*derived.pass_shape(*shape), shape[1]) for shape in shapes]
    if way == TOGETHER:
        passes = [found for found in passes if found[0] > 1]
    elif way == ALONE:
        passes = [found for found in passes if found[0] == 1]
    groups = 1 if way == RESTING else max(group for group, _, _ in passes)
    most = max(group * height * length for group, height, length in passes)
    lengths = sorted({edge(length for *_, length in passes) for edge in (min, max)})
    tokens: list[tuple[int, ...]] = []
    peaks: list[list[tuple[int, ...]]] = []
    for length in lengths:
        highest = max(1, most // (groups * length))
        heights = sorted({1, isqrt(highest), highest})
        tokens.append(tuple(groups * height * (length - 1) for height in heights))
        found = [_peaks(model, derived, groups, height, length, way) for height in heights]
        peaks.append(list(zip(*found, strict=True)))
    fed = tuple(length - 1 for length in lengths)
    return {
        stage: Activations(fed, tuple(tokens), tuple(own))
        for stage, own in zip(STAGES, zip(*peaks, strict=True), strict=True)
    }


def _peaks(
    model: "CausalModel",
    derived: MemoryModel,
    groups: int,
    height: int,
    length: int,
    way: str = TOGETHER,
) -> tuple[int, ...]:
    """One measured pass: what each stage took beyond what is derived, in the order of `STAGES`."""
    from fedforward.core.batches import TokenBatch

    on = _measured_blocks(derived)
    vocabulary = model.network.get_input_embeddings().weight.shape[0]
    tokens = np.arange(height * length, dtype=np.int64).reshape(height, length) % vocabulary
    moves = [Steps.of([k // 2], [1e-3 if k % 2 == 0 else -1e-3]) for k in range(groups)]
    if not on.all():
        moves = [move.within(on) for move in moves]
    # A batch for each probe, so that no prefix is shared, whichever blocks are tuned.
    probes = [
        Probe(TokenBatch(tokens, tokens), NO_STEPS, NO_STEPS if way == RESTING else move)
        for move in moves
    ]
    model.forget()
    model.plan = replace(
        model.plan, probes_per_call=groups, tokens_per_call=0, trajectory="recompute"
    )
    found = _measure(model, probes)
    moving = 0 if way == RESTING else groups
    scratch = zip(derived.blocks, derived.scratch, on, strict=True)
    tile = max((size for b, size, own in scratch if own and b != "embeddings"), default=0)
    last = max(tile, *derived.head_scratch)
    displaced = moving and any(derived.head_scratch)
    size, most = derived.logits
    logits = size * min(most, (height if displaced else groups * height) * (length - 1))
    bank = moving * _total(derived.bank, on)
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


def _measure(model: "CausalModel", probes: Sequence[Probe]) -> dict[str, int]:
    """Peak bytes of each stage of one forward pass above what was there before."""
    from fedforward.models.blocks import transformer_blocks

    found = dict.fromkeys(STAGES, 0)
    blocks = transformer_blocks(model.network)
    residency = model.residency
    with _meter(model.device) as take:

        def ended(stage: str, number: int | None = None, once: bool = False) -> Any:
            def hook(*_: Any) -> None:
                # What follows the head may be asked for by running the network around it.
                if once and found[stage]:
                    return
                passing = 0
                if residency is not None and number is not None:
                    passing = 0 if number in residency.held else residency.sizes[number]
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
def _meter(device: "torch.device") -> Iterator[Any]:
    """A function that gives the peak of bytes since it was last called, above the beginning."""
    from fedforward.models import devices
    from fedforward.planning.memory.tracker import _Tracker

    if not devices.is_accelerator(device):
        with _Tracker() as tracker:

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


def _library(device: "torch.device") -> int:
    """What an accelerator's allocator has given out that no tensor is."""
    from fedforward.models import devices
    from fedforward.planning.memory.tracker import bytes_alive

    if not devices.is_accelerator(device):
        return 0
    return max(0, devices.allocated(device) - bytes_alive(device.type))


# What follows from layout and plan ----------------------------------------------------------------


def _derive(
    model: "CausalModel", probes_per_step: int, carries: bool, from_base: bool
) -> MemoryModel:
    """Everything but the activations."""
    from fedforward.models.lora import LoraModel

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
        if carries and plan.trajectory == "cache":
            copies = tuple(4 * size for size in layout.block_sizes)
    outside, residents = _weights(model)
    return MemoryModel(
        blocks=layout.blocks,
        depths=model.prefix.depths,
        outside=outside,
        residents=residents,
        adapters=flat,
        carried=flat if carries else 0,
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
        streams=model.residency is not None,
        activations={},
    )


def _scratch(model: "CausalModel") -> tuple[tuple[int, ...], tuple[int, ...]]:
    """For each block the largest tile of its matrices, and that of the output layer."""
    from torch import nn

    from fedforward.models.lm_head import tile_rows

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


def _logit_tile(model: "CausalModel") -> tuple[int, int]:
    """Bytes of one token's logits in a tile of the vocabulary, and the tokens taken at once."""
    from fedforward.models.lm_head import LOGITS_AT_ONCE, tile_rows

    if not model.head.sliceable:
        return 0, 0
    assert model.head.module is not None
    weight: Any = model.head.module.weight
    rows = tile_rows(weight)
    at_once = LOGITS_AT_ONCE.get(weight.device.type, LOGITS_AT_ONCE["cuda"])
    size = weight.element_size()
    # A soft cap takes a tile before and one after it; half precision is widened beside the tile.
    copies, wide = (3, 2) if model.head._after is not None else (1, 1)
    return rows * max(copies * size, wide * size + (4 if size < 4 else 0)), max(1, at_once // rows)


def _weights(model: "CausalModel") -> tuple[int, tuple[int, ...]]:
    """Bytes of the network on its device, outside of and in each of its transformer blocks.

    LoRA's flat storage, of which the adapters are parts, is left out.
    """
    from fedforward.models.blocks import transformer_blocks

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

    if model.residency is not None:
        seen.update(tensor.untyped_storage().data_ptr() for tensor in model.residency.moving())
        return fresh(model.network), model.residency.sizes
    blocks = tuple(fresh(block) for block in transformer_blocks(model.network))
    return fresh(model.network), blocks


def _tensors_of(module: Any) -> Iterable["torch.Tensor"]:
    """Parameters, buffers, and the scales of quantised weights."""
    import torch

    yield from module.parameters()
    yield from module.buffers()
    for part in module.modules():
        state = getattr(getattr(part, "weight", None), "quant_state", None)
        for held in (state, getattr(state, "state2", None)):
            if held is not None:
                yield from (v for v in vars(held).values() if isinstance(v, torch.Tensor))
