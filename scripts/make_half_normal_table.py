"""Make the table of half-normal quantiles that Gaussian directions look up.

Quantile i is that of probability (i + 1/2) / 32768 of the half-normal distribution; all are then
scaled so that a direction's coordinates have variance exactly one (up to float32 rounding). The
committed file is the specification: this script shows where it comes from and prints its SHA-256.
"""

import argparse
import hashlib
from pathlib import Path

import numpy as np
from scipy.special import ndtri

SIZE = 32768
DEFAULT = Path(__file__).parents[1] / "src/fedforward/directions/half_normal.bin"


def table() -> np.ndarray:
    """The 32,768 values as little-endian float32."""
    probability = (np.arange(SIZE, dtype=np.float64) + 0.5) / SIZE
    quantiles = ndtri(0.5 + 0.5 * probability)
    return (quantiles / np.sqrt(np.mean(quantiles**2))).astype("<f4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DEFAULT)
    out = parser.parse_args().out
    values = table()
    out.write_bytes(values.tobytes())
    wide = values.astype(np.float64)
    print(f"variance {np.mean(wide**2):.9f}  kurtosis {np.mean(wide**4):.4f}  max {wide[-1]:.4f}")
    print("sha256", hashlib.sha256(values.tobytes()).hexdigest())


if __name__ == "__main__":
    main()
