"""Runs that were read, in groups that differ by their seed alone. Imports no PyTorch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, nan
from typing import Any

from fedforward.analysis.significance import mean_and_deviation
from fedforward.core.errors import FedForwardError
from fedforward.evaluation.text_metrics import LOSSES
from fedforward.reporting.figures import heldout
from fedforward.reporting.record import RunRecord
from fedforward.training.run_directory import FREE_KEYS
from fedforward.training.spending import Resource, spent
from fedforward.training.variants import check_same_task

#: Keys that do not make another configuration.
_OF_A_RUN = {*FREE_KEYS, "run.seed", "run.threads", "data.example"}
#: Metrics of which less is better, beside the losses.
_LOWER = {*LOSSES, "perplexity"}


@dataclass(frozen=True, eq=False)
class Group:
    """Runs of one configuration at several seeds.

    Attributes:
        label: its name.
        runs: by seed.
    """

    label: str
    runs: Mapping[int, RunRecord]

    @property
    def first(self) -> RunRecord:
        """The run of the first seed."""
        return next(iter(self.runs.values()))

    @property
    def diverged(self) -> int:
        """How many runs have diverged."""
        return sum(map(has_diverged, self.runs.values()))

    @property
    def sound(self) -> dict[int, RunRecord]:
        """The runs that have not diverged, by seed."""
        return {seed: run for seed, run in self.runs.items() if not has_diverged(run)}


def has_diverged(record: RunRecord) -> bool:
    """Whether a run ended because its loss rose too far or was not a number."""
    return str((record.summary or {}).get("stopped") or "").startswith("diverged")


def lower_is_better(name: str) -> bool:
    """Whether less of a held-out figure is better."""
    return name in _LOWER


def final(record: RunRecord, name: str) -> float:
    """A held-out figure at the last evaluation; NaN if it is not finite."""
    values = heldout(record, name).y
    return float(values[-1]) if values and isfinite(values[-1]) else nan


def best(record: RunRecord, name: str) -> float:
    """The best of all evaluations; NaN if none is finite."""
    values = [value for value in heldout(record, name).y if isfinite(value)]
    if not values:
        return nan
    return min(values) if lower_is_better(name) else max(values)


def total(record: RunRecord, what: Resource) -> float:
    """What a run has spent in all."""
    return spent(record.lines, what)[-1]


def statistics(values: Iterable[float]) -> tuple[float, float]:
    """Mean and standard deviation of the finite ones."""
    return mean_and_deviation([value for value in values if isfinite(value)])


def measure_of(groups: Sequence[Group]) -> str:
    """The held-out figure that decides: what all runs optimise, or the loss."""
    objectives = {run.config.objective for group in groups for run in group.runs.values()}
    return objectives.pop() if len(objectives) == 1 else "loss"


def grouped(records: Sequence[RunRecord]) -> list[Group]:
    """Runs by configuration, in their order; labels say what differs.

    Raises:
        FedForwardError: two runs are of the same configuration and seed.
    """
    found: dict[tuple[tuple[str, str], ...], dict[int, RunRecord]] = {}
    for record in records:
        key = tuple(sorted((k, repr(v)) for k, v in _flat(record).items() if k not in _OF_A_RUN))
        runs, seed = found.setdefault(key, {}), record.config.run.seed
        if seed in runs:
            raise FedForwardError(
                f"{runs[seed].path} and {record.path} have the same configuration and the same "
                f"run.seed = {seed}: one run twice says nothing about the spread. Leave one out."
            )
        runs[seed] = record
    keys = [dict(key) for key in found]
    labels = _labels(keys)
    return [
        Group(label, dict(sorted(runs.items())))
        for label, runs in zip(labels, found.values(), strict=True)
    ]


def _labels(keys: Sequence[Mapping[str, str]]) -> list[str]:
    """The method's name, with whatever else tells groups apart."""
    names = [str(key["method.name"]).strip("'") for key in keys]
    labels = []
    for name, key in zip(names, keys, strict=True):
        alike = [other for other, its in zip(keys, names, strict=True) if its == name]
        differing = sorted({k for other in alike for k in key if other.get(k) != key[k]})
        texts = [f"{k.partition('.')[2]}={key[k].strip(chr(39))}" for k in differing]
        # More than three say nothing in a table; a number tells them apart.
        words = " ".join(texts[:3]) if texts else ""
        labels.append(f"{name} {words}".strip())
    return [
        label if labels.count(label) == 1 else f"{label} ({labels[: n + 1].count(label)})"
        for n, label in enumerate(labels)
    ]


def _flat(record: RunRecord) -> dict[str, Any]:
    content = record.config.with_objective().model_dump()
    return {f"{section}.{key}": value for section, keys in content.items()
            for key, value in keys.items()}  # fmt: skip


def check_comparable(groups: Sequence[Group]) -> None:
    """Refuse runs whose held-out figures are not of the same.

    Raises:
        FedForwardError: other data, another way to measure, or other metrics.
    """
    records = [record for group in groups for record in group.runs.values()]
    first = records[0]
    for other in records[1:]:
        check_same_task(str(first.path), first.config, str(other.path), other.config)
        one, its = (sorted(record.lines[0].get("metrics", {})) for record in (first, other))
        if one != its:
            raise FedForwardError(
                f"{first.path} and {other.path} cannot be compared, as they have other metrics: "
                f"{', '.join(one) or 'the loss alone'} and {', '.join(its) or 'the loss alone'}. "
                "Give both the same evaluation.metrics."
            )
