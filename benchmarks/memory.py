"""Peak memory of a step above the loaded model, beside the plain forward pass with labels.

    python benchmarks/memory.py [--shapes ~30M] [--tokens 128 2048] [--tune lora] [--json] [--check]

The configurations of `step.py`. Every figure comes from a process of its own, all with the same
imports and the same warm-up: both ways of tuning on a tiny network, one matrix product and, once
the model is loaded, one plain forward pass of the rows that will be measured, so that libraries,
compiled kernels, thread pools and the matrix library's buffers are in neither figure. Then freed
memory goes back to the system, the system forgets the peak so far (`/proc/self/clear_refs`), the
step runs, and `VmHWM` minus the `VmRSS` before it is the figure: the whole process. The tensors
alive at the worst moment of another such step stand beside it; those inside one operation of
PyTorch are seen by the process's figure only. With `--device cuda` both are the allocator's peak.

The naive side is one `model(input_ids=…, labels=…)` under `inference_mode`, without a key-value
cache, over as many rows: twice the batch when both probes share a forward pass, the batch itself
beside the setting of one probe at a time. A step at H = 1 includes its commit; at H = 30 the
trajectory is walked on four tokens to its last step, which has the full batch, and all of it
counts. glibc's threshold for mapping memory is fixed in all processes alike at its initial 128 KiB
(`--malloc default` leaves it alone): freed tensors then go back to the system at once, and the
resident size says what was alive rather than what the allocator kept.
"""

import argparse
import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import torch
from common import Column, Reach, Row, Trajectory
from step import HORIZON, TOKENS

from fedforward.core.batches import TokenBatch
from fedforward.planning.memory.tracker import peak_bytes
from fedforward.planning.probe_grouping import TOKENS_PER_CALL

REACH = Reach("<=", 1.05)
REACH_LARGE_VOCABULARY = Reach("<", 1.0)
LARGE_VOCABULARY = 32000
STEADY = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
COLUMNS = (
    Column("shape", "shape"),
    Column("tune", "tune"),
    Column("tokens", "tokens"),
    Column("horizon", "H"),
    Column("distribution", "directions"),
    Column("trajectory", "trajectory"),
    Column("probes_per_call", "probes at once"),
    Column("plain_tokens", "tokens of the plain pass"),
    Column("process_bytes", "process, MB", ".1f", 1e-6),
    Column("plain_process_bytes", "plain, MB", ".1f", 1e-6),
    Column("process_over_plain", "ratio", ".3f"),
    Column("tensor_bytes", "tensors, MB", ".1f", 1e-6),
    Column("plain_tensor_bytes", "plain, MB", ".1f", 1e-6),
    Column("tensors_over_plain", "ratio", ".3f"),
)


# In a process of its own --------------------------------------------------------------------------


def child(spec: dict[str, Any]) -> dict[str, int]:
    """Measure one contender: bytes of the process and of tensors above the loaded model."""
    arguments = argparse.Namespace(**spec)
    common.prepare(arguments)
    warm_up(arguments)
    base = common.network(arguments.shape, arguments.dtype, arguments.device)
    batch = common.token_batch(arguments.shape, arguments.tokens, arguments.longest)
    tokens = common.on_device(batch, arguments.device, arguments.probes_per_call)
    common.plain_forward(base, tokens)
    action, end_round = prepared(arguments, base, batch, tokens)
    alive = common.bytes_now(arguments.device)
    process = process_peak(action, arguments.device)
    end_round()
    # What a model keeps from round to round (a scratch) counts here too.
    tensors = peak_bytes(action) - alive
    return {"process_bytes": process, "tensor_bytes": tensors}


def warm_up(arguments: argparse.Namespace) -> None:
    """Everything that is loaded, compiled or started once, on a network of no size."""
    square = torch.ones(512, 512, device=arguments.device)
    torch.mm(square, square)
    batch = common.token_batch("quick", 16)
    tokens = common.on_device(batch, arguments.device)
    for build in (common.lora_model, common.full_model):
        for distribution in common.DISTRIBUTIONS:
            for trajectory in ("recompute", "cache"):
                base = common.network("quick", arguments.dtype, arguments.device)
                common.plain_forward(base, tokens)
                path = Trajectory(
                    build(base, distribution, common.make_plan(arguments, 2, trajectory)), 2
                )
                for _ in range(2):
                    path.step(batch)
                path.finish()


def prepared(
    arguments: argparse.Namespace, base: Any, batch: TokenBatch, tokens: torch.Tensor
) -> tuple[Callable[[], object], Callable[[], object]]:
    """What is measured, ready to run, and what makes it ready to run again."""
    if arguments.contender == "plain":
        return lambda: common.plain_forward(base, tokens), lambda: None
    plan = common.make_plan(arguments, arguments.probes_per_call, arguments.trajectory)
    build = common.lora_model if arguments.contender == "lora" else common.full_model
    path = Trajectory(build(base, arguments.distribution, plan), arguments.horizon)
    tiny = common.tiny_batch(arguments.shape)

    def walk() -> None:
        for _ in range(arguments.horizon - 1):
            # What is generated with every probe leaves nothing behind.
            if arguments.trajectory == "recompute":
                path.skip()
            else:
                path.step(tiny)
        path.step(batch)

    return walk, path.finish if arguments.horizon > 1 else lambda: None


def process_peak(action: Callable[[], object], device: str) -> int:
    """Bytes by which the process's resident size (the device's memory) rises at most."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated()) - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _resident("VmRSS")
    action()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}")
    return 1024 * int(found.group(1))


# Pairing ------------------------------------------------------------------------------------------


def measure(arguments: argparse.Namespace, **spec: Any) -> dict[str, int]:
    """`child` in a process of its own; the median of its figures over the repeats."""
    common.note(" ".join(str(value) for value in spec.values() if value is not None))
    shared = {
        "dtype": arguments.dtype,
        "device": arguments.device,
        "threads": arguments.threads,
        "longest": arguments.longest,
    }
    environment = os.environ | (STEADY if arguments.malloc == "steady" else {})
    results = []
    for _ in range(arguments.repeats or 1):
        done = subprocess.run(
            [sys.executable, __file__, "--child", json.dumps(shared | spec)],
            stdout=subprocess.PIPE,
            env=environment,
            check=True,
        )
        results.append(json.loads(done.stdout))
    return {name: sorted(r[name] for r in results)[len(results) // 2] for name in results[0]}


def settings(arguments: argparse.Namespace, tune: str) -> Iterator[dict[str, Any]]:
    """What is measured for one shape, number of tokens and way of tuning."""
    kinds: list[tuple[int, str | None]] = [(HORIZON, None)]
    if tune == "full":
        kinds = [(1, None), (HORIZON, "recompute"), (HORIZON, "cache")]
    for horizon, trajectory in kinds:
        for distribution in arguments.distributions:
            for probes in arguments.probes_per_call:
                # One at a time stands beside one setting of each: directions change no size.
                if probes == 1 and (
                    trajectory is not None or distribution != arguments.distributions[0]
                ):
                    continue
                yield {
                    "horizon": horizon,
                    "trajectory": trajectory,
                    "distribution": distribution,
                    "probes_per_call": probes,
                }


def reach(shape: str, probes_per_call: int, trajectory: str | None) -> Reach | None:
    """The reach is that of the configuration of `step.py`; what stands beside it has none."""
    if probes_per_call == 1 or trajectory == "cache":
        return None
    large = common.SHAPES[shape].vocabulary >= LARGE_VOCABULARY
    return REACH_LARGE_VOCABULARY if large else REACH


def rows(arguments: argparse.Namespace, shape: str, tokens: int) -> Iterator[Row]:
    size = {"shape": shape, "tokens": tokens}
    limit_tokens = TOKENS_PER_CALL[arguments.device]

    def beside_of(tune: str, probes: int) -> tuple[int, int]:
        """Tokens of a batch and copies of it that the plain pass takes: as many as ours in one."""
        if probes * tokens <= limit_tokens:
            return tokens, probes
        # Adapters let a batch be cut by rows; all weights take one probe at a time.
        return (limit_tokens, 1) if tune == "lora" else (tokens, 1)

    wanted = {beside_of(t, p) for t in arguments.tune for p in arguments.probes_per_call}
    plain = {
        (size_, copies): measure(
            arguments, contender="plain", shape=shape, tokens=size_, probes_per_call=copies
        )
        for size_, copies in sorted(wanted)
    }
    for tune in arguments.tune:
        for setting in settings(arguments, tune):
            found = measure(arguments, contender=tune, **size, **setting)
            beside_tokens, copies = beside_of(tune, setting["probes_per_call"])
            beside = plain[beside_tokens, copies]
            limit = reach(shape, setting["probes_per_call"], setting["trajectory"])
            labels = [shape, tune, f"H = {setting['horizon']}", setting["trajectory"]]
            labels += [setting["distribution"], f"{tokens} tokens"]
            labels += [f"{setting['probes_per_call']} probes at once"]
            yield {
                "name": " ".join(filter(None, labels)),
                **size,
                "tune": tune,
                "dtype": arguments.dtype,
                **setting,
                "plain_tokens": beside_tokens * copies,
                **found,
                **{f"plain_{name}": value for name, value in beside.items()},
                "process_over_plain": found["process_bytes"] / beside["process_bytes"],
                "tensors_over_plain": found["tensor_bytes"] / beside["tensor_bytes"],
                "reaches": {"process_over_plain": limit}
                if limit and arguments.device == "cpu"
                else {},
            }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=list(common.SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, help="a step, rows of at most 512")
    parser.add_argument("--tune", nargs="+", choices=("lora", "full"), default=["lora", "full"])
    parser.add_argument("--dtype", choices=list(common.DTYPES), default="float32")
    parser.add_argument(
        "--distributions", nargs="+", choices=common.DISTRIBUTIONS, default=common.DISTRIBUTIONS
    )
    parser.add_argument("--probes-per-call", nargs="+", type=int, choices=(1, 2), default=[2, 1])
    parser.add_argument("--malloc", choices=("steady", "default"), default="steady")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.shapes = arguments.shapes or ["quick"]
        arguments.tokens = arguments.tokens or [32]
        arguments.distributions, arguments.probes_per_call = ["rademacher"], [2]
    arguments.shapes = arguments.shapes or ["~30M", "~110M"]
    arguments.tokens = arguments.tokens or list(TOKENS)
    arguments.longest = 16 if arguments.quick else 512
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.child:
        print(json.dumps(child(json.loads(arguments.child))))
        return
    common.prepare(arguments)
    found = [
        row
        for shape in arguments.shapes
        for tokens in arguments.tokens
        for row in rows(arguments, shape, tokens)
    ]
    remarks = [
        f"{arguments.dtype}; above the loaded model, each figure from a process of its own; "
        f"malloc {arguments.malloc}.",
        "The plain forward pass has as many rows as ours in one pass: a plan keeps to some number "
        "of tokens, beyond which adapters take fewer rows and all weights one probe.",
    ]
    common.finish(arguments, "memory", found, COLUMNS, remarks)


if __name__ == "__main__":
    main()
