"""What is remembered for speed never outlives what it was made from."""

from __future__ import annotations

from secure_store.core.policy import MAX_DECIDED, Effect, PolicySet, Rule


def test_a_remembered_verdict_is_void_once_any_policy_changes() -> None:
    policies = PolicySet({"r": (Rule("a/*", ("read",)),)})
    assert policies.allows(("r",), "read", "a/b")
    policies.put("r", (Rule("a/*", ("read",), Effect.DENY),))
    assert not policies.allows(("r",), "read", "a/b")
    policies.put("s", (Rule("a/b", ("read",)),))
    assert policies.allows(("r", "s"), "read", "a/b")


def test_remembered_verdicts_are_bounded() -> None:
    policies = PolicySet({"r": (Rule("k/+", ("read",)),)})
    for n in range(MAX_DECIDED + 10):
        assert policies.allows(("r",), "read", f"k/{n}")
        assert not policies.allows(("r",), "write", f"k/{n}")
    assert len(policies._decided) <= MAX_DECIDED
