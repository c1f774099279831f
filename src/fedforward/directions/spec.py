"""The constants of the direction specification and its scalar form in plain Python integers.

`docs/directions.md` is the text that this module, the PyTorch reference and the CPU kernels follow.
Nothing here is fast: it is what the other implementations are held against.
"""

import hashlib
from enum import IntEnum, StrEnum
from functools import cache
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

from fedforward.core.layout import TILE as TILE

#: Frozen: any change of a bit changes it, and parties refuse any other.
VERSION = "1"

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10

#: SHA-256 of the half-normal table: 32,768 little-endian float32 values.
HALF_NORMAL_SHA256 = "e230179c3827e615b4f063e99741aa697a3a8925635cf89f6dddf2f8182450ef"


class Distribution(StrEnum):
    """What the coordinates of a direction look like; both have mean 0 and variance 1."""

    GAUSSIAN = "gaussian"
    RADEMACHER = "rademacher"


class Stream(IntEnum):
    """The fourth counter word: what a seed's numbers are used for."""

    DIRECTION = 0
    INITIALISATION = 1
    DITHER = 2


#: Philox calls (of four words each) that one tile takes.
CALLS = {Distribution.RADEMACHER: TILE // 128, Distribution.GAUSSIAN: TILE // 8}
DITHER_CALLS = TILE // 8


def philox_4x32_10(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox-4x32-10 (Salmon et al., SC'11): four counter words and two key words to four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        p0 = PHILOX_MULTIPLIERS[0] * c0
        p1 = PHILOX_MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (p1 >> 32) ^ c1 ^ k0,
            p1 & 0xFFFFFFFF,
            (p0 >> 32) ^ c3 ^ k1,
            p0 & 0xFFFFFFFF,
        )
        k0 = (k0 + PHILOX_WEYL[0]) & 0xFFFFFFFF
        k1 = (k1 + PHILOX_WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def tile_words(seed: int, tile: int, calls: int, stream: Stream) -> list[int]:
    """The words of one tile: word m of call k stands at position m * calls + k."""
    key = (seed & 0xFFFFFFFF, seed >> 32)
    words = [0] * (4 * calls)
    for call in range(calls):
        counter = (call, tile & 0xFFFFFFFF, tile >> 32, int(stream))
        for m, word in enumerate(philox_4x32_10(counter, key)):
            words[m * calls + call] = word
    return words


def coordinate(seed: int, index: int, distribution: Distribution) -> float:
    """z(seed) at one coordinate of the tunable space, by the letter of the specification."""
    tile, offset = divmod(index, TILE)
    words = tile_words(seed, tile, CALLS[distribution], Stream.DIRECTION)
    if distribution is Distribution.RADEMACHER:
        bit = words[offset % 64] >> (offset // 64) & 1
        return -1.0 if bit else 1.0
    half = words[offset % 1024] >> (16 * (offset // 1024)) & 0xFFFF
    magnitude = float(half_normal_table()[half & 0x7FFF])
    return -magnitude if half & 0x8000 else magnitude


@cache
def half_normal_table() -> NDArray[np.float32]:
    """The 32,768 half-normal quantiles of unit variance, float32, read-only and checked by hash.

    Raises:
        RuntimeError: the installed file is not the table of the specification.
    """
    data = files("fedforward.directions").joinpath("half_normal.bin").read_bytes()
    if hashlib.sha256(data).hexdigest() != HALF_NORMAL_SHA256:
        raise RuntimeError(
            "half_normal.bin differs from the direction specification: reinstall fedforward"
        )
    return np.frombuffer(data, dtype="<f4")
