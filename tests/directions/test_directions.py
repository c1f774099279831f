"""Directions: the kernels equal the reference bit for bit, and both are what the page says."""

import hashlib
import importlib.util
import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedforward.core.steps import NO_STEPS, Steps
from fedforward.directions import TILE, Distribution, Layout, reference
from fedforward.directions import numba_kernels as cpu
from fedforward.directions import ops as kernels
from fedforward.directions.spec import HALF_NORMAL_SHA256, Stream, half_normal_table, tile_words
from tests.support.exact import FORMATS, converted

ROOT = Path(__file__).parents[2]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALVES = DTYPES[1:]
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
CODES = {torch.float32: cpu.FLOAT32, torch.bfloat16: cpu.BFLOAT16, torch.float16: cpu.FLOAT16}
SIZES = (1, 5, TILE - 1, TILE, TILE + 1, 3 * TILE + 100)
COUNTS = (0, 1, 7, 8, 9, 130, 300)
NONE = np.empty(0, np.uint64), np.empty(0, np.float32)

Pair = tuple[NDArray[np.uint64], NDArray[np.float32]]

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
by_half = pytest.mark.parametrize("dtype", HALVES, ids=NAMES.get)
by_distribution = pytest.mark.parametrize("distribution", Distribution)


def bits(tensor: torch.Tensor) -> NDArray[Any]:
    """The bits of each element, the same for every NaN."""
    tensor = torch.where(tensor.isnan(), torch.full_like(tensor, torch.nan), tensor)
    if tensor.dtype is torch.float32:
        return tensor.numpy().view(np.uint32)
    return tensor.view(torch.uint16).numpy()


def of_bits(pattern: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    if dtype is torch.float32:
        return torch.from_numpy(np.array(pattern, np.uint32).view(np.float32))
    return torch.from_numpy(np.array(pattern, np.uint16)).view(dtype)


def weights_of_every_kind(size: int, dtype: torch.dtype) -> torch.Tensor:
    """Ordinary weights, and among them zeros, subnormals, infinities, NaN and the largest."""
    random = np.random.default_rng(size)
    ordinary = random.standard_normal(size) * 10.0 ** random.uniform(-6, 1, size)
    special = [0.0, -0.0, 1e-40, -3e-41, 1e-45, 2e-8, -6e-8, 6.0e-5, 65504.0, -65519.0]
    special += [
        65520.0,
        65535.9,
        -65536.0,
        3.4e38,
        -3.39e38,
        np.inf,
        -np.inf,
        np.nan,
        1.1754944e-38,
    ]
    places = random.random(size) < 0.2
    chosen = random.choice(special, size)
    mixed = np.where(places, chosen, ordinary)
    with np.errstate(over="ignore"):
        return torch.from_numpy(mixed.astype(np.float32)).to(dtype)


def some_steps(count: int) -> Pair:
    random = np.random.default_rng(count)
    seeds = random.integers(0, 2**64, count, dtype=np.uint64)
    coefficients = random.standard_normal(count) * 10.0 ** random.uniform(-8, 0, count)
    return seeds, coefficients.astype(np.float32)


@pytest.fixture
def quick_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference with its directions kept, so that a few hundred cases take seconds."""
    monkeypatch.setattr(reference, "direction", _remembered)


_direction = reference.direction


@cache
def _whole(seed: int, first_tile: int, distribution: Distribution, stream: Stream) -> torch.Tensor:
    return _direction(
        seed, max(SIZES), first_tile=first_tile, distribution=distribution, stream=stream
    )


def _remembered(seed: int, count: int, *, device: Any, **where: Any) -> torch.Tensor:
    return _whole(seed, where["first_tile"], where["distribution"], where["stream"])[:count]


def run(
    accumulate: Callable[..., None],
    weights: torch.Tensor,
    steps: Pair,
    dtype: torch.dtype,
    **options: Any,
) -> torch.Tensor:
    """A new tensor of `dtype`; no element keeps what it held before."""
    options = {"first_tile": 0, "distribution": Distribution.GAUSSIAN} | options
    out = torch.full_like(weights, 77.0, dtype=dtype)
    accumulate(weights, *steps, out=out, **options)
    return out


def on_arrays(weights: torch.Tensor, *steps: Any, out: torch.Tensor, **options: Any) -> None:
    """`cpu.commit` on what it takes: flat arrays, half precisions as their bits."""
    source, target = (
        t.numpy() if t.dtype is torch.float32 else t.view(torch.uint16).numpy()
        for t in (weights, out)
    )
    codes = (CODES[weights.dtype], CODES[out.dtype])
    if "decay" in options:
        options["decays"] = (options.pop("decay"),)
    if "dither_seed" in options:
        seed = options.pop("dither_seed")
        options["dither_seeds"] = None if seed is None else (seed,)
    cpu.commit(source, *steps, out=target, codes=codes, **options)


# Reference equality


@pytest.mark.usefixtures("quick_reference")
@by_distribution
@pytest.mark.parametrize("count", COUNTS)
@by_dtype
def test_kernels_equal_the_reference(
    dtype: torch.dtype, count: int, distribution: Distribution
) -> None:
    steps = some_steps(count)
    for size, out, dither, decay in itertools.product(SIZES, DTYPES, (None, 2**64 - 5), (1.0, 0.9)):
        weights = weights_of_every_kind(size, dtype)
        options: dict[str, Any] = {
            "first_tile": 2**32 - 2,
            "distribution": distribution,
            "dither_seed": dither,
            "decay": decay,
        }
        expected = bits(run(reference.accumulate, weights, steps, out, **options))
        found = bits(run(kernels.accumulate, weights, steps, out, **options))
        np.testing.assert_array_equal(found, expected, err_msg=f"{size} {out} {dither} {decay}")
        if decay == 1.0:
            found = bits(run(on_arrays, weights, steps, out, **options))
            np.testing.assert_array_equal(found, expected)


@by_distribution
@pytest.mark.parametrize("stream", Stream)
def test_streams_differ_and_equal_the_reference(distribution: Distribution, stream: Stream) -> None:
    weights, steps = torch.zeros(TILE + 7), some_steps(3)
    options: dict[str, Any] = {"distribution": distribution, "stream": stream, "first_tile": 4}
    found = run(kernels.accumulate, weights, steps, torch.float32, **options)
    expected = run(reference.accumulate, weights, steps, torch.float32, **options)
    np.testing.assert_array_equal(bits(found), bits(expected))
    options["stream"] = Stream((stream + 1) % 3)
    other = run(kernels.accumulate, weights, steps, torch.float32, **options)
    assert (found != other).float().mean() > 0.4


@by_dtype
@pytest.mark.parametrize("dither", (None, 3))
def test_in_place(dtype: torch.dtype, dither: int | None) -> None:
    weights, steps = weights_of_every_kind(2 * TILE + 9, dtype), some_steps(9)
    beside = run(kernels.accumulate, weights, steps, dtype, dither_seed=dither)
    before = bits(weights).copy()
    for accumulate in (kernels.accumulate, reference.accumulate):
        own = weights.clone()
        accumulate(
            own,
            *steps,
            first_tile=0,
            distribution=Distribution.GAUSSIAN,
            out=own,
            dither_seed=dither,
        )
        np.testing.assert_array_equal(bits(own), bits(beside))
    np.testing.assert_array_equal(bits(weights), before)


def test_shape_is_row_major() -> None:
    steps = some_steps(2)
    flat = run(kernels.accumulate, torch.zeros(6000), steps, torch.float32)
    cube = run(kernels.accumulate, torch.zeros(20, 30, 10), steps, torch.float32)
    assert torch.equal(cube, flat.view(20, 30, 10))


@by_distribution
def test_result_does_not_depend_on_threads(distribution: Distribution) -> None:
    weights, steps = weights_of_every_kind(11 * TILE + 5, torch.bfloat16), some_steps(9)
    # Few enough tile-seeds would stay on one thread.
    assert cpu.THREADING_THRESHOLD < 12 * (9 + 1)
    options: dict[str, Any] = {
        "distribution": distribution,
        "dither_seed": 8,
        "first_tile": 3,
    }
    expected = bits(run(reference.accumulate, weights, steps, torch.bfloat16, **options))
    for threads in (1, 2, 3, 7, 50):
        found = run(on_arrays, weights, steps, torch.bfloat16, threads=threads, **options)
        np.testing.assert_array_equal(bits(found), expected)


@by_distribution
def test_coordinates_depend_on_the_first_tile_only(distribution: Distribution) -> None:
    shapes = {"c": (3, 700), "a": (TILE,), "b": (5,), "d": (4000,)}
    layout, steps = Layout.of(shapes), some_steps(3)
    assert layout.first_tiles == (0, 1, 2, 4)
    options: dict[str, Any] = {"distribution": distribution}
    space = torch.zeros(layout.tiles * TILE)
    whole = run(kernels.accumulate, space, steps, torch.float32, **options)
    for shape, size, tile in zip(layout.shapes, layout.sizes, layout.first_tiles, strict=True):
        options["first_tile"] = tile
        part = run(kernels.accumulate, torch.zeros(shape), steps, torch.float32, **options)
        assert torch.equal(part.view(-1), whole[tile * TILE : tile * TILE + size])


# Arithmetic


@by_distribution
@pytest.mark.parametrize("count", (9, 21))
def test_steps_are_added_one_by_one(distribution: Distribution, count: int) -> None:
    """The plain float32 loop, on coefficients for which order and every rounding matter."""
    size = TILE + 50
    random = np.random.default_rng(7)
    coefficients = (random.standard_normal(count) * 2.0 ** random.integers(-12, 3, count)).astype(
        np.float32
    )
    seeds = random.integers(0, 2**64, count, dtype=np.uint64)
    weights = random.standard_normal(size).astype(np.float32)
    decay = np.float32(0.99)
    z = np.stack(
        [reference.direction(int(s), size, distribution=distribution).numpy() for s in seeds]
    )
    expected, fused = np.empty_like(weights), np.empty_like(weights)
    for i in range(size):
        acc = decay * weights[i]
        once = float(decay) * float(weights[i])
        for c, direction in zip(coefficients, z[:, i], strict=True):
            acc = acc + c * direction
            once += float(c) * float(direction)
        expected[i], fused[i] = acc, np.float32(once)
    options: dict[str, Any] = {"distribution": distribution, "decay": float(decay)}
    tensor = torch.from_numpy(weights)
    found = run(kernels.accumulate, tensor, (seeds, coefficients), torch.float32, **options)
    np.testing.assert_array_equal(bits(found), expected.view(np.uint32))
    # The cases tell: another order, or one rounding for all, gives other bits.
    turned = seeds[::-1].copy(), coefficients[::-1].copy()
    reverse = run(kernels.accumulate, tensor, turned, torch.float32, **options)
    assert (reverse != found).float().mean() > 0.1
    assert np.mean(fused != expected) > 0.1


def test_large_then_small_is_not_small_then_large() -> None:
    """2^24 swallows a first step of 1 when it is there already, and not when it comes later."""
    seeds = np.array([1, 1, 1], np.uint64)
    options: dict[str, Any] = {"distribution": Distribution.RADEMACHER}

    def after(*coefficients: float) -> torch.Tensor:
        steps = seeds, np.array(coefficients, np.float32)
        return run(kernels.accumulate, torch.zeros(100), steps, torch.float32, **options)

    assert not after(2.0**24, 1.0, -(2.0**24)).any()
    assert (after(2.0**24, -(2.0**24), 1.0).abs() == 1.0).all()


@by_distribution
def test_subnormal_results_are_not_flushed(distribution: Distribution) -> None:
    steps = np.array([4], np.uint64), np.array([3e-42], np.float32)
    options: dict[str, Any] = {"distribution": distribution}
    for weight in (0.0, 1e-40, -2e-39):
        weights = torch.full((TILE,), weight)
        found = run(kernels.accumulate, weights, steps, torch.float32, **options)
        assert (found.abs() < torch.finfo(torch.float32).tiny).all()
        # z is below 1e-3 only for one Gaussian coordinate in a thousand.
        assert (found != weight).float().mean() > 0.99
    halved = run(
        kernels.accumulate, torch.full((9,), 1.2e-38), NONE, torch.float32, decay=0.5, **options
    )
    assert torch.equal(halved, torch.full((9,), 6e-39))


@by_dtype
def test_no_steps_and_no_decay_leave_every_bit(dtype: torch.dtype) -> None:
    pattern = range(1 << 16) if dtype is not torch.float32 else range(0, 1 << 32, 65521)
    weights = of_bits(list(pattern), dtype)
    for dither in (None, 5):
        found = run(kernels.accumulate, weights, NONE, dtype, dither_seed=dither)
        np.testing.assert_array_equal(bits(found), bits(weights))


# Rounding


def patterns(*, finite: bool = False) -> st.SearchStrategy[list[int]]:
    """Lists of float32 bits: any, and those near the limits and ties of the half precisions."""
    zero_and_subnormal = (0x00000000, 0x00008000, 0x00800000)
    float16_limits = (0x33000000, 0x33800000, 0x38800000, 0x477FE000, 0x477FF000, 0x47800000)
    ties_at_one = (0x3F800000, 0x3F808000, 0x3F801000)
    largest = (0x7F7F0000, 0x7F7F8000, 0x7F7FFFFF, 0x7F800000)
    centre = st.sampled_from((*zero_and_subnormal, *float16_limits, *ties_at_one, *largest))
    near = st.builds(
        lambda middle, shift, sign: ((middle + shift) & 0x7FFFFFFF) | (sign << 31),
        centre,
        st.integers(-3, 3),
        st.integers(0, 1),
    )
    upper = st.integers(0, (1 << 19) - 1).map(lambda value: value << 13)
    tie = st.builds(int.__or__, upper, st.sampled_from((0, 0xFFF, 0x1000, 0x1001)))
    one = near | tie | st.integers(0, (1 << 32) - 1)
    if finite:
        one = one.filter(lambda b: b & 0x7FFFFFFF < 0x7F800000)
    return st.lists(one, min_size=1, max_size=60)


@by_half
@given(pattern=patterns())
@settings(max_examples=150, deadline=None)
def test_nearest_rounding_is_that_of_the_framework(dtype: torch.dtype, pattern: list[int]) -> None:
    values = of_bits(pattern)
    found = run(kernels.accumulate, values, NONE, dtype)
    np.testing.assert_array_equal(bits(found), bits(values.to(dtype)))


@by_half
def test_nearest_rounding_at_every_number_and_tie(dtype: torch.dtype) -> None:
    every = of_bits(list(range(1 << 15)), dtype).float()
    every = every[every.isfinite()].numpy()
    ties = (every[:-1] + (every[1:] - every[:-1]) / 2).view(np.uint32)
    near = np.concatenate((ties - 1, ties, ties + 1, every.view(np.uint32)))
    values = of_bits(np.concatenate((near, near | np.uint32(1 << 31))))
    found = run(kernels.accumulate, values, NONE, dtype)
    np.testing.assert_array_equal(bits(found), bits(values.to(dtype)))


@by_half
@given(pattern=patterns(finite=True), seed=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_stochastic_rounding_in_exact_fractions(
    dtype: torch.dtype, pattern: list[int], seed: int
) -> None:
    """One of the two neighbours, and the one that the noise of the coordinate says."""
    form = FORMATS[NAMES[dtype]]
    words = tile_words(seed, 6, 256, Stream.DITHER)
    expected = [
        converted(b, FORMATS["float32"], form, words[i] & 0xFFFF) for i, b in enumerate(pattern)
    ]
    options: dict[str, Any] = {"first_tile": 6, "dither_seed": seed}
    for accumulate in (kernels.accumulate, reference.accumulate):
        found = run(accumulate, of_bits(pattern), NONE, dtype, **options)
        assert bits(found).tolist() == expected


@by_half
@given(
    pattern=st.integers(0x30000000, 0x477FDFFF) | st.integers(0xB0000000, 0xC77FDFFF),
)
@settings(max_examples=60, deadline=None)
def test_stochastic_rounding_is_unbiased_and_within_one_place(
    dtype: torch.dtype, pattern: int
) -> None:
    """Over all 65,536 noises the mean is the value itself, up to what is cut from it."""
    value = of_bits([pattern]).expand(1 << 16).contiguous()
    noise = torch.arange(1 << 16)
    found = reference.round_stochastically(value, noise, dtype).double()
    lower, upper = found.min().item(), found.max().item()
    exact = value[0].double().item()
    place = torch.finfo(dtype).eps * max(2.0 ** np.floor(np.log2(abs(exact))), 2.0**-14)
    assert lower <= exact <= upper or upper - lower == 0.0
    assert abs(exact - lower) < place and abs(exact - upper) < place
    assert abs(found.mean().item() - exact) < place / 65536


@by_half
def test_stochastic_rounding_of_the_kernels_is_unbiased(dtype: torch.dtype) -> None:
    size = 1 << 20
    place = torch.finfo(dtype).eps
    for share in (0.0, 1 / 3, 0.9):
        exact = np.float32(-(1.0 + share * place))
        values = torch.full((size,), float(exact))
        found = run(kernels.accumulate, values, NONE, dtype, dither_seed=12).double()
        assert set(found.unique().tolist()) <= {-1.0, -(1.0 + place)}
        mean, error = (-found.mean().item() - 1) / place, (0.25 / size) ** 0.5
        assert abs(mean - share) < 5 * error * (share > 0) + 1e-4


def test_noise_belongs_to_the_coordinate_and_not_to_the_call() -> None:
    values = torch.full((4 * TILE,), 1.0 + 2.0**-9)
    whole = run(kernels.accumulate, values, NONE, torch.bfloat16, first_tile=5, dither_seed=3)
    part = run(kernels.accumulate, values[:100], NONE, torch.bfloat16, first_tile=7, dither_seed=3)
    assert torch.equal(part, whole[2 * TILE : 2 * TILE + 100])
    other = run(kernels.accumulate, values, NONE, torch.bfloat16, first_tile=5, dither_seed=4)
    assert 0.2 < (other != whole).float().mean() < 0.5


def test_small_updates_survive_stochastic_rounding_only() -> None:
    """Moves of rms 1e-6 on bfloat16 weights of 0.02: the share that arrives, by projection."""
    size = 1 << 22
    random = np.random.default_rng(0)
    weights = torch.from_numpy(random.standard_normal(size, dtype=np.float32) * np.float32(0.02))
    weights = weights.to(torch.bfloat16)
    steps = np.array([77], np.uint64), np.array([1e-6], np.float32)
    move = run(kernels.accumulate, torch.zeros(size), steps, torch.float32).double()

    def arrived(dither: int | None) -> float:
        after = run(kernels.accumulate, weights, steps, torch.bfloat16, dither_seed=dither)
        change = after.double() - weights.double()
        return float(change @ move / (move @ move))

    assert arrived(5) == pytest.approx(1.0, abs=0.03)
    assert 0.0 < arrived(None) < 0.06


# Distributions

SAMPLE = 1 << 22


@cache
def sample(seed: int, distribution: Distribution) -> NDArray[np.float32]:
    steps = np.array([seed], np.uint64), np.ones(1, np.float32)
    zeros = torch.zeros(SAMPLE)
    out = run(kernels.accumulate, zeros, steps, torch.float32, distribution=distribution)
    return out.numpy()


@by_distribution
def test_moments(distribution: Distribution) -> None:
    gaussian = distribution is Distribution.GAUSSIAN
    z = sample(1, distribution).astype(np.float64)
    error = SAMPLE**-0.5
    square = z * z
    assert abs(z.mean()) < 4 * error
    assert abs(square.mean() - 1) <= 4 * np.sqrt(2) * error * gaussian
    assert abs((square * z).mean()) < 4 * np.sqrt(15) * error
    kurtosis = 2.99925 if gaussian else 1.0
    assert abs((square * square).mean() - kurtosis) <= 4 * np.sqrt(96) * error * gaussian
    assert abs(z).max() == (half_normal_table()[-1] if gaussian else 1.0)


@by_distribution
@pytest.mark.parametrize("other", (2, 0, 1 + 2**32, 1 + 2**63))
def test_seeds_are_uncorrelated(distribution: Distribution, other: int) -> None:
    a, b = sample(1, distribution), sample(other, distribution)
    assert abs(np.mean(a * b, dtype=np.float64)) < 4.5 * SAMPLE**-0.5


@by_distribution
def test_coordinates_are_uncorrelated(distribution: Distribution) -> None:
    z = sample(1, distribution)
    for lag in (1, 2, 16, 32, 63, 64, 256, 1023, 1024, TILE, 2 * TILE):
        assert abs(np.mean(z[:-lag] * z[lag:], dtype=np.float64)) < 4.5 * SAMPLE**-0.5


@by_distribution
def test_every_offset_of_a_tile_is_balanced(distribution: Distribution) -> None:
    """The means over tiles of the 2048 offsets scatter as independent means do, none by much."""
    tiles = sample(1, distribution).reshape(-1, TILE)
    means = tiles.mean(0, dtype=np.float64) * len(tiles) ** 0.5
    assert abs(means).max() < 5.5
    assert np.mean(means**2) == pytest.approx(1.0, abs=5 * np.sqrt(2 / TILE))


def test_gaussian_uses_every_value_equally() -> None:
    z = sample(1, Distribution.GAUSSIAN)
    index = np.searchsorted(half_normal_table(), np.abs(z))
    assert (half_normal_table()[index] == np.abs(z)).all()
    counts = np.bincount(2 * index + (z < 0), minlength=65536)
    expected = SAMPLE / 65536
    chi_square = np.sum((counts - expected) ** 2) / expected
    assert abs(chi_square - 65535) < 4.5 * np.sqrt(2 * 65535)


# The table


def test_table_is_the_one_of_the_specification() -> None:
    from importlib.resources import files

    data = files("fedforward.directions").joinpath("half_normal.bin").read_bytes()
    assert len(data) == 4 * 32768
    assert hashlib.sha256(data).hexdigest() == HALF_NORMAL_SHA256
    table = half_normal_table()
    assert table.tobytes() == data
    assert not table.flags.writeable
    wide = table.astype(np.float64)
    assert (np.diff(wide) > 0).all() and wide[0] > 0
    assert np.mean(wide**2) == pytest.approx(1.0, abs=1e-9)
    assert np.mean(wide**4) == pytest.approx(2.99925, abs=1e-5)


def test_a_damaged_table_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedforward.directions import spec as specification

    monkeypatch.setattr(specification, "HALF_NORMAL_SHA256", "0" * 64)
    with pytest.raises(RuntimeError, match="reinstall fedforward"):
        half_normal_table.__wrapped__()


def test_table_follows_from_its_formula() -> None:
    pytest.importorskip("scipy")
    path = ROOT / "scripts" / "make_half_normal_table.py"
    spec = importlib.util.spec_from_file_location("make_half_normal_table", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    made = script.table().view(np.int32).astype(np.int64)
    shipped = half_normal_table().view(np.int32).astype(np.int64)
    assert np.abs(made - shipped).max() <= 1


def test_arrays_that_do_not_fit_are_refused() -> None:
    weights, seeds = np.zeros(10, np.float32), np.arange(2, dtype=np.uint64)
    coefficients = np.ones(2, np.float32)
    for arguments, out, error in (
        ((weights, seeds, coefficients[:1]), weights, ValueError),
        ((weights, seeds, coefficients), np.zeros(11, np.float32), ValueError),
        ((weights, seeds, coefficients.astype(np.float64)), weights, TypeError),
        ((weights, seeds.astype(np.int64), coefficients), weights, TypeError),
    ):
        with pytest.raises(error):
            cpu.commit(*arguments, first_tile=0, distribution=Distribution.GAUSSIAN, out=out)


ONE, OTHER = Steps.of([2**63 + 7], [0.01]), Steps.of([2**63 + 7], [-0.01])
THREE = Steps.of([5, 6, 7], [0.02, -0.03, 0.01])


@by_distribution
@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("own", [[ONE, OTHER], [ONE, OTHER, THREE, NO_STEPS, ONE], [OTHER, ONE]])
@pytest.mark.parametrize("shared", [NO_STEPS, THREE])
def test_displacements_are_those_of_the_reference(
    dtype: torch.dtype, distribution: Distribution, own: list[Steps], shared: Steps
) -> None:
    """Whole tensors, tiles and rows that begin anywhere, both signs and mixed lists of steps."""
    weights = (0.02 * torch.randn(7000, generator=torch.Generator().manual_seed(1))).to(dtype)
    weights[[3, 2050]] = torch.tensor([float("inf"), 1e-42]).to(dtype)
    for starts in (None, [2048], [1999], [0, 3, 4900, 3], []):
        places = None if starts is None else np.array(starts, np.int64)
        length = 7000 if starts is None else 2100 * len(starts)
        results = []
        for how in (kernels, reference):
            out = torch.full((len(own), length), 77.0, dtype=dtype)
            how.displace(
                weights, shared, own, first_tile=2**33, distribution=distribution, out=out,
                starts=places,
            )  # fmt: skip
            results.append(out.view(torch.uint8))
        assert torch.equal(*results)


@by_distribution
def test_displacements_do_not_depend_on_threads(
    distribution: Distribution, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, own = weights_of_every_kind(20 * TILE + 5, torch.bfloat16), [ONE, OTHER, THREE]
    # Few enough tile-seeds would stay on one thread.
    assert 21 * (len(THREE) + len(own) + 1) > cpu.THREADING_THRESHOLD
    expected = torch.empty(len(own), len(weights), dtype=torch.bfloat16)
    options: dict[str, Any] = {"first_tile": 3, "distribution": distribution}
    reference.displace(weights, THREE, own, out=expected, **options)
    for threads in (1, 2, 3, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=threads: count)
        found = torch.full_like(expected, 77.0)
        kernels.displace(weights, THREE, own, out=found, **options)
        np.testing.assert_array_equal(bits(found), bits(expected))


def test_pieces_that_do_not_fit_are_refused() -> None:
    weights, out = torch.zeros(100), torch.zeros(1, 30)
    for starts in ([80], [-1], [0, 1, 2, 3]):
        with pytest.raises(ValueError, match="do not lie within 100"):
            kernels.displace(
                weights, NO_STEPS, [ONE], first_tile=0, distribution=Distribution.GAUSSIAN,
                out=out, starts=np.array(starts),
            )  # fmt: skip
    with pytest.raises(ValueError, match="2 rounds up to step 2 of 3"):
        cpu.commit(
            weights.numpy(), THREE.seeds, THREE.coefficients, first_tile=0, ends=(1, 2),
            distribution=Distribution.GAUSSIAN, out=weights.numpy(), decays=(1.0, 1.0),
        )  # fmt: skip
