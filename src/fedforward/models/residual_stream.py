"""The residual stream of a network: what writes into it.

A transformer block adds to what it was given. A linear module whose output is added as it is, such
as `o_proj` and `down_proj`, moves the output of the last block by about as much as its own. So the
gradient of a loss at the last block's output, which needs the final norm and the head alone, tells
in which directions the outputs of all such modules matter (see `loss_gradients`).
"""

import re
from typing import Any

import torch
from torch import nn

from fedforward.models.blocks import transformer_blocks
from fedforward.models.loading import input_device
from fedforward.models.loss_gradients import hooked, state_of
from fedforward.models.trial import ADVICE, is_linear, running, sentences, trial_tokens

#: Length of a tried change of a module's output, relative to what its block hands on: far more than
#: half precision rounds away there.
CHANGE = 0.3
#: Least cosine of a change of a module's output and what it does to that of its block. What does
#: not reach it as it is has a cosine near 0.
LEAST_COSINE = 0.3


@torch.inference_mode()
def residual_writers(network: Any) -> set[str]:
    """Names of the linear modules in transformer blocks whose output is added to the stream.

    Modules of equal names but for their numbers are taken to be alike: one of each is tried, in the
    middle of the network.

    Raises:
        FedForwardError: the network cannot be run.
    """
    blocks = transformer_blocks(network)
    names = {id(module): name for name, module in network.named_modules()}
    alike: dict[str, list[str]] = {}
    owner: dict[str, nn.Module] = {}
    for block in blocks:
        for module in block.modules():
            if is_linear(module):
                name = names[id(module)]
                alike.setdefault(_without_numbers(name), []).append(name)
                owner[name] = block
    tokens = trial_tokens(network).to(input_device(network))
    found: set[str] = set()
    with sentences("This network fails on two short texts", ADVICE), running(network):
        for same in alike.values():
            name = same[len(same) // 2]
            if _reaches_the_stream(network, network.get_submodule(name), owner[name], tokens):
                found.update(same)
    return found


def _without_numbers(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _reaches_the_stream(
    network: Any, module: nn.Module, block: nn.Module, tokens: torch.Tensor
) -> bool:
    """Whether a change of a module's output is one of its block's output as well."""
    outputs: list[torch.Tensor] = []
    changes: list[torch.Tensor] = []

    def change(_: nn.Module, args: Any, result: Any) -> Any:
        if not torch.is_tensor(result):
            return None
        size = CHANGE * outputs[0].norm(dim=-1, keepdim=True).to(result.device)
        if result.shape != outputs[0].shape:
            # A module may be given all tokens in one row.
            if result.numel() != outputs[0].numel():
                return None
            size = size.view(*result.shape[:-1], 1)
        generator = torch.Generator().manual_seed(len(changes))
        drawn = torch.randn(result.shape, generator=generator).to(result.device)
        changes.append(drawn * size / drawn.norm(dim=-1, keepdim=True))
        return (result.float() + changes[-1]).to(result.dtype)

    def note(_: nn.Module, args: Any, result: Any) -> None:
        outputs.append(state_of(result).float())

    with hooked(block, note):
        network(input_ids=tokens, use_cache=False)
        with hooked(module, change):
            network(input_ids=tokens, use_cache=False)
    if len(outputs) != 2 or len(changes) != 1 or changes[0].numel() != outputs[0].numel():
        return False
    moved = (outputs[1] - outputs[0]).flatten()
    cosine = nn.functional.cosine_similarity(moved, changes[0].to(moved.device).flatten(), dim=0)
    return bool(cosine >= LEAST_COSINE)
