"""Full tuning: every weight moves, and a probe never touches one.

While probes run, the parameters are replaced by displaced ones (see `displaced_tensor`), which
generate θ + displacement beside the weights, a tile at a time.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedforward.core.errors import FedForwardError
from fedforward.core.paths import absolute_text
from fedforward.core.steps import NO_STEPS, Probe, ProbePlan, Steps, Update
from fedforward.directions import Distribution
from fedforward.directions.ops import commit_all
from fedforward.models.base import CausalModel
from fedforward.models.batching import Arrays, Measure
from fedforward.models.blocks import class_heads, names_in_blocks
from fedforward.models.displaced_tensor import DisplacedTensor, Displacement
from fedforward.models.fingerprints import fingerprint
from fedforward.models.folders import copy_processor
from fedforward.models.grouping import settled
from fedforward.models.lm_head import VocabularyTile, tile_rows
from fedforward.models.loading import DTYPES, persistent_buffers
from fedforward.models.pretrained import allow, loaded
from fedforward.models.text_part import text_prefixes
from fedforward.models.trial import examine, patterns


class FullModel(CausalModel):
    """Parameters of a network, tuned in the dtype they are loaded in. Tied weights count once."""

    def __init__(
        self,
        network: Any,
        *,
        distribution: Distribution = Distribution.GAUSSIAN,
        plan: ProbePlan,
        blocks: Collection[int] | None = None,
        tokenizer: Any = None,
        reload: Callable[[], Any] | None = None,
    ) -> None:
        """Tune all parameters, or only those of some transformer blocks, numbered from 0.

        What a text does not run through is not tuned (see `left_out`): a tower for images, or
        attention to an encoder that is not there. The head of a sequence classifier is tuned in
        any case.

        Args:
            reload: loads the network again, for `reset`.
        """
        parameters = dict(network.named_parameters())
        base = fingerprint([*sorted(parameters.items()), *persistent_buffers(network)])
        heads = [f"{name}." for name in class_heads(network)]
        inside = (*text_prefixes(network), *heads)
        if blocks is not None:
            inside = (*names_in_blocks(network, blocks), *heads)
        asked = [name for name in parameters if name.startswith(inside)]
        packed = [name for name in asked if parameters[name].dtype not in DTYPES.values()]
        if packed:
            raise FedForwardError(
                f"model.tune = 'full' changes every weight, and {len(packed)} tensors of this "
                f"model are quantised, such as {min(packed)} ({parameters[min(packed)].dtype}). "
                "Use model.tune = 'lora', or give the model as it was before."
            )
        trial = examine(network)
        # Only now: offloaded blocks have come and gone.
        tensors = {name: parameters[name].data for name in asked if name not in trial.unused}
        super().__init__(network, tensors, distribution, plan, base)
        unused = [name for name in trial.unused if name.startswith(inside)]
        if unused:
            self.left_out = (
                f"model.tune = 'full' leaves out {len(unused)} tensors that a text does not run "
                f"through: {patterns(unused)}"
            )
        # No token may be sent to some experts in a pass.
        self._routed = trial.routed
        self.tokenizer = tokenizer
        self._reload = reload
        self._weights: dict[str, DisplacedTensor] = {}
        self._places: list[tuple[nn.Module, str, nn.Parameter, DisplacedTensor]] = []
        self._rebind()
        self._moved: set[str] = set()
        self._reached: set[str] = set()
        self._cache: dict[str, torch.Tensor] = {}
        self._cached = NO_STEPS

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: str = "float32",
        device: str = "auto",
        distribution: str = "gaussian",
        seed: int = 0,
    ) -> "FullModel":
        """A model whose weights are all tuned, from a folder in Hugging Face format or a hub name.

        Args:
            path: the base model; its tokenizer comes along.
            dtype: of the weights: "float32", "bfloat16" or "float16".
            device: "auto", "cpu", "cuda" or "cuda:N".
            distribution: of the directions, "gaussian" or "rademacher".
            seed: of the run that is made with the model.

        Raises:
            FedForwardError: there is no such model, or it does not fit.

        Example:
            >>> from importlib.resources import files
            >>> folder = files("fedforward.demo").joinpath("model")
            >>> FullModel.from_pretrained(folder, device="cpu").layout.blocks[0]
            'embeddings'
        """
        allow("distribution", distribution, tuple(Distribution))
        network, tokenizer, plan, device = loaded(path, dtype, device, seed)
        place = absolute_text(str(path))
        model = cls(
            network,
            distribution=Distribution(distribution),
            plan=plan,
            tokenizer=tokenizer,
            reload=lambda: loaded(place, dtype, device, seed)[0],
        )
        model.plan = settled(model)
        model.settings = {
            "model": {"path": place, "dtype": dtype, "tune": "full"},
            "method": {"distribution": distribution},
            "run": {"seed": seed, "device": device},
        }
        return model

    def _rebind(self) -> None:
        parameters = dict(self.network.named_parameters())
        self.tensors = {name: parameters[name].data for name in self.layout.names}
        places = zip(self.layout.names, self.layout.first_tiles, self.layout.owners, strict=True)
        self._weights = {
            name: DisplacedTensor.of(self.tensors[name], name, first_tile, owner)
            for name, first_tile, owner in places
        }
        names = {id(parameter): name for name, parameter in parameters.items()}
        self._places = [
            (module, key, parameter, self._weights[names[id(parameter)]])
            for module in self.network.modules()
            for key, parameter in module._parameters.items()
            if parameter is not None and names[id(parameter)] in self._weights
        ]

    def _measured(self, probes: Sequence[Probe], measure: Measure) -> list[Arrays]:
        """See `CausalModel`.

        Raises:
            FedForwardError: the network reads a tuned tensor past its parameter, so that a probe
                would not see it move.
        """
        before = set(self._moved)
        try:
            results = super()._measured(probes, measure)
        except BaseException:
            # A pass that was cut short has not asked for everything.
            self._moved = before
            raise
        unreached = self._moved - self._reached - self._routed
        if unreached and self._reached:
            raise FedForwardError(
                f"model.tune = 'full' does not reach {len(unreached)} tensors of this model, such "
                f"as {min(unreached)}: nothing in its forward pass asks for them, so that a probe "
                "would not see them move. Use model.tune = 'lora'."
            )
        return results

    def clear_cache(self) -> None:
        """See `CausalModel.clear_cache`."""
        self._cache, self._cached = {}, NO_STEPS

    def _start_again(self) -> None:
        if self._reload is None:
            raise FedForwardError("This model cannot go back to its base: load it again.")
        base = dict(self._reload().named_parameters())
        for name, tensor in self.tensors.items():
            tensor.copy_(base[name].data)

    @contextmanager
    def _displaced(self, probes: Sequence[Probe], shape: tuple[int, int]) -> Iterator[None]:
        trajectory, free = probes[0].trajectory, self.free_coordinates()
        shared, own = trajectory, [probe.perturbation for probe in probes]
        sources: dict[str, torch.Tensor] = {}
        if any(probe.trajectory is not trajectory for probe in probes):
            shared, own = NO_STEPS, [probe.trajectory + probe.perturbation for probe in probes]
        elif len(trajectory) and self.plan.trajectory == "cache" and not free:
            self._update_cache(trajectory)
            shared, sources = NO_STEPS, self._cache
        displacement = Displacement(
            shared, own, self.distribution, shape, sources, self._reached, self.masks, free
        )
        moving = [place for place in self._places if displacement.moves(place[-1])]
        self._moved |= {weight.path for *_, weight in moving}
        try:
            for module, key, _, weight in moving:
                weight.displacement = displacement
                # The registry takes a plain tensor where setattr would insist on a Parameter.
                module._parameters[key] = weight  # type: ignore[assignment]
            yield
        finally:
            for module, key, parameter, weight in moving:
                module._parameters[key] = parameter
                weight.displacement = None

    def _vocabulary_tiles(self) -> tuple[int, Iterator[VocabularyTile]] | None:
        head = self.head.module
        assert isinstance(head, nn.Linear)
        weight, bias = head.weight, head.bias
        if not isinstance(weight, DisplacedTensor):
            return None if isinstance(bias, DisplacedTensor) else super()._vocabulary_tiles()
        displacement = weight.displacement
        assert displacement is not None
        biases = [] if bias is None else displacement.parts(bias)[0]

        def tiles() -> Iterator[VocabularyTile]:
            rows = tile_rows(weight.plain)
            for begin in range(0, len(weight.plain), rows):
                count = min(rows, len(weight.plain) - begin)
                made = displacement.tile(weight, begin, count)
                yield VocabularyTile(begin, list(made), [b[begin : begin + count] for b in biases])

        return displacement.groups, tiles()

    def _vocabulary_rows(self, tokens: torch.Tensor) -> tuple[int, VocabularyTile] | None:
        head = self.head.module
        assert isinstance(head, nn.Linear)
        weight, bias = head.weight, head.bias
        if not isinstance(weight, DisplacedTensor):
            return None if isinstance(bias, DisplacedTensor) else super()._vocabulary_rows(tokens)
        displacement = weight.displacement
        assert displacement is not None
        biases = [] if bias is None else displacement.parts(bias)[0]
        rows = displacement.rows_of(weight, tokens)
        here = tokens.to(rows.device)
        return displacement.groups, VocabularyTile(0, list(rows), [b[here] for b in biases])

    def _update_cache(self, trajectory: Steps) -> None:
        """Bring the float32 copies to θ + trajectory by adding only the steps it lacks.

        Blocks that the trajectory does not move are not copied.
        """
        weights = {n: w for n, w in self._weights.items() if trajectory.moves(w.block)}
        if weights.keys() != self._cache.keys() or not trajectory.starts_with(self._cached):
            # What is no longer needed is freed before its successor is made.
            self._cache = {n: copy for n, copy in self._cache.items() if n in weights}
            for name, weight in weights.items():
                if name not in self._cache:
                    self._cache[name] = torch.empty_like(weight.plain, dtype=torch.float32)
            for name, copy in self._cache.items():
                copy.copy_(self.tensors[name])
            self._cached = NO_STEPS
        missing = trajectory[len(self._cached) :]
        # Until it is whole again, the copy is nobody's: an interruption must not leave a mixture.
        copies, self._cache = self._cache, {}
        if len(missing):
            # Float32 is not rounded: a commit is the sum alone.
            by_block = [Update(missing.block(b), 0) for b in range(len(self.layout.blocks))]
            parts = [
                (copy, self._weights[name].first_tile, [by_block[self._weights[name].block]])
                for name, copy in copies.items()
            ]
            commit_all(parts, self.distribution)
        self._cache, self._cached = copies, trajectory

    def save(self, folder: Path) -> None:
        """Write the whole model, and its tokenizer if there is one, in Hugging Face format."""
        self.network.save_pretrained(str(folder))
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(str(folder))
        copy_processor(self.network.name_or_path, Path(folder))
