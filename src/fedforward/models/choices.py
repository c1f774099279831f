"""Possible answers that share a row: what is read where, who sees whom, and whether it is right.

A row is what the answers of an example have in common, followed by their endings (`JoinedRows`).
An ending sees the common part and itself, at the positions that it has in its own answer. Whether a
network takes such rows is tried against a row for each answer.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedforward.core.batches import IGNORED, ChoiceBatch, JoinedRows, TokenBatch
from fedforward.core.errors import out_of_memory
from fedforward.core.steps import Probe, ProbePlan, Steps
from fedforward.data.examples import Example
from fedforward.data.sampler import collate_choices, join
from fedforward.models.loading import longest_sequence
from fedforward.models.trial import trial_tokens

if TYPE_CHECKING:
    from fedforward.models.base import CausalModel

#: What two ways to measure a text may differ by, relative to the loss, by whether weights are
#: float32: rounding.
ROUNDING = {True: 5e-5, False: 2e-2}
#: How many times as much joined rows that are read as text must differ by, likewise.
TELLING = {True: 20.0, False: 4.0}
#: Tokens of a row where a network sets no limit.
NO_LIMIT = 1 << 20
#: Keys of configurations that say how far back attention looks.
WINDOWS = {
    "sliding_window",
    "attention_window",
    "attention_window_size",
    "attention_chunk_size",
    "window_size",
}


@dataclass(frozen=True, eq=False)
class Choices:
    """What a model thinks of the possible answers of examples.

    Attributes:
        sums: float64 [examples, answers], the summed loss of each answer's tokens in nats, up to a
            number of each example: answers of one token are measured without the normaliser, which
            is the same for all of them.
        losses: float64 [examples], the loss of the right answer's tokens; where joined rows of
            single tokens were measured without `loss`, it is 0.
    """

    sums: NDArray[np.float64]
    losses: NDArray[np.float64]


def of_sums(sums: NDArray[np.float64], right: NDArray[np.int64]) -> Choices:
    """`Choices` from the loss of each answer, float64 [examples, answers]."""
    return Choices(sums, sums[np.arange(len(right)), right])


@dataclass(frozen=True, eq=False)
class Asked:
    """What is read of the rows of several batches; see `JoinedRows`.

    Attributes:
        places: int64 [rows, answers, tokens].
        targets: int64 [rows, answers, tokens]; all IGNORED in rows that are added.
        right: int64 [rows].
    """

    places: torch.Tensor
    targets: torch.Tensor
    right: torch.Tensor

    @property
    def right_targets(self) -> torch.Tensor:
        """The right answers' first tokens, int64 [rows, 1]."""
        return self.targets[:, :, 0].gather(1, self.right[:, None])


def stack(batches: Sequence[JoinedRows], rows: int) -> Asked:
    """What is read of several batches, each with so many rows."""
    shape = np.max([batch.targets.shape[1:] for batch in batches], axis=0)
    places = np.zeros((len(batches), rows, *shape), np.int64)
    targets = np.full((len(batches), rows, *shape), IGNORED, np.int64)
    right = np.zeros((len(batches), rows), np.int64)
    for place, batch in enumerate(batches):
        height, answers, tokens = batch.targets.shape
        places[place, :height, :answers, :tokens] = batch.places
        targets[place, :height, :answers, :tokens] = batch.targets
        right[place, :height] = batch.right
    flat = (len(batches) * rows, *shape)
    return Asked(
        torch.from_numpy(places.reshape(flat)),
        torch.from_numpy(targets.reshape(flat)),
        torch.from_numpy(right.reshape(-1)),
    )


def branching(
    batches: Sequence[JoinedRows],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """Positions and mask of joined rows, as arguments of a network.

    Args:
        shape: rows of all batches and their length.
        dtype: of the mask, which is added to attention's scores: [rows, 1, length, length].
    """
    rows, length = shape[0] // len(batches), shape[1]
    positions = np.zeros((len(batches), rows, length), np.int64)
    endings = np.full((len(batches), rows, length), -1, np.int64)
    for place, batch in enumerate(batches):
        height, width = batch.tokens.shape
        positions[place, :height, :width] = batch.positions
        endings[place, :height, :width] = batch.endings
    of = torch.from_numpy(endings.reshape(shape)).to(device)
    before = torch.ones((length, length), dtype=torch.bool, device=device).tril()
    seen = (of[:, None, :] == 0) | (of[:, None, :] == of[:, :, None])
    mask = torch.zeros((shape[0], 1, length, length), dtype=dtype, device=device)
    mask.masked_fill_(~(seen & before)[:, None], torch.finfo(dtype).min)
    return {
        "position_ids": torch.from_numpy(positions.reshape(shape)).to(device),
        "attention_mask": mask,
    }


def with_choices(model: "CausalModel", plan: ProbePlan) -> ProbePlan:
    """A plan that says which label words share a row, found out on two short texts.

    Probes of a batch are measured, with their forward pass shared where the plan shares it: both
    ways, and for words of several tokens in a third way, the joined rows read as if they were
    text. That is wrong, and the two ways must differ by far less.
    """
    if model.classes:
        return plan
    kept = model.plan
    try:
        model.plan = plan
        if not _agree(model, (1, 1, 1)):
            return plan
        plan = replace(plan, joins_choices=True)
        if _takes_branches(model) and _agree(model, (1, 2, 3)):
            plan = replace(plan, most_branching=_row_limit(model.network))
    finally:
        model.plan = kept
        model.clear_cache()
    return plan


def _takes_branches(model: "CausalModel") -> bool:
    names = inspect.signature(model.network.forward).parameters
    return {"attention_mask", "position_ids"} <= names.keys()


def _row_limit(network: Any) -> int:
    """Tokens of a row that attention sees all of."""
    config = vars(network.config.get_text_config())
    limits = [value for key, value in config.items() if key in WINDOWS and type(value) is int]
    limits += [longest_sequence(network) or NO_LIMIT]
    return min(limit for limit in limits if limit > 0)


def _agree(model: "CausalModel", lengths: Sequence[int]) -> bool:
    """Whether joined rows of words of so many tokens give what a row for each word does."""
    exact = all(tensor.dtype is torch.float32 for tensor in model.network.parameters())
    examples = _examples(trial_tokens(model.network).numpy(), lengths)
    apart, joined = collate_choices(examples), join(examples)
    last = np.arange(len(model.layout.blocks)) == len(model.layout.blocks) - 1
    steps = [Steps.of([seed], [1e-2]).within(last) for seed in (1, 2)]

    def sums(rows: TokenBatch) -> NDArray[np.float64]:
        batch = ChoiceBatch(rows, apart.right)
        probes = [Probe(batch, perturbation=part) for part in steps]
        return np.array([found.sums for found in model.choices(probes)])

    try:
        expected, found = sums(apart.rows), sums(joined)
        text = sums(_as_text(joined)) if joined.branches else found
    except Exception as error:
        # Networks raise whatever they like where they are given what they do not expect.
        if out_of_memory(error):
            raise
        return False
    rounding = ROUNDING[exact] * np.abs(expected).max()
    # Words of one token are measured up to a number of each example.
    expected, found, text = (part - part[..., :1] for part in (expected, found, text))
    if joined.branches and not np.abs(text - expected).max() > TELLING[exact] * rounding:
        return False
    return bool(np.abs(found - expected).max() <= rounding)


def _examples(texts: NDArray[np.int64], lengths: Sequence[int]) -> list[Example]:
    """Two prompts of different lengths, each with words of so many tokens."""
    begins = np.cumsum([0, *lengths])
    examples = []
    for number, text in enumerate(texts):
        prompt = text[: max(2, len(text) - begins[-1] - 3 * number)]
        words = [text[::-1][begin:end] for begin, end in pairwise(begins)]
        choices = tuple(np.concatenate((prompt, word)) for word in words)
        examples.append(Example(choices[number], len(prompt), "", choices, number))
    return examples


def _as_text(rows: JoinedRows) -> JoinedRows:
    """The same rows where every token sees all that come before it."""
    positions = np.broadcast_to(np.arange(rows.tokens.shape[1]), rows.tokens.shape)
    return replace(rows, endings=np.minimum(rows.endings, 0), positions=positions)
