"""FedAvg by backpropagation (McMahan et al., 2017): the first-order baseline, tensors on the wire.

`sgd` is what the FedMeZO paper compares with; `adamw` is the honest baseline. The optimiser's state
starts afresh in every round. A report's payload is the client's tuned state, float32 [d]; what the
server remembers is their average, which no list of steps can rebuild.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedforward.core.errors import MessageError
from fedforward.messages.entry import Entry
from fedforward.messages.report import ClientResult, Report
from fedforward.messages.snapshot import Snapshot
from fedforward.messages.task import Task
from fedforward.methods.base import BatchStream, Capabilities, LocalRound, Method
from fedforward.methods.parameters import parameter


@dataclass(frozen=True, kw_only=True)
class FedAvg(Method):
    """The algorithm with its settings.

    Attributes:
        optimizer: "sgd" or "adamw".

    Example:
        >>> FedAvg(optimizer="adamw").capabilities.forward_only
        False
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        forward_only=False, replayable=False, contributions=False, masks=False
    )
    optimizer: str = parameter("sgd", "of the clients", choices=("sgd", "adamw"))

    @property
    def directions(self) -> int:
        """None are probed."""
        return 0

    def seeds(self, round_number: int, client: int, payload: bytes = b"") -> NDArray[np.uint64]:
        """None."""
        return np.empty(0, np.uint64)

    def new_state(self) -> "AveragedState":
        """The average after the last round."""
        return AveragedState()

    def restore(self, model: Any, snapshot: Snapshot, state: "AveragedState") -> None:
        """Take over the average, rounded to the weights' dtype."""
        state.restore(snapshot.data)
        if len(state.average) != model.layout.parameters:
            raise MessageError(
                f"A snapshot of {len(state.average)} numbers was refused: this model has "
                f"{model.layout.parameters} tuned parameters."
            )
        model.assign_state(state.average)

    def local_round(self, task: Task, batches: BatchStream, model: Any = None) -> LocalRound:
        """H optimiser steps from the server's state; the report carries the client's tensors.

        The model is back at the server's state afterwards: in a simulation the next client of the
        round begins from there.
        """
        import torch

        start = model.export_state()
        parameters = model.tuned_parameters()
        losses: list[float] = []
        skipped = 0
        for parameter_ in parameters:
            parameter_.requires_grad_(True)
        kind: Any = torch.optim.SGD if self.optimizer == "sgd" else torch.optim.AdamW
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
        for parameter_ in parameters:
            parameter_.grad = None
            parameter_.requires_grad_(False)
        trained = model.export_state()
        model.assign_state(start)
        yield from ()
        return Report(
            round=task.round,
            client=task.client,
            examples=len(batches),
            loss=float(np.mean(losses)) if losses else float("nan"),
            skipped=skipped,
            gradients=np.empty(0, np.float32),
            payload=trained.astype("<f4").tobytes(),
        )

    def rehearse(
        self, model: Any, batches: Sequence[Any], active: NDArray[np.bool_] | None = None
    ) -> None:
        """One backward pass on the first batch; the gradients are dropped."""
        parameters = model.tuned_parameters()
        for parameter_ in parameters:
            parameter_.requires_grad_(True)
        model.loss(batches[0]).backward()
        for parameter_ in parameters:
            parameter_.grad = None
            parameter_.requires_grad_(False)

    def check_report(self, report: Report, parameters: int) -> None:
        """Refuse other than one finite number for each tuned parameter."""
        found = len(report.payload) // 4
        if len(report.payload) != 4 * parameters or len(report.gradients):
            raise MessageError(
                f"A report of client {report.client} was refused: it has {found} numbers, not "
                f"{parameters}."
            )
        if not np.isfinite(_numbers(report.payload)).all():
            raise MessageError(
                f"A report of client {report.client} was refused: its tensors are not finite."
            )

    def aggregate(
        self, round_number: int, results: Sequence[ClientResult], state: "AveragedState"
    ) -> Entry:
        """Σ_i p_i θ_i, summed in float64 in the order of the clients."""
        total = np.zeros(len(_numbers(results[0].report.payload)), np.float64)
        for part in results:
            total += part.weight * _numbers(part.report.payload)
        state.coming = total.astype(np.float32)
        data = state.coming.astype("<f4").tobytes()
        return Entry(round_number, (), payload=hashlib.sha256(data).digest())

    def observe(
        self, entry: Entry, results: Sequence[ClientResult], state: "AveragedState"
    ) -> None:
        """The average that was just made becomes the state; on resume it comes from its file."""
        if state.coming is not None:
            state.average, state.coming = state.coming, None

    def kept(self, report: Report) -> Report:
        """Without the tensors."""
        return replace(report, payload=b"")


class AveragedState:
    """What the server of tensors remembers.

    Attributes:
        average: float32 [d], the tuned state after the last round; empty before the first.
        coming: that of the round that is being closed.
    """

    def __init__(self) -> None:
        self.average = np.empty(0, np.float32)
        self.coming: NDArray[np.float32] | None = None

    def encode(self) -> bytes:
        """The average."""
        return self.average.astype("<f4").tobytes()

    def restore(self, data: bytes) -> None:
        """Take over an average.

        Raises:
            MessageError: it is not a row of finite numbers.
        """
        if len(data) % 4 or not np.isfinite(_numbers(data)).all():
            raise MessageError(f"A snapshot of {len(data)} bytes was refused: it is no average.")
        self.average = _numbers(data)


def _numbers(data: bytes) -> NDArray[np.float32]:
    return np.frombuffer(data, "<f4").astype(np.float32)
