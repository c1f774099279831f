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
    from fedforward.config.method_sections import PlanningSection


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
        the plan for all clients; blocks that nobody has are inactive for the round.
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


@dataclass(frozen=True)
class ClientBlocks:
    """What a client says of itself, as far as blocks are allotted by it.

    Attributes:
        name: for errors.
        examples: training examples.
        active: blocks that it can perturb; None is all.
    """

    name: str
    examples: int
    active: int | None = None


class BlockAllotment:
    """Allots blocks to clients of which each says how many it can perturb.

    Clients may join, and may change what they say, between rounds.
    """

    def __init__(self, planning: "PlanningSection", layout: Layout, *, equal: bool) -> None:
        """`equal`: whether all clients weigh the same in the average, whatever their examples."""
        self.planning = planning
        self.layout = layout
        self.equal = equal
        self._planned: tuple[Sequence[ClientBlocks], Allocator] | None = None

    def active(self, clients: Sequence[ClientBlocks]) -> list[int]:
        """Blocks that each client can perturb, at most all of the layout."""
        blocks = len(self.layout.blocks)
        return [min(client.active or blocks, blocks) for client in clients]

    def uncovered(self, clients: Sequence[ClientBlocks]) -> int:
        """Blocks that all clients together cannot perturb in one round."""
        return max(0, len(self.layout.blocks) - sum(self.active(clients)))

    def allot(
        self, clients: Sequence[ClientBlocks], participants: Sequence[int], round_number: int
    ) -> NDArray[np.bool_]:
        """The blocks of each participant, bool [participants, B].

        Args:
            clients: all of them, by number.
            participants: numbers of those that take part in the round.
            round_number: from 0; where the clients together cannot cover all blocks, each round
                begins with another one.
        """
        active = self.active(clients)
        if self.uncovered(clients):
            counts = [active[client] for client in participants]
            return in_turn(round_number, counts, len(self.layout.blocks))
        if self._planned is None or self._planned[0] != clients:
            names = [client.name for client in clients]
            planner = counted(
                self.planning,
                self.layout,
                [1.0 if self.equal else float(client.examples) for client in clients],
                active,
                names,
                f"limits.active_blocks of {', '.join(names)}",
            )
            self._planned = (clients, planner)
        return self._planned[1](participants)


def in_turn(round_number: int, active: Sequence[int], blocks: int) -> NDArray[np.bool_]:
    """As many blocks for each as it can perturb, from where the last one's end, bool [n, blocks].

    For clients that together cannot cover all: each round begins with another block.
    """
    matrix = np.zeros((len(active), blocks), np.bool_)
    place = round_number * sum(active)
    for row, count in zip(matrix, active, strict=True):
        row[np.arange(place, place + count) % blocks] = True
        place += count
    return matrix
