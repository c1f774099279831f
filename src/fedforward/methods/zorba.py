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
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedforward.core.seeds import SHARED
from fedforward.messages.entry import Entry
from fedforward.messages.report import ClientResult
from fedforward.methods.base import Capabilities, Method, round_seeds, shared_contribution


@dataclass(frozen=True, kw_only=True)
class ZorBA(Method):
    """Shared directions, each client in its own blocks.

    Example:
        >>> ZorBA().capabilities.blocks
        True
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        shared_directions=True, scales=True, blocks=True
    )

    def seeds(self, round_number: int, client: int, payload: bytes = b"") -> NDArray[np.uint64]:
        """s_h, the same for every client."""
        return round_seeds(self.run_seed, round_number, SHARED, self.local_steps, self.directions)

    def aggregate(self, round_number: int, results: Sequence[ClientResult], state: Any) -> Entry:
        """One contribution for each set of blocks that were active on the same clients.

        A set that fewer clients have than the aggregator needs has none.
        """
        width = max((len(part.blocks) for part in results if part.blocks is not None), default=1)
        every = np.ones(width, np.bool_)
        matrix = np.array([every if part.blocks is None else part.blocks for part in results])
        groups: dict[bytes, list[int]] = {}
        for block in range(width):
            groups.setdefault(matrix[:, block].tobytes(), []).append(block)
        contributions = []
        for blocks in groups.values():
            rows = np.flatnonzero(matrix[:, blocks[0]]).tolist()
            # Where fewer clients have a block than the rule needs, nobody moves it.
            if len(rows) >= self.aggregator.least:
                moved = np.isin(np.arange(width), blocks)
                contributions.append(
                    shared_contribution(
                        self,
                        [results[row] for row in rows],
                        SHARED,
                        None if moved.all() else moved,
                    )
                )
        return Entry(round_number, tuple(contributions))
