"""fedforward: federated fine-tuning of language models with forward passes only.

The public face. Every name is imported when it is first used, so that `import fedforward` needs
neither PyTorch nor transformers.

Example:
    >>> import fedforward as ff
    >>> method = ff.DeComFL(local_steps=10, estimator=ff.TwoPoint(mu=1e-3, directions=4))
    >>> method.name, method.directions
    ('decomfl', 4)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedforward.core.version import __version__

if TYPE_CHECKING:
    from fedforward.core.errors import FedForwardError
    from fedforward.core.registry import (
        AGGREGATORS,
        ESTIMATORS,
        METHODS,
        OBJECTIVES,
        REPORT_FILTERS,
        RUNTIMES,
    )
    from fedforward.core.steps import Evaluation, ForwardModel, Probe, ProbePlan, Steps, Update
    from fedforward.evaluation.objectives import Objective
    from fedforward.methods.base import Capabilities, Method
    from fedforward.methods.decomfl import DeComFL
    from fedforward.methods.estimators import FZOO, TwoPoint
    from fedforward.methods.fedavg import FedAvg
    from fedforward.methods.fedkseed import FedKSeed, FedKSeedPro
    from fedforward.methods.fedmezo import FedMeZO
    from fedforward.methods.feedsign import FeedSign
    from fedforward.methods.zorba import ZorBA
    from fedforward.models.full import FullModel
    from fedforward.models.lora import LoraModel
    from fedforward.models.quadratic import Quadratic
    from fedforward.training.api import Dataset, Result, Simulation
    from fedforward.training.replay import export, verify

#: Where each name is, by module.
_MODULES = {
    "core.errors": ("FedForwardError",),
    "core.registry": (
        "AGGREGATORS", "ESTIMATORS", "METHODS", "OBJECTIVES", "REPORT_FILTERS", "RUNTIMES",
    ),
    "core.steps": ("Evaluation", "ForwardModel", "Probe", "ProbePlan", "Steps", "Update"),
    "evaluation.objectives": ("Objective",),
    "methods.base": ("Capabilities", "Method"),
    "methods.decomfl": ("DeComFL",),
    "methods.estimators": ("FZOO", "TwoPoint"),
    "methods.fedavg": ("FedAvg",),
    "methods.fedkseed": ("FedKSeed", "FedKSeedPro"),
    "methods.fedmezo": ("FedMeZO",),
    "methods.feedsign": ("FeedSign",),
    "methods.zorba": ("ZorBA",),
    "models.full": ("FullModel",),
    "models.lora": ("LoraModel",),
    "models.quadratic": ("Quadratic",),
    "training.api": ("Dataset", "Result", "Simulation"),
    "training.replay": ("export", "verify"),
}  # fmt: skip
_PLACES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "AGGREGATORS",
    "ESTIMATORS",
    "FZOO",
    "METHODS",
    "OBJECTIVES",
    "REPORT_FILTERS",
    "RUNTIMES",
    "Capabilities",
    "Dataset",
    "DeComFL",
    "Evaluation",
    "FedAvg",
    "FedForwardError",
    "FedKSeed",
    "FedKSeedPro",
    "FedMeZO",
    "FeedSign",
    "ForwardModel",
    "FullModel",
    "LoraModel",
    "Method",
    "Objective",
    "Probe",
    "ProbePlan",
    "Quadratic",
    "Result",
    "Simulation",
    "Steps",
    "TwoPoint",
    "Update",
    "ZorBA",
    "__version__",
    "export",
    "verify",
]


def __getattr__(name: str) -> Any:
    """A public name, imported now."""
    if name not in _PLACES:
        raise AttributeError(f"module 'fedforward' has no attribute {name!r}")
    found = getattr(import_module(f"fedforward.{_PLACES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
