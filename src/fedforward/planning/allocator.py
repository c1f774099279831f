"""Which blocks the participants of a round perturb, planned again whenever they change.

The server calls an `Allocator` with the participants; it knows budgets and predicted memory, and
no weights. Nothing here needs PyTorch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedforward.core.errors import FedForwardError
from fedforward.directions import Layout
from fedforward.planning.activation import Activation, Objective, Problem, solve

if TYPE_CHECKING:
    from fedforward.config.sections import PlanningSection


def counted(
    planning: "PlanningSection",
    layout: Layout,
    shares: Sequence[float],
    active: Sequence[int],
    names: Sequence[str],
    key: str,
) -> "Allocator":
    """Plans activation where each client says how many blocks it can perturb.

    Args:
        shares: of each client in the average.
        active: blocks that each client can perturb.
        names: of the clients.
        key: what set `active`, for the error.

    Raises:
        FedForwardError: the clients together cannot cover the blocks, or one has too many.
    """
    clients, blocks = len(active), len(layout.blocks)
    if sum(active) < blocks or max(active) > blocks:
        raise FedForwardError(
            f"{key} = {list(active)} does not fit this model: its {blocks} blocks "
            f"({', '.join(layout.blocks)}) must each be active on some client, and no client can "
            f"have more than {blocks}."
        )
    sizes = np.array(layout.block_sizes, dtype=np.float64)
    problem = Problem(
        shares=np.array(shares, np.float64),
        weights=sizes,
        dimensions=sizes,
        fixed=np.zeros(clients, np.int64),
        costs=np.ones((clients, blocks), np.int64),
        budgets=np.array(active, dtype=np.int64),
        dimension_penalty=planning.dimension_penalty,
        client_names=tuple(names),
        block_names=layout.blocks,
    )
    return Allocator(problem, planning.epsilon, planning.objective)


@dataclass
class Allocator:
    """Plans activation for the participants of a round.

    Attributes:
        problem: of all clients together.
        epsilon: how far above its least the surrogate may be, relatively.
        objective: "total" or "worst", which memory is then least.
    """

    problem: Problem
    epsilon: float = 0.0
    objective: Objective = "total"

    def __post_init__(self) -> None:
        self._plans: dict[tuple[int, ...], Activation] = {}

    def __call__(self, participants: Sequence[int]) -> NDArray[np.bool_]:
        """The blocks of each participant, bool [participants, B].

        Where those who are there cannot cover every block, each keeps the blocks that it has in
        the plan for all clients; blocks that nobody has rest for the round.
        """
        try:
            return self.plan(participants).matrix
        except FedForwardError:
            everyone = range(len(self.problem.shares))
            return self.plan(everyone).matrix[np.array(participants, dtype=np.int64)]

    def plan(self, participants: Sequence[int]) -> Activation:
        """The plan for some of the clients, with its certificates.

        Raises:
            FedForwardError: they cannot cover all blocks within their budgets.
        """
        wanted = tuple(participants)
        if wanted not in self._plans:
            found = solve(self.part(wanted), epsilon=self.epsilon, objective=self.objective)
            everyone = tuple(range(len(self.problem.shares)))
            # Two plans are enough: the one in force, and the one for all clients.
            self._plans = {key: plan for key, plan in self._plans.items() if key == everyone}
            self._plans[wanted] = found
        return self._plans[wanted]

    def part(self, participants: Sequence[int]) -> Problem:
        """The problem of some of the clients."""
        rows = np.array(participants, dtype=np.int64)
        whole = self.problem
        return replace(
            whole,
            shares=whole.shares[rows],
            fixed=whole.fixed[rows],
            costs=whole.costs[rows],
            budgets=whole.budgets[rows],
            client_names=tuple(whole.client_names[row] for row in participants),
        )
