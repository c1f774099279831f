"""Sparse masks: which coordinates of the tuned tensors move at all, for a whole run.

A mask is another kind of active set, by coordinate in place of by block. It follows from the run
seed or from the base weights, so that it never travels, or it lies in a file that every party has.
It takes a byte for each tuned parameter.
"""

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from fedforward.core.batches import TokenBatch
from fedforward.core.errors import FedForwardError
from fedforward.core.logs import PHASES
from fedforward.core.seeds import derive
from fedforward.directions import Distribution, Layout
from fedforward.directions.ops import accumulate
from fedforward.directions.spec import half_normal_table
from fedforward.models.base import CausalModel
from fedforward.models.pinned_files import PinnedFile, pinned

LOGGER = logging.getLogger("fedforward.models")
KIND, KEY, COMMAND = "mask", "method.mask_file", "fedforward mask"


def random_mask(
    tensors: Mapping[str, torch.Tensor], layout: Layout, density: float, run_seed: int
) -> dict[str, torch.Tensor]:
    """A share of the coordinates, drawn from a direction of the run, the same on every device.

    Returns:
        bool tensors in the shapes of the tuned ones.
    """
    table = half_normal_table()
    values = np.sort(np.concatenate((-table, table)))
    threshold = float(values[max(1, round(density * len(values))) - 1])
    seed = np.array([derive(run_seed, "mask")], dtype=np.uint64)
    masks = {}
    for name, first_tile in zip(layout.names, layout.first_tiles, strict=True):
        drawn = torch.zeros_like(tensors[name], dtype=torch.float32)
        accumulate(
            drawn,
            seed,
            np.ones(1, np.float32),
            first_tile=first_tile,
            distribution=Distribution.GAUSSIAN,
            out=drawn,
        )
        masks[name] = drawn <= threshold
    return masks


def small_weights_mask(
    tensors: Mapping[str, torch.Tensor], density: float
) -> dict[str, torch.Tensor]:
    """In every tensor, the share of the base weights with the least magnitude.

    After Sparse MeZO (arXiv 2402.15751), which perturbs small weights alone; its thresholds are per
    layer, ours per tensor.

    Returns:
        bool tensors in the shapes of the tuned ones.
    """
    masks = {}
    for name, tensor in tensors.items():
        size = tensor.detach().float().abs().flatten()
        count = max(1, round(density * size.numel()))
        masks[name] = tensor.detach().float().abs() <= size.kthvalue(count).values
    return masks


def sensitivity_mask(
    model: CausalModel, batches: Sequence[TokenBatch], density: float
) -> PinnedFile:
    """The share of the tuned coordinates with the largest mean squared gradient of the loss.

    After SensZOQ (arXiv 2406.02913): one backward pass for each batch, before the run, anywhere.
    A tensor's gradient is squared and dropped as soon as it is there, so that beside the weights
    there is one float32 number for each tuned coordinate.

    Args:
        batches: at least one.
        density: share of all tuned coordinates; those whose gradient is 0 are never among them.

    Returns:
        By name of a tensor, the numbers of its free coordinates, int64, in order.

    Raises:
        FedForwardError: the gradient is 0 or not finite everywhere.
    """
    total = _squared_gradients(model, batches)
    every = np.concatenate([total[name].ravel() for name in model.layout.names])
    count = max(1, round(density * len(every)))
    if not np.isfinite(every).all() or not every.any():
        what = "0 everywhere" if np.isfinite(every).all() else "not finite"
        raise FedForwardError(
            f"The gradient of the loss on these rows is {what}, so that no mask can be made of it. "
            "Give other rows in data.public, or another model.dtype."
        )
    least = max(np.partition(every, len(every) - count)[len(every) - count], np.float32(0.0))
    chosen = np.flatnonzero(every > least)
    # Of those that are as large as the least, the first.
    level = np.flatnonzero(every == least) if least > 0 else np.empty(0, np.int64)
    chosen = np.sort(np.concatenate((chosen, level[: count - len(chosen)])))
    if len(chosen) < count:
        LOGGER.warning(
            "The mask has %d coordinates in place of %d: the gradient of the others is 0, as that "
            "of A is while B is 0.",
            len(chosen),
            count,
        )
    edges = np.cumsum([0, *model.layout.sizes])
    places = np.searchsorted(chosen, edges)
    free = {
        name: torch.from_numpy(chosen[places[n] : places[n + 1]] - edges[n])
        for n, name in enumerate(model.layout.names)
    }
    made_for = {
        "base": model.base_fingerprint,
        "layout": model.layout.fingerprint,
        "density": density,
        "coordinates": len(chosen),
        "rows": sum(len(batch.tokens) for batch in batches),
    }
    return pinned(KIND, free, made_for, "the mask of this run")


def _squared_gradients(
    model: CausalModel, batches: Sequence[TokenBatch]
) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    """The sum of squared gradients over batches, float32, by tensor."""
    parameters = {parameter.data_ptr(): parameter for parameter in model.tuned_parameters()}
    total = {name: torch.zeros(t.shape, device=t.device) for name, t in model.tensors.items()}
    handles = []

    def note(name: str) -> object:
        def add(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            total[name] += parameter.grad.float() ** 2
            parameter.grad = None

        return add

    for name, tensor in model.tensors.items():
        parameter = parameters[tensor.data_ptr()]
        parameter.requires_grad_(True)
        handles.append(parameter.register_post_accumulate_grad_hook(note(name)))
    try:
        for number, batch in enumerate(batches):
            PHASES.info("measuring gradients: %d of %d batches", number, len(batches))
            model.loss(batch).backward()
    finally:
        for handle in handles:
            handle.remove()
        for parameter in parameters.values():
            parameter.requires_grad_(False)
    return {name: squares.cpu().numpy() for name, squares in total.items()}


def mask_of(made: PinnedFile, model: CausalModel) -> dict[str, torch.Tensor]:
    """A mask of a file, for a model at its base.

    Returns:
        bool tensors in the shapes of the tuned ones.

    Raises:
        FedForwardError: it was made for another model or other tuned tensors.
    """
    again = "make it again with `fedforward mask CONFIG --out FILE`."
    layout = model.layout
    if made.made_for.get("base") != model.base_fingerprint:
        raise FedForwardError(
            f"{made.origin} was made for a base with other weights than this model.path, as "
            f"model.dtype holds it ({str(made.made_for.get('base'))[:12]}… there, "
            f"{model.base_fingerprint[:12]}… here). Give that base, or {again}"
        )
    fits = made.made_for.get("layout") == layout.fingerprint
    fits = fits and made.tensors.keys() == set(layout.names)
    sizes = dict(zip(layout.names, layout.sizes, strict=True))
    if not fits or any(len(t) and int(t.max()) >= sizes[n] for n, t in made.tensors.items()):
        raise FedForwardError(
            f"{made.origin} was made for other tuned tensors than model.tune, model.blocks and the "
            f"section [lora] say here. Set these as they were, or {again}"
        )
    masks = {}
    for name, tensor in model.tensors.items():
        mask = torch.zeros(tensor.numel(), dtype=torch.bool)
        mask[made.tensors[name]] = True
        masks[name] = mask.view(tensor.shape).to(tensor.device)
    return masks
