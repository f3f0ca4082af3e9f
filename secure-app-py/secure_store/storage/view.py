"""What reads see, and what plans are made on: the tables, plus what is not in them yet.

Three layers. The *tables* are the fold of the decided records that have been applied. The *shown*
overlay is what is decided but not applied yet: reads see it. The *head* overlay is what has been
appended, decided or not: only plans see it. Overlay entries live until the tables have caught up.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator

from secure_store.core import kv
from secure_store.core.changes import (
    Audited,
    Change,
    Destroy,
    MarkDeleted,
    PutPolicy,
    PutToken,
    PutValue,
    Remember,
    RevokeToken,
    UseToken,
    decode_changes,
)
from secure_store.core.kv import KeyState
from secure_store.core.policy import PolicySet, Rule
from secure_store.core.records import Position
from secure_store.storage.database import Database, Remembered

CACHE_BYTES = 64 << 20
REPLAY_RECORDS = 1024
REPLAY_BYTES = 4 << 20
_ENTRY_BYTES = 300  # a cached entry's own cost, besides key and value


class _Overlay:
    """Key states newer than the tables."""

    def __init__(self) -> None:
        self.states: dict[str, tuple[KeyState | None, int]] = {}
        self._order: deque[tuple[int, str]] = deque()

    def put(self, key: str, state: KeyState | None, seq: int) -> None:
        self.states[key] = (state, seq)
        self._order.append((seq, key))

    def forget(self, applied_seq: int) -> None:
        while self._order and self._order[0][0] <= applied_seq:
            seq, key = self._order.popleft()
            if key in self.states and self.states[key][1] == seq:
                del self.states[key]


class View:
    """Used on the event loop only."""

    def __init__(self, database: Database, base_roles: dict[str, tuple[Rule, ...]] | None) -> None:
        self._database = database
        self._base_roles = base_roles
        self.reset()

    def reset(self) -> None:
        """Start from the tables (at start, and after a snapshot replaced them)."""
        self._head = _Overlay()
        self._shown = _Overlay()
        self._values: dict[tuple[str, int], tuple[bytes, int]] = {}
        self._values_order: deque[tuple[int, tuple[str, int]]] = deque()
        self._remembered: dict[bytes, Remembered] = {}
        self._remembered_order: deque[tuple[int, bytes]] = deque()
        self._cache: OrderedDict[str, tuple[KeyState | None, bytes | None]] = OrderedDict()
        self._cache_bytes = 0
        self.tokens = self._database.load_tokens()
        self.head_tokens = self._database.load_tokens()
        self.policies, self.head_policies = PolicySet(), PolicySet()
        for policies in (self.policies, self.head_policies):
            for role, rules in (self._base_roles or {}).items():
                policies.put(role, rules)
            for policy in self._database.load_policies():
                policies.put(policy.role, policy.rules)
        self.token_key = self._database.token_key()

    # --- what plans see -----------------------------------------------------------------------

    def head_state(self, key: str) -> KeyState | None:
        """A key's state after everything appended."""
        found = self._head.states.get(key)
        return found[0] if found is not None else self.state(key)

    def due(self, now_ms: int, limit: int) -> list[tuple[str, int]]:
        """(key, version) of values whose time is over, as far as the tables know; up to `limit`
        keys, the oldest first."""
        found: list[tuple[str, int]] = []
        for key in self._database.due(now_ms, limit):
            try:
                state = self.head_state(key)
            except kv.Damaged:
                continue  # whoever reads it is told; nothing is known of its versions
            if state is not None:
                found += [(key, v.number) for v in state.versions if v.is_due(now_ms)]
        return found

    def head_remembered(self, scope_hash: bytes) -> Remembered | None:
        return self._remembered.get(scope_hash) or self._database.remembered(scope_hash)

    def append(self, changes: tuple[Change, ...], seq: int) -> None:
        """A record was appended (not decided)."""
        for change in changes:
            match change:
                case PutValue() | MarkDeleted() | Destroy():
                    self._head.put(change.key, kv.apply(self.head_state(change.key), change), seq)
                case PutToken() | RevokeToken() | UseToken():
                    self.head_tokens.apply(change)
                case Remember():
                    kept = Remembered(
                        change.request_hash,
                        change.status,
                        change.body,
                        change.version,
                        change.expires_ms,
                    )
                    self._remembered[change.scope_hash] = kept
                    self._remembered_order.append((seq, change.scope_hash))
                case PutPolicy(role, rules):
                    self.head_policies.put(role, rules)
                case _:
                    pass

    def is_open(self, key: str, shown_seq: int) -> bool:
        """Whether a record about this key is appended and not decided."""
        found = self._head.states.get(key)
        return found is not None and found[1] > shown_seq

    def is_open_under(self, prefix: str, shown_seq: int) -> bool:
        """The same of any key with this prefix."""
        states = self._head.states.items()
        return any(seq > shown_seq and key.startswith(prefix) for key, (_, seq) in states)

    def decided_after(
        self, seq: int, hash_digits: str, shown_seq: int
    ) -> list[tuple[tuple[Change, ...], Position]] | None:
        """The decided records after record `seq`, whose hash begins with these hex digits. None if
        that is not in this history, or what followed is no longer kept, or too much."""
        position = self._database.position(seq)
        if position is None or seq > shown_seq or position.hash.hex()[:16] != hash_digits:
            return None
        records = self._database.read_log(seq, REPLAY_RECORDS, REPLAY_BYTES)
        if records is None or (records and records[-1].seq < shown_seq):
            return None
        return [(decode_changes(r.payload), r.position) for r in records if r.seq <= shown_seq]

    # --- what reads see -----------------------------------------------------------------------

    def show(self, changes: tuple[Change, ...], seq: int) -> None:
        """A record was decided."""
        for change in changes:
            match change:
                case PutValue() | MarkDeleted() | Destroy():
                    planned = self._head.states.get(change.key)
                    if planned is not None and planned[1] == seq:
                        after = planned[0]  # nothing newer was appended to this key
                    else:
                        after = kv.apply(self.state(change.key), change)
                    self._shown.put(change.key, after, seq)
                    self._drop_cached(change.key)
                    if isinstance(change, PutValue):
                        name = (change.key, change.version)
                        self._values[name] = (change.value, seq)
                        self._values_order.append((seq, name))
                case PutToken() | RevokeToken() | UseToken():
                    self.tokens.apply(change)
                case PutPolicy(role, rules):
                    self.policies.put(role, rules)
                case Remember() | Audited():
                    pass
                case _:
                    self.token_key = change.token_key

    def applied(self, seq: int) -> None:
        """The tables hold everything up to `seq`."""
        self._head.forget(seq)
        self._shown.forget(seq)
        while self._values_order and self._values_order[0][0] <= seq:
            at, name = self._values_order.popleft()
            if name in self._values and self._values[name][1] == at:
                del self._values[name]
        while self._remembered_order and self._remembered_order[0][0] <= seq:
            self._remembered.pop(self._remembered_order.popleft()[1], None)

    def state(self, key: str) -> KeyState | None:
        """A key's decided state. Raises Damaged if what is stored does not open."""
        found = self._shown.states.get(key)
        if found is not None:
            return found[0]
        cached = self._cache.get(key)
        return cached[0] if cached is not None else self._database.key_state(key)

    def value(self, key: str, version: int) -> bytes | None:
        """One version's JSON text, decided."""
        found = self._values.get((key, version))
        return found[0] if found is not None else self._database.value(key, version)

    def current(self, key: str, now_ms: int) -> tuple[int, bytes] | None:
        """(version, JSON text) that a read gives now; None: not found. The hot path."""
        if key not in self._shown.states:
            cached = self._cache.get(key)
            if cached is not None:
                state, text = cached
                if state is None or text is None or not state.newest.readable(now_ms):
                    return None
                self._cache.move_to_end(key)
                return state.newest.number, text
        state = self.state(key)
        if state is None or not state.newest.readable(now_ms):
            return None
        text = self.value(key, state.newest.number)
        if text is not None and key not in self._shown.states:
            self._remember(key, state, text)
        return None if text is None else (state.newest.number, text)

    def _remember(self, key: str, state: KeyState, text: bytes) -> None:
        self._cache[key] = (state, text)
        self._cache_bytes += len(key) + len(text) + _ENTRY_BYTES
        while self._cache_bytes > CACHE_BYTES:
            self._drop_cached(next(iter(self._cache)))

    def _drop_cached(self, key: str) -> None:
        dropped = self._cache.pop(key, None)
        if dropped is not None:
            self._cache_bytes -= len(key) + len(dropped[1] or b"") + _ENTRY_BYTES

    def scan(self, prefix: str, after: str, now_ms: int) -> Iterator[str]:
        """Readable keys with this prefix, greater than `after`, in order."""
        start = max(prefix, after + "\0" if after else prefix)
        overlay = iter(sorted(k for k in self._shown.states if k >= start and k.startswith(prefix)))
        pending = next(overlay, None)
        while True:
            page = self._database.keys_from(start, 256)
            for key, state in page:
                while pending is not None and pending < key:
                    if self._is_readable(pending, now_ms):
                        yield pending
                    pending = next(overlay, None)
                if not key.startswith(prefix):
                    break
                if key == pending:
                    if self._is_readable(key, now_ms):
                        yield key
                    pending = next(overlay, None)
                elif state.newest.readable(now_ms):
                    yield key
            else:
                if len(page) == 256:
                    start = page[-1][0] + "\0"
                    continue
            break
        while pending is not None:
            if self._is_readable(pending, now_ms):
                yield pending
            pending = next(overlay, None)

    def _is_readable(self, key: str, now_ms: int) -> bool:
        state = self.state(key)
        return state is not None and state.newest.readable(now_ms)
