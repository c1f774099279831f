"""Whether probes of a model can share a forward pass: found out on two short texts.

The losses of grouped probes must be those of single ones. Routers, scans and states that are no
rows of a batch may not keep the groups apart, which raises an error or, worse, changes a loss.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from fedforward.core.batches import IGNORED, TokenBatch
from fedforward.core.errors import out_of_memory
from fedforward.core.steps import Probe, ProbePlan, Steps
from fedforward.models.base import CausalModel
from fedforward.models.trial import trial_tokens

#: Coefficients of the directions, until two directions have clearly different losses.
COEFFICIENTS = (1e-3, 1e-2, 1e-1)
#: By width of the dtype: how different, relative to the loss.
CLEAR = {True: 1e-3, False: 1e-2}
#: How much of that difference grouping may change, and how much of the loss.
TOLERATED = {True: (1e-3, 1e-5), False: (0.25, 0.0)}


def settled(model: CausalModel) -> ProbePlan:
    """The model's plan; one probe in a forward pass where probes cannot share one.

    The plan says why, and what of the model is not tuned. Groups of two probes are measured: with
    a batch in common, with a batch each, and with the last block alone perturbed, where they share
    what lies below.

    Raises:
        FedForwardError: the model cannot measure single probes either.
    """
    plan = replace(model.plan, left_out=model.left_out)
    if plan.probes_per_call == 1:
        return plan
    tokens = trial_tokens(model.network).numpy()
    labels = tokens.copy()
    labels[:, : tokens.shape[1] // 3] = IGNORED
    if model.classes:
        # The last token's label is the class of a text.
        labels[:, :-1], labels[:, -1] = IGNORED, 0
    first, second = TokenBatch(tokens, labels), TokenBatch(tokens[::-1].copy(), labels[::-1].copy())
    reason = _why_not(model, (first, first), None) or _why_not(model, (first, second), None)
    if reason:
        return replace(plan, probes_per_call=1, alone=reason)
    last = np.array([name == _last_block(model) for name in model.layout.blocks])
    return replace(plan, shares_prefix=not _why_not(model, (first, first), last))


def _why_not(
    model: CausalModel, batches: Sequence[TokenBatch], active: NDArray[np.bool_] | None
) -> str:
    """Why two probes of these batches cannot share a forward pass, in words; "" if they can.

    Args:
        active: bool [B], blocks that are perturbed; None is all.
    """
    exact = all(tensor.dtype is torch.float32 for tensor in model.network.parameters())
    plan = model.plan
    try:
        pairs, alone = _single(model, batches, active, exact)
        model.plan = replace(plan, probes_per_call=2, tokens_per_call=0)
        try:
            together = _sums(model, pairs)
        except Exception as error:
            # Networks raise whatever they like where rows are not what they expect.
            if out_of_memory(error):
                raise
            return "the network does not keep the rows of a batch apart"
        return "" if _agree(alone, together, exact) else "grouped losses differ from single ones"
    finally:
        model.plan = plan
        model.clear_cache()


def _last_block(model: CausalModel) -> str:
    numbered = [name for name in model.layout.blocks if name.isdigit()]
    return numbered[-1] if numbered else model.layout.blocks[-1]


def _single(
    model: CausalModel,
    batches: Sequence[TokenBatch],
    active: NDArray[np.bool_] | None,
    exact: bool,
) -> tuple[list[Probe], NDArray[np.float64]]:
    """Two probes whose losses differ clearly, and these losses, one probe in a forward pass."""
    model.plan = replace(model.plan, probes_per_call=1, tokens_per_call=0)
    for coefficient in COEFFICIENTS:
        steps = [Steps.of([seed], [coefficient]) for seed in (1, 2, 3)]
        trajectory, *own = steps if active is None else [s.within(active) for s in steps]
        pairs = [Probe(b, trajectory, o) for b, o in zip(batches, own, strict=True)]
        found = _sums(model, pairs)
        if coefficient > COEFFICIENTS[0] and not np.isfinite(found).all():
            break
        probes, alone = pairs, found
        # Rows of the second batch are those of the first in the other order.
        other = alone[1][::-1] if batches[0] is not batches[1] else alone[1]
        if (np.abs(alone[0] - other) > CLEAR[exact] * np.abs(alone[0])).all():
            break
    return probes, alone


def _sums(model: CausalModel, probes: Sequence[Probe]) -> NDArray[np.float64]:
    """Summed losses of the rows of each probe, float64 [probes, rows]."""
    if model.classes:
        logits = np.array(model.class_logits(probes))
        return np.asarray(np.logaddexp.reduce(logits, axis=-1) - logits[..., 0])
    return np.array([evaluation.sums for evaluation in model.token_losses(probes)])


def _agree(alone: NDArray[np.float64], together: NDArray[np.float64], exact: bool) -> bool:
    apart = np.abs(alone[0] - alone[1])
    of_difference, of_loss = TOLERATED[exact]
    allowed = of_difference * apart + of_loss * np.abs(alone)
    return bool((np.abs(together - alone) <= allowed).all())
