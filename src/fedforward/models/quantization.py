"""Frozen bases in fewer bits: quantised when they are loaded, or as their folder has them.

What flows between the weights is never rounded: a two-point estimate is a small difference. The way
back to plain weights is here too.
"""

import importlib.util
import logging
from collections.abc import Mapping
from typing import Any

import torch

from fedforward.core.errors import FedForwardError
from fedforward.models import int8


def check_package(quantization: str) -> None:
    """Refuse what needs bitsandbytes where it is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise FedForwardError(
            f"model.quantization = {quantization!r} needs the package bitsandbytes, which is not "
            "installed. Install it with `pip install 'fedforward[quantization]'`, or use "
            "model.quantization = 'none'."
        )
    # Its import warns of a kernel that `settle` does without.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def bits(dtype: torch.dtype) -> Any:
    """NF4 in blocks of 64 weights with a float32 scale each: 4.5 bits a weight."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def quantises(path: str, stored: Any, asked: str) -> bool:
    """Whether the weights are quantised when they are loaded; else they lie there as asked.

    Raises:
        FedForwardError: they lie there in another way.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    found = getattr(stored, "quantization_config", None)
    if found is None:
        if asked == "stored":
            raise FedForwardError(
                "model.quantization = 'stored' is for a folder that is quantised already, and "
                f"model.path = {path!r} is not. Use 'nf4', or 'none'."
            )
        return asked != "none"
    settings = found if isinstance(found, dict) else found.to_dict()
    method = str(settings.get("quant_method", "unknown"))
    # What other packages have quantised is theirs to load.
    fits = asked in ("none", "stored")
    if settings.get("load_in_4bit") or settings.get("load_in_8bit") or method == "bitsandbytes":
        method = "int8"
        if settings.get("load_in_4bit"):
            method = str(settings.get("bnb_4bit_quant_type", "fp4"))
        fits = asked in (method, "stored")
        if fits:
            check_package(asked)
    elif method not in AUTO_QUANTIZER_MAPPING:
        raise FedForwardError(
            f"model.path = {path!r} is quantised in a way that transformers does not know "
            f"({method}). Give the model as it was before."
        )
    if not fits:
        advice = "nf4" if method == "nf4" else "stored"
        raise FedForwardError(
            f"model.path = {path!r} is quantised on disk already ({method}), and "
            f"model.quantization = {asked!r}. Set model.quantization = {advice!r}, or give the "
            "model as it was before."
        )
    return False


def unpack(stored: Any, dtype: torch.dtype) -> bool:
    """Have FP8 and MXFP4 weights made plain in `dtype` when they are read, whatever the device.

    Their layers would round activations as well, and only on some devices.

    Returns:
        whether the configuration `stored` was changed for that.
    """
    settings = getattr(stored, "quantization_config", None)
    if not isinstance(settings, dict) or settings.get("quant_method") not in ("fp8", "mxfp4"):
        return False
    settings["dequantize"] = True
    stored.dtype = dtype
    return True


def settle(path: str, network: Any, quantization: str, dtype: torch.dtype) -> None:
    """Have the quantised layers compute in `dtype`, whatever the processor offers.

    On processors with AVX512-BF16 bitsandbytes rounds activations to bfloat16 in a kernel of its
    own. The two losses of a small perturbation then differ by little more than that rounding.
    """
    int8.take_over(network)
    bring_to(network, dtype)
    layers = [module for module in network.modules() if is_quantized(module)]
    if not layers and quantization == "nf4":
        raise FedForwardError(
            f"model.quantization = {quantization!r}: model.path = {path!r} has no linear layers "
            "beside its head. Use model.quantization = 'none'."
        )
    for layer in layers:
        if isinstance(layer, int8.Int8Linear):
            continue
        layer.support_avx512bf16_for_cpu = False
        layer.compute_dtype = dtype
        layer.compute_type_is_set = True


def is_quantized(module: Any) -> bool:
    """Whether this module's weight is held in 4 or 8 bits."""
    if isinstance(module, int8.Int8Linear):
        return True
    return getattr(getattr(module, "weight", None), "quant_state", None) is not None


def dequantize(network: Any, added: Mapping[str, torch.Tensor]) -> Any:
    """The same network with plain weights of the values that it computed with; this is used up.

    Args:
        network: as `load` quantised it.
        added: float32 [outputs, inputs] to add to the weights of these modules.
    """
    from transformers.pytorch_utils import Conv1D

    kinds = {name: m.source_cls for name, m in network.named_modules() if is_quantized(m)}
    packed = {n: m for n, m in network.named_modules() if isinstance(m, int8.Int8Linear)}
    if packed:
        for name, layer in packed.items():
            linear = torch.nn.Linear(layer.in_features, layer.out_features, device="meta")
            linear.weight = torch.nn.Parameter(layer.plain(network.dtype))
            linear.bias = layer.bias
            network.set_submodule(name, linear)
    else:
        network = network.dequantize(network.dtype)
    make_plain(network, network.dtype)
    for name, delta in added.items():
        weight = network.get_submodule(name).weight
        weight.data = (weight.float() + delta.to(weight.device)).to(weight.dtype)
    for name, kind in kinds.items():
        if kind is Conv1D:
            # GPT-2 stores its weights transposed; transformers leaves them the way they computed.
            linear = network.get_submodule(name)
            conv = Conv1D(linear.out_features, linear.in_features)
            conv.weight = torch.nn.Parameter(linear.weight.T.contiguous())
            conv.bias = linear.bias
            network.set_submodule(name, conv)
    return network.eval().requires_grad_(False)


def bring_to(network: Any, dtype: torch.dtype) -> None:
    """Have the plain parameters of a quantised folder in `dtype`, but those that stay in float32.

    Transformers leaves what lies beside packed weights as its file has it.
    """
    wide = set(getattr(network, "_keep_in_fp32_modules_strict", None) or ())
    if dtype is torch.float16:
        wide |= set(getattr(network, "_keep_in_fp32_modules", None) or ())
    for name, parameter in network.named_parameters():
        if parameter.is_floating_point() and not wide & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)


def make_plain(network: Any, dtype: torch.dtype) -> None:
    """Take transformers' notes of a quantisation from a network whose weights are plain."""
    bring_to(network, dtype)
    network.hf_quantizer = None
    network.is_quantized = False
    if hasattr(network.config, "quantization_config"):
        del network.config.quantization_config
    # What undid the quantisation when weights were read would be redone when they are saved;
    # without this list transformers takes that of the family.
    network.__dict__.pop("_weight_conversions", None)
