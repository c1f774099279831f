"""From a configuration to its parts: data, partition, tokenised batches, model and method.

The same configuration and probe plan give the same parts, bit for bit; whoever starts, resumes or
verifies a run builds them here.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedforward.config.schema import Config
from fedforward.core.batches import Batch
from fedforward.core.errors import FedForwardError
from fedforward.core.identity import ModelIdentity
from fedforward.core.seeds import derive, generator
from fedforward.core.steps import Probe, ProbePlan
from fedforward.data import labels, sources, templates
from fedforward.data.partition import partition
from fedforward.data.sampler import Batches, Collate, collate, collate_prompts
from fedforward.data.templates import Example
from fedforward.directions import Distribution
from fedforward.evaluation.objectives import Context, build_objective, needs_answers, texts
from fedforward.methods.base import Method
from fedforward.models.base import CausalModel
from fedforward.models.fingerprints import tokenizer_fingerprint
from fedforward.models.full import FullModel
from fedforward.models.loading import load, longest_sequence
from fedforward.models.lora import LoraModel
from fedforward.models.masks import random_mask, small_weights_mask
from fedforward.planning import probe_grouping as probes
from fedforward.training.faults import Faults


@dataclass(frozen=True)
class Corpus:
    """The data of a run, tokenised and divided.

    Attributes:
        clients: each client's training examples.
        heldout: the examples kept for evaluation.
        example: the prompt that is answered before and after, and its expected answer if known.
        classes: of a sequence classifier, in the order of its head; else empty.
        cut: answers cut at the sequence length.
        dropped: rows without room for an answer.
    """

    clients: list[list[Example]]
    heldout: list[Example]
    example: tuple[str, str | None]
    cut: int
    dropped: int
    classes: tuple[str, ...] = ()


def read_classes(config: Config) -> tuple[str, ...]:
    """The classes of a run: those of training and held-out data, or the label words.

    Empty for a causal model.

    Raises:
        FedForwardError: see `labels.classes`, and for whatever is wrong with the data.
    """
    if config.model.head == "causal":
        return ()
    if config.data.label_words:
        return labels.classes((), config.data.answer, config.data.label_words)
    rows, heldout_rows = _read_rows(config)
    return labels.classes([*rows, *heldout_rows], config.data.answer, None)


def read_corpus(
    config: Config, tokenizer: Any, positions: int | None, classes: Sequence[str] = ()
) -> Corpus:
    """Read, split, tokenise and partition the data.

    Args:
        positions: the longest sequence that the model takes, or None.
        classes: of a sequence classifier, in the order of its head.

    Raises:
        FedForwardError: for whatever is wrong with the data or their keys.
    """
    data = config.data
    if positions is not None and data.sequence_length > positions:
        raise FedForwardError(
            f"data.sequence_length = {data.sequence_length} is longer than the {positions} "
            f"positions that this model takes. Use at most {positions}."
        )
    if data.label_words:
        labels.check_template(data.answer)
    rows, heldout_rows = _read_rows(config)
    field = _field(config)
    heldout = _tokenise(config, heldout_rows, tokenizer, classes)
    train = _tokenise(config, rows, tokenizer, classes)
    if not heldout.examples or not train.examples:
        raise FedForwardError(
            f"data.sequence_length = {data.sequence_length} leaves no "
            f"{'held-out' if not heldout.examples else 'training'} example: every prompt fills it, "
            "or every answer is empty. Raise it, or look at data.prompt and data.answer."
        )
    parts = partition(
        [rows[row][field] if field else 0 for row in train.rows],
        config.federation.clients,
        kind=config.federation.partition,
        field=field,
        alpha=config.federation.alpha,
        seed=derive(config.run.seed, "partition"),
    )
    _check_room_for_answers(config, [*heldout.examples, *train.examples], positions)
    shown = templates.fill(data.prompt, heldout_rows[heldout.rows[0]])
    example = (shown, heldout.examples[0].reference)
    return Corpus(
        clients=[[train.examples[index] for index in part] for part in parts],
        heldout=heldout.examples,
        example=(data.example, None) if data.example else example,
        cut=heldout.cut + train.cut,
        dropped=heldout.dropped + train.dropped,
        classes=tuple(classes),
    )


def _read_rows(config: Config) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows to train on and those to evaluate on, each in an order of the run's seed."""
    data = config.data
    table = sources.read(data.source, split=data.split, subset=data.subset, key="data.source")
    table = _with_own_names(config, table)
    _check_templates(config, table, "")
    field = _field(config)
    if field is not None and field not in table.column_names:
        raise FedForwardError(
            f"federation.field = {field!r} is not a field of the data. Their fields are "
            f"{', '.join(table.column_names)}."
        )
    order = generator(config.run.seed, "heldout").permutation(len(table)).tolist()
    rows = [table[index] for index in order[: data.limit]]
    if config.evaluation.source is not None:
        return rows, _evaluation_rows(config)
    kept = _heldout_count(data.heldout, len(rows))
    return rows[kept:], rows[:kept][: config.evaluation.limit]


def _with_own_names(config: Config, table: Any) -> Any:
    """The data with their fields called what the templates call them."""
    names = config.data.fields or {}
    for wanted, found in names.items():
        if found not in table.column_names:
            raise FedForwardError(
                f"data.fields: {wanted} = {found!r} is not a field of {config.data.source}. Their "
                f"fields are {', '.join(table.column_names)}."
            )
    if not names:
        return table
    # At once, for two fields may change places; what has a wanted name and no other goes.
    hidden = [name for name in names if name in table.column_names and name not in names.values()]
    own = {found: wanted for wanted, found in names.items()}
    table = table.remove_columns(hidden)
    return table.rename_columns(own)


def _field(config: Config) -> str | None:
    """The field that the data are divided by, if any."""
    return config.federation.field if config.federation.partition != "iid" else None


def _check_templates(config: Config, table: Any, where: str) -> None:
    """Refuse templates that name fields which a data set does not have."""
    for key, template in (("prompt", config.data.prompt), ("answer", config.data.answer)):
        templates.check_fields(template, table.column_names, f"data.{key}{where}")


def _evaluation_rows(config: Config) -> list[dict[str, Any]]:
    """The examples of `evaluation.source`, in an order of the run's seed."""
    wish = config.evaluation
    assert wish.source is not None
    table = sources.read(wish.source, split=wish.split, subset=wish.subset, key="evaluation.source")
    _check_templates(config, table, f" (with evaluation.source = {wish.source!r})")
    order = generator(config.run.seed, "evaluation").permutation(len(table)).tolist()
    return [table[index] for index in order[: wish.limit]]


def _tokenise(
    config: Config, rows: Sequence[dict[str, Any]], tokenizer: Any, classes: Sequence[str]
) -> templates.Tokenised:
    data = config.data
    options: dict[str, Any] = {
        "prompt": data.prompt,
        "answer": data.answer,
        "sequence_length": data.sequence_length,
    }
    if classes:
        return labels.classify(rows, tokenizer, words=data.label_words, classes=classes, **options)
    if data.label_words:
        return labels.tokenise(rows, tokenizer, words=data.label_words, **options)
    return templates.tokenise(rows, tokenizer, **options)


def _check_room_for_answers(
    config: Config, examples: Sequence[Example], positions: int | None
) -> None:
    """Refuse prompts that leave a model fewer positions than a generated answer may take."""
    wanted = (config.method.objective, *config.evaluation.metrics)
    if positions is None or not any(map(needs_answers, wanted)):
        return
    longest = max(example.prompt_length for example in examples)
    room = positions - config.data.answer_tokens
    if longest > room:
        raise FedForwardError(
            f"data.answer_tokens = {config.data.answer_tokens} after the longest prompt of "
            f"{longest} tokens is more than the {positions} positions that this model takes. Lower "
            f"it, or drop long prompts with data.sequence_length = {max(1, room)}."
        )


def _heldout_count(wish: float, examples: int) -> int:
    if wish < 1:
        count = max(1, round(wish * examples))
    elif wish == int(wish):
        count = int(wish)
    else:
        raise FedForwardError(
            f"data.heldout = {wish:g} is neither a share below 1 nor a whole number of examples."
        )
    if count >= examples:
        raise FedForwardError(
            f"data.heldout = {wish:g} keeps {count} examples for evaluation, but the data have "
            f"only {examples}. Use a smaller share or number."
        )
    return count


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


def resolve_device(wish: str) -> str:
    """A device that is there.

    Raises:
        FedForwardError: CUDA was asked for and is not there, or the name is unknown.
    """
    from fedforward.models import devices

    there = devices.accelerators()
    if wish == "auto":
        return "cuda" if "cuda" in there else "cpu"
    kind = wish.split(":")[0]
    if not re.fullmatch("|".join(["cpu", *(rf"{name}(:\d+)?" for name in {"cuda", *there})]), wish):
        raise FedForwardError(
            f"run.device = {wish!r} is not allowed: it must be 'auto', 'cpu', 'cuda' or 'cuda:N'."
        )
    if kind == "cuda" and kind not in there:
        raise FedForwardError(
            f"run.device = {wish!r}: PyTorch finds no CUDA device here. Use 'cpu' or 'auto'."
        )
    if kind in there and int(wish.partition(":")[2] or 0) >= devices.count(kind):
        raise FedForwardError(
            f"run.device = {wish!r}: there are only {devices.count(kind)} {kind.upper()} devices, "
            "numbered from 0."
        )
    return wish


def _load(config: Config, device: str, classes: Sequence[str]) -> tuple[Any, Any]:
    """The network at its base weights, and its tokenizer."""
    return load(
        config.model.path,
        config.model.dtype,
        device,
        quantization=config.model.quantization,
        device_map=config.model.device_map,
        rests_on_host=_rests_on_host(config, device),
        classes=classes,
        run_seed=config.run.seed,
    )


def _rests_on_host(config: Config, device: str) -> bool:
    """Whether blocks wait in host memory. The processor's own are there anyway."""
    return config.model.offload == "host" and device != "cpu"


def build_model(
    config: Config, plan: ProbePlan, classes: Sequence[str] | None = None
) -> tuple[CausalModel, Any]:
    """The model at its base weights, ready to probe, and its tokenizer.

    Args:
        classes: of a sequence classifier, where they are known; None reads them from the data.
    """
    classes = read_classes(config) if classes is None else classes
    model, tokenizer = _tuned_model(config, plan, classes)
    if _rests_on_host(config, resolve_device(config.run.device)):
        model.rest_on_host()
    density = config.method.density
    if config.method.mask == "random":
        model.masks = random_mask(model.tensors, model.layout, density, config.run.seed)
    elif config.method.mask == "small":
        model.masks = small_weights_mask(model.tensors, density)
    return model, tokenizer


def _tuned_model(
    config: Config, plan: ProbePlan, classes: Sequence[str]
) -> tuple[CausalModel, Any]:
    import torch

    from fedforward.models import devices

    torch.set_num_threads(plan.threads)
    device = resolve_device(config.run.device)
    if ":" in device:
        devices.select(device)
    network, tokenizer = _load(config, device, classes)
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
    model = LoraModel(
        network,
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        targets=config.lora.targets,
        factors=config.lora.factors,
        blocks=config.model.tuned_blocks,
        run_seed=config.run.seed,
        distribution=distribution,
        plan=plan,
    )
    return model, tokenizer


def identity(model: CausalModel, tokenizer: Any = None) -> ModelIdentity:
    """What other parties must have in common with this model, and with a tokenizer if given."""
    return ModelIdentity(
        layout=model.layout,
        base=model.base_fingerprint,
        classes=tuple(model.classes),
        state_bytes=model.state_bytes,
        tokenizer="" if tokenizer is None else tokenizer_fingerprint(tokenizer),
    )


def collate_of(config: Config, tokenizer: Any, classes: Sequence[str]) -> Collate:
    """How training examples become the batches of the run's objective."""
    context = Context(tokenizer, config.data.answer_tokens, tuple(classes))
    return build_objective(config.method.objective, context).batch


def fit_plan(
    config: Config,
    model: CausalModel,
    corpus: Corpus,
    method: Method,
    collate: Collate = collate,
) -> ProbePlan:
    """The model's plan, with as many probes in a forward pass as `run.memory_budget` allows."""
    budget = config.run.budget
    if budget is None or not method.capabilities.forward_only:
        return model.plan
    clients = config.federation.clients if config.model.tune == "lora" else 1
    batches = longest_batches(config, corpus, collate)
    return probes.fit(model, batches, budget, clients, method.estimator)


def faults(config: Config) -> Faults:
    """What goes wrong in the simulation."""
    given = config.simulation
    if given.plain:
        return Faults()
    return Faults(
        run_seed=config.run.seed,
        failing=given.dropout,
        slow=given.straggler,
        lying=given.byzantine,
        late=given.late_join,
        late_round=given.late_join_round,
    )


def corpus_fingerprint(corpus: Corpus) -> str:
    """SHA-256 of every client's and the held-out examples' tokens and classes, hexadecimal."""
    state = hashlib.sha256()
    for part in (*corpus.clients, corpus.heldout):
        state.update(f"{len(part)}\n".encode())
        for example in part:
            state.update(f"{example.prompt_length} {len(example.tokens)}\n".encode())
            for tokens in (example.tokens, *example.choices):
                state.update(tokens.astype("<i8").tobytes())
            if corpus.classes:
                state.update(f"class {example.right}\n".encode())
    return state.hexdigest()


def client_batches(config: Config, corpus: Corpus, collate: Collate = collate) -> list[Batches]:
    """Each client's stream of batches."""
    return [
        Batches(
            examples,
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
    return [
        collate(sorted(part, key=lambda example: len(example.tokens))[-size:])
        for part in corpus.clients
    ]


def answer(model: CausalModel, tokenizer: Any, prompt: str, most_tokens: int) -> str:
    """The greedy continuation of a prompt at the model's current weights; a classifier's class."""
    if model.classes:
        limits = {"truncation": True, "max_length": longest_sequence(model.network)}
        given = tokenizer(prompt, verbose=False, **(limits if limits["max_length"] else {}))
        return model.classify(np.array(given["input_ids"], np.int64))
    begin = templates.begin_tokens(tokenizer) if tokenizer.bos_token_id is not None else []
    ids = begin + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    limit = longest_sequence(model.network)
    if limit is not None:
        ids = ids[-max(1, limit - most_tokens) :]
    batch = collate_prompts([np.array(ids, np.int64)], tokenizer, most_tokens)
    (generated,) = model.generate([Probe(batch)])
    return texts(tokenizer, generated)[0]
