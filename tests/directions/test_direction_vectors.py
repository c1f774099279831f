"""Every test vector of docs/directions.md, against each implementation it concerns.

The vectors were made by other code. Roundings are checked once more in exact fractions, so that a
vector and an implementation cannot be wrong in the same way.
"""

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedforward.core.seeds import derive, direction_seed, dither_seed
from fedforward.directions import TILE, VERSION, Distribution, Layout, Stream, reference
from fedforward.directions import ops as kernels
from fedforward.directions.spec import (
    CALLS,
    DITHER_CALLS,
    HALF_NORMAL_SHA256,
    coordinate,
    half_normal_table,
    philox_4x32_10,
    tile_words,
)
from fedforward.models.lora_layers import initialise
from tests.support.exact import FORMATS, accumulated

PAGE = (Path(__file__).parents[2] / "docs" / "directions.md").read_text(encoding="utf-8")
VECTORS = json.loads(re.findall(r"^```json\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[0])
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
IMPLEMENTATIONS = {"reference": reference.accumulate, "kernels": kernels.accumulate}


def number(text: str) -> int:
    return int(text, 16)


def numbers(texts: list[str]) -> list[int]:
    return [number(text) for text in texts]


def bits_of(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


def tensor_of(bits: list[int], dtype: torch.dtype) -> torch.Tensor:
    if dtype is torch.float32:
        return torch.from_numpy(np.array(bits, np.uint32).view(np.float32))
    return torch.from_numpy(np.array(bits, np.uint16)).view(dtype)


def bits_at(tensor: torch.Tensor, positions: list[int]) -> list[int]:
    array = (
        tensor.numpy().view(np.uint32)
        if tensor.dtype is torch.float32
        else tensor.view(torch.uint16).numpy()
    )
    return [int(array[position]) for position in positions]


def test_the_page_names_the_version_and_the_table() -> None:
    assert VECTORS["version"] == VERSION
    assert PAGE.startswith(f"# Directions, version {VERSION}\n")
    assert VECTORS["table"]["sha256"] == HALF_NORMAL_SHA256
    assert f"`{HALF_NORMAL_SHA256}`" in PAGE


def test_the_vectors_are_all_there() -> None:
    assert len(VECTORS["philox"]) == 3
    assert {case["distribution"] for case in VECTORS["coordinates"]} == set(Distribution)
    assert {case["stream"] for case in VECTORS["words"]} == set(Stream)
    assert {case["weights_dtype"] for case in VECTORS["accumulate"]} == set(DTYPES)
    for key in ("seeds", "coordinates", "words", "accumulate"):
        assert len(VECTORS[key]) >= 4


@pytest.mark.parametrize("case", VECTORS["philox"])
def test_philox_known_answers(case: dict[str, Any]) -> None:
    counter, key = numbers(case["counter"]), numbers(case["key"])
    expected = tuple(numbers(case["words"]))
    assert philox_4x32_10(tuple(counter), (key[0], key[1])) == expected
    lanes = tuple(torch.tensor([word], dtype=torch.int64) for word in counter)
    assert tuple(int(word) for word in reference.philox(lanes, (key[0], key[1]))) == expected


@pytest.mark.parametrize("case", VECTORS["seeds"])
def test_seeds(case: dict[str, Any]) -> None:
    run_seed, where, expected = number(case["run_seed"]), case["where"], number(case["seed"])
    assert derive(run_seed, case["purpose"], *where) == expected
    named = {"direction": direction_seed, "dither": dither_seed}.get(case["purpose"])
    if named is not None:
        assert named(run_seed, *where) == expected


def test_layout() -> None:
    case = VECTORS["layout"]
    shapes = {name: tuple(shape) for name, shape in reversed(case["shapes"].items())}
    layout = Layout.of(shapes, case["blocks"])
    assert list(layout.names) == case["names"]
    assert list(layout.first_tiles) == case["first_tiles"]
    assert (layout.tiles, layout.parameters) == (case["tiles"], case["parameters"])
    assert layout.fingerprint == case["fingerprint"]


@pytest.mark.parametrize("case", VECTORS["words"])
def test_words_of_a_tile(case: dict[str, Any]) -> None:
    words = tile_words(
        number(case["seed"]), number(case["tile"]), case["calls"], Stream(case["stream"])
    )
    assert words[case["position"]] == number(case["word"])


def test_table_entries() -> None:
    table = half_normal_table().view(np.uint32)
    for index, bits in VECTORS["table"]["entries"].items():
        assert int(table[int(index)]) == number(bits)


@pytest.mark.parametrize("case", VECTORS["coordinates"])
def test_coordinates_in_every_implementation(case: dict[str, Any]) -> None:
    seed, tile, offsets = number(case["seed"]), number(case["tile"]), case["offsets"]
    distribution = Distribution(case["distribution"])
    expected = numbers(case["z"])
    scalar = [coordinate(seed, tile * TILE + offset, distribution) for offset in offsets]
    assert [bits_of(z) for z in scalar] == expected
    direction = reference.direction(seed, TILE, first_tile=tile, distribution=distribution)
    assert bits_at(direction, offsets) == expected
    for accumulate in IMPLEMENTATIONS.values():
        out = torch.zeros(TILE)
        accumulate(
            out,
            np.array([seed], np.uint64),
            np.ones(1, np.float32),
            first_tile=tile,
            distribution=distribution,
            out=out,
        )
        assert bits_at(out, offsets) == expected


def noise_at(seed: int, tile: int, offset: int) -> int:
    """The dither of a coordinate, from the scalar specification."""
    words = tile_words(seed, tile, DITHER_CALLS, Stream.DITHER)
    return words[offset % 1024] >> (16 * (offset // 1024)) & 0xFFFF


def results() -> Iterator[Any]:
    for case in VECTORS["accumulate"]:
        for key, expected in case["results"].items():
            yield pytest.param(case, key, numbers(expected), id=f"{case['name']}: {key}")


@pytest.mark.parametrize(("case", "key", "expected"), list(results()))
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_accumulate(
    case: dict[str, Any], key: str, expected: list[int], implementation: str
) -> None:
    name, rounding = key.split()
    dtype = DTYPES[case["weights_dtype"]]
    bits = [0] * case["size"]
    for position, weight in zip(case["positions"], numbers(case["weights"]), strict=True):
        bits[position] = weight
    out = torch.empty(case["size"], dtype=DTYPES[name])
    IMPLEMENTATIONS[implementation](
        tensor_of(bits, dtype),
        np.array(numbers(case["seeds"]), np.uint64),
        np.array(numbers(case["coefficients"]), np.uint32).view(np.float32),
        first_tile=number(case["first_tile"]),
        distribution=Distribution(case["distribution"]),
        out=out,
        decay=float(np.uint32(number(case["decay"])).view(np.float32)),
        dither_seed=number(case["dither_seed"]) if rounding == "stochastic" else None,
    )
    assert bits_at(out, case["positions"]) == expected


@pytest.mark.parametrize(("case", "key", "expected"), list(results()))
def test_accumulate_in_exact_fractions(case: dict[str, Any], key: str, expected: list[int]) -> None:
    name, rounding = key.split()
    first, seeds = number(case["first_tile"]), numbers(case["seeds"])
    for position, weight, bits in zip(
        case["positions"], numbers(case["weights"]), expected, strict=True
    ):
        tile, offset = first + position // TILE, position % TILE
        z = [
            bits_of(coordinate(seed, tile * TILE + offset, Distribution(case["distribution"])))
            for seed in seeds
        ]
        exact = accumulated(
            weight,
            FORMATS[case["weights_dtype"]],
            number(case["decay"]),
            list(zip(numbers(case["coefficients"]), z, strict=True)),
            FORMATS[name],
            noise_at(number(case["dither_seed"]), tile, offset)
            if rounding == "stochastic"
            else None,
        )
        assert exact == bits


def test_initial_factors() -> None:
    case = VECTORS["initial_a"]
    run_seed = number(case["run_seed"])
    assert derive(run_seed, "lora-a") == number(case["seed"])
    adapters = {
        name: torch.nn.Parameter(torch.full(shape, 7.0)) for name, shape in case["shapes"].items()
    }
    initialise(adapters, run_seed)
    assert not adapters["m.lora_B.weight"].any()
    for element in case["values"]:
        flat = adapters[element["name"]].detach().view(-1)
        assert bits_at(flat, [element["index"]]) == [number(element["bits"])]
    assert CALLS == {Distribution.RADEMACHER: 16, Distribution.GAUSSIAN: 256}
