"""What lies in a run's `adapter/` or `model/`, compared with what was rebuilt from its ledger.

A whole model is compared as loading it gives it: transformers may rename, split or join tensors
when it writes a file, and undoes that when it reads one.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fedforward.models.adapters import KEPT, SETTINGS
from fedforward.models.auto_classes import reason_of
from fedforward.models.base import CausalModel
from fedforward.models.loading import load_report_hidden
from fedforward.models.lora import LoraModel
from fedforward.models.lora_layers import ADAPTER

#: Entries of `config.json` that say where and with what a model was written, not what it computes.
_CIRCUMSTANCES = {"_name_or_path", "transformers_version", "architectures"}


def compare(model: CausalModel, folder: Path) -> list[str]:
    """A sentence for each thing in `folder` that is not what `model` would save; none if all is."""
    if isinstance(model, LoraModel):
        return [
            *_compare_adapter(model, folder),
            *_compare_settings(model, folder / SETTINGS),
        ]
    return compare_model(model.network, folder)


def compare_model(network: Any, folder: Path) -> list[str]:
    """A sentence for each tensor and setting in which a saved model differs from `network`.

    Args:
        network: a transformers model, all of it: weights that were not tuned count as well.
        folder: where a model of this kind was saved.
    """
    try:
        # Several kinds of model may share a network's class, and not its configuration's.
        own = {"local_files_only": True, "trust_remote_code": False}
        config = type(network.config).from_pretrained(str(folder), **own)
        with load_report_hidden():
            saved, loading = type(network).from_pretrained(
                str(folder),
                config=config,
                dtype="auto",
                output_loading_info=True,
                use_safetensors=True,
                **own,
            )
    except MemoryError:
        raise
    except Exception as error:
        # Each library that transformers stands on has errors of its own.
        return [f"{folder.name}/ cannot be loaded: {reason_of(error)}"]
    absent = {str(name) for name in loading["missing_keys"]}
    absent |= {str(key[0]) for key in loading["mismatched_keys"]}
    differences = [
        f"{folder.name}/: the tensor {name} is missing or of another kind"
        for name in sorted(absent)
    ]
    differences += [
        f"{folder.name}/: the tensor {name} is not the run's"
        for name in sorted(loading["unexpected_keys"])
    ]
    own, other = network.state_dict(), saved.state_dict()
    seen: set[tuple[int, int]] = set()
    for name in sorted(own.keys() - absent):
        if name not in other:
            differences.append(f"{folder.name}/: the tensor {name} is missing or of another kind")
            continue
        # Tied weights have several names.
        places = (own[name].data_ptr(), other[name].data_ptr())
        if places not in seen:
            seen.add(places)
            differences += _compare_tensor(name, own[name], other[name], folder)
    return sorted(differences) + _compare_configuration(network, saved, folder)


def _compare_configuration(network: Any, saved: Any, folder: Path) -> list[str]:
    """A sentence for each entry of a saved model's `config.json` that is not the network's."""
    with tempfile.TemporaryDirectory() as scratch:
        network.config.save_pretrained(scratch)
        wanted = type(network.config).from_pretrained(scratch, local_files_only=True).to_dict()
    found = saved.config.to_dict()
    return [
        f"{folder.name}/config.json has {key} {found.get(key)!r}, the run {wanted.get(key)!r}"
        for key in sorted((wanted.keys() | found.keys()) - _CIRCUMSTANCES)
        if _plain(found.get(key)) != _plain(wanted.get(key))
    ]


def _plain(value: Any) -> Any:
    """A value of a configuration as JSON would bring it back, circumstances left out."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items() if k not in _CIRCUMSTANCES}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value).removeprefix("torch.") if isinstance(value, str | torch.dtype) else value


def _compare_adapter(model: LoraModel, folder: Path) -> list[str]:
    """A sentence for each tensor of an adapter whose saved bits differ."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    stored: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            stored |= load_file(file)
        except (OSError, SafetensorError) as error:
            return [f"{folder.name}/{file.name} cannot be read: {error}"]
    expected = model.saved_tensors()
    extra = sorted(stored.keys() - expected.keys())
    differences = [f"{folder.name}/: the tensor {name} is not the run's" for name in extra]
    for name, tensor in expected.items():
        if name in stored:
            differences += _compare_tensor(name, tensor, stored[name], folder)
        else:
            differences.append(f"{folder.name}/: the tensor {name} is missing or of another kind")
    return differences


def _compare_tensor(
    name: str, expected: torch.Tensor, found: torch.Tensor, folder: Path
) -> list[str]:
    """A sentence if the bits of two tensors differ; else nothing."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return [f"{folder.name}/: the tensor {name} is missing or of another kind"]
    mine, theirs = (t.detach().cpu().contiguous() for t in (expected, found))
    differing = mine.view(-1).view(torch.uint8) != theirs.view(-1).view(torch.uint8)
    changed = differing.view(-1, mine.element_size()).any(dim=1).sum().item()
    return [f"{folder.name}/: {changed} values of {name} differ"] if changed else []


def _compare_settings(model: LoraModel, file: Path) -> list[str]:
    """A sentence for each setting of the saved adapter that is not the run's."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(stored, dict):
            raise ValueError
    except (OSError, ValueError):
        return [f"{file.parent.name}/{file.name} cannot be read"]
    wanted = model.peft.peft_config[ADAPTER].to_dict()
    return [
        f"{file.parent.name}/{file.name} has {key} {stored.get(key)}, the run {wanted[key]}"
        for key in ("r", "lora_alpha", "bias", "use_dora", *KEPT)
        if stored.get(key) != wanted[key]
    ]
