"""An accelerator for machines without one: a PyTorch back end, "emulated", whose kernels are the
CPU's.

Code for CUDA goes wrong in ways that the CPU cannot show: tensors of two devices meet, memory is
counted somewhere else, an array is asked for that lies on the device. Here they go wrong as they do
on CUDA:

- tensors of two devices in one operation are refused, but for numbers (0-dim tensors) of the CPU
  and indices;
- `numpy()` is refused; `cpu()`, `to()`, `item()` and `copy_()` cross;
- memory is counted byte by byte: `memory_allocated`, `max_memory_allocated`, and `OutOfMemoryError`
  beyond what the device has;
- host memory can be pinned, gradients flow, `parameter.data` may move to the device and back.

Operations run on the CPU's own kernels, on the same memory, so that results have the CPU's bits.
What PyTorch decides by the kind of device is decided as for any accelerator without kernels of its
own: attention is plain matrix products, not the CPU's fused kernel (see `plain_attention`). There
is one stream and nothing is asynchronous, so that a race is not seen; no kernel is compiled.

The back end is `emulated_device.cpp`, compiled with g++ on first use (5 s) and kept.
"""

import hashlib
import os
import shutil
import subprocess
import types
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedforward.directions import ops as kernels

NAME = "emulated"
SOURCE = Path(__file__).with_suffix(".cpp")
#: Optimised little: the time goes to compiling.
FLAGS = ("-std=c++17", "-O1", "-shared", "-fPIC", "-w")


class UnavailableError(Exception):
    """The device cannot be had here; the text says why."""


class _Module(types.ModuleType):
    """`torch.emulated`: the functions that `torch.cuda` has, for one device."""

    def __init__(self) -> None:
        super().__init__(f"torch.{NAME}")
        self.shown = False

    def is_available(self) -> bool:
        return self.shown

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return int(self.shown)

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None:
        if (torch.device(NAME, device) if isinstance(device, int) else device).index:
            raise RuntimeError(f"invalid device ordinal: {device}")

    def synchronize(self, device: Any = None) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def memory_allocated(self, device: Any = None) -> int:
        return int(torch.ops.emulated.allocated())

    def memory_reserved(self, device: Any = None) -> int:
        return self.memory_allocated()

    def max_memory_allocated(self, device: Any = None) -> int:
        return int(torch.ops.emulated.peak())

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        torch.ops.emulated.reset_peak()

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        total = int(torch.ops.emulated.most())
        return total - self.memory_allocated(), total

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """Random numbers come from the CPU's generator."""


def module() -> Any:
    """`torch.emulated`."""
    return torch.get_device_module(NAME)


def load(folder: Path) -> None:
    """Make the device known to PyTorch, once in a process. It stays out of sight until `shown`.

    Args:
        folder: where the compiled back end is kept.

    Raises:
        UnavailableError: there is no compiler, or it fails.
    """
    if hasattr(torch, NAME):
        return
    if torch.cuda.is_available():
        raise UnavailableError("a CUDA device is there, and PyTorch takes one accelerator")
    library = _compiled(folder)
    torch.utils.rename_privateuse1_backend(NAME)
    torch.ops.load_library(str(library))
    torch.ops.emulated.register_hooks()
    torch._register_device_module(NAME, _Module())


def _compiled(folder: Path) -> Path:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise UnavailableError("the emulated device needs a C++ compiler: install g++, or set CXX")
    root = Path(torch.__file__).parent
    options = [*FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    options += [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    libraries = [f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{root / 'lib'}"]
    identity = [SOURCE.read_text(encoding="utf-8"), torch.__version__, compiler, *options]
    key = hashlib.sha256("\n".join(identity).encode()).hexdigest()[:16]
    target = folder / f"{NAME}-{key}.so"
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        # Test workers may compile at once: each its own, and the last one stays.
        own = target.with_suffix(f".{os.getpid()}")
        command = [compiler, *options, str(SOURCE), "-o", str(own), *libraries]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UnavailableError(f"the emulated device does not compile: {done.stderr[-2000:]}")
        own.replace(target)
    return target


@contextmanager
def shown() -> Iterator[torch.device]:
    """While it is open, PyTorch finds the device, all of its memory free."""
    own = module()
    own.shown = True
    own.reset_peak_memory_stats()
    try:
        yield torch.device(NAME)
    finally:
        own.shown = False


@contextmanager
def memory(total: int) -> Iterator[None]:
    """While it is open, the device has so many bytes."""
    before = int(torch.ops.emulated.most())
    torch.ops.emulated.set_most(total)
    try:
        yield
    finally:
        torch.ops.emulated.set_most(before)


class Kernels:
    """Stands in for `directions.triton_launch`: kernels that need no memory beside their result.

    They are those of the CPU, on the device's memory. The PyTorch reference, which any other device
    takes, makes large temporary tensors on it.
    """

    @staticmethod
    def accumulate(weights: torch.Tensor, *given: Any, out: torch.Tensor, **named: Any) -> None:
        kernels.accumulate(_here(weights), *given, out=_here(out), **named)

    @staticmethod
    def commit(weights: torch.Tensor, *given: Any, **named: Any) -> int:
        return kernels.commit(_here(weights), *given, **named)

    @staticmethod
    def displace(weights: torch.Tensor, *given: Any, out: torch.Tensor, **named: Any) -> None:
        kernels.displace(_here(weights), *given, out=_here(out), **named)


def _here(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type != NAME:
        raise RuntimeError(f"a kernel of the device was given a tensor on {tensor.device}")
    seen: torch.Tensor = torch.ops.emulated.as_cpu(tensor.detach())
    return seen


def plain_attention() -> AbstractContextManager[None]:
    """While it is open, attention is the same matrix products on every device."""
    return sdpa_kernel(SDPBackend.MATH)
