"""What all tuned causal language models share: the loss on answers, commit and digest.

How a probe's displacement reaches the weights is left to `lora` (a batched adapter bank) and
`full` (a scratch beside the weights).
"""

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedforward.directions import Distribution, Layout
from fedforward.directions.kernels import accumulate
from fedforward.steps import Evaluation, Probe, Update

#: Label of tokens that do not count (the prompt and the padding).
IGNORED = -100
#: Float32 logits that the loss works on at once (1 MiB), unless that is under LOSS_TOKENS tokens.
LOSS_CHUNK = 1 << 18
LOSS_TOKENS = 16


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Right-padded token rows. Causal attention never looks right, so no mask is needed.

    Attributes:
        tokens: int64 [rows, length].
        labels: int64 [rows, length]; IGNORED where a token does not count.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class ProbePlan:
    """How probes are grouped into forward passes. Fixed when a run starts and stored with it.

    Attributes:
        probes_per_call: LoRA probes that share one forward pass; 1 with full tuning.
        threads: PyTorch and kernel threads.
        trajectory: "generate" adds a client's local steps to the weights in every probe; "copy"
            keeps their sum in one float32 copy of the tuned weights (full tuning only). Both round
            once from the same sum, so the bits are the same.
        evaluation_rows: examples per forward pass of a held-out evaluation.
        device: where the run was started; the last bits of losses depend on it.
    """

    probes_per_call: int
    threads: int
    trajectory: str
    evaluation_rows: int
    device: str = "cpu"


def fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order given; hexadecimal."""
    state = hashlib.sha256()
    for name, tensor in tensors:
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        state.update(flat.numpy().data)
    return state.hexdigest()


class CausalModel(ABC):
    """A causal language model with tuned tensors: the `ForwardModel` of real work.

    Attributes:
        network: the transformers model that runs.
        tensors: the tuned tensors by canonical name, in the layout's order.
        layout: their place in the tunable space.
        plan: how probes are grouped.
        base_fingerprint: of all weights as loaded, hexadecimal; parties must agree on it.
        changed_share: of the tuned weights, how many the last update changed; None in float32,
            where it says nothing.
    """

    def __init__(
        self,
        network: Any,
        tensors: Mapping[str, torch.Tensor],
        distribution: Distribution,
        plan: ProbePlan,
        base_fingerprint: str,
    ) -> None:
        self.network = network
        self.layout = Layout.of({name: tuple(t.shape) for name, t in tensors.items()})
        self.tensors = {name: tensors[name] for name in self.layout.names}
        self.distribution = distribution
        self.plan = plan
        self.base_fingerprint = base_fingerprint
        self.device = next(network.parameters()).device
        self.changed_share: float | None = None
        forward = inspect.signature(network.forward).parameters
        self._selects_logits = "logits_to_keep" in forward

    @abstractmethod
    def evaluate(self, probes: Sequence[Probe]) -> list[Evaluation]:
        """Measure each probe on its `TokenBatch`; the weights stay, bit for bit."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what was tuned: a PEFT adapter, or the whole model in Hugging Face format."""

    def commit(self, updates: Sequence[Update]) -> None:
        """Apply updates in order: nearest rounding in float32, stochastic in half precision."""
        for update in updates:
            changed = 0
            for name, first_tile in zip(self.layout.names, self.layout.first_tiles, strict=True):
                tensor = self.tensors[name]
                before = tensor.clone() if tensor.dtype is not torch.float32 else None
                accumulate(
                    tensor,
                    update.steps.seeds,
                    update.steps.coefficients,
                    first_tile=first_tile,
                    distribution=self.distribution,
                    out=tensor,
                    decay=update.decay,
                    dither_seed=update.dither_seed,
                )
                if before is not None:
                    changed += int((before != tensor).sum())
                    self.changed_share = changed / self.layout.parameters

    def tuned_parameters(self) -> list[torch.nn.Parameter]:
        """The network's parameters that hold the tuned tensors (for first-order methods)."""
        places = {tensor.data_ptr() for tensor in self.tensors.values()}
        return [p for p in self.network.parameters() if p.data_ptr() in places]

    def saved_tensors(self) -> dict[str, torch.Tensor]:
        """What `save` writes and the ledger determines, by the names in the file."""
        return self.tensors

    def digest(self) -> bytes:
        """SHA-256 of the tuned tensors: names, dtypes, shapes and bytes in canonical order."""
        return bytes.fromhex(fingerprint(self.tensors.items()))

    def export_state(self) -> NDArray[np.float32]:
        """The tuned tensors in the layout's order as one float32 array [d]."""
        parts = [tensor.detach().float().reshape(-1) for tensor in self.tensors.values()]
        return torch.cat(parts).cpu().numpy()

    @torch.no_grad()
    def assign_state(self, state: NDArray[np.float32]) -> None:
        """Set the tuned tensors from one float32 array [d], rounding to nearest."""
        parts = torch.from_numpy(state).split(list(self.layout.sizes))
        for tensor, part in zip(self.tensors.values(), parts, strict=True):
            tensor.copy_(part.view(tensor.shape))

    def loss(self, batch: TokenBatch) -> torch.Tensor:
        """Mean loss per counted token with gradients to the tuned tensors (first-order methods)."""
        sums, counts = self._losses(torch.from_numpy(batch.tokens), torch.from_numpy(batch.labels))
        return sums.sum() / counts.sum()

    def _losses(
        self, tokens: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Per row: the summed loss (float64 [rows]) and the number of counted tokens."""
        tokens, labels = tokens.to(self.device), labels.to(self.device)
        targets = labels[:, 1:]
        counted = targets != IGNORED
        positions = counted.any(dim=0).nonzero()[:, 0]
        options = {"logits_to_keep": positions} if self._selects_logits else {}
        logits = self.network(input_ids=tokens[:, :-1], use_cache=False, **options).logits
        if not self._selects_logits:
            logits = logits[:, positions]
        targets, counted = targets[:, positions], counted[:, positions]
        rows = max(LOSS_TOKENS, LOSS_CHUNK // logits.shape[-1])
        losses = [
            _token_losses(part, target)
            for part, target in zip(
                logits.flatten(0, 1).split(rows), targets.flatten().split(rows), strict=True
            )
        ]
        per_token = torch.cat(losses).view(targets.shape).double() * counted
        return per_token.sum(dim=1), counted.sum(dim=1)


def _token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log p of each target, float32 [tokens]; anything where the target is IGNORED."""
    wide = logits.float()
    chosen = wide.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return torch.logsumexp(wide, dim=1) - chosen


def stack(batches: Sequence[TokenBatch]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels of several batches as one, int64 [batches * rows, length].

    Every batch gets as many rows, and as long ones, as the largest; what is added does not count.
    """
    rows = max(len(batch.tokens) for batch in batches)
    length = max(batch.tokens.shape[1] for batch in batches)
    tokens = np.zeros((len(batches), rows, length), np.int64)
    labels = np.full((len(batches), rows, length), IGNORED, np.int64)
    for place, batch in enumerate(batches):
        height, width = batch.tokens.shape
        tokens[place, :height, :width] = batch.tokens
        labels[place, :height, :width] = batch.labels
    flat = (len(batches) * rows, length)
    return torch.from_numpy(tokens.reshape(flat)), torch.from_numpy(labels.reshape(flat))
