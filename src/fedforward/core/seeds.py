"""Every random choice of a run, as a pure function of the run seed and of where it is needed.

Nothing is drawn from a generator with state, so a resumed run and a late client make the same
choices. The hash is BLAKE2b, which any language has.
"""

import hashlib
import struct

import numpy as np
from numpy.typing import NDArray

#: Stands for "no particular client" where a seed is shared by all.
SHARED = 0xFFFFFFFF


def derive(run_seed: int, purpose: str, *where: int) -> int:
    """A 64-bit seed for `purpose` at `where` (round, client, step … in the caller's order).

    BLAKE2b-64 over the run seed and the coordinates as little-endian 64-bit integers, with the
    purpose as personalisation (at most 16 bytes).
    """
    packed = struct.pack(f"<{1 + len(where)}Q", run_seed, *where)
    digest = hashlib.blake2b(packed, digest_size=8, person=purpose.encode()).digest()
    return int.from_bytes(digest, "little")


def draws(run_seed: int, purpose: str, count: int, *where: int) -> NDArray[np.uint64]:
    """So many 64-bit numbers for `purpose` at `where`, uint64 [count]; parties agree on them.

    BLAKE2b-512 in place of the 64-bit hash of `derive`, eight numbers from each block, with the
    block's number as the last coordinate.
    """
    blocks = []
    for block in range(-(-count // 8)):
        packed = struct.pack(f"<{2 + len(where)}Q", run_seed, *where, block)
        blocks.append(hashlib.blake2b(packed, digest_size=64, person=purpose.encode()).digest())
    return np.frombuffer(b"".join(blocks), "<u8")[:count].astype(np.uint64)


def generator(run_seed: int, purpose: str, *where: int) -> np.random.Generator:
    """A numpy generator for choices that never travel: batch order, participation, partition."""
    return np.random.Generator(np.random.Philox(key=derive(run_seed, purpose, *where)))


def direction_seed(run_seed: int, round_number: int, client: int, step: int, direction: int) -> int:
    """The seed of one direction; `client` is SHARED for methods whose clients share directions."""
    return derive(run_seed, "direction", round_number, client, step, direction)


def dither_seed(run_seed: int, round_number: int) -> int:
    """The seed of the stochastic rounding when round `round_number` is committed."""
    return derive(run_seed, "dither", round_number)
