"""The Triton kernels: directions on CUDA devices, generated where they are added, never stored.

A program owns one or two tiles and reads and writes each of their weights once, whatever the number
of seeds. Everything about a coordinate stays in one thread: the thread that makes a word of a tile
holds the sums of the coordinates that the word drives. `kernels.py` alone calls what is here;
importing this module needs Triton.
"""

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from fedforward.core.steps import Steps, Update
from fedforward.directions.spec import (
    PHILOX_MULTIPLIERS,
    PHILOX_ROUNDS,
    PHILOX_WEYL,
    TILE,
    Distribution,
    Stream,
    half_normal_table,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FIRST = bytes(8)

_MULTIPLIER_0 = tl.constexpr(PHILOX_MULTIPLIERS[0])
_MULTIPLIER_1 = tl.constexpr(PHILOX_MULTIPLIERS[1])
_WEYL_0 = tl.constexpr(PHILOX_WEYL[0])
_WEYL_1 = tl.constexpr(PHILOX_WEYL[1])
_ROUNDS = tl.constexpr(PHILOX_ROUNDS)
_TILE = tl.constexpr(TILE)
_DITHER = tl.constexpr(int(Stream.DITHER))


class Shape(NamedTuple):
    """How a program's coordinates lie in its tensors of shape [8, 256 / lanes, tiles * lanes].

    Place [h, q, l] is the coordinate at offset 256 h + lanes q + l mod lanes of tile l // lanes.
    The last dimension is as long as there are threads or longer, and the other two lie in a
    thread's registers.

    Attributes:
        tiles: tiles of a program.
        lanes: neighbouring coordinates of a tile in the last dimension, a power of two from 16 to
            256. A Rademacher tile takes 16 calls: with 16 lanes every thread makes its own words,
            with 32 or 64 two or four threads make the same ones, and each holds fewer sums.
        warps: warps of a program; 32 * warps divides tiles * lanes.
    """

    tiles: int
    lanes: int
    warps: int


#: By distribution and by whether the kernel has more than the sums to hold: dither, or more rows.
#: Measured on an H200; the bits do not depend on them.
SHAPES = {
    (Distribution.RADEMACHER, False): Shape(2, 16, 1),
    (Distribution.RADEMACHER, True): Shape(1, 128, 2),
    (Distribution.GAUSSIAN, False): Shape(1, 128, 4),
    (Distribution.GAUSSIAN, True): Shape(1, 256, 4),
}
#: Of Rademacher commits with dither whose updates have few steps each: what threads make in common
#: matters less than how many of them there are. As many tiles as above.
SHAPE_OF_FEW = Shape(1, 256, 4)
FEW = 8


# Device functions


@triton.jit
def _philox(c0, c1, c2, c3, seed):  # type: ignore[no-untyped-def]
    """Philox-4x32-10: four uint32 tensors of one shape and an int64 scalar with the seed's bits."""
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(_ROUNDS):
        p0 = c0.to(tl.uint64) * _MULTIPLIER_0
        p1 = c2.to(tl.uint64) * _MULTIPLIER_1
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 = k0 + _WEYL_0
        k1 = k1 + _WEYL_1
    return c0, c1, c2, c3


@triton.jit
def _pick(number, w0, w1, w2, w3):  # type: ignore[no-untyped-def]
    """The word of each place by its number, 0 to 3, all of one shape; known when compiled."""
    return tl.where(number < 2, tl.where(number < 1, w0, w1), tl.where(number < 3, w2, w3))


@triton.jit
def _signs(tile, stream, seed, tiles: tl.constexpr, lanes: tl.constexpr):  # type: ignore[no-untyped-def]
    """uint32 [8, 256 / lanes, tiles * lanes]: bit 31 is the sign of z, the rest is anything.

    The coordinate at offset 16 r + k is bit r // 4 of word r mod 4 of call k (Rademacher). Here
    r = 16 h + q lanes / 16 + g, where g is the lane's group of 16.
    """
    lane = tl.arange(0, tiles * lanes)
    call = (lane % 16).to(tl.uint32)
    low = tile.to(tl.uint32)
    high = (tile >> 32).to(tl.uint32)
    w0, w1, w2, w3 = _philox(call, low, high, (call * 0) + stream.to(tl.uint32), seed)
    if lanes >= 32:
        odd = (lane // 16) % 2 == 1
        w0 = tl.where(odd, w1, w0)
        w2 = tl.where(odd, w3, w2)
    if lanes >= 64:
        w0 = tl.where((lane // 32) % 2 == 1, w2, w0)
    shape: tl.constexpr = (256 // lanes, tiles * lanes)
    q = tl.arange(0, 256 // lanes)[:, None]
    if lanes >= 64:
        word = tl.broadcast_to(w0[None, :], shape)
        # What is the thread's own of the bit's number is shifted once for all of its places.
        most: tl.constexpr = lanes // 64 - 1
        word = word << (most - (lane % lanes) // 64).to(tl.uint32)[None, :]
        bit = 4 * tl.arange(0, 8)[:, None, None] + (q * (lanes // 64) + most)[None, :, :]
    else:
        word = _pick(
            tl.broadcast_to((q % (64 // lanes)) * (lanes // 16), shape),
            tl.broadcast_to(w0[None, :], shape),
            tl.broadcast_to(w1[None, :], shape),
            tl.broadcast_to(w2[None, :], shape),
            tl.broadcast_to(w3[None, :], shape),
        )
        bit = 4 * tl.arange(0, 8)[:, None, None] + (q // (64 // lanes))[None, :, :]
    return word[None, :, :] << (31 - bit).to(tl.uint32)


@triton.jit
def _halves(tile, stream, seed, tiles: tl.constexpr, lanes: tl.constexpr):  # type: ignore[no-untyped-def]
    """uint32 [8, 256 / lanes, tiles * lanes]: a half word in the Gaussian order, above it anything.

    That is half h // 4 of the word h mod 4 of the call lanes q + l mod lanes.
    """
    shape: tl.constexpr = (256 // lanes, tiles * lanes)
    q = tl.arange(0, 256 // lanes)[:, None]
    call = tl.broadcast_to(lanes * q + (tl.arange(0, tiles * lanes) % lanes)[None, :], shape)
    call = call.to(tl.uint32)
    low = tl.broadcast_to(tile.to(tl.uint32)[None, :], shape)
    high = tl.broadcast_to((tile >> 32).to(tl.uint32)[None, :], shape)
    w0, w1, w2, w3 = _philox(call, low, high, (call * 0) + stream.to(tl.uint32), seed)
    block: tl.constexpr = (8, 256 // lanes, tiles * lanes)
    h = tl.arange(0, 8)[:, None, None]
    word = _pick(
        tl.broadcast_to(h % 4, block),
        tl.broadcast_to(w0[None, :, :], block),
        tl.broadcast_to(w1[None, :, :], block),
        tl.broadcast_to(w2[None, :, :], block),
        tl.broadcast_to(w3[None, :, :], block),
    )
    return word >> (16 * (h // 4)).to(tl.uint32)


@triton.jit
def _draw(  # type: ignore[no-untyped-def]
    tile, stream, seed, table, gaussian: tl.constexpr, tiles: tl.constexpr, lanes: tl.constexpr
):
    """What `_moved` needs of z(seed): bit 31 is its sign; Gaussian magnitudes go beside it."""
    if gaussian:
        half = _halves(tile, stream, seed, tiles, lanes)
        sign = half << 16
        # Neighbours they are not: it says which dimension lies across threads, and no more, as
        # the table's alignment is not known.
        entry = tl.max_contiguous(table + (half & 0x7FFF).to(tl.int32), [1, 1, 2])
        magnitude = tl.load(entry)
    else:
        sign = _signs(tile, stream, seed, tiles, lanes)
        magnitude = 1.0
    return sign, magnitude


@triton.jit
def _moved(acc, coefficient, sign, magnitude, gaussian: tl.constexpr):  # type: ignore[no-untyped-def]
    """RNE(acc + RNE(c z)): the sign goes into the product, which changes nothing else of it."""
    if gaussian:
        product = (coefficient * magnitude).to(tl.uint32, bitcast=True)
    else:
        product = coefficient.to(tl.uint32, bitcast=True)
    return acc + (product ^ (sign & 0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def _float(bits):  # type: ignore[no-untyped-def]
    """The float32 whose bits an int64 scalar holds."""
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _add(  # type: ignore[no-untyped-def]
    acc, steps, begin, end, tile, stream, table,
    gaussian: tl.constexpr, tiles: tl.constexpr, lanes: tl.constexpr,
):  # fmt: skip
    """acc + Σ c z(s) over the rows begin..end of `steps`, one after the other."""
    for step in range(begin, end):
        seed = tl.load(steps + 2 * step)
        coefficient = _float(tl.load(steps + 2 * step + 1))
        sign, magnitude = _draw(tile, stream, seed, table, gaussian, tiles, lanes)
        acc = _moved(acc, coefficient, sign, magnitude, gaussian)
    return acc


# The interpreter's own conversions to and from bfloat16 cut halves off and lose subnormals.
_INTERPRETED = tl.constexpr(not isinstance(_philox, triton.JITFunction))


@triton.jit
def _widened(numbers):  # type: ignore[no-untyped-def]
    """float32 of any of the three dtypes, exactly."""
    if numbers.dtype == tl.bfloat16:
        if _INTERPRETED:
            bits = numbers.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
            wide = bits.to(tl.float32, bitcast=True)
        else:
            wide = numbers.to(tl.float32)
    else:
        wide = numbers.to(tl.float32)
    return wide


@triton.jit
def _nearest(acc, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 to `dtype`, to nearest-even: one instruction of the device."""
    if dtype == tl.bfloat16:
        if _INTERPRETED:
            bits = acc.to(tl.uint32, bitcast=True)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            rounded = tl.where(acc == acc, rounded, 0x7FC0).to(tl.uint16)
            narrow = rounded.to(tl.bfloat16, bitcast=True)
        else:
            narrow = acc.to(dtype)
    else:
        narrow = acc.to(dtype)
    return narrow


@triton.jit
def _dithered(acc, noise, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 rounded stochastically to numbers of `dtype`, float32 still; 2^16 stays finite."""
    bits = acc.to(tl.uint32, bitcast=True)
    if dtype == tl.bfloat16:
        rounded = ((bits + noise) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        normal = ((bits + (noise >> 3)) & 0xFFFFE000).to(tl.float32, bitcast=True)
        # Below 2^-14 the last place is 2^-24: units of 2^-40 have 16 bits of fraction.
        magnitude = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
        small = magnitude < 0.00006103515625
        units = (tl.where(small, magnitude, 0.0) * 1099511627776.0).to(tl.int32).to(tl.uint32)
        kept = ((units + noise) >> 16).to(tl.int32).to(tl.float32) * 0.000000059604644775390625
        signed = (kept.to(tl.uint32, bitcast=True) | (bits & 0x80000000)).to(
            tl.float32, bitcast=True
        )
        rounded = tl.where(small, signed, normal)
    return tl.where(acc == acc, rounded, acc)


# Kernels. Counts and places are arguments, never compiled in, and pointers are not specialised:
# were the compiler to know their alignment, it would give a thread neighbouring coordinates to load
# them as vectors, and so make every thread generate the words of its neighbours.


@triton.jit(
    do_not_specialize=[
        "weights", "out", "updates", "steps", "table", "changed", "size", "first_tile", "count",
        "stream",
    ]
)  # fmt: skip
def _commit(  # type: ignore[no-untyped-def]
    weights, out, updates, steps, table, changed, size, first_tile, count, stream,
    gaussian: tl.constexpr, dithered: tl.constexpr, counting: tl.constexpr,
    tiles: tl.constexpr, lanes: tl.constexpr,
):  # fmt: skip
    """All updates on the program's tiles.

    If `counting`, `out` is `weights`, and the program says how many numbers the last one changed.
    `updates` [count, 4] int64: first step, last step + 1, dither seed, decay's bits.
    `steps` [K, 2] int64: seed, coefficient's bits. `changed` [programs] int32.
    """
    lane = tl.arange(0, tiles * lanes)
    own = tl.program_id(0).to(tl.int64) * tiles + lane // lanes
    tile = own + first_tile
    # A thread's places are one base plus constants.
    base = tl.max_contiguous(own * _TILE + lane % lanes, lanes)
    offset = (
        256 * tl.arange(0, 8)[:, None, None] + lanes * tl.arange(0, 256 // lanes)[None, :, None]
    )
    mask = offset < tl.minimum(size - base, _TILE).to(tl.int32)[None, None, :]
    place = base[None, None, :] + offset

    value = _widened(tl.load(weights + place, mask=mask, other=0.0, cache_modifier=".cg"))
    for update in range(count):
        if counting:  # noqa: SIM102 (one is decided by the compiler, one by the device)
            if (update > 0) & (update == count - 1):
                # Read again below: to keep it would take half of the registers.
                tl.store(out + place, _nearest(value, out.dtype.element_ty), mask=mask)
        begin = tl.load(updates + 4 * update).to(tl.int32)
        end = tl.load(updates + 4 * update + 1).to(tl.int32)
        decay = _float(tl.load(updates + 4 * update + 3))
        value = _add(value * decay, steps, begin, end, tile, stream, table, gaussian, tiles, lanes)
        if dithered:
            seed = tl.load(updates + 4 * update + 2)
            noise = _halves(tile, tl.full((), _DITHER, tl.int32), seed, tiles, lanes) & 0xFFFF
            value = _dithered(value, noise, out.dtype.element_ty)
        value = _widened(_nearest(value, out.dtype.element_ty))
    if counting:
        # The read and the store before it may lie in other threads than the store after it.
        tl.debug_barrier()
        before = _widened(tl.load(out + place, mask=mask, other=0.0, cache_modifier=".cg"))
        tl.debug_barrier()
        differ = ((value != before) & mask).to(tl.int32)
        total = tl.sum(tl.sum(tl.sum(differ, axis=0), axis=0), axis=0)
        tl.store(changed + tl.program_id(0), total)
    tl.store(out + place, _nearest(value, out.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        "weights", "out", "starts", "steps", "singles", "lists", "table", "size", "first_tile",
        "pieces", "length", "tiles_per_piece", "trajectory", "single_count", "list_count",
    ]
)  # fmt: skip
def _displace(  # type: ignore[no-untyped-def]
    weights, out, starts, steps, singles, lists, table, size, first_tile, pieces, length,
    tiles_per_piece, trajectory, single_count, list_count,
    gaussian: tl.constexpr, listed: tl.constexpr, tiles: tl.constexpr, lanes: tl.constexpr,
):  # fmt: skip
    """The program's tiles of the pieces: the trajectory once, then every perturbation.

    `steps` [K, 2] int64: seed, coefficient's bits; the first `trajectory` are the trajectory's.
    `singles` [., 5] int64: seed, coefficient's bits and row of `out`, the same of its twin; the
    row is -1 where there is none. `lists` [., 3] int64: row, first step, last step + 1.
    """
    lane = tl.arange(0, tiles * lanes)
    own = tl.program_id(0) * tiles + lane // lanes
    piece = own // tiles_per_piece
    start = tl.load(starts + piece, mask=piece < pieces, other=0)
    start = tl.where(start < 0, size, start)
    inner = start // _TILE + (own - piece * tiles_per_piece)
    tile = inner + first_tile
    base = tl.max_contiguous(inner * _TILE + lane % lanes, lanes)
    offset = (
        256 * tl.arange(0, 8)[:, None, None] + lanes * tl.arange(0, 256 // lanes)[None, :, None]
    )
    # The piece's part of the tile, counted from the thread's base; none beyond the last piece.
    first = tl.minimum(tl.maximum(start - base, 0), _TILE).to(tl.int32)
    behind = tl.minimum(tl.maximum(start + length - base, 0), _TILE)
    behind = tl.where(piece < pieces, behind, 0).to(tl.int32)
    limit = tl.minimum(tl.maximum(size - base, 0), _TILE).to(tl.int32)
    mask = (offset >= first[None, None, :]) & (offset < behind[None, None, :])
    source = weights + base[None, None, :] + offset
    target = tl.max_contiguous(piece * length.to(tl.int64) + base - start, lanes)
    target = target[None, None, :] + offset
    row_length = length.to(tl.int64) * pieces
    stream = tl.full((), 0, tl.int32)

    here = mask & (offset < limit[None, None, :])
    value = _widened(tl.load(source, mask=here, other=0.0, cache_modifier=".cg"))
    value = _add(value, steps, 0, trajectory, tile, stream, table, gaussian, tiles, lanes)
    for single in range(single_count):
        at = singles + 5 * single
        sign, magnitude = _draw(tile, stream, tl.load(at), table, gaussian, tiles, lanes)
        moved = _moved(value, _float(tl.load(at + 1)), sign, magnitude, gaussian)
        place = out + tl.load(at + 2) * row_length + target
        tl.store(place, _nearest(moved, out.dtype.element_ty), mask=mask)
        twin = tl.load(at + 4)
        if twin >= 0:
            other = _moved(value, _float(tl.load(at + 3)), sign, magnitude, gaussian)
            place = out + twin * row_length + target
            tl.store(place, _nearest(other, out.dtype.element_ty), mask=mask)
    if listed:
        for number in range(list_count):
            at = lists + 3 * number
            begin = tl.load(at + 1).to(tl.int32)
            end = tl.load(at + 2).to(tl.int32)
            moved = _add(value, steps, begin, end, tile, stream, table, gaussian, tiles, lanes)
            place = out + tl.load(at) * row_length + target
            tl.store(place, _nearest(moved, out.dtype.element_ty), mask=mask)


# Launchers


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
    """`fedforward.directions.ops.accumulate` for tensors on a CUDA device.

    Raises:
        ValueError: a tensor is not contiguous, or sizes or devices do not fit.
        TypeError: a dtype is not one of those that `kernels.accumulate` lists.
    """
    _check(weights, out, weights.numel())
    update = Update(Steps(seeds, coefficients), dither_seed or 0, decay)
    # The arrays are the caller's, so that nothing is known of them by whose they are.
    there = _updating.__wrapped__((update,), weights.device, _stream_of(weights))
    dithered = dither_seed is not None
    _run_updates(weights, out, there, first_tile, distribution, stream, dithered, None)


def commit(
    weights: torch.Tensor,
    updates: Sequence[Update],
    *,
    first_tile: int,
    distribution: Distribution,
) -> int:
    """Apply updates to `weights` in place and in order, in one pass over them.

    After each the weights are rounded to their dtype: half precisions stochastically, with that
    update's dither seed.

    Args:
        weights: as for `accumulate`.
        updates: any number of them.
        first_tile: where the tensor begins in the tunable space.
        distribution: of the coordinates of z.

    Returns:
        How many coordinates the last update changed, which waits for the device; 0 in float32.

    Raises:
        ValueError, TypeError: as `accumulate`.
    """
    return commit_all([(weights, first_tile, updates)], distribution)


def commit_all(
    parts: Sequence[tuple[torch.Tensor, int, Sequence[Update]]], distribution: Distribution
) -> int:
    """`commit` for many tensors, each with its own updates, and a single wait for the device.

    Args:
        parts: of each tensor the weights, where it begins in the tunable space, and its updates.

    Returns:
        The sum of what `commit` returns.

    Raises:
        ValueError, TypeError: as `accumulate`.
    """
    launched = [part for part in parts if part[2] and part[0].numel()]
    for weights, _, _ in launched:
        _check(weights, weights, weights.numel())
    counting = [part for part in launched if part[0].dtype is not torch.float32]
    programs: dict[torch.device, int] = {}
    for weights, _, _ in counting:
        own = _programs(weights.numel(), SHAPES[distribution, True])
        programs[weights.device] = programs.get(weights.device, 0) + own
    counts = {
        device: torch.empty(number, dtype=torch.int32, device=device)
        for device, number in programs.items()
    }
    free = dict(counts)
    for weights, first_tile, updates in launched:
        changed = None
        if weights.dtype is not torch.float32:
            own = _programs(weights.numel(), SHAPES[distribution, True])
            changed, free[weights.device] = free[weights.device].tensor_split((own,))
        _run_updates(
            weights,
            weights,
            _updating(tuple(updates), weights.device, _stream_of(weights)),
            first_tile,
            distribution,
            Stream.DIRECTION,
            True,
            changed,
        )
    return sum(int(changed.sum()) for changed in counts.values())


def displace(
    weights: torch.Tensor,
    trajectory: Steps,
    perturbations: Sequence[Steps],
    *,
    first_tile: int,
    distribution: Distribution,
    out: torch.Tensor,
    starts: torch.Tensor | Sequence[int] | None = None,
) -> None:
    """out[g] = round(weights + Σ trajectory + Σ perturbations[g]), to nearest, for all g at once.

    The sum over the trajectory is made once, and z once for two neighbouring perturbations of one
    step each with the same seed (the two sides of a finite difference).

    Args:
        weights: as for `accumulate`; only read.
        trajectory: steps that all rows of `out` share; they are added first.
        perturbations: G of them, each a row's own steps; any may be empty.
        first_tile: where the tensor begins in the tunable space.
        distribution: of the coordinates of z.
        out: contiguous [G, …] with n elements a row, any of the three dtypes; not `weights`.
        starts: int64 [S], where in the flat tensor S pieces of n // S coordinates begin, one after
            the other in a row of `out`. They may overlap and need no alignment; on the device
            they are not checked, and what is outside the tensor counts as 0. None: one piece
            from 0.

    Raises:
        ValueError, TypeError: as `accumulate`; or pieces that do not fit.
    """
    rows = len(perturbations)
    if rows == 0 or out.numel() == 0:
        return
    _check(weights, out, None)
    total, left = divmod(out.numel(), rows)
    pieces = 1 if starts is None else len(starts)
    length = total // pieces if pieces else 0
    if left or pieces == 0 or length * pieces != total or out.shape[0] != rows:
        raise ValueError(
            f"out has shape {tuple(out.shape)}: it must be [{rows}, n] for {rows} perturbations, "
            f"and n a multiple of the {pieces} pieces"
        )
    device, stream = weights.device, _stream_of(weights)
    if isinstance(starts, torch.Tensor):
        # Where they begin is known on the device alone: so many tiles a piece can touch.
        tiles_per_piece = (length - 1 + TILE - 1) // TILE + 1
        on_device = starts.to(device, torch.int64, non_blocking=True).contiguous()
    else:
        places = _FIRST
        first = last = within = 0
        if starts is not None:
            begins = np.asarray(starts, np.int64)
            places = begins.tobytes()
            first, last = int(begins.min()), int(begins.max())
            within = int((begins % TILE).max())
        if first < 0 or last + length > weights.numel():
            raise ValueError(
                f"pieces of {length} coordinates begin at {first} to {last}: they "
                f"must lie within the tensor's {weights.numel()}"
            )
        tiles_per_piece = (within + length - 1) // TILE + 1
        on_device = _copied(places, device, stream)

    there = _displacing(trajectory, tuple(perturbations), device, stream)
    shape = SHAPES[distribution, True]
    _launch(
        _displace,
        _programs(TILE * pieces * tiles_per_piece, shape),
        weights,
        (weights, out, on_device, there.steps, there.singles, there.lists, _table(device)),
        (
            weights.numel(),
            first_tile,
            pieces,
            length,
            tiles_per_piece,
            there.trajectory,
            there.single_count,
            there.list_count,
        ),
        (distribution is Distribution.GAUSSIAN, there.list_count > 0),
        shape,
    )


def _run_updates(
    weights: torch.Tensor,
    out: torch.Tensor,
    there: "_Updating",
    first_tile: int,
    distribution: Distribution,
    stream: Stream,
    dithered: bool,
    changed: torch.Tensor | None,
) -> None:
    """Launch `_commit`; float32 is never rounded, so its dither is not generated."""
    if weights.numel() == 0:
        return
    dithered = dithered and out.dtype is not torch.float32
    shape = SHAPES[distribution, dithered]
    if dithered and there.step_count <= FEW * there.update_count:
        shape = SHAPE_OF_FEW
    _launch(
        _commit,
        _programs(weights.numel(), shape),
        weights,
        (
            weights,
            out,
            there.updates,
            there.steps,
            _table(weights.device),
            there.updates if changed is None else changed,
        ),
        (weights.numel(), first_tile, there.update_count, int(stream)),
        (distribution is Distribution.GAUSSIAN, dithered, changed is not None),
        shape,
    )


def _programs(coordinates: int, shape: Shape) -> int:
    return -(-coordinates // (TILE * shape.tiles))


#: By kernel, device, dtypes, integers that need 64 bits, and what is decided by the compiler.
_compiled: dict[tuple[Any, ...], Any] = {}


def _launch(
    kernel: Any,
    programs: int,
    weights: torch.Tensor,
    tensors: tuple[torch.Tensor, ...],
    numbers: tuple[int, ...],
    decided: tuple[bool, ...],
    shape: Shape,
) -> None:
    """Start a kernel on the device of `weights` and its current stream.

    Triton's own way to a compiled kernel looks at every argument each time. Of ours only the
    dtypes of weights and out differ, and whether an integer needs 64 bits.
    """
    wide = max(numbers) >> 31 and tuple([number >> 31 != 0 for number in numbers])
    key = (kernel, weights.get_device(), weights.dtype, tensors[1].dtype, wide, decided, shape)
    constants = (*decided, shape.tiles, shape.lanes)
    with torch.cuda.device_of(weights):
        known = _compiled.get(key)
        if known is not None:
            known[programs, 1, 1](*tensors, *numbers, *constants)
            return
        plain = [tensor.detach() for tensor in tensors]
        made = kernel[(programs,)](*plain, *numbers, *constants, **_options(shape))
        # The interpreter compiles nothing.
        if isinstance(made, triton.compiler.CompiledKernel):
            _compiled[key] = made


def _options(shape: Shape) -> dict[str, Any]:
    """Product and sum stay two roundings; loads in loops are not copied to shared memory ahead."""
    return {"num_warps": shape.warps, "num_stages": 1, "enable_fp_fusion": False}


def _check(weights: torch.Tensor, out: torch.Tensor, size: int | None) -> None:
    for name, tensor in (("weights", weights), ("out", out)):
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} is {tensor.dtype}: it must be float32, bfloat16 or float16")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}: it must be contiguous")
    if out.device != weights.device:
        raise ValueError(f"weights are on {weights.device}, out on {out.device}")
    if size is not None and out.numel() != size:
        raise ValueError(f"{size} weights into {out.numel()}: the numbers must be equal")


def _pairs(steps: Steps) -> NDArray[np.int64]:
    """int64 [K, 2]: the bits of the seeds and of the coefficients."""
    seeds, coefficients = steps.seeds, steps.coefficients
    if len(seeds) != len(coefficients):
        raise ValueError(
            f"{len(seeds)} seeds with {len(coefficients)} coefficients: the numbers must be equal"
        )
    if seeds.dtype != np.uint64 or coefficients.dtype != np.float32:
        raise TypeError(f"seeds are {seeds.dtype}, coefficients {coefficients.dtype}")
    return np.stack((seeds.view(np.int64), coefficients.view(np.int32).astype(np.int64)), axis=1)


def _rows(
    trajectory: Steps, perturbations: Sequence[Steps]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """What `_displace` reads: all steps, rows of a single step (with their twins), other rows."""
    steps = [_pairs(trajectory)]
    singles: list[list[int]] = []
    lists: list[list[int]] = []
    count, previous = len(trajectory), -1
    for row, perturbation in enumerate(perturbations):
        own = _pairs(perturbation)
        if len(own) != 1:
            lists.append([row, count, count + len(own)])
            steps.append(own)
            count += len(own)
            continue
        seed, coefficient = own[0].tolist()
        last = singles[-1] if singles else None
        if last is not None and previous == row - 1 and last[0] == seed and last[4] < 0:
            last[3:] = [coefficient, row]
        else:
            singles.append([seed, coefficient, row, 0, -1])
        previous = row
    return np.concatenate(steps), np.array(singles, np.int64), np.array(lists, np.int64)


class _Displacing(NamedTuple):
    """What `_displace` reads of its steps, on the device."""

    steps: torch.Tensor
    singles: torch.Tensor
    lists: torch.Tensor
    trajectory: int
    single_count: int
    list_count: int


@lru_cache(maxsize=64)
def _displacing(
    trajectory: Steps, perturbations: tuple[Steps, ...], device: torch.device, stream: int
) -> _Displacing:
    """All tensors of a block are displaced by the same objects, which say so by being the same."""
    rows = _rows(trajectory, perturbations)
    steps, singles, lists = (_numbers(part, device, stream) for part in rows)
    return _Displacing(steps, singles, lists, len(trajectory), len(rows[1]), len(rows[2]))


class _Updating(NamedTuple):
    """What `_commit` reads of its updates, on the device."""

    updates: torch.Tensor
    steps: torch.Tensor
    update_count: int
    step_count: int


@lru_cache(maxsize=64)
def _updating(updates: tuple[Update, ...], device: torch.device, stream: int) -> _Updating:
    """As `_displacing`."""
    ends = np.cumsum([len(update.steps) for update in updates]).tolist()
    plan = np.array(
        [
            (end - len(update.steps), end, _signed(update.dither_seed), _bits(update.decay))
            for update, end in zip(updates, ends, strict=True)
        ],
        np.int64,
    )
    steps = np.concatenate([_pairs(update.steps) for update in updates])
    there = _numbers(plan, device, stream), _numbers(steps, device, stream)
    return _Updating(*there, len(updates), len(steps))


def _bits(value: float) -> int:
    return int(np.float32(value).view(np.int32))


def _signed(seed: int) -> int:
    """The int64 with the bits of a 64-bit seed."""
    return seed - (1 << 64) if seed >> 63 else seed


def _numbers(array: NDArray[np.int64], device: torch.device, stream: int) -> torch.Tensor:
    """The numbers on the device; a kernel that reads none still gets a pointer."""
    return _copied(array.tobytes() or bytes(8), device, stream)


@lru_cache(maxsize=64)
def _copied(data: bytes, device: torch.device, stream: int) -> torch.Tensor:
    """int64 on the device, the same for all tensors of a model; ordered within its stream."""
    return torch.frombuffer(bytearray(data), dtype=torch.int64).to(device, non_blocking=True)


def _stream_of(tensor: torch.Tensor) -> int:
    if not tensor.is_cuda:
        return 0
    stream: int = triton.runtime.driver.active.get_current_stream(tensor.get_device())
    return stream


@cache
def _table(device: torch.device) -> torch.Tensor:
    return torch.from_numpy(half_normal_table().copy()).to(device)
