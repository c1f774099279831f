"""Which rounds a private client has answered, so that none is answered twice.

Each answer spends privacy. Whoever asks again, after a restart or to learn more, gets the report of
that round as it was, or nothing. Imports no PyTorch.
"""

import hashlib
import json
from pathlib import Path

from fedforward.core.errors import FedForwardError, MessageError
from fedforward.core.files import keep_names, write_bytes
from fedforward.federation.budget import Budget
from fedforward.messages.report import Report
from fedforward.messages.task import Task


class Releases:
    """The last round that a client has answered.

    Attributes:
        round: its number; -1 before one.
        path: file that outlasts the process; None keeps it in memory.
        budget: what answers cost; None where nobody counts.
    """

    def __init__(self, path: Path | None = None, budget: Budget | None = None) -> None:
        """Goes on with what is in the file.

        Raises:
            FedForwardError: the file is there and is none of these.
        """
        self.path = path
        self.budget = budget
        self.round = -1
        self._question = self._report = b""
        if path is None or not path.is_file():
            return
        try:
            content = json.loads(path.read_bytes())
            self.round = content["round"]
            if type(self.round) is not int or self.round < 0:
                raise ValueError
            self._question = bytes.fromhex(content["question"])
            self._report = bytes.fromhex(content["report"])
        except (ValueError, TypeError, KeyError) as error:
            raise FedForwardError(
                f"{path} says which rounds were answered with noise, and cannot be read. Restore "
                "it, or take no further part in this run."
            ) from error

    def again(self, task: Task, state: bytes) -> Report | None:
        """The report that answered this task before; None where the round is a new one.

        Args:
            state: digest of the weights that the task starts from.

        Raises:
            MessageError: the round was answered with other weights, or is before the last one.
            SpentError: a new answer would cost more than is left.
        """
        if task.round > self.round:
            if self.budget is not None:
                self.budget.check_round(task.round)
            return None
        if task.round == self.round and self._question == _question(task, state):
            if self.budget is not None:
                # Whoever was killed between the two notes has made the first alone.
                self.budget.spend(task.round)
            return Report.decode(self._report)
        raise MessageError(
            f"Round {task.round + 1} was refused: with [privacy] a round is answered once, and "
            f"{self.round + 1} rounds were."
        )

    def note(self, task: Task, state: bytes, report: Report) -> None:
        """Keep a report, and what it costs, before it leaves.

        Raises:
            FedForwardError: it cannot be written down.
        """
        if self.path is not None:
            content = {
                "round": task.round,
                "question": _question(task, state).hex(),
                "report": report.encode().hex(),
            }
            try:
                self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                write_bytes(self.path, json.dumps(content).encode(), private=True)
                keep_names(self.path.parent)
            except OSError as error:
                raise FedForwardError(
                    f"{self.path} cannot be written: {error.strerror or error}. Until it can, no "
                    "round with noise is answered. Make room, or look at the rights of the folder."
                ) from error
        self.round, self._question = task.round, _question(task, state)
        self._report = report.encode()
        if self.budget is not None:
            self.budget.spend(task.round)


def _question(task: Task, state: bytes) -> bytes:
    """What a report depends on beside the data: SHA-256 of weights, rate, blocks and payload."""
    blocks = b"" if task.blocks is None else task.blocks.tobytes()
    parts = (state, repr(task.learning_rate).encode(), blocks, task.payload)
    lengths = b"".join(len(part).to_bytes(8, "little") for part in parts)
    return hashlib.sha256(lengths + b"".join(parts)).digest()
