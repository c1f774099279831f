"""Frozen bases in fewer bits and on several devices: the same network, and errors that help."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("pydantic", reason="the configuration needs pydantic")

from fedforward.config.loading import validate
from fedforward.config.schema import Config
from fedforward.core.errors import FedForwardError
from fedforward.core.steps import NO_STEPS, Probe, Steps, Update
from fedforward.directions import Distribution
from fedforward.models import loading
from fedforward.models.fingerprints import fingerprint
from fedforward.models.lora import LoraModel
from fedforward.training import build as experiment
from fedforward.training import replay as artefacts
from tests.conftest import DEMO_MODEL
from tests.models.test_models import (
    PERTURBATION,
    TRAJECTORY,
    batch,
    displace,
    hugging_face_loss,
    lora,
    plan,
)

Configure = Callable[..., Config]
CarryOut = Callable[..., dict[str, Any]]

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed (pip install 'fedforward[quantization]')",
)
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")


@pytest.fixture
def folder(tmp_path: Path, tiny_network: Callable[..., Any]) -> Path:
    """A tiny random Llama with a tokenizer, as a folder."""
    path = tmp_path / "tiny"
    tiny_network().save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, path / name)
    return path


def four_bits(path: Path, dtype: str = "float32", device: str = "cpu") -> Any:
    return loading.load(str(path), dtype, device, quantization="nf4")[0]


def identity(network: Any) -> str:
    return fingerprint(loading.weights(network))


@pytest.mark.parametrize(
    ("model", "run", "words"),
    [
        (
            {"quantization": "int8"},
            {},
            ["model.quantization = 'int8' is not allowed", "'none', 'nf4'"],
        ),
        (
            {"quantization": "nf4", "tune": "full"},
            {},
            ["model: quantization = 'nf4'", "tune = 'full'", "use tune = 'lora'"],
        ),
        (
            {"device_map": "auto", "tune": "full"},
            {},
            ["model: device_map = 'auto'", "tune = 'full'", "device_map = 'none'"],
        ),
        ({"device_map": "cuda"}, {}, ["model.device_map = 'cuda'", "'none', 'auto'"]),
        (
            {"device_map": "auto"},
            {"device": "cpu"},
            ["model.device_map = 'auto'", "run.device = 'cpu'", "model.device_map = 'none'"],
        ),
        ({"device_map": "auto"}, {"device": "cuda:1"}, ["run.device = 'cuda:1'", "'auto'"]),
    ],
)
def test_settings_that_are_refused(
    model: dict[str, str], run: dict[str, str], words: list[str]
) -> None:
    whole = {"model": {"path": "m"} | model, "data": {"source": "d"}, "run": run}
    with pytest.raises(FedForwardError) as caught:
        validate(whole)
    for word in words:
        assert word in str(caught.value)


def test_a_missing_package_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None))
    monkeypatch.setattr(loading, "importlib", absent)
    with pytest.raises(FedForwardError, match=r"pip install 'fedforward\[quantization\]'"):
        four_bits(folder)


@without_cuda
def test_a_spread_model_needs_cuda(folder: Path) -> None:
    with pytest.raises(FedForwardError, match=r"model\.device_map = 'auto' .* finds none here"):
        loading.load(str(folder), "float32", "cpu", device_map="auto")


def test_places_that_are_refused() -> None:
    with pytest.raises(FedForwardError, match=r"'m' fits neither .* model\.quantization = 'nf4'"):
        loading.check_placement("m", {"a": 0, "b": "cpu", "c": "disk"})
    with pytest.raises(FedForwardError, match="no room on any CUDA device"):
        loading.check_placement("m", {"": "cpu"})
    loading.check_placement("m", {"a": 0, "b": "cpu"})


@pytest.mark.parametrize(
    ("stored", "asked", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, "nf4", ["(gptq)", "'nf4'", "as it was before"]),
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            "none",
            ["(bitsandbytes)", "'none'", "as it was before"],
        ),
        (
            {
                "quant_method": "bitsandbytes",
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
            },
            "none",
            ["(nf4)", "Set model.quantization = 'nf4'"],
        ),
    ],
)
def test_another_quantization_on_disk_is_refused(
    folder: Path, stored: dict[str, Any], asked: str, words: list[str]
) -> None:
    if asked != "none":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": stored}))
    with pytest.raises(FedForwardError) as caught:
        loading.load(str(folder), "float32", "cpu", quantization=asked)
    for word in [f"model.path = {str(folder)!r}", *words]:
        assert word in str(caught.value)


@needs_package
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_four_bits_compute_in_the_dtype(folder: Path, dtype: str) -> None:
    """The values of the weights are all that changes: no rounding of what flows between them."""
    network = four_bits(folder, dtype)
    quantised = [name for name, m in network.named_modules() if loading.is_quantized(m)]
    assert len(quantised) == 14 and not any("head" in name for name in quantised)
    tokens = torch.from_numpy(batch().tokens)
    with torch.inference_mode():
        packed = network(input_ids=tokens).logits
        plain = loading.dequantize(network, {})(input_ids=tokens).logits
    assert not any(loading.is_quantized(module) for module in network.modules())
    assert packed.dtype is getattr(torch, dtype)
    torch.testing.assert_close(packed, plain, rtol=0, atol=0)


@needs_package
def test_the_base_fingerprint_covers_the_scales(
    folder: Path, tmp_path: Path, tiny_network: Callable[..., Any]
) -> None:
    """Twice the weights are the same codes: only the scales differ."""
    network = tiny_network()
    layer = network.model.layers[1].mlp.up_proj
    layer.weight.data *= 2
    shutil.copytree(folder, tmp_path / "double")
    network.save_pretrained(tmp_path / "double")
    one, again, double = (four_bits(f) for f in (folder, folder, tmp_path / "double"))
    plain = loading.load(str(folder), "float32", "cpu")[0]
    assert identity(one) == identity(again)
    assert len({identity(n) for n in (one, double, plain)}) == 3
    same = [dict(n.named_parameters()) for n in (one, double)]
    assert all(torch.equal(same[0][name], same[1][name]) for name in same[0])
    assert identity(plain) == fingerprint(sorted(plain.named_parameters()))
    assert lora(one).base_fingerprint == lora(again).base_fingerprint
    assert lora(double).base_fingerprint != lora(four_bits(folder)).base_fingerprint


@needs_package
@pytest.mark.parametrize("factors", ["both", "B"])
def test_a_probe_beside_four_bits_equals_moving_the_adapters(folder: Path, factors: str) -> None:
    model = lora(four_bits(folder), factors=factors)
    model.commit([Update(Steps.of([1], [0.05]), 0)])
    probes = [
        Probe(batch(), TRAJECTORY, PERTURBATION),
        Probe(batch(), TRAJECTORY, Steps.of([11], [-0.05])),
        Probe(batch(3, 1, 6)),
    ]
    first, second, third = model.evaluate(probes)
    assert third.mean == pytest.approx(hugging_face_loss(model.network, batch(3, 1, 6)), rel=2e-6)
    displace(model.tensors, model.layout, TRAJECTORY + PERTURBATION, Distribution.GAUSSIAN)
    assert first.mean == pytest.approx(hugging_face_loss(model.network, batch()), rel=2e-6)
    assert first.mean != pytest.approx(second.mean, rel=1e-4)


@needs_package
def test_a_saved_four_bit_model_is_taken_as_it_is(folder: Path, tmp_path: Path) -> None:
    network = four_bits(folder)
    shutil.copytree(folder, tmp_path / "packed", ignore=shutil.ignore_patterns("*.safetensors"))
    network.save_pretrained(tmp_path / "packed")
    assert identity(four_bits(tmp_path / "packed")) == identity(network)


@needs_package
def test_a_transposed_family_is_merged_and_saved(folder: Path, tmp_path: Path) -> None:
    """GPT-2 keeps its weights transposed, square ones too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings = AutoConfig.for_model(
        "gpt2", n_embd=32, n_layer=2, n_head=4, vocab_size=97, n_positions=64,
        bos_token_id=1, eos_token_id=2, initializer_range=0.1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(settings).save_pretrained(folder)
    model = lora(four_bits(folder))
    model.commit([Update(Steps.of([1], [0.05]), 0)])
    expected = hugging_face_loss(model.network, batch())
    (probed,) = model.evaluate([Probe(batch())])
    assert probed.mean == pytest.approx(expected, rel=2e-6)
    model.merge().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert hugging_face_loss(merged.eval(), batch()) == pytest.approx(expected, rel=2e-6)


@needs_package
def test_a_run_in_four_bits(configure: Configure, carry_out: CarryOut, tmp_path: Path) -> None:
    """It falls, verifies, goes on as if it had never stopped, and exports what was tuned."""
    from transformers import AutoModelForCausalLM

    settings: dict[str, Any] = {"model__quantization": "nf4", "method__learning_rate": 1e-3}
    short = configure(federation__rounds=2, **settings)
    first = carry_out(short, tmp_path / "run")
    assert np.isfinite(first["heldout_loss"]["end"])
    assert first["heldout_loss"]["end"] < first["heldout_loss"]["start"]
    result = artefacts.verify(tmp_path / "run")
    assert result.differences == [] and result.replayed and result.saved
    whole = configure(federation__rounds=4, **settings)
    resumed = carry_out(whole, tmp_path / "run", resume=True)
    unbroken = carry_out(whole, tmp_path / "whole")
    assert resumed["state_digest"] == unbroken["state_digest"]
    assert resumed["ledger_digest"] == unbroken["ledger_digest"]

    artefacts.export(tmp_path / "run", tmp_path / "adapter", merge=False)
    artefacts.export(tmp_path / "run", tmp_path / "merged", merge=True)
    tokens = torch.arange(5, 25)[None]
    network = loading.load(str(DEMO_MODEL), "float32", "cpu", quantization="nf4")[0]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    from peft import PeftModel

    with torch.inference_mode():
        base = network(input_ids=tokens).logits
        adapted = PeftModel.from_pretrained(network, tmp_path / "adapter")
        tuned = adapted(input_ids=tokens).logits
        torch.testing.assert_close(merged(input_ids=tokens).logits, tuned, rtol=1e-4, atol=1e-4)
    assert (tuned - base).abs().max() > 1e-3


@needs_package
def test_another_base_under_a_ledger_is_refused(
    configure: Configure, carry_out: CarryOut, tmp_path: Path
) -> None:
    carry_out(configure(model__quantization="nf4"), tmp_path / "run")
    with pytest.raises(FedForwardError, match=r"model\.quantization is 'nf4' there"):
        carry_out(configure(federation__rounds=5), tmp_path / "run", resume=True)


@needs_package
def test_backpropagation_through_four_bits(
    configure: Configure, carry_out: CarryOut, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"method__name": "fedavg", "method__learning_rate": 0.3}
    summary = carry_out(configure(model__quantization="nf4", **settings), tmp_path / "run")
    assert summary["heldout_loss"]["end"] < summary["heldout_loss"]["start"]
    assert artefacts.verify(tmp_path / "run").differences == []


def apart(path: str, dtype: str, names: list[str], scratch: Path) -> Any:
    """The network with some modules' weights on disk until their turn, by accelerate's hooks."""
    from transformers import AutoConfig, AutoModelForCausalLM

    parts = ["model.embed_tokens", "lm_head", "model.norm", "model.rotary_emb"]
    blocks = AutoConfig.from_pretrained(path).num_hidden_layers
    parts += [f"model.layers.{place}" for place in range(blocks)]
    network = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=getattr(torch, dtype),
        device_map=dict.fromkeys(parts, "cpu") | dict.fromkeys(names, "disk"),
        offload_folder=str(scratch),
    )
    assert any(parameter.is_meta for parameter in network.parameters())
    return network.eval().requires_grad_(False)


def test_where_a_network_is_spread_is_described(tmp_path: Path) -> None:
    spread = apart(str(DEMO_MODEL), "float32", ["model.layers.1"], tmp_path)
    words = loading.placement(spread).split(", ")
    assert "model.layers.1 on disk" in words and words[0] == "model.embed_tokens on cpu"
    assert loading.placement(loading.load(str(DEMO_MODEL), "float32", "cpu")[0]) == ""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("names", [["model.layers.1"], ["model.embed_tokens", "lm_head"]])
def test_weights_that_wait_for_their_turn(tmp_path: Path, dtype: str, names: list[str]) -> None:
    """What a GPU with too little memory meets, without one: every bit is that of the whole."""
    whole = loading.load(str(DEMO_MODEL), dtype, "cpu")[0]
    spread = apart(str(DEMO_MODEL), dtype, names, tmp_path / "apart")
    assert identity(spread) == identity(whole) == identity(spread)
    models: list[LoraModel] = [lora(network, plan=plan(2)) for network in (whole, spread)]
    assert models[0].base_fingerprint == models[1].base_fingerprint
    assert models[0].digest() == models[1].digest()
    probes = [
        Probe(batch(), TRAJECTORY, PERTURBATION),
        Probe(batch(), TRAJECTORY, Steps.of([11], [-0.05])),
        Probe(batch(), NO_STEPS, NO_STEPS),
    ]
    for model in models:
        model.commit([Update(Steps.of([1], [0.05]), 0)])
    for expected, found in zip(*(model.evaluate(probes) for model in models), strict=True):
        np.testing.assert_allclose(expected.sums, found.sums, rtol=1e-6)
    assert hugging_face_loss(whole, batch()) == hugging_face_loss(spread, batch())


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("name", ["fedmezo", "fedavg"])
def test_a_run_with_weights_that_wait(
    configure: Configure,
    carry_out: CarryOut,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    from safetensors.torch import load_file

    def spread(path: str, dtype: str, device: str, **options: str) -> tuple[Any, Any]:
        network = apart(path, dtype, ["model.layers.0", "model.layers.2"], tmp_path / "apart")
        return network, load(path, dtype, device, **options)[1]

    load = experiment.load
    settings = configure(method__name=name, federation__rounds=2)
    losses = [carry_out(settings, tmp_path / "whole")["heldout_loss"]]
    artefacts.export(tmp_path / "whole", tmp_path / "merged", merge=True)
    monkeypatch.setattr(experiment, "load", spread)
    losses.append(carry_out(settings, tmp_path / "spread")["heldout_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert artefacts.verify(tmp_path / "spread").differences == []
    artefacts.export(tmp_path / "spread", tmp_path / "merged spread", merge=True)
    one, two = (load_file(tmp_path / f / "model.safetensors") for f in ("merged", "merged spread"))
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=1e-4)


@needs_package
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_every_device_has_the_same_four_bits(folder: Path) -> None:
    here, there = four_bits(folder), four_bits(folder, device="cuda")
    assert identity(here) == identity(there)
    models = [lora(network) for network in (here, there)]
    losses = [model.evaluate([Probe(batch(), TRAJECTORY)])[0].mean for model in models]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    """By its own sentence, before anything else of the folder is looked at."""
    from transformers import BartConfig, T5Config

    for config in (T5Config(), BartConfig()):
        config.save_pretrained(str(tmp_path))
        with pytest.raises(FedForwardError, match=r"is an encoder-decoder \((t5|bart)\)"):
            loading.load(str(tmp_path), "float32", "cpu")


def test_a_model_type_without_a_causal_model_is_refused(folder: Path, tmp_path: Path) -> None:
    from transformers import ViTConfig

    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    ViTConfig().save_pretrained(str(tmp_path))
    with pytest.raises(FedForwardError, match="no language model of the wanted kind"):
        loading.load(str(tmp_path), "float32", "cpu")


def test_no_limit_of_positions_may_be_a_number() -> None:
    """XLNet's configuration says -1."""
    limits = [64, -1, 0, None]
    found = [
        loading.longest_sequence(
            SimpleNamespace(config=SimpleNamespace(max_position_embeddings=limit))
        )
        for limit in limits
    ]
    assert found == [64, None, None, None]
