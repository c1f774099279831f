"""The part of a network that reads text: all of a language model, or its decoder beside an encoder.

Networks that take images or sound as well are tuned in that part alone. What only the other inputs
pass through has no effect on a text, so that its weights would move at random.
"""

from typing import Any

from torch import nn


def is_multimodal(network: Any) -> bool:
    """Whether a network takes other inputs than text as well."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as IMAGES,
    )

    config = getattr(network, "config", None)
    parts = ("vision_config", "audio_config")
    other = any(getattr(config, key, None) is not None for key in parts)
    return other or type(network).__name__ in IMAGES.values()


def text_part(network: Any) -> nn.Module:
    """The decoder of a network that takes images or sound; of others the network itself.

    Embeddings lie in it, and a head that is not tied to them does not.
    """
    if not is_multimodal(network):
        part: nn.Module = network
        return part
    decoder = network.get_decoder()
    # Some have one body for all inputs.
    return decoder if isinstance(decoder, nn.Module) else network


def text_prefixes(network: Any) -> tuple[str, ...]:
    """What the names of the text part's parameters begin with, its head's included."""
    parts = [text_part(network)]
    if parts[0] is network:
        return ("",)
    head = network.get_output_embeddings()
    parts += [] if head is None else [head]
    return tuple(
        f"{name}." for name, m in network.named_modules() if any(m is part for part in parts)
    )
