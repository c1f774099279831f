"""A federation whose processes are killed at random instants, and a run that nothing disturbs."""

import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from fedforward.config.template import toml_value
from fedforward.demo.text import ANSWER, PROMPT
from tests.conftest import DEMO_MODEL
from tests.faults import processes
from tests.support.coordinator import PARTS, ROWS, rounds

NAMES = "abc"
#: All three sites are in every round, so that a round is the same whoever was killed in it.
CONTENT: dict[str, Any] = {
    "federation__quorum": 3,
    "federation__rounds": 12,
    "method__name": "decomfl",
    "run__evaluate_every": 4,
}


def site_toml(folder: Path, name: str) -> Path:
    """The file of a site with its own rows."""
    source = folder / f"{name}.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in PARTS[name]), encoding="utf-8")
    content: dict[str, dict[str, Any]] = {
        "site": {"name": name, "out": str(folder / name)},
        "model": {"path": str(DEMO_MODEL)},
        "data": {"source": str(source)},
        "run": {"threads": 1, "device": "cpu"},
        "limits": {"fields": list(ROWS[0]), "heldout": 1, "terms": 10_000},
    }
    path = folder / f"{name}.toml"
    path.write_text(
        "".join(
            f"[{section}]\n" + "".join(f"{key} = {toml_value(v)}\n" for key, v in part.items())
            for section, part in content.items()
        ),
        encoding="utf-8",
    )
    return path


class Federation:
    """Three sites and a coordinator, each a process.

    Attributes:
        killed: living processes that were killed, by kind.
        ends: exit codes of coordinators that ended by themselves.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.chance = random.Random(seed)
        self.sockets = folder / "sockets"
        self.sockets.mkdir(parents=True)
        self.settings = {name: site_toml(folder, name) for name in NAMES}
        self.sites: dict[str, BaseProcess] = {}
        self.killed = {"server": 0, "site": 0}
        self.ends: list[int] = []
        self._context = processes.context()

    def start_site(self, name: str) -> None:
        socket, log = self.sockets / f"{name}.socket", self.folder / f"{name}.log"
        made = self._context.Process(
            target=processes.site, args=(self.settings[name], socket, log), daemon=True
        )
        made.start()
        self.sites[name] = made

    def start_server(self, out: Path) -> BaseProcess:
        made = self._context.Process(
            target=processes.server,
            args=(CONTENT, out, self.sockets, self.folder / "server.log"),
            daemon=True,
        )
        made.start()
        return made

    def kill_site(self, name: str) -> None:
        self.killed["site"] += processes.kill(self.sites[name])
        # The engine would see that it is gone.
        (self.sockets / f"{name}.socket").unlink(missing_ok=True)

    def run(self, out: Path, kills: dict[str, int]) -> None:
        """One run to its end, in which so many processes of each kind are killed, if it lasts."""
        server = self.start_server(out)
        goals = {kind: self.killed[kind] + count for kind, count in kills.items()}
        last = time.monotonic() + 600
        while True:
            assert time.monotonic() < last, "the run does not end"
            # Most instants are in rounds; some are in the start of a process.
            time.sleep(self.chance.choice([0.02, 0.3, 1.0]) * self.chance.random() + 0.005)
            if not server.is_alive():
                self.ends.append(processes.ended(server))
                if self.ends[-1] == 0:
                    return
                assert self.ends[-1] == processes.SENTENCE, self.log()
                server = self.start_server(out)
            due = [kind for kind, goal in goals.items() if self.killed[kind] < goal]
            if not due:
                server.join(300)
                continue
            if self.chance.choice(due) == "server":
                self.killed["server"] += processes.kill(server)
                server = self.start_server(out)
            else:
                name = self.chance.choice(NAMES)
                self.kill_site(name)
                time.sleep(0.2 * self.chance.random())
                self.start_site(name)

    def log(self) -> str:
        """The ends of all logs."""
        parts = [path.read_text(errors="replace")[-2000:] for path in self.folder.glob("*.log")]
        return "\n".join(parts)

    def close(self) -> None:
        for process in self.sites.values():
            processes.kill(process)


@contextmanager
def federation(folder: Path, seed: int) -> Iterator[Federation]:
    """Sites that are there, and are gone at the end."""
    made = Federation(folder, seed)
    try:
        for name in NAMES:
            made.start_site(name)
        yield made
    finally:
        made.close()


def result(out: Path) -> tuple[Any, ...]:
    """What must be the same however often processes were killed."""
    summary = processes.read(out / "summary.json")
    return summary["rounds"], summary["state_digest"], rounds(out / "ledger.sqlite", proofs=False)


def simulated(folder: Path) -> dict[str, Any]:
    """The configuration of a simulated run with two clients."""
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:24]), encoding="utf-8")
    return {
        "model": {"path": str(DEMO_MODEL)},
        "lora": {"rank": 2},
        "data": {
            "source": str(source),
            "prompt": PROMPT,
            "answer": ANSWER,
            "heldout": 4,
            "sequence_length": 64,
        },
        "federation": {"clients": 2, "rounds": 25},
        "method": {"learning_rate": 3e-3, "mu": 1e-2, "local_steps": 1, "batch_size": 1},
        "run": {"evaluate_every": 5, "threads": 1},
    }
