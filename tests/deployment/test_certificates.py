"""Certificates and keys: what is made, what can be used, and what is never overwritten."""

import os
import ssl
import stat
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from fedforward.core.errors import FedForwardError
from fedforward.deployment.flower import certificates

PKCS8 = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
OPENSSH = (serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH)
PLAIN = serialization.NoEncryption()
LOCKED = serialization.BestAvailableEncryption(b"secret")


def test_certificates(tmp_path: Path) -> None:
    folder = tmp_path / "certs"
    with pytest.raises(FedForwardError, match=r"there is no ca\.crt"):
        certificates.check_server(folder)
    certificates.make(folder, ["fed.example.org"], ["a", "b"])
    certificates.check_server(folder)
    for path in (folder / "ca.key", folder / "server.key", folder / "sites" / "a.key"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    certificates.check_site(folder, folder / "sites" / "a.key")
    with pytest.raises(FedForwardError, match="is not a site's key"):
        certificates.check_site(folder, folder / "server.crt")
    with pytest.raises(FedForwardError, match=r"--key .*: it is a folder; give the file in it"):
        certificates.check_site(folder, folder / "sites")
    for check in (
        lambda: certificates.check_site(folder / "ca.crt", folder / "sites" / "a.key"),
        lambda: certificates.check_server(folder / "ca.crt"),
        lambda: certificates.make(folder / "ca.crt", ["x"], []),
    ):
        with pytest.raises(FedForwardError, match=r"ca\.crt is a file\. Give"):
            check()
    before = (folder / "server.crt").read_bytes()
    assert [p.name for p in certificates.make(folder, ["x"], ["c"])] == ["c.key", "c.pub"]
    assert (folder / "server.crt").read_bytes() == before
    with pytest.raises(FedForwardError, match=r"--site '\.\./x' is not allowed"):
        certificates.make(folder, [], ["../x"])
    (folder / "server.crt").unlink()
    (folder / "ca.key").unlink()
    with pytest.raises(FedForwardError, match=r"no ca\.key"):
        certificates.make(folder, ["x"], [])


def test_a_host_may_have_a_long_name(tmp_path: Path) -> None:
    host = ".".join(["a" * 60, "b" * 60, "example.org"])
    certificates.make(tmp_path, [host, "::1", "*.example.org"], [])
    certificates.check_server(tmp_path)
    made = x509.load_pem_x509_certificate((tmp_path / "server.crt").read_bytes())
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName)[:2] == [host, "*.example.org"]


@pytest.mark.parametrize(
    "host",
    ["", "a b", "fed.example.org:9400", "é.org", "-", ".org", "a..b", "x" * 64, "a." * 127 + "ab",
     "fe80::1%eth0", "https://fed", "a\n"],
)  # fmt: skip
def test_a_host_that_no_certificate_can_name(host: str, tmp_path: Path) -> None:
    if host == "-":
        host = "-.org"
    with pytest.raises(FedForwardError, match=r"--host .* is not allowed"):
        certificates.make(tmp_path / "certs", ["fed.example.org", host], [])
    assert not (tmp_path / "certs").exists()


@pytest.mark.parametrize(
    ("made", "removed"),
    [
        ("ca.key", ["ca.crt"]),
        ("server.key", ["server.crt"]),
        ("sites/a.pub", ["sites/a.key"]),
    ],
)
@pytest.mark.parametrize("link", [False, True], ids=["file", "link"])
def test_nothing_is_overwritten(made: str, removed: list[str], link: bool, tmp_path: Path) -> None:
    folder, outside = tmp_path / "certs", tmp_path / "outside"
    certificates.make(folder, ["localhost"], ["a"])
    for name in removed:
        (folder / name).unlink()
    if link:
        (folder / made).unlink()
        (folder / made).symlink_to(outside)
    before = {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}
    with pytest.raises(FedForwardError, match=f"{made} is there already"):
        certificates.make(folder, ["localhost"], ["a"])
    assert {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()} == before
    assert not outside.exists()


def test_an_authority_that_cannot_sign(tmp_path: Path) -> None:
    certificates.make(tmp_path, [], [])
    key = serialization.load_pem_private_key((tmp_path / "ca.key").read_bytes(), None)
    crt = (tmp_path / "ca.crt").read_bytes()
    others = (
        ec.generate_private_key(ec.SECP384R1()).private_bytes(*PKCS8, PLAIN),
        rsa.generate_private_key(65537, 2048).private_bytes(*PKCS8, PLAIN),
        key.private_bytes(*PKCS8, LOCKED),
        b"no key",
        b"",
    )
    for content, certificate in [*((other, crt) for other in others), (b"no key", b"no crt")]:
        (tmp_path / "ca.key").write_bytes(content)
        (tmp_path / "ca.crt").write_bytes(certificate)
        with pytest.raises(FedForwardError, match="cannot sign a new server certificate"):
            certificates.make(tmp_path, ["localhost"], [])
        assert not (tmp_path / "server.key").exists()


def test_files_that_cannot_be_used_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "certs"
    certificates.make(folder, ["localhost"], ["a"])
    site = folder / "sites" / "a.key"
    whole = {path: path.read_bytes() for path in (folder / "ca.crt", folder / "server.key", site)}
    key = serialization.load_pem_private_key(whole[folder / "server.key"], None)
    for content in (b"", b"no certificate", whole[site], whole[folder / "ca.crt"][:300]):
        (folder / "ca.crt").write_bytes(content)
        for check in (
            lambda: certificates.check_server(folder),
            lambda: certificates.check_site(folder, site),
        ):
            with pytest.raises(FedForwardError, match=r"ca\.crt is not a certificate in PEM form"):
                check()
    (folder / "ca.crt").write_bytes(whole[folder / "ca.crt"])
    # Of a key with a passphrase OpenSSL would ask at the terminal.
    for content in (key.private_bytes(*PKCS8, LOCKED), b"", whole[site]):
        (folder / "server.key").write_bytes(content)
        with pytest.raises(FedForwardError, match="cannot be used together"):
            certificates.check_server(folder)
    (folder / "server.key").write_bytes(whole[folder / "server.key"])
    certificates.check_server(folder)
    # A key on a token, which the library does not support.
    token = b"-----BEGIN OPENSSH PRIVATE KEY-----\n" + whole[site].split(b"\n", 1)[1]
    foreign = ed25519.Ed25519PrivateKey.generate().private_bytes(*OPENSSH, PLAIN)
    unsupported = _with_type(whole[site], b"sk-ssh-ed25519@x.org")
    for content in (foreign, unsupported, b"", token[:200], os.urandom(100)):
        site.write_bytes(content)
        with pytest.raises(FedForwardError, match="is not a site's key"):
            certificates.check_site(folder, site)
    assert isinstance(certificates.trust(folder), ssl.SSLContext)


def _with_type(pem: bytes, name: bytes) -> bytes:
    """A key file in OpenSSH form whose type is another of the same length."""
    from base64 import b64decode, b64encode

    lines = pem.strip().split(b"\n")
    content = b64decode(b"".join(lines[1:-1]))
    old = b"ecdsa-sha2-nistp384"
    assert old in content
    changed = b64encode(content.replace(old, name[: len(old)]))
    return b"\n".join([lines[0], changed, lines[-1], b""])
