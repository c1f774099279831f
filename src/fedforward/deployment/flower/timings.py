"""When what happened to messages, as lines of a local file; `fedforward bench-federation` reads it.

Off unless somebody asks for it. A line has a wall-clock time in seconds, what happened, and to
whom: nothing of a message, and nothing of it is sent anywhere.
"""

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

#: Environment variable that has `fedforward server` and `client` begin such a file, if it is not
#: empty. It is called `FILE`, in their `flower` folders.
VARIABLE = "FEDFORWARD_TIMINGS"
FILE = "timings.jsonl"


class Timings:
    """One such file; without one nothing is noted."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    @classmethod
    def of(cls, home: Path) -> "Timings":
        """The file in a `flower` folder, if it was begun."""
        path = home / FILE
        return cls(path if path.is_file() else None)

    @classmethod
    def begin(cls, home: Path) -> "Timings":
        """Begin a file in a `flower` folder where the environment asks for it; else remove it.

        Raises:
            OSError: the file cannot be written.
        """
        path = home / FILE
        path.unlink(missing_ok=True)
        if os.environ.get(VARIABLE):
            path.write_bytes(b"")
        return cls.of(home)

    def note(self, what: str, site: str = "", **more: str | int) -> None:
        """Write down that something happens now; without a word if that fails."""
        if self.path is None:
            return
        line = {"at": time.time(), "what": what, "site": site, **more}
        with suppress(OSError), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def note_envelope(self, what: str, site: str, data: bytes) -> None:
        """Likewise, of an encoded envelope: its kind, and a task's round from 1 on."""
        if self.path is None:
            return
        from fedforward.messages.envelope import Envelope, MessageKind
        from fedforward.messages.secure import SumTask
        from fedforward.messages.task import Task

        envelope = Envelope.decode(data)
        body = envelope.body
        if envelope.kind is MessageKind.SUM_TASK:
            body = SumTask.decode(body).task
        tasks = (MessageKind.TASK, MessageKind.SUM_TASK)
        more = {"round": Task.decode(body).round + 1} if envelope.kind in tasks else {}
        self.note(what, site, kind=envelope.kind.name, **more)


def read(path: Path) -> list[dict[str, Any]]:
    """What was noted, as it came; a last line that is cut off is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):
            content = json.loads(line)
            if isinstance(content, dict) and isinstance(content.get("at"), float):
                found.append(content)
    return found
