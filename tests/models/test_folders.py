"""Folders that are no whole model, or none at all: each is one sentence, and none a traceback."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("pydantic", reason="the configuration needs pydantic")

from fedforward.core.batches import TokenBatch
from fedforward.core.errors import FedForwardError
from fedforward.core.steps import Probe
from fedforward.models import loading
from tests.conftest import DEMO_MODEL
from tests.models.test_adapters import saved_adapter
from tests.models.test_models import batch, lora

Make = Callable[..., Any]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n"


@pytest.fixture
def folder(tmp_path: Path, tiny_network: Make) -> Path:
    """A tiny random Llama with a tokenizer that fits it, as a folder."""
    path = tmp_path / "tiny"
    tiny_network(vocabulary=958).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, path / name)
    return path


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def shard(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    network.save_pretrained(folder, max_shard_size="40KB")


def _tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def _absent_shard(folder: Path) -> None:
    shard(folder)
    sorted(folder.glob("*.safetensors"))[1].unlink()


def _broken_index(folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text("{")


def _no_map(folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text("{}")


def _leads_out(name: str) -> Callable[[Path], Any]:
    """An index that names an existing file elsewhere."""

    def damage(folder: Path) -> None:
        shard(folder)
        index = folder / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        first = min(content["weight_map"])
        moved = folder.parent / "elsewhere.safetensors"
        shutil.move(folder / content["weight_map"][first], moved)
        old = content["weight_map"][first]
        place = name.replace("{}", str(folder.parent))
        content["weight_map"] = {
            key: place if part == old else part for key, part in content["weight_map"].items()
        }
        index.write_text(json.dumps(content))

    return damage


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _dangling(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("nowhere")


def _bad_bin(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"abc" * 100)


def _nested(folder: Path) -> None:
    (folder / "inside").mkdir()
    for file in list(folder.glob("*.*")):
        shutil.move(file, folder / "inside" / file.name)


def _no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def _sentencepiece(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\x0a\x05")


def _only_gguf(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    (folder / "x.gguf").write_bytes(b"GGUF")


def _write(name: str, text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(text)


def _remove(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


def _config(**changes: Any) -> Callable[[Path], Any]:
    return lambda folder: edit(folder / "config.json", **changes)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_remove("config.json"), "the folder has no config.json"),
        (_nested, "inside': give that as model.path"),
        (_only_gguf, "x.gguf' as model.path"),
        (_write("config.json", "{,"), "config.json is damaged"),
        (_write("config.json", "[1]"), "config.json is damaged: it holds no settings"),
        (_config(model_type=""), "names no model_type"),
        (_config(model_type="nonsense9"), "does not recognize this architecture"),
        (_config(hidden_size="32"), "expected int, got str"),
        (_config(num_attention_heads=5), "not a multiple"),
        (_config(num_hidden_layers=1), "asks for only 1 blocks in model.layers"),
        (_config(num_hidden_layers=3), r"the weights lack \d+ tensors"),
        (_config(intermediate_size=64), "other shapes than its config.json says"),
        (
            _config(
                model_type="mine", auto_map={"AutoConfig": "a.B", "AutoModelForCausalLM": "a.C"}
            ),
            "Python code of its own",
        ),
        (_remove("model.safetensors"), "the folder has no weights"),
        (_dangling, "the folder has no weights"),
        (_cut, "model.safetensors is damaged or cut short"),
        (_write("model.safetensors", ""), "model.safetensors is damaged or cut short"),
        (_write("model.safetensors", POINTER), "git lfs pull"),
        (_absent_shard, "names 1 files that are not there, such as model-00002"),
        (_broken_index, "model.safetensors.index.json is damaged"),
        (_no_map, "has no weight_map"),
        (_leads_out("../elsewhere.safetensors"), "which is outside of the folder"),
        (_leads_out("{}/elsewhere.safetensors"), "which is outside of the folder"),
        (_bad_bin, "pytorch_model.bin is no file of PyTorch's"),
        (_no_tokenizer, "the folder has no tokenizer"),
        (_sentencepiece, "the tokenizer cannot be loaded"),
        (_remove("tokenizer.json"), "the tokenizer cannot be loaded: none of its files"),
        (_write("tokenizer.json", '{"a": '), "tokenizer.json is damaged"),
        (
            _write("tokenizer.json", "{}"),
            "the tokenizer cannot be loaded: 'added_tokens' is missing",
        ),
        (_write("tokenizer.json", POINTER), "git lfs pull"),
        (_write("tokenizer_config.json", "{"), "tokenizer_config.json is damaged"),
        (_write("generation_config.json", "{"), "generation_config.json is damaged"),
    ],
)
def test_a_damaged_folder_is_one_sentence(
    folder: Path, damage: Callable[[Path], Any], words: str
) -> None:
    loading.load(str(folder), "float32", "cpu")
    damage(folder)
    with pytest.raises(FedForwardError, match=words) as caught:
        loading.load(str(folder), "float32", "cpu")
    message = str(caught.value)
    assert message.startswith(f"model.path = {str(folder)!r}") and "\n" not in message


def _no_architectures(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    del content["architectures"]
    (folder / "config.json").write_text(json.dumps(content))


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _snapshot(folder: Path) -> None:
    """Links into another folder, as in the hub's cache."""
    blobs = folder.with_name("blobs")
    blobs.mkdir()
    for file in list(folder.iterdir()):
        shutil.move(file, blobs / file.name)
        file.symlink_to(f"../blobs/{file.name}")


@pytest.mark.parametrize("change", [shard, _no_architectures, _pickled, _snapshot])
def test_odd_folders_that_hold_a_whole_model(folder: Path, change: Callable[[Path], Any]) -> None:
    expected = lora(loading.load(str(folder), "float32", "cpu")[0]).base_fingerprint
    change(folder)
    found = lora(loading.load(str(folder) + "/", "float32", "cpu")[0]).base_fingerprint
    assert found == expected


def test_tensors_that_are_not_used_are_told_of(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _tensors(folder, lambda tensors: tensors.update({"model.oddity": torch.ones(2)}))
    loading.load(str(folder), "float32", "cpu")
    (told,) = [m for m in caplog.messages if "are not used" in m]
    assert "1 tensors" in told and "model.oddity" in told


def test_an_adapter_is_not_a_model(tiny_network: Make, tmp_path: Path, folder: Path) -> None:
    adapter = saved_adapter(tiny_network(), tmp_path / "adapter")
    edit(adapter / "adapter_config.json", base_model_name_or_path="some/base")
    with pytest.raises(FedForwardError) as caught:
        loading.load(str(adapter), "float32", "cpu")
    assert f"Set model.path = 'some/base' and model.adapter = {str(adapter)!r}" in str(caught.value)
    for file in adapter.iterdir():
        shutil.copy(file, folder / file.name)
    with pytest.raises(FedForwardError, match="holds a model and an adapter"):
        loading.load(str(folder), "float32", "cpu")


def test_a_tokenizer_of_another_model(tiny_network: Make, folder: Path) -> None:
    tiny_network(vocabulary=200).save_pretrained(folder)
    with pytest.raises(FedForwardError, match=r"758 tokens .* with number 200; there are 200 rows"):
        loading.load(str(folder), "float32", "cpu")


def test_an_added_token_beyond_the_embeddings(folder: Path) -> None:
    """As Gemma 3 has one for images: it may be there, and no text may have it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<image>"])
    tokenizer.save_pretrained(folder)
    network, tokenizer = loading.load(str(folder), "float32", "cpu")
    assert tokenizer("<image>")["input_ids"] == [958]
    model = lora(network)
    model.evaluate([Probe(batch())])
    data = batch()
    tokens = data.tokens.copy()
    tokens[0, 0] = 958
    with pytest.raises(FedForwardError, match=r"number 958, and the embeddings .* have 958 rows"):
        model.evaluate([Probe(TokenBatch(tokens, data.labels))])
    tokenizer.pad_token = "<image>"
    tokenizer.save_pretrained(folder)
    with pytest.raises(FedForwardError, match=r"1 tokens .* '<image>' with number 958"):
        loading.load(str(folder), "float32", "cpu")
