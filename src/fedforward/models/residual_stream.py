"""The residual stream of a network: what writes into it, and where a loss wants it to go.

A transformer block adds to what it was given. A linear module whose output is added as it is, such
as `o_proj` and `down_proj`, moves the output of the last block by about as much as its own. So the
gradient of a loss at the last block's output, which needs the final norm and the head alone, tells
in which directions the outputs of all such modules matter. No pass goes back through the blocks.
The head's logits are held for all tokens that count, with their gradient.
"""

import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedforward.core.errors import FedForwardError
from fedforward.models.blocks import transformer_blocks
from fedforward.models.loading import input_device
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
        outputs.append(_state(result).float())

    with _hooked(block, note):
        network(input_ids=tokens, use_cache=False)
        with _hooked(module, change):
            network(input_ids=tokens, use_cache=False)
    if len(outputs) != 2 or len(changes) != 1 or changes[0].numel() != outputs[0].numel():
        return False
    moved = (outputs[1] - outputs[0]).flatten()
    cosine = nn.functional.cosine_similarity(moved, changes[0].to(moved.device).flatten(), dim=0)
    return bool(cosine >= LEAST_COSINE)


def _state(result: Any) -> torch.Tensor:
    """What a block hands on."""
    state: torch.Tensor = result if torch.is_tensor(result) else result[0]
    return state


@contextmanager
def _hooked(module: nn.Module, hook: Any) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class StreamGradients:
    """The second moment of a loss's gradient at the output of the last transformer block.

    Attributes:
        moment: Σ g gᵀ over the tokens of all texts, float64 [hidden, hidden].
    """

    def __init__(self, network: Any) -> None:
        """Nothing is added up yet.

        Raises:
            FedForwardError: no transformer blocks are known of this network.
        """
        blocks = transformer_blocks(network)
        if not blocks:
            raise FedForwardError(
                "lora.factors = 'R' needs transformer blocks, and none are known of this network. "
                "Use lora.factors = 'B'."
            )
        self.moment: torch.Tensor | None = None
        self._network = network
        self._last = blocks[-1]
        self._selects = "logits_to_keep" in inspect.signature(network.forward).parameters

    def add(
        self, text: NDArray[np.int64], counted: NDArray[np.bool_], words: Sequence[int]
    ) -> None:
        """Run a text, and add the gradients of its loss.

        Where words are told apart, the loss is the cross-entropy between them, with each as the
        right one as often as the network itself would choose it. Else it is the mean loss of the
        tokens that count.

        Args:
            text: int64 [length].
            counted: bool [length], which tokens' loss counts: one after the first, at least.
            words: the token that each label word begins with, all of which differ; may be empty.
        """
        states: list[torch.Tensor] = []

        def begin(_: nn.Module, args: Any, result: Any) -> Any:
            state = _state(result).detach().requires_grad_()
            states.append(state)
            return state if torch.is_tensor(result) else (state, *result[1:])

        tokens = torch.from_numpy(text)[None].to(input_device(self._network))
        places = torch.from_numpy(np.flatnonzero(counted[1:]))
        wanted = tokens[0, places.to(tokens.device) + 1]
        places = places[:1] if words else places
        kept = {"logits_to_keep": places.to(tokens.device)} if self._selects else {}
        with torch.enable_grad(), _hooked(self._last, begin):
            logits = self._network(input_ids=tokens, use_cache=False, **kept).logits[0]
            rows = (logits if kept else logits[places.to(logits.device)]).float()
            if words:
                chances = torch.log_softmax(rows[0, list(words)], dim=0)
                # The moment has squares of gradients, so that a root of each chance weighs them.
                losses = [-chance.detach().div(2).exp() * chance for chance in chances]
            else:
                losses = [nn.functional.cross_entropy(rows, wanted.to(rows.device))]
            (state,) = states
            for number, loss in enumerate(losses):
                more = number < len(losses) - 1
                (gradient,) = torch.autograd.grad(loss, state, retain_graph=more)
                found = gradient[0].double()
                found = found[(found != 0).any(dim=1)]
                product = found.T @ found
                self.moment = product if self.moment is None else self.moment.add_(product)

    def directions(self, count: int) -> NDArray[np.float64]:
        """U: the directions with the largest second moment, as columns.

        Each is as long as the root of its own moment. All are then scaled so that their squares sum
        to the width, as those of a random U do on average.

        Args:
            count: of the columns.

        Returns:
            [hidden, count].

        Raises:
            FedForwardError: the gradient is 0 or not finite everywhere.
        """
        from scipy.linalg import eigh

        moment = None if self.moment is None else self.moment.cpu().numpy()
        if moment is None or not np.isfinite(moment).all() or not moment.any():
            raise FedForwardError(
                "The gradient of the loss at the last block's output is 0 or not finite on these "
                "rows. Give other rows in data.public, or another model.dtype."
            )
        size = len(moment)
        first = max(0, size - count)
        values, vectors = eigh(moment, subset_by_index=[first, size - 1])
        values, vectors = values[::-1].clip(min=0.0), vectors[:, ::-1]
        largest = np.abs(vectors).argmax(axis=0)
        signs = np.sign(np.take_along_axis(vectors, largest[None], axis=0))
        found: NDArray[np.float64] = np.zeros((size, count))
        found[:, : len(values)] = vectors * signs * np.sqrt(values)
        found *= np.sqrt(size / np.square(found).sum())
        return found
