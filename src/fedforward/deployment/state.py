"""The files of a run across machines, beside those of any run.

federation.json  the run's random name and the sites' numbers: read again after a kill
status.json      what is going on, for `fedforward status`; never read by the coordinator
without.json     sites that the operator leaves out, by name; read when a coordinator begins
stop             its being there asks the coordinator to stop
"""

import os
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedforward.config.schema import Config
from fedforward.core.errors import FedForwardError
from fedforward.core.files import parse_json
from fedforward.messages.envelope import RUN_BYTES, Enrollment
from fedforward.planning.allocator import ClientBlocks
from fedforward.training import run_directory
from fedforward.training.assembly import quorum_of
from fedforward.training.run_directory import RunDirectory

_WITHOUT = "without.json"


@dataclass(frozen=True)
class SiteRecord:
    """What is kept of a site that was ever admitted.

    Attributes:
        number: its client number.
        examples: training examples.
        active_blocks: blocks that it can perturb; None is all.
    """

    number: int
    examples: int
    active_blocks: int | None = None


def _is_record(site: SiteRecord) -> bool:
    counts = (site.number, site.examples, site.active_blocks or 0)
    return all(type(count) is int and 0 <= count < 2**32 for count in counts)


@dataclass
class CoordinatorState:
    """The coordinator's own files; see the module.

    Attributes:
        run: the run's random name.
        sites: that were ever admitted, by name.
        reset: numbers of sites whose state was refused, and that have not started again yet.
        without: names of sites that the operator leaves out.
    """

    directory: RunDirectory
    run: bytes = b""
    sites: dict[str, SiteRecord] = field(default_factory=dict)
    reset: set[int] = field(default_factory=set)
    without: frozenset[str] = frozenset()

    @property
    def _federation(self) -> Path:
        return self.directory.path / "federation.json"

    @property
    def stop_file(self) -> Path:
        """See the module."""
        return self.directory.path / "stop"

    def open(self, config: Config, resume: bool) -> Config:
        """Begin a run's folder, or read what a killed coordinator left.

        Returns:
            The configuration with the run's objective, where it leaves that open.

        Raises:
            FedForwardError: the folder holds another run, or none that can be continued.
        """
        directory = self.directory
        if directory.continues(config, resume):
            self._read()
            self.without = read_without(directory.path)
            config = config.with_objective(directory.config().objective)
        else:
            self.run = os.urandom(RUN_BYTES)
            self._save()
            config = config.with_objective()
            directory.start(config)
        self.stop_file.unlink(missing_ok=True)
        return config

    def _read(self) -> None:
        try:
            content = parse_json(self._federation.read_bytes())
            self.run = bytes.fromhex(content["run"])
            self.sites = {str(name): SiteRecord(**site) for name, site in content["sites"].items()}
            self.reset = set(content["reset"])
            if len(self.run) != RUN_BYTES:
                raise ValueError(f"the run's name has {len(self.run)} bytes, not {RUN_BYTES}")
            if sorted(site.number for site in self.sites.values()) != [*range(len(self.sites))]:
                raise ValueError("the sites' numbers are not 0, 1, 2, …")
            if not self.reset <= {site.number for site in self.sites.values()}:
                raise ValueError("who must start again is no site")
            if not all(map(_is_record, self.sites.values())):
                raise ValueError("a site's numbers are no whole numbers")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FedForwardError(
                f"{self._federation} cannot be read: {error}. It has the numbers of the sites; "
                "restore it from a copy."
            ) from error

    def admit(self, enrollments: Mapping[str, Enrollment]) -> None:
        """Give sites their numbers, or keep those that they have; on disk when this returns."""
        before = dict(self.sites)
        for name, enrollment in enrollments.items():
            old = self.sites.get(name)
            number = len(self.sites) if old is None else old.number
            self.sites[name] = SiteRecord(number, enrollment.examples, enrollment.active_blocks)
        if self.sites != before:
            self._save()

    def by_number(self) -> list[tuple[str, SiteRecord]]:
        """Names and records of all sites, by number."""
        return sorted(self.sites.items(), key=lambda item: item[1].number)

    def examples(self) -> list[int]:
        """Training examples of all sites, by number."""
        return [site.examples for _, site in self.by_number()]

    def blocks(self) -> list[ClientBlocks]:
        """What all sites say of the blocks that they can perturb, by number."""
        return [
            ClientBlocks(name, site.examples, site.active_blocks) for name, site in self.by_number()
        ]

    def _save(self) -> None:
        sites = {name: asdict(site) for name, site in self.sites.items()}
        content = {"run": self.run.hex(), "reset": sorted(self.reset), "sites": sites}
        run_directory.write_json(self._federation, content)

    def note_reset(self, numbers: Set[int]) -> None:
        """Keep who must start again, for a coordinator that begins anew."""
        if self.reset != numbers:
            self.reset = set(numbers)
            self._save()

    def write_status(self, content: dict[str, Any]) -> None:
        """Replace `status.json`."""
        run_directory.write_json(self.directory.path / "status.json", content)


def read_without(run: Path) -> frozenset[str]:
    """The names of the sites that are left out of a run.

    Raises:
        FedForwardError: the file does not hold names.
    """
    path = run / _WITHOUT
    if not path.is_file():
        return frozenset()
    try:
        names = parse_json(path.read_bytes())
    except (OSError, ValueError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FedForwardError(
            f"{path} holds no list of names. Remove it, and give --without again."
        )
    return frozenset(names)


def leave_out(run: Path, names: Sequence[str], config: Config) -> None:
    """Leave sites out of a run from its next start on, and no others.

    Raises:
        FedForwardError: see `check_without`.
    """
    check_without(run, names, config)
    if names:
        run_directory.write_json(run / _WITHOUT, sorted(set(names)))
    else:
        (run / _WITHOUT).unlink(missing_ok=True)


def check_without(run: Path, names: Sequence[str], config: Config) -> None:
    """Refuse to leave sites out of a run that cannot go on so; changes nothing.

    Raises:
        FedForwardError: there is no run, it has never admitted such a site, or cannot go on
            without it.
    """
    if not names:
        return
    if not (run / "federation.json").is_file():
        raise FedForwardError(
            f"--without {names[0]}: {run} holds no run yet. To let nobody in with that key, remove "
            f"{names[0]}.pub from the folder of keys."
        )
    state = CoordinatorState(RunDirectory(run))
    state._read()
    unknown = [name for name in names if name not in state.sites]
    if unknown:
        raise FedForwardError(
            f"--without {unknown[0]}: the run has no such site. Its sites are "
            f"{', '.join(sorted(state.sites)) or 'none yet'}."
        )
    left, quorum = len(state.sites) - len(set(names)), quorum_of(config)
    if left < quorum:
        raise FedForwardError(
            f"--without {' --without '.join(names)}: that leaves {left} of the run's sites, and "
            f"a round needs {quorum} (federation.quorum, method.aggregator)."
        )
    if config.evaluation.site in names:
        raise FedForwardError(
            f"--without {config.evaluation.site}: that site evaluates (evaluation.site), so the "
            "run cannot go on without it."
        )
