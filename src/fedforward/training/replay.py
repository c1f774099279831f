"""What can be made from a finished or interrupted run: its proof, and its adapter or model.

Both rebuild the tuned state from the base model and the ledger alone.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedforward.config.schema import Config
from fedforward.config.site import AT_SITES
from fedforward.core.errors import FedForwardError
from fedforward.core.paths import (
    absolute_text,
    as_path,
    check_folder,
    check_new_folder,
    home,
    is_path,
)
from fedforward.federation.client import Replica
from fedforward.federation.ledger import Ledger
from fedforward.federation.state_file import read_state
from fedforward.messages.report import DIGEST_BYTES
from fedforward.messages.snapshot import Snapshot
from fedforward.methods.base import method_class
from fedforward.models.base import CausalModel
from fedforward.models.folders import copy_processor
from fedforward.models.gguf_files import is_gguf
from fedforward.models.lora import LoraModel
from fedforward.training import build as experiment
from fedforward.training.assembly import build_method, check_header, ledger_header
from fedforward.training.run_directory import RunDirectory
from fedforward.training.saved import compare

#: Called with the rounds that are rebuilt and all there are.
RoundCallback = Callable[[int, int], None]


def _ignore(done: int, total: int) -> None:
    """Show nothing of how far a rebuild is."""


@dataclass(frozen=True)
class Verification:
    """What was rebuilt and what it was compared with.

    Attributes:
        rounds: replayed.
        state_digest: of the rebuilt tuned state, hexadecimal.
        ledger_digest: the chain hash, hexadecimal.
        proofs: state digests in clients' reports that were checked.
        saved: whether a saved adapter or model was compared.
        replayed: False for a run whose clients send tensors: its state is no list of steps.
        differences: a sentence for each thing that does not agree; empty if all bits do.
    """

    rounds: int
    state_digest: str
    ledger_digest: str
    proofs: int
    saved: bool
    replayed: bool
    differences: list[str]

    @property
    def ok(self) -> bool:
        """Whether all bits agree."""
        return not self.differences


@dataclass(frozen=True)
class Rebuilt:
    """A model brought to the end of a run's ledger."""

    model: CausalModel
    tokenizer: object
    ledger: Ledger
    proofs: int
    differences: list[str]


def rebuild(
    directory: RunDirectory,
    base: str | None = None,
    on_round: RoundCallback = _ignore,
    adapter: str | None = None,
    init_file: str | None = None,
    mask_file: str | None = None,
) -> Rebuilt:
    """Base model plus ledger; checks on the way the digests that clients proved.

    Args:
        base: folder or hub name of the base model, where it has moved since the run was started.
            The run directory of a server has none, and needs it.
        on_round: called after each round.
        adapter: folder of the adapter that the run went on from, where it has moved. The run
            directory of a server needs it as well.
        init_file: with the A that aligned adapters began with, where it has moved; likewise.
        mask_file: that says which weights move, where it has moved; likewise.

    Raises:
        FedForwardError: no base model, adapter or file, or another one than the ledger's.
    """
    config = _with_base(directory, directory.config(), base)
    # A server has no plan.
    planned = base is None or (directory.path / "plan.json").is_file()
    plan = directory.load()[1] if planned else experiment.resolve_plan(config)
    ledger = Ledger(directory.ledger)
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
    # The data need not be there any more.
    classes = ledger.header.get("classes") or ()
    model, tokenizer = experiment.build_model(config, plan, classes)
    if config.lora.init == "aligned" and config.lora.init_file is None:
        assert isinstance(model, LoraModel)
        model.begin_with(experiment.initial_a_of(directory))
    check_header(ledger, ledger_header(config, experiment.identity(model)))
    proofs, differences = 0, []
    method = build_method(config)
    replica = Replica(model, method)
    if not method.capabilities.replayable:
        read_state(ledger, replica.state)
        if ledger.length:
            replica.restore(Snapshot(ledger.length, b"", b"", replica.state.encode()))
        return Rebuilt(model, tokenizer, ledger, 0, [])
    for record in ledger.rounds():
        claimed = {r.report.digest for r in record.results if r.report.digest}
        if claimed:
            proofs += len(claimed)
            if claimed != {model.digest()[:DIGEST_BYTES]}:
                differences.append(
                    f"round {record.entry.round}: the clients' state was "
                    f"{' and '.join(sorted(d.hex() for d in claimed))}, the rebuilt one is "
                    f"{model.digest()[:DIGEST_BYTES].hex()}"
                )
        replica.catch_up([record.entry])
        on_round(record.entry.round + 1, ledger.length)
    return Rebuilt(model, tokenizer, ledger, proofs, differences)


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

    Raises:
        FedForwardError: this is not a run, or its ledger or base model cannot be used.
    """
    directory = RunDirectory(Path(path))
    config = directory.config()
    rebuilt = rebuild(directory, base, on_round, adapter, init_file, mask_file)
    differences = list(rebuilt.differences)
    digest = rebuilt.model.digest().hex()
    current = False
    if directory.summary.is_file():
        wanted = {"state_digest": digest, "ledger_digest": rebuilt.ledger.chain.hex()}
        try:
            summary = json.loads(directory.summary.read_text(encoding="utf-8"))
            claimed = {name: summary[name] for name in wanted}
            # A run that was resumed after its summary has a longer ledger than the summary, and
            # an adapter of the time before.
            current = summary["rounds"] == rebuilt.ledger.length
            if summary["rounds"] > rebuilt.ledger.length:
                differences.append(
                    f"summary.json has {summary['rounds']} rounds, the ledger only "
                    f"{rebuilt.ledger.length}"
                )
        except (OSError, ValueError, KeyError, TypeError):
            current, claimed = False, {}
            differences.append("summary.json is damaged (--resume writes it again)")
        differences += [
            f"summary.json has {name} {claimed[name]}, rebuilt is {value}"
            for name, value in wanted.items()
            if current and claimed[name] != value
        ]
    folder = directory.tuned(config)
    saved = current and folder.is_dir()
    if saved:
        differences += compare(rebuilt.model, folder)
    elif current and config.model.path != AT_SITES:
        differences.append(f"{folder.name}/ is missing (--resume writes it again)")
    rebuilt.ledger.close()
    return Verification(
        rounds=rebuilt.ledger.length,
        state_digest=digest,
        ledger_digest=rebuilt.ledger.chain.hex(),
        proofs=rebuilt.proofs,
        saved=saved,
        replayed=method_class(config.method.name).capabilities.replayable,
        differences=differences,
    )


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

    Raises:
        FedForwardError: `out` is in use, or the run cannot be rebuilt.
    """
    path, out = Path(path), home(out)
    check_new_folder(out, "--out")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FedForwardError(f"--out {out} exists and is not an empty folder. Choose another.")
    rebuilt = rebuild(RunDirectory(path), base, on_round, adapter, init_file, mask_file)
    rebuilt.ledger.close()
    if rebuilt.differences:
        raise FedForwardError(
            f"{path} does not agree with its ledger: {rebuilt.differences[0]}. See `fedforward "
            f"verify {path}`."
        )
    if isinstance(rebuilt.model, LoraModel) and merge:
        merged = rebuilt.model.merge()
        merged.save_pretrained(str(out))
        rebuilt.tokenizer.save_pretrained(str(out))  # type: ignore[attr-defined]
        copy_processor(merged.name_or_path, out)
    else:
        rebuilt.model.save(out)
    return out
