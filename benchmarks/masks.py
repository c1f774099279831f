"""What a mask of 0.1 % of the weights costs: replay, and the displacement of probes.

    python benchmarks/masks.py [--json] [--check]

`replay` is the commit of 30 steps in one pass. `probes` are both signs of a direction at the end of
a trajectory of 30 steps, on 64 tokens, over two plain forward passes. Beside the mask there are all
weights, and the same mask with whole tiles, which is how denser masks and CUDA devices have it.
"""

import argparse
from collections.abc import Sequence

import common
from common import Column, Reach, Row

from fedforward.core.steps import Probe, Steps, Update
from fedforward.directions import Distribution, ops
from fedforward.models.masks import random_mask

DENSITY, STEPS, TOKENS = 0.001, 30, 64
REACH = Reach("<=", 0.1)
WAYS = ("all weights", "mask, whole tiles", "mask, list")


def measure(arguments: argparse.Namespace, tune: str, distribution: str) -> list[Row]:
    shape = "quick" if arguments.quick else "small"
    base = common.network(shape, "float32", arguments.device)
    plan = common.make_plan(arguments, 2, "recompute")
    data = common.token_batch(shape, 8 if arguments.quick else TOKENS)
    ids = common.on_device(data, arguments.device)
    kind = common.lora_model if tune == "lora" else common.full_model
    model = kind(base, distribution, plan)
    masks = random_mask(model.tensors, model.layout, DENSITY, common.RUN_SEED)
    limits, none = dict(ops.SPARSE), dict.fromkeys(ops.SPARSE, 0.0)
    along = Steps.of(range(STEPS), [common.RATE] * STEPS)
    probes = [Probe(data, along, Steps.of([12345], [s * common.MU])) for s in (1, -1)]

    def begin(way: str) -> None:
        ops.SPARSE.update(none if way == "mask, whole tiles" else limits)
        model.masks = {} if way == "all weights" else dict(masks)
        model.clear_cache()
        # The lists are made once a run.
        model.free_coordinates()
        model.commit([Update(Steps.of([1], [common.RATE]), 0)])

    rows = []
    repeats = arguments.repeats or (1 if arguments.quick else 7)
    for way in WAYS:
        begin(way)

        def displaced() -> None:
            model.clear_cache()
            model.evaluate(probes)

        actions = {
            "replay": lambda: model.commit([Update(along, 0)]),
            "probes": displaced,
            "pass": lambda: common.plain_forward(base, ids),
        }
        common.interleave(actions, 1, arguments.device)
        times = common.medians(common.interleave(actions, repeats, arguments.device))
        # Whole tiles of signs cost little, and so do those of adapters.
        reached = way == "mask, list" and not arguments.quick
        reached = reached and (tune, distribution) == ("full", "gaussian")
        rows.append(
            {
                "name": f"{tune}, {distribution}, {way}",
                "tune": tune,
                "distribution": distribution,
                "way": way,
                "parameters": model.layout.parameters,
                "replay_seconds": times["replay"],
                "probes_seconds": times["probes"],
                "probes_over_passes": times["probes"] / (2 * times["pass"]),
                "replay_over_all": times["replay"] / rows[0]["replay_seconds"] if rows else 1.0,
                "reaches": {"replay_over_all": REACH} if reached else {},
            }
        )
    ops.SPARSE.update(limits)
    return rows


def main(given: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--tune", nargs="+", choices=("lora", "full"), default=["lora", "full"])
    arguments = parser.parse_args(given)
    common.prepare(arguments)
    rows = [
        row for tune in arguments.tune for d in Distribution for row in measure(arguments, tune, d)
    ]
    columns = [
        Column("name", "what"),
        Column("replay_seconds", "replay (ms)", ".1f", 1000.0),
        Column("replay_over_all", "/ all weights", ".3f"),
        Column("probes_seconds", "two probes (ms)", ".0f", 1000.0),
        Column("probes_over_passes", "/ two passes", ".2f"),
    ]
    common.finish(arguments, "masks", rows, columns)


if __name__ == "__main__":
    main()
