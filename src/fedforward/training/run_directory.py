"""The folder of a run: what is in it, written so that a kill or a full disk loses nothing.

config.toml       the resolved configuration        metrics.jsonl   a line per round
initial_a.safetensors   where adapters are aligned: what they began with, unless a file was given
plan.json         the probe plan                    loss.png        the loss curve
environment.json  versions and machine              summary.json    the result
clients.json      labels of each client's examples
ledger.sqlite     the source of truth               adapter/ or model/   what was tuned
ledger.head       how many rounds it must have
lock, lock.json   held by the process that writes here, and which one that is
"""

import json
import math
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from fedforward.config.loading import load, renamed
from fedforward.config.paths import PATH_KEYS, absolute
from fedforward.config.schema import Config
from fedforward.config.template import to_toml
from fedforward.core.errors import FedForwardError
from fedforward.core.files import parse_json, write_bytes
from fedforward.core.machine import processor_name
from fedforward.core.paths import check_new_folder, home
from fedforward.core.steps import ProbePlan
from fedforward.core.version import __version__
from fedforward.training.folder_lock import COORDINATOR_LOCK, HOLDER, LOCK, FolderLock
from fedforward.training.metrics_lines import read_line

#: Keys that may change on resume: no committed step depends on them.
FREE_KEYS = {
    "run.patience",
    "run.evaluate_every",
    "run.activation_cache",
    "run.on_divergence",
    "run.callbacks",
}
#: What a start that was cut short may leave behind; nothing has been computed yet.
_FIRST_FILES = {LOCK, HOLDER, COORDINATOR_LOCK, f"{COORDINATOR_LOCK}.json"} | {
    name + ending
    for name in (
        "plan.json",
        "clients.json",
        "environment.json",
        "config.toml",
        "federation.json",
        "initial_a.safetensors",
    )
    for ending in ("", ".partial")
}
#: No plan has larger numbers, and no machine more threads.
_LARGEST_COUNT, _MOST_THREADS = 2**31, 4096
_PACKAGES = ("torch", "transformers", "peft", "numba", "numpy", "datasets")


class RunDirectory:
    """Paths and files of one run."""

    def __init__(self, path: Path) -> None:
        # A shell leaves the "~" of --out=~/run as it is.
        path = self.path = home(path)
        self.ledger = path / "ledger.sqlite"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"
        self.plot = path / "loss.png"
        self.initial_a = path / "initial_a.safetensors"
        self._lock = FolderLock(path, "--out")

    @property
    def started(self) -> bool:
        """Whether a run has been started here."""
        try:
            return (self.path / "config.toml").is_file()
        except OSError:
            # A name that the system does not take.
            return False

    def tuned(self, config: Config) -> Path:
        """Where the adapter or the model lies when the run is done."""
        return self.path / ("adapter" if config.model.tune == "lora" else "model")

    def claim(self) -> None:
        """Make sure that a new run can be written here.

        Raises:
            FedForwardError: the folder is in use, or cannot be made.
        """
        check_new_folder(self.path, "--out")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            used = any(file.name not in _FIRST_FILES for file in self.path.iterdir())
        except OSError as error:
            raise FedForwardError(
                f"{self.path} cannot be a run directory: {error.strerror}. Choose another --out."
            ) from error
        if used:
            raise FedForwardError(
                f"{self.path} is not empty and is not a run directory. Choose another --out."
            )
        if not os.access(self.path, os.W_OK):
            raise FedForwardError(f"{self.path} cannot be written. Choose another --out.")

    def lock(self) -> None:
        """Keep other processes from writing here until `unlock`; a kill lets go of it as well.

        Raises:
            FedForwardError: another process does, or the folder cannot be used.
        """
        if not self.started:
            self.claim()
        self._lock.acquire()

    def unlock(self) -> None:
        """Let others write here; a folder in which no run was started is left as it was."""
        self._lock.release(remove=not self.started)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """`lock`, unless this object has done so, and `unlock` at the end."""
        self.lock()
        try:
            yield
        finally:
            self.unlock()

    def continues(self, config: Config, resume: bool) -> bool:
        """Whether a run that was started here is to be continued; else the folder is claimed.

        Raises:
            FedForwardError: there is one and `resume` is not asked for, or it is another's; or the
                folder cannot be used; or more rounds are done than are asked for.
        """
        if not self.started:
            self.claim()
            return False
        if not resume:
            raise FedForwardError(
                f"{self.path} holds a run already. Continue it with --resume, or choose another "
                "--out."
            )
        self.check_same(config)
        lines = self.read_metrics(sys.maxsize - 1)
        # A run may end with a round that takes others back, after its last one.
        done = len(lines) - 1 - ("taken_back" in lines[-1] if lines else 0)
        if done > config.federation.rounds:
            raise FedForwardError(
                f"{self.path} has {done} rounds already, and federation.rounds = "
                f"{config.federation.rounds}. Give {done} or more, or choose another --out."
            )
        return True

    def start(self, config: Config, plan: ProbePlan | None = None) -> None:
        """Write what the run is, before its first round; its paths become absolute.

        Args:
            plan: None for a run across machines, whose sites have their own.
        """
        if plan is not None:
            write_json(self.path / "plan.json", asdict(plan))
        write_json(self.path / "environment.json", environment())
        write_text(self.path / "config.toml", to_toml(absolute(config.with_objective())))

    def config(self) -> Config:
        """The configuration of a run that was started here.

        Raises:
            FedForwardError: this is not a run directory, or its configuration is damaged.
        """
        if not self.started:
            above = RunDirectory(self.path.parent)
            place = f", {above.path}" if self.path.name and above.started else ""
            raise FedForwardError(
                f"{self.path} is not a run directory: it has no config.toml. Give the --out "
                f"folder of a run{place}."
            )
        return load(self.path / "config.toml")

    def load(self) -> tuple[Config, ProbePlan]:
        """The configuration and plan of a run that was started here.

        Raises:
            FedForwardError: this is not a run directory, or its files are damaged.
        """
        config = self.config()
        try:
            content = parse_json((self.path / "plan.json").read_bytes())
            plan = ProbePlan(**content)
            if moved := renamed("run.trajectory", plan.trajectory):
                raise FedForwardError(f"{self.path / 'plan.json'}: {moved.removeprefix('run.')}.")
            if not _is_plan(plan):
                raise ValueError(f"{content} is not a probe plan")
        except (OSError, ValueError, TypeError) as error:
            raise FedForwardError(
                f"{self.path / 'plan.json'} is damaged: {error}. Restore it from a copy."
            ) from error
        return config, plan

    def check_same(self, requested: Config) -> None:
        """Refuse to resume a run of another configuration, naming the keys that differ."""
        found = self.config()
        # The ledger's header has the digests of what lies there.
        free = FREE_KEYS | set(PATH_KEYS)
        if requested.method.objective is None:
            free.add("method.objective")
        if found.method.schedule == requested.method.schedule == "constant":
            free.add("federation.rounds")
        old, new = _flat(found), _flat(requested)
        differing = [
            f"{key} is {old.get(key)!r} there and {new.get(key)!r} here"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key) and key not in free
        ]
        if differing:
            raise FedForwardError(
                f"{self.path} belongs to another configuration: {'; '.join(differing)}. Resume it "
                "with the configuration that it was started with, or choose another --out."
            )

    def read_metrics(self, rounds: int) -> list[dict[str, Any]]:
        """The lines up to `rounds` rounds, as far as they are whole.

        A kill may cut the last line short; the ledger has what is needed to write it again.
        """
        lines: list[dict[str, Any]] = []
        if self.metrics.is_file():
            text = self.metrics.read_text(encoding="utf-8", errors="replace")
            for number, raw in enumerate(text.split("\n")[: rounds + 1]):
                line = read_line(raw, number)
                if line is None:
                    break
                lines.append(line)
        return lines

    def check_length(self, rounds: int) -> None:
        """Refuse a ledger of fewer rounds than the metrics or the summary, written after it.

        Raises:
            FedForwardError: rounds of the ledger are gone.
        """
        done = self._summary().get("rounds")
        known = {
            "metrics are": self._rounds_measured(),
            "summary is": done if type(done) is int else 0,
        }
        for what, count in known.items():
            if count > rounds:
                raise FedForwardError(
                    f"{self.path}: its {what} of {count} rounds, and its ledger has {rounds}: "
                    "rounds are missing. Copy the whole folder again while no run writes to it, "
                    "or restore ledger.sqlite from a copy."
                )

    def _summary(self) -> dict[str, Any]:
        """The content of summary.json; empty where there is none, or it is damaged."""
        with suppress(OSError, ValueError):
            content = parse_json(self.summary.read_bytes())
            return content if isinstance(content, dict) else {}
        return {}

    def compare_summary(self, rounds: int, found: Mapping[str, str]) -> tuple[bool, list[str]]:
        """Compare digests after so many rounds with those of the summary.

        A run that was resumed after its summary has more rounds, and an adapter of the time before.

        Returns:
            Whether the summary is of so many rounds; and a sentence for each difference.
        """
        if not self.summary.is_file():
            return False, []
        content = self._summary()
        if type(content.get("rounds")) is not int or not found.keys() <= content.keys():
            return False, ["summary.json is damaged (--resume writes it again)"]
        if content["rounds"] != rounds:
            return False, []
        return True, [
            f"summary.json has {name} {content[name]}, rebuilt is {value}"
            for name, value in found.items()
            # Where no site gave its state, there is none.
            if content[name] != value and (name != "state_digest" or content[name] is not None)
        ]

    def summary_of(self, ledger_digest: str) -> dict[str, Any] | None:
        """The summary, if there is one and it is of the ledger's state with this chain hash."""
        content = self._summary() if self.summary.is_file() else {}
        return content if content.get("ledger_digest") == ledger_digest else None

    def _rounds_measured(self) -> int:
        return len(self.read_metrics(sys.maxsize - 1)) - 1

    def rewrite_metrics(self, lines: list[dict[str, Any]]) -> None:
        """Replace the metrics (on resume, when lines of a round that was lost are dropped)."""
        write_text(self.metrics, "".join(json.dumps(strict(line)) + "\n" for line in lines))

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Add a round's line."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(strict(line)) + "\n")


def _is_plan(plan: ProbePlan) -> bool:
    counts = (plan.probes_per_call, plan.threads, plan.evaluation_rows)
    whole = all(type(count) is int and 0 < count < _LARGEST_COUNT for count in counts)
    # Libraries end the process where they cannot start their threads.
    whole = whole and plan.threads <= _MOST_THREADS
    zeros = (plan.tokens_per_call, plan.most_branching)
    whole = whole and all(type(count) is int and 0 <= count < _LARGEST_COUNT for count in zeros)
    words = (plan.device, plan.placement, plan.alone, plan.left_out, plan.not_kept)
    whole = whole and all(type(word) is str for word in words)
    switches = (plan.shares_prefix, plan.joins_choices, plan.keeps_activations)
    whole = whole and all(type(switch) is bool for switch in switches)
    return whole and plan.trajectory in ("recompute", "cache")


def _flat(config: Config) -> dict[str, Any]:
    return {
        f"{section}.{key}": value
        for section, values in config.model_dump().items()
        for key, value in values.items()
    }


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, content: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(strict(content), indent=2) + "\n")


def strict(content: Any) -> Any:
    """The same with null for numbers that are not finite, which JSON does not have."""
    if isinstance(content, Mapping):
        return {key: strict(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [strict(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content


@contextmanager
def errors_of_the_disk(path: Path) -> Iterator[None]:
    """Turn a full or failing disk into a sentence; the ledger is whole either way."""
    import sqlite3

    from safetensors import SafetensorError

    try:
        yield
    except (OSError, sqlite3.OperationalError, SafetensorError) as error:
        raise FedForwardError(
            f"{path} cannot be written: {error}. Every finished round is kept; make room and "
            "continue with --resume."
        ) from error


def environment() -> dict[str, Any]:
    """Versions and the machine, as far as they matter for repeating a run."""
    versions: dict[str, str | None] = {"fedforward": __version__}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "packages": versions,
    }
