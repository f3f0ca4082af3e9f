"""Bearer tokens: who holds one, what it may be used for, and until when.

A token is known by its keyed hash only. Revoking one revokes every token made with it. What is
unknown, expired, used up and revoked cannot be told apart from outside: `find` gives None for all.
"""

from __future__ import annotations

import hashlib
import heapq
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
    expires_ms: int = 0  # 0: never
    # What the token it was made with may do at most, and the one that was made with, and so on.
    ceilings: tuple[tuple[str, ...], ...] = ()


def is_static(parent: str) -> bool:
    """Whether a token's parent is a static token (`file:…`, `demo:…`), or none: no accessor."""
    return not parent or ":" in parent


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
        self._expiring: list[tuple[int, str]] = []  # a heap; entries of revoked tokens linger

    def __contains__(self, accessor: str) -> bool:
        """Whether there is something to revoke: the token, or what was made with it."""
        return accessor in self.by_accessor or bool(self._children.get(accessor))

    def expired(self, now_ms: int, limit: int) -> list[str]:
        """Up to `limit` accessors of tokens that expired before `now_ms`, oldest first."""
        found: list[tuple[int, str]] = []
        while self._expiring and self._expiring[0][0] < now_ms and len(found) < limit:
            entry = heapq.heappop(self._expiring)
            if entry[1] in self.by_accessor:
                found.append(entry)
        for entry in found:  # they are gone once the revocation is applied
            heapq.heappush(self._expiring, entry)
        return [accessor for _, accessor in found]

    def find(self, hashed: bytes, now_ms: int) -> Principal | None:
        """The principal behind a token's hash, if the token may be used now."""
        accessor = self._by_hash.get(hashed)
        if accessor is None:
            return None
        token = self.by_accessor[accessor]
        if (token.expires_ms and now_ms >= token.expires_ms) or token.uses_left == 0:
            return None
        return Principal(
            f"token:{accessor}",
            token.roles,
            accessor,
            token.uses_left,
            token.expires_ms,
            token.ceilings,
        )

    def apply(self, change: PutToken | RevokeToken | UseToken) -> list[str]:
        """Fold one change; returns the accessors that are gone with it."""
        match change:
            case PutToken():
                self.by_accessor[change.accessor] = change
                self._by_hash[change.token_hash] = change.accessor
                if change.expires_ms:
                    heapq.heappush(self._expiring, (change.expires_ms, change.accessor))
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
                siblings = self._children.get(token.parent)
                if siblings is not None:
                    siblings.discard(each)
                    if not siblings:
                        del self._children[token.parent]
        return gone
