"""What a run's noise is worth: ε at δ by Rényi differential privacy, and σ for an ε.

The curve of the subsampled Gaussian mechanism (Mironov, Talwar and Zhang, 2019) and its conversion
(Balle et al., 2020, theorem 21) are those of Opacus, of which only the file with them is loaded: it
needs no PyTorch. They are of one example added or removed. The curve of one replaced by another is
integrated here. Laplace noise has an ε of its own, without δ. Imports no PyTorch.
"""

import importlib.util
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np

from fedforward.core.errors import FedForwardError
from fedforward.methods.privacy import Noise

#: Orders α at which the curve is looked at.
ORDERS = (*(1.0 + x / 10.0 for x in range(1, 100)), *range(12, 64), *range(64, 513, 8), 1024)
#: Between which σ is looked for, and how near to the least that will do.
LEAST_NOISE, MOST_NOISE, NEAR = 0.2, 2000.0, 1e-4
#: Beyond this exponent a mixture is its larger part.
MOST_EXPONENT = 500.0

Adjacency = Literal["add-remove", "replace-one"]


@dataclass(frozen=True)
class Guarantee:
    """Settings of a run that decide its privacy.

    Attributes:
        clip: C.
        noise_multiplier: σ.
        delta: δ.
        batch_size: B, examples that a sample is expected to have.
        examples: n, as all may know; B / n is the chance of each in a sample.
        local_steps: H, samples of a round.
        noise: "gaussian", or "laplace", whose δ is 0.
        adjacency: "add-remove" of one example, or "replace-one" by another.
    """

    clip: float
    noise_multiplier: float
    delta: float
    batch_size: int
    examples: int
    local_steps: int
    noise: Noise = "gaussian"
    adjacency: Adjacency = "add-remove"

    @property
    def chance(self) -> float:
        """q, of each example in a sample."""
        return min(1.0, self.batch_size / self.examples)

    def epsilon(self, rounds: int) -> float:
        """ε of so many rounds, all of which a client took part in."""
        steps = rounds * self.local_steps
        return self._epsilon(self.noise_multiplier, steps)

    def calibrated(self, target: float, rounds: int) -> "Guarantee":
        """With the least σ, to a part in 10,000, that keeps so many rounds within ε = `target`.

        Raises:
            FedForwardError: there is none below 2,000, or Opacus is not installed.
        """
        steps = rounds * self.local_steps
        noise = _least(lambda sigma: self._epsilon(sigma, steps), target, steps)
        return replace(self, noise_multiplier=noise)

    def _epsilon(self, noise_multiplier: float, steps: int) -> float:
        if self.noise == "laplace":
            return steps * laplace_epsilon(self.chance, noise_multiplier, self.adjacency)
        return epsilon(self.chance, noise_multiplier, steps, self.delta, self.adjacency)


def laplace_epsilon(
    chance: float, noise_multiplier: float, adjacency: Adjacency = "add-remove"
) -> float:
    """ε of one step with Laplace noise, δ = 0; those of several steps add up.

    An example is in a sample with the chance q, and then shifts a sum by at most C (L1), so that no
    density changes by more than the factor e^(1/σ). Added or removed, it changes that of a step by
    at most 1 + q (e^(1/σ) - 1). Replaced, by that over 1 + q (e^(-1/σ) - 1): one example has raised
    the density, and the other lowers it.
    """
    most = 1.0 / noise_multiplier
    if most > MOST_EXPONENT:
        return most if adjacency == "add-remove" else 2.0 * most
    raised = math.log1p(chance * math.expm1(most))
    if adjacency == "add-remove":
        return raised
    return raised - math.log1p(chance * math.expm1(-most))


def rdp(chance: float, noise_multiplier: float, steps: int) -> list[float]:
    """The Rényi divergences of so many steps at `ORDERS`, an example added or removed."""
    curve = _accountant().compute_rdp(
        q=chance, noise_multiplier=noise_multiplier, steps=steps, orders=list(ORDERS)
    )
    return [float(value) for value in curve]


def replacement_rdp(chance: float, noise_multiplier: float, steps: int) -> list[float]:
    """The Rényi divergences of so many steps at `ORDERS`, an example replaced by another.

    exp((α - 1) D) = E[(1 - q + qA)^α (1 - q + qB)^(1 - α)], where A and B are the density ratios of
    the shifts u and v by the two examples, beside no shift. By Price's theorem it falls with the
    covariance of log A and log B, and it rises with the lengths of u and v, since it is convex in
    A and in B. So the largest is that of u = -v with length C, which is an integral over a line.
    """
    return [steps * _replaced(chance, 1.0 / noise_multiplier, order) for order in ORDERS]


def _replaced(chance: float, shift: float, order: float) -> float:
    """The integral by equal steps, which leaves out less than float64 can show."""
    step = 0.1 * min(1.0, 1.0 / shift)
    x = np.arange(-12.0, 2.0 * order * shift + 12.0, step)
    stay = -np.inf if chance >= 1.0 else math.log1p(-chance)
    ratios = [
        np.logaddexp(stay, math.log(chance) + sign * shift * x - shift**2 / 2) for sign in (1, -1)
    ]
    exponents = order * ratios[0] + (1.0 - order) * ratios[1] - x**2 / 2
    largest = exponents.max()
    total = np.exp(exponents - largest).sum() * step / math.sqrt(2.0 * math.pi)
    return float((largest + math.log(total)) / (order - 1.0))


@cache
def epsilon(
    chance: float,
    noise_multiplier: float,
    steps: int,
    delta: float,
    adjacency: Adjacency = "add-remove",
) -> float:
    """ε at δ of the subsampled Gaussian mechanism after so many steps.

    Raises:
        FedForwardError: Opacus is not installed.

    Example:
        >>> round(epsilon(chance=256 / 60000, noise_multiplier=1.1, steps=14062, delta=1e-5), 2)
        2.6
    """
    if steps == 0:
        return 0.0
    with warnings.catch_warnings():
        # That another order might be better: ε is then larger than it need be, never smaller.
        warnings.simplefilter("ignore")
        replaced = adjacency == "replace-one"
        curve = (replacement_rdp if replaced else rdp)(chance, noise_multiplier, steps)
        found, _ = _accountant().get_privacy_spent(orders=list(ORDERS), rdp=curve, delta=delta)
    return max(0.0, float(found))


def _least(cost: Callable[[float], float], target: float, steps: int) -> float:
    """The least σ at which `cost` is within a target."""
    low, high = LEAST_NOISE, MOST_NOISE
    if cost(high) > target:
        raise FedForwardError(
            f"privacy.target_epsilon = {target:g} cannot be kept over {steps} steps with any noise "
            f"up to {MOST_NOISE:g} times privacy.clip. Raise it, or take fewer federation.rounds."
        )
    if cost(low) <= target:
        return low
    while high / low > 1 + NEAR:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if cost(middle) <= target else (middle, high)
    return high


@cache
def _accountant() -> ModuleType:
    """The module of Opacus with the curve, without the package around it, which needs PyTorch."""
    package = importlib.util.find_spec("opacus")
    folders = list(package.submodule_search_locations or ()) if package is not None else []
    for folder in folders:
        path = Path(folder) / "accountants" / "analysis" / "rdp.py"
        spec = importlib.util.spec_from_file_location("fedforward_opacus_rdp", path)
        if path.is_file() and spec is not None and spec.loader is not None:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    raise FedForwardError(
        "The section [privacy] needs the accountant of Opacus, which is not installed here. "
        "Install it with `pip install 'fedforward[privacy]'`."
    )
