"""Predicted against measured peaks of a client's step: how far the memory model is to be trusted.

    python benchmarks/memory_model.py [--shapes llama-30M] [--tune full] [--json] [--check]
    python benchmarks/memory_model.py --model FOLDER

A network of each shape with random weights, in a process of its own, is calibrated on the batches
of `BATCHES`; then the peak of a step's probes is counted for these and for `OTHERS`, which the
calibration has not seen, with late, early and all blocks active. The figures are bytes of tensors
alive: `whole` begins where there was no network, `above` where its weights (and LoRA's adapters)
were there. With `--device cuda` they are the allocator's. `--offload host` does the same with the
blocks that are not active in host memory (`model.offload`), where `above` counts the blocks on the
device too; on the CPU what waits is tensors alive as well, and is taken off. The table shows, for
each choice of blocks, the batch whose prediction is furthest off above the weights; `--json` has
all of them.

The reach is 10 % of the whole peak, and of what is above the weights.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from common import Column, Reach, Row
from numpy.typing import NDArray

from fedforward.core.batches import TokenBatch
from fedforward.methods.estimators import TwoPoint
from fedforward.models.base import CausalModel
from fedforward.models.blocks import transformer_blocks
from fedforward.planning.memory.calibrate import calibrate
from fedforward.planning.memory.model import MemoryModel
from fedforward.planning.memory.tracker import peak_bytes
from fedforward.planning.probe_grouping import step_probes

REACH = Reach("<=", 0.10)
#: Rows and length: a pass of few tokens, several probes in a pass, more tokens than it takes.
BATCHES = ((1, 16), (2, 128), (6, 128))
OTHERS = ((3, 32), (1, 100))
KINDS = {"lora": ("cache",), "full": ("cache", "recompute")}
#: Family, vocabulary, hidden, blocks, heads, intermediate, whether the head is tied, dtype.
SHAPES: dict[str, tuple[str, int, int, int, int, int, bool, str]] = {
    "llama-tiny": ("llama", 97, 32, 2, 4, 48, True, "float32"),
    "llama-tiny-untied": ("llama", 512, 64, 4, 4, 160, False, "float32"),
    "gpt2-tiny": ("gpt2", 512, 64, 4, 4, 256, True, "float32"),
    "gemma2-tiny": ("gemma2", 2048, 64, 4, 4, 192, True, "float32"),
    "llama-small": ("llama", 4096, 192, 8, 6, 512, True, "float32"),
    "llama-small-bf16": ("llama", 4096, 192, 8, 6, 512, True, "bfloat16"),
    "gpt2-small": ("gpt2", 8192, 256, 6, 8, 1024, True, "float32"),
    "llama-32k-untied": ("llama", 32000, 128, 6, 4, 352, False, "float32"),
    "llama-30M": ("llama", 8192, 512, 8, 8, 1408, True, "float32"),
}
COLUMNS = (
    Column("shape", "shape"),
    Column("kind", "kind"),
    Column("rows", "rows", "d"),
    Column("length", "length", "d"),
    Column("seen", "calibrated on"),
    Column("blocks", "active"),
    Column("measured_bytes", "whole, MB", ".2f", 1e-6),
    Column("predicted_bytes", "predicted", ".2f", 1e-6),
    Column("error", "error", "+.1%"),
    Column("above_bytes", "above, MB", ".2f", 1e-6),
    Column("above_error", "error", "+.1%"),
    Column("bound_bytes", "bound, MB", ".2f", 1e-6),
)


# In a process of its own --------------------------------------------------------------------------


def build(shape: str, device: str) -> Any:
    """A network with random weights, without a key-value cache."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family, vocabulary, hidden, layers, heads, intermediate, tied, dtype = SHAPES[shape]
    if family == "gpt2":
        own = {"n_embd": hidden, "n_layer": layers, "n_head": heads, "n_inner": intermediate}
        own |= {"n_positions": 512}
    else:
        own = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
        own |= {"num_key_value_heads": heads, "intermediate_size": intermediate}
        own |= {"head_dim": hidden // heads, "max_position_embeddings": 512}
    own |= {"vocab_size": vocabulary, "tie_word_embeddings": tied, "use_cache": False}
    config = AutoConfig.for_model(family, **own, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config, dtype=common.DTYPES[dtype])
    return made.to(device).eval().requires_grad_(False)


def load(folder: str, device: str) -> Any:
    from transformers import AutoModelForCausalLM

    made = AutoModelForCausalLM.from_pretrained(folder, use_cache=False)
    return made.to(device).eval().requires_grad_(False)


def choices(model: CausalModel) -> dict[str, NDArray[np.bool_]]:
    """Sets of active blocks by name."""
    names = model.layout.blocks
    last = len(transformer_blocks(model.network)) - 1
    sets = {
        "last block": [str(last)],
        "last half": [*(str(n) for n in range((last + 1) // 2, last + 1)), "norm"],
        "first block": ["0"],
        "all": list(names),
    }
    if "embeddings" in names:
        sets |= {"embeddings": ["embeddings"]}
    return {title: np.array([name in own for name in names]) for title, own in sets.items()}


def child(spec: dict[str, Any]) -> list[Row]:
    """All figures of one network."""
    arguments = argparse.Namespace(**spec)
    common.prepare(arguments)
    # Libraries are loaded, and take what they take, with the first models of a kind.
    for make in (common.lora_model, common.full_model):
        network = build("llama-tiny", arguments.device)
        calibrate(make(network, "rademacher", common.make_plan(arguments, 2)), BATCHES[:1])
    # What they made is not looked through for tensors each time that these are counted.
    del network
    gc.collect()
    gc.freeze()
    kinds = [
        (tune, trajectory, offload)
        for offload in arguments.offload
        for tune in arguments.tune
        for trajectory in KINDS[tune]
    ]
    found = [row for kind in kinds for row in compare(arguments, *kind)]
    gc.unfreeze()
    return found


def compare(arguments: argparse.Namespace, tune: str, trajectory: str, offload: str) -> list[Row]:
    """Predicted and measured peaks of one way of tuning."""
    device = arguments.device
    before = common.bytes_now(device)
    network = load(arguments.model, device) if arguments.model else build(arguments.shape, device)
    make = common.lora_model if tune == "lora" else common.full_model
    model = make(network, "rademacher", common.make_plan(arguments, 2, trajectory))
    waiting = 0
    if offload == "host":
        model.offload_to_host()
        assert model.offload is not None
        waiting = sum(model.offload.sizes) if device == "cpu" else 0
    memory = calibrate(model, BATCHES)
    weights = memory.outside + memory.adapters
    weights += sum(memory.residents) if offload == "none" else 0
    kind = tune if tune == "lora" else f"{tune} {trajectory}"
    kind += ", offloaded" if offload == "host" else ""
    vocabulary = network.get_input_embeddings().weight.shape[0]
    results: list[Row] = []
    for rows, length in (*BATCHES, *OTHERS):
        tokens = np.arange(rows * length).reshape(rows, length) % vocabulary
        for title, active in choices(model).items():
            measured = measure(model, TokenBatch(tokens, tokens), active) - before - waiting
            predicted = memory.peak(active, rows, length)
            error, above = (predicted / measured, (predicted - weights) / (measured - weights))
            results.append(
                {
                    "kind": kind,
                    "rows": rows,
                    "length": length,
                    "seen": "yes" if (rows, length) in BATCHES else "no",
                    "blocks": title,
                    "weights_bytes": weights,
                    "measured_bytes": measured,
                    "predicted_bytes": predicted,
                    "error": error - 1.0,
                    "above_bytes": measured - weights,
                    "above_error": above - 1.0,
                    "bound_bytes": bound(memory, active, rows, length),
                }
            )
    return results


def measure(model: CausalModel, batch: TokenBatch, active: NDArray[np.bool_]) -> int:
    """Peak bytes of the two probes of a step in the middle of a round."""
    probes = step_probes([batch], 2, TwoPoint(1, common.MU), active)
    if model.offload is not None:
        # The blocks of the last choice leave, and those of this one come.
        model.evaluate(probes)
    model.clear_cache()
    peak = peak_bytes(lambda: model.evaluate(probes))
    model.clear_cache()
    return peak


def bound(memory: MemoryModel, active: NDArray[np.bool_], rows: int, length: int) -> int:
    """What the choice of active blocks is made with."""
    return memory.fixed(rows, length) + int(memory.cost[active].sum())


# Rows of the table --------------------------------------------------------------------------------


def rows(arguments: argparse.Namespace) -> Iterator[Row]:
    for shape in arguments.shapes:
        common.note(shape)
        names = ("model", "tune", "offload", "device", "threads")
        spec = {name: getattr(arguments, name) for name in names} | {"shape": shape}
        command = [sys.executable, __file__, "--child", json.dumps(spec)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        for found in json.loads(done.stdout):
            batch = f"{found['rows']} x {found['length']}"
            yield {
                "name": f"{shape} {found['kind']} {batch} {found['blocks']}",
                "shape": shape,
                **found,
                "error_size": abs(found["error"]),
                "above_error_size": abs(found["above_error"]),
                "reaches": {"error_size": REACH, "above_error_size": REACH},
            }


def worst(found: list[Row]) -> list[Row]:
    """Of the rows that differ in the batch alone, the one that is furthest off."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in found:
        groups.setdefault((row["shape"], row["kind"], row["blocks"]), []).append(row)
    return [max(own, key=lambda row: float(row["above_error_size"])) for own in groups.values()]


def summary(found: list[Row]) -> list[str]:
    """Largest and median errors of each kind, in words."""
    sentences = []
    for kind in dict.fromkeys(row["kind"] for row in found):
        own = [row for row in found if row["kind"] == kind]
        parts = []
        for title, key in (("whole", "error_size"), ("above the weights", "above_error_size")):
            sizes = [row[key] for row in own]
            parts.append(
                f"{title} at most {max(sizes):.1%} off, median {statistics.median(sizes):.1%}"
            )
        excess = max(row["bound_bytes"] / row["predicted_bytes"] - 1.0 for row in own)
        parts.append(f"the additive bound is at most {excess:.1%} above the prediction")
        sentences.append(f"{kind} ({len(own)} figures): " + "; ".join(parts) + ".")
    return sentences


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES))
    parser.add_argument("--tune", nargs="+", choices=("lora", "full"), default=["lora", "full"])
    parser.add_argument("--offload", nargs="+", choices=("none", "host"), default=["none", "host"])
    parser.add_argument("--model", help="a folder, in place of the shapes")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    arguments.shapes = arguments.shapes or (["llama-tiny"] if arguments.quick else list(SHAPES))
    if arguments.model:
        arguments.shapes = [Path(arguments.model).name]
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.child:
        print(json.dumps(child(json.loads(arguments.child))))
        return
    common.prepare(arguments)
    found = list(rows(arguments))
    shown = found if arguments.json else worst(found)
    common.finish(arguments, "memory_model", shown, COLUMNS, summary(found))


if __name__ == "__main__":
    main()
