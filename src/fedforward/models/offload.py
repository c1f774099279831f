"""Transformer blocks that are offloaded to host memory and come to the device while they run.

A block that a client does not perturb is read once in a forward pass and never written by it. So
only the client's own blocks need to be on the device all the time: that is what a block's
activation costs, and what `planning.memory` counts where `model.offload = "host"`.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from fedforward.models import devices
from fedforward.models.blocks import transformer_blocks


class Offload:
    """Where the weights of each transformer block are.

    What several blocks share, or a block and the rest of the network, stays on the device.

    Attributes:
        blocks: the weights of each block that move.
        pinned: numbers of the blocks that are on the device all the time.
        sizes: bytes of each block's weights that move.
    """

    def __init__(
        self, network: nn.Module, device: torch.device, exempt: Collection[int] = ()
    ) -> None:
        """Move every transformer block to host memory.

        Args:
            device: where blocks run.
            exempt: `data_ptr` of storages that do not move (LoRA's adapters).
        """
        self.device = device
        self.pinned: frozenset[int] = frozenset()
        self.blocks = [
            _Block([place for place in places if _storage(place.tensor) not in exempt])
            for places in _places_by_block(network)
        ]
        self.sizes = tuple(block.size for block in self.blocks)
        with torch.inference_mode(False):
            for block in self.blocks:
                block.leave(devices.is_accelerator(device))
        self._hooks = []
        for number, module in enumerate(transformer_blocks(network)):
            self._hooks.append(module.register_forward_pre_hook(self._fetch_hook(number)))
            # Also after an error: what the pass had fetched must not stay.
            drop = self._drop_hook(number)
            self._hooks.append(module.register_forward_hook(drop, always_call=True))

    def pin(self, numbers: Collection[int]) -> None:
        """Keep these blocks on the device, and no others.

        After an error (the device is full) `pinned` says which are there.
        """
        requested = frozenset(numbers)
        if requested == self.pinned:
            return
        with torch.inference_mode(False):
            for number, block in enumerate(self.blocks):
                if number not in self.pinned:
                    # What an interrupted pass has left.
                    block.drop()
            for number in sorted(self.pinned - requested):
                self.blocks[number].write_back()
                self.pinned -= {number}
            for number in sorted(requested - self.pinned):
                self.blocks[number].fetch(self.device)
                self.pinned |= {number}

    def moving(self) -> Iterator[torch.Tensor]:
        """Every tensor that moves, where it is now."""
        for block in self.blocks:
            for place in block.places:
                yield place.tensor

    def end(self) -> None:
        """Leave every block in host memory, where it stays."""
        self.pin(())
        for hook in self._hooks:
            hook.remove()

    def _fetch_hook(self, number: int) -> Any:
        def hook(*_: Any) -> None:
            if number not in self.pinned:
                with torch.inference_mode(False):
                    self.blocks[number].fetch(self.device)

        return hook

    def _drop_hook(self, number: int) -> Any:
        def hook(*_: Any) -> None:
            if number not in self.pinned:
                with torch.inference_mode(False):
                    self.blocks[number].drop()

        return hook


def place_the_rest(network: nn.Module, device: torch.device | str) -> None:
    """Move everything to the device but what belongs to one transformer block alone."""
    moving = {_storage(p.tensor) for places in _places_by_block(network) for p in places}
    for module in network.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and _storage(tensor) not in moving:
                _Place(module, name).put(tensor.data.to(device))


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
        found = self._module._parameters.get(self._name)
        if found is None:
            self._module._buffers[self._name] = tensor
        else:
            assert isinstance(found, nn.Parameter), f"{self._name} is displaced"
            found.data = tensor


class _Block:
    """The tensors of one block, each with its place in host memory."""

    def __init__(self, places: Sequence[_Place]) -> None:
        self.places = places
        self._host: Sequence[torch.Tensor] = []
        self.size = sum(p.tensor.numel() * p.tensor.element_size() for p in places)

    def leave(self, page_locked: bool) -> None:
        """To host memory, in pages that the device can read by itself if `page_locked`."""
        for place in self.places:
            host = place.tensor.cpu()
            if page_locked:
                # Pages that may not be locked are copied more slowly, and that is all.
                with suppress(RuntimeError):
                    host = host.pin_memory()
            place.put(host)
        self._host = [place.tensor for place in self.places]

    def fetch(self, device: torch.device) -> None:
        """Copies on the device. The host's stay where they are, also after an error."""
        try:
            for place, host in zip(self.places, self._host, strict=True):
                place.put(host.to(device, non_blocking=True, copy=True))
        except BaseException:
            self.drop()
            raise

    def drop(self) -> None:
        """Free the copies on the device, which nobody has changed."""
        for place, host in zip(self.places, self._host, strict=True):
            place.put(host)

    def write_back(self) -> None:
        """Copy what is on the device to the host, and drop it there."""
        for place, host in zip(self.places, self._host, strict=True):
            host.copy_(place.tensor)
        self.drop()


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _places_by_block(network: nn.Module) -> list[list[_Place]]:
    """Of each transformer block, the tensors that are in no other block and nowhere else."""
    blocks = {id(block): number for number, block in enumerate(transformer_blocks(network))}
    named = list(network.named_modules(remove_duplicate=False))
    prefixes = [(f"{name}.", blocks[id(part)]) for name, part in named if id(part) in blocks]
    users: dict[int, set[int]] = {}
    found: list[list[_Place]] = [[] for _ in blocks]
    seen: set[tuple[int, str]] = set()
    for name, module in named:
        inside = (n for prefix, n in prefixes if f"{name}.".startswith(prefix))
        user = next(inside, -1)
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or not tensor.numel():
                continue
            users.setdefault(_storage(tensor), set()).add(user)
            # A parameter moves as an object, once; a buffer in each of its modules.
            own = key in module._parameters
            identity = (id(tensor), "") if own else (id(module), key)
            if user >= 0 and identity not in seen:
                seen.add(identity)
                found[user].append(_Place(module, key))
    return [[p for p in places if len(users[_storage(p.tensor)]) == 1] for places in found]
