"""Linear layers whose weights bitsandbytes has saved in 8 bits, multiplied without rounding inputs.

bitsandbytes rounds what flows into such a layer to 8 bits as well, and the two losses of a small
perturbation differ by less than that. Here a weight is made plain for the moment of its product.
"""

from typing import Any

import torch
from torch import nn


class Int8Linear(nn.Linear):
    """x Wᵀ + b with W = codes · scale / 127 by rows, in the dtype of x.

    Attributes:
        weight: int8 [outputs, inputs], the codes.
        scale: float32 [outputs], the largest magnitude of each row.
        source_cls: of the layer before it was quantised; GPT-2's are transposed.
    """

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, bias: Any, source: type) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = codes.shape
        self.weight = nn.Parameter(codes.detach().clone(), requires_grad=False)
        self.bias = bias
        self.scale: torch.Tensor
        self.register_buffer("scale", scale.detach().float().clone())
        self.source_cls = source

    def plain(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight, [outputs, inputs], rounded once from float32."""
        return (self.weight.float() * (self.scale / 127.0)[:, None]).to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return nn.functional.linear(x, self.plain(x.dtype), self.bias)


def take_over(network: nn.Module) -> None:
    """Put an `Int8Linear` in the place of each layer that bitsandbytes holds in 8 bits."""
    from bitsandbytes.nn import Linear8bitLt

    layers = {n: m for n, m in network.named_modules() if isinstance(m, Linear8bitLt)}
    for name, layer in layers.items():
        weight, state = layer.weight, layer.state
        codes = state.CB if weight.CB is None else weight.CB
        scale = state.SCB if weight.SCB is None else weight.SCB
        source = getattr(layer, "source_cls", nn.Linear)
        network.set_submodule(name, Int8Linear(codes, scale, layer.bias, source))
