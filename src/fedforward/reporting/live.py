"""The page of runs that go on, written again whenever there is something new.

Imports no PyTorch.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedforward.core.errors import FedForwardError
from fedforward.reporting.page import check_out, make_page, write_page
from fedforward.reporting.record import RunRecord, read_run

LOGGER = logging.getLogger("fedforward.reporting")
#: Seconds after which a browser loads the page of a run in progress again.
RELOAD_S = 15
#: Seconds between two looks at a folder.
POLL_INTERVAL_S = 1.0
#: Drawing takes at most one part in so many of the time.
PAUSE = 5.0


def signature(run: Path) -> str:
    """What changes when a run's folder has something new for its page."""
    found = []
    for name in ("metrics.jsonl", "summary.json"):
        with suppress(OSError):
            status = (run / name).stat()
            found.append(f"{name} {status.st_mtime_ns} {status.st_size}")
    return "; ".join(found)


class LivePage:
    """The page of a run that this process carries out.

    Attributes:
        path: of the page.
    """

    def __init__(self, run: Path, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds.

        Raises:
            FedForwardError: the page cannot be written there.
        """
        self.run, self.path, self.clock = run, path, clock
        if path.exists():
            check_out(path)
        self._next = -float("inf")
        self._failed = False

    def progress(self, done: int, total: int, line: dict[str, Any]) -> None:
        """Write the page after an evaluation, unless the last one was so slow that it is too soon.

        Args:
            done: rounds that are done.
            total: rounds of the run.
            line: the round's metrics.
        """
        if "heldout_loss" in line and self.clock() >= self._next:
            self.write(reload_s=RELOAD_S)

    def write(self, reload_s: int | None = None) -> bool:
        """Write the page; what goes wrong is said once and does not end the run."""
        began = self.clock()
        try:
            write_page(self.path, make_page([read_run(self.run)], reload_s=reload_s))
        except FedForwardError as error:
            if not self._failed:
                LOGGER.warning("The page could not be written: %s The run goes on.", error)
            self._failed = True
            return False
        self._next = self.clock() + PAUSE * (self.clock() - began)
        return True


def watch(
    paths: Sequence[Path],
    page: Path,
    told: Callable[[Sequence[RunRecord], int], None],
    *,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Write the page of runs again and again until all are finished; returns its bytes.

    Runs that have no figures yet are waited for.

    Args:
        told: told of the runs and of the page's bytes each time.
        sleep: waits for seconds.
        clock: gives seconds.

    Raises:
        FedForwardError: a folder is no run's, or the page cannot be written.
    """
    seen: list[str] | None = None
    while True:
        now = [signature(path) for path in paths]
        if now != seen and all(map(_has_figures, paths)):
            seen, began = now, clock()
            records = [read_run(path) for path in paths]
            size = write_page(page, make_page(records, reload_s=RELOAD_S))
            told(records, size)
            if all(record.summary is not None for record in records):
                return size
            sleep(PAUSE * (clock() - began))
        sleep(POLL_INTERVAL_S)


def _has_figures(run: Path) -> bool:
    """Whether the base model was measured: its line is there as a whole."""
    with suppress(OSError), (run / "metrics.jsonl").open("rb") as file:
        return file.readline().endswith(b"\n")
    return False
