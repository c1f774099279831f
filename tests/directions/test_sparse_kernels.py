"""A few coordinates of a tensor, each generated alone: the bits of whole tiles."""

from itertools import product

import numpy as np
import pytest

from fedforward.core.steps import NO_STEPS, Steps
from fedforward.directions import numba_kernels as whole
from fedforward.directions import sparse_kernels as few
from fedforward.directions.spec import TILE, Distribution

CODES = (whole.FLOAT32, whole.BFLOAT16, whole.FLOAT16)
FIRST_TILE = 12345


def weights(code: int, size: int, seed: int = 0) -> np.ndarray:
    values = (np.random.default_rng(seed).normal(size=size) * 0.02).astype(np.float32)
    if code == whole.BFLOAT16:
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(np.float16).view(np.uint16) if code == whole.FLOAT16 else values


def free(size: int, count: int) -> few.FreeCoordinates:
    places = np.random.default_rng(1).choice(size, count, replace=False)
    return few.FreeCoordinates(np.sort(places), FIRST_TILE)


@pytest.mark.parametrize(("distribution", "code"), list(product(Distribution, CODES)))
@pytest.mark.parametrize("count", [0, 1, 1025, 4 * TILE + 77])
def test_a_commit_has_the_bits_of_whole_tiles(
    distribution: Distribution, code: int, count: int
) -> None:
    """Rounds with decay and dither; the last list has every coordinate there is."""
    size = 4 * TILE + 77
    random = np.random.default_rng(2)
    seeds = random.integers(0, 2**63, 6).astype(np.uint64)
    coefficients = (random.normal(size=6) * 1e-2).astype(np.float32)
    rounds = {"ends": [2, 2, 6], "decays": [1.0, 0.9, 1.0], "dither_seeds": [7, 8, 9]}
    given, chosen = weights(code, size), free(size, count)
    all_moved = given.copy()
    changed = whole.commit(
        all_moved,
        seeds,
        coefficients,
        first_tile=FIRST_TILE,
        distribution=distribution,
        out=all_moved,
        codes=(code, code),
        **rounds,
    )
    for threads in (1, 2):
        found = given.copy()
        own = few.commit_at(
            found,
            chosen,
            seeds,
            coefficients,
            distribution=distribution,
            code=code,
            threads=threads,
            **rounds,
        )
        expected = given.copy()
        expected[chosen.places] = all_moved[chosen.places]
        assert found.tobytes() == expected.tobytes()
        assert own == changed if count == size else own <= changed


@pytest.mark.parametrize(("distribution", "code"), list(product(Distribution, CODES)))
@pytest.mark.parametrize("shared", [NO_STEPS, Steps.of([3, 4, 2**63], [0.1, -0.2, 0.3])])
def test_a_displacement_has_the_bits_of_whole_tiles(
    distribution: Distribution, code: int, shared: Steps
) -> None:
    size = 3 * TILE + 5
    own = (Steps.of([5], [0.1]), Steps.of([5], [-0.1]), Steps.of([6, 7], [0.1, 0.2]), NO_STEPS)
    given, chosen = weights(code, size), free(size, 700)
    dtype = given.dtype
    expected, found = np.zeros((4, size), dtype), np.zeros((4, 700), dtype)
    whole.displace(
        given,
        shared,
        own,
        first_tile=FIRST_TILE,
        distribution=distribution,
        out=expected,
        codes=(code, code),
    )
    few.displace_at(
        given, chosen, shared, own, distribution=distribution, out=found, codes=(code, code)
    )
    assert found.tobytes() == expected[:, chosen.places].tobytes()


def test_which_coordinates_lie_between() -> None:
    chosen = few.FreeCoordinates(np.array([3, 5, 9], np.int64), 0)
    assert [chosen.between(*part) for part in ((0, 3), (3, 6), (6, 10))] == [(0, 0), (0, 2), (2, 3)]
