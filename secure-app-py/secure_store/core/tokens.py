"""Bearer tokens: who holds one, what it may be used for, and until when.

A token is known by its keyed hash only. Revoking one revokes every token made with it. What is
unknown, expired, used up and revoked cannot be told apart from outside: `find` gives None for all.
"""

from __future__ import annotations

import hashlib
import hmac

import msgspec

from secure_store.core.changes import PutToken, RevokeToken, UseToken

MAX_TOKENS = 100_000


class Principal(msgspec.Struct, frozen=True):
    """Who a request comes from."""

    name: str  # for the audit log: a token's accessor or a static token's name
    roles: tuple[str, ...]
    accessor: str = ""  # "" for a static token
    uses_left: int = -1  # -1: unlimited


def token_hash(token_key: bytes, token: str) -> bytes:
    """HMAC-SHA256 under the cluster's token key: a stolen database says nothing about tokens."""
    return hmac.digest(token_key, token.encode("utf-8", "surrogatepass"), "sha256")


def plain_hash(token: str) -> bytes:
    """SHA-256, for static tokens from a file (they are random, or demo ones that are public)."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


class TokenSet:
    """All live tokens of the cluster, folded from the log's changes."""

    def __init__(self) -> None:
        self.by_accessor: dict[str, PutToken] = {}
        self._by_hash: dict[bytes, str] = {}
        self._children: dict[str, set[str]] = {}

    def find(self, hashed: bytes, now_ms: int) -> Principal | None:
        """The principal behind a token's hash, if the token may be used now."""
        accessor = self._by_hash.get(hashed)
        if accessor is None:
            return None
        token = self.by_accessor[accessor]
        if (token.expires_ms and now_ms >= token.expires_ms) or token.uses_left == 0:
            return None
        return Principal(f"token:{accessor}", token.roles, accessor, token.uses_left)

    def apply(self, change: PutToken | RevokeToken | UseToken) -> list[str]:
        """Fold one change; returns the accessors that are gone with it."""
        match change:
            case PutToken():
                self.by_accessor[change.accessor] = change
                self._by_hash[change.token_hash] = change.accessor
                if change.parent:
                    self._children.setdefault(change.parent, set()).add(change.accessor)
                return []
            case UseToken(accessor, uses_left):
                token = self.by_accessor.get(accessor)
                if token is not None:
                    spent = msgspec.structs.replace(token, uses_left=uses_left)
                    self.by_accessor[accessor] = spent
                return []
            case RevokeToken(accessor):
                return self._revoke(accessor)

    def _revoke(self, accessor: str) -> list[str]:
        gone: list[str] = []
        doomed = [accessor]
        while doomed:
            each = doomed.pop()
            token = self.by_accessor.pop(each, None)
            doomed.extend(sorted(self._children.pop(each, ())))
            if token is not None:
                gone.append(each)
                self._by_hash.pop(token.token_hash, None)
                self._children.get(token.parent, set()).discard(each)
        return gone
