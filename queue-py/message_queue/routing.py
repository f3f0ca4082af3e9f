"""From any node to the owner: the api's `Service`. Does it here, forwards it in one hop, or waits
for an owner; never longer than two seconds beyond what the client asked to wait."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import msgspec

from message_queue.api.keys import WrongNode
from message_queue.core.acks import shares, statuses_of
from message_queue.core.messages import RING_PARTITION
from message_queue.core.operations import (
    ANEW,
    IN_ORDER,
    Answer,
    ChangeRing,
    Configure,
    Consume,
    Direct,
    Extend,
    ListQueues,
    Nack,
    Operation,
    Peek,
    Produce,
    Redrive,
    Settle,
    SettleRuns,
    Show,
    certain_refusal,
    refusal,
    unknown_outcome,
)
from message_queue.core.placement.ring import PARTITIONS, partition_of
from message_queue.detours import ANSWER_S, NO_OWNER_S, Begun, Detours
from message_queue.hosting import Delivered
from message_queue.transport.forwards import Asked, Forwards, NotSent, OutcomeUnknown, PeerLost

if TYPE_CHECKING:
    from message_queue.node import Node

log = logging.getLogger(__name__)

FORWARD_S = ANSWER_S
"""How long an answer may take, beyond what the client asked to wait."""
_LOOK_AGAIN_S = 0.05
_LATE_S = 0.2
HANDOVER_S = 1.5
"""Longer than a partition needs to get a new owner, planned or not."""
MAX_CHAIN = 16
MAX_TOLD = 1024
_partition_of = lru_cache(maxsize=65536)(partition_of)


class Router:
    """One per node."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._loop = asyncio.get_running_loop()
        self.forwards = Forwards(node.send)
        self._detours = Detours(node, self._start, self.refuses_all)
        self._asked = 0
        # At the start all have been without one for ever.
        self._ownerless_since = dict.fromkeys(range(PARTITIONS), -math.inf)
        self._told: dict[str, int] = {}
        """Queue -> the owner that the log named last."""

    # ── one operation ───────────────────────────────────────────────────────────────────────────

    async def ask(self, operation: Operation, forward: bool = True) -> Answer:
        """See `api.keys.Service`."""
        return (await self._route(operation, forward)).answer

    async def consume(self, operation: Consume, forward: bool = True) -> Delivered:
        """See `api.keys.Service`."""
        return await self._route(operation, forward)

    def consume_now(self, operation: Consume) -> Delivered | None:
        """See `api.keys.Service`."""
        node = self._node
        host = node.hosts.get(_partition_of(operation.queue))
        if host is None or node.stopping or not node.may_serve(host.partition):
            return None
        return host.consume_now(operation)

    def begin(self, op: Direct, done: Callable[[Answer], None]) -> None:
        """See `api.keys.Service`."""
        partition = _partition_of(op.queue) if isinstance(op, Produce) else op.partition
        if partition >= PARTITIONS:
            done(refusal(404, "Message not found"))
            return
        self._asked += 1
        begun = Begun(self._detours, self._asked, op, partition, done, self._loop.time())
        if partition in self._detours.open:
            self._detours.add(begun)
        else:
            self._start(begun)

    def _start(self, begun: Begun) -> None:
        """Do it here or at the owner as known now."""
        node, op, partition = self._node, begun.op, begun.partition
        host = node.hosts.get(partition)
        if host is not None and not node.stopping and node.may_serve(partition):
            if self._detours.overtakes(partition, node.config.position):
                self._detours.add(begun)
                return
            if isinstance(op, Produce):
                self._tell(op.queue, partition, node.config.position)
            host.begin(op, begun)
            return
        position = node.replicator.owner(partition)
        if (
            position is None
            or position == node.config.position
            or self._detours.overtakes(partition, position)
        ):
            self._detours.add(begun)
            return
        if isinstance(op, Produce):
            self._tell(op.queue, partition, position)
        anew = self._detours.goes_to(begun, position)
        node.metrics.forwarded += 1
        if not self.forwards.begin(position, op, FORWARD_S, begun, ANEW if anew else IN_ORDER):
            begun(None)

    def refuses_all(self) -> str | None:
        """Why nothing is done here any more, if so."""
        if self._node.stopping:
            return "Node is stopping"
        return "Node has left the cluster" if self._node.keeper.departed else None

    def begin_here(self, op: Direct, done: Callable[[Answer | None], None]) -> None:
        """`here` for what needs no task."""
        node = self._node
        partition = _partition_of(op.queue) if isinstance(op, Produce) else op.partition
        host = node.hosts.get(partition)
        if host is None or node.stopping or not node.may_serve(partition):
            done(None)
        else:
            host.begin(op, done)

    async def _route(self, op: Operation, forward: bool) -> Delivered:
        loop = asyncio.get_running_loop()
        partition = target_of(op)
        if partition is None or (partition >= PARTITIONS and not isinstance(op, ChangeRing)):
            return Delivered(refusal(404, "Message not found"))
        wait_s = op.wait_ms / 1000 if isinstance(op, Consume) else 0.0
        began_s = loop.time()
        give_up_s = began_s + NO_OWNER_S
        while True:
            asked_s = loop.time()
            if asked_s - began_s < _LATE_S:
                delivered = await self._try(op, partition, forward, wait_s + FORWARD_S)
            else:
                # Part of the time went into waiting for an owner: only the rest is left.
                try:
                    async with asyncio.timeout_at(began_s + wait_s + FORWARD_S):
                        delivered = await self._try(op, partition, forward, wait_s + FORWARD_S)
                except TimeoutError:
                    return Delivered(unknown_outcome("No answer in time"))
            if delivered is not None:
                return delivered
            if (why := self.refuses_all()) is not None:
                return Delivered(certain_refusal(why))
            now_s = loop.time()
            if wait_s and now_s - asked_s > NO_OWNER_S / 2:
                # It stood in line somewhere until that owner went: patience begins anew.
                give_up_s = now_s + NO_OWNER_S
            if now_s >= give_up_s:
                if not forward:
                    raise WrongNode(None)
                return Delivered(certain_refusal("No quorum"))
            await self._owner_changed(min(_LOOK_AGAIN_S, give_up_s - now_s))
            if isinstance(op, Consume) and op.wait_ms:
                # A long poll that lost its owner goes on with what is left of its time.
                wait_s = max(0.0, wait_s - (loop.time() - began_s))
                began_s = loop.time()
                op = msgspec.structs.replace(op, wait_ms=int(wait_s * 1000))

    async def _try(
        self, op: Operation, partition: int, forward: bool, timeout_s: float
    ) -> Delivered | None:
        """Do it here or at the owner as known now. None: nothing was done, there is no owner."""
        node = self._node
        position = node.replicator.owner(partition)
        if isinstance(op, Produce) and position is not None:
            self._tell(op.queue, partition, position)
        delivered = await self.here(op)
        if delivered is not None:
            return delivered
        position = node.replicator.owner(partition)
        if position is None or position == node.config.position:
            return None
        if not forward:
            raise WrongNode(node.addresses.get(position))
        return await self._forward(position, op, timeout_s)

    def _tell(self, queue: str, partition: int, position: int) -> None:
        """Name a queue's owner in the log, once and whenever it changes."""
        if self._told.get(queue) == position:
            return
        if len(self._told) >= MAX_TOLD:
            self._told.clear()
        self._told[queue] = position
        mine = position == self._node.config.position
        log.info(
            "queue %s: partition %d, owner %s (%s)",
            queue,
            partition,
            self._node.addresses[position],
            "this node" if mine else "forwarding",
        )

    async def here(self, op: Operation) -> Delivered | None:
        """Do it if this node is the owner; None (and nothing done) if not."""
        node = self._node
        if isinstance(op, ListQueues):
            return Delivered(Answer(200, msgspec.json.encode(self._queues_here())))
        if isinstance(op, ChangeRing):
            changed = await node.keeper.change(op) if not node.stopping else None
            return Delivered(changed) if changed is not None else None
        partition = target_of(op)
        host = node.hosts.get(partition) if partition is not None else None
        if host is None or node.stopping or not node.may_serve(host.partition):
            return None
        if isinstance(op, Consume):
            return await host.consume(op)
        answer = await host.perform(op)
        return Delivered(answer) if answer is not None else None

    async def _forward(self, position: int, op: Operation, timeout_s: float) -> Delivered | None:
        self._node.metrics.forwarded += 1
        try:
            asked: Asked = await self.forwards.ask(position, op, timeout_s)
        except NotSent:
            return None
        except OutcomeUnknown as unknown:
            if isinstance(op, Consume) and isinstance(unknown, PeerLost):
                return None  # nothing was delivered: ask the next owner, or this one again
            return Delivered(unknown_outcome("No answer from the owner"))
        if asked.answer is None:
            return None
        leased = isinstance(op, Consume) and asked.answer.status == 200
        return Delivered(asked.answer, asked.undo if leased else None)

    async def _owner_changed(self, timeout_s: float) -> None:
        await self._node.changes(timeout_s)

    # ── operations on several partitions ────────────────────────────────────────────────────────

    async def ack(
        self, ids: Sequence[str], receipt: str | None, forward: bool = True
    ) -> list[int] | Answer:
        """See `api.keys.Service`."""
        its = shares(ids, receipt)
        asked = [self.ask(share.settle, forward) for share in its]
        answers = [await asked[0]] if len(asked) == 1 else await asyncio.gather(*asked)
        statuses = statuses_of(len(ids), zip(its, answers, strict=True))
        if isinstance(statuses, Answer):
            return statuses
        self._node.metrics.acked += statuses.count(200)
        return statuses

    async def configure(self, queue: str, changes: bytes, forward: bool = True) -> Answer:
        """See `api.keys.Service`."""
        wanted = msgspec.json.decode(changes, type=dict[str, Any])
        target = wanted.get("dead_letter")
        path = [queue]
        while target is not None:
            if target in path or len(path) > MAX_CHAIN:
                return refusal(400, "Dead letter cycle", field="dead_letter", path=[*path, target])
            path.append(target)
            shown = await self.ask(Show(target))
            if shown.status not in (200, 404):
                return shown
            settings = msgspec.json.decode(shown.body, type=dict[str, Any])["settings"]
            target = settings["dead_letter"]
        return await self.ask(Configure(queue, changes), forward)

    async def redrive(self, queue: str, most: int | None, forward: bool = True) -> Answer:
        """See `api.keys.Service`."""
        shown = await self.ask(Show(queue))
        if shown.status not in (200, 404):
            return shown
        target = msgspec.json.decode(shown.body, type=dict[str, Any])["settings"]["dead_letter"]
        if target is None:
            return await self.ask(Redrive(queue, None, most), forward)
        answer = await self.ask(Redrive(target, queue, most), forward)
        if answer.status == 200 and not msgspec.json.decode(answer.body)["messages"]:
            # Nothing of its own died: perhaps it is where others bury theirs.
            peeked = await self.ask(Peek(queue, 1))
            if peeked.status == 200 and any(
                "source_id" in message for message in msgspec.json.decode(peeked.body)["messages"]
            ):
                return await self.ask(Redrive(queue, None, most), forward)
        return answer

    async def show(self, queue: str) -> Answer:
        """See `api.keys.Service`."""
        shown = await self.ask(Show(queue))
        if shown.status != 200:
            return shown
        figures = msgspec.json.decode(shown.body, type=dict[str, Any])
        dead = figures["settings"]["dead_letter"]
        letters = await self.ask(Show(dead)) if dead is not None else None
        if letters is not None and letters.status not in (200, 404):
            return letters
        held = msgspec.json.decode(letters.body, type=dict[str, Any]) if letters else {}
        figures["dead"] = _held(held)
        figures |= self._where(figures["partition"])
        return Answer(200, msgspec.json.encode(figures))

    async def queues(self) -> dict[str, object]:
        """See `api.keys.Service`."""
        node = self._node
        others = [p for p in node.addresses if p != node.config.position]
        answers = await asyncio.gather(*(self._queues_of(position) for position in others))
        found = {str(q["queue"]): q for q in msgspec.json.decode(
            msgspec.json.encode(self._queues_here()), type=list[dict[str, Any]])}  # fmt: skip
        for queues in answers:
            found |= {str(q["queue"]): q for q in queues or ()}
        for figures in found.values():
            figures["dead"] = _held(found.get(figures["settings"]["dead_letter"], {}))
            figures |= self._where(figures["partition"])
        absent = [p for p in range(PARTITIONS) if node.replicator.owner(p) is None]
        complete = not absent and None not in answers
        return {"queues": [found[name] for name in sorted(found)], "complete": complete}

    async def _queues_of(self, position: int) -> list[dict[str, Any]] | None:
        try:
            asked = await self.forwards.ask(position, ListQueues(), FORWARD_S)
        except (NotSent, OutcomeUnknown):
            return None
        if asked.answer is None or asked.answer.status != 200:
            return None
        return msgspec.json.decode(asked.answer.body, type=list[dict[str, Any]])

    def _queues_here(self) -> list[dict[str, object]]:
        return [
            host.figures(name)
            for host in self._node.hosts.values()
            for name in host.owner.delivery.queue_names()
        ]

    # ── about the node ──────────────────────────────────────────────────────────────────────────

    def _where(self, partition: int) -> dict[str, object]:
        node = self._node
        position = node.replicator.owner(partition)
        return {
            "owner": node.addresses.get(position) if position is not None else None,
            "replicas": [
                node.addresses[p]
                for p in node.replicator.replicas(partition)
                if p in node.addresses
            ],
            "epoch": node.replicator.epoch(partition),
        }

    def ring(self, queue: str | None) -> dict[str, object]:
        """See `api.keys.Service`."""
        node = self._node
        ring = node.replicator.ring
        owners = (node.replicator.owner(p) for p in range(PARTITIONS))
        owned = Counter(position for position in owners if position is not None)
        one = [_partition_of(queue)] if queue is not None else range(PARTITIONS)
        found: dict[str, object] = {
            "version": ring.version,
            "virtual_nodes": ring.virtual_nodes,
            "replication_factor": ring.copies,
            "change": node.keeper.progress(),
            "nodes": node.keeper.described(owned),
            "partitions": [{"partition": p, **self._where(p)} for p in one],
        }
        if queue is not None:
            found["queue"] = queue
        return found

    def status(self) -> dict[str, object]:
        """See `api.keys.Service`."""
        node = self._node
        return {
            "id": node.config.node_id,
            "addr": str(node.config.addr),
            "position": node.config.position,
            "ring_version": node.replicator.ring.version,
            "left": node.keeper.departed,
            "ready": self.not_ready_because() is None,
            "incarnation": node.incarnation,
            "cluster_ms": node.cluster_ms(),
            "owned_partitions": len(node.hosts),
            "peers_connected": node.metrics.peers_connected,
            "messages": sum(h.owner.delivery.held for h in node.hosts.values()),
            "message_memory_bytes": node.memory.used,
            "disk": node.store.trouble.value if node.store.trouble else "ok",
            "storage": node.store.figures(),
        }

    def not_ready_because(self) -> str | None:
        """See `api.keys.Service`."""
        if self._node.stopping:
            return "stopping"
        if self._node.keeper.departed:
            return "this node has left the cluster"
        if not self._ownerless_since:
            return None
        now_s = asyncio.get_running_loop().time()
        absent = sum(now_s - since > HANDOVER_S for since in self._ownerless_since.values())
        if not absent:
            return None
        missing = self._missing_founders()
        return f"{absent} of {PARTITIONS} partitions have no owner" + (
            f"; a new cluster waits for {', '.join(missing)}" if missing else ""
        )

    def _missing_founders(self) -> list[str]:
        """Who has to come before a cluster that this node knows nothing of can be founded."""
        node = self._node
        ring = node.replicator.ring
        states = node.store.states
        if ring.version > 1 or any(states[p].promised for p in self._ownerless_since):
            return []
        absent = set(node.addresses) - node.links.connected - {node.config.position}
        return [node.addresses[p] for p in sorted(absent)]

    async def change_ring(self, join: bool, addr: str) -> Answer:
        """See `api.keys.Service`."""
        answer = await self.ask(ChangeRing(join, addr))
        if answer.status in (200, 202):
            await self._node.keeper.heard_of(answer)
        return answer

    @property
    def every_partition_is_served(self) -> bool:
        """As of the last look."""
        return not self._ownerless_since

    def watch_owners(self, now_s: float) -> None:
        """Note which partitions are without an owner, and since when. A planned hand-over leaves
        one alone for a moment: that is no reason to send clients away."""
        node = self._node
        since = self._ownerless_since
        for p in range(PARTITIONS):
            owner = node.replicator.owner(p)
            here = owner == node.config.position
            if owner is None or (here and (p not in node.hosts or not node.may_serve(p))):
                since.setdefault(p, now_s)
            else:
                since.pop(p, None)


def target_of(op: Operation) -> int | None:
    """The partition that an operation belongs to."""
    if isinstance(op, Settle | SettleRuns | Nack | Extend):
        return op.partition
    match op:
        case ListQueues():
            return None
        case ChangeRing():
            return RING_PARTITION
        case _:
            return _partition_of(op.queue)


def _held(figures: dict[str, Any]) -> int:
    return sum(int(figures.get(key, 0)) for key in ("ready", "in_flight", "delayed"))
