"""What is made of text before a run, once, and shipped to every party as a file."""

from pathlib import Path
from typing import Any

from fedforward.config.fields import AT_SITES
from fedforward.config.schema import Config
from fedforward.core.errors import FedForwardError
from fedforward.core.files import write_bytes
from fedforward.core.paths import home
from fedforward.data.corpus import Corpus
from fedforward.data.public import public_reader
from fedforward.models.base import CausalModel
from fedforward.models.loading import longest_sequence
from fedforward.models.pinned_files import PinnedFile
from fedforward.training import build


def make_initial_a(config: Config, out: Path) -> PinnedFile:
    """Write the file of a run with aligned adapters (`lora.init_file`).

    Raises:
        FedForwardError: there is no model or text, or `out` cannot be written.
    """
    if config.model.tune == "full" or config.model.adapter is not None:
        key = "tune" if config.model.tune == "full" else "adapter"
        raise FedForwardError(
            f"model.{key} = {getattr(config.model, key)!r}: `fedforward align` is for new "
            "adapters. Leave it out."
        )
    lora = config.lora.model_copy(update={"init": "random", "init_file": None})
    out = _check(config, out)
    model, tokenizer, corpus = _built(config.model_copy(update={"lora": lora}))
    return _written(build.align(config, model, tokenizer, corpus), out)


def make_mask(config: Config, out: Path) -> PinnedFile:
    """Write the mask of a run (`method.mask_file`): `method.density` of the tuned weights.

    Raises:
        FedForwardError: there is no model or text, or `out` cannot be written.
    """
    if config.lora.init == "aligned" and config.lora.init_file is None:
        raise FedForwardError(
            "lora.init = 'aligned' without lora.init_file: gradients depend on A. Make it first, "
            "with `fedforward align CONFIG --out FILE`, and name it here."
        )
    method = config.method.model_copy(update={"mask": "none", "mask_file": None})
    out = _check(config, out)
    model, tokenizer, corpus = _built(config.model_copy(update={"method": method}))
    return _written(build.sensitivity(config, model, tokenizer, corpus), out)


def _check(config: Config, out: Path) -> Path:
    """Refuse what could not be written or computed, before anything is loaded."""
    out = home(out)
    if out.exists():
        raise FedForwardError(f"--out {out} exists already. Choose another name.")
    if not out.absolute().parent.is_dir():
        raise FedForwardError(f"--out {out}: there is no folder {out.parent}.")
    if config.model.path == AT_SITES:
        raise FedForwardError(
            "This configuration has no model.path, as a server's has none. Give model.path=FOLDER "
            "after its name."
        )
    if config.data.public is None and config.data.source == AT_SITES:
        raise FedForwardError(
            "This configuration has neither data.public nor data.source. Give data.public=FILE "
            "after its name: a text that anyone may see, with the fields of the run's rows, or a "
            ".txt file."
        )
    return out


def _built(config: Config) -> tuple[CausalModel, Any, Corpus | None]:
    """The model at its base weights, its tokenizer and, without `data.public`, the corpus."""
    plan = build.resolve_plan(config)
    sources = config.data.source == AT_SITES
    reader = public_reader(config) if sources else build.corpus_reader(config)
    model, tokenizer = build.build_model(config, plan, build.read_classes(config, reader))
    if config.data.public is not None:
        return model, tokenizer, None
    positions = longest_sequence(model.network)
    return model, tokenizer, build.read_corpus(config, reader, tokenizer, positions, model.classes)


def _written(made: PinnedFile, out: Path) -> PinnedFile:
    try:
        write_bytes(out, made.data)
    except OSError as error:
        raise FedForwardError(f"--out {out} cannot be written: {error.strerror}.") from error
    return made
