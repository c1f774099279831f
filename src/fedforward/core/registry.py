"""What can be chosen by name: methods, estimators, objectives, aggregators, filters, runtimes.

A registry knows the built-in names without importing what they stand for, so that a configuration
is checked without PyTorch. A package from outside adds a name by an entry point of the registry's
group, or by the decorator `register` once it is imported.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from fedforward.core.errors import FedForwardError

T = TypeVar("T")


class Registry:
    """Objects of one kind by name.

    Example:
        >>> METHODS.names()[:2]
        ('fedmezo', 'fedmezo-auto')
        >>> METHODS.get("decomfl").__name__
        'DeComFL'

    Attributes:
        kind: what the objects are, as an error calls them.
        group: the entry-point group of packages that add some.
    """

    def __init__(self, kind: str, group: str, builtin: Mapping[str, str]) -> None:
        """`builtin`: references "module:attribute" by name."""
        self.kind = kind
        self.group = group
        self._builtin = dict(builtin)
        self._registered: dict[str, Any] = {}
        self._loaded: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator that adds an object under a name; the last one of a name holds.

        Example:
            >>> @REPORT_FILTERS.register("as-it-is")
            ... class AsItIs:
            ...     def __call__(self, report):
            ...         return report
            >>> "as-it-is" in REPORT_FILTERS
            True
            >>> REPORT_FILTERS.forget("as-it-is")
        """

        def add(found: T) -> T:
            self._registered[name] = found
            return found

        return add

    def forget(self, name: str) -> None:
        """Take back what `register` added; built-in names and entry points stay."""
        self._registered.pop(name, None)

    def names(self) -> tuple[str, ...]:
        """All names, the built-in ones first; nothing is imported for it."""
        others = {*self._registered, *self._points()} - self._builtin.keys()
        return (*self._builtin, *sorted(others))

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def get(self, name: str) -> Any:
        """The object of a name.

        Raises:
            FedForwardError: there is none, or the package that has it cannot be imported.
        """
        known = self._registered.get(name, self._loaded.get(name))
        if known is not None:
            return known
        if name in self._builtin:
            module, _, attribute = self._builtin[name].partition(":")
            self._loaded[name] = getattr(import_module(module), attribute)
            return self._loaded[name]
        point = self._points().get(name)
        if point is None:
            near = get_close_matches(name, self.names(), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise FedForwardError(
                f"{name!r} is not a known {self.kind}.{hint} Allowed are "
                f"{', '.join(map(repr, self.names()))}."
            )
        try:
            self._loaded[name] = point.load()
        except Exception as error:
            raise FedForwardError(
                f"The {self.kind} {name!r} of {point.value} cannot be imported: {error}. Mend or "
                "remove the package that adds it."
            ) from error
        return self._loaded[name]

    def name_of(self, found: object) -> str:
        """The name of an object of this registry; of one that it does not know, its own."""
        for name, known in (*self._registered.items(), *self._loaded.items()):
            if known is found:
                return name
        for name in self.names():
            # A package that cannot be imported has not made this object.
            with contextlib.suppress(FedForwardError):
                if self.get(name) is found:
                    return name
        return str(getattr(found, "__name__", type(found).__name__))

    def _points(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self.group)}


METHODS = Registry(
    "method",
    "fedforward.methods",
    {
        "fedmezo": "fedforward.methods.fedmezo:FedMeZO",
        "fedmezo-auto": "fedforward.methods.fedmezo:FedMeZOAuto",
        "decomfl": "fedforward.methods.decomfl:DeComFL",
        "feedsign": "fedforward.methods.feedsign:FeedSign",
        "zorba": "fedforward.methods.zorba:ZorBA",
        "fedkseed": "fedforward.methods.fedkseed:FedKSeed",
        "fedkseed-pro": "fedforward.methods.fedkseed:FedKSeedPro",
        "fedavg": "fedforward.methods.fedavg:FedAvg",
    },
)
ESTIMATORS = Registry(
    "estimator",
    "fedforward.estimators",
    {
        "two-point": "fedforward.methods.estimators:TwoPoint",
        "one-sided": "fedforward.methods.estimators:OneSided",
        "fzoo": "fedforward.methods.estimators:FZOO",
    },
)
AGGREGATORS = Registry(
    "aggregator",
    "fedforward.aggregators",
    {
        "mean": "fedforward.methods.aggregation:mean",
        "clipped-mean": "fedforward.methods.aggregation:clipped_mean",
        "median": "fedforward.methods.aggregation:median",
        "trimmed-mean": "fedforward.methods.aggregation:trimmed_mean",
        "geometric-median": "fedforward.methods.aggregation:geometric_median",
        "krum": "fedforward.methods.aggregation:krum",
        "multi-krum": "fedforward.methods.aggregation:multi_krum",
    },
)
REPORT_FILTERS = Registry(
    "report filter",
    "fedforward.report_filters",
    {
        "clip": "fedforward.methods.report_filters:Clip",
        "withhold-loss": "fedforward.methods.report_filters:WithholdLoss",
    },
)
OBJECTIVES = Registry(
    "objective",
    "fedforward.objectives",
    {
        "loss": "fedforward.evaluation.objectives:Loss",
        "choice": "fedforward.evaluation.objectives:Choice",
        "accuracy": "fedforward.evaluation.objectives:Accuracy",
        "exact-match": "fedforward.evaluation.objectives:EXACT_MATCH",
        "f1": "fedforward.evaluation.objectives:F1",
        "rougeL": "fedforward.evaluation.objectives:ROUGE_L",
    },
)
CALLBACKS = Registry(
    "callback",
    "fedforward.callbacks",
    {
        "csv": "fedforward.training.callbacks:CsvFile",
        "tensorboard": "fedforward.training.callbacks:TensorBoard",
        "wandb": "fedforward.training.callbacks:WeightsAndBiases",
    },
)
RUNTIMES = Registry(
    "runtime",
    "fedforward.runtimes",
    {
        "flower": "fedforward.deployment.flower.runtime:RUNTIME",
        "nvflare": "fedforward.deployment.nvflare.runtime:RUNTIME",
    },
)
