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
from fedforward.models import loading, quantization
from fedforward.models.fingerprints import fingerprint
from fedforward.models.full import FullModel
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
    tiny_network(vocabulary=958).save_pretrained(path)
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
            ["model.quantization = 'int8' is not allowed", "'none', 'nf4', 'stored'"],
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
    monkeypatch.setattr(quantization, "importlib", absent)
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
            ["(int8)", "'none'", "Set model.quantization = 'stored'", "as it was before"],
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
        ({"quant_method": "mine"}, "none", ["does not know (mine)", "as it was before"]),
        ({"quant_method": "gptq", "bits": 4}, "stored", ["cannot be loaded", "GPTQ"]),
        ({"quant_method": "awq", "bits": 4}, "stored", ["cannot be loaded", "AWQ"]),
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
    quantised = [name for name, m in network.named_modules() if quantization.is_quantized(m)]
    assert len(quantised) == 14 and not any("head" in name for name in quantised)
    tokens = torch.from_numpy(batch().tokens)
    with torch.inference_mode():
        packed = network(input_ids=tokens).logits
        plain = quantization.dequantize(network, {})(input_ids=tokens).logits
    assert not any(quantization.is_quantized(module) for module in network.modules())
    assert packed.dtype is getattr(torch, dtype)
    torch.testing.assert_close(packed, plain, rtol=0, atol=0)


@needs_package
def test_the_base_fingerprint_covers_the_scales(
    folder: Path, tmp_path: Path, tiny_network: Callable[..., Any]
) -> None:
    """Twice the weights are the same codes: only the scales differ."""
    network = tiny_network(vocabulary=958)
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


def saved_in(folder: Path, path: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """The folder's model as bitsandbytes quantises and transformers saves it."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    shutil.copytree(folder, path, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    network = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        device_map={"": "cpu"},
        quantization_config=BitsAndBytesConfig(**settings),
    )
    network.save_pretrained(path)
    return path


STORED: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
}


@needs_package
@pytest.mark.parametrize("kind", STORED)
def test_a_folder_that_is_quantised_computes_with_its_values(
    folder: Path, tmp_path: Path, kind: str
) -> None:
    """Weights are those of transformers' own way back, and no activation is rounded."""
    from transformers import AutoModelForCausalLM

    packed = saved_in(folder, tmp_path / "packed", **STORED[kind])
    plain = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32).dequantize().eval()
    expected = hugging_face_loss(plain, batch())
    assert expected != hugging_face_loss(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), batch()
    )
    network = loading.load(str(packed), "float32", "cpu", quantization="stored")[0]
    assert sum(map(quantization.is_quantized, network.modules())) == 14
    assert hugging_face_loss(network, batch()) == pytest.approx(expected, rel=1e-6)
    model = lora(network)
    (start,) = model.evaluate([Probe(batch())])
    assert start.mean == pytest.approx(expected, rel=1e-6)
    again = loading.load(str(packed), "float32", "cpu", quantization="stored")[0]
    assert lora(again).base_fingerprint == model.base_fingerprint
    model.commit([Update(Steps.of([1], [0.05]), 0)])
    moved = hugging_face_loss(model.network, batch())
    merged = model.merge()
    merged.save_pretrained(tmp_path / "merged")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert not hasattr(found.config, "quantization_config")
    assert hugging_face_loss(found, batch()) == pytest.approx(moved, rel=2e-6)
    assert moved != pytest.approx(expected, rel=1e-4)


@needs_package
@pytest.mark.parametrize("kind", STORED)
def test_what_lies_beside_packed_weights_comes_to_the_dtype(tmp_path: Path, kind: str) -> None:
    """The demonstration's own dtype is bfloat16, and so are its embeddings in the folder."""
    packed = saved_in(DEMO_MODEL, tmp_path / "packed", torch.bfloat16, **STORED[kind])
    network = loading.load(str(packed), "float32", "cpu", quantization="stored")[0]
    plain = {p.dtype for p in network.parameters() if p.is_floating_point()}
    assert plain == {torch.float32} and network.dtype is torch.float32
    logits = network(input_ids=torch.arange(5, 25)[None]).logits
    assert logits.dtype is torch.float32 and not torch.equal(logits, logits.bfloat16().float())


@needs_package
def test_the_fingerprint_of_eight_bits_covers_the_scales(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    packed = saved_in(folder, tmp_path / "packed", **STORED["int8"])
    one = identity(loading.load(str(packed), "float32", "cpu", quantization="stored")[0])
    file = packed / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("SCB"))
    save_file(tensors | {name: tensors[name] * 2}, file, metadata={"format": "pt"})
    other = identity(loading.load(str(packed), "float32", "cpu", quantization="stored")[0])
    assert one != other


@needs_package
@pytest.mark.parametrize("kind", ["int8", "double"])
def test_a_run_on_a_quantised_folder(
    configure: Configure, carry_out: CarryOut, tmp_path: Path, kind: str
) -> None:
    packed = saved_in(DEMO_MODEL, tmp_path / "packed", **STORED[kind])
    settings = {"model__path": str(packed), "model__quantization": "stored"}
    summary = carry_out(configure(**settings, federation__rounds=1), tmp_path / "run")
    result = artefacts.verify(tmp_path / "run")
    assert result.saved and result.differences == []
    artefacts.export(tmp_path / "run", tmp_path / "merged", merge=True)
    plain = configure(model__path=str(tmp_path / "merged"), federation__rounds=1)
    after = carry_out(plain, tmp_path / "after")
    assert after["heldout_loss"]["start"] == pytest.approx(summary["heldout_loss"]["end"], rel=1e-5)


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_base_in_fp8_is_made_plain(
    configure: Configure, carry_out: CarryOut, tmp_path: Path, tune: str
) -> None:
    """Its layers would round activations; saved as it was, an export would be rounded again."""
    from safetensors.torch import load_file, save_file

    packed = tmp_path / "packed"
    shutil.copytree(DEMO_MODEL, packed)
    tensors = load_file(packed / "model.safetensors")
    for name in [name for name in tensors if "_proj." in name]:
        weight = tensors[name].float()
        rows, columns = (size // 32 for size in weight.shape)
        scale = weight.abs().amax() / 448
        tensors[name] = (weight / scale).to(torch.float8_e4m3fn)
        place = name.replace("weight", "weight_scale_inv")
        tensors[place] = torch.full((rows, columns), float(scale))
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    settings = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    file = packed / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": settings}))
    network = loading.load(str(packed), "float32", "cpu")[0]
    for name, parameter in network.named_parameters():
        place = name.replace("weight", "weight_scale_inv")
        scale = tensors[place].flatten()[0] if place in tensors else 1.0
        torch.testing.assert_close(parameter, tensors[name].float() * scale, rtol=1e-6, atol=0)
    changes = {"model__path": str(packed), "model__tune": tune, "federation__rounds": 1}
    summary = carry_out(configure(**changes), tmp_path / "run")
    result = artefacts.verify(tmp_path / "run")
    assert result.saved and result.differences == []
    artefacts.export(tmp_path / "run", tmp_path / "out", merge=True)
    content = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in content
    plain = configure(model__path=str(tmp_path / "out"), federation__rounds=1)
    after = carry_out(plain, tmp_path / "after")
    assert after["heldout_loss"]["start"] == pytest.approx(summary["heldout_loss"]["end"], rel=1e-5)


def test_a_plain_folder_has_nothing_stored(folder: Path) -> None:
    with pytest.raises(FedForwardError, match="'stored' is for a folder that is quantised already"):
        loading.load(str(folder), "float32", "cpu", quantization="stored")


def test_full_tuning_of_packed_weights_is_refused(tiny_network: Callable[..., Any]) -> None:
    network = tiny_network()
    layer = network.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(FedForwardError, match=r"1 tensors .*up_proj\.weight \(torch\.int8\)"):
        FullModel(network, plan=plan())


@needs_package
def test_a_transposed_family_is_merged_and_saved(folder: Path, tmp_path: Path) -> None:
    """GPT-2 keeps its weights transposed, square ones too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings = AutoConfig.for_model(
        "gpt2", n_embd=32, n_layer=2, n_head=4, vocab_size=958, n_positions=64,
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
    """By its own sentence, before its weights are read."""
    from safetensors.torch import save_file
    from transformers import BartConfig, T5Config

    save_file({}, tmp_path / "model.safetensors")
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    for config in (T5Config(), BartConfig()):
        config.save_pretrained(str(tmp_path))
        with pytest.raises(FedForwardError, match=r"is an encoder-decoder \((t5|bart)\)"):
            loading.load(str(tmp_path), "float32", "cpu")


def test_a_model_type_without_a_causal_model_is_refused(folder: Path, tmp_path: Path) -> None:
    from transformers import ViTConfig

    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    ViTConfig().save_pretrained(str(tmp_path))
    with pytest.raises(FedForwardError, match="has no language model for its configuration, a ViT"):
        loading.load(str(tmp_path), "float32", "cpu")


def test_no_limit_of_positions_may_be_a_number() -> None:
    """XLNet's configuration says -1."""
    from transformers import LlamaConfig

    found = []
    for limit in (64, -1, 0):
        config = LlamaConfig()
        config.max_position_embeddings = limit
        found.append(loading.longest_sequence(SimpleNamespace(config=config)))
    assert found == [64, None, None]
