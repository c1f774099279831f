"""Randomness that nobody can derive: of the noise and the samples of differential privacy.

All other random choices of a run follow from its seed (`core.seeds`), which every party knows.
Noise is whole numbers, drawn exactly: no floating-point number is rounded on the way.
"""

import os
import secrets
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

#: Uniform 64-bit integers below 2⁶⁴.
_RANGE = 2**64


class Entropy(Protocol):
    """A source of independent draws."""

    def chosen(self, count: int, chance: float) -> NDArray[np.int64]:
        """The numbers below `count` that were drawn, each by itself, int64 [drawn]."""
        ...

    def gaussian(self, count: int, scale: int) -> NDArray[np.int64]:
        """Draws of the discrete Gaussian: x with weight exp(-x² / 2 scale²), int64 [count]."""
        ...

    def laplace(self, count: int, scale: int) -> NDArray[np.int64]:
        """Draws of the discrete Laplace: x with weight exp(-|x| / scale), int64 [count]."""
        ...


class SystemEntropy:
    """The operating system's cryptographic source (`os.urandom`); nothing can be set or repeated.

    Noise is made as Canonne, Kamath and Steinke have it (arXiv 2004.00010, algorithms 1 to 3).

    Example:
        >>> SystemEntropy().chosen(3, chance=1.0).tolist()
        [0, 1, 2]
    """

    def chosen(self, count: int, chance: float) -> NDArray[np.int64]:
        """See `Entropy`; a chance is exact to 2⁻⁶⁴."""
        if chance >= 1.0:
            return np.arange(count, dtype=np.int64)
        draws = np.frombuffer(os.urandom(8 * count), np.uint64)
        return np.flatnonzero(draws < np.uint64(int(chance * _RANGE))).astype(np.int64)

    def gaussian(self, count: int, scale: int) -> NDArray[np.int64]:
        """See `Entropy`."""
        return np.array([_gaussian(scale) for _ in range(count)], np.int64)

    def laplace(self, count: int, scale: int) -> NDArray[np.int64]:
        """See `Entropy`."""
        return np.array([_laplace(scale) for _ in range(count)], np.int64)


def _gaussian(scale: int) -> int:
    """A discrete Laplace, kept with the chance that makes it a discrete Gaussian."""
    wide, square = scale + 1, scale * scale
    while True:
        drawn = _laplace(wide)
        # exp(-(|y| - s²/t)² / 2s²), as a fraction.
        if _decays((abs(drawn) * wide - square) ** 2, 2 * square * wide * wide):
            return drawn


def _laplace(scale: int) -> int:
    """Its remainder and its multiple of `scale`, each with its own chance, and a sign."""
    while True:
        rest = secrets.randbelow(scale)
        if not _decays(rest, scale):
            continue
        whole = 0
        while _decays(1, 1):
            whole += 1
        drawn = rest + scale * whole
        negative = secrets.randbits(1)
        if negative and not drawn:
            continue
        return -drawn if negative else drawn


def _decays(over: int, under: int) -> bool:
    """True with the chance exp(-over / under)."""
    while over > under:
        if not _decays(1, 1):
            return False
        over -= under
    number = 1
    while secrets.randbelow(under * number) < over:
        number += 1
    return number % 2 == 1
