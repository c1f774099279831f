"""What runs have spent of the privacy of a site's rows, kept in the site's folder.

Each run on some rows has an account. Costs of runs add up, ε and δ alike, for each row by itself:
data that share rows share what was spent on them. An account is on disk before an answer leaves.
Imports no PyTorch.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from fedforward.core.errors import FedForwardError
from fedforward.core.files import keep_names, parse_json, write_bytes

ACCOUNTS, LOCK = "spent.json", "spent.lock"
#: Sums of decimal fractions may lie this much above a limit, as a share of it.
ROUNDING = 1e-9
_ADVICE = (
    "It says what was spent of the rows' privacy. Restore the folder from a copy; without it "
    "nobody knows how much may still be spent."
)
Rows = NDArray[np.uint64]


class SpentError(FedForwardError):
    """An answer would cost more than the site allows for its rows."""


class Costs(Protocol):
    """What a run costs; see `federation.privacy.Guarantee`."""

    @property
    def delta(self) -> float:
        """δ of all rounds."""
        ...

    def epsilon(self, rounds: int) -> float:
        """ε of so many rounds."""
        ...


@dataclass(frozen=True)
class Account:
    """What a run has spent on some rows.

    Attributes:
        run: its random name, hexadecimal.
        rows: name of the rows.
        rounds: that were answered.
        last: number of the last of them, from 0.
        epsilon, delta: that they cost.
        day: of the last answer, as YYYY-MM-DD.
    """

    run: str
    rows: str
    rounds: int
    last: int
    epsilon: float
    delta: float
    day: str


class Accounts:
    """All accounts of a site's folder."""

    def __init__(self, folder: Path) -> None:
        """`folder` need not be there yet."""
        self.folder = folder
        self.file = folder / ACCOUNTS

    def all(self) -> list[Account]:
        """Every account, oldest first.

        Raises:
            FedForwardError: the file is damaged, or is gone while those of rows are there.
        """
        if not self.file.is_file():
            if any(self.folder.glob("*.rows")):
                raise FedForwardError(f"{self.file} is gone. {_ADVICE}")
            return []
        try:
            content = parse_json(self.file.read_bytes())
            found = [Account(**entry) for entry in content["accounts"]]
            for account in found:
                _check(account)
            return found
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise FedForwardError(f"{self.file} cannot be read: {error}. {_ADVICE}") from error

    def rows(self, name: str) -> Rows:
        """The rows of a name, uint64 [rows], sorted.

        Raises:
            FedForwardError: the file is gone or damaged.
        """
        path = self.folder / f"{name}.rows"
        try:
            found = np.frombuffer(path.read_bytes(), "<u8").astype(np.uint64)
        except (OSError, ValueError) as error:
            raise FedForwardError(f"{path} cannot be read: {error}. {_ADVICE}") from error
        if name_of(found) != name:
            raise FedForwardError(f"{path} is damaged. {_ADVICE}")
        return found

    def spent(self, rows: Rows, beside: str = "") -> tuple[float, float]:
        """The largest ε and the largest δ that runs have spent on one of these rows.

        Args:
            beside: a run whose account on these very rows is left out.
        """
        own = (beside, name_of(rows))
        totals = np.zeros((2, len(rows)))
        for account in self.all():
            if (account.run, account.rows) != own:
                cost = np.array([[account.epsilon], [account.delta]])
                totals += cost * np.isin(rows, self.rows(account.rows))
        epsilon, delta = totals.max(axis=1, initial=0.0).tolist()
        return epsilon, delta

    def keep(self, account: Account, rows: Rows) -> None:
        """Put an account in place of the one before it; on disk when this returns."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        everyone = [a for a in self.all() if (a.run, a.rows) != (account.run, account.rows)]
        content = {"accounts": [asdict(each) for each in (*everyone, account)]}
        if not self.file.is_file():
            # Before the rows: those without accounts count as damage.
            write_bytes(self.file, b'{"accounts": []}')
            keep_names(self.folder)
        path = self.folder / f"{account.rows}.rows"
        if not path.is_file():
            write_bytes(path, rows.astype("<u8").tobytes())
        write_bytes(self.file, json.dumps(content, indent=1).encode())
        keep_names(self.folder)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from the accounts."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with FileLock(self.folder / LOCK):
            yield


class Budget:
    """What one run may spend on a site's rows, and has.

    Attributes:
        accounts: of the site's folder.
        run: the run's random name, hexadecimal.
        most: ε and δ that all runs together may spend on a row; None is no limit.
    """

    def __init__(
        self,
        accounts: Accounts,
        run: str,
        rows: Rows,
        costs: Costs,
        most: tuple[float, float] | None = None,
    ) -> None:
        """`rows`: see `data.rows.fingerprints`."""
        self.accounts = accounts
        self.run = run
        self.most = most
        self._rows, self._costs = rows, costs

    def check(self, rounds: int) -> None:
        """Refuse what would cost more than is left, were so many rounds of this run answered.

        Raises:
            SpentError: with what was spent and what is allowed.
            FedForwardError: an account cannot be read.
        """
        if self.most is None:
            return
        before = self.accounts.spent(self._rows, self.run)
        mine = (self._costs.epsilon(rounds), self._costs.delta)
        for name, key, spent, cost, most in zip(
            ("epsilon", "delta"), ("epsilon", "delta"), before, mine, self.most, strict=True
        ):
            if spent + cost > most * (1.0 + ROUNDING):
                raise SpentError(
                    f"{rounds} rounds (federation.rounds) cost {name} {cost:.4g}, and other runs "
                    f"have spent {spent:.4g} on these rows: together above this site's "
                    f"limits.{key} = {most:g}. `fedforward privacy SITE.toml` lists the runs."
                )

    def check_round(self, number: int) -> None:
        """Refuse a round that was answered before, or that costs more than is left.

        Raises:
            SpentError: as `check`, and where an answer is known that is not there any more.
        """
        account = self._account()
        if number <= account.last:
            raise SpentError(
                f"Round {number + 1} was answered before, and what was answered is gone from "
                f"{self.accounts.folder}."
            )
        self.check(account.rounds + 1)

    def spend(self, number: int) -> None:
        """Note that a round is answered; once, however often it is noted."""
        with self.accounts.locked():
            account = self._account()
            if number <= account.last:
                return
            rounds = account.rounds + 1
            day = datetime.now(UTC).date().isoformat()
            epsilon = self._costs.epsilon(rounds)
            new = replace(account, rounds=rounds, last=number, epsilon=epsilon, day=day)
            self.accounts.keep(new, self._rows)

    def _account(self) -> Account:
        name = name_of(self._rows)
        for account in self.accounts.all():
            if (account.run, account.rows) == (self.run, name):
                return account
        return Account(self.run, name, 0, -1, 0.0, self._costs.delta, "")


def name_of(rows: Rows) -> str:
    """What rows are called: the first half of their SHA-256, hexadecimal."""
    return hashlib.sha256(rows.astype("<u8").tobytes()).hexdigest()[:32]


def _check(account: Account) -> None:
    texts = (account.run, account.rows, account.day)
    counts = (account.rounds, account.last)
    costs = (account.epsilon, account.delta)
    whole = all(isinstance(text, str) for text in texts) and all(type(n) is int for n in counts)
    if not whole or not all(isinstance(c, float | int) and 0.0 <= c < np.inf for c in costs):
        raise ValueError(f"the account of run {str(account.run)[:32]} is none")
    if len(account.rows) != 32 or not set(account.rows) <= set("0123456789abcdef"):
        raise ValueError("an account names no rows")
