"""The files of a run across machines, beside those of any run.

federation.json  the run's random name and the sites' numbers: read again after a kill
status.json      what is going on, for `fedforward status`; never read by the coordinator
stop             its being there asks the coordinator to stop
"""

import json
import os
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedforward.config.schema import Config
from fedforward.core.errors import FedForwardError
from fedforward.messages.envelope import RUN_BYTES, Enrolment
from fedforward.training import run_directory
from fedforward.training.run_directory import RunDirectory


@dataclass(frozen=True)
class Place:
    """What is kept of a site that was ever taken in.

    Attributes:
        number: its client number.
        examples: training examples.
        active_blocks: blocks that it can perturb; None is all.
    """

    number: int
    examples: int
    active_blocks: int | None = None


@dataclass
class Papers:
    """See the module.

    Attributes:
        run: the run's random name.
        places: of the sites, by name.
        reset: numbers of sites whose state was refused, and that have not started again yet.
    """

    directory: RunDirectory
    run: bytes = b""
    places: dict[str, Place] = field(default_factory=dict)
    reset: set[int] = field(default_factory=set)

    @property
    def _federation(self) -> Path:
        return self.directory.path / "federation.json"

    @property
    def stop_file(self) -> Path:
        """See the module."""
        return self.directory.path / "stop"

    def open(self, config: Config, resume: bool) -> None:
        """Begin a run's folder, or read what a killed coordinator left.

        Raises:
            FedForwardError: the folder holds another run, or none that can be continued.
        """
        directory = self.directory
        if directory.continues(config, resume):
            self._read()
        else:
            self.run = os.urandom(RUN_BYTES)
            self._save()
            directory.start(config)
        self.stop_file.unlink(missing_ok=True)

    def _read(self) -> None:
        try:
            content = json.loads(self._federation.read_text(encoding="utf-8"))
            self.run = bytes.fromhex(content["run"])
            self.places = {str(name): Place(**place) for name, place in content["sites"].items()}
            self.reset = {int(number) for number in content["reset"]}
            if sorted(place.number for place in self.places.values()) != [*range(len(self.places))]:
                raise ValueError("the sites' numbers are not 0, 1, 2, …")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FedForwardError(
                f"{self._federation} cannot be read: {error}. It has the numbers of the sites; "
                "restore it from a copy."
            ) from error

    def settle(self, enrolments: Mapping[str, Enrolment]) -> None:
        """Give sites their places, or keep those that they have; on disk when this returns."""
        before = dict(self.places)
        for name, said in enrolments.items():
            old = self.places.get(name)
            number = len(self.places) if old is None else old.number
            self.places[name] = Place(number, said.examples, said.active_blocks)
        if self.places != before:
            self._save()

    def by_number(self) -> list[tuple[str, Place]]:
        """Names and places of all sites, by number."""
        return sorted(self.places.items(), key=lambda item: item[1].number)

    def examples(self) -> list[int]:
        """Training examples of all sites, by number."""
        return [place.examples for _, place in self.by_number()]

    def _save(self) -> None:
        sites = {name: asdict(place) for name, place in self.places.items()}
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
