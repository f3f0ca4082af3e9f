"""The lock service without HTTP: Raft, the lock machine, cluster time and the desk, under every
fault.

`LockNode` does what node.py does, with the same `Desk`, on the simulator's clock, disk and
network. Clients retry with the same ids until they know; their histories are judged by the clock
of the simulation.
"""

from __future__ import annotations

from typing import Any

from raft_node import RaftNode, small_limits
from register_harness import EVERYTHING, scenario, through_the_wire

from lock_manager.api.pending import Desk, Pending, Proposed
from lock_manager.core.cluster_clock import ClusterClock
from lock_manager.core.invariants import RaftChecker
from lock_manager.core.locks import invariants, machine, snapshot
from lock_manager.core.locks.commands import (
    Acquire,
    Ask,
    Batch,
    Command,
    Keepalive,
    LeaderStarted,
    LockType,
    Release,
    decode_batch,
    encode_batch,
    fingerprint,
)
from lock_manager.core.locks.machine import LockMachine
from lock_manager.core.locks.replies import (
    Acquired,
    Deadlock,
    Held,
    LeaseLost,
    NotHeld,
    Released,
    Renewed,
    Reply,
    TimedOut,
)
from lock_manager.core.raft import (
    Accepted,
    Configuration,
    Entry,
    EntryKind,
    Member,
    Note,
    RaftConfig,
    Role,
    SteppedDown,
    WonElection,
)
from testkit.checkers import locks
from testkit.sim import TIMED_OUT, Harness, Host, World

BATCHES_UNDER_WAY = 2
STAMP_EVERY_MS = 1_000
LOCKS = ("a", "b", "c")
# A leader's clock may run fast by the drift of the faults: its leases are that much shorter.
SLACK_MS = 10.0
ENDS_AT_ONCE = machine.ENDS_AT_ONCE


class Answer:
    """One client's connection with a request on it; to `Desk` it is the future to be answered."""

    def __init__(self, promise: Any) -> None:
        self.pending: Pending | None = None
        self._promise = promise
        self._done = False

    def done(self) -> bool:
        return self._done

    def set_result(self, reply: Reply) -> None:
        self._done = True
        self._promise.resolve(reply)

    def set_exception(self, error: Exception) -> None:
        self._done = True
        self._promise.resolve(error)


class MachineOnTheLog:
    """The lock machine as RaftNode's machine: snapshots only, for batches are applied by
    LockNode."""

    def __init__(self) -> None:
        self.locks = LockMachine()

    def apply(self, entry: Entry) -> Any:
        raise AssertionError("LockNode applies")

    def snapshot(self) -> bytes:
        return snapshot.encode(self.locks)

    def restore(self, data: bytes) -> None:
        self.locks = snapshot.restore(data)
        assert snapshot.encode(self.locks) == data, "a snapshot does not restore to itself"


class LockNode(RaftNode):
    """RaftNode with the lock service's turn of the loop around it."""

    machine: MachineOnTheLog

    def __init__(
        self, host: Host, config: RaftConfig, checker: RaftChecker, **settings: int
    ) -> None:
        super().__init__(host, config, checker, MachineOnTheLog(), **settings)
        self.clock = ClusterClock()
        self.desk = Desk()
        self.logged_ms = 0
        self.begun_term = 0

    @property
    def leads(self) -> bool:
        return self.core.role is Role.LEADER

    # ------------------------------------------------------------------------------------ requests

    def ask(self, command: Command, answer: Answer) -> None:
        if not self.leads:
            answer.set_exception(LookupError("not the leader"))
            return
        answer.pending = self.desk.submit(command, answer)
        self._flush()

    def hang_up(self, answer: Answer) -> None:
        """The client's connection closed."""
        if answer.pending is not None:
            for command in self.desk.abandon(answer.pending):
                self.desk.submit(command, None)
            self.host.cover("hung up")
            self._flush()

    # ------------------------------------------------------------------------------------ the loop

    def _flush(self) -> None:
        self._propose()
        super()._flush()
        if not self.host.alive:
            return
        due = self._stamp_due_ms() if self.leads else None
        if due is not None:
            self.host.set_timer("stamp", max(1, due - self.clock.now_ms))

    def on_timer(self, name: str) -> None:
        if name == "stamp":
            self._flush()
        else:
            super().on_timer(name)

    def _after_commit(self) -> None:
        self._propose()

    def _propose(self) -> None:
        if not self.leads:
            self.desk.refuse_mail(LookupError("not the leader"))
            return
        if self.begun_term != self.core.term:
            self._begin_term()
        cluster_ms = self.clock.observe(self.host.now_ms())
        self.core.advance_stamp(cluster_ms)
        while self.desk.has_mail and self.desk.batches_under_way < BATCHES_UNDER_WAY:
            if not self._propose_batch(self.desk.take_mail(), cluster_ms):
                return
        due = self._stamp_due_ms()
        if due is not None and cluster_ms >= due and not self.desk.batches_under_way:
            self._propose_batch([], cluster_ms)
            self.host.cover("stamps")

    def _begin_term(self) -> None:
        self.begun_term = self.core.term
        self.clock.lead(max(self.core.stamp_ms, self.machine.locks.now_ms), self.host.now_ms())
        self.logged_ms = self.clock.now_ms
        self.desk.put_back([Pending(LeaderStarted(), None)])

    def _stamp_due_ms(self) -> int | None:
        due = self.machine.locks.next_due_ms()
        if due is None:
            return None
        return max(min(due, self.logged_ms + STAMP_EVERY_MS), self.machine.locks.now_ms + 1)

    def _propose_batch(self, mail: list[Any], cluster_ms: int) -> bool:
        batch = Batch(cluster_ms, [pending.command for pending in mail])
        result = self.core.propose([encode_batch(batch)])
        if isinstance(result, Accepted):
            self.logged_ms = cluster_ms
            self.desk.proposed(result.first_index, Proposed(result.term, batch, mail, 0.0))
            return True
        self.desk.put_back(mail)
        return False

    def _apply(self, entry: Entry) -> None:
        assert entry.index == self._applied + 1, "entries are applied in order, each once"
        self._applied = entry.index
        own = self.desk.take_proposed(entry.index, entry.term)
        locks = self.machine.locks
        if entry.kind is not EntryKind.COMMAND:
            locks.applied_index = entry.index
            return
        outcomes = locks.apply(entry.index, decode_batch(entry.payload))
        invariants.check(locks, lagging=bool(outcomes.expired))
        if (due := locks.next_due_ms()) is not None and due <= locks.now_ms:
            self.host.cover("leases that must wait for their end")
        follow_up: list[Command] = []
        if own is not None:
            follow_up += self.desk.answer(own.pendings, outcomes)
        follow_up += self.desk.resolve(outcomes.resolutions)
        for expired in outcomes.expired:
            self.host.cover("reaped grants" if expired.reaped else "expired leases")
        if self.leads:
            for command in follow_up:
                self.desk.submit(command, None)

    def _note(self, note: Note) -> None:
        super()._note(note)
        match note:
            case WonElection():
                self._propose()
            case SteppedDown():
                self.clock.follow()
                self.desk.leadership_lost()
            case _:
                pass


class LockHarness(Harness[LockNode]):
    """Clients that take and free a few locks on three nodes."""

    voters = (1, 2, 3)

    def __init__(self, world: World[LockNode]) -> None:
        super().__init__(world)
        # One entry ends one lease, as if masses of them ended together; until `finish`, for the
        # tests of the machine may run in this process, too.
        machine.ENDS_AT_ONCE = 1
        self.checker = RaftChecker()
        self.members = Configuration(tuple(Member(node_id=node) for node in self.voters))

    def build(self, host: Host) -> LockNode:
        return LockNode(
            host,
            small_limits(host, self.members),
            self.checker,
            snapshot_every=host.rng.choice([0, 10, 40]),
            keep_entries=host.rng.choice([0, 5]),
        )

    def begin(self) -> None:
        for client in range(4):
            self.world.spawn(self.client(f"c{client}"))

    # ------------------------------------------------------------------------------------- clients

    async def client(self, me: str) -> None:
        """Takes a lock, perhaps a second one, holds, renews, frees; knows each outcome before it
        goes on."""
        world = self.world
        rng = world.rng
        ttl_ms = rng.choice([0, 400, 1_200])  # for all its life: a lease never becomes none
        for turn in range(12):
            names = rng.sample(LOCKS, rng.choice([1, 1, 1, 2]))
            tokens: dict[str, int] = {}
            for name in names:  # in any order: deadlocks happen, and are found
                token = await self.acquire(me, f"{me}-{turn}-{name}", name, ttl_ms)
                if token is None:
                    break
                tokens[name] = token
            await world.sleep_ms(rng.uniform(0, 60))
            if ttl_ms and tokens and rng.random() < 0.4:
                await self.keepalive(me, ttl_ms)
                await world.sleep_ms(rng.uniform(0, ttl_ms))
            for name, token in tokens.items():
                if ttl_ms and rng.random() < 0.15:
                    world.coverage.hit("left to expire")
                    continue
                await self.release(me, f"{me}-{turn}-{name}-free", name, token)
            await world.sleep_ms(rng.uniform(0, 80))

    async def acquire(self, me: str, request_id: str, name: str, ttl_ms: int) -> int | None:
        rng, history = self.world.rng, self.world.history
        # Each client always wants a lock in the same way: conversions would blur the history.
        shared = (int(me[1:]) + LOCKS.index(name)) % 3 == 0
        ask = Ask(name, LockType.SHARED if shared else LockType.EXCLUSIVE)
        command = Acquire(me, (ask,), rng.choice([0, 100, 2_000]), ttl_ms, request_id)
        argument: dict[str, Any] = {"type": ask.lock_type.value}
        if ttl_ms:
            argument["ttl_ms"] = ttl_ms
        operation = history.invoke(me, "acquire", name, argument)
        reply = await self.until_known(command)
        match reply:
            case Acquired(fencing_token=token):
                history.ok(operation, token)
                self.world.coverage.hit("grants")
                return token
            case Held() | TimedOut() | Deadlock() | LeaseLost():
                history.fail(operation)
                self.world.coverage.hit(type(reply).__name__)
            case None:
                history.unknown(operation)
            case _:
                raise AssertionError(f"acquire answered {reply}")
        return None

    async def release(self, me: str, request_id: str, name: str, token: int) -> None:
        history = self.world.history
        operation = history.invoke(me, "release", name, None)
        reply = await self.until_known(Release(me, name, token, request_id))
        match reply:
            case Released():
                history.ok(operation)
            case NotHeld():
                history.ok(operation)
                self.world.coverage.hit("released too late")
            case None:
                history.unknown(operation)
            case _:
                raise AssertionError(f"release answered {reply}")

    async def keepalive(self, me: str, ttl_ms: int) -> None:
        history = self.world.history
        operation = history.invoke(me, "keepalive", "", {"ttl_ms": ttl_ms})
        reply = await self.until_known(Keepalive(me, ttl_ms))
        match reply:
            case Renewed(lost=()):
                history.ok(operation)
                self.world.coverage.hit("renewals")
            case Renewed():
                history.unknown(operation)  # some of its locks are gone, it does not matter which
            case None:
                history.unknown(operation)
            case _:
                raise AssertionError(f"keepalive answered {reply}")

    async def until_known(self, command: Acquire | Release | Keepalive) -> Reply | None:
        """Retries with the same ids, at any node, until there is an answer; None: gave up."""
        world = self.world
        if not isinstance(command, Keepalive):
            command = type(command)(
                **{
                    **{field: getattr(command, field) for field in command.__struct_fields__},
                    "fingerprint": fingerprint(command),
                }
            )
        for _ in range(200):
            target = self.probable_leader()
            promise = world.promise(timeout_ms=world.rng.choice([150, 700, 4_000]))
            answer = Answer(promise)
            world.tell(target, lambda node, answer=answer: node.ask(command, answer))
            reply = await promise
            if reply is TIMED_OUT:
                world.tell(target, lambda node, answer=answer: node.hang_up(answer))
                world.coverage.hit("retries")
            elif isinstance(reply, Exception):
                world.coverage.hit("turned away")
            else:
                return reply
            await world.sleep_ms(world.rng.uniform(5, 60))
        return None

    def probable_leader(self) -> str:
        leaders = [name for name in sorted(self.world.nodes) if self.world.nodes[name].leads]
        if leaders and self.world.rng.random() < 0.95:
            return self.world.rng.choice(leaders)
        return self.world.rng.choice(self.world.names)

    # --------------------------------------------------------------------------------------- judge

    def finish(self) -> None:
        machine.ENDS_AT_ONCE = ENDS_AT_ONCE
        locks.check(self.world.history, slack_ms=SLACK_MS).require()
        nodes = list(self.world.nodes.values())
        leaders = [node for node in nodes if node.leads]
        assert leaders, "nobody leads though all is well"
        most = max(node._applied for node in nodes)
        images = {node.machine.snapshot() for node in nodes if node._applied == most}
        assert len(images) == 1, "machines that applied the same log differ"


LOCK = scenario(
    "lock",
    LockHarness,
    EVERYTHING,
    duration_ms=3_500,
    settle_ms=4_000,
    wire=through_the_wire,
)
