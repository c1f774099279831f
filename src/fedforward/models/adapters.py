"""LoRA adapters in PEFT format that a run goes on from (`model.adapter`).

An adapter is read, checked and put into a model's own PEFT layers. What it says beside its tensors
is either kept exactly (rank and alpha, by module too, rsLoRA) or refused by a sentence.
"""

import json
import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedforward.core.errors import FedForwardError
from fedforward.core.paths import home
from fedforward.models.fingerprints import fingerprint
from fedforward.models.pinned_files import PinnedFile

LOGGER = logging.getLogger("fedforward.models")
SETTINGS = "adapter_config.json"
#: The U of B = U R in a file with the A to begin with.
OUTPUTS = "lora_U.weight"
#: Settings that decide what the tensors compute, or what PEFT does with them later.
KEPT = ("lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern")
#: Settings that may have any value: they say where an adapter came from, or which modules it has,
#: which its tensors say as well.
_FREE = {
    *KEPT, "r", "lora_alpha", "peft_type", "task_type", "auto_mapping", "peft_version",
    "base_model_name_or_path", "revision", "inference_mode", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "fan_in_fan_out", "modules_to_save",
}  # fmt: skip
#: Ways to begin an adapter that leave the base as it is.
_PLAIN_BEGINNINGS = (True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class StoredAdapter:
    """A LoRA adapter as it lies in a folder.

    Attributes:
        path: of the folder, as given.
        settings: of its `adapter_config.json`.
        tensors: float32, by their names in the file.
    """

    path: str
    settings: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]

    @property
    def digest(self) -> str:
        """SHA-256 of the tensors and of what decides what they compute, hexadecimal."""
        said = {key: self.settings.get(key) for key in ("r", "lora_alpha", *KEPT)}
        text = json.dumps({key: value or None for key, value in said.items()}, sort_keys=True)
        return fingerprint([*sorted(self.tensors.items()), (text, torch.zeros(0))])

    @property
    def kept(self) -> dict[str, Any]:
        """Settings for PEFT that the configuration of a run has no keys for."""
        return {key: self.settings[key] for key in KEPT if self.settings.get(key)}

    def check_settings(self, rank: int, alpha: float, heads: Collection[str]) -> None:
        """Refuse settings of a run that are not the adapter's.

        Args:
            heads: of a sequence classifier, which PEFT saves beside the adapter.

        Raises:
            FedForwardError: with the keys to set.
        """
        saved = self.settings.get("modules_to_save")
        if saved and not heads:
            raise self._refusal(f"modules_to_save = {saved!r}")
        wanted = {"lora.rank": self.settings["r"], "lora.alpha": float(self.settings["lora_alpha"])}
        found = {"lora.rank": rank, "lora.alpha": float(alpha)}
        differing = [key for key in wanted if wanted[key] != found[key]]
        if differing:
            here = " and ".join(f"{key} = {found[key]!r}" for key in differing)
            there = " and ".join(f"{key} = {wanted[key]!r}" for key in differing)
            raise FedForwardError(
                f"{here} does not fit model.adapter = {self.path!r}. Set {there}, and lora.targets "
                f"= {self._targets()} as the adapter has them."
            )

    def check_tensors(self, own: Mapping[str, torch.Tensor], targets: str | Sequence[str]) -> None:
        """Refuse an adapter whose tensors are not those of a model.

        Args:
            own: the adapters of the model, and its classifier's head, by the names in a file.
            targets: `lora.targets`.

        Raises:
            FedForwardError: with what does not fit.
        """
        extra, missing = sorted(self.tensors.keys() - own.keys()), sorted(own.keys() - self.tensors)
        if extra or missing:
            here, there = _blocks(own), _blocks(self.tensors)
            advice = [] if here == there else [f"model.blocks = {sorted(there)}"]
            if advice == [] or _leaves(own) != _leaves(self.tensors):
                advice = [f"lora.targets = {self._targets()}", *advice]
            which = f"lacks {_module(missing[0])}" if missing else f"has {_module(extra[0])}"
            raise FedForwardError(
                f"lora.targets = {targets!r} does not fit model.adapter = {self.path!r}, which "
                f"{which}{' that it would adapt' if missing else ' beside them'}. Set "
                f"{' and '.join(advice)}, and model.path to the base that it was made "
                f"for{self._base()}."
            )
        for name, tensor in own.items():
            if tensor.shape != self.tensors[name].shape:
                raise FedForwardError(
                    f"model.adapter = {self.path!r} does not fit the base: {name} has shape "
                    f"{list(self.tensors[name].shape)} there and {list(tensor.shape)} here. Set "
                    f"model.path to the base that it was made for{self._base()}."
                )

    def put_into(self, own: Mapping[str, torch.Tensor]) -> None:
        """Give a model's tensors the adapter's values."""
        for name, tensor in own.items():
            tensor.data.copy_(self.tensors[name])

    def _targets(self) -> str:
        """What `lora.targets` is called in TOML."""
        targets = self.settings.get("target_modules")
        return json.dumps(sorted(targets) if isinstance(targets, list) else targets)

    def _base(self) -> str:
        base = self.settings.get("base_model_name_or_path")
        return f" ({base!r})" if base else ""

    def _refusal(self, what: str) -> FedForwardError:
        return FedForwardError(
            f"model.adapter = {self.path!r} has {what} in {SETTINGS}, which a run with forward "
            "passes cannot go on from. Merge it into its base with PEFT, and give that as "
            "model.path."
        )


def check_initial(
    initial: PinnedFile, base: str, adapted: Mapping[str, Any], own: Mapping[str, torch.Tensor]
) -> None:
    """Refuse an initial A that was made for another model or other adapters.

    Args:
        base: fingerprint of the model's base.
        adapted: `lora.rank`, `lora.targets` and `model.blocks` of the model.
        own: every A of the model, by its name in a file.

    Raises:
        FedForwardError: with the key and what differs.
    """
    given, made_for = initial.origin, initial.made_for
    again = "or make it again with `fedforward align CONFIG --out FILE`."
    if made_for.get("rank") != adapted["rank"]:
        raise FedForwardError(
            f"lora.rank = {adapted['rank']} does not fit {given}, which was made for lora.rank = "
            f"{made_for.get('rank')!r}. Set that, {again}"
        )
    in_file, in_model = _outputs(initial.tensors), _outputs(own)
    if bool(in_file) != bool(in_model):
        factors = "'R'" if in_file else "'B' or 'both'"
        raise FedForwardError(
            f"lora.factors = {adapted['factors']!r} does not fit {given}, which was made for "
            f"lora.factors = {factors}. Set that, {again}"
        )
    if (OUTPUTS in in_file) != (OUTPUTS in in_model):
        alignment = "forward" if OUTPUTS in in_file else "backward"
        raise FedForwardError(
            f"lora.alignment = {adapted['alignment']!r} does not fit {given}, which was made with "
            f"lora.alignment = {alignment!r}. Set that, {again}"
        )
    extra, missing = (
        sorted(initial.tensors.keys() - own.keys()),
        sorted(own.keys() - initial.tensors),
    )
    if (extra or missing) and made_for.get("base") == base:
        which = f"lacks {_module(missing[0])}" if missing else f"has {_module(extra[0])}"
        keys = {"targets": "lora.targets", "blocks": "model.blocks"}
        wanted = {key: made_for.get(name) for name, key in keys.items()}
        differing = [k for n, k in keys.items() if wanted[k] != adapted[n]] or [*wanted]
        here = " and ".join(f"{k} = {_toml(adapted[n])}" for n, k in keys.items() if k in differing)
        there = " and ".join(f"{key} = {_toml(wanted[key])}" for key in differing)
        raise FedForwardError(
            f"{here} does not fit {given}, which {which}"
            f"{'' if missing else ' beside what is adapted'}. Set {there}, {again}"
        )
    shapes = any(own[n].shape != t.shape for n, t in initial.tensors.items() if n in own)
    if made_for.get("base") != base or extra or missing or shapes:
        raise FedForwardError(
            f"{given} was made for a base with other weights than this model.path, as model.dtype "
            f"and model.quantization hold it ({str(made_for.get('base'))[:12]}… there, "
            f"{base[:12]}… here). Give that base, {again}"
        )


def _outputs(names: Iterable[str]) -> list[str]:
    """Those of some names that are of a U."""
    return [name for name in names if name == OUTPUTS or name.endswith(f".{OUTPUTS}")]


def _toml(value: Any) -> str:
    """A value of `lora.targets` or `model.blocks` as TOML has it."""
    return json.dumps("all" if value is None else value)


def read_adapter(path: str) -> StoredAdapter:
    """A LoRA adapter of a folder that PEFT has saved.

    Raises:
        FedForwardError: there is none, it is damaged, or it is of a kind that cannot be kept
            exactly.
    """
    folder = home(path)
    given = f"model.adapter = {path!r}"
    if not folder.is_dir():
        raise FedForwardError(
            f"{given}: no such folder. Give a folder with {SETTINGS} and "
            "adapter_model.safetensors, as PEFT and `fedforward export` write it."
        )
    file = folder / SETTINGS
    if not file.is_file():
        what = (
            "It is a model: give it as model.path. " if (folder / "config.json").is_file() else ""
        )
        raise FedForwardError(
            f"{given}: the folder has no {SETTINGS}. {what}An adapter is a folder that PEFT has "
            "saved."
        )
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("it holds no settings")
    except (OSError, ValueError) as error:
        raise FedForwardError(f"{given}: {SETTINGS} cannot be read: {error}.") from error
    adapter = StoredAdapter(path, settings, {})
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise FedForwardError(
            f"{given} has peft_type = {kind!r} in {SETTINGS}, and a run goes on from 'LORA' alone."
        )
    for key, value in unusual(settings):
        raise adapter._refusal(f"{key} = {value!r}")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float):
        raise FedForwardError(f"{given}: {SETTINGS} has r = {rank!r} and lora_alpha = {alpha!r}.")
    if settings.get("lora_dropout"):
        LOGGER.warning(
            "%s has lora_dropout = %s, which is kept in what is saved; no probe drops anything",
            given,
            settings["lora_dropout"],
        )
    return StoredAdapter(path, settings, _tensors(folder, given))


def unusual(settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Settings that change what an adapter computes, in ways that no probe knows."""
    from peft import LoraConfig

    plain = LoraConfig().to_dict()
    found = []
    for key, value in settings.items():
        if key == "init_lora_weights":
            # Others have moved a part of the base into the adapter.
            if value not in _PLAIN_BEGINNINGS:
                found.append((key, value))
        elif key not in _FREE and value and value != plain.get(key):
            found.append((key, value))
    return found


def _tensors(folder: Path, given: str) -> dict[str, torch.Tensor]:
    """The tensors of an adapter's file in float32, which holds those of narrower dtypes exactly."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    names = ("adapter_model.safetensors", "adapter_model.bin")
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        raise FedForwardError(f"{given}: the folder has no {names[0]}. Give a complete adapter.")
    try:
        if file.suffix == ".bin":
            stored = torch.load(file, map_location="cpu", weights_only=True)
        else:
            stored = load_file(file)
        tensors = {name: tensor.float() for name, tensor in stored.items()}
    except (OSError, ValueError, RuntimeError, SafetensorError, EOFError, LookupError) as error:
        raise FedForwardError(f"{given}: {file.name} cannot be read: {error}.") from error
    except (AttributeError, TypeError, ImportError) as error:
        raise FedForwardError(f"{given}: {file.name} holds no tensors.") from error
    except Exception as error:
        # Python's pickle names its own errors, which are of no common kind.
        raise FedForwardError(f"{given}: {file.name} is damaged ({error}).") from error
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise FedForwardError(
                f"{given}: the tensor {name} of {file.name} has values that are not finite."
            )
    return tensors


def _blocks(names: Iterable[str]) -> set[int]:
    """The numbers of the transformer blocks that tensors of an adapter belong to."""
    found = (re.search(r"\.(\d+)\.", name) for name in names)
    return {int(match[1]) for match in found if match}


def _leaves(names: Iterable[str]) -> set[str]:
    """The last names of the modules that tensors of an adapter belong to."""
    return {_module(name).rsplit(".", 1)[-1] for name in names}


def _module(name: str) -> str:
    """The module that a tensor of an adapter belongs to, as the base calls it."""
    return name.removeprefix("base_model.model.").split(".lora_")[0]
