"""The transformer blocks of a network, and the part below the tuned ones that probes share.

Probes of one batch have the same activations up to the first block that holds a tuned tensor: its
rows go through that part once, and are repeated for the probes where they enter that block.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from fedforward.core.errors import FedForwardError
from fedforward.core.steps import Probe
from fedforward.models.text_part import is_multimodal, text_part


def transformer_blocks(network: nn.Module) -> Sequence[nn.Module]:
    """The list of equal blocks that holds most of the text part's parameters; may be empty."""
    lists = [module for module in text_part(network).modules() if isinstance(module, nn.ModuleList)]
    lists = lists or [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    sizes = [sum(p.numel() for p in blocks.parameters()) for blocks in lists]
    return list(lists[sizes.index(max(sizes))]) if lists else []


def class_heads(network: nn.Module) -> list[str]:
    """Names of the modules that a sequence classifier has on top of its base model.

    Empty for other networks. Transformers names its classes by what they do, and says nowhere else
    which they are.
    """
    if not type(network).__name__.endswith("ForSequenceClassification"):
        return []
    base = getattr(network, "base_model", network)
    children = network.named_children()
    return [name for name, part in children if part is not base and list(part.parameters())]


def names_in_blocks(network: nn.Module, requested: Collection[int]) -> list[str]:
    """Prefixes of the names of everything in some blocks, such as "model.layers.3.".

    Raises:
        FedForwardError: the network has no such block.
    """
    blocks = transformer_blocks(network)
    missing = sorted(number for number in requested if number >= len(blocks))
    if missing:
        raise FedForwardError(
            f"model.blocks names block {missing[0]}, but this model has {len(blocks)} blocks, "
            "numbered from 0."
        )
    places = {id(blocks[number]) for number in requested}
    return [f"{name}." for name, module in network.named_modules() if id(module) in places]


def names_by_block(network: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, list[str]]:
    """The tuned tensors' names under the names of their blocks, in the order of the forward pass.

    Transformer blocks are called by their numbers. What lies before them is "embeddings", what
    comes after is "norm", and an output layer that is not tied to the embeddings is "head", as is
    all that a sequence classifier has on top of its base model.
    """
    blocks = transformer_blocks(network)
    inside = {p.data_ptr(): str(n) for n, b in enumerate(blocks) for p in b.parameters()}
    head = network.get_output_embeddings()
    heads = [network.get_submodule(name) for name in class_heads(network)]
    heads += [] if head is None else [head]
    last = {p.data_ptr() for module in heads for p in module.parameters()}
    first = network.get_input_embeddings()
    last -= {p.data_ptr() for p in first.parameters()}
    before: set[int] = set()
    for parameter in network.parameters():
        if parameter.data_ptr() in inside:
            break
        before.add(parameter.data_ptr())
    found: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        place = tensor.data_ptr()
        outside = "head" if place in last else "embeddings" if place in before else "norm"
        found.setdefault(inside.get(place, outside), []).append(name)
    order = ["embeddings", *map(str, range(len(blocks))), "norm", "head"]
    return {block: found[block] for block in order if block in found}


class Prefix:
    """What lies below the first block that probes move, which all probes of a batch share.

    Attributes:
        count: transformer blocks of the network.
        begins: for each block of a layout, the number of the transformer block below which nothing
            depends on it.
        depths: the same, and 0 where nothing can be shared.
    """

    def __init__(self, network: nn.Module, blocks: Sequence[str]) -> None:
        """`blocks`: of the layout (see `names_by_block`).

        A sequence classifier shares nothing: it picks a position for each row that it was given,
        which must then be the rows that arrive.
        """
        self._blocks = transformer_blocks(network)
        # The last block is where rows can still be told apart for what follows all of them.
        after = max(0, len(self._blocks) - 1)
        outside = {"embeddings": 0, "norm": after, "head": after}
        self.count = len(self._blocks)
        self.begins = tuple(outside[b] if b in outside else int(b) for b in blocks)
        # With images beside text, positions have three axes, the first of which is no row.
        alone = class_heads(network) or is_multimodal(network)
        self.depths = (0,) * len(self.begins) if alone else self.begins
        self._hooked = False
        self._first = 0
        self._rows = 0
        self._index: torch.Tensor | None = None

    def first(self, probes: Sequence[Probe]) -> int:
        """The first transformer block that some probe moves, in its own or its trajectory's steps.

        What lies below it is the same for all probes of a batch.
        """
        steps = [s for p in probes for s in (p.trajectory, p.perturbation) if len(s)]
        moved = (
            min(d for b, d in enumerate(self.depths) if s.moves(b))
            for s in {id(s): s for s in steps}.values()
            if any(s.moves(b) for b in range(len(self.depths)))
        )
        return min(moved, default=0)

    @contextmanager
    def spread(self, rows: int, index: torch.Tensor | None, first: int) -> Iterator[None]:
        """While it is open, the `rows` that reach block `first` leave it as rows `index`.

        None leaves them as they are.
        """
        if index is not None and not self._hooked:
            self._hooked = True
            for number, block in enumerate(self._blocks):
                block.register_forward_pre_hook(self._hook(number), with_kwargs=True)
        self._rows, self._index, self._first = rows, index, first
        try:
            yield
        finally:
            self._index = None

    def _hook(self, number: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            index = self._index
            if index is None or number < self._first:
                return None

            def beside(value: Any) -> Any:
                # What is there once for all rows broadcasts; masks and rotations may be per row.
                own = isinstance(value, torch.Tensor) and value.dim() >= 3 and self._rows > 1
                if own and len(value) == self._rows != len(index):
                    return value.index_select(0, index.to(value.device))
                return value

            hidden, rest, named = args[:1], args[1:], dict(kwargs)
            state = hidden[0] if hidden else named.pop("hidden_states")
            if number == self._first:
                state = state.index_select(0, index.to(state.device))
            named = tree_map(beside, named)
            rest = tree_map(beside, rest)
            if hidden:
                return (state, *rest), named
            return rest, {"hidden_states": state} | named

        return hook
