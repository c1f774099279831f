"""The reference of the public API: what `fedforward` exports, and the modules beneath it.

Names are resolved by import, so that a lazy export points at the object that it stands for. What a
page shows of each is read from the source by mkdocstrings.
"""

import importlib.util
import inspect
from typing import Any

import fedforward

#: Modules that extensions are written against, shown whole. One that moves must be named anew.
MODULES = (
    "fedforward.core.steps",
    "fedforward.core.batches",
    "fedforward.core.layout",
    "fedforward.core.seeds",
    "fedforward.core.registry",
    "fedforward.core.errors",
    "fedforward.directions.spec",
    "fedforward.directions.ops",
    "fedforward.messages.task",
    "fedforward.messages.report",
    "fedforward.messages.entry",
    "fedforward.messages.snapshot",
    "fedforward.methods.base",
    "fedforward.methods.parameters",
    "fedforward.methods.estimators",
    "fedforward.methods.aggregation",
    "fedforward.methods.report_filters",
    "fedforward.evaluation.objectives",
    "fedforward.federation.ledger",
)


def identifier(name: str) -> str:
    """Where an export of `fedforward` is defined, as a dotted path."""
    found: Any = getattr(fedforward, name)
    if inspect.ismodule(found):
        return found.__name__
    module = getattr(found, "__module__", None)
    qualified = getattr(found, "__qualname__", None)
    return f"{module}.{qualified}" if module and qualified else f"fedforward.{name}"


def page() -> str:
    """The page, in Markdown with mkdocstrings directives."""
    parts = [
        "# API\n",
        "`import fedforward as ff` needs no PyTorch; a name is imported when it is first used.\n",
        "## The public face\n",
    ]
    for name in sorted(set(fedforward.__all__)):
        parts.append(
            f"::: {identifier(name)}\n    options:\n      heading_level: 3\n"
            f'      heading: "{name}"\n      toc_label: "{name}"\n'
        )
    parts.append("## Modules that extensions use\n")
    for module in MODULES:
        if importlib.util.find_spec(module) is None:
            raise LookupError(f"{module} is gone: name its successor in scripts/docs/api.py")
        parts.append(f"::: {module}\n    options:\n      heading_level: 3\n")
    return "\n".join(parts)
