"""Networks and tokenizers from folders or the hub, with errors that say what is wrong with them."""

import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch

from fedforward.errors import FedForwardError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(path: str, dtype: str, device: str) -> tuple[Any, Any]:
    """The network (evaluation mode, no gradients) and the tokenizer of a folder or a hub name.

    Raises:
        FedForwardError: there is no such folder, it lacks a file, or the hub cannot be reached.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

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
    name = str(folder) if local else path
    # Offline the hub's client tries again for most of a minute; what it has cached needs no hub.
    kept = local or not hub_is_reachable()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=kept)
        network, loading = AutoModelForCausalLM.from_pretrained(
            name, dtype=DTYPES[dtype], output_loading_info=True, local_files_only=kept
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
        if "ignore_mismatched_sizes" in reason:
            reason = "the weights have other shapes than its config.json says."
        if not local and kept:
            reason = f"there is no such folder here, and the hub cannot be reached. {reason}"
        raise FedForwardError(f"model.path = {path!r} cannot be loaded: {reason}") from error
    if loading["missing_keys"]:
        raise FedForwardError(
            f"model.path = {path!r}: the weights lack {len(loading['missing_keys'])} tensors that "
            f"its config.json asks for, such as {min(loading['missing_keys'])}. Give a complete "
            "model."
        )
    network.to(device).eval().requires_grad_(False)
    return network, tokenizer


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
    return int(limit) if limit else None
