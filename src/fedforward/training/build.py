"""From a configuration to its parts: data, partition, tokenised batches, model and method.

The same configuration and probe plan give the same parts, bit for bit; whoever starts, resumes or
verifies a run builds them here.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedforward.config.schema import Config
from fedforward.core.batches import Batch
from fedforward.core.errors import FedForwardError
from fedforward.core.identity import ModelIdentity
from fedforward.core.machine import usable_cores
from fedforward.core.steps import Probe, ProbePlan
from fedforward.data.chat import read_template
from fedforward.data.corpus import Corpus, CorpusReader
from fedforward.data.encoding import TextEncoder
from fedforward.data.examples import Example, Flipped
from fedforward.data.labels import label_names
from fedforward.data.public import public_examples, training_examples
from fedforward.data.sampler import (
    Batches,
    Collate,
    collate,
    collate_classes,
    collate_prompts,
    longest,
)
from fedforward.directions import Distribution
from fedforward.evaluation.objectives import Context, build_objective, needs_answers, texts
from fedforward.methods.base import Method
from fedforward.models import aligned, masks
from fedforward.models.adapters import read_adapter
from fedforward.models.base import CausalModel
from fedforward.models.choices import with_choices
from fedforward.models.fingerprints import tokenizer_fingerprint
from fedforward.models.full import FullModel
from fedforward.models.grouping import settled
from fedforward.models.loading import load, longest_sequence
from fedforward.models.lora import LoraModel
from fedforward.models.masks import mask_of, random_mask, sensitivity_mask, small_weights_mask
from fedforward.models.pinned_files import PinnedFile, read_pinned
from fedforward.models.trial import check_causal
from fedforward.planning import probe_grouping as probes
from fedforward.training import activation_cache
from fedforward.training.attacks import Attack
from fedforward.training.faults import Faults
from fedforward.training.run_directory import RunDirectory

LOGGER = logging.getLogger("fedforward.training.build")


def corpus_reader(config: Config) -> CorpusReader:
    """What reads the data of a run, once, for classes and corpus."""
    return CorpusReader(config.data, config.evaluation, config.federation, config.run.seed)


def read_classes(config: Config, reader: CorpusReader) -> tuple[str, ...]:
    """The classes of a run; empty for a causal model, whose data are not read.

    Raises:
        FedForwardError: see `CorpusReader.classes`.
    """
    return () if config.model.head == "causal" else reader.classes()


def read_corpus(
    config: Config,
    reader: CorpusReader,
    tokenizer: Any,
    positions: int | None,
    classes: Sequence[str] = (),
) -> Corpus:
    """The corpus of a run, with room for the answers that its objective or metrics generate.

    Args and errors: see `CorpusReader.corpus`.
    """
    measured = (config.objective, *config.evaluation.metrics)
    if reader.chat is None:
        _warn_of_no_end(config, tokenizer)
    return reader.corpus(tokenizer, positions, classes, generates=any(map(needs_answers, measured)))


def _warn_of_no_end(config: Config, tokenizer: Any) -> None:
    """Say that answers cannot learn where to end, where the tokenizer has no token for it."""
    asked = config.model.head == "causal" and config.data.label_words is None
    if asked and tokenizer.eos_token_id is None:
        LOGGER.warning(
            "the tokenizer of model.path = %r has no end-of-sequence token: nothing is put after "
            "an answer, so the model does not learn where to end, and a generated answer has "
            "data.answer_tokens = %d tokens. Set eos_token in its tokenizer_config.json if the "
            "model knows one.",
            config.model.path,
            config.data.answer_tokens,
        )


def resolve_plan(config: Config) -> ProbePlan:
    """The probe plan of a new run."""
    return probes.resolve(
        tune=config.model.tune,
        threads=config.run.threads,
        probes_per_call=config.run.probes_per_call,
        tokens_per_call=config.run.tokens_per_call,
        trajectory=config.run.trajectory,
        probes_per_step=config.method.probes_per_step,
        device=resolve_device(config.run.device),
    )


def resolve_device(requested: str) -> str:
    """A device that is there; see `devices.resolve`."""
    from fedforward.models import devices

    return devices.resolve(requested, "run.device")


def _load(config: Config, device: str, classes: Sequence[str]) -> tuple[Any, Any]:
    """The network at its base weights, and its tokenizer."""
    return load(
        config.model.path,
        config.model.dtype,
        device,
        quantization=config.model.quantization,
        device_map=config.model.device_map,
        offload=offloads(config, device),
        classes=classes,
        run_seed=config.run.seed,
    )


def offloads(config: Config, device: str) -> bool:
    """Whether blocks are offloaded to host memory. On the CPU they are there anyway."""
    return config.model.offload == "host" and device != "cpu"


def build_model(config: Config, plan: ProbePlan, classes: Sequence[str]) -> tuple[CausalModel, Any]:
    """The model at its base weights, ready to probe, and its tokenizer.

    Args:
        classes: of a sequence classifier (see `read_classes`); else empty.
    """
    model, tokenizer = _tuned_model(config, plan, classes)
    if offloads(config, resolve_device(config.run.device)):
        model.offload_to_host()
    set_masks(config, model)
    return model, tokenizer


def set_masks(config: Config, model: CausalModel) -> None:
    """Set which weights of a model at its base may move at all (`method.mask`)."""
    density = config.method.density
    model.masks, model.mask_digest = {}, ""
    if config.method.mask == "random":
        model.masks = random_mask(model.tensors, model.layout, density, config.run.seed)
    elif config.method.mask == "small":
        model.masks = small_weights_mask(model.tensors, density)
    elif config.method.mask == "file":
        if config.method.mask_file is None:
            raise FedForwardError(
                "method.mask = 'file' needs method.mask_file, a file that `fedforward mask CONFIG "
                "--out FILE` has written."
            )
        made = read_pinned(config.method.mask_file, masks.KIND, masks.KEY, masks.COMMAND)
        model.masks, model.mask_digest = mask_of(made, model), made.digest


def read_initial_a(path: str, key: str = aligned.KEY) -> PinnedFile:
    """The A that aligned adapters begin with, from a file.

    Args:
        key: that names it in errors.

    Raises:
        FedForwardError: see `read_pinned`.
    """
    return read_pinned(path, aligned.KIND, key, aligned.COMMAND)


def initial_a_of(directory: RunDirectory) -> PinnedFile:
    """The A that a run of this machine was given at its start.

    Raises:
        FedForwardError: it is gone or damaged.
    """
    file = directory.initial_a
    if not file.is_file():
        raise FedForwardError(
            f"{file} is missing, with which the adapters of this run began. Restore it from a "
            "copy; `fedforward verify` and `export` take one with --init-file FILE."
        )
    return read_initial_a(str(file), "lora.init = 'aligned', the file")


def align(
    config: Config, model: CausalModel, tokenizer: Any, corpus: Corpus | None = None
) -> PinnedFile:
    """The aligned A of a model, from `data.public`, or else from the training rows.

    Raises:
        FedForwardError: for whatever is wrong with `data.public`.
    """
    assert isinstance(model, LoraModel)
    examples = public_or_training(config, model, tokenizer, corpus, "aligning adapters")
    places = [example.prompt_length - 1 for example in examples]
    # Rows of plain text have no prompt.
    decided = config.objective in ("choice", "accuracy") and not model.classes
    decided = decided and all(e.choices and e.prompt_length for e in examples)
    tokens = [example.tokens for example in examples]
    words = [_first_tokens(example) if decided else () for example in examples]
    if decided and not all(words):
        words = [() for _ in examples]
        if model.outputs:
            LOGGER.info("label words begin alike: U follows the loss of the right ones")
    losses = [(example.counted, first) for example, first in zip(examples, words, strict=True)]
    return aligned.align(model, tokens, places if decided else None, losses)


def _first_tokens(example: Example) -> Sequence[int]:
    """The token that each label word begins with; none where two of them begin alike."""
    prompts = example.choice_prompts or (example.prompt_length,) * len(example.choices)
    firsts = [int(c[p]) for c, p in zip(example.choices, prompts, strict=True) if p < len(c)]
    same = len(set(prompts)) == 1 and len(set(firsts)) == len(example.choices)
    return firsts if same else ()


def sensitivity(
    config: Config, model: CausalModel, tokenizer: Any, corpus: Corpus | None = None
) -> PinnedFile:
    """The mask of `method.density` of the tuned weights, from `data.public` or the training rows.

    Raises:
        FedForwardError: for whatever is wrong with `data.public`; no row is of the run's classes.
    """
    examples = public_or_training(config, model, tokenizer, corpus, "measuring gradients")
    if model.classes:
        examples = [example for example in examples if example.right >= 0]
        if not examples:
            raise FedForwardError(
                f"data.public = {config.data.public!r} has no row of the run's classes, "
                f"{', '.join(model.classes[:8])}. Give other rows."
            )
    rows = collate_classes if model.classes else collate
    return sensitivity_mask(model, [rows([example]) for example in examples], config.method.density)


def public_or_training(
    config: Config, model: CausalModel, tokenizer: Any, corpus: Corpus | None, what: str
) -> list[Example]:
    """Rows of `data.public`, or else of what all clients train on; which, is logged.

    Args:
        corpus: None only with `data.public`.
        what: is done with them, for the log.
    """
    if config.data.public is not None:
        examples = public_examples(config, tokenizer, model.classes)
        where = f"data.public = {config.data.public!r}"
    else:
        assert corpus is not None
        examples = training_examples(corpus, config.data.public_rows)
        where = "the training rows of all clients, which lie on this machine (no data.public)"
    LOGGER.info("%s with %d rows of %s", what, len(examples), where)
    return examples


def use_threads(plan: ProbePlan) -> None:
    """Compute with the plan's number of threads, on which the last bits of losses depend."""
    import torch

    torch.set_num_threads(plan.threads)


@contextmanager
def all_cores() -> Iterator[None]:
    """Compute with all cores meanwhile: for commits, whose bits no number of threads changes."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(before, usable_cores()))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _tuned_model(
    config: Config, plan: ProbePlan, classes: Sequence[str]
) -> tuple[CausalModel, Any]:
    from fedforward.models import devices

    use_threads(plan)
    device = resolve_device(config.run.device)
    if ":" in device:
        devices.select(device)
    network, tokenizer = _load(config, device, classes)
    if config.data.chat_template is not None:
        # It goes on with a model that is saved.
        tokenizer.chat_template = read_template(config.data.chat_template)
    check_causal(network, config.model.path)
    distribution = Distribution(config.method.distribution)
    if config.model.tune == "full":
        full = FullModel(
            network,
            distribution=distribution,
            plan=plan,
            blocks=config.model.tuned_blocks,
            tokenizer=tokenizer,
            reload=lambda: _load(config, device, classes)[0],
        )
        return full, tokenizer
    begin = config.model.adapter
    model = LoraModel(
        network,
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        targets=config.lora.targets,
        factors=config.lora.factors,
        alignment=config.lora.alignment,
        blocks=config.model.tuned_blocks,
        run_seed=config.run.seed,
        distribution=distribution,
        plan=plan,
        adapter=None if begin is None else read_adapter(begin),
    )
    if config.lora.init == "aligned" and config.lora.init_file is not None:
        model.begin_with(read_initial_a(config.lora.init_file))
    return model, tokenizer


def identity(model: CausalModel, tokenizer: Any = None) -> ModelIdentity:
    """What other parties must have in common with this model, and with a tokenizer if given."""
    return ModelIdentity(
        layout=model.layout,
        base=model.base_fingerprint,
        classes=tuple(model.classes),
        state_bytes=model.state_bytes,
        tokenizer="" if tokenizer is None else tokenizer_fingerprint(tokenizer),
        adapter=model.adapter_digest,
        initial_a=model.initial_a_digest,
        mask=model.mask_digest,
    )


def collate_of(config: Config, tokenizer: Any, model: CausalModel) -> Collate:
    """How training examples become the batches of the run's objective, by the model's plan."""
    context = Context(
        tokenizer,
        config.data.answer_tokens,
        tuple(model.classes),
        joined=model.plan.joins_choices,
        most_branching=model.plan.most_branching,
    )
    return build_objective(config.objective, context).batch


def settle_plan(config: Config, model: CausalModel, method: Method) -> ProbePlan:
    """The model's plan, with what is found out about the model on short texts.

    What is noteworthy is logged: what is not tuned, and probes that are alone.
    """
    if model.left_out:
        LOGGER.warning("%s.", model.left_out)
    if method.capabilities.forward_only:
        plan = settled(model)
    else:
        plan = replace(model.plan, left_out=model.left_out)
    if plan.alone:
        LOGGER.warning("One probe a forward pass: %s.", plan.alone)
    return with_choices(model, plan) if config.data.label_words else plan


def fit_plan(
    config: Config,
    model: CausalModel,
    corpus: Corpus,
    method: Method,
    collate: Collate = collate,
) -> ProbePlan:
    """The model's settled plan: kept activations, and as many probes as a memory budget allows."""
    if not method.capabilities.forward_only:
        return model.plan
    batches = longest_batches(config, corpus, collate)
    model.plan = activation_cache.planned(config, model, corpus, batches)
    budget = config.run.budget
    if budget is None or model.plan.alone:
        return model.plan
    clients = config.federation.clients if config.model.tune == "lora" else 1
    kept = activation_cache.largest_bytes(model, corpus)
    return probes.fit(model, batches, budget, clients, method.estimator, kept)


def faults(config: Config) -> Faults:
    """What goes wrong in the simulation."""
    given = config.simulation
    if given.plain:
        return Faults()
    return Faults(
        run_seed=config.run.seed,
        dropout=given.dropout,
        straggler=given.straggler,
        byzantine=given.byzantine,
        late_join=given.late_join,
        late_join_round=given.late_join_round,
    )


def attack(config: Config) -> Attack:
    """Which simulated clients lie in their reports, and how."""
    given = config.simulation
    return Attack(given.attack, tuple(given.attackers), given.factor, config.run.seed)


def client_batches(config: Config, corpus: Corpus, collate: Collate = collate) -> list[Batches]:
    """Each client's stream of batches; those of clients that flip labels have wrong ones."""
    given = config.simulation
    flipped = given.attackers if given.attack == "label-flip" else ()
    names = label_names(config.data.answer, config.data.label_words, corpus.classes)
    return [
        Batches(
            Flipped(examples, names) if client in flipped else examples,
            batch_size=config.method.batch_size,
            run_seed=config.run.seed,
            client=client,
            collate=collate,
        )
        for client, examples in enumerate(corpus.clients)
    ]


def longest_batches(config: Config, corpus: Corpus, collate: Collate = collate) -> list[Batch]:
    """Per client, the batch of its longest examples, the longest first: where memory peaks."""
    steps = widest_steps(config, corpus, collate)
    return sorted(steps, key=lambda batch: -batch.tokens.shape[1])


def widest_steps(config: Config, corpus: Corpus, collate: Collate = collate) -> list[Batch]:
    """Per client, in their order, the batch of its longest examples."""
    size = config.method.batch_size
    return [collate(longest(part, size)) for part in corpus.clients]


def answer(
    model: CausalModel, tokenizer: Any, prompt: str | NDArray[np.int64], most_tokens: int
) -> str:
    """The greedy continuation of a prompt at the model's current weights; a classifier's class.

    Args:
        prompt: text, or its tokens, int64 [length].
    """
    limit = longest_sequence(model.network)
    if isinstance(prompt, str):
        encoder = TextEncoder(tokenizer)
        prompt = encoder.texts([prompt])[0] if model.classes else encoder.prompt(prompt)
    if model.classes:
        return model.classify(prompt[:limit])
    if limit is not None:
        prompt = prompt[-max(1, limit - most_tokens) :]
    batch = collate_prompts([prompt], tokenizer, most_tokens)
    (generated,) = model.generate([Probe(batch)])
    return texts(tokenizer, generated)[0]
