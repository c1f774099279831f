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
            f"{key} has no form yet for federation.secure_sums = true, whose sums hold losses; "
            "leave one of them out"
        )
    made = config.lora.init == "aligned" and config.lora.init_file is None
    # Sites have a file, which is refused where it is not there.
    if made and config.data.public is None and config.data.source != AT_SITES:
        yield (
            f"{key} does not cover the A that lora.init = 'aligned' makes of the training rows; "
            "name data.public or lora.init_file, or leave lora.init out"
        )
    if config.privacy.examples is not None and method.batch_size > config.privacy.examples:
        yield (
            f"method.batch_size = {method.batch_size} is above privacy.examples = "
            f"{config.privacy.examples}, of which a step takes a sample; lower it"
        )
