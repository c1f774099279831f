"""The public keys of the sites that are let in: those in the server's folder, at any time.

The engine is told of each, by Flower's command line, and the reverse proxy asks here.
"""

import hashlib
import logging
import os
import time
from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from fedforward.core.errors import FedForwardError
from fedforward.core.files import read_object
from fedforward.deployment.flower import engine
from fedforward.deployment.flower.site_auth import PublicKeys, read_public_key
from fedforward.training.run_directory import write_json

LOGGER = logging.getLogger("fedforward.deployment.server")
#: Seconds after which a key that was not taken is tried again.
RETRY_KEY_S = 60.0


@dataclass(frozen=True)
class _KeyFile:
    """A `.pub` that was found: where, its SHA-256, and what Flower sends of the key in it."""

    path: Path
    fingerprint: str
    public: tuple[bytes, ec.EllipticCurvePublicKey] | None


class SiteKeys:
    """See the module.

    Attributes:
        known: what the engine was told, by the sites' names: fingerprints and node numbers.
    """

    def __init__(self, tls: Path | None, record: Path, flower: engine.CommandLine) -> None:
        """`record` is a file with what the engine was told by a server before this one.

        Raises:
            FedForwardError: the file is there and says nothing of the kind.
        """
        self.folder = None if tls is None else tls / "sites"
        self.record = record
        self.flower = flower
        self.known: dict[str, dict[str, Any]] = {}
        if record.is_file():
            self.known = _read_record(record)
        self._found: dict[str, _KeyFile] = {}
        self.complaints: dict[tuple[str, str], str] = {}
        self.tried: dict[tuple[str, str], float] = {}

    @property
    def public(self) -> PublicKeys | None:
        """Keys that are there and that the engine knows; None where nobody needs one."""
        if self.folder is None:
            return None
        return dict(
            file.public
            for name, file in self._found.items()
            if file.public is not None and self._registered(name) == file.fingerprint
        )

    @property
    def names(self) -> dict[str, str]:
        """Names of the sites, by the public key as Flower's header has it."""
        return {
            b64encode(file.public[0]).decode(): name
            for name, file in self._found.items()
            if file.public is not None
        }

    def _registered(self, name: str) -> str:
        return str(self.known[name]["key"]) if name in self.known else ""

    def look(self) -> None:
        """Let in new keys, and no longer those that are gone or were replaced.

        Raises:
            OSError: the folder cannot be looked at; nothing was changed.
        """
        if self.folder is None or not self.folder.is_dir():
            return
        self._found = found = self._read(self.folder)
        for name in list(self.known):
            if name not in found or found[name].fingerprint != self._registered(name):
                self._take_away(name)
        now = time.monotonic()
        new = {
            name: file.path
            for name, file in found.items()
            if name not in self.known
            and now - self.tried.get((name, file.fingerprint), -RETRY_KEY_S) >= RETRY_KEY_S
        }
        self.tried |= {(name, found[name].fingerprint): now for name in new}
        self._let_in(new)

    def _take_away(self, name: str) -> None:
        try:
            self.flower.unregister(self.known[name]["node"])
        except FedForwardError as error:
            # The engine lets it in until it has worked; the next look tries again.
            self._complain(name, "", f"its key cannot be taken away: {error}")
            return
        LOGGER.info(f"site {name}: its key was taken away")
        del self.known[name]
        self._save()

    def _let_in(self, new: dict[str, Path]) -> None:
        try:
            nodes = self.flower.register(new)
        except FedForwardError as error:
            nodes = {name: str(error) for name in new}
        for name, node in nodes.items():
            fingerprint = self._found[name].fingerprint
            if isinstance(node, str):
                self._complain(name, fingerprint, f"its key {new[name]} is not taken: {node}")
            else:
                self.known[name] = {"key": fingerprint, "node": node}
        if nodes:
            self._save()

    def _read(self, folder: Path) -> dict[str, _KeyFile]:
        """The public keys that are there, by name; one that cannot be read stays as it was.

        Raises:
            OSError: the folder cannot be listed. `Path.glob` would say that it is empty.
        """
        found = {}
        for path in sorted(folder / name for name in os.listdir(folder)):  # noqa: PTH208
            name = path.stem
            if path.suffix != ".pub":
                continue
            try:
                content = path.read_bytes()
            except OSError as error:
                self._complain(name, "", f"its key {path} cannot be read: {error.strerror}")
                if name in self._found and not isinstance(error, FileNotFoundError):
                    found[name] = self._found[name]
                continue
            fingerprint = hashlib.sha256(content).hexdigest()
            found[name] = _KeyFile(path, fingerprint, read_public_key(content))
        return found

    def _complain(self, name: str, key: str, words: str) -> None:
        """Say what is wrong with a site's key, once."""
        if self.complaints.get((name, key)) != words:
            self.complaints[name, key] = words
            LOGGER.info(f"site {name}: {words}")

    def _save(self) -> None:
        write_json(self.record, self.known)


def _read_record(path: Path) -> dict[str, dict[str, Any]]:
    advice = (
        "It says which keys the engine knows. Restore it from a copy, or remove the folder "
        f"{path.parent.name}/ while no server runs: keys are then told anew, and the run goes on."
    )
    content = read_object(path, advice)
    for site in content.values():
        if not isinstance(site, dict) or not isinstance(site.get("key"), str):
            break
        if type(site.get("node")) is not int:
            break
    else:
        return content
    raise FedForwardError(f"{path} is damaged: it holds no keys with their nodes. {advice}")
