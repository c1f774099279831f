"""What a client's step will take in memory, predicted from plain numbers for any choice of blocks.

`calibrate` fills a `MemoryModel` from a model. Using the result needs no PyTorch: nothing here
imports it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedforward.core.errors import FedForwardError

#: The parts of a forward pass, whose peaks are told apart.
STAGES = ("embeddings", "block", "norm", "head")
#: What weights are when a stage runs: not displaced, displaced for one probe, for several.
UNDISPLACED, ALONE, TOGETHER = "undisplaced", "alone", "together"


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
        trajectory_cache: LoRA's sum of local steps: all adapters, whichever blocks are active.
        base: a copy of the tuned tensors for updates from the base, or 0.
        library: what the device's libraries hold; 0 on the CPU.
        bank: [B], a block's adapters in the bank, for each probe of a forward pass.
        copies: [B], a block's float32 copy, to which local steps are added.
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
        kept: activations that are kept by example (`run.activation_cache`), where they lie in the
            same memory.
        activations: by "stage mode" (of `STAGES`, and `UNDISPLACED`, `ALONE` or `TOGETHER`), what a
            stage takes beyond all of the above.
    """

    blocks: tuple[str, ...]
    depths: tuple[int, ...]
    outside: int
    residents: tuple[int, ...]
    adapters: int
    trajectory_cache: int
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
    kept: int = 0

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "MemoryModel":
        """The model from what `dataclasses.asdict` made of it, also after JSON."""
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
        kept = groups * total_bytes(self.bank, active) + total_bytes(self.copies, active)
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
        return (
            self.outside
            + self.adapters
            + self.trajectory_cache
            + self.base
            + self.library
            + self.kept
        )

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
            modes = (UNDISPLACED, moved) if displaced else (UNDISPLACED,)
            count = tokens if below else groups * tokens
            return max(self._table(stage, mode).at(count, length - 1) for mode in modes)

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
        own = total_bytes(self.head_scratch, active)
        tokens_met = tokens if own else groups * tokens
        size, most = self.logits
        logits = size * min(most, tokens_met)
        if not own:
            return (
                groups * tile
                + logits
                + self._table("head", UNDISPLACED).at(groups * tokens, length)
            )
        # A head taken by tiles is given the same, displaced or not. Otherwise it is a module.
        modes = (UNDISPLACED,) if size else (UNDISPLACED, TOGETHER if groups > 1 else ALONE)
        given = max(self._table("head", mode).at(groups * tokens, length) for mode in modes)
        # A scratch that grows is there twice for a moment, before the first logits.
        growing = tile + own if own > tile else 0
        return given + max(groups * max(tile, own) + logits, groups * growing)

    def _table(self, stage: str, mode: str) -> Activations:
        """As measured for this mode of meeting weights, or for the nearest one that was."""
        near = {
            UNDISPLACED: (UNDISPLACED, ALONE, TOGETHER),
            ALONE: (ALONE, TOGETHER, UNDISPLACED),
            TOGETHER: (TOGETHER, ALONE, UNDISPLACED),
        }
        names = (f"{stage} {other}" for other in near[mode])
        return next(self.activations[name] for name in names if name in self.activations)


def total_bytes(sizes: Sequence[int], active: NDArray[np.bool_]) -> int:
    """Sum of the sizes of active blocks; `sizes` in bytes and `active`, bool, are both [B]."""
    return sum(size for size, own in zip(sizes, active, strict=True) if own)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
