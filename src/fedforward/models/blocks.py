"""The transformer blocks of a network, and the part below the tuned ones that probes share.

Probes of one batch have the same activations up to the first block that holds a tuned tensor: its
rows go through that part once, and are repeated for the probes where they enter that block.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from fedforward.errors import FedForwardError


def transformer_blocks(network: nn.Module) -> Sequence[nn.Module]:
    """The list of equal blocks that holds most of the network's parameters; may be empty."""
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    sizes = [sum(p.numel() for p in blocks.parameters()) for blocks in lists]
    return list(lists[sizes.index(max(sizes))]) if lists else []


def names_in_blocks(network: nn.Module, wanted: Collection[int]) -> list[str]:
    """Prefixes of the names of everything in some blocks, such as "model.layers.3.".

    Raises:
        FedForwardError: the network has no such block.
    """
    blocks = transformer_blocks(network)
    missing = sorted(number for number in wanted if number >= len(blocks))
    if missing:
        raise FedForwardError(
            f"model.blocks names block {missing[0]}, but this model has {len(blocks)} blocks, "
            "numbered from 0."
        )
    places = {id(blocks[number]) for number in wanted}
    return [f"{name}." for name, module in network.named_modules() if id(module) in places]


class Prefix:
    """What lies below the first block that holds a tuned tensor.

    Attributes:
        first: the number of that block; 0, so that nothing is shared, also where something outside
            the blocks is tuned or the network has no blocks that can be told.
    """

    def __init__(self, network: nn.Module, tuned: Collection[torch.Tensor]) -> None:
        blocks = transformer_blocks(network)
        places = {tensor.data_ptr() for tensor in tuned}
        held = [[p.data_ptr() in places for p in block.parameters()] for block in blocks]
        inside = sum(map(sum, held))
        first = next((number for number, block in enumerate(held) if any(block)), 0)
        self.first = first if inside == len(places) else 0
        self._rows = 0
        self._index: torch.Tensor | None = None
        for number, block in enumerate(blocks):
            if self.first and number >= self.first:
                block.register_forward_pre_hook(self._hook(number == self.first), with_kwargs=True)

    @contextmanager
    def spread(self, rows: int, index: torch.Tensor | None) -> Iterator[None]:
        """While it is open, the `rows` that reach the first tuned block leave it as rows `index`.

        None leaves them as they are.
        """
        self._rows, self._index = rows, index
        try:
            yield
        finally:
            self._index = None

    def _hook(self, enters: bool) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            index = self._index
            if index is None:
                return None

            def beside(value: Any) -> Any:
                # What is there once for all rows broadcasts; masks and rotations may be per row.
                own = isinstance(value, torch.Tensor) and value.dim() >= 3 and self._rows > 1
                if own and len(value) == self._rows != len(index):
                    return value.index_select(0, index.to(value.device))
                return value

            hidden, rest, named = args[:1], args[1:], dict(kwargs)
            state = hidden[0] if hidden else named.pop("hidden_states")
            if enters:
                state = state.index_select(0, index.to(state.device))
            named = tree_map(beside, named)
            rest = tree_map(beside, rest)
            if hidden:
                return (state, *rest), named
            return rest, {"hidden_states": state} | named

        return hook
