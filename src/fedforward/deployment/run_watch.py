"""What a server's command shows of a run whose coordinator is another process.

It reads the files that the coordinator writes, and knows no engine.
"""

import json
import logging
import time
from typing import Any

from fedforward.config.schema import Config
from fedforward.core.logs import PHASES
from fedforward.training.metrics import ProgressCallback, RoundingWatch
from fedforward.training.run_directory import RunDirectory

LOGGER = logging.getLogger("fedforward.deployment.server")


def finished(directory: RunDirectory, config: Config) -> dict[str, Any] | None:
    """The summary of a run that has had all its rounds; None of any other.

    Raises:
        FedForwardError: the folder holds another run.
    """
    if not directory.summary.is_file():
        return None
    directory.check_same(config)
    try:
        summary = json.loads(directory.summary.read_text(encoding="utf-8"))
        done = summary["rounds"] >= config.federation.rounds
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dict(summary) if done else None


class RunWatch:
    """Logs what is new of a run, and tells its progress."""

    def __init__(
        self, config: Config, directory: RunDirectory, progress: ProgressCallback | None
    ) -> None:
        self.config = config
        self.directory = directory
        self.progress = progress
        self.status_file = directory.path / "status.json"
        self._lines_seen = 0
        self._rounding = RoundingWatch(config)
        self._notes: dict[str, str] = {}
        self._phase = ""

    def status(self) -> dict[str, Any] | None:
        """What the coordinator says of itself; None if it has said nothing yet.

        Raises:
            OSError: it cannot be read at this moment, which says nothing of the coordinator.
        """
        try:
            return dict(json.loads(self.status_file.read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError):
            return None

    def silent_s(self) -> float:
        """Seconds since the coordinator's last sign of life."""
        try:
            return time.time() - self.status_file.stat().st_mtime
        except OSError:
            return 0.0

    def show(self, status: dict[str, Any]) -> None:
        """Log what has changed since the last call."""
        for site in status["sites"]:
            words = _words(site)
            if self._notes.get(site["name"]) != words:
                self._notes[site["name"]] = words
                LOGGER.info("site %s: %s", site["label"], words)
        lines = self.directory.read_metrics(self.config.federation.rounds)
        if len(lines) > self._lines_seen:
            for line in lines[max(1, self._lines_seen) :]:
                # The coordinator is another process, whose log nobody sees.
                if words := self._rounding.look(line):
                    LOGGER.warning(words)
            self._lines_seen = len(lines)
            if len(lines) > 1 and self.progress is not None:
                self.progress(lines[-1]["round"], self.config.federation.rounds, lines[-1])
        elif not lines:
            self.phase(status["what"])

    def phase(self, what: str) -> None:
        """Say what is waited for, once."""
        if what != self._phase:
            self._phase = what
            PHASES.info(what)

    def summary(self) -> dict[str, Any]:
        """Of a run that is over."""
        return dict(json.loads(self.directory.summary.read_text(encoding="utf-8")))


def _words(site: dict[str, Any]) -> str:
    """What a site is doing, for people."""
    if site["note"]:
        return str(site["note"])
    if not site["present"]:
        return "not connected"
    if not site["ready"]:
        return "connected, loading model and data"
    return f"takes part with {site['examples']} examples"
