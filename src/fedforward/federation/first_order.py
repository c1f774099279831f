"""The server of first-order methods, whose update is a tensor that no ledger of scalars can hold.

The ledger keeps the SHA-256 of each round's state, and the newest state lies beside it in a file,
which is on disk before the round is. Imports no PyTorch.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedforward.core.errors import FedForwardError
from fedforward.federation.ledger import Ledger, Round
from fedforward.federation.server import Server, ServerSettings, origins
from fedforward.messages.codec import Entry, MessageError, Report
from fedforward.methods.base import FirstOrderMethod, Returned


class TensorServer(Server):
    """A `Server` that averages tensors.

    Attributes:
        state: float32 [d], the tuned state after the last round; empty before the first, when
            clients begin from the base.
    """

    def __init__(
        self,
        settings: ServerSettings,
        method: FirstOrderMethod,
        ledger: Ledger,
        folder: Path,
    ) -> None:
        """`folder` holds `state-N.npy`, the state after N rounds.

        Raises:
            FedForwardError: the ledger has rounds but the state file is missing or differs.
        """
        super().__init__(settings, method, ledger)
        self.first_order = method
        self.folder = folder
        self.state = np.empty(0, np.float32)
        if ledger.length:
            self.state = self._restore()

    def _file(self, rounds: int) -> Path:
        return self.folder / f"state-{rounds}.npy"

    def _restore(self) -> NDArray[np.float32]:
        path = self._file(self.ledger.length)
        last = next(self.ledger.entries(self.ledger.length - 1))
        if path.is_file():
            try:
                state: NDArray[np.float32] = np.load(path)
            except (OSError, ValueError, EOFError):
                state = np.empty(0, np.float32)
            if _digest(state) == last.state:
                return state
        raise FedForwardError(
            f"{path} is missing or is not the state that the ledger names. A first-order run "
            "cannot be rebuilt from its ledger; start it again in a new directory."
        )

    def _lacking(self, client: int) -> tuple[bytes, tuple[Entry, ...]]:
        return b"", ()

    def _state(self) -> NDArray[np.float32]:
        return self.state

    def _check(self, report: Report) -> None:
        found = 0 if report.state is None else len(report.state)
        if found != self.settings.layout.parameters or len(report.gradients):
            raise MessageError(
                f"A report of client {report.client} was refused: it has {found} numbers, not "
                f"{self.settings.layout.parameters}."
            )

    def _join(self, returned: Sequence[Returned]) -> Round:
        self.state = self.first_order.average(returned)
        done = self.round + 1
        partial = self._file(done).with_suffix(".partial.npy")
        with partial.open("wb") as file:
            np.save(file, self.state)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._file(done))
        for old in self.folder.glob("state-*.npy"):
            if old not in (self._file(done), self._file(done - 1)):
                old.unlink()
        without = [replace(part, report=replace(part.report, state=None)) for part in returned]
        return Round(Entry(self.round, (), state=_digest(self.state)), origins(without))


def _digest(state: NDArray[np.float32]) -> bytes:
    return hashlib.sha256(state.astype("<f4").tobytes()).digest()
