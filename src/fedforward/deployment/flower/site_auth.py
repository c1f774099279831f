"""What a site's request shows before its body is read: the route, and who signed it when.

Flower has a site sign the time of each request. The engine checks that again, with the site's
number, which is in the body. Here it is checked so that nobody else's body is read. The answers to
a request that is refused are the engine's own, so a site says the same of both.
"""

import binascii
import datetime
import json
from base64 import b64decode
from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

#: Path below which requests pass: the sites' part.
SITES_PATH = "/v1/fleet/"
#: What Flower's sites ask for.
ROUTES = frozenset(
    SITES_PATH + name
    for name in (
        "activate-node",
        "confirm-message-received",
        "deactivate-node",
        "get-fab",
        "get-run",
        "pull-messages",
        "pull-object",
        "push-messages",
        "push-object",
        "register-node",
        "send-node-heartbeat",
        "unregister-node",
    )
)
#: Flower's headers of a signed request.
PUBLIC_KEY, SIGNATURE, TIMESTAMP = "flwr-public-key", "flwr-signature", "flwr-timestamp"
#: Seconds that a signature is good for, and that clocks may differ by: Flower's own.
SIGNATURE_AGE_S, CLOCK_TOLERANCE_S = 300.0, 5.0

#: The sites' public keys, by the bytes that Flower sends of them.
PublicKeys = Mapping[bytes, ec.EllipticCurvePublicKey]


@dataclass(frozen=True)
class Refusal:
    """An answer of the engine to who is not let in."""

    status: int
    content: str


_UNAUTHENTIC = Refusal(401, json.dumps({"detail": "Invalid SuperNode authentication"}))
_UNKNOWN = {
    SITES_PATH + "activate-node": Refusal(
        412, json.dumps({"code": 2004, "detail": "Failed to activate SuperNode."})
    ),
    SITES_PATH + "register-node": Refusal(
        412,
        json.dumps(
            {
                "code": 2001,
                "detail": "SuperNode authentication is enabled. All SuperNodes must be registered "
                "via the CLI.",
            }
        ),
    ),
}


def read_public_key(content: bytes) -> tuple[bytes, ec.EllipticCurvePublicKey] | None:
    """A public key from its OpenSSH form, with the bytes that Flower sends of it; None if it is
    none.
    """
    try:
        key = serialization.load_ssh_public_key(content)
    except (ValueError, UnsupportedAlgorithm):
        return None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        return None
    sent = key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return sent, key


def seconds_left(headers: Mapping[str, str]) -> float:
    """Seconds for which the engine will take a request's signature; 0 where there is none.

    Args:
        headers: as of `refusal`, of a request that was not refused.
    """
    try:
        signed = datetime.datetime.fromisoformat(headers[TIMESTAMP])
        age_s = (datetime.datetime.now(datetime.UTC) - signed).total_seconds()
    except (KeyError, ValueError, TypeError):
        return 0.0
    return SIGNATURE_AGE_S - age_s


def refusal(path: str, headers: Mapping[str, str], keys: PublicKeys) -> Refusal | None:
    """Why a request is not let in; None if a site with one of the keys signed it just now.

    Args:
        path: one of `ROUTES`.
        headers: of the request, by names in lower case.
    """
    try:
        public_key = b64decode(headers[PUBLIC_KEY], validate=True)
        signature = b64decode(headers[SIGNATURE], validate=True)
        timestamp = headers[TIMESTAMP]
        signed = datetime.datetime.fromisoformat(timestamp)
        age_s = (datetime.datetime.now(datetime.UTC) - signed).total_seconds()
    except (KeyError, ValueError, TypeError, binascii.Error):
        return _UNAUTHENTIC
    key = keys.get(public_key)
    if key is None:
        return _UNKNOWN.get(path, _UNAUTHENTIC)
    if not -CLOCK_TOLERANCE_S < age_s < SIGNATURE_AGE_S + CLOCK_TOLERANCE_S:
        return _UNAUTHENTIC
    try:
        key.verify(signature, timestamp.encode("ascii"), ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, UnicodeError):
        return _UNAUTHENTIC
    return None
