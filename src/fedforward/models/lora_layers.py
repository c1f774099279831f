"""Forward passes of LoRA layers, in which each group of rows meets its own adapter.

`replace_forward` and `replace_head` put them in place of PEFT's; they read the `AdapterBank`, which
a model fills for the probes of a pass. With what values adapters start is decided here too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from fedforward.core.errors import FedForwardError
from fedforward.core.seeds import derive
from fedforward.directions import TILE, Layout
from fedforward.models.loading import draw_normal

#: PEFT's name of the adapter that is tuned.
ADAPTER = "default"
#: The R of an adapter with B = U R, as a parameter of its layer.
FACTOR_R = "factor_r"
#: Activations that an adapter works on at once, by device: what fits a cache, or fills a GPU.
ACTIVATIONS_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 28}
#: How many half precisions hold a float32, and how much larger than their share the later ones are:
#: float16 has no exponents for them as they are.
PARTS = {torch.float16: (2, 2.0**11), torch.bfloat16: (3, 1.0)}
#: Multiplications from which products of half precisions are worth their launches.
HALVES_PAY = 1 << 28
#: Whether PyTorch multiplies half precisions into float32 (from 2.8).
_FLOAT32_PRODUCTS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)


@dataclass
class AdapterBank:
    """What the layers of a model meet in a forward pass.

    Attributes:
        factors: by `id` of a tuned parameter, its values for each group of rows, float32
            [groups, *shape]. What is not in it is met as it is.
        rows: of all groups together, before and after a layer flattens rows and tokens.
        outputs: by `id` of an R, the U of its B = U R, float32 [width, r] (see `LoraModel`).
        probing: whether probes run.
    """

    outputs: dict[int, torch.Tensor] = field(default_factory=dict)
    factors: dict[int, torch.Tensor] = field(default_factory=dict)
    rows: tuple[int, int] = (0, 0)
    probing: bool = False


def replace_forward(bank: AdapterBank, name: str, layer: Any, pooled: bool) -> None:
    """Give one PEFT layer a forward pass that uses the bank while there is one.

    Args:
        pooled: it may be given one vector for each row.
    """
    plain = layer.forward
    factor_a = layer.lora_A[ADAPTER].weight
    factor_b = layer.lora_B[ADAPTER].weight
    factor_r = getattr(layer, FACTOR_R, None)
    scaling = layer.scaling[ADAPTER]

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if factor_r is None and not bank.probing and x.device == factor_b.device:
            result: torch.Tensor = plain(x, *args, **kwargs)
            return result
        if factor_r is None:
            b = bank.factors.get(id(factor_b))
        else:
            own = bank.factors.get(id(factor_r), factor_r[None])
            b = torch.matmul(bank.outputs[id(factor_r)].to(own.device), own)
        if b is None:
            return adapted(layer.base_layer, x, factor_a[None], factor_b[None], scaling)
        groups = len(b)
        expected = bank.rows[x.dim() == 2]
        if groups > 1 and len(x) != expected and not (pooled and len(x) == bank.rows[0]):
            raise FedForwardError(
                f"{name} does not see the rows of a batch in their order, so that probes "
                "cannot share a forward pass. Set run.probes_per_call = 1."
            )
        a = bank.factors.get(id(factor_a))
        if a is None:
            a = factor_a[None].expand(groups, -1, -1)
        return adapted(layer.base_layer, x, a, b, scaling)

    layer.forward = forward


def replace_head(bank: AdapterBank, name: str, head: nn.Module) -> None:
    """Give the linear maps of a classifier's head a forward pass in float32, with the bank."""
    for path, part in head.named_modules(prefix=name):
        if not any(True for _ in part.parameters(recurse=False)):
            continue
        if type(part) is not nn.Linear:
            raise FedForwardError(
                f"model.head = 'classification' with model.tune = 'lora' probes heads of "
                f"linear layers, and {path} of this model is a {type(part).__name__}. Use "
                "model.tune = 'full'."
            )
        part.__dict__["forward"] = partial(_head_forward, bank, path, part)


def _head_forward(bank: AdapterBank, path: str, part: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """x Wᵀ + b in float32, each group of rows with its own W and b while there is a bank."""
    weight = bank.factors.get(id(part.weight))
    bias = bank.factors.get(id(part.bias))
    x = x.to(part.weight.device, torch.float32)
    if weight is None:
        return nn.functional.linear(x, part.weight, part.bias)
    if len(weight) > 1 and len(x) not in bank.rows:
        raise FedForwardError(
            f"{path} does not see the rows of a batch in their order, so that probes cannot "
            "share a forward pass. Set run.probes_per_call = 1."
        )
    out = torch.bmm(x.reshape(len(weight), -1, x.shape[-1]), weight.transpose(1, 2))
    if bias is not None:
        out += bias[:, None]
    return out.view(*x.shape[:-1], out.shape[-1])


def adapted(
    base: nn.Module, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
) -> torch.Tensor:
    """base(x) + scaling · B A x, each group of rows with its own factors, summed in float32.

    Args:
        x: [rows of all groups, ..., inputs].
        a: float32 [groups, r, inputs].
        b: float32 [groups, outputs, r].
    """
    plain = type(base) is nn.Linear and base.bias is None and "forward" not in base.__dict__
    plain = plain and not base._forward_hooks and not base._forward_pre_hooks
    if (
        plain
        and isinstance(base.weight, torch.Tensor)
        and x.dtype is torch.float32
        and x.device == a.device
    ):
        # The small product first: the large one adds to it where it writes anyway.
        flat = x.reshape(len(b), -1, x.shape[-1])
        out = torch.bmm(torch.bmm(flat, a.transpose(1, 2)).mul_(scaling), b.transpose(1, 2))
        out.view(-1, out.shape[-1]).addmm_(flat.reshape(-1, x.shape[-1]), base.weight.T)
        return out.view(*x.shape[:-1], out.shape[-1])
    result: torch.Tensor = base(x)
    a, b = a.to(result.device), b.to(result.device)
    flat = x.to(result.device).reshape(len(b), -1, x.shape[-1])
    target = result.view(len(b), -1, result.shape[-1])
    at_once = ACTIVATIONS_AT_ONCE.get(result.device.type, ACTIVATIONS_AT_ONCE["cuda"])
    rows = max(16, at_once // (len(b) * max(x.shape[-1], result.shape[-1])))
    for begin in range(0, flat.shape[1], rows):
        part = slice(begin, begin + rows)
        inner = inner_product(flat[:, part], a)
        if result.dtype is torch.float32:
            target[:, part].baddbmm_(inner, b.transpose(1, 2), alpha=scaling)
        else:
            float32 = target[:, part].float().baddbmm_(inner, b.transpose(1, 2), alpha=scaling)
            target[:, part] = float32
    return result


def inner_product(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """A x, summed in float32.

    A GPU multiplies half precisions an order of magnitude faster than float32: `x` is one already,
    and `a` is cut into several.

    Args:
        x: [groups, tokens, inputs].
        a: float32 [groups, r, inputs].

    Returns:
        float32 [groups, tokens, r].
    """
    half = x.is_cuda and x.dtype in PARTS
    if not half or not _FLOAT32_PRODUCTS or x.numel() * a.shape[1] < HALVES_PAY:
        return torch.bmm(x.float(), a.transpose(1, 2))
    parts = in_halves(a, x.dtype)
    inners = torch.bmm(x, parts.transpose(1, 2), out_dtype=torch.float32)
    inner: torch.Tensor
    inner, *others = inners.split(a.shape[1], dim=2)
    for other in others:
        inner = torch.add(inner, other, alpha=1.0 / PARTS[x.dtype][1])
    return inner


def in_halves(a: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A float32 tensor as a sum of half precisions, exact to 22 bits (float16) or 24 (bfloat16).

    Args:
        a: float32 [groups, r, inputs], finite in `dtype`.
        dtype: one of `PARTS`.

    Returns:
        `dtype` [groups, parts * r, inputs]; those after the first are to be divided by the scale.
    """
    count, scale = PARTS[dtype]
    groups, rank, inputs = a.shape
    parts = torch.empty((groups, count * rank, inputs), dtype=dtype, device=a.device)
    for number, part in enumerate(parts.split(rank, dim=1)):
        part.copy_(a)
        if number < count - 1:
            a = torch.sub(a, part).mul_(scale)
    return parts


def views_of(layout: Layout, parts: Sequence[tuple[int, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The tuned tensors that lie inside flat buffers, leading dimensions kept.

    Args:
        parts: (first tile, [..., tiles * 2048]), each for whole tensors.
    """
    return {
        name: storage[..., TILE * (tile - first) :][..., :size].unflatten(-1, shape)
        for name, shape, size, tile in zip(
            layout.names, layout.shapes, layout.sizes, layout.first_tiles, strict=True
        )
        for first, storage in parts
        if first <= tile < first + storage.shape[-1] // TILE
    }


def product(outputs: torch.Tensor, factor_r: torch.Tensor) -> torch.Tensor:
    """U R in float32, the same bits on every machine: each sum in one order, in float64.

    Args:
        outputs: U, float32 [width, r].
        factor_r: R, float32 [r, r].
    """
    u, r = outputs.detach().cpu().double(), factor_r.detach().cpu().double()
    total = u[:, :1] * r[:1]
    for place in range(1, len(r)):
        total += u[:, place : place + 1] * r[place : place + 1]
    return total.float()


def initial_outputs(
    width: int, rank: int, run_seed: int, device: torch.device, tile: int = 0
) -> torch.Tensor:
    """A random U, float32 [width, r]: normal with variance 1 / r, from a seed of its own.

    Args:
        tile: of the direction that it is drawn from, the first.
    """
    outputs = torch.empty((width, rank), dtype=torch.float32, device=device)
    draw_normal(outputs, derive(run_seed, "lora-u"), tile, rank**-0.5)
    return outputs


def initialise(adapters: Mapping[str, torch.Tensor], run_seed: int) -> None:
    """B = 0; A from the initialisation stream, the same on every device and library version."""
    layout = Layout.of({name: tuple(tensor.shape) for name, tensor in adapters.items()})
    seed = derive(run_seed, "lora-a")
    for name, first_tile in zip(layout.names, layout.first_tiles, strict=True):
        tensor = adapters[name].data
        if ".lora_B." in name:
            tensor.zero_()
            continue
        draw_normal(tensor, seed, first_tile, (3.0 * tensor.shape[1]) ** -0.5)
