"""The Triton kernels equal the reference bit for bit, on a CUDA device or in Triton's interpreter.

Where there is no device, one test runs the others of this file in processes of their own, with the
kernels interpreted on tensors in main memory.
"""

import importlib.metadata
import importlib.util
import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedforward.core.steps import NO_STEPS, Steps, Update
from fedforward.directions import TILE, Distribution, Stream, reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
SIZES = (1, 63, TILE - 1, TILE, TILE + 1, 5000)
FIRST_TILES = (0, 7, 2**32 - 2, 2**40 + 3, 2**62 + 2**33 - 1)

on_device = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (INTERPRETED or torch.cuda.is_available()), reason="no CUDA device, not interpreted"
    ),
]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
by_half = pytest.mark.parametrize("dtype", DTYPES[1:], ids=NAMES.get)
by_distribution = pytest.mark.parametrize("distribution", Distribution)


@pytest.fixture(scope="module")
def cuda() -> Any:
    from fedforward.directions import triton_launch as cuda

    return cuda


def bits(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The bits of each element, the same for every NaN."""
    tensor = tensor.cpu()
    tensor = torch.where(tensor.isnan(), torch.full_like(tensor, torch.nan), tensor)
    return tensor.contiguous().view(torch.uint8).numpy()


def some_weights(size: int, dtype: torch.dtype) -> torch.Tensor:
    """Ordinary weights, and among them zeros, subnormals, infinities, NaN and the largest."""
    random = np.random.default_rng(size)
    ordinary = random.standard_normal(size) * 10.0 ** random.uniform(-6, 1, size)
    special = [0.0, -0.0, 1e-40, -3e-41, 1e-45, 2e-8, -6e-8, 6.0e-5, 65504.0, -65519.0, 65520.0]
    special += [65535.9, -65536.0, 3.4e38, -3.39e38, np.inf, -np.inf, np.nan, 1.1754944e-38]
    mixed = np.where(random.random(size) < 0.2, random.choice(special, size), ordinary)
    with np.errstate(over="ignore"):
        return torch.from_numpy(mixed.astype(np.float32)).to(dtype)


def some_steps(count: int, salt: int = 0) -> Steps:
    random = np.random.default_rng((count, salt))
    seeds = random.integers(0, 2**64, count, dtype=np.uint64)
    seeds[1::3] |= np.uint64(2**63)
    seeds[2::3] |= np.uint64(2**31)
    coefficients = random.standard_normal(count) * 10.0 ** random.uniform(-8, 0, count)
    return Steps(seeds, coefficients.astype(np.float32))


def expected(
    weights: torch.Tensor, steps: Steps, dtype: torch.dtype, **options: Any
) -> torch.Tensor:
    out = torch.full_like(weights, 77.0, dtype=dtype)
    reference.accumulate(weights, steps.seeds, steps.coefficients, out=out, **options)
    return out


def same(
    cuda: Any, weights: torch.Tensor, steps: Steps, dtype: torch.dtype, **options: Any
) -> None:
    out = torch.full_like(weights, 77.0, dtype=dtype, device=DEVICE)
    moved = weights.to(DEVICE, copy=True)
    cuda.accumulate(moved, steps.seeds, steps.coefficients, out=out, **options)
    wanted = expected(weights, steps, dtype, **options)
    message = f"{weights.shape} {weights.dtype} {dtype} {options}"
    np.testing.assert_array_equal(bits(out), bits(wanted), err_msg=message)
    np.testing.assert_array_equal(bits(moved), bits(weights), err_msg="the weights are only read")


class TestAccumulate:
    pytestmark = on_device

    @by_distribution
    @by_dtype
    def test_dtypes_and_sizes(
        self, cuda: Any, dtype: torch.dtype, distribution: Distribution
    ) -> None:
        for number, (out, dither) in enumerate(itertools.product(DTYPES, (None, 2**64 - 5))):
            for size in SIZES if out is dtype else (TILE + 1,):
                same(
                    cuda,
                    some_weights(size, dtype),
                    some_steps(3),
                    out,
                    first_tile=FIRST_TILES[number % 5],
                    distribution=distribution,
                    dither_seed=dither,
                    decay=(1.0, 0.9)[number % 2],
                )

    @by_distribution
    @pytest.mark.parametrize("count", (0, 1, 9, 130))
    def test_any_number_of_seeds(self, cuda: Any, count: int, distribution: Distribution) -> None:
        for dtype, dither in ((torch.float32, None), (torch.bfloat16, 3))[count > 9 :]:
            same(
                cuda,
                some_weights(63 if count > 9 else TILE + 1, dtype),
                some_steps(count),
                dtype,
                first_tile=2,
                distribution=distribution,
                dither_seed=dither,
            )

    @by_distribution
    @pytest.mark.parametrize("first_tile", FIRST_TILES)
    def test_first_tiles(self, cuda: Any, first_tile: int, distribution: Distribution) -> None:
        for dither in (None, 2**63):
            same(
                cuda,
                torch.zeros(3 * TILE + 5),
                some_steps(3),
                torch.float16,
                first_tile=first_tile,
                distribution=distribution,
                dither_seed=dither,
            )

    @by_distribution
    @pytest.mark.parametrize("stream", Stream)
    def test_streams(self, cuda: Any, stream: Stream, distribution: Distribution) -> None:
        same(
            cuda,
            torch.zeros(70),
            some_steps(2),
            torch.float32,
            first_tile=1,
            distribution=distribution,
            stream=stream,
        )

    @by_dtype
    def test_in_place(self, cuda: Any, dtype: torch.dtype) -> None:
        weights, steps = some_weights(5000, dtype).view(50, 100), some_steps(4)
        options: dict[str, Any] = {"first_tile": 3, "distribution": Distribution.RADEMACHER}
        own = weights.to(DEVICE, copy=True)
        cuda.accumulate(own, steps.seeds, steps.coefficients, out=own, dither_seed=8, **options)
        wanted = expected(weights, steps, dtype, dither_seed=8, **options)
        np.testing.assert_array_equal(bits(own), bits(wanted))

    @by_distribution
    def test_a_view_into_a_larger_tensor(self, cuda: Any, distribution: Distribution) -> None:
        whole = torch.zeros(3000, dtype=torch.bfloat16, device=DEVICE)
        steps = some_steps(2)
        options: dict[str, Any] = {"first_tile": 0, "distribution": distribution}
        part = whole[501:2990]
        cuda.accumulate(part, steps.seeds, steps.coefficients, out=part, **options)
        wanted = torch.zeros(3000, dtype=torch.bfloat16)
        wanted[501:2990] = expected(torch.zeros(2489), steps, torch.bfloat16, **options)
        np.testing.assert_array_equal(bits(whole), bits(wanted))

    @by_distribution
    def test_every_rounding_counts(self, cuda: Any, distribution: Distribution) -> None:
        """Coefficients for which order, and each of the two roundings, change the result."""
        random = np.random.default_rng(7)
        scale = 2.0 ** random.integers(-12, 3, 21)
        coefficients = (random.standard_normal(21) * scale).astype(np.float32)
        seeds = random.integers(0, 2**64, 21, dtype=np.uint64)
        weights = torch.from_numpy(random.standard_normal(TILE + 50).astype(np.float32))
        steps = Steps(seeds, coefficients)
        options: dict[str, Any] = {"first_tile": 0, "distribution": distribution}
        same(cuda, weights, steps, torch.float32, decay=0.99, **options)
        turned = Steps(seeds[::-1].copy(), coefficients[::-1].copy())
        forward, backward = (
            expected(weights, s, torch.float32, **options) for s in (steps, turned)
        )
        assert (forward != backward).float().mean() > 0.1

    @by_distribution
    def test_subnormals_and_overflow(self, cuda: Any, distribution: Distribution) -> None:
        for coefficient in (3e-42, 1e-45, -2e-39, 3e38, -0.0, 0.0):
            steps = Steps.of([4, 2**63 + 1, 4], [coefficient] * 3)
            for weight in (0.0, -0.0, 1e-40, -3.3e38):
                weights = torch.full((130,), weight)
                options: dict[str, Any] = {"first_tile": 0, "distribution": distribution}
                same(cuda, weights, steps, torch.float32, **options)
        same(cuda, torch.full((9,), 1.2e-38), NO_STEPS, torch.float32, decay=0.5, **options)

    @by_half
    @pytest.mark.parametrize("dither", (None, 2**63 + 9))
    def test_rounding_at_every_number_and_tie(
        self, cuda: Any, dtype: torch.dtype, dither: int | None
    ) -> None:
        every = torch.from_numpy(np.arange(1 << 15, dtype=np.int16)).view(dtype).float()
        every = every[every.isfinite()].numpy()
        ties = (every[:-1] + (every[1:] - every[:-1]) / 2).view(np.uint32)
        random = np.random.default_rng(1).integers(0, 2**32, 20000, dtype=np.uint32)
        small = np.random.default_rng(2).integers(0x2F000000, 0x39000000, 5000).astype(np.uint32)
        limits = np.array([0x477FDFFF, 0x477FE000, 0x477FEFFF, 0x477FF000, 0x477FFFFF], np.uint32)
        limits = np.concatenate((limits, limits + 1, [0x7F7FFFFF, 0x7F7F8000, 0x7F7F7FFF]))
        limits = np.repeat(limits.astype(np.uint32), 200)
        near = np.concatenate((ties - 1, ties, ties + 1)) if dither is None else ties[::3]
        values = np.concatenate((near, near | np.uint32(1 << 31), random, small, limits))
        weights = torch.from_numpy(values.view(np.float32))
        options: dict[str, Any] = {"first_tile": 5, "distribution": Distribution.GAUSSIAN}
        same(cuda, weights, NO_STEPS, dtype, dither_seed=dither, **options)

    def test_what_does_not_fit_is_refused(self, cuda: Any) -> None:
        options: dict[str, Any] = {"first_tile": 0, "distribution": Distribution.GAUSSIAN}
        weights = torch.zeros(10, device=DEVICE)
        one = (np.zeros(1, np.uint64), np.ones(1, np.float32))
        for first, second, error in (
            (weights.double(), weights, TypeError),
            (weights, weights.int(), TypeError),
            (torch.zeros(20, device=DEVICE)[::2], weights, ValueError),
            (weights, torch.zeros(11, device=DEVICE), ValueError),
        ):
            with pytest.raises(error):
                cuda.accumulate(first, *one, out=second, **options)
        with pytest.raises(ValueError, match="the numbers must be equal"):
            cuda.accumulate(weights, one[0], np.ones(2, np.float32), out=weights, **options)
        with pytest.raises(TypeError, match="seeds are"):
            cuda.accumulate(weights, one[0].astype(np.int64), one[1], out=weights, **options)
        empty = torch.zeros(0, device=DEVICE)
        cuda.accumulate(empty, *one, out=empty, **options)


class TestCommit:
    pytestmark = on_device

    @by_distribution
    @by_dtype
    def test_rounds_in_one_pass(
        self, cuda: Any, dtype: torch.dtype, distribution: Distribution
    ) -> None:
        """As many commits with the reference, one after the other, and what the last changed."""
        for counts, size in (((2,), 63), ((0, 3), 5000), ((3, 1, 0, 4), TILE + 1), ((1, 0), 700)):
            updates = [
                Update(some_steps(count, number), 2**64 - 1 - number, (1.0, 0.97)[number % 2])
                for number, count in enumerate(counts)
            ]
            options: dict[str, Any] = {"first_tile": 2**32 - 1, "distribution": distribution}
            weights = some_weights(size, dtype)
            found = weights.to(DEVICE, copy=True)
            changed = cuda.commit(found, updates, **options)
            wanted = before = weights
            for update in updates:
                before = wanted
                wanted = expected(
                    before,
                    update.steps,
                    dtype,
                    decay=update.decay,
                    dither_seed=update.dither_seed,
                    **options,
                )
            np.testing.assert_array_equal(bits(found), bits(wanted), err_msg=f"{counts} {size}")
            counted = dtype is not torch.float32
            assert changed == int((wanted != before).sum()) * counted

    def test_the_count_is_that_of_the_framework(self, cuda: Any) -> None:
        """NaN differs from itself; -0 equals 0; nothing else of an idle update counts."""
        numbers = [0.0, -0.0, 1.0, torch.nan, torch.inf]
        weights = torch.tensor(numbers, dtype=torch.bfloat16, device=DEVICE)
        options: dict[str, Any] = {"first_tile": 0, "distribution": Distribution.RADEMACHER}
        idle = Update(NO_STEPS, 1)
        assert cuda.commit(weights, [idle], **options) == 1
        assert cuda.commit(weights, [idle, Update(Steps.of([3], [0.5]), 2)], **options) == 4
        assert cuda.commit(weights, [], **options) == 0
        assert cuda.commit(weights[:0], [idle], **options) == 0
        assert weights.cpu()[:3].abs().tolist() in ([0.5, 0.5, 0.5], [0.5, 0.5, 1.5])

    @by_distribution
    def test_many_tensors_at_once(self, cuda: Any, distribution: Distribution) -> None:
        """The bits and the count of one after the other, whatever their dtypes and updates."""
        both = [Update(some_steps(2), 5, 0.9), Update(some_steps(1, 3), 6)]
        cases = [
            (some_weights(TILE + 1, torch.bfloat16), 3, both),
            (some_weights(700, torch.float32), 2**40, both),
            (some_weights(63, torch.float16), 9, both[1:]),
            (some_weights(5, torch.float16), 10, []),
            (some_weights(0, torch.float16), 11, both),
        ]
        parts = [(w.to(DEVICE, copy=True), first_tile, own) for w, first_tile, own in cases]
        changed = cuda.commit_all(parts, distribution)
        wanted = 0
        for (weights, first_tile, updates), (found, *_) in zip(cases, parts, strict=True):
            wanted += reference.commit(
                weights, updates, first_tile=first_tile, distribution=distribution
            )
            np.testing.assert_array_equal(bits(found), bits(weights))
        assert changed == wanted
        assert cuda.commit_all([], distribution) == 0


class TestDisplace:
    pytestmark = on_device

    def same(
        self,
        cuda: Any,
        weights: torch.Tensor,
        trajectory: Steps,
        perturbations: Sequence[Steps],
        dtype: torch.dtype,
        starts: Sequence[int] | None = None,
        length: int | None = None,
        **options: Any,
    ) -> None:
        length = weights.numel() if length is None else length
        begins = [0] if starts is None else starts
        wanted = torch.stack(
            [
                torch.cat([row[begin : begin + length] for begin in begins])
                for row in (
                    expected(weights, trajectory + p, dtype, **options) for p in perturbations
                )
            ]
        )
        given: list[Any] = [starts]
        if starts is not None:
            given.append(torch.tensor(starts, dtype=torch.int64, device=DEVICE))
        for places in given:
            out = torch.full_like(wanted, 77.0, device=DEVICE)
            there = weights.to(DEVICE)
            cuda.displace(there, trajectory, perturbations, out=out, starts=places, **options)
            np.testing.assert_array_equal(bits(out), bits(wanted), err_msg=f"{places} {dtype}")

    @by_distribution
    @by_dtype
    def test_pairs_and_others(
        self, cuda: Any, dtype: torch.dtype, distribution: Distribution
    ) -> None:
        a, b = some_steps(1, 1), some_steps(1, 2)
        minus_a, minus_b = (Steps(s.seeds, -s.coefficients) for s in (a, b))
        pairs = [a, minus_a, b, minus_b]
        others = [a, b, NO_STEPS, minus_b, b, b, some_steps(3), some_steps(2), a, NO_STEPS, minus_a]
        for (size, trajectory), perturbations in itertools.product(
            ((5000, some_steps(2)), (63, NO_STEPS)), (pairs, others, [NO_STEPS], [b], [b, b, b])
        ):
            self.same(
                cuda,
                some_weights(size, dtype),
                trajectory,
                perturbations,
                dtype,
                first_tile=2**32 - 2,
                distribution=distribution,
            )

    @by_distribution
    def test_out_may_have_another_dtype(self, cuda: Any, distribution: Distribution) -> None:
        a = some_steps(1)
        options: dict[str, Any] = {"first_tile": 0, "distribution": distribution}
        for source, target in itertools.permutations(DTYPES, 2):
            self.same(cuda, some_weights(300, source), some_steps(2), [a, a], target, **options)

    @by_distribution
    @pytest.mark.parametrize(
        ("length", "starts"),
        (
            (7, (0, 14, 14, 7, 9993, 2044, 2041)),
            (300, (300, 9600, 1900, 300)),
            (TILE, (0, TILE, 3 * TILE)),
            (TILE, (1, 2047, TILE)),
            (5000, (4999,)),
            (1, (2047, 2048, 0)),
        ),
    )
    def test_pieces(
        self, cuda: Any, length: int, starts: tuple[int, ...], distribution: Distribution
    ) -> None:
        a, b = some_steps(1, 1), some_steps(2, 2)
        self.same(
            cuda,
            some_weights(10_000, torch.bfloat16),
            some_steps(2),
            [a, Steps(a.seeds, -a.coefficients), b],
            torch.bfloat16,
            list(starts),
            length,
            first_tile=11,
            distribution=distribution,
        )

    def test_what_does_not_fit_is_refused(self, cuda: Any) -> None:
        options: dict[str, Any] = {"first_tile": 0, "distribution": Distribution.GAUSSIAN}
        weights, out = torch.zeros(10, device=DEVICE), torch.zeros(2, 10, device=DEVICE)
        a = some_steps(1)
        with pytest.raises(ValueError, match=r"it must be \[3, n\]"):
            cuda.displace(weights, NO_STEPS, [a, a, a], out=out, **options)
        with pytest.raises(ValueError, match="multiple of the 3 pieces"):
            cuda.displace(weights, NO_STEPS, [a, a], out=out, starts=[0, 1, 2], **options)
        with pytest.raises(ValueError, match="within the tensor's 10"):
            cuda.displace(weights, NO_STEPS, [a, a], out=out, starts=[0, 6], **options)
        cuda.displace(weights, NO_STEPS, [], out=out[:0], **options)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no CUDA device")
@by_distribution
def test_more_coordinates_than_32_bits_count(cuda: Any, distribution: Distribution) -> None:
    size, tail = 2**32 + 5000, 2**32 - TILE
    if torch.cuda.mem_get_info()[0] < 5 * size:
        pytest.skip("needs 20 GiB on the device")
    weights = torch.zeros(size, dtype=torch.bfloat16, device=DEVICE)
    end = torch.from_numpy(np.random.default_rng(0).standard_normal(size - tail))
    weights[tail:] = end.to(torch.bfloat16)
    before = weights[tail:].cpu()
    options: dict[str, Any] = {"first_tile": 5, "distribution": distribution}
    there = options | {"first_tile": 5 + tail // TILE}
    a = some_steps(1)

    out = torch.zeros(1, size, dtype=torch.bfloat16, device=DEVICE)
    cuda.displace(weights, NO_STEPS, [a], out=out, **options)
    wanted = expected(before, a, torch.bfloat16, **there)
    np.testing.assert_array_equal(bits(out[0, tail:]), bits(wanted))
    rows = torch.zeros(1, 3000, dtype=torch.bfloat16, device=DEVICE)
    cuda.displace(weights, NO_STEPS, [a], out=rows, starts=[tail + 2000], **options)
    np.testing.assert_array_equal(bits(rows[0]), bits(wanted[2000:5000]))
    del out
    cuda.commit(weights, [Update(a, 9)], **options)
    wanted = expected(before, a, torch.bfloat16, dither_seed=9, **there)
    np.testing.assert_array_equal(bits(weights[tail:]), bits(wanted))


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted run")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the tests run on the device")
@pytest.mark.parametrize(
    "part",
    [
        "streams or in_place or every_rounding_counts or rounds_in_one_pass or refused",
        pytest.param("TestAccumulate", marks=pytest.mark.slow),
        pytest.param("not TestAccumulate", marks=pytest.mark.slow),
    ],
)
def test_in_the_interpreter(part: str) -> None:
    """All of the above; numpy's warnings about infinities and NaN are the interpreter's own.

    The first part is a sample of both kinds of kernels, in seconds. The others are two halves.
    """
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    release = tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])
    if release < (3, 9):
        pytest.skip(f"the interpreter of Triton {release} does not work with numpy 2.4")
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-x"]
    done = subprocess.run(
        [*command, "-W", "ignore", "-k", part, str(Path(__file__))],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
