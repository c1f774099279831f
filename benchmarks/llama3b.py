"""The setting of the FedMeZO paper on a GPU: a 3 B Llama shape with random weights in float16.

    python benchmarks/llama3b.py --device cuda [--parts memory step] [--json] [--check]

LoRA r = 128, α = 256 on q_proj and v_proj, batch 1, 1000 tokens, all of them labelled, H = 30,
three clients. Needs PyTorch, transformers, peft and numba, no tokenizer and no data.

    memory    peak above the loaded model: a step of ours, the plain forward pass with labels over
              as many rows, and a step of backpropagation with the same adapter (plain PEFT, SGD)
    step      a two-point step beside two plain forward passes, LoRA and full tuning (`step.py`;
              full tuning at H = 1 with its commit)
    rounds    seconds of 10 rounds of three clients and 30 steps each (`LocalRuntime`: encoded
              messages, a ledger on disk), bytes per client and round; backpropagation is timed on
              10 steps and extrapolated to the 900, its bytes are those of an encoded report
    replay    90 steps over all parameters in one commit, beside regenerating and adding (timed on
              10 steps and extrapolated)

`--tiny` runs the same code on a tiny shape, on the CPU too.
"""

import argparse
import gc
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np
import simulation
import step
import torch
from common import Column, LoraSettings, Reach, Row, Trajectory

from fedforward.messages.report import Report

PARTS = ("memory", "step", "rounds", "replay")
CLIENTS = 3
SEEDS = 90
MEMORY = Reach("<=", 1.0)
STEP = {"lora": Reach("<=", 1.05), "full": Reach("<=", 1.25)}
REPLAY = {"gaussian": Reach("<=", 5.0), "rademacher": Reach("<=", 2.0)}
COLUMNS = (
    Column("name", "figure"),
    Column("ours", "ours", ",.4g"),
    Column("unit", "unit"),
    Column("beside", "beside", ",.4g"),
    Column("ratio", "ours / beside", ".4g"),
    Column("what", "what it is beside"),
)


def row(name: str, unit: str, ours: float, beside: float | None, what: str) -> Row:
    ratio = ours / beside if beside else None
    return {
        "name": name,
        "unit": unit,
        "ours": ours,
        "beside": beside,
        "ratio": ratio,
        "what": what,
        "reaches": {},
    }


def held(made: Row, key: str, reach: Reach, arguments: argparse.Namespace) -> Row:
    """The row with its reach, which is that of a CUDA device and of the whole shape."""
    return made if arguments.tiny else made | {"reaches": {key: reach}}


def network(arguments: argparse.Namespace) -> Any:
    free(arguments.device)
    return common.network(arguments.shape, arguments.dtype, arguments.device)


def free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


# Memory -------------------------------------------------------------------------------------------


def memory(arguments: argparse.Namespace) -> Iterator[Row]:
    batch = common.token_batch(arguments.shape, arguments.tokens, arguments.tokens)
    # The matrix library takes its workspace once; it must be in none of the figures.
    plain_peak(arguments, batch, 2)
    plain = {rows: plain_peak(arguments, batch, rows) for rows in (1, 2)}
    backwards = backpropagation_peak(arguments, batch)
    for tune in ("lora", "full"):
        for probes in (2, 1):
            peak = our_peak(arguments, tune, batch, probes)
            at_once = "both probes at once" if probes == 2 else "one probe at a time"
            what = f"plain forward pass with labels, {probes} row{'s' * (probes - 1)}"
            made = row(f"memory of a step, {tune}, {at_once}", "MB", peak, plain[probes], what)
            yield held(made, "ratio", MEMORY, arguments)
            if tune == "lora":
                name = f"the same, {at_once}"
                yield row(name, "MB", peak, backwards, "backpropagation with the same adapter")


def our_peak(arguments: argparse.Namespace, tune: str, batch: Any, probes: int) -> float:
    """MB of three steps and their commit (LoRA) or of two steps that are committed (full)."""
    plan = common.make_plan(arguments, probes)
    if tune == "lora":
        model: Any = common.lora_model(network(arguments), "gaussian", plan, arguments.lora)
        path = Trajectory(model, 3)
    else:
        model = common.full_model(network(arguments), "gaussian", plan)
        path = Trajectory(model, 1)

    def steps() -> None:
        for _ in range(3):
            path.step(batch)
        if path.horizon > 1:
            path.finish()

    return common.peak_above(steps, arguments.device) / 1e6


def plain_peak(arguments: argparse.Namespace, batch: Any, rows: int) -> float:
    base = network(arguments)
    tokens = common.on_device(batch, arguments.device, rows)
    return common.peak_above(lambda: common.plain_forward(base, tokens), arguments.device) / 1e6


def backpropagation(arguments: argparse.Namespace, batch: Any) -> tuple[Any, Callable[[], None]]:
    """A plain PEFT model with the same adapter and its training step (SGD, as in the paper)."""
    model, tuned = common.peft_network(network(arguments), arguments.lora)
    for parameter in tuned:
        parameter.requires_grad_(True)
    optimizer = torch.optim.SGD(tuned, lr=common.RATE)
    tokens = common.on_device(batch, arguments.device)

    def train() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    return tuned, train


def backpropagation_peak(arguments: argparse.Namespace, batch: Any) -> float:
    _, train = backpropagation(arguments, batch)
    return common.peak_above(lambda: [train() for _ in range(2)], arguments.device) / 1e6


# Steps --------------------------------------------------------------------------------------------


def steps(arguments: argparse.Namespace) -> Iterator[Row]:
    settings = argparse.Namespace(**vars(arguments))
    settings.tokens, settings.longest = [arguments.tokens], arguments.tokens
    settings.horizons, settings.probes_per_call = (1,), 2
    settings.distributions = common.DISTRIBUTIONS
    for tune in ("lora", "full"):
        free(arguments.device)
        for found in step.measure(settings, arguments.shape, tune):
            name = f"a step, {tune}, {found['distribution']}"
            ours, two = 1e3 * found["ours_seconds"], 1e3 * found["two_forwards_seconds"]
            made = row(name, "ms", ours, two, "two plain forward passes with labels")
            yield held(made, "ratio", STEP[tune], arguments)
            in_place = 1e3 * found["in_place_seconds"]
            yield row(name, "ms", ours, in_place, "perturb and restore in place, as MeZO does")


# Rounds -------------------------------------------------------------------------------------------


def rounds(arguments: argparse.Namespace) -> Iterator[Row]:
    batch = common.token_batch(arguments.shape, arguments.tokens, arguments.tokens)
    tuned, train = backpropagation(arguments, batch)
    train()
    samples = common.interleave({"train": train}, arguments.timed, arguments.device)
    count = arguments.rounds * CLIENTS * arguments.steps
    backwards = count * common.medians(samples)["train"]
    parameters = sum(parameter.numel() for parameter in tuned)
    upload = len(tensor_report(parameters).encode())
    del tuned, train
    for distribution in common.DISTRIBUTIONS:
        taken, up, down = run_rounds(arguments, distribution)
        name = f"{arguments.rounds} rounds, {distribution}"
        yield row(name, "s", taken, backwards, "backpropagation, extrapolated")
        yield row(f"{name}: up per client and round", "B", up, upload, "the adapter in float32")
        yield row(f"{name}: down per client and round", "B", down, upload, "the adapter in float32")


def run_rounds(arguments: argparse.Namespace, distribution: str) -> tuple[float, float, float]:
    """Seconds of all rounds, and the mean bytes per client and round, up and down."""
    plan = common.make_plan(arguments, 2)
    model = common.lora_model(network(arguments), distribution, plan, arguments.lora)
    bounds = (arguments.tokens, arguments.tokens)
    vocabulary = common.SHAPES[arguments.shape].vocabulary
    batches = [simulation.Rows(vocabulary, bounds, client) for client in range(CLIENTS)]
    with tempfile.TemporaryDirectory() as folder:
        runtime = simulation.runtime(model, CLIENTS, 1, arguments.steps, batches, Path(folder))
        # Kernels compile in a step before the first round.
        path = Trajectory(model, 2)
        for _ in range(2):
            path.step(batches[0][0])
        path.finish()
        traffic = []

        def work() -> None:
            for _ in range(arguments.rounds):
                traffic.append(runtime.run_round()[1])

        taken = common.seconds(work, arguments.device)
        runtime.server.ledger.close()
    up, down = (sum(getattr(part, side) for part in traffic) for side in ("up", "down"))
    return taken, up / len(traffic), down / len(traffic)


def tensor_report(parameters: int) -> Report:
    """What a client of first-order federated averaging sends."""
    state = np.zeros(parameters, np.float32)
    return Report(0, 0, 1, 0.0, 0, np.empty(0, np.float32), payload=state.tobytes())


# Replay -------------------------------------------------------------------------------------------


def replay(arguments: argparse.Namespace) -> Iterator[Row]:
    missed = [common.make_update(0, SEEDS, 1e-7)]
    for distribution in common.DISTRIBUTIONS:
        plan = common.make_plan(arguments, 2)
        model = common.full_model(network(arguments), distribution, plan)
        tensors = list(model.tensors.values())

        def naive(tensors: list[torch.Tensor] = tensors) -> None:
            common.regenerate_and_add(tensors, 1, 1e-7)

        actions = {"ours": lambda model=model: model.commit(missed), "naive": naive}
        common.interleave(actions, 1, arguments.device)
        samples = common.interleave(actions, 3, arguments.device)
        common.interleave({"naive": naive}, arguments.timed, arguments.device, samples)
        medians = common.medians(samples)
        what = "regenerate and add, extrapolated"
        name = f"replay of {SEEDS} seeds over {model.layout.parameters / 1e9:.3g} B, {distribution}"
        made = row(name, "s", medians["ours"], SEEDS * medians["naive"], what)
        yield held(made, "ours", REPLAY[distribution], arguments)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each part of `step`")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, on any device")
    arguments = parser.parse_args(argv)
    arguments.tiny = arguments.tiny or arguments.quick
    if arguments.device == "cpu" and not arguments.tiny:
        common.stop("llama3b needs a CUDA device: --device cuda. On the CPU there is --tiny.")
    arguments.dtype = "float16"
    arguments.shape, arguments.tokens, arguments.steps, arguments.timed = "3B", 1000, 30, 10
    arguments.lora = LoraSettings(128, 256.0, ("q_proj", "v_proj"))
    if arguments.tiny:
        arguments.shape, arguments.tokens, arguments.steps, arguments.timed = "quick", 12, 3, 2
        arguments.lora = LoraSettings(4, 8.0, ("q_proj", "v_proj"))
        arguments.rounds, arguments.repeats, arguments.seconds = 2, 1, 0.0
    common.prepare(arguments)
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    parts = {"memory": memory, "step": steps, "rounds": rounds, "replay": replay}
    found: list[Row] = []
    for part in arguments.parts:
        common.note(part)
        found += parts[part](arguments)
    remarks = [
        f"{arguments.shape} shape, {arguments.dtype}, 1 x {arguments.tokens} tokens, LoRA "
        f"r = {arguments.lora.rank}, alpha = {arguments.lora.alpha:g} on q_proj and v_proj."
    ]
    common.finish(arguments, "llama3b", found, COLUMNS, remarks)


if __name__ == "__main__":
    main()
