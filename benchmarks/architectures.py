"""Every causal architecture of transformers at a tiny size, under LoRA's defaults and full tuning.

    architectures.py --write        # the whole table; writes docs/reference/architectures.md
    architectures.py llama mamba    # some of them, printed

A configuration is shrunk, a network with random weights and a tokenizer of letters are saved as a
folder, and a run of two rounds is made from it. Its first loss is compared with transformers, its
last with what PEFT and transformers load of the adapter, the merged export and the tuned model.

An outcome is "works", "refused" with the sentence, "differs" where a loss or a proof is another
one, "crash" where a traceback would end the run, or "unmade" where transformers itself cannot run
the shrunken network. The aim is none of "differs" and "crash".
"""

import argparse
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from fedforward.core.errors import FedForwardError

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/reference/architectures.md"
KINDS = ("lora", "full")
#: Architectures that one process looks at, so that a fault of the interpreter ends few of them.
AT_ONCE = 24
#: Seconds for one architecture and one kind of tuning.
LIMIT = 120
#: Largest relative difference between two losses in float32 that are the same.
TOLERANCE = 2e-5

#: Letters, digits, signs and the tokens that begin, end and pad.
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
LETTERS = [chr(code) for code in range(32, 127)]
VOCABULARY = 128

#: What the fields of configurations that carry sizes are set to, by their names.
SIZES: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "decoder_vocab_size", "unpadded_vocab_size"), VOCABULARY),
    **dict.fromkeys(("vocab_size_per_layer_input",), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim"), 32),
    **dict.fromkeys(("embedding_size", "input_embedding_size", "output_embedding_size"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "lru_width", "attention_hidden_size"), 32),
    **dict.fromkeys(("backbone_hidden_size", "ple_embed_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_inner", "n_inner", "dff", "dim_ff"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "feed_forward_size"), 48),
    **dict.fromkeys(("ffn_hidden_size", "intermediate_size_mlp", "dense_intermediate_size"), 48),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("moe_intermediate_size", "shared_experts_intermediate_size"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_layers_per_stack"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("attention_heads", "encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("swa_num_attention_heads", "linear_num_heads", "index_n_heads"), 4),
    **dict.fromkeys(("linear_num_value_heads", "mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("linear_num_key_heads", "n_mamba_heads"), 2),
    **dict.fromkeys(("head_dim", "dim_head", "d_head", "kv_channels", "swa_head_dim"), 8),
    **dict.fromkeys(("attention_head_size", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("linear_head_dim", "qk_nope_head_dim", "v_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "laurel_rank"), 8),
    **dict.fromkeys(("gated_norm_rank", "hc_lowrank", "adapter_rank"), 8),
    **dict.fromkeys(("hidden_size_per_layer_input", "d_rel", "router_hidden_size"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_num_experts", "zero_expert_num"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "num_expert_group", "topk_group", "n_groups"), 1),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 8),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    **dict.fromkeys(("model_max_length", "max_target_positions", "context_length"), 128),
    **dict.fromkeys(("original_max_position_embeddings",), 64),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size"), 16),
    **dict.fromkeys(("attention_window_size", "attention_chunk_size", "local_attention"), 16),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "block_size", "index_block_size"), 16),
    # More than a text has: a choice of fewer among equal scores, which are 0, is nobody's.
    **dict.fromkeys(("index_topk", "index_topk_blocks"), 128),
    **dict.fromkeys(("rel_extent",), 8),
    **dict.fromkeys(
        ("pronunciation_embed_dim", "shape_embed_dim", "ffn_round_up_to_multiple_of"), 8
    ),
    **dict.fromkeys(("pronunciation_vocab_size", "shape_vocab_size"), 64),
    **dict.fromkeys(("encoder_hash_byte_group_vocab", "ngram_vocab_size_base"), 64),
    **dict.fromkeys(("hidden_size_global", "split_ngram_parts"), 64),
}
#: The same for parts of another kind, such as a tower for images, which text does not run through.
TOWERS = ("vision_config", "audio_config", "vq_config", "audio_encoder", "text_encoder")

#: What some families need beside the sizes, or in place of them.
FAMILIES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        "global_config": {
            "hidden_size": 64,
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
        }
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_text": {"num_hidden_layers": 2, "layer_types": None, "per_layer_config": None},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 16},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": 48,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hrm_text": {"num_hidden_layers": 1, "num_layers_per_stack": None},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 16]},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 5,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid", "hybrid"],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "attention_hidden_size": 64,
        "n_mamba_heads": 4,
    },
}
#: What a class cannot be made without.
START: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_kv_shared_layers": 2,
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": 128,
        }
    },
}
#: What cannot run on a text alone, whatever its size.
NOT_TEXT = {"gemma4_assistant", "gemma4_unified_assistant", "musicgen", "musicgen_melody"}
#: Fields that say which layer is of which kind.
ORDERED = {"layer_types", "layers_block_type", "attn_layer_indices", "num_hidden_layers"}


def tokenizer_into(folder: Path) -> None:
    """Save a tokenizer with a token for each letter; it begins and ends no text."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate((*SPECIAL, *LETTERS))}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(str(folder))


def shrunken(kind: type, family: str) -> Any:
    """A configuration of a class with small sizes in place of its defaults.

    What a class derives from its sizes, as a list with an entry for each layer, is derived again.
    Where such a list holds several kinds of layers, there is one layer of each kind.
    """
    default = kind(**START.get(family, {}))
    given = START.get(family, {}) | FAMILIES.get(family, {})
    wanted = _sizes(default)
    if hasattr(default, "qk_rope_head_dim"):
        # Multi-head latent attention: the head of a key is what rotates.
        wanted |= {"num_key_value_heads": 4, "head_dim": SIZES["qk_rope_head_dim"]}
    settable = not isinstance(getattr(kind, "layer_types", None), property)
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or ()))
    if len(kinds) > 1 and settable and not ORDERED & given.keys():
        wanted |= {"num_hidden_layers": len(kinds), "layer_types": kinds}
        if hasattr(default, "mlp_layer_types"):
            others = list(dict.fromkeys(default.mlp_layer_types or ()))
            wanted["mlp_layer_types"] = [others[-(n + 1) % len(others)] for n in range(len(kinds))]
            wanted["mlp_layer_types"].sort(key=others.index)
    return kind(**(wanted | given))


def _sizes(default: Any) -> dict[str, Any]:
    """The fields of a configuration that carry sizes, at their small values."""
    wanted: dict[str, Any] = {}
    for name, value in vars(default).items():
        if name in SIZES and isinstance(value, int) and not isinstance(value, bool):
            wanted[name] = min(value, SIZES[name]) if value > 0 else value
        elif hasattr(value, "to_dict") and hasattr(value, "model_type"):
            wanted[name] = shrunken(type(value), value.model_type).to_dict()
        elif name == "initializer_range":
            wanted[name] = 0.1
    for number, name in enumerate(("pad_token_id", "bos_token_id", "eos_token_id")):
        wanted[name] = number
    return wanted


def folder_of(family: str, folder: Path) -> None:
    """Save a tiny network of a family, random weights, and the tokenizer."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = shrunken(CONFIG_MAPPING[family], family)
    torch.manual_seed(0)
    try:
        network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (AttributeError, ValueError) as error:
        # Its causal class takes a part of the configuration, which is not what the folder has.
        part = getattr(config, "decoder", None) or config.get_text_config()
        if part is config:
            raise error
        network = causal_class(family)(part)
    size = sum(parameter.numel() for parameter in network.parameters())
    if size > 5_000_000:
        raise ValueError(f"{size / 1e6:.1f} million weights are left")
    network.requires_grad_(False)
    with torch.no_grad():
        for parameter in network.parameters():
            # Nothing is left at a neutral value.
            if parameter.is_floating_point():
                parameter.add_(0.02 * torch.randn(parameter.shape, dtype=parameter.dtype))
    network.eval()
    if family not in NOT_TEXT:
        logits = network(input_ids=torch.arange(5, 25)[None], use_cache=False).logits
        if not torch.isfinite(logits).all():
            raise ValueError("its logits are not finite")
    network.save_pretrained(str(folder))
    tokenizer_into(folder)


def causal_class(family: str) -> Any:
    """The class that transformers names for a model type."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family])


def rows_into(file: Path) -> None:
    """Questions and answers of different lengths, so that batches have padding."""
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    rows = [
        {"q": f"{a} and {b}", "a": f"{b} {a[: k % 4 + 1]}"}
        for k, (a, b) in enumerate(zip(words, words[3:] + words[:3], strict=True))
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def configuration(folder: Path, rows: Path, tune: str) -> Any:
    """The defaults, but for sizes that make a run short."""
    from fedforward.config.loading import validate

    return validate(
        {
            "model": {"path": str(folder), "tune": tune},
            "data": {
                "source": str(rows),
                "prompt": "{q}:",
                "answer": " {a}",
                "heldout": 4,
                "sequence_length": 40,
                "answer_tokens": 4,
            },
            "federation": {"clients": 2, "rounds": 2},
            "method": {
                "learning_rate": 1e-3,
                "mu": 1e-2,
                "local_steps": 1,
                "batch_size": 2,
                "directions": 2,
            },
            "run": {"evaluate_every": 2, "threads": 1, "device": "cpu"},
        }
    )


@torch.inference_mode()
def reference_loss(network: Any, examples: Iterable[Any]) -> float:
    """Mean loss per answer token as transformers has it, one text at a time without padding."""
    total, count = 0.0, 0
    for example in examples:
        tokens = torch.from_numpy(example.tokens)[None]
        logits = network(input_ids=tokens, use_cache=False).logits.double()
        begin = example.prompt_length
        losses = torch.nn.functional.cross_entropy(
            logits[0, begin - 1 : -1], tokens[0, begin:], reduction="sum"
        )
        total, count = total + float(losses), count + tokens.shape[1] - begin
    return total / count


def same(one: float, other: float) -> bool:
    """Whether two losses in float32 are the same."""
    return math.isclose(one, other, rel_tol=TOLERANCE)


class DiffersError(Exception):
    """Two figures that must agree do not."""


def carried_out(family: str, folder: Path, rows: Path, tune: str, out: Path) -> dict[str, Any]:
    """One run and all that it is compared with.

    Returns:
        what the table says of it beside the outcome.

    Raises:
        FedForwardError: the run is refused.
        DiffersError: a loss is not the one that it must be.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from fedforward.training.replay import export, verify
    from fedforward.training.run import Run

    def base(path: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32).eval()

    run = Run(configuration(folder, rows, tune), out)
    heldout = run.corpus.heldout
    expected = reference_loss(base(folder), heldout)
    run.fit()
    lines = run.directory.read_metrics(2)
    plan = run.plan
    figures: dict[str, Any] = {
        "probes_per_call": plan.probes_per_call,
        "alone": plan.alone,
        "left_out": plan.left_out,
    }
    start, end = lines[0]["heldout_loss"], lines[-1]["heldout_loss"]
    _compare("the first loss", start, "transformers'", expected)
    if start == end:
        raise DiffersError("the loss has not moved")
    kept = out / ("adapter" if tune == "lora" else "model")
    if tune == "lora":
        loaded = PeftModel.from_pretrained(base(folder), str(kept)).eval()
        _compare(
            "the last loss", end, "that of PEFT with the adapter", reference_loss(loaded, heldout)
        )
        merged = export(out, out.with_name("merged"), merge=True)
        _compare("the last loss", end, "the merged model's", reference_loss(base(merged), heldout))
    else:
        _compare("the last loss", end, "the saved model's", reference_loss(base(kept), heldout))
    proof = verify(out)
    return figures | {"verifies": proof.ok, "proof": "".join(proof.differences[:1])}


def _compare(what: str, found: float, whose: str, expected: float) -> None:
    if not same(found, expected):
        raise DiffersError(f"{what} is {found:.6f}, {whose} is {expected:.6f}")


def outcomes(family: str) -> list[dict[str, Any]]:
    """What becomes of one architecture, for each kind of tuning."""
    with tempfile.TemporaryDirectory() as place:
        folder, rows = Path(place, family), Path(place, "rows.jsonl")
        rows_into(rows)
        try:
            with limited(LIMIT):
                folder_of(family, folder)
        except Exception as error:  # whatever transformers raises
            return [_row(family, tune, "unmade", _first_line(error)) for tune in KINDS]
        return [_outcome(family, folder, rows, tune) for tune in KINDS]


def _outcome(family: str, folder: Path, rows: Path, tune: str) -> dict[str, Any]:
    begin = time.perf_counter()
    out = folder.with_name(tune) / "run"
    out.parent.mkdir()
    try:
        with limited(LIMIT), without_chatter():
            figures = carried_out(family, folder, rows, tune, out)
        row = _row(family, tune, "works", "") | figures
    except FedForwardError as error:
        row = _row(family, tune, "refused", str(error).replace(str(folder), "FOLDER"))
    except DiffersError as error:
        row = _row(family, tune, "differs", str(error))
    except Exception as error:
        row = _row(family, tune, "crash", _first_line(error))
        row["traceback"] = traceback.format_exc()
    shutil.rmtree(out.parent, ignore_errors=True)
    return row | {"seconds": round(time.perf_counter() - begin, 2)}


def _row(family: str, tune: str, outcome: str, says: str) -> dict[str, Any]:
    return {"architecture": family, "tune": tune, "outcome": outcome, "says": says}


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise `TimeoutError` where the body takes longer."""

    def ring(*_: Any) -> None:
        raise TimeoutError(f"it takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def without_chatter() -> Iterator[None]:
    """Libraries' warnings are not this table's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def architectures() -> list[str]:
    """Every model type for which transformers has a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def look_at(names: Sequence[str], show: Callable[[dict[str, Any]], None]) -> None:
    """Outcomes of some architectures, in this process."""
    import gc

    from fedforward.models.libraries import quiet_libraries

    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    quiet_libraries()
    torch.set_num_threads(1)
    for name in names:
        for row in outcomes(name):
            show(row)
        gc.collect()
        # A run counts the tensors alive, and looks at every object for it.
        gc.freeze()


def in_processes(names: Sequence[str], show: Callable[[dict[str, Any]], None]) -> None:
    """The same, some architectures in each process; what ends a process is a crash of one."""
    waiting = list(names)
    while waiting:
        part, waiting = waiting[:AT_ONCE], waiting[AT_ONCE:]
        command = [sys.executable, __file__, "--lines", *part]
        done: Counter[str] = Counter()
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    row = json.loads(line)
                    done[row["architecture"]] += 1
                    show(row)
        if process.returncode:
            cut = next((name for name in part if done[name] < len(KINDS)), None)
            if cut is not None:
                for tune in KINDS[done[cut] :]:
                    show(_row(cut, tune, "crash", f"the process ended with {process.returncode}"))
                waiting = part[part.index(cut) + 1 :] + waiting


#: What the page calls each outcome; a refusal is called by its kind.
OUTCOMES = ("works", "refused", "differs", "crash", "unmade")
#: Kinds of refusals, by words of their sentences.
REFUSALS = {
    "is not causal": "not causal",
    "the network fails on two short texts": "not text alone",
    "cannot be loaded": "not loaded",
    "is an encoder-decoder": "encoder-decoder",
    "does not reach": "unreached tensors",
    "does not fit this model": "nothing to adapt",
    "cannot continue a text": "no generation",
}


def kind_of(row: dict[str, Any]) -> str:
    """What a cell of the table says of an outcome."""
    if row["outcome"] == "refused":
        kinds = (kind for words, kind in REFUSALS.items() if words in row["says"])
        return f"refused: {next(kinds, 'another reason')}"
    alone = ", one probe a pass" if row.get("alone") else ""
    return f"{row['outcome']}{alone}"


def counts(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """How often each cell stands in the columns of the table."""
    return {
        tune: dict(Counter(kind_of(row) for row in rows if row["tune"] == tune).most_common())
        for tune in KINDS
    }


def page(rows: Sequence[dict[str, Any]], versions: Mapping[str, str]) -> str:
    """The page of the documentation.

    Args:
        versions: of the packages that the outcomes depend on.
    """
    by_name: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_name.setdefault(row["architecture"], {})[row["tune"]] = row
    numbers = counts(rows)
    agreed = {t: sum(r["tune"] == t and r.get("verifies", False) for r in rows) for t in KINDS}
    cells = list(dict.fromkeys([*numbers["lora"], *numbers["full"]]))
    lines = [
        "# Architectures",
        "",
        "<!-- Written by benchmarks/architectures.py --write; do not edit. -->",
        "",
        f"transformers {versions['transformers']} has a causal language model for {len(by_name)} "
        "model types, and this page has all.",
        "A tiny network with random weights is made of each, and tuned for two rounds",
        "with the default settings of LoRA and of full tuning.",
        f"PEFT is {versions['peft']}, and PyTorch {versions['torch']} on the CPU.",
        "",
        '"works" means that these figures agree to five digits:',
        "",
        "- the first held-out loss, with that of transformers for each text alone;",
        "- the last one with what PEFT loads of the adapter, and with the merged export;",
        "- under full tuning, the last one with what transformers loads of the saved model.",
        "",
        '"one probe a pass" says that probes cannot share a forward pass.',
        "It is found out when the model is built, and stands in `plan.json`; a run takes longer.",
        '"unmade" says that transformers cannot run the network at this size.',
        "`benchmarks/architectures.py --write` makes this page and `architectures.json` beside it.",
        "",
        "| outcome | LoRA | full tuning |",
        "|---|--:|--:|",
        *(f"| {c} | {numbers['lora'].get(c, 0)} | {numbers['full'].get(c, 0)} |" for c in cells),
        f"| of those that work, `verify` agrees | {agreed['lora']} | {agreed['full']} |",
        "",
        "## Refusals",
        "",
        "Each kind is one sentence and exit code 2:",
        "",
    ]
    for words, kind in REFUSALS.items():
        found = next((r for r in rows if r["outcome"] == "refused" and words in r["says"]), None)
        if found is not None:
            lines += [f"| {kind} |", "|---|", f"| {_cell(found['says'])} |", ""]
    unmade = {r["architecture"]: r["says"] for r in rows if r["outcome"] == "unmade"}
    if unmade:
        lines += [
            "## Not made at this size",
            "",
            "| architecture | transformers says |",
            "|---|---|",
        ]
        lines += [f"| `{name}` | {_cell(says)} |" for name, says in unmade.items()]
        lines.append("")
    lines += ["## Table", "", "| architecture | LoRA | full tuning |", "|---|---|---|"]
    for name, row in by_name.items():
        lines.append(f"| `{name}` | {kind_of(row['lora'])} | {kind_of(row['full'])} |")
    left = {row["left_out"]: [] for row in rows if row.get("left_out")}
    for row in rows:
        if row.get("left_out"):
            left[row["left_out"]].append(row["architecture"])
    lines += ["", "## What is left out", ""]
    lines += [
        "The run says it, and `plan.json` has it as `left_out`.",
        "Fused experts are one tensor of three dimensions, with rows of tokens sorted by expert.",
        'An adapter of a probe\'s own cannot stand beside them; `model.tune = "full"` tunes them.',
        "",
    ]
    lines += ["| architecture | left out |", "|---|---|"]
    lines += [f"| {', '.join(names)} | {_cell(words)} |" for words, names in left.items()]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("<", "&lt;").replace("*", "\\*")


def write(rows: Sequence[dict[str, Any]], where: Path = PAGE) -> None:
    """Write the page, and the outcomes beside it without what differs from run to run."""
    kept = [
        {name: value for name, value in row.items() if name not in ("seconds", "traceback")}
        for row in rows
    ]
    where.parent.mkdir(exist_ok=True)
    versions = installed()
    where.write_text(page(rows, versions), encoding="utf-8")
    content = {"versions": versions, "rows": kept}
    where.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def installed() -> dict[str, str]:
    """Versions of the packages that the outcomes depend on."""
    names = ("transformers", "peft", "torch")
    return {name: metadata.version(name).partition("+")[0] for name in names}


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="model types; none is all")
    parser.add_argument("--json", type=Path, help="write the outcomes there")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    parser.add_argument("--lines", action="store_true", help="print a line of JSON for each")
    parser.add_argument("--check", action="store_true", help="exit 1 for a crash or a difference")
    given = parser.parse_args(arguments)
    names = given.names or architectures()
    rows: list[dict[str, Any]] = []
    if given.lines:
        look_at(names, lambda row: print(json.dumps(row), flush=True))
        return 0

    def show(row: dict[str, Any]) -> None:
        rows.append(row)
        shown = f"{row['architecture']:26} {row['tune']:5} {kind_of(row):32} "
        print(f"{shown}{row.get('seconds', 0):6} {row['says']}", flush=True)

    in_processes(names, show)
    print(json.dumps(counts(rows), indent=1))
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if given.write:
        write(rows)
    bad = [row for row in rows if row["outcome"] in ("crash", "differs")]
    return 1 if given.check and bad else 0


if __name__ == "__main__":
    sys.exit(main())
