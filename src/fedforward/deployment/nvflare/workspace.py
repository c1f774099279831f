"""FLARE's workspaces and programs as this project starts them.

A workspace belongs to a run or to a site, and has FLARE's jobs and logs. Its `startup` and `local`
are copies of the kit's, so that filters and authorisation hold that an operator has put there.
`local` has what this package needs beside them.
"""

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedforward.core.errors import FedForwardError
from fedforward.deployment.nvflare.job import ALLOWED
from fedforward.deployment.supervisor import Child

#: The file in `startup` that tells what a kit is for.
SERVER, CLIENT, ADMIN = "fed_server.json", "fed_client.json", "fed_admin.json"
_PROGRAMS = {
    SERVER: "nvflare.private.fed.app.server.server_train",
    CLIENT: "nvflare.private.fed.app.client.client_train",
}
#: Seconds after which FLARE's server forgets a site that it does not hear of.
HEARTBEAT_TIMEOUT_S = 60
_STREAMERS = ("site_log_streamer", "log_receiver")


def check_kit(folder: Path, file: str, option: str) -> dict[str, Any]:
    """The configuration in a startup kit.

    Args:
        file: in `startup`, which tells what the kit is for.
        option: how the user gave the folder.

    Raises:
        FedForwardError: the folder is no such kit.
    """
    path = folder / "startup" / file
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    except (OSError, ValueError):
        pass
    raise FedForwardError(
        f"{option}: {path} is missing or no JSON. The folder must be a FLARE startup kit, as "
        "`fedforward certs FOLDER --runtime nvflare` or `nvflare provision` makes them."
    )


def prepare(kit: Path, workspace: Path) -> None:
    """Make a workspace of a kit, or bring one up to date.

    Raises:
        FedForwardError: the kit's `local` folder cannot be used.
    """
    workspace.mkdir(mode=0o700, parents=True, exist_ok=True)
    (workspace / "transfer").mkdir(exist_ok=True)
    for name in ("startup", "local"):
        # A link will not do: FLARE looks for its files in real folders.
        shutil.rmtree(workspace / name, ignore_errors=True)
        shutil.copytree(kit / name, workspace / name)
    local = workspace / "local"
    file = local / "resources.json"
    source = file if file.is_file() else local / "resources.json.default"
    try:
        resources = json.loads(source.read_text(encoding="utf-8"))
        _change(resources, workspace)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FedForwardError(
            f"{kit / 'local' / source.name} cannot be used: {error}. It is FLARE's; restore it "
            "from the kit."
        ) from error
    file.write_text(json.dumps(resources, indent=2) + "\n", encoding="utf-8")


def _change(resources: dict[str, Any], workspace: Path) -> None:
    """Allow this package's classes, send no logs, and keep jobs in the workspace."""
    allowed = resources.setdefault("class_allow_list", [])
    if "*" not in allowed and ALLOWED not in allowed:
        allowed.append(ALLOWED)
    if "client" in resources:
        resources["allow_log_streaming"] = False
    for server in resources.get("servers", []):
        server["heart_beat_timeout"] = HEARTBEAT_TIMEOUT_S
    components = [c for c in resources["components"] if c.get("id") not in _STREAMERS]
    resources["components"] = components
    for component in components:
        if component.get("id") == "job_manager":
            component["args"]["uri_root"] = str(workspace.absolute() / "jobs")
    if storage := resources.get("snapshot_persistor"):
        storage["args"]["storage"]["args"]["root_dir"] = str(workspace.absolute() / "snapshots")


def target(kit: dict[str, Any], folder: Path) -> str:
    """HOST:PORT that a kit of a server or a site is made for.

    Raises:
        FedForwardError: it does not say.
    """
    try:
        found = str(kit["servers"][0]["service"]["target"])
        int(found.rpartition(":")[2])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise FedForwardError(
            f"{folder / 'startup'} does not say which server it is for. Make the kit again."
        ) from error
    return found


def subject(kit: Path, certificate: str) -> tuple[str, str]:
    """Name and organisation in a kit's certificate, which FLARE knows a participant by.

    Raises:
        FedForwardError: it cannot be read.
    """
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    path = kit / "startup" / certificate
    try:
        names = x509.load_pem_x509_certificate(path.read_bytes()).subject
        found = [
            str(names.get_attributes_for_oid(oid)[0].value)
            for oid in (NameOID.COMMON_NAME, NameOID.ORGANIZATION_NAME)
        ]
    except (OSError, ValueError, IndexError) as error:
        raise FedForwardError(
            f"{path} is missing or no certificate of FLARE's. Ask the operator for the kit again."
        ) from error
    return found[0], found[1]


def child(
    name: str,
    workspace: Path,
    file: str,
    log: Path,
    environment: Mapping[str, str],
    on_line: Callable[[str], None] | None = None,
) -> Child:
    """FLARE's server or client in a prepared workspace, to be started.

    Args:
        name: what it is called to people.
        file: `SERVER` or `CLIENT`.
        log: file for what it prints.
    """
    certificate = "server.crt" if file == SERVER else "client.crt"
    site, organisation = subject(workspace, certificate)
    settings = ["secure_train=true", f"org={organisation}", "config_folder=config"]
    if file == CLIENT:
        settings.append(f"uid={site}")
    command = [sys.executable, "-u", "-m", _PROGRAMS[file], "-m", str(workspace.absolute())]
    return Child(name, [*command, "-s", file, "--set", *settings], log, environment, on_line)
