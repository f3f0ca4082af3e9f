"""Versions of keys, and plans: exact checks, all or nothing, replays."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from secure_store.core import kv
from secure_store.core.changes import PutToken, Remember, decode_changes, encode_changes
from secure_store.core.kv import Conflict, KeyState, Missing, Version
from secure_store.core.plan import (
    AddOp,
    CheckOp,
    DeleteOp,
    DestroyOp,
    Idempotency,
    KeyReused,
    OpFailed,
    RevokeOp,
    SetOp,
    SpendOp,
    UndeleteOp,
    Write,
    plan,
)
from secure_store.core.tokens import TokenSet


class Heads:
    """A store in a dict, as the planner sees it."""

    def __init__(self) -> None:
        self.states: dict[str, KeyState | None] = {}
        self.answers: dict[bytes, SimpleNamespace] = {}
        self.head_tokens = TokenSet()

    def head_state(self, key: str) -> KeyState | None:
        return self.states.get(key)

    def head_remembered(self, scope: bytes):
        return self.answers.get(scope)

    def do(self, *ops, now_ms: int = 1000, again: Idempotency | None = None):
        planned = plan(Write(ops, lambda v: repr(v).encode(), again), self, now_ms)
        for change in decode_changes(encode_changes(planned.changes)):
            if isinstance(change, Remember):
                self.answers[change.scope_hash] = SimpleNamespace(
                    request_hash=change.request_hash, body=change.body,
                    version=change.version, expires_ms=change.expires_ms,
                )  # fmt: skip
            elif hasattr(change, "key"):
                self.states[change.key] = kv.apply(self.states.get(change.key), change)
            else:
                self.head_tokens.apply(change)
        return planned

    def current(self, key: str, now_ms: int = 1000) -> int:
        state = self.states.get(key)
        return state.current(now_ms) if state is not None else 0


def test_versions_grow_and_twenty_are_kept() -> None:
    heads = Heads()
    for i in range(1, 31):
        assert heads.do(SetOp("k", b"1")).version == i
    numbers = [v.number for v in heads.states["k"].versions]
    assert numbers == list(range(11, 31))


def test_expected_version_is_what_a_read_gives_and_zero_is_nothing() -> None:
    heads = Heads()
    heads.do(SetOp("k", b"1", expected=0))
    with pytest.raises(OpFailed) as failed:
        heads.do(SetOp("k", b"2", expected=0))
    assert isinstance(failed.value.cause, Conflict)
    assert failed.value.cause.current == 1
    heads.do(SetOp("k", b"2", expected=1))
    heads.do(DeleteOp("k"))
    heads.do(SetOp("k", b"3", expected=0))
    assert heads.current("k") == 3, "a number is never used twice"


def test_a_deleted_version_comes_back_and_a_destroyed_one_does_not() -> None:
    heads = Heads()
    heads.do(SetOp("k", b"1"))
    heads.do(DeleteOp("k"))
    assert heads.current("k") == 0
    with pytest.raises(OpFailed):
        heads.do(DeleteOp("k"))
    heads.do(UndeleteOp("k", None))
    assert heads.current("k") == 1
    heads.do(DestroyOp("k", 1))
    assert heads.current("k") == 0
    with pytest.raises(OpFailed):
        heads.do(UndeleteOp("k", 1))
    heads.do(DestroyOp("k", None))
    assert heads.states["k"] is None


def test_a_value_expires_by_the_time_that_is_passed_in() -> None:
    heads = Heads()
    heads.do(SetOp("k", b"1", ttl_ms=500), now_ms=1000)
    assert heads.current("k", 1499) == 1
    assert heads.current("k", 1500) == 0
    assert heads.do(SetOp("k", b"2", expected=0), now_ms=1500).version == 2


def test_a_transaction_sees_its_own_changes_and_fails_whole() -> None:
    heads = Heads()
    planned = heads.do(SetOp("a", b"1"), SetOp("a", b"2", expected=1), CheckOp("a", 2))
    assert planned.body == b"[1, 2, 2]"
    with pytest.raises(OpFailed) as failed:
        heads.do(SetOp("b", b"1"), CheckOp("a", 9))
    assert failed.value.index == 1
    assert "b" not in heads.states


def test_a_repeated_request_gets_its_first_answer_and_another_one_is_refused() -> None:
    heads = Heads()
    again = Idempotency(b"scope", b"request", 5000)
    first = heads.do(SetOp("k", b"1"), again=again)
    second = heads.do(SetOp("k", b"1"), again=again)
    assert second.replayed
    assert second.body == first.body
    assert second.changes == ()
    with pytest.raises(KeyReused):
        heads.do(SetOp("k", b"2"), again=Idempotency(b"scope", b"other", 5000))
    assert not heads.do(SetOp("k", b"1"), now_ms=5000, again=again).replayed, "it has expired"


def token(accessor: str, parent: str = "", uses: int = -1, expires_ms: int = 0) -> PutToken:
    hashed = accessor.encode() * 4
    return PutToken(accessor, hashed, ("user",), "", 0, expires_ms, uses, parent)


def test_revoking_a_token_revokes_what_was_made_with_it() -> None:
    heads = Heads()
    for made in (token("a"), token("b", "a"), token("c", "b"), token("d")):
        heads.do(AddOp(made))
    heads.do(RevokeOp("a"))
    assert list(heads.head_tokens.by_accessor) == ["d"]
    for accessor in ("a", "b", "c"):
        assert heads.head_tokens.find(accessor.encode() * 4, 0) is None
    with pytest.raises(OpFailed):
        heads.do(RevokeOp("a"))


def test_uses_are_counted_and_a_spent_or_expired_token_is_nobody() -> None:
    heads = Heads()
    heads.do(AddOp(token("a", uses=2)))
    heads.do(AddOp(token("e", expires_ms=100)))
    heads.do(SpendOp("a"))
    heads.do(SpendOp("a"))
    with pytest.raises(OpFailed):
        heads.do(SpendOp("a"))
    assert heads.head_tokens.find(b"aaaa", 0) is None
    assert heads.head_tokens.find(b"eeee", 99) is not None
    assert heads.head_tokens.find(b"eeee", 100) is None


def test_a_child_lives_no_longer_than_its_parent_and_needs_it_alive() -> None:
    heads = Heads()
    heads.do(AddOp(token("p", "file:ops", expires_ms=100)))
    for asked, given_ms in ((0, 100), (500, 100), (60, 60)):
        heads.do(AddOp(token("c", "p", expires_ms=asked)))
        assert heads.head_tokens.by_accessor["c"].expires_ms == given_ms
        heads.do(RevokeOp("c"))
    heads.do(RevokeOp("p"))
    with pytest.raises(OpFailed):
        heads.do(AddOp(token("orphan", "p")))


def test_expired_tokens_are_found_by_their_time_and_once_revoked_no_more() -> None:
    heads = Heads()
    for name, expires_ms in (("b", 20), ("a", 10), ("c", 0), ("d", 30)):
        heads.do(AddOp(token(name, expires_ms=expires_ms)))
    assert heads.head_tokens.expired(25, 10) == ["a", "b"]
    assert heads.head_tokens.expired(25, 1) == ["a"]
    heads.do(RevokeOp("a"))
    assert heads.head_tokens.expired(25, 10) == ["b"]


def test_all_tokens_made_with_a_static_one_can_be_revoked_by_its_name() -> None:
    heads = Heads()
    for each in (token("a", "file:ops"), token("b", "a"), token("c", "file:other")):
        heads.do(AddOp(each))
    heads.do(RevokeOp("file:ops"))
    assert list(heads.head_tokens.by_accessor) == ["c"]
    with pytest.raises(OpFailed):
        heads.do(RevokeOp("file:ops"))


ops = st.one_of(
    st.builds(SetOp, st.sampled_from("ab"), st.just(b"1"), st.none() | st.integers(0, 3)),
    st.builds(DeleteOp, st.sampled_from("ab")),
    st.builds(UndeleteOp, st.sampled_from("ab"), st.none() | st.integers(1, 3)),
    st.builds(DestroyOp, st.sampled_from("ab"), st.none() | st.integers(1, 3)),
)


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(ops, max_size=30))
def test_numbers_only_grow_and_a_plan_is_checked_against_what_a_read_gives(some) -> None:
    heads = Heads()
    highest: dict[str, int] = {}
    for op in some:
        before = heads.current(op.key)
        try:
            planned = heads.do(op)
        except OpFailed as e:
            refused = e.cause
        else:
            refused = None
        if refused is not None:
            assert isinstance(refused, (Conflict, Missing))
            if isinstance(op, SetOp):
                assert op.expected not in (None, before)
            continue
        if isinstance(op, SetOp):
            assert op.expected in (None, before)
            assert planned.version > highest.get(op.key, 0)
            highest[op.key] = planned.version
        state = heads.states.get(op.key)
        if state is None:
            highest.pop(op.key, None)  # destroyed whole: numbering starts anew
        else:
            numbers = [v.number for v in state.versions]
            assert numbers == sorted(set(numbers))


def test_a_version_says_whether_it_is_readable() -> None:
    assert Version(1, 0).readable(10)
    assert not Version(1, 0, expires_ms=10).readable(10)
    assert not Version(1, 0, deleted_ms=1).readable(10)
    assert not Version(1, 0, destroyed=True).readable(10)
