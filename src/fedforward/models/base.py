"""What all tuned language models share: probes in one batch, the loss, commit and digest.

How a probe's displacement reaches the weights is left to `lora` (a batched adapter bank) and
`full` (tiles beside the weights).
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedforward.core.batches import (
    IGNORED,
    Batch,
    ChoiceBatch,
    JoinedRows,
    PromptBatch,
    TokenBatch,
)
from fedforward.core.errors import FedForwardError
from fedforward.core.steps import Evaluation, Probe, ProbePlan, Steps, Update
from fedforward.directions import Distribution, Layout
from fedforward.directions.ops import SPARSE, commit_all, commit_at
from fedforward.directions.sparse_kernels import FreeCoordinates
from fedforward.models import choices, tensor_bytes
from fedforward.models.batching import Arrays, Measure, height_and_length, stack
from fedforward.models.blocks import Prefix, class_heads, names_by_block
from fedforward.models.choices import Choices
from fedforward.models.fingerprints import fingerprint
from fedforward.models.kept_activations import (
    CarriedStates,
    KeptActivations,
    LowerBlocks,
    NotKeptError,
    Work,
)
from fedforward.models.lm_head import Head, VocabularyTile, losses_of
from fedforward.models.loading import input_device
from fedforward.models.offload import Offload
from fedforward.models.trial import sentences, trial_tokens


class CausalModel(ABC):
    """A causal language model with tuned tensors: the `ForwardModel` of real work.

    A sequence classifier on such a model, or on an encoder, is measured through the same passes.

    Attributes:
        network: the transformers model that runs.
        classes: names of a sequence classifier's classes, in the order of its logits; else empty.
        tensors: the tuned tensors by canonical name, in the layout's order.
        layout: their place in the tunable space.
        plan: how probes are grouped.
        base_fingerprint: of all weights as loaded, hexadecimal; parties must agree on it.
        masks: bool, by tensor, which coordinates may move at all; empty is all of them.
        offload: of the transformer blocks, where inactive ones are offloaded; else None.
        adapter_digest: of the adapter that the tuned tensors begin with; "" if they are new.
        initial_a_digest: of the file with the A that adapters begin with; "" if it is random.
        mask_digest: of the file with the mask; "" if there is none.
        changed_share: of the tuned weights, how many the last update changed; None in float32,
            where it says nothing.
        left_out: what of the network is not tuned though all is asked for, in words; may be empty.
        tokenizer: that came with the model; None unless it was loaded by `from_pretrained`.
        settings: what a configuration says of the model, by section; likewise.
        kept: what enters the first tuned block, where it is kept (see `keep_activations`).
        work: what probes have cost so far, generated answers aside.
    """

    tokenizer: Any = None
    settings: Mapping[str, Mapping[str, Any]] = {}
    adapter_digest = ""
    initial_a_digest = ""
    mask_digest = ""
    left_out = ""
    _applied = 0

    def __init__(
        self,
        network: Any,
        tensors: Mapping[str, torch.Tensor],
        distribution: Distribution,
        plan: ProbePlan,
        base_fingerprint: str,
    ) -> None:
        self.network = network
        blocks = names_by_block(network, tensors)
        self.layout = Layout.of({name: tuple(t.shape) for name, t in tensors.items()}, blocks)
        self.tensors = {name: tensors[name] for name in self.layout.names}
        self.distribution = distribution
        self.plan = plan
        self.base_fingerprint = base_fingerprint
        self.device = input_device(network)
        self._rows = len(network.get_input_embeddings().weight)
        self.changed_share: float | None = None
        forward = inspect.signature(network.forward).parameters
        self._selects_logits = "logits_to_keep" in forward
        self._plain_options = {"use_cache": False} if "use_cache" in forward else {}
        named = network.config.id2label if class_heads(network) else {}
        self.classes = tuple(named[place] for place in range(len(named)))
        self.head = Head(network)
        self.prefix = Prefix(network, self.layout.blocks)
        self._base: dict[str, torch.Tensor] = {}
        self.masks: dict[str, torch.Tensor] = {}
        self._free: tuple[Any, dict[str, FreeCoordinates]] = (None, {})
        self.offload: Offload | None = None
        self.kept: KeptActivations | None = None
        self.work = Work()
        self._carried = CarriedStates(network, self._plain_logits)

    def keep_activations(self, most_bytes: int) -> str:
        """From now on keep what enters the first tuned block, by row, in host memory.

        Losses then have other last bits, which do not depend on `most_bytes`.

        Args:
            most_bytes: that are kept between passes; 0 keeps nothing, and the bits are the same.

        Returns:
            Why it is not kept, in words; "" if it is.
        """
        self.drop_activations()
        depth = min(self.prefix.begins, default=0)
        if not depth:
            return "the first transformer block is tuned"
        if self._is_spread:
            return "blocks are offloaded, or lie on several devices"
        lower = LowerBlocks(self.network, depth)
        places = {tensor.data_ptr() for tensor in self.tensors.values()}
        tuned = [
            module
            for module in self.network.modules()
            if any(
                parameter.data_ptr() in places
                for parameter in module.parameters(recurse=hasattr(module, "lora_A"))
            )
        ]
        try:
            lower.check(self._plain_logits, trial_tokens(self.network), tuned)
        except NotKeptError as reason:
            lower.end()
            return str(reason)
        self.kept = KeptActivations(lower, self._plain_logits, most_bytes)
        return ""

    @property
    def _is_spread(self) -> bool:
        """Whether blocks do not lie on one device all the time."""
        hooked = any(hasattr(module, "_hf_hook") for module in self.network.modules())
        return self.offload is not None or hooked

    def drop_activations(self) -> None:
        """Keep no activations from now on."""
        if self.kept is not None:
            self.kept.lower.end()
            self.kept = None

    def _plain_logits(self, tokens: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """The logits of rows of so many tokens at the weights as they are."""
        if not self.classes:
            logits: torch.Tensor = self.network(
                input_ids=tokens.to(self.device), use_cache=False
            ).logits
            return logits
        labels = torch.full(tokens.shape, IGNORED)
        labels[torch.arange(len(tokens)), torch.tensor(lengths) - 1] = 0
        return self._classified(tokens, labels)

    def offload_to_host(self) -> None:
        """From now on transformer blocks that probes do not move are offloaded to host memory.

        They come to the device while they run. Those that the last probes moved are pinned there.
        """
        self.offload = Offload(self.network, self.device, self._not_offloaded())
        self._rebind()
        # Only now does a network run whose blocks were left in host memory when it was loaded.
        self.head = Head(self.network)

    def _not_offloaded(self) -> Collection[int]:
        """`data_ptr` of storages within blocks that do not move with them."""
        return ()

    @abstractmethod
    def _rebind(self) -> None:
        """Rebind the tuned tensors, now that blocks have been pinned or offloaded."""

    def _pin_moved(self, probes: Sequence[Probe]) -> None:
        """Pin the blocks that probes move, and offload the others."""
        if self.offload is None:
            return
        steps = {id(s): s for p in probes for s in (p.trajectory, p.perturbation) if len(s)}
        if not steps:
            # A plain forward pass between two steps is no reason to send a client's blocks away.
            return
        moved = {
            int(name)
            for place, name in enumerate(self.layout.blocks)
            if name.isdigit() and any(s.moves(place) for s in steps.values())
        }
        self.pin_blocks(moved)

    def pin_blocks(self, numbers: Collection[int]) -> None:
        """Keep these transformer blocks on the device, and offload the others.

        Raises:
            RuntimeError: the device is full; `offload.pinned` says which blocks are there.
        """
        assert self.offload is not None
        before = self.offload.pinned
        try:
            self.offload.pin(numbers)
        finally:
            if self.offload.pinned != before:
                self._rebind()

    def evaluate(self, probes: Sequence[Probe]) -> list[Evaluation]:
        """Measure probes on their batches, as the objectives of these ask for it.

        The weights stay, bit for bit.
        """
        self.work.probes += len(probes)
        results: list[Evaluation] = []
        for _, run in groupby(probes, key=lambda probe: id(probe.batch.objective)):
            part = list(run)
            objective = part[0].batch.objective
            measured = self.token_losses(part) if objective is None else None
            results += objective.measure(self, part) if measured is None else measured
        return results

    def token_losses(self, probes: Sequence[Probe]) -> list[Evaluation]:
        """The loss of the labelled tokens of each probe's `TokenBatch`.

        Some probes share a forward pass: how many is the plan's to say; neighbours go together.

        Raises:
            FedForwardError: the network is a sequence classifier, which has none.
        """
        if self.classes:
            raise FedForwardError(
                "A sequence classifier has class logits and no token losses; measure it with the "
                "objectives 'loss' or 'accuracy'."
            )
        return [Evaluation(*arrays) for arrays in self._measured(probes, self._losses)]

    def choices(self, probes: Sequence[Probe], *, loss: bool = False) -> list[Choices]:
        """What the model thinks of the possible answers of each probe's `ChoiceBatch`.

        Args:
            loss: whether the loss of the right answers is asked for as well.
        """
        plain = [p for p in probes if not isinstance(p.batch.rows, JoinedRows)]
        joined = [p for p in probes if isinstance(p.batch.rows, JoinedRows)]
        found: dict[int, Choices] = {}
        if plain:
            measured = self.token_losses([replace(p, batch=p.batch.rows) for p in plain])
            for probe, losses in zip(plain, measured, strict=True):
                sums = losses.sums.reshape(len(probe.batch.right), -1)
                found[id(probe)] = choices.of_sums(sums, probe.batch.right)
        if joined:
            rows = [replace(p, batch=p.batch.rows) for p in joined]
            columns = self._measured(rows, partial(self._choice_columns, loss=loss))
            for probe, (sums, right) in zip(joined, columns, strict=True):
                found[id(probe)] = Choices(sums[:, : probe.batch.rows.targets.shape[1]], right)
        return [found[id(probe)] for probe in probes]

    def class_logits(self, probes: Sequence[Probe]) -> list[NDArray[np.float64]]:
        """A sequence classifier's logits for each probe's `TokenBatch`, float64 [rows, classes]."""
        return [logits for (logits,) in self._measured(probes, self._logits)]

    def _measured(self, probes: Sequence[Probe], measure: Measure) -> list[Arrays]:
        """What a pass yields for each probe, a row for each of its batch's."""
        self._pin_moved(probes)
        results: list[Arrays] = []
        begin = 0
        try:
            while begin < len(probes):
                end = begin + 1
                while end < len(probes) and self._fit(probes[begin : end + 1]):
                    end += 1
                again = end < len(probes) and probes[end].batch is probes[end - 1].batch
                results += self._measured_together(probes[begin:end], measure, again)
                begin = end
        finally:
            self._carried.clear()
        return results

    def _fit(self, probes: Sequence[Probe]) -> bool:
        """Whether the plan lets these probes share a forward pass."""
        tokens = len(probes) * prod(height_and_length([probe.batch for probe in probes]))
        most = self.plan.tokens_per_call or tokens
        return len(probes) <= self.plan.probes_per_call and tokens <= most

    @torch.inference_mode()
    def _measured_together(
        self, probes: Sequence[Probe], measure: Measure, again: bool
    ) -> list[Arrays]:
        """One forward pass. The probes' rows come one group after another; probes with a batch in
        common share what lies below the first block that they move, with the next pass as well if
        that measures the last batch `again`.
        """
        batches = list({id(probe.batch): probe.batch for probe in probes}.values())
        place = {id(batch): number for number, batch in enumerate(batches)}
        tokens, labels = stack(batches)
        rows = len(tokens) // len(batches)
        owner = torch.tensor([place[id(probe.batch)] for probe in probes])
        index = (owner[:, None] * rows + torch.arange(rows)).flatten()
        self._check_tokens(tokens)
        labels = labels[index]
        spread: torch.Tensor | None = index.to(self.device)
        shares = len(batches) < len(probes) and self.plan.shares_prefix
        depth = self.prefix.first(probes) if self.plan.shares_prefix else 0
        first = depth if shares else 0
        entering = self._entering(batches, tokens)
        if not first:
            tokens, spread = tokens[index], None
            entering = None if entering is None else [entering[place] for place in index.tolist()]
        if depth and (self.kept is not None or self._is_spread):
            depth = 0
        carried = self._carried.over(tuple(map(id, batches)), depth, again)
        with carried as spared, self._lower_left_out(entering):
            below = depth if spared else self.kept.lower.depth if self.kept and entering else 0
            self._count(len(tokens), labels.shape, measure, first, below)
            with self.prefix.spread(len(tokens), spread, first):
                measured = measure(tokens, labels, probes)
        columns = [part.split(rows) for part in measured]
        return [
            tuple(part.numpy()[: len(probe.batch.tokens)] for part in parts)
            for probe, *parts in zip(probes, *columns, strict=True)
        ]

    def _entering(
        self, batches: Sequence[TokenBatch], tokens: torch.Tensor
    ) -> list[torch.Tensor] | None:
        """What enters the first tuned block, for each row of stacked batches; None if not kept."""
        lengths = [batch.input_lengths for batch in batches]
        if self.kept is None or any(own is None for own in lengths):
            return None
        needed = np.zeros((len(batches), len(tokens) // len(batches)), np.int64)
        for place, own in enumerate(lengths):
            assert own is not None
            # A classifier reads its labelled token as well.
            needed[place, : len(own)] = own + bool(self.classes)
        before = self.kept.tokens
        rows = self.kept.rows(tokens.numpy(), needed.reshape(-1))
        self.work.token_blocks += (self.kept.tokens - before) * self.kept.lower.depth
        return rows

    def _lower_left_out(self, entering: list[torch.Tensor] | None) -> AbstractContextManager[None]:
        if self.kept is None or entering is None:
            return nullcontext()
        return self.kept.lower.left_out(entering)

    def _count(
        self, shared: int, shape: tuple[int, ...], measure: Measure, first: int, begin: int
    ) -> None:
        """Add a pass to `work`.

        Args:
            shared: rows below block `first`.
            shape: rows from there on, and tokens of each.
            begin: the block that the pass begins with.
        """
        rows, length = shape
        # What is predicted last need not be read.
        length -= measure == self._losses
        every = self.prefix.count or 1
        first = max(first, begin)
        self.work.token_blocks += length * (shared * (first - begin) + rows * (every - first))
        self.work.plain_token_blocks += length * rows * every

    def count_pass(self, tokens: int) -> None:
        """Add a pass over so many tokens, through all blocks, to `work`."""
        every = self.prefix.count or 1
        self.work.token_blocks += tokens * every
        self.work.plain_token_blocks += tokens * every

    def _losses(
        self, tokens: torch.Tensor, labels: torch.Tensor, probes: Sequence[Probe]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Per row: the summed loss (float64 [rows]) and the number of counted tokens.

        Args:
            tokens: int64 [rows below the first block that moves, length].
            labels: int64 [rows, length], equally many of each probe.
        """
        targets = labels[:, 1:]
        counted = targets != IGNORED
        positions = counted.any(dim=0).nonzero()[:, 0]
        every = len(positions) == targets.shape[1]
        shape = (len(labels), targets.shape[1])
        options: dict[str, Any] = {"input_ids": tokens[:, :-1].to(self.device)}
        if not every:
            targets, counted = targets[:, positions], counted[:, positions]
            # A head that is taken apart is given everything, and what counts is chosen then.
            if self._selects_logits and self.head.module is None:
                options["logits_to_keep"] = positions.to(self.device)
        with self._displaced(probes, shape):
            if self.head.module is None:
                given = self.network(use_cache=False, **options).logits
            else:
                given = self.head.inputs(**options)
            if not every and "logits_to_keep" not in options:
                given = given[:, positions.to(given.device)]
            losses = self._losses_of(given, targets, counted)
        per_token = losses.cpu().double().view(counted.shape).masked_fill(~counted, 0.0)
        return per_token.sum(dim=1), counted.sum(dim=1)

    def _losses_of(
        self, given: torch.Tensor, targets: torch.Tensor, counted: torch.Tensor
    ) -> torch.Tensor:
        """-log p of targets under the open displacement; anything where they are not counted.

        Args:
            given: what the head is given, or logits where it cannot be taken apart,
                [rows, positions, hidden or vocabulary].
            targets: int64 [rows, positions], in main memory, as is `counted`.
            counted: bool [rows, positions].
        """
        if self.head.module is None:
            return losses_of(given, targets.to(given.device))
        if self.head.sliceable and (sliced := self._vocabulary_tiles()):
            return self.head.losses_of_counted(given, targets, counted, *sliced)
        return self.head.losses_whole(given, targets.to(given.device))

    def _choice_columns(
        self, tokens: torch.Tensor, labels: torch.Tensor, probes: Sequence[Probe], loss: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Per row of `JoinedRows`: see `Choices`, float64 [rows, answers] and [rows].

        Args:
            tokens: int64 [rows below the first block that moves, length].
            labels: only their shape counts, [rows, length], equally many of each probe.
            loss: see `choices`.
        """
        own = [probe.batch for probe in probes]
        asked = choices.stack(own, len(labels) // len(own))
        self._check_tokens(asked.targets)
        places = asked.places.flatten(1)
        options: dict[str, Any] = {"input_ids": tokens.to(self.device)}
        if any(batch.branches for batch in own):
            below = own
            if len(tokens) < len(labels):
                below = list({id(batch): batch for batch in own}.values())
            options |= choices.branching(below, tokens.shape, self.network.dtype, self.device)
        if self.head.module is None and self._selects_logits:
            kept, places = places.unique(return_inverse=True)
            options["logits_to_keep"] = kept.to(self.device)
        with self._displaced(probes, (len(labels), labels.shape[1])):
            if self.head.module is None:
                given = self.network(use_cache=False, **options).logits
            else:
                given = self.head.inputs(**options)
            rows = torch.arange(len(given), device=given.device)[:, None]
            if all(batch.single for batch in own):
                # What is left out of the sum is the same for all words of a row.
                at = given[rows, places[:, :1].to(given.device)]
                sums = -self._logits_of(at, asked.targets[:, :, 0]).double().cpu()
                right = asked.right_targets
                losses = torch.zeros(len(right))
                if loss:
                    losses = self._losses_of(at, right, right != IGNORED)
                return sums, losses.double().cpu().flatten()
            at = given[rows, places.to(given.device)]
            targets, counted = asked.targets.flatten(1), (asked.targets != IGNORED).flatten(1)
            per_token = self._losses_of(at, targets, counted).cpu().double()
        per_token = per_token.view(counted.shape).masked_fill(~counted, 0.0)
        sums = per_token.view(asked.targets.shape).sum(dim=2)
        return sums, sums.gather(1, asked.right[:, None])[:, 0]

    def _logits_of(self, given: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """The logits of some words of each row under the open displacement, [rows, words].

        Args:
            given: as in `_losses_of`, [rows, 1, hidden or vocabulary].
            words: int64 [rows, words], in main memory; anything where they are IGNORED.
        """
        known, place = words.clamp(min=0).unique(return_inverse=True)
        if self.head.module is None:
            return given[:, 0].float().gather(1, known[place].to(given.device))
        found = self._vocabulary_rows(known) if self.head.sliceable else None
        if found is None:
            logits = self.head.module(given)
            logits = logits if self.head.after is None else self.head.after(logits)
            return logits[:, 0].float().gather(1, known[place].to(logits.device))
        logits = self.head.logits_of(given[:, 0], *found)
        return logits.gather(1, place.to(logits.device))

    def _logits(
        self, tokens: torch.Tensor, labels: torch.Tensor, probes: Sequence[Probe]
    ) -> tuple[torch.Tensor]:
        """See `_losses`: a sequence classifier's logits, float64 [rows, classes]."""
        with self._displaced(probes, (labels.shape[0], labels.shape[1])):
            return (self._classified(tokens, labels).double().cpu(),)

    def _classified(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """A sequence classifier's logits, [rows, classes].

        What follows a row's labelled token is hidden by the mask, and is the network's own padding
        token: decoders look for the last token that is another one.
        """
        place = torch.arange(labels.shape[1])
        there = place <= (place * (labels != IGNORED)).amax(dim=1, keepdim=True)
        padded = tokens.masked_fill(~there, self.network.config.get_text_config().pad_token_id)
        logits: torch.Tensor = self.network(
            input_ids=padded.to(self.device),
            attention_mask=there.long().to(self.device),
            **self._plain_options,
        ).logits
        return logits

    def _check_tokens(self, tokens: torch.Tensor) -> None:
        """Refuse tokens that the embeddings have no rows for, which a GPU would only crash on."""
        largest, rows = int(tokens.max()), self._rows
        if largest >= rows:
            raise FedForwardError(
                f"A text has the token with number {largest}, and the embeddings of this model "
                f"have {rows} rows: its tokenizer has more tokens than the model. Take out the "
                "text, or resize the embeddings."
            )

    @torch.inference_mode()
    def infer(self, batch: Batch) -> None:
        """One plain forward pass over the rows of a batch."""
        tokens = torch.from_numpy(batch.tokens)
        self._check_tokens(tokens)
        if self.classes:
            self._classified(tokens, torch.from_numpy(batch.labels))  # type: ignore[attr-defined]
        else:
            self.network(input_ids=tokens.to(self.device), use_cache=False)

    @torch.inference_mode()
    def classify(self, tokens: NDArray[np.int64]) -> str:
        """The name of the likeliest class of one text, int64 [length]."""
        labels = np.full((1, len(tokens)), IGNORED, np.int64)
        labels[0, -1] = 0
        (logits,) = self.class_logits([Probe(TokenBatch(tokens[None], labels))])
        name: str = self.classes[int(logits.argmax())]
        return name

    @torch.inference_mode()
    def generate(self, probes: Sequence[Probe]) -> list[NDArray[np.int64]]:
        """Greedy continuations of `PromptBatch`es, a probe at a time.

        Returns:
            int64 [rows, new tokens] for each probe, padded after the end of a continuation.
        """
        self._pin_moved(probes)
        continuations = []
        for probe in probes:
            prompts: PromptBatch = probe.batch
            rows, length = prompts.tokens.shape
            self._check_tokens(torch.from_numpy(prompts.tokens))
            failing = sentences("This network cannot continue a text", "Give another model.")
            with failing, self._displaced([probe], (rows, length)):
                whole = self.network.generate(
                    input_ids=torch.from_numpy(prompts.tokens).to(self.device),
                    attention_mask=torch.from_numpy(prompts.mask).to(self.device),
                    max_new_tokens=prompts.most_tokens,
                    do_sample=False,
                    num_beams=1,
                    pad_token_id=prompts.padding,
                )
            continuations.append(whole[:, length:].cpu().numpy())
        return continuations

    @abstractmethod
    def _displaced(
        self, probes: Sequence[Probe], shape: tuple[int, int]
    ) -> AbstractContextManager[None]:
        """While it is open, group g of the rows meets the weights displaced as probe g has them.

        Args:
            shape: rows of all groups, and tokens in a row.
        """

    def _vocabulary_tiles(self) -> tuple[int, Iterator[VocabularyTile]] | None:
        """The head as the open displacement has it, and how many groups of rows differ in it.

        None if it cannot be cut along the vocabulary.
        """
        return 1, self.head.frozen_tiles()

    def _vocabulary_rows(self, tokens: torch.Tensor) -> tuple[int, VocabularyTile] | None:
        """Some rows of the head, int64 [tokens], as the open displacement has them.

        See `_vocabulary_tiles`.
        """
        head = self.head.module
        assert isinstance(head, nn.Linear)
        tokens = tokens.to(head.weight.device)
        biases = [] if head.bias is None else [head.bias[tokens]]
        return 1, VocabularyTile(0, [head.weight[tokens]], biases)

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what was tuned: a PEFT adapter, or the whole model in Hugging Face format."""

    def commit(self, updates: Sequence[Update]) -> None:
        """Apply updates in order, any number of them in one pass over the weights.

        Float32 is rounded to nearest, half precision stochastically, after each update. What
        comes before an update from the base is not applied: nothing of it would be left.
        """
        self.clear_cache()
        begin = max((n for n, update in enumerate(updates) if update.from_base), default=0)
        updates = updates[begin:]
        if updates and updates[0].from_base:
            self.keep_base()
            for name, base in self._base.items():
                self.tensors[name].copy_(base)
        if self.free_coordinates():
            changed = self._commit_few(updates)
        elif self.masks:
            changed = self._commit_masked(updates)
        else:
            changed = commit_all(self._moved_by(updates), self.distribution)
        if updates and any(t.dtype is not torch.float32 for t in self.tensors.values()):
            self.changed_share = changed / self.layout.parameters

    def _commit_masked(self, updates: Sequence[Update]) -> int:
        """Move all coordinates, and put back those that a mask holds; returns how many changed."""
        changed = 0
        for name, mask in self.masks.items():
            place = self.layout.names.index(name)
            own = [update.block(self.layout.owners[place]) for update in updates]
            tensor = self.tensors[name]
            before = tensor.clone()
            part = (tensor, self.layout.first_tiles[place], own)
            changed += commit_all([part], self.distribution)
            tensor.copy_(torch.where(mask.to(tensor.device), tensor, before))
        return changed

    def _commit_few(self, updates: Sequence[Update]) -> int:
        """Move the few coordinates that a mask leaves free; returns how many changed."""
        free = self.free_coordinates()
        moved = zip(self.layout.names, self._moved_by(updates), strict=True)
        return sum(
            commit_at(tensor, free[name], own, distribution=self.distribution)
            for name, (tensor, _, own) in moved
        )

    def free_coordinates(self) -> dict[str, FreeCoordinates]:
        """The coordinates that a mask leaves free, by tensor, where a list of them is faster.

        Nothing where there is no mask, or it leaves many free, or the weights are not in main
        memory. The bits are the same either way.
        """
        if self._free[0] is not self.masks:
            found: dict[str, FreeCoordinates] = {}
            count = sum(int(mask.sum()) for mask in self.masks.values())
            few = count <= SPARSE[self.distribution] * self.layout.parameters
            if self.masks and few and all(t.device.type == "cpu" for t in self.tensors.values()):
                tiles = dict(zip(self.layout.names, self.layout.first_tiles, strict=True))
                for name, mask in self.masks.items():
                    places = mask.view(-1).nonzero()[:, 0].numpy()
                    found[name] = FreeCoordinates(places, tiles[name])
            self._free = (self.masks, found)
        return self._free[1]

    def _moved_by(self, updates: Sequence[Update]) -> list[tuple[torch.Tensor, int, list[Update]]]:
        """What updates do to each tuned tensor: the tensor, its first tile, its own updates."""
        by_block = [[update.block(b) for update in updates] for b in range(len(self.layout.blocks))]
        places = zip(self.layout.names, self.layout.first_tiles, self.layout.owners, strict=True)
        return [(self.tensors[name], tile, by_block[owner]) for name, tile, owner in places]

    def apply(self, steps: Steps) -> None:
        """θ ← round(θ + Σ_k c_k z(s_k)): one update, for loops that are written by hand.

        In half precision it is rounded stochastically, each call in another way.

        Example:
            >>> model.apply(-1e-3 * Steps.of([7], [1.0]))  # doctest: +SKIP
        """
        self._applied += 1
        self.commit([Update(steps, self._applied)])

    def reset(self) -> None:
        """Back to the base: the tuned tensors as they were when the model was built."""
        if self._base:
            for name, base in self._base.items():
                self.tensors[name].copy_(base)
        else:
            self._start_again()
        self.clear_cache()

    @abstractmethod
    def _start_again(self) -> None:
        """Make the tuned tensors' first values again."""

    def keep_base(self) -> None:
        """Keep the tuned tensors as they are now, for updates that start from the base."""
        if not self._base:
            self._base = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}

    @abstractmethod
    def clear_cache(self) -> None:
        """Drop what is kept between calls: sums of local steps, adapters of the last probes."""

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

    def export_bytes(self) -> bytes:
        """The tuned tensors' bytes in the layout's order, dtypes as they are."""
        return tensor_bytes.to_bytes(self.tensors.values())

    @torch.no_grad()
    def assign_bytes(self, data: bytes) -> None:
        """Set the tuned tensors from what `export_bytes` gave.

        Raises:
            MessageError: it is of another size.
        """
        tensor_bytes.assign_bytes(self.tensors.values(), data)
        self.clear_cache()

    @property
    def state_bytes(self) -> int:
        """Bytes of the tuned tensors."""
        return sum(tensor_bytes.sizes(self.tensors.values()))

    def export_state(self) -> NDArray[np.float32]:
        """The tuned tensors in the layout's order as one float32 array [d]."""
        parts = [tensor.detach().float().reshape(-1).cpu() for tensor in self.tensors.values()]
        return torch.cat(parts).numpy()

    @torch.no_grad()
    def assign_state(self, state: NDArray[np.float32]) -> None:
        """Set the tuned tensors from one float32 array [d], rounding to nearest."""
        parts = torch.from_numpy(state).split(list(self.layout.sizes))
        for tensor, part in zip(self.tensors.values(), parts, strict=True):
            tensor.copy_(part.view(tensor.shape))
        self.clear_cache()

    def loss(self, batch: TokenBatch | ChoiceBatch) -> torch.Tensor:
        """Mean loss per counted token with gradients to the tuned tensors (first-order methods).

        Of a `ChoiceBatch`: the mean cross-entropy over the possible answers of its examples.
        """
        if isinstance(batch, ChoiceBatch):
            return nn.functional.cross_entropy(
                -self._choice_sums(batch), torch.from_numpy(batch.right).to(self.device)
            )
        if self.classes:
            labels = torch.from_numpy(batch.labels)
            logits = self._classified(torch.from_numpy(batch.tokens), labels)
            classes = labels.amax(dim=1).to(logits.device)
            return nn.functional.cross_entropy(logits.double(), classes)
        losses, counted = self._losses_with_gradients(batch)
        return losses.sum() / counted.sum()

    def logits_and_targets(
        self, batch: TokenBatch | ChoiceBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `loss` is the mean cross-entropy of, with gradients to the tuned tensors.

        Returns:
            logits, float32 or wider [n, classes], and the right classes, int64 [n]: of counted
            tokens, of the possible answers of examples, or of a classifier's texts.
        """
        if isinstance(batch, ChoiceBatch):
            sums = self._choice_sums(batch)
            return -sums, torch.from_numpy(batch.right).to(sums.device)
        if self.classes:
            labels = torch.from_numpy(batch.labels)
            logits = self._classified(torch.from_numpy(batch.tokens), labels)
            return logits.float(), labels.amax(dim=1).to(logits.device)
        logits, targets, counted = self._logits_with_gradients(batch)
        return logits[counted].float(), targets[counted]

    def _losses_with_gradients(self, batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed losses of the rows, float64 [rows], and how many tokens were counted, [rows]."""
        logits, targets, counted = self._logits_with_gradients(batch)
        losses = losses_of(logits, targets).double() * counted
        return losses.sum(dim=1), counted.sum(dim=1)

    def _logits_with_gradients(
        self, batch: TokenBatch
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits [rows, positions, vocabulary] where some row counts, targets, and which count."""
        tokens = torch.from_numpy(batch.tokens).to(self.device)
        targets = torch.from_numpy(batch.labels)[:, 1:].to(self.device)
        counted = targets != IGNORED
        positions = counted.any(dim=0).nonzero()[:, 0]
        options = {"logits_to_keep": positions} if self._selects_logits else {}
        logits = self.network(input_ids=tokens[:, :-1], use_cache=False, **options).logits
        if not self._selects_logits:
            logits = logits[:, positions]
        return logits, targets[:, positions], counted[:, positions]

    def _choice_sums(self, batch: ChoiceBatch) -> torch.Tensor:
        """As `Choices.sums`, with gradients to the tuned tensors."""
        rows = batch.rows
        if not isinstance(rows, JoinedRows):
            return self._losses_with_gradients(rows)[0].view(len(batch.right), -1)
        asked = choices.stack([rows], len(rows.tokens))
        options: dict[str, Any] = {"input_ids": torch.from_numpy(rows.tokens).to(self.device)}
        if rows.branches:
            dtype = self.network.dtype
            options |= choices.branching([rows], rows.tokens.shape, dtype, self.device)
        places = asked.places.flatten(1)
        if self._selects_logits:
            kept, places = places.unique(return_inverse=True)
            options["logits_to_keep"] = kept.to(self.device)
        logits = self.network(use_cache=False, **options).logits
        at = logits[torch.arange(len(logits))[:, None], places]
        targets = asked.targets.flatten(1).to(at.device)
        losses = losses_of(at, targets).double().masked_fill(targets == IGNORED, 0.0)
        return losses.view(asked.targets.shape).sum(dim=2)
