"""Fingerprints of weights and of tokenizers, which parties compare before they work together."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch

#: About how many of a tokenizer's own tokens it is tried on.
_OWN_TOKENS = 4000
#: What a tokenizer is tried on, beside its vocabulary.
PROBE_TEXTS = ("Hello, world! 3.14 = 22/7", "Größe  naïve\tℝ 你好 🙂", "def f(x):\n    return x")


def fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order given; hexadecimal."""
    state = hashlib.sha256()
    for name, tensor in tensors:
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        state.update(flat.numpy().data)
    return state.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's vocabulary and of what it makes of texts, hexadecimal.

    The texts are a few sentences and some thousand of its own tokens, which another list of merges
    puts together in another way.
    """
    vocabulary = sorted(tokenizer.get_vocab())
    own = [tokenizer.convert_tokens_to_string([token]) for token in vocabulary]
    step = max(1, len(own) // _OWN_TOKENS)
    tried = [tokenizer(text)["input_ids"] for text in (*PROBE_TEXTS, *own[::step])]
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    content = json.dumps([sorted(tokenizer.get_vocab().items()), tried, special])
    return hashlib.sha256(content.encode()).hexdigest()
