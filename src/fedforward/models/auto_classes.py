"""What transformers makes of a model's files: which class, which tokenizer, and what does not fit.

Weights, configuration and tokenizer of a folder may come from different models; the checks here
find that out before a run begins.
"""

import logging
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch

from fedforward.core.errors import FedForwardError

LOGGER = logging.getLogger("fedforward.models")


def network_class(stored: Any) -> Any:
    """The class that loads a language model of this configuration.

    One that takes images beside text is loaded whole, as it was saved.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto as known

    whole = known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(stored.model_type)
    causal = type(stored) in known.MODEL_FOR_CAUSAL_LM_MAPPING
    saved = not causal or whole in (stored.architectures or ())
    if whole and saved and not stored.is_encoder_decoder:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def load_tokenizer(path: str, name: str, where: Mapping[str, Any]) -> Any:
    """The tokenizer of a model.

    Raises:
        FedForwardError: there is none, or its files are damaged.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, **where)
    except Exception as error:
        # The tokenizers library raises errors of no kind for files that it cannot read.
        reason = reason_of(error)
        if "instantiate the backend tokenizer" in reason:
            reason = (
                "none of its files can be read here. Copy tokenizer.json there from where the "
                "model came from, or install the package that its kind needs (sentencepiece or "
                "tiktoken)."
            )
        raise FedForwardError(
            f"model.path = {path!r}: the tokenizer cannot be loaded: {reason}"
        ) from error


def reason_of(error: BaseException) -> str:
    """What a library says of a model that it cannot load, in one line."""
    # The first line often ends before what it announces ("… one of:").
    reason = " ".join(str(error).split("\n\n")[0].split())
    if isinstance(error, KeyError):
        reason = f"{reason} is missing."
    if "ignore_mismatched_sizes" in reason:
        reason = "the weights have other shapes than its config.json says."
    if "automatic conversion of the weights" in reason:
        reason = (
            "parts of some tensors are missing, or have other shapes than its config.json says."
        )
    if found := re.search(r"Unrecognized configuration class <class '[\w.]*\.(\w+)'>", reason):
        reason = f"transformers has no language model for its configuration, a {found[1]}."
    if "trust_remote_code" in reason:
        reason = "it brings Python code of its own, which is not run here."
    return reason or type(error).__name__


def check_blocks(path: str, network: Any, unexpected: Collection[str]) -> None:
    """Refuse weights of more blocks than the network has; tensors of other kinds are told of.

    Raises:
        FedForwardError: a whole block would be left out.
    """
    lists = {n: m for n, m in network.named_modules() if isinstance(m, torch.nn.ModuleList)}
    for name in sorted(unexpected):
        found = re.match(r"(.+?)\.(\d+)\.", name)
        if found and found[1] in lists and int(found[2]) >= len(lists[found[1]]):
            raise FedForwardError(
                f"model.path = {path!r}: the weights have {name}, and config.json asks for only "
                f"{len(lists[found[1]])} blocks in {found[1]}. Give a config.json and weights "
                "that belong together."
            )
    if unexpected:
        LOGGER.warning(
            "model.path = %r: %d tensors of its files are not used, such as %s",
            path,
            len(unexpected),
            min(unexpected),
        )


def check_vocabulary(path: str, network: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer of another model: the embeddings have no rows for its tokens.

    Some models have tokens beyond their embeddings that were added for images; a text that has one
    is refused when it comes.
    """
    rows = len(network.get_input_embeddings().weight)
    added = tokenizer.get_added_vocab()
    needed = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token}
    beyond = [
        (number, token)
        for token, number in tokenizer.get_vocab().items()
        if number >= rows and (token not in added or token in needed)
    ]
    if beyond:
        number, token = min(beyond)
        raise FedForwardError(
            f"model.path = {path!r}: its tokenizer has {len(beyond)} tokens that its embeddings "
            f"have no rows for, such as {token!r} with number {number}; there are {rows} rows. "
            "Give the tokenizer that the model was trained with, or resize the embeddings."
        )
