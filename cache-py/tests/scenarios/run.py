"""Scenarios from data files, played against the pure core: `python run.py FILE.json…`

Prints `ID ok` or `ID FAILED at step N: why`, then `N passed, M failed`; exit code 0 only if all
passed, 2 for a file that holds no scenarios. The format is in README.md beside this file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # mesi_cache
# The network whose messages a script delivers one by one:
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

from little_net import LittleNet

from mesi_cache.core.invariants import check_cluster, check_machine
from mesi_cache.core.records import Cas, Delete, Incr, Operation, Write
from mesi_cache.core.step import Changed, Found, Missing, Unavailable

Scenario = dict[str, Any]


class BadFile(Exception):
    """No file of scenarios; the text says where."""


class Player:
    """One scenario under way. `AssertionError`: it did not come as it should."""

    def __init__(self, scenario: Scenario) -> None:
        config = scenario.get("config", {})
        self._net = LittleNet(*config.get("nodes", "abc"), capacity=config.get("capacity", 4))
        self._keys: dict[str, str] = {}
        for number, (name, home) in enumerate(scenario.get("keys", {"x": "a"}).items()):
            self._keys[name] = self._net.key_of(home, number)
        self._calls: dict[str, tuple[str, int]] = {}
        self._lives = dict.fromkeys(self._net.names, 1)

    def step(self, verb: str, *arguments: Any) -> None:
        """Do one step, then look at every invariant."""
        getattr(self, "_" + verb)(*arguments)
        for machine in self._net.machines.values():
            check_machine(machine)
            assert machine.counts.ignored == 0, "a message that no table foresees"
        check_cluster([(machine, self._net.now_ms) for machine in self._net.machines.values()])

    # --- what clients do ----------------------------------------------------------------------

    def _read(self, node: str, key: str, call: str) -> None:
        self._ask(node, key, None, call)

    def _write(self, node: str, key: str, value: Any, call: str, ttl_ms: int = 0) -> None:
        self._ask(node, key, Write(json.dumps(value).encode(), ttl_ms), call)

    def _cas(self, node: str, key: str, version: int, value: Any, call: str) -> None:
        self._ask(node, key, Cas(version, json.dumps(value).encode()), call)

    def _incr(self, node: str, key: str, by: int, call: str) -> None:
        self._ask(node, key, Incr(by), call)

    def _delete(self, node: str, key: str, call: str) -> None:
        self._ask(node, key, Delete(), call)

    def _ask(self, node: str, key: str, operation: Operation | None, call: str) -> None:
        assert call not in self._calls, f"{call} was asked before"
        self._calls[call] = self._net.ask(node, self._keys[key], operation)

    # --- what happens to messages and nodes ---------------------------------------------------

    def _deliver(self, source: str, target: str, kind: str = "") -> None:
        self._net.receive(source, target, self._take(source, target, kind))

    def _drop(self, source: str, target: str, kind: str = "") -> None:
        self._take(source, target, kind)

    def _duplicate(self, source: str, target: str, kind: str = "") -> None:
        message = self._take(source, target, kind)
        self._net.wires[source, target][:0] = [message, message]

    def _flow(self) -> None:
        self._net.flow()

    def _pass(self, ms: float) -> None:
        self._net.pass_time(ms)

    def _evict(self, node: str) -> None:
        step = self._net.step()
        self._net.machines[node].cache.surrender(step, 1)
        self._net.carry_out(node, step)

    def _restart(self, node: str) -> None:
        # Whoever asked its earlier life gets no answer any more; a new life counts from one again.
        self._calls = {call: who for call, who in self._calls.items() if who[0] != node}
        self._net.answers = {
            who: answer for who, answer in self._net.answers.items() if who[0] != node
        }
        self._lives[node] += 1
        self._net.start(node, self._lives[node])

    def _take(self, source: str, target: str, kind: str) -> Any:
        wire = self._net.wires.get((source, target), [])
        for at, message in enumerate(wire):
            if kind in ("", type(message).__name__):
                return wire.pop(at)
        raise AssertionError(f"no {kind or 'message'} on its way from {source} to {target}: {wire}")

    # --- what must be seen --------------------------------------------------------------------

    def _expect(self, states: dict[str, dict[str, str]]) -> None:
        for node, lines in states.items():
            for key, state in lines.items():
                seen = self._net.state(node, self._keys[key])
                assert seen == state, f"{key} is {seen} on {node}, not {state}"

    def _answered(self, call: str, expected: dict[str, Any]) -> None:
        answer = self._net.answers.get(self._calls[call])
        assert answer is not None, f"{call} has no answer yet"
        told = _told(answer)
        wrong = {name: told.get(name) for name in expected if told.get(name) != expected[name]}
        assert not wrong, f"{call} was told {told}"

    def _waiting(self, *calls: str) -> None:
        for call in calls:
            answer = self._net.answers.get(self._calls[call])
            assert answer is None, f"{call} was told {answer}"

    def _on_its_way(self, source: str, target: str, *kinds: str) -> None:
        wire = [type(m).__name__ for m in self._net.wires.get((source, target), [])]
        assert wire == list(kinds), f"from {source} to {target}: {wire}"

    def _logged(self, home: str, key: str, *values: Any) -> None:
        seen = [
            x.record.value for x in self._net.log[home] if x.record and x.key == self._keys[key]
        ]
        shown = [None if value is None else json.loads(value) for value in seen]
        assert shown == list(values), f"{home} has logged {shown}"


def _told(answer: Any) -> dict[str, Any]:
    """An answer in the words of the scenarios."""
    match answer:
        case Found(value=value, version=version, state=state, hit=hit):
            return {"value": json.loads(value), "version": version, "state": state, "hit": hit}
        case Missing():
            return {"missing": True}
        case Changed(outcome):
            value = json.loads(outcome.value) if outcome.value is not None else None
            return {"status": outcome.status, "version": outcome.version, "value": value}
        case Unavailable(definite=definite):
            return {"unavailable": True, "definite": definite}
    raise TypeError(answer)


VERBS = frozenset(name[1:] for name in vars(Player) if name.startswith("_") and name[1] != "_")


def load(path: str) -> list[Scenario]:
    """The scenarios of one file; raises BadFile."""
    try:
        scenarios = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise BadFile(f"{path}: {e}") from e
    if not isinstance(scenarios, list):
        raise BadFile(f"{path}: expected a list of scenarios")
    for scenario in scenarios:
        if not isinstance(scenario, dict) or not {"id", "steps"} <= scenario.keys():
            raise BadFile(f"{path}: a scenario needs id and steps")
        for step in scenario["steps"]:
            if not isinstance(step, list) or not step or step[0] not in VERBS - {"ask", "take"}:
                raise BadFile(f"{path}: {scenario['id']}: no such step: {step!r}")
    return scenarios


def play(scenario: Scenario) -> str:
    """What went wrong, and at which step; empty if nothing did."""
    player = Player(scenario)
    for number, step in enumerate(scenario["steps"], 1):
        try:
            player.step(*step)
        except (AssertionError, KeyError, TypeError) as e:
            said = str(e) if isinstance(e, AssertionError) else f"{type(e).__name__} {e}"
            return f"at step {number}: {said} in {json.dumps(step)}"
    return ""


def main(argv: list[str]) -> int:
    try:
        scenarios = [scenario for path in argv for scenario in load(path)]
    except BadFile as e:
        print(f"run.py: error: {e}", file=sys.stderr)
        return 2
    failed = 0
    for scenario in scenarios:
        why = play(scenario)
        failed += bool(why)
        print(f"{scenario['id']} FAILED {why}" if why else f"{scenario['id']} ok")
    print(f"{len(scenarios) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
