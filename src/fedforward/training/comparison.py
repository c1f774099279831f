"""Carry out every run of a comparison, and keep what is finished.

    OUT/LABEL/seed-N      the runs, each a run directory like any other
    OUT/settings.json     what all of them share: the budget, and how many rounds each may have

All variants share a budget of rounds, bytes, forward passes or seconds. Unless it is given, it is
what the first variant spends at the first seed. How many rounds another variant needs for it is
measured in a trial of `TRIAL_ROUNDS`; its runs end with the round that spends it. Imports PyTorch
only to run.
"""

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import ceil, isfinite
from pathlib import Path
from typing import Any

from fedforward.config.schema import Config
from fedforward.core.errors import FedForwardError
from fedforward.core.files import parse_json
from fedforward.core.logs import PHASES
from fedforward.core.paths import check_new_folder
from fedforward.methods.base import method_class
from fedforward.training.folder_lock import HOLDER, LOCK, FolderLock
from fedforward.training.metrics import DivergenceError, ProgressCallback
from fedforward.training.run_directory import RunDirectory, write_json
from fedforward.training.spending import RESOURCES, WORDS, Resource, spent
from fedforward.training.variants import Variant

LOGGER = logging.getLogger("fedforward.training.comparison")
TRIAL_ROUNDS = 3
#: How many times the rounds of the estimate a run may have, where its schedule does not ask.
HEADROOM: Mapping[Resource, float] = {"rounds": 1.0, "bytes": 1.1, "passes": 1.1, "seconds": 2.0}
MOST_ROUNDS = 1_000_000
SETTINGS, RESULT = "settings.json", "compare.json"
_TRIALS = ".trial-"


@dataclass(frozen=True)
class Length:
    """How far the runs of a variant go: at most so many rounds, with evaluations between."""

    rounds: int
    evaluate_every: int


@dataclass
class Settings:
    """What a comparison's folder keeps of how its runs are matched.

    Attributes:
        match: the resource that all variants may spend the same of.
        first: label of the first variant.
        rounds: of the configuration.
        given: the budget that was asked for; None leaves it to the first variant.
        budget: None as long as it is not known.
        lengths: by label.
    """

    match: Resource
    first: str
    rounds: int
    given: float | None = None
    budget: float | None = None
    lengths: dict[str, Length] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """What a variant's rounds cost, in the resource that is matched.

    Attributes:
        first: of the first round.
        later: of each later one.
        evaluation: of an evaluation; 0 where that costs nothing of it.
    """

    first: float
    later: float
    evaluation: float

    def rounds_for(self, budget: float, evaluations: int) -> float:
        """How many rounds spend the budget, as a fraction."""
        return 1.0 + (budget - evaluations * self.evaluation - self.first) / self.later

    def total(self, rounds: int, evaluations: int) -> float:
        """What so many rounds spend."""
        return self.first + (rounds - 1) * self.later + evaluations * self.evaluation


class Comparison:
    """The runs of several variants at several seeds.

    Attributes:
        out: the folder.
        settings: how they are matched.
    """

    def __init__(
        self,
        variants: Sequence[Variant],
        seeds: Sequence[int],
        out: Path,
        *,
        match: str = "rounds",
        budget: float | None = None,
    ) -> None:
        """Check what can be checked before anything runs.

        Raises:
            FedForwardError: a variant cannot be matched, the budget is none, or the folder has
                runs of another configuration or comparison.
        """
        self.variants, self.seeds, self.out = list(variants), list(seeds), out
        kind = check_match(match)
        check_budget(kind, budget)
        rounds = variants[0].config.federation.rounds
        if kind == "rounds" and budget is not None:
            rounds, budget = int(budget), None
        self.settings = Settings(kind, variants[0].label, rounds, budget, budget)
        check_folder(out)
        self._check_variants()
        self._take_over()
        self._check_folders()

    @property
    def folders(self) -> dict[str, dict[int, Path]]:
        """Of every run, by label and seed."""
        return {
            variant.label: {seed: self.out / variant.label / f"seed-{seed}" for seed in self.seeds}
            for variant in self.variants
        }

    def run(
        self,
        progress: ProgressCallback | None = None,
        began: Callable[[int, int, str], None] | None = None,
    ) -> None:
        """Carry out what is not finished.

        Args:
            progress: told of each round.
            began: told before each run: its number from 1, how many there are, and its name.

        Raises:
            FedForwardError: a run cannot be carried out; what was done is kept.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(self.out, "--out")
        lock.acquire()
        try:
            self._write()
            for left in self.out.glob(f"{_TRIALS}*"):
                shutil.rmtree(left, ignore_errors=True)
            self._plan(progress)
            self._write()
            total, number = len(self.variants) * len(self.seeds), 0
            for variant in self.variants:
                for seed in self.seeds:
                    number += 1
                    if began is not None:
                        began(number, total, f"{variant.label}, seed {seed}")
                    self._carry_out(variant, seed, progress)
        finally:
            lock.release()

    # ---- before anything runs ---------------------------------------------------------------

    def _check_variants(self) -> None:
        for variant in self.variants:
            can = method_class(variant.config.method.name).capabilities
            if self.settings.match == "passes" and not can.forward_only:
                raise FedForwardError(
                    f"--match passes: {variant.label} trains by backpropagation, whose passes are "
                    "not counted. Match rounds, bytes or seconds, or leave it out."
                )

    def _take_over(self) -> None:
        """Go on with the matching of an earlier call in the same folder."""
        path = self.out / SETTINGS
        if not path.is_file():
            return
        kept = _read_settings(path)
        now, free = self.settings, {"budget", "lengths"}
        if now.match == "rounds":
            free.add("rounds")
        differing = [
            f"{name} is {value!r} there and {getattr(now, name)!r} here"
            for name, value in vars(kept).items()
            if name not in free and value != getattr(now, name)
        ]
        if differing:
            raise FedForwardError(
                f"{self.out} has another comparison: {'; '.join(differing)}. Call it as it was "
                "begun, or choose another --out. Methods and seeds may be added."
            )
        now.budget = kept.budget
        now.lengths = {} if now.match == "rounds" else kept.lengths

    def _check_folders(self) -> None:
        """Refuse runs of other configurations."""
        for variant in self.variants:
            length = self._length(variant)
            for seed, path in self.folders[variant.label].items():
                directory = RunDirectory(path)
                if directory.started:
                    own = length or _length_of(directory.config())
                    directory.continues(_config(variant, seed, own), True)

    # ---- the budget --------------------------------------------------------------------------

    def _length(self, variant: Variant) -> Length | None:
        """How far its runs go; None if that is not known yet."""
        now = self.settings
        if now.match == "rounds" or (now.given is None and variant.label == now.first):
            return Length(now.rounds, variant.config.run.evaluate_every)
        return now.lengths.get(variant.label)

    def _plan(self, progress: ProgressCallback | None) -> None:
        """Find out how far each variant goes."""
        now = self.settings
        missing = [variant for variant in self.variants if self._length(variant) is None]
        if not missing:
            return
        first = self.variants[0]
        every = first.config.run.evaluate_every
        evaluations = max(1, -(-now.rounds // every))
        about = now.budget
        if about is None:
            trial = self._trial(first)
            about = trial.total(now.rounds, evaluations)
        trials = {variant.label: self._trial(variant) for variant in missing}
        for variant in missing:
            one = trials[variant.label].first
            if about < one:
                raise FedForwardError(
                    f"{variant.label}: one round takes {one:,.0f} {WORDS[now.match]}, and the "
                    f"budget is {about:,.0f}{self._whose()}. Leave it out, give a larger --budget "
                    "or more federation.rounds, or match rounds."
                )
        if now.budget is None:
            seed = self.seeds[0]
            self._carry_out(first, seed, progress)
            lines = RunDirectory(self.folders[first.label][seed]).read_metrics(now.rounds)
            now.budget = spent(lines, now.match)[-1]
            if _diverged(self.folders[first.label][seed]) or not isfinite(now.budget):
                raise FedForwardError(
                    f"{first.label} diverged at seed {seed} after {len(lines) - 1} rounds, so that "
                    f"what it spent is no budget. Lower its rate with --rates {first.label}=RATE "
                    "and choose another --out, or give a --budget."
                )
        for variant in missing:
            estimate = trials[variant.label].rounds_for(now.budget, evaluations)
            free = variant.config.method.schedule == "constant"
            estimate *= HEADROOM[now.match] if free else 1.0
            rounds = min(MOST_ROUNDS, max(1, ceil(round(estimate, 3))))
            now.lengths[variant.label] = Length(rounds, max(1, rounds // evaluations))

    def _whose(self) -> str:
        now = self.settings
        if now.given is not None:
            return ""
        return f", about what {now.first} uses in {now.rounds} rounds"

    def _trial(self, variant: Variant) -> Trial:
        """What rounds of a variant cost; its folder is gone afterwards."""
        PHASES.info("measuring what a round of %s takes", variant.label)
        length = Length(TRIAL_ROUNDS, TRIAL_ROUNDS)
        with tempfile.TemporaryDirectory(dir=self.out, prefix=_TRIALS) as folder:
            path = Path(folder) / "run"
            try:
                _run(_config(variant, self.seeds[0], length), path, None)
            except DivergenceError as error:
                LOGGER.debug("the trial of %s: %s", variant.label, error)
            lines = RunDirectory(path).read_metrics(TRIAL_ROUNDS)
        costs = spent(lines, self.settings.match)
        if len(lines) <= TRIAL_ROUNDS or not isfinite(costs[-1]):
            raise FedForwardError(
                f"{variant.label}: a trial of {TRIAL_ROUNDS} rounds ended after {len(lines) - 1}, "
                f"so that what it takes in {self.settings.match} is not known. Lower its rate with "
                f"--rates {variant.label}=RATE, or match rounds."
            )
        _, one, two, three = costs
        if self.settings.match != "seconds":
            return Trial(one, (three - one) / 2, 0.0)
        # The first round compiles, and the last one is followed by an evaluation.
        return Trial(two - one, two - one, max(0.0, three - 2 * two + one))

    # ---- the runs ----------------------------------------------------------------------------

    def _carry_out(self, variant: Variant, seed: int, progress: ProgressCallback | None) -> None:
        """Carry a run to its end, unless it is there."""
        length = self._length(variant)
        assert length is not None
        path = self.folders[variant.label][seed]
        if is_finished(path, length.rounds):
            return
        own = self.settings.given is None and variant.label == self.settings.first
        limited = self.settings.match != "rounds" and not own
        stop = self._spent if limited else None
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _run(_config(variant, seed, length), path, progress, stop)
        except DivergenceError as error:
            LOGGER.warning("%s, seed %d: %s", variant.label, seed, error)

    def _spent(self, lines: Sequence[dict[str, Any]]) -> str:
        """Why a run ends here: its budget is spent; else empty."""
        budget, kind = self.settings.budget, self.settings.match
        assert budget is not None
        done = spent(lines, kind)[-1]
        return "" if done < budget else f"budget: {done:,.1f} of {budget:,.1f} {kind} are spent"

    def _write(self) -> None:
        write_json(self.out / SETTINGS, asdict(self.settings))


def check_folder(path: Path) -> None:
    """Refuse a folder that is something else than a comparison's.

    Raises:
        FedForwardError: it is a file or a run's folder, has other files, or cannot be made.
    """
    check_new_folder(path, "--out")
    if RunDirectory(path).started:
        raise FedForwardError(
            f"--out {path} is the folder of a single run. Choose another for the comparison."
        )
    if not path.is_dir() or any((path / name).is_file() for name in (SETTINGS, RESULT)):
        return
    # A start that was cut short leaves the lock.
    if any(file.name not in (LOCK, HOLDER) for file in path.iterdir()):
        raise FedForwardError(f"--out {path} is not empty and is no comparison. Choose another.")


def check_match(match: str) -> Resource:
    """The resource of that name.

    Raises:
        FedForwardError: there is none.
    """
    for known in RESOURCES:
        if match == known:
            return known
    raise FedForwardError(f"--match {match!r} is not allowed: it must be {', '.join(RESOURCES)}.")


def check_budget(match: Resource, budget: float | None) -> None:
    """Refuse a budget that is none.

    Raises:
        FedForwardError: it is not above 0, or of rounds not whole.
    """
    if budget is None:
        return
    if not isfinite(budget) or budget <= 0:
        raise FedForwardError(f"--budget {budget:g} is not allowed: it must be above 0.")
    if match == "rounds" and (budget != int(budget) or budget > MOST_ROUNDS):
        raise FedForwardError(
            f"--budget {budget:g} is not allowed: with --match rounds it is a whole number, at "
            f"least 1 and at most {MOST_ROUNDS:,}. Below one round nothing can be compared."
        )


def is_finished(path: Path, rounds: int) -> bool:
    """Whether a run has ended: after all its rounds, or for a reason that its summary tells."""
    directory = RunDirectory(path)
    if not directory.started or not directory.summary.is_file():
        return False
    summary = _object(directory.summary)
    done = len(directory.read_metrics(MOST_ROUNDS)) - 1
    if summary.get("rounds") != done:
        return False
    return done >= rounds or bool(summary.get("stopped"))


def _diverged(path: Path) -> bool:
    return str(_object(RunDirectory(path).summary).get("stopped") or "").startswith("diverged")


def _config(variant: Variant, seed: int, length: Length) -> Config:
    return variant.at(seed, rounds=length.rounds, every=length.evaluate_every)


def _length_of(config: Config) -> Length:
    return Length(config.federation.rounds, config.run.evaluate_every)


def _run(
    config: Config,
    path: Path,
    progress: ProgressCallback | None,
    stop: Callable[[Sequence[dict[str, Any]]], str] | None = None,
) -> None:
    """A run, or the rest of it."""
    from fedforward.training.run import Run

    Run(config, path, True, progress, stop=stop).fit()


def _object(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_settings(path: Path) -> Settings:
    try:
        content = json.loads(path.read_bytes())
        lengths = {
            str(label): Length(int(each["rounds"]), int(each["evaluate_every"]))
            for label, each in content["lengths"].items()
        }
        budget, given = (
            None if content[name] is None else float(content[name]) for name in ("budget", "given")
        )
        found = Settings(
            check_match(content["match"]), str(content["first"]), int(content["rounds"]), given,
            budget, lengths,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError, FedForwardError) as error:
        raise FedForwardError(
            f"{path} is damaged: {error!r}. Restore it from a copy, or choose another --out."
        ) from error
    return found
