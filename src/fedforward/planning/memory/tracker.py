"""Bytes of tensors alive, and their peak while something runs, exactly and on any device.

The process's resident size says more about allocators and imports than about a method; what a
method needs is counted here from the tensors themselves.
"""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedforward.models import devices


def bytes_alive(device: str | None = None) -> int:
    """Bytes of all storages that some living tensor refers to, or of those on a kind of device."""
    gc.collect()
    storages: dict[int, int] = {}
    for candidate in gc.get_objects():
        # Proxies and lazy modules may run code when asked for their class; `type` does not.
        if issubclass(type(candidate), torch.Tensor):
            try:
                storage = candidate.untyped_storage()
            except (NotImplementedError, RuntimeError):
                continue
            if device is not None and candidate.device.type != device:
                continue
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class Tracker(TorchDispatchMode):
    """Follows every storage that an operation makes until it is freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._alive: dict[int, weakref.finalize] = {}  # type: ignore[type-arg]

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # Under inference mode composite operations arrive whole: taken apart, what they make on
        # the way is seen too.
        with self:
            parts = function.decompose(*args, **(kwargs or {}))
        if parts is not NotImplemented:
            return parts
        result = function(*args, **(kwargs or {}))
        inputs = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in inputs:
                    self._follow(storage)
        return result

    def _follow(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._alive and self._alive[key].alive:
            return
        size = storage.nbytes()
        self._alive[key] = weakref.finalize(storage, self._freed, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _freed(self, size: int) -> None:
        self.now -= size


def peak_bytes(action: Callable[[], object], device: torch.device | str | None = None) -> int:
    """Bytes of tensors alive at the worst moment of `action`, those from before included.

    On CUDA it is what the allocator has given out at most. The matrix library's workspace (8 to
    34 MB) is in it, as the device has to have it, and predictions have it too.

    Args:
        device: on which `action` works: on an accelerator, its allocator is asked. None is CUDA if
            this process has used it, and the CPU if not.
    """
    return before_and_peak(action, device)[1]


def before_and_peak(
    action: Callable[[], object], device: torch.device | str | None = None
) -> tuple[int, int]:
    """Bytes of tensors alive before `action` begins, and at its worst moment; see `peak_bytes`."""
    if device is None:
        used = torch.cuda.is_available() and torch.cuda.is_initialized()
        device = "cuda" if used else "cpu"
    if devices.is_accelerator(device):
        gc.collect()
        before = devices.allocated(device)
        devices.reset_peak(device)
        action()
        return before, devices.peak_allocated(device)
    before = bytes_alive()
    tracker = Tracker()
    with tracker:
        action()
    return before, before + tracker.peak
