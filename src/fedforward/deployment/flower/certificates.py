"""Certificates and keys for a federation that has no authority of its own.

A folder has `ca.crt` (goes to every site), `ca.key` (stays), `server.crt` and `server.key` (of the
server), and in `sites/` for each site `NAME.key` (goes to that site alone) and `NAME.pub` (stays:
the server lets in whoever has the key to one of these).
"""

import datetime
import ipaddress
import os
import re
import ssl
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedforward.core.errors import FedForwardError

#: Days that the authority and the server's certificate are good for.
DAYS = 825
#: What a site may be called: it becomes a file name, and the name that the server knows it by.
SITE_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,31}")
#: What a host may be called, in a certificate's words.
_HOST = re.compile(r"(\*\.)?([A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?\.)*[A-Za-z0-9_-]{1,63}")
#: Characters of a certificate's common name at most; the host's whole name is beside it.
_COMMON_NAME = 64


def make(folder: Path, hosts: Sequence[str], sites: Sequence[str]) -> list[Path]:
    """Write what is missing of a folder; returns the files that were written.

    Args:
        hosts: names or addresses that sites reach the server by; this machine's own are added.
        sites: names of the sites.

    Raises:
        FedForwardError: a name is not allowed, or the folder has certificates but not the
            authority's key, which new ones must be signed with.
    """
    for name in sites:
        if not SITE_NAME.fullmatch(name):
            raise FedForwardError(
                f"--site {name!r} is not allowed: it must be at most 32 letters, digits, '.', '_' "
                "or '-', and begin with a letter or digit."
            )
    for host in hosts:
        if not _is_host(host):
            raise FedForwardError(
                f"--host {host!r} is not allowed: it must be a name in ASCII letters, as in "
                "fed.example.org, or an address, without a port."
            )
    if folder.is_file():
        raise FedForwardError(f"{folder} is a file. Give a folder, or the name of a new one.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sites").mkdir(exist_ok=True)
    written = []
    if not (folder / "ca.crt").exists():
        key = ec.generate_private_key(ec.SECP384R1())
        written += [
            write_new(folder / "ca.key", _pem(key), secret=True),
            write_new(folder / "ca.crt", _authority(key)),
        ]
    if hosts and not (folder / "server.crt").exists():
        if not (folder / "ca.key").exists():
            raise FedForwardError(
                f"{folder} has ca.crt and no ca.key, which a new server certificate must be signed "
                "with. Bring the key back, or choose another folder."
            )
        issuer, signer = _read_authority(folder)
        key = ec.generate_private_key(ec.SECP384R1())
        written += [
            write_new(folder / "server.key", _pem(key), secret=True),
            write_new(folder / "server.crt", _server(key, hosts, issuer, signer)),
        ]
    for name in sites:
        path = folder / "sites" / f"{name}.key"
        if path.exists():
            continue
        key = ec.generate_private_key(ec.SECP384R1())
        secret = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
        public = key.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
        # The public key first: where there is an old one, nothing must be written.
        beside = write_new(path.with_suffix(".pub"), public)
        written += [write_new(path, secret, secret=True), beside]
    return written


def _is_host(text: str) -> bool:
    """Whether a certificate can name it."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return len(text) <= 253 and _HOST.fullmatch(text) is not None
    return "%" not in text


def _read_authority(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """The authority's certificate and key.

    Raises:
        FedForwardError: they cannot sign.
    """
    try:
        issuer = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
        signer = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
        matching = issuer.public_key() == signer.public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion):
        matching = False
    if not matching or not isinstance(signer, ec.EllipticCurvePrivateKey):
        raise FedForwardError(
            f"{folder}: ca.crt and ca.key cannot sign a new server certificate. They must be an "
            "authority's certificate and its elliptic-curve key in PEM form, without a passphrase."
        )
    return issuer, signer


def _check_authority(folder: Path) -> None:
    """Make sure that connections can be checked with ca.crt."""
    try:
        trust(folder)
    except (OSError, ValueError) as error:
        raise FedForwardError(
            f"--tls {folder}: ca.crt is not a certificate in PEM form that can be used: {error}."
        ) from error


def check_server(folder: Path) -> None:
    """Make sure that a server can use a folder.

    Raises:
        FedForwardError: with the file that is missing or cannot be read.
    """
    _check_no_file(folder)
    for name in ("ca.crt", "server.crt", "server.key"):
        if not (folder / name).is_file():
            raise FedForwardError(
                f"--tls {folder}: there is no {name}. `fedforward certs {folder} --host HOST` "
                "makes what is needed; certificates of your own go under these names."
            )
    _check_authority(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Without a password OpenSSL would ask for one at the terminal.
        context.load_cert_chain(folder / "server.crt", folder / "server.key", password="")
    except (OSError, ValueError) as error:
        raise FedForwardError(
            f"--tls {folder}: server.crt and server.key cannot be used together: {error}."
        ) from error


def _check_no_file(folder: Path) -> None:
    if folder.is_file():
        raise FedForwardError(f"--tls {folder} is a file. Give the folder that it lies in.")


def check_site(folder: Path, key: Path) -> None:
    """Make sure that a site can use an authority's certificate and a key.

    Raises:
        FedForwardError: with the file that is missing or is not what it should be.
    """
    _check_no_file(folder)
    authority = folder / "ca.crt"
    if not authority.is_file():
        raise FedForwardError(
            f"--tls {folder}: there is no ca.crt. It is the server's, and says whom to trust."
        )
    _check_authority(folder)
    if not key.is_file():
        what = "it is a folder; give the file in it" if key.is_dir() else "no such file"
        raise FedForwardError(f"--key {key}: {what}.")
    try:
        found = serialization.load_ssh_private_key(key.read_bytes(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        found = None
    if not isinstance(found, ec.EllipticCurvePrivateKey):
        raise FedForwardError(
            f"--key {key} is not a site's key (an elliptic-curve key in OpenSSH form without a "
            "passphrase, as `fedforward certs` makes them)."
        )


def trust(folder: Path) -> ssl.SSLContext:
    """A client's context that trusts the folder's authority alone."""
    return ssl.create_default_context(cafile=str(folder / "ca.crt"))


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(
    subject: str, issuer: x509.Name, key: ec.EllipticCurvePrivateKey
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # Clocks of sites may be a little behind.
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=DAYS))
    )


def _authority(key: ec.EllipticCurvePrivateKey) -> bytes:
    name = "fedforward development authority"
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    return (
        _builder(name, _name(name), key)
        .add_extension(x509.BasicConstraints(True, 0), True)
        .add_extension(usage, True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .sign(key, hashes.SHA384())
        .public_bytes(serialization.Encoding.PEM)
    )


def _server(
    key: ec.EllipticCurvePrivateKey,
    hosts: Sequence[str],
    issuer: x509.Certificate,
    signer: ec.EllipticCurvePrivateKey,
) -> bytes:
    names: list[x509.GeneralName] = []
    for host in dict.fromkeys([*hosts, "localhost", "127.0.0.1", "::1"]):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host))
    public = signer.public_key()
    return (
        _builder(hosts[0][:_COMMON_NAME], issuer.subject, key)
        .add_extension(x509.SubjectAlternativeName(names), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(public), False)
        .sign(signer, hashes.SHA384())
        .public_bytes(serialization.Encoding.PEM)
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def write_new(path: Path, content: bytes, *, secret: bool = False) -> Path:
    """Write a new file; one that is secret is never readable by others, not even for a moment.

    Raises:
        FedForwardError: there is a file or a link of that name. Neither is written to.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    try:
        descriptor = os.open(path, flags, 0o600 if secret else 0o644)
    except FileExistsError:
        raise FedForwardError(
            f"{path} is there already, and what belongs to it is not. Bring that back, or move "
            "this file away: it is not overwritten."
        ) from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    return path
