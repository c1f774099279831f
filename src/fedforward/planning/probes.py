"""The probe plan: how many probes share a forward pass, and how long trajectories are carried.

It is resolved once, stored with the run and reused on resume, because the grouping changes the
last bits of a loss.
"""

import os

from fedforward.models.causal_lm import ProbePlan

#: Held-out examples per forward pass; more saves nothing on two cores and costs memory.
EVALUATION_ROWS = 8


def resolve(
    *,
    tune: str,
    threads: int,
    probes_per_call: int,
    trajectory: str,
    device: str,
    directions: int,
) -> ProbePlan:
    """The plan from the configuration's wishes, where 0 and "auto" leave the choice to us.

    One client's step goes through the base in one pass, so that memory does not depend on the
    number of clients; larger groups pay where rows are short.
    """
    full = tune == "full"
    return ProbePlan(
        probes_per_call=1 if full else probes_per_call or 2 * directions,
        threads=threads or len(os.sched_getaffinity(0)),
        trajectory=("copy" if trajectory == "auto" else trajectory) if full else "generate",
        evaluation_rows=EVALUATION_ROWS,
        device=device,
    )
