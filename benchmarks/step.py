"""A two-point step beside two plain forward passes, a doubled one, and MeZO's way in place.

    python benchmarks/step.py [--shapes ~30M] [--tokens 128 2048] [--tune lora] [--json] [--check]

Ours is `model.evaluate` of both probes in one call. Under full tuning at H = 1 the commit of the
step is part of it; at H = 30 the commit happens once a round and is left out. At H = 30 a figure
is the mean over the trajectory of 30 steps: the steps are taken in their order, lengths 0 and 1 and
the middles of equal parts of the rest are timed, and the steps between them run on four tokens, so
that whatever a model carries from step to step is what it would be.

The naive side is the library's `model(input_ids=…, labels=…)` under `inference_mode` on a network
of its own, without hooks and without a key-value cache: two of them one after another, one of
twice the batch, and MeZO's perturb, forward, perturb, forward, restore and update (its line for z,
added in place). For LoRA the two forward passes that are checked against are those of the base
without adapters; those of the PEFT model stand beside them. Ours keeps to the plan's tokens a pass
(1,024 on the CPU), so that at 2,048 tokens it works row by row with adapters, which a plain forward
pass does not unless its user cuts the batch. All contenders take turns in one loop;
medians.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import common
from common import Column, Reach, Row, Trajectory

from fedforward.models.base import CausalModel

HORIZON = 30
TOKENS = (128, 256, 512, 2048)
#: Columns to reach, by (tune, horizon, trajectory) and tokens.
REACHES: dict[tuple[str, int, str | None], dict[int, dict[str, Reach]]] = {
    ("lora", HORIZON, None): {
        128: {"over_two_forwards": Reach("<=", 0.95)},
        2048: {"over_two_forwards": Reach("<=", 1.02)},
    },
    ("full", 1, None): {
        256: {"in_place_over_ours": Reach(">=", 2.0)},
        512: {"over_two_forwards": Reach("<=", 1.15)},
        2048: {"over_two_forwards": Reach("<=", 1.05)},
    },
    ("full", HORIZON, "cache"): {
        512: {"over_two_forwards": Reach("<=", 1.15)},
        2048: {"over_two_forwards": Reach("<=", 1.05)},
    },
}
COLUMNS = (
    Column("shape", "shape"),
    Column("tune", "tune"),
    Column("tokens", "tokens", "d"),
    Column("horizon", "H", "d"),
    Column("distribution", "directions"),
    Column("trajectory", "trajectory"),
    Column("ours_seconds", "ours, ms", ".1f", 1e3),
    Column("two_forwards_seconds", "two forwards, ms", ".1f", 1e3),
    Column("over_two_forwards", "ours / two forwards", ".3f"),
    Column("over_two_forwards_peft", "/ two of PEFT", ".3f"),
    Column("over_twice_batch", "/ twice the batch", ".3f"),
    Column("in_place_over_ours", "in place / ours", ".2f"),
    Column("timed", "times timed", "d"),
)


class Contender:
    """One of our models on its way along a trajectory."""

    def __init__(self, model: Any, distribution: str, horizon: int, trajectory: str | None) -> None:
        self.path = Trajectory(model, horizon)
        self.distribution = distribution
        self.horizon = horizon
        self.trajectory = trajectory

    def key(self, length: int) -> str:
        place = f" at {length}" if self.horizon > 1 else ""
        return f"{self.distribution} {self.horizon} {self.trajectory}{place}"

    def advance(self, tiny: Any) -> None:
        """One step that is not timed."""
        if self.trajectory == "recompute":
            self.path.skip()
        elif self.horizon > 1:
            self.path.step(tiny)

    def seconds(self, samples: dict[str, list[float]], weights: dict[int, float]) -> float:
        """The median, at H > 1 the mean over the trajectory of the medians."""
        if self.horizon == 1:
            return statistics.median(samples[self.key(0)])
        return sum(
            weight * statistics.median(samples[self.key(length)])
            for length, weight in weights.items()
        )


def contenders(arguments: argparse.Namespace, base: Any, tune: str) -> list[Contender]:
    made: list[Contender] = []
    model: CausalModel
    for distribution in arguments.distributions:
        kinds: list[tuple[int, str | None]] = [(HORIZON, None)]
        if tune == "full":
            kinds = [(1, None), (HORIZON, "recompute"), (HORIZON, "cache")]
            kinds = [kind for kind in kinds if kind[0] in arguments.horizons]
        for horizon, trajectory in kinds:
            plan = common.make_plan(arguments, arguments.probes_per_call, trajectory)
            if tune == "lora":
                model = common.lora_model(copy.deepcopy(base), distribution, plan, arguments.lora)
            else:
                model = common.full_model(copy.deepcopy(base), distribution, plan)
            made.append(Contender(model, distribution, horizon, trajectory))
    return made


def measure(arguments: argparse.Namespace, shape: str, tune: str) -> Iterator[Row]:
    """The rows of one shape and one way of tuning."""
    base = common.network(shape, arguments.dtype, arguments.device)
    ours = contenders(arguments, base, tune)
    if tune == "lora":
        moved, tuned = common.peft_network(copy.deepcopy(base), arguments.lora)
    else:
        moved = copy.deepcopy(base)
        tuned = list(moved.parameters())
    tensors = [parameter.data for parameter in tuned]
    for tokens in arguments.tokens:
        batch = common.token_batch(shape, tokens, arguments.longest)
        once = common.on_device(batch, arguments.device)
        twice = common.on_device(batch, arguments.device, 2)
        in_place = common.InPlace(moved, tensors, once)
        naive: dict[str, Callable[[], object]] = {
            "two forwards": lambda once=once: [common.plain_forward(base, once) for _ in "ab"],
            "twice the batch": lambda twice=twice: common.plain_forward(base, twice),
            "in place": in_place.step,
        }
        if tune == "lora":
            naive["two of PEFT"] = lambda once=once: [
                common.plain_forward(moved, once) for _ in "ab"
            ]
        common.note(f"{shape} {tune} {tokens} tokens")
        common.check_same_loss(ours[0].path.model, batch, common.plain_forward(base, once))
        samples, weights = walk(arguments, shape, batch, ours, naive)
        yield from rows(arguments, shape, tune, tokens, ours, samples, weights)


def walk(
    arguments: argparse.Namespace,
    shape: str,
    batch: Any,
    ours: list[Contender],
    naive: dict[str, Callable[[], object]],
) -> tuple[dict[str, list[float]], dict[int, float]]:
    """Take all contenders along trajectories until the time for this configuration is over."""
    tiny = common.tiny_batch(shape)
    for contender in ours:
        contender.path.step(tiny)
        contender.path.finish()
    estimate = common.seconds(naive["two forwards"], arguments.device) * (len(ours) + len(naive))
    weights = common.sampled_lengths(HORIZON, 2 if 6 * estimate > arguments.seconds else 4)
    samples: dict[str, list[float]] = {}
    begin, walks, turn = time.perf_counter(), 0, 0
    while True:
        for length in range(HORIZON):
            if length not in weights:
                for contender in ours:
                    contender.advance(tiny)
                continue
            actions = dict(naive)
            for contender in ours:
                actions[contender.key(length)] = lambda path=contender.path: path.step(batch)
            common.interleave(common.turned(actions, turn), 1, arguments.device, samples)
            turn += 1
        for contender in ours:
            if contender.horizon > 1:
                contender.path.finish()
        walks += 1
        elapsed = time.perf_counter() - begin
        if walks >= (arguments.repeats or 5) or elapsed * (walks + 1) / walks > arguments.seconds:
            return samples, weights


def rows(
    arguments: argparse.Namespace,
    shape: str,
    tune: str,
    tokens: int,
    ours: list[Contender],
    samples: dict[str, list[float]],
    weights: dict[int, float],
) -> Iterator[Row]:
    for contender in ours:
        mine = contender.seconds(samples, weights)
        medians = common.medians(samples)
        two, doubled = medians["two forwards"], medians["twice the batch"]
        kind = (tune, contender.horizon, contender.trajectory)
        limits = REACHES.get(kind, {}).get(tokens, {}) if arguments.device == "cpu" else {}
        labels = [shape, tune, f"H = {contender.horizon}", contender.trajectory]
        yield {
            "name": " ".join(filter(None, [*labels, contender.distribution, f"{tokens} tokens"])),
            "shape": shape,
            "tune": tune,
            "dtype": arguments.dtype,
            "tokens": tokens,
            "horizon": contender.horizon,
            "distribution": contender.distribution,
            "trajectory": contender.trajectory,
            "probes_per_call": arguments.probes_per_call,
            "ours_seconds": mine,
            "two_forwards_seconds": two,
            "twice_batch_seconds": doubled,
            "in_place_seconds": medians["in place"],
            "two_forwards_peft_seconds": medians.get("two of PEFT"),
            "over_two_forwards": mine / two,
            "over_twice_batch": mine / doubled,
            "over_two_forwards_peft": (
                mine / medians["two of PEFT"] if "two of PEFT" in medians else None
            ),
            "in_place_over_ours": medians["in place"] / mine,
            "timed": sum(
                len(values) for key, values in samples.items() if _belongs(key, contender)
            ),
            "naive_timed": len(samples["two forwards"]),
            "reaches": limits,
        }


def _belongs(key: str, contender: Contender) -> bool:
    lengths = range(HORIZON) if contender.horizon > 1 else (0,)
    return key in {contender.key(length) for length in lengths}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=list(common.SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, help="a step, rows of at most 512")
    parser.add_argument("--tune", nargs="+", choices=("lora", "full"), default=["lora", "full"])
    parser.add_argument("--dtype", choices=list(common.DTYPES), default="float32")
    parser.add_argument(
        "--distributions", nargs="+", choices=common.DISTRIBUTIONS, default=common.DISTRIBUTIONS
    )
    parser.add_argument("--probes-per-call", type=int, default=2)
    parser.add_argument(
        "--horizons", nargs="+", type=int, choices=(1, HORIZON), default=[1, HORIZON],
        help="of full tuning",
    )  # fmt: skip
    parser.add_argument(
        "--seconds",
        type=float,
        default=20.0,
        help="for one shape, way of tuning and number of tokens; one walk is always finished",
    )
    arguments = parser.parse_args(argv)
    arguments.shapes = arguments.shapes or (["quick"] if arguments.quick else ["~30M", "~110M"])
    arguments.tokens = arguments.tokens or ([8, 32] if arguments.quick else list(TOKENS))
    arguments.lora = common.LoraSettings()
    arguments.longest = 16 if arguments.quick else 512
    if arguments.quick:
        arguments.seconds, arguments.repeats = 0.0, 1
    common.prepare(arguments)
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    found = [
        row
        for shape in arguments.shapes
        for tune in arguments.tune
        for row in measure(arguments, shape, tune)
    ]
    remarks = [
        f"{arguments.dtype}, probes per call {arguments.probes_per_call}; LoRA rank 8, alpha 16, "
        "all linear layers, both factors.",
        "Full tuning at H = 1 includes the commit; at H = 30 it happens once a round, not timed.",
    ]
    common.finish(arguments, "step", found, COLUMNS, remarks)


if __name__ == "__main__":
    main()
