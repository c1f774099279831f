"""What lies at `model.path`: a sentence for what is missing, damaged or something else.

Only names, headers and small JSON files are looked at. What is there is left to transformers to
load (see `loading`).
"""

import json
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from fedforward.core.errors import FedForwardError
from fedforward.core.paths import home
from fedforward.models.adapters import SETTINGS

#: Files one of which every tokenizer that transformers saves has.
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "tiktoken.model",
)
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
#: What transformers saves of a processor beside its tokenizer.
_PROCESSORS = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
#: What Git LFS leaves in place of a file that it has not fetched.
_POINTER = b"version https://git-lfs"


def check_folder(path: str) -> None:
    """Refuse a folder that is no whole model in Hugging Face format.

    Raises:
        FedForwardError: what it is, or what it lacks, and what to do.
    """
    folder, given = home(path), f"model.path = {path!r}"
    if (folder / SETTINGS).is_file():
        _refuse_adapter(path, folder)
    if not (folder / "config.json").is_file():
        raise FedForwardError(f"{given}: the folder has no config.json. {_nearest(folder)}")
    config = _read_json(folder / "config.json", given)
    if not config.get("model_type"):
        raise FedForwardError(
            f"{given}: its config.json names no model_type, so that nobody knows which network it "
            "is. Take config.json from where the model came from."
        )
    _check_weights(folder, given)
    # With its configuration alone a tokenizer may have files of other names, or none.
    if not any((folder / name).is_file() for name in (*_TOKENIZERS, "tokenizer_config.json")):
        raise FedForwardError(
            f"{given}: the folder has no tokenizer, such as tokenizer.json. Copy the tokenizer's "
            "files there from where the model came from."
        )
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (folder / name).is_file():
            _read_json(folder / name, given)


def copy_processor(source: str, folder: Path) -> None:
    """Copy how a local base prepares images to where a tuned model of it was saved."""
    for name in _PROCESSORS:
        if (home(source) / name).is_file() and not (folder / name).exists():
            shutil.copyfile(home(source) / name, folder / name)


def _refuse_adapter(path: str, folder: Path) -> None:
    """Say how an adapter is gone on from."""
    settings = _read_json(folder / SETTINGS, f"model.path = {path!r}")
    base = settings.get("base_model_name_or_path") or "the base that it was made for"
    if (folder / "config.json").is_file():
        raise FedForwardError(
            f"model.path = {path!r} holds a model and an adapter ({SETTINGS}), and transformers "
            f"would load the adapter's base. Move the adapter to a folder of its own, and name "
            "that as model.adapter to go on from it."
        )
    raise FedForwardError(
        f"model.path = {path!r} is an adapter ({SETTINGS}) and not a model. Set model.path = "
        f"{base!r} and model.adapter = {path!r} to go on from it."
    )


def _nearest(folder: Path) -> str:
    """What to give in place of a folder without a model."""
    try:
        inside = sorted(
            file.parent for depth in ("*", "*/*") for file in folder.glob(f"{depth}/config.json")
        )
        gguf = sorted(folder.glob("*.gguf"))
    except OSError:
        inside, gguf = [], []
    if inside:
        return f"There is one in {str(inside[0])!r}: give that as model.path."
    if gguf:
        return f"There is a GGUF file in it: give {str(gguf[0])!r} as model.path."
    return "It must be a model saved in Hugging Face format."


def _check_weights(folder: Path, given: str) -> None:
    """Refuse weights that are absent in part, or not whole."""
    indices = [folder / f"{name}.index.json" for name in _WEIGHTS]
    files = [folder / name for name in _WEIGHTS if (folder / name).is_file()][:1]
    if not files:
        index = next((file for file in indices if file.is_file()), None)
        if index is None:
            raise FedForwardError(
                f"{given}: the folder has no weights, such as {_WEIGHTS[0]}. Give a complete model."
            )
        parts = _read_json(index, given).get("weight_map")
        if not isinstance(parts, dict):
            raise FedForwardError(f"{given}: {index.name} has no weight_map.")
        names = sorted(set(map(str, parts.values())))
        for name in names:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise FedForwardError(
                    f"{given}: {index.name} names {name!r}, which is outside of the folder. Give a "
                    "model whose files are all in its folder."
                )
        files = [folder / name for name in names]
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise FedForwardError(
                f"{given}: {index.name} names {len(absent)} files that are not there, such as "
                f"{absent[0]}. Give a complete model."
            )
    for file in files:
        _check_file(file, given)


def _check_file(file: Path, given: str) -> None:
    """Refuse a file of weights that was cut short."""
    from safetensors import SafetensorError, safe_open

    _check_pointer(file, given)
    if file.suffix != ".safetensors":
        # An archive of PyTorch's, or a pickle of its older releases.
        if not beginning(file, 2).startswith((b"PK", b"\x80")):
            raise FedForwardError(
                f"{given}: {file.name} is no file of PyTorch's. Download or copy it again."
            )
        return
    try:
        with safe_open(file, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise FedForwardError(
            f"{given}: {file.name} is damaged or cut short ({error}). Download or copy it again."
        ) from error


def _check_pointer(file: Path, given: str) -> None:
    if beginning(file, len(_POINTER)) == _POINTER:
        raise FedForwardError(
            f"{given}: {file.name} is a pointer of Git LFS and not the file. Fetch it with "
            "`git lfs pull`."
        )


def beginning(file: Path, size: int) -> bytes:
    """The first bytes of a file; none of one that cannot be read."""
    try:
        with file.open("rb") as opened:
            return opened.read(size)
    except OSError:
        return b""


def _read_json(file: Path, given: str) -> dict[str, Any]:
    """The content of a JSON file of a model.

    Raises:
        FedForwardError: it is damaged.
    """
    _check_pointer(file, given)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FedForwardError(
            f"{given}: {file.name} is damaged ({error}). Copy it again from where the model came "
            "from."
        ) from error
    if not isinstance(content, dict):
        raise FedForwardError(f"{given}: {file.name} is damaged: it holds no settings.")
    return content
