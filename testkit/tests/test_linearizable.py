"""The linearizability checker, against histories that must pass, must fail, and a brute force."""

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testkit.checkers import linearizable
from testkit.checkers.models import ILLEGAL, Lock, Model, Register, VersionedRegister, freeze
from testkit.history import History, Operation

Row = tuple[str, str, Any, int, int | None, Any]  # process, kind, argument, from, to, result


def history(*rows: Row, key: str = "x") -> list[Operation]:
    """Rows with `to` None are of unknown outcome."""
    return [
        Operation(
            number=number,
            process=process,
            kind=kind,
            key=key,
            argument=argument,
            invoked_us=invoked,
            completed_us=completed,
            status="unknown" if completed is None else "ok",
            result=result,
        )
        for number, (process, kind, argument, invoked, completed, result) in enumerate(rows)
    ]


GOOD: dict[str, tuple[Model, list[Operation]]] = {
    "nothing at all": (Register(), []),
    "a read during a write may see either": (
        Register(),
        history(
            ("a", "write", 1, 0, 10, None),
            ("b", "read", None, 1, 3, None),
            ("c", "read", None, 4, 6, 1),
        ),
    ),
    "an unknown write may take effect late": (
        Register(),
        history(
            ("a", "write", 1, 0, None, None),
            ("b", "read", None, 5, 6, None),
            ("b", "read", None, 100, 101, 1),
        ),
    ),
    "an unknown write may never take effect": (
        Register(),
        history(("a", "write", 1, 0, None, None), ("b", "read", None, 5, 6, None)),
    ),
    "a failed compare-and-set saw another value": (
        Register(),
        history(
            ("a", "write", 1, 0, 1, None),
            ("b", "cas", [2, 3], 2, 3, False),
            ("b", "cas", [1, 3], 4, 5, True),
            ("b", "read", None, 6, 7, 3),
        ),
    ),
    "increments count": (
        Register(),
        history(
            ("a", "incr", 1, 0, 9, 2),
            ("b", "incr", 1, 0, 9, 1),
            ("b", "incr", 5, 10, 11, 7),
        ),
    ),
    "an unknown write's version is learnt": (
        VersionedRegister(),
        history(
            ("a", "write", "u", 0, None, None),
            ("b", "read", None, 5, 6, {"value": "u", "version": 4}),
            ("b", "cas", {"expected_version": 4, "value": "v"}, 7, 8, 5),
            ("b", "delete", None, 9, 10, None),
            ("b", "read", None, 11, 12, None),
            ("b", "cas", {"expected_version": 0, "value": "w"}, 13, 14, 6),
        ),
    ),
    "sharers overlap and tokens grow": (
        Lock(),
        history(
            ("a", "acquire", {"type": "shared"}, 0, 1, 1),
            ("b", "acquire", {"type": "shared"}, 2, 3, 2),
            ("a", "release", None, 4, 5, True),
            ("b", "release", None, 4, 5, True),
            ("c", "acquire", {"type": "exclusive"}, 3, 9, 3),
            ("c", "acquire", {"type": "exclusive"}, 10, 11, 3),
        ),
    ),
    "an unknown acquire may block": (
        Lock(),
        history(
            ("a", "acquire", None, 0, None, None),
            ("b", "acquire", None, 5, 6, 7),
            ("b", "release", None, 7, 8, True),
            ("a", "acquire", None, 9, 10, 8),
        ),
    ),
    "a lock that is seen to be held, free, and held by one of unknown fate": (
        Lock(),
        history(
            ("a", "acquire", None, 0, 1, 1),
            ("r", "read", None, 2, 3, {"a": 1}),
            ("a", "release", None, 4, 5, True),
            ("r", "read", None, 6, 7, {}),
            ("b", "acquire", None, 6, None, None),
            ("r", "read", None, 8, 9, {"b": 4}),
        ),
    ),
}
BAD: dict[str, tuple[Model, list[Operation]]] = {
    "a stale read": (
        Register(),
        history(
            ("a", "write", 1, 0, 1, None),
            ("a", "write", 2, 2, 3, None),
            ("b", "read", None, 4, 5, 1),
        ),
    ),
    "a read that goes back": (
        Register(),
        history(
            ("a", "write", 1, 0, 100, None),
            ("b", "read", None, 10, 11, 1),
            ("c", "read", None, 12, 13, None),
        ),
    ),
    "an unknown write seen and then unseen": (
        Register(),
        history(
            ("a", "write", 1, 0, None, None),
            ("b", "read", None, 10, 11, 1),
            ("c", "read", None, 12, 13, None),
        ),
    ),
    "a value before it was written": (
        Register(),
        history(("b", "read", None, 0, 1, 7), ("a", "write", 7, 2, 3, None)),
    ),
    "two successful swaps of one value": (
        Register(),
        history(
            ("a", "write", 1, 0, 1, None),
            ("b", "cas", [1, 2], 2, 9, True),
            ("c", "cas", [1, 3], 2, 9, True),
        ),
    ),
    "a lost increment": (
        Register(),
        history(("a", "incr", 1, 0, 9, 1), ("b", "incr", 1, 0, 9, 1)),
    ),
    "one is not true": (
        Register(),
        history(("a", "write", 1, 0, 1, None), ("b", "read", None, 2, 3, True)),
    ),
    "a version that recurs": (
        VersionedRegister(),
        history(
            ("a", "write", "u", 0, 1, 1),
            ("a", "delete", None, 2, 3, None),
            ("a", "write", "v", 4, 5, 1),
        ),
    ),
    "a deleted key that reads": (
        VersionedRegister(),
        history(
            ("a", "write", "u", 0, 1, 1),
            ("a", "delete", None, 2, 3, None),
            ("b", "read", None, 4, 5, {"value": "u", "version": 1}),
        ),
    ),
    "two holders": (
        Lock(),
        history(("a", "acquire", None, 0, 1, 1), ("b", "acquire", None, 2, 3, 2)),
    ),
    "a token that goes back": (
        Lock(),
        history(
            ("a", "acquire", None, 0, 1, 5),
            ("a", "release", None, 2, 3, True),
            ("b", "acquire", None, 4, 5, 4),
        ),
    ),
    "a semaphore beyond its limit": (
        Lock(),
        history(
            ("a", "acquire", {"type": "semaphore", "permits": 2, "limit": 3}, 0, 1, 1),
            ("b", "acquire", {"type": "semaphore", "permits": 2, "limit": 3}, 2, 3, 2),
        ),
    ),
    "a holder that was seen after its release": (
        Lock(),
        history(
            ("a", "acquire", None, 0, 1, 1),
            ("a", "release", None, 2, 3, True),
            ("r", "read", None, 4, 5, {"a": 1}),
        ),
    ),
    "a holder seen with a token that is not its": (
        Lock(),
        history(("a", "acquire", None, 0, 1, 1), ("r", "read", None, 4, 5, {"a": 2})),
    ),
    "released yet refused": (
        Lock(),
        history(("a", "acquire", None, 0, 1, 1), ("a", "release", None, 2, 3, False)),
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_it_accepts(name: str) -> None:
    model, operations = GOOD[name]
    linearizable.check(operations, model).require()


@pytest.mark.parametrize("name", BAD)
def test_it_refuses(name: str) -> None:
    model, operations = BAD[name]
    verdict = linearizable.check(operations, model)
    assert verdict.valid is False
    with pytest.raises(AssertionError, match="not linearizable"):
        verdict.require()


def brute_force(operations: list[Operation], model: Model) -> bool:
    """Every order of every subset that leaves out only unknown operations."""
    live = [operation for operation in operations if operation.status != "fail"]
    certain = [o for o in live if o.status == "ok"]
    open_ended = [o for o in live if o.status != "ok"]
    for mask in range(1 << len(open_ended)):
        chosen = certain + [o for bit, o in enumerate(open_ended) if mask >> bit & 1]
        if any(_shows(order, model) for order in permutations(chosen)):
            return True
    return False


def _shows(order: tuple[Operation, ...], model: Model) -> bool:
    for index, operation in enumerate(order):
        for later in order[index + 1 :]:
            if later.completed_us is not None and later.completed_us < operation.invoked_us:
                return False
    state: Any = model.initial()
    for operation in order:
        state = model.step(state, operation)
        if state is ILLEGAL:
            return False
    return True


@st.composite
def tiny_histories(draw: st.DrawFn) -> list[Operation]:
    rows: list[Row] = []
    for number in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, 12))
        end = draw(st.one_of(st.none(), st.integers(1, 6)))
        value = st.integers(0, 2)
        kind = draw(st.sampled_from(["read", "write", "cas", "incr", "delete"]))
        argument: Any = None
        result: Any = None
        match kind:
            case "read":
                result = draw(st.one_of(st.none(), value))
            case "write":
                argument = draw(value)
            case "cas":
                argument = [draw(st.one_of(st.none(), value)), draw(value)]
                result = draw(st.booleans())
            case "incr":
                argument, result = 1, draw(st.integers(1, 3))
            case _:  # delete: neither argument nor result
                pass
        # Distinct times, so that the brute force need not know how ties are broken.
        invoked = start * 100 + number
        completed = None if end is None else (start + end) * 100 + 50 + number
        rows.append((f"p{number}", kind, argument, invoked, completed, result))
    return history(*rows)


@given(tiny_histories())
@settings(max_examples=200, deadline=None)
def test_it_agrees_with_brute_force_on_tiny_histories(operations: list[Operation]) -> None:
    verdict = linearizable.check(operations, Register())
    assert verdict.valid is brute_force(operations, Register())
    if verdict.valid is False:
        assert not brute_force(list(verdict.window), Register()), "the window must be a proof"


def test_keys_are_judged_apart_and_failed_operations_never_happened() -> None:
    good = history(("a", "write", 1, 0, 1, None), ("a", "read", None, 2, 3, 1), key="x")
    bad = history(("a", "write", 1, 0, 1, None), ("a", "read", None, 2, 3, None), key="y")
    verdict = linearizable.check(good + bad, Register())
    assert verdict.valid is False
    assert "'y'" in verdict.reason
    bad[0].status = "fail"
    linearizable.check(good + bad, Register()).require()


def test_the_window_leaves_out_what_it_does_not_need() -> None:
    rows: list[Row] = []
    for step in range(200):
        rows.append(("a", "write", step, step * 10, step * 10 + 1, None))
        rows.append(("b", "read", None, step * 10 + 2, step * 10 + 3, step))
    rows.append(("c", "read", None, 1505, 1506, 3))
    verdict = linearizable.check(history(*rows), Register())
    assert verdict.valid is False
    assert verdict.window[-1].result == 3
    assert sum(operation.kind == "read" for operation in verdict.window) == 1


def test_it_gives_up_when_the_search_is_bounded() -> None:
    rows: list[Row] = [(f"p{n}", "incr", 1, 0, 1000, None) for n in range(12)]
    rows.append(("q", "read", None, 2000, 2001, 99))
    operations = history(*rows)
    for operation in operations[:12]:
        operation.status, operation.completed_us = "unknown", None
    verdict = linearizable.check(operations, Register(default=0), max_configurations=50)
    assert verdict.valid is None
    with pytest.raises(AssertionError, match="GAVE UP"):
        verdict.require()


def test_ten_thousand_operations_are_judged_quickly() -> None:
    rows: list[Row] = []
    for step in range(2_500):
        base = step * 100
        rows += [
            ("a", "write", step, base, base + 50, None),
            ("b", "read", None, base + 10, base + 60, step),
            ("c", "read", None, base + 55, base + 90, step),
            ("d", "cas", [step, step], base + 61, base + 95, True),
        ]
    linearizable.check(history(*rows), Register()).require()


def test_histories_are_kept_and_loaded(tmp_path: Path) -> None:
    clock = iter([5, 5, 5, 9])
    recorded = History(clock=lambda: next(clock))
    first = recorded.invoke("a", "write", "x", {"deep": [1, None]})
    recorded.ok(first, {"version": 1}, info=200)
    second = recorded.invoke("b", "read", "x")
    recorded.unknown(second, "timeout")
    assert first.invoked_us < (first.completed_us or 0) < second.invoked_us
    recorded.save(tmp_path / "h.jsonl")
    assert list(History.load(tmp_path / "h.jsonl")) == list(recorded)
    assert freeze({"b": 1, "a": [True]}) == freeze({"a": [True], "b": 1})
