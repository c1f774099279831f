"""Full tuning: every weight moves, and a probe never touches one.

When a module runs, θ + displacement of its own parameters is generated into a scratch, used and
forgotten. Hooks on whatever modules own parameters do this, so no architecture is named here.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedforward.directions import Distribution
from fedforward.directions.kernels import accumulate
from fedforward.errors import FedForwardError
from fedforward.models.causal_lm import CausalModel, ProbePlan, fingerprint, stack
from fedforward.steps import NO_STEPS, Evaluation, Probe, Steps, Update

#: Bytes; each tensor in the scratch begins on a cache line.
ALIGNMENT = 64


class FullModel(CausalModel):
    """All parameters of a network, tuned in the dtype they are loaded in.

    Tied weights are one tensor and count once. Probes run one at a time.
    """

    def __init__(
        self,
        network: Any,
        *,
        distribution: Distribution = Distribution.GAUSSIAN,
        plan: ProbePlan,
        tokenizer: Any = None,
    ) -> None:
        tensors = {name: parameter.data for name, parameter in network.named_parameters()}
        base = fingerprint(sorted(network.named_parameters()))
        super().__init__(network, tensors, distribution, plan, base)
        self.tokenizer = tokenizer
        self._first_tiles = dict(zip(self.layout.names, self.layout.first_tiles, strict=True))
        self._names = {id(parameter): name for name, parameter in network.named_parameters()}
        self._unreached = set(self._names.values())
        self._probe: Probe | None = None
        self._saved: list[dict[str, nn.Parameter | None]] = []
        self._tops: list[int] = []
        self._top = 0
        self._scratch = torch.empty(0, dtype=torch.uint8, device=self.device)
        self._copy: dict[str, torch.Tensor] = {}
        self._copied = NO_STEPS
        for module in network.modules():
            if any(True for _ in module.parameters(recurse=False)):
                module.register_forward_pre_hook(self._displace)
                module.register_forward_hook(self._restore, always_call=True)

    def evaluate(self, probes: Sequence[Probe]) -> list[Evaluation]:
        """Measure the probes one after another."""
        return [self._evaluate_one(probe) for probe in probes]

    @torch.inference_mode()
    def _evaluate_one(self, probe: Probe) -> Evaluation:
        if len(probe.trajectory) and self.plan.trajectory == "copy":
            self._carry(probe.trajectory)
        self._probe = probe if len(probe.trajectory) or len(probe.perturbation) else None
        try:
            sums, counts = self._losses(*stack([probe.batch]))
            if self._probe is not None and self._unreached:
                raise FedForwardError(
                    f"model.tune = 'full' does not reach {len(self._unreached)} tensors of this "
                    f"model, such as {min(self._unreached)}: they are read by another module than "
                    "the one that owns them, so that a probe would not see them move. Use "
                    "model.tune = 'lora'."
                )
        finally:
            self._probe = None
        return Evaluation(sums.cpu().numpy(), counts.cpu().numpy())

    def commit(self, updates: Sequence[Update]) -> None:
        """See `CausalModel.commit`; the copy of a finished trajectory is dropped."""
        self._copy, self._copied = {}, NO_STEPS
        super().commit(updates)

    def _carry(self, trajectory: Steps) -> None:
        """Bring the float32 copy to θ + trajectory by adding only the steps it lacks."""
        if not self._copy or not trajectory.starts_with(self._copied):
            if not self._copy:
                self._copy = {
                    name: torch.empty_like(tensor, dtype=torch.float32)
                    for name, tensor in self.tensors.items()
                }
            for name, copy in self._copy.items():
                copy.copy_(self.tensors[name])
            self._copied = NO_STEPS
        missing = trajectory[len(self._copied) :]
        if len(missing):
            for name, copy in self._copy.items():
                self._add(copy, missing, name, copy)
        self._copied = trajectory

    def _add(self, source: torch.Tensor, steps: Steps, name: str, out: torch.Tensor) -> None:
        accumulate(
            source,
            steps.seeds,
            steps.coefficients,
            first_tile=self._first_tiles[name],
            distribution=self.distribution,
            out=out,
        )

    def _displace(self, module: nn.Module, _: Any) -> None:
        """Before a module runs: put displaced values in place of its own parameters."""
        if self._probe is None:
            return
        own = {key: p for key, p in module._parameters.items() if p is not None}
        self._saved.append(dict(module._parameters))
        self._tops.append(self._top)
        for key, parameter in own.items():
            name = self._names[id(parameter)]
            self._unreached.discard(name)
            out = self._take(parameter)
            if name in self._copy and len(self._probe.trajectory):
                self._add(self._copy[name], self._probe.perturbation, name, out)
            else:
                steps = self._probe.trajectory + self._probe.perturbation
                self._add(self.tensors[name], steps, name, out)
            # The registry takes a plain tensor where setattr would insist on a Parameter.
            module._parameters[key] = out  # type: ignore[assignment]

    def _restore(self, module: nn.Module, *_: Any) -> None:
        """After a module ran, also when it failed: its own parameters are back."""
        if self._probe is None:
            return
        module._parameters.update(self._saved.pop())
        self._top = self._tops.pop()

    def _take(self, parameter: torch.Tensor) -> torch.Tensor:
        """A part of the scratch in the parameter's shape; nested modules take it as a stack."""
        size = parameter.numel() * parameter.element_size()
        begin = -(-self._top // ALIGNMENT) * ALIGNMENT
        if begin + size > len(self._scratch):
            # Views handed out earlier keep the old storage alive until their modules are done.
            self._scratch = self._scratch.new_empty(begin + size)
        self._top = begin + size
        return self._scratch[begin : self._top].view(parameter.dtype).view(parameter.shape)

    def save(self, folder: Path) -> None:
        """Write the whole model, and its tokenizer if there is one, in Hugging Face format."""
        self.network.save_pretrained(str(folder))
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(str(folder))
