"""Everything that a run imports sooner or later: the fork server does so once."""

import importlib

import torch

from tests.conftest import LIBRARIES

torch.set_num_threads(1)
for _name in (
    *LIBRARIES,
    "transformers",
    "fedforward.deployment.coordinator",
    "fedforward.deployment.model_server",
    "fedforward.deployment.site",
    "fedforward.models.lora",
    "fedforward.training.run",
    "tests.faults.processes",
    "tests.support.coordinator",
):
    importlib.import_module(_name)
