"""What a method or estimator does not go with, by what it declares of itself.

The registries are asked for `Capabilities` and settings; no rule knows a method's name. Imports
no PyTorch.
"""

from collections.abc import Iterator
from typing import Protocol

from fedforward.config.method_sections import (
    FederationSection,
    MethodSection,
    PlanningSection,
    PrivacySection,
    ServerSection,
)
from fedforward.config.privacy_rules import LOSS_RATES, with_privacy
from fedforward.config.run_section import RunSection
from fedforward.config.sections import DataSection, LoraSection, ModelSection
from fedforward.config.simulation import SimulationSection
from fedforward.core.errors import FedForwardError
from fedforward.core.registry import AGGREGATORS, REPORT_FILTERS
from fedforward.messages.secure import MOST_SITES
from fedforward.methods.aggregation import Aggregator
from fedforward.methods.base import Capabilities, method_class, usable_methods
from fedforward.methods.estimators import build_estimator
from fedforward.methods.parameters import check_parameters
from fedforward.methods.report_filters import build_filters

#: Objectives that backpropagation can optimise.
WITH_GRADIENT = ("loss", "choice")


class SectionsRead(Protocol):
    """What the rules read of a configuration."""

    @property
    def model(self) -> ModelSection:
        """The section `[model]`."""
        ...

    @property
    def lora(self) -> LoraSection:
        """The section `[lora]`."""
        ...

    @property
    def data(self) -> DataSection:
        """The section `[data]`."""
        ...

    @property
    def privacy(self) -> PrivacySection:
        """The section `[privacy]`."""
        ...

    @property
    def method(self) -> MethodSection:
        """The section `[method]`."""
        ...

    @property
    def server(self) -> ServerSection:
        """The section `[server]`."""
        ...

    @property
    def federation(self) -> FederationSection:
        """The section `[federation]`."""
        ...

    @property
    def planning(self) -> PlanningSection:
        """The section `[planning]`."""
        ...

    @property
    def simulation(self) -> SimulationSection:
        """The section `[simulation]`."""
        ...

    @property
    def run(self) -> RunSection:
        """The section `[run]`."""
        ...

    @property
    def objective(self) -> str:
        """What the run optimises."""
        ...


def capabilities(method: str) -> Capabilities:
    """What a method of that name can do.

    Raises:
        FedForwardError: there is none, or the package that has it cannot be imported.
    """
    return method_class(method).capabilities


def able(**wanted: bool) -> str:
    """The methods with such capabilities, for a sentence."""
    names = [
        name
        for name, found in usable_methods().items()
        if all(getattr(found.capabilities, key) == value for key, value in wanted.items())
    ]
    return ", ".join(map(repr, names))


def rules(config: SectionsRead) -> Iterator[str]:
    """What is wrong with a configuration because of its method or estimator, a sentence each.

    The sentences have no full stop. Sections are valid by themselves when this is called.
    """
    method, can = config.method, capabilities(config.method.name)
    if not can.forward_only:
        yield from _sends_tensors(config)
    elif not can.contributions and not config.server.plain:
        yield (
            "server.learning_rate, server.state_decay and server.momentum scale and repeat the "
            f"steps of a round, and method.name = {method.name!r} writes rounds in a form of its "
            "own; leave them at 1, 1 and 0"
        )
    if config.run.on_divergence == "rollback" and not can.replayable:
        yield (
            "run.on_divergence = 'rollback' makes an earlier state again from the ledger, and the "
            f"one of method.name = {method.name!r} has no steps to replay; leave it at 'stop'"
        )
    if can.votes:
        yield from _votes(config)
    if not can.blocks:
        yield from _same_blocks(config)
    if not can.masks and method.mask != "none":
        yield (
            f"method.mask = {method.mask!r} does not go with method.name = {method.name!r}, which "
            "moves all weights"
        )
    if method.mask != "none" and method.client_rates == "update-difference":
        yield (
            f"method.mask = {method.mask!r} does not go with method.client_rates = "
            "'update-difference', which measures all tuned weights"
        )
    aggregator = AGGREGATORS.get(method.aggregator)
    if not isinstance(aggregator, Aggregator):
        yield (
            f"method.aggregator = {method.aggregator!r} is {aggregator!r}, which is no Aggregator; "
            "mend or remove the package that adds it"
        )
    elif aggregator.shared_directions and not can.shared_directions:
        yield (
            f"method.aggregator = {method.aggregator!r} compares the scalars of clients, and those "
            f"of method.name = {method.name!r} multiply different directions; use "
            f"{able(shared_directions=True)}, or method.aggregator = 'mean'"
            + (" or 'clipped-mean'" if can.scales else "")
        )
    else:
        yield from _aggregator_fits(config, aggregator)
    try:
        build_estimator(method.estimator, method.directions, method.mu)
        check_parameters(method_class(method.name), method.parameters)
        filters = build_filters(method.report_filters, "method.report_filters")
    except FedForwardError as error:
        yield str(error).removesuffix(".")
        return
    if method.client_rates in LOSS_RATES and any(
        getattr(item, "withholds_loss", False) for item in filters
    ):
        yield (
            f"method.client_rates = {method.client_rates!r} reads the losses that "
            f"method.report_filters = {list(method.report_filters)!r} withholds; use "
            "'fixed', 'random' or 'update-difference'"
        )
    yield from _automatic_rate(config, can)
    if config.privacy.on:
        yield from with_privacy(config, can, able(private=True))
    if config.federation.secure_sums:
        yield from _secure_sums(config, can)


def _secure_sums(config: SectionsRead, can: Capabilities) -> Iterator[str]:
    """Rules of federation.secure_sums: the server has a sum and no single report."""
    method, federation, key = config.method, config.federation, "federation.secure_sums = true"
    if not can.sums:
        yield (
            f"{key} is for methods whose server needs sums alone, and method.name = "
            f"{method.name!r} needs single reports; use {able(sums=True)}"
        )
    for name, found, legal, why in (
        ("method.aggregator", method.aggregator, "mean", "compares single reports"),
        ("method.client_rates", method.client_rates, "fixed", "gives clients rates of their own"),
        ("federation.weights", federation.weights, "equal", "weighs single reports"),
        ("federation.participation", federation.participation, 1.0, "leaves out some of the sites"),
    ):
        if found != legal:
            yield f"{key} adds reports up as they are, and {name} = {found!r} {why}; use {legal!r}"
    if method.learning_rate == "auto":
        yield (
            f"{key} hides what single clients measure, which method.learning_rate = 'auto' reads; "
            "give method.learning_rate a number, such as 1e-3"
        )
    if config.server.normalise:
        yield (
            f"{key} hides the sizes of single reports, which server.normalise = true reads; leave "
            "it out"
        )
    if config.simulation.byzantine:
        yield (
            f"{key} hides who reports wrongly, so simulation.byzantine = "
            f"{config.simulation.byzantine:g} cannot be tried with it; leave one of them out"
        )
    if config.simulation.attack not in ("none", "label-flip"):
        yield (
            f"{key} has reports that are parts of a sum, and simulation.attack = "
            f"{config.simulation.attack!r} changes single reports; use 'label-flip', or leave one "
            "of them out"
        )
    least, most = federation.secure_threshold, federation.clients_of_a_round
    if not least <= most <= MOST_SITES:
        yield (
            f"{key} needs federation.secure_threshold = {least} to {MOST_SITES} clients in each "
            f"round, and there are {most}; change federation.clients"
        )


def _automatic_rate(config: SectionsRead, can: Capabilities) -> Iterator[str]:
    """Rules of method.learning_rate = "auto"."""
    method, server, key = config.method, config.server, "method.learning_rate = 'auto'"
    if method.learning_rate != "auto":
        return
    if not can.forward_only:
        yield (
            f"{key} measures the loss along sums of directions, and the clients of method.name = "
            f"{method.name!r} send tensors; give a number, such as 1e-3"
        )
        return
    for found, does in (
        (f"server.momentum = {server.momentum:g}" if server.momentum else "", "repeats steps"),
        ("server.normalise = true" if server.normalise else "", "scales them as well"),
    ):
        if found:
            yield (
                f"{key} sets the size of a round's steps by what they do, and {found} {does}; "
                "leave it out, or give method.learning_rate a number"
            )
    for name in method.report_filters:
        if getattr(REPORT_FILTERS.get(name.partition(":")[0]), "withholds_loss", False):
            yield (
                f"{key} reads losses, which method.report_filters = "
                f"{list(method.report_filters)!r} withholds; give method.learning_rate a number"
            )


def _votes(config: SectionsRead) -> Iterator[str]:
    """Rules of methods whose clients send signs alone."""
    method, found = config.method, f"method.name = {config.method.name!r}"
    if method.aggregator != "mean":
        yield (
            f"method.aggregator = {method.aggregator!r} joins scalars, and the clients of {found} "
            "vote: their majority is the update; leave it out"
        )
    if method.learning_rate == "auto":
        yield (
            f"method.learning_rate = 'auto' follows the size of projected gradients, and with "
            f"{found} only their signs are sent; give a number, such as 1e-3"
        )
    if config.server.normalise:
        yield (
            f"server.normalise = true divides by the size of projected gradients, and with {found} "
            "only their signs are sent; leave it out"
        )


def _sends_tensors(config: SectionsRead) -> Iterator[str]:
    """Rules of methods that train by backpropagation."""
    method, found = config.method, f"method.name = {config.method.name!r}"
    if config.objective not in WITH_GRADIENT:
        yield (
            f"method.objective = {config.objective!r} has no gradient, and {found} trains by "
            f"backpropagation; use method.objective = {' or '.join(map(repr, WITH_GRADIENT))}, or "
            "one of " + able(forward_only=True)
        )
    if method.client_rates == "update-difference":
        yield (
            "method.client_rates = 'update-difference' needs projected gradients; "
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
    if config.run.activation_cache not in ("auto", "none"):
        yield (
            f"run.activation_cache = {config.run.activation_cache!r} keeps what probes share, and "
            f"{found} has none; leave it out"
        )
    if not config.server.plain or config.server.normalise:
        yield f"the [server] section works on steps, and {found} has tensors; leave it out"
    if not config.simulation.plain:
        yield (
            "the [simulation] section is for methods whose clients send scalars; with "
            f"{found} leave it out"
        )


def _aggregator_fits(config: SectionsRead, aggregator: Aggregator) -> Iterator[str]:
    """What a rule needs of the method and of the number of clients."""
    method, federation = config.method, config.federation
    named = f"method.aggregator = {method.aggregator!r}"
    if aggregator.scales is not None and not capabilities(method.name).scales:
        yield (
            f"{named} shortens clients' updates, and method.name = {method.name!r} joins them in "
            f"its own way; use {able(scales=True)}, or method.aggregator = 'mean'"
        )
    if aggregator.tolerating is None:
        if method.tolerated is not None:
            yield (
                f"method.tolerated = {method.tolerated} is a number for method.aggregator = "
                f"'trimmed-mean', 'krum' or 'multi-krum', and it is {method.aggregator!r}; leave "
                "it out"
            )
        return
    tolerated = 1 if method.tolerated is None else method.tolerated
    needed, clients = aggregator.clients_for(tolerated), federation.clients_of_a_round
    if clients < needed:
        yield (
            f"{named} with method.tolerated = {tolerated} needs {needed} clients in each round, "
            f"and there are {clients}; lower method.tolerated, or raise federation.clients"
        )


def _same_blocks(config: SectionsRead) -> Iterator[str]:
    """Rules of methods whose clients all perturb the same blocks."""
    for key in ("budgets", "active"):
        if getattr(config.planning, key) is not None:
            yield (
                f"planning.{key} says which blocks a client is given, and with method.name = "
                f"{config.method.name!r} all clients have the same; leave it out, or use "
                f"{able(blocks=True)}"
            )
