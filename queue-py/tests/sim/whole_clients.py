"""What clients of whole nodes do (`whole_node.py`), what goes wrong meanwhile, and the judges:
every message accounted for, every second delivery explained, the order of a stream kept, and
nothing lost or doubled on the way to the dead letters and back.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from random import Random
from typing import Any, Final

import msgspec
from whole_node import FOUNDERS, Machine, WholeCluster, played

from message_queue.core.ids import parse_id
from message_queue.core.operations import (
    Answer,
    ChangeRing,
    Configure,
    Consume,
    Direct,
    Nack,
    NewMessage,
    Operation,
    Produce,
    Redrive,
    Run,
    Settle,
    SettleRuns,
    results_decoder,
    settled_runs_decoder,
)
from message_queue.core.placement.membership import changing
from message_queue.core.placement.ring import PARTITIONS, partition_of
from testkit.checkers import total_queue
from testkit.history import History
from testkit.history import Operation as Recorded
from testkit.sim.coverage import Coverage
from testkit.sim.virtual_loop import VirtualLoop, run_virtually

QUEUES: Final = ("alpha", "beta")
SICK, DEAD = "sick", "sick.dead"
VISIBILITY_MS: Final = 700
SLACK_MS: Final = 50
PATIENCE_S: Final = 3.0
"""A client hears within two seconds, unless its node is dead or stopped."""


class Whole:
    """One run."""

    def __init__(
        self, loop: VirtualLoop, rng: Random, root: Path, *, calm: bool, moves: bool
    ) -> None:
        self.loop = loop
        self.rng = rng
        self.calm = calm
        self.moves = moves
        self.cluster = WholeCluster(loop, rng, root, spare=1 if moves else 0)
        self.doomed = rng.choice(self.cluster.machines)
        """Whose disk may be lost: of every confirmed record another has a copy."""
        self.coverage = self.cluster.coverage
        self.history = History(clock=lambda: int(loop.time() * 1e6))
        self.stopped = False
        self.sick: dict[str, str] = {}
        """Body -> what its produce was told: ok, fail or unknown."""

    # -- one request -----------------------------------------------------------------------------

    async def _told(self, answered: asyncio.Future[Any], patience_s: float) -> Any:
        timer = self.loop.call_later(patience_s, _resolve, answered, None)
        try:
            return await answered
        finally:
            timer.cancel()

    async def call(
        self, work: Callable[[Machine], Coroutine[Any, Any, Any]], patience_s: float = PATIENCE_S
    ) -> Any:
        """What some machine answers; None: nothing, in that time. Who hangs up is noticed."""
        machine = self.rng.choice(self.cluster.machines)
        process, answered = machine.process, self.loop.create_future()
        if process is None or machine.node is None:
            await self.cluster.sleep(0.05)
            return Answer(503, b'{"definite":true}')

        async def asked() -> None:
            _resolve(answered, await work(machine))

        task = process.spawn(asked())
        answer = await self._told(answered, patience_s)
        if answer is None:
            process.call(task.cancel)
        return answer

    async def ask(self, op: Operation) -> Answer | None:
        async def asked(machine: Machine) -> Answer:
            assert machine.node is not None
            return await machine.node.router.ask(op)

        answer: Answer | None = await self.call(asked)
        return answer

    async def certain(self, op: Operation) -> Answer:
        """Asked until it is answered."""
        for _ in range(200):
            answer = await self.ask(op)
            if answer is not None and answer.status != 503:
                return answer
            await self.cluster.sleep(0.1)
        raise AssertionError(f"never answered: {op}")

    # -- producers -------------------------------------------------------------------------------

    async def stream(self, me: str) -> None:
        """Sends without waiting for answers, through one machine as long as that does its part."""
        rng, count = self.rng, 0
        while not self.stopped:
            machine = rng.choice(self.cluster.machines)
            queue = rng.choice(QUEUES)
            session: list[tuple[Recorded, asyncio.Future[Answer | None]]] = []
            process, node = machine.process, machine.node
            for _ in range(rng.randint(5, 30)):
                if self.stopped or node is None or process is None or not process.alive:
                    break
                many = rng.choice((1, 1, 1, 2, 30))
                bodies = [f"{me}/{count + n}" for n in range(many)]
                count += many
                operation = self.history.invoke(me, "produce", queue, bodies)
                answered: asyncio.Future[Answer | None] = self.loop.create_future()
                group = rng.choice((None, None, None, "g"))
                messages = tuple(NewMessage(_json(body), group_id=group) for body in bodies)
                op = Produce(queue, messages, batch=True)
                self.loop.call_later(PATIENCE_S, _resolve, answered, None)
                process.call(node.router.begin, op, lambda a, to=answered: _resolve(to, a))
                session.append((operation, answered))
                await self.cluster.sleep(rng.choice((0.0, 0.0, 0.002, 0.03)))
            await self._end_session(session)
            await self.cluster.sleep(rng.uniform(0, 0.1))

    async def _end_session(
        self, session: Sequence[tuple[Recorded, asyncio.Future[Answer | None]]]
    ) -> None:
        stored: list[tuple[int, str]] = []
        certain = True
        for operation, answered in session:
            answer = await answered
            self._record(operation, answer, "ids")
            certain &= operation.status != "unknown"
            if operation.status == "ok":
                for name in operation.result:
                    parsed = parse_id(name)
                    assert parsed is not None
                    stored.append((parsed.dot, name))
        if certain:
            # Whatever refused some of them, and whoever owned the queue meanwhile.
            assert stored == sorted(stored), f"order lost: {stored}"
            self.coverage.hit("ordered_sessions")
            if len({dot >> 40 for dot, _ in stored}) > 1:
                self.coverage.hit("sessions_across_owners")

    def _record(self, operation: Recorded, answer: Answer | None, field: str) -> None:
        info = {"batch": True}
        if answer is not None and answer.status in (200, 201):
            found = msgspec.json.decode(answer.body)[field] if field else None
            self.history.ok(operation, found, info)
        elif answer is None or b'"definite":false' in answer.body:
            self.coverage.hit(f"{operation.kind}_unknown")
            self.history.unknown(operation, info)
        else:
            self.coverage.hit(f"{operation.kind}_refused")
            self.history.fail(operation, info=info)

    # -- consumers -------------------------------------------------------------------------------

    async def consumer(self, me: str) -> None:
        rng = self.rng
        while not self.stopped:
            queue = rng.choice(QUEUES)
            most = rng.choice((1, 5, 20, 40))
            op = Consume(queue, most, True, rng.choice((0, 300)), VISIBILITY_MS)
            got = await self.consume(me, op)
            if got is None:
                continue
            messages, receipt = got
            if len(messages) > 1 and receipt:
                self.coverage.hit("delivered_together")
            kept = messages[: rng.choice((len(messages), len(messages), len(messages) // 2))]
            if messages and rng.random() < 0.1:
                await self.nack(me, queue, messages[-1])
                kept = [m for m in kept if m is not messages[-1]]
            if kept and rng.random() < 0.9:
                await self.ack(me, queue, kept, receipt)
            await self.cluster.sleep(rng.uniform(0, 0.03))

    async def consume(self, me: str, op: Consume) -> tuple[list[dict[str, Any]], str] | None:
        operation = self.history.invoke(
            me, "consume", op.queue, {"visibility_ms": op.visibility_ms}
        )

        async def consumed(machine: Machine) -> Answer:
            assert machine.node is not None
            now = machine.node.router.consume_now(op)
            return (now or await machine.node.router.consume(op)).answer

        answer = await self.call(consumed, PATIENCE_S + op.wait_ms / 1000)
        if answer is None or answer.status not in (200, 204):
            self._record(operation, answer, "")
            return None
        messages = json.loads(answer.body)["messages"] if answer.status == 200 else []
        self.history.ok(operation, messages)
        return messages, answer.receipt

    async def ack(self, me: str, queue: str, messages: list[dict[str, Any]], receipt: str) -> None:
        """One by one in a list, or as the delivery that they were."""
        operation = self.history.invoke(me, "ack", queue, [m["id"] for m in messages])
        dots = [name.dot for m in messages if (name := parse_id(m["id"])) is not None]
        partition = partition_of(queue)
        op: Direct
        receipts = [m["receipt"] for m in messages]
        if receipt and self.rng.random() < 0.5:
            op = SettleRuns(partition, _runs(dots, receipts))
        else:
            op = Settle(partition, tuple(dots), tuple(receipts))
        answer = await self.direct(op)
        if answer is None or answer.status != 200:
            self._record(operation, answer, "")
            return
        gone = [200] * len(dots)
        if isinstance(op, SettleRuns):
            told = settled_runs_decoder.decode(answer.body)
            self.coverage.hit("acked_as_a_run")
            assert not told.unknown, "issued, and unknown"
            gone = [409 if dot in told.overtaken else 200 for dot in dots]
        else:
            gone = list(results_decoder.decode(answer.body).statuses)
        assert set(gone) <= {200, 409}, f"issued, and unknown: {gone}"
        if 409 not in gone:
            self.history.ok(operation)
            return
        # Those that were overtaken were not acked: as if each had been asked by itself.
        self.coverage.hit("overtaken")
        operation.argument = [m["id"] for m, s in zip(messages, gone, strict=True) if s == 200]
        self.history.ok(operation)

    async def nack(self, me: str, queue: str, message: dict[str, Any]) -> None:
        operation = self.history.invoke(me, "nack", queue, message["id"])
        name = parse_id(message["id"])
        assert name is not None
        answer = await self.direct(Nack(partition_of(queue), name.dot, message["receipt"], 20))
        if answer is not None and answer.status == 200:
            self.coverage.hit("nacked")
            self.history.ok(operation)
        else:
            self.history.unknown(operation)

    async def direct(self, op: Direct) -> Answer | None:
        """As a stream asks."""

        async def begun(machine: Machine) -> Answer:
            assert machine.node is not None
            answered: asyncio.Future[Answer] = self.loop.create_future()
            machine.node.router.begin(op, lambda answer: _resolve(answered, answer))
            return await answered

        answer: Answer | None = await self.call(begun)
        return answer

    # -- dead letters ----------------------------------------------------------------------------

    async def patient(self) -> None:
        """Fills a queue whose every message dies, and sends the letters back, again and again."""
        rng, count = self.rng, 0
        while not self.stopped:
            bodies = [f"s/{count + n}" for n in range(rng.choice((1, 20)))]
            count += len(bodies)
            op = Produce(SICK, tuple(NewMessage(_json(body)) for body in bodies), batch=True)
            answer = await self.ask(op)
            status = "unknown"
            if answer is not None and answer.status == 201:
                status = "ok"
            elif answer is not None and b'"definite":false' not in answer.body:
                status = "fail"
            self.sick.update(dict.fromkeys(bodies, status))
            await self.ask(Consume(SICK, 20, True, 0, 0))
            if rng.random() < 0.3:
                redriven = await self.ask(Redrive(DEAD))
                if redriven is not None and redriven.status == 200:
                    self.coverage.hit("redriven", json.loads(redriven.body)["messages"])
            await self.cluster.sleep(rng.uniform(0, 0.3))

    # -- faults ----------------------------------------------------------------------------------

    async def trouble(self) -> None:
        cluster, rng = self.cluster, self.rng
        while not self.stopped:
            await cluster.sleep(rng.uniform(0.05, 1.2))
            victim, other = rng.sample(cluster.machines, 2)
            down = [m for m in cluster.machines if m.process is None or m.process.paused]
            kind = rng.choice(("kill", "kill", "power", "stop", "pause", "reset", "reset", "cut",
                               "swallow", "isolate", "wipe"))  # fmt: skip
            if down and kind in ("kill", "stop", "pause", "wipe"):
                continue
            self.coverage.hit(f"fault_{kind}")
            for_s = rng.uniform(0.02, 1.8)
            match kind:
                case "kill":
                    victim.kill(power=rng.random() < 0.5)
                    self.loop.call_later(for_s, victim.start)
                case "power":
                    cluster.power_cut()
                    for machine in cluster.machines:
                        self.loop.call_later(rng.uniform(0, 0.5), machine.start)
                case "stop":
                    await victim.stop()
                    self.loop.call_later(for_s / 2, victim.start)
                case "pause" if victim.process is not None:
                    victim.process.pause()
                    self.loop.call_later(for_s, victim.process.resume)
                case "wipe":
                    self.doomed.erase()
                    self.loop.call_later(for_s / 2, self.doomed.start)
                case "reset":
                    cluster.reset(victim, other)
                case "cut" | "swallow":
                    action = cluster.cut if kind == "cut" else cluster.swallow
                    action(victim, other)
                    if rng.random() < 0.5:
                        action(other, victim)
                    self.loop.call_later(for_s, cluster.heal)
                case "isolate":
                    for machine in cluster.machines:
                        if machine is not victim:
                            cluster.cut(victim, machine)
                            cluster.cut(machine, victim)
                    self.loop.call_later(for_s, cluster.heal)
                case _:
                    pass

    async def mend(self) -> None:
        self.cluster.heal()
        await self.cluster.sleep(2.5)
        for machine in self.cluster.machines:
            if machine.process is not None:
                machine.process.resume()
            machine.start()
        self.cluster.heal()
        for _ in range(600):
            self.retire()
            up = [m.node for m in self.cluster.machines if m.node is not None]
            owned = Counter(p for node in up for p in node.hosts)
            rings = [node.replicator.ring for node in up if not node.keeper.departed]
            settled = len({r.version for r in rings}) == 1 and not any(map(changing, rings))
            if settled and len(owned) == PARTITIONS and max(owned.values()) == 1:
                return
            await self.cluster.sleep(0.05)
        raise AssertionError(f"not whole again: {len(owned)} partitions are owned, rings {rings}")

    # -- the ring --------------------------------------------------------------------------------

    async def operator(self) -> None:
        """Lets machines in and out; whoever has left comes back as another node."""
        rng = self.rng
        while not self.stopped:
            await self.cluster.sleep(rng.uniform(0.1, 1.5))
            self.retire()
            known = [m.node.replicator.ring for m in self.cluster.machines if m.node is not None]
            if not known:
                continue
            ring = max(known, key=lambda ring: ring.version)
            members = {member.addr for _, member in ring.members}
            outside = [m for m in self.cluster.machines if m.addr not in members]
            if changing(ring) and rng.random() < 0.8:
                continue
            if outside and (len(members) <= FOUNDERS or rng.random() < 0.5):
                machine = rng.choice(outside)
                machine.start()
                op = ChangeRing(True, machine.addr)
            else:
                op = ChangeRing(False, rng.choice(sorted(members)))
            answer = await self.ask(op)
            if answer is not None and answer.status == 202:
                self.coverage.hit("join" if op.join else "leave")

    def retire(self) -> None:
        """Who has left is switched off and erased, to be let in again one day."""
        for machine in self.cluster.machines:
            if machine.node is not None and machine.node.keeper.departed:
                self.coverage.hit("departed")
                machine.erase()
                machine.joins = True

    # -- from the beginning to the end -----------------------------------------------------------

    async def play(self, seconds: float) -> Coverage:
        for machine in self.cluster.machines[:FOUNDERS]:
            machine.start()
        for queue in QUEUES:
            await self.configure(queue, max_deliveries=None)
        await self.configure(SICK, max_deliveries=1)
        work = [self.stream(f"p{n}") for n in range(3)]
        work += [self.consumer(f"c{n}") for n in range(3)]
        work.append(self.patient())
        if not self.calm:
            work.append(self.trouble())
        if self.moves:
            work.append(self.operator())
        tasks = [self.loop.create_task(each) for each in work]
        await self.cluster.sleep(seconds)
        self.stopped = True
        await asyncio.gather(*tasks)
        await self.mend()
        await self.judge()
        self.coverage.hit("runs")
        return self.coverage

    async def configure(self, queue: str, **settings: object) -> None:
        changes = msgspec.json.encode({"visibility_ms": VISIBILITY_MS, **settings})
        assert (await self.certain(Configure(queue, changes))).status == 200

    async def judge(self) -> None:
        left = {m["id"] for queue in QUEUES for m in await self.drained(queue)}
        verdict = total_queue.check(
            self.history, leftovers=left, causes=total_queue.CAUSES, slack_ms=SLACK_MS
        )
        verdict.require()
        for kind in ("produce", "ack"):
            done = sum(op.kind == kind and op.status == "ok" for op in self.history)
            self.coverage.hit(f"{kind}_ok", done)
        for cause in total_queue.CAUSES & verdict.counts.keys():
            self.coverage.hit(f"again: {cause}", verdict.counts[cause])
        # Letters are moved, never copied: each stands where it died, or where it went.
        await self.cluster.sleep(8)
        await self.configure(SICK, max_deliveries=None)
        there = Counter([m["body"] for queue in (SICK, DEAD) for m in await self.drained(queue)])
        for body, status in self.sick.items():
            found = there.pop(body, 0)
            wanted = {"ok": (1,), "fail": (0,), "unknown": (0, 1)}[status]
            assert found in wanted, f"{body}: produce {status}, and there are {found} of it"
        assert not there, f"never produced: {there}"
        self.coverage.hit("letters", len(self.sick))

    async def drained(self, queue: str) -> list[dict[str, Any]]:
        """All that a queue holds, once its leases are over; of a group one after the other."""
        await self.cluster.sleep(1.5)
        found: list[dict[str, Any]] = []
        while True:
            answer = await self.certain(Consume(queue, 1000, True, 0, 60_000))
            assert answer.status in (200, 204), answer
            if answer.status == 204:
                return found
            messages = json.loads(answer.body)["messages"]
            found += messages
            dots = tuple(name.dot for m in messages if (name := parse_id(m["id"])) is not None)
            gone = await self.certain(Settle(partition_of(queue), dots, (None,) * len(dots)))
            assert set(results_decoder.decode(gone.body).statuses) == {200}


def _json(body: str) -> bytes:
    return msgspec.json.encode(body)


def _resolve(answered: asyncio.Future[Any], answer: Any) -> None:
    if not answered.done():
        answered.set_result(answer)


def _runs(dots: Sequence[int], receipts: Sequence[str]) -> tuple[Run, ...]:
    """Those that follow each other and were given under one receipt, as one."""
    found: list[Run] = []
    for dot, receipt in zip(dots, receipts, strict=True):
        last = found[-1] if found else None
        if last is not None and last.first + last.count == dot and last.receipt == receipt:
            found[-1] = Run(last.first, last.count + 1, receipt)
        else:
            found.append(Run(dot, 1, receipt))
    return tuple(found)


def play(
    seed: int, root: Path, seconds: float = 12.0, *, calm: bool = False, moves: bool = False
) -> Coverage:
    """One seed; raises AssertionError with the seed in it."""
    rng = Random(seed)
    found: list[Coverage] = []

    async def main(loop: VirtualLoop) -> None:
        whole = Whole(loop, rng, root, calm=calm, moves=moves)
        with played(loop, whole.cluster.disks, rng):
            found.append(await whole.play(seconds))

    try:
        run_virtually(main, rng)
    except Exception as error:
        told = f"seed {seed}: {type(error).__name__}: {error}"
        error.add_note(told)
        raise
    return found[0]
