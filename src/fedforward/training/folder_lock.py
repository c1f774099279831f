"""The lock of a folder that one process at a time writes to, and the note of who holds it.

`lock` is locked by the operating system, which lets go of it when the process ends, however that
happens. `lock.json` beside it says who holds it; one that a killed process has left does no harm.
"""

import json
import os
import platform
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from fedforward.core.errors import FedForwardError
from fedforward.core.machine import process_runs

LOCK = "lock"
HOLDER = "lock.json"
#: Of the coordinator of a run across machines, whose `lock` the process has that started it.
COORDINATOR_LOCK = "coordinator.lock"
#: Seconds that another process has between locking a folder and saying that it did.
_NOTE_TIMEOUT_S = 0.5


class FolderLock:
    """The lock of one folder, which must exist when it is acquired."""

    def __init__(self, folder: Path, key: str, name: str = LOCK) -> None:
        """`key`: what names the folder, such as "--out"; `name`: of the file."""
        self.folder = folder
        self.key = key
        self._file, self._note_file = folder / name, folder / f"{name}.json"
        # One thread may build a run and another carry it out.
        self._lock = FileLock(self._file, timeout=0, thread_local=False)

    def acquire(self) -> None:
        """Keep other processes out until `release`; nothing happens if it is held already.

        Raises:
            FedForwardError: another process holds it, or the folder cannot be locked.
        """
        if self._lock.is_locked:
            return
        try:
            self._lock.acquire()
        except Timeout as error:
            raise FedForwardError(
                f"{self.folder} is in use by another fedforward process{self._holder()}. Wait "
                f"until that one has ended, stop it, or choose another {self.key}."
            ) from error
        except (OSError, NotImplementedError) as error:
            raise FedForwardError(
                f"{self._file} cannot be locked: "
                f"{getattr(error, 'strerror', None) or error}. Look at the rights of the folder, "
                f"or choose another {self.key}."
            ) from error
        note = {
            "pid": os.getpid(),
            "host": platform.node(),
            "since": datetime.now().astimezone().isoformat(" ", "seconds"),
        }
        # The lock holds without the note.
        with suppress(OSError):
            self._note_file.write_text(json.dumps(note) + "\n", encoding="utf-8")

    def release(self, *, remove: bool = False) -> None:
        """Let others in.

        Args:
            remove: whether to leave the folder without `lock` as well.
        """
        if self._lock.is_locked:
            with suppress(OSError):
                self._note_file.unlink()
            if remove:
                # Windows does not remove a file that is open; an empty one does no harm.
                with suppress(OSError):
                    self._file.unlink()
        self._lock.release(force=True)

    def _holder(self) -> str:
        """Who holds the lock, in words; empty if that is not known."""
        last = time.monotonic() + _NOTE_TIMEOUT_S
        while not (words := self.note()) and time.monotonic() < last:
            time.sleep(0.05)
        return words

    def note(self) -> str:
        """Who has locked the folder, in words; empty if nobody, or if that is not known."""
        try:
            content = json.loads(self._note_file.read_text(encoding="utf-8"))
            pid, host, since = int(content["pid"]), str(content["host"]), str(content["since"])
            here = host == platform.node()
            if here and not process_runs(pid):
                # A killed process left it; the one that holds the lock has not written yet.
                return ""
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            return ""
        where = "this one" if here and pid == os.getpid() else f"process {pid}"
        return f" ({where}{'' if here else f' on {host}'}, since {since})"
