"""Whether every block finds a client within the budgets, and what is missing if not."""

import numpy as np

from fedforward.core.errors import FedForwardError
from fedforward.core.units import format_bytes
from fedforward.planning.activation.problem import Bools, Problem
from fedforward.planning.activation.program import run


def check_each(problem: Problem) -> None:
    """Whether every client can run at all, and every block fits on some client alone.

    Raises:
        FedForwardError: not so; the sentence names client, block and missing bytes.
    """
    missing = problem.fixed - problem.budgets
    if (missing > 0).any():
        client = int(missing.argmax())
        raise FedForwardError(
            f"Client {problem.client_names[client]!r} cannot take part: with no active block it "
            f"needs {format_bytes(int(problem.fixed[client]))} and lacks "
            f"{format_bytes(int(missing[client]))}. Raise its budget or leave it out."
        )
    alone = missing[:, None] + problem.costs
    nearest = alone.argmin(axis=0)
    block = int(alone.min(axis=0).argmax())
    if alone[nearest[block], block] > 0:
        raise _uncovered(problem, block, int(nearest[block]), int(alone[nearest[block], block]))


def cover(problem: Problem, deadline: float) -> Bools:
    """A matrix with every block on one client within the budgets, bool [N, L].

    A mixed-integer program, which misses as few bytes in all as possible; to try first what is
    quicker is the caller's part.

    Raises:
        FedForwardError: there is none; the sentence names client, block and missing bytes.
    """
    from scipy.sparse import block_diag, coo_array, eye_array, hstack

    clients, blocks = problem.costs.shape
    room = problem.budgets - problem.fixed
    unit = max(int(np.gcd.reduce(problem.costs, axis=None)), 1)
    cells = clients * blocks
    costs = block_diag([row[None] for row in problem.costs // unit])
    covered = hstack([eye_array(blocks)] * clients + [coo_array((blocks, clients))])
    answer = run(
        np.append(np.zeros(cells), np.ones(clients)),
        cells,
        np.append(np.ones(cells), np.full(clients, np.inf)),
        [
            (
                hstack([costs, -eye_array(clients)]).tocsr(),
                -np.inf,
                np.minimum(room, problem.costs.sum()) / unit,
            ),
            (covered.tocsr(), 1, 1),
        ],
        deadline,
        {"mip_rel_gap": 0.0},
    )
    if answer.x is None:
        raise FedForwardError(
            "No activation was found that has every block on some client; raise a client's budget."
        )
    matrix: Bools = answer.x[:cells].reshape(clients, blocks) > 0.5
    if problem.admits(matrix):
        return matrix
    excess = problem.memory(matrix) - problem.budgets
    client = int(excess.argmax())
    # A block whose absence makes the others fit, if there is one.
    costs = np.where(matrix[client], problem.costs[client], -1)
    enough = np.where(costs >= excess[client], costs, np.iinfo(np.int64).max)
    block = int(enough.argmin() if (costs >= excess[client]).any() else costs.argmax())
    raise _uncovered(problem, block, client, int(excess[client]), beside=True)


def _uncovered(
    problem: Problem, block: int, client: int, missing: int, beside: bool = False
) -> FedForwardError:
    where = " in addition to the others" if beside else ""
    return FedForwardError(
        f"Block {problem.block_names[block]!r} cannot be active on any client{where}: client "
        f"{problem.client_names[client]!r} comes nearest and lacks {format_bytes(missing)}. Raise "
        "its budget, or choose a smaller model or a lower cost of an active block."
    )
