"""The numba kernels: directions on the CPU, generated and consumed tile by tile, never stored.

One call covers any number of seeds in one pass over the weights. The kernels release the
interpreter lock and are spread over tiles by a small thread pool of our own, which sleeps when it
is idle and leaves the cores to PyTorch's threads.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
from numba import njit, uint16, uint32, uint64
from numpy.typing import NDArray

from fedforward.directions.specification import (
    TILE,
    Distribution,
    Stream,
    half_normal_table,
)

#: Seeds whose words are kept at once; bounds the scratch of a thread to half a megabyte.
SEEDS_AT_ONCE = 128
#: Below this many tile-seeds a second thread costs more than it saves.
THREADING_THRESHOLD = 64

FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2

DITHER = int(Stream.DITHER)


@njit(inline="always")
def _philox(words, calls, tile, stream, seed):  # type: ignore[no-untyped-def]
    """Fill words[: 4 * calls]; word m of call k at m * calls + k (vectorised over k)."""
    low = uint32(tile & uint64(0xFFFFFFFF))
    high = uint32(tile >> uint64(32))
    for k in range(calls):
        c0 = uint32(k)
        c1 = low
        c2 = high
        c3 = uint32(stream)
        k0 = uint32(seed & uint64(0xFFFFFFFF))
        k1 = uint32(seed >> uint64(32))
        for _ in range(10):
            p0 = uint64(c0) * uint64(0xD2511F53)
            p1 = uint64(c2) * uint64(0xCD9E8D57)
            c0 = uint32(p1 >> uint64(32)) ^ c1 ^ k0
            c1 = uint32(p1 & uint64(0xFFFFFFFF))
            c2 = uint32(p0 >> uint64(32)) ^ c3 ^ k1
            c3 = uint32(p0 & uint64(0xFFFFFFFF))
            k0 = uint32(k0 + uint32(0x9E3779B9))
            k1 = uint32(k1 + uint32(0xBB67AE85))
        words[k] = c0
        words[calls + k] = c1
        words[2 * calls + k] = c2
        words[3 * calls + k] = c3


@njit(inline="always")
def _signed(c, word, shift):  # type: ignore[no-untyped-def]
    """The float32 with the bits `c`, its sign flipped where bit 31 of `word << shift` is set."""
    return np.uint32(c ^ (uint32(word << shift) & uint32(0x80000000))).view(np.float32)


@njit(inline="always")
def _add_rademacher(acc, words, seeds, bits, start, stop, tile, stream):  # type: ignore[no-untyped-def]
    """acc[64 j + i] += ±c for the seeds start..stop, in order; bits are the coefficients' bits."""
    count = stop - start
    for s in range(count):
        _philox(words[s], 16, tile, stream, seeds[start + s])
    # Eight seeds a pass keep the accumulator in registers; the order of additions stays.
    fused = count - count % 8
    for j in range(32):
        shift = uint32(31 - j)
        part = acc[j]
        for s in range(0, fused, 8):
            w0, w1, w2, w3 = words[s], words[s + 1], words[s + 2], words[s + 3]
            w4, w5, w6, w7 = words[s + 4], words[s + 5], words[s + 6], words[s + 7]
            b = bits[start + s : start + s + 8]
            for i in range(64):
                a = part[i] + _signed(b[0], w0[i], shift)
                a += _signed(b[1], w1[i], shift)
                a += _signed(b[2], w2[i], shift)
                a += _signed(b[3], w3[i], shift)
                a += _signed(b[4], w4[i], shift)
                a += _signed(b[5], w5[i], shift)
                a += _signed(b[6], w6[i], shift)
                a += _signed(b[7], w7[i], shift)
                part[i] = a
        for s in range(fused, count):
            c = bits[start + s]
            w0 = words[s]
            for i in range(64):
                part[i] += _signed(c, w0[i], shift)


@njit(inline="always")
def _add_gaussian(acc, words, seeds, bits, start, stop, tile, stream, table):  # type: ignore[no-untyped-def]
    """acc[1024 j + i] += c z for the seeds start..stop, in order; two roundings, never fused."""
    for s in range(start, stop):
        c = np.uint32(bits[s]).view(np.float32)
        _philox(words, 256, tile, stream, seeds[s])
        for i in range(1024):
            w = words[i]
            low = c * table[w & uint32(0x7FFF)]
            high = c * table[(w >> uint32(16)) & uint32(0x7FFF)]
            low_bits = np.float32(low).view(np.uint32) ^ (
                uint32(w << uint32(16)) & uint32(0x80000000)
            )
            high_bits = np.float32(high).view(np.uint32) ^ (w & uint32(0x80000000))
            acc[i] += np.uint32(low_bits).view(np.float32)
            acc[1024 + i] += np.uint32(high_bits).view(np.float32)


@njit(inline="always")
def _half_to_bits(half):  # type: ignore[no-untyped-def]
    """The float32 bits of a float16, exactly."""
    sign = uint32(uint32(half) & uint32(0x8000)) << uint32(16)
    exponent = uint32(half >> uint16(10)) & uint32(31)
    mantissa = uint32(half) & uint32(0x3FF)
    if exponent == uint32(31):
        return uint32(sign | uint32(0x7F800000) | uint32(mantissa << uint32(13)))
    if exponent == uint32(0):
        # Subnormal: the mantissa counts units of 2^-24, which float32 holds exactly.
        value = np.float32(mantissa) * np.float32(2.0**-24)
        return uint32(sign | np.float32(value).view(np.uint32))
    return uint32(sign | uint32((exponent + uint32(112)) << uint32(23)) | (mantissa << uint32(13)))


@njit(inline="always")
def _to_bfloat16(bits, dither):  # type: ignore[no-untyped-def]
    """Float32 bits to bfloat16 bits: nearest-even if dither < 0, else up if frac + dither >= 1."""
    if (bits & uint32(0x7FFFFFFF)) > uint32(0x7F800000):
        return uint16((bits >> uint32(16)) | uint32(0x40))
    if dither < 0:
        step = uint32(0x7FFF) + ((bits >> uint32(16)) & uint32(1))
    elif (bits & uint32(0x7F800000)) == uint32(0x7F800000):
        step = uint32(0)
    else:
        step = uint32(dither)
    return uint16(uint32(bits + step) >> uint32(16))


@njit(inline="always")
def _to_float16(bits, dither):  # type: ignore[no-untyped-def]
    """Float32 bits to float16 bits; the fraction below the last place is cut to 16 bits."""
    sign = uint32(bits >> uint32(16)) & uint32(0x8000)
    magnitude = uint32(bits & uint32(0x7FFFFFFF))
    if magnitude >= uint32(0x7F800000):
        special = uint32(0x7E00) if magnitude > uint32(0x7F800000) else uint32(0x7C00)
        return uint16(sign | special)
    exponent = magnitude >> uint32(23)
    if exponent >= uint32(143):
        return uint16(sign | uint32(0x7C00))
    mantissa = uint64(magnitude & uint32(0x7FFFFF))
    if exponent >= uint32(113):
        kept = (uint64(exponent - uint32(113)) << uint64(10)) + (mantissa >> uint64(13))
        kept += uint64(1 << 10)
        rest = uint64((mantissa & uint64(0x1FFF)) << uint64(3))
        exact_half = rest == uint64(0x8000)
    else:
        # Below 2^-14 the last place is 2^-24: shift the full significand down to units of it.
        shift = uint64(min(uint32(126) - exponent, uint32(41)))
        significand = mantissa | uint64(0x800000) if exponent > uint32(0) else mantissa
        kept = significand >> shift
        below = significand & ((uint64(1) << shift) - uint64(1))
        rest = (below << uint64(16)) >> shift
        exact_half = (below << uint64(1)) == (uint64(1) << shift)
    if dither < 0:
        up = rest >= uint64(0x8000) and (not exact_half or (kept & uint64(1)) == uint64(1))
    else:
        up = rest + uint64(dither) >= uint64(0x10000)
    if up:
        kept += uint64(1)
    return uint16(sign | uint32(kept))


@njit(inline="always")
def _load(acc, weights, code, decay):  # type: ignore[no-untyped-def]
    """acc[i] = RNE(decay * float32(weights[i]))."""
    if code == FLOAT32:
        for i in range(len(weights)):
            acc[i] = decay * np.float32(weights[i])
    elif code == BFLOAT16:
        for i in range(len(weights)):
            bits = uint32(weights[i]) << uint32(16)
            acc[i] = decay * np.uint32(bits).view(np.float32)
    else:
        for i in range(len(weights)):
            bits = _half_to_bits(uint16(weights[i]))
            acc[i] = decay * np.uint32(bits).view(np.float32)


@njit(inline="always")
def _store(out, code, acc, dithered, dither):  # type: ignore[no-untyped-def]
    """out[i] = acc[i], rounded once; the dither of i is half i // 1024 of word i % 1024."""
    if code == FLOAT32:
        for i in range(len(out)):
            out[i] = acc[i]
        return
    for i in range(len(out)):
        bits = np.float32(acc[i]).view(np.uint32)
        noise = np.int64(-1)
        if dithered:
            noise = np.int64((dither[i % 1024] >> uint32(16 * (i // 1024))) & uint32(0xFFFF))
        if code == BFLOAT16:
            out[i] = _to_bfloat16(bits, noise)
        else:
            out[i] = _to_float16(bits, noise)


@njit(nogil=True, cache=True)
def _accumulate(  # type: ignore[no-untyped-def]
    weights, weights_code, out, out_code, decay, seeds, bits, gaussian, table,
    first_tile, begin_tile, end_tile, stream, dithered, dither_seed,
):  # fmt: skip
    """Tiles begin..end of one flat tensor whose first tile has the number first_tile."""
    acc = np.zeros(TILE, np.float32)
    rows = acc.reshape(32, 64)
    words = np.empty((SEEDS_AT_ONCE, 64), np.uint32)
    wide = np.empty(1024, np.uint32)
    dither = np.empty(1024, np.uint32)
    total = len(weights)
    for tile in range(begin_tile, end_tile):
        begin = tile * TILE
        count = min(TILE, total - begin)
        number = uint64(first_tile + tile)
        _load(acc, weights[begin : begin + count], weights_code, decay)
        if gaussian:
            _add_gaussian(acc, wide, seeds, bits, 0, len(seeds), number, stream, table)
        else:
            for start in range(0, len(seeds), SEEDS_AT_ONCE):
                stop = min(start + SEEDS_AT_ONCE, len(seeds))
                _add_rademacher(rows, words, seeds, bits, start, stop, number, stream)
        if dithered:
            _philox(dither, 256, number, DITHER, dither_seed)
        _store(out[begin : begin + count], out_code, acc, dithered, dither)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="fedforward-directions")


def accumulate(
    weights: NDArray[Any],
    seeds: NDArray[np.uint64],
    coefficients: NDArray[np.float32],
    *,
    first_tile: int,
    distribution: Distribution,
    out: NDArray[Any],
    codes: tuple[int, int] = (FLOAT32, FLOAT32),
    decay: float = 1.0,
    dither_seed: int | None = None,
    stream: Stream = Stream.DIRECTION,
    threads: int = 1,
) -> None:
    """`fedforward.directions.kernels.accumulate` for flat arrays in main memory.

    Args beyond those of `kernels.accumulate`:
        codes: dtypes of `weights` and `out`; FLOAT32 arrays are float32, the half precisions are
            uint16 arrays of their bits.
        threads: at most so many share the tiles; the result does not depend on it.
    """
    if len(seeds) != len(coefficients) or len(out) != len(weights):
        raise ValueError(
            f"{len(seeds)} seeds with {len(coefficients)} coefficients, {len(weights)} weights "
            f"into {len(out)}: the numbers must be equal"
        )
    if seeds.dtype != np.uint64 or coefficients.dtype != np.float32:
        raise TypeError(f"seeds are {seeds.dtype}, coefficients {coefficients.dtype}")
    tiles = -(-len(weights) // TILE)
    # float32 is never rounded, so its dither would be generated for nothing.
    dithered = dither_seed is not None and codes[1] != FLOAT32

    def work(begin: int, end: int) -> None:
        _accumulate(
            weights,
            codes[0],
            out,
            codes[1],
            np.float32(decay),
            seeds,
            coefficients.view(np.uint32),
            distribution is Distribution.GAUSSIAN,
            half_normal_table(),
            first_tile,
            begin,
            end,
            int(stream),
            dithered,
            np.uint64(dither_seed or 0),
        )

    threads = min(threads, tiles)
    if threads <= 1 or tiles * (len(seeds) + 1) < THREADING_THRESHOLD:
        work(0, tiles)
        return
    edges = [tiles * part // threads for part in range(threads + 1)]
    jobs = [_pool(threads).submit(work, begin, end) for begin, end in pairwise(edges[1:])]
    work(0, edges[1])
    for job in jobs:
        job.result()
