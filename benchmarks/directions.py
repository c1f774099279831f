"""Directions against regenerating and adding through PyTorch, paired and interleaved in one run.

    python benchmarks/directions.py [--coordinates 16777216] [--dtypes float32] [--json] [--check]

Ours is one fused pass over the weights. The naive way is MeZO's, in the weights' dtype and with a
seed per direction: `z = torch.normal(mean=0, std=1, size=…, dtype=…)`, then `weights += c * z`.
`in place` spares it every allocation (`torch.normal(out=…)`, `add_(alpha=…)`). MeZO has no other
directions than normal ones, so Rademacher is held against the same lines; the distribution is one
of the things that may be chosen for speed. A baseline's time for K seeds is K times that of one,
since it does the same work K times.

In half precision `nearest` is what a probe does to one direction and `stochastic` what a commit
does; in float32 the two are the same.
"""

import argparse
from collections.abc import Iterator

import common
import numpy as np
import torch
from common import Column, Reach, Row

from fedforward.directions import Distribution
from fedforward.directions.ops import accumulate

SEEDS = (1, 90)
REACHES = {
    ("gaussian", 1): Reach(">=", 12.0),
    ("rademacher", 1): Reach(">=", 18.0),
    ("gaussian", 90): Reach(">=", 20.0),
    ("rademacher", 90): Reach(">=", 150.0),
}
COLUMNS = (
    Column("dtype", "dtype"),
    Column("distribution", "directions"),
    Column("seeds", "seeds"),
    Column("rounding", "rounding"),
    Column("ours_seconds", "ours, ms", ".2f", 1e3),
    Column("giga_coordinates_per_second", "G coordinates/s", ".2f"),
    Column("times_naive", "× regenerate and add", ".1f"),
    Column("times_in_place", "× in place", ".1f"),
)


def roundings(dtype: str, count: int) -> tuple[str, ...]:
    if dtype == "float32":
        return ("nearest",)
    return ("nearest", "stochastic") if count == 1 else ("stochastic",)


def measure(arguments: argparse.Namespace, dtype: str) -> Iterator[Row]:
    coordinates, device = arguments.coordinates, arguments.device
    weights = torch.zeros(coordinates, dtype=common.DTYPES[dtype], device=device)
    buffer = torch.empty_like(weights)

    def naive() -> None:
        torch.manual_seed(1)
        z = torch.normal(mean=0, std=1, size=weights.size(), dtype=weights.dtype, device=device)
        weights.add_(1e-3 * z)

    def in_place() -> None:
        torch.manual_seed(1)
        torch.normal(0.0, 1.0, weights.size(), out=buffer)
        weights.add_(buffer, alpha=1e-3)

    for distribution in Distribution:
        for count in SEEDS:
            seeds = np.arange(count, dtype=np.uint64)
            coefficients = np.full(count, 1e-3, np.float32)
            for rounding in roundings(dtype, count):
                dither_seed = 1 if rounding == "stochastic" else None

                def ours(
                    seeds: np.ndarray = seeds,
                    coefficients: np.ndarray = coefficients,
                    distribution: Distribution = distribution,
                    dither_seed: int | None = dither_seed,
                ) -> None:
                    accumulate(
                        weights,
                        seeds,
                        coefficients,
                        first_tile=0,
                        distribution=distribution,
                        out=weights,
                        dither_seed=dither_seed,
                    )

                actions = {"ours": ours, "naive": naive, "in place": in_place}
                # Kernels compile and pages are mapped in the first round.
                common.interleave(actions, 1, device)
                samples = common.interleave(actions, arguments.repeats or 9, device)
                medians = common.medians(samples)
                mine = medians["ours"]
                # A commit of one seed stands beside; the reach is that of a probe.
                held = device == "cpu" and (count > 1 or rounding == "nearest")
                yield {
                    "name": f"{dtype} {distribution} {count} seeds {rounding}",
                    "dtype": dtype,
                    "distribution": str(distribution),
                    "seeds": count,
                    "rounding": rounding,
                    "coordinates": coordinates,
                    "ours_seconds": mine,
                    "giga_coordinates_per_second": coordinates * count / mine / 1e9,
                    "times_naive": count * medians["naive"] / mine,
                    "times_in_place": count * medians["in place"] / mine,
                    "reaches": ({"times_naive": REACHES[str(distribution), count]} if held else {}),
                }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--coordinates", type=int, default=0, help="0 is 16,777,216")
    parser.add_argument(
        "--dtypes", nargs="+", choices=list(common.DTYPES), default=list(common.DTYPES)
    )
    arguments = parser.parse_args(argv)
    arguments.coordinates = arguments.coordinates or (1 << 12 if arguments.quick else 1 << 24)
    if arguments.quick:
        arguments.repeats = 1
    common.prepare(arguments)
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    found = [row for dtype in arguments.dtypes for row in measure(arguments, dtype)]
    remarks = [
        f"{arguments.coordinates:,} coordinates. Both distributions against MeZO's normal "
        "directions in the same dtype."
    ]
    common.finish(arguments, "directions", found, COLUMNS, remarks)


if __name__ == "__main__":
    main()
