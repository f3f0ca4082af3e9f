"""Is there an order, within real time, in which a sequential object shows this history?

Wing & Gong's search (1993) with Lowe's memoisation (2017): remember each (set of linearised
operations, state) and never enter it twice. Keys are judged apart (locality: Herlihy & Wing 1990).
An operation of unknown outcome may take effect at any time after its invocation, or never; one that
failed never did and is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from testkit.checkers.models import ILLEGAL, Lock, Model, Register, VersionedRegister
from testkit.checkers.verdict import Verdict
from testkit.history import History, Operation

__all__ = ["Lock", "Register", "VersionedRegister", "check"]

MAX_CONFIGURATIONS: Final = 2_000_000
SHOWN: Final = 25


def check(
    history: History | Iterable[Operation],
    model: Model,
    *,
    key_of: Callable[[Operation], str] = lambda operation: operation.key,
    max_configurations: int = MAX_CONFIGURATIONS,
) -> Verdict:
    """Judge every key; the first invalid one is told with its smallest window.

    `max_configurations` bounds the whole search; beyond it the verdict is "gave up" (valid None),
    unless another key is invalid.
    """
    keys: dict[str, list[Operation]] = {}
    for operation in history:
        if operation.status != "fail":
            keys.setdefault(key_of(operation), []).append(operation)
    left = max_configurations
    gave_up: str | None = None
    for key, operations in keys.items():
        outcome = _search(operations, model, left)
        left -= outcome.entered
        if outcome.valid is False:
            window = _smallest(operations, model, max_configurations)
            culprit = max(window, key=_completion)
            reason = f"key {key!r} is not linearizable: no order allows [{culprit}]"
            return Verdict(False, reason, window[-SHOWN:], {"operations": len(operations)})
        if outcome.valid is None and gave_up is None:
            gave_up = key
    counts = {"keys": len(keys), "configurations": max_configurations - max(left, 0)}
    if gave_up is not None:
        return Verdict(
            None, f"key {gave_up!r}: over {max_configurations} configurations", (), counts
        )
    return Verdict(True, "", (), counts)


@dataclass(frozen=True, slots=True)
class _Outcome:
    valid: bool | None
    entered: int


def _search(operations: Sequence[Operation], model: Model, budget: int) -> _Outcome:
    """Depth-first over linearisations, on a doubly linked list of calls and returns in time order.

    Lifting an operation out of the list linearises it. The head's first return bounds the choice:
    whatever is called after that return cannot come before it.
    """
    entries: list[tuple[int, int, int]] = []  # time, 0 call / 1 return, operation number
    for number, operation in enumerate(operations):
        entries.append((operation.invoked_us, 0, number))
        if operation.status == "ok" and operation.completed_us is not None:
            entries.append((operation.completed_us, 1, number))
    entries.sort()
    size = len(entries)
    head, tail = size, size + 1  # sentinels
    following = [*range(1, size), tail, 0 if size else tail, tail]
    previous = [head, *range(size - 1), head, size - 1 if size else head]
    if size == 0:
        return _Outcome(True, 0)
    position: dict[int, list[int]] = {}
    for at, (_, _, number) in enumerate(entries):
        position.setdefault(number, []).append(at)
    remaining = sum(1 for places in position.values() if len(places) == 2)

    state: Any = model.initial()
    lifted = 0
    seen = {(0, state)}
    stack: list[tuple[int, Any]] = []  # the call's place, the state before it
    at = following[head]
    while remaining:
        if at != tail and entries[at][1] == 0:
            number = entries[at][2]
            after = model.step(state, operations[number])
            if after is not ILLEGAL:
                configuration = (lifted | 1 << number, after)
                if configuration not in seen:
                    if len(seen) > budget:
                        return _Outcome(None, len(seen))
                    seen.add(configuration)
                    stack.append((at, state))
                    lifted, state = configuration
                    for place in position[number]:
                        following[previous[place]] = following[place]
                        previous[following[place]] = previous[place]
                    remaining -= len(position[number]) == 2
                    at = following[head]
                    continue
            at = following[at]
            continue
        # A return whose call was not linearised yet (or the end): the last choice was wrong.
        if not stack:
            return _Outcome(False, len(seen))
        at, state = stack.pop()
        number = entries[at][2]
        lifted &= ~(1 << number)
        for place in reversed(position[number]):
            following[previous[place]] = place
            previous[following[place]] = place
        remaining += len(position[number]) == 2
        at = following[at]
    return _Outcome(True, len(seen))


def _completion(operation: Operation) -> int:
    return -1 if operation.completed_us is None else operation.completed_us


def _smallest(operations: Sequence[Operation], model: Model, budget: int) -> list[Operation]:
    """The shortest invalid prefix, less the reads that it does not need.

    Linearizability is prefix-closed, so the prefix can be searched by halving. Leaving out a read
    of an invalid history may make it valid, never a valid one invalid: what stays is a proof.
    """
    ends = sorted(o.completed_us for o in operations if o.completed_us is not None)
    low, high = 0, len(ends) - 1
    while low < high:
        middle = (low + high) // 2
        if _search(_until(operations, ends[middle]), model, budget).valid is False:
            high = middle
        else:
            low = middle + 1
    window = _until(operations, ends[high])
    for operation in [o for o in window if model.is_read(o)]:
        shorter = [o for o in window if o is not operation]
        if _search(shorter, model, budget // 10).valid is False:
            window = shorter
    return window


def _until(operations: Sequence[Operation], end_us: int) -> list[Operation]:
    """What was known at `end_us`: later invocations left out, later completions unknown."""
    known = []
    for operation in operations:
        if operation.invoked_us > end_us:
            continue
        if operation.completed_us is not None and operation.completed_us > end_us:
            operation = _open(operation)
        known.append(operation)
    return known


def _open(operation: Operation) -> Operation:
    return Operation(
        number=operation.number,
        process=operation.process,
        kind=operation.kind,
        key=operation.key,
        argument=operation.argument,
        invoked_us=operation.invoked_us,
    )
