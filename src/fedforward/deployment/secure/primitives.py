"""The cryptography of secure sums: all of it is that of `cryptography` and PyCryptodome.

X25519 agrees on keys, HKDF-SHA256 derives them, ChaCha20 makes masks, ChaCha20-Poly1305 encrypts
shares, and PyCryptodome's Shamir splits secrets of 128 bits. Every derived key is bound to the run,
the session and what it is for, and is used once, so nonces are 0.
"""

import hashlib
import os
from collections.abc import Sequence

import numpy as np
from Crypto.Protocol.SecretSharing import Shamir
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from numpy.typing import NDArray

from fedforward.core.errors import MessageError
from fedforward.messages.secure import SECRET_BYTES

_NAME = b"fedforward secure sum 1: "
_NONCE = bytes(12)


def new_secret() -> bytes:
    """16 bytes of the operating system's generator."""
    return os.urandom(SECRET_BYTES)


def derived(secret: bytes, purpose: bytes, context: bytes) -> bytes:
    """A key of 32 bytes for one purpose, HKDF-SHA256."""
    return HKDF(SHA256(), 32, salt=None, info=_NAME + purpose + b"\0" + context).derive(secret)


def private_key(secret: bytes, context: bytes) -> X25519PrivateKey:
    """The key that follows from a secret, so that shares of the secret are shares of the key."""
    return X25519PrivateKey.from_private_bytes(derived(secret, b"mask key", context))


def public_bytes(key: X25519PrivateKey) -> bytes:
    """The public half, 32 bytes."""
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def agreed(key: X25519PrivateKey, other: bytes, purpose: bytes, context: bytes) -> bytes:
    """What the owners of two keys agree on, 32 bytes.

    Raises:
        MessageError: the other's key is none.
    """
    try:
        shared = key.exchange(X25519PublicKey.from_public_bytes(other))
    except ValueError as error:
        raise MessageError("A public key was refused: nothing can be agreed on with it.") from error
    return derived(shared, purpose, context)


def mask(key: bytes, count: int) -> NDArray[np.uint64]:
    """The numbers of a key, uniform modulo 2⁶⁴: ChaCha20's stream, uint64 [count]."""
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    return np.frombuffer(stream.update(bytes(8 * count)), "<u8").astype(np.uint64)


def seal(key: bytes, content: bytes) -> bytes:
    """Encrypt and authenticate with a key that is used once."""
    return ChaCha20Poly1305(key).encrypt(_NONCE, content, None)


def unseal(key: bytes, sealed: bytes) -> bytes:
    """What `seal` was given.

    Raises:
        MessageError: it was sealed with another key, or altered.
    """
    try:
        return ChaCha20Poly1305(key).decrypt(_NONCE, sealed, None)
    except InvalidTag as error:
        raise MessageError("An encrypted share was refused: it was altered.") from error


def commitment(secret: bytes) -> bytes:
    """32 bytes that say nothing of a secret and hold its owner to it."""
    return hashlib.sha256(_NAME + b"commitment\0" + secret).digest()


def split(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """Shares of a secret, 16 bytes each; any `threshold` of them tell it, fewer say nothing."""
    return [share for _, share in Shamir.split(threshold, count, secret, ssss=False)]


def combined(shares: Sequence[tuple[int, bytes]]) -> bytes:
    """The secret of exactly as many shares as its threshold; anything where one is wrong.

    Args:
        shares: places in `split`, from 0, and shares.
    """
    secret: bytes = Shamir.combine([(place + 1, share) for place, share in shares], ssss=False)
    return secret
