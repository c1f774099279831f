"""FedAvg by backpropagation (McMahan et al., 2017): the first-order baseline, tensors on the wire.

The one method that imports PyTorch. `sgd` is what the FedMeZO paper compares with; `adamw` is the
honest baseline. The optimiser's state starts afresh in every round.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedforward.messages.codec import Report, Task
from fedforward.methods.base import BatchStream, Returned
from fedforward.models.base import CausalModel


@dataclass(frozen=True)
class FedAvg:
    """The algorithm with its settings.

    Attributes:
        local_steps: H.
        optimizer: "sgd" or "adamw".
    """

    local_steps: int
    optimizer: str
    name: str = "fedavg"
    directions: int = 1

    def train(self, task: Task, batches: BatchStream, model: CausalModel) -> Report:
        """H optimiser steps from the server's state; the report carries the client's tensors.

        The model is back at the server's state afterwards: in a simulation the next client of the
        round begins from there.
        """
        start = model.export_state()
        parameters = model.tuned_parameters()
        losses: list[float] = []
        skipped = 0
        for parameter in parameters:
            parameter.requires_grad_(True)
        kind = torch.optim.SGD if self.optimizer == "sgd" else torch.optim.AdamW
        optimizer = kind(parameters, lr=task.learning_rate, weight_decay=0.0)
        for step in range(self.local_steps):
            optimizer.zero_grad(set_to_none=True)
            loss = model.loss(batches[task.round * self.local_steps + step])
            if not torch.isfinite(loss):
                skipped += 1
                continue
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        for parameter in parameters:
            parameter.grad = None
            parameter.requires_grad_(False)
        trained = model.export_state()
        model.assign_state(start)
        return Report(
            round=task.round,
            client=task.client,
            examples=len(batches),
            loss=float(np.mean(losses)) if losses else float("nan"),
            skipped=skipped,
            gradients=np.empty(0, np.float32),
            state=trained,
        )

    def average(self, returned: Sequence[Returned]) -> NDArray[np.float32]:
        """Σ_i p_i θ_i, summed in float64 in the order of the clients, float32 [d]."""
        total = np.zeros(len(_state(returned[0])), np.float64)
        for part in returned:
            total += part.weight * _state(part)
        return total.astype(np.float32)


def _state(part: Returned) -> NDArray[np.float32]:
    assert part.report.state is not None
    return part.report.state
