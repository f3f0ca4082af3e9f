"""Where a list goes on, when the last key that was looked at is not the caller's to know.

`next` of a page is a key if the caller was shown it. If a page ended among keys that the caller may
not list, it is the key sealed under the cluster's token key (so either node can open it), padded so
that its length says nothing.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from secure_store.core.policy import MAX_KEY_BYTES

_MARK = "~"
_NONCE_BYTES = 12


def seal_cursor(token_key: bytes, key: str) -> str:
    """`key` for whoever cannot open it."""
    nonce = os.urandom(_NONCE_BYTES)
    padded = key.encode().ljust(MAX_KEY_BYTES, b"\0")
    return _MARK + base64.urlsafe_b64encode(
        nonce + _cipher(token_key).encrypt(nonce, padded, None)
    ).decode().rstrip("=")


def open_cursor(token_key: bytes, text: str) -> str | None:
    """The key in a cursor; None if this is none."""
    if not text.startswith(_MARK):
        return None
    try:
        raw = base64.urlsafe_b64decode(text[1:] + "=" * (-len(text[1:]) % 4))
        nonce, sealed = raw[:_NONCE_BYTES], raw[_NONCE_BYTES:]
        return _cipher(token_key).decrypt(nonce, sealed, None).rstrip(b"\0").decode()
    except (InvalidTag, binascii.Error, ValueError):
        return None


def _cipher(token_key: bytes) -> AESGCM:
    return AESGCM(hmac.digest(token_key, b"cursor", "sha256"))
