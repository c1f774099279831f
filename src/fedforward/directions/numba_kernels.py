"""The numba kernels: directions on the CPU, generated and consumed tile by tile, never stored.

One call covers any number of seeds in one pass over the weights. The kernels release the
interpreter lock and are spread over tiles by a small thread pool of our own, which sleeps when it
is idle and leaves the cores to PyTorch's threads.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types, uint16, uint32, uint64
from numba.extending import intrinsic
from numpy.typing import NDArray

from fedforward.core.steps import Steps
from fedforward.directions.spec import TILE, Distribution, Stream, half_normal_table

#: Seeds whose words are kept at once; bounds the scratch of a thread to 64 KiB.
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


@intrinsic
def _shift_left(context, word, count):  # type: ignore[no-untyped-def]
    """word << count in 32 bits, count below 32; numba's own widens to 64 and halves the lanes."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.shl(*arguments)

    return types.uint32(types.uint32, types.uint32), generate


@njit(inline="always")
def _signed(c, word, shift):  # type: ignore[no-untyped-def]
    """The float32 with the bits `c`, its sign flipped where bit 31 of `word << shift` is set."""
    return np.uint32(c ^ (_shift_left(word, shift) & uint32(0x80000000))).view(np.float32)


@njit(inline="always")
def _add_rademacher(acc, words, seeds, bits, start, stop, tile, stream):  # type: ignore[no-untyped-def]
    """acc[j, i] += ±c for the seeds start..stop, in order; bits are the coefficients' bits."""
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
def _gaussian(z, words, tile, stream, seed, table):  # type: ignore[no-untyped-def]
    """z[:] = a Gaussian tile; table holds the bits of the half-normal quantiles.

    The look-ups stand alone, as they are the only part that is done one number at a time.
    """
    raw = z.view(np.uint32)
    _philox(words, 256, tile, stream, seed)
    for i in range(1024):
        w = words[i]
        raw[i] = table[w & uint32(0x7FFF)]
        raw[1024 + i] = table[(w >> uint32(16)) & uint32(0x7FFF)]
    for i in range(1024):
        w = words[i]
        raw[i] ^= uint32(w << uint32(16)) & uint32(0x80000000)
        raw[1024 + i] ^= w & uint32(0x80000000)


@njit(inline="always")
def _add_gaussian(acc, scratch, seeds, bits, start, stop, tile, stream, table):  # type: ignore[no-untyped-def]
    """acc[i] += c z[i] for the seeds start..stop, in order; two roundings, never fused."""
    _, wide, z = scratch
    for s in range(start, stop):
        c = np.uint32(bits[s]).view(np.float32)
        _gaussian(z, wide, tile, stream, seeds[s], table)
        for i in range(TILE):
            acc[i] += c * z[i]


@njit(inline="always")
def _both_signs(  # type: ignore[no-untyped-def]
    plus, minus, acc, scratch, seed, bits, gaussian, tile, stream, table
):
    """plus = acc + c z and minus = acc - c z for one seed on one tile; z is made once."""
    words, wide, z = scratch
    if gaussian:
        c = np.uint32(bits).view(np.float32)
        _gaussian(z, wide, tile, stream, seed, table)
        for i in range(TILE):
            p = c * z[i]
            plus[i] = acc[i] + p
            minus[i] = acc[i] - p
        return
    own = words[0]
    _philox(own, 16, tile, stream, seed)
    for j in range(32):
        shift = uint32(31 - j)
        for i in range(64):
            p = _signed(bits, own[i], shift)
            plus[64 * j + i] = acc[64 * j + i] + p
            minus[64 * j + i] = acc[64 * j + i] - p


@intrinsic
def _half_to_float(context, half):  # type: ignore[no-untyped-def]
    """The float32 of a float16's bits, exactly, by the processor's own conversion."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def _to_float16(context, value):  # type: ignore[no-untyped-def]
    """The bits of the nearest float16, ties to even, by the processor's own conversion."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), generate


@njit(inline="always")
def _to_bfloat16(value):  # type: ignore[no-untyped-def]
    """The bits of the nearest bfloat16, ties to even."""
    bits = np.float32(value).view(np.uint32)
    top = uint32(bits >> uint32(16))
    rounded = uint32(uint32(bits + uint32(0x7FFF) + (top & uint32(1))) >> uint32(16))
    quiet = top | uint32(0x40)
    return uint16(quiet if (bits & uint32(0x7FFFFFFF)) > uint32(0x7F800000) else rounded)


@njit(inline="always")
def _dithered_bfloat16(value, noise):  # type: ignore[no-untyped-def]
    """The bits of a neighbouring bfloat16: up where fraction + noise reaches one last place."""
    bits = np.float32(value).view(np.uint32)
    special = (bits & uint32(0x7F800000)) == uint32(0x7F800000)
    rounded = uint16(uint32(bits + noise) >> uint32(16))
    return _to_bfloat16(value) if special else rounded


@njit(inline="always")
def _dithered_float16(value, noise):  # type: ignore[no-untyped-def]
    """The same for float16; the fraction below the last place is cut to 16 bits."""
    bits = np.float32(value).view(np.uint32)
    magnitude = bits & uint32(0x7FFFFFFF)
    normal = uint32(uint32(uint32(magnitude - uint32(0x38000000)) << uint32(3)) + noise)
    # Below 2^-14 the last place is 2^-24; cut to 16 bits of it, the number is whole in 2^-40.
    tiny = min(np.uint32(magnitude).view(np.float32), np.float32(2.0**-14)) * np.float32(2.0**40)
    small = uint32(uint32(np.int32(tiny)) + noise)
    rounded = uint32((small if magnitude < uint32(0x38800000) else normal) >> uint32(16))
    half = uint16(rounded | (uint32(bits >> uint32(16)) & uint32(0x8000)))
    return _to_float16(np.float32(value)) if magnitude >= uint32(0x47800000) else half


@njit(inline="always")
def _load(acc, weights, code):  # type: ignore[no-untyped-def]
    """acc[i] = float32(weights[i])."""
    if code == FLOAT32:
        for i in range(len(weights)):
            acc[i] = np.float32(weights[i])
    elif code == BFLOAT16:
        for i in range(len(weights)):
            acc[i] = np.uint32(uint32(weights[i]) << uint32(16)).view(np.float32)
    else:
        for i in range(len(weights)):
            acc[i] = _half_to_float(uint16(weights[i]))


@njit(inline="always")
def _store(out, code, acc):  # type: ignore[no-untyped-def]
    """out[i] = acc[i], rounded to nearest-even."""
    if code == FLOAT32:
        for i in range(len(out)):
            out[i] = acc[i]
    elif code == BFLOAT16:
        for i in range(len(out)):
            out[i] = _to_bfloat16(acc[i])
    else:
        for i in range(len(out)):
            out[i] = _to_float16(acc[i])


@njit(inline="always")
def _store_dithered(out, code, acc, words):  # type: ignore[no-untyped-def]
    """out[i] = acc[i], rounded by the dither of i: half i // 1024 of word i % 1024.

    By slices: an index that is a sum kept these loops from being vectorised.
    """
    for first in range(0, len(out), 1024):
        part, source = out[first : first + 1024], acc[first : first + 1024]
        shift = uint32(0 if first else 16)
        if code == BFLOAT16:
            for i in range(len(part)):
                noise = uint32(_shift_left(words[i], shift) >> uint32(16))
                part[i] = _dithered_bfloat16(source[i], noise)
        else:
            for i in range(len(part)):
                noise = uint32(_shift_left(words[i], shift) >> uint32(16))
                part[i] = _dithered_float16(source[i], noise)


@njit(inline="always")
def _scratch():  # type: ignore[no-untyped-def]
    """What a thread works in: words of Rademacher seeds, words of a Gaussian one, and its z."""
    return (
        np.empty((SEEDS_AT_ONCE, 64), np.uint32),
        np.empty(1024, np.uint32),
        np.empty(TILE, np.float32),
    )


@njit(inline="always")
def _add(acc, scratch, seeds, bits, start, stop, gaussian, tile, stream, table):  # type: ignore[no-untyped-def]
    """acc += the steps start..stop on one tile, in order."""
    if gaussian:
        _add_gaussian(acc, scratch, seeds, bits, start, stop, tile, stream, table)
    else:
        rows = acc.reshape(32, 64)
        for first in range(start, stop, SEEDS_AT_ONCE):
            last = min(first + SEEDS_AT_ONCE, stop)
            _add_rademacher(rows, scratch[0], seeds, bits, first, last, tile, stream)


@njit(nogil=True, cache=True)
def _commit(  # type: ignore[no-untyped-def]
    weights, weights_code, out, out_code, decays, seeds, bits, ends, gaussian, table,
    first_tile, begin_tile, end_tile, stream, dithered, dither_seeds,
):  # fmt: skip
    """Tiles begin..end of a flat tensor; returns how many coordinates the last round changed.

    Round r ends at step ends[r]. Between rounds the values are those that `out` would hold.
    """
    acc = np.zeros(TILE, np.float32)
    before = np.zeros(TILE, np.float32)
    scratch = _scratch()
    noise = np.empty(1024, np.uint32)
    total = len(weights)
    changed = 0
    for tile in range(begin_tile, end_tile):
        begin = tile * TILE
        count = min(TILE, total - begin)
        number = uint64(first_tile + tile)
        target = out[begin : begin + count]
        _load(acc, weights[begin : begin + count], weights_code)
        step = 0
        for r in range(len(ends)):
            if out_code != FLOAT32 and r == len(ends) - 1:
                before[:] = acc
            if decays[r] != np.float32(1.0):
                for i in range(TILE):
                    acc[i] = decays[r] * acc[i]
            _add(acc, scratch, seeds, bits, step, ends[r], gaussian, number, stream, table)
            step = ends[r]
            if out_code != FLOAT32:
                if dithered:
                    _philox(noise, 256, number, DITHER, dither_seeds[r])
                    _store_dithered(target, out_code, acc, noise)
                else:
                    _store(target, out_code, acc)
                _load(acc, target, out_code)
        if out_code == FLOAT32:
            _store(target, out_code, acc)
        else:
            for i in range(count):
                if before[i] != acc[i]:
                    changed += 1
    return changed


@njit(nogil=True, cache=True)
def _displace(  # type: ignore[no-untyped-def]
    weights, weights_code, out, out_code, seeds, bits, own_seeds, own_bits, ends, gaussian, table,
    first_tile, tiles, skips, counts, places, begin, end, stream,
):  # fmt: skip
    """Pieces begin..end: out[g, places..] = weights + the shared steps + those up to ends[g].

    Piece p is counts[p] coordinates that begin skips[p] after the start of tile tiles[p].
    """
    acc = np.zeros(TILE, np.float32)
    own = np.zeros(TILE, np.float32)
    other = np.zeros(TILE, np.float32)
    scratch = _scratch()
    for piece in range(begin, end):
        skip, count, place = skips[piece], counts[piece], places[piece]
        source = tiles[piece] * TILE + skip
        number = uint64(first_tile + tiles[piece])
        _load(acc[skip : skip + count], weights[source : source + count], weights_code)
        _add(acc, scratch, seeds, bits, 0, len(seeds), gaussian, number, stream, table)
        step = 0
        g = 0
        while g < len(ends):
            target = out[g, place : place + count]
            if (
                g + 1 < len(ends)
                and ends[g] == step + 1
                and ends[g + 1] == step + 2
                and own_seeds[step] == own_seeds[step + 1]
                and own_bits[step] == own_bits[step + 1] ^ uint32(0x80000000)
            ):
                _both_signs(
                    own, other, acc, scratch, own_seeds[step], own_bits[step],
                    gaussian, number, stream, table,
                )  # fmt: skip
                _store(target, out_code, own[skip : skip + count])
                _store(out[g + 1, place : place + count], out_code, other[skip : skip + count])
                g += 1
            elif g == len(ends) - 1:
                # Nobody else needs the shared sum.
                _add(
                    acc, scratch, own_seeds, own_bits, step, ends[g],
                    gaussian, number, stream, table,
                )  # fmt: skip
                _store(target, out_code, acc[skip : skip + count])
            else:
                own[:] = acc
                _add(
                    own, scratch, own_seeds, own_bits, step, ends[g],
                    gaussian, number, stream, table,
                )  # fmt: skip
                _store(target, out_code, own[skip : skip + count])
            step = ends[g]
            g += 1


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="fedforward-directions")


def _shared(work: Callable[[int, int], int], parts: int, cost: int, threads: int) -> int:
    """work(begin, end) over 0..parts, on several threads if it is worth it; the sum of results.

    Args:
        cost: tile-seeds in all.
    """
    threads = min(threads, parts)
    if threads <= 1 or cost < THREADING_THRESHOLD:
        return work(0, parts)
    edges = [parts * part // threads for part in range(threads + 1)]
    jobs = [_pool(threads).submit(work, begin, end) for begin, end in pairwise(edges[1:])]
    return work(0, edges[1]) + sum(job.result() for job in jobs)


def _check(seeds: NDArray[np.uint64], coefficients: NDArray[np.float32]) -> None:
    if len(seeds) != len(coefficients):
        raise ValueError(
            f"{len(seeds)} seeds with {len(coefficients)} coefficients: the numbers must be equal"
        )
    if seeds.dtype != np.uint64 or coefficients.dtype != np.float32:
        raise TypeError(f"seeds are {seeds.dtype}, coefficients {coefficients.dtype}")


def commit(
    weights: NDArray[Any],
    seeds: NDArray[np.uint64],
    coefficients: NDArray[np.float32],
    *,
    first_tile: int,
    distribution: Distribution,
    out: NDArray[Any],
    codes: tuple[int, int] = (FLOAT32, FLOAT32),
    ends: Sequence[int] | None = None,
    decays: Sequence[float] = (1.0,),
    dither_seeds: Sequence[int] | None = None,
    stream: Stream = Stream.DIRECTION,
    threads: int = 1,
) -> int:
    """Rounds of `fedforward.directions.ops.accumulate`, one after another, in one pass.

    Args beyond those of `ops.accumulate`:
        weights, out: flat; FLOAT32 arrays are float32, the half precisions uint16 arrays of
            their bits.
        codes: dtypes of `weights` and `out`.
        ends: the step at which each round ends; None is one round.
        decays: of each round.
        dither_seeds: of each round; None rounds to nearest.
        threads: at most so many share the tiles; the result does not depend on it.

    Returns:
        How many coordinates the last round changed; 0 in float32, where they are not counted.
    """
    _check(seeds, coefficients)
    if len(out) != len(weights):
        raise ValueError(
            f"{len(weights)} weights into {len(out)} places: the numbers must be equal"
        )
    ends = (len(seeds),) if ends is None else ends
    rounds = {len(ends), len(decays), len(ends if dither_seeds is None else dither_seeds)}
    if len(rounds) != 1 or not len(ends) or ends[-1] != len(seeds):
        raise ValueError(
            f"{len(ends)} rounds up to step {ends[-1] if len(ends) else 0} of {len(seeds)}, with "
            f"{len(decays)} decays: the numbers must be equal"
        )
    # float32 is never rounded, so its dither would be generated for nothing.
    dithered = dither_seeds is not None and codes[1] != FLOAT32
    settings = (
        np.array(decays, np.float32),
        seeds,
        coefficients.view(np.uint32),
        np.array(ends, np.int64),
        distribution is Distribution.GAUSSIAN,
        half_normal_table().view(np.uint32),
        first_tile,
    )
    noise = np.array(dither_seeds if dithered else (), np.uint64)

    def work(begin: int, end: int) -> int:
        changed = _commit(
            weights, codes[0], out, codes[1], *settings, begin, end, int(stream), dithered, noise
        )
        return int(changed)

    tiles = -(-len(weights) // TILE)
    return _shared(work, tiles, tiles * (len(seeds) + 1), threads)


def displace(
    weights: NDArray[Any],
    shared: Steps,
    own: Sequence[Steps],
    *,
    first_tile: int,
    distribution: Distribution,
    out: NDArray[Any],
    codes: tuple[int, int] = (FLOAT32, FLOAT32),
    starts: NDArray[np.int64] | None = None,
    threads: int = 1,
) -> None:
    """`fedforward.directions.ops.displace` for arrays in main memory; see `commit` for codes.

    Args:
        weights: flat.
        out: [len(own), n].
        starts: int64 [S], where each of S pieces of n // S coordinates begins; None is 0 alone.
    """
    if len(out) != len(own):
        raise ValueError(f"{len(own)} displacements into {len(out)} rows: must be equal")
    _check(shared.seeds, shared.coefficients)
    begins = np.zeros(1, np.int64) if starts is None else starts
    length = out.shape[1] // max(1, len(begins))
    if length * len(begins) != out.shape[1] or (
        len(begins) and (begins.min() < 0 or begins.max() + length > len(weights))
    ):
        raise ValueError(
            f"{len(begins)} pieces for rows of {out.shape[1]} do not lie within {len(weights)} "
            "weights, or are not of equal length"
        )
    seeds, bits, ends = _joined(own)
    if starts is None or len(starts) == 1:
        start = 0 if starts is None else int(starts[0])
        first_tile += start // TILE
        weights = weights[start - start % TILE :]
        pieces = _piece(start % TILE, out.shape[1])
    elif len(starts):
        pieces = _pieces(starts, out.shape[1] // len(starts))
    else:
        return
    settings = (
        shared.seeds,
        shared.coefficients.view(np.uint32),
        seeds,
        bits,
        ends,
        distribution is Distribution.GAUSSIAN,
        half_normal_table().view(np.uint32),
        first_tile,
        *pieces,
    )

    def work(begin: int, end: int) -> int:
        _displace(weights, codes[0], out, codes[1], *settings, begin, end, int(Stream.DIRECTION))
        return 0

    count = len(pieces[0])
    _shared(work, count, count * (len(shared) + len(own) + 1), threads)


_last_joined: tuple[Any, Any] = (None, None)


def _joined(own: Sequence[Steps]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Seeds, the coefficients' bits and the ends of several lists of steps, as arrays.

    A forward pass asks for the same lists hundreds of times: the last ones are remembered.
    """
    global _last_joined
    known, result = _last_joined
    if known is not own:
        seeds = np.concatenate([part.seeds for part in own])
        coefficients = np.concatenate([part.coefficients for part in own])
        _check(seeds, coefficients)
        ends = np.cumsum([len(part) for part in own])
        result = (seeds, coefficients.view(np.uint32), ends)
        # Only what cannot change behind our back.
        if isinstance(own, tuple):
            _last_joined = (own, result)
    return result  # type: ignore[no-any-return]


@lru_cache(maxsize=1024)
def _piece(skip: int, length: int) -> tuple[NDArray[np.int64], ...]:
    return _pieces(np.array([skip]), length)


def _pieces(starts: NDArray[np.int64], length: int) -> tuple[NDArray[np.int64], ...]:
    """Tile, coordinates skipped in it, their number and place in the output, of every piece."""
    first = starts // TILE
    spanned = (starts + length - 1) // TILE - first + 1
    ends = np.cumsum(spanned)
    owner = np.repeat(np.arange(len(starts)), spanned)
    tiles = first[owner] + np.arange(ends[-1]) - (ends - spanned)[owner]
    begins = np.maximum(starts[owner], TILE * tiles)
    stops = np.minimum(starts[owner] + length, TILE * (tiles + 1))
    places = owner * length + begins - starts[owner]
    return tiles, begins - TILE * tiles, stops - begins, places
