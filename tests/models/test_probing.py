"""Probes beside the weights in the ways that make them cheap: together, by tiles, from a prefix."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedforward.core.batches import TokenBatch
from fedforward.core.errors import FedForwardError
from fedforward.core.steps import NO_STEPS, Probe, Steps, Update
from fedforward.directions import Distribution
from fedforward.methods.estimators import TwoPoint
from fedforward.models import lm_head as head_module
from fedforward.models.base import CausalModel
from fedforward.models.blocks import transformer_blocks
from fedforward.models.full import FullModel
from fedforward.planning import probe_grouping as planning
from fedforward.planning.memory.tracker import bytes_alive, peak_bytes
from tests.models.test_models import (
    PERTURBATION,
    TRAJECTORY,
    batch,
    displace,
    hugging_face_loss,
    lora,
    plan,
)

Make = Callable[..., Any]
OPPOSITE = Steps.of([11], [-0.05])
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gpt2", "opt", "phi", "mamba")


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight and every head takes several tiles, every tile several chunks of tokens."""
    monkeypatch.setitem(head_module.WEIGHTS_AT_ONCE, "cpu", 700)
    monkeypatch.setitem(head_module.LOGITS_AT_ONCE, "cpu", 100)


def make(family: str) -> Any:
    """A tiny network of a family, random weights, with nothing left at a neutral value."""
    from transformers import AutoConfig, AutoModelForCausalLM

    small: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "vocab_size": 97,
        "max_position_embeddings": 64,
        "head_dim": 8,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family == "gpt2":
        small = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 97, "n_positions": 64}
        small |= {"bos_token_id": 1, "eos_token_id": 2}
    if family == "opt":
        small |= {"ffn_dim": 48, "word_embed_proj_dim": 32}
    if family == "gemma2":
        small |= {"final_logit_softcapping": 0.7}
    if family == "mamba":
        small = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **small)
    network = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape))
    return network


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("together", [1, 2])
def test_full_tuning_of_a_family(family: str, together: int) -> None:
    """Both signs in one forward pass or one after another: as if the weights had moved."""
    network = make(family)
    expected = hugging_face_loss(network, batch())
    model = FullModel(network, plan=plan(together))
    probes = [Probe(batch())]
    probes += [Probe(batch(), TRAJECTORY, sign) for sign in (PERTURBATION, OPPOSITE)]
    plain, *moved = [r.mean for r in model.evaluate(probes[:1]) + model.evaluate(probes[1:])]
    assert plain == pytest.approx(expected, rel=1e-5)
    assert moved[0] != pytest.approx(moved[1], rel=1e-4)
    for sign, loss in zip((PERTURBATION, OPPOSITE), moved, strict=True):
        other = FullModel(make(family), plan=plan(1))
        displace(other.tensors, other.layout, TRAJECTORY + sign, Distribution.GAUSSIAN)
        assert loss == pytest.approx(hugging_face_loss(other.network, batch()), rel=1e-5)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "mamba"])
def test_adapters_on_a_family(family: str) -> None:
    network = make(family)
    expected = hugging_face_loss(network, batch())
    model = lora(network, plan=plan(2))
    plain, moved = model.evaluate([Probe(batch()), Probe(batch(), TRAJECTORY, PERTURBATION)])
    assert plain.mean == pytest.approx(expected, rel=1e-5)
    displace(model.tensors, model.layout, TRAJECTORY + PERTURBATION, Distribution.GAUSSIAN)
    assert moved.mean == pytest.approx(hugging_face_loss(network, batch()), rel=1e-5)
    assert moved.mean != pytest.approx(plain.mean, rel=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("trajectory", ["recompute", "cache"])
def test_both_signs_in_one_pass_in_every_dtype(
    tiny_network: Make, dtype: str, trajectory: str
) -> None:
    probes = [Probe(batch(), TRAJECTORY, sign) for sign in (PERTURBATION, OPPOSITE)]
    together = FullModel(tiny_network(dtype), plan=plan(2, trajectory)).evaluate(probes)
    alone = FullModel(tiny_network(dtype), plan=plan(1, trajectory)).evaluate(probes)
    apart = abs(alone[0].mean - alone[1].mean)
    for one, other in zip(together, alone, strict=True):
        assert abs(one.mean - other.mean) < (1e-4 if dtype == "float32" else 0.25) * apart


def test_trajectories_that_differ_in_one_pass(tiny_network: Make) -> None:
    """Full tuning: neither probe meets the float32 copy that an earlier call left behind."""
    model = FullModel(tiny_network(), plan=plan(2, "cache"))
    model.evaluate([Probe(batch(), TRAJECTORY, PERTURBATION)])
    probes = [Probe(batch(), TRAJECTORY[:k], PERTURBATION) for k in (1, 2)]
    together = model.evaluate(probes)
    for probe, result in zip(probes, together, strict=True):
        (alone,) = FullModel(tiny_network(), plan=plan(1)).evaluate([probe])
        assert result.mean == pytest.approx(alone.mean, rel=1e-6)


@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("tokens", [1, 24, 60])
def test_a_pass_keeps_to_its_tokens(tiny_network: Make, tune: str, tokens: int) -> None:
    """Whatever the limit: the same losses for the same examples, and no pass above it."""
    network = tiny_network()
    limited = replace(plan(4), tokens_per_call=tokens)
    model: CausalModel = (
        lora(network, plan=limited) if tune == "lora" else FullModel(network, plan=limited)
    )
    seen: list[int] = []
    network.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    data = [batch(1, 3), batch(2, 2, 9)]
    probes = [Probe(b, TRAJECTORY, sign) for b in data for sign in (PERTURBATION, OPPOSITE)]
    results = model.evaluate(probes)
    row = 11 if tune == "lora" else 33
    assert max(seen) <= max(tokens, row) and len(seen) > 1
    for probe, result in zip(probes, results, strict=True):
        build = lora if tune == "lora" else FullModel
        (alone,) = build(tiny_network(), plan=plan(1)).evaluate([probe])
        np.testing.assert_allclose(result.sums, alone.sums, rtol=1e-5)
        assert result.counts.tolist() == alone.counts.tolist()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("rows", [1, 2])
def test_an_adapted_head(tiny_network: Make, rows: int) -> None:
    """Where the head itself has adapters, every group of rows meets its own."""
    model = lora(tiny_network(tie=False), targets=["q_proj", "lm_head"], plan=plan(2))
    data = batch(0, rows)
    plus, minus = model.evaluate([Probe(data, TRAJECTORY, s) for s in (PERTURBATION, OPPOSITE)])
    displace(model.tensors, model.layout, TRAJECTORY + PERTURBATION, Distribution.GAUSSIAN)
    assert plus.mean == pytest.approx(hugging_face_loss(model.network, data), rel=2e-6)
    assert minus.mean != pytest.approx(plus.mean, rel=1e-4)


@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("rows", [1, 3])
def test_blocks_below_the_first_tuned_one_run_once(
    tiny_network: Make, tune: str, rows: int
) -> None:
    """Two clients with two probes each: the lower blocks see two batches, the upper four."""
    network = tiny_network()
    last = len(transformer_blocks(network)) - 1
    model: CausalModel
    if tune == "lora":
        model = lora(network, blocks=[last], plan=plan(4))
    else:
        model = FullModel(network, blocks=[last], plan=plan(4))
    assert min(model.prefix.depths) == last
    assert all(f"layers.{last}." in name for name in model.tensors)
    seen: list[int] = []
    for number in (0, last):
        transformer_blocks(network)[number].register_forward_hook(
            lambda _, args, out: seen.append(len(out if torch.is_tensor(out) else out[0]))
        )
    one, two = batch(1, rows), batch(2, rows, 9)
    probes = [
        Probe(data, TRAJECTORY, sign) for data in (one, two) for sign in (PERTURBATION, OPPOSITE)
    ]
    results = model.evaluate(probes)
    assert seen == [2 * rows, 4 * rows]
    displace(model.tensors, model.layout, TRAJECTORY + OPPOSITE, Distribution.GAUSSIAN)
    assert results[1].mean == pytest.approx(hugging_face_loss(network, one), rel=1e-5)
    assert results[3].mean == pytest.approx(hugging_face_loss(network, two), rel=1e-5)


def test_a_prefix_passes_rows_and_masks_on() -> None:
    """Gemma 2 hands every block a mask of its own kind and rotations for all rows."""
    network = make("gemma2")
    model = FullModel(network, blocks=[1], plan=plan(2))
    plus, _ = model.evaluate(
        [Probe(batch(0, 3), NO_STEPS, sign) for sign in (PERTURBATION, OPPOSITE)]
    )
    displace(model.tensors, model.layout, PERTURBATION, Distribution.GAUSSIAN)
    assert plus.mean == pytest.approx(hugging_face_loss(network, batch(0, 3)), rel=1e-5)


def test_blocks_that_are_not_there_are_refused(tiny_network: Make) -> None:
    with pytest.raises(FedForwardError, match=r"model\.blocks names block 40, but this model has"):
        lora(tiny_network(), blocks=[0, 40])


def test_a_cached_sum_has_the_bits_of_one_made_at_once(tiny_network: Make) -> None:
    """LoRA: the local steps that a client has taken are added once, not in every probe."""
    model = lora(tiny_network(), plan=plan(2))
    for length in range(4):
        trajectory = TRAJECTORY[:length]
        other = TRAJECTORY[: max(0, length - 1)] + Steps.of([99], [0.03])
        probes = [Probe(batch(), t, PERTURBATION) for t in (trajectory, other)]
        cached = model.evaluate(probes)
        fresh = lora(tiny_network(), plan=plan(2)).evaluate(probes)
        for one, same in zip(cached, fresh, strict=True):
            assert one.sums.tobytes() == same.sums.tobytes()
    assert len(model.trajectory_cache) == 2


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_any_number_of_updates_in_one_pass(tiny_network: Make, tune: str) -> None:
    """A client that catches up ends with the bits of one that was there."""
    updates = [
        Update(Steps.of(range(k, k + 9), np.linspace(-1e-2, 1e-2, 9)), 7 * k, decay=1 - 1e-3 * k)
        for k in range(6)
    ]

    def model() -> CausalModel:
        return (
            lora(tiny_network())
            if tune == "lora"
            else FullModel(tiny_network("bfloat16"), plan=plan(1))
        )

    there, late = model(), model()
    for update in updates:
        there.commit([update])
    late.commit(updates)
    assert late.digest() == there.digest()
    assert late.changed_share == there.changed_share


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_step_never_holds_the_logits(tiny_network: Make, tune: str) -> None:
    """With a wide vocabulary a step of two probes takes less than the logits of one would."""
    network = tiny_network(vocabulary=30_000)
    model: CausalModel = (
        lora(network, plan=plan(2)) if tune == "lora" else FullModel(network, plan=plan(2))
    )
    tokens = np.random.default_rng(0).integers(3, 97, (8, 129))
    probes = [Probe(TokenBatch(tokens, tokens), NO_STEPS, s) for s in (PERTURBATION, OPPOSITE)]
    model.evaluate(probes)
    before = bytes_alive()
    assert peak_bytes(lambda: model.evaluate(probes)) - before < 4 * 8 * 128 * 30_000 / 2


def test_probes_follow_a_memory_budget(tiny_network: Make) -> None:
    model = lora(tiny_network(), plan=plan(1))
    data = [batch(0, 4, 40)]

    def peak(count: int) -> int:
        model.plan = plan(count)
        probes = planning.step_probes(data, count, TwoPoint())
        return peak_bytes(lambda: model.evaluate(probes))

    peak(8)
    budget = peak(6) + 1000
    chosen = planning.fit(model, data, budget, 32, TwoPoint()).probes_per_call
    assert 5 <= chosen <= 7 and peak(chosen) <= budget
    assert planning.fit(model, data, 10 * budget, 6, TwoPoint()).probes_per_call == 12
    with pytest.raises(FedForwardError, match=r"run\.memory_budget = 10\.00 KiB is too small"):
        planning.fit(model, data, 10240, 32, TwoPoint())


def test_a_weight_that_is_read_past_its_parameter_is_refused() -> None:
    """A network that keeps a second way to a weight would not see it move."""
    network = make("llama")
    layer = network.model.layers[0].self_attn.q_proj
    kept = layer.weight.data
    layer.forward = lambda x: x @ kept.T
    model = FullModel(network, plan=plan(1))
    with pytest.raises(FedForwardError, match=r"does not reach .*q_proj"):
        model.evaluate([Probe(batch(), NO_STEPS, PERTURBATION)])


def test_targets_within_blocks_are_those_of_peft(tiny_network: Make) -> None:
    """A string is a regular expression, a list holds endings of names, with blocks or without."""
    for targets in (r".*\.(q|v)_proj", ["self_attn.q_proj", "v_proj"]):
        everywhere = lora(tiny_network(), targets=targets).tensors
        last = lora(tiny_network(), targets=targets, blocks=[1]).tensors
        assert set(last) == {name for name in everywhere if "layers.1." in name} != set()
    for targets in ("all-linear(", ".*none", ["none"]):
        with pytest.raises(FedForwardError, match=r"lora\.targets = .* does not fit this model"):
            lora(tiny_network(), targets=targets, blocks=[1])
