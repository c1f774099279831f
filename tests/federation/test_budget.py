"""What runs spend of rows: sums over runs, rows that data share, damage, and durability."""

import json
from pathlib import Path

import numpy as np
import pytest

from fedforward.core.errors import FedForwardError
from fedforward.data.rows import fingerprint, fingerprints
from fedforward.data.sources import find
from fedforward.federation import budget as budgets
from fedforward.federation.budget import Accounts, Budget, SpentError, name_of
from fedforward.federation.releases import Releases
from fedforward.messages.task import Task
from tests.federation.test_privacy import REPORT


class PerRound:
    """ε of 0.5 a round."""

    delta = 1e-6

    def epsilon(self, rounds: int) -> float:
        return 0.5 * rounds


def rows(*numbers: int) -> np.ndarray:
    return np.array(sorted(numbers), np.uint64)


def budget(folder: Path, run: str, *numbers: int, most: float | None = None) -> Budget:
    limit = None if most is None else (most, 1e-5)
    return Budget(Accounts(folder), run, rows(*numbers), PerRound(), limit)


def test_a_round_is_paid_once_and_runs_add_up(tmp_path: Path) -> None:
    first = budget(tmp_path, "aa", 1, 2, 3)
    for number in (0, 0, 1, 4, 4):
        first.spend(number)
    (account,) = Accounts(tmp_path).all()
    assert (account.rounds, account.last, account.epsilon) == (3, 4, 1.5)
    budget(tmp_path, "bb", 1, 2, 3).spend(0)
    assert Accounts(tmp_path).spent(rows(1, 2, 3)) == (2.0, 2e-6)
    assert Accounts(tmp_path).spent(rows(1, 2, 3), beside="aa") == (0.5, 1e-6)


def test_data_that_share_a_row_share_its_cost(tmp_path: Path) -> None:
    """Neither a new row nor a row less makes the others new."""
    budget(tmp_path, "aa", 1, 2, 3).spend(0)
    budget(tmp_path, "bb", 3, 4).spend(0)
    accounts = Accounts(tmp_path)
    assert accounts.spent(rows(1, 9))[0] == 0.5
    assert accounts.spent(rows(3))[0] == 1.0
    assert accounts.spent(rows(8, 9)) == (0.0, 0.0)
    # The same run, on data that have changed: what is in both pays twice.
    budget(tmp_path, "aa", 1, 2, 3, 5).spend(1)
    assert accounts.spent(rows(1))[0] == 1.0 and accounts.spent(rows(5))[0] == 0.5


def test_a_limit_is_of_all_runs_together(tmp_path: Path) -> None:
    budget(tmp_path, "aa", 1, 2).spend(0)
    second = budget(tmp_path, "bb", 2, 3, most=2.0)
    second.check(3)
    with pytest.raises(SpentError, match=r"4 rounds .*cost epsilon 2, and other runs have spent"):
        second.check(4)
    for number in range(3):
        second.check_round(number)
        second.spend(number)
    with pytest.raises(SpentError, match=r"limits.epsilon = 2"):
        second.check_round(3)
    # Of the two parts of a cost, delta is the other.
    many = Budget(Accounts(tmp_path), "cc", rows(2), PerRound(), (100.0, 2.5e-6))
    with pytest.raises(SpentError, match=r"cost delta 1e-06, and other runs have spent 2e-06"):
        many.check(1)


def test_another_run_may_have_spent_meanwhile(tmp_path: Path) -> None:
    mine = budget(tmp_path, "aa", 1, most=1.0)
    mine.check(2)
    mine.spend(0)
    budget(tmp_path, "bb", 1).spend(0)
    with pytest.raises(SpentError):
        mine.check_round(1)


def test_answers_and_accounts_are_kept_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is killed between the two has not answered, and pays when it does."""
    task = Task(2, 0, 0.1, False, ())
    kept = Releases(tmp_path / "run.json", budget(tmp_path, "aa", 1))
    with monkeypatch.context() as killed:
        killed.setattr(Budget, "spend", lambda self, number: (_ for _ in ()).throw(SystemExit))
        with pytest.raises(SystemExit):
            kept.note(task, b"state", REPORT)
    assert Accounts(tmp_path).all() == []
    again = Releases(tmp_path / "run.json", budget(tmp_path, "aa", 1))
    assert again.again(task, b"state") is not None
    assert [account.rounds for account in Accounts(tmp_path).all()] == [1]
    # Without the answer nobody draws a second one.
    (tmp_path / "run.json").unlink()
    lost = Releases(tmp_path / "run.json", budget(tmp_path, "aa", 1))
    with pytest.raises(SpentError, match=r"Round 3 was answered before"):
        lost.again(task, b"state")
    assert lost.again(Task(3, 0, 0.1, False, ()), b"state") is None


def test_accounts_are_on_disk_before_they_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    write, names = budgets.write_bytes, budgets.keep_names

    def written(path: Path, data: bytes) -> None:
        done.append(path.name)
        write(path, data)

    def kept(folder: Path) -> None:
        done.append("names")
        names(folder)

    monkeypatch.setattr(budgets, "write_bytes", written)
    monkeypatch.setattr(budgets, "keep_names", kept)
    mine = budget(tmp_path / "privacy", "aa", 1)
    mine.spend(0)
    assert done[-3:] == [f"{name_of(rows(1))}.rows", "spent.json", "names"]
    assert (tmp_path / "privacy").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"accounts": [{}]}',
        '{"accounts": 3}',
        '{"accounts": [{"run": "aa", "rows": "../../x", "rounds": 1, "last": 0, '
        '"epsilon": 1.0, "delta": 0.0, "day": ""}]}',
        '{"accounts": [{"run": "aa", "rows": "' + 32 * "0" + '", "rounds": 1, "last": 0, '
        '"epsilon": -1.0, "delta": 0.0, "day": ""}]}',
        '{"accounts": [{"run": "aa", "rows": "' + 32 * "0" + '", "rounds": 1, "last": 0, '
        '"epsilon": NaN, "delta": 0.0, "day": ""}]}',
    ],
)
def test_a_damaged_file_is_a_refusal(tmp_path: Path, content: str) -> None:
    mine = budget(tmp_path, "aa", 1, most=5.0)
    mine.spend(0)
    (tmp_path / "spent.json").write_text(content, encoding="utf-8")
    for act in (lambda: mine.check(1), lambda: mine.check_round(1), lambda: mine.spend(1)):
        with pytest.raises(FedForwardError, match=r"spent.json cannot be read"):
            act()
    (tmp_path / "spent.json").unlink()
    with pytest.raises(FedForwardError, match=r"spent.json is gone"):
        mine.check(1)


def test_rows_that_are_gone_or_others_are_a_refusal(tmp_path: Path) -> None:
    budget(tmp_path, "aa", 1).spend(0)
    other = budget(tmp_path, "bb", 1, most=5.0)
    (file,) = tmp_path.glob("*.rows")
    file.write_bytes(rows(2).tobytes())
    with pytest.raises(FedForwardError, match=r"\.rows is damaged"):
        other.check(1)
    file.unlink()
    with pytest.raises(FedForwardError, match=r"\.rows cannot be read"):
        other.check(1)


def test_rows_are_known_by_content_and_not_by_file(tmp_path: Path) -> None:
    given = [{"q": "one", "n": 1}, {"q": "two", "n": 2}, {"q": "two", "n": 2}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in given), "utf-8")
    (tmp_path / "b.csv").write_text("n,q\n2,two\n1,one\n", "utf-8")
    one, other = (
        fingerprints([find(str(tmp_path / name), key="data.source")])
        for name in ("a.jsonl", "b.csv")
    )
    assert len(one) == 2 and one.tolist() == other.tolist()
    assert fingerprint({"q": "one", "n": 2}) not in one.tolist()
