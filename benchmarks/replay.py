"""Catching up on many rounds at once, against regenerating and adding step by step.

    python benchmarks/replay.py [--cases lora full-float32] [--distributions rademacher] [--json]

Ours is `model.commit` of all the updates that a late client lacks: 500 rounds of 90 steps for LoRA
(rank 8, all linear layers, both factors) on the ~110M shape, 10 rounds of 90 steps for all of its
weights. The naive way regenerates every step through PyTorch and adds it to the tensors it tunes,
as MeZO and FedKSeed do (its line for z, added in place); it is timed on 200 steps or more, in parts
between our commits, and extrapolated to all of them: its steps do the same work each. MeZO's
directions are normal, so both distributions are held against the same naive way.

Before anything is timed, the commit of a few rounds in one call must have the bits of the commits
one by one, over all tensors, and those of the PyTorch reference that rounds after every round, on
tensors small enough for it.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass

import common
import torch
from common import Column, Reach, Row

from fedforward.core.steps import Update
from fedforward.directions import Distribution, reference
from fedforward.models.base import CausalModel

#: Of the coefficients; small enough that thousands of steps leave random weights what they are.
COEFFICIENT = 1e-7
#: Where bits are compared: large enough that half precision changes everywhere.
CHECKED_COEFFICIENT = 1e-3
REACHES = {"gaussian": Reach(">=", 15.0), "rademacher": Reach(">=", 100.0)}
IDENTICAL = Reach(">=", 1.0)
COLUMNS = (
    Column("tune", "tune"),
    Column("dtype", "dtype"),
    Column("parameters", "parameters", ","),
    Column("rounds", "rounds"),
    Column("steps", "steps each"),
    Column("distribution", "directions"),
    Column("ours_seconds", "ours, s", ".2f"),
    Column("naive_seconds", "step by step, s (extrapolated)", ".0f"),
    Column("times_naive", "× step by step", ".1f"),
    Column("giga_coordinates_per_second", "G coordinates/s", ".2f"),
    Column("naive_steps_timed", "its steps timed"),
    Column("repeats", "ours timed"),
)


@dataclass(frozen=True)
class Case:
    """What is caught up on; `checked` rounds are compared bit by bit."""

    tune: str
    dtype: str
    rounds: int
    steps: int
    checked: int


CASES = {
    "lora": Case("lora", "float32", 500, 90, 20),
    "full-float32": Case("full", "float32", 10, 90, 2),
    "full-bfloat16": Case("full", "bfloat16", 10, 90, 2),
}


def build(arguments: argparse.Namespace, case: Case, distribution: str) -> CausalModel:
    base = common.network(arguments.shape, case.dtype, arguments.device)
    plan = common.make_plan(arguments, 2)
    make = common.lora_model if case.tune == "lora" else common.full_model
    return make(base, distribution, plan)


def updates(case: Case, rounds: int, coefficient: float) -> list[Update]:
    return [common.make_update(number, case.steps, coefficient) for number in range(rounds)]


def identical(model: CausalModel, missed: list[Update], largest: int) -> bool:
    """Whether one commit, commits one by one and the reference give the same bits.

    The model's weights are what they were afterwards.
    """
    start = model.export_state()
    sample = sample_names(model, largest)
    expected = {name: model.tensors[name].clone() for name in sample}
    model.commit(missed)
    together = model.digest()
    found = {name: model.tensors[name].clone() for name in sample}
    model.assign_state(start)
    for update in missed:
        model.commit([update])
    one_by_one = model.digest()
    model.assign_state(start)
    places = dict(zip(model.layout.names, model.layout.first_tiles, strict=True))
    for name, tensor in expected.items():
        for update in missed:
            reference.accumulate(
                tensor,
                update.steps.seeds,
                update.steps.coefficients,
                first_tile=places[name],
                distribution=Distribution(model.distribution),
                out=tensor,
                decay=update.decay,
                dither_seed=update.dither_seed,
            )
    same = all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    return same and together == one_by_one


def sample_names(model: CausalModel, largest: int) -> list[str]:
    """The smallest tensor, and the last of the largest that the reference can be asked for."""
    sizes = {name: tensor.numel() for name, tensor in model.tensors.items()}
    smallest = min(sizes, key=sizes.__getitem__)
    allowed = [name for name in sizes if sizes[name] <= largest] or [smallest]
    return sorted({smallest, max(reversed(allowed), key=sizes.__getitem__)})


class Naive:
    """Regenerates and adds step by step, in parts; remembers the seconds of each step."""

    def __init__(self, tensors: list[torch.Tensor], device: str) -> None:
        self.tensors = tensors
        self.device = device
        self.samples: list[float] = []
        self.steps = 0

    def part(self, steps: int) -> None:
        begin = self.steps
        self.steps += steps

        def work() -> None:
            for seed in range(begin, self.steps):
                common.regenerate_and_add(self.tensors, seed, COEFFICIENT)

        self.samples.append(common.seconds(work, self.device) / steps)

    @property
    def seconds(self) -> float:
        """Of one step: the median of the parts."""
        return common.medians({"part": self.samples})["part"]


def measure(arguments: argparse.Namespace, case: Case) -> Iterator[Row]:
    models = {name: build(arguments, case, name) for name in arguments.distributions}
    first = next(iter(models.values()))
    naive = Naive([tensor.clone() for tensor in first.tensors.values()], arguments.device)
    missed = updates(case, case.rounds, COEFFICIENT)
    checked = updates(case, case.checked, CHECKED_COEFFICIENT)
    same = {name: identical(model, checked, arguments.largest) for name, model in models.items()}
    naive.part(1)
    naive.samples.clear()
    naive.steps = 0
    part = -(-arguments.naive_steps // (len(models) + 1))
    samples: dict[str, list[float]] = {}
    naive.part(part)
    for name, model in models.items():
        begin, repeats = time.perf_counter(), 0
        while True:
            taken = common.seconds(lambda model=model: model.commit(missed), arguments.device)
            samples.setdefault(name, []).append(taken)
            repeats += 1
            elapsed = time.perf_counter() - begin
            if (
                repeats >= (arguments.repeats or 3)
                or elapsed * (repeats + 1) / repeats > arguments.seconds
            ):
                break
        naive.part(part)
    medians = common.medians(samples)
    for name, model in models.items():
        steps = case.rounds * case.steps
        held = {"times_naive": REACHES[name]} if arguments.device == "cpu" else {}
        yield {
            "name": f"{case.tune} {case.dtype} {name}",
            "tune": case.tune,
            "dtype": case.dtype,
            "shape": arguments.shape,
            "parameters": model.layout.parameters,
            "rounds": case.rounds,
            "steps": case.steps,
            "distribution": name,
            "ours_seconds": medians[name],
            "naive_seconds": naive.seconds * steps,
            "naive_extrapolated": naive.steps < steps,
            "naive_steps_timed": naive.steps,
            "times_naive": naive.seconds * steps / medians[name],
            "giga_coordinates_per_second": model.layout.parameters * steps / medians[name] / 1e9,
            "repeats": len(samples[name]),
            "bit_identical": same[name],
            "reaches": {**held, "bit_identical": IDENTICAL},
        }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--shape", choices=list(common.SHAPES), default="")
    parser.add_argument(
        "--distributions", nargs="+", choices=common.DISTRIBUTIONS, default=common.DISTRIBUTIONS
    )
    parser.add_argument("--naive-steps", type=int, default=0, help="0 is 200, of the naive way")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="for one case of ours; once is always done"
    )
    arguments = parser.parse_args(argv)
    arguments.shape = arguments.shape or ("quick" if arguments.quick else "~110M")
    arguments.naive_steps = arguments.naive_steps or (6 if arguments.quick else 200)
    #: Coordinates of a tensor that the reference is asked for.
    arguments.largest = 1 << 20
    if arguments.quick:
        arguments.repeats = 1
    common.prepare(arguments)
    return arguments


def shortened(case: Case) -> Case:
    return Case(case.tune, case.dtype, 3, 4, 2)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    found: list[Row] = []
    for name in arguments.cases:
        common.note(name)
        case = shortened(CASES[name]) if arguments.quick else CASES[name]
        found += measure(arguments, case)
    alike = all(row["bit_identical"] for row in found)
    remarks = [
        f"{arguments.shape} shape. Step by step: timed on "
        f"{found[0]['naive_steps_timed']} steps, extrapolated to all.",
        "One commit, commits one by one and the reference: "
        + ("the same bits." if alike else "DIFFERENT BITS."),
    ]
    common.finish(arguments, "replay", found, COLUMNS, remarks)


if __name__ == "__main__":
    main()
