"""Memory of a step against the size of the model: planned, measured, and with backpropagation.

    python studies/memory.py                         # up to 1.2 billion parameters, about an hour
    python studies/memory.py --shapes 30M 110M
    python studies/memory.py --quick --out FOLDER    # a tiny shape

Llamas with random weights in float32, with LoRA of rank 8 on all linear layers and one row of
`--tokens` tokens, all labelled. Each size is a process of its own. Figures are bytes of tensors
alive at the worst moment, above the weights of the network and the adapters. A size is kept in a
CSV when it is done, so that a study that was stopped goes on where it was. The page is made of all
rows of the CSV.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import common  # noqa: E402
import shared  # noqa: E402
from common import Shape, Trajectory  # noqa: E402

from fedforward.planning.memory.calibrate import calibrate  # noqa: E402

#: SmolLM2-360M's form, and that of Llama 3.2 with a billion.
SHAPES = {
    "quick": common.SHAPES["quick"],
    "30M": common.SHAPES["~30M"],
    "110M": common.SHAPES["~110M"],
    "360M": Shape(49152, 960, 32, 15, 2560, kv_heads=5),
    "1.2B": Shape(128256, 2048, 16, 32, 8192, kv_heads=8),
}
FIELDS = (
    "shape",
    "tokens",
    "parameters",
    "adapter",
    "weights",
    "forward",
    "forward_two",
    "step",
    "step_one_at_a_time",
    "planned",
    "backpropagation",
    "seconds",
)
MEGABYTE = 1e6
PAGE = """# Memory against the size of the model

What a step takes above the model, as models grow. `studies/memory.py` makes this page.

Llamas with random weights in float32, LoRA of rank 8 on all linear layers, one row of {tokens}
tokens, all labelled. Figures are MB of tensors alive at the worst moment, above the weights of the
network and the adapters. `forward` is the library's own pass with labels, for one row and for two.
`step` is a two-point Gaussian step in the middle of a round, with both probes in one pass or one
after the other. `planned` is what `fedforward plan` predicts for the first. `backpropagation` is a
step of SGD on the same adapter, without checkpoints of activations.

{table}

![Memory of a step against parameters](memory.png)

{conclusions}
"""


def measure(name: str, tokens: int) -> dict[str, str]:
    """All figures of a size, in this process."""
    began = time.monotonic()
    common.SHAPES[name] = SHAPES[name]
    arguments = argparse.Namespace(device="cpu", threads=torch.get_num_threads())
    batch = common.token_batch(name, tokens, tokens)
    network = common.network(name, "float32", "cpu")
    parameters = sum(each.numel() for each in network.parameters())
    row: dict[str, Any] = {"shape": name, "tokens": tokens, "parameters": parameters}
    row["weights"] = common.bytes_now("cpu")
    for field, copies in (("forward", 1), ("forward_two", 2)):
        rows = common.on_device(batch, "cpu", copies)
        row[field] = common.peak_above(lambda rows=rows: common.plain_forward(network, rows), "cpu")
    plan = common.make_plan(arguments, 2)
    model = common.lora_model(network, "gaussian", plan)
    row["step"] = _step(model, batch)
    active = np.ones(len(model.layout.blocks), bool)
    predicted = calibrate(model, [(1, tokens)])
    row["adapter"] = predicted.adapters // 4
    own = predicted.outside + predicted.adapters + sum(predicted.residents)
    row["planned"] = predicted.peak(active, 1, tokens) - own
    del model
    model = common.lora_model(
        common.network(name, "float32", "cpu"), "gaussian", common.make_plan(arguments, 1)
    )
    row["step_one_at_a_time"] = _step(model, batch)
    del model
    row["backpropagation"] = common.peak_above(
        _training(common.network(name, "float32", "cpu"), batch), "cpu"
    )
    row["seconds"] = f"{time.monotonic() - began:.0f}"
    return {field: str(row[field]) for field in FIELDS}


def _step(model: Any, batch: Any) -> int:
    """Of the first two steps of a round; the second is one on a trajectory."""
    path = Trajectory(model, 3)
    return common.peak_above(lambda: [path.step(batch) for _ in range(2)], "cpu")


def _training(network: Any, batch: Any) -> Callable[[], None]:
    """A step of SGD on PEFT's adapters."""
    model, tuned = common.peft_network(network)
    for parameter in tuned:
        parameter.requires_grad_(True)
    optimizer = torch.optim.SGD(tuned, lr=common.RATE)
    tokens = common.on_device(batch, "cpu")

    def train() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    return train


def table(rows: list[dict[str, str]]) -> str:
    """For people, in MB."""
    lines = [
        "| parameters | adapter | weights | forward | forward, two rows | step | one at a time | "
        "planned | backpropagation | planned / measured | step / forward of two rows |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        sizes = [
            f"{int(row[field]) / MEGABYTE:,.1f}"
            for field in (
                "weights",
                "forward",
                "forward_two",
                "step",
                "step_one_at_a_time",
                "planned",
                "backpropagation",
            )
        ]
        exact = int(row["planned"]) / int(row["step"])
        share = int(row["step"]) / int(row["forward_two"])
        lines.append(
            f"| {int(row['parameters']) / 1e6:,.1f} M | {int(row['adapter']) / 1e6:,.2f} M | "
            f"{' | '.join(sizes)} | {exact:.3f} | {share:.2f} |"
        )
    return "\n".join(lines)


def conclusions(rows: list[dict[str, str]]) -> str:
    """Shares at the largest size."""
    most = max(rows, key=lambda row: int(row["parameters"]))
    values = {field: int(most[field]) for field in FIELDS if field not in ("shape", "seconds")}
    return (
        f"At {values['parameters'] / 1e6:,.0f} M parameters a step takes "
        f"{values['step'] / values['forward_two']:.2f} of a forward pass with labels of as many\n"
        f"rows, and {values['step'] / values['backpropagation']:.3f} of backpropagation. "
        f"Above the weights that is {values['step'] / values['weights']:.1%} of the weights;\n"
        f"backpropagation takes {values['backpropagation'] / values['weights']:.1%}."
    )


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """Each way against parameters."""
    figure, (axes,) = shared.figure((7, 4))
    for field, label in (
        ("weights", "the weights"),
        ("backpropagation", "backpropagation"),
        ("forward_two", "forward pass, two rows"),
        ("step", "step, both probes at once"),
        ("step_one_at_a_time", "step, one probe at a time"),
        ("planned", "planned, both at once"),
    ):
        style = "x--" if field == "planned" else "o-"
        points = sorted((int(row["parameters"]), int(row[field]) / MEGABYTE) for row in rows)
        axes.loglog(*zip(*points, strict=True), style, label=label)
    axes.set_xlabel("parameters")
    axes.set_ylabel("MB")
    axes.legend(fontsize=8)
    shared.save(figure, path)


def main() -> None:
    """See the module."""
    parser = shared.parser(__doc__, "a tiny shape")
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES))
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = shared.parse(parser)
    if arguments.child:
        print(json.dumps(measure(arguments.child, arguments.tokens)))
        return
    folder = arguments.out
    file = folder / "memory.csv"
    done = shared.Table(file, FIELDS, 2)
    shapes = arguments.shapes or (("quick",) if arguments.quick else tuple(SHAPES)[1:])
    for shape in shapes:
        if (shape, str(arguments.tokens)) in done.known:
            continue
        common.note(f"{shape}: measuring")
        command = [sys.executable, __file__, "--child", shape, "--tokens", str(arguments.tokens)]
        found = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        row = json.loads(found.stdout.splitlines()[-1])
        done.add(row[field] for field in FIELDS)
    rows = sorted(done.known.values(), key=lambda row: int(row["parameters"]))
    shown = [row for row in rows if row["tokens"] == str(arguments.tokens)]
    text = PAGE.format(tokens=arguments.tokens, table=table(shown), conclusions=conclusions(shown))
    (folder / "memory.md").write_text(text, encoding="utf-8")
    draw(shown, folder / "memory.png")


if __name__ == "__main__":
    main()
