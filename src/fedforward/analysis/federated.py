"""Gradients of clients' batches at some points, and what they say of the paper's assumptions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedforward.analysis.assumptions import (
    Moments,
    heterogeneity_constants,
    local_rate,
    noise_constants,
    rate_constants,
    step_bound,
)
from fedforward.analysis.derivatives import LossSurface, differentiable
from fedforward.analysis.heterogeneity import divergences, index
from fedforward.analysis.result import Assumed, Differences, MatrixRank
from fedforward.analysis.subject import Subject
from fedforward.core.seeds import direction_seed
from fedforward.core.steps import Steps
from fedforward.federation.learning_rates import update_differences
from fedforward.methods.estimators import TwoPoint
from fedforward.training import build

#: Clients that are sampled, at most, and batches of each.
MOST_CLIENTS, LEAST_BATCHES, MOST_BATCHES = 16, 3, 8
#: Bytes of gradients that are held at once.
MOST_BYTES = 1 << 30
#: Local steps whose update stands for a client's in the index "update difference".
UPDATE_STEPS = 4


@dataclass(frozen=True, eq=False)
class Gradients:
    """What was sampled of clients.

    Attributes:
        clients: their numbers.
        weights: p_i, float64 [N].
        points: names.
        grams: inner products at each point, float64 [N, K, N, K].
        losses: mean over a client's batches, float64 [points, N].
        secants: ‖Δ∇f‖ / ‖Δθ‖ between neighbouring points.
        decisive: number of the point that a rate is for: the base, or the trained point.
        along: gᵀHg / ‖g‖² of ∇f there.
        notes: sentences on what was left out.
    """

    clients: tuple[int, ...]
    weights: NDArray[np.float64]
    points: tuple[str, ...]
    grams: tuple[NDArray[np.float64], ...]
    losses: NDArray[np.float64]
    secants: list[float]
    decisive: int
    along: float
    notes: list[str]

    @property
    def moments(self) -> list[Moments]:
        """Of each point."""
        return [Moments.of(gram, self.weights) for gram in self.grams]


def sample_gradients(
    found: Subject,
    base: NDArray[np.float32],
    trained: NDArray[np.float32] | None,
    points: int,
    rows: int,
    smoothness: float,
    progress: Callable[[int, int], None],
) -> Gradients:
    """Gradients of the first batches of every client at some points.

    The points lie on the line from the base to the trained point; without one, they are reached
    by steps of 1 / ‖H‖ along the mean gradient. The batches are those of a run.

    Args:
        rows: of all clients, at each point.
        smoothness: ‖H‖ of the base.
    """
    model, config = found.model, found.config
    every = len(found.corpus.clients)
    clients = tuple(range(min(every, MOST_CLIENTS)))
    notes = []
    if every > MOST_CLIENTS:
        notes.append(f"Noise and heterogeneity are of the first {MOST_CLIENTS} clients of {every}.")
    size, batch_size = model.layout.parameters, config.method.batch_size
    count = min(MOST_BATCHES, max(LEAST_BATCHES, rows // (len(clients) * batch_size)))
    count = max(2, min(count, MOST_BYTES // (4 * size * len(clients))))
    streams = build.client_batches(config, found.corpus, found.collate)
    batches = [[streams[client][step] for step in range(count)] for client in clients]
    weights = found.weights(clients)
    state = base.copy() if trained is None else base
    grams, losses, names, secants = [], [], [], []
    before: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None
    decisive = 0 if trained is None else points - 1
    along, done, total = 0.0, 0, points * len(clients) * count
    gradients = np.zeros((len(clients) * count, size), np.float32)
    for point in range(points):
        if trained is not None:
            share = point / (points - 1)
            state = ((1.0 - share) * base + share * trained).astype(np.float32)
            names.append(f"{share:.2f} of the way")
        else:
            names.append("base" if point == 0 else f"{point} steps of 1/‖H‖")
        model.assign_state(state)
        found_losses = np.zeros((len(clients), count))
        with differentiable(model):
            for row in range(len(gradients)):
                client, batch = divmod(row, count)
                surface = LossSurface(model, [batches[client][batch]])
                found_losses[client, batch], gradients[row] = surface.gradient()
                done += 1
                progress(done, total)
        mean = np.repeat(weights / count, count) @ gradients.astype(np.float64)
        grams.append(_gram(gradients, len(clients), count))
        losses.append(found_losses.mean(axis=1))
        here = state.astype(np.float64)
        if before is not None and np.any(here != before[0]):
            secants.append(
                float(np.linalg.norm(mean - before[1]) / np.linalg.norm(here - before[0]))
            )
        before = here, mean
        if point == decisive:
            along = _bend_along(found, mean, [b for own in batches for b in own[:1]])
        if trained is None:
            state = (here - mean / smoothness).astype(np.float32)
    return Gradients(
        clients=clients,
        weights=weights,
        points=tuple(names),
        grams=tuple(grams),
        losses=np.array(losses),
        secants=secants,
        decisive=decisive,
        along=along,
        notes=notes,
    )


def _gram(gradients: NDArray[np.float32], clients: int, count: int) -> NDArray[np.float64]:
    """Inner products in float64, in stretches of coordinates."""
    total = np.zeros((len(gradients), len(gradients)))
    for begin in range(0, gradients.shape[1], 1 << 18):
        part = gradients[:, begin : begin + (1 << 18)].astype(np.float64)
        total += part @ part.T
    return total.reshape(clients, count, clients, count)


def _bend_along(found: Subject, mean: NDArray[np.float64], batches: Sequence[object]) -> float:
    """gᵀHg / ‖g‖² of the mean gradient, over one batch of each client."""
    with differentiable(found.model):
        surface = LossSurface(found.model, batches)
        image = surface.hessian(mean[None])[0]
    return float(mean @ image / (mean @ mean))


def assumed(
    found: Subject,
    made: Gradients,
    matrices: Sequence[MatrixRank],
    smoothness: Sequence[float],
) -> Assumed:
    """The constants of the assumptions, and what the theorems make of them.

    Args:
        matrices: Hessian and Gauss-Newton at the last point of the curvature.
        smoothness: every L that was met.
    """
    config, method = found.config, found.method
    hessian, other = matrices
    noise = noise_constants(made.grams, made.weights)
    several = len(made.clients) > 1
    spread = heterogeneity_constants(made.grams, made.weights) if several else None
    directions = max(1, method.directions)
    largest = max(smoothness)
    # Assumption 1 bounds the Hessian from above, and the larger trace is the safer one.
    positive = max(hessian, other, key=lambda matrix: matrix.trace.value)
    clients = len(found.corpus.clients)
    return Assumed(
        points=made.points,
        clients=len(made.clients),
        batches=made.grams[0].shape[1],
        batch_size=config.method.batch_size,
        gradient_squares=tuple(moment.mean_square for moment in made.moments),
        smoothness=largest,
        noise=noise,
        heterogeneity=spread,
        bound=step_bound(
            steps=method.local_steps,
            smoothness=largest,
            c_g=noise.slope.value,
            size=found.model.layout.parameters,
            clients=clients,
        ),
        rates=rate_constants(
            size=found.model.layout.parameters,
            rank=max(1.0, positive.effective_rank.value),
            directions=directions,
            clients=clients,
            steps=method.local_steps,
            rounds=config.federation.rounds,
            c_h=None if spread is None else spread.slope.value,
            sigma_h2=None if spread is None else spread.rest.value,
        ),
        local=local_rate(
            made.moments[made.decisive],
            trace=positive.trace.value,
            along=made.along,
            directions=directions,
            steps=method.local_steps,
            shared=method.capabilities.shared_directions,
        ),
        trace_from=positive.matrix,
    )


def differences(found: Subject, made: Gradients) -> Differences:
    """How clients differ, and which index ranks them as their gradients do."""
    moments = made.moments
    distances = np.mean([moment.distances for moment in moments], axis=0)
    measured = np.sqrt(np.maximum(distances, 0.0))
    away = made.losses - (made.losses @ made.weights)[:, None]
    cosines = np.array([moment.cosines for moment in moments])
    known = np.isfinite(cosines)
    mean = np.where(known, cosines, 0.0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    apart = np.where(known.any(axis=0), 1.0 - mean, np.nan)
    indices = {
        "loss difference": np.abs(away[-1]),
        "window": np.abs(away.mean(axis=0)),
        "update difference": _updates(found, made),
        "gradient cosine": apart,
    }
    if labels := labels_of(found, made.clients):
        indices["label divergence"] = divergences(labels)
    return Differences(
        measured=tuple(measured.tolist()),
        indices=tuple(index(name, own, distances) for name, own in indices.items()),
    )


def _updates(found: Subject, made: Gradients) -> NDArray[np.float64]:
    """s_i = Σ over tensors ‖Δ_i - Δ̄‖ of a few steps of each client, by forward passes."""
    config, model, method = found.config, found.model, found.method
    directions = max(1, method.directions)
    estimator = TwoPoint(directions=directions, mu=config.method.mu)
    streams = build.client_batches(config, found.corpus, found.collate)
    updates = {}
    for client in made.clients:
        seeds, coefficients = [], []
        for step in range(UPDATE_STEPS):
            own = [
                direction_seed(config.run.seed, 0, client, step, direction)
                for direction in range(directions)
            ]
            probes = estimator.probes(
                streams[client][step], Steps.of((), ()), [Steps.of([s], [1.0]) for s in own]
            )
            gradients, _ = estimator.gradients(model.evaluate(probes))
            seeds += own
            coefficients += (-np.nan_to_num(gradients) / directions).tolist()
        updates[client] = Steps.of(seeds, coefficients)
    scores = update_differences(updates, made.weights.tolist(), model.layout, model.distribution)
    return np.array([scores[client] for client in made.clients])


def labels_of(found: Subject, clients: Sequence[int]) -> list[dict[str, int]]:
    """How often each client's examples have each label; empty where there are no labels."""
    corpus = found.corpus
    if corpus.groups and not (corpus.classes or found.config.data.label_words):
        return [dict(corpus.groups[client]) for client in clients]
    if not (corpus.classes or found.config.data.label_words):
        return []
    counted: list[dict[str, int]] = []
    for client in clients:
        own: dict[str, int] = {}
        for example in corpus.clients[client]:
            own[str(example.right)] = own.get(str(example.right), 0) + 1
        counted.append(own)
    return counted
