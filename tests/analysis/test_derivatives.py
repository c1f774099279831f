"""Hessian and Gauss-Newton products of real networks, against differences of gradients."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from fedforward.analysis.derivatives import LossSurface, check_second_derivative, differentiable
from fedforward.analysis.forward_only import trace_of
from fedforward.analysis.spectrum import spectrum
from fedforward.core.batches import IGNORED, TokenBatch
from fedforward.core.errors import FedForwardError
from fedforward.core.steps import Probe, ProbePlan
from fedforward.models.full import FullModel
from fedforward.models.lora import LoraModel

Make = Callable[..., Any]
PLAN = ProbePlan(8, 1, "recompute", 8)


def batches(count: int = 2) -> list[TokenBatch]:
    generator = np.random.default_rng(0)
    found = []
    for number in range(count):
        tokens = generator.integers(0, 97, (2, 9 + number))
        labels = tokens.copy()
        labels[:, :5] = IGNORED
        labels[1, -2:] = IGNORED
        found.append(TokenBatch(tokens, labels))
    return found


def trained(model: LoraModel) -> np.ndarray:
    generator = np.random.default_rng(1)
    moved = 0.2 * generator.standard_normal(model.layout.parameters)
    return (model.export_state() + moved).astype(np.float32)


def lora(network: Any) -> LoraModel:
    return LoraModel(network, rank=2, alpha=4.0, plan=PLAN)


def full(network: Any) -> FullModel:
    from fedforward.directions import Distribution

    return FullModel(network, distribution=Distribution.GAUSSIAN, plan=PLAN, blocks=[1])


@pytest.mark.parametrize("make", [lora, full])
def test_products_are_derivatives_of_gradients(tiny_network: Make, make: Any) -> None:
    model = make(tiny_network())
    if isinstance(model, LoraModel):
        model.assign_state(trained(model))
    state = model.export_state()
    vector = np.random.default_rng(2).standard_normal((1, len(state)))
    before = model.digest()
    with differentiable(model):
        surface = LossSurface(model, batches())
        loss, _ = surface.gradient()
        (image,) = surface.hessian(vector)
        ends = []
        for sign in (1.0, -1.0):
            model.assign_state((state + sign * 1e-3 * vector[0]).astype(np.float32))
            ends.append(surface.gradient()[1])
    model.assign_state(state)
    difference = (ends[0] - ends[1]) / 2e-3
    assert np.linalg.norm(image - difference) < 0.02 * np.linalg.norm(difference)
    assert model.digest() == before
    assert not any(parameter.requires_grad for parameter in model.tuned_parameters())
    measured = model.evaluate([Probe(batch) for batch in batches()])
    mean = sum(e.sums.sum() for e in measured) / sum(e.counts.sum() for e in measured)
    assert loss == pytest.approx(mean, rel=1e-5)


def test_gauss_newton_is_jacobians_around_the_loss(tiny_network: Make) -> None:
    """Against Σ over counted tokens of Jᵀ (diag p - p pᵀ) J, J by differences of logits."""
    model = lora(tiny_network())
    state = trained(model)
    model.assign_state(state)
    one, other = np.random.default_rng(3).standard_normal((2, len(state)))
    with differentiable(model):
        surface = LossSurface(model, batches())
        first, second = surface.gauss_newton(np.stack([one, other]))
    expected = 0.0
    for batch in batches():
        with torch.no_grad():
            chances = torch.softmax(model.logits_and_targets(batch)[0], dim=1).double()
            moved = []
            for sign in (1.0, -1.0):
                model.assign_state((state + sign * 1e-3 * one).astype(np.float32))
                moved.append(model.logits_and_targets(batch)[0].double())
            model.assign_state(state)
        along = (moved[0] - moved[1]) / 2e-3
        inner = (chances * along**2).sum(dim=1) - (chances * along).sum(dim=1) ** 2
        expected += float(inner.sum()) / surface.counted
    assert one @ first == pytest.approx(expected, rel=0.01)
    assert other @ first == pytest.approx(one @ second, rel=1e-4)


def test_at_b_zero_nothing_depends_on_a(tiny_network: Make) -> None:
    model = lora(tiny_network())
    is_a = np.repeat([".lora_A." in name for name in model.layout.names], model.layout.sizes)
    vector = np.random.default_rng(4).standard_normal((1, len(is_a))) * is_a
    with differentiable(model):
        surface = LossSurface(model, batches())
        _, gradient = surface.gradient()
        (hessian,), (gauss_newton,) = surface.hessian(vector), surface.gauss_newton(vector)
        assert not gradient[is_a].any() and gradient[~is_a].any()
        assert not hessian[is_a].any() and hessian[~is_a].any()
        assert not gauss_newton.any()
        model.assign_state(trained(model))
        assert surface.gradient()[1][is_a].any()
        assert surface.gauss_newton(vector).any()


def test_forward_passes_agree_with_products(tiny_network: Make) -> None:
    model = lora(tiny_network())
    model.assign_state(trained(model))
    with differentiable(model):
        surface = LossSurface(model, batches())
        exact = spectrum(surface.hessian, surface.size, probes=60, steps=8, seed=0)
    found = trace_of(model, batches(), range(1, 301), 1e-3)
    assert found.trace.low <= exact.trace.high and exact.trace.low <= found.trace.high
    assert found.squares.value == pytest.approx(exact.squares.value, rel=0.5)


def test_products_of_blocks_stay_in_them(tiny_network: Make) -> None:
    model = lora(tiny_network())
    model.assign_state(trained(model))
    with differentiable(model):
        surface = LossSurface(model, batches())
        inside = surface.owners == np.arange(2)[:, None]
        vectors = np.where(inside, np.random.default_rng(5).standard_normal(surface.size), 0.0)
        for parts, whole in (
            (surface.hessian_of_blocks, surface.hessian),
            (surface.gauss_newton_of_blocks, surface.gauss_newton),
        ):
            assert np.allclose(parts(vectors), np.where(inside, whole(vectors), 0.0), atol=1e-6)
            assert np.allclose(parts(vectors[1:]), parts(vectors)[1:], atol=1e-6)


def test_what_has_no_second_derivative_is_said(
    tiny_network: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = tiny_network()
    network.set_attn_implementation("sdpa")
    model = lora(network)
    with differentiable(model):
        check_second_derivative(LossSurface(model, batches(1)))
        assert network.config._attn_implementation == "eager"
    assert network.config._attn_implementation == "sdpa"
    name = "fedforward.analysis.derivatives.eager_attention"
    monkeypatch.setattr(name, lambda network: nullcontext())
    with differentiable(model), pytest.raises(FedForwardError, match="no second derivative"):
        check_second_derivative(LossSurface(model, batches(1)))
    assert not any(parameter.requires_grad for parameter in model.tuned_parameters())
