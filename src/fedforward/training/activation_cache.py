"""`run.activation_cache`: whether a run keeps activations, and how much memory that may take.

Whether it does is settled when a run starts and stored in its plan, because the last bits of losses
depend on it. How much memory it may take is this machine's affair, and may change on resume.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace

from fedforward.config.schema import Config
from fedforward.core.batches import Batch
from fedforward.core.errors import FedForwardError
from fedforward.core.machine import available_memory
from fedforward.core.steps import ProbePlan
from fedforward.core.units import format_bytes
from fedforward.data.corpus import Corpus
from fedforward.data.examples import lengths
from fedforward.models.base import CausalModel

LOGGER = logging.getLogger("fedforward.training.activation_cache")

#: Most that "auto" takes, and its share of the memory that is free when a run starts, or of
#: `run.memory_budget`.
MOST_BYTES, SHARE = 1 << 30, 4


def allowed_bytes(config: Config) -> int:
    """What kept activations may take by `run.activation_cache`; 0 for "none"."""
    if (given := config.run.cache_bytes) is not None:
        return given
    limits = [MOST_BYTES]
    for known in (available_memory(), config.run.budget):
        limits += [] if known is None else [known // SHARE]
    return min(limits)


def planned(
    config: Config, model: CausalModel, corpus: Corpus, batches: Sequence[Batch]
) -> ProbePlan:
    """The plan of a new run, whose model keeps activations from now on if they can be kept.

    Args:
        batches: the longest of each client.

    Raises:
        FedForwardError: `run.activation_cache` is an amount that does not hold one batch.
    """
    plan, most = model.plan, allowed_bytes(config)
    asked = config.run.activation_cache not in ("auto", "none")
    every = not min(model.prefix.begins, default=0)
    if config.run.activation_cache == "none" or (every and not asked):
        return plan
    reason = model.keep_activations(most)
    if not reason and not asked:
        reason = _why_no_use(model, corpus, batches)
        if reason:
            model.drop_activations()
    if reason:
        note = LOGGER.warning if asked else LOGGER.info
        note("run.activation_cache = %r keeps nothing: %s.", config.run.activation_cache, reason)
        return replace(plan, not_kept=reason)
    _check(config, model, batches)
    return replace(plan, keeps_activations=True)


def resumed(config: Config, model: CausalModel, batches: Sequence[Batch]) -> None:
    """Let the model of a run that was started before keep activations if that one did.

    Raises:
        FedForwardError: it did, and here they cannot be kept; see `planned` as well.
    """
    if not model.plan.keeps_activations:
        return
    reason = model.keep_activations(allowed_bytes(config))
    if reason:
        raise FedForwardError(
            "This run was started with kept activations (run.activation_cache), and here they "
            f"cannot be kept: {reason}. Resume it with the versions of torch and transformers "
            "that environment.json names."
        )
    _check(config, model, batches)


def _why_no_use(model: CausalModel, corpus: Corpus, batches: Sequence[Batch]) -> str:
    """Why it would not help to keep what can be kept; "" if it would."""
    assert model.kept is not None
    most = model.kept.most_bytes
    if least_bytes(model, batches) > most:
        return f"one batch takes more than the {format_bytes(most)} that are free for it"
    every = _tokens(corpus) * model.kept.bytes_per_token
    if model.device.type != "cpu" and every > most:
        # Rows that run alone do not fill an accelerator. On a CPU they cost what a batch does.
        return f"all rows take {format_bytes(every)}, and {format_bytes(most)} are free for them"
    return ""


def _tokens(corpus: Corpus) -> int:
    """Of all examples, training and held-out."""
    return sum(int(lengths(part).sum()) for part in (*corpus.clients, corpus.heldout))


def _check(config: Config, model: CausalModel, batches: Sequence[Batch]) -> None:
    given, least = config.run.cache_bytes, least_bytes(model, batches)
    if given and given < least:
        assert model.kept is not None
        raise FedForwardError(
            f"run.activation_cache = {config.run.activation_cache!r} is too small: what enters "
            f"block {model.kept.lower.depth} takes {format_bytes(least)} for the longest batch. "
            f"Give at least {-(-least // 1000)} KB, or 'none'."
        )


def least_bytes(model: CausalModel, batches: Sequence[Batch]) -> int:
    """What the rows of the largest batch take at most."""
    assert model.kept is not None
    tokens = max((batch.tokens.size for batch in batches), default=0)
    return tokens * model.kept.bytes_per_token


def largest_bytes(model: CausalModel, corpus: Corpus) -> int:
    """What kept activations can come to over a run; 0 if none are kept."""
    if model.kept is None:
        return 0
    return min(model.kept.most_bytes, _tokens(corpus) * model.kept.bytes_per_token)


def described(model: CausalModel, corpus: Corpus) -> str:
    """What is kept and what it takes, in words; "" if nothing is."""
    if model.kept is None:
        return ""
    size = largest_bytes(model, corpus) / 1e6
    return f"what enters block {model.kept.lower.depth} kept by example: at most {size:.1f} MB"
