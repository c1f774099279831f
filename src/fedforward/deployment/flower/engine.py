"""Flower's programs as this project starts them: environment, commands, and an app to submit."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from fedforward.config.schema import Config
from fedforward.config.template import toml_value
from fedforward.core.errors import FedForwardError
from fedforward.deployment.supervisor import UTF8

#: The name under which Flower's command line knows our engine.
CONNECTION = "fedforward"
#: Seconds for a command of Flower's command line.
TIMEOUT_S = 60.0
_APPS = ("server_app", "client_app")
#: Releases of Flower whose messages between its programs are known: `1.41.0` and on.
_RELEASES = "1.41."


def check_installed() -> None:
    """Refuse to go on without Flower.

    Raises:
        FedForwardError: it is not installed, or another release of it.
    """
    try:
        import flwr  # noqa: F401
    except ImportError as error:
        raise FedForwardError(
            "Federations across machines run on Flower, which is not installed. Install it with: "
            "pip install 'fedforward[flower]'"
        ) from error
    found = version("flwr")
    if not found.startswith(_RELEASES):
        raise FedForwardError(
            f"Flower {found} is installed, and this release of fedforward goes with "
            f"{_RELEASES}*. Install it with: pip install 'fedforward[flower]'"
        )


def program(name: str) -> str:
    """The path of one of Flower's programs, the one beside this Python first."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise FedForwardError(
            f"{name} is not found, though Flower is installed. Install it again with: "
            "pip install 'fedforward[flower]'"
        )
    return found


def environment(home: Path) -> dict[str, str]:
    """What all of Flower's processes are started with: a home of their own, nothing sent home."""
    return {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.3",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PYTHONUNBUFFERED": "1",
        # They start one another by name.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        # A proxy between a site and its server would see only refusals; the loopback needs none.
        "NO_PROXY": os.pathsep.join(["127.0.0.1", "localhost"]).replace(os.pathsep, ","),
    }


class CommandLine:
    """Flower's command line, pointed at one engine."""

    def __init__(self, home: Path, address: str, authority: Path | None) -> None:
        """`authority`: the certificate that the engine's is checked with; None is plaintext."""
        self.home = home
        lines = [f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]']
        lines.append(f'address = "{address}"')
        if authority is None:
            lines.append("insecure = true")
        else:
            lines.append(f"root-certificates = {toml_value(str(authority.absolute()))}")
        (home / "config.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def carry_out(self, commands: Sequence[Sequence[str]]) -> list[dict[str, object] | str]:
        """The JSON that each command prints, or what it said where it failed.

        Raises:
            FedForwardError: they did not end in time.
        """
        program = [sys.executable, "-m", "fedforward.deployment.flower.commands"]
        timeout_s = TIMEOUT_S + len(commands)
        try:
            done = subprocess.run(
                program,
                input=json.dumps([[*command, "--format", "json"] for command in commands]),
                env={**os.environ, **UTF8, **environment(self.home)},
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=timeout_s,
                start_new_session=True,
                check=False,
            )
            results = json.loads(done.stdout)
        except subprocess.TimeoutExpired as error:
            raise FedForwardError(
                f"`flwr {' '.join(commands[0])}` did not end within {timeout_s:.0f} s."
            ) from error
        except ValueError:
            results = [{"out": "", "error": done.stderr, "code": 1} for _ in commands]
        return [_printed(**result) for result in results]

    def __call__(self, *arguments: str) -> dict[str, object]:
        """The JSON that a command prints.

        Raises:
            FedForwardError: it failed, with what it said.
        """
        (answer,) = self.carry_out([arguments])
        if isinstance(answer, str):
            raise FedForwardError(f"`flwr {' '.join(arguments)}` failed: {answer}")
        return answer

    def register(self, public_keys: Mapping[str, Path]) -> dict[str, int | str]:
        """Let in whoever has these keys; returns the nodes' numbers, or what went wrong."""
        commands = [
            ("supernode", "register", str(path), CONNECTION, "--name", name)
            for name, path in public_keys.items()
        ]
        answers = self.carry_out(commands) if commands else []
        return {
            name: answer if isinstance(answer, str) else int(str(answer["node-id"]))
            for name, answer in zip(public_keys, answers, strict=True)
        }

    def unregister(self, node: int) -> None:
        """No longer let in a node."""
        self("supernode", "unregister", str(node), CONNECTION)

    def submit(self, app: Path) -> str:
        """Start a run of an app; returns its number."""
        return str(self("run", str(app), CONNECTION)["run-id"])

    def stop(self, run: str) -> None:
        """End a run, if it has not ended."""
        self("stop", run, CONNECTION)


def _printed(out: str, error: str, code: int) -> dict[str, object] | str:
    """What a command printed as JSON, or in words why it failed."""
    begin = out.find("{")
    try:
        content = json.loads(out[begin:]) if begin >= 0 else {}
    except ValueError:
        content = {}
    if code or not content.get("success", True):
        said = str(content.get("error-message") or error or out).splitlines()
        words = [line.strip() for line in said if "Using SuperLink" not in line]
        return " ".join(words).strip() or "no reason given"
    return dict(content)


def write_app(folder: Path, config: Config, out: Path) -> Path:
    """An app for Flower that carries out a run; everything in it is from the installed package."""
    from fedforward.deployment.flower.server_app import run_config

    package = folder / "fedforward_app"
    package.mkdir(parents=True, exist_ok=True)
    settings = {"out": str(out.absolute()), **run_config(config)}
    (folder / "pyproject.toml").write_text(
        "\n".join(
            [
                "[project]",
                'name = "fedforward-app"',
                'version = "1.0.0"',
                'description = "Federated fine-tuning with forward passes only."',
                'license = "Apache-2.0"',
                "dependencies = []",
                "",
                "[tool.flwr.app]",
                'publisher = "fedforward"',
                "",
                "[tool.flwr.app.components]",
                *(f'{name.replace("_", "")} = "fedforward_app.{name}:{name}"' for name in _APPS),
                "",
                "[tool.flwr.app.config]",
                *(f"{key} = {toml_value(value)}" for key, value in settings.items()),
                "",
            ]
        ),
        encoding="utf-8",
    )
    (package / "__init__.py").write_text("", encoding="utf-8")
    for name in _APPS:
        # Of the two, only the server's needs the configuration, the planner and the ledger.
        text = f'from fedforward.deployment.flower.{name} import {name}\n\n__all__ = ["{name}"]\n'
        (package / f"{name}.py").write_text(text, encoding="utf-8")
    return folder


def hand_over(config: Config, out: Path, address: str, authority: Path | None) -> str:
    """Submit a run to an engine that others operate; returns the engine's number for it.

    Args:
        out: the run directory, on the machine on which the engine runs server apps.
        authority: the certificate that the engine's is checked with; None is plaintext.
    """
    with tempfile.TemporaryDirectory(prefix="fedforward-") as folder:
        home = Path(folder)
        app = write_app(home / "app", config, out)
        return CommandLine(home, address, authority).submit(app)


def superlink(port: int, database: Path, secret: Path, certificates: Path | None) -> Sequence[str]:
    """The command of the engine, on the loopback device."""
    command = [program("flower-superlink"), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--database", str(database), "--isolation", "process"]
    command += ["--superexec-auth-secret-file", str(secret)]
    command += ["--disable-runtime-dependency-installation"]
    if certificates is None:
        return [*command, "--insecure"]
    files = {"certfile": "server.crt", "keyfile": "server.key", "ca-certfile": "ca.crt"}
    for option, name in files.items():
        command += [f"--ssl-{option}", str(certificates / name)]
    return [*command, "--enable-supernode-auth"]


def superexec(port: int, secret: Path, certificates: Path | None) -> Sequence[str]:
    """The command of what starts the server app."""
    command = [program("flower-superexec"), "--runtime-api-address", f"127.0.0.1:{port}"]
    command += ["--superexec-auth-secret-file", str(secret)]
    if certificates is None:
        return [*command, "--insecure"]
    return [*command, "--root-certificates", str(certificates / "ca.crt")]


def supernode(
    server: str, port: int, authority: Path | None, key: Path | None, secret: Path
) -> Sequence[str]:
    """The command of a site's connection to the server.

    Args:
        secret: a file; whoever has it can take the site's tasks, at `port` of the loopback.
    """
    command = [program("flower-supernode"), "--superlink", server, "--port", str(port)]
    command += ["--isolation", "process", "--superexec-auth-secret-file", str(secret)]
    if authority is None:
        command.append("--insecure")
    else:
        command += ["--root-certificates", str(authority)]
    if key is not None:
        command += ["--auth-supernode-private-key", str(key)]
    return command


def executor(port: int, secret: Path, socket: Path, home: Path, log: Path) -> Sequence[str]:
    """The command of what takes a SuperNode's tasks to the model server; `log` is that one's."""
    command = [sys.executable, "-m", "fedforward.deployment.flower.executor"]
    return [*command, f"127.0.0.1:{port}", str(secret), str(socket), str(home), str(log)]
