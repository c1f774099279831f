"""Second moments of gradients at the outputs of modules, against plain backpropagation."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fedforward.core.errors import FedForwardError
from fedforward.models import aligned, loss_gradients
from fedforward.models.adapters import OUTPUTS
from fedforward.models.loss_gradients import OutputGradients, StreamGradients
from tests.models.test_models import lora
from tests.models.test_probing import make

Make = Callable[..., Any]
OWN = {"factors": "R", "alignment": "backward"}


def text_of(length: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(3, 97, length)


def last_gradient(network: Any, text: Any, loss: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """d loss / d output of the last block by a whole backward pass, float64 [length, width]."""
    held: list[torch.Tensor] = []

    def keep(_: Any, __: Any, result: Any) -> None:
        state = result if torch.is_tensor(result) else result[0]
        state.retain_grad()
        held.append(state)

    for parameter in network.parameters():
        parameter.requires_grad_(True)
    handle = network.model.layers[-1].register_forward_hook(keep)
    loss(network(input_ids=torch.from_numpy(text)[None], use_cache=False).logits[0]).backward()
    handle.remove()
    for parameter in network.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    assert held[0].grad is not None
    return held[0].grad[0].double()


def test_gradients_of_text(tiny_network: Make) -> None:
    network = tiny_network()
    text = text_of(12)
    counted = np.arange(12) >= 5
    stream = StreamGradients(network)
    stream.add(text, counted, ())
    wanted = torch.from_numpy(text[5:])
    gradient = last_gradient(
        network, text, lambda z: torch.nn.functional.cross_entropy(z[4:-1], wanted)
    )
    torch.testing.assert_close(
        stream.moments[OUTPUTS], gradient.T @ gradient, rtol=1e-4, atol=1e-12
    )
    assert not any(p.requires_grad for p in network.parameters())


def test_gradients_between_words(tiny_network: Make) -> None:
    """Σ_c p_c g_c g_cᵀ with g_c the gradient of -log p_c, of the words alone."""
    network = tiny_network()
    text, words = text_of(9), [7, 20, 33]
    counted = np.arange(9) >= 6
    stream = StreamGradients(network)
    stream.add(text, counted, words)
    expected = torch.zeros(())
    for number in range(3):
        chance: list[float] = []

        def loss(z: torch.Tensor, number: int = number, chance: Any = chance) -> torch.Tensor:
            own = torch.log_softmax(z[5, torch.tensor(words)], dim=0)
            chance.append(float(own[number].detach().exp()))
            return -own[number]

        gradient = last_gradient(network, text, loss)
        expected = expected + chance[0] * gradient.T @ gradient
    torch.testing.assert_close(stream.moments[OUTPUTS], expected, rtol=1e-4, atol=1e-12)


def test_u_has_the_directions_of_the_gradient(tiny_network: Make) -> None:
    stream = StreamGradients(tiny_network())
    random = np.random.default_rng(1)
    basis = np.linalg.qr(random.standard_normal((16, 16)))[0]
    values = np.array([81.0, 16.0, 1.0] + 13 * [1e-9])
    stream.moments[OUTPUTS] = torch.from_numpy(basis * values @ basis.T)
    found = stream.shared(3)
    assert np.square(found).sum() == pytest.approx(16)
    lengths = np.linalg.norm(found, axis=0)
    np.testing.assert_allclose(lengths / lengths[2], [9.0, 4.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(np.abs(basis.T @ (found / lengths))[:3], np.eye(3), atol=1e-6)
    # More columns than the width has none for.
    assert not stream.shared(20)[:, 16:].any()
    stream.moments[OUTPUTS] = torch.zeros(16, 16).double()
    with pytest.raises(FedForwardError, match="is 0 on these rows"):
        stream.shared(3)


def output_gradients(network: Any, text: Any, loss: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """d loss / d output of each linear module in blocks, by a whole backward pass."""
    held: dict[str, torch.Tensor] = {}
    handles = []
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers." in name:

            def keep(_: Any, __: Any, result: torch.Tensor, name: str = name) -> None:
                result.retain_grad()
                held[name] = result

            handles.append(module.register_forward_hook(keep))
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    loss(network(input_ids=torch.from_numpy(text)[None], use_cache=False).logits[0]).backward()
    for handle in handles:
        handle.remove()
    return {name: state.grad[0].double() for name, state in held.items()}  # type: ignore[index]


def test_gradients_at_the_outputs_of_modules(tiny_network: Make) -> None:
    text, counted = text_of(12), np.arange(12) >= 5
    model = lora(tiny_network(), **OWN)
    layers = {n: m for n, m in model.peft.named_modules() if hasattr(m, "base_layer")}
    found = OutputGradients(model.network, layers)
    found.add(text, counted, ())
    wanted = torch.from_numpy(text[5:])
    expected = output_gradients(
        tiny_network(), text, lambda z: torch.nn.functional.cross_entropy(z[4:-1], wanted)
    )
    assert {name.removeprefix("base_model.model.") for name in found.moments} == expected.keys()
    for name, moment in found.moments.items():
        gradient = expected[name.removeprefix("base_model.model.")]
        scale = float(moment.abs().max())
        torch.testing.assert_close(moment, gradient.T @ gradient, rtol=1e-3, atol=1e-5 * scale)
    assert not any(p.requires_grad or p.grad is not None for p in model.network.parameters())


def test_of_many_tokens_some_count(tiny_network: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_gradients, "MOST_TOKENS", 3)
    text = text_of(12)
    stream = StreamGradients(tiny_network())
    stream.add(text, np.arange(12) >= 4, ())
    # Of the tokens 4 to 11: the first, the last, and one between.
    wanted, places = torch.from_numpy(text[[4, 7, 11]]), [3, 6, 10]
    gradient = last_gradient(
        tiny_network(), text, lambda z: torch.nn.functional.cross_entropy(z[places], wanted)
    )
    torch.testing.assert_close(
        stream.moments[OUTPUTS], gradient.T @ gradient, rtol=1e-4, atol=1e-12
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt", "phi", "mamba", "qwen3"])
def test_every_adapted_module_has_a_u(family: str, dtype: str) -> None:
    model = lora(make(family).to(getattr(torch, dtype)), **OWN)
    texts = [text_of(14, seed) for seed in range(4)]
    random = {name: u.clone() for name, u in model.outputs.items()}
    made = aligned.align(model, texts)
    assert made.made_for["alignment"] == "backward"
    factors = [name.replace(".lora_R.", ".lora_U.") for name in model.tensors]
    assert sorted(random) == sorted(factors) == sorted(n for n in made.tensors if OUTPUTS in n)
    for name, u in random.items():
        found = made.tensors[name]
        assert found.shape == u.shape and not torch.equal(found, u)
        assert float(found.square().sum()) == pytest.approx(len(found), rel=1e-4)
    model.begin_with(made)
    assert all(torch.equal(u, made.tensors[name]) for name, u in model.outputs.items())
    model.reset()
    assert all(torch.equal(u, made.tensors[name]) for name, u in model.outputs.items())
    assert aligned.align(lora(make(family).to(model.network.dtype), **OWN), texts).digest == (
        made.digest
    )


def test_random_us_differ_from_module_to_module(tiny_network: Make) -> None:
    every = list(lora(tiny_network(), **OWN).outputs.values())
    firsts = {u[:4].numpy().tobytes() for u in every}
    assert len(firsts) == len(every) == 14


def test_with_label_words_every_module_has_a_u(tiny_network: Make) -> None:
    texts = [text_of(14, seed) for seed in range(4)]
    losses = [(np.arange(14) >= 11, [7, 20])] * 4
    model = lora(tiny_network(), **OWN)
    before = model.work.passes
    made = aligned.align(model, texts, [10] * 4, losses)
    assert model.work.token_blocks > before
    assert model.work.token_blocks == 4 * 14 * 5 * 2
    assert all(bool(tensor.isfinite().all()) for tensor in made.tensors.values())


def test_layers_that_do_not_fit_at_once(
    tiny_network: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [text_of(14, seed) for seed in range(4)]
    whole = aligned.align(lora(tiny_network(), **OWN), texts)
    monkeypatch.setattr(aligned, "MOST_BYTES", 1)
    parts = aligned.align(lora(tiny_network(), **OWN), texts)
    assert parts.tensors.keys() == whole.tensors.keys()
    for name, tensor in parts.tensors.items():
        torch.testing.assert_close(tensor, whole.tensors[name], rtol=1e-4, atol=1e-5)


def test_a_module_without_gradient_keeps_its_u(tiny_network: Make) -> None:
    network = tiny_network()
    network.model.layers[1].mlp.down_proj.weight.data.zero_()
    model = lora(network, **OWN)
    still = [name for name in model.outputs if "layers.1.mlp.up_proj" in name]
    made = aligned.align(model, [text_of(14)])
    assert all(torch.equal(made.tensors[name], model.outputs[name]) for name in still) and still


def test_what_has_no_backward_pass_is_said(tiny_network: Make) -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            raise NotImplementedError("a kernel for reading alone")

    network = tiny_network()
    network.model.norm.register_forward_hook(lambda _, __, result: Broken.apply(result))
    with pytest.raises(FedForwardError, match=r"'backward': .* reading alone.* 'forward'\."):
        aligned.align(lora(network, **OWN), [text_of(14)])


def test_files_of_the_other_alignment_are_refused(tiny_network: Make) -> None:
    texts = [text_of(14, seed) for seed in range(4)]
    own, shared = lora(tiny_network(), **OWN), lora(tiny_network(), factors="R")
    of_own, of_shared = aligned.align(own, texts), aligned.align(shared, texts)
    with pytest.raises(FedForwardError, match=r"'forward' does not fit .* = 'backward'\. Set"):
        shared.begin_with(of_own)
    with pytest.raises(FedForwardError, match=r"'backward' does not fit .* = 'forward'\. Set"):
        own.begin_with(of_shared)
