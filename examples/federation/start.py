"""A server and three sites on one machine, with TLS and keys, each with its own data.

    python examples/federation/start.py [FOLDER]

FOLDER (default `runs/federation`) gets the four configurations from beside this file, invented
data, the demonstration model, certificates and keys; then five commands run in it, which are
printed and can as well be typed in terminals of their own. Ctrl-C stops everything; the same
command goes on from the last round.
"""

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from importlib.resources import as_file, files
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedforward.demo.text import site_examples

HERE = Path(__file__).parent
SITES = {"museum": "cyan", "harbour": "green", "garden": "magenta"}
console = Console(highlight=False)


def prepare(folder: Path) -> None:
    """Write what is missing of the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("run", *SITES):
        shutil.copy(HERE / f"{name}.toml", folder)
    with as_file(files("fedforward.demo").joinpath("model")) as model:
        shutil.copytree(model, folder / "model", dirs_exist_ok=True)
    rows = site_examples(seed=0, per_site=200)
    for name in SITES:
        own = [row for row in rows if row["site"] == name]
        if name == "harbour":
            own = [{"asked": row["question"], "record": row["answer"]} for row in own]
        text = "".join(json.dumps(row) + "\n" for row in own)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command(*arguments: str) -> list[str]:
    """Show a command as one types it, and make it for a process."""
    console.print(f"[bold]$ fedforward {escape(' '.join(arguments))}[/bold]", soft_wrap=True)
    return [sys.executable, "-m", "fedforward.cli", *arguments]


def start(folder: Path, name: str, colour: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a command in the folder and show what it prints, with its name before each line."""
    process = subprocess.Popen(
        command(*arguments),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )

    def show() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            console.print(f"[{colour}]{name:>8}[/{colour}] {escape(line.rstrip())}")

    threading.Thread(target=show, daemon=True).start()
    return process


def results(folder: Path) -> bool:
    """Show what each site holds; True if all hold the same."""
    table = Table("site", "rounds", "tuned state", "adapter")
    digests = set()
    for name in SITES:
        state = json.loads((folder / name / "state.json").read_text(encoding="utf-8"))
        digests.add(state["digest"])
        table.add_row(
            name, str(state["rounds"]), state["digest"][:16], str(folder / name / "adapter")
        )
    console.print(table)
    return len(digests) == 1


def interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    signal.signal(signal.SIGTERM, interrupt)
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/federation")
    prepare(folder)
    names = [option for name in SITES for option in ("--site", name)]
    subprocess.run(command("certs", "certs", "--host", "localhost", *names), cwd=folder, check=True)
    port = free_port()
    tls = ("--tls", "certs")
    processes = []
    try:
        server = start(
            folder,
            "server",
            "yellow",
            *("server", "run.toml", "--listen", f"127.0.0.1:{port}", *tls),
            *("--out", "server", "--resume"),
        )
        processes.append(server)
        for name, colour in SITES.items():
            key = f"certs/sites/{name}.key"
            where = ("--server", f"localhost:{port}", *tls, "--key", key, "--once")
            processes.append(start(folder, name, colour, "client", f"{name}.toml", *where))
        if server.wait():
            return 1
        # If the run was over before, no site hears of its end.
        last = time.monotonic() + 30
        while time.monotonic() < last and any(process.poll() is None for process in processes):
            time.sleep(0.5)
    except KeyboardInterrupt:
        # The terminal has told the others as well.
        return 130
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait()
    return 0 if results(folder) else 1


if __name__ == "__main__":
    sys.exit(main())
