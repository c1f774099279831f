"""Weights as probes see them: made where an operation asks for them, a tile at a time.

While probes run, each tuned parameter of the network is replaced by a `DisplacedTensor`. It has the
parameter's shape, dtype and device; what PyTorch computes with it, it computes for each group of
rows with that group's own θ + displacement. Linear maps are taken by bounded tiles of the weight,
embeddings by the rows of the tokens present, anything else by whole (small) tensors. This works at
the level of PyTorch's functions, so no module and no architecture is named.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.utils._pytree import tree_flatten, tree_unflatten

from fedforward.core.errors import FedForwardError
from fedforward.core.steps import Steps
from fedforward.directions import Distribution
from fedforward.directions.ops import displace, displace_at
from fedforward.directions.sparse_kernels import FreeCoordinates
from fedforward.models.lm_head import tile_rows

_DESCRIBING = {"size", "dim", "numel", "stride", "ndimension", "is_contiguous", "element_size"}
_DESCRIBING |= {
    "is_floating_point",
    "is_complex",
    "untyped_storage",
    "data_ptr",
    "__len__",
    "__hash__",
    "__repr__",
}


class Displacement:
    """The displacements of one forward pass, a group of rows for each.

    Attributes:
        groups: how many.
        rows: of all groups together, at the tuned modules.
        reached: names of the tensors that some operation has asked for.
    """

    def __init__(
        self,
        shared: Steps,
        own: Sequence[Steps],
        distribution: Distribution,
        shape: tuple[int, int],
        sources: dict[str, torch.Tensor],
        reached: set[str],
        masks: dict[str, torch.Tensor],
        free: dict[str, FreeCoordinates],
    ) -> None:
        """A forward pass at θ + shared + own[g] for group g.

        Args:
            shape: rows of all groups, and tokens in a row.
            sources: what is displaced in place of a tensor of that name (a float32 copy of it).
            masks: which coordinates of a tensor move; none is all.
            free: the same as lists, where they are few; `sources` has none of these tensors.
        """
        self.shared, self.own = shared, tuple(own)
        self.distribution = distribution
        self.groups = len(own)
        self.rows = {shape[0], shape[0] * shape[1]}
        self.sources = sources
        self.reached = reached
        self.masks, self.free = masks, free
        self._free_values: dict[str, torch.Tensor] = {}
        self._by_block: dict[int, tuple[Steps, tuple[Steps, ...]]] = {}
        self._moving: dict[int, bool] = {}
        self._scratch: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}

    def moves(self, weight: "DisplacedTensor") -> bool:
        """Whether any group meets another value of a tensor than its own."""
        if weight.path in self.free and not len(self.free[weight.path]):
            return False
        if weight.block not in self._moving:
            steps = (self.shared, *self.own)
            self._moving[weight.block] = any(part.moves(weight.block) for part in steps)
        return self._moving[weight.block] or weight.path in self.sources

    def values(self, weight: "DisplacedTensor") -> torch.Tensor:
        """The whole tensor of every group, [groups, *shape]."""
        plain = weight.plain
        out = torch.empty((self.groups, *plain.shape), dtype=plain.dtype, device=plain.device)
        self._make(weight, out.view(self.groups, -1), None)
        return out

    def rows_of(self, weight: "DisplacedTensor", numbers: torch.Tensor) -> torch.Tensor:
        """Rows of a matrix for every group, [groups, len(numbers), columns]."""
        plain = weight.plain
        columns = plain.shape[1]
        out = torch.empty(
            (self.groups, len(numbers), columns), dtype=plain.dtype, device=plain.device
        )
        starts = numbers.cpu().numpy().astype(np.int64) * columns
        self._make(weight, out.view(self.groups, -1), starts)
        return out

    def tile(self, weight: "DisplacedTensor", begin: int, rows: int) -> torch.Tensor:
        """Rows begin.. of a matrix for every group, [groups, rows, columns], in the scratch.

        The next tile overwrites it.
        """
        columns = weight.plain.shape[1]
        size = self.groups * rows * columns
        # What is asked of `weight` itself would be dispatched like any function of it.
        key = (weight.plain.dtype, weight.plain.device)
        if key not in self._scratch or len(self._scratch[key]) < size:
            self._scratch[key] = torch.empty(size, dtype=key[0], device=key[1])
        out = self._scratch[key][:size].view(self.groups, -1)
        self._make(weight, out, np.array([begin * columns]) if begin else None)
        return out.view(self.groups, rows, columns)

    def _make(self, weight: "DisplacedTensor", out: torch.Tensor, starts: Any) -> None:
        self.reached.add(weight.path)
        if weight.block not in self._by_block:
            own = tuple(steps.block(weight.block) for steps in self.own)
            self._by_block[weight.block] = self.shared.block(weight.block), own
        if weight.path in self.free:
            self._make_few(weight, out, starts)
            return
        displace(
            self.sources.get(weight.path, weight.plain),
            *self._by_block[weight.block],
            first_tile=weight.first_tile,
            distribution=self.distribution,
            out=out,
            starts=starts,
        )
        if weight.path in self.masks:
            pieces = np.zeros(1, np.int64) if starts is None else starts
            width = out.shape[1] // len(pieces)
            for piece, start in enumerate(pieces.tolist()):
                there = slice(start, start + width)
                moved = out[:, piece * width : (piece + 1) * width]
                mask = self.masks[weight.path].view(-1)[there].to(moved.device)
                moved.copy_(torch.where(mask, moved, weight.plain.view(-1)[there]))

    def _make_few(self, weight: "DisplacedTensor", out: torch.Tensor, starts: Any) -> None:
        """As `_make`: the weights as they are, but for the few coordinates that are free."""
        free, flat = self.free[weight.path], weight.plain.view(-1)
        if weight.path not in self._free_values:
            shared, own = self._by_block[weight.block]
            self._free_values[weight.path] = displace_at(
                flat, free, shared, own, distribution=self.distribution
            )
        values = self._free_values[weight.path]
        pieces = [0] if starts is None else starts.tolist()
        width = out.shape[1] // max(1, len(pieces))
        for piece, start in enumerate(pieces):
            part = out[:, piece * width : (piece + 1) * width]
            part.copy_(flat[start : start + width])
            first, last = free.between(start, start + width)
            if first < last:
                places = torch.from_numpy(free.places[first:last] - start)
                part.index_copy_(1, places, values[:, first:last])

    def parts(self, value: Any) -> tuple[list[Any], bool]:
        """An argument as each group has it, and whether it holds the groups' rows in turn."""
        if isinstance(value, DisplacedTensor):
            return list(self.values(value)), False
        if isinstance(value, GroupedTensor):
            return value.parts, False
        if isinstance(value, torch.Tensor) and value.dim() and len(value) in self.rows:
            return list(value.chunk(self.groups)), True
        return [value] * self.groups, False


class GroupedTensor(torch.Tensor):
    """One tensor per group of rows: what an operation on displaced weights alone results in."""

    parts: list[torch.Tensor]
    displacement: Displacement

    @classmethod
    def of(cls, parts: Sequence[torch.Tensor], displacement: Displacement) -> "GroupedTensor":
        """`parts`: one of equal shape for each group."""
        result: GroupedTensor = torch.Tensor._make_subclass(cls, parts[0])
        result.parts, result.displacement = list(parts), displacement
        return result

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _dispatch(function, args, kwargs or {})


class DisplacedTensor(torch.Tensor):
    """A tuned parameter while probes run.

    Attributes:
        plain: the parameter's data; never changed.
        path: its canonical name in the network.
        first_tile: its place in the tunable space.
        block: of the layout, that it belongs to.
        displacement: of the forward pass that runs.
    """

    plain: torch.Tensor
    path: str
    first_tile: int
    block: int
    displacement: Displacement | None

    @classmethod
    def of(cls, plain: torch.Tensor, name: str, first_tile: int, block: int) -> "DisplacedTensor":
        """See the attributes."""
        result: DisplacedTensor = torch.Tensor._make_subclass(cls, plain)
        result.plain, result.path, result.first_tile = plain, name, first_tile
        result.block = block
        result.displacement = None
        return result

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _dispatch(function, args, kwargs or {})


def _dispatch(function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """What a PyTorch function gives where some argument is displaced or grouped."""
    name = getattr(function, "__name__", "")
    if name == "__get__" or name in _DESCRIBING:
        with torch._C.DisableTorchFunctionSubclass():
            described = function(*args, **kwargs)
        if not isinstance(described, torch.Tensor):
            return described
    displacement = _displacement_of(args, kwargs)
    if displacement is None:
        # Outside of probes it is the parameter's data and nothing else.
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)
    special = _SPECIAL.get(function)
    if special is not None:
        result = special(displacement, *args, **kwargs)
        if result is not None:
            return result
    return _by_groups(displacement, function, args, kwargs)


def _displacement_of(args: Any, kwargs: dict[str, Any]) -> Displacement | None:
    """That of the first displaced or grouped argument."""
    for leaf in args:
        if isinstance(leaf, (DisplacedTensor, GroupedTensor)):
            return leaf.displacement
    # Inside of lists or among the keywords.
    leaves, _ = tree_flatten((args, kwargs))
    displaced = (leaf for leaf in leaves if isinstance(leaf, (DisplacedTensor, GroupedTensor)))
    return next(displaced).displacement


def _by_groups(
    displacement: Displacement, function: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    """Run a function once for each group, on its own rows and its own values."""
    leaves, form = tree_flatten((args, kwargs))
    split = [displacement.parts(leaf) for leaf in leaves]
    results = []
    for g in range(displacement.groups):
        own_args, own_kwargs = tree_unflatten([parts[g] for parts, _ in split], form)
        results.append(function(*own_args, **own_kwargs))
    if displacement.groups == 1:
        return results[0]
    if not isinstance(results[0], torch.Tensor):
        raise FedForwardError(
            f"This network reads numbers out of its weights ({getattr(function, '__name__', '')}), "
            "so that probes cannot share a forward pass. Set run.probes_per_call = 1."
        )
    if any(carried for _, carried in split):
        joined = torch.cat(results)
        if len(joined) not in displacement.rows:
            raise FedForwardError(
                f"This network does not keep the rows of a batch apart "
                f"({getattr(function, '__name__', '')}), so that probes cannot share a forward "
                "pass. Set run.probes_per_call = 1."
            )
        return joined
    return GroupedTensor.of(results, displacement)


def _linear(
    displacement: Displacement,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> Any:
    """x Wᵀ + b by tiles of W's rows."""
    if type(weight) is not DisplacedTensor or not _carries(displacement, x):
        return None
    count = weight.plain.shape[0]
    flat = x.reshape(displacement.groups, -1, x.shape[-1])
    rows = tile_rows(weight.plain)
    if rows == count and x.is_cuda:
        # One launch for all groups: between small matrices the host sets the pace.
        out = torch.bmm(flat, displacement.tile(weight, 0, count).transpose(1, 2))
    else:
        out = flat.new_empty((*flat.shape[:2], count))
        for begin in range(0, count, rows):
            part = slice(begin, min(begin + rows, count))
            tile = displacement.tile(weight, begin, part.stop - begin)
            for g in range(displacement.groups):
                torch.mm(flat[g], tile[g].T, out=out[g, :, part])
    if bias is not None:
        for g, own in enumerate(displacement.parts(bias)[0]):
            out[g] += own
    return out.view(*x.shape[:-1], count)


def _addmm(
    displacement: Displacement,
    bias: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    **options: Any,
) -> Any:
    """b + x W by tiles of W's rows, which are x's columns (GPT-2 keeps its weights so)."""
    if options or type(weight) is not DisplacedTensor or not _carries(displacement, x):
        return None
    count, width = weight.plain.shape
    flat = x.reshape(displacement.groups, -1, count)
    out = flat.new_empty((*flat.shape[:2], width))
    for g, own in enumerate(displacement.parts(bias)[0]):
        out[g] = own
    rows = tile_rows(weight.plain)
    for begin in range(0, count, rows):
        part = slice(begin, min(begin + rows, count))
        tile = displacement.tile(weight, begin, part.stop - begin)
        for g in range(displacement.groups):
            out[g].addmm_(flat[g, :, part], tile[g])
    return out.view(*x.shape[:-1], width)


def _embedding(
    displacement: Displacement, tokens: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any
) -> Any:
    """Rows of W, generated only for the tokens that are there."""
    if type(weight) is not DisplacedTensor:
        return None
    present, places = tokens.unique(return_inverse=True)
    if len(present) and not 0 <= int(present[0]) <= int(present[-1]) < len(weight.plain):
        raise IndexError(f"token {int(present[-1])} of a vocabulary of {len(weight.plain)}")
    rows = displacement.rows_of(weight, present)
    if not _carries(displacement, tokens):
        return GroupedTensor.of([own[places] for own in rows], displacement)
    own = places.chunk(displacement.groups)
    return torch.cat([rows[g][own[g]] for g in range(displacement.groups)])


def _product(displacement: Displacement, *factors: Any, **options: Any) -> Any:
    """A vector times what holds the rows of all groups, or the other way round: a norm's scale."""
    if options or len(factors) != 2:
        return None
    weight, x = factors if type(factors[0]) is DisplacedTensor else factors[::-1]
    if type(weight) is not DisplacedTensor or weight.plain.dim() != 1:
        return None
    if not isinstance(x, torch.Tensor) or x.dim() < 2 or not _carries(displacement, x):
        return None
    if x.shape[-1] != len(weight.plain):
        return None
    flat = x.reshape(displacement.groups, -1, x.shape[-1])
    return (displacement.values(weight)[:, None] * flat).view(x.shape)


def _carries(displacement: Displacement, x: torch.Tensor) -> bool:
    """Whether a plain tensor holds the rows of all groups."""
    plain = not isinstance(x, (DisplacedTensor, GroupedTensor))
    return plain and x.dim() > 0 and x.shape[0] in displacement.rows


_SPECIAL: dict[Any, Callable[..., Any]] = {
    functional.linear: _linear,
    torch.addmm: _addmm,
    functional.embedding: _embedding,
    torch.Tensor.mul: _product,
    torch.Tensor.__mul__: _product,
    torch.Tensor.__rmul__: _product,
    torch.mul: _product,
}
