"""The one operation on tensors: add displacements to weights, on whatever device they are."""

import numpy as np
import torch
from numpy.typing import NDArray

from fedforward.directions import cpu, reference
from fedforward.directions.specification import Distribution, Stream

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
        cpu.accumulate(
            _array(weights),
            seeds,
            coefficients,
            first_tile=first_tile,
            distribution=distribution,
            out=_array(out),
            codes=(_CODES[weights.dtype], _CODES[out.dtype]),
            decay=decay,
            dither_seed=dither_seed,
            stream=stream,
            threads=torch.get_num_threads(),
        )
        return
    reference.accumulate(
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


def _array(tensor: torch.Tensor) -> NDArray[np.float32] | NDArray[np.uint16]:
    """A flat numpy view that shares memory: float32 as it is, half precisions as their bits."""
    flat = tensor.detach().view(-1)
    return (flat if flat.dtype is torch.float32 else flat.view(torch.uint16)).numpy()
