"""What can be made from a finished or interrupted run: its proof, and its adapter or model.

Both rebuild the tuned state from the base model and the ledger alone.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from fedforward.config.fields import AT_SITES
from fedforward.config.schema import Config
from fedforward.core.errors import FedForwardError
from fedforward.core.files import read_object
from fedforward.core.identity import ModelIdentity
from fedforward.core.paths import (
    absolute_text,
    as_path,
    check_folder,
    check_new_folder,
    home,
    is_path,
)
from fedforward.federation.audit import Audit
from fedforward.federation.client import Replica
from fedforward.federation.ledger import Ledger
from fedforward.federation.witness import differences as differences_of
from fedforward.federation.witness import read_witness
from fedforward.methods.base import Method, method_class
from fedforward.models.base import CausalModel
from fedforward.models.folders import copy_processor
from fedforward.models.gguf_files import is_gguf
from fedforward.models.lora import LoraModel
from fedforward.training import build as experiment
from fedforward.training.assembly import (
    build_method,
    check_header,
    ledger_header,
    server_settings,
)
from fedforward.training.model_card import write_card
from fedforward.training.round_replay import RoundCallback, RoundReplay
from fedforward.training.run_directory import RunDirectory
from fedforward.training.saved import compare


def _ignore(done: int, total: int) -> None:
    """Show nothing of how far a rebuild is."""


@dataclass(frozen=True)
class Verification:
    """What was rebuilt and what it was compared with.

    Attributes:
        rounds: replayed.
        length: rounds in the ledger.
        state_digest: of the rebuilt tuned state, hexadecimal.
        ledger_digest: the chain hash after these rounds, hexadecimal.
        proofs: state digests in clients' reports that were checked.
        recorded: whether summary.json has digests after these rounds, which were compared.
        saved: whether a saved adapter or model was compared.
        replayed: False for a run whose clients send tensors: its state is no list of steps.
        unchecked: what of the rounds could not be made again from their reports, in words.
        differences: a sentence for each thing that does not agree; empty if all bits do.
    """

    rounds: int
    length: int
    state_digest: str
    ledger_digest: str
    proofs: int
    recorded: bool
    saved: bool
    replayed: bool
    unchecked: list[str]
    differences: list[str]

    @property
    def ok(self) -> bool:
        """Whether all bits agree."""
        return not self.differences


@dataclass(frozen=True)
class Rebuilt:
    """A model brought to a round of a run's ledger.

    Attributes:
        rounds: that are in the model.
        length: rounds in the ledger.
        chain: 32 bytes, the ledger's chain hash after `rounds` rounds.
        proofs: state digests in clients' reports that were compared.
        unchecked: see `Verification`.
        differences: a sentence for what does not agree.
    """

    model: CausalModel
    tokenizer: object
    rounds: int
    length: int
    chain: bytes
    proofs: int
    unchecked: tuple[str, ...]
    differences: list[str]


def rebuild(
    directory: RunDirectory,
    base: str | None = None,
    on_round: RoundCallback = _ignore,
    adapter: str | None = None,
    init_file: str | None = None,
    mask_file: str | None = None,
    rounds: int | None = None,
) -> Rebuilt:
    """Base model plus ledger; nothing in the run directory is made or changed.

    On the way each entry is made again from its reports, and the digests that clients proved are
    compared.

    Args:
        base: folder or hub name of the base model, where it has moved since the run was started.
            The run directory of a server has none, and needs it.
        on_round: called after each round.
        adapter: folder of the adapter that the run went on from, where it has moved. The run
            directory of a server needs it as well.
        init_file: with the A that aligned adapters began with, where it has moved; likewise.
        mask_file: that says which weights move, where it has moved; likewise.
        rounds: after which the state is wanted; None is all.

    Raises:
        FedForwardError: no base model, adapter or file, or another one than the ledger's; rounds
            of the ledger are missing, or it has fewer than are wanted.
    """
    kept = directory.config()
    with closing(Ledger(directory.ledger, read_only=True)) as ledger:
        directory.check_length(ledger.length)
        count = _chosen(rounds, ledger.length)
        config = _with_base(directory, kept, base)
        config = _with_files(directory, config, ledger, adapter, init_file, mask_file)
        model, tokenizer = _base_model(directory, config, ledger, base)
        identity = experiment.identity(model)
        check_header(ledger, ledger_header(config, identity))
        method = build_method(config)
        at_sites = kept.model.path == AT_SITES
        audit = _audit(config, identity, method, ledger, at_sites=at_sites)
        replay = RoundReplay(ledger, count, Replica(model, method), audit)
        with experiment.all_cores():
            replay.run(directory.read_metrics(count), on_round)
        return Rebuilt(
            model,
            tokenizer,
            rounds=count,
            length=ledger.length,
            chain=ledger.chain_after(count),
            proofs=replay.proofs,
            unchecked=audit.unchecked,
            differences=replay.differences,
        )


def _chosen(rounds: int | None, length: int) -> int:
    """How many rounds are wanted of a ledger of that length."""
    if rounds is None:
        return length
    if not 0 <= rounds <= length:
        raise FedForwardError(
            f"--round {rounds} is not allowed: the ledger has {length} rounds. Give a number from "
            f"0, the base model, to {length}."
        )
    return rounds


def _with_files(
    directory: RunDirectory,
    config: Config,
    ledger: Ledger,
    adapter: str | None,
    init_file: str | None,
    mask_file: str | None,
) -> Config:
    """The configuration of a run with the files that its model needs where they are now."""
    if adapter is not None:
        config = config.model_copy(
            update={"model": config.model.model_copy(update={"adapter": adapter})}
        )
    elif ledger.header.get("adapter") and config.model.adapter is None:
        raise FedForwardError(
            f"{directory.path} is of a server, whose sites went on from an adapter. Give --adapter "
            "FOLDER, the one that they have as model.adapter."
        )
    if init_file is not None:
        section = config.lora.model_copy(update={"init": "aligned", "init_file": init_file})
        config = config.model_copy(update={"lora": section})
    elif ledger.header.get("initial_a") and not (directory.path / "plan.json").is_file():
        raise FedForwardError(
            f"{directory.path} is of a server, whose sites began with aligned adapters. Give "
            "--init-file FILE, the one that they have as lora.init_file."
        )
    if mask_file is not None:
        masked = config.method.model_copy(update={"mask": "file", "mask_file": mask_file})
        config = config.model_copy(update={"method": masked})
    elif config.method.mask == "file" and config.method.mask_file is None:
        raise FedForwardError(
            f"{directory.path} is of a server, whose sites have a mask in a file. Give --mask-file "
            "FILE, the one that they have as method.mask_file."
        )
    return config


def _base_model(
    directory: RunDirectory, config: Config, ledger: Ledger, base: str | None
) -> tuple[CausalModel, object]:
    """The model of a run before its first round, and its tokenizer."""
    # A server has no plan.
    planned = base is None or (directory.path / "plan.json").is_file()
    plan = directory.load()[1] if planned else experiment.resolve_plan(config)
    # The data need not be there any more.
    classes = ledger.header.get("classes") or ()
    if not isinstance(classes, list | tuple) or not all(isinstance(c, str) for c in classes):
        raise FedForwardError(
            f"{ledger.path}: its header has classes {classes!r}, which are no list of texts. "
            "Restore the ledger from a copy."
        )
    model, tokenizer = experiment.build_model(config, plan, classes)
    if config.lora.init == "aligned" and config.lora.init_file is None:
        assert isinstance(model, LoraModel)
        model.begin_with(experiment.initial_a_of(directory))
    return model, tokenizer


def _audit(
    config: Config, identity: ModelIdentity, method: Method, ledger: Ledger, *, at_sites: bool
) -> Audit:
    settings = server_settings(config, identity, ())
    return Audit(settings, method, ledger.remaining_rounds, examples_told=not at_sites)


def _with_base(directory: RunDirectory, config: Config, base: str | None) -> Config:
    """The configuration of a run with its base model where that is now.

    Raises:
        FedForwardError: there is no such folder, or none is known.
    """
    if base is None:
        if config.model.path == AT_SITES:
            raise FedForwardError(
                f"{directory.path} is of a server, which has no model. Give --model FOLDER, the "
                "base model that its sites have."
            )
        if is_path(config.model.path) and not is_gguf(config.model.path):
            where = "the base model's place with --model FOLDER"
            check_folder(config.model.path, "model.path", where)
        return config
    try:
        as_path(base)
    except ValueError as error:
        raise FedForwardError(f"--model {error}.") from error
    if is_path(base) and not is_gguf(base):
        check_folder(base, "--model", "the folder of the base model, or its hub name")
    section = config.model.model_copy(update={"path": absolute_text(base)})
    return config.model_copy(update={"model": section})


def verify(
    path: Path | str,
    base: str | None = None,
    on_round: RoundCallback = _ignore,
    adapter: str | None = None,
    init_file: str | None = None,
    mask_file: str | None = None,
    rounds: int | None = None,
    witnesses: Sequence[str | Path] = (),
) -> Verification:
    """Rebuild the tuned state and compare it, bit for bit, with all that the run left.

    Example:
        >>> verify(Path("runs/first")).ok  # doctest: +SKIP
        True

    Args:
        base: see `rebuild`.
        on_round: see `rebuild`.
        adapter: see `rebuild`.
        init_file: see `rebuild`.
        mask_file: see `rebuild`.
        rounds: see `rebuild`.
        witnesses: files in which sites have kept what they were sent of the ledger.

    Raises:
        FedForwardError: this is not a run, or its ledger, base model or a file of a site cannot be
            used.
    """
    directory = RunDirectory(Path(path))
    config = directory.config()
    unseen = _unseen(directory, witnesses)
    rebuilt = rebuild(directory, base, on_round, adapter, init_file, mask_file, rounds)
    differences = [*unseen, *rebuilt.differences]
    digest = rebuilt.model.digest().hex()
    found = {"state_digest": digest, "ledger_digest": rebuilt.chain.hex()}
    recorded, words = directory.compare_summary(rebuilt.rounds, found)
    differences += words
    folder = directory.tuned(config)
    saved = recorded and folder.is_dir()
    if saved:
        differences += compare(rebuilt.model, folder)
    elif recorded and config.model.path != AT_SITES:
        differences.append(f"{folder.name}/ is missing (--resume writes it again)")
    return Verification(
        rounds=rebuilt.rounds,
        length=rebuilt.length,
        state_digest=digest,
        ledger_digest=rebuilt.chain.hex(),
        proofs=rebuilt.proofs,
        recorded=recorded,
        saved=saved,
        replayed=method_class(config.method.name).capabilities.replayable,
        unchecked=list(rebuilt.unchecked),
        differences=differences,
    )


def _unseen(directory: RunDirectory, files: Sequence[str | Path]) -> list[str]:
    """A sentence for each file of a site that has seen another ledger than this run's."""
    if not files:
        return []
    found = []
    known = [read_witness(Path(file)) for file in files]
    federation = directory.path / "federation.json"
    own = read_object(federation, "Only a run across machines has sites.").get("run")
    with closing(Ledger(directory.ledger, read_only=True)) as ledger:
        for file, witness in zip(files, known, strict=True):
            if witness.run != own:
                raise FedForwardError(f"{file} is of run {witness.run}, and this is {own}.")
            found += [f"{file}: {words}" for words in differences_of(ledger, witness)]
    return found


def export(
    path: str | Path,
    out: str | Path,
    *,
    merge: bool = False,
    base: str | None = None,
    on_round: RoundCallback = _ignore,
    adapter: str | None = None,
    init_file: str | None = None,
    mask_file: str | None = None,
    rounds: int | None = None,
) -> Path:
    """Write the adapter, or with `merge` (or full tuning) a whole model, rebuilt from the ledger.

    Example:
        >>> export("runs/first", "merged", merge=True)  # doctest: +SKIP

    Args:
        base: see `rebuild`.
        on_round: see `rebuild`.
        adapter: see `rebuild`.
        init_file: see `rebuild`.
        mask_file: see `rebuild`.
        rounds: see `rebuild`.

    Raises:
        FedForwardError: `out` is in use, or the run cannot be rebuilt.
    """
    path, out = Path(path), home(out)
    check_new_folder(out, "--out")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FedForwardError(f"--out {out} exists and is not an empty folder. Choose another.")
    rebuilt = rebuild(RunDirectory(path), base, on_round, adapter, init_file, mask_file, rounds)
    if rebuilt.differences:
        raise FedForwardError(
            f"{path} does not agree with its ledger: {rebuilt.differences[0]}. See `fedforward "
            f"verify {path}`."
        )
    digest = rebuilt.model.digest().hex()
    merged_in = isinstance(rebuilt.model, LoraModel) and merge
    if isinstance(rebuilt.model, LoraModel) and merge:
        merged = rebuilt.model.merge()
        merged.save_pretrained(str(out))
        rebuilt.tokenizer.save_pretrained(str(out))  # type: ignore[attr-defined]
        copy_processor(merged.name_or_path, out)
    else:
        rebuilt.model.save(out)
    directory = RunDirectory(path)
    config = directory.config()
    if config.model.path == AT_SITES:
        # Only now it is known which model that is.
        config = _with_base(directory, config, base)
    write_card(
        out,
        config,
        rounds=rebuilt.rounds,
        whole=merged_in,
        state_digest=digest,
        ledger_digest=rebuilt.chain.hex(),
        summary=directory.summary_of(rebuilt.chain.hex()),
    )
    return out
