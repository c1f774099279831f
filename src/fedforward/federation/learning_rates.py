"""Personal learning rates (FedMeZO, Prop. 3.7): η_i = η_0 + α Φ_i, and the schedule of η_0.

All strategies are functions of what the ledger holds, so a resumed server gives the same rates.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import cos, isfinite, pi

import numpy as np
from numpy.typing import NDArray

from fedforward.core.seeds import generator
from fedforward.core.steps import Steps
from fedforward.directions import TILE, Distribution, Layout
from fedforward.directions.numba_kernels import commit
from fedforward.federation.ledger import Round

#: Rounds that `loss-window` looks back.
WINDOW = 5
#: Tiles whose directions `update-difference` holds at once, per client.
TILES_AT_ONCE = 32


@dataclass(frozen=True)
class RateSettings:
    """How learning rates are chosen.

    Attributes:
        base: η_0.
        spread: α; rates lie in [η_0 - α, η_0 + α].
        client_rates: "fixed", "random", "loss", "loss-window" or "update-difference".
        schedule: "constant", "linear" or "cosine": what η_0 and α are multiplied with.
        warmup: rounds over which the factor rises from 1/warmup to 1.
        rounds: T, where "linear" and "cosine" reach their end.
        final: the factor at the end of "linear" and "cosine".
    """

    base: float
    spread: float
    client_rates: str
    schedule: str
    warmup: int
    rounds: int
    final: float

    def factor(self, round_number: int) -> float:
        """The schedule's multiplier in a round."""
        rising = min(1.0, (round_number + 1) / self.warmup) if self.warmup else 1.0
        done = round_number / max(1, self.rounds)
        if self.schedule == "linear":
            return rising * (1.0 - (1.0 - self.final) * done)
        if self.schedule == "cosine":
            return rising * (self.final + (1.0 - self.final) * 0.5 * (1.0 + cos(pi * done)))
        return rising


def rates(
    settings: RateSettings,
    round_number: int,
    participants: Sequence[int],
    history: Sequence[Round],
    run_seed: int,
    differences: Callable[[], Mapping[int, float]],
) -> dict[int, float]:
    """η_i for each participant of a round.

    Args:
        history: the last rounds, at most `WINDOW`, oldest first.
        differences: s_i of the last round, for "update-difference".
    """
    factor = settings.factor(round_number)
    if settings.client_rates == "random":
        draw = {
            client: float(generator(run_seed, "rate", round_number, client).uniform(-1.0, 1.0))
            for client in participants
        }
    elif settings.client_rates == "fixed" or not history:
        draw = {}
    elif settings.client_rates == "update-difference":
        draw = normalized_scores(differences(), participants)
    else:
        window = history[-1:] if settings.client_rates == "loss" else history[-WINDOW:]
        draw = normalized_scores(mean_losses(window), participants)
    return {
        client: factor * (settings.base + settings.spread * draw.get(client, 0.0))
        for client in participants
    }


def normalized_scores(scores: Mapping[int, float], participants: Sequence[int]) -> dict[int, float]:
    """Φ_i = (s_i - s̄) / max_j |s_j - s̄| in [-1, 1], over the participants that have a score.

    Participants without a score (absent, or all steps skipped) get 0, which is η_0; so do all when
    the scores are equal.
    """
    known = {c: scores[c] for c in participants if c in scores and isfinite(scores[c])}
    if not known:
        return dict.fromkeys(participants, 0.0)
    mean = sum(known.values()) / len(known)
    width = max(abs(score - mean) for score in known.values())
    # Equal scores differ in their last bits; dividing by that would be noise at full strength.
    if width <= 1e-12 * abs(mean):
        return dict.fromkeys(participants, 0.0)
    return {c: (known[c] - mean) / width if c in known else 0.0 for c in participants}


def mean_losses(history: Sequence[Round]) -> dict[int, float]:
    """Each client's mean training loss over the given rounds in which it reported one."""
    losses: dict[int, list[float]] = {}
    for record in history:
        for result in record.results:
            if isfinite(result.report.loss):
                losses.setdefault(result.report.client, []).append(result.report.loss)
    return {client: sum(values) / len(values) for client, values in losses.items()}


def update_differences(
    updates: Mapping[int, Steps],
    weights: Sequence[float],
    layout: Layout,
    distribution: Distribution,
    threads: int = 1,
) -> dict[int, float]:
    """s_i = Σ_tensors ‖Δ_i - Δ̄‖₂ from seeds and layout alone, without any weights of the model.

    Args:
        updates: Δ_i, what client i's round alone would do.
        weights: p_i in the same order; Δ̄ = Σ_i p_i Δ_i.
    """
    shares = np.array(weights)
    totals = np.zeros(len(updates))
    zeros = np.zeros(TILES_AT_ONCE * TILE, np.float32)
    moved = np.empty((len(updates), len(zeros)), np.float32)
    for size, first_tile, owner in zip(
        layout.sizes, layout.first_tiles, layout.owners, strict=True
    ):
        own = [steps.block(owner) for steps in updates.values()]
        squares = np.zeros(len(updates))
        for begin in range(0, size, len(zeros)):
            count = min(len(zeros), size - begin)
            for row, steps in enumerate(own):
                commit(
                    zeros[:count],
                    steps.seeds,
                    steps.coefficients,
                    first_tile=first_tile + begin // TILE,
                    distribution=distribution,
                    out=moved[row, :count],
                    threads=threads,
                )
            squares += _squared_distances(moved[:, :count], shares)
        totals += np.sqrt(squares)
    return dict(zip(updates, totals.tolist(), strict=True))


def _squared_distances(
    updates: NDArray[np.float32], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    float64 = updates.astype(np.float64)
    away = float64 - weights @ float64
    squares: NDArray[np.float64] = np.einsum("ij,ij->i", away, away)
    return squares
