"""What `[privacy]` does not go with: whatever else would tell of the examples, or need to know.

Imports no PyTorch.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fedforward.config.fields import AT_SITES
from fedforward.core.registry import ESTIMATORS
from fedforward.methods.base import Capabilities

if TYPE_CHECKING:
    from fedforward.config.rules import SectionsRead

#: `method.client_rates` that follow the losses of clients.
LOSS_RATES = ("loss", "loss-window")


def with_privacy(config: "SectionsRead", can: Capabilities, able: str) -> Iterator[str]:
    """A sentence without full stop for each key that does not go with `[privacy]`.

    Args:
        able: the methods that can be private, for a sentence.
    """
    method, federation, key = config.method, config.federation, "[privacy]"
    if config.privacy.level == "client":
        yield from _of_clients(config)
        return
    if not can.private:
        yield (
            f"{key} gives noise to projected gradients before a client moves, and method.name = "
            f"{method.name!r} does not report them as they are; use {able}"
        )
    if not hasattr(ESTIMATORS.get(method.estimator), "by_example"):
        yield (
            f"{key} clips what each example says, and method.estimator = {method.estimator!r} "
            "cannot tell examples apart; use 'two-point' or 'one-sided'"
        )
    if ":" in config.objective:
        yield (
            f"{key} clips what each example says, and method.objective = {config.objective!r} "
            "is a function of all examples of a batch; use one that is not, such as 'loss'"
        )
    if method.learning_rate == "auto":
        yield (
            f"{key} withholds the losses that method.learning_rate = 'auto' reads; give "
            "method.learning_rate a number, such as 1e-3"
        )
    if method.client_rates in LOSS_RATES:
        yield (
            f"{key} withholds the losses that method.client_rates = {method.client_rates!r} "
            "reads; use 'fixed', 'random' or 'update-difference'"
        )
    if federation.weights != "equal":
        yield (
            f"{key} withholds how many examples a client has, which federation.weights = "
            f"{federation.weights!r} reads; use 'equal'"
        )
    if federation.secure_sums:
        yield (
            f"{key} of examples has no form yet for federation.secure_sums = true, whose sums hold "
            "losses; leave one of them out, or set privacy.level = 'client'"
        )
    yield from _aligned(config)
    if config.privacy.examples is not None and method.batch_size > config.privacy.examples:
        yield (
            f"method.batch_size = {method.batch_size} is above privacy.examples = "
            f"{config.privacy.examples}, of which a step takes a sample; lower it"
        )


def _aligned(config: "SectionsRead") -> Iterator[str]:
    made = config.lora.init == "aligned" and config.lora.init_file is None
    # Sites have a file, which is refused where it is not there.
    if made and config.data.public is None and config.data.source != AT_SITES:
        yield (
            "[privacy] does not cover the A that lora.init = 'aligned' makes of the training rows; "
            "name data.public or lora.init_file, or leave lora.init out"
        )


def _of_clients(config: "SectionsRead") -> Iterator[str]:
    """Of privacy.level = "client", whose noise is added to a sum."""
    federation, delta, key = config.federation, config.privacy.delta, "privacy.level = 'client'"
    if not federation.secure_sums:
        yield (
            f"{key} adds noise to the sum of reports, and without federation.secure_sums = true "
            "the ledger would hold each report as it is; set it, with method.name = 'decomfl'"
        )
    if delta is not None and delta * federation.clients >= 1:
        yield (
            f"privacy.delta = {delta:g} is not below 1 / federation.clients = "
            f"{1 / federation.clients:g}, and would let one client be shown to all; use a smaller "
            f"one, such as {0.1 / federation.clients:.1g}"
        )
    yield from _aligned(config)
