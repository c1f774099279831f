"""Starts the Triton kernels: shapes of programs, plans on the device, and compiled kernels.

`ops` alone calls what is here; importing this module needs Triton. The kernels themselves are in
`triton_kernels`.
"""

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from numpy.typing import NDArray

from fedforward.core.steps import Steps, Update
from fedforward.directions.spec import TILE, Distribution, Stream, half_normal_table
from fedforward.directions.triton_kernels import commit_kernel, displace_kernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FIRST = bytes(8)


class Shape(NamedTuple):
    """How a program's coordinates lie in its tensors of shape [8, 256 / lanes, tiles * lanes].

    Place [h, q, l] is the coordinate at offset 256 h + lanes q + l mod lanes of tile l // lanes.
    The last dimension is as long as there are threads or longer, and the other two lie in a
    thread's registers.

    Attributes:
        tiles: tiles of a program.
        lanes: neighbouring coordinates of a tile in the last dimension, a power of two from 16 to
            256. A Rademacher tile takes 16 calls: with 16 lanes every thread makes its own words,
            with 32 or 64 two or four threads make the same ones, and each holds fewer sums.
        warps: warps of a program; 32 * warps divides tiles * lanes.
    """

    tiles: int
    lanes: int
    warps: int


#: By distribution and by whether the kernel has more than the sums to hold: dither, or more rows.
#: Measured on an H200; the bits do not depend on them.
SHAPES = {
    (Distribution.RADEMACHER, False): Shape(2, 16, 1),
    (Distribution.RADEMACHER, True): Shape(1, 128, 2),
    (Distribution.GAUSSIAN, False): Shape(1, 128, 4),
    (Distribution.GAUSSIAN, True): Shape(1, 256, 4),
}
#: Of Rademacher commits with dither whose updates have few steps each: what threads make in common
#: matters less than how many of them there are. As many tiles as above.
SHAPE_OF_FEW = Shape(1, 256, 4)
FEW = 8


def accumulate(
    weights: torch.Tensor,
    seeds: NDArray[np.uint64],
    coefficients: NDArray[np.float32],
    *,
    first_tile: int,
    distribution: Distribution,
    out: torch.Tensor,
    decay: float = 1.0,
    dither_seed: int | None = None,
    stream: Stream = Stream.DIRECTION,
) -> None:
    """`fedforward.directions.ops.accumulate` for tensors on a CUDA device.

    Raises:
        ValueError: a tensor is not contiguous, or sizes or devices do not fit.
        TypeError: a dtype is not one of those that `ops.accumulate` lists.
    """
    _check(weights, out, weights.numel())
    update = Update(Steps(seeds, coefficients), dither_seed or 0, decay)
    # The arrays are the caller's, so that nothing is known of them by whose they are.
    there = _updating.__wrapped__((update,), weights.device, _stream_of(weights))
    dithered = dither_seed is not None
    _run_updates(weights, out, there, first_tile, distribution, stream, dithered, None)


def commit(
    weights: torch.Tensor,
    updates: Sequence[Update],
    *,
    first_tile: int,
    distribution: Distribution,
) -> int:
    """Apply updates to `weights` in place and in order, in one pass over them.

    After each the weights are rounded to their dtype: half precisions stochastically, with that
    update's dither seed.

    Args:
        weights: as for `accumulate`.
        updates: any number of them.
        first_tile: where the tensor begins in the tunable space.
        distribution: of the coordinates of z.

    Returns:
        How many coordinates the last update changed, which waits for the device; 0 in float32.

    Raises:
        ValueError, TypeError: as `accumulate`.
    """
    return commit_all([(weights, first_tile, updates)], distribution)


def commit_all(
    parts: Sequence[tuple[torch.Tensor, int, Sequence[Update]]], distribution: Distribution
) -> int:
    """`commit` for many tensors, each with its own updates, and a single wait for the device.

    Args:
        parts: of each tensor the weights, where it begins in the tunable space, and its updates.

    Returns:
        The sum of what `commit` returns.

    Raises:
        ValueError, TypeError: as `accumulate`.
    """
    launched = [part for part in parts if part[2] and part[0].numel()]
    for weights, _, _ in launched:
        _check(weights, weights, weights.numel())
    counting = [part for part in launched if part[0].dtype is not torch.float32]
    programs: dict[torch.device, int] = {}
    for weights, _, _ in counting:
        own = _programs(weights.numel(), SHAPES[distribution, True])
        programs[weights.device] = programs.get(weights.device, 0) + own
    counts = {
        device: torch.empty(number, dtype=torch.int32, device=device)
        for device, number in programs.items()
    }
    free = dict(counts)
    for weights, first_tile, updates in launched:
        changed = None
        if weights.dtype is not torch.float32:
            own = _programs(weights.numel(), SHAPES[distribution, True])
            changed, free[weights.device] = free[weights.device].tensor_split((own,))
        _run_updates(
            weights,
            weights,
            _updating(tuple(updates), weights.device, _stream_of(weights)),
            first_tile,
            distribution,
            Stream.DIRECTION,
            True,
            changed,
        )
    return sum(int(changed.sum()) for changed in counts.values())


def displace(
    weights: torch.Tensor,
    trajectory: Steps,
    perturbations: Sequence[Steps],
    *,
    first_tile: int,
    distribution: Distribution,
    out: torch.Tensor,
    starts: torch.Tensor | Sequence[int] | None = None,
) -> None:
    """out[g] = round(weights + Σ trajectory + Σ perturbations[g]), to nearest, for all g at once.

    The sum over the trajectory is made once, and z once for two neighbouring perturbations of one
    step each with the same seed (the two sides of a finite difference).

    Args:
        weights: as for `accumulate`; only read.
        trajectory: steps that all rows of `out` share; they are added first.
        perturbations: G of them, each a row's own steps; any may be empty.
        first_tile: where the tensor begins in the tunable space.
        distribution: of the coordinates of z.
        out: contiguous [G, …] with n elements a row, any of the three dtypes; not `weights`.
        starts: int64 [S], where in the flat tensor S pieces of n // S coordinates begin, one after
            the other in a row of `out`. They may overlap and need no alignment; on the device
            they are not checked, and what is outside the tensor counts as 0. None: one piece
            from 0.

    Raises:
        ValueError, TypeError: as `accumulate`; or pieces that do not fit.
    """
    rows = len(perturbations)
    if rows == 0 or out.numel() == 0:
        return
    _check(weights, out, None)
    total, left = divmod(out.numel(), rows)
    pieces = 1 if starts is None else len(starts)
    length = total // pieces if pieces else 0
    if left or pieces == 0 or length * pieces != total or out.shape[0] != rows:
        raise ValueError(
            f"out has shape {tuple(out.shape)}: it must be [{rows}, n] for {rows} perturbations, "
            f"and n a multiple of the {pieces} pieces"
        )
    device, stream = weights.device, _stream_of(weights)
    if isinstance(starts, torch.Tensor):
        # Where they begin is known on the device alone: so many tiles a piece can touch.
        tiles_per_piece = (length - 1 + TILE - 1) // TILE + 1
        on_device = starts.to(device, torch.int64, non_blocking=True).contiguous()
    else:
        places = _FIRST
        first = last = within = 0
        if starts is not None:
            begins = np.asarray(starts, np.int64)
            places = begins.tobytes()
            first, last = int(begins.min()), int(begins.max())
            within = int((begins % TILE).max())
        if first < 0 or last + length > weights.numel():
            raise ValueError(
                f"pieces of {length} coordinates begin at {first} to {last}: they "
                f"must lie within the tensor's {weights.numel()}"
            )
        tiles_per_piece = (within + length - 1) // TILE + 1
        on_device = _copied(places, device, stream)

    there = _displacing(trajectory, tuple(perturbations), device, stream)
    shape = SHAPES[distribution, True]
    _launch(
        displace_kernel,
        _programs(TILE * pieces * tiles_per_piece, shape),
        weights,
        (weights, out, on_device, there.steps, there.singles, there.lists, _table(device)),
        (
            weights.numel(),
            first_tile,
            pieces,
            length,
            tiles_per_piece,
            there.trajectory,
            there.single_count,
            there.list_count,
        ),
        (distribution is Distribution.GAUSSIAN, there.list_count > 0),
        shape,
    )


def _run_updates(
    weights: torch.Tensor,
    out: torch.Tensor,
    there: "_Updating",
    first_tile: int,
    distribution: Distribution,
    stream: Stream,
    dithered: bool,
    changed: torch.Tensor | None,
) -> None:
    """Launch `commit_kernel`; float32 is never rounded, so its dither is not generated."""
    if weights.numel() == 0:
        return
    dithered = dithered and out.dtype is not torch.float32
    shape = SHAPES[distribution, dithered]
    if dithered and there.step_count <= FEW * there.update_count:
        shape = SHAPE_OF_FEW
    _launch(
        commit_kernel,
        _programs(weights.numel(), shape),
        weights,
        (
            weights,
            out,
            there.updates,
            there.steps,
            _table(weights.device),
            there.updates if changed is None else changed,
        ),
        (weights.numel(), first_tile, there.update_count, int(stream)),
        (distribution is Distribution.GAUSSIAN, dithered, changed is not None),
        shape,
    )


def _programs(coordinates: int, shape: Shape) -> int:
    return -(-coordinates // (TILE * shape.tiles))


#: By kernel, device, dtypes, integers that need 64 bits, and what is decided by the compiler.
_compiled: dict[tuple[Any, ...], Any] = {}


def _launch(
    kernel: Any,
    programs: int,
    weights: torch.Tensor,
    tensors: tuple[torch.Tensor, ...],
    numbers: tuple[int, ...],
    decided: tuple[bool, ...],
    shape: Shape,
) -> None:
    """Start a kernel on the device of `weights` and its current stream.

    Triton's own way to a compiled kernel looks at every argument each time. Of ours only the
    dtypes of weights and out differ, and whether an integer needs 64 bits.
    """
    int64s = max(numbers) >> 31 and tuple([number >> 31 != 0 for number in numbers])
    key = (
        kernel,
        weights.get_device(),
        weights.dtype,
        tensors[1].dtype,
        int64s,
        decided,
        shape,
    )
    constants = (*decided, shape.tiles, shape.lanes)
    with torch.cuda.device_of(weights):
        known = _compiled.get(key)
        if known is not None:
            known[programs, 1, 1](*tensors, *numbers, *constants)
            return
        plain = [tensor.detach() for tensor in tensors]
        made = kernel[(programs,)](*plain, *numbers, *constants, **_options(shape))
        # The interpreter compiles nothing.
        if isinstance(made, triton.compiler.CompiledKernel):
            _compiled[key] = made


def _options(shape: Shape) -> dict[str, Any]:
    """Product and sum stay two roundings; loads in loops are not copied to shared memory ahead."""
    return {"num_warps": shape.warps, "num_stages": 1, "enable_fp_fusion": False}


def _check(weights: torch.Tensor, out: torch.Tensor, size: int | None) -> None:
    for name, tensor in (("weights", weights), ("out", out)):
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} is {tensor.dtype}: it must be float32, bfloat16 or float16")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}: it must be contiguous")
    if out.device != weights.device:
        raise ValueError(f"weights are on {weights.device}, out on {out.device}")
    if size is not None and out.numel() != size:
        raise ValueError(f"{size} weights into {out.numel()}: the numbers must be equal")


def _pairs(steps: Steps) -> NDArray[np.int64]:
    """int64 [K, 2]: the bits of the seeds and of the coefficients."""
    seeds, coefficients = steps.seeds, steps.coefficients
    if len(seeds) != len(coefficients):
        raise ValueError(
            f"{len(seeds)} seeds with {len(coefficients)} coefficients: the numbers must be equal"
        )
    if seeds.dtype != np.uint64 or coefficients.dtype != np.float32:
        raise TypeError(f"seeds are {seeds.dtype}, coefficients {coefficients.dtype}")
    return np.stack((seeds.view(np.int64), coefficients.view(np.int32).astype(np.int64)), axis=1)


def _rows(
    trajectory: Steps, perturbations: Sequence[Steps]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """What `displace_kernel` reads: all steps, single-step rows with their twins, other rows."""
    steps = [_pairs(trajectory)]
    singles: list[list[int]] = []
    lists: list[list[int]] = []
    count, previous = len(trajectory), -1
    for row, perturbation in enumerate(perturbations):
        own = _pairs(perturbation)
        if len(own) != 1:
            lists.append([row, count, count + len(own)])
            steps.append(own)
            count += len(own)
            continue
        seed, coefficient = own[0].tolist()
        last = singles[-1] if singles else None
        if last is not None and previous == row - 1 and last[0] == seed and last[4] < 0:
            last[3:] = [coefficient, row]
        else:
            singles.append([seed, coefficient, row, 0, -1])
        previous = row
    return np.concatenate(steps), np.array(singles, np.int64), np.array(lists, np.int64)


class _Displacing(NamedTuple):
    """What `displace_kernel` reads of its steps, on the device."""

    steps: torch.Tensor
    singles: torch.Tensor
    lists: torch.Tensor
    trajectory: int
    single_count: int
    list_count: int


@lru_cache(maxsize=64)
def _displacing(
    trajectory: Steps, perturbations: tuple[Steps, ...], device: torch.device, stream: int
) -> _Displacing:
    """All tensors of a block are displaced by the same objects, which say so by being the same."""
    rows = _rows(trajectory, perturbations)
    steps, singles, lists = (_numbers(part, device, stream) for part in rows)
    return _Displacing(steps, singles, lists, len(trajectory), len(rows[1]), len(rows[2]))


class _Updating(NamedTuple):
    """What `commit_kernel` reads of its updates, on the device."""

    updates: torch.Tensor
    steps: torch.Tensor
    update_count: int
    step_count: int


@lru_cache(maxsize=64)
def _updating(updates: tuple[Update, ...], device: torch.device, stream: int) -> _Updating:
    """As `_displacing`."""
    ends = np.cumsum([len(update.steps) for update in updates]).tolist()
    plan = np.array(
        [
            (end - len(update.steps), end, _signed(update.dither_seed), _bits(update.decay))
            for update, end in zip(updates, ends, strict=True)
        ],
        np.int64,
    )
    steps = np.concatenate([_pairs(update.steps) for update in updates])
    there = _numbers(plan, device, stream), _numbers(steps, device, stream)
    return _Updating(*there, len(updates), len(steps))


def _bits(value: float) -> int:
    return int(np.float32(value).view(np.int32))


def _signed(seed: int) -> int:
    """The int64 with the bits of a 64-bit seed."""
    return seed - (1 << 64) if seed >> 63 else seed


def _numbers(array: NDArray[np.int64], device: torch.device, stream: int) -> torch.Tensor:
    """The numbers on the device; a kernel that reads none still gets a pointer."""
    return _copied(array.tobytes() or bytes(8), device, stream)


@lru_cache(maxsize=64)
def _copied(data: bytes, device: torch.device, stream: int) -> torch.Tensor:
    """int64 on the device, the same for all tensors of a model; ordered within its stream."""
    return torch.frombuffer(bytearray(data), dtype=torch.int64).to(device, non_blocking=True)


def _stream_of(tensor: torch.Tensor) -> int:
    if not tensor.is_cuda:
        return 0
    stream: int = triton.runtime.driver.active.get_current_stream(tensor.get_device())
    return stream


@cache
def _table(device: torch.device) -> torch.Tensor:
    return torch.from_numpy(half_normal_table().copy()).to(device)
