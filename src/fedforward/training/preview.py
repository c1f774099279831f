"""What a run will need, before it runs: memory, bytes on the wire, and who perturbs which blocks.

Builds the same parts as a run does, from the same configuration, and trains nothing.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedforward.config.schema import Config
from fedforward.core.errors import FedForwardError
from fedforward.core.logs import PHASES
from fedforward.messages.report import NO_FLOATS, ClientResult, Report
from fedforward.messages.task import Task
from fedforward.methods.base import Method
from fedforward.models.base import CausalModel
from fedforward.models.choices import with_choices
from fedforward.models.loading import longest_sequence
from fedforward.planning.activation import UNLIMITED, Activation, pareto
from fedforward.planning.allocator import Allocator
from fedforward.planning.budgets import Resources, allocator, survey
from fedforward.training import activation_cache
from fedforward.training import build as experiment
from fedforward.training.assembly import build_method

#: How much of the surrogate may be given up, for the Pareto front.
EPSILONS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class Preview:
    """A plan and what it was made from.

    Attributes:
        config: of the run.
        blocks: names of the layout's blocks.
        block_sizes: tuned parameters of each.
        examples: of each client.
        resources: budgets, memory model, weights of blocks.
        activation: who perturbs what, with certificates; None where all clients perturb all.
        front: one activation for each ε, or nothing.
        up: encoded bytes of a client's report.
        down: encoded bytes of its task, with the entry of one round.
        parameters: that are tuned.
        kept_bytes: that activations kept by example come to; 0 if none are.
    """

    config: Config
    blocks: tuple[str, ...]
    block_sizes: tuple[int, ...]
    examples: tuple[int, ...]
    resources: Resources
    activation: Activation | None
    front: list[Activation]
    up: int
    down: int
    parameters: int
    kept_bytes: int = 0

    @property
    def matrix(self) -> NDArray[np.bool_]:
        """Who perturbs what, bool [clients, blocks]."""
        if self.activation is not None:
            return self.activation.matrix
        return np.ones((len(self.examples), len(self.blocks)), np.bool_)

    def peaks(self, client: int) -> list[int]:
        """Predicted bytes of a client's step with 0, 1, … active blocks, the last ones first.

        Those take the least time: what lies below the first of them is shared by all probes.
        """
        memory, shape = self.resources.memory, self.resources.shapes[client]
        count = len(self.blocks)
        return [memory.peak(np.arange(count) >= count - k, *shape) for k in range(count + 1)]

    def predicted(self, client: int, *, streams: bool | None = None) -> int:
        """Predicted bytes of a client's step with the blocks that it was given.

        Args:
            streams: as if `model.offload` were "host" or not; None takes it as it is.
        """
        memory, shape = self.resources.memory, self.resources.shapes[client]
        if streams is not None:
            memory = replace(memory, streams=streams)
        return int(memory.peak(self.matrix[client], *shape))

    def as_json(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        limits = self.resources.budgets.tolist()
        return {
            "method": self.config.method.name,
            "blocks": list(self.blocks),
            "block_sizes": list(self.block_sizes),
            "block_weights": self.resources.weights.tolist(),
            "clients": [
                {
                    "client": client,
                    "examples": examples,
                    "budget_bytes": None if limits[client] == UNLIMITED else limits[client],
                    "peak_bytes_by_active_blocks": self.peaks(client),
                    "active": [
                        name
                        for name, on in zip(self.blocks, self.matrix[client], strict=True)
                        if on
                    ],
                    "predicted_bytes": self.predicted(client),
                    "predicted_bytes_offloaded": self.predicted(client, streams=True),
                }
                for client, examples in enumerate(self.examples)
            ],
            "activation": None if self.activation is None else certificate(self.activation),
            "activation_cache_bytes": self.kept_bytes,
            "pareto": [certificate(point) for point in self.front],
            "bytes_per_client_round": {"up": self.up, "down": self.down},
        }


def certificate(plan: Activation) -> dict[str, Any]:
    """What was reached and what is proven of it."""
    return {
        "epsilon": plan.epsilon,
        "objective": plan.objective,
        "surrogate": plan.surrogate,
        "surrogate_bound": plan.bound,
        "surrogate_gap": plan.gap,
        "memory_total_bytes": int(plan.memory.sum()),
        "memory_worst_bytes": int(plan.memory.max()),
        "memory_bound_bytes": plan.memory_bound,
        "memory_gap": plan.memory_gap,
        "coverage": plan.coverage.tolist(),
        "active_blocks": int(plan.matrix.sum()),
        "seconds": plan.seconds,
    }


def preview(config: Config) -> Preview:
    """Build the parts of a run and plan it.

    Raises:
        FedForwardError: for whatever the run would refuse, and for budgets that cannot be kept.
    """
    method = build_method(config)
    if not method.capabilities.forward_only:
        raise FedForwardError(
            f"method.name = {config.method.name!r} trains by backpropagation; `fedforward plan` "
            "is for methods of forward passes."
        )
    if config.model.head == "classification":
        raise FedForwardError(
            "model.head = 'classification' has no predictions of memory, and `fedforward plan` is "
            "made of them. `fedforward run` measures what it takes."
        )
    PHASES.info("loading the model")
    model, tokenizer = experiment.build_model(config, experiment.resolve_plan(config), ())
    PHASES.info("reading the data")
    reader = experiment.corpus_reader(config)
    corpus = experiment.read_corpus(config, reader, tokenizer, longest_sequence(model.network))
    examples = tuple(len(part) for part in corpus.clients)
    PHASES.info("measuring what the model needs")
    steps = experiment.widest_steps(config, corpus)
    if config.data.label_words:
        model.plan = with_choices(model, model.plan)
        collate = experiment.collate_of(config, tokenizer, model)
        steps = experiment.widest_steps(config, corpus, collate)
    model.plan = activation_cache.planned(config, model, corpus, steps)
    kept = activation_cache.largest_bytes(model, corpus)
    resources = survey(config, model, steps, kept)
    planner: Allocator | None = None
    front: list[Activation] = []
    if method.capabilities.blocks:
        PHASES.info("planning blocks")
        counted = config.planning.active is not None
        planner = allocator(config, model, examples, None if counted else resources)
        if not counted:
            front = pareto(planner.problem, EPSILONS, config.planning.objective)
    activation = None if planner is None else planner.plan(range(len(examples)))
    up, down = traffic(method, model, examples, activation)
    return Preview(
        config=config,
        blocks=model.layout.blocks,
        block_sizes=model.layout.block_sizes,
        examples=examples,
        resources=resources,
        activation=activation,
        front=front,
        up=up,
        down=down,
        parameters=model.layout.parameters,
        kept_bytes=kept,
    )


def traffic(
    method: Method, model: CausalModel, examples: tuple[int, ...], plan: Activation | None
) -> tuple[int, int]:
    """Encoded bytes of a client's report and task in a round, from messages that are made up.

    The task carries the entry of the round before; the digest comes every tenth round.
    """
    count = method.local_steps * method.directions
    reports = [
        method.with_scalars(
            Report(0, client, size, 1.0, 0, NO_FLOATS), np.arange(count, dtype=np.float32)
        )
        for client, size in enumerate(examples)
    ]
    rows = [None] * len(reports) if plan is None else list(plan.matrix)
    results = [
        ClientResult(1 / len(reports), 1e-3, report, row)
        for report, row in zip(reports, rows, strict=True)
    ]
    state = method.new_state()
    entry = method.aggregate(0, results, state)
    method.observe(entry, results, state)
    payload = method.task_payload(state)
    tasks = [
        Task(1, client, 1e-3, False, (entry,), blocks=row, payload=payload)
        for client, row in enumerate(rows)
    ]
    up = max(len(report.encode()) for report in reports)
    return up, round(sum(len(task.encode()) for task in tasks) / len(tasks))
