"""The Triton kernels: directions on CUDA devices, generated where they are added, never stored.

A program owns one or two tiles and reads and writes each of their weights once, whatever the number
of seeds. Everything about a coordinate stays in one thread: the thread that makes a word of a tile
holds the sums of the coordinates that the word drives. `triton_launch` alone starts what is here;
importing this module needs Triton.

A program's coordinates lie in tensors of shape [8, 256 / lanes, tiles * lanes]: see
`triton_launch.Shape`.
"""

import triton
import triton.language as tl

from fedforward.directions.spec import PHILOX_MULTIPLIERS, PHILOX_ROUNDS, PHILOX_WEYL, TILE, Stream

_MULTIPLIER_0 = tl.constexpr(PHILOX_MULTIPLIERS[0])
_MULTIPLIER_1 = tl.constexpr(PHILOX_MULTIPLIERS[1])
_WEYL_0 = tl.constexpr(PHILOX_WEYL[0])
_WEYL_1 = tl.constexpr(PHILOX_WEYL[1])
_ROUNDS = tl.constexpr(PHILOX_ROUNDS)
_TILE = tl.constexpr(TILE)
_DITHER = tl.constexpr(int(Stream.DITHER))


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
            float32 = bits.to(tl.float32, bitcast=True)
        else:
            float32 = numbers.to(tl.float32)
    else:
        float32 = numbers.to(tl.float32)
    return float32


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
def commit_kernel(  # type: ignore[no-untyped-def]
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
def displace_kernel(  # type: ignore[no-untyped-def]
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
