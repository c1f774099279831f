"""From a configuration to the server's parts: the method, the settings, the ledger's header.

What a server across machines has, which holds no model: nothing here imports PyTorch.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

from fedforward.config.schema import Config
from fedforward.core.errors import FedForwardError
from fedforward.core.identity import ModelIdentity
from fedforward.core.registry import AGGREGATORS
from fedforward.directions import VERSION, Distribution
from fedforward.federation.client_privacy import ClientBound, SumNoise
from fedforward.federation.learning_rates import RateSettings
from fedforward.federation.ledger import Ledger
from fedforward.federation.privacy import Guarantee
from fedforward.federation.rate_search import RateSearch
from fedforward.federation.server import Allocate, ServerSettings
from fedforward.federation.server_optimizer import ServerOptimizer
from fedforward.methods.aggregation import Aggregator
from fedforward.methods.base import Method, method_class
from fedforward.methods.estimators import build_estimator
from fedforward.methods.parameters import check_parameters
from fedforward.methods.privacy import Mechanism
from fedforward.methods.report_filters import ReportFilter, build_filters


def build_method(config: Config) -> Method:
    """The method that the configuration names.

    Raises:
        FedForwardError: it, its estimator or its aggregator is unknown, or does not fit.
    """
    method = config.method
    kind = method_class(method.name)
    estimator = build_estimator(method.estimator, method.directions, method.mu)
    built: Method = kind(
        run_seed=config.run.seed,
        local_steps=method.local_steps,
        estimator=estimator,
        aggregator=aggregator_of(config),
        **check_parameters(kind, method.parameters),
    )
    return built


def aggregator_of(config: Config) -> Aggregator:
    """How the clients' reports become one update."""
    rule: Aggregator = AGGREGATORS.get(config.method.aggregator)
    tolerated = config.method.tolerated
    return rule.for_tolerated(1 if tolerated is None else tolerated)


def quorum_of(config: Config) -> int:
    """Reports without which a round is not closed: what is asked for, or what a rule needs."""
    federation = config.federation
    least = federation.secure_threshold if federation.secure_sums else 1
    return max(federation.quorum, aggregator_of(config).least, least)


def guarantee_of(config: Config) -> Guarantee | None:
    """What decides the run's privacy; None without `[privacy]`.

    Raises:
        FedForwardError: no noise is enough for `privacy.target_epsilon`, or the accountant is not
            installed.
    """
    privacy, method = config.privacy, config.method
    if privacy.clip is None:
        return None
    # A client's report has all of its data, and each is in each sum.
    whole = privacy.level == "client"
    given = Guarantee(
        clip=privacy.clip,
        noise_multiplier=privacy.noise_multiplier or 0.0,
        delta=privacy.delta or 0.0,
        batch_size=1 if whole else method.batch_size,
        examples=privacy.examples or 1,
        local_steps=1 if whole else method.local_steps,
        noise=privacy.mechanism,
        adjacency=privacy.adjacency,
    )
    if privacy.target_epsilon is not None:
        return _calibrated(given, privacy.target_epsilon, config.federation.rounds)
    # Without an accountant nothing begins.
    given.epsilon(config.federation.rounds)
    return given


@cache
def _calibrated(given: Guarantee, target: float, rounds: int) -> Guarantee:
    return given.calibrated(target, rounds)


def mechanism_of(config: Config) -> Mechanism | None:
    """Clipping and noise of every client, from the system's entropy; None where none adds noise.

    Raises:
        FedForwardError: as `guarantee_of`.
    """
    found = guarantee_of(config)
    if found is None or config.privacy.level == "client":
        return None
    return Mechanism(
        clip=found.clip,
        noise_multiplier=found.noise_multiplier,
        expected=found.batch_size,
        chance=found.chance,
        examples=found.examples,
        noise=found.noise,
    )


def filters_of(config: Config) -> tuple[ReportFilter, ...]:
    """What the terms have every client do to its reports, in this order."""
    filters = build_filters(config.method.report_filters, "method.report_filters")
    privacy = config.privacy
    if privacy.clip is None or privacy.level != "client":
        return tuple(filters)
    return (*filters, ClientBound(privacy.clip, privacy.mechanism))


def _sum_noise_of(config: Config) -> SumNoise | None:
    """What the server adds to sums; None where it adds nothing."""
    found = guarantee_of(config)
    if found is None or config.privacy.level != "client":
        return None
    return SumNoise.of(found.clip, found.noise_multiplier, found.noise)


def _privacy_of(config: Config) -> list[Any] | None:
    """What a ledger has of its noise: C, σ, δ, q, kind, adjacency and level; None without."""
    found = guarantee_of(config)
    if found is None:
        return None
    numbers = [found.clip, found.noise_multiplier, found.delta, found.chance]
    return [*numbers, found.noise, found.adjacency, config.privacy.level]


def ledger_header(config: Config, model: ModelIdentity) -> dict[str, Any]:
    """What the ledger of a run is bound to: enough to replay it, and to refuse another's."""
    # The file with the initial A is known by its digest.
    lora = (
        config.lora.model_dump(exclude={"init", "init_file"})
        if config.model.tune == "lora"
        else None
    )
    return {
        # 7: rounds may take others back.
        "format": 7,
        "direction_version": VERSION,
        "distribution": config.method.distribution,
        "directions": config.method.directions,
        "run_seed": config.run.seed,
        "method": config.method.name,
        "parameters": config.method.parameters,
        "mask": _mask_of(config, model),
        "classes": list(model.classes) or None,
        "layout": model.layout.fingerprint,
        "base": model.base,
        "adapter": model.adapter or None,
        "initial_a": model.initial_a or None,
        "lora": lora,
        "secure_sums": config.federation.secure_sums or None,
        "privacy": _privacy_of(config),
    }


def _mask_of(config: Config, model: ModelIdentity) -> list[Any] | None:
    """What says which weights move: a kind with its share, or a file's digest; None is all."""
    method = config.method
    if method.mask == "none":
        return None
    return [method.mask, model.mask if method.mask == "file" else method.density]


def check_header(ledger: Ledger, header: dict[str, Any]) -> None:
    """Refuse a ledger that was made with another base model, layout or direction version."""
    for key, value in header.items():
        if ledger.header.get(key) != value:
            what = {
                "base": "the base model has other weights than that of the run",
                "adapter": "the adapter that it began with (model.adapter) is another",
                "initial_a": "the A that its adapters began with (lora.init_file) is another",
                "mask": "the mask (method.mask, method.density or method.mask_file) is another",
                "data": "the data are not those of the run, or have changed",
                "classes": "the data have other classes than when the run started",
                "lora": "the adapters are set up in another way",
                "privacy": "the noise that its rounds have, with C, delta and chance of an example "
                "(privacy, and federation.rounds for target_epsilon), is another",
                "layout": "the model's tuned tensors are not those of the run",
                "direction_version": "it was made with another version of the directions",
            }.get(key, f"its {key} differs")
            raise FedForwardError(
                f"{ledger.path}: {what} ({ledger.header.get(key)!r} there, {value!r} here). "
                "Restore what the run was started with."
            )


def server_settings(
    config: Config,
    model: ModelIdentity,
    examples: Sequence[int],
    allocate: Allocate | None = None,
) -> ServerSettings:
    """The server's view of the run.

    Args:
        examples: training examples of each client.
    """
    method = config.method
    return ServerSettings(
        run_seed=config.run.seed,
        examples=tuple(examples),
        participation=config.federation.participation,
        weights=config.federation.weights,
        weight_ratio=config.federation.weight_ratio,
        weight_share=config.federation.weight_share,
        rates=RateSettings(
            base=1.0 if method.learning_rate == "auto" else method.learning_rate,
            spread=method.alpha,
            client_rates=method.client_rates,
            schedule=method.schedule,
            warmup=method.warmup,
            rounds=config.federation.rounds,
            final=method.final,
        ),
        layout=model.layout,
        distribution=Distribution(method.distribution),
        quorum=quorum_of(config),
        deadline=config.federation.deadline or math.inf,
        optimizer=ServerOptimizer(
            learning_rate=config.server.learning_rate,
            decay=config.server.state_decay,
            momentum=config.server.momentum,
            window=config.server.window,
            normalise=config.server.normalise,
        ),
        allocate=allocate,
        search=RateSearch(method.mu, method.directions) if method.learning_rate == "auto" else None,
        state_bytes=model.state_bytes,
        secure_sums=config.federation.secure_sums,
        sum_noise=_sum_noise_of(config),
    )
