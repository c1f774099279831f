"""The numba kernels for a few coordinates of a tensor: a mask's free ones, each generated alone.

A coordinate of z takes one call of Philox, whose place follows from the coordinate. So a list of n
coordinates costs n calls for each seed, however many tiles they lie in. The bits are those of
`numba_kernels` at these coordinates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numba import njit, uint32, uint64
from numpy.typing import NDArray

from fedforward.core.steps import Steps
from fedforward.directions.numba_kernels import (
    BFLOAT16,
    DITHER,
    FLOAT32,
    _check,
    _dithered_bfloat16,
    _dithered_float16,
    _joined,
    _load,
    _shared,
    _store,
)
from fedforward.directions.spec import TILE, Distribution, Stream, half_normal_table

DIRECTION = int(Stream.DIRECTION)
#: Coordinates that a thread works on at once; their words stay in its cache.
AT_ONCE = 1024


@dataclass(frozen=True, eq=False)
class FreeCoordinates:
    """Coordinates of one tensor that may move.

    Attributes:
        places: int64 [n], in the tensor's row-major order, increasing.
        first_tile: of the tensor in the tunable space, below 2³².
    """

    places: NDArray[np.int64]
    first_tile: int

    def __len__(self) -> int:
        return len(self.places)

    @cached_property
    def tiles(self) -> NDArray[np.uint32]:
        """The number of each coordinate's tile."""
        return (self.first_tile + self.places // TILE).astype(np.uint32)

    @cached_property
    def halves(self) -> tuple[NDArray[np.uint32], ...]:
        """Of Gaussian numbers and dithers: call, word of the call and shift of each coordinate."""
        inside = self.places % TILE
        word = inside % 1024
        found = (word % 256, word // 256, 16 * (inside // 1024))
        return tuple(part.astype(np.uint32) for part in found)

    @cached_property
    def signs(self) -> tuple[NDArray[np.uint32], ...]:
        """Of Rademacher numbers: call, word of the call and bit of each coordinate."""
        inside = self.places % TILE
        word = inside % 64
        return tuple(part.astype(np.uint32) for part in (word % 16, word // 16, inside // 64))

    def between(self, begin: int, end: int) -> tuple[int, int]:
        """Which of the coordinates lie in begin..end: the first, and the one after the last."""
        first, last = np.searchsorted(self.places, (begin, end))
        return int(first), int(last)


@njit(inline="always")
def _words(words, tiles, calls, parts, stream, seed):  # type: ignore[no-untyped-def]
    """words[i] = word parts[i] of call calls[i] of tile tiles[i]."""
    for i in range(len(words)):
        c0 = calls[i]
        c1 = tiles[i]
        c2 = uint32(0)
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
        part = parts[i]
        low = c0 if part == uint32(0) else c1
        high = c2 if part == uint32(2) else c3
        words[i] = low if part < uint32(2) else high


@njit(inline="always")
def _add_at(  # type: ignore[no-untyped-def]
    acc, words, seeds, bits, start, stop, gaussian, table, tiles, calls, parts, shifts, stream
):
    """acc[i] += c z for the seeds start..stop, in order; two roundings, never fused."""
    count = len(tiles)
    for s in range(start, stop):
        _words(words, tiles, calls, parts, stream, seeds[s])
        if gaussian:
            c = np.uint32(bits[s]).view(np.float32)
            for i in range(count):
                half = uint32(words[i] >> shifts[i]) & uint32(0xFFFF)
                sign = uint32((half & uint32(0x8000)) << uint32(16))
                z = np.uint32(table[half & uint32(0x7FFF)] ^ sign).view(np.float32)
                acc[i] += c * z
        else:
            for i in range(count):
                sign = uint32(uint32(words[i] >> shifts[i]) << uint32(31))
                acc[i] += np.uint32(bits[s] ^ sign).view(np.float32)


@njit(nogil=True, cache=True)
def _commit_at(  # type: ignore[no-untyped-def]
    values, code, decays, seeds, bits, ends, gaussian, table, tiles, where, halves, begin, end,
    dithered, dither_seeds,
):  # fmt: skip
    """Values begin..end; returns how many of them the last round changed."""
    acc = np.zeros(AT_ONCE, np.float32)
    before = np.zeros(AT_ONCE, np.float32)
    words = np.empty(AT_ONCE, np.uint32)
    changed = 0
    for first in range(begin, end, AT_ONCE):
        last = min(first + AT_ONCE, end)
        count = last - first
        own, own_words = acc[:count], words[:count]
        target = values[first:last]
        _load(own, target, code)
        step = 0
        for r in range(len(ends)):
            if code != FLOAT32 and r == len(ends) - 1:
                before[:count] = own
            if decays[r] != np.float32(1.0):
                for i in range(count):
                    own[i] = decays[r] * own[i]
            _add_at(
                own, own_words, seeds, bits, step, ends[r], gaussian, table,
                tiles[first:last], where[0][first:last], where[1][first:last],
                where[2][first:last], DIRECTION,
            )  # fmt: skip
            step = ends[r]
            if code == FLOAT32:
                continue
            if dithered:
                _words(
                    own_words, tiles[first:last], halves[0][first:last], halves[1][first:last],
                    DITHER, dither_seeds[r],
                )  # fmt: skip
                for i in range(count):
                    noise = uint32(own_words[i] >> halves[2][first + i]) & uint32(0xFFFF)
                    if code == BFLOAT16:
                        target[i] = _dithered_bfloat16(own[i], noise)
                    else:
                        target[i] = _dithered_float16(own[i], noise)
            else:
                _store(target, code, own)
            _load(own, target, code)
        if code == FLOAT32:
            _store(target, code, own)
        else:
            for i in range(count):
                if before[i] != own[i]:
                    changed += 1
    return changed


@njit(nogil=True, cache=True)
def _displace_at(  # type: ignore[no-untyped-def]
    values, code, out, out_code, seeds, bits, own_seeds, own_bits, ends, gaussian, table,
    tiles, where, begin, end,
):  # fmt: skip
    """out[g, begin..end] = values + the shared steps + those up to ends[g]."""
    acc = np.zeros(AT_ONCE, np.float32)
    own = np.zeros(AT_ONCE, np.float32)
    words = np.empty(AT_ONCE, np.uint32)
    for first in range(begin, end, AT_ONCE):
        last = min(first + AT_ONCE, end)
        count = last - first
        part, scratch = tiles[first:last], words[:count]
        calls, parts, shifts = where[0][first:last], where[1][first:last], where[2][first:last]
        _load(acc[:count], values[first:last], code)
        _add_at(
            acc[:count],
            scratch,
            seeds,
            bits,
            DIRECTION,
            len(seeds),
            gaussian,
            table,
            part,
            calls,
            parts,
            shifts,
            DIRECTION,
        )
        step = 0
        for g in range(len(ends)):
            own[:count] = acc[:count]
            _add_at(
                own[:count], scratch, own_seeds, own_bits, step, ends[g], gaussian, table,
                part, calls, parts, shifts, DIRECTION,
            )  # fmt: skip
            _store(out[g, first:last], out_code, own[:count])
            step = ends[g]


def _settings(
    free: FreeCoordinates, distribution: Distribution
) -> tuple[bool, NDArray[np.uint32], NDArray[np.uint32], tuple[NDArray[np.uint32], ...]]:
    gaussian = distribution is Distribution.GAUSSIAN
    table = half_normal_table().view(np.uint32)
    return gaussian, table, free.tiles, free.halves if gaussian else free.signs


def commit_at(
    weights: NDArray[Any],
    free: FreeCoordinates,
    seeds: NDArray[np.uint64],
    coefficients: NDArray[np.float32],
    *,
    distribution: Distribution,
    code: int,
    ends: Sequence[int],
    decays: Sequence[float],
    dither_seeds: Sequence[int],
    threads: int = 1,
) -> int:
    """`numba_kernels.commit` in place, at the free coordinates alone.

    Args: see there.

    Returns:
        How many free coordinates the last round changed; 0 in float32.
    """
    _check(seeds, coefficients)
    values = weights[free.places]
    gaussian, table, tiles, where = _settings(free, distribution)
    settings = (
        np.array(decays, np.float32), seeds, coefficients.view(np.uint32),
        np.array(ends, np.int64), gaussian, table, tiles, where, free.halves,
    )  # fmt: skip
    noise = np.array(dither_seeds if code != FLOAT32 else (), np.uint64)

    def work(begin: int, end: int) -> int:
        return int(_commit_at(values, code, *settings, begin, end, code != FLOAT32, noise))

    changed = _shared(work, len(free), len(free) * (len(seeds) + 1) // TILE, threads)
    weights[free.places] = values
    return changed


def displace_at(
    weights: NDArray[Any],
    free: FreeCoordinates,
    shared: Steps,
    own: Sequence[Steps],
    *,
    distribution: Distribution,
    out: NDArray[Any],
    codes: tuple[int, int],
    threads: int = 1,
) -> None:
    """`numba_kernels.displace` at the free coordinates alone.

    Args:
        weights: flat.
        out: [len(own), n].
        codes: dtypes of `weights` and `out`.
    """
    _check(shared.seeds, shared.coefficients)
    seeds, bits, ends = _joined(own)
    values = weights[free.places]
    gaussian, table, tiles, where = _settings(free, distribution)

    def work(begin: int, end: int) -> int:
        _displace_at(
            values, codes[0], out, codes[1], shared.seeds, shared.coefficients.view(np.uint32),
            seeds, bits, ends, gaussian, table, tiles, where, begin, end,
        )  # fmt: skip
        return 0

    cost = len(free) * (len(shared) + len(seeds) + 1) // TILE
    _shared(work, len(free), cost, threads)
