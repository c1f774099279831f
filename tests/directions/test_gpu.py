"""What runs on a CUDA device gives the bits, or nearly the losses, of the CPU."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fedforward.core.batches import TokenBatch
from fedforward.core.steps import Probe, ProbePlan, Steps
from fedforward.directions import Distribution
from fedforward.directions.ops import accumulate
from fedforward.models import lora_layers
from fedforward.models.lora import LoraModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("distribution", list(Distribution))
@pytest.mark.parametrize("dither_seed", [None, 2**64 - 5])
def test_a_commit_has_the_bits_of_the_cpu(
    dtype: torch.dtype, distribution: Distribution, dither_seed: int | None
) -> None:
    weights = (0.02 * torch.randn(5000, generator=torch.Generator().manual_seed(0))).to(dtype)
    seeds = np.arange(9, dtype=np.uint64) * np.uint64(2**60 + 1)
    coefficients = np.linspace(-1e-3, 1e-3, 9).astype(np.float32)
    results = []
    for device in ("cpu", "cuda"):
        moved = weights.to(device, copy=True)
        accumulate(
            moved,
            seeds,
            coefficients,
            first_tile=3,
            distribution=distribution,
            out=moved,
            dither_seed=dither_seed,
        )
        results.append(moved.cpu().view(torch.uint8))
    assert torch.equal(*results)


def test_probes_agree_with_the_cpu(tiny_network: Callable[..., Any]) -> None:
    tokens = np.random.default_rng(0).integers(3, 97, (2, 12))
    probe = Probe(TokenBatch(tokens, tokens), Steps.of([5], [0.02]), Steps.of([6], [0.05]))
    losses = []
    for device in ("cpu", "cuda"):
        model = LoraModel(
            tiny_network().to(device), rank=3, alpha=6.0, plan=ProbePlan(2, 1, "recompute", 4)
        )
        losses.append(model.evaluate([probe])[0].mean)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapters_of_half_precision_activations(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of halves are as far from float64 as float32 is, as for what a perturbation does."""
    random = torch.Generator(device="cuda").manual_seed(0)
    x = torch.randn((2, 1000, 3072), device="cuda", generator=random).to(dtype)
    a = torch.randn((2, 128, 3072), device="cuda", generator=random) * 0.01
    z = 1e-3 * torch.randn(a.shape, device="cuda", generator=random).sign()
    plus, minus = a + z, a - z
    wanted = x.double() @ plus.double().transpose(1, 2)
    moved = x.double() @ (plus.double() - minus.double()).transpose(1, 2)
    for pays in (0, 1 << 62):
        monkeypatch.setattr(lora_layers, "HALVES_PAY", pays)
        found = lora_layers.inner_product(x, plus).double()
        assert float((found - wanted).norm() / wanted.norm()) < 2e-5
        difference = found - lora_layers.inner_product(x, minus).double()
        assert float((difference - moved).norm() / moved.norm()) < 2e-5
