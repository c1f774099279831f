"""R of B = U R: which modules have one, what U is, and that PEFT sees the adapters that ran."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fedforward.core.errors import FedForwardError
from fedforward.core.steps import Probe, Steps, Update
from fedforward.directions import Distribution
from fedforward.models import aligned
from fedforward.models.adapters import OUTPUTS
from fedforward.models.lora_layers import initial_outputs, product
from fedforward.models.pinned_files import pinned
from fedforward.models.residual_stream import residual_writers
from tests.models.test_loss_gradients import text_of
from tests.models.test_models import (
    PERTURBATION,
    TRAJECTORY,
    batch,
    displace,
    hugging_face_loss,
    lora,
)
from tests.models.test_probing import make

Make = Callable[..., Any]
WRITERS = {
    "llama": {"o_proj", "down_proj"},
    "gemma2": {"o_proj", "down_proj"},
    "gpt2": {"c_proj"},
    "opt": {"out_proj", "fc2"},
    "phi": {"dense", "fc2"},
    "mamba": {"out_proj"},
}
ALIGNMENTS = pytest.mark.parametrize("alignment", ["forward", "backward"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", WRITERS)
def test_what_writes_into_the_stream_is_found(family: str, dtype: torch.dtype) -> None:
    found = residual_writers(make(family).to(dtype))
    assert {name.rpartition(".")[2] for name in found} == WRITERS[family]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_stream_hides_no_writer(dtype: torch.dtype) -> None:
    network = make("llama")
    network.get_input_embeddings().weight.data.mul_(100.0)
    assert len(residual_writers(network.to(dtype))) == 4


def test_every_block_has_its_writers(tiny_network: Make) -> None:
    network = tiny_network()
    blocks = len(network.model.layers)
    assert len(residual_writers(network)) == 2 * blocks


@ALIGNMENTS
@pytest.mark.parametrize("distribution", list(Distribution))
def test_a_probe_of_r_equals_moving_it(
    tiny_network: Make, distribution: Distribution, alignment: str
) -> None:
    model = lora(tiny_network(), factors="R", alignment=alignment, distribution=distribution)
    model.commit([Update(Steps.of([1], [0.05]), 0)])
    probes = [Probe(batch(), TRAJECTORY, PERTURBATION), Probe(batch(), TRAJECTORY)]
    probed, beside = model.evaluate(probes)
    displace(model.tensors, model.layout, TRAJECTORY + PERTURBATION, distribution)
    assert probed.mean == pytest.approx(hugging_face_loss(model.network, batch()), rel=2e-6)
    assert beside.mean != pytest.approx(probed.mean, rel=2e-5)
    assert all(name.endswith(".lora_R.weight") for name in model.tensors)
    assert model.layout.parameters == 9 * len(model.tensors)


@ALIGNMENTS
def test_peft_loads_the_adapter_that_ran(
    tiny_network: Make, tmp_path: Path, alignment: str
) -> None:
    from peft import PeftModel

    model = lora(tiny_network(), factors="R", alignment=alignment)
    base = hugging_face_loss(model.network, batch())
    model.commit([Update(Steps.of([3, 4], [0.5, -0.3]), 0)])
    (own,) = model.evaluate([Probe(batch())])
    assert own.mean != pytest.approx(base, rel=1e-3)
    model.save(tmp_path)
    stored = load_file(str(tmp_path / "adapter_model.safetensors"))
    assert stored.keys() == model.saved_tensors().keys()
    loaded = PeftModel.from_pretrained(tiny_network(), str(tmp_path))
    assert hugging_face_loss(loaded, batch()) == pytest.approx(own.mean, rel=2e-6)
    # A save does not take R away.
    (after,) = model.evaluate([Probe(batch())])
    assert after.mean == own.mean
    merged = model.merge()
    assert hugging_face_loss(merged, batch()) == pytest.approx(own.mean, rel=2e-5)


@ALIGNMENTS
def test_going_back_to_the_base(tiny_network: Make, alignment: str) -> None:
    model = lora(tiny_network(), factors="R", alignment=alignment)
    digest = model.digest()
    model.commit([Update(Steps.of([3], [0.5]), 0)])
    assert model.digest() != digest
    model.reset()
    assert model.digest() == digest


@ALIGNMENTS
def test_backpropagation_tunes_r(tiny_network: Make, alignment: str) -> None:
    model = lora(tiny_network(), factors="R", alignment=alignment)
    parameters = model.tuned_parameters()
    assert len(parameters) == len(model.tensors)
    for parameter in parameters:
        parameter.requires_grad_(True)
    data = batch()
    tokens, labels = torch.from_numpy(data.tokens), torch.from_numpy(data.labels)
    model.network(input_ids=tokens, labels=labels, use_cache=False).loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in parameters)


def test_the_product_is_u_r() -> None:
    u = initial_outputs(40, 8, 3, torch.device("cpu"))
    r = torch.randn((8, 8), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(product(u, r), (u.double() @ r.double()).float(), rtol=0, atol=2e-7)
    assert float(u.var()) == pytest.approx(1 / 8, rel=0.3)


def test_an_aligned_r_lowers_the_loss_along_the_gradient(tiny_network: Make) -> None:
    """The file has A and U; they are those that the model then has, also after a reset."""
    texts = [text_of(14, seed) for seed in range(4)]
    model = lora(tiny_network(), factors="R")
    random = model.outputs[OUTPUTS].clone()
    initial = aligned.align(model, texts)
    assert initial.tensors[OUTPUTS].shape == random.shape
    assert sum(name.endswith("lora_A.weight") for name in initial.tensors) == len(model.tensors)
    again = aligned.align(lora(tiny_network(), factors="R"), texts)
    assert again.digest == initial.digest
    model.begin_with(initial)
    assert torch.equal(model.outputs[OUTPUTS], initial.tensors[OUTPUTS])
    model.commit([Update(Steps.of([3], [0.5]), 0)])
    model.reset()
    assert torch.equal(model.outputs[OUTPUTS], initial.tensors[OUTPUTS])


def test_files_of_other_factors_are_refused(tiny_network: Make) -> None:
    texts = [text_of(14, seed) for seed in range(4)]
    with_r, with_b = lora(tiny_network(), factors="R"), lora(tiny_network(), factors="B")
    of_r, of_b = aligned.align(with_r, texts), aligned.align(with_b, texts)
    with pytest.raises(FedForwardError, match=r"'B' does not fit .* made for lora\.factors = 'R'"):
        with_b.begin_with(of_r)
    with pytest.raises(FedForwardError, match=r"'R' does not fit .* = 'B' or 'both'"):
        with_r.begin_with(of_b)
    wider = pinned("initial A", {**of_r.tensors, OUTPUTS: torch.ones(9, 3)}, of_r.made_for, "x")
    with pytest.raises(FedForwardError, match="base with other weights"):
        with_r.begin_with(wider)


def test_targets_that_write_nowhere_are_refused(tiny_network: Make) -> None:
    for targets in (["q_proj"], ["o_proj", "q_proj"]):
        with pytest.raises(
            FedForwardError, match=r"names 'q_proj', .* here these are down_proj, o"
        ):
            lora(tiny_network(), factors="R", targets=targets)
    with pytest.raises(FedForwardError, match=r"leaves nothing to adapt: .* here down_proj, o_pro"):
        lora(tiny_network(), factors="R", targets=".*q_proj")
    model = lora(tiny_network(), factors="R", targets=["o_proj"])
    assert all("o_proj" in name for name in model.tensors)


def test_what_peft_does_not_adapt_is_said() -> None:
    with pytest.raises(FedForwardError, match=r"leaves out .*out_proj \(not adapted .* = 'B'\."):
        lora(make("mamba"), factors="R")


def test_a_second_try_has_all_gradients(
    tiny_network: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [text_of(14, seed) for seed in range(4)]
    expected = aligned.align(lora(tiny_network(), factors="R"), texts)
    right, tries = aligned._covariances, []

    def broken(layers: Any, given: Any, places: Any, run: Any, share: bool = True) -> Any:
        tries.append(share)
        if share:
            run(0)
            raise aligned._NotSharedError
        return right(layers, given, places, run, share)

    monkeypatch.setattr(aligned, "_covariances", broken)
    again = aligned.align(lora(tiny_network(), factors="R"), texts)
    assert tries == [True, False]
    torch.testing.assert_close(again.tensors[OUTPUTS], expected.tensors[OUTPUTS])


def test_a_text_without_counted_tokens_is_run_all_the_same(tiny_network: Make) -> None:
    texts = [text_of(14, seed) for seed in range(3)]
    losses = [(np.arange(14) >= 5, ()), (np.zeros(14, np.bool_), ()), (np.arange(14) >= 9, ())]
    found = aligned.align(lora(tiny_network(), factors="R"), texts, None, losses)
    some = aligned.align(
        lora(tiny_network(), factors="R"), texts[::2], None, [losses[0], losses[2]]
    )
    torch.testing.assert_close(found.tensors[OUTPUTS], some.tensors[OUTPUTS])
    assert found.made_for["rows"] == 3


def test_the_mean_of_prompts_has_a_row_of_its_own() -> None:
    random = np.random.default_rng(0)
    inputs = 5.0 + random.standard_normal((40, 12)) * np.linspace(0.1, 2.0, 12)
    directions, moments = aligned._beside_mean(inputs, 4)
    np.testing.assert_allclose(directions @ directions.T, np.eye(4), atol=1e-12)
    mean = inputs.mean(axis=0)
    np.testing.assert_allclose(directions[0], mean / np.linalg.norm(mean))
    np.testing.assert_allclose(moments, np.square(inputs @ directions.T).mean(axis=0))
    np.testing.assert_allclose(directions[1:] @ mean, 0.0, atol=1e-9)
    assert (np.diff(moments[1:]) < 0.0).all()


@pytest.mark.parametrize("count", [1, 5])
def test_texts_that_are_alike_give_one_direction(count: int) -> None:
    """What rounding leaves of them is none, however short."""
    inputs = np.tile(np.random.default_rng(0).standard_normal(30), (count, 1))
    directions, moments = aligned._beside_mean(inputs, 8)
    assert directions.shape == (1, 30) and moments[0] == pytest.approx(np.sum(inputs[0] ** 2))
