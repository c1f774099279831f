"""Sparse masks: which coordinates of the tuned tensors move at all, for a whole run.

A mask is another kind of active set, by coordinate in place of by block. It follows from the run
seed or from the base weights, so that it never travels; it takes a byte for each tuned parameter.
"""

from collections.abc import Mapping

import numpy as np
import torch

from fedforward.core.seeds import derive
from fedforward.directions import Distribution, Layout
from fedforward.directions.ops import accumulate
from fedforward.directions.spec import half_normal_table


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
