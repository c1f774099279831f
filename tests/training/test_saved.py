"""Exports as loading gives them: no false alarm, and no change that is not found."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedforward.config.schema import Config
from fedforward.training import replay
from fedforward.training.saved import compare_model
from tests.conftest import DEMO_MODEL

Configure = Callable[..., Config]
CarryOut = Callable[..., dict[str, Any]]
Tensors = dict[str, torch.Tensor]

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 958,
    "max_position_embeddings": 128,
}
#: Families whose files have other names, or other pieces, than the network has parameters.
RENAMED: dict[str, dict[str, Any]] = {
    "gpt_neox": {},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "head_dim": 8,
    },
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16},
}


def folder_of(family: str, path: Path) -> Path:
    """A tiny model with random weights and the demonstration's tokenizer, as a folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SMALL, **RENAMED[family]})
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, path / name)
    return path


def loaded(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype="auto")


@pytest.mark.parametrize(
    "family",
    [
        "gpt_neox",
        "mixtral",
        *(pytest.param(f, marks=pytest.mark.slow) for f in list(RENAMED)[2:]),
    ],
)
def test_a_run_verifies_where_files_have_other_names(
    configure: Configure, carry_out: CarryOut, tmp_path: Path, family: str
) -> None:
    base = folder_of(family, tmp_path / "base")
    names = dict(loaded(base).named_parameters()).keys()
    assert names - load_file(base / "model.safetensors").keys(), "nothing is renamed here"
    settings: dict[str, Any] = {"model__tune": "full", "run__probes_per_call": 1}
    carry_out(configure(model__path=str(base), federation__rounds=1, **settings), tmp_path / "run")
    result = replay.verify(tmp_path / "run")
    assert result.saved and result.differences == []
    file = tmp_path / "run/model/model.safetensors"
    tensors = load_file(file)
    name = max(tensors)
    tensors[name].view(torch.uint8).view(-1)[0] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
    (difference,) = replay.verify(tmp_path / "run").differences
    assert "model/: 1 values of" in difference


def _swap(tensors: Tensors) -> None:
    one, other = sorted(name for name in tensors if ".experts." in name and "w1" in name)[:2]
    tensors[one], tensors[other] = tensors[other], tensors[one]


def _drop(tensors: Tensors) -> None:
    del tensors[min(name for name in tensors if ".experts." in name)]


def _shorten(tensors: Tensors) -> None:
    name = min(tensors)
    tensors[name] = tensors[name][:-1].clone()


def _narrow(tensors: Tensors) -> None:
    for name in tensors:
        tensors[name] = tensors[name].half()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_swap, "values of model.layers.0.mlp.experts"),
        (_drop, "parts of some tensors are missing"),
        (_shorten, "other shapes"),
        (_narrow, "values of"),
        (lambda tensors: tensors.update(odd=torch.ones(1)), "the tensor odd is not the run's"),
    ],
)
def test_a_changed_file_is_found(
    tmp_path: Path, change: Callable[[Tensors], None], words: str
) -> None:
    network = loaded(folder_of("mixtral", tmp_path / "model"))
    assert compare_model(network, tmp_path / "model") == []
    file = tmp_path / "model/model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    differences = compare_model(network, tmp_path / "model")
    assert differences and words in " ".join(differences)


def test_a_damaged_folder_is_found(tmp_path: Path) -> None:
    folder = folder_of("gpt_neox", tmp_path / "model")
    network = loaded(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 0.5}))
    (difference,) = compare_model(network, folder)
    assert difference == "model/config.json has layer_norm_eps 0.5, the run 1e-05"
    (folder / "config.json").write_text(json.dumps(config))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    (difference,) = compare_model(network, folder)
    assert difference.startswith("model/ cannot be loaded: ")
    file.unlink()
    (difference,) = compare_model(network, folder)
    assert difference.startswith("model/ cannot be loaded: ")
