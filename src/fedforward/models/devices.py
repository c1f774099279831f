"""What a run asks of the kind of device that it computes on, whatever PyTorch calls it.

Every device but the CPU is an accelerator: it has memory of its own, and PyTorch's module for it
(`torch.cuda`, `torch.xpu`, …) counts what is allocated there. Kernels and measured defaults that
are for CUDA alone name it where they are.
"""

import re
from typing import Any

import torch

from fedforward.core.errors import FedForwardError

#: Kinds that cannot run this package: no float64, in which losses are summed.
_UNFIT = {"mps"}


def is_accelerator(device: torch.device | str) -> bool:
    """Whether a device has memory of its own, apart from main memory."""
    return torch.device(device).type != "cpu"


def accelerators() -> list[str]:
    """Kinds of accelerators that are there: CUDA, and another one if PyTorch finds one."""
    found = ["cuda"] if torch.cuda.is_available() else []
    other = torch.accelerator.current_accelerator()
    if other is not None and torch.accelerator.is_available() and other.type not in _UNFIT:
        found += [other.type] if other.type not in found else []
    return found


def count(kind: str) -> int:
    """How many devices of a kind there are."""
    return int(_module(kind).device_count())


def select(device: torch.device | str) -> None:
    """Make a device the one that its kind's name stands for from now on."""
    _module(device).set_device(torch.device(device))


def allocated(device: torch.device | str) -> int:
    """Bytes that are allocated now, on all devices of this one's kind."""
    return sum(int(_module(device).memory_allocated(n)) for n in range(count(str(device))))


def peak_allocated(device: torch.device | str) -> int:
    """The most bytes since `reset_peak`, on all devices of this one's kind."""
    return sum(int(_module(device).max_memory_allocated(n)) for n in range(count(str(device))))


def reset_peak(device: torch.device | str) -> None:
    """Have `peak_allocated` begin at what is allocated now."""
    for number in range(count(str(device))):
        _module(device).reset_peak_memory_stats(number)


def room(device: torch.device | str) -> int:
    """Bytes that this process could still take on one device, those that it holds included."""
    module = _module(device)
    free, _ = module.mem_get_info(device)
    return int(free + module.memory_reserved(device))


def resolve(requested: str, key: str) -> str:
    """A device that is there.

    Args:
        requested: "auto", "cpu", "cuda" or "cuda:N".
        key: as the user typed it.

    Raises:
        FedForwardError: CUDA was asked for and is not there, or the name is unknown.
    """
    there = accelerators()
    if requested == "auto":
        return "cuda" if "cuda" in there else "cpu"
    kind = requested.split(":")[0]
    names = ["cpu", *(rf"{name}(:\d+)?" for name in {"cuda", *there})]
    if not re.fullmatch("|".join(names), requested):
        raise FedForwardError(
            f"{key} = {requested!r} is not allowed: it must be 'auto', 'cpu', 'cuda' or 'cuda:N'."
        )
    if kind == "cuda" and kind not in there:
        raise FedForwardError(
            f"{key} = {requested!r}: PyTorch finds no CUDA device here. Use 'cpu' or 'auto'."
        )
    if kind in there and int(requested.partition(":")[2] or 0) >= count(kind):
        raise FedForwardError(
            f"{key} = {requested!r}: there are only {count(kind)} {kind.upper()} "
            "devices, numbered from 0."
        )
    return requested


def _module(device: torch.device | str) -> Any:
    return torch.get_device_module(device)
