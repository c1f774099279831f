"""Models of the public face: a folder or hub name in, a model with its tokenizer out.

What a configuration would say of the model is kept beside it (`settings`), so that a run made from
it can be written down, resumed and verified like one that began with a file.
"""

from pathlib import Path
from typing import Any

from fedforward.core.machine import usable_cores
from fedforward.core.steps import ProbePlan
from fedforward.models import devices
from fedforward.models.libraries import quiet_libraries
from fedforward.models.loading import load

#: Examples in a forward pass of an evaluation.
EVALUATION_ROWS = 8


def loaded(
    path: str | Path, dtype: str, device: str, seed: int, **options: Any
) -> tuple[Any, Any, ProbePlan, str]:
    """Network, tokenizer, a plan of pairs of probes, and the device that was chosen.

    Raises:
        FedForwardError: see `load`.
    """
    quiet_libraries()
    if device == "auto":
        device = "cuda" if "cuda" in devices.accelerators() else "cpu"
    network, tokenizer = load(str(path), dtype, device, run_seed=seed, **options)
    plan = ProbePlan(2, usable_cores(), "cache", EVALUATION_ROWS, device)
    return network, tokenizer, plan, device
