"""The operations on tensors: add displacements to weights, on whatever device they are.

The device chooses the kernel: numba on the CPU, Triton on CUDA, the PyTorch reference elsewhere.
All give the same bits.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedforward.core.steps import Steps, Update
from fedforward.directions import numba_kernels as cpu
from fedforward.directions import reference
from fedforward.directions import sparse_kernels as sparse
from fedforward.directions.sparse_kernels import FreeCoordinates
from fedforward.directions.spec import Distribution, Stream

_CODES = {
    torch.float32: cpu.FLOAT32,
    torch.bfloat16: cpu.BFLOAT16,
    torch.float16: cpu.FLOAT16,
}


def accumulate(
    weights: torch.Tensor,
    seeds: NDArray[np.uint64],
    coefficients: NDArray[np.float32],
    *,
    first_tile: int,
    distribution: Distribution,
    out: torch.Tensor,
    decay: float = 1.0,
    dither_seed: int | None = None,
    stream: Stream = Stream.DIRECTION,
) -> None:
    """out = round(decay · weights + Σ_k c_k z(s_k)), in one pass over the weights.

    Every addition and product is one float32 operation in the given order; the sum is rounded
    once to `out`'s dtype. See `docs/directions.md`, "Arithmetic".

    Args:
        weights: contiguous, float32, bfloat16 or float16, any shape; coordinate 0 of its row-major
            order is coordinate 0 of tile `first_tile`.
        seeds: uint64 [K]. K may be 0.
        coefficients: float32 [K].
        first_tile: where the tensor begins in the tunable space (see `Layout`).
        distribution: of the coordinates of z.
        out: contiguous, as many elements, any of the three dtypes; may be `weights` itself.
        decay: multiplies the weights first (1 leaves every bit as it is).
        dither_seed: None rounds to nearest-even; a 64-bit seed rounds stochastically (used when an
            update is committed to weights in half precision).
        stream: the Philox stream that the numbers come from.
    """
    if weights.device.type == "cpu":
        cpu.commit(
            _array(weights),
            seeds,
            coefficients,
            first_tile=first_tile,
            distribution=distribution,
            out=_array(out),
            codes=(_CODES[weights.dtype], _CODES[out.dtype]),
            decays=(decay,),
            dither_seeds=None if dither_seed is None else (dither_seed,),
            stream=stream,
            threads=torch.get_num_threads(),
        )
        return
    kernels_of(weights.device.type).accumulate(
        weights,
        seeds,
        coefficients,
        first_tile=first_tile,
        distribution=distribution,
        out=out,
        decay=decay,
        dither_seed=dither_seed,
        stream=stream,
    )


def commit(
    weights: torch.Tensor,
    updates: Sequence[Update],
    *,
    first_tile: int,
    distribution: Distribution,
) -> int:
    """Apply updates in place, each with its own rounding, in one pass over the weights.

    Float32 weights are not rounded; half precisions are rounded stochastically after every update,
    with its dither. The bits are those of `accumulate` called for one update after another.

    Args:
        weights: contiguous; see `accumulate`, also for the others.
        updates: in order.

    Returns:
        How many coordinates the last update changed; 0 in float32, where they are not counted.
    """
    if not updates:
        return 0
    if weights.device.type == "cpu":
        array = _array(weights)
        return cpu.commit(
            array,
            np.concatenate([update.steps.seeds for update in updates]),
            np.concatenate([update.steps.coefficients for update in updates]),
            first_tile=first_tile,
            distribution=distribution,
            out=array,
            codes=(_CODES[weights.dtype],) * 2,
            ends=np.cumsum([len(update.steps) for update in updates]).tolist(),
            decays=[update.decay for update in updates],
            dither_seeds=[update.dither_seed for update in updates],
            threads=torch.get_num_threads(),
        )
    changed = kernels_of(weights.device.type).commit(
        weights, updates, first_tile=first_tile, distribution=distribution
    )
    return 0 if weights.dtype is torch.float32 else int(changed)


def commit_all(
    parts: Sequence[tuple[torch.Tensor, int, Sequence[Update]]], distribution: Distribution
) -> int:
    """`commit` for many tensors; a CUDA device is waited for once and not after each.

    Args:
        parts: of each tensor the weights, the first tile, and the updates.

    Returns:
        The sum of what `commit` returns.
    """
    changed, on_cuda = 0, []
    for part in parts:
        weights, first_tile, updates = part
        if weights.device.type == "cuda":
            on_cuda.append(part)
        else:
            changed += commit(weights, updates, first_tile=first_tile, distribution=distribution)
    if not on_cuda:
        return changed
    implementation = kernels_of("cuda")
    if implementation is reference:
        return changed + sum(
            commit(weights, updates, first_tile=first_tile, distribution=distribution)
            for weights, first_tile, updates in on_cuda
        )
    return changed + int(implementation.commit_all(on_cuda, distribution))


def displace(
    weights: torch.Tensor,
    shared: Steps,
    own: Sequence[Steps],
    *,
    first_tile: int,
    distribution: Distribution,
    out: torch.Tensor,
    starts: NDArray[np.int64] | None = None,
) -> None:
    """out[g] = round(weights + Σ shared + Σ own[g]), beside the weights, for all g in one pass.

    The shared sum is made once; neighbours in `own` that are one step along the same seed (the two
    signs of a direction) share its z.

    Args:
        weights: contiguous; see `accumulate`, also for the others.
        shared: steps that come first in every sum.
        own: G lists of steps.
        out: contiguous [G, n], float32, bfloat16 or float16, rounded to nearest-even.
        starts: int64 [S], at which coordinates of the weights S pieces of n / S neighbours begin
            (rows of an embedding, or a tile of a matrix); None takes the first n.
    """
    if weights.device.type == "cpu":
        cpu.displace(
            _array(weights),
            shared,
            own,
            first_tile=first_tile,
            distribution=distribution,
            out=_array(out).reshape(out.shape),
            codes=(_CODES[weights.dtype], _CODES[out.dtype]),
            starts=starts,
            threads=torch.get_num_threads(),
        )
        return
    kernels_of(weights.device.type).displace(
        weights, shared, own, first_tile=first_tile, distribution=distribution, out=out,
        starts=starts,
    )  # fmt: skip


#: Share of the coordinates up to which a list of free ones is faster than whole tiles, measured.
SPARSE = {Distribution.GAUSSIAN: 0.2, Distribution.RADEMACHER: 0.02}


def commit_at(
    weights: torch.Tensor,
    free: FreeCoordinates,
    updates: Sequence[Update],
    *,
    distribution: Distribution,
) -> int:
    """`commit` at some coordinates of weights in main memory; the others stay.

    Returns:
        How many of them the last update changed; 0 in float32.
    """
    if not updates or not len(free):
        return 0
    return sparse.commit_at(
        _array(weights),
        free,
        np.concatenate([update.steps.seeds for update in updates]),
        np.concatenate([update.steps.coefficients for update in updates]),
        distribution=distribution,
        code=_CODES[weights.dtype],
        ends=np.cumsum([len(update.steps) for update in updates]).tolist(),
        decays=[update.decay for update in updates],
        dither_seeds=[update.dither_seed for update in updates],
        threads=torch.get_num_threads(),
    )


def displace_at(
    weights: torch.Tensor,
    free: FreeCoordinates,
    shared: Steps,
    own: Sequence[Steps],
    *,
    distribution: Distribution,
) -> torch.Tensor:
    """`displace` at some coordinates of weights in main memory.

    Returns:
        [G, n] in the weights' dtype.
    """
    out = torch.empty((len(own), len(free)), dtype=weights.dtype)
    sparse.displace_at(
        _array(weights),
        free,
        shared,
        own,
        distribution=distribution,
        out=_array(out).reshape(out.shape),
        codes=(_CODES[weights.dtype],) * 2,
        threads=torch.get_num_threads(),
    )
    return out


@cache
def kernels_of(device: str) -> Any:
    """The implementation for tensors on a kind of device other than main memory."""
    if device == "cuda":
        try:
            from fedforward.directions import triton_launch as cuda
        except ImportError:
            return reference
        return cuda
    return reference


def _array(tensor: torch.Tensor) -> NDArray[np.float32] | NDArray[np.uint16]:
    """A flat numpy view that shares memory: float32 as it is, half precisions as their bits."""
    flat = tensor.detach().view(-1)
    return (flat if flat.dtype is torch.float32 else flat.view(torch.uint16)).numpy()
