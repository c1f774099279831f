"""LoRA tuning: many probes in one forward pass, each group of rows with its own adapter.

The adapters are PEFT's own layers, so that a run ends in a PEFT folder; only their forward pass is
replaced (see `lora_layers`). The frozen base sees one large batch; row group g meets adapter g of
the bank, a float32 buffer with one row per probe that the direction kernel fills in one pass.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from operator import is_
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedforward.core.batches import TokenBatch
from fedforward.core.errors import FedForwardError
from fedforward.core.paths import absolute_text
from fedforward.core.steps import NO_STEPS, Probe, ProbePlan, Steps, Update
from fedforward.directions import TILE, Distribution, Layout
from fedforward.directions.ops import accumulate, commit_at, displace, displace_at
from fedforward.directions.sparse_kernels import FreeCoordinates
from fedforward.models.adapters import OUTPUTS, StoredAdapter, check_initial, read_adapter
from fedforward.models.base import CausalModel
from fedforward.models.batching import Arrays, Measure, cut
from fedforward.models.blocks import class_heads, transformer_blocks
from fedforward.models.fingerprints import fingerprint
from fedforward.models.grouping import settled
from fedforward.models.loading import input_device, weights
from fedforward.models.lora_layers import (
    ADAPTER,
    FACTOR_R,
    AdapterBank,
    initial_outputs,
    initialise,
    product,
    replace_forward,
    replace_head,
    views_of,
)
from fedforward.models.pinned_files import PinnedFile, read_pinned
from fedforward.models.pretrained import allow, loaded
from fedforward.models.quantization import dequantize, is_quantized
from fedforward.models.residual_stream import residual_writers
from fedforward.models.targets import check_writers, find_targets
from fedforward.models.trial import examine, is_linear, shared_weights


class LoraModel(CausalModel):
    """A frozen base with PEFT LoRA adapters, tuned in float32.

    The head of a sequence classifier is tuned itself, in a float32 copy (PEFT's `modules_to_save`).

    Attributes:
        peft: the `PeftModel` around the network.
        flat: float32 [tiles * 2048], the storage that all tuned tensors are views of.
        trajectory_cache: sums of local steps, each with its trajectory: float32, as `flat`.
        adapted: rank, targets, blocks, factors and alignment, as a configuration says them.
        outputs: every U by its name in a file, float32 [width, r]; empty where no R is tuned.
    """

    def __init__(
        self,
        network: Any,
        *,
        rank: int,
        alpha: float,
        targets: str | Sequence[str] = "all-linear",
        factors: str = "both",
        alignment: str = "forward",
        blocks: Collection[int] | None = None,
        run_seed: int = 0,
        distribution: Distribution = Distribution.GAUSSIAN,
        plan: ProbePlan,
        adapter: StoredAdapter | None = None,
    ) -> None:
        """Inject the adapters: B = 0, and A from the initialisation stream of a direction seed.

        A is normal with variance 1/(3 · inputs), the variance of PEFT's own default.

        Args:
            network: a transformers causal language model or sequence classifier; it is changed in
                place.
            rank: LoRA r.
            alpha: LoRA α; the product BA is scaled by α / r.
            targets: names of modules; "all-linear" is every linear module that can be probed, the
                head aside (see `left_out`).
            factors: "both" tunes A and B, "B" freezes A. "R" tunes the R [r, r] of B = U R, as
                LoRA-XS does (arXiv 2405.17604), with a frozen U.
            alignment: of R: "forward" has one U [width, r] for all modules that write into the
                residual stream, and adapts no others; "backward" has one for each module.
            blocks: only modules in these transformer blocks, numbered from 0; None is all. The
                head of a sequence classifier is tuned in any case.
            run_seed: of the initial A.
            distribution: of the directions.
            plan: how probes are grouped.
            adapter: whose values the adapters begin with, in place of these.

        Raises:
            FedForwardError: no module of the model has a name in `targets`, one that has cannot be
                adapted, or there is no such block; or `adapter` does not fit.
        """
        from peft import LoraConfig, get_peft_model

        base = fingerprint(weights(network))
        heads = class_heads(network)
        if adapter is not None:
            adapter.check_settings(rank, alpha, heads)
        # These two are PEFT's to add.
        others = [name for name in heads if name not in ("classifier", "score")]
        settings = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=[],
            bias="none",
            # GPT-2's Conv1D stores its weight transposed.
            fan_in_fan_out=any(type(m).__name__ == "Conv1D" for m in network.modules()),
            task_type="SEQ_CLS" if heads else "CAUSAL_LM",
            modules_to_save=others or None,
            **({"lora_dropout": 0.0} | ({} if adapter is None else adapter.kept)),
        )
        if factors == "R" and (heads or adapter is not None):
            key = "model.head = 'classification'" if heads else "model.adapter"
            raise FedForwardError(
                f"lora.factors = 'R' is of new adapters of a causal language model, and {key} is "
                "given. Use lora.factors = 'B', or 'both'."
            )
        own_outputs = factors == "R" and alignment == "backward"
        writers = residual_writers(network) if factors == "R" and not own_outputs else None
        try:
            found, left_out = find_targets(
                network, targets, blocks, heads, examine(network), writers
            )
        except re.error:
            found, left_out = [], ""
        if writers is not None:
            check_writers(network, targets, found, writers, left_out)
        if not found:
            linear = sorted(
                {n.rsplit(".", 1)[-1] for n, m in network.named_modules() if is_linear(m)}
            )
            raise FedForwardError(
                f"lora.targets = {targets!r} does not fit this model. Its linear modules are "
                f"{', '.join(linear)}; 'all-linear' takes all of them that can be probed, but the "
                "head."
            )
        settings.target_modules = found
        self.peft = get_peft_model(network, settings, autocast_adapter_dtype=True)
        self.peft.eval()
        device = input_device(network)
        for layer in self.peft.modules():
            # Beside a weight that waits in host memory PEFT leaves the factors without storage.
            if hasattr(layer, "lora_A") and layer.lora_A[ADAPTER].weight.is_meta:
                layer.lora_A.to_empty(device=device)
                layer.lora_B.to_empty(device=device)
        adapters = {
            name.replace(f".{ADAPTER}.", "."): parameter
            for name, parameter in self.peft.named_parameters()
            if ".lora_" in name
        }
        initialise(adapters, run_seed)
        saved = f".modules_to_save.{ADAPTER}."
        self._heads = {
            name.replace(saved, "."): parameter
            for name, parameter in self.peft.named_parameters()
            if saved in name
        }
        # In the wrapper around it, the head as it was loaded lies beside its copy.
        self._base_heads = {
            name.replace(".original_module.", "."): parameter
            for name, parameter in self.peft.named_parameters()
            if ".original_module." in name
        }
        self._begin = adapter
        if adapter is not None:
            adapter.check_tensors({**adapters, **self._heads}, targets)
            adapter.put_into({**adapters, **self._heads})
            self.adapter_digest = adapter.digest
        self._factors_r = self._with_factors_r(rank, device) if factors == "R" else {}
        tuned = {
            n: p
            for n, p in adapters.items()
            if factors == "both" or (factors == "B" and ".lora_B." in n)
        }
        tuned |= {name: factor for name, (factor, _) in self._factors_r.items()}
        tuned |= self._heads
        layout = Layout.of({name: tuple(p.shape) for name, p in tuned.items()})
        self.flat = torch.zeros(layout.tiles * TILE, dtype=torch.float32, device=device)
        self.peft.requires_grad_(False)
        for name, view in views_of(layout, [(0, self.flat)]).items():
            view.copy_(tuned[name].data)
            tuned[name].data = view
        super().__init__(network, tuned, distribution, plan, base)
        self.left_out = f"lora.targets = 'all-linear' leaves out {left_out}" if left_out else ""
        self._bank = AdapterBank()
        self.outputs = self._random_outputs(rank, run_seed, device, own_outputs)
        self._buffer = self.flat.new_empty(0)
        self._adapters = adapters
        self._run_seed = run_seed
        self._initial: PinnedFile | None = None
        self.adapted: dict[str, Any] = {
            "rank": rank,
            "targets": targets if isinstance(targets, str) else list(targets),
            "blocks": None if blocks is None else sorted(blocks),
            "factors": factors,
            **({"alignment": alignment} if factors == "R" else {}),
        }
        self._flat_mask: tuple[Any, torch.Tensor | None] = (None, None)
        self._free_parts: tuple[Any, dict[tuple[int, int], FreeCoordinates]] = (None, {})
        self.trajectory_cache: list[tuple[Steps, torch.Tensor]] = []
        self._live: set[int] = set()
        self._filled: list[Steps] = []
        self._last_factors: dict[int, torch.Tensor] = {}
        inside = {id(m) for block in transformer_blocks(network) for m in block.modules()}
        for name, layer in self.peft.named_modules():
            if hasattr(layer, "lora_A") and hasattr(layer, "base_layer"):
                # Beyond its blocks a classifier may have pooled a row's tokens.
                replace_forward(self._bank, name, layer, bool(heads) and id(layer) not in inside)
            elif f"{name}.".endswith(saved):
                replace_head(self._bank, name.removesuffix(saved[:-1]), layer)

    def _with_factors_r(
        self, rank: int, device: torch.device
    ) -> dict[str, tuple[torch.nn.Parameter, torch.nn.Parameter]]:
        """Give every adapter an R = 0; by name, that and the B = U R that it makes."""
        found = {}
        for name, layer in self.peft.named_modules():
            if hasattr(layer, "lora_A") and hasattr(layer, "base_layer"):
                factor = torch.nn.Parameter(torch.zeros((rank, rank), device=device))
                layer.register_parameter(FACTOR_R, factor)
                found[f"{name}.lora_R.weight"] = (factor, layer.lora_B[ADAPTER].weight)
        return found

    def _random_outputs(
        self, rank: int, run_seed: int, device: torch.device, own: bool
    ) -> dict[str, torch.Tensor]:
        """A random U for all R, or one for each (`own`); by name, and for the bank by R."""
        found: dict[str, torch.Tensor] = {}
        tile = 0
        for name, (factor, b) in self._factors_r.items():
            key = name.replace(".lora_R.", ".lora_U.") if own else OUTPUTS
            if key not in found:
                found[key] = initial_outputs(b.shape[0], rank, run_seed, device, tile)
                tile += -(-b.numel() // TILE)
            self._bank.outputs[id(factor)] = found[key]
        return found

    @contextmanager
    def _without_factors_r(self) -> Iterator[None]:
        """While it is open no R is a parameter of its layer: PEFT would save it."""
        layers = [m for m in self.peft.modules() if FACTOR_R in m._parameters]
        held = [(layer, layer._parameters.pop(FACTOR_R)) for layer in layers]
        try:
            yield
        finally:
            for layer, factor in held:
                layer.register_parameter(FACTOR_R, factor)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        targets: str | Sequence[str] = "all-linear",
        factors: str = "both",
        alignment: str = "forward",
        dtype: str = "float32",
        device: str = "auto",
        quantization: str = "none",
        distribution: str = "gaussian",
        seed: int = 0,
        adapter: str | Path | None = None,
        init_file: str | Path | None = None,
    ) -> "LoraModel":
        """A model with new adapters, from a folder in Hugging Face format or a hub name.

        Args:
            path: the base model; its tokenizer comes along.
            rank: LoRA r.
            alpha: LoRA α; the product BA is scaled by α / r.
            targets: "all-linear" or names of modules.
            factors: "both" tunes A and B, "B" freezes A, "R" tunes the R of B = U R alone.
            alignment: "forward" has one U for the modules that write into the residual stream,
                "backward" one for each module; `init_file` must be of the same.
            dtype: of the frozen base: "float32", "bfloat16" or "float16".
            device: "auto", "cpu", "cuda" or "cuda:N".
            quantization: "nf4" holds the base's linear layers in 4 bits; "stored" takes a folder
                that is quantised already.
            distribution: of the directions, "gaussian" or "rademacher".
            seed: of the initial A, and of the run that is made with the model.
            adapter: a folder in PEFT format to go on from; rank, alpha and targets must be its own.
            init_file: of `fedforward align`, with the A to begin with in place of the random one.

        Raises:
            FedForwardError: there is no such model, or it does not fit.

        Example:
            >>> from importlib.resources import files
            >>> folder = files("fedforward.demo").joinpath("model")
            >>> LoraModel.from_pretrained(folder, rank=2, device="cpu").layout.parameters
            14784
        """
        if type(rank) is not int or rank < 1:
            raise FedForwardError(
                f"rank = {rank!r} is not allowed: it must be a whole number, at least 1."
            )
        if init_file is not None and adapter is not None:
            raise FedForwardError(
                f"init_file = {str(init_file)!r} and adapter = {str(adapter)!r} both give the A "
                "that the adapters begin with. Leave one of them out."
            )
        allow("distribution", distribution, tuple(Distribution))
        allow("factors", factors, ("both", "B", "R"))
        allow("alignment", alignment, ("forward", "backward"))
        allow("quantization", quantization, ("none", "nf4", "stored"))
        network, tokenizer, plan, device = loaded(
            path, dtype, device, seed, quantization=quantization
        )
        model = cls(
            network,
            rank=rank,
            alpha=alpha,
            targets=targets,
            factors=factors,
            alignment=alignment,
            run_seed=seed,
            distribution=Distribution(distribution),
            plan=plan,
            adapter=None if adapter is None else read_adapter(str(adapter)),
        )
        if init_file is not None:
            model.begin_with(
                read_pinned(str(init_file), "initial A", "lora.init_file", "fedforward align")
            )
        model.tokenizer = tokenizer
        model.plan = settled(model)
        model.settings = {
            "model": {
                "path": absolute_text(str(path)),
                "dtype": dtype,
                "quantization": quantization,
                "adapter": None if adapter is None else absolute_text(str(adapter)),
            },
            "lora": {
                "rank": rank,
                "alpha": float(alpha),
                "targets": targets if isinstance(targets, str) else list(targets),
                "factors": factors,
                "alignment": alignment,
                **(
                    {"init": "random"}
                    if init_file is None
                    else {"init": "aligned", "init_file": absolute_text(str(init_file))}
                ),
            },
            "method": {"distribution": distribution},
            "run": {"seed": seed, "device": device},
        }
        return model

    def _measured(self, probes: Sequence[Probe], measure: Measure) -> list[Arrays]:
        """See `CausalModel`. A batch too long for a forward pass is cut by rows.

        Another pass costs an adapter next to nothing, and what is worked on stays in the cache.
        """
        pieces: list[Probe] = []
        owners: list[int] = []
        for _, run in groupby(range(len(probes)), key=lambda place: id(probes[place].batch)):
            places = list(run)
            for part in self._parts(probes[places[0]].batch, len(places)):
                pieces += [replace(probes[place], batch=part) for place in places]
                owners += places
        results: list[list[Arrays]] = [[] for _ in probes]
        with self._bounded_cache(probes):
            measured = super()._measured(pieces, measure)
        for owner, result in zip(owners, measured, strict=True):
            results[owner].append(result)
        return [tuple(map(np.concatenate, zip(*parts, strict=True))) for parts in results]

    def generate(self, probes: Sequence[Probe]) -> list[NDArray[np.int64]]:
        """See `CausalModel.generate`."""
        with self._bounded_cache(probes):
            return super().generate(probes)

    @contextmanager
    def _bounded_cache(self, probes: Sequence[Probe]) -> Iterator[None]:
        """Keep one sum for each client of the call, so that their number in it bounds the memory.

        What other clients have left is dropped afterwards.
        """
        self._live = {id(probe.trajectory) for probe in probes}
        yield
        self.trajectory_cache = [e for e in self.trajectory_cache if id(e[0]) in self._live]

    def _parts(self, batch: TokenBatch, probes: int) -> list[TokenBatch]:
        """A batch cut by rows, so that the probes that share it keep to the tokens of the plan."""
        rows, length = batch.tokens.shape
        most = self.plan.tokens_per_call or rows * length * probes
        fitting = max(1, most // (length * min(probes, self.plan.probes_per_call)))
        return [batch] if fitting >= rows else cut(batch, fitting)

    def clear_cache(self) -> None:
        """See `CausalModel.clear_cache`."""
        self.trajectory_cache, self._filled, self._last_factors = [], [], {}
        self._buffer = self.flat.new_empty(0)

    def _not_offloaded(self) -> Collection[int]:
        return (self.flat.untyped_storage().data_ptr(),)

    def _rebind(self) -> None:
        """The adapters are not offloaded, so they are where they were."""

    def _start_again(self) -> None:
        if self._begin is not None:
            self._begin.put_into({**self._adapters, **self._heads})
            return
        initialise(self._adapters, self._run_seed)
        for factor, _ in self._factors_r.values():
            factor.data.zero_()
        if self._initial is not None:
            self._put_initial(self._initial)
        for name, parameter in self._heads.items():
            parameter.data.copy_(self._base_heads[name])

    def begin_with(self, initial: PinnedFile) -> None:
        """Begin with the A of a file in place of the random one (see `aligned`).

        Raises:
            FedForwardError: it was made for another model or other adapters.
        """
        own = {name: a.data for name, a in self._adapters.items() if ".lora_A." in name}
        check_initial(initial, self.base_fingerprint, self.adapted, own | self.outputs)
        self._initial, self.initial_a_digest = initial, initial.digest
        self._put_initial(initial)
        self.clear_cache()

    def _put_initial(self, initial: PinnedFile) -> None:
        for name, values in initial.tensors.items():
            own = self.outputs.get(name)
            (self._adapters[name].data if own is None else own).copy_(values)

    def _write_b(self) -> None:
        """Give the adapters the B = U R that PEFT reads."""
        for factor, b in self._factors_r.values():
            b.data.copy_(product(self._bank.outputs[id(factor)], factor))

    @contextmanager
    def _displaced(self, probes: Sequence[Probe], shape: tuple[int, int]) -> Iterator[None]:
        self._bank.rows = (shape[0], shape[0] * shape[1])
        self._fill_bank(probes)
        self._bank.probing = True
        try:
            yield
        finally:
            self._bank.factors, self._bank.probing = {}, False

    def _fill_bank(self, probes: Sequence[Probe]) -> None:
        """One adapter per probe; a trajectory that neighbours share is summed once."""
        requested = [steps for probe in probes for steps in (probe.trajectory, probe.perturbation)]
        if len(requested) == len(self._filled) and all(map(is_, requested, self._filled)):
            self._bank.factors = self._last_factors
            return
        self._filled = []
        groups = len(probes)
        segments = self._segments(requested)
        moving = {b for b, _, _ in segments if any(steps.moves(b) for steps in requested)}
        size = groups * TILE * sum(end - begin for b, begin, end in segments if b in moving)
        if len(self._buffer) < size:
            self._buffer = self.flat.new_empty(size)
        free = self._buffer
        banks = {}
        for block, begin, end in segments:
            # Where nothing moves, all rows meet the adapters as they are.
            if block in moving:
                own = free[: groups * TILE * (end - begin)]
                free = free[len(own) :]
                banks[block, begin, end] = own.view(groups, -1)
        few = bool(self.free_coordinates())
        for same in _runs(probes) if few else ():
            for (block, begin, end), bank in banks.items():
                self._fill_few(probes[same], block, begin, end, bank[same])
        for same in () if few else _runs(probes):
            total = self._trajectory_sum(probes[same.start].trajectory)
            for (block, begin, end), bank in banks.items():
                displace(
                    total[TILE * begin : TILE * end],
                    NO_STEPS,
                    [probe.perturbation.block(block) for probe in probes[same]],
                    first_tile=begin,
                    distribution=self.distribution,
                    out=bank[same],
                )
        for (_, begin, end), bank in banks.items() if self.masks and not few else ():
            still = self.flat[TILE * begin : TILE * end]
            torch.where(self._mask_flat()[TILE * begin : TILE * end], bank, still, out=bank)
        views = views_of(self.layout, [(begin, bank) for (_, begin, _), bank in banks.items()])
        self._bank.factors = {id(self.tensors[name]): view for name, view in views.items()}
        # The parts of a batch come one after another with the same probes.
        self._filled, self._last_factors = requested, self._bank.factors

    def _fill_few(
        self, probes: Sequence[Probe], block: int, begin: int, end: int, bank: torch.Tensor
    ) -> None:
        """The adapters of probes with one trajectory, of which few coordinates move.

        Args:
            begin: first tile, and `end` the one after the last.
            bank: float32 [probes, coordinates], which is filled.
        """
        still = self.flat[TILE * begin : TILE * end]
        bank.copy_(still)
        free = self._free_between(begin, end)
        if len(free):
            own = [probe.perturbation.block(block) for probe in probes]
            shared = probes[0].trajectory.block(block)
            values = displace_at(still, free, shared, own, distribution=self.distribution)
            bank.index_copy_(1, torch.from_numpy(free.places), values)

    def _free_between(self, begin: int, end: int) -> FreeCoordinates:
        """The free coordinates of some tiles of the flat storage, numbered from the first."""
        known = self._free_parts
        if known[0] is not self.masks:
            known = self._free_parts = (self.masks, {})
        if (begin, end) not in known[1]:
            inside = self._mask_flat()[TILE * begin : TILE * end]
            places = inside.nonzero()[:, 0].numpy()
            known[1][begin, end] = FreeCoordinates(places, begin)
        return known[1][begin, end]

    def _moved_by(self, updates: Sequence[Update]) -> list[tuple[torch.Tensor, int, list[Update]]]:
        """The stretches of the flat storage that are updated alike, in place of its many tensors.

        One launch has more to do than a GPU has processors. What lies between tensors moves too,
        and is read by none.
        """
        return [
            (self.flat[TILE * begin : TILE * end], begin, [u.block(block) for u in updates])
            for block, begin, end in self._segments([update.steps for update in updates])
        ]

    def _commit_few(self, updates: Sequence[Update]) -> int:
        """See `CausalModel`: of the flat storage's stretches, not of its many tensors."""
        parts = zip(
            self._segments([u.steps for u in updates]), self._moved_by(updates), strict=True
        )
        return sum(
            commit_at(part, self._free_between(b, e), own, distribution=self.distribution)
            for (_, b, e), (part, _, own) in parts
        )

    def _mask_flat(self) -> torch.Tensor:
        """The masks in the flat storage's order, bool [tiles * 2048]; False in padding."""
        known, flat = self._flat_mask
        if flat is None or known is not self.masks:
            flat = torch.zeros(len(self.flat), dtype=torch.bool, device=self.device)
            for name, view in views_of(self.layout, [(0, flat)]).items():
                view.copy_(self.masks[name])
            self._flat_mask = self.masks, flat
        return flat

    def _segments(self, steps: Sequence[Steps]) -> Sequence[tuple[int, int, int]]:
        """The stretches of the flat storage in which all of these steps have equal coefficients."""
        by_block = any(part.by_block for part in steps)
        return self.layout.segments if by_block else ((0, 0, self.layout.tiles),)

    def _trajectory_sum(self, trajectory: Steps) -> torch.Tensor:
        """The adapters at θ + trajectory: a sum made before, and the steps that it lacks.

        Float32 sums are not rounded on the way, so they are the ones made from θ at once.
        """
        if not len(trajectory):
            return self.flat
        known = [entry for entry in self.trajectory_cache if trajectory.starts_with(entry[0])]
        steps, total = max(known, key=lambda e: len(e[0]), default=(NO_STEPS, self.flat))
        missing = trajectory[len(steps) :]
        if not len(missing):
            return total
        others = [entry for entry in self.trajectory_cache if entry[1] is not total]
        target = total
        if total is self.flat or id(steps) in self._live:
            others, target = self.trajectory_cache, torch.empty_like(self.flat)
        # Until it is whole again, a sum that is extended in place is nobody's.
        self.trajectory_cache = others
        for block, begin, end in self._segments([missing]):
            part, own = slice(TILE * begin, TILE * end), missing.block(block)
            if len(own) or target is not total:
                accumulate(
                    total[part],
                    own.seeds,
                    own.coefficients,
                    first_tile=begin,
                    distribution=self.distribution,
                    out=target[part],
                )
        self.trajectory_cache = [*others, (trajectory, target)]
        return target

    def save(self, folder: Path) -> None:
        """Write the adapter in PEFT format."""
        self._write_b()
        with self._without_factors_r():
            # No embeddings are tuned; PEFT would look for those of the base, on the hub as well.
            self.peft.save_pretrained(str(folder), save_embedding_layers=False)

    def saved_tensors(self) -> dict[str, torch.Tensor]:
        """Both factors of every adapter, the frozen A included, and a classifier's head."""
        self._write_b()
        return {**self._adapters, **self._heads}

    def merge(self) -> Any:
        """The base with the adapters added in, a plain transformers model; this one is used up.

        Raises:
            FedForwardError: an adapted module shares its weight with another module.
        """
        self._write_b()
        shared = [n for n in shared_weights(self.network) if n.endswith(".base_layer")]
        if shared:
            name = shared[0].removesuffix(".base_layer")
            raise FedForwardError(
                f"{name} shares its weight with another module, so that its adapter cannot be "
                "merged. Export the adapter without --merge, or leave the module out of "
                "lora.targets."
            )
        if self.offload is not None:
            self.offload.end()
            self.peft.to("cpu")
        for head in class_heads(self.network):
            wrapper = self.network.get_submodule(head)
            for part in wrapper.modules_to_save[ADAPTER].modules():
                part.__dict__.pop("forward", None)
            wrapper.modules_to_save[ADAPTER].to(self.network.dtype)
        if not any(is_quantized(module) for module in self.network.modules()):
            return self.peft.merge_and_unload()
        # PEFT would round the sum to 4 bits again, and the result would not be what was tuned.
        deltas = {
            name: layer.get_delta_weight(ADAPTER)
            for name, layer in self.network.named_modules()
            if hasattr(layer, "lora_A") and hasattr(layer, "base_layer")
        }
        return dequantize(self.peft.unload(), deltas)


def random_factors(model: LoraModel) -> dict[str, torch.Tensor]:
    """Every A as the run seed gives it, float32 [r, inputs], by its name in a file."""
    factors = {name: torch.empty_like(p.data) for name, p in model._adapters.items()}
    initialise(factors, model._run_seed)
    return {name: factor for name, factor in factors.items() if ".lora_A." in name}


def _runs(probes: Sequence[Probe]) -> Iterator[slice]:
    """Stretches of neighbours that share a trajectory."""
    begin = 0
    for end in range(1, len(probes) + 1):
        if end == len(probes) or probes[end].trajectory is not probes[begin].trajectory:
            yield slice(begin, end)
            begin = end
