"""Networks and tokenizers from folders or the hub, with errors that say what is wrong with them.

A frozen base may be held in fewer bits, and may lie on several devices; what it consists of then,
and its way back to plain weights, are here too.
"""

import logging
import socket
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import groupby
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch

from fedforward.core import paths
from fedforward.core.errors import FedForwardError
from fedforward.core.paths import absolute_text, hint, home, is_path
from fedforward.core.seeds import derive
from fedforward.core.steps import Steps
from fedforward.directions import Distribution, Layout, Stream
from fedforward.directions.ops import accumulate
from fedforward.models import gguf_files, int8
from fedforward.models import quantization as packing
from fedforward.models.auto_classes import (
    check_blocks,
    check_vocabulary,
    load_tokenizer,
    network_class,
    reason_of,
)
from fedforward.models.blocks import class_heads
from fedforward.models.folders import check_folder
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
        path: a folder in Hugging Face format, a GGUF file, or a hub name.
        dtype: of the weights, and of the arithmetic where they are held in fewer bits.
        device: where the network goes, unless `device_map` decides.
        quantization: "nf4" holds the linear layers in 4 bits through bitsandbytes. They are
            quantised on the CPU, so that every party has the same base, unless `device_map` places
            them first. "stored" takes a folder that is quantised already.
        classes: their names; none makes a causal language model.
        run_seed: of a head that the folder lacks.
        device_map: "auto" spreads the layers over all CUDA devices and then host memory.
        offload: the transformer blocks stay in host memory, for `Offload`; until there is
            one the network cannot run.

    Raises:
        FedForwardError: there is no such folder, it lacks a file, or the hub cannot be reached; it
            cannot be quantised or placed like that.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    name, local, gguf = _locate(path)
    if device_map == "auto" and torch.device(device).type == "cpu":
        raise FedForwardError(
            "model.device_map = 'auto' spreads a model over CUDA devices, and PyTorch finds none "
            "here. Use model.device_map = 'none'."
        )
    options: dict[str, Any] = {"dtype": DTYPES[dtype]}
    if device_map == "auto":
        options["device_map"] = "auto"
    if quantization != "none":
        if quantization == "nf4":
            packing.check_package(quantization)
        options = {"device_map": {"": "cpu"}} | options
    # Offline the hub's client tries again for most of a minute; what it has cached needs no hub.
    kept = local or gguf or not hub_is_reachable()
    where: dict[str, Any] = {"local_files_only": kept, "trust_remote_code": False}
    if gguf:
        where["gguf_file"] = home(path).name
        if quantization != "none":
            raise FedForwardError(
                f"model.quantization = {quantization!r} does not go with model.path = {path!r}: "
                "the weights of a GGUF file are made plain when they are read. Use "
                "model.quantization = 'none'."
            )
    with gguf_files.folder_of(path) if gguf else nullcontext(name) as name:
        try:
            stored = AutoConfig.from_pretrained(name, **where)
            if not classes:
                _check_kind(path, stored)
            if packing.quantises(path, stored, quantization):
                options["quantization_config"] = packing.bits(DTYPES[dtype])
            if packing.unpack(stored, DTYPES[dtype]):
                options["config"] = stored
            kind = network_class(stored)
            if classes:
                kind = AutoModelForSequenceClassification
                _name_classes(path, stored, classes)
                options["config"] = stored
            with load_report_hidden(bool(classes)):
                network, loading = kind.from_pretrained(
                    name, output_loading_info=True, **where, **options
                )
        except (FedForwardError, MemoryError):
            raise
        except Exception as error:
            # Each library that transformers stands on has errors of its own.
            reason = reason_of(error).replace(str(name), path)
            if "dispatched on the CPU or the disk" in reason:
                reason = (
                    f"with model.quantization = {quantization!r} and model.device_map = 'auto' "
                    "all of it must fit on the CUDA devices, and it does not."
                )
            if not local and kept:
                reason = (
                    f"no such folder is here, and the hub cannot be reached.{hint(path)} {reason}"
                )
            raise FedForwardError(f"model.path = {path!r} cannot be loaded: {reason}") from error
        tokenizer = load_tokenizer(path, name, where)
        check_vocabulary(path, network, tokenizer)
    if gguf:
        network.config._name_or_path = network.name_or_path = absolute_text(path)
        tokenizer.name_or_path = network.name_or_path
    packed = getattr(stored, "quantization_config", None) is not None
    if gguf or (packed and getattr(network, "hf_quantizer", None) is None):
        # Its weights were made plain when they were read.
        packing.make_plain(network, DTYPES[dtype])
    heads = tuple(f"{name}." for name in class_heads(network))
    missing = {name for name in loading["missing_keys"] if not name.startswith(heads)}
    if missing:
        raise FedForwardError(
            f"model.path = {path!r}: the weights lack {len(missing)} tensors that "
            f"its config.json asks for, such as {min(missing)}. Give a complete model."
        )
    check_blocks(path, network, loading["unexpected_keys"])
    if classes:
        _initialise_head(network, loading["missing_keys"], run_seed)
        _choose_padding(path, network, tokenizer)
    if quantization != "none":
        packing.settle(path, network, quantization, DTYPES[dtype])
    if device_map == "auto":
        check_placement(path, network.hf_device_map)
    elif offload:
        place_the_rest(network, device)
    else:
        network.to(device)
    network.eval().requires_grad_(False)
    return network, tokenizer


def _locate(path: str) -> tuple[str, bool, bool]:
    """Where a model is, whether that is a path, and whether it is a GGUF file.

    Raises:
        FedForwardError: there is no whole model there.
    """
    local, gguf = is_path(path), gguf_files.is_gguf(path)
    if gguf:
        gguf_files.check_gguf(path)
    elif local:
        paths.check_folder(
            path,
            "model.path",
            "a folder with config.json, weights and tokenizer, or a hub name such as "
            "'Qwen/Qwen3-0.6B'",
        )
        check_folder(path)
    # PEFT writes this name into the adapter, which is then loaded from any folder.
    return absolute_text(path), local, gguf


def tokenizer_and_positions(path: str) -> tuple[Any, int | None]:
    """The tokenizer of a model, and the longest sequence that the model takes, or None.

    Raises:
        FedForwardError: they cannot be loaded.
    """
    from transformers import AutoConfig

    name, local, gguf = _locate(path)
    kept = local or gguf or not hub_is_reachable()
    where: dict[str, Any] = {"local_files_only": kept, "trust_remote_code": False}
    if gguf:
        where["gguf_file"] = home(path).name
    with gguf_files.folder_of(path) if gguf else nullcontext(name) as folder:
        try:
            stored = AutoConfig.from_pretrained(folder, **where)
        except Exception as error:
            reason = reason_of(error).replace(folder, path)
            raise FedForwardError(f"model.path = {path!r} cannot be loaded: {reason}") from error
        tokenizer = load_tokenizer(path, folder, where)
    return tokenizer, _positions(stored)


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
def load_report_hidden(hidden: bool = True) -> Iterator[None]:
    """Leave out transformers' table of tensors that do not fit; they are looked at here."""

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


def weights(network: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """All that a base consists of: its parameters by name, then its buffers and quantised scales.

    Buffers that a saved model does not have are computed, and left out. Weights that wait in host
    memory for their turn on a device are fetched module by module.
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
    yield from persistent_buffers(network)
    for name, module in sorted(network.named_modules()):
        if isinstance(module, int8.Int8Linear):
            yield f"{name}.weight.scale", module.scale
        elif packing.is_quantized(module):
            for key, tensor in sorted(module.weight.quant_state.as_dict(packed=True).items()):
                yield f"{name}.weight.{key}", tensor


def persistent_buffers(network: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The buffers of a network that its saved form has, by name."""
    for name, module in sorted(network.named_modules()):
        for key, buffer in sorted(module._buffers.items()):
            own = key not in module._non_persistent_buffers_set
            if own and buffer is not None and not buffer.is_meta:
                yield f"{name}.{key}".removeprefix("."), buffer


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
    return _positions(network.config)


def _positions(config: Any) -> int | None:
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    # XLNet says -1 for none.
    return int(limit) if limit and limit > 0 else None
