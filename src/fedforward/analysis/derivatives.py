"""Gradients, and products with the Hessian and the Gauss-Newton matrix, of a model's mean loss.

Exact, by automatic differentiation, in float32. While it happens attention is "eager": fused
attention has no second derivative. The point is where the tuned tensors are, and they stay.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedforward.core.errors import FedForwardError, out_of_memory
from fedforward.models.base import CausalModel

#: Told of products that are done.
Counter = Callable[[int], None]


@contextmanager
def eager_attention(network: Any) -> Iterator[None]:
    """While it is open, attention is made of plain operations, which can be differentiated twice.

    Where a network knows no other kind, it stays as it is.
    """
    text = network.config.get_text_config()
    before = getattr(text, "_attn_implementation", None)
    try:
        network.set_attn_implementation("eager")
    except (AttributeError, KeyError, ValueError, TypeError):
        before = None
    try:
        yield
    finally:
        if before is not None:
            network.set_attn_implementation(before)


@contextmanager
def differentiable(model: CausalModel) -> Iterator[None]:
    """While it is open, the tuned tensors ask for gradients, and attention is eager."""
    parameters = model.tuned_parameters()
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        with eager_attention(model.network), torch.enable_grad():
            yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


class LossSurface:
    """The mean loss of some batches together, as a function of a model's tuned tensors.

    Vectors have the tuned tensors in the layout's order, d numbers without padding. To be used
    while `differentiable` is open.

    Attributes:
        size: d.
        owners: int64 [d], the block of each coordinate.
        counted: what the loss is the mean of: tokens, examples or texts.
    """

    def __init__(
        self, model: CausalModel, batches: Sequence[Any], on_product: Counter | None = None
    ) -> None:
        """Nothing is computed yet.

        Args:
            batches: small ones; the graph of one is held at a time.
            on_product: told of products that are done.
        """
        self.model = model
        self.batches = batches
        self.on_product = on_product
        by_place = {parameter.data_ptr(): parameter for parameter in model.tuned_parameters()}
        self.parameters = [by_place[tensor.data_ptr()] for tensor in model.tensors.values()]
        layout = model.layout
        self.size = layout.parameters
        self.owners = np.repeat(np.array(layout.owners, np.int64), layout.sizes)
        self._parts = [
            [n for n, owner in enumerate(layout.owners) if owner == block]
            for block in range(len(layout.blocks))
        ]
        with torch.no_grad():
            self.counted = sum(model.logits_and_targets(batch)[1].numel() for batch in batches)

    def gradient(self) -> tuple[float, NDArray[np.float64]]:
        """The mean loss and its gradient, float64 [d]."""
        loss, total = 0.0, np.zeros(self.size)
        for own in self._losses():
            loss += float(own.detach())
            total += self._flat(self._grad(own, self.parameters))
        return loss, total

    def hessian(self, vectors: NDArray[np.float64]) -> NDArray[np.float64]:
        """H v of each row, float64 [k, d]."""
        return self._hessian(vectors, [self._every()] * len(vectors))

    def hessian_of_blocks(self, vectors: NDArray[np.float64]) -> NDArray[np.float64]:
        """H_bb v of each row, float64 [k, d]; a row is 0 outside one block, as is its result."""
        return self._hessian(vectors, self._own_parts(vectors))

    def gauss_newton(self, vectors: NDArray[np.float64]) -> NDArray[np.float64]:
        """G v of each row, float64 [k, d], G = Jᵀ H_L J of the outputs' Jacobian J."""
        return self._gauss_newton(vectors, [self._every()] * len(vectors))

    def gauss_newton_of_blocks(self, vectors: NDArray[np.float64]) -> NDArray[np.float64]:
        """See `hessian_of_blocks`."""
        return self._gauss_newton(vectors, self._own_parts(vectors))

    def _own_parts(self, vectors: NDArray[np.float64]) -> list[list[int]]:
        """The places of the tensors of each row's block."""
        return [self._parts[self.owners[np.abs(vector).argmax()]] for vector in vectors]

    def _every(self) -> list[int]:
        return list(range(len(self.parameters)))

    def _losses(self) -> Iterator[torch.Tensor]:
        """What each batch adds to the mean."""
        for batch in self.batches:
            logits, targets = self.model.logits_and_targets(batch)
            yield nn.functional.cross_entropy(logits, targets, reduction="sum") / self.counted

    def _hessian(
        self, vectors: NDArray[np.float64], parts: Sequence[Sequence[int]]
    ) -> NDArray[np.float64]:
        found = np.zeros_like(vectors)
        for number, loss in enumerate(self._losses()):
            gradients = self._grad(loss, self.parameters, create_graph=True)
            for row, (vector, part) in enumerate(zip(vectors, parts, strict=True)):
                asked = [(n, v) for n, v in enumerate(self._tensors(vector)) if n in part]
                own = [(gradients[n], v) for n, v in asked if gradients[n].requires_grad]
                if own:
                    outputs, weights = zip(*own, strict=True)
                    inputs = [self.parameters[n] for n in part]
                    moved = self._grad(outputs, inputs, weights, retain_graph=True)
                    found[row] += self._flat(moved, part)
                self._tell(number)
        return found

    def _gauss_newton(
        self, vectors: NDArray[np.float64], parts: Sequence[Sequence[int]]
    ) -> NDArray[np.float64]:
        found = np.zeros_like(vectors)
        for number, batch in enumerate(self.batches):
            logits, _ = self.model.logits_and_targets(batch)
            chances = torch.softmax(logits.detach(), dim=1)
            # A gradient is linear in what it is weighed with, so its derivative there is J v.
            weights = torch.zeros_like(logits, requires_grad=True)
            pulled = self._grad(logits, self.parameters, weights, create_graph=True)
            for row, (vector, part) in enumerate(zip(vectors, parts, strict=True)):
                tensors = self._tensors(vector)
                own = [(pulled[n], tensors[n]) for n in part if pulled[n].requires_grad]
                if own:
                    outputs, along = zip(*own, strict=True)
                    (moved,) = self._grad(outputs, [weights], along, retain_graph=True)
                    bent = chances * (moved - (chances * moved).sum(dim=1, keepdim=True))
                    inputs = [self.parameters[n] for n in part]
                    image = self._grad(logits, inputs, bent / self.counted, retain_graph=True)
                    found[row] += self._flat(image, part)
                self._tell(number)
        return found

    def _tell(self, batch: int) -> None:
        if self.on_product is not None and batch == len(self.batches) - 1:
            self.on_product(1)

    def _grad(
        self, outputs: Any, inputs: Sequence[torch.Tensor], weights: Any = None, **options: Any
    ) -> tuple[torch.Tensor, ...]:
        """`torch.autograd.grad`, with zeros where nothing depends on an input.

        Raises:
            FedForwardError: something in the network has no such derivative.
        """
        options = {"materialize_grads": True, **options}
        try:
            return tuple(torch.autograd.grad(outputs, inputs, weights, **options))
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            reason = str(error).strip().splitlines()[0]
            raise FedForwardError(
                f"This network has no second derivative: {reason} Its curvature can be estimated "
                "from forward passes alone."
            ) from error

    def _tensors(self, vector: NDArray[np.float64]) -> list[torch.Tensor]:
        """A vector as tensors like the tuned ones."""
        parts = torch.from_numpy(vector.astype(np.float32)).split(list(self.model.layout.sizes))
        return [
            part.view(p.shape).to(p.device, p.dtype)
            for part, p in zip(parts, self.parameters, strict=True)
        ]

    def _flat(
        self, tensors: Sequence[torch.Tensor], part: Sequence[int] | None = None
    ) -> NDArray[np.float64]:
        """Tensors like the tuned ones, or some of them, as one vector; 0 elsewhere."""
        whole = np.zeros(self.size)
        sizes = self.model.layout.sizes
        begins = np.concatenate([[0], np.cumsum(sizes)])
        for place, tensor in zip(self._every() if part is None else part, tensors, strict=True):
            flat = tensor.detach().double().reshape(-1).cpu().numpy()
            whole[begins[place] : begins[place + 1]] = flat
        return whole


def check_second_derivative(surface: LossSurface) -> None:
    """Refuse a network that cannot be differentiated twice, before long work begins.

    Raises:
        FedForwardError: it cannot.
    """
    LossSurface(surface.model, surface.batches[:1]).hessian(np.ones((1, surface.size)))
