"""What enters the first tuned block, kept by example across rounds and evaluations.

Where only upper transformer blocks are tuned, the lower ones give a text the same activations in
every probe. A row's are computed from its tokens alone, without padding and without other rows, so
that they do not depend on what was kept, dropped or measured before. A pass then runs the network
as it is, with the lower blocks left out and the kept rows put in where the first tuned one begins.

Imports the network's parts, and nothing of probes or plans.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedforward.core.errors import out_of_memory
from fedforward.models.blocks import transformer_blocks
from fedforward.models.trial import BEGINNING, LENGTH, is_apart, trial_tokens

#: Runs a network: tokens int64 [rows, length] and the length of each row give logits with a row
#: for each of them.
RunNetwork = Callable[[torch.Tensor, Sequence[int]], torch.Tensor]


class NotKeptError(Exception):
    """Why a network's activations cannot be kept, in words."""


class _EnteredError(Exception):
    """Ends a forward pass where the first tuned block begins."""


class LowerBlocks:
    """The transformer blocks below one of them: run alone, or left out of a pass.

    Attributes:
        depth: the number of the first block that is not among them.
        width: features of a token where that block begins.
        dtype: of these.
    """

    def __init__(self, network: nn.Module, depth: int) -> None:
        blocks = transformer_blocks(network)
        self.depth = depth
        self.width = 0
        self.dtype = torch.float32
        self._lower = list(blocks[:depth])
        self._outputs: list[Any] = [None] * depth
        self._entered: list[torch.Tensor] = []
        self._taking = self._stopping = False
        self._given: Sequence[torch.Tensor] | None = None
        # Rows are put in before anything else looks at what enters.
        self._handle = blocks[depth].register_forward_pre_hook(
            self._enter, prepend=True, with_kwargs=True
        )

    def end(self) -> None:
        """Leave the network alone from now on."""
        self._handle.remove()

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._taking and self._given is None:
            return None
        state = args[0] if args else kwargs["hidden_states"]
        if self._taking:
            self._entered.append(state)
            if self._stopping:
                raise _EnteredError
            return None
        assert self._given is not None
        rows, length = state.shape[:2]
        if len(self._given) != rows:
            raise NotKeptError(f"block {self.depth} is not given a row for each text")
        shape = (rows, length, self.width)
        padded = torch.zeros(shape, dtype=self.dtype, device=self._given[0].device)
        for place, row in enumerate(self._given):
            padded[place, : len(row)] = row
        padded = padded.to(state.device)
        if args:
            return (padded, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": padded}

    def states(self, run: Callable[[], Any], *, whole: bool = False) -> torch.Tensor:
        """What enters the first block above in a pass, [rows, length, width].

        Args:
            run: the pass.
            whole: let it run to its end, and learn what the lower blocks return.

        Raises:
            NotKeptError: that block is not entered exactly once, with such a tensor.
        """
        self._entered, self._taking, self._stopping = [], True, not whole
        handles = []
        if whole:
            calls = [0] * self.depth
            for number, block in enumerate(self._lower):
                handles.append(block.register_forward_hook(self._note(number, calls)))
        try:
            run()
        except _EnteredError:
            pass
        finally:
            self._taking = False
            for handle in handles:
                handle.remove()
        entered, self._entered = self._entered, []
        if len(entered) != 1 or (whole and set(calls) != {1}):
            raise NotKeptError("its blocks do not run once each, one after another")
        if not isinstance(entered[0], torch.Tensor) or entered[0].dim() != 3:
            raise NotKeptError(f"what enters block {self.depth} is not [rows, tokens, width]")
        return entered[0]

    @contextmanager
    def taken(self) -> Iterator[list[torch.Tensor]]:
        """While it is open, what enters the first block above is noted in a list."""
        self._entered, self._taking, self._stopping = [], True, False
        try:
            yield self._entered
        finally:
            self._entered, self._taking = [], False

    def _note(self, number: int, calls: list[int]) -> Any:
        def note(_: nn.Module, __: Any, result: Any) -> None:
            calls[number] += 1
            self._outputs[number] = len(result) if isinstance(result, tuple) else None

        return note

    @contextmanager
    def left_out(self, rows: Sequence[torch.Tensor]) -> Iterator[None]:
        """While it is open, lower blocks hand on what they are given.

        The first block above is given these rows, [tokens, width] each, with zeros after them.
        """
        own = [block.__dict__.get("forward") for block in self._lower]
        for block, count in zip(self._lower, self._outputs, strict=True):
            block.__dict__["forward"] = _handing_on(count)
        self._given = rows
        try:
            yield
        finally:
            self._given = None
            for block, forward in zip(self._lower, own, strict=True):
                if forward is None:
                    del block.__dict__["forward"]
                else:
                    block.__dict__["forward"] = forward

    @torch.inference_mode()
    def check(self, run: RunNetwork, tokens: torch.Tensor, tuned: Collection[nn.Module]) -> None:
        """Compare passes that leave lower blocks out with plain ones, on two texts.

        Passes of the same shape must have the same bits, so that nothing but the state enters from
        below. A text that runs alone must give what it gives beside a longer one, but for rounding.

        Args:
            run: the network as it is measured.
            tokens: int64 [2, length], the texts.
            tuned: modules that hold tuned tensors.

        Raises:
            NotKeptError: they differ.
        """
        early: list[bool] = []
        note = self._noting_below(early)
        handles = [module.register_forward_pre_hook(note) for module in tuned]
        length = tokens.shape[1]
        short = max(2, length * BEGINNING // LENGTH)
        inputs = [(tokens, [length, length]), (tokens[:1, :short], [short]), (tokens[1:], [length])]
        plain: list[torch.Tensor] = []
        states: list[torch.Tensor] = []
        try:
            # What a pass leaves behind in the network is of the last of these afterwards.
            for given in inputs:
                state = self.states(lambda: plain.append(run(*given)), whole=True)  # noqa: B023
                if state.shape[:2] != given[0].shape:
                    raise NotKeptError(f"what enters block {self.depth} has no row for each text")
                states.append(state)
                self.width, self.dtype = state.shape[2], state.dtype
        finally:
            for handle in handles:
                handle.remove()
        if any(early):
            raise NotKeptError(f"a tuned module runs before block {self.depth}")
        try:
            for given, logits, state in zip(inputs, plain, states, strict=True):
                with self.left_out(list(state)):
                    found = run(*given)
                if not torch.equal(found, logits):
                    raise NotKeptError(
                        f"blocks from {self.depth} on take more from those below than one state"
                    )
            with self.left_out([states[1][0], states[2][0]]):
                mixed = run(tokens, [short, length])
        except NotKeptError:
            raise
        except Exception as error:
            # Networks raise whatever they like where something is missing.
            if out_of_memory(error):
                raise
            raise NotKeptError(f"the network fails without blocks 0 to {self.depth - 1}") from error
        beside = run(tokens, [short, length])
        # A classifier has one row of logits for a text.
        part = slice(0, short if beside.dim() > 2 else None)
        pairs = [(mixed[0][part], beside[0][part]), (mixed[1], beside[1])]
        if any(is_apart(one[None], other[None], self.dtype) for one, other in pairs):
            raise NotKeptError("the activations of a text depend on what it runs beside")

    def _noting_below(self, early: list[bool]) -> Callable[..., None]:
        def note(*_: Any) -> None:
            early.append(not self._entered)

        return note


def _handing_on(count: int | None) -> Callable[..., Any]:
    """A block's forward pass that returns its input, alone or in a tuple of so many."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        state = args[0] if args else kwargs["hidden_states"]
        return state if count is None else (state, *[None] * (count - 1))

    return forward


@dataclass
class KeptActivations:
    """Rows of what enters the first tuned block, in host memory; the least recently used go first.

    Attributes:
        lower: the blocks below it, checked.
        run: the network as it is measured.
        most_bytes: that are kept between passes.
        size: bytes that are kept.
        tokens: that have run through the lower blocks so far.
    """

    lower: LowerBlocks
    run: RunNetwork
    most_bytes: int
    size: int = 0
    tokens: int = 0

    def __post_init__(self) -> None:
        self._kept: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    @property
    def bytes_per_token(self) -> int:
        """What a token of a kept row takes."""
        return self.lower.width * self.lower.dtype.itemsize

    def clear(self) -> None:
        """Drop all rows."""
        self._kept.clear()
        self.size = 0

    @torch.inference_mode()
    def rows(self, tokens: NDArray[np.int64], lengths: NDArray[np.int64]) -> list[torch.Tensor]:
        """The rows' states, [length, width] each; those that are not kept are computed.

        Args:
            tokens: int64 [rows, any length].
            lengths: int64 [rows], how many of a row's tokens are needed.
        """
        found: dict[bytes, torch.Tensor] = {}
        keys = []
        for row, length in zip(tokens, lengths.tolist(), strict=True):
            own = np.ascontiguousarray(row[:length])
            key = blake2b(own.tobytes(), digest_size=16).digest()
            keys.append(key)
            if key in found:
                continue
            if key in self._kept:
                self._kept.move_to_end(key)
                found[key] = self._kept[key]
            else:
                found[key] = self._computed(own)
                self._keep(key, found[key])
        return [found[key] for key in keys]

    def _computed(self, tokens: NDArray[np.int64]) -> torch.Tensor:
        """One row's states, [length, width], in host memory."""
        lower, length = self.lower, len(tokens)
        if not length:
            return torch.zeros((0, lower.width), dtype=lower.dtype)
        self.tokens += length
        given = torch.from_numpy(tokens)[None]
        return lower.states(lambda: self.run(given, [length]))[0].cpu().clone()

    def _keep(self, key: bytes, row: torch.Tensor) -> None:
        self._kept[key] = row
        self.size += row.nbytes
        while self.size > self.most_bytes and self._kept:
            self.size -= self._kept.popitem(last=False)[1].nbytes


class CarriedStates:
    """What passes over the same batches have in common, from one pass of a call to its next.

    Probes that do not fit into one pass need not run their lower blocks again. Passes of the same
    shape have the same bits either way.
    """

    def __init__(self, network: Any, run: RunNetwork) -> None:
        self._network, self._run = network, run
        self._lower: dict[int, LowerBlocks | None] = {}
        self._key: tuple[int, ...] = ()
        self._state: torch.Tensor | None = None

    def clear(self) -> None:
        """Drop the state of the last pass."""
        self._key, self._state = (), None

    @contextmanager
    def over(self, key: tuple[int, ...], depth: int, again: bool) -> Iterator[bool]:
        """Around one pass; yields whether it is spared the blocks below `depth`.

        Args:
            key: what two passes must have in common to have the same state there.
            depth: the first block that probes move; 0 shares nothing.
            again: whether a later pass of the call will ask for this state.
        """
        own = (depth, *key)
        known, self._state = self._state if own == self._key else None, None
        lower = self._checked(depth) if depth and (again or known is not None) else None
        if lower is None:
            yield False
        elif known is not None:
            with lower.left_out(list(known)):
                yield True
            self._state = known if again else None
        else:
            with lower.taken() as entered:
                yield False
                self._key, self._state = own, entered[0] if len(entered) == 1 else None

    def _checked(self, depth: int) -> LowerBlocks | None:
        """The blocks below, or None if they cannot be left out."""
        if depth not in self._lower:
            lower = LowerBlocks(self._network, depth)
            self._lower[depth] = lower
            try:
                lower.check(self._run, trial_tokens(self._network), ())
            except NotKeptError:
                lower.end()
                self._lower[depth] = None
        return self._lower[depth]


@dataclass
class Work:
    """What measured passes have cost so far.

    Attributes:
        token_blocks: tokens times the transformer blocks that they ran through.
        plain_token_blocks: what they would be if every probe were a plain pass of its own.
        probes: that were measured.
    """

    token_blocks: int = 0
    plain_token_blocks: int = 0
    probes: int = 0

    @property
    def passes(self) -> float:
        """Forward-pass equivalents: plain passes over a probe's batch that cost as much."""
        plain = self.plain_token_blocks
        return self.probes * self.token_blocks / plain if plain else 0.0

    def since(self, earlier: "Work") -> "Work":
        """What has been added since there was this much."""
        return Work(
            self.token_blocks - earlier.token_blocks,
            self.plain_token_blocks - earlier.plain_token_blocks,
            self.probes - earlier.probes,
        )
