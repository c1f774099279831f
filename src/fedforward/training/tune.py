"""What learning rate a method bears on a model and data, found by a few rounds of "auto".

The rounds run in a folder that is gone afterwards. The last update is then measured on the held-out
examples at multiples of its length, which gives the loss against the rate.
"""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedforward.config.loading import validate
from fedforward.config.schema import Config
from fedforward.core.errors import FedForwardError
from fedforward.core.logs import PHASES
from fedforward.core.steps import Probe, Steps
from fedforward.data.sampler import by_length
from fedforward.federation.client import along_update
from fedforward.training.run import Run
from fedforward.training.run_directory import errors_of_the_disk

#: Lengths at which the last update is measured, as multiples of it.
MULTIPLES = (0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
#: Held-out examples that are measured.
EXAMPLES = 256
#: Rounds beyond those asked for in which a last update is waited for that was not taken back.
MORE_ROUNDS = 10


@dataclass(frozen=True)
class Point:
    """What one rate makes of the loss.

    Attributes:
        learning_rate: that the last update would have had.
        loss: the held-out mean after it, in nats (or in the objective's unit).
        error: the standard error of the loss less that without the update.
    """

    learning_rate: float
    loss: float
    error: float


@dataclass(frozen=True)
class Tuning:
    """What `tune` has found.

    Attributes:
        learning_rate: that "auto" had reached in its last round, for `method.learning_rate`.
        curve: the loss against the rate of the last round's update, the first at rate 0.
        objective: what the loss is of.
        rounds: that ran.
        taken_back: updates among them that were taken back.
        passes: forward-pass equivalents that all of it took, of a batch each.
        examples: held-out examples that the curve was measured on.
    """

    learning_rate: float
    curve: tuple[Point, ...]
    objective: str
    rounds: int
    taken_back: int
    passes: float
    examples: int

    @property
    def best(self) -> Point:
        """The point of the curve with the least loss."""
        return min(self.curve, key=lambda point: point.loss)

    def as_json(self) -> dict[str, Any]:
        """As `fedforward tune --json` prints it."""
        return asdict(self) | {"best": asdict(self.best)}


def tune(config: Config, rounds: int, on_round: Callable[[int, int], None] | None = None) -> Tuning:
    """Run a configuration with the rate "auto" for some rounds, and measure its last update.

    Args:
        rounds: that run at least; more where the last of them has no update that is kept.
        on_round: told how many rounds are done, and of how many.

    Raises:
        FedForwardError: the configuration cannot run, its method has no such rate, or no round
            had an update.

    Example:
        >>> from fedforward.config.loading import load
        >>> tune(load("run.toml"), rounds=12).learning_rate  # doctest: +SKIP
        0.0031
    """
    config = _automatic(config, rounds)
    there = Path(tempfile.gettempdir())
    with errors_of_the_disk(there), tempfile.TemporaryDirectory(prefix="fedforward-") as folder:
        run = Run(config, Path(folder) / "run")
        with run.directory.locked():
            try:
                return _tuned(run, rounds, on_round)
            finally:
                run.ledger.close()


def _tuned(run: Run, rounds: int, on_round: Callable[[int, int], None] | None) -> Tuning:
    """See `tune`."""
    PHASES.info("rounds with the rate 'auto'")
    before = run.model.work.passes
    taken_back = number = 0
    while True:
        if on_round is not None:
            on_round(number, max(rounds, number + 1))
        record = run.run_round().record
        number += 1
        # Of an entry that takes another back nothing is the round's own.
        update = run.method.round_steps(record.entry)
        taken_back += not len(update)
        if number >= rounds and len(update):
            break
        if number >= rounds + MORE_ROUNDS:
            raise FedForwardError(
                f"None of the last {MORE_ROUNDS + 1} rounds had an update that was kept, so that "
                "there is no rate to show. Set method.batch_size or method.mu higher."
            )
    rate = sum(part.weight * part.learning_rate for part in record.results)
    curve, examples = _curve(run, update, rate)
    return Tuning(
        learning_rate=rate,
        curve=curve,
        objective=run.config.objective,
        rounds=number,
        taken_back=taken_back,
        passes=run.model.work.passes - before,
        examples=examples,
    )


def _automatic(config: Config, rounds: int) -> Config:
    """The configuration with a rate that is found, and nothing that changes it over rounds."""
    content = config.model_dump(mode="json", exclude_unset=True)
    content["method"] = {
        **{k: v for k, v in content["method"].items() if k not in ("rate_spread", "warmup")},
        "learning_rate": "auto",
        "schedule": "constant",
    }
    content["federation"] = {**content.get("federation", {}), "rounds": rounds}
    return validate(content)


def _curve(run: Run, update: Steps, rate: float) -> tuple[tuple[Point, ...], int]:
    """The held-out loss where the last update is 0 to 16 times as long; and of how many examples.

    Args:
        update: that the model has taken.
        rate: that it was taken at.
    """
    examples = run.corpus.heldout[:EXAMPLES]
    PHASES.info("measuring %d lengths of the last update", len(MULTIPLES))
    found: list[list[Any]] = [[] for _ in MULTIPLES]
    for group in by_length(examples, run.plan.evaluation_rows):
        batch = run.collate(group)
        probes = [Probe(batch, perturbation=update.scaled(m - 1.0)) for m in MULTIPLES]
        for place, evaluation in enumerate(run.model.evaluate(probes)):
            found[place].append(evaluation)
    points = []
    for multiple, own in zip(MULTIPLES, found, strict=True):
        _, loss, _, error = map(float, along_update([found[0], own, own]))
        points.append(Point(multiple * rate, loss, error if multiple else 0.0))
    return tuple(points), len(examples)
