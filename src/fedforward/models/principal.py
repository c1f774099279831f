"""Principal directions of a second moment, with signs that every machine agrees on."""

import numpy as np
from numpy.typing import NDArray

#: A direction with less than this share of all variance is one that the texts do not show.
LEAST_SHARE = 1e-10


def principal_directions(
    moment: NDArray[np.float64], count: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """At most `count` eigenvectors with the largest eigenvalues, as rows, and these.

    The largest component of each is positive; the first of several that are as large decides.

    Args:
        moment: symmetric, [width, width].
        count: of the rows, at most; directions without variance are left out.
    """
    from scipy.linalg import eigh

    size = len(moment)
    first = max(0, size - count)
    values, vectors = eigh(moment, subset_by_index=[first, size - 1])
    values, vectors = values[::-1], vectors.T[::-1]
    there = values > LEAST_SHARE * np.trace(moment)
    values, vectors = values[there], vectors[there]
    largest = np.abs(vectors).argmax(axis=1)
    signs = np.sign(np.take_along_axis(vectors, largest[:, None], axis=1))
    return vectors * signs, values
