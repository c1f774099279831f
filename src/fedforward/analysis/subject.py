"""What is diagnosed: model, data and points, built from a configuration as a run builds them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedforward.config.fields import AT_SITES
from fedforward.config.schema import Config
from fedforward.core.batches import Batch
from fedforward.core.errors import FedForwardError
from fedforward.core.logs import PHASES
from fedforward.core.paths import home
from fedforward.core.seeds import generator
from fedforward.data.corpus import Corpus
from fedforward.data.examples import Example
from fedforward.data.sampler import Collate
from fedforward.methods.base import Method
from fedforward.models.adapters import read_adapter
from fedforward.models.base import CausalModel
from fedforward.models.loading import longest_sequence
from fedforward.models.lora import LoraModel
from fedforward.training import build, replay
from fedforward.training.assembly import build_method
from fedforward.training.run_directory import RunDirectory

#: Tokens of the rows whose graph is held at a time.
TOKENS_AT_ONCE = 512
#: Objectives that have a derivative.
SMOOTH = ("loss", "choice")


@dataclass(frozen=True, eq=False)
class Subject:
    """A model at its base, the data of a run, and how they meet.

    Attributes:
        config: with the dtype in which the model was built.
        method: of the configuration.
        model: at its base.
        corpus: the clients' examples.
        collate: makes batches.
        without: why there are no derivatives, in a sentence; "" if there are.
    """

    config: Config
    method: Method
    model: CausalModel
    tokenizer: Any
    corpus: Corpus
    collate: Collate
    without: str

    def rows(self, count: int) -> list[Batch]:
        """So many training rows, drawn from those of all clients alike, in small batches."""
        sizes = [len(part) for part in self.corpus.clients]
        random = generator(self.config.run.seed, "diagnose-rows")
        every = random.choice(sum(sizes), min(count, sum(sizes)), replace=False)
        ends = np.cumsum(sizes)
        found: list[Example] = []
        for place in sorted(every.tolist()):
            client = int(np.searchsorted(ends, place, side="right"))
            found.append(self.corpus.clients[client][place - int(ends[client]) + sizes[client]])
        found.sort(key=lambda example: len(example.tokens))
        batches: list[Batch] = []
        group: list[Example] = []
        for example in found:
            if group and (len(group) + 1) * len(example.tokens) > TOKENS_AT_ONCE:
                batches.append(self.collate(group))
                group = []
            group.append(example)
        return [*batches, self.collate(group)]

    def weights(self, clients: Sequence[int]) -> NDArray[np.float64]:
        """p_i of these clients, which sum to 1, float64 [N]."""
        if self.config.federation.weights == "equal":
            return np.full(len(clients), 1.0 / len(clients))
        sizes = np.array([len(self.corpus.clients[client]) for client in clients], np.float64)
        return np.asarray(sizes / sizes.sum())


def check(config: Config) -> str:
    """Refuse what cannot be diagnosed; returns why derivatives are not to be had, or "".

    Raises:
        FedForwardError: there is no model or no text here, or the objective has no derivative.
    """
    if config.model.path == AT_SITES:
        raise FedForwardError(
            "This configuration has no model.path, as a server's has none. Give model.path=FOLDER "
            "after its name."
        )
    if config.data.source == AT_SITES:
        raise FedForwardError(
            "This configuration has no data.source, as a server's has none, and a diagnosis is of "
            "text. Give data.source=FILE after its name."
        )
    if config.objective not in SMOOTH:
        raise FedForwardError(
            f"method.objective = {config.objective!r} has no derivative, and a diagnosis is of "
            "curvature and gradients. Give method.objective=loss after the configuration's name."
        )
    if config.model.quantization != "none":
        return (
            f"model.quantization = {config.model.quantization!r}: quantised layers have no second "
            "derivative, so only what forward passes tell is here."
        )
    if config.model.offload == "host":
        return (
            'model.offload = "host": blocks that are fetched and dropped cannot be differentiated, '
            "so only what forward passes tell is here."
        )
    if config.model.device_map != "none":
        return (
            f"model.device_map = {config.model.device_map!r}: a model over several devices is not "
            "differentiated, so only what forward passes tell is here."
        )
    return ""


def subject(config: Config) -> Subject:
    """Build what is diagnosed; in float32 where it is differentiated.

    Raises:
        FedForwardError: see `check`; and for whatever a run would refuse.
    """
    without = check(config)
    if not without:
        config = with_dtype(config, "float32")
    method = build_method(config)
    PHASES.info("loading the model")
    reader = build.corpus_reader(config)
    plan = build.resolve_plan(config)
    model, tokenizer = build.build_model(config, plan, build.read_classes(config, reader))
    PHASES.info("reading the data")
    positions = longest_sequence(model.network)
    corpus = build.read_corpus(config, reader, tokenizer, positions, model.classes)
    if config.lora.init == "aligned" and config.lora.init_file is None:
        assert isinstance(model, LoraModel)
        PHASES.info("aligning adapters")
        model.begin_with(build.align(config, model, tokenizer, corpus))
    model.plan = build.settle_plan(config, model, method)
    collate = build.collate_of(config, tokenizer, model)
    return Subject(config, method, model, tokenizer, corpus, collate, without)


def with_dtype(config: Config, dtype: str) -> Config:
    """The configuration with its weights in another dtype."""
    return config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})


def check_point(at: str) -> None:
    """Refuse what has no trained state, before anything is computed.

    Raises:
        FedForwardError: it is neither a run directory nor the folder of an adapter.
    """
    path = home(at)
    if not RunDirectory(path).started and not (Path(path) / "adapter_config.json").is_file():
        raise FedForwardError(
            f"--at {at} is neither a run directory nor a folder with an adapter. Give one of both."
        )


def trained_state(found: Subject, at: str) -> NDArray[np.float32]:
    """The tuned tensors of a run directory or an adapter, float32 [d]; the model has them then.

    Raises:
        FedForwardError: there is neither, or it is of another model.
    """
    path, model = home(at), found.model
    directory = RunDirectory(path)
    if directory.started:
        PHASES.info("rebuilding the run %s", at)
        kept = directory.config()
        base = found.config.model.path if kept.model.path == AT_SITES else None
        rebuilt = replay.rebuild(directory, base)
        if rebuilt.differences:
            raise FedForwardError(
                f"--at {at} does not agree with its ledger: {rebuilt.differences[0]}. See "
                f"`fedforward verify {at}`."
            )
        if rebuilt.model.layout != model.layout:
            raise FedForwardError(
                f"--at {at} tunes other tensors than this configuration. Give the configuration "
                f"of the run, {path / 'config.toml'}."
            )
        _take_frozen(model, rebuilt.model)
        state = rebuilt.model.export_state()
        model.assign_state(state)
        return state
    if not isinstance(model, LoraModel) or model.outputs:
        key = "lora.factors = 'R'" if isinstance(model, LoraModel) else "model.tune = 'full'"
        raise FedForwardError(f"--at {at} is an adapter, and {key}. Give the run directory.")
    adapter = read_adapter(str(path))
    adapter.check_settings(found.config.lora.rank, found.config.lora.alpha, model.classes)
    tensors = model.saved_tensors()
    adapter.check_tensors(tensors, found.config.lora.targets)
    adapter.put_into(tensors)
    model.clear_cache()
    return model.export_state()


def _take_frozen(model: CausalModel, trained: CausalModel) -> None:
    """Give adapters the frozen A that a run's had."""
    if isinstance(model, LoraModel) and isinstance(trained, LoraModel):
        theirs = trained.saved_tensors()
        for name, tensor in model.saved_tensors().items():
            if name not in model.tensors:
                tensor.data.copy_(theirs[name].data)
        for name, output in model.outputs.items():
            output.copy_(trained.outputs[name])
        model.clear_cache()
