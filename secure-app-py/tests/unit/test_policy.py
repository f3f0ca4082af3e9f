"""Rules over key patterns: tables of cases, and the compiled tree against the naive evaluator."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from secure_store.core.outrank import outranks
from secure_store.core.policy import (
    VERBS,
    CompiledRules,
    Effect,
    PolicyError,
    PolicySet,
    Rule,
    check_key,
    check_pattern,
    check_role_name,
    check_rules,
    decide,
    deciding,
    matches,
)


@pytest.mark.parametrize(
    ("pattern", "key", "expected"),
    [
        ("a", "a", True), ("a", "ab", False), ("a/*", "ab", False), ("a/*", "a", False),
        ("a/*", "a/b", True), ("a/*", "a/b/c", True), ("a/*", "a/", True), ("*", "x", True),
        ("*", "x/y/z", True), ("+", "x", True), ("+", "x/y", False), ("a/+/c", "a/b/c", True),
        ("a/+/c", "a/b/d", False), ("a/+/c", "a/b/b/c", False), ("a/+", "a/", True),
        ("a/+/*", "a/b", False), ("a/+/*", "a/b/c/d", True), ("A", "a", False),
    ],
)  # fmt: skip
def test_a_pattern_covers_whole_segments_only(pattern: str, key: str, expected: bool) -> None:
    assert matches(pattern, key) is expected


def test_the_most_specific_rule_decides() -> None:
    rules = (
        Rule("*", ("read",)),
        Rule("a/*", ("read",), Effect.DENY),
        Rule("a/+/c", ("read",)),
        Rule("a/b/c", ("read",), Effect.DENY),
    )
    assert decide(rules, "read", "x")
    assert not decide(rules, "read", "a/x")
    assert decide(rules, "read", "a/x/c")
    assert not decide(rules, "read", "a/b/c")
    assert not decide(rules, "write", "x"), "default deny"


def test_deny_wins_between_equally_specific_rules_in_either_order() -> None:
    allow, deny = Rule("a/*", ("read",)), Rule("a/*", ("read",), Effect.DENY)
    for rules in ((allow, deny), (deny, allow)):
        assert not decide(rules, "read", "a/b")
        assert not CompiledRules(rules).allows("read", "a/b")


def test_rules_of_several_roles_are_pooled_and_unknown_roles_grant_nothing() -> None:
    policies = PolicySet()
    policies.put("auditor", (Rule("*", ("audit",)), Rule("secret/*", ("read",), Effect.DENY)))
    assert policies.allows(("user",), "read", "secret/x")
    assert not policies.allows(("user", "auditor"), "read", "secret/x")
    assert policies.allows(("user", "auditor"), "audit", "audit")
    assert not policies.allows(("nobody",), "read", "x")
    policies.put("auditor", ())
    assert policies.allows(("user", "auditor"), "read", "secret/x"), "a put takes effect at once"


@pytest.mark.parametrize(
    "key", ["", "a/../b", "..", "a\nb", "a\x00", "\x1b[0m", "x" * 257, "\ud800"]
)
def test_a_key_that_could_be_read_two_ways_is_refused(key: str) -> None:
    with pytest.raises(PolicyError):
        check_key(key)


@pytest.mark.parametrize("pattern", ["a/*/b", "a*", "a/b+", "", "a/../*"])
def test_wildcards_are_whole_segments(pattern: str) -> None:
    with pytest.raises(PolicyError):
        check_pattern(pattern)


@pytest.mark.parametrize("role", ["", "Root", "root ", "a" * 65, "1a", "a/b", "ä"])
def test_a_role_has_one_spelling(role: str) -> None:
    with pytest.raises(PolicyError):
        check_role_name(role)


def test_a_rule_names_a_verb_and_a_role_has_few_rules() -> None:
    with pytest.raises(PolicyError):
        check_rules((Rule("a", ()),))
    with pytest.raises(PolicyError):
        check_rules((Rule("a", ("read",)),) * 257)


segments = st.sampled_from(["a", "b", "c", ""])
keys = st.lists(segments, min_size=1, max_size=4).map("/".join)


@st.composite
def patterns(draw: st.DrawFn) -> str:
    parts = draw(st.lists(st.sampled_from(["a", "b", "c", "", "+"]), max_size=3))
    return "/".join([*parts, draw(st.sampled_from(["a", "b", "+", "*"]))])


rules = st.builds(
    Rule,
    patterns(),
    st.lists(st.sampled_from(VERBS), min_size=1, max_size=3).map(tuple),
    st.sampled_from(Effect),
)


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(rules, max_size=12), keys, st.sampled_from(VERBS))
def test_the_tree_agrees_with_the_naive_evaluator(some: list[Rule], key: str, verb: str) -> None:
    assert CompiledRules(some).allows(verb, key) is decide(some, verb, key)


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(rules, max_size=8), keys, st.sampled_from(VERBS), st.randoms())
def test_the_order_of_rules_does_not_matter(some: list[Rule], key: str, verb: str, rng) -> None:
    shuffled = list(some)
    rng.shuffle(shuffled)
    assert decide(some, verb, key) is decide(shuffled, verb, key)


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(rules, max_size=8), rules, keys, st.sampled_from(VERBS))
def test_a_further_denial_never_allows_more(some, denial: Rule, key: str, verb: str) -> None:
    denied = Rule(denial.pattern, denial.verbs, Effect.DENY)
    assert not (decide([*some, denied], verb, key) and not decide(some, verb, key))


segments = st.sampled_from(["a", "b", "+"])
patterns = st.builds(
    lambda parts, star: "/".join([*parts, "*"] if star or not parts else parts),
    st.lists(segments, max_size=3),
    st.booleans(),
)
some_rules = st.lists(
    st.builds(Rule, patterns, st.just(("read",)), st.sampled_from(list(Effect))), max_size=6
)
KEYS = ["/".join(parts) for n in range(1, 6) for parts in itertools.product("abz", repeat=n)]


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(some_rules, some_rules)
def test_outranking_is_what_trying_every_key_says(child: list[Rule], parent: list[Rule]) -> None:
    mine, theirs = CompiledRules(child), CompiledRules(parent)
    exceeds = any(mine.allows("read", key) and not theirs.allows("read", key) for key in KEYS)
    assert outranks(mine, theirs) is exceeds


def test_a_policy_that_is_hard_to_compare_is_taken_to_outrank() -> None:
    hard = [
        Rule("/".join("+" if i != at else f"s{i}{n}" for i in range(24)) + "/*", ("read",))
        for at in range(24)
        for n in range(10)
    ]
    denied = [Rule(r.pattern, r.verbs, Effect.DENY) for r in hard]
    child = CompiledRules([*hard, Rule("x", ("read",))])
    assert outranks(child, CompiledRules([*denied, Rule("*", ("read",)), *hard]))
    assert not outranks(child, CompiledRules([Rule("*", VERBS)]))


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(some_rules, st.sampled_from(KEYS))
def test_the_rule_that_is_named_is_the_one_that_decides(rules: list[Rule], key: str) -> None:
    named = deciding(rules, "read", key)
    assert decide(rules, "read", key) is (named is not None and named.effect is Effect.ALLOW)
    assert CompiledRules(rules).allows("read", key) is decide(rules, "read", key)
    assert named is None or matches(named.pattern, key)
