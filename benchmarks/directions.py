"""Directions against `torch.normal` and add, paired and interleaved in one run.

    python benchmarks/directions.py [--coordinates 16777216] [--json]

Ours: one fused pass over float32 weights. Two baselines, both through PyTorch with a seed per
direction: `mezo` is the line of MeZO's code (fresh tensors, `w.data = w.data + scale * z * eps`),
`in-place` spares it every allocation. Medians of interleaved repeats; a baseline's time for K seeds
is K times that of one, since it does the same work K times.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

# As the command line has it: threads of PyTorch that still spin would share our cores.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fedforward.directions import Distribution
from fedforward.directions.kernels import accumulate

REACH = {("gaussian", 1): 10.0, ("rademacher", 1): 10.0, ("rademacher", 90): 80.0}


def seconds(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def measure(coordinates: int, repeats: int) -> list[dict[str, object]]:
    weights = torch.zeros(coordinates)
    buffer = torch.empty(coordinates)

    def mezo() -> None:
        torch.manual_seed(1)
        z = torch.normal(mean=0.0, std=1.0, size=weights.size(), dtype=weights.dtype)
        weights.data = weights.data + 1.0 * z * 1e-3

    def in_place() -> None:
        torch.manual_seed(1)
        torch.normal(0.0, 1.0, weights.size(), out=buffer)
        weights.add_(buffer, alpha=1e-3)

    rows = []
    for distribution in Distribution:
        for count in (1, 8, 90):
            seeds = np.arange(count, dtype=np.uint64)
            coefficients = np.full(count, 1e-3, np.float32)

            def ours(
                seeds: np.ndarray = seeds,
                coefficients: np.ndarray = coefficients,
                distribution: Distribution = distribution,
            ) -> None:
                accumulate(
                    weights,
                    seeds,
                    coefficients,
                    first_tile=0,
                    distribution=distribution,
                    out=weights,
                )

            ours(), mezo(), in_place()
            samples = [(seconds(ours), seconds(mezo), seconds(in_place)) for _ in range(repeats)]
            mine, literal, spared = (
                statistics.median(column) for column in zip(*samples, strict=True)
            )
            rows.append(
                {
                    "distribution": str(distribution),
                    "seeds": count,
                    "ours_seconds": mine,
                    "giga_coordinates_per_second": coordinates * count / mine / 1e9,
                    "times_mezo": count * literal / mine,
                    "times_in_place": count * spared / mine,
                    "reach": REACH.get((str(distribution), count)),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--coordinates", type=int, default=1 << 24)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = measure(arguments.coordinates, arguments.repeats)
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    table = Table(
        title=f"{arguments.coordinates:,} float32 coordinates, {torch.get_num_threads()} threads"
    )
    for name in (
        "distribution",
        "seeds",
        "seconds",
        "G coordinates/s",
        "× mezo",
        "× in place",
        "reach",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row["distribution"]),
            str(row["seeds"]),
            f"{row['ours_seconds']:.4f}",
            f"{row['giga_coordinates_per_second']:.2f}",
            f"{row['times_mezo']:.1f}",
            f"{row['times_in_place']:.1f}",
            f"{row['reach']:.0f} x mezo" if row["reach"] else "",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
