"""The methods, one short file each, that read like their papers' algorithm boxes.

A method says what a client does in a round and how the server joins the reports. Adding one is
a file with these two functions and a line in `create`. No method imports PyTorch (`fedavg`, the
first-order baseline, aside).
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fedforward.messages import Contribution, Report, Task
from fedforward.steps import Evaluation, Probe

#: What a client does in a round: it yields probes and is sent their evaluations.
LocalRound = Generator[Sequence[Probe], Sequence[Evaluation], Report]


class BatchStream(Protocol):
    """A client's batches by step since the start of the run."""

    def __len__(self) -> int: ...
    def __getitem__(self, step: int) -> Any: ...


@dataclass(frozen=True, eq=False)
class Returned:
    """A report as the server holds it when a round closes.

    Attributes:
        weight: p_i, the client's share of the average; the weights of a round sum to one.
        learning_rate: η_i that the client was given.
        report: what it sent.
    """

    weight: float
    learning_rate: float
    report: Report


class Method(Protocol):
    """A method whose clients send scalars."""

    @property
    def name(self) -> str:
        """As in `method.name` of a configuration."""
        ...

    @property
    def local_steps(self) -> int:
        """H."""
        ...

    @property
    def directions(self) -> int:
        """Directions of each step; its gradients in a report times H."""
        ...

    def local_round(self, task: Task, batches: BatchStream, run_seed: int) -> LocalRound:
        """The client's part of a round."""
        ...

    def aggregate(self, returned: Sequence[Returned]) -> tuple[Contribution, ...]:
        """The server's part: the round's steps from the reports, sorted by client."""
        ...


@runtime_checkable
class FirstOrderMethod(Protocol):
    """A method whose clients train by backpropagation and send tensors."""

    @property
    def name(self) -> str:
        """As in `method.name` of a configuration."""
        ...

    @property
    def local_steps(self) -> int:
        """H."""
        ...

    @property
    def directions(self) -> int:
        """Directions of each step; its gradients in a report times H."""
        ...

    def train(self, task: Task, batches: BatchStream, model: Any) -> Report:
        """The client's part of a round; the model is back at the server's state afterwards."""
        ...

    def average(self, returned: Sequence[Returned]) -> NDArray[np.float32]:
        """The server's part: the tuned state after the round, float32 [d]."""
        ...
