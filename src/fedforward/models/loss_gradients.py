"""Where a loss pulls the outputs of modules: second moments of its gradient over some texts.

`StreamGradients` looks at the output of the last transformer block. That takes the gradient through
the final norm and the head alone. `OutputGradients` looks at the output of each module. That takes
a pass back through the blocks from the first of these modules on, for one text at a time.
"""

import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedforward.core.errors import FedForwardError
from fedforward.models.adapters import OUTPUTS
from fedforward.models.blocks import transformer_blocks
from fedforward.models.loading import input_device
from fedforward.models.principal import principal_directions
from fedforward.models.trial import sentences

#: Tokens of a text whose loss counts, at most; of more, as many are taken at equal distances. Their
#: logits are held, with their gradient.
MOST_TOKENS = 256


def state_of(result: Any) -> torch.Tensor:
    """What a block hands on."""
    state: torch.Tensor = result if torch.is_tensor(result) else result[0]
    return state


@contextmanager
def hooked(module: nn.Module, hook: Any) -> Iterator[None]:
    """While it is open, `hook` is called with what the module gives back, as PyTorch does."""
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class LossGradients:
    """Adds up Σ g gᵀ over texts, g the gradient of a loss at the outputs of some modules.

    Attributes:
        moments: by name, float64 [width, width].
    """

    def __init__(self, network: Any, modules: Mapping[str, nn.Module], cut: bool) -> None:
        """Nothing is added up yet.

        Args:
            network: with a causal head.
            modules: by name, whose outputs are looked at.
            cut: whether nothing before their outputs is to be differentiated.
        """
        self.moments: dict[str, torch.Tensor] = {}
        self._network = network
        self._modules = dict(modules)
        self._cut = cut
        self._selects = "logits_to_keep" in inspect.signature(network.forward).parameters

    def add(
        self, text: NDArray[np.int64], counted: NDArray[np.bool_], words: Sequence[int]
    ) -> None:
        """Run a text, and add the gradients of its loss.

        Where words are told apart, the loss is the cross-entropy between them, with each as the
        right one as often as the network itself would choose it. Else it is the mean loss of the
        tokens that count, of at most `MOST_TOKENS`.

        Args:
            text: int64 [length].
            counted: bool [length], which tokens' loss counts: one after the first, at least.
            words: the token that each label word begins with, all of which differ; may be empty.
        """
        tokens = torch.from_numpy(text)[None].to(input_device(self._network))
        found = np.flatnonzero(counted[1:])
        chosen = np.linspace(0, len(found) - 1, min(len(found), MOST_TOKENS)).astype(int)
        places = torch.from_numpy(found[:1] if words else found[chosen])
        wanted = tokens[0, places.to(tokens.device) + 1]
        kept = {"logits_to_keep": places.to(tokens.device)} if self._selects else {}
        with torch.enable_grad(), self._noting() as outputs:
            logits = self._network(input_ids=tokens, use_cache=False, **kept).logits[0]
            rows = (logits if kept else logits[places.to(logits.device)]).float()
            if words:
                chances = torch.log_softmax(rows[0, list(words)], dim=0)
                # The moment has squares of gradients, so that a root of each chance weighs them.
                losses = [-chance.detach().div(2).exp() * chance for chance in chances]
            else:
                losses = [nn.functional.cross_entropy(rows, wanted.to(rows.device))]
            names = [name for name, own in outputs.items() for _ in own]
            states = [state for own in outputs.values() for state in own]
            for number, loss in enumerate(losses):
                more = number < len(losses) - 1
                gradients = torch.autograd.grad(loss, states, retain_graph=more, allow_unused=True)
                for name, gradient in zip(names, gradients, strict=True):
                    if gradient is not None:
                        self._add(name, gradient)

    def passes(self, words: int) -> int:
        """Forward passes that a text counts as, with so many label words."""
        return 1

    def _add(self, name: str, gradient: torch.Tensor) -> None:
        rows = gradient.reshape(-1, gradient.shape[-1]).double()
        rows = rows[(rows != 0).any(dim=1)]
        known = self.moments.get(name)
        self.moments[name] = rows.T @ rows if known is None else known.addmm_(rows.T, rows)

    @contextmanager
    def _noting(self) -> Iterator[dict[str, list[torch.Tensor]]]:
        """While it is open, the outputs of the modules are noted, by name."""
        outputs: dict[str, list[torch.Tensor]] = defaultdict(list)

        def note(name: str, result: Any) -> Any:
            state = state_of(result)
            if self._cut or not state.requires_grad:
                state = state.detach().requires_grad_()
            outputs[name].append(state)
            return state if torch.is_tensor(result) else (state, *result[1:])

        with ExitStack() as stack:
            for name, module in self._modules.items():
                hook = lambda _, __, result, name=name: note(name, result)  # noqa: E731
                stack.enter_context(hooked(module, hook))
            yield outputs

    def directions(self, name: str, count: int) -> NDArray[np.float64] | None:
        """U: the directions with the largest second moment, as columns.

        Each is as long as the root of its own moment. All are then scaled so that their squares sum
        to the width, as those of a random U do on average.

        Args:
            name: of the module.
            count: of the columns.

        Returns:
            [width, count]; None where the gradient is 0 everywhere.

        Raises:
            FedForwardError: the gradient is not finite.
        """
        found = self.moments.get(name)
        moment = np.zeros((1, 1)) if found is None else found.cpu().numpy()
        if not np.isfinite(moment).all():
            raise FedForwardError(f"{_no_gradient(name)} is not finite on these rows. {_ADVICE}")
        if not moment.any():
            return None
        vectors, values = principal_directions(moment, count)
        columns: NDArray[np.float64] = np.zeros((len(moment), count))
        columns[:, : len(values)] = vectors.T * np.sqrt(values)
        columns *= np.sqrt(len(moment) / np.square(columns).sum())
        return columns


_ADVICE = "Give other rows in data.public, or another model.dtype."


def _no_gradient(name: str) -> str:
    where = "the last block" if name == OUTPUTS else name
    return f"The gradient of the loss at the output of {where}"


class StreamGradients(LossGradients):
    """`LossGradients` of the last transformer block, under the name of the U that all share."""

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
        super().__init__(network, {OUTPUTS: blocks[-1]}, cut=True)

    def shared(self, count: int) -> NDArray[np.float64]:
        """The U of all modules, [hidden, count]; see `directions`.

        Raises:
            FedForwardError: the gradient is 0 or not finite everywhere.
        """
        found = self.directions(OUTPUTS, count)
        if found is None:
            raise FedForwardError(f"{_no_gradient(OUTPUTS)} is 0 on these rows. {_ADVICE}")
        return found


class OutputGradients(LossGradients):
    """`LossGradients` of each of some modules."""

    def __init__(self, network: Any, modules: Mapping[str, nn.Module]) -> None:
        """Nothing is added up yet."""
        super().__init__(network, modules, cut=False)

    def passes(self, words: int) -> int:
        """See `LossGradients.passes`: a pass back counts as two."""
        return 1 + 2 * max(1, words)

    def add(
        self, text: NDArray[np.int64], counted: NDArray[np.bool_], words: Sequence[int]
    ) -> None:
        """See `LossGradients.add`.

        Raises:
            FedForwardError: something in the network has no backward pass.
        """
        with sentences(
            "lora.alignment = 'backward': the backward pass through this network fails",
            "Use lora.alignment = 'forward'.",
        ):
            super().add(text, counted, words)
