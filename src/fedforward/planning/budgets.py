"""What the clients of a run have and need: budgets, predicted memory, and how much blocks matter.

From a configuration, a model and the clients' examples to the problem that `activation` solves.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from fedforward.config.schema import Config
from fedforward.core.batches import Batch
from fedforward.core.errors import FedForwardError
from fedforward.core.machine import available_memory
from fedforward.core.registry import METHODS
from fedforward.core.seeds import derive
from fedforward.core.steps import NO_STEPS, Steps
from fedforward.core.units import parse_bytes
from fedforward.methods.estimators import TwoPoint
from fedforward.models import devices
from fedforward.models.base import CausalModel
from fedforward.planning.activation import UNLIMITED, Problem
from fedforward.planning.allocator import Allocator, counted
from fedforward.planning.memory.calibrate import calibrate
from fedforward.planning.memory.model import MemoryModel

#: Directions of a sensitivity measurement, on a batch each.
SENSITIVITY_PASSES = 8


@dataclass(frozen=True)
class Resources:
    """What every client has and needs.

    Attributes:
        memory: predicts a client's peak.
        shapes: rows and tokens a row of each client's widest step.
        budgets: int64 [N], bytes; `UNLIMITED` where nothing was said.
        weights: float64 [B], how much blocks matter, sum 1.
    """

    memory: MemoryModel
    shapes: tuple[tuple[int, int], ...]
    budgets: NDArray[np.int64]
    weights: NDArray[np.float64]


def survey(
    config: Config, model: CausalModel, longest: Sequence[Batch], kept_bytes: int = 0
) -> Resources:
    """Measure what the model needs, and read what the clients have.

    Args:
        longest: each client's batch of its longest examples, in the order of the clients.
        kept_bytes: that kept activations will come to, in host memory.
    """
    shapes = tuple((len(batch.tokens), batch.tokens.shape[1]) for batch in longest)
    memory = calibrate(
        model,
        sorted(set(shapes)),
        config.method.probes_per_step,
        caches_trajectory=config.method.local_steps > 1,
        from_base=METHODS.get(config.method.name).capabilities.from_base,
    )
    if model.device.type == "cpu":
        memory = replace(memory, kept=kept_bytes)
    sizes = np.array(model.layout.block_sizes, dtype=np.float64)
    weights = sizes / sizes.sum()
    if config.planning.weights == "sensitivity":
        weights = sensitivity(model, longest, config.method.mu, config.run.seed)
    return Resources(memory, shapes, _budgets(config, model, len(longest)), weights)


def _budgets(config: Config, model: CausalModel, clients: int) -> NDArray[np.int64]:
    given = config.planning.budgets
    if given is None:
        return np.full(clients, UNLIMITED, np.int64)
    if given == "measured":
        return np.full(clients, memory_there(model.device), np.int64)
    texts = [given] * clients if isinstance(given, str) else given
    return np.array([parse_bytes(text) for text in texts], dtype=np.int64)


def memory_there(device: torch.device) -> int:
    """Bytes that a process could still take on a device.

    On an accelerator what PyTorch's allocator holds unused counts as free.

    Raises:
        FedForwardError: the system does not tell.
    """
    if devices.is_accelerator(device):
        return devices.room(device)
    available = available_memory()
    if available is None:
        raise FedForwardError(
            "planning.budgets = 'measured' is not possible here: this system does not tell how "
            "much memory is available. Give an amount, such as '6 GiB'."
        )
    return available


def sensitivity(
    model: CausalModel, batches: Sequence[Batch], mu: float, run_seed: int
) -> NDArray[np.float64]:
    """How much the loss feels each block: E g² along directions within it, float64 [B], sum 1.

    For Gaussian directions E g² is the squared norm of the block's gradient. A block that the loss
    does not feel at all keeps a millionth, so that it stays coverable.
    """
    blocks = len(model.layout.blocks)
    squares = np.zeros(blocks)
    estimator = TwoPoint(1, mu)
    for number in range(SENSITIVITY_PASSES):
        direction = Steps.of([derive(run_seed, "sensitivity", number)], [1.0])
        batch = batches[number % len(batches)]
        for block in range(blocks):
            own = direction.within(np.arange(blocks) == block)
            evaluations = model.evaluate(estimator.probes(batch, NO_STEPS, [own]))
            gradients, _ = estimator.gradients(evaluations)
            squares[block] += float(np.nan_to_num(gradients[0])) ** 2
    model.clear_cache()
    squares = np.maximum(squares, 1e-6 * max(squares.sum(), 1e-30))
    weights: NDArray[np.float64] = squares / squares.sum()
    return weights


def allocator(
    config: Config, model: CausalModel, examples: Sequence[int], resources: Resources | None
) -> Allocator:
    """Plans which blocks clients perturb.

    Args:
        examples: of each client.
        resources: of the clients; None where `planning.active` counts blocks.

    Raises:
        FedForwardError: the budgets cannot be kept.
    """
    planning, layout = config.planning, model.layout
    clients = len(examples)
    equal = config.federation.weights == "equal"
    shares = np.ones(clients) if equal else np.array(examples, np.float64)
    names = tuple(map(str, range(clients)))
    if resources is None:
        assert planning.active is not None
        return counted(planning, layout, list(shares), planning.active, names, "planning.active")
    memory = resources.memory
    problem = Problem(
        shares=shares,
        weights=resources.weights,
        dimensions=np.array(layout.block_sizes, dtype=np.float64),
        fixed=np.array([memory.fixed(*shape) for shape in resources.shapes], dtype=np.int64),
        costs=np.tile(memory.cost, (clients, 1)),
        budgets=resources.budgets,
        dimension_penalty=planning.dimension_penalty,
        client_names=names,
        block_names=layout.blocks,
    )
    return Allocator(problem, planning.epsilon, planning.objective)
