"""fedforward: federated fine-tuning of language models with forward passes only.

The vocabulary (`Steps`, `Probe`, `Update`, `ForwardModel`) is here; everything else is imported
from its module. This face imports no PyTorch.
"""

from fedforward.core.errors import FedForwardError
from fedforward.core.steps import Evaluation, ForwardModel, Probe, Steps, Update

#: The one place of the version: the build, the command line and the run directory read it here.
__version__ = "0.1.0"

__all__ = [
    "Evaluation",
    "FedForwardError",
    "ForwardModel",
    "Probe",
    "Steps",
    "Update",
    "__version__",
]
