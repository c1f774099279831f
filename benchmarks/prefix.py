"""A step with the upper half of the blocks active, against the same step with all of them.

    python benchmarks/prefix.py [--json] [--check]

Below the first active block both signs of a direction have the same activations, so that it runs
once in place of twice; inactive blocks are not displaced either. The shape has blocks that are at
least 80 % of the forward pass (`block_share` is measured: the pass without its output layer over
the whole pass). Mean over a trajectory of H = 30 (LoRA), and H = 1 without commit (full tuning).
"""

import argparse
from collections.abc import Sequence
from typing import Any

import common
import numpy as np
from common import Column, Reach, Row, Shape

from fedforward.core.steps import Steps
from fedforward.methods.estimators import TwoPoint

SHAPE = "16 blocks"
common.SHAPES[SHAPE] = Shape(8192, 512, 16, 8, 1408)
REACH = Reach("<=", 0.80)


def step(model: Any, batch: Any, active: Any, horizon: int) -> None:
    """One two-point step at the middle of a trajectory; nothing is committed."""
    estimator = TwoPoint(1, common.MU)
    along = Steps.of(range(horizon // 2), [common.RATE] * (horizon // 2)).within(active)
    unit = Steps.of([12345], [1.0]).within(active)
    estimator.gradients(model.evaluate(estimator.probes(batch, along, [unit])))


def measure(arguments: argparse.Namespace, tune: str, tokens: int) -> Row:
    shape = "quick" if arguments.quick else SHAPE
    base = common.network(shape, "float32", arguments.device)
    plan = common.make_plan(arguments, 2, "cache" if tune == "lora" else "recompute")
    batch = common.token_batch(shape, tokens)
    ids = common.on_device(batch, arguments.device)
    forward = {
        "whole": lambda: common.plain_forward(base, ids),
        "body": lambda: body(base, ids),
    }
    repeats = arguments.repeats or (1 if arguments.quick else 9)
    common.interleave(forward, 1, arguments.device)
    parts = common.medians(common.interleave(forward, repeats, arguments.device))
    kind = common.lora_model if tune == "lora" else common.full_model
    model = kind(base, "gaussian", plan)
    names = model.layout.blocks
    numbers = [int(name) if name.isdigit() else -1 for name in names]
    half = common.SHAPES[shape].layers // 2
    upper = np.array([number >= half for number in numbers])
    every = np.array([number >= 0 for number in numbers])
    horizon = 30 if tune == "lora" else 1
    actions = {
        "upper": lambda: step(model, batch, upper, horizon),
        "all": lambda: step(model, batch, every, horizon),
    }
    common.interleave(actions, 1, arguments.device)
    times = common.medians(common.interleave(actions, repeats, arguments.device))
    return {
        "name": f"{tune}, {tokens} tokens",
        "tune": tune,
        "tokens": tokens,
        "shape": shape,
        "parameters": sum(parameter.numel() for parameter in base.parameters()),
        "block_share": parts["body"] / parts["whole"],
        "upper_seconds": times["upper"],
        "all_seconds": times["all"],
        "upper_over_all": times["upper"] / times["all"],
        "reaches": {} if arguments.quick else {"upper_over_all": REACH},
    }


def body(model: Any, ids: Any) -> None:
    import torch

    with torch.inference_mode():
        model.base_model(input_ids=ids)


def main(given: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--tune", nargs="+", choices=("lora", "full"), default=["lora", "full"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[128, 512])
    arguments = parser.parse_args(given)
    common.prepare(arguments)
    tokens = [8] if arguments.quick else arguments.tokens
    rows = [measure(arguments, tune, count) for tune in arguments.tune for count in tokens]
    columns = [
        Column("name", "what"),
        Column("block_share", "blocks' share of a pass", ".2f"),
        Column("upper_seconds", "upper half (ms)", ".0f", 1000.0),
        Column("all_seconds", "all blocks (ms)", ".0f", 1000.0),
        Column("upper_over_all", "upper / all", ".3f"),
    ]
    common.finish(arguments, "prefix", rows, columns)


if __name__ == "__main__":
    main()
