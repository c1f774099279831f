"""What a method or estimator does not go with, by its name: the only place that knows such names.

The predicates say what a name means; `rules` turns them into sentences. A name that a plug-in has
registered meets none of them. Imports neither PyTorch nor the sections, which import this.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fedforward.config import names

if TYPE_CHECKING:
    from fedforward.config.schema import Config


def is_first_order(method: str) -> bool:
    """Whether clients train by backpropagation and send tensors."""
    return method == "fedavg"


def has_candidates(method: str) -> bool:
    """Whether all directions come from a pool of candidate seeds, with an exact sum for each."""
    return method in ("fedkseed", "fedkseed-pro")


def has_active_blocks(method: str) -> bool:
    """Whether each client perturbs only the blocks that it is allotted."""
    return method == "zorba"


def is_one_sided(estimator: str) -> bool:
    """Whether a step takes directions + 1 probes, normalised by the spread of their losses."""
    return estimator == "fzoo"


def rules(config: "Config") -> Iterator[str]:
    """What is wrong with a configuration because of its method or estimator, a sentence each.

    The sentences have no full stop. Sections are valid by themselves when this is called.
    """
    method = config.method
    if is_first_order(method.name):
        yield from _first_order(config)
    if method.pool and not config.server.plain:
        yield (
            "server.learning_rate, server.state_decay and server.momentum change what "
            f"method.name = {method.name!r} keeps as exact sums over candidate seeds; leave them "
            "at 1, 1 and 0"
        )
    if not has_active_blocks(method.name):
        yield from _no_active_blocks(config)
    if method.mask != "none" and method.client_rates == "update-difference":
        yield (
            f"method.mask = {method.mask!r} does not go with method.client_rates = "
            "'update-difference', which measures all tuned weights"
        )
    if is_one_sided(method.estimator) and method.directions < 2:
        yield (
            f"method.estimator = {method.estimator!r} is normalised by the spread of its "
            f"directions' losses, and method.directions = {method.directions} has none; use "
            "method.directions = 2 or more (the paper has 8)"
        )
    if method.parameters and method.name in names.BUILT_IN["method"]:
        yield (
            f"method.parameters has {', '.join(method.parameters)}, and method.name = "
            f"{method.name!r} takes none beside the keys of [method]; leave them out"
        )


def _first_order(config: "Config") -> Iterator[str]:
    """Rules of methods without probes."""
    method, found = config.method, f"method.name = {config.method.name!r}"
    if method.objective != "loss":
        yield (
            f"method.objective = {method.objective!r} has no gradient, and {found} trains by "
            "backpropagation; use method.name = 'fedmezo' or method.objective = 'loss'"
        )
    if method.client_rates == "update-difference":
        yield (
            "method.client_rates = 'update-difference' needs the projected gradients of fedmezo; "
            f"with {found} allowed are 'fixed', 'random', 'loss' and 'loss-window'"
        )
    if config.model.offload == "host":
        yield (
            "model.offload = 'host' is for blocks that probes do not move, and "
            f"{found} has no probes; use model.offload = 'none'"
        )
    if config.run.memory_budget is not None:
        yield (
            f"run.memory_budget = {config.run.memory_budget!r} says how many probes share a "
            f"forward pass, and {found} has none; leave it out"
        )
    if method.mask != "none":
        yield f"method.mask = {method.mask!r} does not go with {found}, which moves all weights"
    if not config.server.plain or config.server.normalise:
        yield f"the [server] section works on steps, and {found} has tensors; leave it out"
    if not config.simulation.plain:
        yield (
            "the [simulation] section is for methods whose clients send scalars; with "
            f"{found} leave it out"
        )


def _no_active_blocks(config: "Config") -> Iterator[str]:
    """Rules of methods whose clients all perturb the same blocks."""
    for key in ("budgets", "active"):
        if getattr(config.planning, key) is not None:
            yield (
                f"planning.{key} says which blocks zorba allots to a client, and method.name is "
                f"{config.method.name!r}; leave it out"
            )
