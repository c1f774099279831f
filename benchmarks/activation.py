"""Block activation: seconds and certified gaps of both stages, on one core.

    python benchmarks/activation.py [--epsilon 0.1] [--time-limit 10] [--json] [--check]

Random shares, block weights and budgets (each client can hold a uniformly random part of the
blocks). The costs are 100 MB for every block, or differ by client, or differ by client and block
by a factor of up to four, which is the hardest case and more than any real model has. `gap` is that
of the convergence surrogate above its proven lower bound, `memory gap` that of the second stage.
Every matrix is checked against the budgets before it is returned. Only 100 clients have figures to
reach, as a federation server ends near 100 sites; 1,000 have six times the limit.
"""

import argparse
import os
import time
from collections.abc import Iterator

# One core: the linear algebra reads this when it is loaded.
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"

import common
import numpy as np
from common import Column, Reach, Row

from fedforward.planning.activation import Objective, Problem, solve

SIZES = ((100, 80), (1000, 80))
SHARES = ("equal", "unequal")
COSTS = ("same", "by client", "by client and block")
OBJECTIVES: tuple[Objective, ...] = ("total", "worst")
COLUMNS = (
    Column("clients", "clients", "d"),
    Column("blocks", "blocks", "d"),
    Column("shares", "shares"),
    Column("costs", "costs of a block"),
    Column("objective", "memory"),
    Column("seconds", "seconds", ".2f"),
    Column("processor_seconds", "of the processor", ".2f"),
    Column("surrogate", "least f₁", ".4f"),
    Column("gap", "gap", ".1e"),
    Column("gigabytes", "memory, GB", ".1f"),
    Column("memory_gap", "memory gap", ".1e"),
)


def problem(clients: int, blocks: int, shares: str, costs: str, seed: int = 0) -> Problem:
    """A random problem; the same seed gives the same one."""
    random = np.random.default_rng(seed)
    parts = np.ones(clients) if shares == "equal" else random.random(clients) + 0.05
    weights = random.random(blocks) + 0.2
    size = {
        "same": (1, 1),
        "by client": (clients, 1),
        "by client and block": (clients, blocks),
    }[costs]
    cost = np.full(size, 10**8) if costs == "same" else random.integers(5 * 10**7, 2 * 10**8, size)
    cost = np.broadcast_to(cost, (clients, blocks))
    fixed = np.full(clients, 10**9)
    room = (random.random(clients) * cost.sum(axis=1)).astype(np.int64)
    return Problem(parts, weights, np.ones(blocks), fixed, cost, fixed + room)


def reaches(shares: str, costs: str, limit: float) -> dict[str, Reach]:
    """The time for every case; gaps where the cost of a block does not depend on the block."""
    held = {"seconds": Reach("<=", limit)}
    if costs != "by client and block":
        held["gap"] = Reach("<=", 1e-9 if shares == "equal" else 1e-6)
        held["memory_gap"] = Reach("<=", 1e-3)
    return held


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    for clients, blocks in ((12, 8),) if arguments.quick else SIZES:
        for shares in SHARES:
            for costs in COSTS:
                made = problem(clients, blocks, shares, costs)
                limit = arguments.time_limit * (1 if clients <= 100 else 6)
                for objective in OBJECTIVES:
                    # The limit is for the search; a certificate may end a little later.
                    found = []
                    for _ in range(arguments.repeats or 3):
                        begin = time.process_time()
                        one = solve(made, arguments.epsilon, objective, 0.9 * limit)
                        found.append((one.seconds, time.process_time() - begin, one))
                    seconds, processor, best = min(found, key=lambda timed: timed[0])
                    yield {
                        "name": f"{clients} x {blocks}, {shares} shares, costs {costs}, "
                        f"{objective} memory",
                        "clients": clients,
                        "blocks": blocks,
                        "shares": shares,
                        "costs": costs,
                        "objective": objective,
                        "epsilon": arguments.epsilon,
                        "seconds": seconds,
                        "processor_seconds": processor,
                        "surrogate": best.best_surrogate,
                        "gap": best.gap,
                        "gigabytes": best.used / 1e9,
                        "memory_gap": best.memory_gap,
                        "reaches": reaches(shares, costs, limit) if clients <= 100 else {},
                    }
                    common.note(
                        f"{clients} x {blocks}, {shares}, {costs}, {objective}: {seconds:.2f} s"
                    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--epsilon", type=float, default=0.1, help="of the second stage")
    parser.add_argument("--time-limit", type=float, default=10.0, help="seconds for each problem")
    arguments = parser.parse_args(argv)
    arguments.threads = 1
    if arguments.quick:
        arguments.repeats, arguments.time_limit = 1, min(arguments.time_limit, 1.0)
    common.prepare(arguments)
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    remarks = [
        f"ε = {arguments.epsilon}; the least of the repeats. Both stages and all certificates on "
        "one core, without PyTorch."
    ]
    common.finish(arguments, "activation", list(measure(arguments)), COLUMNS, remarks)


if __name__ == "__main__":
    main()
