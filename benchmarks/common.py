"""What the benchmarks share: arguments, interleaved timing, networks, tables, JSON and checks.

A row of a benchmark is a plain dictionary. `reaches` in it names the columns that have a figure to
reach; `finish` prints the rows and, with `--check`, exits 1 naming every figure that falls short.
Nothing here needs more than PyTorch, transformers, peft and numba (and rich for the table).
"""

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

# As the command line has it: threads of PyTorch that still spin would share the cores. It holds for
# the baselines just as well.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from numpy.typing import NDArray

from fedforward.core.batches import TokenBatch
from fedforward.core.seeds import direction_seed, dither_seed
from fedforward.core.steps import NO_STEPS, Probe, ProbePlan, Steps, Update
from fedforward.directions import Distribution
from fedforward.methods.estimators import TwoPoint
from fedforward.models.base import CausalModel
from fedforward.models.full import FullModel
from fedforward.models.lora import LoraModel
from fedforward.planning.memory.tracker import bytes_alive, peak_bytes
from fedforward.planning.probe_grouping import TOKENS_PER_CALL

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DISTRIBUTIONS = tuple(str(distribution) for distribution in Distribution)
RUN_SEED = 0
MU = 1e-3
#: Small enough that a benchmark's commits leave the random weights what they are.
RATE = 1e-8

Row = dict[str, Any]


# Arguments ----------------------------------------------------------------------------------------


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    made.add_argument("--json", action="store_true", help="print JSON, not a table")
    made.add_argument("--check", action="store_true", help="exit 1 naming what falls short")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--repeats", type=int, default=0, help="at most so many; 0 is the default")
    made.add_argument("--threads", type=int, default=0, help="0 is one per processor")
    made.add_argument("--quick", action="store_true", help="tiny sizes, for the tests only")
    return made


def prepare(arguments: argparse.Namespace) -> None:
    """Threads, quiet libraries, and an end with a sentence if the device is not there."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        stop("--device cuda: PyTorch finds no CUDA device here.")
    arguments.threads = arguments.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(arguments.threads)
    quiet()


def stop(sentence: str) -> NoReturn:
    """Leave with exit code 2, the code of a wrong request."""
    print(sentence, file=sys.stderr)
    raise SystemExit(2)


def quiet() -> None:
    """Keep the libraries' own bars and advice out of the output."""
    import warnings

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")


# Time ---------------------------------------------------------------------------------------------


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(action: Callable[[], object], device: str = "cpu") -> float:
    """Wall-clock seconds of one call, the device's work included."""
    synchronise(device)
    begin = time.perf_counter()
    action()
    synchronise(device)
    return time.perf_counter() - begin


def interleave(
    actions: Mapping[str, Callable[[], object]],
    repeats: int,
    device: str = "cpu",
    samples: dict[str, list[float]] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each action, all of them once per repeat.

    The order rotates, so that no action always follows the same one.
    """
    samples = {} if samples is None else samples
    for repeat in range(repeats):
        for name, action in turned(actions, repeat).items():
            samples.setdefault(name, []).append(seconds(action, device))
    return samples


def medians(samples: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in samples.items()}


def turned(actions: Mapping[str, Callable[[], object]], by: int) -> dict[str, Callable[[], object]]:
    """The same actions beginning with another one."""
    names = list(actions)
    turn = by % len(names)
    return {name: actions[name] for name in names[turn:] + names[:turn]}


def note(text: str) -> None:
    """Progress, beside the output."""
    print(text, file=sys.stderr, flush=True)


# Memory -------------------------------------------------------------------------------------------


def bytes_now(device: str) -> int:
    """Bytes of tensors alive; on CUDA what the allocator has given out."""
    synchronise(device)
    return int(torch.cuda.memory_allocated()) if device == "cuda" else bytes_alive()


def peak_above(action: Callable[[], object], device: str) -> int:
    """Peak bytes of tensors while `action` runs, above those before it."""
    before = bytes_now(device)
    return peak_bytes(action) - before


# Networks and batches -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A Llama shape; the embedding is tied to the head."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    intermediate: int
    kv_heads: int = 0


SHAPES = {
    "~30M": Shape(8192, 512, 8, 8, 1408),
    "~110M": Shape(32000, 768, 12, 12, 2048),
    "small": Shape(4096, 192, 8, 6, 512),
    "3B": Shape(128256, 3072, 28, 24, 8192, kv_heads=8),
    "quick": Shape(64, 32, 2, 2, 48),
}


def network(shape: str, dtype: str, device: str, seed: int = 0) -> Any:
    """A Llama with random weights, ready to run; the same seed gives the same weights.

    Its configuration has no key-value cache: neither side of a comparison has a use for one, and
    the plain forward pass is cheaper without.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    form = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=form.vocabulary,
        hidden_size=form.hidden,
        intermediate_size=form.intermediate,
        num_hidden_layers=form.layers,
        num_attention_heads=form.heads,
        num_key_value_heads=form.kv_heads or form.heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        use_cache=False,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        made = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    return made.to(device).eval().requires_grad_(False)


def token_batch(shape: str, tokens: int, longest: int = 512, seed: int = 0) -> TokenBatch:
    """Random tokens in rows of at most `longest`; all are labelled."""
    rows = -(-tokens // longest)
    random = np.random.default_rng(seed)
    drawn = random.integers(0, SHAPES[shape].vocabulary, (rows, tokens // rows), dtype=np.int64)
    return TokenBatch(drawn, drawn.copy())


def tiny_batch(shape: str) -> TokenBatch:
    return token_batch(shape, 4)


def on_device(batch: TokenBatch, device: str, copies: int = 1) -> torch.Tensor:
    """The batch's tokens, int64 [copies * rows, length]."""
    return torch.from_numpy(batch.tokens).repeat(copies, 1).to(device)


def plain_forward(model: Any, tokens: torch.Tensor) -> float:
    """The naive forward pass: the library's own loss on all tokens."""
    with torch.inference_mode():
        return float(model(input_ids=tokens, labels=tokens).loss)


# Our side -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoraSettings:
    rank: int = 8
    alpha: float = 16.0
    targets: str | tuple[str, ...] = "all-linear"


def make_plan(
    arguments: argparse.Namespace, probes_per_call: int, trajectory: str | None = None
) -> ProbePlan:
    """A run's own plan; the trajectory is carried as it is by default unless it is named."""
    return ProbePlan(
        probes_per_call=probes_per_call,
        threads=arguments.threads,
        trajectory=trajectory or "cache",
        evaluation_rows=8,
        device=arguments.device,
        tokens_per_call=TOKENS_PER_CALL[arguments.device],
    )


def lora_model(
    base: Any, distribution: str, plan: ProbePlan, settings: LoraSettings | None = None
) -> LoraModel:
    settings = settings or LoraSettings()
    targets = settings.targets
    return LoraModel(
        base,
        rank=settings.rank,
        alpha=settings.alpha,
        targets=targets if isinstance(targets, str) else list(targets),
        run_seed=RUN_SEED,
        distribution=Distribution(distribution),
        plan=plan,
    )


def full_model(base: Any, distribution: str, plan: ProbePlan) -> FullModel:
    return FullModel(base, distribution=Distribution(distribution), plan=plan)


class Trajectory:
    """One client's local steps on a model, as a method takes them: probe, estimate, go on.

    With `horizon` 1 every step is committed; otherwise the steps are carried as a trajectory, and
    `finish` commits them as the one update of the round.
    """

    def __init__(self, model: CausalModel, horizon: int) -> None:
        self.model = model
        self.horizon = horizon
        self.round = 0
        self.steps = NO_STEPS

    def step(self, batch: TokenBatch) -> None:
        """One two-point step; both probes are asked for in one call."""
        seed = direction_seed(RUN_SEED, self.round, 0, len(self.steps), 0)
        estimator = TwoPoint(1, MU)
        probes = estimator.probes(batch, self.steps, [Steps.of([seed], [1.0])])
        gradients, _ = estimator.gradients(self.model.evaluate(probes))
        self.steps = self.steps + Steps.of([seed], -RATE * gradients.astype(np.float64))
        if self.horizon == 1:
            self.finish()

    def skip(self) -> None:
        """Lengthen the trajectory without a probe, for a model that carries nothing between."""
        seed = direction_seed(RUN_SEED, self.round, 0, len(self.steps), 0)
        self.steps = self.steps + Steps.of([seed], [RATE])

    def finish(self) -> None:
        """Commit the round and begin the next at the new weights."""
        self.model.commit([Update(self.steps, dither_seed(RUN_SEED, self.round))])
        self.steps = NO_STEPS
        self.round += 1


def check_same_loss(model: CausalModel, batch: TokenBatch, plain: float) -> None:
    """Both sides of a comparison must compute the same loss over all tokens."""
    ours = model.evaluate([Probe(batch)])[0].mean
    tolerance = 1e-4 if next(model.network.parameters()).dtype is torch.float32 else 3e-2
    if not math.isclose(ours, plain, rel_tol=tolerance):
        raise RuntimeError(f"our loss is {ours}, that of the plain forward pass is {plain}")


def make_update(round_number: int, count: int, coefficient: float) -> Update:
    """An update of `count` steps with coefficients of about that size, as a round leaves it."""
    seeds = [direction_seed(RUN_SEED, round_number, 0, step, 0) for step in range(count)]
    random = np.random.default_rng(round_number)
    coefficients: NDArray[np.float64] = coefficient * random.standard_normal(count)
    return Update(Steps.of(seeds, coefficients), dither_seed(RUN_SEED, round_number))


def sampled_lengths(horizon: int, strata: int) -> dict[int, float]:
    """Trajectory lengths to time and their weights in the mean over 0 … horizon - 1.

    Lengths 0 and 1 stand for themselves, because a trajectory begins there. The others are divided
    into `strata` of equal size, each timed at its middle (the upper one of two).
    """
    weights = dict.fromkeys(range(min(2, horizon)), 1.0 / horizon)
    rest = range(2, horizon)
    strata = min(strata, len(rest))
    for stratum in range(strata):
        begin, end = (len(rest) * edge // strata for edge in (stratum, stratum + 1))
        weights[rest[(begin + end) // 2]] = (end - begin) / horizon
    return weights


# The naive side -----------------------------------------------------------------------------------


def normal_like(parameter: torch.Tensor) -> torch.Tensor:
    """MeZO's own line for z, in the parameter's dtype and on its device."""
    return torch.normal(
        mean=0, std=1, size=parameter.size(), device=parameter.device, dtype=parameter.dtype
    )


def regenerate_and_add(tensors: Iterable[torch.Tensor], seed: int, scale: float) -> None:
    """θ ← θ + scale · z(seed) as MeZO does, with the addition in place (which spares it a copy)."""
    torch.manual_seed(seed)
    for tensor in tensors:
        tensor.add_(normal_like(tensor), alpha=scale)


def peft_network(base: Any, settings: LoraSettings | None = None) -> tuple[Any, list[Any]]:
    """A plain PEFT model around `base` with the same adapters, and their parameters."""
    from peft import LoraConfig, get_peft_model

    settings = settings or LoraSettings()
    targets = settings.targets
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=int(settings.alpha),
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config).eval().requires_grad_(False)
    return model, [p for name, p in model.named_parameters() if ".lora_" in name]


class InPlace:
    """MeZO's step: perturb, forward, perturb back twice as far, forward, restore, update."""

    def __init__(self, model: Any, tensors: Sequence[torch.Tensor], tokens: torch.Tensor) -> None:
        self.model = model
        self.tensors = tensors
        self.tokens = tokens
        self.seed = 0

    def step(self) -> None:
        self.seed += 1
        regenerate_and_add(self.tensors, self.seed, MU)
        plus = plain_forward(self.model, self.tokens)
        regenerate_and_add(self.tensors, self.seed, -2 * MU)
        minus = plain_forward(self.model, self.tokens)
        regenerate_and_add(self.tensors, self.seed, MU)
        gradient = (plus - minus) / (2 * MU)
        regenerate_and_add(self.tensors, self.seed, -RATE * gradient)


# Output -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reach:
    """What a figure is held against; `sense` is "<=", "<" or ">="."""

    sense: str
    limit: float

    def met(self, value: object) -> bool:
        if not isinstance(value, int | float) or math.isnan(value):
            return False
        if self.sense == "<=":
            return value <= self.limit
        return value < self.limit if self.sense == "<" else value >= self.limit

    def __str__(self) -> str:
        return f"{self.sense.replace('<=', '≤').replace('>=', '≥')} {self.limit:g}"


@dataclass(frozen=True)
class Column:
    """How a row's value is shown; `reached` marks columns whose figures may have a reach."""

    key: str
    title: str
    form: str = ""
    factor: float = 1.0

    def cell(self, row: Row) -> str:
        value = row.get(self.key)
        if self.factor != 1.0 and value is not None:
            value = value * self.factor
        text = "" if value is None else format(value, self.form)
        reach = row.get("reaches", {}).get(self.key)
        return f"{text} ({reach})" if reach else text


def shortfalls(rows: Sequence[Row]) -> list[str]:
    """A sentence for every figure that has a reach and does not meet it."""
    return [
        f"{row['name']}: {key} is {_number(row.get(key))}, the reach is {reach}"
        for row in rows
        for key, reach in row.get("reaches", {}).items()
        if not reach.met(row.get(key))
    ]


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "missing"


def check(rows: Sequence[Row]) -> None:
    """Exit 1 naming each figure that falls short of its reach."""
    short = shortfalls(rows)
    for sentence in short:
        print(sentence, file=sys.stderr)
    if short:
        raise SystemExit(1)


def machine(threads: int, device: str) -> dict[str, Any]:
    """The machine without its name."""
    described: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    if device == "cuda":
        described["cuda"] = torch.version.cuda
    return described


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123
            found = dict(
                (part.strip() for part in line.split(":", 1)) for line in lines if ":" in line
            )
        return f"{found['model name']} (family {found['cpu family']})"
    except (OSError, KeyError):
        return platform.processor() or platform.machine()


def finish(
    arguments: argparse.Namespace,
    benchmark: str,
    rows: Sequence[Row],
    columns: Sequence[Column],
    remarks: Sequence[str] = (),
) -> None:
    """Print the rows as JSON or as a table, then check them if that was asked for."""
    described = machine(arguments.threads, arguments.device)
    if arguments.json:
        plain = [
            row | {"reaches": {key: str(reach) for key, reach in row.get("reaches", {}).items()}}
            for row in rows
        ]
        content = {
            "benchmark": benchmark,
            "machine": described,
            "quick": arguments.quick,
            "remarks": list(remarks),
            "rows": plain,
        }
        print(json.dumps(content, indent=2, allow_nan=False))
    else:
        _print_table(benchmark, rows, columns, remarks, described)
    if arguments.check:
        check(rows)


def _print_table(
    benchmark: str,
    rows: Sequence[Row],
    columns: Sequence[Column],
    remarks: Sequence[str],
    described: Mapping[str, Any],
) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = [c for c in columns if any(row.get(c.key) is not None for row in rows)]
    table = Table(title=f"{benchmark}: " + ", ".join(f"{k} {v}" for k, v in described.items()))
    for column in shown:
        table.add_column(column.title, justify="right" if column.form else "left")
    for row in rows:
        table.add_row(*(column.cell(row) for column in shown))
    width = None if sys.stdout.isatty() else 200
    console = Console(width=width)
    console.print(table)
    for remark in remarks:
        console.print(remark, highlight=False)
