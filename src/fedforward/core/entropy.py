"""Randomness that nobody can derive: of the noise and the samples of differential privacy.

All other random choices of a run follow from its seed (`core.seeds`), which every party knows.
"""

import os
import random
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

    def normal(self, count: int) -> NDArray[np.float64]:
        """Draws of N(0, 1), float64 [count]."""
        ...


class SystemEntropy:
    """The operating system's cryptographic source (`os.urandom`); nothing can be set or repeated.

    Example:
        >>> SystemEntropy().chosen(3, chance=1.0).tolist()
        [0, 1, 2]
    """

    def __init__(self) -> None:
        self._random = random.SystemRandom()

    def chosen(self, count: int, chance: float) -> NDArray[np.int64]:
        """See `Entropy`; a chance is exact to 2⁻⁶⁴."""
        if chance >= 1.0:
            return np.arange(count, dtype=np.int64)
        draws = np.frombuffer(os.urandom(8 * count), np.uint64)
        return np.flatnonzero(draws < np.uint64(int(chance * _RANGE))).astype(np.int64)

    def normal(self, count: int) -> NDArray[np.float64]:
        """See `Entropy`.

        Each is the mean of four draws times two: what the last bits of one draw would tell of it
        is lost in the sum (Holohan and Braghin, 2021, section 4).
        """
        draws = [self._random.gauss(0.0, 1.0) for _ in range(4 * count)]
        return np.asarray(np.array(draws, np.float64).reshape(count, 4).sum(axis=1) / 2.0)
