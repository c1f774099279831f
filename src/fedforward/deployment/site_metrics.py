"""What a site says that it measured, checked, and several sites' metrics combined."""

import math
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from statistics import median_low
from typing import Any

import numpy as np

from fedforward.core.errors import MessageError
from fedforward.federation.plausibility import LEAST_TELLERS, plausible_losses

#: A site's held-out data count for at most so many times what those of the median site do.
FAR_WEIGHT = 10


@dataclass(frozen=True)
class SiteMetrics:
    """The body of a METRICS message.

    Attributes:
        rounds: ledger rounds that the site holds.
        digest: of its tuned state, hexadecimal.
        examples: held-out examples.
        tokens: held-out answer tokens.
        loss: mean held-out loss per answer token, in nats; NaN where it is not finite; None where
            none was measured.
        metrics: by name; NaN where one is not finite.
    """

    rounds: int
    digest: str
    examples: int
    tokens: int
    loss: float | None
    metrics: dict[str, float]

    @classmethod
    def decode(cls, content: dict[str, Any]) -> "SiteMetrics":
        """From a message's JSON, in which null stands for what is not finite.

        Raises:
            MessageError: something is missing, of another type or out of range.
        """
        try:
            metrics = content.get("metrics", {})
            if not isinstance(metrics, dict):
                raise TypeError(f"metrics {reprlib.repr(metrics)}")
            return cls(
                rounds=_count(content["rounds"]),
                digest=bytes.fromhex(content["digest"]).hex(),
                examples=_count(content["examples"]),
                tokens=_count(content["tokens"]),
                loss=_loss(content["heldout_loss"]) if "heldout_loss" in content else None,
                metrics={str(name): _real(value) for name, value in metrics.items()},
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise MessageError(f"Metrics were refused: {error!r} in them.") from error

    @property
    def withheld(self) -> bool:
        """Whether it says nothing of held-out rows."""
        return self.loss is None and not self.metrics

    def complete(self, names: Sequence[str]) -> bool:
        """Whether the loss and these metrics are there, and no others."""
        return self.loss is not None and set(self.metrics) == set(names)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**53:
        raise ValueError(f"{reprlib.repr(value)} is not a count")
    return value


def _real(value: Any) -> float:
    if value is None:
        return math.nan
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{reprlib.repr(value)} is not a number")
    return float(value)


def _loss(value: Any) -> float:
    """A mean cross-entropy, which is never below 0."""
    loss = _real(value)
    if loss < 0.0:
        raise ValueError(f"{loss:g} is not a loss")
    return loss


def combined(answers: Sequence[SiteMetrics]) -> dict[str, Any]:
    """`heldout_loss` and `metrics` of several sites together; empty where nothing was measured.

    From three sites on there are `medians` of both beside them, which decide when a run stops.

    Losses are weighted by answer tokens and other metrics by examples; perplexity is that of the
    combined loss. A site whose loss is not finite is left out as long as another's is, and one
    whose loss is far from most is. None counts for more than some times what the median does.
    """
    measured = [(answer.loss, answer) for answer in answers if answer.loss is not None]
    sound = [(loss, answer) for loss, answer in measured if math.isfinite(loss)]
    if 2 * len(sound) < len(measured):
        # One that is finite does not hide that most are not.
        sound = measured
    if not sound:
        return {}
    tellers = [answer for _, answer in sound]
    if all(math.isfinite(loss) for loss, _ in sound):
        sound = list(compress(sound, plausible_losses([loss for loss, _ in sound])))
    loss = weighted_mean([loss for loss, _ in sound], [answer.tokens for _, answer in sound])
    figures: dict[str, Any] = {"heldout_loss": loss}
    metrics = {}
    for name in sound[0][1].metrics:
        having = [answer for _, answer in sound if name in answer.metrics]
        values = [answer.metrics[name] for answer in having]
        metrics[name] = weighted_mean(values, [answer.examples for answer in having])
    if "perplexity" in metrics:
        with np.errstate(over="ignore"):
            metrics["perplexity"] = float(np.exp(loss))
    if metrics:
        figures["metrics"] = metrics
    if len(tellers) >= LEAST_TELLERS:
        figures["medians"] = _medians(tellers)
    return figures


def _medians(answers: Sequence[SiteMetrics]) -> dict[str, float]:
    """What a run is stopped by: one site of several does not move these far."""
    losses = [math.inf if a.loss is None or math.isnan(a.loss) else a.loss for a in answers]
    found = {"heldout_loss": median_low(losses)}
    for name in answers[0].metrics:
        values = [a.metrics[name] for a in answers if math.isfinite(a.metrics.get(name, math.nan))]
        if values:
            found[name] = median_low(values)
    return found


def weighted_mean(values: Sequence[float], weights: Sequence[int]) -> float:
    """Σ w v / Σ w in float64, no w above a multiple of the median; NaN where all are 0."""
    if not any(weights):
        return math.nan
    most = FAR_WEIGHT * median_low([weight for weight in weights if weight])
    weights = [min(weight, most) for weight in weights]
    return float(np.average(np.array(values, np.float64), weights=np.array(weights, np.float64)))
