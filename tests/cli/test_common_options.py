"""What all commands share: groups, a light `--help`, -v and -q, JSON alone on standard output."""

import io
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from rich.console import Console

from fedforward import __version__
from fedforward.cli import console
from fedforward.cli.main import GROUPS
from fedforward.training import run_directory
from tests.support.command_line import command, write_config

COMMANDS = [name for commands in GROUPS.values() for name in commands]
HEAVY = ("torch", "transformers", "datasets", "numba", "flwr", "matplotlib", "pydantic")


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print('heavy:', [m for m in {HEAVY} if m in sys.modules]))\n"
        "from fedforward.cli.main import main\n"
        "main()\n"
    )
    line = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("heavy: []\n")


def test_help_lists_the_commands_in_groups() -> None:
    lines = command("--help").out.splitlines()
    places = {name: i for i, line in enumerate(lines) for name in GROUPS if f"─ {name} ─" in line}
    assert list(places) == list(GROUPS)
    ends = [*list(places.values())[1:], len(lines)]
    for (group, commands), end in zip(GROUPS.items(), ends, strict=True):
        inside = [line.split()[1] for line in lines[places[group] : end] if len(line.split()) > 2]
        assert [name for name in inside if name in COMMANDS] == list(commands)
    assert not any(line.split()[1:2] == ["letter"] for line in lines)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_the_common_options(name: str) -> None:
    text = command(name, "--help").out
    assert "--verbose" in text and "-v" in text and "--quiet" in text and "-q" in text


def test_python_m(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "fedforward.cli", "status", str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and not done.stdout


def test_the_version_needs_no_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", version)
    assert command("--version").out == f"fedforward {__version__}\n"
    packages = run_directory.environment()["packages"]
    assert packages["fedforward"] == __version__ and packages["torch"] is None


def test_the_old_name_of_a_command_names_the_new_one() -> None:
    command("letter", "a", "b").refused("Type: fedforward inspect-message a b")


def test_quiet_and_verbose_exclude_each_other(tmp_path: Path) -> None:
    command("status", tmp_path, "-v", "-q").refused("-v and -q exclude each other")


def test_an_error_has_its_traceback_with_v_alone(tmp_path: Path) -> None:
    shown = command("status", tmp_path, "-v")
    assert shown.code == 2
    assert "Traceback" in shown.error and "FedForwardError" in shown.error
    message = command("status", tmp_path).refused("has no status")
    assert shown.error.endswith(f"error:{message}")
    command("status", tmp_path, "-q").refused("has no status")


def test_what_standard_error_shows_of_a_run(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    shown = {
        option: command(
            "run", config, "--out", tmp_path / f"run{option}", "--json", *option.split()
        )
        for option in ("", "-q", "-v")
    }
    for option, result in shown.items():
        assert result.code == 0, result
        assert json.loads(result.out)["rounds"] == 2, option
    assert shown["-q"].error == ""
    assert "reading the data\n" in shown[""].error and "round 2/2  training" in shown[""].error
    assert "fedforward." not in shown[""].error
    assert "fedforward.cli.console: reading the data: " in shown["-v"].error
    assert "fedforward.cli.console: round 1: {'round': 1, " in shown["-v"].error
    result = command("verify", tmp_path / "run", "-q")
    assert result.error == "" and result.out.startswith("bit-identical: 2 rounds")


def test_records_of_the_package_are_shown_by_level(capsys: pytest.CaptureFixture[str]) -> None:
    wanted = {
        (False, False): "site a: takes part\nwarning: [w]\nerror: e\n",
        (False, True): "error: e\n",
        (True, False): "fedforward.x: d\ni\nsite a: takes part\nwarning: [w]\nerror: e\n",
    }
    package = console.log.parent
    assert package is not None and package.parent is not None
    for (verbose, quiet), text in wanted.items():
        console.set_up_logging(verbose=verbose, quiet=quiet)
        log = console.logging.getLogger("fedforward.x")
        log.debug("d")
        log.info("i")
        console.deployment_log.info("site %s: takes part", "a")
        log.warning("[w]")
        log.error("e")
        captured = capsys.readouterr()
        assert (captured.err, captured.out) == (text, "")
    console.set_up_logging(verbose=False, quiet=False)


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for quiet in (False, True):
        console.set_up_logging(verbose=False, quiet=quiet)
        screen = io.StringIO()
        terminal = Console(file=screen, force_terminal=True, width=100)
        monkeypatch.setattr(console, "console", terminal)
        with console.display("rebuilding [from] base") as shown:
            shown.count(1, 2)
            shown.rich.refresh()
        text = screen.getvalue()
        assert ("rebuilding [from] base" in text and "━" in text) is not quiet
        assert (text == "") is quiet
    console.set_up_logging(verbose=False, quiet=False)
