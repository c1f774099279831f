"""What lying clients report in a simulation: the attacks of `simulation.attack`.

A liar does its round and then reports other scalars. Each attack is a function from the scalars
that the honest clients and the liars have measured to what the liars report. Those that collude
look at all honest reports of the round. Where a method sends signs alone, those of the lie are
sent. Whatever is drawn follows from the run seed, the round and the client. Imports no PyTorch.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedforward.core.seeds import generator
from fedforward.messages.codec import MAX_FLOAT32
from fedforward.messages.report import Report
from fedforward.methods.aggregation import krum_order
from fedforward.methods.base import Method

Floats = NDArray[np.float64]
#: The least λ of a Krum attack, relative to the first one.
LEAST_LAMBDA = 1e-5


@dataclass(frozen=True)
class Scene:
    """What the liars of a round know.

    Attributes:
        honest: float64 [honest clients, H * n], what these report.
        own: float64 [liars, H * n], what the liars have measured.
        factor: `simulation.attack_factor`.
        randoms: of each liar, for what it draws.
    """

    honest: Floats
    own: Floats
    factor: float
    randoms: Sequence[np.random.Generator]

    @property
    def against(self) -> Floats:
        """-sign(Σ_i g_i) over all clients, float64 [H * n]: against what all measured together."""
        against: Floats = -np.sign(self.honest.sum(axis=0) + self.own.sum(axis=0))
        return against

    @property
    def size(self) -> Floats:
        """The root mean square of what each liar has measured, float64 [liars, 1]."""
        sizes: Floats = np.sqrt((self.own**2).mean(axis=1, keepdims=True))
        return sizes


def sign_flip(scene: Scene) -> Floats:
    """-g: every scalar with the other sign (Li et al., 2019, arXiv 1811.03761)."""
    return -scene.own


def scale(scene: Scene) -> Floats:
    """c · g: the scalars times the factor, which may be below 0."""
    return scene.factor * scene.own


def constant(scene: Scene) -> Floats:
    """The same number for each direction: the factor times the root mean square of g."""
    return np.ones_like(scene.own) * scene.factor * scene.size


def random(scene: Scene) -> Floats:
    """N(0, σ²), with σ the factor times the root mean square of g (Xie et al., 2018, 1802.10116).

    DeComFL's kit has a σ of 200, whatever the size of the scalars.
    """
    width = scene.own.shape[1]
    drawn = np.array([numbers.standard_normal(width) for numbers in scene.randoms])
    lies: Floats = scene.factor * scene.size * drawn
    return lies


def little_is_enough(scene: Scene) -> Floats:
    """μ - z s σ: within the spread of honest clients (Baruch et al., 2019, Algorithm 3).

    μ and σ are the mean and the standard deviation over honest clients, the factor is z, and s is
    the sign of μ. The paper has s = 1; the sign of a direction means nothing, so that a shift to
    one side would be noise.
    """
    mean, spread = scene.honest.mean(axis=0), scene.honest.std(axis=0)
    return np.tile(mean - scene.factor * np.sign(mean) * spread, (len(scene.own), 1))


def trim(scene: Scene) -> Floats:
    """Beyond the last honest scalar on the other side (Fang et al., 2020, Section 3.2; b = 2).

    Where all together go down, numbers above the largest honest one; else below the least. Each
    is that extreme times, or divided by, a number drawn from [1, 2], whichever leads further away.
    """
    upwards = scene.against > 0
    extreme = np.where(upwards, scene.honest.max(axis=0), scene.honest.min(axis=0))
    # Away from 0 the extreme is multiplied, towards it divided.
    grows = (extreme > 0) == upwards
    lies = []
    for numbers in scene.randoms:
        drawn = 1.0 + numbers.random(len(extreme))
        lies.append(np.where(grows, extreme * drawn, extreme / drawn))
    return np.array(lies)


def krum(scene: Scene) -> Floats:
    """-λ sign(Σ_i g_i) of all liars, with a λ at which Krum chooses it (Fang et al., 2020, 3.3).

    It begins with the bound of Theorem 1, and is halved until Krum's choice among all reports is a
    liar's. The state before the round is the report 0.
    """
    liars, honest = len(scene.own), scene.honest
    lie = scene.against
    bound = _krum_bound(honest, liars)
    size = bound
    while size > LEAST_LAMBDA * bound:
        reports = np.vstack([np.tile(size * lie, (liars, 1)), honest])
        if krum_order(liars, reports)[0] < liars:
            break
        size /= 2.0
    return np.tile(size * lie, (liars, 1))


def _krum_bound(honest: Floats, liars: int) -> float:
    """The upper bound of λ in Theorem 1, for the reports of honest clients alone."""
    clients, width = len(honest) + liars, honest.shape[1]
    distances = np.linalg.norm(honest[:, None] - honest[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    near = np.sort(distances, axis=1)[:, : max(1, clients - liars - 2)]
    near = np.where(np.isfinite(near), near, 0.0)
    sums = (near**2).sum(axis=1)
    share = max(1, clients - 2 * liars - 1) * width
    longest = float(np.linalg.norm(honest, axis=1).max())
    return math.sqrt(float(sums.min()) / share) + longest / math.sqrt(width)


#: By what `simulation.attack` calls them; "label-flip" lies in the data.
ATTACKS: Mapping[str, Callable[[Scene], Floats]] = {
    "sign-flip": sign_flip,
    "scale": scale,
    "constant": constant,
    "random": random,
    "little-is-enough": little_is_enough,
    "trim": trim,
    "krum": krum,
}


@dataclass(frozen=True)
class Attack:
    """Who lies in a simulation, and how.

    Attributes:
        name: in `ATTACKS`; anything else leaves reports as they are.
        attackers: numbers of the clients that lie, from 0.
        factor: see `Scene`.
        run_seed: of what is drawn.
    """

    name: str = "none"
    attackers: tuple[int, ...] = ()
    factor: float = 1.0
    run_seed: int = 0

    def sent(self, method: Method, round_number: int, reports: Mapping[int, bytes]) -> list[bytes]:
        """The encoded reports of a round as they are sent, in their order.

        Args:
            method: knows where its reports have their scalars.
            round_number: from 0.
            reports: encoded, by client, as they were made.
        """
        act = ATTACKS.get(self.name)
        liars = [client for client in reports if client in self.attackers]
        if act is None or not liars:
            return list(reports.values())
        decoded = {client: Report.decode(data) for client, data in reports.items()}
        told = {client: method.scalars(report) for client, report in decoded.items()}
        own = np.array([told[client] for client in liars])
        # Where nobody is honest, liars know of each other alone.
        honest = np.array([told[client] for client in told if client not in liars] or own)
        randoms = [generator(self.run_seed, "attack", round_number, client) for client in liars]
        lies = act(Scene(honest, own, self.factor, randoms))
        # What float32 does not hold is as large as it can be.
        lies = np.clip(lies, -MAX_FLOAT32, MAX_FLOAT32).astype(np.float32)
        wrong = dict(zip(liars, lies, strict=True))
        return [
            method.with_scalars(report, wrong[client]).encode()
            if client in wrong
            else reports[client]
            for client, report in decoded.items()
        ]
