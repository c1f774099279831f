"""ZorBA: zeroth-order tuning with heterogeneous block activation (arXiv 2603.04436).

From the paper (its abstract): the server allots different transformer blocks to different clients,
random seeds are shared, and finite differences are what travels. The rest is our formulation:
in step h of a round all clients use the same seed s_h; client i perturbs only the coordinates of
its active blocks, z(s_h) ⊙ mask_i, along its own trajectory of the round, which is dropped after
reporting g_ih; each block moves by the average over the clients that had it active,

    θ_b ← θ_b - Σ_h z_b(s_h) Σ_i A_ib p_i η_i g_ih / Σ_i A_ib p_i,

and a block that no reporting client had active stays. `planning/activation` chooses A.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedforward.messages import Entry, pack_blocks
from fedforward.methods import Method, Returned, round_seeds, shared_contribution
from fedforward.seeds import SHARED


@dataclass(frozen=True)
class ZorBA(Method):
    """Shared directions, each client in its own blocks."""

    name: ClassVar[str] = "zorba"
    by_block: ClassVar[bool] = True
    shared_seeds: ClassVar[bool] = True

    def seeds(self, round_number: int, client: int, odds: NDArray[np.uint16]) -> NDArray[np.uint64]:
        """s_h, the same for every client."""
        return round_seeds(self.run_seed, round_number, SHARED, self.local_steps, self.directions)

    def aggregate(
        self, round_number: int, returned: Sequence[Returned], odds: NDArray[np.uint16]
    ) -> Entry:
        """One contribution for each set of blocks that were active on the same clients."""
        width = max((len(part.active) for part in returned if part.active is not None), default=1)
        matrix = np.array(
            [np.ones(width, np.bool_) if p.active is None else p.active for p in returned]
        )
        groups: dict[bytes, list[int]] = {}
        for block in range(width):
            groups.setdefault(matrix[:, block].tobytes(), []).append(block)
        contributions = []
        for blocks in groups.values():
            rows = np.flatnonzero(matrix[:, blocks[0]]).tolist()
            if rows:
                moved = np.isin(np.arange(width), blocks)
                contributions.append(
                    shared_contribution(
                        [returned[row] for row in rows],
                        self.directions,
                        SHARED,
                        pack_blocks(moved),
                    )
                )
        return Entry(round_number, tuple(contributions))
