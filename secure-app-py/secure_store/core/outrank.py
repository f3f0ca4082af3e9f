"""Whether one set of roles may do anything that another may not.

A token may not make a token that outranks it. Roles are names, so comparing names would not do: a
role of another name can grant less, and a narrower pattern can be covered by a wider one. This
compares what the rules *mean*: it walks both compiled policies at once, over every key that the two
can tell apart (each literal segment that either mentions, and one that neither does).
"""

from __future__ import annotations

from secure_store.core.policy import VERBS, Branch, CompiledRules, Verb

MAX_STEPS = 50_000
_OTHER = "\0"  # a segment that no pattern can name

# What is left of a search after some segments, in order of rank: branches that may still decide,
# and verdicts of `*` rules, which decide whatever follows.
_Left = tuple[Branch | bool, ...]


def outranks(child: CompiledRules, parent: CompiledRules) -> bool:
    """Whether `child` allows some verb on some key that `parent` does not. Also true if finding out
    would take too long (policies made to be hard to compare)."""
    return any(_exceeds(verb, child, parent) for verb in VERBS)


def _exceeds(verb: Verb, child: CompiledRules, parent: CompiledRules) -> bool:
    start = ((child.root(verb),), (parent.root(verb),))
    seen: set[tuple[_Left, _Left]] = {start}
    waiting: list[tuple[_Left, _Left]] = [start]
    steps = 0
    while waiting:
        mine, theirs = waiting.pop()
        for segment in _segments(mine, theirs):
            steps += 1
            if steps > MAX_STEPS:
                return True
            after = (_step(mine, segment), _step(theirs, segment))
            if _verdict(after[0]) and not _verdict(after[1]):
                return True
            if not after[0] or after[1][:1] == (True,) or after in seen:
                continue  # nothing is granted from here on; or all is granted to the parent
            if all(isinstance(x, bool) for x in (*after[0], *after[1])):
                continue  # longer keys get the same verdicts
            seen.add(after)
            waiting.append(after)
    return False


def _segments(mine: _Left, theirs: _Left) -> set[str]:
    return {_OTHER}.union(
        *(branch.literal for branch in (*mine, *theirs) if not isinstance(branch, bool))
    )


def _step(left: _Left, segment: str) -> _Left:
    """The search after one more segment; nothing behind a `*` verdict can be reached."""
    after: list[Branch | bool] = []
    for each in left:
        if isinstance(each, bool):
            after.append(each)
            break
        literal = each.literal.get(segment)
        if literal is not None:
            after.append(literal)
        if each.plus is not None:
            after.append(each.plus)
        if each.star is not None:
            after.append(each.star)
            break
    return tuple(after)


def _verdict(left: _Left) -> bool:
    """What is decided for a key that ends here."""
    for each in left:
        verdict = each if isinstance(each, bool) else each.here
        if verdict is not None:
            return verdict
    return False
