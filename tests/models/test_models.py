"""Causal language models: probes beside the weights, equal to the plain way of doing it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fedforward.core.batches import IGNORED, TokenBatch
from fedforward.core.errors import FedForwardError
from fedforward.core.steps import NO_STEPS, Probe, ProbePlan, Steps, Update
from fedforward.directions import TILE, Distribution, Layout, reference
from fedforward.models.base import CausalModel
from fedforward.models.full import FullModel
from fedforward.models.lora import LoraModel
from fedforward.models.lora_layers import PARTS, in_halves

Make = Callable[..., Any]
TRAJECTORY = Steps.of([5, 6, 7], [0.02, -0.01, 0.015])
PERTURBATION = Steps.of([11], [0.05])


def plan(probes: int = 4, trajectory: str = "recompute") -> ProbePlan:
    return ProbePlan(probes, 1, trajectory, 4)


def batch(seed: int = 0, rows: int = 2, length: int = 12) -> TokenBatch:
    random = np.random.default_rng(seed)
    tokens = random.integers(3, 97, (rows, length))
    labels = tokens.copy()
    labels[:, : length // 3] = IGNORED
    labels[-1, -2:] = IGNORED
    return TokenBatch(tokens, labels)


def lora(network: Any, **options: Any) -> LoraModel:
    options = {"rank": 3, "alpha": 6.0, "plan": plan()} | options
    return LoraModel(network, **options)


def hugging_face_loss(network: Any, data: TokenBatch) -> float:
    tokens, labels = torch.from_numpy(data.tokens), torch.from_numpy(data.labels)
    with torch.inference_mode():
        return float(network(input_ids=tokens, labels=labels, use_cache=False).loss)


def displace(tensors: dict[str, torch.Tensor], layout: Layout, steps: Steps, how: Any) -> None:
    """Add steps to tensors in place through the reference implementation."""
    for name, tile in zip(layout.names, layout.first_tiles, strict=True):
        reference.accumulate(
            tensors[name],
            steps.seeds,
            steps.coefficients,
            first_tile=tile,
            distribution=how,
            out=tensors[name],
        )


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_the_loss_is_the_one_of_transformers(tiny_network: Make, tune: str) -> None:
    network = tiny_network()
    expected = hugging_face_loss(network, batch())
    model: CausalModel = lora(network) if tune == "lora" else FullModel(network, plan=plan())
    (evaluation,) = model.evaluate([Probe(batch())])
    assert evaluation.mean == pytest.approx(expected, rel=1e-6)
    assert evaluation.counts.tolist() == [8, 6]


@pytest.mark.parametrize("factors", ["both", "B"])
@pytest.mark.parametrize("distribution", list(Distribution))
def test_a_lora_probe_equals_moving_the_adapters(
    tiny_network: Make, factors: str, distribution: Distribution
) -> None:
    model = lora(tiny_network(), factors=factors, distribution=distribution)
    model.commit([Update(Steps.of([1], [0.05]), 0)])
    (probed,) = model.evaluate([Probe(batch(), TRAJECTORY, PERTURBATION)])
    displace(model.tensors, model.layout, TRAJECTORY + PERTURBATION, distribution)
    assert probed.mean == pytest.approx(hugging_face_loss(model.network, batch()), rel=2e-6)
    assert model.layout.parameters == sum(t.numel() for t in model.tensors.values())
    assert all(".lora_B." in name for name in model.tensors) == (factors == "B")


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float16, 22), (torch.bfloat16, 24)])
def test_halves_hold_a_float32(dtype: torch.dtype, bits: int) -> None:
    a = torch.randn((2, 3, 1000), generator=torch.Generator().manual_seed(0)) * 0.01
    moved = a + 1e-3 * torch.sign(a)
    for wide in (a, moved):
        first, *others = in_halves(wide, dtype).double().split(3, dim=1)
        total = first + sum(others) / PARTS[dtype][1]
        error = (total - wide.double()).abs()
        # Below its normal numbers float16 has no bits but a last place, 2^-24 of the scale.
        assert bool((error <= 2.0**-bits * wide.abs() + 2.0**-36).all())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("trajectory", ["recompute", "cache"])
def test_a_full_probe_equals_moving_the_weights(
    tiny_network: Make, dtype: str, tie: bool, trajectory: str
) -> None:
    """Bit for bit: scratch and copy round once from the sum that the reference computes."""
    model = FullModel(tiny_network(dtype, tie), plan=plan(1, trajectory))
    probes = [
        Probe(batch(), TRAJECTORY[:2], PERTURBATION),
        Probe(batch(), TRAJECTORY, PERTURBATION),
        Probe(batch(), TRAJECTORY, Steps.of([11], [-0.05])),
        Probe(batch(), NO_STEPS, PERTURBATION),
    ]
    results = model.evaluate(probes)
    for probe, result in zip(probes, results, strict=True):
        moved = FullModel(tiny_network(dtype, tie), plan=plan(1))
        displace(
            moved.tensors,
            moved.layout,
            probe.trajectory + probe.perturbation,
            Distribution.GAUSSIAN,
        )
        (expected,) = moved.evaluate([Probe(batch())])
        assert result.sums.tobytes() == expected.sums.tobytes()


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_probes_never_touch_the_weights(tiny_network: Make, tune: str) -> None:
    network = tiny_network()
    model: CausalModel = (
        lora(network) if tune == "lora" else FullModel(network, plan=plan(1, "cache"))
    )
    before = {name: p.clone() for name, p in network.named_parameters()}
    digest = model.digest()
    model.evaluate([Probe(batch(), TRAJECTORY, PERTURBATION)] * 3)
    assert model.digest() == digest
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_a_failing_probe_leaves_the_weights_in_place(tiny_network: Make) -> None:
    model = FullModel(tiny_network(), plan=plan(1))
    before = dict(model.network.named_parameters())
    broken = TokenBatch(np.full((1, 6), -1), np.full((1, 6), 5))
    with pytest.raises(IndexError):
        model.evaluate([Probe(broken, NO_STEPS, PERTURBATION)])
    after = dict(model.network.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert model.evaluate([Probe(batch())])[0].mean == pytest.approx(
        hugging_face_loss(model.network, batch()), rel=1e-6
    )


def test_probes_of_different_clients_in_one_call(tiny_network: Make) -> None:
    """Other batches, lengths, row counts and trajectories beside a probe do not change it."""
    model = lora(tiny_network(), plan=plan(8))
    probes = [
        Probe(batch(1, 2, 9), TRAJECTORY, PERTURBATION),
        Probe(batch(1, 2, 9), TRAJECTORY, Steps.of([11], [-0.05])),
        Probe(batch(2, 3, 17), TRAJECTORY[:1], PERTURBATION),
        Probe(batch(3, 1, 6)),
    ]
    together = model.evaluate(probes)
    for probe, joint in zip(probes, together, strict=True):
        (alone,) = model.evaluate([probe])
        np.testing.assert_allclose(joint.sums, alone.sums, rtol=1e-5)
        assert joint.counts.tolist() == alone.counts.tolist()
    assert len({round(result.mean, 4) for result in together}) == 4


def test_the_initial_adapter_comes_from_the_seed(tiny_network: Make) -> None:
    one, same, other = (lora(tiny_network(), run_seed=seed) for seed in (1, 1, 2))
    assert one.digest() == same.digest() != other.digest()
    for name, tensor in one.tensors.items():
        if ".lora_B." in name:
            assert not tensor.any()
        else:
            width = (3 * tensor.shape[1]) ** -0.5
            assert float(tensor.std()) == pytest.approx(width, rel=0.35)
    frozen = lora(tiny_network(), run_seed=1, factors="B")
    a = next(n for n in one.tensors if ".lora_A." in n)
    value = dict(frozen.peft.named_parameters())[a.replace(".weight", ".default.weight")]
    assert torch.equal(value, one.tensors[a])


def test_a_commit_is_the_reference_to_the_bit(tiny_network: Make) -> None:
    updates = [Update(TRAJECTORY, 3), Update(PERTURBATION, 4, decay=0.999)]
    for dtype in ("float32", "bfloat16", "float16"):
        model = FullModel(tiny_network(dtype), plan=plan(1))
        expected = {name: tensor.clone() for name, tensor in model.tensors.items()}
        model.commit(updates)
        for update in updates:
            for name, tile in zip(model.layout.names, model.layout.first_tiles, strict=True):
                reference.accumulate(
                    expected[name],
                    update.steps.seeds,
                    update.steps.coefficients,
                    first_tile=tile,
                    distribution=Distribution.GAUSSIAN,
                    out=expected[name],
                    decay=update.decay,
                    dither_seed=update.dither_seed,
                )
        for name, tensor in model.tensors.items():
            assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8)), name


def test_tied_weights_count_once(tiny_network: Make) -> None:
    tied = FullModel(tiny_network(tie=True), plan=plan(1))
    untied = FullModel(tiny_network(tie=False), plan=plan(1))
    assert untied.layout.parameters - tied.layout.parameters == 97 * 32


def test_the_layout_pads_to_tiles() -> None:
    layout = Layout.of({"b": (3,), "a": (TILE + 1,), "c": (2, 2)})
    assert layout.names == ("a", "b", "c")
    assert layout.first_tiles == (0, 2, 3)
    assert (layout.tiles, layout.parameters) == (4, TILE + 8)
    assert layout.fingerprint != Layout.of({"b": (3,), "a": (TILE + 1,), "c": (4,)}).fingerprint


def test_targets_that_fit_nothing_are_refused(tiny_network: Make) -> None:
    with pytest.raises(FedForwardError, match=r"lora\.targets = \['query'\].*q_proj"):
        lora(tiny_network(), targets=["query"])


def test_commit_reports_the_share_of_changed_weights(tiny_network: Make) -> None:
    model = FullModel(tiny_network("bfloat16"), plan=plan(1))
    model.commit([Update(Steps.of([1], [1e-7]), 0)])
    small = model.changed_share
    model.commit([Update(Steps.of([1], [1e-2]), 1)])
    assert small is not None and model.changed_share is not None
    assert 0.0 < small < 0.1 < 0.9 < model.changed_share <= 1.0
    exact = FullModel(tiny_network(), plan=plan(1))
    exact.commit([Update(Steps.of([1], [1e-7]), 0)])
    assert exact.changed_share is None
