"""Aligned adapters: the A of a layer spans the directions in which its inputs vary most.

C = Σ x xᵀ over the tokens of some texts, by forward passes of the base. The rows of A are the top r
eigenvectors of C, each divided by the root of its own variance, so that an update of B moves along
all of them alike. They are scaled so that tr(A C Aᵀ) is that of the random A of the run seed.

Where label words are told apart, only what stands at the last token of a prompt decides. The rows
of A are then the directions in which the inputs at that place differ most from text to text. All
tokens together vary most in directions that say nothing of a text, such as that of the first token.
Where R is tuned, the first row is the direction of their mean, and the others are at right angles
to it.

Where the R of B = U R is tuned, U is aligned too: its columns are the directions in which the loss
of these texts pulls the output of the last transformer block, or of each module by itself (see
`loss_gradients`).
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedforward.core.batches import IGNORED, TokenBatch
from fedforward.core.errors import FedForwardError
from fedforward.core.logs import PHASES
from fedforward.core.steps import Probe
from fedforward.models.adapters import OUTPUTS
from fedforward.models.lora import LoraModel, random_factors
from fedforward.models.loss_gradients import LossGradients, OutputGradients, StreamGradients
from fedforward.models.pinned_files import PinnedFile, pinned
from fedforward.models.principal import LEAST_SHARE, principal_directions

LOGGER = logging.getLogger("fedforward.models")
KIND, KEY, COMMAND = "initial A", "lora.init_file", "fedforward align"
#: Powers of its variance that a row of A is as long as, where B and where R is tuned. With the
#: first all rows vary alike; the second moves most along what varies most.
WHITENED, STREAM = -0.5, 0.25
#: Bytes of float64 covariances that are held at once; more layers take another pass over the texts.
MOST_BYTES = 1 << 30


def align(
    model: LoraModel,
    texts: Sequence[NDArray[np.int64]],
    places: Sequence[int] | None = None,
    losses: Sequence[tuple[NDArray[np.bool_], Sequence[int]]] | None = None,
) -> PinnedFile:
    """The aligned A of a model, from the inputs of its adapted layers over some texts.

    The network must be at its base weights. It is run on one text at a time, so nothing is padded.
    Where the texts show fewer than r directions of a layer's inputs, the last rows are those of the
    random A without their parts along the directions found.

    Args:
        texts: int64 [length] each.
        places: of the one token of each text at which inputs are compared, before its last; None
            takes all tokens.
        losses: for U, where R is tuned: of each text which tokens' loss counts, bool [length], and
            the first tokens of its label words (see `LossGradients.add`); None counts all.

    Returns:
        float32 [r, inputs] by name of a layer's A, and U [width, r] where R is tuned, ready to be
        written.

    Raises:
        FedForwardError: no text has two tokens; the gradient of U is 0 or not finite, or the
            network has none.
    """
    least = 0 if model.classes else 1
    kept = [number for number, text in enumerate(texts) if len(text) > least]
    texts = [texts[number] for number in kept]
    losses = None if losses is None else [losses[number] for number in kept]
    places = None if places is None else [places[number] for number in kept]
    if not texts:
        raise FedForwardError("No text with two tokens or more is there to align adapters with.")
    random = random_factors(model)
    layers = {
        name: layer
        for name, layer in model.peft.named_modules()
        if hasattr(layer, "lora_A") and hasattr(layer, "base_layer")
    }
    found: dict[str, torch.Tensor] = {}
    short = done = 0
    for part in _parts(random, layers, model.outputs):
        PHASES.info("aligning adapters: %d of %d layers", done, len(layers))
        own = {n: layers[n] for n in part}
        gradients = _gradients(model, own, first=not done)
        run = _runner(model, texts, gradients, losses)
        try:
            covariances, leaders, inputs = _covariances(own, texts, places, run)
        except _NotSharedError:
            # Some texts were run already.
            gradients = _gradients(model, own, first=not done)
            run = _runner(model, texts, gradients, losses)
            covariances, leaders, inputs = _covariances(own, texts, places, run, share=False)
        if gradients is not None:
            found |= _aligned_outputs(model, gradients, part)
        done += len(part)
        top: dict[str, _Chosen] = {}
        for name in part:
            initial = random[_key(name)].double().cpu().numpy()
            leader = leaders.get(name, name)
            if leader not in covariances:
                found[_key(name)], short = random[_key(name)].cpu(), short + 1
                continue
            if leader not in top:
                # An expert may have been given none of the tokens at `places`.
                single = inputs.get(leader)
                with_r = bool(model.outputs)
                top[leader] = _chosen(covariances[leader], single, len(initial), with_r)
            chosen = top[leader]
            short += len(chosen.directions) < len(initial)
            rows = aligned_rows(
                chosen.directions, chosen.variances, chosen.covariance, initial, chosen.power
            )
            found[_key(name)] = torch.from_numpy(rows.astype(np.float32))
    if short:
        LOGGER.warning(
            "In %d of %d adapted layers the texts show fewer directions than lora.rank = %d; the "
            "other rows of their A are random.",
            short,
            len(layers),
            len(next(iter(random.values()))),
        )
    made_for = {
        "base": model.base_fingerprint,
        **model.adapted,
        "rows": len(texts),
        "tokens": sum(map(len, texts)),
        "positions": "all" if places is None else "last of each prompt",
    }
    return pinned(KIND, found, made_for, f"the {KIND} of this run")


def _gradients(model: LoraModel, layers: Mapping[str, Any], first: bool) -> LossGradients | None:
    """What adds up the gradients for the U of some layers; None where there is nothing to add.

    Args:
        first: whether these are the first layers; one U of all is made with them.
    """
    if model.adapted.get("alignment") == "backward":
        if model.offload is not None:
            raise FedForwardError(
                "lora.alignment = 'backward' needs all blocks at once, and model.offload = 'host' "
                "brings them one at a time. Make lora.init_file on another machine, with "
                "`fedforward align`, or use lora.alignment = 'forward'."
            )
        return OutputGradients(model.network, layers)
    return StreamGradients(model.network) if model.outputs and first else None


def _aligned_outputs(
    model: LoraModel, gradients: LossGradients, layers: Sequence[str]
) -> dict[str, torch.Tensor]:
    """The U of some layers, or of all, by name in a file.

    A layer that the loss does not depend on, such as an expert that is given no token, keeps its
    random U.
    """
    if isinstance(gradients, StreamGradients):
        shared = gradients.shared(model.outputs[OUTPUTS].shape[1])
        return {OUTPUTS: torch.from_numpy(shared.astype(np.float32))}
    found: dict[str, torch.Tensor] = {}
    for name in layers:
        key = f"{name}.{OUTPUTS}"
        own = gradients.directions(name, model.outputs[key].shape[1])
        known = model.outputs[key].cpu().clone()
        found[key] = known if own is None else torch.from_numpy(own.astype(np.float32))
    if not gradients.moments:
        raise FedForwardError(
            "lora.alignment = 'backward': the loss of these rows depends on none of the adapted "
            "modules. Give other rows in data.public, or use lora.alignment = 'forward'."
        )
    return found


@dataclass(frozen=True)
class _Chosen:
    """What the rows of a layer's A are made of (see `aligned_rows`)."""

    directions: NDArray[np.float64]
    variances: NDArray[np.float64]
    covariance: NDArray[np.float64]
    power: float


def _chosen(
    covariance: NDArray[np.float64],
    single: NDArray[np.float64] | None,
    rank: int,
    with_r: bool,
) -> _Chosen:
    """The directions of a layer's inputs that its A takes, and how long its rows are.

    Args:
        covariance: over all tokens, [inputs, inputs].
        single: the inputs at the places that decide, [texts, inputs]; None where all count.
        with_r: whether R is tuned.
    """
    if single is None:
        return _Chosen(
            *principal_directions(covariance, rank), covariance, STREAM if with_r else WHITENED
        )
    if not with_r:
        return _Chosen(*principal_directions(_around_mean(single), rank), covariance, WHITENED)
    return _Chosen(*_beside_mean(single, rank), single.T @ single / len(single), WHITENED)


def aligned_rows(
    directions: NDArray[np.float64],
    variances: NDArray[np.float64],
    covariance: NDArray[np.float64],
    initial: NDArray[np.float64],
    power: float = WHITENED,
) -> NDArray[np.float64]:
    """A of one layer.

    Args:
        directions: orthonormal [found, inputs], the one with the largest variance first.
        variances: of the inputs along each.
        covariance: C, [inputs, inputs].
        initial: the random A, [r, inputs].
        power: of its variance that each row is as long as.

    Returns:
        [r, inputs]; variances that sum to those of the random A.
    """
    found = len(directions)
    if not found:
        return initial
    total = np.einsum("ri,ij,rj->", initial, covariance, initial, optimize=True)
    scale = variances**power
    scale *= np.sqrt(total / np.sum(scale**2 * variances))
    rest = initial[found:]
    rest = rest - (rest @ directions.T) @ directions
    return np.concatenate((directions * scale[:, None], rest))


def _parts(
    random: Mapping[str, torch.Tensor],
    layers: Mapping[str, Any],
    outputs: Mapping[str, torch.Tensor],
) -> list[list[str]]:
    """The layers in their order, cut where their second moments would take too much memory.

    Args:
        outputs: every U by its name in a file.
    """
    number, held = 0, 0
    place = {}
    for name in layers:
        size = 8 * random[_key(name)].shape[1] ** 2
        if (own := outputs.get(f"{name}.{OUTPUTS}")) is not None:
            size += 8 * own.shape[0] ** 2
        if held and held + size > MOST_BYTES:
            number, held = number + 1, 0
        held += size
        place[name] = number
    return [list(part) for _, part in groupby(layers, key=place.__getitem__)]


class _NotSharedError(Exception):
    """A layer that was given another's inputs is given its own as well."""


def _runner(
    model: LoraModel,
    texts: Sequence[NDArray[np.int64]],
    gradients: LossGradients | None,
    losses: Sequence[tuple[NDArray[np.bool_], Sequence[int]]] | None,
) -> Callable[[int], None]:
    """What runs the text of a number; `gradients` of its loss are added in the same pass."""

    def run(number: int) -> None:
        text = texts[number]
        counted, words = (np.ones(len(text), np.bool_), ()) if losses is None else losses[number]
        if gradients is not None and counted[1:].any():
            gradients.add(text, counted, words)
            model.count_pass(gradients.passes(len(words)) * len(text))
            return
        labels = np.full((1, len(text)), IGNORED, np.int64)
        labels[0, -1] = 0 if model.classes else text[-1]
        probe = Probe(TokenBatch(text[None], labels))
        if model.classes:
            model.class_logits([probe])
        else:
            model.token_losses([probe])

    return run


def _covariances(
    layers: Mapping[str, Any],
    texts: Sequence[NDArray[np.int64]],
    places: Sequence[int] | None,
    run: Callable[[int], None],
    share: bool = True,
) -> tuple[dict[str, NDArray[np.float64]], dict[str, str], dict[str, NDArray[np.float64]]]:
    """The mean of x xᵀ of layers over the tokens of texts, float64 [inputs, inputs].

    Args:
        places: see `align`.
        run: runs the text of a number.
        share: whether layers that are given the very same tensor, as those of queries, keys and
            values are, share one.

    Returns:
        By layer; for each layer that shares another's, which one that is; and by layer the inputs
        at `places`, [texts, inputs].

    Raises:
        _NotSharedError: they share some of their inputs and not all.
    """
    sums: dict[str, torch.Tensor] = {}
    tokens = dict.fromkeys(layers, 0)
    single: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    place: list[int] = []
    leaders: dict[str, str] = {}
    last: list[Any] = ["", None]

    def note(name: str, x: torch.Tensor) -> None:
        if share and x is last[1] and name not in sums:
            if leaders.setdefault(name, last[0]) != last[0]:
                raise _NotSharedError
            return
        if name in leaders:
            raise _NotSharedError
        last[:] = [name, x]
        rows = x.detach().reshape(-1, x.shape[-1]).double()
        tokens[name] += len(rows)
        if place and place[0] < len(rows):
            single[name].append(rows[place[0]])
        if name in sums:
            sums[name].addmm_(rows.T, rows)
        else:
            sums[name] = rows.T @ rows

    with _told(layers, note):
        for number in range(len(texts)):
            last[:] = ["", None]
            place[:] = [] if places is None else [places[number]]
            run(number)
    means = {name: (total / tokens[name]).cpu().numpy() for name, total in sums.items()}
    inputs = {name: torch.stack(rows).cpu().numpy() for name, rows in single.items() if rows}
    return means, leaders, inputs


def _around_mean(inputs: NDArray[np.float64]) -> NDArray[np.float64]:
    """The covariance of rows [texts, inputs] around their mean, [inputs, inputs]."""
    away = inputs - inputs.mean(axis=0)
    covariance: NDArray[np.float64] = away.T @ away / len(away)
    return covariance


def _beside_mean(
    inputs: NDArray[np.float64], rank: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The direction of the mean of rows [texts, inputs], and those that vary most beside it.

    All labels look alike along the first. It has a coordinate of its own, so that the many others
    do not move it.

    Returns:
        Orthonormal [at most rank, inputs], and the second moment along each.
    """
    mean = inputs.mean(axis=0)
    length = np.linalg.norm(mean)
    if not length > 0.0:
        return principal_directions(_around_mean(inputs), rank)
    mean = mean / length
    beside = inputs - np.outer(inputs @ mean, mean)
    directions = mean[None]
    if rank > 1:
        others, _ = principal_directions(_around_mean(beside), rank - 1)
        directions = np.concatenate((directions, others))
    moments = np.square(inputs @ directions.T).mean(axis=0)
    # What is left of texts that are all alike is rounding.
    there = moments > LEAST_SHARE * np.square(inputs).sum(axis=1).mean()
    return directions[there], moments[there]


@contextmanager
def _told(layers: Mapping[str, Any], note: Any) -> Iterator[None]:
    """While it is open, `note(name, x)` is called with what a layer is given."""
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _key(name: str) -> str:
    """The name of a layer's A in files."""
    return f"{name}.lora_A.weight"
