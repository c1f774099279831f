"""Bases from GGUF files: the same network, tokens and loss as from safetensors."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("gguf", reason="gguf is not installed (pip install 'fedforward[gguf]')")
pytest.importorskip("pydantic", reason="the configuration needs pydantic")

from fedforward.config.schema import Config
from fedforward.core.errors import FedForwardError
from fedforward.core.steps import Probe
from fedforward.models import gguf_files, loading
from fedforward.training import replay
from tests.conftest import DEMO_MODEL
from tests.models.test_models import batch, hugging_face_loss, lora
from tests.support.gguf_file import write_gguf

Configure = Callable[..., Config]
CarryOut = Callable[..., dict[str, Any]]


@pytest.fixture
def demo() -> Any:
    return loading.load(str(DEMO_MODEL), "float32", "cpu")


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0"])
def test_the_loss_is_that_of_the_same_weights(tmp_path: Path, demo: Any, kind: str) -> None:
    import gguf

    network, tokenizer = demo
    assert network.config.num_attention_heads == network.config.num_key_value_heads
    write_gguf(network, tmp_path / "x.gguf", kind)
    found, tokens = loading.load(str(tmp_path / "x.gguf"), "float32", "cpu")
    text = "Hello, world!\n  3.14 = 22/7\tGröße"
    assert tokens(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (tokens.bos_token, tokens.eos_token) == (tokenizer.bos_token, tokenizer.eos_token)
    if kind != "F32":
        how = gguf.GGMLQuantizationType[kind]
        for parameter in network.parameters():
            if parameter.dim() > 1:
                packed = gguf.quants.quantize(parameter.numpy(), how)
                parameter.copy_(torch.from_numpy(gguf.quants.dequantize(packed, how)))
    expected = hugging_face_loss(network, batch())
    assert hugging_face_loss(found, batch()) == pytest.approx(expected, rel=1e-6)
    (probed,) = lora(found).evaluate([Probe(batch())])
    assert probed.mean == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_run_on_a_file_verifies_and_exports(
    configure: Configure, carry_out: CarryOut, tmp_path: Path, demo: Any, tune: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_gguf(demo[0], tmp_path / "x.gguf")
    plain = carry_out(configure(model__tune=tune, federation__rounds=1), tmp_path / "plain")
    settings = {"model__path": str(tmp_path / "x.gguf"), "model__tune": tune}
    summary = carry_out(configure(federation__rounds=1, **settings), tmp_path / "run")
    for when in ("start", "end"):
        assert summary["heldout_loss"][when] == pytest.approx(plain["heldout_loss"][when], rel=1e-5)
    result = replay.verify(tmp_path / "run")
    assert result.saved and result.differences == []
    replay.export(tmp_path / "run", tmp_path / "out", merge=True)
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not hasattr(network.config, "quantization_config")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "</s>"


def test_what_lies_beside_a_file_is_not_its_own(tmp_path: Path, demo: Any) -> None:
    """Transformers alone takes the tokenizer of the folder."""
    network, tokenizer = demo
    write_gguf(network, tmp_path / "x.gguf")
    content = json.loads((DEMO_MODEL / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:5]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    shutil.copy(DEMO_MODEL / "tokenizer_config.json", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "vocab_size": 50}))
    found, tokens = loading.load(str(tmp_path / "x.gguf"), "float32", "cpu")
    assert tokens("Hello")["input_ids"] == tokenizer("Hello")["input_ids"]
    assert found.config.name_or_path == str(tmp_path / "x.gguf")


def _absent(path: Path) -> None:
    path.unlink()


def _text(path: Path) -> None:
    path.write_text("hello " * 100)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def _eight(path: Path) -> None:
    path.write_bytes(b"GGUF\3\0\0\0")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_absent, "no such file"),
        (_text, "is no GGUF file"),
        (_cut, "cannot be loaded"),
        (_eight, "cannot be loaded"),
    ],
)
def test_a_damaged_file_is_one_sentence(
    tmp_path: Path, demo: Any, damage: Callable[[Path], None], words: str
) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(demo[0], path)
    damage(path)
    with pytest.raises(FedForwardError, match=words) as caught:
        loading.load(str(path), "float32", "cpu")
    assert f"model.path = {str(path)!r}" in str(caught.value)


def test_what_is_refused(tmp_path: Path, demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import import_utils

    write_gguf(demo[0], tmp_path / "x.gguf")
    os.link(tmp_path / "x.gguf", tmp_path / "x-00001-of-00003.gguf")
    with pytest.raises(FedForwardError, match="one part of a model"):
        loading.load(str(tmp_path / "x-00001-of-00003.gguf"), "float32", "cpu")
    with pytest.raises(FedForwardError, match="are made plain when they are read"):
        loading.load(str(tmp_path / "x.gguf"), "float32", "cpu", quantization="nf4")
    monkeypatch.setattr(import_utils, "is_gguf_available", lambda: False)
    with pytest.raises(FedForwardError, match=r"pip install 'fedforward\[gguf\]'"):
        gguf_files.check_gguf(str(tmp_path / "x.gguf"))
