"""Files of tensors that a run begins with, made once and the same for every party.

Each says what it was made for. Its SHA-256 stands in the ledger's header, and parties compare it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fedforward.core.errors import FedForwardError
from fedforward.core.paths import hint, home

#: The one entry of a file's metadata. With several, safetensors writes them in a changing order.
_ENTRY = "fedforward"


@dataclass(frozen=True)
class PinnedFile:
    """The content of such a file.

    Attributes:
        origin: the key and path that name it in errors, such as "lora.init_file = 'a.safetensors'".
        tensors: by name.
        made_for: what of a model and a configuration it fits.
        data: its bytes.
    """

    origin: str
    tensors: Mapping[str, torch.Tensor]
    made_for: Mapping[str, Any]
    data: bytes

    @property
    def digest(self) -> str:
        """SHA-256 of the file, hexadecimal."""
        return hashlib.sha256(self.data).hexdigest()


def pinned(
    kind: str, tensors: Mapping[str, torch.Tensor], made_for: Mapping[str, Any], origin: str = ""
) -> PinnedFile:
    """Tensors as a file: the same content gives the same bytes.

    Args:
        kind: of the file, such as "initial A".
        tensors: by name; copied to the CPU.
        made_for: plain values that JSON takes.
        origin: what names it in errors.
    """
    from safetensors.torch import save

    content = json.dumps({"kind": kind, "made_for": made_for}, sort_keys=True)
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return PinnedFile(origin, held, dict(made_for), save(held, {_ENTRY: content}))


def read_pinned(path: str, kind: str, key: str, command: str) -> PinnedFile:
    """Read such a file.

    Args:
        path: as the user typed it.
        kind: that it must be of.
        key: that names it, such as "lora.init_file".
        command: that makes it, such as "fedforward align".

    Raises:
        FedForwardError: there is none, it is damaged, or it is of another kind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    origin, file = f"{key} = {path!r}", home(path)
    advice = f"Give the file that `{command} CONFIG --out FILE` has written."
    if not file.is_file():
        reason = "it is a folder." if file.is_dir() else f"no such file.{hint(path)}"
        raise FedForwardError(f"{origin}: {reason} {advice}")
    try:
        data = file.read_bytes()
        tensors = load(data)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise FedForwardError(
            f"{origin} cannot be read: {error}. Copy it again from where it was made."
        ) from error
    content = _content(data)
    if content.get("kind") != kind or not isinstance(content.get("made_for"), dict):
        raise FedForwardError(f"{origin} holds no {kind} of a run. {advice}")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise FedForwardError(
                f"{origin}: the tensor {name} has values that are not finite. {advice}"
            )
    return PinnedFile(origin, tensors, content["made_for"], data)


def _content(data: bytes) -> dict[str, Any]:
    """What the metadata of a safetensors file say; nothing if it has none of ours."""
    length = int.from_bytes(data[:8], "little")
    try:
        said = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_ENTRY])
    except (ValueError, KeyError, TypeError):
        return {}
    return said if isinstance(said, dict) else {}
