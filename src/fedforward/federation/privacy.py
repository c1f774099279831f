"""What a run's noise is worth: ε at δ by Rényi differential privacy, and σ for an ε.

The curve of the subsampled Gaussian mechanism (Mironov, Talwar and Zhang, 2019) and its conversion
(Balle et al., 2020, theorem 21) are those of Opacus, of which only the file with them is loaded: it
needs no PyTorch. Adjacency is add-or-remove of one example. Imports no PyTorch.
"""

import importlib.util
import math
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

from fedforward.core.errors import FedForwardError

#: Orders α at which the curve is looked at.
ORDERS = (*(1.0 + x / 10.0 for x in range(1, 100)), *range(12, 64), *range(64, 513, 8), 1024)
#: Between which σ is looked for, and how near to the least that will do.
LEAST_NOISE, MOST_NOISE, NEAR = 0.2, 2000.0, 1e-4


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
    """

    clip: float
    noise_multiplier: float
    delta: float
    batch_size: int
    examples: int
    local_steps: int

    @property
    def chance(self) -> float:
        """q, of each example in a sample."""
        return min(1.0, self.batch_size / self.examples)

    def epsilon(self, rounds: int) -> float:
        """ε of so many rounds, all of which a client took part in."""
        return epsilon(self.chance, self.noise_multiplier, rounds * self.local_steps, self.delta)


def rdp(chance: float, noise_multiplier: float, steps: int) -> list[float]:
    """The Rényi divergences of so many steps at `ORDERS`."""
    curve = _accountant().compute_rdp(
        q=chance, noise_multiplier=noise_multiplier, steps=steps, orders=list(ORDERS)
    )
    return [float(value) for value in curve]


@cache
def epsilon(chance: float, noise_multiplier: float, steps: int, delta: float) -> float:
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
        found, _ = _accountant().get_privacy_spent(
            orders=list(ORDERS), rdp=rdp(chance, noise_multiplier, steps), delta=delta
        )
    return max(0.0, float(found))


@cache
def noise_for(target: float, chance: float, steps: int, delta: float) -> float:
    """The least σ, to a part in 10,000, with which so many steps stay within ε = `target`.

    Raises:
        FedForwardError: there is none below 2,000, or Opacus is not installed.
    """
    low, high = LEAST_NOISE, MOST_NOISE
    if epsilon(chance, high, steps, delta) > target:
        raise FedForwardError(
            f"privacy.target_epsilon = {target:g} cannot be kept over {steps} steps with any noise "
            f"up to {MOST_NOISE:g} times privacy.clip. Raise it, or take fewer federation.rounds."
        )
    if epsilon(chance, low, steps, delta) <= target:
        return low
    while high / low > 1 + NEAR:
        middle = math.sqrt(low * high)
        within = epsilon(chance, middle, steps, delta) <= target
        low, high = (low, middle) if within else (middle, high)
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
