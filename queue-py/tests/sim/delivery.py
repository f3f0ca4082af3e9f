"""The replication core with the real delivery machine (``PartitionOwner``), as ``hosting.py`` joins
them: batches one after the other, long polls, dedupe, groups, delays, priorities, nacks, receipts.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec
from sim_judge import Stopping
from sim_node import SimNode, wire

from message_queue.core.delivery.invariants import check
from message_queue.core.delivery.lots import Taken, receipts_of, singly
from message_queue.core.delivery.model import Receipt
from message_queue.core.delivery.owner import SETTINGS_KEY, PartitionOwner
from message_queue.core.delivery.stored import MessageMeta, decode
from message_queue.core.ids import message_id, pack_dot, parse_id, unpack_dot
from message_queue.core.messages import AppendRecord
from message_queue.core.operations import (
    Answer,
    Configure,
    Consume,
    Nack,
    NewMessage,
    Operation,
    Produce,
    Settle,
    SettleRuns,
    results_decoder,
)
from message_queue.core.replication.contract import Accepted
from message_queue.core.replication.effects import Committed, Gained, Lost
from message_queue.core.replication.state import PartitionState
from testkit.checkers import total_queue
from testkit.sim import PERFECT, ROUGH, TIMED_OUT, Faults, Host, LinkSettings, Scenario

VISIBILITY_MS = 500
ANSWER_WITHIN_MS = 1_600


class DeliveryNode(SimNode):
    """``hosting.Host`` in miniature, one ``PartitionOwner`` a partition."""

    def __init__(self, host: Host, harness: DeliveryHarness) -> None:
        super().__init__(host, harness)
        self.owners: dict[int, PartitionOwner] = {}
        self.replies: dict[tuple[int, int, int], Any] = {}
        self.polls: dict[tuple[int, int, int], Any] = {}
        self.tokens = 0

    # -- ownership -------------------------------------------------------------------------------

    def gained(self, gained: Gained) -> None:
        assert self.core is not None
        partition = gained.partition
        state = self.core.state(partition)
        owner = PartitionOwner(
            partition, gained.epoch, lambda dot: state.records.context.has(*unpack_dot(dot))
        )
        held = [(pack_dot(*dot), *self.stored(partition, dot)) for dot in sorted(state.held.dots())]
        settings = {
            key: setting.value
            for key, setting in state.records.settings.items()
            if key.startswith(SETTINGS_KEY)
        }
        if gained.soft:
            self.host.cover("leases_passed_on")
        assert not owner.restore(held, settings, gained.soft, self.cluster_ms())
        self.owners[partition] = owner
        self.after(partition)

    def stored(self, partition: int, dot: tuple[int, int]) -> tuple[bytes, int]:
        meta, body = self.bodies[partition, dot[0], dot[1]]
        return meta, len(body)

    def committed(self, done: Committed, first: int) -> None:
        owner = self.owners.get(done.partition)
        if owner is not None and owner.epoch == done.epoch:
            owner.committed(done.upto, self.cluster_ms())
            self.after(done.partition)

    def lost(self, lost: Lost) -> None:
        owner = self.owners.pop(lost.partition)
        if owner.in_flight:
            self.host.cover("clean_in_doubt" if lost.clean else "in_doubt")
        owner.lost(lost.clean)
        self.finish(owner)
        for key, (reply, _) in list(self.polls.items()):
            if key[:2] == (owner.partition, owner.epoch):
                del self.polls[key]
                reply.resolve(("moved", None))

    def jumped(self, by_ms: int) -> None:
        for owner in self.owners.values():
            owner.postpone(by_ms)

    def cluster_ms(self) -> int:
        assert self.core is not None
        return self.core.cluster_ms(self.host.now_ms())

    # -- what the owner decided ------------------------------------------------------------------

    def finish(self, owner: PartitionOwner) -> None:
        finished, owner.finished = owner.finished, []
        for token, answer in finished:
            reply = self.replies.pop((owner.partition, owner.epoch, token), None)
            if reply is not None:
                reply.resolve(("moved", None) if answer is None else answer)

    def after(self, partition: int) -> None:
        assert self.core is not None
        owner = self.owners[partition]
        owner.collect(self.cluster_ms())
        self.finish(owner)
        grants, owner.grants = owner.grants, []
        serving = self.core.may_serve(partition, self.host.now_ms())
        for grant in grants:
            reply, _ = self.polls.pop((partition, owner.epoch, grant.token), (None, 0))
            if reply is None or not serving:
                if reply is not None:
                    reply.resolve(("moved", None))
                owner.delivery.release_all(receipts_of(grant.entries), self.cluster_ms())
            else:
                self.host.cover("granted_to_a_waiter")
                reply.resolve(self.rendered(partition, grant.entries))
        assert not owner.dead_letters, "the queues have no limit of deliveries"
        check(owner.delivery)
        if owner.has_gathered and not owner.in_flight:
            self.flush(partition)

    def flush(self, partition: int) -> None:
        assert self.core is not None
        owner = self.owners[partition]
        drafts, gathered = owner.gather(1 << 20)
        now_ms = self.cluster_ms()
        if not drafts:
            owner.proposed(gathered, 0, now_ms)
            self.after(partition)
            return
        outcome = self.core.propose(partition, drafts, self.host.now_ms())
        if not isinstance(outcome, Accepted):
            owner.refused(gathered, now_ms)
            self.finish(owner)
            return
        record = outcome.effects.persist[0]
        assert isinstance(record, AppendRecord)
        owner.proposed(gathered, outcome.first, now_ms)
        self.run(outcome.effects)

    def rendered(self, partition: int, taken: list[Taken]) -> list[dict[str, Any]]:
        entries = singly(taken)
        for entry in entries:
            if entry.attempt > 1:
                self.host.cover("redelivered")
        return [
            {
                "id": message_id(partition, entry.dot),
                "body": self.bodies[partition, *unpack_dot(entry.dot)][1].decode(),
                "receipt": str(Receipt(entry.epoch, entry.attempt)),
            }
            for entry in entries
        ]

    def on_timer(self, name: str) -> None:
        super().on_timer(name)
        assert self.core is not None
        now_ms = self.host.now_ms()
        for key, (reply, until_ms) in list(self.polls.items()):
            if now_ms >= until_ms:
                del self.polls[key]
                owner = self.owners.get(key[0])
                if owner is not None and owner.epoch == key[1]:
                    owner.delivery.cancel(key[2])
                reply.resolve([])
        for partition, owner in list(self.owners.items()):
            if owner.due(self.cluster_ms()) and self.core.may_serve(partition, now_ms):
                owner.tick(self.cluster_ms())
                self.after(partition)
            leases = owner.leases()
            if leases is not None:
                self.run(self.core.soft(partition, leases))

    # -- clients ---------------------------------------------------------------------------------

    def perform(self, partition: int, op: Operation, reply: Any) -> None:
        now_ms = self.host.now_ms()
        owner = self.owners.get(partition)
        if self.core is None or owner is None or not self.core.may_serve(partition, now_ms):
            other = None if self.core is None else self.core.owner(partition)
            reply.resolve(("moved", None if other == self.position else other))
            return
        self.tokens += 1
        token = self.tokens
        key = (partition, owner.epoch, token)
        answer: Any = None
        match op:
            case Produce():
                answer = owner.produce(token, op, self.cluster_ms(), self.host.wall_ms())
            case Settle() | SettleRuns():
                answer = owner.settle(token, op)
            case Configure():
                answer = owner.configure(token, op)
            case Nack():
                answer = owner.nack(op, self.cluster_ms())
            case Consume(queue, most, _, wait_ms, visibility_ms):
                taken = owner.delivery.take(queue, most, visibility_ms, self.cluster_ms())
                if taken or not wait_ms:
                    answer = self.rendered(partition, taken)
                else:
                    self.polls[key] = (reply, now_ms + wait_ms)
                    owner.delivery.wait(token, queue, most, visibility_ms)
                    self.after(partition)
                    return
            case _:
                raise AssertionError(op)
        if answer is not None:
            reply.resolve(answer)
        else:
            self.replies[key] = reply
        self.after(partition)


class DeliveryHarness(Stopping):
    """Clients that use everything the delivery machine offers."""

    causes = total_queue.CAUSES

    def build(self, host: Host) -> SimNode:
        return DeliveryNode(host, self)

    def begin(self) -> None:
        for partition in range(self.partitions):
            self.world.spawn(self.configure(partition))
        super().begin()

    async def configure(self, partition: int) -> None:
        """No dead letters, and settings that must survive."""
        changes = msgspec.json.encode({"max_deliveries": None, "visibility_ms": VISIBILITY_MS})
        op = Configure(f"q{partition}", changes)
        while not isinstance(await self.do(partition, op, 2_000), Answer):
            await self.world.sleep_ms(50)

    async def do(self, partition: int, op: Operation, within_ms: float) -> Any:
        return await self.ask(
            lambda node, reply: node.perform(partition, op, reply),
            self.world.clock.now_ms + within_ms,
        )

    async def produce(
        self, me: str, partition: int, bodies: tuple[str, ...], deadline_ms: float
    ) -> None:
        world, rng = self.world, self.world.rng
        dedupe = rng.random() < 0.5
        group = rng.choice((None, None, "g"))
        operation = world.history.invoke(me, "produce", key=f"q{partition}", argument=list(bodies))
        op = Produce(
            f"q{partition}",
            tuple(
                NewMessage(
                    body.encode(),
                    delay_ms=rng.choice((0, 0, 0, 300)),
                    priority=rng.choice((0, 0, 5)),
                    dedupe_id=body if dedupe else None,
                    group_id=group,
                )
                for body in bodies
            ),
            True,
        )
        answer = await self.do(partition, op, ANSWER_WITHIN_MS)
        for _ in range(4):
            if not dedupe or isinstance(answer, Answer):
                break
            # In doubt: the same id again, and it must be one message in the end.
            world.coverage.hit("deduped_retry")
            again = await self.do(partition, op, ANSWER_WITHIN_MS)
            answer = again if isinstance(again, Answer) else TIMED_OUT
        batch = {"batch": True}
        if isinstance(answer, Answer) and answer.status in (200, 201):
            if answer.status == 200:
                world.coverage.hit("deduped")
            world.history.ok(operation, json.loads(answer.body)["ids"], batch)
        elif isinstance(answer, tuple):
            world.history.fail(operation, info=batch)
        else:
            world.coverage.hit("produce_unknown")
            world.history.unknown(operation, batch)

    async def consume(self, me: str, partition: int, deadline_ms: float) -> list[dict[str, Any]]:
        world = self.world
        operation = world.history.invoke(
            me, "consume", key=f"q{partition}", argument={"visibility_ms": VISIBILITY_MS}
        )
        wait_ms = world.rng.choice((0, 0, 300))
        op = Consume(f"q{partition}", 2, True, wait_ms, VISIBILITY_MS)
        answer = await self.do(partition, op, ANSWER_WITHIN_MS)
        if not isinstance(answer, list):
            if isinstance(answer, tuple):
                world.history.fail(operation)
            else:
                world.history.unknown(operation)
            return []
        world.history.ok(operation, answer)
        kept = []
        for message in answer:
            name = parse_id(message["id"])
            assert name is not None
            if world.rng.random() < 0.1:
                world.coverage.hit("nacked")
                nack = world.history.invoke(me, "nack", key=f"q{partition}", argument=message["id"])
                back = Nack(partition, name.dot, message["receipt"], 50)
                reply = await self.do(partition, back, ANSWER_WITHIN_MS)
                if isinstance(reply, Answer) and reply.status == 200:
                    world.history.ok(nack)
                else:
                    world.history.unknown(nack)
            else:
                kept.append(message)
        return kept

    async def settle(self, me: str, partition: int, message_id: str, deadline_ms: float) -> None:
        world = self.world
        name = parse_id(message_id)
        assert name is not None
        operation = world.history.invoke(me, "ack", key=f"q{partition}", argument=message_id)
        answer = await self.do(partition, Settle(partition, (name.dot,), (None,)), ANSWER_WITHIN_MS)
        if isinstance(answer, Answer) and answer.status == 200:
            (status,) = results_decoder.decode(answer.body).statuses
            if status == 200:
                world.history.ok(operation)
            else:
                assert status == 409, f"{message_id} was issued and is unknown"
                world.history.fail(operation)
        elif isinstance(answer, tuple):
            world.history.fail(operation)
        else:
            world.coverage.hit("ack_unknown")
            world.history.unknown(operation)

    def leftovers(self, partition: int, state: PartitionState) -> list[str]:
        node = next(
            node
            for node in self.world.nodes.values()
            if isinstance(node, DeliveryNode) and partition in node.owners
        )
        return [
            message_id(partition, pack_dot(*dot))
            for dot in state.held.dots()
            if isinstance(decode(node.bodies[partition, *dot][0]), MessageMeta)
        ]


DELIVERY = Scenario(
    "delivery",
    nodes=("n1", "n2", "n3"),
    harness=DeliveryHarness,
    duration_ms=4_000,
    settle_ms=5_000,
    faults=Faults(
        crash=4, stop=1, pause=2, partition=2, isolate=2, one_way=2, power_cut=1, drift_ppm=2_000
    ),
    links=(PERFECT, LinkSettings(), ROUGH),
    wire=wire,
)
