"""What enters the first tuned block, kept by example: the same bits whatever was kept before."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedforward.core.batches import IGNORED, TokenBatch
from fedforward.core.steps import Evaluation, Probe, Steps, Update
from fedforward.models.base import CausalModel
from fedforward.models.blocks import transformer_blocks
from fedforward.models.full import FullModel
from fedforward.models.kept_activations import Work
from fedforward.models.trial import is_linear
from tests.models.test_classification import KINDS, classifier, examples
from tests.models.test_classification import batch as classes
from tests.models.test_models import batch, hugging_face_loss, lora, plan
from tests.models.test_probing import FAMILIES, make

Make = Callable[..., Any]
#: More than any of these tests keeps.
PLENTY = 1 << 24


def build(tune: str, network: Any, blocks: Sequence[int] = (1,), together: int = 4) -> CausalModel:
    if tune == "lora":
        return lora(network, plan=plan(together), blocks=blocks)
    return FullModel(network, plan=plan(together), blocks=blocks)


def probes(*data: TokenBatch) -> list[Probe]:
    """Two of each batch, apart from a step that they share."""
    along = Steps.of([5], [0.05])
    return [Probe(b, along, Steps.of([11], [c])) for b in data for c in (0.05, -0.05)]


def bits(measured: Sequence[Evaluation]) -> list[list[float]]:
    return [evaluation.sums.tolist() for evaluation in measured]


def joined(*parts: TokenBatch) -> TokenBatch:
    """Rows of several batches as one, each padded on the right to the longest."""
    width = max(part.tokens.shape[1] for part in parts)
    pads = [(0, width - part.tokens.shape[1]) for part in parts]
    tokens = [np.pad(p.tokens, ((0, 0), w)) for p, w in zip(parts, pads, strict=True)]
    labels = [
        np.pad(p.labels, ((0, 0), w), constant_values=IGNORED)
        for p, w in zip(parts, pads, strict=True)
    ]
    return TokenBatch(np.concatenate(tokens), np.concatenate(labels))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_kept_is_what_a_plain_pass_computes(family: str, tune: str) -> None:
    """Lower blocks run once for a row, and never again; losses differ by rounding at most."""
    if (family, tune) == ("mamba", "lora"):
        pytest.skip("no linear module of it can be probed")
    one, two = batch(1, 2, 9), batch(2, 3, 12)
    expected = build(tune, make(family)).evaluate(probes(one, two))
    model = build(tune, make(family))
    assert model.keep_activations(PLENTY) == ""
    first = model.evaluate(probes(one, two))
    for kept, plain in zip(first, expected, strict=True):
        np.testing.assert_allclose(kept.sums, plain.sums, rtol=1e-5)
        assert kept.counts.tolist() == plain.counts.tolist()
    assert first[0].sums[0] != pytest.approx(first[1].sums[0], rel=1e-5)
    calls: list[int] = []
    lower = transformer_blocks(model.network)[0]
    inner = next(module for module in lower.modules() if is_linear(module))
    handle = inner.register_forward_hook(lambda *_: calls.append(1))
    assert bits(model.evaluate(probes(one, two))) == bits(first)
    assert not calls
    model.evaluate(probes(batch(3)))
    handle.remove()
    assert calls


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_no_bit_depends_on_what_was_kept(tiny_network: Make, tune: str, dtype: str) -> None:
    """Enough memory, room for one row or for none; in any order; in any company."""
    data = [batch(seed, 2, length) for seed, length in ((1, 7), (2, 12), (3, 9))]
    given = probes(*data)
    model = build(tune, tiny_network(dtype))
    assert model.keep_activations(PLENTY) == ""
    whole = bits(model.evaluate(given))
    assert model.kept is not None
    # A row is needed up to what precedes its last counted token.
    needed = sum(int(batch.input_lengths.sum()) for batch in data)  # type: ignore[union-attr]
    assert model.kept.size == needed * model.kept.bytes_per_token
    row = 11 * model.kept.bytes_per_token
    for most in (row, 0):
        other = build(tune, tiny_network(dtype))
        assert other.keep_activations(most) == ""
        assert bits(other.evaluate(given)) == whole
        assert bits(other.evaluate(given)) == whole
        assert other.kept is not None and other.kept.size <= most
    # A row that is measured beside others for the first time is kept as if it had been alone.
    other = build(tune, tiny_network(dtype))
    other.keep_activations(PLENTY)
    other.evaluate([Probe(joined(*data))])
    before = other.kept.tokens if other.kept else 0
    assert bits(other.evaluate(given)) == whole
    assert other.kept is not None and other.kept.tokens == before


def test_what_was_used_last_stays(tiny_network: Make) -> None:
    model = build("lora", tiny_network())
    one, two, three = (batch(seed, 1, 10) for seed in (1, 2, 3))
    assert model.keep_activations(PLENTY) == "" and model.kept is not None
    model.kept.most_bytes = 2 * 9 * model.kept.bytes_per_token

    def computed(data: TokenBatch) -> bool:
        assert model.kept is not None
        before = model.kept.tokens
        model.evaluate([Probe(data)])
        return model.kept.tokens > before

    assert [computed(data) for data in (one, two, one, three, one, two)] == [
        True, True, False, True, False, True,
    ]  # fmt: skip


def test_updates_leave_what_is_kept(tiny_network: Make) -> None:
    """After steps of upper blocks: what another model computes that was moved before."""
    update = [Update(Steps.of([9], [0.1]), 0)]
    model, other = build("full", tiny_network()), build("full", tiny_network())
    model.keep_activations(PLENTY)
    before = bits(model.evaluate(probes(batch())))
    model.commit(update)
    other.commit(update)
    other.keep_activations(PLENTY)
    after = bits(model.evaluate(probes(batch())))
    assert after == bits(other.evaluate(probes(batch())))
    assert after != before


def test_clients_with_other_blocks_share_what_lies_between() -> None:
    """Kept up to the first block that anyone tunes; spread where a client's own begins."""
    network = make("llama")
    model = build("lora", make("llama"), (0, 1))
    assert model.keep_activations(PLENTY) == "the first transformer block is tuned"
    torch.manual_seed(0)
    four = network.config.to_dict() | {"num_hidden_layers": 4, "layer_types": None}
    network = type(network)(type(network.config)(**four)).eval().requires_grad_(False)
    model = build("lora", network, (1, 2, 3))
    data = batch()
    top = np.array([name == "3" for name in model.layout.blocks])
    given = [
        Probe(data, Steps.of([5], [0.05]).within(top), Steps.of([s], [0.1]).within(top))
        for s in (7, 8)
    ]
    plain = model.evaluate(given)
    assert model.keep_activations(PLENTY) == ""
    model.evaluate(given)
    model.work = Work()
    for kept, expected in zip(model.evaluate(given), plain, strict=True):
        np.testing.assert_allclose(kept.sums, expected.sums, rtol=1e-5)
    # Blocks 1 and 2 once, block 3 for both.
    assert model.work.token_blocks == 2 * 11 * (2 + 2)
    assert model.work.plain_token_blocks == 2 * 2 * 11 * 4
    assert model.work.passes == 1.0


def test_work_counts_lower_blocks_once(tiny_network: Make) -> None:
    model = build("lora", tiny_network())
    blocks = len(transformer_blocks(model.network))
    data = batch(0, 2, 12)
    model.evaluate([replace(probe, batch=data) for probe in probes(data)])
    # Two probes: what lies below the first tuned block once for both.
    assert model.work == Work(2 * 11 * (1 + 2 * (blocks - 1)), 2 * 2 * 11 * blocks, 2)
    model.keep_activations(PLENTY)
    for lower in (11 + 9, 0):
        model.work = Work()
        model.evaluate(probes(data))
        assert model.work.token_blocks == lower + 2 * 2 * 11 * (blocks - 1)
        assert model.work.plain_token_blocks == 2 * 2 * 11 * blocks


class Remembers(torch.nn.Module):
    """A block that adds what the block below it was given: more enters it than one state."""

    def __init__(self, block: Any, below: Any) -> None:
        super().__init__()
        self.block, self.state = block, None
        below.register_forward_hook(lambda module, args, result: self.note(args[0]))

    def note(self, state: Any) -> None:
        self.state = state

    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        result = self.block(hidden_states, *args, **kwargs)
        if isinstance(result, tuple):
            return (result[0] + self.state, *result[1:])
        return result + self.state


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_blocks_that_take_more_from_below(tune: str) -> None:
    network = make("llama")
    layers = network.model.layers
    inner = layers[1]
    layers[1] = Remembers(inner, layers[0].mlp)
    model = build(tune, network, together=1)
    plain = bits(model.evaluate(probes(batch())))
    assert "take more from those below" in model.keep_activations(PLENTY)
    assert model.kept is None
    assert bits(model.evaluate(probes(batch()))) == plain


def test_a_tuned_module_below() -> None:
    """It is registered after the blocks, and runs before them."""
    network = make("llama")
    network.early = torch.nn.Linear(32, 32)
    network.model.embed_tokens.register_forward_hook(lambda *call: network.early(call[-1]))
    model = lora(network, plan=plan(1), targets=["early"])
    assert model.prefix.begins == (1,)
    assert model.keep_activations(PLENTY) == "a tuned module runs before block 1"


def test_kept_no_more(tiny_network: Make) -> None:
    model = build("lora", tiny_network())
    plain = bits(model.evaluate(probes(batch())))
    hooks = len(transformer_blocks(model.network)[1]._forward_pre_hooks)
    model.keep_activations(PLENTY)
    model.evaluate(probes(batch()))
    model.drop_activations()
    assert bits(model.evaluate(probes(batch()))) == plain
    assert len(transformer_blocks(model.network)[1]._forward_pre_hooks) == hooks


def test_generated_answers_and_plain_inference_go_the_plain_way(tiny_network: Make) -> None:
    model = build("lora", tiny_network())
    data = batch()
    expected = hugging_face_loss(model.network, data)
    model.keep_activations(PLENTY)
    model.evaluate(probes(data))
    assert hugging_face_loss(model.network, data) == expected
    assert model.kept is not None
    before = model.kept.tokens
    model.infer(data)
    assert model.kept.tokens == before


@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize(
    ("together", "apart", "expected"),
    [
        (1, [2] * 9, [2, 2]),
        # The fourth pass has probes of both batches: it is another one.
        (2, [2, 2, 2, 4, 2], [2, 4, 2]),
        (3, [2, 2, 4], [2, 4]),
    ],
)
def test_probes_in_several_passes_share_lower_blocks(
    tune: str, together: int, apart: list[int], expected: list[int]
) -> None:
    """Rows that run through block 0 in passes of their own, and in those of one call."""
    one, two = batch(0, 2, 12), batch(1, 2, 12)
    along = Steps.of([5], [0.05])
    data = [one] * 7 + [two] * 2
    given = [Probe(own, along, Steps.of([s], [0.1])) for s, own in enumerate(data)]
    model = build(tune, make("llama"), together=together)
    model.evaluate(given)
    rows: list[int] = []
    inner = transformer_blocks(model.network)[0].mlp
    handle = inner.register_forward_hook(lambda module, args, result: rows.append(len(args[0])))
    alone = [
        evaluation
        for begin in range(0, len(given), together)
        for evaluation in model.evaluate(given[begin : begin + together])
    ]
    assert rows == apart
    rows.clear()
    model.work = Work()
    assert bits(model.evaluate(given)) == bits(alone)
    assert rows == expected
    assert model.work.token_blocks == 11 * (sum(expected) + 2 * len(given))
    handle.remove()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_classifiers(kind: str, tune: str) -> None:
    """Encoders too: a text sees all of itself, and padding is hidden from it either way."""
    data = [classes(seed) for seed in (0, 1)]
    along = Steps.of([5], [0.05])
    given = [Probe(b, along, Steps.of([11], [c])) for b in data for c in (0.1, -0.1)]
    plain = build(tune, classifier(kind)).evaluate(given)
    model = build(tune, classifier(kind))
    assert model.keep_activations(PLENTY) == ""
    kept = model.evaluate(given)
    for one, other in zip(kept, plain, strict=True):
        np.testing.assert_allclose(one.sums, other.sums, rtol=2e-5)
    assert model.kept is not None
    before = model.kept.tokens
    # Every token of a text was read, none of them twice.
    assert before == sum(len(e.tokens) for seed in (0, 1) for e in examples(seed))
    assert bits(model.evaluate(given)) == bits(kept)
    assert model.kept.tokens == before
    model.kept.clear()
    model.kept.most_bytes = 0
    assert bits(model.evaluate(given[2:])) == bits(kept[2:])
