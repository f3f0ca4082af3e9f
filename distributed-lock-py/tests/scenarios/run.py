#!/usr/bin/env python3
"""Replays scenario files against the Raft core: python tests/scenarios/run.py PATH…

A PATH is a file or a folder of *.json; a file holds one scenario or an array of them. The format
is described in FORMAT.md beside this file. Prints `ID ok` or `ID FAILED at step N: why` (steps are
counted from 1; 0 is the set-up) and the totals; exits 0 only if every scenario passed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent / "src"), str(HERE)]

import msgspec  # noqa: E402 - the paths come first
from scripted_cluster import ClusterSettings, InitialState, ScriptedCluster  # noqa: E402

from lock_manager.core.invariants import InvariantBroken  # noqa: E402
from lock_manager.core.raft import (  # noqa: E402
    AppendEntries,
    AppendReply,
    Entry,
    EntryKind,
    Message,
    RequestVote,
    VoteReply,
)


class ScenarioError(Exception):
    """The scenario does not hold, or is not one."""


class Scenario(msgspec.Struct, frozen=True):
    """One scenario; fields that the format does not name (notes, titles) are let be."""

    id: str
    config: ClusterSettings
    steps: list[list[Any]]
    init: dict[str, InitialState] = {}


class SentMessage(msgspec.Struct, frozen=True, kw_only=True):
    """A `send` step's message; what is left out is 0, false or empty."""

    type: str
    sender: int = msgspec.field(name="from", default=0)
    to: int
    term: int = 0
    prev_index: int = 0
    prev_term: int = 0
    entries_terms: list[int] = []
    commit: int = 0
    last_index: int = 0
    last_term: int = 0
    pre_vote: bool = False
    granted: bool = False
    success: bool = False
    match_index: int = 0

    def as_message(self) -> Message:
        address = {"sender": self.sender, "to": self.to, "term": self.term}
        match self.type:
            case "request_vote":
                return RequestVote(
                    **address,
                    last_index=self.last_index,
                    last_term=self.last_term,
                    pre_vote=self.pre_vote,
                )
            case "request_vote_reply":
                return VoteReply(**address, granted=self.granted, pre_vote=self.pre_vote)
            case "append_entries":
                return AppendEntries(
                    **address,
                    prev_index=self.prev_index,
                    prev_term=self.prev_term,
                    entries=tuple(
                        Entry(index, term, EntryKind.COMMAND, b"")
                        for index, term in enumerate(self.entries_terms, self.prev_index + 1)
                    ),
                    commit=self.commit,
                )
            case "append_entries_reply":
                return AppendReply(
                    **address,
                    success=self.success,
                    match_index=self.match_index if self.success else 0,
                    prev_index=self.prev_index,
                    hint_index=self.last_index or self.match_index,
                    hint_term=self.last_term,
                )
            case _:
                raise ScenarioError(f"unknown message type {self.type!r}")


class Player:
    """Plays one scenario's steps against a cluster."""

    def __init__(self, scenario: Scenario) -> None:
        init = {int(node): state for node, state in scenario.init.items()}
        self.cluster = ScriptedCluster(scenario.config, init)
        self.read_ids: dict[str, int] = {}

    # --------------------------------------------------------------------------------------- steps

    def play(self, step: list[Any]) -> None:
        """Carries out one step; raises whatever shows that the scenario does not hold."""
        if not step or step[0] not in STEPS:
            raise ScenarioError(f"unknown step {json.dumps(step)}")
        name, *arguments = step
        perform, kinds = STEPS[name]
        if len(arguments) != len(kinds) or not all(map(_is, arguments, kinds)):
            raise ScenarioError(f"wrong arguments in {json.dumps(step)}")
        perform(self, *arguments)
        self.cluster.check()

    def _running(self, node_id: int) -> bool:
        node = self.cluster.nodes.get(node_id)
        if node is None:
            raise ScenarioError(f"there is no node {node_id}")
        return node.running

    def campaign(self, node_id: int) -> None:
        if self._running(node_id):
            node = self.cluster.nodes[node_id]
            node.core.campaign(node.clock)
            self.cluster.settle(node_id)

    def tick(self, node_id: int, ticks: int) -> None:
        if self._running(node_id):
            self.cluster.tick(node_id, ticks)

    def propose(self, node_id: int, data: object) -> None:
        if self._running(node_id):
            self.cluster.nodes[node_id].core.propose([msgspec.json.encode(data)])
            self.cluster.settle(node_id)

    def deliver_one(self, source: int, target: int) -> None:
        link = self.cluster.link(source, target)
        if link:
            self.cluster.hand_over(link.popleft())

    def deliver_last(self, source: int, target: int) -> None:
        link = self.cluster.link(source, target)
        if link:
            self.cluster.hand_over(link.pop())

    def duplicate(self, source: int, target: int) -> None:
        link = self.cluster.link(source, target)
        if link:
            link.append(link[0])

    def crash(self, node_id: int) -> None:
        if self._running(node_id):
            self.cluster.crash(node_id)

    def restart(self, node_id: int) -> None:
        if not self._running(node_id):
            self.cluster.restart(node_id)

    def compact(self, node_id: int) -> None:
        if self._running(node_id):
            self.cluster.compact(node_id)

    def read(self, node_id: int, name: str) -> None:
        read_id = self.read_ids[name] = len(self.read_ids) + 1
        self.cluster.reads[read_id] = None
        if self._running(node_id):
            self.cluster.checker.asked(node_id, read_id)
            self.cluster.nodes[node_id].core.read_index(read_id)
            self.cluster.settle(node_id)

    def transfer(self, node_id: int, target: int) -> None:
        if self._running(node_id):
            node = self.cluster.nodes[node_id]
            node.core.transfer(target, node.clock)
            self.cluster.settle(node_id)

    def add(self, leader: int, member: int) -> None:
        if self._running(leader):
            self.cluster.add(leader, member)

    def remove(self, leader: int, member: int) -> None:
        if self._running(leader):
            self.cluster.nodes[leader].core.remove(member)
            self.cluster.settle(leader)

    def send(self, fields: dict[str, Any]) -> None:
        message = msgspec.convert(fields, SentMessage)
        self._running(message.to)
        self.cluster.hand_over(message.as_message())

    # -------------------------------------------------------------------------------- expectations

    def expect(self, expected: dict[str, Any]) -> None:
        for key, value in expected.items():
            match key:
                case "reads":
                    for name, index in value.items():
                        found = self.cluster.reads.get(self.read_ids.get(name, 0))
                        _compare(f"read {name}", found, index)
                case "in_flight":
                    for link, count in value.items():
                        source, _, target = link.partition(">")
                        found = len(self.cluster.link(int(source), int(target)))
                        _compare(f"messages in flight {link}", found, count)
                case _:
                    self._expect_node(int(key), value)

    def _expect_node(self, node_id: int, expected: dict[str, Any]) -> None:
        self._running(node_id)
        core = self.cluster.nodes[node_id].core
        for field, value in expected.items():
            match field:
                case "role":
                    role = str(core.role)
                    holds = role != value[1:] if value.startswith("!") else role == value
                    if not holds:
                        raise ScenarioError(f"node {node_id}: role is {role}, expected {value}")
                    continue
                case "term":
                    found: Any = core.term
                case "vote":
                    found = core.voted_for
                case "leader":
                    found = core.leader_id
                case "log_terms":
                    found = [
                        core.entry_term(index)
                        for index in range(core.snapshot_index + 1, core.last_index + 1)
                    ]
                case "commit":
                    found = core.commit_index
                case "snapshot_index":
                    found = core.snapshot_index
                case _:
                    raise ScenarioError(f"unknown field {field!r} in expect")
            _compare(f"node {node_id}: {field}", found, value)


def _compare(what: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise ScenarioError(f"{what} is {json.dumps(found)}, expected {json.dumps(expected)}")


def _is(value: Any, kind: type) -> bool:
    return kind is object or (isinstance(value, kind) and not isinstance(value, bool))


STEPS: dict[str, tuple[Callable[..., None], tuple[type, ...]]] = {
    "campaign": (Player.campaign, (int,)),
    "tick": (Player.tick, (int, int)),
    "propose": (Player.propose, (int, object)),
    "deliver": (lambda player, a, b: player.cluster.deliver(a, b), (int, int)),
    "deliver_one": (Player.deliver_one, (int, int)),
    "deliver_last": (Player.deliver_last, (int, int)),
    "drop": (lambda player, a, b: player.cluster.link(a, b).clear(), (int, int)),
    "duplicate": (Player.duplicate, (int, int)),
    "cut": (lambda player, a, b: player.cluster.cut(a, b), (int, int)),
    "heal": (lambda player, a, b: player.cluster.heal(a, b), (int, int)),
    "isolate": (lambda player, n: player.cluster.isolate(n), (int,)),
    "heal_all": (lambda player: player.cluster.heal_all(), ()),
    "crash": (Player.crash, (int,)),
    "restart": (Player.restart, (int,)),
    "compact": (Player.compact, (int,)),
    "read": (Player.read, (int, str)),
    "transfer": (Player.transfer, (int, int)),
    "add": (Player.add, (int, int)),
    "remove": (Player.remove, (int, int)),
    "stabilize": (lambda player: player.cluster.stabilize(), ()),
    "send": (Player.send, (dict,)),
    "expect": (Player.expect, (dict,)),
}


def verdict(raw: Any) -> str | None:
    """None if the scenario passes, else `at step N: why`."""
    step = 0
    try:
        scenario = msgspec.convert(raw, Scenario)
        player = Player(scenario)
        for action in scenario.steps:
            step += 1
            player.play(action)
    except (ScenarioError, InvariantBroken) as error:
        return f"at step {step}: {error}"
    except Exception as error:  # noqa: BLE001 - a crash fails its scenario, not the others
        return f"at step {step}: {type(error).__name__}: {error}"
    return None


def files(paths: list[str]) -> Iterator[Path]:
    for name in paths:
        path = Path(name)
        if path.is_dir():
            yield from sorted(path.rglob("*.json"))
        else:
            yield path


def scenarios(path: Path) -> list[tuple[str, Any]]:
    """(id, scenario) of everything in a file; a broken file counts as one scenario that fails."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [(str(path), error)]
    several = raw if isinstance(raw, list) else [raw]
    return [
        (str(one.get("id", path)) if isinstance(one, dict) else str(path), one) for one in several
    ]


def main(paths: list[str]) -> int:
    if not paths or paths[0] in ("-h", "--help"):
        print(__doc__, file=sys.stderr)
        return 2
    passed = failed = 0
    for path in files(paths):
        for name, raw in scenarios(path):
            why = f"at step 0: {raw}" if isinstance(raw, Exception) else verdict(raw)
            if why is None:
                passed += 1
                print(f"{name} ok")
            else:
                failed += 1
                print(f"{name} FAILED {why}")
    print(f"{passed} passed, {failed} failed")
    return 0 if passed and not failed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
