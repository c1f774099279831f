"""The direction specification in plain PyTorch: the oracle, for any device and any dtype.

Integer arithmetic on int64 tensors and one float32 operation at a time; no generator of the
framework, no `alpha=`, no `addcmul`. Slow on purpose: the fast kernels must agree with it bit
for bit.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fedforward.core.steps import Steps, Update
from fedforward.directions.spec import (
    CALLS,
    DITHER_CALLS,
    PHILOX_MULTIPLIERS,
    PHILOX_ROUNDS,
    PHILOX_WEYL,
    TILE,
    Distribution,
    Stream,
    half_normal_table,
)

_LOW = 0xFFFFFFFF


def philox(counter: tuple[torch.Tensor, ...], key: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Philox-4x32-10 on int64 tensors that hold 32-bit words, elementwise."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        # The product wraps modulo 2^64 into a signed number: masking after the shift undoes it.
        p0 = c0 * PHILOX_MULTIPLIERS[0]
        p1 = c2 * PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _LOW) ^ c1 ^ k0,
            p1 & _LOW,
            ((p0 >> 32) & _LOW) ^ c3 ^ k1,
            p0 & _LOW,
        )
        k0 = (k0 + PHILOX_WEYL[0]) & _LOW
        k1 = (k1 + PHILOX_WEYL[1]) & _LOW
    return c0, c1, c2, c3


def _words(
    seed: int, tiles: torch.Tensor, calls: int, stream: Stream, device: torch.device
) -> torch.Tensor:
    """int64 [tiles, 4 * calls]: the words of each tile in the order of the specification."""
    call = torch.arange(calls, dtype=torch.int64, device=device).expand(len(tiles), calls)
    low = (tiles & _LOW)[:, None].expand_as(call)
    high = (tiles >> 32)[:, None].expand_as(call)
    counter = (call, low, high, torch.full_like(call, int(stream)))
    return torch.cat(philox(counter, (seed & _LOW, seed >> 32)), dim=1)


def direction(
    seed: int,
    count: int,
    *,
    first_tile: int = 0,
    distribution: Distribution,
    stream: Stream = Stream.DIRECTION,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """z(seed) at `count` coordinates from the start of tile `first_tile`, float32 [count]."""
    device = torch.device(device)
    tiles = torch.arange(-(-count // TILE), dtype=torch.int64, device=device) + first_tile
    words = _words(seed, tiles, CALLS[distribution], stream, device)
    if distribution is Distribution.RADEMACHER:
        shifts = torch.arange(32, device=device)[None, :, None]
        bits = (words[:, None, :] >> shifts) & 1
        return (1 - 2 * bits).to(torch.float32).reshape(-1)[:count]
    halves = _halves(words)
    table = torch.from_numpy(half_normal_table().copy()).to(device)
    magnitude = table[halves & 0x7FFF]
    return torch.where(halves >= 0x8000, -magnitude, magnitude)[:count]


def _halves(words: torch.Tensor) -> torch.Tensor:
    """int64 [tiles, 1024] words to [tiles * 2048] 16-bit halves, low halves of a tile first."""
    return torch.stack((words & 0xFFFF, words >> 16), dim=1).reshape(-1)


def dither(seed: int, count: int, first_tile: int, device: torch.device) -> torch.Tensor:
    """int64 [count]: 16 random bits a coordinate for stochastic rounding."""
    tiles = torch.arange(-(-count // TILE), dtype=torch.int64, device=device) + first_tile
    return _halves(_words(seed, tiles, DITHER_CALLS, Stream.DITHER, device))[:count]


def round_stochastically(
    values: torch.Tensor, noise: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """float32 to bfloat16 or float16: away from zero if fraction + noise reaches one last place.

    The fraction of a last place is cut to 16 bits before the comparison. Infinities and NaN pass.
    """
    bits = values.view(torch.int32).to(torch.int64) & _LOW
    sign, magnitude = bits >> 31, bits & 0x7FFFFFFF
    if dtype is torch.bfloat16:
        kept, rest = magnitude >> 16, magnitude & 0xFFFF
        rounded = (sign << 15) | (kept + (rest + noise >= 0x10000).to(torch.int64))
    else:
        exponent, mantissa = magnitude >> 23, magnitude & 0x7FFFFF
        normal = exponent >= 113
        shift = torch.where(normal, 13, (126 - exponent).clamp(max=41))
        significand = torch.where(exponent > 0, mantissa | 0x800000, mantissa)
        significand = torch.where(normal, ((exponent - 112) << 23) + mantissa, significand)
        kept = significand >> shift
        below = significand & ((torch.ones_like(shift) << shift) - 1)
        rest = (below << 16) >> shift
        kept = kept + (rest + noise >= 0x10000).to(torch.int64)
        rounded = (sign << 15) | kept.clamp(max=0x7C00)
    rounded = torch.where(rounded >= 0x8000, rounded - 0x10000, rounded)
    result = rounded.to(torch.int16).view(dtype)
    return torch.where(torch.isfinite(values), result, values.to(dtype))


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
    """The oracle behind `fedforward.directions.accumulate`."""
    flat = weights.detach().reshape(-1)
    scalar = torch.tensor(np.float32(decay), dtype=torch.float32, device=flat.device)
    total = flat.to(torch.float32) * scalar
    for seed, coefficient in zip(seeds.tolist(), coefficients, strict=True):
        z = direction(
            seed,
            flat.numel(),
            first_tile=first_tile,
            distribution=distribution,
            stream=stream,
            device=flat.device,
        )
        total = total + z * torch.tensor(coefficient, dtype=torch.float32, device=flat.device)
    if dither_seed is None or out.dtype is torch.float32:
        rounded = total.to(out.dtype)
    else:
        noise = dither(dither_seed, flat.numel(), first_tile, flat.device)
        rounded = round_stochastically(total, noise, out.dtype)
    out.copy_(rounded.view(out.shape))


def commit(
    weights: torch.Tensor,
    updates: Sequence[Update],
    *,
    first_tile: int,
    distribution: Distribution,
) -> int:
    """The oracle behind `ops.commit`: one pass over the weights for every update."""
    changed = 0
    for update in updates:
        before = weights.clone()
        accumulate(
            weights,
            update.steps.seeds,
            update.steps.coefficients,
            first_tile=first_tile,
            distribution=distribution,
            out=weights,
            decay=update.decay,
            dither_seed=update.dither_seed,
        )
        changed = int((before != weights).sum())
    return 0 if weights.dtype is torch.float32 else changed


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
    """The oracle behind `ops.displace`: the whole tensor is displaced and cut."""
    begins = [0] if starts is None else starts.tolist()
    length = out.shape[1] // max(1, len(begins))
    for g, steps in enumerate(own):
        whole = torch.empty(weights.numel(), dtype=out.dtype, device=out.device)
        total = shared + steps
        accumulate(
            weights,
            total.seeds,
            total.coefficients,
            first_tile=first_tile,
            distribution=distribution,
            out=whole,
        )
        for place, begin in enumerate(begins):
            out[g, place * length : (place + 1) * length] = whole[begin : begin + length]
