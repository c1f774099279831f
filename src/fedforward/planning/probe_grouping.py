"""The probe plan: how many probes share a forward pass, and how trajectories are kept.

It is resolved once, stored with the run and reused on resume, because the grouping changes the
last bits of a loss.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedforward.core.batches import Batch
from fedforward.core.errors import FedForwardError
from fedforward.core.machine import usable_cores
from fedforward.core.steps import Probe, ProbePlan
from fedforward.core.units import format_bytes
from fedforward.methods.base import rehearsal
from fedforward.methods.estimators import Estimator
from fedforward.models.base import CausalModel
from fedforward.planning.memory.tracker import peak_bytes

#: Held-out examples per forward pass; more saves nothing on two cores and costs memory.
EVALUATION_ROWS = 8
#: Tokens of a forward pass by device: activations that stay in a cache, or fill a GPU.
TOKENS_PER_CALL = {"cpu": 1024, "cuda": 16384}


def resolve(
    *,
    tune: str,
    threads: int,
    probes_per_call: int,
    tokens_per_call: int,
    trajectory: str,
    device: str,
    probes_per_step: int,
) -> ProbePlan:
    """The plan from what the configuration requests, where 0 and "auto" leave the choice to us.

    The two signs of one direction go through the network together. With adapters a client's whole
    step does, so that memory does not depend on the number of clients.
    """
    full = tune == "full"
    kind = device.split(":")[0]
    return ProbePlan(
        probes_per_call=probes_per_call or (2 if full else probes_per_step),
        threads=threads or usable_cores(),
        trajectory="cache" if trajectory == "auto" or not full else trajectory,
        evaluation_rows=EVALUATION_ROWS,
        device=device,
        tokens_per_call=tokens_per_call or TOKENS_PER_CALL.get(kind, TOKENS_PER_CALL["cuda"]),
    )


def step_probes(
    batches: Sequence[Batch],
    count: int,
    estimator: Estimator,
    active: NDArray[np.bool_] | None = None,
) -> list[Probe]:
    """The first `count` probes of steps in the middle of a round, client after client.

    Args:
        batches: of the clients, in turn.
        active: bool [B], blocks that are perturbed; None is all.
    """
    clients = -(-count // estimator.probes_per_step)
    chosen = [batches[client % len(batches)] for client in range(clients)]
    return rehearsal(estimator, chosen, active)[:count]


def fit(
    model: CausalModel,
    batches: Sequence[Batch],
    budget: int,
    clients: int,
    estimator: Estimator,
    kept_bytes: int = 0,
) -> ProbePlan:
    """The model's plan with as many probes in a forward pass as a memory budget allows.

    One and two probes of the longest batches are measured, the number is extrapolated and measured
    again, and lowered until it fits.

    Args:
        batches: the longest of each client.
        budget: bytes of tensors alive, the model's own included.
        clients: whose steps can ever be ready at once.
        estimator: of a step.
        kept_bytes: that kept activations will come to, in host memory.

    Raises:
        FedForwardError: not even one probe fits.
    """
    plan = model.plan
    counted = kept_bytes if model.device.type == "cpu" else 0

    def measured(count: int) -> int:
        model.plan = replace(plan, probes_per_call=count)
        probes = step_probes(batches, count, estimator)
        peak = peak_bytes(lambda: model.evaluate(probes), model.device)
        return peak + max(0, counted - (model.kept.size if model.kept else 0))

    try:
        measured(1)
        one, two = measured(1), measured(2)
        if one > budget:
            raise FedForwardError(
                f"run.memory_budget = {format_bytes(budget)} is too small: the model and one probe "
                f"of its longest batch take {format_bytes(one)}. Raise it, or lower "
                "data.sequence_length or method.batch_size."
            )
        count = min(clients * estimator.probes_per_step, 1 + (budget - one) // max(1, two - one))
        while count > 1 and measured(count) > budget:
            count = max(1, count * 3 // 4)
    finally:
        model.plan = plan
        model.clear_cache()
    return replace(plan, probes_per_call=count)
