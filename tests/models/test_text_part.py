"""Networks that take images as well: the part that reads text is tuned, and the rest stays."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("pydantic", reason="the configuration needs pydantic")

from fedforward.config.schema import Config
from fedforward.core.steps import NO_STEPS, Probe, Steps
from fedforward.models import loading
from fedforward.models.full import FullModel
from fedforward.training import replay
from tests.conftest import DEMO_MODEL
from tests.models.test_models import batch, hugging_face_loss, lora, plan

Configure = Callable[..., Config]
CarryOut = Callable[..., dict[str, Any]]

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 958,
    "max_position_embeddings": 128,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: More blocks, and more weights, than the part that reads text.
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 16,
}
ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
TILES: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 32,
    "num_heads": 4,
    "patch_size": 8,
}
TOKENS = {
    "image_token_id": 950,
    "video_token_id": 951,
    "vision_start_token_id": 952,
    "vision_end_token_id": 953,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llava": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": VISION | {"model_type": "clip_vision_model"},
        "image_token_index": 950,
    },
    "qwen2_vl": {
        "text_config": TEXT | ROPE,
        "vision_config": TILES | {"embed_dim": 32, "mlp_ratio": 2},
        **TOKENS,
    },
    "gemma3": {
        "text_config": TEXT | {"model_type": "gemma3_text"},
        "vision_config": VISION | {"model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
        "image_token_index": 950,
        "boi_token_index": 951,
        "eoi_token_index": 952,
    },
    "smolvlm": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": VISION,
        "image_token_id": 950,
        "scale_factor": 1,
    },
    "qwen2_5_vl": {
        "text_config": TEXT | ROPE,
        "vision_config": TILES
        | {"out_hidden_size": 32, "intermediate_size": 64, "fullatt_block_indexes": [0]},
        **TOKENS,
    },
    "qwen3_vl": {
        "text_config": TEXT | ROPE,
        "vision_config": TILES
        | {"out_hidden_size": 32, "intermediate_size": 64, "deepstack_visual_indexes": [0]},
        **TOKENS,
    },
    "mistral3": {
        "text_config": TEXT | {"model_type": "mistral"},
        "vision_config": VISION | {"model_type": "pixtral"},
        "image_token_index": 950,
    },
    "mllama": {
        "text_config": TEXT | {"cross_attention_layers": [1], "num_hidden_layers": 3},
        "vision_config": VISION
        | {
            "attention_heads": 4,
            "num_global_layers": 1,
            "vision_output_dim": 64,
            "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1]],
            "max_num_tiles": 1,
        },
        "image_token_index": 950,
    },
}
FAST = ("llava", "qwen2_vl")


def folder_of(family: str, path: Path) -> Path:
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES[family])
    network = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    network.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, path / name)
    return path


def network_of(path: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(path).eval()


@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize(
    "family",
    [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES],
)
def test_the_text_part_is_tuned_and_nothing_else(
    configure: Configure, carry_out: CarryOut, tmp_path: Path, family: str, tune: str
) -> None:
    from peft import PeftModel

    base = folder_of(family, tmp_path / "base")
    (base / "preprocessor_config.json").write_text("{}")
    settings = {"model__path": str(base), "model__tune": tune, "federation__rounds": 2}
    network = loading.load(str(base), "float32", "cpu")[0]
    expected = hugging_face_loss(network_of(base), batch())
    model: Any = lora(network, rank=2) if tune == "lora" else FullModel(network, plan=plan())
    (start,) = model.evaluate([Probe(batch())])
    assert start.mean == pytest.approx(expected, rel=1e-6)
    probes = [Probe(batch(), NO_STEPS, Steps.of([s], [0.01])) for s in (3, 4)]
    alone = [model.evaluate([probe])[0].mean for probe in probes]
    np.testing.assert_allclose([e.mean for e in model.evaluate(probes)], alone, rtol=1e-5)
    parts = ("language_model", "text_model", "lm_head")
    assert all(any(part in name for part in parts) for name in model.tensors)
    assert not any("cross_attn" in name for name in model.tensors)

    carry_out(configure(**settings), tmp_path / "run")
    result = replay.verify(tmp_path / "run")
    assert result.saved and result.differences == []
    replay.export(tmp_path / "run", tmp_path / "out", merge=True)
    tuned = hugging_face_loss(network_of(tmp_path / "out"), batch())
    assert tuned != pytest.approx(expected, rel=1e-5)
    assert (tmp_path / "out/preprocessor_config.json").is_file()
    if tune == "lora":
        adapted = PeftModel.from_pretrained(network_of(base), tmp_path / "run/adapter")
        assert hugging_face_loss(adapted, batch()) == pytest.approx(tuned, rel=1e-6)
    before, after = (load_file(next((tmp_path / f).glob("*.safetensors"))) for f in ("base", "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    # Qwen2-VL's files call its parts otherwise.
    others = ("vis", "projector", "connector", "cross_attn")
    assert changed and not any(part in name for name in changed for part in others)
    assert any(part in name for name in before for part in others)


def test_named_targets_are_those_of_the_text_part(tmp_path: Path) -> None:
    """The other part has projections of the same names."""
    network = loading.load(str(folder_of("llava", tmp_path / "base")), "float32", "cpu")[0]
    assert any("vision" in n and n.endswith("q_proj") for n, _ in network.named_modules())
    model = lora(network, targets=["q_proj"], blocks=[1])
    kept = {name.split(".lora_")[0] for name in model.tensors}
    assert kept == {"base_model.model.model.language_model.layers.1.self_attn.q_proj"}
    assert model.layout.blocks == ("1",)


def test_positions_are_those_of_the_text(tmp_path: Path) -> None:
    network = loading.load(str(folder_of("qwen2_vl", tmp_path / "base")), "float32", "cpu")[0]
    assert loading.longest_sequence(network) == 128
    # Three rows are as many as the axes of its positions.
    data = batch(rows=3)
    model = FullModel(network, plan=plan(), blocks=[1])
    probes = [Probe(data, NO_STEPS, Steps.of([s], [0.01])) for s in (3, 4)]
    alone = [model.evaluate([probe])[0].mean for probe in probes]
    np.testing.assert_allclose([e.mean for e in model.evaluate(probes)], alone, rtol=1e-5)


def test_a_text_only_class_of_the_same_folder_is_not_taken(tmp_path: Path) -> None:
    """Transformers would load Llama 3.2 Vision without its part for images, and so save it."""
    base = folder_of("mllama", tmp_path / "base")
    content = json.loads((base / "config.json").read_text())
    assert content["architectures"] == ["MllamaForConditionalGeneration"]
    network = loading.load(str(base), "float32", "cpu")[0]
    assert type(network).__name__ == "MllamaForConditionalGeneration"
