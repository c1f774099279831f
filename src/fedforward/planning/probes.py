"""The probe plan: how many probes share a forward pass, and how long trajectories are carried.

It is resolved once, stored with the run and reused on resume, because the grouping changes the
last bits of a loss.
"""

import os

from fedforward.models.causal_lm import ProbePlan

#: Held-out examples per forward pass; more saves nothing on two cores and costs memory.
EVALUATION_ROWS = 8
#: Probes of a LoRA step that go through the base together unless the configuration says otherwise.
LORA_PROBES = 2


def resolve(
    *,
    tune: str,
    threads: int,
    probes_per_call: int,
    trajectory: str,
    clients: int,
    directions: int,
) -> ProbePlan:
    """The plan from the configuration's wishes, where 0 and "auto" leave the choice to us."""
    step = 2 * directions
    if tune == "full":
        grouped = 1
    else:
        grouped = probes_per_call or min(step * clients, max(step, LORA_PROBES))
    if trajectory == "auto":
        trajectory = "copy"
    return ProbePlan(
        probes_per_call=grouped,
        threads=threads or len(os.sched_getaffinity(0)),
        trajectory="generate" if tune == "lora" else trajectory,
        evaluation_rows=EVALUATION_ROWS,
    )
