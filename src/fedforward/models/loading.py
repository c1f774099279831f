"""Networks and tokenizers from folders or the hub, with errors that say what is wrong with them.

A frozen base may be held in fewer bits, and may lie on several devices; what it consists of then,
and its way back to plain weights, are here too.
"""

import importlib.util
import logging
import socket
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch

from fedforward.core.errors import FedForwardError
from fedforward.core.seeds import derive
from fedforward.core.steps import Steps
from fedforward.directions import Distribution, Layout, Stream
from fedforward.directions.ops import accumulate
from fedforward.models.blocks import class_heads
from fedforward.models.offload import place_the_rest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    path: str,
    dtype: str,
    device: str,
    *,
    quantization: str = "none",
    device_map: str = "none",
    offload: bool = False,
    classes: Sequence[str] = (),
    run_seed: int = 0,
) -> tuple[Any, Any]:
    """The network (evaluation mode, no gradients) and the tokenizer of a folder or a hub name.

    With `classes` it is a sequence classifier. Where the folder is one for classes of these names,
    they keep its order; a head that it lacks is made from the run seed.

    Args:
        path: a folder in Hugging Face format, or a hub name.
        dtype: of the weights, and of the arithmetic where they are held in fewer bits.
        device: where the network goes, unless `device_map` decides.
        quantization: "nf4" holds the linear layers in 4 bits through bitsandbytes. They are
            quantised on the CPU, so that every party has the same base, unless `device_map` places
            them first.
        classes: their names; none makes a causal language model.
        run_seed: of a head that the folder lacks.
        device_map: "auto" spreads the layers over all CUDA devices and then host memory.
        offload: the transformer blocks stay in host memory, for `Offload`; until there is
            one the network cannot run.

    Raises:
        FedForwardError: there is no such folder, it lacks a file, or the hub cannot be reached; it
            cannot be quantised or placed like that.
    """
    from safetensors import SafetensorError
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    folder = Path(path).expanduser()
    local = folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1
    if local and not folder.is_dir():
        raise FedForwardError(
            f"model.path = {path!r}: no such folder. Give a folder with config.json, weights and "
            "tokenizer, or a hub name such as 'Qwen/Qwen3-0.6B'."
        )
    if local and not (folder / "config.json").is_file():
        raise FedForwardError(
            f"model.path = {path!r}: the folder has no config.json. It must be a model saved in "
            "Hugging Face format."
        )
    if device_map == "auto" and torch.device(device).type == "cpu":
        raise FedForwardError(
            "model.device_map = 'auto' spreads a model over CUDA devices, and PyTorch finds none "
            "here. Use model.device_map = 'none'."
        )
    options: dict[str, Any] = {"dtype": DTYPES[dtype]}
    if device_map == "auto":
        options["device_map"] = "auto"
    if quantization != "none":
        _check_package(quantization)
        options = {"device_map": {"": "cpu"}} | options
    name = str(folder) if local else path
    # Offline the hub's client tries again for most of a minute; what it has cached needs no hub.
    kept = local or not hub_is_reachable()
    try:
        stored = AutoConfig.from_pretrained(name, local_files_only=kept)
        if not classes:
            _check_kind(path, stored)
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=kept)
        if quantization != _stored_quantization(path, stored, quantization):
            options["quantization_config"] = _settings(dtype)
        kind: Any = AutoModelForCausalLM
        if classes:
            kind = AutoModelForSequenceClassification
            _name_classes(path, stored, classes)
            options["config"] = stored
        with _without_report(bool(classes)):
            network, loading = kind.from_pretrained(
                name, output_loading_info=True, local_files_only=kept, **options
            )
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        ImportError,
        RuntimeError,
        SafetensorError,
    ) as error:
        # The first line often ends before what it announces ("… one of:").
        reason = " ".join(str(error).split("\n\n")[0].split())
        if "Unrecognized configuration class" in reason:
            reason = "transformers has no language model of the wanted kind for its model_type."
        if "ignore_mismatched_sizes" in reason:
            reason = "the weights have other shapes than its config.json says."
        if "dispatched on the CPU or the disk" in reason:
            reason = (
                f"with model.quantization = {quantization!r} and model.device_map = 'auto' all of "
                "it must fit on the CUDA devices, and it does not."
            )
        if not local and kept:
            reason = f"there is no such folder here, and the hub cannot be reached. {reason}"
        raise FedForwardError(f"model.path = {path!r} cannot be loaded: {reason}") from error
    heads = tuple(f"{name}." for name in class_heads(network))
    missing = {name for name in loading["missing_keys"] if not name.startswith(heads)}
    if missing:
        raise FedForwardError(
            f"model.path = {path!r}: the weights lack {len(missing)} tensors that "
            f"its config.json asks for, such as {min(missing)}. Give a complete model."
        )
    if classes:
        _initialise_head(network, loading["missing_keys"], run_seed)
        _choose_padding(path, network, tokenizer)
    if quantization != "none":
        _settle(path, network, quantization, dtype)
    if device_map == "auto":
        check_placement(path, network.hf_device_map)
    elif offload:
        place_the_rest(network, device)
    else:
        network.to(device)
    network.eval().requires_grad_(False)
    return network, tokenizer


def _check_kind(path: str, stored: Any) -> None:
    """Refuse an encoder-decoder, of which transformers would load the decoder alone.

    Raises:
        FedForwardError: it is one.
    """
    if getattr(stored, "is_encoder_decoder", False):
        raise FedForwardError(
            f"model.path = {path!r} is an encoder-decoder ({stored.model_type}), and fedforward "
            "tunes causal language models, which have no encoder. Give one of these."
        )


def _name_classes(path: str, stored: Any, classes: Sequence[str]) -> None:
    """Write the classes into a configuration, in the order of the head that the folder has.

    Raises:
        FedForwardError: that head is for another number of classes.
    """
    made = any(name.endswith("ForSequenceClassification") for name in stored.architectures or ())
    if made and stored.num_labels != len(classes):
        raise FedForwardError(
            f"model.path = {path!r} has a head for {stored.num_labels} classes, and the data have "
            f"{len(classes)}: {', '.join(classes[:8])}. Give a model without a head, or data of "
            "its classes."
        )
    known = [stored.id2label[place] for place in sorted(stored.id2label)]
    names = known if made and set(known) == set(classes) else list(classes)
    stored.id2label = dict(enumerate(names))
    stored.label2id = {name: place for place, name in enumerate(names)}


@contextmanager
def _without_report(hidden: bool) -> Iterator[None]:
    """Leave out transformers' table of the head's missing tensors; they are looked at here."""

    def is_shown(record: logging.LogRecord) -> bool:
        return not (hidden and "LOAD REPORT" in record.getMessage())

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_shown)
    try:
        yield
    finally:
        logger.removeFilter(is_shown)


def _initialise_head(network: Any, missing: Collection[str], run_seed: int) -> None:
    """A head's missing matrices from the initialisation stream, its missing biases 0.

    The width is the network's own (`initializer_range`); what is neither stays as transformers made
    it, which draws nothing for it.
    """
    tensors = {name: network.get_parameter(name).data for name in missing}
    layout = Layout.of({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    width = getattr(network.config.get_text_config(), "initializer_range", None) or 0.02
    seed = derive(run_seed, "class-head")
    for name, first_tile in zip(layout.names, layout.first_tiles, strict=True):
        tensor = tensors[name]
        if name.endswith(".bias"):
            tensor.zero_()
        elif tensor.dim() > 1:
            drawn = torch.zeros(tensor.shape)
            draw_normal(drawn, seed, first_tile, width)
            tensor.copy_(drawn)


def draw_normal(tensor: torch.Tensor, seed: int, first_tile: int, width: float) -> None:
    """Fill a float32 tensor with normal numbers of the initialisation stream, of this width."""
    scale = Steps.of([seed], [width])
    accumulate(
        torch.zeros_like(tensor),
        scale.seeds,
        scale.coefficients,
        first_tile=first_tile,
        distribution=Distribution.GAUSSIAN,
        out=tensor,
        stream=Stream.INITIALISATION,
    )


def _choose_padding(path: str, network: Any, tokenizer: Any) -> None:
    """Tell a classifier which token pads, where its configuration does not."""
    config = network.config.get_text_config()
    if config.pad_token_id is not None:
        return
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            config.pad_token_id = token
            return
    raise FedForwardError(
        f"model.path = {path!r} names no token that pads, neither in config.json nor in its "
        "tokenizer, and a classifier needs one to know where a text ends. Set pad_token_id in its "
        "config.json."
    )


def _check_package(quantization: str) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise FedForwardError(
            f"model.quantization = {quantization!r} needs the package bitsandbytes, which is not "
            "installed. Install it with `pip install 'fedforward[quantization]'`, or use "
            "model.quantization = 'none'."
        )
    # Its import warns of a kernel that `_settle` does without.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _settings(dtype: str) -> Any:
    """NF4 in blocks of 64 weights with a float32 scale each: 4.5 bits a weight."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=DTYPES[dtype]
    )


def _stored_quantization(path: str, stored: Any, asked: str) -> str:
    """How the weights lie on disk: "none" or as asked.

    Raises:
        FedForwardError: they are quantised in another way.
    """
    found = getattr(stored, "quantization_config", None)
    if found is None:
        return "none"
    settings = found if isinstance(found, dict) else found.to_dict()
    method = str(settings.get("quant_method", "unknown"))
    bits = method == "bitsandbytes"
    if settings.get("load_in_4bit"):
        bits, method = True, str(settings.get("bnb_4bit_quant_type", "fp4"))
    if method == asked or (asked == "none" and not bits):
        # What other packages have quantised is theirs to load.
        return asked
    advice = "Give the model as it was before."
    if method == "nf4":
        advice = "Set model.quantization = 'nf4'."
    raise FedForwardError(
        f"model.path = {path!r} is quantised on disk already ({method}), and model.quantization = "
        f"{asked!r}. {advice}"
    )


def _settle(path: str, network: Any, quantization: str, dtype: str) -> None:
    """Have the quantised layers compute in `dtype`, whatever the processor offers.

    On processors with AVX512-BF16 bitsandbytes rounds activations to bfloat16 in a kernel of its
    own. The two losses of a small perturbation then differ by little more than that rounding.
    """
    layers = [module for module in network.modules() if is_quantized(module)]
    if not layers:
        raise FedForwardError(
            f"model.quantization = {quantization!r}: model.path = {path!r} has no linear layers "
            "beside its head. Use model.quantization = 'none'."
        )
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
        layer.compute_dtype = DTYPES[dtype]
        layer.compute_type_is_set = True


def check_placement(path: str, places: dict[str, Any]) -> None:
    """Refuse a model that found no room on any CUDA device, or too little memory altogether."""
    kinds = {str(place) for place in places.values()}
    if "disk" in kinds:
        raise FedForwardError(
            f"model.path = {path!r} fits neither on the CUDA devices nor in host memory beside "
            "them, and every probe would read the rest from disk. Use model.quantization = 'nf4', "
            "a narrower model.dtype or a smaller model."
        )
    if kinds == {"cpu"}:
        raise FedForwardError(
            f"model.path = {path!r}: model.device_map = 'auto' finds no room on any CUDA device. "
            "Free their memory, or use run.device = 'cpu' and model.device_map = 'none'."
        )


def is_quantized(module: Any) -> bool:
    """Whether this module's weight is held in 4 bits."""
    return getattr(getattr(module, "weight", None), "quant_state", None) is not None


def weights(network: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """All that a base consists of: its parameters by name, then the scales of the quantised ones.

    Weights that wait in host memory for their turn on a device are fetched module by module.
    """
    from accelerate.utils import align_module_device

    # Weights without storage lose their ties, and would then be counted twice.
    tied = getattr(network, "all_tied_weights_keys", {})
    for name, parameter in sorted(network.named_parameters()):
        if not parameter.is_meta:
            yield name, parameter
            continue
        if name in tied:
            continue
        parent, _, leaf = name.rpartition(".")
        module = network.get_submodule(parent)
        with align_module_device(module, torch.device("cpu")):
            yield name, getattr(module, leaf)
    for name, module in sorted(network.named_modules()):
        if is_quantized(module):
            for key, tensor in sorted(module.weight.quant_state.as_dict(packed=True).items()):
                yield f"{name}.weight.{key}", tensor


def placement(network: Any) -> str:
    """The first module on each device that a network is spread over, in its order; "" for one.

    For example "model.embed_tokens on 0, model.layers.17 on 1, model.layers.30 on cpu".
    """
    places = getattr(network, "hf_device_map", {})
    runs = [next(run) for _, run in groupby(places.items(), key=lambda place: str(place[1]))]
    return ", ".join(f"{name} on {device}" for name, device in runs) if len(runs) > 1 else ""


def input_device(network: Any) -> torch.device:
    """Where tokens go; the device of the embeddings' turn if they wait in host memory."""
    embeddings = network.get_input_embeddings()
    if embeddings.weight.is_meta:
        return torch.device(embeddings._hf_hook.execution_device)
    device: torch.device = embeddings.weight.device
    return device


def dequantize(network: Any, added: Mapping[str, torch.Tensor]) -> Any:
    """The same network with plain weights of the values that it computed with; this is used up.

    Args:
        network: as `load` quantised it.
        added: float32 [outputs, inputs] to add to the weights of these modules.
    """
    from transformers.pytorch_utils import Conv1D

    kinds = {name: m.source_cls for name, m in network.named_modules() if is_quantized(m)}
    network = network.dequantize(network.dtype)
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


def hub_is_reachable(seconds: float = 5.0) -> bool:
    """Whether the model hub answers; taken for granted behind a proxy."""
    from huggingface_hub import constants

    address = urlsplit(constants.ENDPOINT)
    if getproxies().get(address.scheme):
        return True
    try:
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname or "", port), timeout=seconds).close()
    except OSError:
        return False
    return True


def longest_sequence(network: Any) -> int | None:
    """Positions that the model takes, or None if its configuration names no limit."""
    limit = getattr(network.config, "max_position_embeddings", None)
    # XLNet says -1 for none.
    return int(limit) if limit and limit > 0 else None
