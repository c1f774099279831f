"""The loss without the logits: the head is taken tile by tile with an online log-sum-exp.

While losses are measured, the head only hands over what it is given; its product, whatever the
network does to logits after it (a soft cap, a scale), and the loss are then computed for a few
hundred tokens and a slice of the vocabulary at a time. No architecture is named here.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedforward.core.errors import out_of_memory
from fedforward.models.loading import input_device

#: Logits that are worked on at once, by device: what fits a cache, or fills a GPU.
LOGITS_AT_ONCE = {"cpu": 1 << 19, "cuda": 1 << 26}
#: Weights of a tile of the vocabulary, likewise.
WEIGHTS_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 26}

Forward = Callable[..., Any]


@dataclass(frozen=True)
class VocabularyTile:
    """A slice of the vocabulary as each group of tokens meets it.

    Attributes:
        begin: the first token of the slice.
        weights: [rows, hidden], one per group, or a single one for all.
        biases: [rows] each, or nothing.
    """

    begin: int
    weights: Sequence[torch.Tensor]
    biases: Sequence[torch.Tensor]


class Head:
    """The output embeddings of a network, and what the network does to logits after them.

    Attributes:
        module: the head, or None if the network has none that can be taken apart: then its logits
            are computed whole.
        after: what the network does to logits, float [..., vocabulary]; None if nothing.
    """

    def __init__(self, network: Any) -> None:
        self.network = network
        self.module: nn.Module | None = network.get_output_embeddings()
        self._body: nn.Module = network.base_model
        self._stub: Any = None
        self._given: torch.Tensor | None = None
        self.after: Callable[[torch.Tensor], torch.Tensor] | None = None
        if self.module is not None:
            self._inspect()

    @torch.inference_mode()
    def _inspect(self) -> None:
        """One token through the network tells whether the head is called, and what follows it."""
        outputs: list[Any] = []
        handle = self._body.register_forward_hook(lambda *call: outputs.append(call[-1]))
        device = input_device(self.network)
        token = torch.ones((1, 1), dtype=torch.int64, device=device)
        probe: list[torch.Tensor] = []

        def answer(x: torch.Tensor) -> torch.Tensor:
            probe.append(
                torch.linspace(-90.0, 90.0, 64, device=x.device, dtype=x.dtype)[None, None]
            )
            return probe[0]

        try:
            with self._replaced(answer):
                logits = self.network(input_ids=token, use_cache=False).logits
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            # Something after the head counts on the size of the vocabulary.
            self.module = None
            return
        finally:
            handle.remove()
        if len(probe) != 1 or logits.shape != probe[0].shape:
            self.module = None
        elif logits is not probe[0] and not torch.equal(logits, probe[0]):
            if len(outputs) != 1 or self._body is self.network:
                self.module = None
                return
            self._stub = outputs[0]
            self.after = self._through_network

    @contextmanager
    def _replaced(self, forward: Forward) -> Iterator[None]:
        """The head runs another forward pass of its own."""
        assert self.module is not None
        with _instead(self.module, lambda x, *_, **__: forward(x)):
            yield

    def _through_network(self, logits: torch.Tensor) -> torch.Tensor:
        """What the network makes of logits, by running it with body and head left out."""
        device = input_device(self.network)
        token = torch.ones((1, 1), dtype=torch.int64, device=device)
        with self._replaced(lambda _: logits), _instead(self._body, lambda *_, **__: self._stub):
            result: torch.Tensor = self.network(input_ids=token, use_cache=False).logits
        return result

    def inputs(self, **arguments: Any) -> torch.Tensor:
        """Run the network without its head: what the head is given, [rows, positions, hidden]."""
        given: list[torch.Tensor] = []

        def take(x: torch.Tensor) -> torch.Tensor:
            given.append(x)
            return x[..., :1]

        with self._replaced(take):
            self.network(use_cache=False, **arguments)
        return given[0]

    @property
    def sliceable(self) -> bool:
        """Whether the head is a plain linear map whose weight can be cut along the vocabulary."""
        return type(self.module) is nn.Linear and not hasattr(self.module, "_hf_hook")

    def losses(
        self,
        groups: Sequence[torch.Tensor],
        targets: Sequence[torch.Tensor],
        tiles: Iterable[VocabularyTile],
    ) -> torch.Tensor:
        """-log p of every target, by tiles of the vocabulary.

        Args:
            groups: what the head is given, [tokens, hidden] for each group.
            targets: int64 [tokens] for each group.
            tiles: of the whole vocabulary; a tile is done with before the next is asked for.

        Returns:
            float32 [tokens of all groups].
        """
        device = groups[0].device
        total = [torch.full((len(x),), -torch.inf, device=device) for x in groups]
        chosen = [torch.zeros(len(x), device=device) for x in groups]
        at_once = LOGITS_AT_ONCE.get(device.type, LOGITS_AT_ONCE["cuda"])
        buffer = torch.empty(0, device=device, dtype=groups[0].dtype)
        for tile in tiles:
            size = len(tile.weights[0])
            rows = max(1, at_once // size)
            needed = min(rows, max(len(x) for x in groups)) * size
            if len(buffer) < needed:
                buffer = buffer.new_empty(needed)
            for g, x in enumerate(groups):
                weight = tile.weights[g % len(tile.weights)]
                for begin in range(0, len(x), rows):
                    part = slice(begin, begin + rows)
                    logits = buffer[: len(x[part]) * size].view(-1, size)
                    torch.mm(x[part], weight.T, out=logits)
                    if tile.biases:
                        logits += tile.biases[g % len(tile.biases)]
                    if self.after is not None:
                        logits = self.after(logits[None])[0]
                    local = targets[g][part] - tile.begin
                    _absorb(logits.float(), local, total[g][part], chosen[g][part])
        return torch.cat(total) - torch.cat(chosen)

    def losses_of_counted(
        self,
        given: torch.Tensor,
        targets: torch.Tensor,
        counted: torch.Tensor,
        groups: int,
        tiles: Iterator[VocabularyTile],
    ) -> torch.Tensor:
        """-log p of the counted targets, by tiles of the vocabulary; 0 of the others.

        Args:
            given: what the head is given, [rows, positions, hidden].
            targets: int64 [rows, positions], in main memory, as is `counted`.
            counted: bool [rows, positions].
            groups: of rows, equally large, that meet different heads.
            tiles: see `losses`.

        Returns:
            float32 [rows * positions].
        """
        assert isinstance(self.module, nn.Linear)
        device = self.module.weight.device
        flat, chosen = given.flatten(0, 1).to(device), targets.flatten()
        sizes = counted.view(groups, -1).sum(dim=1).tolist()
        places = counted.flatten().nonzero()[:, 0]
        some = len(places) < len(chosen)
        if some:
            flat, chosen = flat.index_select(0, places.to(device)), chosen[places]
        losses = self.losses(flat.split(sizes), chosen.to(device).split(sizes), tiles)
        if some:
            return losses.new_zeros(counted.numel()).index_copy_(0, places.to(device), losses)
        return losses

    def logits_of(self, given: torch.Tensor, groups: int, rows: VocabularyTile) -> torch.Tensor:
        """Logits of a few tokens, computed in float32 whatever the head's dtype.

        Args:
            given: what the head is given, [rows, hidden].
            groups: of rows, equally large, that meet different heads.
            rows: of the head, those of the tokens.

        Returns:
            float32 [rows, tokens].
        """
        weights = torch.stack(list(rows.weights)).float()
        parts = given.to(weights.device).float().view(groups, -1, given.shape[-1])
        logits = torch.bmm(parts, weights.transpose(1, 2))
        if rows.biases:
            logits += torch.stack(list(rows.biases)).float()[:, None]
        logits = logits.flatten(0, 1)
        return logits if self.after is None else self.after(logits[None])[0]

    def losses_whole(self, given: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """-log p of every target through the head's own forward pass, some positions at a time.

        Args:
            given: what the head is given, [rows, positions, hidden].
            targets: int64 [rows, positions].

        Returns:
            float32 [rows, positions].
        """
        assert self.module is not None
        width = int(getattr(self.module, "out_features", 0)) or 1 << 15
        at_once = LOGITS_AT_ONCE.get(given.device.type, LOGITS_AT_ONCE["cuda"])
        step = max(1, at_once // (width * len(given)))
        parts = []
        for begin in range(0, given.shape[1], step):
            logits = self.module(given[:, begin : begin + step])
            if self.after is not None:
                logits = self.after(logits)
            own = targets[:, begin : begin + step].to(logits.device)
            parts.append(losses_of(logits, own).to(targets.device))
        return torch.cat(parts, dim=1) if parts else targets.new_zeros(targets.shape).float()

    def frozen_tiles(self) -> Iterator[VocabularyTile]:
        """The head's own weights, cut along the vocabulary."""
        assert isinstance(self.module, nn.Linear)
        weight, bias = self.module.weight, self.module.bias
        rows = tile_rows(weight)
        for begin in range(0, len(weight), rows):
            part = slice(begin, begin + rows)
            yield VocabularyTile(begin, [weight[part]], [] if bias is None else [bias[part]])


def tile_rows(weight: torch.Tensor, device: str = "") -> int:
    """Rows of a weight matrix that are worked on at once; whole direction tiles where possible.

    Args:
        device: kind of device where that is; where the weight lies unless given.
    """
    at_once = WEIGHTS_AT_ONCE.get(device or weight.device.type, WEIGHTS_AT_ONCE["cuda"])
    rows = max(1, at_once // weight.shape[1])
    return min(len(weight), rows - rows % 32 if rows > 32 else rows)


def losses_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log p of each target, float32, in the shape of `targets`; never all logits in float32."""
    flat, tokens = logits.flatten(0, -2), targets.flatten()
    at_once = LOGITS_AT_ONCE.get(logits.device.type, LOGITS_AT_ONCE["cuda"])
    rows = max(16, at_once // flat.shape[1])
    parts = []
    for part, target in zip(flat.split(rows), tokens.split(rows), strict=True):
        float32 = part.float()
        chosen = float32.gather(1, target.clamp(min=0)[:, None])[:, 0]
        parts.append(torch.logsumexp(float32, dim=1) - chosen)
    return torch.cat(parts).view(targets.shape)


def _absorb(
    logits: torch.Tensor, local: torch.Tensor, total: torch.Tensor, chosen: torch.Tensor
) -> None:
    """Take a tile of logits (used up) into the running log-sum-exp and the chosen logits."""
    size = logits.shape[1]
    found = logits.gather(1, local.clamp(0, size - 1)[:, None])[:, 0]
    inside = (local >= 0) & (local < size)
    chosen.copy_(torch.where(inside, found, chosen))
    # A finite maximum, so that a row of nothing but -inf stays -inf.
    top = logits.amax(dim=1).clamp_(min=torch.finfo(torch.float32).min)
    sums = logits.sub_(top[:, None]).exp_().sum(dim=1).log_().add_(top)
    torch.logaddexp(total, sums, out=total)


@contextmanager
def _instead(module: nn.Module, forward: Forward) -> Iterator[None]:
    """A module runs `forward` for a while; what it ran before comes back, also after an error."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own
