"""A run as its folder has it: read for a report, whether it is finished, running or cut short.

Nothing in the folder is changed. What is damaged or missing is left out, and a sentence says so.
Imports no PyTorch.
"""

import sys
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from fedforward.config.fields import AT_SITES
from fedforward.config.schema import Config
from fedforward.core.errors import FedForwardError
from fedforward.core.files import parse_json
from fedforward.federation.ledger import Ledger
from fedforward.training.divided import Divided, read_divided
from fedforward.training.run_directory import RunDirectory

Line = dict[str, Any]


@dataclass(frozen=True, eq=False)
class ClientRounds:
    """What the ledger has of each client and round; NaN where a client was not in a round.

    Attributes:
        clients: their numbers, ascending; C of them.
        loss: float64 [T, C], mean training loss that a client has reported, in nats.
        rate: float64 [T, C], learning rate that its projected gradients counted by.
        size: float64 [T, C], root mean square of its projected gradients.
        zeros: float64 [T, C], share of its projected gradients that are exactly 0.
        skipped: float64 [T, C], steps whose loss was not finite.
        took_part: bool [T, C], whether the round was made from its report.
        examples: int64 [C], training examples of each, as last reported.
        active: float64 [B, C], share of a client's rounds in which it had a block; None where all
            clients have all blocks.
    """

    clients: list[int]
    loss: NDArray[np.float64]
    rate: NDArray[np.float64]
    size: NDArray[np.float64]
    zeros: NDArray[np.float64]
    skipped: NDArray[np.float64]
    took_part: NDArray[np.bool_]
    examples: NDArray[np.int64]
    active: NDArray[np.float64] | None


@dataclass(frozen=True, eq=False)
class RunRecord:
    """A run, as far as its folder tells.

    Attributes:
        path: of the folder, as it was given.
        config: of the run.
        lines: of `metrics.jsonl` up to the first that is not whole; line 0 is the base model.
        summary: of `summary.json` where it is of so many rounds; else None.
        environment: of `environment.json`; empty where that cannot be read.
        clients: from the ledger; None where that cannot be read, or has no round.
        divided: how examples are divided; None where that is not known.
        answer: a prompt with the answers before and after; `after` is None until the run is done.
        remarks: a sentence for each thing that is missing or damaged.
        ledger_digest: chain hash after the last round shown, hexadecimal; empty if not known.
        text: the run's `config.toml`.
        sites: names of a server's sites by number, as far as its `status.json` tells.
    """

    path: Path
    config: Config
    lines: list[Line]
    summary: Mapping[str, Any] | None
    environment: Mapping[str, Any]
    clients: ClientRounds | None
    divided: Divided | None
    answer: Mapping[str, Any] | None
    remarks: list[str] = field(default_factory=list)
    ledger_digest: str = ""
    text: str = ""
    sites: Mapping[int, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.path.absolute().name

    @property
    def rounds(self) -> int:
        """That are measured."""
        return int(self.lines[-1]["round"])

    @property
    def server(self) -> bool:
        """Whether this is the folder of a server, whose data and model are the sites' own."""
        return self.config.model.path == AT_SITES

    @property
    def state(self) -> str:
        """How far the run is, in words."""
        total = self.config.federation.rounds
        if self.summary is not None:
            why = self.summary.get("stopped")
            return f"stopped after {self.rounds} of {total} rounds: {why}" if why else "finished"
        return f"not finished: {self.rounds} of {total} rounds"


def read_run(path: Path) -> RunRecord:
    """Read a run's folder.

    Raises:
        FedForwardError: it is no run's folder, or has no figures of the base model yet.
    """
    directory = RunDirectory(path)
    config = directory.config()
    remarks: list[str] = []
    lines = _lines(directory, remarks)
    rounds = lines[-1]["round"]
    clients, digest = _from_ledger(directory, rounds, remarks)
    summary = _summary(directory, rounds, remarks)
    server = config.model.path == AT_SITES
    return RunRecord(
        path=path,
        config=config,
        lines=lines,
        summary=summary,
        environment=_object(directory.path / "environment.json"),
        clients=clients,
        divided=None if server else read_divided(directory.path),
        # What a site's model answers is the site's.
        answer=None if server else _answer(lines, summary),
        remarks=remarks,
        ledger_digest=digest,
        text=(directory.path / "config.toml").read_text(encoding="utf-8", errors="replace"),
        sites=_sites(directory.path) if server else {},
    )


def _sites(folder: Path) -> dict[int, str]:
    found = _object(folder / "status.json").get("sites")
    return {
        site["number"]: site["label"]
        for site in (found if isinstance(found, list) else [])
        if isinstance(site, dict)
        and type(site.get("number")) is int
        and isinstance(site.get("label"), str)
    }


def _lines(directory: RunDirectory, remarks: list[str]) -> list[Line]:
    file = directory.metrics
    try:
        lines = directory.read_metrics(sys.maxsize - 1)
        text = file.read_bytes() if file.is_file() else b""
    except OSError as error:
        raise FedForwardError(f"{file} cannot be read: {error.strerror}.") from error
    again = "`fedforward run … --resume` writes it again from the ledger"
    if not text:
        raise FedForwardError(
            f"{directory.path} has no figures yet: {file.name} is missing or empty. Wait until the "
            "run has measured the base model, or go on with it with --resume."
        )
    if not lines:
        raise FedForwardError(f"{file}: line 1 is damaged or not whole; {again}.")
    written = len(text.split(b"\n")) - text.endswith(b"\n")
    if written > len(lines):
        remarks.append(
            f"Line {len(lines) + 1} of {file.name} is damaged or not whole. The page shows the "
            f"{lines[-1]['round']} rounds before it; {again}."
        )
    return lines


def _summary(directory: RunDirectory, rounds: int, remarks: list[str]) -> Mapping[str, Any] | None:
    if not directory.summary.is_file():
        return None
    content = _object(directory.summary)
    known = {"rounds", "heldout_loss", "metrics", "seconds", "state_digest", "ledger_digest"}
    if not known <= content.keys():
        remarks.append("summary.json is damaged; `fedforward run … --resume` writes it again.")
        return None
    # A run that goes on has a summary of the time before.
    return content if content["rounds"] == rounds else None


def _object(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        content = parse_json(path.read_bytes())
        if isinstance(content, dict):
            return content
    return {}


def _answer(lines: list[Line], summary: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The example of the summary, else that of the base model's line; `after` is None there."""
    if summary is not None and _is_answer(summary.get("example")):
        return cast("Mapping[str, Any]", summary["example"])
    example = lines[0].get("example")
    return {**example, "after": None} if example else None


def _is_answer(content: Any) -> bool:
    if not isinstance(content, dict):
        return False
    texts = [content.get(name) for name in ("prompt", "before", "after")]
    expected = content.get("expected", 0)
    return all(isinstance(t, str) for t in texts) and isinstance(expected, str | None)


def _from_ledger(
    directory: RunDirectory, rounds: int, remarks: list[str]
) -> tuple[ClientRounds | None, str]:
    """What the ledger has of the first `rounds` rounds, and its chain hash after them."""
    try:
        with closing(Ledger(directory.ledger, read_only=True)) as ledger:
            count = min(rounds, ledger.length)
            found = _client_rounds(ledger, count)
            return found, ledger.chain_after(count).hex()
    except FedForwardError as error:
        remarks.append(f"Figures of single clients are left out. {error}")
        return None, ""


def _client_rounds(ledger: Ledger, rounds: int) -> ClientRounds | None:
    seen: list[tuple[int, int, tuple[float, ...]]] = []
    examples: dict[int, int] = {}
    active: dict[int, NDArray[np.float64]] = {}
    counts: dict[int, int] = {}
    for number, record in enumerate(ledger.rounds(0, rounds)):
        for result in record.results:
            report = result.report
            gradients = report.gradients.astype(np.float64)
            size = float(np.sqrt((gradients**2).mean())) if gradients.size else np.nan
            zeros = float((gradients == 0).mean()) if gradients.size else np.nan
            client = report.client
            figures = (report.loss, result.learning_rate, size, zeros, float(report.skipped))
            seen.append((number, client, figures))
            examples[client] = report.examples
            if result.blocks is not None:
                active[client] = active.get(client, 0.0) + result.blocks.astype(np.float64)
                counts[client] = counts.get(client, 0) + 1
    if not seen:
        return None
    clients = sorted(examples)
    place = {client: n for n, client in enumerate(clients)}
    found = np.full((5, rounds, len(clients)), np.nan)
    took_part = np.zeros((rounds, len(clients)), np.bool_)
    for number, client, values in seen:
        found[:, number, place[client]] = values
        took_part[number, place[client]] = True
    grid = None
    if active:
        blocks = len(next(iter(active.values())))
        none = np.full(blocks, np.nan)
        grid = np.stack([active[c] / counts[c] if c in active else none for c in clients], axis=1)
    numbers = np.array([examples[client] for client in clients], np.int64)
    return ClientRounds(
        clients=clients,
        loss=found[0],
        rate=found[1],
        size=found[2],
        zeros=found[3],
        skipped=found[4],
        took_part=took_part,
        examples=numbers,
        active=grid,
    )
