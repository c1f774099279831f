"""Models of the public face: a folder or hub name in, a model with its tokenizer out.

What a configuration would say of the model is kept beside it (`settings`), so that a run made from
it can be written down, resumed and verified like one that began with a file.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from fedforward.core.errors import FedForwardError
from fedforward.core.machine import usable_cores
from fedforward.core.steps import ProbePlan
from fedforward.models import devices
from fedforward.models.libraries import quiet_libraries
from fedforward.models.loading import DTYPES, load
from fedforward.models.trial import check_causal

#: Examples in a forward pass of an evaluation.
EVALUATION_ROWS = 8


def allow(key: str, value: object, allowed: Collection[str]) -> None:
    """Refuse a value that is none of those allowed.

    Raises:
        FedForwardError: with what is.
    """
    if value not in allowed:
        raise FedForwardError(
            f"{key} = {value!r} is not allowed: it must be one of {', '.join(map(repr, allowed))}."
        )


def loaded(
    path: str | Path, dtype: str, device: str, seed: int, **options: Any
) -> tuple[Any, Any, ProbePlan, str]:
    """Network, tokenizer, a plan of pairs of probes, and the device that was chosen.

    Raises:
        FedForwardError: see `load`.
    """
    allow("dtype", dtype, DTYPES)
    device = devices.resolve(device, "device")
    quiet_libraries()
    network, tokenizer = load(str(path), dtype, device, run_seed=seed, **options)
    check_causal(network, str(path))
    plan = ProbePlan(2, usable_cores(), "cache", EVALUATION_ROWS, device)
    return network, tokenizer, plan, device
