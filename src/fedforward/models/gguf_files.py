"""Bases from GGUF files, which transformers reads into plain weights.

A file is read in a folder of its own: transformers would take settings and tokenizers that lie
beside it for those of the file.
"""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedforward.core.errors import FedForwardError
from fedforward.core.paths import home
from fedforward.models.folders import beginning


def is_gguf(path: str) -> bool:
    """Whether a path names a GGUF file, there or not."""
    return path.lower().endswith(".gguf")


def check_gguf(path: str) -> None:
    """Refuse a GGUF file that cannot be one, or that nothing here can read.

    Raises:
        FedForwardError: it is missing, of another kind or in parts; the package gguf is absent.
    """
    from transformers.utils.import_utils import is_gguf_available

    file, given = home(path), f"model.path = {path!r}"
    if not file.is_file():
        raise FedForwardError(f"{given}: no such file.")
    if beginning(file, 4) != b"GGUF":
        raise FedForwardError(f"{given} is no GGUF file: it does not begin with 'GGUF'.")
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", path.lower()):
        raise FedForwardError(
            f"{given} is one part of a model, and transformers reads whole files. Join the parts "
            "with `llama-gguf-split --merge`."
        )
    if not is_gguf_available():
        raise FedForwardError(
            f"{given} needs the package gguf, which is not installed. Install it with "
            "`pip install 'fedforward[gguf]'`."
        )


@contextmanager
def folder_of(path: str) -> Iterator[str]:
    """While it is open, a folder in which a GGUF file lies alone, under its own name.

    Raises:
        FedForwardError: no link to the file can be made.
    """
    file = home(path).resolve()
    with tempfile.TemporaryDirectory(prefix="fedforward-") as folder, _quiet():
        link = Path(folder) / Path(path).name
        try:
            link.symlink_to(file)
        except OSError:
            try:
                # Some systems allow symbolic links to administrators alone.
                link.hardlink_to(file)
            except OSError as error:
                raise FedForwardError(
                    f"model.path = {path!r} cannot be linked into {folder}: {error.strerror}. Put "
                    "it on the same disk as the folder for temporary files."
                ) from error
        yield folder


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' bar of the tensors of a GGUF file unseen."""
    from transformers import modeling_gguf_pytorch_utils as reader

    shown = getattr(reader, "tqdm", None)
    if shown is None:
        yield
        return
    reader.tqdm = lambda items, *_, **__: items
    try:
        yield
    finally:
        reader.tqdm = shown
