"""FLARE's startup kits for a federation that has no FLARE of its own yet.

FLARE's provisioning makes them: certificates of one authority, addresses and signatures. A folder
has `server/` and `admin/` (both stay), and `sites/NAME/` for each site, which goes there.
`fedforward/` has the authority, with which more sites are added.
"""

import io
import json
import re
import shutil
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from fedforward.core.errors import FedForwardError

#: Of FLARE's project, and of the organisation of all of its participants.
PROJECT = "fedforward"
#: Who submits the jobs of `fedforward server`.
ADMIN = "operator@fedforward.invalid"
#: The port that sites reach the server by, where `--host` has none.
DEFAULT_PORT = 9400
#: Days that the authority's certificate is good for.
ROOT_DAYS = 825
#: What FLARE lets a site be called.
SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
_RESERVED = ("server", "admin")
_PARTICIPANTS = "participants.json"


class _Collected:
    """Takes what FLARE's provisioning says, which else goes to the terminal."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def info(self, text: str) -> None:
        pass

    debug = warning = info

    def error(self, text: str) -> None:
        self.errors.append(text)


def address(host: str) -> tuple[str, int]:
    """HOST or HOST:PORT, as a server's name and port.

    Raises:
        FedForwardError: it is neither.
    """
    name, colon, port = host.partition(":")
    number = int(port) if re.fullmatch(r"\d{1,5}", port) else 0
    if not _HOST.fullmatch(name) or (colon and not 0 < number < 65536):
        raise FedForwardError(
            f"--host {host!r} is not allowed: it must be the one name that sites reach the server "
            "by, as in fed.example.org or fed.example.org:9400."
        )
    return name, number or DEFAULT_PORT


def make(folder: Path, hosts: Sequence[str], sites: Sequence[str]) -> list[Path]:
    """Make what is missing of the kits; returns the folders that were written.

    Args:
        folder: for all kits.
        hosts: the server's name, with or without a port; none where the folder has kits already.
        sites: names of sites.

    Raises:
        FedForwardError: a name is not allowed, there is no host or another one, or FLARE failed.
    """
    for name in sites:
        if not SITE_NAME.fullmatch(name) or name in _RESERVED:
            raise FedForwardError(
                f"--site {name!r} is not allowed: FLARE takes at most 32 letters, digits, '_' or "
                "'-', the first a letter or digit; 'server' and 'admin' are taken."
            )
    if folder.is_file():
        raise FedForwardError(f"{folder} is a file. Give a folder, or the name of a new one.")
    known = _participants(folder)
    if len(hosts) > 1:
        raise FedForwardError("Give one --host: FLARE's sites reach the server by one name.")
    if hosts:
        host, port = address(hosts[0])
        if known is not None and (host, port) != (known["host"], known["port"]):
            raise FedForwardError(
                f"{folder} has kits for {known['host']}:{known['port']}, which are signed. Choose "
                f"another folder for {host}:{port}."
            )
    elif known is None:
        raise FedForwardError("--host is missing: the name that sites reach the server by.")
    else:
        host, port = known["host"], known["port"]
    names = [*(known["sites"] if known else []), *sites]
    names = list(dict.fromkeys(names))
    places = {host: folder / "server", ADMIN: folder / "admin"}
    places |= {name: folder / "sites" / name for name in names}
    missing = {name: place for name, place in places.items() if not (place / "startup").is_dir()}
    if not missing:
        return []
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    made = _provision(folder, host, port, names)
    for name, place in missing.items():
        place.parent.mkdir(exist_ok=True)
        shutil.rmtree(place, ignore_errors=True)
        shutil.move(made / name, place)
        place.chmod(0o700)
    shutil.rmtree(made)
    content = {"host": host, "port": port, "sites": names}
    (folder / _PARTICIPANTS).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return list(missing.values())


def _participants(folder: Path) -> dict[str, Any] | None:
    file = folder / _PARTICIPANTS
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return {
            "host": str(content["host"]),
            "port": int(content["port"]),
            "sites": [str(name) for name in content["sites"]],
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FedForwardError(
            f"{file} cannot be read: {error}. It says whom kits were made for; restore it from a "
            "copy, or choose another folder."
        ) from error


def _provision(folder: Path, host: str, port: int, sites: Sequence[str]) -> Path:
    """Have FLARE make the kits of all participants; returns the folder that has them.

    Raises:
        FedForwardError: it could not.
    """
    from nvflare.lighter.constants import ProvisionMode
    from nvflare.lighter.entity import Project, participant_from_dict
    from nvflare.lighter.impl.cert import CertBuilder
    from nvflare.lighter.impl.signature import SignatureBuilder
    from nvflare.lighter.impl.static_file import StaticFileBuilder
    from nvflare.lighter.impl.workspace import WorkspaceBuilder
    from nvflare.lighter.provisioner import Provisioner

    people: list[dict[str, Any]] = [
        {"name": host, "type": "server", "fed_learn_port": port, "admin_port": port},
        *({"name": name, "type": "client", "allow_log_streaming": False} for name in sites),
        {"name": ADMIN, "type": "admin", "role": "project_admin"},
    ]
    project = Project(name=PROJECT, description="", props={"api_version": 3, "name": PROJECT})
    log = _Collected()
    try:
        for person in people:
            project.add_participant(participant_from_dict({**person, "org": PROJECT}))
        builders = [
            WorkspaceBuilder(),
            StaticFileBuilder(config_folder="config"),
            CertBuilder(root_valid_days=ROOT_DAYS),
            SignatureBuilder(),
        ]
        # What goes wrong is printed, with a traceback.
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            context = Provisioner(str(folder), builders).provision(
                project, ProvisionMode.NORMAL, log
            )
    except (ValueError, RuntimeError, OSError) as error:
        log.errors.append(str(error))
    if log.errors:
        raise FedForwardError(f"FLARE could not make the kits in {folder}: {log.errors[0]}")
    # It has the authority's key.
    (folder / PROJECT / "state" / "cert.json").chmod(0o600)
    return Path(context["current_prod_dir"])
