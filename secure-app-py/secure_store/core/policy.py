"""Who may do what: rules over key patterns, default deny.

Theory of operation. A key is a path of segments (`a/b/c`). A pattern is a path too; a segment of
it is

* a literal, which matches itself,
* `+`, which matches exactly one segment,
* `*`, allowed only as the last segment, which matches one or more remaining segments.

So `a/*` matches `a/b` and `a/b/c`, never `a` and never `ab`. Among the rules that mention the verb
and match the key, the most specific one decides: patterns are compared segment by segment from the
left, literal before `+` before `*` (Vault's ACL order, made total). Where two equally specific
rules disagree deny wins. No rule: denied.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import Literal

import msgspec

Verb = Literal["read", "write", "delete", "list", "audit", "admin"]
VERBS: tuple[Verb, ...] = ("read", "write", "delete", "list", "audit", "admin")

MAX_KEY_BYTES = 256
MAX_RULES = 256
MAX_DECIDED = 8_192  # verdicts remembered; forgotten when any policy changes


class Effect(Enum):
    """What a rule does to the requests it decides."""

    ALLOW = "allow"
    DENY = "deny"


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of a policy: on keys like `pattern`, `verbs` are allowed or denied."""

    pattern: str
    verbs: tuple[Verb, ...]
    effect: Effect = Effect.ALLOW


class PolicyError(ValueError):
    """A pattern, key or role name that this store does not accept; the message says why."""


def check_path(path: str, what: str) -> None:
    """Raise PolicyError unless `path` is a clean key: 1..256 bytes, no control characters, no `..`.

    A key that could be read two ways (`a/../b`) would let a rule be passed by, and a line break
    would let one request forge two log lines. Lone surrogates are not text and cannot be stored.
    """
    try:
        size = len(path.encode())
    except UnicodeEncodeError:
        raise PolicyError(f"{what} is not valid Unicode text") from None
    if size == 0:
        raise PolicyError(f"{what} must not be empty")
    if size > MAX_KEY_BYTES:
        raise PolicyError(f"{what} must be at most {MAX_KEY_BYTES} bytes")
    if not path.isprintable():
        raise PolicyError(f"{what} must not contain control characters")
    if path == ".." or ".." in path.split("/"):
        raise PolicyError(f"{what} must not contain '..'")


def check_key(key: str) -> None:
    """Raise PolicyError unless `key` may name a value."""
    check_path(key, "key")


def check_pattern(pattern: str) -> None:
    """Raise PolicyError unless `pattern` is a path whose `+` and `*` are whole segments, `*`
    last."""
    check_path(pattern, "pattern")
    segments = pattern.split("/")
    for index, segment in enumerate(segments):
        if segment == "*" and index != len(segments) - 1:
            raise PolicyError("pattern may have '*' only as its last segment")
        if segment not in ("+", "*") and ("*" in segment or "+" in segment):
            raise PolicyError("pattern may have '+' and '*' only as whole segments")


def matches(pattern: str, key: str) -> bool:
    """Whether the pattern covers the key. Both are taken as already checked."""
    wanted = pattern.split("/")
    given = key.split("/")
    for index, segment in enumerate(wanted):
        if segment == "*":
            return len(given) > index
        if index >= len(given) or (segment not in ("+", given[index])):
            return False
    return len(given) == len(wanted)


def specificity(pattern: str) -> tuple[int, ...]:
    """A sort key: the smaller, the more specific. Compared segment by segment from the left."""
    return tuple(2 if s == "*" else 1 if s == "+" else 0 for s in pattern.split("/"))


def deciding(rules: Iterable[Rule], verb: Verb, key: str) -> Rule | None:
    """The rule that decides `verb` on `key`; None if none does, which is a denial. Linear in the
    rules; see PolicySet for the hot path."""
    best: Rule | None = None
    best_rank: tuple[int, ...] = ()
    for rule in rules:
        if verb not in rule.verbs or not matches(rule.pattern, key):
            continue
        rank = specificity(rule.pattern)
        if best is None or rank < best_rank:
            best, best_rank = rule, rank
        elif rank == best_rank and rule.effect is Effect.DENY:
            best = rule
    return best


def decide(rules: Iterable[Rule], verb: Verb, key: str) -> bool:
    """True if the rules allow `verb` on `key`."""
    rule = deciding(rules, verb, key)
    return rule is not None and rule.effect is Effect.ALLOW


class Branch:
    """One segment deep in a compiled policy: literal children, a `+` child, and the `*` verdict."""

    __slots__ = ("here", "literal", "plus", "star")

    def __init__(self) -> None:
        self.literal: dict[str, Branch] = {}
        self.plus: Branch | None = None
        self.star: bool | None = None
        self.here: bool | None = None


class CompiledRules:
    """The rules of one set of roles as a tree per verb: a decision costs the key's depth, not the
    number of rules. The search order *is* the rank (literal, `+`, `*` at each segment), so the
    first verdict found is the most specific one; deny wins when two rules meet in one leaf.
    """

    __slots__ = ("_roots",)

    def __init__(self, rules: Iterable[Rule]) -> None:
        self._roots: dict[str, Branch] = {verb: Branch() for verb in VERBS}
        for rule in rules:
            allow = rule.effect is Effect.ALLOW
            for verb in rule.verbs:
                self._insert(self._roots[verb], rule.pattern.split("/"), allow)

    @staticmethod
    def _insert(branch: Branch, segments: list[str], allow: bool) -> None:
        for segment in segments:
            if segment == "*":
                branch.star = allow if branch.star is None else branch.star and allow
                return
            if segment == "+":
                branch.plus = branch.plus or Branch()
                branch = branch.plus
            else:
                branch = branch.literal.setdefault(segment, Branch())
        branch.here = allow if branch.here is None else branch.here and allow

    def root(self, verb: Verb) -> Branch:
        """The tree of one verb (see outrank.py)."""
        return self._roots[verb]

    def allows(self, verb: Verb, key: str) -> bool:
        """Whether `verb` on `key` is allowed; the same verdict as decide() over the same rules."""
        return self._search(self._roots[verb], key.split("/"), 0) or False

    def _search(self, branch: Branch, segments: list[str], depth: int) -> bool | None:
        if depth == len(segments):
            return branch.here
        literal = branch.literal.get(segments[depth])
        if literal is not None:
            verdict = self._search(literal, segments, depth + 1)
            if verdict is not None:
                return verdict
        if branch.plus is not None:
            verdict = self._search(branch.plus, segments, depth + 1)
            if verdict is not None:
                return verdict
        return branch.star


BUILT_IN_ROLES: dict[str, tuple[Rule, ...]] = {
    "admin": (Rule("*", VERBS),),
    "user": (Rule("*", ("read", "list")),),
}


class PolicySet:
    """Every role's rules. A role that nobody defined grants nothing."""

    def __init__(self, roles: dict[str, tuple[Rule, ...]] | None = None) -> None:
        self.roles: dict[str, tuple[Rule, ...]] = dict(BUILT_IN_ROLES if roles is None else roles)
        self._compiled: dict[tuple[str, ...], CompiledRules] = {}
        self._decided: dict[tuple[tuple[str, ...], Verb, str], bool] = {}

    def put(self, role: str, rules: tuple[Rule, ...]) -> None:
        """Replace one role's rules (already validated by check_rules)."""
        self.roles[role] = rules
        self._compiled.clear()
        self._decided.clear()

    def allows(self, roles: tuple[str, ...], verb: Verb, key: str) -> bool:
        """Whether a principal with these roles may do `verb` on `key`; the roles' rules are
        pooled."""
        question = (roles, verb, key)
        verdict = self._decided.get(question)
        if verdict is None:
            if len(self._decided) >= MAX_DECIDED:
                self._decided.clear()
            verdict = self._decided[question] = self.compiled(roles).allows(verb, key)
        return verdict

    def rules(self, roles: tuple[str, ...]) -> list[Rule]:
        """The pooled rules of these roles."""
        return [rule for role in roles for rule in self.roles.get(role, ())]

    def compiled(self, roles: tuple[str, ...]) -> CompiledRules:
        found = self._compiled.get(roles)
        if found is None:
            found = self._compiled[roles] = CompiledRules(self.rules(roles))
            if len(self._compiled) > 1024:
                self._compiled = {roles: found}
        return found


def check_role_name(role: str) -> None:
    """Raise PolicyError unless `role` is 1..64 of `a-z 0-9 . _ -`, starting with a letter.

    Lower case only: two spellings of one role must not be two roles.
    """
    ok = 0 < len(role) <= 64 and "a" <= role[0] <= "z"
    if not ok or not all("a" <= c <= "z" or "0" <= c <= "9" or c in "._-" for c in role):
        raise PolicyError("role must be 1 to 64 of a-z 0-9 . _ - and start with a letter")


def check_rules(rules: tuple[Rule, ...]) -> None:
    """Raise PolicyError unless every pattern is sound, every rule names a verb, and there are
    few."""
    if len(rules) > MAX_RULES:
        raise PolicyError(f"a role may have at most {MAX_RULES} rules")
    for rule in rules:
        check_pattern(rule.pattern)
        if not rule.verbs:
            raise PolicyError("verbs must name at least one verb")
