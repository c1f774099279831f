"""What learning rate and which blocks suit a model and data, found by a few rounds of "auto".

The rounds run in a folder that is gone afterwards. The last update is then measured on the held-out
examples at multiples of its length, which gives the loss against the rate. Where it is asked for,
what all rounds have added is measured in the upper blocks alone, for several numbers of blocks.
"""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedforward.config.loading import validate
from fedforward.config.schema import Config
from fedforward.core.errors import FedForwardError
from fedforward.core.logs import PHASES
from fedforward.core.steps import NO_STEPS, Evaluation, Probe, Steps
from fedforward.data.sampler import by_length
from fedforward.federation.client import along_update
from fedforward.federation.rate_search import LARGEST_LOSS
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
        loss: the held-out mean after it, in nats (or in the objective's unit); inf where it is not
            finite.
        error: the standard error of the loss less that without the update.
    """

    learning_rate: float
    loss: float
    error: float


@dataclass(frozen=True)
class UpperBlocks:
    """What is left of the fall of the loss where only the upper blocks have moved.

    Attributes:
        blocks: as `model.blocks` takes them, such as "22-29".
        cost: of a pass through them, as a share of one through all tuned blocks.
        loss: the held-out mean, as in `Point`.
        share: of the fall that all tuned blocks have; None where there is no fall.
    """

    blocks: str
    cost: float
    loss: float
    share: float | None


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
        upper_blocks: from the uppermost block to all that are tuned; empty if not asked for.
    """

    learning_rate: float
    curve: tuple[Point, ...]
    objective: str
    rounds: int
    taken_back: int
    passes: float
    examples: int
    upper_blocks: tuple[UpperBlocks, ...] = ()

    @property
    def best(self) -> Point:
        """The point of the curve with the least loss."""
        return min(self.curve, key=lambda point: point.loss)

    def as_json(self) -> dict[str, Any]:
        """As `fedforward tune --json` prints it."""
        return asdict(self) | {"best": asdict(self.best)}


def tune(
    config: Config,
    rounds: int,
    on_round: Callable[[int, int], None] | None = None,
    blocks: bool = False,
) -> Tuning:
    """Run a configuration with the rate "auto" for some rounds, and measure its last update.

    Args:
        rounds: that run at least; more where the last of them has no update that is kept.
        on_round: told how many rounds are done, and of how many.
        blocks: whether to measure what the upper blocks alone make of the loss.

    Raises:
        FedForwardError: the configuration cannot run, its method has no such rate, or no round
            had an update.

    Example:
        >>> from fedforward.config.loading import load
        >>> tune(load("run.toml"), rounds=12).learning_rate  # doctest: +SKIP
        0.0031
    """
    if config.privacy.on:
        raise FedForwardError(
            "`fedforward tune` measures losses of rows, which [privacy] does not allow. Find rates "
            "on public rows: leave [privacy] out, and name them with data.source."
        )
    config = _automatic(config, rounds)
    there = Path(tempfile.gettempdir())
    with errors_of_the_disk(there), tempfile.TemporaryDirectory(prefix="fedforward-") as folder:
        run = Run(config, Path(folder) / "run")
        with run.directory.locked():
            try:
                found = _tuned(run, rounds, on_round)
                return replace(found, upper_blocks=_upper_blocks(run)) if blocks else found
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
        search = run.server.search
        kept = search is not None and search.applied > 0.0
        taken_back += not kept
        if number >= rounds and kept:
            break
        if number >= rounds + MORE_ROUNDS:
            raise FedForwardError(
                f"None of the last {MORE_ROUNDS + 1} rounds had an update that was kept, so that "
                "there is no rate to show. Set method.batch_size or method.mu higher."
            )
    rate = sum(part.weight * part.learning_rate for part in record.results)
    curve, examples = _curve(run, run.method.round_steps(record.entry), rate)
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
    PHASES.info("measuring %d lengths of the last update", len(MULTIPLES))
    found = _measured(run, [update.scaled(m - 1.0) for m in MULTIPLES])
    points = []
    for multiple, own in zip(MULTIPLES, found, strict=True):
        _, loss, _, error = map(float, along_update([found[0], own, own]))
        if loss >= LARGEST_LOSS:
            loss = error = math.inf
        points.append(Point(multiple * rate, loss, error if multiple else 0.0))
    return tuple(points), sum(len(part.counts) for part in found[0])


def _measured(run: Run, perturbations: Sequence[Steps]) -> list[list[Evaluation]]:
    """The held-out examples, or the first of them, at each perturbation of the model."""
    found: list[list[Evaluation]] = [[] for _ in perturbations]
    for group in by_length(run.corpus.heldout[:EXAMPLES], run.plan.evaluation_rows):
        batch = run.collate(group)
        probes = [Probe(batch, perturbation=own) for own in perturbations]
        for place, evaluation in enumerate(run.model.evaluate(probes)):
            found[place].append(evaluation)
    return found


def _upper_blocks(run: Run) -> tuple[UpperBlocks, ...]:
    """The held-out loss where what all rounds have added is kept in the upper blocks alone.

    Raises:
        FedForwardError: the model has no transformer blocks, or one alone is tuned.
    """
    names = run.model.layout.blocks
    numbered = [place for place, name in enumerate(names) if name.isdigit()]
    if len(numbered) < 2:
        raise FedForwardError(
            "--blocks compares tuned transformer blocks, and of this configuration there "
            f"{'is one' if numbered else 'are none'}. Leave it out."
        )
    counts = sorted({len(numbered), *(1 << n for n in range(len(numbered).bit_length()))})
    counts = [count for count in counts if count <= len(numbered)]
    PHASES.info("measuring the upper blocks")
    added = _added(run)
    perturbations = [added.scaled(-1.0)]
    for count in counts:
        lower = np.zeros(len(names), np.bool_)
        lower[numbered[: len(numbered) - count]] = True
        perturbations.append(added.within(lower).scaled(-1.0))
    losses = [
        float(sum(part.sums.sum() for part in own) / sum(part.counts.sum() for part in own))
        for own in _measured(run, perturbations)
    ]
    base, *others = losses
    fall = base - others[-1]
    last = names[numbered[-1]]
    found = []
    for count, loss in zip(counts, others, strict=True):
        first = names[numbered[len(numbered) - count]]
        share = (base - loss) / fall if fall > 0.0 else None
        chosen = last if count == 1 else f"{first}-{last}"
        found.append(UpperBlocks(chosen, count / len(numbered), loss, share))
    return tuple(found)


def _added(run: Run) -> Steps:
    """What the rounds of the ledger have added to the base weights."""
    total, state = NO_STEPS, run.method.new_state()
    for entry in run.ledger.entries():
        update = run.method.update(entry, state)
        total = update.steps if update.from_base else total.scaled(update.decay) + update.steps
    return total
