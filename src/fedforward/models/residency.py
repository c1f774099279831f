"""Transformer blocks that wait in host memory and come to the device while they run.

A block that a client does not perturb is read once in a forward pass and never written by it. So
only the client's own blocks need to be on the device all the time: that is what a block's
activation costs, and what `planning.memory_model` counts where `model.resting = "host"`.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from fedforward.models.blocks import transformer_blocks


class Residency:
    """Where the weights of each transformer block are.

    Attributes:
        held: numbers of the blocks that are on the device all the time.
        sizes: bytes of each block's weights that move.
    """

    def __init__(
        self, network: nn.Module, device: torch.device, staying: Collection[int] = ()
    ) -> None:
        """Move every transformer block to host memory.

        Args:
            device: where blocks run.
            staying: `data_ptr` of storages that do not move (LoRA's adapters).
        """
        self.device = device
        self.held: frozenset[int] = frozenset()
        self._blocks = [_Block(block, staying) for block in transformer_blocks(network)]
        self.sizes = tuple(block.size for block in self._blocks)
        with torch.inference_mode(False):
            for block in self._blocks:
                block.leave(device.type == "cuda")
        self._hooks = []
        for number, module in enumerate(transformer_blocks(network)):
            self._hooks.append(module.register_forward_pre_hook(self._arrives(number)))
            # Also after an error: what the pass had fetched must not stay.
            leaves = self._leaves(number)
            self._hooks.append(module.register_forward_hook(leaves, always_call=True))

    def hold(self, numbers: Collection[int]) -> bool:
        """Keep these blocks on the device, and no others; whether that changed anything."""
        wanted = frozenset(numbers)
        if wanted == self.held:
            return False
        with torch.inference_mode(False):
            for number in sorted(self.held - wanted):
                self._blocks[number].give_back()
            for number in sorted(wanted - self.held):
                self._blocks[number].fetch(self.device)
        self.held = wanted
        return True

    def end(self) -> None:
        """Leave every block in host memory, where it stays."""
        self.hold(())
        for hook in self._hooks:
            hook.remove()

    def _arrives(self, number: int) -> Any:
        def hook(*_: Any) -> None:
            if number not in self.held:
                with torch.inference_mode(False):
                    self._blocks[number].fetch(self.device)

        return hook

    def _leaves(self, number: int) -> Any:
        def hook(*_: Any) -> None:
            if number not in self.held:
                with torch.inference_mode(False):
                    self._blocks[number].drop()

        return hook


class _Block:
    """The tensors of one block, each with its place in host memory."""

    def __init__(self, block: nn.Module, staying: Collection[int]) -> None:
        self._places = [
            place
            for place in _places(block)
            if place.tensor.untyped_storage().data_ptr() not in staying
        ]
        self._host: Sequence[torch.Tensor] = []
        self.size = sum(p.tensor.numel() * p.tensor.element_size() for p in self._places)

    def leave(self, pinned: bool) -> None:
        """To host memory, in pages that the device can read by itself if `pinned`."""
        for place in self._places:
            host = place.tensor.cpu()
            if pinned:
                # Pages that may not be locked are copied more slowly, and that is all.
                with suppress(RuntimeError):
                    host = host.pin_memory()
            place.put(host)
        self._host = [place.tensor for place in self._places]

    def fetch(self, device: torch.device) -> None:
        """Copies on the device. The host's stay where they are."""
        for place, host in zip(self._places, self._host, strict=True):
            place.put(host.to(device, non_blocking=True, copy=True))

    def drop(self) -> None:
        """Forget the copies on the device, which nobody has changed."""
        for place, host in zip(self._places, self._host, strict=True):
            place.put(host)

    def give_back(self) -> None:
        """Write what is on the device to the host, and forget it there."""
        for place, host in zip(self._places, self._host, strict=True):
            host.copy_(place.tensor)
        self.drop()


class _Place:
    """A parameter or a buffer of a module."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self._module, self._name = module, name

    @property
    def tensor(self) -> torch.Tensor:
        found = getattr(self._module, self._name)
        return found.data if isinstance(found, nn.Parameter) else found

    def put(self, tensor: torch.Tensor) -> None:
        """The parameter stays the same object, so that all who know it see it move."""
        found = getattr(self._module, self._name)
        if isinstance(found, nn.Parameter):
            found.data = tensor
        else:
            self._module._buffers[self._name] = tensor


def _places(block: nn.Module) -> Iterator[_Place]:
    seen: set[int] = set()
    for module in block.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield _Place(module, name)
