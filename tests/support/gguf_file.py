"""A GGUF file of a tiny Llama, written with the package gguf as llama.cpp's converter does."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.conftest import DEMO_MODEL

_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


def _renamed(name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
    number, _, rest = name.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{_NAMES[rest]}"


def _permuted(weight: NDArray[Any], heads: int) -> NDArray[Any]:
    """The order of rows in which llama.cpp rotates the halves of a head."""
    rows, columns = weight.shape
    split = weight.reshape(heads, 2, rows // heads // 2, columns)
    return split.swapaxes(1, 2).reshape(rows, columns)


def write_gguf(network: Any, path: Path, kind: str = "F32") -> None:
    """Write a Llama with the demonstration's tokenizer.

    Args:
        kind: of the matrices: "F32", "F16", "Q8_0" …; vectors are float32.
    """
    import gguf

    config = network.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokenizer = json.loads((DEMO_MODEL / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"] | {
        token["content"]: token["id"] for token in tokenizer["added_tokens"]
    }
    special = {token["id"] for token in tokenizer["added_tokens"]}
    tokens = sorted(vocabulary, key=lambda token: int(vocabulary[token]))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    types = [3 if vocabulary[token] in special else 1 for token in tokens]
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    quantised = gguf.GGMLQuantizationType[kind]
    for name, parameter in network.named_parameters():
        weight = parameter.detach().float().numpy()
        if name.endswith("q_proj.weight"):
            weight = _permuted(weight, config.num_attention_heads)
        if name.endswith("k_proj.weight"):
            weight = _permuted(weight, config.num_key_value_heads)
        if weight.ndim == 1 or kind == "F32":
            writer.add_tensor(_renamed(name), np.ascontiguousarray(weight))
        else:
            packed = gguf.quants.quantize(np.ascontiguousarray(weight), quantised)
            writer.add_tensor(_renamed(name), packed, raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
