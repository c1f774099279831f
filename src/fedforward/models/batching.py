"""Batches as the tensors of a forward pass: stacked for several probes, or cut by rows."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedforward.core.batches import IGNORED, JoinedRows, TokenBatch
from fedforward.core.steps import Probe

#: What a forward pass yields: arrays with a row for each row of a probe's batch.
Arrays = tuple[NDArray[Any], ...]
#: From tokens, labels and probes of one forward pass to tensors in main memory, a row for each.
Measure = Callable[[torch.Tensor, torch.Tensor, Sequence[Probe]], tuple[torch.Tensor, ...]]


def stack(batches: Sequence[TokenBatch]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels of several batches as one, int64 [batches * rows, length].

    Every batch gets as many rows, and as long ones, as the largest; what is added does not count.
    """
    rows, length = height_and_length(batches)
    tokens = np.zeros((len(batches), rows, length), np.int64)
    labels = np.full((len(batches), rows, length), IGNORED, np.int64)
    for place, batch in enumerate(batches):
        height, width = batch.tokens.shape
        tokens[place, :height, :width] = batch.tokens
        labels[place, :height, :width] = batch.labels
    flat = (len(batches) * rows, length)
    return torch.from_numpy(tokens.reshape(flat)), torch.from_numpy(labels.reshape(flat))


def height_and_length(batches: Sequence[TokenBatch]) -> tuple[int, int]:
    """The most rows and the most tokens a row of some batches."""
    return (
        max(len(batch.tokens) for batch in batches),
        max(batch.tokens.shape[1] for batch in batches),
    )


def cut(batch: TokenBatch, rows: int) -> list[TokenBatch]:
    """A batch as several of so many rows, each without the padding that it does not need."""
    if isinstance(batch, JoinedRows):
        begins = range(0, len(batch.tokens), rows)
        return [batch.part(slice(begin, begin + rows)) for begin in begins]
    parts = []
    for begin in range(0, len(batch.tokens), rows):
        tokens, labels = batch.tokens[begin : begin + rows], batch.labels[begin : begin + rows]
        used = np.flatnonzero((labels != IGNORED).any(axis=0))
        length = max(2, int(used[-1]) + 1) if len(used) else tokens.shape[1]
        parts.append(replace(batch, tokens=tokens[:, :length], labels=labels[:, :length]))
    return parts
